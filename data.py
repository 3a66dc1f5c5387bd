"""Text to numbers for ELMo: tokenization, vocabulary, character ids, MindRecord files.

    python data.py                               # no text? the docstrings of Python's own library
    python data.py --input news/*.txt            # tokenized text, one sentence a line
    python data.py --input book.txt --raw --build-vocab --vocab my_vocab --heldout heldout.mindrecord

`python data.py --help` explains every option.
"""
import argparse
import ast
import collections
import contextlib
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import os
import queue
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
import zlib
from typing import NamedTuple

import numpy as np

# MindSpore is imported where it is needed: it takes seconds that --help and most mistakes need not wait for.
# Its log repeats, over ten lines, errors which we report in one; so let it print only what is fatal.
os.environ.setdefault("GLOG_v", "4")


class InputError(ValueError):
    """Something that the user must mend; one line that names the file, the place and the remedy."""


# ---- characters: a word as the 50 numbers that the character encoder reads ---------------------------------

SPECIAL = ("<S>", "</S>", "<UNK>")  # begin and end of a sentence, any word outside the vocabulary
S, E, UNK = 0, 1, 2                 # their ids
MAX_CHARS = 50                      # characters a word, the marks of its begin and end included
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING = 256, 257, 258, 259, 260  # 0 to 255 are bytes


def char_ids(word, length=MAX_CHARS):
    """The character ids of a word, int32 [length]: its UTF-8 bytes, marked and padded, cut where too long.

    Ids are shifted by +1 so that 0 is left for positions where there is no word (see `batch_to_ids`).
    """
    if word in ("<S>", "</S>"):
        codes = [BEGIN_SENTENCE if word == "<S>" else END_SENTENCE]
    else:
        codes = word.encode("utf-8", "ignore")[:length - 2]
    ids = np.full(length, PADDING, np.int32)
    ids[:len(codes) + 2] = [BEGIN_WORD, *codes, END_WORD]
    return ids + 1


def batch_to_ids(sentences):
    """Character ids of tokenized sentences: Tensor int32 [sentences, longest, 50], 0 behind a sentence."""
    import mindspore
    longest = max(map(len, sentences), default=0)
    ids = np.zeros((len(sentences), longest, MAX_CHARS), np.int32)
    for row, sentence in zip(ids, sentences):
        for position, word in zip(row, sentence):
            position[:] = char_ids(word)
    return mindspore.Tensor(ids)


# ---- vocabulary: the words that the softmax can predict, the most frequent first ---------------------------

class Vocabulary:
    """The words of a file, one a line; a word's id is its line, from 0. InputError where it is unusable."""

    def __init__(self, path):
        with open(path, "rb") as file:
            content = file.read()
        try:
            self.words = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from None
        if self.words[-1] == "":
            del self.words[-1]
        if tuple(self.words[:3]) != SPECIAL:
            raise InputError(f'{path}: lines 1 to 3 must be {" ".join(SPECIAL)}; use --build-vocab')
        self.index = {}
        for number, word in enumerate(self.words, 1):
            if word.split() != [word]:
                raise InputError(f"{path}: line {number} is blank or holds white space; remove it")
            if word in self.index:
                first = self.index[word] + 1
                raise InputError(f"{path}: line {number} repeats {word!r} of line {first}; remove it")
            self.index[word] = number - 1
        self.fingerprint = hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def __len__(self):
        return len(self.words)

    def ids(self, words):
        """The ids of words, int32 [words]; `UNK` for those outside the vocabulary."""
        get = self.index.get
        return np.array([get(word, UNK) for word in words], np.int32)


def build_vocabulary(sentences, path, min_count, max_words):
    """Write the words of sentences (lists of str) to a file, by falling count, then in code-point order."""
    counts = collections.Counter()
    for words in sentences:
        counts.update(words)
    frequent = [word for word, count in counts.items() if count >= min_count and word not in SPECIAL]
    if not frequent:
        raise InputError(f"--min-count {min_count}: no word of the input is that frequent; lower it")
    frequent.sort(key=lambda word: (-counts[word], word))
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(word + "\n" for word in itertools.chain(SPECIAL, frequent[:max_words]))


def frequency_order(counts):
    """How well a vocabulary is in the order of these counts: 1 perfectly, 0 not at all, below 0 reversed.

    The sampled softmax draws negatives log-uniformly by rank, so what matters is the logarithm of the rank:
    its mean over the corpus is compared with the best possible order (1) and with a random one (0).
    English in a good order scores above 0.5 from three sentences on, in alphabetical order below 0.3.
    """
    if not counts.any():
        return 1.0
    log_rank = np.log(np.arange(2, len(counts) + 2))
    mean, best = (np.average(log_rank, weights=c) for c in (counts, np.sort(counts)[::-1]))
    random = log_rank.mean()
    return (random - mean) / (random - best) if random > best else 1.0


# ---- text: from files to sentences -------------------------------------------------------------------------

MAX_LINE = 1 << 16  # characters; longer lines and paragraphs are cut, so that memory stays bounded


def find_inputs(patterns):
    """The files that --input names: files, folders, globs. InputError where there are none, or empty ones."""
    inputs = []
    for pattern in patterns:
        found = []
        for path in [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True)):
            if os.path.isdir(path):
                found += sorted(os.path.join(folder, name)
                                for folder, _, names in os.walk(path) for name in names)
            elif os.path.isfile(path) and os.path.getsize(path) == 0:
                raise InputError(f"{path}: an empty file; check --input")
            else:
                found.append(path)
        if not found:
            raise InputError(f"{pattern}: no such file, or a folder without files; check --input")
        inputs += found
    return list(dict.fromkeys(inputs))


def read_lines(path):
    """The lines of a UTF-8 file, unpacked if it is .gz; yields str, cut at a space beyond MAX_LINE."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # no other character ends a line
        rest = ""
        try:
            for piece in iter(lambda: file.readline(MAX_LINE), ""):
                line = rest + piece
                end = len(line) if len(piece) < MAX_LINE else line.rfind(" ") + 1 or len(line)
                rest = line[end:]
                yield line[:end]
            yield rest
        except UnicodeDecodeError as error:  # its object is what the decoder held of the bytes read so far
            byte = file.buffer.tell() - len(error.object) + error.start
            raise InputError(f"{path}: not UTF-8 at byte {byte}; convert it to UTF-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged gzip file ({error}); get it anew") from None


def docstring_lines():
    """The lines of the docstrings of Python's standard library: English that every installation carries."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "test", "tests", "idle_test"})
        for name in sorted(name for name in names if name.endswith(".py")):
            with open(os.path.join(folder, name), "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the parser thinks of the library's style
                try:
                    nodes = list(ast.walk(ast.parse(file.read())))
                except (SyntaxError, ValueError):
                    continue
            for node in nodes:
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = inspect.cleandoc(ast.get_docstring(node) or "")
                    text = re.sub(r"(?ms)^ *>>>.*?(\n *\n|\Z)", "\n", text)  # examples
                    text = re.sub(r"(?m)^\W+$", "", text)                     # underlines of headings
                    yield from text.split("\n")
                    yield ""


# What a word is made of: neither white space nor punctuation, said this way round because Python's \w lacks
# the vowel signs of Indic scripts. The zero-width (non-)joiners that Persian needs stay in a word.
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

    Tokenized text comes back as it was. Scripts without spaces are divided at punctuation only.
    """
    return TOKEN.findall(text)


def split_sentences(words):
    """Cut a paragraph's words into sentences; yields lists of str.

    A sentence ends at . ! ? and what closes after it, unless the next word is in lower case. An abbreviation
    keeps its period and ends nothing, but for those that do so more often than not (etc., p.m.).
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


def paragraphs(lines):
    """Join the lines between blank ones; yields str, cut where beyond MAX_LINE."""
    parts, size = [], 0
    for line in itertools.chain(lines, [""]):
        if parts and (not line.strip() or size > MAX_LINE):
            yield " ".join(parts)
            parts, size = [], 0
        if line.strip():
            parts.append(line)
            size += len(line)


def read_sentences(paths, raw):
    """The sentences of text files, or of the docstrings where there are no paths; yields lists of str.

    The text is tokenized, one sentence a line, or, where raw, prose in paragraphs. <S> and </S> are left out
    of it: training sets them itself, around every sentence.
    """
    lines = docstring_lines()
    if paths:
        lines = itertools.chain.from_iterable(itertools.chain(read_lines(path), [""]) for path in paths)
    if raw:
        for text in paragraphs(lines):
            yield from split_sentences(tokenize(text))
        return
    for line in lines:
        words = line.split()
        if "S>" in line:
            words = [word for word in words if word not in ("<S>", "</S>")]
        if words:
            yield words


# ---- MindRecord: one record a sentence, its words and their ids --------------------------------------------

class Writer:
    """Writes sentences to a MindRecord file, about 2,000 at a time, and counts what it writes."""
    CHUNK = 50_000            # tokens; MindRecord is slow at single records
    MOST_UNKNOWN = 2_000_000  # distinct unknown words to count; memory must not grow with the corpus

    def __init__(self, path, vocabulary):
        from mindspore.mindrecord import FileWriter
        self.path, self.vocabulary = path, vocabulary
        self.file = FileWriter(path)
        # Pages of 2 MB, not 32: MindRecord holds a page's index in memory, a kilobyte for each record.
        self.file.set_page_size(1 << 21)
        # Two fields of bytes: MindRecord copies strings and single numbers into its index as well.
        self.file.add_schema({"text": {"type": "bytes"}, "ids": {"type": "bytes"}}, "sentences for ELMo")
        self.waiting, self.waiting_tokens = [], 0             # sentences not yet handed over
        self.sentences = self.tokens = self.bytes = self.checksum = 0  # totals
        self.counts = np.zeros(len(vocabulary), np.int64)     # of each word
        self.unknown = set()                                  # hashes of the words outside the vocabulary

    def add(self, words):
        """Write a sentence, a list of str."""
        self.waiting.append(words)
        self.waiting_tokens += len(words)
        if self.waiting_tokens >= self.CHUNK:
            self.flush()

    def flush(self):
        """Hand the waiting sentences over to MindRecord."""
        words = list(itertools.chain.from_iterable(self.waiting))
        ids = self.vocabulary.ids(words)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        if len(self.unknown) < self.MOST_UNKNOWN:
            self.unknown.update(hash(words[i]) for i in np.flatnonzero(ids == UNK))
        records, start = [], 0
        for sentence in self.waiting:
            end = start + len(sentence)
            records.append({"text": " ".join(sentence).encode(), "ids": ids[start:end].tobytes()})
            self.bytes += sum(map(len, records[-1].values()))
            self.checksum = zlib.crc32(records[-1]["text"] + b"\n", self.checksum)
            start = end
        self.file.write_raw_data(records)
        self.sentences += len(records)
        self.tokens += len(words)
        self.waiting, self.waiting_tokens = [], 0

    def finish(self):
        """Complete the file. Its last bytes are its totals and the checksum of all, the index beside it included."""
        if self.waiting:
            self.flush()
        if not self.sentences:
            raise InputError(f"{os.path.basename(self.path)}: no sentence for it; give more text")
        if shutil.disk_usage(os.path.dirname(self.path) or ".").free < (64 << 20) + 64 * self.sentences:
            raise RuntimeError("no room for the index")  # over which MindSpore would crash
        self.file.commit()
        totals = json.dumps([self.sentences, self.tokens, self.checksum, len(self.vocabulary),
                             self.vocabulary.fingerprint]).encode().ljust(TOTALS)
        end = totals + zlib.crc32(totals, checksum(self.path)).to_bytes(4, "big")
        with open(self.path, "ab") as file:
            file.write(end)
        self.bytes += os.path.getsize(self.path + ".db")

    def summary(self):
        """What was written, in one line."""
        distinct = np.count_nonzero(self.counts[len(SPECIAL):]) + len(self.unknown)
        more = "more than " if len(self.unknown) >= self.MOST_UNKNOWN else ""
        rate, size = self.counts[UNK] / self.tokens, self.bytes / self.tokens
        return (f"{self.sentences:,} sentences, {self.tokens:,} tokens, {more}{distinct:,} distinct words, "
                f"{rate:.2%} out of vocabulary, {size:.1f} bytes a token")


TOTALS = 200  # bytes that a MindRecord's totals take, in JSON, near its end; MindSpore does not mind


def checksum(path, leave=0):
    """The CRC-32 of a MindRecord, all but its last `leave` bytes, and of the index beside it."""
    total = 0
    for name, rest in ((path, os.path.getsize(path) - leave), (path + ".db", os.path.getsize(path + ".db"))):
        with open(name, "rb") as file:
            while rest > 0 and (block := file.read(min(rest, 1 << 20))):
                total, rest = zlib.crc32(block, total), rest - len(block)
    return total


class Corpus:
    """A MindRecord from `Writer`, opened for reading; InputError where it is missing, damaged or foreign.

    The whole file is compared with its checksum, which takes seconds for gigabytes: MindSpore itself returns wrong
    text from a damaged file, or crashes.
    """
    CHUNK = 1 << 16  # records; MindSpore opens the file anew for each chunk

    def __init__(self, path):
        self.path = path
        for file in (path, path + ".db"):
            if not os.path.isfile(file):
                raise InputError(f"{file}: no such file; data.py writes it")
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - TOTALS - 4))
            totals, expected = file.read(TOTALS), file.read(4)
        try:
            self.sentences, self.tokens, self.checksum, self.vocabulary_size, self.fingerprint = json.loads(totals)
        except (ValueError, TypeError):
            raise InputError(f"{path}: damaged, or not from data.py; convert the text with data.py") from None
        if zlib.crc32(totals, checksum(path, leave=TOTALS + 4)).to_bytes(4, "big") != expected:
            raise InputError(f"{path}: damaged, it or {path}.db; convert the text again")

    def read(self, indices):
        """The records of these numbers, in their order: yields words, list of str, and ids, int32 [words]."""
        import mindspore.dataset
        chunk = min(self.CHUNK, self.sentences)  # MindSpore refuses more numbers than there are records
        for start in range(0, len(indices), chunk):
            records = mindspore.dataset.MindDataset(
                self.path, ["text", "ids"], num_parallel_workers=min(2, os.cpu_count()),
                sampler=mindspore.dataset.SubsetSampler(indices[start:start + chunk]))
            try:
                for text, ids in records.create_tuple_iterator(num_epochs=1, output_numpy=True):
                    yield text.tobytes().decode("utf-8").split(), np.frombuffer(ids.tobytes(), np.int32)
            except RuntimeError:  # MindSpore's message is many lines
                raise InputError(f"{self.path}: can no longer be read; is it still there?") from None


# ---- training batches: sentences in rows, their distinct words, and the negatives of the sampled softmax ---------

class Rows:
    """Sentences packed end to end into rows, `batch_size` for each worker, and cut into windows of `unroll_steps`.

    With a seed, the sentences are shuffled anew each epoch, without end; without, they come once, in the corpus'
    order, and the last windows are not full. `position` says where to go on; `position()` tells where we are.
    """

    def __init__(self, corpus, options, seed=None, position=None, workers=1):
        self.corpus, self.seed = corpus, seed
        self.batch, self.time = options.batch_size * workers, options.unroll_steps
        position = np.zeros(2 + 2 * self.batch, np.int64) if position is None else position
        self.epoch, self.next = (int(n) for n in position[:2])
        begun, starts = position[2:].reshape(2, -1)
        self.rows = [(int(record), *read_both_ways(*sentence), int(start))
                     for record, start, sentence in zip(begun, starts, corpus.read(begun))]
        if not (self.epoch or self.next):  # nothing was read yet: every row begins with a new sentence
            self.rows = [(record, words, ids, len(words[0]) - 1) for record, words, ids, _ in self.rows]
        self.sentences = self.read()

    def position(self):
        """Where the stream stands, int64 [2 + 2 · batch]: epoch, sentences read, each row's record and start."""
        return np.array([self.epoch, self.next, *(row[0] for row in self.rows), *(row[3] for row in self.rows)])

    def read(self):
        while True:
            order = np.arange(self.corpus.sentences)
            if self.seed is not None:
                order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
            order = order[self.next:]
            for record, sentence in zip(order, self.corpus.read(order)):
                self.next += 1
                yield (int(record), *read_both_ways(*sentence), 0)
            if self.seed is None:
                return
            self.epoch, self.next = self.epoch + 1, 0

    def __iter__(self):
        """Yields windows: the distinct words (a list), which of them stands where, int32 [2, time, batch], the
        vocabulary id to predict there, int32 [2, time, batch], and whether there is one, bool [time, batch].
        Index 0 is the forward direction, 1 the backward, in its own reading order."""
        while True:
            index, place = {}, np.zeros((2, self.time, self.batch), np.int32)
            target, real = np.zeros_like(place), np.zeros((self.time, self.batch), bool)
            for r, (record, words, ids, start) in enumerate(self.rows):
                t = 0
                while t < self.time:
                    if start == len(words[0]) - 1:
                        if (sentence := next(self.sentences, None)) is None:
                            break
                        record, words, ids, start = sentence
                    n = min(self.time - t, len(words[0]) - 1 - start)  # n words in a sentence: n + 1 predictions
                    for d in (0, 1):
                        place[d, t:t + n, r] = [index.setdefault(w, len(index)) for w in words[d][start:start + n]]
                        target[d, t:t + n, r] = ids[d][start + 1:start + n + 1]
                    real[t:t + n, r] = True
                    t, start = t + n, start + n
                self.rows[r] = record, words, ids, start
            if not index:
                return
            yield list(index), place, target, real


def read_both_ways(words, ids):
    """A sentence as each direction reads it: its words, and their ids, from <S> to </S> and from </S> to <S>."""
    words, ids = ["<S>", *words, "</S>"], np.concatenate(([S], ids, [E]))
    return (words, words[::-1]), (ids, ids[::-1])


class Slots(NamedTuple):
    """Room for the distinct words of a batch: tiers of (number of words, their greatest length in character ids).

    The shapes of a batch must not change from step to step, but most words are short, and the character CNN need not
    look at all their padding. The last tier is of full length; a batch that does not fit gets 256 more there, or
    as often 256 as it needs.
    """
    tiers: tuple

    @classmethod
    def measure(cls, rows, options):
        """The room that windows like the next 20 of `rows` need, in four tiers with the least to convolve."""
        longer = np.zeros(MAX_CHARS + 1, int)  # [k] words of a window, at most, have more than k character ids
        for words, *_ in itertools.islice(rows, 20):
            _, lengths = characters(words)
            counts = np.bincount(lengths, minlength=MAX_CHARS + 1)
            longer = np.maximum(longer, len(words) - counts.cumsum())
        longer += longer // 20 + 16  # some more, for windows with more words than these
        def tiers(limits):
            bounds = (0, *limits)
            rooms = [(int(longer[lower] - longer[upper]), upper) for lower, upper in zip(bounds, limits)]
            return [*filter(all, rooms), (int(longer[bounds[-1]]), MAX_CHARS)]
        shorter = range(1, MAX_CHARS - max(width for width, _ in options.filters) + 1)
        choices = itertools.combinations(shorter, min(3, len(shorter)))
        def cost(tiers):  # a word of n characters is convolved at n + 1 positions, see elmo.CharEncoder
            return sum(number * (length + 1) for number, length in tiers)
        return cls(tuple(min(map(tiers, choices), key=cost)))

    def fill(self, words, place):
        """-> the characters of the words, each in a slot where it fits, int32 [slots, 50], and `place` changed to
        numbers of slots."""
        chars, lengths = characters(words)
        order = np.argsort(lengths, kind="stable")
        room = np.repeat([length for _, length in self.tiers], [number for number, _ in self.tiers])
        while len(words) > len(room) or (lengths[order] > room[len(room) - len(words):]).any():
            room = np.append(room, np.full(256, MAX_CHARS))  # in few sizes, since each is compiled anew
        slot = np.empty(len(words), np.int32)
        slot[order] = np.arange(len(room) - len(words), len(room))  # the longest words at the end
        filled = np.zeros((len(room), MAX_CHARS), np.int32)
        filled[slot] = chars
        return filled, slot[place]


cached_char_ids = functools.lru_cache(1 << 16)(char_ids)


def characters(words):
    """The character ids of words, int32 [words, 50], and how many of them are not padding, int [words]."""
    chars = np.stack([cached_char_ids(word) for word in words])
    return chars, (chars != PADDING + 1).sum(1)


def log_uniform_sample(rng, number, classes):
    """Draws classes with P(k) = log((k + 2) / (k + 1)) / log(classes + 1) until `number` distinct ones are found
    (Zipf's law, where a class is a word's rank) -> those, int64 [number], and how many draws it took."""
    drawn = np.empty(0, np.int64)
    while True:
        draws = np.exp(rng.random(2 * number) * np.log(classes + 1)).astype(np.int64) - 1
        drawn = np.concatenate((drawn, np.minimum(draws, classes - 1)))
        first = np.sort(np.unique(drawn, return_index=True)[1])
        if len(first) >= number:
            return drawn[first[:number]], int(first[number - 1]) + 1


def log_expected_count(k, draws, classes):
    """log of how often class k is expected among the distinct classes found in so many draws, float [like k]:
    log(1 - (1 - p_k)^draws)."""
    p = np.log((k + 2) / (k + 1)) / np.log(classes + 1)
    return np.log(-np.expm1(draws * np.log1p(-p)))


class Batch(NamedTuple):
    """What one training step reads. N negatives, R rows of the softmax that the step touches, n = time · batch."""
    chars: np.ndarray         # int32 [slots, 50], the distinct words, see Slots
    words: np.ndarray         # int32 [2, time, batch], the slot of the word that stands there
    fresh: np.ndarray         # bool [batch], the LSTM state is set to zero before the window
    target: np.ndarray        # int32 [2, n], number among the R rows
    drawn: np.ndarray         # int32 [2, N], the negatives, numbers among the R rows
    target_log_q: np.ndarray  # float32 [2, n], log expected count
    drawn_log_q: np.ndarray   # float32 [2, N]
    undrawn: np.ndarray       # bool [2, n], the target is not among the negatives
    keep: np.ndarray          # bool [layers + 1, 2, time, batch, projection], dropout; [0] where there is none


def make_batch(window, slots, classes, options, seed, step, worker=0):
    """One window of `Rows` -> (rows of the softmax that the step touches, int32 [R], and the `Batch`).

    Several workers share the window, each taking its own rows of it, and they share the negatives, as if they were
    one; so the rows of the softmax that they touch together are known to each.
    """
    words, place, target, _ = window
    o, mine = options, slice(worker * options.batch_size, (worker + 1) * options.batch_size)
    rng = np.random.default_rng([seed, step, 1])  # of the negatives, the same for every worker
    targets, target = target.reshape(2, -1), target[:, :, mine].reshape(2, -1)
    if o.sample_softmax:
        drawn, draws = zip(*(log_uniform_sample(rng, o.n_negative_samples_batch, classes) for _ in range(2)))
        drawn, draws = np.stack(drawn), np.array(draws)[:, None]
        log_q = [log_expected_count(k, draws, classes) for k in (target, drawn)]
    else:  # the full softmax is the sampled one with every class drawn
        drawn = np.tile(np.arange(classes), (2, 1))
        log_q = [np.zeros(target.shape), np.zeros(drawn.shape)]
    touched = np.unique(np.concatenate((targets.ravel(), drawn.ravel())))
    # The number of rows must not change from step to step: the others get a gradient of zero, which changes nothing.
    size = min(classes, targets.size + drawn.size)
    rows = np.concatenate((touched, np.setdiff1d(np.arange(size), touched)[:size - len(touched)]))

    place = place[:, :, mine]
    here = np.unique(place)  # the distinct words of this worker's rows
    place = np.searchsorted(here, place)
    words = [words[k] for k in here]
    # A state that is carried for ever is one that the model never learns to begin from, as every test and embedding
    # does. So a row whose window happens to begin with a sentence, about every twentieth, begins afresh.
    fresh = np.array([words[k] == "<S>" for k in place[0, 0]])
    shape = (o.n_layers + 1, *place.shape, o.projection) if o.dropout else 0
    keep = np.random.default_rng([seed, step, 2, worker]).random(shape, np.float32) >= o.dropout
    return rows.astype(np.int32), Batch(
        *slots.fill(words, place), fresh, *(np.searchsorted(touched, k).astype(np.int32) for k in (target, drawn)),
        *(q.astype(np.float32) for q in log_q), np.stack([~np.isin(t, k) for t, k in zip(target, drawn)]), keep)


def training_batches(corpus, slots, classes, options, seed, step=0, position=None, worker=0, workers=1):
    """The endless stream of training batches from `step` on: (rows, `Batch`, the stream's position after it).
    What is random about a batch depends on the seed, the step and the worker, so that a run can be resumed."""
    rows = Rows(corpus, options, seed, position, workers)
    for step, window in zip(itertools.count(step), rows):
        yield *make_batch(window, slots, classes, options, seed, step, worker), rows.position()


def ahead(iterator, number=2):
    """The same items, made by a thread `number` ahead, so that a training step need not wait for its batch."""
    queued, end = queue.Queue(number), object()
    def work():
        try:
            for item in iterator:
                queued.put(item)
            queued.put(end)
        except BaseException as error:  # raised again where the items are taken
            queued.put(error)
    threading.Thread(target=work, daemon=True).start()
    while (item := queued.get()) is not end:
        if isinstance(item, BaseException):
            raise item
        yield item


# ---- command line ------------------------------------------------------------------------------------------

class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):  # in one line, where argparse prints its usage first
        raise InputError(f"{message}; see --help")


def natural(text, least=1):
    """The type of arguments that are 1 or more."""
    if not least <= int(text) < 1 << 40:
        raise ValueError
    return int(text)


def parse_arguments(argv):
    """The command line's options; InputError where they make no sense."""
    parser = ArgumentParser(
        prog="data.py", description="Convert text to the MindRecord file that elmo.py trains from.")
    option = parser.add_argument
    option("--input", "--input_file", nargs="+", metavar="PATH", default=[],
           help="files, folders, globs, - for standard input; .gz is unpacked. UTF-8, one sentence a line, "
                'white space between tokens (default: the docstrings of Python\'s library, and --heldout '
                "heldout.mindrecord)")
    option("--raw", action="store_true", help="the input is prose in paragraphs: find sentences and words")
    option("--output", "--output_file", metavar="FILE", default="train.mindrecord",
           help="file to write, and FILE.db, which belongs to it (default: %(default)s)")
    option("--heldout", metavar="FILE", help="another such file, for sentences that are kept apart")
    option("--heldout-share", metavar="X", type=float, default=0.01,
           help="how many of all, decided by a hash of the sentence (default: %(default)s)")
    option("--vocab", "--vocab_path", metavar="FILE",
           help="vocabulary, one word a line (default: ./vocab, else the one beside data.py)")
    option("--build-vocab", action="store_true",
           help="write the vocabulary first: the input's words by frequency, those kept apart not counted")
    option("--min-count", metavar="N", type=natural, default=3,
           help="of words that occur at least N times (default: %(default)s)")
    option("--max-vocab", metavar="N", type=natural, help="and no more of them than N, the most frequent")
    option("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    if not 0 < args.heldout_share < 1:
        parser.error(f"--heldout-share {args.heldout_share}: must lie between 0 and 1")
    if not args.input:
        args.heldout = args.heldout or "heldout.mindrecord"
    if not args.vocab:
        here = args.build_vocab or os.path.exists("vocab")
        args.vocab = "vocab" if here else os.path.join(os.path.dirname(os.path.abspath(__file__)), "vocab")
    return args


def check_outputs(records, vocab, inputs, overwrite):
    """InputError unless MindRecords and a vocabulary (or None) can be written without harm to other files."""
    taken = set(map(os.path.realpath, inputs))
    for path in records + [vocab] * bool(vocab):
        is_other = os.path.exists(path) and not os.path.isfile(path)
        if is_other or set(os.path.basename(path)) & set('\\:*?"<>|`&;\''):
            raise InputError(f"{path}: not a file, or a name that MindRecord does not allow; choose another")
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"{path}: its folder does not exist; create it first")
        for file in [path, path + ".db"] if path in records else [path]:
            if os.path.realpath(file) in taken:
                raise InputError(f"{file}: is an input or another output, too; choose another name")
            if os.path.exists(file) and not overwrite:
                raise InputError(f"{file}: exists; choose another name or say --overwrite")
            taken.add(os.path.realpath(file))


def is_heldout(words, share):
    """Whether a sentence is kept apart; its text decides, so that equal sentences always go the same way."""
    return zlib.crc32(" ".join(words).encode()) < share * 2 ** 32


def with_progress(sentences, task):
    """Pass sentences on and say how many they are: on a terminal every second in one line, else every ten."""
    def report(end):
        rate = tokens / (now - began + 1e-9)
        print(f"{start}{task}: {number:,} sentences, {tokens:,} tokens, {rate:,.0f} tokens a second",
              end=end, file=sys.stderr, flush=True)

    start, end, pause = ("\r", "", 1) if sys.stderr.isatty() else ("", "\n", 10)
    number = tokens = 0
    began = last = time.monotonic()
    for number, words in enumerate(sentences, 1):
        yield words
        tokens += len(words)
        now = time.monotonic()
        if now > last + pause:
            report(end)
            last = now
    now = time.monotonic()
    report("\n")


def convert(args):
    """Do what the command line asks for."""
    inputs = find_inputs(path for path in args.input if path != "-")
    records = [path for path in (args.output, args.heldout) if path]
    check_outputs(records, args.vocab if args.build_vocab else None, inputs, args.overwrite)
    share = args.heldout_share if args.heldout else 0
    if not args.input:
        library = sysconfig.get_paths()["stdlib"]
        print(f"no --input: converting the docstrings of Python's library, {library}", flush=True)

    def sentences(task):
        return with_progress(read_sentences(inputs, args.raw or not inputs), task)

    # Everything is written in a folder beside its destination and moved there when all of it is complete; a
    # MindRecord under its own name, since it holds that inside.
    with contextlib.ExitStack() as stack:
        def draft(path, name=None):
            folder = tempfile.TemporaryDirectory(prefix=".data-", dir=os.path.dirname(path) or ".")
            return os.path.join(stack.enter_context(folder), name or os.path.basename(path))

        drafts = {path: draft(path) for path in records}
        for pipe in [path for path in inputs if not os.path.isfile(path)] + ["-"] * ("-" in args.input):
            # Copied to a file, as --build-vocab reads it twice.
            copy = draft(args.output, "standard input" if pipe == "-" else os.path.basename(pipe))
            source = sys.stdin.buffer if pipe == "-" else stack.enter_context(open(pipe, "rb"))
            with open(copy, "wb") as file:
                shutil.copyfileobj(source, file)
            inputs = [path for path in inputs if path != pipe] + [copy]
        if args.build_vocab:
            drafts[args.vocab] = draft(args.vocab)
            build_vocabulary((words for words in sentences("counting") if not is_heldout(words, share)),
                             drafts[args.vocab], args.min_count, args.max_vocab)
        vocabulary = Vocabulary(drafts.get(args.vocab, args.vocab))
        writers = [Writer(drafts[path], vocabulary) for path in records]
        began = time.monotonic()
        try:
            for words in sentences("converting"):
                writers[is_heldout(words, share)].add(words)
            for writer in writers:
                writer.finish()
        except RuntimeError:  # MindSpore says no more than the line of its source
            raise InputError(f"{args.output}: could not be written; is the disk full?") from None
        seconds = time.monotonic() - began
        for path, file in drafts.items():
            for end in (".db", "") if path in records else ("",):
                os.replace(file + end, path + end)
    for path, writer in zip(records, writers):
        print(f"{path}: {writer.summary()}")
    print(f"{sum(writer.tokens for writer in writers) / seconds:,.0f} tokens a second, "
          f"{len(vocabulary):,} words in {args.vocab}")
    warn_of_order(writers[0].counts, args.vocab)


def warn_of_order(counts, vocab):
    """Warns where a vocabulary is not in the order of its words' counts in the text."""
    order = frequency_order(counts[len(SPECIAL):])
    if order < 0.4:
        print(f"WARNING: {vocab} is not in the order of frequency of this text (score {order:.2f}; the "
              "best order has 1, a random one 0).\nWARNING: The sampled softmax takes the first words to be "
              "the most frequent: training will be poor. Sort them or use --build-vocab.", file=sys.stderr)


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        convert(parse_arguments(argv))
        return 0
    except (InputError, OSError) as error:
        file = getattr(error, "filename", None)  # of an OSError
        message = f"{file}: {error.strerror}" if file else error
        print(f"data.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary folders go away
    sys.exit(main())
