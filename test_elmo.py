"""The specification of this project, as tests: `python -m pytest test_elmo.py`."""
import gzip
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data

# ---------------------------------------------------------------------------------------------------------
# data.py: text, vocabulary, MindRecord
# ---------------------------------------------------------------------------------------------------------

def write(path, text):
    """Write text (str or bytes) to a path; returns the path as a str."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


WORDS = ["the", "cat", "sat", ".", "on", "mat", "dog"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a vocabulary of its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "vocab", "\n".join([*data.SPECIAL, *WORDS]) + "\n")
    return tmp_path


def sentences_of(path="train.mindrecord"):
    corpus = data.Corpus(str(path))
    return [words for words, _ in corpus.read(range(corpus.sentences))]


def tree(folder):
    """Every path under a folder, hidden ones included, and the content of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_character_ids_are_those_bilm_tf_publishes():
    assert (data.char_ids("th", 5) - 1).tolist() == [258, 116, 104, 259, 260]
    assert (data.char_ids("<S>", 5) - 1).tolist() == [258, 256, 259, 260, 260]
    assert (data.char_ids("</S>", 5) - 1).tolist() == [258, 257, 259, 260, 260]
    assert data.char_ids("th").dtype == np.int32 and data.char_ids("th").shape == (50,)


def test_character_ids_are_bytes_and_long_words_are_cut_to_48():
    assert (data.char_ids("é")[:5] - 1).tolist() == [258, 0xC3, 0xA9, 259, 260]
    assert (data.char_ids("x" * 60) - 1).tolist() == [258] + [120] * 48 + [259]
    assert (data.char_ids("x" * 47 + "é")[-3:] - 1).tolist() == [120, 0xC3, 259]  # cut inside a character
    assert (data.char_ids('a\ud800b')[:5] - 1).tolist() == [258, 97, 98, 259, 260]  # a lone surrogate is no byte
    assert (data.char_ids("")[:3] - 1).tolist() == [258, 259, 260]
    assert (data.char_ids("<UNK>")[:7] - 1).tolist() == [258, *b"<UNK>", 259]


def test_batch_to_ids_pads_with_zeros():
    ids = data.batch_to_ids([["a", "cat"], ["the"]]).asnumpy()
    assert ids.shape == (2, 2, 50) and ids.dtype == np.int32
    assert (ids[0, 1] == data.char_ids("cat")).all() and (ids[1, 0] == data.char_ids("the")).all()
    assert not ids[1, 1].any()
    assert data.batch_to_ids([]).shape == (0, 0, 50)
    assert data.batch_to_ids([[], []]).shape == (2, 0, 50)
    assert data.batch_to_ids([[], ["a"]]).shape == (2, 1, 50)


@pytest.mark.parametrize("text, words", [
    ("I can't say it's John's.", "I ca n't say it 's John 's ."),
    ("WON'T you? They'll; we've, I'd, I'm", "WO N'T you ? They 'll ; we 've , I 'd , I 'm"),
    ("it’s “so” don’t", "it ’s “ so ” do n’t"),
    ('He said "Yes" (or [no]) {x}.', 'He said " Yes " ( or [ no ] ) { x } .'),
    ("Mr. J. Smith of the U.S. rose at 9 a.m. e.g. today.", "Mr. J. Smith of the U.S. rose at 9 a.m. e.g. today ."),
    ("No. 5 said no. U.S.-led plan B.", "No. 5 said no . U.S.-led plan B ."),
    ("$3.14 for 1,000 or 50% at 10:30, -3.5 in 1990s", "$ 3.14 for 1,000 or 50 % at 10:30 , -3.5 in 1990s"),
    ("See https://x.org/a?b=c#d, or www.x.org (me@ex-ample.co.uk).",
     "See https://x.org/a?b=c#d , or www.x.org ( me@ex-ample.co.uk ) ."),
    ("A well-known rock'n'roll O'Neil AT&T and/or", "A well-known rock'n'roll O'Neil AT&T and/or"),
    ('Wait... what -- no--yes? the dogs\'', "Wait ... what -- no -- yes ? the dogs '"),
    ("他来了。我走了！", "他来了 。 我走了 ！"),
    ("यह हिन्दी है। مرحبا، نعم؟ می‌خواهم", "यह हिन्दी है । مرحبا ، نعم ؟ می‌خواهم"),
    ("a_b.c(d) == x[0]", "a_b.c ( d ) == x [ 0 ]"),
    ("", ""),
])
def test_tokenization_is_penn_treebank_and_leaves_its_own_result_alone(text, words):
    assert data.tokenize(text) == words.split()
    assert data.tokenize(words) == words.split()


def test_tokenization_is_idempotent_on_random_text():
    rng = np.random.default_rng(0)
    pieces = [*"abJCIds.,'’\"-_/:&@!?()[]$%*~+019  \n\u00a0。ह\u093f\u200c\x00\u2028", "n't", "'s", "N'T", "http://",
              "www.", "U.S.", "e.g.", "Mr.", "No.", "x@y.z", "1,000", "Word", "--", "..."]
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 14)))
        words = data.tokenize(text)
        assert data.tokenize(" ".join(words)) == words, repr(text)
        assert "".join(words) == "".join(text.split()), repr(text)  # and nothing is lost


def test_sentences_end_where_they_should():
    text = ('He said "Go." Then Mr. Smith left. "Why?" she asked. It was 5 p.m. Dr. No (who?) came... and went. '
            "So do I. 他来了。我走了！")
    assert [" ".join(words) for words in data.split_sentences(data.tokenize(text))] == [
        'He said " Go . "', "Then Mr. Smith left .", '" Why ? " she asked .', "It was 5 p.m.",
        "Dr. No ( who ? ) came ... and went .", "So do I .", "他来了 。", "我走了 ！"]


def test_prose_runs_over_lines_but_not_over_blank_ones(folder):
    write(folder / "a.txt", "A title\n\nOne sentence\nover lines. Another\r\n \r\nend\n")
    assert data.main(["--input", "a.txt", "--raw"]) == 0
    assert list(map(" ".join, sentences_of())) == ["A title", "One sentence over lines .", "Another", "end"]


def test_vocabulary_is_by_falling_count_then_code_point(folder):
    write(folder / "a.txt", "b b b a a é é <UNK> Z Z <S> rare\n")
    command = ["--input", "a.txt", "--build-vocab", "--overwrite", "--min-count", "2"]
    assert data.main(command) == 0
    assert (folder / "vocab").read_text(encoding="utf-8") == "<S>\n</S>\n<UNK>\nb\nZ\na\né\n"
    assert data.main([*command, "--max-vocab", "2"]) == 0
    assert data.Vocabulary("vocab").words == ["<S>", "</S>", "<UNK>", "b", "Z"]


def test_vocabulary_reads_any_line_ends(folder):
    plain = data.Vocabulary("vocab")
    assert len(plain) == 10 and plain.index["the"] == 3
    assert plain.ids(["dog", "cow", "<S>"]).tolist() == [9, data.UNK, data.S] and plain.ids([]).dtype == np.int32
    text = (folder / "vocab").read_text()
    for other in (text[:-1], text.replace("\n", "\r\n")):
        vocabulary = data.Vocabulary(write(folder / "other", other))
        assert vocabulary.words == plain.words and vocabulary.fingerprint == plain.fingerprint
    assert data.Vocabulary(write(folder / "other", text + "cow")).fingerprint != plain.fingerprint


def test_converted_text_comes_back_in_any_order(folder):
    lines = ["the cat sat .", '<S> the\u00a0dog\x00\tsat </S>', "", 'café 北京 . \x00', ' \t ', "the " * 3000 + "."]
    write(folder / "a.txt", "\r\n".join(lines))
    assert data.main(["--input_file", "a.txt", "--output_file", "x.mindrecord", "--vocab_path", "vocab"]) == 0
    corpus, vocabulary = data.Corpus("x.mindrecord"), data.Vocabulary("vocab")
    assert (corpus.sentences, corpus.tokens) == (4, 4 + 3 + 4 + 3001)
    assert (corpus.fingerprint, corpus.vocabulary_size) == (vocabulary.fingerprint, len(vocabulary))
    expected = [["the", "cat", "sat", "."], ["the", 'dog\0', "sat"], ["café", "北京", ".", '\0'],
                ["the"] * 3000 + ["."]]
    order = np.array([3, 0, 2, 1, 0])
    for number, (words, ids) in zip(order, corpus.read(order)):
        assert words == expected[number]
        assert ids.dtype == np.int32 and ids.tolist() == vocabulary.ids(words).tolist()


def test_input_is_files_folders_globs_gz_and_standard_input(folder, monkeypatch):
    (folder / "b" / "c").mkdir(parents=True)
    write(folder / "a1.txt", "the one")  # without a line end: the next file begins a sentence of its own
    write(folder / "a2.txt", '\ufeffthe two\n')
    write(folder / "b" / "z", "the four\n")
    write(folder / "b" / "c" / "x.gz", gzip.compress(b"the three\n"))
    for extra in ([], ["--build-vocab", "--min-count", "1", "--vocab", "new"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the five\n")))
        assert data.main(["--input", "a*.txt", "a1.txt", "b", "-", "--overwrite", *extra]) == 0
        assert [words[1] for words in sentences_of()] == ["one", "two", "three", "four", "five"]


def test_lines_without_end_do_not_fill_the_memory(folder, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    words = [f"wörd{i}" for i in range(3000)] + ["x" * 5000]
    path = write(folder / "a.txt", " ".join(words))
    sentences = list(data.read_sentences([path], raw=False))
    assert sum(sentences, [])[:3000] == words[:3000] and max(len(" ".join(s)) for s in sentences) <= 2000
    assert "".join(sum(sentences, [])[3000:]) == words[3000]
    assert sum(data.read_sentences([path], raw=True), [])[:3000] == words[:3000]


def test_heldout_sentences_are_a_fixed_share_and_never_in_both(folder):
    lines = [f"the cat {i}" for i in range(2000)]
    write(folder / "a.txt", "\n".join(lines + lines[:100]))
    write(folder / "b.txt", "\n".join(reversed(lines)))
    command = ["--heldout", "heldout.mindrecord", "--heldout-share", "0.1", "--overwrite"]
    assert data.main(["--input", "a.txt", *command]) == 0
    train, heldout = ({" ".join(s) for s in sentences_of(f"{part}.mindrecord")} for part in ("train", "heldout"))
    assert train | heldout == set(lines) and not train & heldout and 150 < len(heldout) < 250
    assert data.main(["--input", "b.txt", *command]) == 0
    assert {" ".join(s) for s in sentences_of("heldout.mindrecord")} == heldout


def test_vocabulary_counts_only_the_training_part(folder):
    write(folder / "a.txt", "\n".join(f"the word{i}" for i in range(500)))
    assert data.main(["--input", "a.txt", "--build-vocab", "--min-count", "1", "--vocab", "new",
                      "--heldout", "heldout.mindrecord", "--heldout-share", "0.1"]) == 0
    words = data.Vocabulary("new").words
    assert not any(s[1] in words for s in sentences_of("heldout.mindrecord"))
    assert all(s[1] in words for s in sentences_of())


def test_without_input_the_docstrings_of_the_library_are_converted(folder, monkeypatch, capsys):
    library = folder / "lib"
    (library / "site-packages").mkdir(parents=True)
    write(library / "a.py", '"""The cat sat.\n\n    >>> run()\n    5\n\nOn\nit\n==\nA dog.\n"""\ndef f():\n    "Go"\n')
    write(library / "broken.py", "def (:")
    write(library / "site-packages" / "b.py", '"""Foreign."""')
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert data.main(["--heldout-share", "0.5"]) == 0
    assert str(library) in capsys.readouterr().out
    everything = sentences_of() + sentences_of("heldout.mindrecord")
    assert sorted(map(" ".join, everything)) == ["A dog .", "Go", "On it", "The cat sat ."]


def test_the_summary_tells_what_was_converted(folder, capsys):
    write(folder / "a.txt", "the cat sat . a cow a\nthe owl .\n")
    assert data.main(["--input", "a.txt"]) == 0
    out, err = capsys.readouterr()
    assert "train.mindrecord: 2 sentences, 10 tokens, 7 distinct words, 40.00% out of vocabulary" in out
    assert "bytes a token" in out and "tokens a second" in out
    assert "WARNING" not in out + err and "converting: 2 sentences" in err


def test_a_vocabulary_out_of_frequency_order_is_warned_of(folder, capsys):
    words = [f"w{i:03}" for i in range(200)]
    write(folder / "a.txt", "\n".join(" ".join(words[:length]) for length in (1, 2, 4, 8, 15, 30, 60, 200)))
    for order, warned in ((words, False), (words[::-1], True), (words[100:] + words[:100], True)):
        write(folder / "vocab", "\n".join([*data.SPECIAL, *order]))
        assert data.main(["--input", "a.txt", "--overwrite"]) == 0
        assert ("WARNING" in capsys.readouterr().err) == warned


def test_frequency_order_is_1_for_the_best_order_and_defined_for_any_counts():
    assert data.frequency_order(np.array([5, 3, 1, 0])) == 1
    assert data.frequency_order(np.array([0, 1, 3, 5])) < 0
    assert data.frequency_order(np.array([0, 0])) == data.frequency_order(np.array([7])) == 1
    assert data.frequency_order(np.zeros(0, int)) == 1


GOOD = b"the cat sat .\n"


@pytest.mark.parametrize("files, arguments, message", [
    ({}, "--input nothing.txt", "nothing.txt: no such file"),
    ({}, "--input no*.txt", "no*.txt: no such file"),
    ({"e.txt": b""}, "--input e.txt", "e.txt: an empty file"),
    ({"e.txt": b"\n \n"}, "--input e.txt", "train.mindrecord: no sentence"),
    ({"u.txt": b"the cat\n" * 9000 + b'\xc3\xa9 \xff\n'}, "--input u.txt", "u.txt: not UTF-8 at byte 72003;"),
    ({"u.txt": b'the \xe2\x82'}, "--input u.txt", "u.txt: not UTF-8 at byte 4;"),
    ({"u.gz": gzip.compress(b'the \xff')}, "--input u.gz", "u.gz: not UTF-8 at byte 4;"),
    ({"a.gz": GOOD}, "--input a.gz", "a.gz: damaged gzip file"),
    ({"a.gz": gzip.compress(os.urandom(9999).hex().encode())[:-5000]}, "--input a.gz", "a.gz: damaged gzip file"),
    ({}, "--input a.txt --vocab missing", "missing: No such file"),
    ({"v": b"the\ncat\n"}, "--input a.txt --vocab v", "v: lines 1 to 3 must be <S> </S> <UNK>"),
    ({"v": b""}, "--input a.txt --vocab v", "v: lines 1 to 3 must be"),
    ({"v": b"<S>\n<UNK>\n</S>\nthe"}, "--input a.txt --vocab v", "v: lines 1 to 3 must be"),
    ({"v": b"<S>\n</S>\n<UNK>\nb\na\nb"}, "--input a.txt --vocab v", "v: line 6 repeats 'b' of line 4"),
    ({"v": b"<S>\n</S>\n<UNK>\n\nb"}, "--input a.txt --vocab v", "v: line 4 is blank"),
    ({"v": b"<S>\n</S>\n<UNK>\nb\n\n"}, "--input a.txt --vocab v", "v: line 5 is blank"),
    ({"v": b"<S>\n</S>\n<UNK>\nb 5"}, "--input a.txt --vocab v", "v: line 4 is blank or holds white space"),
    ({"v": b'<S>\n</S>\n<UNK>\n\xff'}, "--input a.txt --vocab v", "v: not UTF-8 at byte 15"),
    ({"train.mindrecord": b"old"}, "--input a.txt", "train.mindrecord: exists"),
    ({"train.mindrecord.db": b"old"}, "--input a.txt", "train.mindrecord.db: exists"),
    ({}, "--input a.txt --build-vocab", "vocab: exists"),
    ({}, "--input a.txt --output a.txt --overwrite", "a.txt: is an input"),
    ({}, "--input a.txt --output h --heldout ./h", "./h: is an input or another output"),
    ({}, "--input a.txt --output vocab --build-vocab --overwrite", "vocab: is an input or another output"),
    ({}, "--input a.txt --output nowhere/x", "nowhere/x: its folder does not exist"),
    ({}, "--input a.txt --output .", ".: a folder"),
    ({}, "--input a.txt --output a&b", "a&b: a folder, or a name that MindRecord does not allow"),
    ({}, "--input a.txt --heldout h --heldout-share 1", "--heldout-share 1.0: must lie between"),
    ({}, "--input a.txt --heldout h --heldout-share 0.000001", "h: no sentence"),
    ({}, "--input a.txt --build-vocab --vocab v --min-count 9", "--min-count 9: no word"),
    ({}, "--input a.txt --min-count 0", "argument --min-count: invalid positive value: '0'"),
    ({}, "--input a.txt --what", "unrecognized arguments: --what"),
])
def test_bad_input_is_one_line_and_changes_nothing(folder, capsys, files, arguments, message):
    for name, content in {"a.txt": GOOD, **files}.items():
        write(folder / name, content)
    before = tree(folder)
    assert data.main(arguments.split()) == 2
    assert tree(folder) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("conv", "count"))]
    assert len(lines) == 1 and lines[0].startswith("data.py: error: ") and message in lines[0], lines


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def interrupted(paths, raw):
        yield ["the"]
        raise KeyboardInterrupt
    write(folder / "a.txt", GOOD)
    before = tree(folder)
    monkeypatch.setattr(data, "read_sentences", interrupted)
    assert data.main(["--input", "a.txt"]) == 130
    assert tree(folder) == before


def test_a_terminated_conversion_cleans_up(folder):
    process = subprocess.Popen([sys.executable, data.__file__, "--input", "-"], stdin=subprocess.PIPE)
    before = tree(folder)
    while tree(folder) == before:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdin.close()
    assert tree(folder) == before


class FullDisk:
    free = 1 << 20


def test_a_full_disk_is_one_line(folder, monkeypatch, capsys):
    write(folder / "a.txt", GOOD)
    before = tree(folder)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: FullDisk)
    assert data.main(["--input", "a.txt"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "data.py: error: train.mindrecord: could not be written; is the disk full?"]
    assert tree(folder) == before


def damage(path, start, content):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


@pytest.mark.parametrize("harm", [
    lambda: os.remove("train.mindrecord"),
    lambda: os.remove("train.mindrecord.db"),
    lambda: os.truncate("train.mindrecord", 20_000_000),
    lambda: os.truncate("train.mindrecord", 0),
    lambda: os.truncate("train.mindrecord.db", 8192),
    lambda: os.truncate("train.mindrecord.db", 0),
    lambda: os.replace("a.txt", "train.mindrecord"),
    lambda: os.replace("a.txt", "train.mindrecord.db"),
    lambda: damage("train.mindrecord", 0, b'\xff' * 4096),
    lambda: damage("train.mindrecord", 16 << 20, b'\xff' * (1 << 20)),
    lambda: damage("train.mindrecord.db", 4096, b'\xff' * 8192),
], ids=str)
def test_a_damaged_mindrecord_is_one_line(folder, harm):
    write(folder / "a.txt", GOOD * 500)
    assert data.main(["--input", "a.txt"]) == 0
    harm()
    with pytest.raises(data.InputError, match=r"train\.mindrecord.*: (no such file|damaged|not from data\.py)"):
        sentences_of()


def test_a_moved_mindrecord_still_opens(folder):
    write(folder / "a.txt", GOOD)
    assert data.main(["--input", "a.txt"]) == 0
    (folder / "new").mkdir()
    for name in ("train.mindrecord", "train.mindrecord.db"):
        os.replace(name, f"new/{name}")
    assert sentences_of("new/train.mindrecord") == [["the", "cat", "sat", "."]]
