"""Text to numbers for ELMo: characters, vocabulary, the stream of training batches; and text files to MindRecord.

    python data.py                               # no text? the docstrings of Python's own library
    python data.py --input news/*.txt            # tokenized text, one sentence a line
    python data.py --input book.txt --raw --build-vocab --vocab my_vocab --heldout heldout.mindrecord

Read this                                        Skip on first reading
  1. Characters of a word                          5. Tokenization of prose
  2. Vocabulary                                    6. Text files
  3. Streams of text, cut into chunks              7. MindRecord files
  4. The distinct words of a chunk                 8. Command line
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import glob
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from typing import NamedTuple

import numpy as np

# MindSpore is imported where it is needed: --help and most mistakes need not wait for it. Its log repeats in ten
# lines the errors that we report in one.
os.environ.setdefault("GLOG_v", "4")


class InputError(ValueError):
    """A mistake that the user can correct: one line that names the file, the place and the remedy."""


# ---- 1. Characters: a word as the 50 numbers that the character CNN reads ------------------------------------------

MAX_CHARS = 50  # characters a word, the marks of its begin and end included
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING = 256, 257, 258, 259, 260  # 0 to 255 are bytes


def char_ids(word):
    """The character ids of a word, int32 [50], as in bilm-tf: begin of word, at most 48 UTF-8 bytes, end of word,
    padding. Ids are shifted by 1, so that 0 is left for positions without a word (see `batch_to_ids`)."""
    mark = {"<S>": BEGIN_SENTENCE, "</S>": END_SENTENCE}.get(word)
    codes = [mark] if mark else word.encode("utf-8", "ignore")[:MAX_CHARS - 2]
    ids = np.full(MAX_CHARS, PADDING, np.int32)
    ids[:len(codes) + 2] = [BEGIN_WORD, *codes, END_WORD]
    return ids + 1


def batch_to_ids(sentences):
    """Character ids of tokenized sentences (lists of words): Tensor int32 [sentences, longest, 50], 0 behind each."""
    check_sentences(sentences)
    import mindspore
    ids = np.zeros((len(sentences), max(map(len, sentences), default=0), MAX_CHARS), np.int32)
    for sentence, words in zip(ids, sentences):
        sentence[:len(words)] = word_chars(words)[0]
    return mindspore.Tensor(ids)


def check_sentences(sentences):
    """ValueError unless they are a list of lists of words; a string would be read as words of one letter."""
    if isinstance(sentences, str) or any(isinstance(words, str) or not all(isinstance(word, str) for word in words)
                                         for words in sentences):
        raise ValueError(f"give a list of lists of words, not {sentences!r:.80}; split sentences first")


# ---- 2. Vocabulary: the words that the softmax can predict, the most frequent first --------------------------------

SPECIAL = ("<S>", "</S>", "<UNK>")  # begin and end of a sentence, any word outside the vocabulary
UNK = SPECIAL.index("<UNK>")


class Vocabulary:
    """The words of a file, one a line; a word's id is its line, counted from 0. InputError where it is unusable."""

    def __init__(self, path):
        self.words = [line.rstrip("\r\n") for line in open_text(path)]
        if tuple(self.words[:3]) != SPECIAL:
            raise InputError(f'{path}: lines 1 to 3 must be {" ".join(SPECIAL)}; use --build-vocab')
        self.index = {}
        for line, word in enumerate(self.words, 1):
            if word.split() != [word]:
                raise InputError(f"{path}: line {line} is blank or holds white space; remove it")
            if word in self.index:
                raise InputError(f"{path}: line {line} repeats {word!r} of line {self.index[word] + 1}; remove it")
            self.index[word] = line - 1

    def __len__(self):
        return len(self.words)


# ---- 3. Streams: sentences packed end to end, read side by side, cut into chunks of time steps ---------------------

class Chunk(NamedTuple):
    """What `batch_size` streams say in `unroll_steps` time steps. Direction 0 is forward; direction 1 is backward, in
    its own reading order."""
    words: list              # the distinct words
    word_index: np.ndarray   # int32 [2, time, batch], which of them is read
    target: np.ndarray       # int32 [2, time, batch], the vocabulary id to predict from it
    valid: np.ndarray        # bool [time, batch], False where there is no more text
    reset_state: np.ndarray  # bool [batch], where the chunk starts at the start of a sentence
    position: np.ndarray     # int32 [2 + 2 · batch], where the streams stand after it, to resume from


def both_directions(words):
    """A sentence of n words as n + 1 time steps: (word read forward, its target, word read backward, its target).

    "A forward language model computes the probability of the sequence by modeling the probability of token t_k given
    the history ... A backward LM is similar ..., except it runs over the sequence in reverse" (section 3.1).
    """
    forward = ["<S>", *words, "</S>"]
    backward = forward[::-1]
    return list(zip(forward, forward[1:], backward, backward[1:]))


def read_chunks(corpus, vocabulary, options, seed=None, position=None, rank=0, size=1):
    """Reads a corpus as `batch_size` streams; yields one `Chunk` after another.

    With a seed, the sentences are shuffled in each epoch, without end; without, they come once, in the corpus' order.
    Of `size` workers, each reads every size-th sentence of the order. `position` (of a chunk) says where to go on.
    bilm-tf reads the backward direction from a stream of its own; here both directions read the same sentences.
    """
    n_streams, n_steps = options.batch_size, options.unroll_steps
    position = np.zeros(2 + 2 * n_streams, np.int32) if position is None else position
    (epoch, n_read), (records, n_left) = position[:2].tolist(), position[2:].reshape(2, -1).tolist()
    # Of each stream: the steps that are left of its last sentence.
    streams = [steps[len(steps) - n:] for n, steps in zip(n_left, map(both_directions, corpus.read(records)))]
    sentences = read_epochs(corpus, seed, epoch, n_read, rank, size)
    while True:
        valid, steps = np.zeros((n_streams, n_steps), bool), []
        for k, stream in enumerate(streams):
            while len(stream) < n_steps and (sentence := next(sentences, None)):
                epoch, n_read, records[k], words = sentence
                stream += both_directions(words)
            valid[k, :len(stream)] = True
            steps += stream[:n_steps] + [("<S>",) * 4] * (n_steps - len(stream))  # not valid: any word will do
            del stream[:n_steps]
        if not valid.any():
            return
        forward, forward_target, backward, backward_target = zip(*steps)  # [streams · steps] each
        index = {}
        word_index = [index.setdefault(word, len(index)) for word in forward + backward]
        target = [vocabulary.index.get(word, UNK) for word in forward_target + backward_target]
        word_index, target = (np.reshape(x, (2, n_streams, n_steps)).swapaxes(1, 2).astype(np.int32, "C")
                              for x in (word_index, target))
        yield Chunk(list(index), word_index, target, valid.T, word_index[0, 0] == index.get("<S>", -1),
                    np.array([epoch, n_read, *records, *map(len, streams)], np.int32))


def read_epochs(corpus, seed, epoch, n_read, rank, size):
    """Yields (epoch, how many sentences of it are read, the last one's number, its words), one epoch after the other,
    from where n_read sentences of an epoch are read."""
    for epoch in [epoch] if seed is None else itertools.count(epoch):
        n = corpus.sentences
        order = np.arange(n) if seed is None else np.random.default_rng([seed, epoch]).permutation(n)
        order = order[rank::size][n_read:]
        for n_read, (record, words) in enumerate(zip(order.tolist(), corpus.read(order)), n_read + 1):
            yield epoch, n_read, record, words
        n_read = 0


def prefetch(items, make, n_ahead=4):
    """make(item) for each item, in their order, made by threads while the caller computes; exceptions come through."""
    items, end = iter(items), object()

    def make_next():
        item = reader.submit(next, items, end)
        return makers.submit(lambda: end if item.result() is end else make(item.result()))

    with concurrent.futures.ThreadPoolExecutor(1) as reader, concurrent.futures.ThreadPoolExecutor(2) as makers:
        waiting = collections.deque(make_next() for _ in range(n_ahead))
        while (made := waiting.popleft().result()) is not end:
            waiting.append(make_next())
            yield made


# ---- 4. The distinct words of a chunk, in tiers of length ----------------------------------------------------------
# A chunk of 2 × 2,560 words has some 1,600 different ones: each is encoded once. Most are short, and the CNN need not
# look at all their padding; but a static graph needs the same shapes in every step. So there is fixed room for words
# of a few lengths: tiers = ((number of words, their characters at most), ...), the last of full length.

def measure_tiers(chunks):
    """The tiers that the first chunks of an iterable need, with spare room. The limits between them are quantiles of
    the words' lengths; any limits are exact, these waste little."""
    of_chunks = [word_chars(chunk.words)[1] for chunk in itertools.islice(chunks, 20)]  # the lengths of each
    limits = sorted({*map(int, np.quantile(np.concatenate(of_chunks), (0.4, 0.75, 0.95, 0.995))), MAX_CHARS})
    # A word may stand in any tier that is long enough: what counts is how many words are longer than a limit.
    n_longer = np.mean([[(lengths > limit).sum() for limit in [0, *limits[:-1]]] for lengths in of_chunks], axis=0)
    n_longer = [*(n_longer + 4 * np.sqrt(n_longer) + 12).astype(int).tolist(), 0]
    return tuple((more - fewer, limit) for more, fewer, limit in zip(n_longer, n_longer[1:], limits) if more > fewer)


def fill_tiers(tiers, words, word_index):
    """-> chars int32 [rows, 50]: the characters of the words, each in a row of a tier that it fits; and `word_index`
    with the words' rows. The rows that are left over come first. Words that find no room get 256 rows more of full
    length, as often as needed."""
    chars, lengths = word_chars(words)
    order = np.argsort(lengths, kind="stable")
    room = np.repeat([limit for _, limit in tiers], [n for n, _ in tiers])
    while len(words) > len(room) or (lengths[order] > room[len(room) - len(words):]).any():
        room = np.append(room, np.full(256, MAX_CHARS))  # a step of 256, since each new shape is compiled
    n_free = len(room) - len(words)
    row = (n_free + np.argsort(order)).astype(np.int32)  # the longest words in the last rows
    return np.pad(chars[order], ((n_free, 0), (0, 0))), row[word_index]


def word_chars(words):
    """-> the characters of words, int32 [words, 50], and how many of each are not padding."""
    chars = np.frombuffer(b"".join(map(char_bytes, words)), np.int32).reshape(-1, MAX_CHARS)
    return chars, np.count_nonzero(chars != PADDING + 1, axis=1)


char_bytes = functools.lru_cache(1 << 16)(lambda word: char_ids(word).tobytes())  # words recur from chunk to chunk


# ---- 5. Tokenization of prose --------------------------------------------------------------------------------------

# What a word is made of: everything but white space and punctuation. (Python's \w lacks the vowel signs of Indic
# scripts.) The zero-width (non-)joiners that Persian needs stay in a word.
W = (r"[^\s!-/:-@\[-^`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u055d-\u055f"
     r"\u0589\u060c\u061b\u061f\u0964\u0965\u200b\u200e-\u206f\u20a0-\u20cf\u2190-\u2bff\u3000-\u3004"
     r"\u3007-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
CLITIC = rf"(?i:s|m|d|ll|re|ve)(?!{W})"
TOKEN = re.compile("|".join((
    rf"(?:[a-zA-Z]{{2,16}}://|www\.)[^\s<>\"]*[\w/]",                        # http://x.org/a?b=c
    rf"{W}[\w.+-]{{0,63}}@[\w-]+(?:\.[\w-]+)+",                             # name@example.org
    rf"(?:[^\W\d_]\.){{2,}}(?!-?{W})",                                      # U.S. e.g. a.m.
    rf"(?:Mrs?|Ms|Dr|Prof|St|Gen|Gov|Sen|Rep|Lt|Col|Capt|Sgt|Rev|Hon|[JS]r|Inc|Corp|Co|Ltd|Bros|vs|etc|cf|al"
    rf"|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec|Mt|Ft|Ph\.D|M\.D|No(?=\.\s*\d))\.(?!-?{W})",
    r"[A-HJ-Z]\.(?=\s+\S)",                                                # J. Smith, but not: plan B.
    rf"{W}+?(?=(?i:n['’]t)(?!{W}))|(?i:n['’]t)(?!{W})|['’]{CLITIC}",        # ca|n't, it|'s
    rf"(?<!\S)[-+](?=\d){W}+(?:[.,:]\d+)*",                                 # -3.5
    rf"{W}+(?:(?:\.?-|[./&]|['’](?!{CLITIC})|(?<=\d)[,:](?=\d)){W}+)*",     # well-known 1,000 O'Neil U.S.-led
    r"\.{2,}|-{2,}|={2,}|\*{2,}|~{2,}",                                     # ... --
    r"\S")))                                                               # any punctuation by itself
SENTENCE_END = re.compile(r"[.!?…。！？।؟]|\.{3,}|etc\.|[ap]\.m\.")
CLOSING = frozenset(")]}’”»」』）")


def tokenize(text):
    """The words of a text in the manner of the Penn Treebank (but quotes stay as they are), a list of str.

    Tokenized text stays as it is. Scripts without spaces are divided at punctuation only.
    """
    return TOKEN.findall(text)


def split_sentences(words):
    """Cuts a paragraph's words into sentences; yields lists of str.

    A sentence ends at . ! ? and the quotes and brackets that close after it, unless the next word is in lower case.
    An abbreviation keeps its period and ends no sentence, but etc., a.m. and p.m. do.
    """
    sentence, ended = [], False
    for word in words:
        closes = word in CLOSING or word in ('"', "'") and sentence.count(word) % 2 == 1
        if ended and not closes and not word[0].islower():
            yield sentence
            sentence = []
        sentence.append(word)
        ended = SENTENCE_END.fullmatch(word) is not None or ended and closes
    if sentence:
        yield sentence


# ---- 6. Text files: from paths to sentences ------------------------------------------------------------------------

MAX_LINE = 1 << 16  # bytes; longer lines and paragraphs of a corpus are cut, so that memory stays bounded


def open_text(path, max_line=-1):
    """Yields the lines of a UTF-8 file, each with its line end; - is standard input, a .gz file is unpacked. A line of
    more than max_line bytes is cut at a space. InputError where the file is no text."""
    def decode(line):
        if b"\0" in line:
            raise InputError(f"{path}: line {number} holds zero bytes: no text; convert it to UTF-8, or unpack it")
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}: line {number} is not UTF-8; convert it") from None

    if path == "-" and sys.stdin is None:
        raise InputError("-: standard input is closed; name a file")
    opener = gzip.open if os.fspath(path).endswith(".gz") else open
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else opener(path, "rb") as file:
        line, number = b"", 1
        try:
            for piece in iter(lambda: file.readline(max_line), b""):
                line += piece
                if line.endswith(b"\n"):
                    yield decode(line)
                    line, number = b"", number + 1
                elif 0 < max_line < len(line):  # at a space, else between two characters
                    end = line.rfind(b" ") + 1 or re.search(rb"([^\x80-\xbf][\x80-\xbf]*)?\Z", line).start()
                    yield decode(line[:end])
                    line = line[end:]
            if line:
                yield decode(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged gzip file ({error}); copy it again") from None


def find_inputs(patterns):
    """The files that --input names: files, folders, globs, -; each once, whatever names lead to it. InputError where
    there are none, or empty ones."""
    inputs = {}
    for pattern in patterns:
        is_path = os.path.exists(pattern) or pattern == "-"
        found = []
        for path in [pattern] if is_path else sorted(glob.glob(pattern, recursive=True)):
            if os.path.isfile(path) and os.path.getsize(path) == 0:
                raise InputError(f"{path}: an empty file; check --input")
            found += sorted(files_in(path)) if os.path.isdir(path) else [path]
        if not found:
            raise InputError(f"{pattern}: no such file, or a folder without files; check --input")
        for path in found:
            inputs.setdefault(os.path.realpath(path), path)
    return list(inputs.values())


def files_in(folder):
    """Yields the files in a folder and its subfolders. An error for what would be left out without a word: subfolders
    that cannot be read or are links, pipes."""
    for path in sorted(os.path.join(folder, name) for name in os.listdir(folder)):
        if os.path.isfile(path):
            yield path
        elif os.path.isdir(path) and not os.path.islink(path):
            yield from files_in(path)
        else:
            raise InputError(f"{path}: neither a file nor a folder; name what is meant in --input")


def docstring_lines():
    """The lines of the docstrings of Python's standard library: English that every installation carries."""
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "test", "tests", "idle_test"})
        for name in sorted(name for name in names if name.endswith(".py")):
            nodes = []
            with open(os.path.join(folder, name), "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the parser thinks of the library's style
                with contextlib.suppress(SyntaxError, ValueError):
                    nodes = ast.walk(ast.parse(file.read()))
            for node in nodes:
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = re.sub(r"(?ms)^ *>>>.*?(\n *\n|\Z)", "\n", ast.get_docstring(node) or "")  # examples
                    text = re.sub(r"(?m)^\W+$", "", text)  # underlines of headings
                    yield from [*text.split("\n"), ""]


def read_sentences(paths, raw):
    """The sentences of text files, or of the docstrings where there are no paths; yields lists of str.

    The text is tokenized, one sentence a line, or, where raw, prose in paragraphs. <S> and </S> are left out: training
    sets them around every sentence.
    """
    lines = docstring_lines()
    if paths:
        lines = itertools.chain.from_iterable(itertools.chain(open_text(path, MAX_LINE), [""]) for path in paths)
    if raw:
        text = ""
        for line in lines:  # a blank one ends each file and each docstring
            if not line.strip() or len(text) > MAX_LINE:
                yield from split_sentences(tokenize(text))
                text = ""
            text += line + " "
        return
    for line in lines:
        words = line.split()
        if "S>" in line:
            words = [word for word in words if word not in ("<S>", "</S>")]
        if words:
            yield words


# ---- 7. MindRecord files: one record a sentence, its text ----------------------------------------------------------

TOTALS = 400  # bytes; a MindRecord ends with JSON of this length and its checksum, which MindSpore does not mind


class Writer:
    """Writes sentences to a MindRecord file, about 2,000 at a time: MindRecord is slow at single records."""

    def __init__(self, path):
        from mindspore.mindrecord import FileWriter
        self.path, self.waiting, self.sentences, self.tokens, self.checksum = path, [], 0, 0, 0
        self.file = FileWriter(path)
        self.file.set_page_size(1 << 21)  # not 32 MB: MindRecord holds a page's index in memory
        self.file.add_schema({"text": {"type": "bytes"}}, "sentences")  # it would copy a string into its index, too

    def add(self, text, n_tokens):
        """Writes a sentence, its tokens joined by spaces."""
        self.waiting.append({"text": text})
        self.sentences, self.tokens = self.sentences + 1, self.tokens + n_tokens
        self.checksum = zlib.crc32(text + b"\n", self.checksum)
        if len(self.waiting) == 2000:
            self.file.write_raw_data(self.waiting)
            self.waiting = []

    def finish(self):
        """Completes the file with its totals and the checksum of all, the index beside it included."""
        name = os.path.basename(self.path)
        if not self.sentences:
            raise InputError(f"{name}: no sentence for it; give more text")
        if self.waiting:
            self.file.write_raw_data(self.waiting)
        if not has_room(self.path, 64 * self.sentences):
            raise RuntimeError("no room for the index")
        self.file.commit()
        totals = json.dumps([name, self.sentences, self.tokens, self.checksum]).encode().ljust(TOTALS)
        with open(self.path, "ab") as file:
            file.write(totals + zlib.crc32(totals, file_checksum(self.path)).to_bytes(4, "big"))


def has_room(path, size):
    """Whether a file may grow by `size` bytes and leave 64 MB: MindSpore and HDF5 crash on a full disk."""
    return shutil.disk_usage(os.path.dirname(path) or ".").free >= (64 << 20) + size


def file_checksum(path, leave=0):
    """The CRC-32 of a MindRecord, all but its last `leave` bytes, and of the index beside it."""
    total = 0
    for name, rest in ((path, os.path.getsize(path) - leave), (path + ".db", os.path.getsize(path + ".db"))):
        with open(name, "rb") as file:
            while block := file.read(max(0, min(rest, 1 << 20))):
                total, rest = zlib.crc32(block, total), rest - len(block)
    return total


class Corpus:
    """A MindRecord from `Writer`, opened for reading; InputError where it is missing, damaged, renamed or foreign.

    The whole file is compared with its checksum, which takes seconds for gigabytes: MindSpore itself returns wrong
    text from a damaged file, or crashes.
    """
    CHUNK = 1 << 16  # records; MindSpore opens the file again for each chunk

    def __init__(self, path):
        for file in (path, os.path.realpath(path) + ".db"):
            if not os.path.isfile(file):
                raise InputError(f"{file}: no such file; data.py writes it")
        self.path = os.path.realpath(path)  # MindRecord looks for the index beside the file, not beside a link to it
        self.files = self.identify()  # before its checksum is compared
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - TOTALS - 4))
            totals, expected = file.read(TOTALS), file.read(4)
        try:
            name, self.sentences, self.tokens, self.checksum = json.loads(totals)
        except (ValueError, TypeError):
            raise InputError(f"{path}: damaged, or not from this version of data.py; convert the text again") from None
        if zlib.crc32(totals, file_checksum(self.path, leave=TOTALS + 4)).to_bytes(4, "big") != expected:
            raise InputError(f"{path}: damaged, it or {path}.db; convert the text again")
        if name != os.path.basename(self.path):  # MindRecord would look for that name, and read what it finds there
            raise InputError(f"{path}: was written as {name}, and needs that name; give it back to it and its .db")

    def identify(self):
        """What tells whether the file or its index was replaced."""
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, (self.path, self.path + ".db"))]

    def read(self, records):
        """Yields the sentences of these numbers, in their order, each a list of words."""
        from mindspore.dataset import MindDataset, SubsetSampler
        n = min(self.CHUNK, self.sentences)  # MindSpore refuses more numbers than there are records
        for start in range(0, len(records), n):
            try:
                if self.identify() != self.files:
                    raise ValueError
                chunk = MindDataset(self.path, ["text"], num_parallel_workers=min(2, os.cpu_count()),
                                    sampler=SubsetSampler(records[start:start + n]))
                for text, in chunk.create_tuple_iterator(num_epochs=1, output_numpy=True):
                    yield text.tobytes().decode("utf-8").split()
            except (RuntimeError, ValueError, OSError):  # MindSpore's message is many lines
                raise InputError(f"{self.path}: can no longer be read; was it moved or replaced?") from None


# ---- 8. Command line -----------------------------------------------------------------------------------------------

class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake is an InputError, and so one line."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def file_name(text):
    """The type of arguments that are paths."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path; is a variable of your shell not set?")
    if text != text.encode(errors="ignore").decode():
        raise argparse.ArgumentTypeError("a name that is not UTF-8; rename it")
    return text


def natural(text, least=1):
    """The type of arguments that are whole numbers, 1 or more."""
    if not text.isdecimal() or not least <= int(text) < 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
    return int(text)


def run_program(program, command):
    """Runs a program's command -> the exit status. A mistake of the user is one line on standard error."""
    try:
        command()
        return 0
    except (InputError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
    except MemoryError as error:
        message = f"not enough memory ({error}); use a smaller model or batch"
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


def is_run(folder):
    """Whether it is the folder of a training run, in whose options.json elmo.py says so."""
    with contextlib.suppress(OSError, ValueError, TypeError), open(os.path.join(folder, "options.json"), "rb") as file:
        return "run" in json.load(file)


RUN_FILE = r"(step-\d+\.npz|best\.npz|options\.json|vocab|log\.csv)"  # the files of a training run's folder


def check_outputs(outputs, inputs, overwrite):
    """InputError unless each output can be written without harm: not over an input of the same command, another
    output or a file of a training run, and over a file that exists only if that is asked for."""
    taken = set(map(os.path.realpath, inputs))
    for path in outputs:
        folder, name = os.path.split(os.path.realpath(path))
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path}: exists, and is not a file; choose another name")
        if not os.path.isdir(folder):
            raise InputError(f"{path}: its folder does not exist; create it first")
        if os.path.join(folder, name) in taken:
            raise InputError(f"{path}: is an input or another output of this command; choose another name")
        if os.path.exists(path) and not overwrite:
            raise InputError(f"{path}: exists; choose another name or say --overwrite")
        if re.fullmatch(RUN_FILE, name) and is_run(folder):
            raise InputError(f"{path}: belongs to a training run; choose another name")
        taken.add(os.path.join(folder, name))


def with_progress(items, describe):
    """Passes items on; every ten seconds prints what `describe` says of how many they were and the seconds it took."""
    began = last = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now > last + 10:
            print(describe(n, now - began), file=sys.stderr, flush=True)
            last = now


def parse_arguments(argv):
    """The command line's arguments; InputError where they make no sense."""
    parser = ArgumentParser(prog="data.py", description="Convert text to the MindRecord file that elmo.py trains from.")
    add = parser.add_argument
    add("--input", "--input_file", nargs="+", action="extend", metavar="PATH", default=[], type=file_name,
        help="files, folders, globs, - for standard input; .gz is unpacked. UTF-8, one sentence a line, white space "
             "between tokens (default: the docstrings of Python's library, and --heldout heldout.mindrecord)")
    add("--raw", action="store_true", help="the input is prose in paragraphs: find sentences and words")
    add("--output", "--output_file", metavar="FILE", default="train.mindrecord", type=file_name,
        help="file to write, and FILE.db, which belongs to it (default: %(default)s)")
    add("--heldout", metavar="FILE", type=file_name, help="another such file, for sentences that are kept apart")
    add("--heldout-share", metavar="X", type=float,
        help="share of the sentences that are kept apart, by a hash of their text (default: 0.01)")
    add("--vocab", "--vocab_path", metavar="FILE", type=file_name,
        help="vocabulary, one word a line (default: ./vocab, else the one beside data.py)")
    add("--build-vocab", action="store_true",
        help="write the vocabulary, too: the input's words by frequency, those kept apart not counted")
    add("--min-count", metavar="N", type=natural, help="of words that occur at least N times (default: 3)")
    add("--max-vocab", metavar="N", type=natural, help="and no more of them than N, the most frequent")
    add("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    if (args.min_count or args.max_vocab) and not args.build_vocab:
        parser.error("--min-count and --max-vocab go with --build-vocab")
    args.heldout = args.heldout or (None if args.input else "heldout.mindrecord")
    if args.build_vocab and args.vocab and args.vocab.endswith(".gz"):
        parser.error(f"--vocab {args.vocab}: --build-vocab does not compress; give it another name")
    if args.heldout_share is not None and not (args.heldout and 0 < args.heldout_share < 1):
        parser.error("--heldout-share X goes with --heldout, 0 < X < 1")
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vocab")
    args.vocab = args.vocab or ("vocab" if args.build_vocab or os.path.exists("vocab") else beside)
    return args


def convert(args):
    """Does what the command line asks for."""
    inputs, records = find_inputs(args.input), [path for path in (args.output, args.heldout) if path]
    for path in records:
        name = os.path.basename(path)
        if set(name) & set('\\:*?"<>|`&;\'') or name != name.strip() or len(name.encode()) > 200:
            raise InputError(f"{path}: a name that MindRecord does not take; choose another")
    outputs = [path + end for path in records for end in ("", ".db")] + [args.vocab] * args.build_vocab
    check_outputs(outputs, inputs + [args.vocab] * (not args.build_vocab), args.overwrite)
    if not args.input:
        print("no --input: converting the docstrings of Python's library,", sysconfig.get_paths()["stdlib"], flush=True)
    vocabulary = None if args.build_vocab else Vocabulary(args.vocab)
    share = (args.heldout_share or 0.01) if args.heldout else 0
    counts = [collections.Counter() for _ in records]
    # Everything is written in folders beside its destination and moved there when all of it is complete; a MindRecord
    # under its own name, since it holds that inside.
    with contextlib.ExitStack() as stack:
        folders = {folder: stack.enter_context(tempfile.TemporaryDirectory(prefix=".data-", dir=folder or "."))
                   for folder in set(map(os.path.dirname, outputs))}
        drafts = {path: os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in outputs}
        writers = [Writer(drafts[path]) for path in records]
        began = time.monotonic()
        try:
            for words in with_progress(read_sentences(inputs, args.raw or not inputs),
                                       lambda n, seconds: f"{n:,} sentences, {n / seconds:,.0f} a second"):
                text = " ".join(words).encode()
                part = zlib.crc32(text) < share * 2 ** 32  # so that equal sentences always go the same way
                writers[part].add(text, len(words))
                counts[part].update(words if args.build_vocab else filter(vocabulary.index.__contains__, words))
            for writer in writers:
                writer.finish()
        except RuntimeError:  # MindSpore says no more than the line of its source
            raise InputError(f"{args.output}: could not be written; is the disk full?") from None
        if args.build_vocab:
            write_vocabulary(counts[0], drafts[args.vocab], args.min_count or 3, args.max_vocab)
            vocabulary = Vocabulary(drafts[args.vocab])
        for path in reversed(outputs):  # a .db before its MindRecord
            os.replace(drafts[path], path)
    for path, writer, count in zip(records, writers, counts):
        known = sum(n for word, n in count.items() if vocabulary.index.get(word, UNK) != UNK)
        print(f"{path}: {writer.sentences:,} sentences, {writer.tokens:,} tokens, "
              f"{(writer.tokens - known) / writer.tokens:.2%} out of vocabulary")
    print(f"{sum(writer.tokens for writer in writers) / (time.monotonic() - began):,.0f} tokens a second, "
          f"{len(vocabulary):,} words in {args.vocab}")
    order = frequency_order(np.array([counts[0][word] for word in vocabulary.words[len(SPECIAL):]]))
    if order < 0.4:
        print(f"WARNING: {args.vocab} is not in the order of frequency of this text (score {order:.2f}; the best order "
              "has 1, a random one 0).\nWARNING: The sampled softmax takes the first words to be the most frequent, "
              "and would train poorly. Sort them or use --build-vocab.", file=sys.stderr)


def write_vocabulary(counts, path, min_count, max_words):
    """Writes the words of a Counter to a file, by falling count, then in code-point order."""
    frequent = [word for word, count in counts.items() if count >= min_count and word not in SPECIAL]
    if not frequent:
        raise InputError(f"--min-count {min_count}: no word of the input is that frequent; lower it")
    frequent.sort(key=lambda word: (-counts[word], word))
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(word + "\n" for word in itertools.chain(SPECIAL, frequent[:max_words]))


def frequency_order(counts):
    """How well a vocabulary is in the order of these counts: 1 perfectly, 0 not at all, below 0 reversed.

    The sampled softmax draws negatives log-uniformly by rank, so what matters is the logarithm of the rank: its mean
    over the corpus is compared with the best possible order (1) and with a random one (0). English in a good order
    scores above 0.5 from three sentences on, in alphabetical order below 0.3.
    """
    if not counts.any():
        return 1.0
    log_rank = np.log(np.arange(2, len(counts) + 2))
    mean, best, random = (np.average(log_rank, weights=c) for c in (counts, np.sort(counts)[::-1], None))
    return (random - mean) / (random - best) if random > best else 1.0


def main(argv=None):
    """Runs the command line -> the exit status."""
    return run_program("data.py", lambda: convert(parse_arguments(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary folders are removed
    sys.exit(main())
