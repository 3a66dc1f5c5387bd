"""Text to numbers for ELMo: characters, vocabulary, the stream of training batches; and text files
to MindRecord.

    python data.py                       # no text? the docstrings of Python's own library
    python data.py --input news/         # tokenized text, one sentence a line
    python data.py --input book.txt --raw --build-vocab --vocab my_vocab

Read this                                        Skip on first reading
  1. Characters of a word                          5. Tokenization of prose
  2. Vocabulary                                    6. Text files
  3. Streams of text, cut into chunks              7. MindRecord files
  4. The distinct words of a chunk                 8. Command line
"""
import argparse
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

# MindSpore is imported where it is needed: --help and most mistakes need not wait for it. Its log
# repeats in ten lines the errors that we report in one.
os.environ.setdefault("GLOG_v", "4")


class InputError(ValueError):
    """A mistake that the user can correct: one line that names the file, the place, the remedy."""


# ---- 1. Characters: a word as the 50 numbers that the character CNN reads ------------------------

MAX_CHARS = 50  # characters a word, the marks of its begin and end included
# 0 to 255 are bytes
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING = 256, 257, 258, 259, 260


def char_ids(word):
    """The character ids of a word, int32 [50], as in bilm-tf: begin of word, at most 48 UTF-8
    bytes, end of word, padding. Ids are shifted by 1, so that 0 is left for positions without a
    word (see `batch_to_ids`)."""
    mark = {"<S>": BEGIN_SENTENCE, "</S>": END_SENTENCE}.get(word)
    codes = [mark] if mark else word.encode("utf-8", "ignore")[:MAX_CHARS - 2]
    ids = np.full(MAX_CHARS, PADDING, np.int32)
    ids[:len(codes) + 2] = [BEGIN_WORD, *codes, END_WORD]
    return ids + 1


char_bytes = functools.lru_cache(1 << 16)(lambda word: char_ids(word).tobytes())


def word_chars(words):
    """-> the character ids of words, int32 [words, 50], and how many of each are not padding."""
    ids = np.frombuffer(b"".join(map(char_bytes, words)), np.int32).reshape(-1, MAX_CHARS)
    return ids, np.count_nonzero(ids != PADDING + 1, axis=1)


def batch_to_ids(sentences):
    """Character ids of tokenized sentences (each some words): Tensor int32 [sentences, longest,
    50], 0 behind each. ValueError for what are no sentences."""
    import mindspore
    sentences = as_lists(sentences)
    ids = np.zeros((len(sentences), max(map(len, sentences), default=0), MAX_CHARS), np.int32)
    for sentence, words in zip(ids, sentences):
        sentence[:len(words)] = word_chars(words)[0]
    return mindspore.Tensor(ids)


def as_lists(sentences):
    """Sentences, in lists or whatever gives them one by one, as lists of words. ValueError where
    they are none: a string would be read as words of one letter."""
    lists = [words if isinstance(words, str) else list(words) for words in sentences]
    for words in lists:
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"give a list of lists of words, not {lists!r:.80}; split sentences")
    return lists


# ---- 2. Vocabulary: the words that the softmax can predict, the most frequent first --------------

SPECIAL = ("<S>", "</S>", "<UNK>")  # begin and end of a sentence, any word outside the vocabulary


class Vocabulary:
    """The words of a file, one a line; a word's id is its line, counted from 0. As in bilm-tf a
    line `!!!MAXTERMID` does not count, <S>, </S> and <UNK> may stand anywhere, and of a word that
    is repeated the last line holds. InputError where it is unusable."""

    def __init__(self, path):
        self.words = [line.strip() for line in open_text(path) if line.strip() != "!!!MAXTERMID"]
        self.index = {word: k for k, word in enumerate(self.words)}
        n_useless = len(self) - sum(word.split() == [word] for word in self.index)
        if 2 * n_useless > len(self) or not self.index.keys() >= {*SPECIAL}:
            raise InputError(f"{path}: one word a line, without counts, and <S>, </S> and <UNK> "
                             "among them, make a vocabulary; see --build-vocab")
        if n_useless:
            print(f"{path}: {n_useless:,} of {len(self):,} lines are blank, hold white space or "
                  "are repeated: they keep their numbers, but match no word", file=sys.stderr)
        self.unk = self.index["<UNK>"]
        self.checksum = zlib.crc32("\n".join(self.words).encode())  # tells vocabularies apart

    def __len__(self):
        return len(self.words)


# ---- 3. Streams: sentences packed end to end, read side by side, cut into chunks of time steps ---

class Chunk(NamedTuple):
    """What `batch_size` streams say in `unroll_steps` time steps. Direction 0 is forward; direction
    1 is backward, in its own reading order."""
    words: list              # the distinct words
    word_index: np.ndarray   # int32 [2, time, batch], which of them is read
    target: np.ndarray       # int32 [2, time, batch], the vocabulary id to predict from it
    valid: np.ndarray        # bool [time, batch], False where there is no more text
    reset_state: np.ndarray  # bool [batch], where the chunk starts at the start of a sentence
    position: np.ndarray     # int32 [2 + 2 · batch], where the streams stand after it


def both_directions(words):
    """A sentence of n words as n + 1 time steps: (word read forward, its target, word read
    backward, its target).

    "Given a sequence of N tokens, (t_1, t_2, ..., t_N), a forward language model computes the
    probability of the sequence by modeling the probability of token t_k given the history
    (t_1, ..., t_k-1) ... A backward LM is similar to a forward LM, except it runs over the sequence
    in reverse" (section 3.1).
    """
    forward = ["<S>", *words, "</S>"]
    backward = forward[::-1]
    return list(zip(forward, forward[1:], backward, backward[1:]))


def read_chunks(corpus, vocabulary, options, seed=None, position=None, rank=0, size=1):
    """Reads a corpus as `batch_size` streams; yields one `Chunk` after another.

    With a seed, the sentences are shuffled in each epoch, without end (bilm-tf shuffles files, and
    the sentences of each); without, they come once, in the corpus' order. Of `size` workers, each
    reads every size-th sentence of the order. `position` (of a chunk) says where to go on. Both
    directions read the same sentences (bilm-tf: each from a stream of its own).
    """
    n_streams, n_steps = options.batch_size, options.unroll_steps
    if position is None:
        position = np.zeros(2 + 2 * n_streams, np.int32)
    epoch, n_read = position[:2].tolist()
    # What is left of a stream is always the end of one sentence: which, and how many time steps
    # (at first none of sentence 0).
    records, n_left = position[2:].reshape(2, -1).tolist()
    streams = [both_directions(words)[len(words) + 1 - n:]
               for words, n in zip(corpus.read(records), n_left)]
    sentences = read_epochs(corpus, seed, epoch, n_read, rank, size)
    while True:
        valid, steps = np.zeros((n_streams, n_steps), bool), []
        for k, stream in enumerate(streams):
            while len(stream) < n_steps:
                sentence = next(sentences, None)
                if sentence is None:
                    break
                epoch, n_read, records[k], words = sentence
                stream += both_directions(words)
            valid[k, :len(stream)] = True
            steps += stream[:n_steps]
            steps += [("<S>",) * 4] * (n_steps - len(stream))  # not valid: any word will do
            del stream[:n_steps]
        if not valid.any():
            return
        forward, forward_target, backward, backward_target = zip(*steps)  # [streams · steps] each
        index = {}
        word_index = [index.setdefault(word, len(index)) for word in forward + backward]
        target = [vocabulary.index.get(word, vocabulary.unk)
                  for word in forward_target + backward_target]
        word_index, target = (
            np.reshape(x, (2, n_streams, n_steps)).swapaxes(1, 2).astype(np.int32, "C")
            for x in (word_index, target))  # [2, time, batch]
        position = np.array([epoch, n_read, *records, *map(len, streams)], np.int32)
        reset_state = word_index[0, 0] == index.get("<S>", -1)
        yield Chunk(list(index), word_index, target, valid.T, reset_state, position)


def read_epochs(corpus, seed, epoch, n_read, rank, size):
    """Yields (epoch, how many sentences of it are read, the last one's number, its words), one
    epoch after the other, from where n_read sentences of an epoch are read."""
    for epoch in [epoch] if seed is None else itertools.count(epoch):
        order = np.arange(corpus.sentences, dtype=np.int32)
        if seed is not None:
            np.random.default_rng([seed, epoch]).shuffle(order)
        order = order[rank::size][n_read:]
        for n_read, (record, words) in enumerate(zip(order, corpus.read(order)), n_read + 1):
            yield epoch, n_read, int(record), words
        n_read = 0


def prefetch(items, make, n_ahead=4):
    """make(item) for each item, in their order, made by threads while the caller computes;
    exceptions come through."""
    with concurrent.futures.ThreadPoolExecutor(2) as makers:
        waiting = collections.deque()
        for item in items:
            waiting.append(makers.submit(make, item))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        for made in waiting:
            yield made.result()


# ---- 4. The distinct words of a chunk, in tiers of length ----------------------------------------
# A chunk of 2 × 2,560 words has some 1,600 different ones: each is encoded once. Most are short,
# and the CNN need not look at all their padding; but a static graph needs the same shapes in every
# step. So there is fixed room for words of a few lengths: tiers = ((number of words, their
# characters at most), ...), the last of full length.

def measure_tiers(chunks):
    """The tiers that the first chunks of an iterable need, with spare room. The limits between them
    are quantiles of the words' lengths; any limits are exact, these waste little, and few make a
    small graph."""
    of_chunks = [word_chars(chunk.words)[1] for chunk in itertools.islice(chunks, 20)]
    lengths = np.concatenate(of_chunks)
    limits = sorted({*map(int, np.quantile(lengths, (0.6, 0.97))), MAX_CHARS})
    tier = np.searchsorted(limits, lengths)  # the shortest that a word fits; a longer one will do
    n_words = np.bincount(tier, minlength=len(limits)) / len(of_chunks)
    room = n_words + 2 * np.sqrt(n_words) + 12
    return tuple(zip(room.astype(int).tolist(), limits))


def fill_tiers(tiers, words, word_index):
    """-> chars int32 [rows, 50]: the characters of the words, each in a row of a tier that it fits;
    and `word_index` with the words' rows. The rows that are left over come first. Words that find
    no room get 256 rows more of full length, as often as needed."""
    chars, lengths = word_chars(words)
    order = np.argsort(lengths, kind="stable")  # the longest words in the last rows
    room = np.repeat([limit for _, limit in tiers], [n for n, _ in tiers])
    while len(words) > len(room) or (lengths[order] > room[len(room) - len(words):]).any():
        room = np.append(room, np.full(256, MAX_CHARS))  # many at once, as each shape is compiled
    n_free = len(room) - len(words)
    row = (n_free + np.argsort(order)).astype(np.int32)
    return np.pad(chars[order], ((n_free, 0), (0, 0))), row[word_index]


# ---- 5. Tokenization of prose --------------------------------------------------------------------

# What a word is made of: everything but white space and punctuation. (Python's \w lacks the vowel
# signs of Indic scripts.) The zero-width (non-)joiners that Persian needs stay in a word.
W = (r"[^\s!-/:-@\[-^`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7"
     r"\u055d-\u055f\u0589\u060c\u061b\u061f\u0964\u0965\u200b\u200e-\u206f\u20a0-\u20cf"
     r"\u2190-\u2bff\u3000-\u3004\u3007-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
     r"\uff5b-\uff65]")
CLITIC = rf"(?i:s|m|d|ll|re|ve)(?!{W})"
TOKEN = re.compile("|".join((
    r"(?:[a-zA-Z]{2,16}://|www\.)[^\s<>\"]*[\w/]",                    # http://x.org/a?b=c
    rf"{W}[\w.+-]{{0,63}}@[\w-]+(?:\.[\w-]+)+",                      # name@example.org
    rf"(?:[^\W\d_]\.){{2,}}(?!-?{W})",                               # U.S. e.g. a.m.
    rf"(?:Mrs?|Ms|Dr|Prof|St|Gen|Gov|Sen|Rep|Lt|Col|Capt|Sgt|Rev|Hon|[JS]r|Inc|Corp|Co|Ltd|Bros|vs"
    rf"|etc|cf|al|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec|Mt|Ft|Ph\.D|M\.D|No(?=\.\s*\d))\.(?!-?{W})",
    r"[A-HJ-Z]\.(?=\s+\S)",                                         # J. Smith, but not: plan B.
    rf"{W}+?(?=(?i:n['’]t)(?!{W}))|(?i:n['’]t)(?!{W})|['’]{CLITIC}",  # ca|n't, it|'s
    rf"(?<!\S)[-+](?=\d){W}+(?:[.,:]\d+)*",                          # -3.5
    # well-known 1,000 O'Neil U.S.-led
    rf"{W}+(?:(?:\.?-|[./&]|['’](?!{CLITIC})|(?<=\d)[,:](?=\d)){W}+)*",
    r"\.{2,}|-{2,}|={2,}|\*{2,}|~{2,}",                              # ... --
    r"\S")))                                                        # punctuation by itself
SENTENCE_END = re.compile(r"[.!?…。！？।؟]|\.{3,}|etc\.|[ap]\.m\.")
CLOSING = frozenset(")]}’”»」』）")


def tokenize(text):
    """The words of a text in the manner of the Penn Treebank (but quotes stay as they are), a list
    of str.

    Tokenized text stays as it is. Scripts without spaces are divided at punctuation only.
    """
    return TOKEN.findall(text)


def split_sentences(words):
    """Cuts a paragraph's words into sentences; yields lists of str.

    A sentence ends at . ! ? and the quotes and brackets that close after it, unless the next word
    is in lower case. An abbreviation keeps its period and ends no sentence, but etc., a.m. and p.m.
    do.
    """
    sentence, ended = [], False
    for word in words:
        is_quote = word in ('"', "'") and sentence.count(word) % 2 == 1
        closes = word in CLOSING or is_quote
        if ended and not closes and not word[0].islower():
            yield sentence
            sentence = []
        sentence.append(word)
        ended = SENTENCE_END.fullmatch(word) is not None or ended and closes
    if sentence:
        yield sentence


# ---- 6. Text files: from paths to sentences ------------------------------------------------------

def open_text(path):
    """Yields the lines of a UTF-8 file. InputError where it is no such text."""
    longest = 1 << 18  # characters, so that memory stays bounded
    # What is not UTF-8 is read as lone surrogates.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(iter(lambda: file.readline(longest), ""), 1):
            if re.search("[\0\udc80-\udcff]", line):
                raise InputError(f"{path}: line {number} is not UTF-8 text; convert or unpack it")
            if len(line) == longest:
                raise InputError(f"{path}: line {number} has {longest:,} characters or more; "
                                 "divide it, for example with: fold -s -w 50000")
            yield line


def text_files(paths):
    """The files that --input names, and those in folders that it names, hidden ones left out."""
    for path in paths:
        os.stat(path)  # an error where it does not exist
        inside = [file for file in sorted(Path(path).rglob("*")) if file.is_file()
                  and not re.search(r"(^|/)\.", str(file.relative_to(path)))]
        if not inside and os.path.isdir(path):
            raise InputError(f"{path}: a folder without files (hidden ones are left out)")
        yield from inside or [path]


def docstring_lines():
    """The lines of the docstrings of Python's standard library: English that every installation
    carries."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if not left_out.intersection(path.relative_to(library).parts):
            for text in re.findall('(?s)"""(.*?)"""', path.read_text("utf-8", "ignore")):
                text = re.sub(r"(?ms)^ *>>>.*?(\n *\n|\Z)", "\n", text)  # examples
                text = re.sub(r"(?m)^\W+$", "", text)  # underlines of headings
                yield from [*text.split("\n"), ""]


def read_sentences(files, raw):
    """The sentences of text files, or of the docstrings where there are none; yields lists of str.
    The text is tokenized, one sentence a line, or, where raw, prose in paragraphs."""
    if raw or not files:
        lines = itertools.chain.from_iterable(itertools.chain(open_text(f), [""]) for f in files)
        paragraph = ""
        for line in lines if files else docstring_lines():
            if not line.strip() or len(paragraph) > 1 << 16:  # a blank one ends each file, too
                yield from split_sentences(tokenize(paragraph))
                paragraph = ""
            paragraph += line + " "
        return
    for file in files:
        for number, line in enumerate(open_text(file), 1):
            words = line.split()
            if len(words) > 10_000:
                raise InputError(f"{file}: line {number} has {len(words):,} words; give a sentence "
                                 "a line, or divide it: fold -s -w 50000")
            if words:  # bilm-tf trains on a blank line as <S> </S>
                yield words


@contextlib.contextmanager
def written(path):
    """A name to write a file under: its own, in a hidden folder beside it. In the end it is moved
    to its place, whole, and so is what was written with it (a MindRecord's .db)."""
    path = Path(path)
    drafts = path.with_name(f".{path.name}.part")
    shutil.rmtree(drafts, ignore_errors=True)  # of a program that was killed
    try:
        drafts.mkdir()
        yield str(drafts / path.name)
        for draft in sorted(drafts.iterdir(), reverse=True):  # the .db first
            os.replace(draft, path.with_name(draft.name))
    except (OSError, RuntimeError) as error:  # MindSpore's
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path}: could not be written: {reason}") from None
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def write_lines(path, lines):
    with written(path) as draft, open(draft, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def check_outputs(outputs, inputs, overwrite):
    """InputError unless each output can be written without harm: over a file that exists only if
    that is asked for, and never over an input of the same command or another output."""
    taken = set(map(os.path.realpath, inputs))
    for path in outputs:
        real = os.path.realpath(path)
        if real in taken:
            raise InputError(f"{path}: is an input or another output of this command; choose "
                             "another name")
        taken.add(real)
        if os.path.exists(path) and not (overwrite and os.path.isfile(path)):
            raise InputError(f"{path}: exists; choose another name or say --overwrite")


# ---- 7. MindRecord files: one record a sentence, its text ----------------------------------------
# MindSpore reads wrong text from a damaged file, or crashes, and looks for a renamed one under its
# old name. So what it wrote is followed by 16 bytes, the totals, which it does not mind, and by a
# CRC-32 of the file's name, the .db and all before. Then the CRC-32 of all is the same number
# always.
WHOLE = 0x2144df1c


def checksum(path):
    """The CRC-32 of a MindRecord's name, its .db and the file itself."""
    crc = zlib.crc32(os.fsencode(os.path.basename(path)))
    for name in (path + ".db", path):
        with open(name, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                crc = zlib.crc32(block, crc)
    return crc


class Writer:
    """Writes sentences to a MindRecord file, 2,000 at a time: MindRecord is slow at single ones."""

    def __init__(self, path):
        from mindspore.mindrecord import FileWriter
        self.path, self.waiting, self.sentences, self.tokens = path, [], 0, 0
        self.file = FileWriter(path)
        self.file.set_page_size(1 << 21)  # not 32 MB: MindRecord holds a page's index in memory
        self.file.add_schema({"text": {"type": "bytes"}}, "sentences")  # a str is in the index, too

    def add(self, text, n_tokens):
        """Writes a sentence, its tokens joined by spaces."""
        if len(self.waiting) == 2000:
            self.file.write_raw_data(self.waiting)
            self.waiting = []
        self.waiting.append({"text": text})
        self.sentences += 1
        self.tokens += n_tokens

    def finish(self):
        if not self.waiting:
            name = os.path.basename(self.path)
            raise InputError(f"{name}: no sentence for it; give more text")
        self.file.write_raw_data(self.waiting)
        self.file.commit()
        totals = np.array([self.sentences, self.tokens], np.int64).tobytes()
        crc = zlib.crc32(totals, checksum(self.path))
        with open(self.path, "ab") as file:
            file.write(totals + crc.to_bytes(4, "little"))


class Corpus:
    """A MindRecord from `Writer`, opened for reading; InputError where it is missing, damaged,
    renamed or foreign. It is read once, to compare its checksum: seconds for gigabytes."""
    CHUNK = 1 << 16  # records; MindSpore opens the file again for each chunk

    def __init__(self, path):
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file; data.py writes it")
        if checksum(path) != WHOLE:
            raise InputError(f"{path}: it or its .db is damaged, renamed or not from this version "
                             "of data.py; give both their old names, or convert the text again")
        with open(path, "rb") as file:
            file.seek(-20, os.SEEK_END)
            self.sentences, self.tokens = np.frombuffer(file.read(16), np.int64).tolist()
            self.checksum = file.read().hex()
        self.path = path

    def read(self, records):
        """Yields the sentences of these numbers, in their order, each a list of words."""
        from mindspore.dataset import MindDataset, SubsetSampler
        n = min(self.CHUNK, self.sentences)  # it refuses more numbers than there are records
        for first in range(0, len(records), n):
            sampler = SubsetSampler(records[first:first + n])
            try:
                chunk = MindDataset(self.path, ["text"], 2, sampler=sampler)
                for text, in chunk.create_tuple_iterator(num_epochs=1, output_numpy=True):
                    yield text.tobytes().decode().split()
            except (RuntimeError, ValueError):  # MindSpore's message is many lines
                raise InputError(f"{self.path}: can no longer be read; was it moved?") from None


# ---- 8. Command line -----------------------------------------------------------------------------

def positive(text):
    """The type of arguments that are whole numbers from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def run_program(program, command):
    """Runs a program's command -> the exit status. A mistake of the user is one line on standard
    error."""
    try:
        command()
        return 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
        if "://" in str(error.filename):
            message += "; download it first"
    except (InputError, RuntimeError) as error:  # MindSpore's: its first line
        message = str(error).strip().partition("\n")[0]
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


def with_progress(items, what, total=None):
    """Passes items on; every ten seconds prints how many they were and how long the rest takes."""
    began = last = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now > last + 10:
            left = ""
            if total:
                left = f" of {max(n, total):,}, {max(0, total - n) * (now - began) / n:,.0f} s left"
            print(f"{what}: {n:,}{left}", file=sys.stderr, flush=True)
            last = now


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="data.py", allow_abbrev=False,
        description="Convert text to the MindRecord file that elmo.py trains from.")
    add = parser.add_argument
    add("--input", "--input_file", nargs="+", action="extend", default=[],
        help="files and folders; UTF-8, one sentence a line, white space between tokens (default: "
             "the docstrings of Python's library, and --heldout heldout.mindrecord)")
    add("--raw", action="store_true", help="the input is prose: find sentences and words")
    add("--output", "--output_file", default="train.mindrecord",
        help="file to write, and FILE.db, which belongs to it (default: %(default)s)")
    add("--heldout", help="another such file, for sentences that are kept apart")
    add("--heldout-share", type=float, default=0.01,
        help="share of the sentences that are kept apart, by a hash of their text (default: "
             "%(default)s)")
    add("--vocab", "--vocab_path",
        help="vocabulary, one word a line (default: ./vocab, else the one beside data.py)")
    add("--build-vocab", action="store_true",
        help="write the vocabulary, too: the input's words by frequency, those kept apart not "
             "counted")
    add("--min-count", type=positive, default=3,
        help="of words that occur at least N times (default: %(default)s)")
    add("--max-vocab", type=positive, help="and of these the N most frequent")
    add("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    if not 0 < args.heldout_share < 1:
        parser.error("--heldout-share X: between 0 and 1")
    if not args.input and not args.heldout:
        args.heldout = "heldout.mindrecord"
    if not args.vocab:
        beside = str(Path(__file__).with_name("vocab"))
        args.vocab = "vocab" if args.build_vocab or os.path.exists("vocab") else beside
    return args


def convert(args):
    """Does what the command line asks for."""
    files = list(text_files(args.input))
    records = [path for path in (args.output, args.heldout) if path]
    inputs, outputs = [*files], [path + end for path in records for end in ("", ".db")]
    (outputs if args.build_vocab else inputs).append(args.vocab)
    check_outputs(outputs, inputs, args.overwrite)
    vocabulary = None if args.build_vocab else Vocabulary(args.vocab)
    share = args.heldout_share if args.heldout else 0
    counts = collections.Counter()  # of words that training reads
    with contextlib.ExitStack() as stack:  # at its end the files take their places
        writers = [Writer(stack.enter_context(written(path))) for path in records]
        for words in with_progress(read_sentences(files, args.raw), "sentences"):
            text = " ".join(words).encode()
            part = zlib.crc32(text) < share * 2 ** 32  # so that equal sentences go the same way
            writers[part].add(text, len(words))
            if part == 0:
                counts.update(words if vocabulary is None
                              else filter(vocabulary.index.__contains__, words))
        for writer in writers:
            writer.finish()
        if vocabulary is None:
            write_vocabulary(counts, args.vocab, args.min_count, args.max_vocab)
            vocabulary = Vocabulary(args.vocab)
    for path, writer in zip(records, writers):
        print(f"{path}: {writer.sentences:,} sentences, {writer.tokens:,} tokens")
    known = sum(counts[word] for word in vocabulary.index)
    print(f"{args.vocab}: {len(vocabulary):,} words, among them {known / writers[0].tokens:.2%} of "
          f"the tokens of {args.output}")
    order = frequency_order(np.array([counts[word] for word in vocabulary.words
                                      if word not in SPECIAL]))
    if order < 0.4:
        print(f"WARNING: {args.vocab} is not in the order of frequency of this text (score "
              f"{order:.2f}; the best order has 1, a random one 0).\nWARNING: The sampled softmax "
              "takes the first words to be the most frequent, and would train poorly. Sort them or "
              "use --build-vocab.", file=sys.stderr)


def write_vocabulary(counts, path, min_count, max_words):
    """Writes the words of a Counter to a file, by falling count, then in code-point order."""
    frequent = [word for word, n in counts.items() if n >= min_count and word not in SPECIAL]
    if not frequent:
        raise InputError(f"--min-count {min_count}: no word is that frequent; lower it")
    frequent.sort(key=lambda word: (-counts[word], word))
    write_lines(path, [*SPECIAL, *frequent[:max_words]])


def frequency_order(counts):
    """How well a vocabulary is in the order of these counts: 1 perfectly, 0 not at all, below 0
    reversed.

    The sampled softmax draws negatives log-uniformly by rank, so what matters is the logarithm of
    the rank: its mean over the corpus is compared with the best possible order (1) and with a
    random one (0). English in a good order scores above 0.5 from three sentences on, in
    alphabetical order below 0.3.
    """
    log_rank = np.log(np.arange(2, len(counts) + 2))
    saved = log_rank.mean() - log_rank  # by a word that has this rank, and not a random one
    most = saved @ np.sort(counts)[::-1]
    return saved @ counts / most if most else 1.0


def main(argv=None):
    """Runs the command line -> the exit status."""
    return run_program("data.py", lambda: convert(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
