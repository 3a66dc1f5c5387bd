"""The specification of this project, as tests: `python -m pytest test_elmo.py`.

First the text (data.py), then the model, part by part as in the paper, against plain numpy, then what runs it.
"""
import contextlib
import csv
import errno
import functools
import gzip
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
import elmo
from data import SPECIAL, Rows, Slots, Vocabulary, ahead, batch_to_ids, char_ids
import mindspore as ms
from mindspore import Tensor, nn, ops

ms.set_device("CPU")  # once; MindSpore refuses it once something has been computed

FIXTURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "shared", "allennlp_fixture")

# ---------------------------------------------------------------------------------------------------------
# Set-up that tests share
# ---------------------------------------------------------------------------------------------------------


WORDS = ["the", "cat", "sat", ".", "on", "mat", "dog"]
GOOD = b"the cat sat .\n"


def write(path, text):
    """Write text (str or bytes) to a path; returns the path as a str."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def tree(folder):
    """Every path under a folder, hidden ones included; of files their content, of large ones size and time."""
    def content(path):
        about = path.stat()
        return path.read_bytes() if about.st_size < 1 << 20 else (about.st_size, about.st_mtime_ns)
    return {str(path): path.is_file() and content(path) for path in sorted(folder.rglob("*"))}


def damage(path, start, content):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a vocabulary of its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "vocab", "\n".join([*data.SPECIAL, *WORDS]) + "\n")
    return tmp_path


def sentences_of(path="train.mindrecord"):
    corpus = data.Corpus(str(path))
    return [words for words, _ in corpus.read(range(corpus.sentences))]


def close(actual, expected, tolerance=1e-5):
    actual = actual.asnumpy() if isinstance(actual, Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def options(**changes):
    """The options of a model that is tiny but has everything, both clips included."""
    tiny = dict(filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5, cell_clip=0.5,
                proj_clip=0.3, dropout=0.0, batch_size=3, unroll_steps=4, n_negative_samples_batch=6)
    return elmo.Options(**{**tiny, **changes})


def randomize(cell, seed=0, scale=0.5):
    """Random values for all parameters of a cell, biases too, which are 0 at first."""
    rng = np.random.default_rng(seed)
    for p in cell.get_parameters():
        p.set_data(Tensor(rng.normal(0, scale, p.shape).astype(np.float32)))
    return cell


def weights(*cells):
    """The parameters of cells in float64, by their published names."""
    parameters = itertools.chain(*(cell.get_parameters() for cell in cells))
    return {p.name.rpartition(".")[2]: p.asnumpy().astype(np.float64) for p in parameters}


def random(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def gradients_of(function, positions):
    """ms.grad, compiled as in training."""
    return ms.jit(ms.grad(function, positions))


def run(*argv, program=elmo):
    """Runs a command line in this process -> its exit status, what it printed, what it printed as errors."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = program.main([str(arg) for arg in argv])
    return status, out.getvalue(), errors.getvalue()


def succeed(*argv, program=elmo):
    status, out, errors = run(*argv, program=program)
    assert status == 0, errors
    return out


EPOCHS = 2
PERPLEXITY = r"perplexity forward (\d+\.\d\d) backward (\d+\.\d\d) average (\d+\.\d\d) over (\d+) predictions"


def training(folder, out):
    """The command line that trains the model of `trained`."""
    return ["train", "--device", "CPU", "--data", folder / "train.mindrecord", "--vocab", folder / "vocab",
            "--heldout", folder / "heldout.mindrecord", "--options", folder / "options.json", "--out", out,
            "--log-every", 10, "--save-every", 15]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A corpus made by data.py and a model that elmo.py trained on it, with what it printed."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    animals, verbs, places = "cat dog cow naïve-fox".split(), "sat ran slept".split(), "mat hill road".split()
    lines = [f"the {rng.choice(animals)} {rng.choice(verbs)} on the {rng.choice(places)} number {k} ."
             for k in range(130)]
    text = folder / "text.txt"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    succeed("--input", text, "--output", folder / "train.mindrecord", "--heldout",
            folder / "heldout.mindrecord",
            "--heldout-share", 0.1, "--vocab", folder / "vocab", "--build-vocab", "--min-count", 2,
            program=data)
    o = options(dropout=0.1, batch_size=8, unroll_steps=3, n_epochs=EPOCHS)
    elmo.write_json(str(folder / "options.json"), elmo.as_json(o))
    graphs = []
    advance = elmo.Run.advance

    def counting(self, *args):
        advance(self, *args)
        graphs.append(compiled_graphs())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(elmo.Run, "advance", counting)
        out = succeed(*training(folder, folder / "model"))
    vocabulary = Vocabulary(str(folder / "vocab"))
    corpus, heldout = (data.Corpus(str(folder / name)) for name in ("train.mindrecord", "heldout.mindrecord"))
    return types.SimpleNamespace(folder=folder, model=folder / "model", out=out, options=o, graphs=graphs,
                                 vocabulary=vocabulary, corpus=corpus, heldout=heldout,
                                 predictions=corpus.tokens + corpus.sentences)


def idle_step(state, W, b, W_sum, b_sum, *batch):
    """In place of the training step: learns nothing, and need not be compiled."""
    return Tensor(1.0), Tensor(1.0), state, W, b, W_sum, b_sum


@pytest.fixture(scope="module")
def exported(trained):
    pytest.importorskip("h5py", reason="h5py, which .hdf5 files need, is not installed")
    succeed("export", "--device", "CPU", "--out", trained.model, "--weights",
            trained.folder / "elmo_weights.hdf5")
    return trained.folder / "elmo_weights.hdf5"


@pytest.fixture(scope="module")
def trained_bilm(trained, exported):
    return elmo.BiLM(str(trained.folder / "elmo_options.json"), str(exported))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model's options and weights in the published format, without a softmax, and the model."""
    h5py = pytest.importorskip("h5py", reason="h5py, which .hdf5 files need, is not installed")
    folder = tmp_path_factory.mktemp("published")
    bilm = randomize(elmo.BiLM(options()), 3)
    elmo.write_json(str(folder / "options.json"), elmo.as_json(bilm.options))
    with h5py.File(folder / "weights.hdf5", "w") as file:
        for name, array in weights(bilm).items():
            file[name] = array.astype(np.float32)
    return types.SimpleNamespace(options=str(folder / "options.json"), weights=str(folder / "weights.hdf5"),
                                 bilm=bilm)

# ---------------------------------------------------------------------------------------------------------
# The model once more, in plain numpy: one word, one time step after the other, in float64
# ---------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.where(x.real > 0, x, 0)  # .real: also for complex numbers, see complex_step_gradient


def clip(x, limit):
    return np.where(np.abs(x.real) < limit, x, np.sign(x.real) * limit)


def numpy_encoder(chars, w, o):
    """The representation of words, chars int [..., 50]."""
    table = np.concatenate((np.zeros((1, o.char_dim)), w["char_embed"]))  # row 0: masked
    embedded = table[chars]  # [..., 50, char_dim]
    features = []
    for k, (width, _) in enumerate(o.filters):
        kernel = w[f"CNN/W_cnn_{k}"][0]
        scores = [sum(embedded[..., t + n, :] @ kernel[n] for n in range(width)) for t
                  in range(50 - width + 1)]
        features.append(np.max(scores, axis=0) + w[f"CNN/b_cnn_{k}"])
    x = np.concatenate(features, -1)
    x = relu(x) if o.activation == "relu" else np.tanh(x)
    for k in range(o.n_highway):
        g = sigmoid(x @ w[f"CNN_high_{k}/W_carry"] + w[f"CNN_high_{k}/b_carry"])
        x = g * relu(x @ w[f"CNN_high_{k}/W_transform"] + w[f"CNN_high_{k}/b_transform"]) + (1 - g) * x
    return x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]


def numpy_lstm(x, h, c, kernel, bias, projection, cell_clip, proj_clip):
    """h and c of every step, x [time, ..., size]."""
    hs, cs = [], []
    for x_t in x:
        i, j, f, o = np.split(np.concatenate((x_t, h), -1) @ kernel + bias, 4, -1)
        c = clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), cell_clip)
        h = clip(sigmoid(o) * np.tanh(c) @ projection, proj_clip)
        hs, cs = hs + [h], cs + [c]
    return np.array(hs), np.array(cs)


def numpy_direction(x, w, direction, o, state=None, keep=None):
    """The layers of one direction, x [time, ..., projection] in its reading order -> all layers' h, the state."""
    state = np.zeros((o.n_layers, *x.shape[1:-1], o.projection + o.dim)) if state is None else state
    outputs, states = [], []
    for layer in range(o.n_layers):
        cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
        x = x if keep is None else x * keep[layer] / (1 - o.dropout)
        h, c = state[layer, ..., :o.projection], state[layer, ..., o.projection:]
        hs, cs = numpy_lstm(x, h, c, w[cell + "W_0"], w[cell + "B"], w[cell + "W_P_0"], o.cell_clip,
                            o.proj_clip)
        x = hs + x if layer > 0 and o.use_skip_connections else hs
        outputs.append(x)
        states.append(np.concatenate((hs[-1], cs[-1]), -1))
    return outputs, np.array(states)


def numpy_layers(words, w, o, state=(None, None)):
    """h_0 ... h_L of one sentence, [layers + 1, words, 2 · projection], and the LSTMs' state after it."""
    x = numpy_encoder(np.array([char_ids(word) for word in ["<S>", *words, "</S>"]]), w, o)
    forward, forward_state = numpy_direction(x, w, 0, o, state[0])
    backward, backward_state = numpy_direction(x[::-1], w, 1, o, state[1])
    layers = [np.concatenate((x, x), -1)]
    layers += [np.concatenate((f, b[::-1]), -1) for f, b in zip(forward, backward)]
    return np.array(layers)[:, 1:-1], np.array((forward_state, backward_state))


def log_sum_exp(x):
    m = x.real.max(-1, keepdims=True)
    return np.log(np.exp(x - m).sum(-1)) + m[..., 0]


def numpy_softmax(y, W, b, target):
    """-log p(target) of y [n, projection] -> [n]."""
    logits = y @ W.T + b
    return log_sum_exp(logits) - logits[np.arange(len(y)), target]


def numpy_sampled_softmax(y, W, b, target, drawn, target_log_q, drawn_log_q):
    """As TensorFlow: true and sampled logits side by side, accidental hits among the latter at -1e30."""
    true = (y * W[target]).sum(-1) + b[target] - target_log_q  # [n]
    sampled = y @ W[drawn].T + b[drawn] - drawn_log_q  # [n, N]
    sampled = np.where(drawn[None, :] == target[:, None], -1e30, sampled)
    return log_sum_exp(np.concatenate((true[:, None], sampled), 1)) - true


def numpy_mix(layers, w, gamma):
    s = np.exp(w) / np.exp(w).sum()
    return gamma * sum(s_j * h for s_j, h in zip(s, layers))


def complex_step_gradient(loss, w, rows=None):
    """The gradient of loss(w), w a dict of arrays, correct to the last digits: Im loss(w + ih) / h.

    rows: of char_embed, those that the loss can depend on (None: all)."""
    gradient = {name: np.zeros(array.shape) for name, array in w.items()}
    for name, array in w.items():
        for index in np.ndindex(array.shape):
            if name != "char_embed" or rows is None or index[0] in rows:
                moved = array.astype(complex)
                moved[index] += 1e-30j
                gradient[name][index] = loss({**w, name: moved}).imag / 1e-30
    return gradient

# ---------------------------------------------------------------------------------------------------------
# data.py: characters
# ---------------------------------------------------------------------------------------------------------


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

# ---------------------------------------------------------------------------------------------------------
# data.py: tokens and sentences
# ---------------------------------------------------------------------------------------------------------


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


def test_a_pipe_is_read_once_also_where_the_vocabulary_is_counted_first(folder):
    os.mkfifo(folder / "pipe")
    thread = threading.Thread(target=write, args=(folder / "pipe", "the six\nthe six\n"))
    thread.start()
    assert data.main(["--input", "pipe", "--build-vocab", "--min-count", "2", "--vocab", "new"]) == 0
    thread.join()
    assert sentences_of() == [["the", "six"]] * 2 and "six" in data.Vocabulary("new").words


def test_lines_without_end_do_not_fill_the_memory(folder, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    words = [f"wörd{i}" for i in range(3000)] + ["x" * 5000]
    path = write(folder / "a.txt", " ".join(words))
    sentences = list(data.read_sentences([path], raw=False))
    assert sum(sentences, [])[:3000] == words[:3000] and max(len(" ".join(s)) for s in sentences) <= 2000
    assert "".join(sum(sentences, [])[3000:]) == words[3000]
    assert sum(data.read_sentences([path], raw=True), [])[:3000] == words[:3000]


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

# ---------------------------------------------------------------------------------------------------------
# data.py: vocabulary
# ---------------------------------------------------------------------------------------------------------


def test_vocabulary_is_by_falling_count_then_code_point(folder):
    write(folder / "a.txt", "b b b a a é é <UNK> Z Z <S> rare\n")
    command = ["--input", "a.txt", "--build-vocab", "--overwrite", "--min-count", "2"]
    assert data.main(command) == 0
    assert (folder / "vocab").read_text(encoding="utf-8") == "<S>\n</S>\n<UNK>\nb\nZ\na\né\n"
    assert data.main([*command, "--max-vocab", "2"]) == 0
    assert data.Vocabulary("vocab").words == ["<S>", "</S>", "<UNK>", "b", "Z"]


def test_vocabulary_reads_any_line_ends_and_a_byte_order_mark(folder):
    plain = data.Vocabulary("vocab")
    assert len(plain) == 10 and plain.index["the"] == 3
    assert plain.ids(["dog", "cow", "<S>"]).tolist() == [9, data.UNK, data.S] and plain.ids([]).dtype == np.int32
    text = (folder / "vocab").read_text()
    for other in (text[:-1], text.replace("\n", "\r\n"), "\ufeff" + text):
        vocabulary = data.Vocabulary(write(folder / "other", other))
        assert vocabulary.words == plain.words and vocabulary.fingerprint == plain.fingerprint
    assert data.Vocabulary(write(folder / "other", text + "cow")).fingerprint != plain.fingerprint


def test_vocabulary_counts_only_the_training_part(folder):
    write(folder / "a.txt", "\n".join(f"the word{i}" for i in range(500)))
    assert data.main(["--input", "a.txt", "--build-vocab", "--min-count", "1", "--vocab", "new",
                      "--heldout", "heldout.mindrecord", "--heldout-share", "0.1"]) == 0
    words = data.Vocabulary("new").words
    assert not any(s[1] in words for s in sentences_of("heldout.mindrecord"))
    assert all(s[1] in words for s in sentences_of())


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

# ---------------------------------------------------------------------------------------------------------
# data.py: MindRecord
# ---------------------------------------------------------------------------------------------------------


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


def test_the_summary_tells_what_was_converted(folder, capsys):
    write(folder / "a.txt", "the cat sat . a cow a\nthe owl .\n")
    assert data.main(["--input", "a.txt"]) == 0
    out, err = capsys.readouterr()
    assert "train.mindrecord: 2 sentences, 10 tokens, 7 distinct words, 40.00% out of vocabulary" in out
    assert "bytes a token" in out and "tokens a second" in out
    assert "WARNING" not in out + err and "converting: 2 sentences" in err


def test_a_moved_mindrecord_still_opens(folder):
    write(folder / "a.txt", GOOD)
    assert data.main(["--input", "a.txt"]) == 0
    (folder / "new").mkdir()
    for name in ("train.mindrecord", "train.mindrecord.db"):
        os.replace(name, f"new/{name}")
    assert sentences_of("new/train.mindrecord") == [["the", "cat", "sat", "."]]


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
    lambda: damage("train.mindrecord.db", 30_000, b'\xfe\xfd\xfc'),
    lambda: damage("train.mindrecord", os.path.getsize("train.mindrecord") - 204, b'[4'),
    lambda: damage("train.mindrecord", os.path.getsize("train.mindrecord") - 1, b'\x01'),
], ids=lambda harm: inspect.getsource(harm).strip())
def test_a_damaged_mindrecord_is_one_line(folder, harm):
    write(folder / "a.txt", GOOD * 500)
    assert data.main(["--input", "a.txt"]) == 0
    harm()
    with pytest.raises(data.InputError, match=r"train\.mindrecord.*: (no such file|damaged)"):
        sentences_of()


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
    before, deadline = tree(folder), time.monotonic() + 60
    while tree(folder) == before:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdin.close()
    assert tree(folder) == before


class FullDisk:
    free = 1 << 20


def test_a_disk_too_full_for_data_py_is_one_line(folder, monkeypatch, capsys):
    write(folder / "a.txt", GOOD)
    before = tree(folder)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: FullDisk)
    assert data.main(["--input", "a.txt"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "data.py: error: train.mindrecord: could not be written; is the disk full?"]
    assert tree(folder) == before


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
    ({}, "--input a.txt --output .", ".: not a file"),
    ({}, "--input a.txt --output a&b", "a&b: not a file, or a name that MindRecord does not allow"),
    ({}, "--input a.txt --heldout h --heldout-share 1", "--heldout-share 1.0: must lie between"),
    ({}, "--input a.txt --heldout h --heldout-share 0.000001", "h: no sentence"),
    ({}, "--input a.txt --build-vocab --vocab v --min-count 9", "--min-count 9: no word"),
    ({}, "--input a.txt --min-count 0", "argument --min-count: invalid natural value: '0'"),
    ({}, "--input a.txt --what", "unrecognized arguments: --what"),
])
def test_bad_input_of_data_py_is_one_line_and_changes_nothing(folder, capsys, files, arguments, message):
    for name, content in {"a.txt": GOOD, **files}.items():
        write(folder / name, content)
    before = tree(folder)
    assert data.main(arguments.split()) == 2
    assert tree(folder) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("conv", "count"))]
    assert len(lines) == 1 and lines[0].startswith("data.py: error: ") and message in lines[0], lines

# ---------------------------------------------------------------------------------------------------------
# 1. Options
# ---------------------------------------------------------------------------------------------------------


def published_json(change=lambda content: None):
    """The content of a usable options file, changed."""
    content = {"char_cnn": {"filters": [[1, 3], [2, 4], [3, 5]], "embedding": {"dim": 4},
                            "activation": "relu", "n_highway": 1,
                            "n_characters": 262, "max_characters_per_token": 50},
               "lstm": {"dim": 7, "projection_dim": 5, "n_layers": 2, "use_skip_connections": True,
                        "cell_clip": 3,
                        "proj_clip": 3}}
    change(content)
    return json.dumps(content)


def with_value(*path_and_value):
    *path, key, value = path_and_value

    def change(content):
        for part in path:
            content = content[part]
        content[key] = value
    return published_json(change)


def test_the_default_is_the_papers_model_and_the_named_sizes_are_the_published_ones():
    o = elmo.Options()
    assert (o.n_layers, o.dim, o.projection, o.n_highway, o.use_skip_connections) == (2, 4096, 512, 2, True)
    assert sum(number for _, number in o.filters) == 2048 and [width for width, _ in o.filters] == [1, 2, 3, 4, 5, 6, 7]
    assert (o.char_dim, o.activation, o.cell_clip, o.proj_clip, o.dropout) == (16, "relu", 3, 3, 0.1)
    assert (o.batch_size, o.unroll_steps, o.n_negative_samples_batch, o.sample_softmax) == (128, 20, 8192, True)
    assert (o.learning_rate, o.all_clip_norm_val, o.n_epochs) == (0.2, 10, 10)
    assert elmo.SIZES["original"] == o
    assert elmo.SIZES["medium"] == replace(o, dim=2048, projection=256, n_highway=1)
    assert elmo.SIZES["small"] == replace(o, dim=1024, projection=128, n_highway=1)


def test_what_published_options_lack_takes_the_papers_values(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(published_json())
    o, paper = elmo.read_options(str(path)), elmo.Options()
    assert o == replace(paper, filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5)
    elmo.write_json(str(path), elmo.as_json(o))
    assert elmo.read_options(str(path)) == o


@pytest.mark.parametrize("content, message", [
    ("{", "not JSON"), ("", "not JSON"), (b"\xff\xfe", "not JSON"), ("[]", "lacks char_cnn"),
    ("3", "lacks char_cnn"),
    ('{"char_cnn": 5, "lstm": []}', "lacks char_cnn"), ("[" * 100_000, "not JSON"),
    (published_json(lambda content: content["lstm"].pop("dim")), "lacks lstm.dim"),
    (published_json(lambda content: content.pop("char_cnn")), "lacks char_cnn.filters"),
    (published_json(lambda content: content["char_cnn"].pop("embedding")), "lacks char_cnn.embedding.dim"),
    (with_value("lstm", "projection_dim", 13), "projection_dim 13"),
    (with_value("char_cnn", "activation", "gelu"), "activation is 'gelu', but must be relu or tanh"),
    (with_value("char_cnn", "filters", [[51, 8]]), "width 1 to 50"),
    (with_value("char_cnn", "filters", [[0, 8]]), "width 1 to 50"),
    (with_value("char_cnn", "filters", [[1, -8]]), "filters must be"),
    (with_value("char_cnn", "filters", [[1]]), "filters must be"),
    (with_value("char_cnn", "filters", []), "filters"),
    (with_value("char_cnn", "filters", "all"), "filters must be"),
    (with_value("char_cnn", "n_characters", 100), "n_characters"),
    (with_value("char_cnn", "max_characters_per_token", 40), "must be 50"),
    (with_value("char_cnn", "n_highway", -1), "n_highway is -1"),
    (with_value("lstm", "dim", -7), "dim is -7"), (with_value("lstm", "dim", "7"), "dim is '7'"),
    (with_value("lstm", "dim", 7.5), "dim is 7.5"), (with_value("lstm", "n_layers", 0), "n_layers is 0"),
    (with_value("lstm", "dim", True), "dim is True"),
    (with_value("lstm", "cell_clip", math.nan), "cell_clip is nan"),
    (with_value("lstm", "use_skip_connections", 1), "use_skip_connections is 1"),
    (with_value("dropout", 1.0), "dropout is 1.0"), (with_value("batch_size", 0), "batch_size is 0"),
    (with_value("unroll_steps", -20), "unroll_steps is -20"),
    (with_value("learning_rate", -0.2), "learning_rate is -0.2"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 60 and "{" not in value else "")
def test_options_that_cannot_be_used_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "options.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.InputError) as error:
        elmo.read_options(str(path))
    line = str(error.value)
    assert line.startswith(f"{path}: ") and message in line and "\n" not in line

# ---------------------------------------------------------------------------------------------------------
# 2. Character CNN (sections 3.1 and 3.4)
# ---------------------------------------------------------------------------------------------------------


ODD_WORDS = ["a", "The", "I", "elephants", "x" * 47, "x" * 48, "y" * 49, "long" * 30, "naïve", "Δημοκρατία",
             "日本語",
             "🙂", "ภาษาไทย" * 4, "<S>", "</S>", "<UNK>", "..."]


@pytest.mark.parametrize("activation, n_highway, filters", [
    ("relu", 1, ((1, 3), (2, 4), (3, 5))),
    ("tanh", 2, ((2, 4), (7, 6), (5, 3))),  # not by width
    ("relu", 3, ((50, 2), (1, 4))),         # as wide as a token
    ("tanh", 0, ((4, 8),)),
])
def test_the_character_encoder_equals_numpy(activation, n_highway, filters):
    o = options(activation=activation, n_highway=n_highway, filters=filters)
    encoder = randomize(elmo.CharEncoder(o, np.random.default_rng(0)))
    chars = np.array([char_ids(word) for word in ODD_WORDS] + [np.zeros(50, np.int32)])  # the last is masked
    close(encoder(Tensor(chars)), numpy_encoder(chars, weights(encoder), o))


@pytest.mark.parametrize("filters", [((1, 3), (2, 4), (3, 5)), ((7, 6), (2, 3)), ((40, 6), (1, 4))])
def test_short_words_need_not_come_with_all_their_padding(filters):
    bilm, place = randomize(elmo.BiLM(options(filters=filters))), np.arange(len(ODD_WORDS))
    full = numpy_encoder(np.array([char_ids(word) for word in ODD_WORDS]), weights(bilm), bilm.options)
    widest = max(width for width, _ in filters)
    for size in sorted({min(size, 50 - widest) for size in (3, 11, 43)}):
        number = sum(int((char_ids(word) != data.PADDING + 1).sum()) <= size for word in ODD_WORDS)
        assert 0 < number < len(ODD_WORDS)
        slots = Slots(((number, size), (len(ODD_WORDS) - number, 50)))
        close(bilm.token_representations(*map(Tensor, slots.fill(ODD_WORDS, place)), slots), full)


def test_the_gradient_of_the_maximum_goes_to_its_first_position_alone():
    rng = np.random.default_rng(0)
    x, kernel, dm = rng.integers(-1, 2, (9, 6, 3)), rng.integers(-1, 2, (3, 4)), rng.normal(size=(6, 4))
    scores = x @ kernel  # small integers, so that there are many ties
    assert ((scores == scores.max(0)).sum(0) > 1).mean() > 0.5
    won = (np.arange(9)[:, None, None] == scores.argmax(0)) * dm
    x, kernel, dm = (Tensor(array.astype(np.float32)) for array in (x, kernel, dm))
    m = elmo.MaxOverTime()

    def loss(x, kernel):
        return (m(x, kernel) * dm).sum()
    close(m(x, kernel), scores.max(0), 0)
    dx, dkernel = gradients_of(loss, (0, 1))(x, kernel)
    close(dx, won @ kernel.asnumpy().T)
    close(dkernel, np.einsum("tnw,tnf->wf", x.asnumpy(), won))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_gradient_of_the_character_encoder_is_right_for_every_weight(activation):
    o = options(activation=activation, filters=((1, 2), (3, 3)), char_dim=2, projection=3, n_highway=2)
    encoder = randomize(elmo.CharEncoder(o, np.random.default_rng(0)), seed=1)
    chars, dy = np.array([char_ids(word) for word in ("a", "naïve", "x" * 60)]), random(3, 3)
    expected = complex_step_gradient(lambda w: (numpy_encoder(chars, w, o) * dy).sum(), weights(encoder))
    chars, dy, parameters = Tensor(chars), Tensor(dy), ms.ParameterTuple(encoder.trainable_params())

    def loss(chars):
        return (encoder(chars) * dy).sum()
    actual = ms.grad(loss, None, parameters)(chars)
    for p, gradient in zip(parameters, actual):
        close(gradient, expected[p.name])
    assert all(np.abs(gradient).max() > 1e-3 for gradient in expected.values())

# ---------------------------------------------------------------------------------------------------------
# 3. LSTM with projection
# ---------------------------------------------------------------------------------------------------------


LSTM_INPUTS = ("x", "h", "c", "kernel", "bias", "projection")


def lstm_inputs(time=6, batch=3, size=4, dim=5, projection=3):
    shapes = ((time, batch, size), (batch, projection), (batch, dim), (size + projection, 4 * dim),
              (4 * dim,),
              (dim, projection))
    return [random(*shape, seed=k, scale=0.5) for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("cell_clip, proj_clip, active", [(100, 100, False), (0.4, 0.2, True)])
def test_the_lstm_and_its_gradient_equal_numpy(cell_clip, proj_clip, active):
    inputs = lstm_inputs()
    lstm, dy = elmo.ProjectedLSTM(cell_clip, proj_clip), Tensor(random(6, 3, 3, seed=9))
    w = {name: array.astype(np.float64) for name, array in zip(LSTM_INPUTS, inputs)}
    hs, cs = numpy_lstm(*w.values(), cell_clip, proj_clip)
    assert active == (np.abs(hs) == proj_clip).any() == (np.abs(cs) == cell_clip).any()
    assert not (np.abs(hs) == proj_clip).all() and not (np.abs(cs) == cell_clip).all()
    actual = lstm(*map(Tensor, inputs))
    close(actual[0], hs, 1e-6)
    close(np.array([c.asnumpy() for c in actual[2]]), cs, 1e-6)

    def loss(x, h, c, kernel, bias, projection):
        return (lstm(x, h, c, kernel, bias, projection)[0] * dy).sum()
    gradient = gradients_of(loss, (0, 1, 2, 3, 4, 5))(*map(Tensor, inputs))

    def numpy_loss(w):
        return (numpy_lstm(*w.values(), cell_clip, proj_clip)[0] * dy.asnumpy()).sum()
    expected = complex_step_gradient(numpy_loss, w)
    for name, actual in zip(LSTM_INPUTS, gradient):
        close(actual, expected[name] * (name not in ("h", "c")))  # gradients stop at the window's begin
        assert np.abs(expected[name]).max() > 1e-2

# ---------------------------------------------------------------------------------------------------------
# 4. Bidirectional language model (section 3.1)
# ---------------------------------------------------------------------------------------------------------


RAGGED = [["The", "cat", "sat", "."], ["one"], [], ["naïve", "日本語", "z" * 60], ["a", "a", "a", "a", "a", "b"]]


@pytest.mark.parametrize("n_layers, use_skip_connections, activation, n_highway", [
    (1, True, "relu", 1), (2, True, "tanh", 2), (2, False, "relu", 1), (3, True, "relu", 3)])
def test_the_bilm_equals_numpy_sentence_by_sentence(n_layers, use_skip_connections, activation, n_highway):
    o = options(n_layers=n_layers, use_skip_connections=use_skip_connections, activation=activation,
                n_highway=n_highway)
    bilm = randomize(elmo.BiLM(o))
    layers, mask, state = bilm(batch_to_ids(RAGGED))
    assert len(layers) == n_layers + 1
    assert mask.asnumpy().tolist() == [[k < len(words) for k in range(6)] for words in RAGGED]
    layers, w = np.array([layer.asnumpy() for layer in layers]), weights(bilm)
    for k, words in enumerate(RAGGED):
        expected, expected_state = numpy_layers(words, w, o)
        close(layers[:, k, :len(words)], expected)
        close(state[:, :, k], expected_state)
        assert (layers[:, k, len(words):] == 0).all()
    h, c = np.split(state.asnumpy(), [o.projection], -1)
    # both clips active
    assert np.isclose(np.abs(h), o.proj_clip).any() and np.isclose(np.abs(c), o.cell_clip).any()


def test_a_sentence_gets_the_same_vectors_whatever_was_read_before_or_stands_beside_it():
    bilm = randomize(elmo.BiLM(options()))

    def vectors(sentences):
        layers, _, _ = bilm(batch_to_ids(sentences))
        layers = np.array([layer.asnumpy() for layer in layers])
        return [layers[:, k, :len(words)] for k, words in enumerate(sentences)]
    together, again, reversed_order = vectors(RAGGED), vectors(RAGGED), vectors(RAGGED[::-1])[::-1]
    for k, words in enumerate(RAGGED):
        assert (again[k] == together[k]).all()  # no hidden state between calls
        close(reversed_order[k], together[k], 1e-6)
        close(vectors([words])[0], together[k], 1e-6)  # neither neighbours nor padding


def test_the_gradient_of_a_ragged_batch_is_that_of_each_sentence_alone():
    o, sentences = tiny_options(n_layers=2), [["a", "cat", "a"], ["b"], []]
    bilm, dy = randomize(elmo.BiLM(o)), random(3, 3, 3, 4)  # [layers, batch, tokens, 2 · projection]
    letters = {n - 1 for word in ("a", "cat", "b", "<S>", "</S>") for n in char_ids(word)}

    def numpy_loss(w):
        return sum((numpy_layers(words, w, o)[0] * dy[:, k, :len(words)]).sum() for k, words in enumerate(sentences))
    expected = complex_step_gradient(numpy_loss, weights(bilm), letters)
    parameters, ids, dy = ms.ParameterTuple(bilm.trainable_params()), batch_to_ids(sentences), Tensor(dy)

    def loss(ids):
        return (ops.stack(bilm(ids)[0]) * dy).sum()
    for p, gradient in zip(parameters, ms.grad(loss, None, parameters)(ids)):
        close(gradient, expected[p.name.rpartition(".")[2]])
    assert all(np.abs(gradient).max() > 1e-3 for gradient in expected.values())


def test_a_batch_of_empty_sentences_gives_vectors_of_no_words():
    bilm = elmo.BiLM(options())
    for sentences in ([[], []], [[]]):
        layers, mask, _ = bilm(batch_to_ids(sentences))
        assert [layer.shape for layer in layers] == 3 * [(len(sentences), 0, 10)]
        assert mask.shape == (len(sentences), 0)


def test_a_given_state_is_read_on_from():
    o = options()
    bilm = randomize(elmo.BiLM(o))
    before, w = [["a", "b", "c"], ["d"]], weights(bilm)
    after = [["e"], ["f", "g"]]
    layers, _, state = bilm(batch_to_ids(after), bilm(batch_to_ids(before))[2])
    for k in range(2):
        expected, expected_state = numpy_layers(after[k], w, o, numpy_layers(before[k], w, o)[1])
        close(np.array([layer.asnumpy()[k, :len(after[k])] for layer in layers]), expected)
        close(state[:, :, k], expected_state)
        assert np.abs(expected - numpy_layers(after[k], w, o)[0]).max() > 1e-2


@pytest.mark.parametrize("use_skip_connections", [True, False])
def test_dropout_drops_the_input_of_each_layer_and_the_residual_adds_what_is_left(use_skip_connections):
    o = options(dropout=0.4, use_skip_connections=use_skip_connections)
    bilm, x = randomize(elmo.BiLM(o)), random(2, 4, 3, o.projection)
    keep = np.random.default_rng(0).random((3, 2, 4, 3, o.projection)) > o.dropout
    outputs, _ = bilm.contextualize(Tensor(x), elmo.zero_state(o, 3), Tensor(keep))
    for d in (0, 1):
        expected, _ = numpy_direction(x[d], weights(bilm), d, o, keep=keep[:, d])
        for layer in (0, 1):
            close(outputs[d][layer], expected[layer])
        assert np.abs(expected[1] - numpy_direction(x[d], weights(bilm), d, o)[0][1]).max() > 0.1


def test_the_forget_gate_bias_is_added_when_run_not_stored():
    stored = [array for name, array in weights(elmo.BiLM(options())).items() if name.endswith("/B")]
    assert len(stored) == 4 and not np.any(stored)
    dim, c = 5, random(2, 5)
    x, h = np.zeros((1, 2, 4), np.float32), np.zeros((2, 3), np.float32)
    w = np.zeros((7, 4 * dim), np.float32), np.zeros(4 * dim, np.float32), np.zeros((dim, 3), np.float32)
    _, _, (after,), _ = elmo.ProjectedLSTM(3.0, 3.0)(*map(Tensor, (x, h, c, *w)))
    # all weights zero: nothing but the forget gate, sigmoid(0 + 1)
    close(after, c / (1 + math.exp(-1)), 1e-6)


def test_weights_begin_with_the_values_of_bilm_tf():
    bilm, softmax = elmo.BiLM(replace(elmo.SIZES["tiny"], n_highway=2)), elmo.Softmax(5000, 64)
    w = weights(bilm, softmax)

    def is_uniform(x, limit):
        return 0.98 * limit < np.abs(x).max() <= limit and abs(x.std() / limit - math.sqrt(1 / 3)) < 0.02

    def is_normal(x, std):
        return abs(x.std() / std - 1) < 0.03 and np.abs(x).max() > 3 * std
    assert is_uniform(w["char_embed"], 1.0) and is_uniform(w["CNN/W_cnn_4"], 0.05)
    assert is_normal(w["CNN_high_1/W_carry"], 496 ** -0.5)
    assert is_normal(w["CNN_high_1/W_transform"], 496 ** -0.5)
    assert is_normal(w["CNN_proj/W_proj"], 496 ** -0.5) and is_normal(w["softmax/W"], 64 ** -0.5)
    cell = "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/"
    assert is_uniform(w[cell + "W_0"], math.sqrt(6 / (128 + 1024)))
    assert is_uniform(w[cell + "W_P_0"], math.sqrt(6 / (256 + 64)))
    assert all((w[f"CNN_high_{k}/b_carry"] == -2).all() for k in range(2))
    zero = ("CNN/b_cnn_0", "CNN_high_0/b_transform", "CNN_proj/b_proj", cell + "B", "softmax/b")
    assert not any(w[name].any() for name in zero)
    tanh = weights(elmo.BiLM(replace(elmo.SIZES["tiny"], activation="tanh")))
    assert is_normal(tanh["CNN/W_cnn_4"], (5 * 16) ** -0.5)

# ---------------------------------------------------------------------------------------------------------
# 5. Softmax, full and sampled
# ---------------------------------------------------------------------------------------------------------


def test_the_full_softmax_equals_numpy():
    softmax = randomize(elmo.Softmax(11, 5))
    y, target = random(7, 5), np.array([0, 3, 10, 3, 1, 2, 9], np.int32)
    w = weights(softmax)
    close(softmax(Tensor(y), Tensor(target)), numpy_softmax(y, w["softmax/W"], w["softmax/b"], target))


def test_the_full_softmax_of_more_positions_than_fit_at_once_equals_numpy():
    softmax = randomize(elmo.Softmax(1 << 20, 2))  # 32 positions at once
    y, target, some = random(33, 2), 31_000 * np.arange(33, dtype=np.int32), [0, 31, 32]
    w = weights(softmax)
    losses = softmax(Tensor(y), Tensor(target)).asnumpy()
    assert losses.shape == (33,)
    close(losses[some], numpy_softmax(y[some], w["softmax/W"], w["softmax/b"], target[some]), 1e-4)


def sampled_inputs(classes=12, n=6, drawn=(4, 0, 7, 2, 11)):
    y, W, b = random(n, 5), random(classes, 5, seed=1), random(classes, seed=2)
    target, drawn = np.array([0, 3, 7, 7, 5, 11][:n], np.int32), np.array(drawn, np.int32)
    target_log_q, drawn_log_q = (data.log_expected_count(k, 9, classes) for k in (target, drawn))
    return y, W, b, target, drawn, target_log_q, drawn_log_q


def sampled_loss(y, W, b, target, drawn, target_log_q, drawn_log_q):
    """The program's, for arrays."""
    floats = (Tensor(np.asarray(array, np.float32)) for array in (y, W, b, target_log_q, drawn_log_q))
    y, W, b, target_log_q, drawn_log_q = floats
    undrawn = Tensor(~np.isin(target, drawn))
    return elmo.SampledSoftmaxLoss()(y, W, b, Tensor(target), Tensor(drawn), target_log_q, drawn_log_q,
                                     undrawn)


def test_the_sampled_softmax_equals_numpy_and_leaves_accidental_hits_out():
    inputs = sampled_inputs()
    assert 0 < np.isin(inputs[3], inputs[4]).sum() < len(inputs[3])
    close(sampled_loss(*inputs), numpy_sampled_softmax(*inputs).mean())


def test_the_sampled_softmax_does_not_overflow():
    y, *inputs = sampled_inputs()
    close(sampled_loss(300 * y, *inputs) / 300, numpy_sampled_softmax(300.0 * y, *inputs).mean() / 300)


def test_the_sampled_softmax_is_the_full_one_when_every_class_is_drawn():
    y, W, b, target, _, _, _ = sampled_inputs()
    everything, zero = np.arange(12, dtype=np.int32), np.zeros(12)
    close(sampled_loss(y, W, b, target, everything, zero[:6], zero), numpy_softmax(y, W, b, target).mean())


def test_the_gradient_of_the_sampled_softmax_is_right():
    y, W, b, target, drawn, target_log_q, drawn_log_q = sampled_inputs()
    w = {"y": y, "W": W, "b": b}

    def numpy_loss(w):
        return numpy_sampled_softmax(w["y"], w["W"], w["b"], target, drawn, target_log_q, drawn_log_q).mean()
    loss, rest = elmo.SampledSoftmaxLoss(), [Tensor(target), Tensor(drawn)]
    rest += [Tensor(target_log_q.astype(np.float32)), Tensor(drawn_log_q.astype(np.float32)),
             Tensor(~np.isin(target, drawn))]

    def loss_of(y, W, b):
        return loss(y, W, b, *rest)
    expected = complex_step_gradient(numpy_loss, {name: array.astype(float) for name, array in w.items()})
    for name, gradient in zip(w, ms.grad(loss_of, (0, 1, 2))(*map(Tensor, w.values()))):
        close(gradient, expected[name], 1e-6)


def test_classes_are_drawn_log_uniformly():
    classes, number, rng = 10, 20_000, np.random.default_rng(0)
    counts = np.bincount([data.log_uniform_sample(rng, 1, classes)[0][0] for _ in range(number)],
                         minlength=classes)
    expected = number * np.log((np.arange(classes) + 2) / (np.arange(classes) + 1)) / np.log(classes + 1)
    # chi-square, 9 df, 0.1 %
    assert len(counts) == classes and ((counts - expected) ** 2 / expected).sum() < 27.9


def test_drawn_classes_are_distinct_and_the_draws_are_counted():
    class Fixed:
        """Random numbers that stand for these classes, then for 0 for ever."""
        def __init__(self, classes, *drawn):
            self.numbers = iter(np.log(np.array(drawn) + 1.5) / np.log(classes + 1))

        def random(self, number):
            return np.array([next(self.numbers, 0.0) for _ in range(number)])
    for number, expected, draws in ((1, [4], 1), (2, [4, 0], 3), (3, [4, 0, 9], 6), (4, [4, 0, 9, 1], 12)):
        found, count = data.log_uniform_sample(Fixed(10, 4, 4, 0, 4, 0, 9, 9, 0, 4, 9, 0, 1), number, 10)
        assert found.tolist() == expected and count == draws
    found, count = data.log_uniform_sample(np.random.default_rng(0), 50, 50)
    assert sorted(found) == list(range(50)) and count > 50


def test_a_class_is_expected_as_often_as_it_is_not_missed_by_every_draw():
    classes, draws, rng = 6, 4, np.random.default_rng(0)
    p = np.log((np.arange(classes) + 2) / (np.arange(classes) + 1)) / np.log(classes + 1)
    assert np.isclose(p.sum(), 1)
    counts = np.exp(data.log_expected_count(np.arange(classes), draws, classes))
    close(counts, 1 - (1 - p) ** draws, 1e-12)
    simulated = rng.choice(classes, (100_000, draws), p=p)
    close(counts, [(simulated == k).any(1).mean() for k in range(classes)], 0.006)
    k, n, V = 793_470, 12_000, 793_471  # for a rare class, p n to the first order
    assert np.isclose(data.log_expected_count(k, n, V), np.log(n * np.log1p(1 / (k + 1)) / np.log(V + 1)),
                      atol=1e-3)

# ---------------------------------------------------------------------------------------------------------
# 6. ELMo: the scalar mix (section 3.2, equation 1)
# ---------------------------------------------------------------------------------------------------------


def test_the_scalar_mix_is_equation_1():
    layers, mix = random(3, 2, 4, 6), elmo.ScalarMix(3)
    close(mix([Tensor(h) for h in layers]), layers.mean(0), 1e-6)  # at first
    mix.scalar_parameters.set_data(Tensor(np.array([0.5, -1, 2], np.float32)))
    mix.gamma.set_data(Tensor(np.array([0.7], np.float32)))
    close(mix([Tensor(h) for h in layers]), numpy_mix(layers, np.array([0.5, -1, 2]), 0.7), 1e-6)


def test_layer_normalization_makes_each_tokens_mean_0_and_variance_1_before_the_mix():
    layers, mix = 3 * random(3, 2, 4, 6) + 5, elmo.ScalarMix(3, do_layer_norm=True)
    mix.scalar_parameters.set_data(Tensor(np.array([0.5, -1, 2], np.float32)))
    normal = (layers - layers.mean(-1, keepdims=True)) / layers.std(-1, keepdims=True)
    close(mix([Tensor(h) for h in layers]), numpy_mix(normal, np.array([0.5, -1, 2]), 1))
    # padding, say: all equal
    close(mix([Tensor(np.full((1, 2, 6), 3, np.float32))] * 3), np.zeros((1, 2, 6)))


SENTENCES = [["The", "cat", "sat"], ["one"], []]


def test_elmo_gives_a_mix_of_the_bilms_layers_for_each_representation(files):
    net = elmo.Elmo(files.options, files.weights, num_output_representations=2, dropout=0.0)
    net.scalar_mixes[1].scalar_parameters.set_data(Tensor(np.array([1, 2, 3], np.float32)))
    ids = batch_to_ids(SENTENCES)
    result = net(ids)
    layers, mask, _ = files.bilm(ids)
    layers = [layer.asnumpy() for layer in layers]
    assert set(result) == {"elmo_representations", "mask"} and len(result["elmo_representations"]) == 2
    assert result["elmo_representations"][0].shape == (3, 3, 10)
    assert (result["mask"].asnumpy() == mask.asnumpy()).all()
    close(result["elmo_representations"][0], numpy_mix(layers, np.zeros(3), 1))
    close(result["elmo_representations"][1], numpy_mix(layers, np.arange(1.0, 4), 1))


def test_elmo_drops_only_while_training(files):
    net, ids = elmo.Elmo(files.options, files.weights, dropout=0.5), batch_to_ids([["a", "b"]] * 16)
    quiet = net(ids)["elmo_representations"][0].asnumpy()
    assert (net(ids)["elmo_representations"][0].asnumpy() == quiet).all() and (quiet != 0).all()
    net.set_train()
    noisy = net(ids)["elmo_representations"][0].asnumpy()
    assert 0.35 < (noisy == 0).mean() < 0.65
    close(noisy[noisy != 0], 2 * quiet[noisy != 0])
    assert (net(ids)["elmo_representations"][0].asnumpy() != noisy).any()
    net.set_train(False)
    assert (net(ids)["elmo_representations"][0].asnumpy() == quiet).all()


class Classifier(nn.Cell):
    """A user's network: is there a "good" in the sentence?"""

    def __init__(self, files, requires_grad):
        super().__init__()
        self.elmo = elmo.Elmo(files.options, files.weights, dropout=0.0, requires_grad=requires_grad)
        self.dense = nn.Dense(10, 2)

    def construct(self, ids):
        result = self.elmo(ids)
        vectors = result["elmo_representations"][0] * result["mask"].astype(ms.float32)[:, :, None]
        return self.dense(vectors.sum(1))


def toy_task():
    words = np.random.default_rng(0).choice(["a", "b", "good", "bad"], (16, 3))
    return batch_to_ids(words.tolist()), Tensor((words == "good").any(1).astype(np.int32))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_gradients_reach_the_mix_and_the_bilm_where_that_is_asked_for(files, requires_grad):
    net = Classifier(files, requires_grad)
    names = {p.name for p in net.trainable_params()}
    assert {name.rpartition(".")[2] for name in names} >= {"scalar_parameters", "gamma", "weight", "bias"}
    assert any(name.endswith("char_embed") for name in names) == requires_grad
    ids, labels = toy_task()
    everything = ms.ParameterTuple(net.get_parameters())

    def loss_of(ids):
        return ops.cross_entropy(net(ids), labels)
    gradient = {p.name.rpartition(".")[2]: g.asnumpy() for p, g
                in zip(everything, ms.grad(loss_of, None, everything)(ids))}
    assert np.abs(gradient["scalar_parameters"]).max() > 1e-5 and np.abs(gradient["gamma"]).max() > 1e-5
    for name in ("char_embed", "CNN/W_cnn_1", "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/W_P_0"):
        assert (np.abs(gradient[name]).max() > 1e-5) == requires_grad


def test_fifty_steps_of_a_toy_task_lower_its_loss_in_a_compiled_network(files):
    net, (ids, labels) = Classifier(files, requires_grad=False), toy_task()
    optimizer = nn.Adam(net.trainable_params(), 0.05)

    def loss_of(ids, labels):
        return ops.cross_entropy(net(ids), labels)
    gradient = ms.value_and_grad(loss_of, None, optimizer.parameters)

    @ms.jit
    def step(ids, labels):
        loss, grads = gradient(ids, labels)
        optimizer(grads)
        return loss
    before = {p.name: p.asnumpy().copy() for p in net.get_parameters()}
    losses = [float(step(ids, labels).asnumpy()) for _ in range(50)]
    assert losses[-1] < losses[0] / 2
    changed = {name for name, p in net.parameters_dict().items() if (p.asnumpy() != before[name]).any()}
    changed = {name.rpartition(".")[2] for name in changed}
    assert {"scalar_parameters", "gamma"} <= changed and "char_embed" not in changed

# ---------------------------------------------------------------------------------------------------------
# 7. Published weights
# ---------------------------------------------------------------------------------------------------------


def fixture_file(name):
    path = os.path.join(FIXTURE, name)
    if not os.path.exists(path):
        pytest.skip(f"{path} is not there: the fixture is no part of this repository")
    return path


@pytest.fixture(scope="module")
def published():
    """AllenNLP's weights, sentences and the vectors bilm-tf gave them, in three columns of ten rows."""
    h5py = pytest.importorskip("h5py", reason="h5py, which .hdf5 files need, is not installed")
    with open(fixture_file("lm_embeddings_sentences.json"), encoding="utf-8") as file:
        columns = [[line.split() for line in column] for column in json.load(file)]
    vectors = []
    for k in range(3):
        with h5py.File(fixture_file(f"lm_embeddings_{k}.hdf5"), "r") as file:
            both = [file[str(n)][...] for n in range(10)]  # [2, words, 16]
        vectors.append([np.concatenate((forward, backward), 1) for forward, backward in both])
    bilm = elmo.BiLM(fixture_file("options.json"), fixture_file("lm_weights.hdf5"))
    return types.SimpleNamespace(bilm=bilm, columns=columns, vectors=vectors, h5py=h5py)


def test_a_fresh_model_gives_the_first_row_of_the_fixture(published):
    vectors = elmo.Embedder(published.bilm)([column[0] for column in published.columns])
    for k in range(3):
        close(vectors[k][2], published.vectors[k][0])


def test_carrying_states_from_row_to_row_gives_the_fixtures_ten_rows(published):
    bilm, longest = published.bilm, max(len(words) for column in published.columns for words in column)

    @ms.jit
    def read(ids, state):
        layers, _, state = bilm(ids, state)
        return layers[2], state

    state = elmo.zero_state(bilm.options, 3)
    for row in range(10):
        sentences = [column[row] for column in published.columns]
        ids = batch_to_ids([*sentences, ["padding"] * longest])[:3]  # all rows of one shape: compiled once
        vectors, state = read(ids, state)
        for k, words in enumerate(sentences):
            close(vectors[k, :len(words)], published.vectors[k][row])


@pytest.mark.parametrize("n_characters", [261, 262, None])
def test_261_and_262_characters_mean_the_same(published, tmp_path, n_characters):
    with open(fixture_file("options.json"), encoding="utf-8") as file:
        content = json.load(file)
    content["char_cnn"]["n_characters"] = n_characters
    if n_characters is None:
        del content["char_cnn"]["n_characters"]
    path = tmp_path / "options.json"
    path.write_text(json.dumps(content))
    bilm = elmo.BiLM(str(path), fixture_file("lm_weights.hdf5"))
    assert bilm.options == published.bilm.options
    expected = weights(published.bilm)
    assert all((array == expected[name]).all() for name, array in weights(bilm).items())


def test_an_export_holds_the_published_names_and_shapes_and_the_best_weights(trained, exported):
    import h5py
    o, n = trained.options, 12
    shapes = {"char_embed": (261, 4), "CNN/W_cnn_0": (1, 1, 4, 3), "CNN/W_cnn_1": (1, 2, 4, 4),
              "CNN/W_cnn_2": (1, 3, 4, 5),
              "CNN/b_cnn_0": (3,), "CNN/b_cnn_1": (4,), "CNN/b_cnn_2": (5,),
              "CNN_high_0/W_carry": (n, n), "CNN_high_0/b_carry": (n,), "CNN_high_0/W_transform": (n, n),
              "CNN_high_0/b_transform": (n,), "CNN_proj/W_proj": (n, 5), "CNN_proj/b_proj": (5,),
              "softmax/W": (len(trained.vocabulary), 5), "softmax/b": (len(trained.vocabulary),)}
    for d, layer in itertools.product(range(2), range(2)):
        cell = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
        shapes.update({cell + "W_0": (10, 28), cell + "B": (28,), cell + "W_P_0": (7, 5)})
    found = {}
    with h5py.File(exported, "r") as file:
        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = item[...]
        file.visititems(visit)
    assert {name: array.shape for name, array in found.items()} == shapes
    assert all(array.dtype == np.float32 for array in found.values())
    with np.load(trained.model / "best.npz") as best:
        assert all((best[name] == array).all() for name, array in found.items())
    # i, j, f, o
    forget = [array.reshape(4, o.dim)[2] for name, array in found.items() if name.endswith("/B")]
    assert all(np.abs(array).max() < 0.5 for array in forget)  # it began at 0; 1 is added when run
    succeed("export", "--device", "CPU", "--out", trained.model, "--options", trained.model / "options.json",
            "--weights", exported, "--overwrite")  # from the run, whatever else is said
    with open(trained.folder / "elmo_options.json", encoding="utf-8") as file:
        content = json.load(file)
    assert content["char_cnn"]["n_characters"] in (261, 262) and content["lstm"]["projection_dim"] == 5
    assert content["char_cnn"]["filters"] == [[1, 3], [2, 4], [3, 5]] and content["lstm"]["dim"] == 7


def test_weights_go_out_and_in_bit_by_bit(trained, trained_bilm, exported):
    bilm = trained_bilm
    softmax = elmo.Softmax(len(trained.vocabulary), 5)
    assert elmo.load_weights(str(exported), softmax, optional=True) is True
    with np.load(trained.model / "best.npz") as best:
        for name, array in weights(bilm, softmax).items():
            assert (best[name] == array).all()


def test_testing_published_weights_gives_the_perplexities_of_the_run_they_come_from(trained, exported):
    out = succeed("test", "--device", "CPU", "--data", trained.folder / "heldout.mindrecord", "--vocab",
                  trained.folder / "vocab", "--options", trained.folder / "elmo_options.json", "--weights",
                  exported)
    assert f"held-out {out.splitlines()[-1]}" == trained.out.splitlines()[-1].partition(": ")[2]


def test_fine_tuning_prints_the_perplexity_before_and_says_where_the_softmax_is_new(
        trained, files, exported, monkeypatch, tmp_path):
    monkeypatch.setattr(elmo, "make_step", lambda *args: idle_step)
    monkeypatch.chdir(tmp_path)  # where there is no heldout.mindrecord, which would be taken by itself
    command = ["train", "--device", "CPU", "--data", trained.folder / "train.mindrecord", "--vocab",
               trained.folder / "vocab", "--steps", "1", "--options", trained.folder / "elmo_options.json"]
    fresh = succeed(*command, "--weights", files.weights, "--out", "fine1")
    assert "has no softmax: that table starts fresh" in fresh and "held-out" not in fresh
    full = succeed(*command, "--weights", exported, "--out", "fine2", "--heldout",
                   trained.folder / "heldout.mindrecord")
    assert "fresh" not in full
    before = re.search(f"before training: held-out ({PERPLEXITY})", full)[1]
    assert f"held-out {before}" in trained.out.splitlines()[-1]  # it goes on where that run ended


def test_fine_tuning_stopped_before_its_first_checkpoint_starts_from_the_same_weights(
        trained, exported, monkeypatch, tmp_path):
    command, seen = training(trained.folder, tmp_path / "fine"), []

    def perplexities(bilm, softmax, corpus):
        seen.append(softmax.W.asnumpy())
        raise Killed
    monkeypatch.setattr(elmo, "perplexities", perplexities)
    for arguments in (["--weights", exported], ["--resume"]):
        with pytest.raises(Killed):
            run(*command, *arguments)
    with np.load(trained.model / "best.npz") as best:
        assert all((W == best["softmax/W"]).all() for W in seen) and len(seen) == 2


def test_a_missing_h5py_is_told_with_its_remedy(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(data.InputError, match="pip install h5py"):
        elmo.BiLM(options(), files.weights)

# ---------------------------------------------------------------------------------------------------------
# The stream of training batches
# ---------------------------------------------------------------------------------------------------------


VOCABULARY = [*SPECIAL, "the", "of", "a", "cat", "dog", "sat", "on", "mat", "."]


class Sentences:
    """A corpus in memory, with what is used of a data.Corpus."""

    def __init__(self, sentences, vocabulary=VOCABULARY):
        index = {word: k for k, word in enumerate(vocabulary)}
        self.records = [(s, np.array([index.get(word, data.UNK) for word in s], np.int32)) for s in sentences]
        self.sentences, self.tokens = len(sentences), sum(map(len, sentences))

    def read(self, indices):
        for k in indices:
            yield self.records[k]


def some_sentences(number=40, seed=0, longest=9):
    """Sentences of words inside and outside the vocabulary, all different."""
    rng = np.random.default_rng(seed)
    words = [*VOCABULARY[3:], "Stranger", "日本語", "donaudampfschifffahrtsgesellschaft", "y" * 60]
    return [[f"n{k}", *rng.choice(words, rng.integers(0, longest))] for k in range(number)]


def read_rows(windows):
    """What windows say -> for each row and direction, its [(word, target), ...] from begin to end."""
    rows = None
    for words, place, target, real in windows:
        rows = rows or [([], []) for _ in range(place.shape[2])]
        for r, row in enumerate(rows):
            for d in (0, 1):
                row[d].extend((words[p], VOCABULARY[t]) for p, t, is_real in
                              zip(place[d, :, r], target[d, :, r], real[:, r]) if is_real)
    return rows


def sentences_of_row(row):
    """The complete sentences of a row of `read_rows`; checks that both directions read them rightly."""
    forward, backward = row
    begins = [k for k, (word, _) in enumerate(forward) if word == "<S>"]
    assert begins == [k for k, (word, _) in enumerate(backward) if word == "</S>"] and begins[0] == 0

    def known(words):
        return [word if word in VOCABULARY else "<UNK>" for word in words]
    for begin, end in zip(begins, begins[1:] + [None]):
        words = [word for word, _ in forward[begin:end]][1:]
        if end is None and forward[-1][1] != "</S>":  # goes on beyond the last window
            return
        assert [target for _, target in forward[begin:end]] == known([*words, "</S>"])
        assert [word for word, _ in backward[begin:end]] == ["</S>", *words[::-1]]
        assert [target for _, target in backward[begin:end]] == known([*words[::-1], "<S>"])
        yield words


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_without_a_seed_every_prediction_comes_once_in_rows_that_carry_on():
    sentences = some_sentences()
    corpus = Sentences(sentences)
    windows = list(Rows(corpus, options()))
    assert sum(real.sum() for *_, real in windows) == corpus.tokens + corpus.sentences
    found = [words for row in read_rows(windows) for words in sentences_of_row(row)]
    assert sorted(found) == sorted(sentences)
    one_row = read_rows(Rows(corpus, options(batch_size=1)))[0]
    assert list(sentences_of_row(one_row)) == sentences  # in the order of the corpus
    # its own characters are the input
    assert any(word == "Stranger" and target != "Stranger" for word, target in one_row[0])


def test_each_epoch_shuffles_the_sentences_anew():
    sentences = some_sentences()
    corpus, o = Sentences(sentences), options(batch_size=1)
    row = read_rows(itertools.islice(Rows(corpus, o, seed=1),
                                     3 * (corpus.tokens + corpus.sentences) // 4 + 1))[0]
    found = list(sentences_of_row(row))
    epochs = [found[k:k + 40] for k in (0, 40, 80)]
    assert all(sorted(epoch) == sorted(sentences) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != sentences


def test_rows_side_by_side_take_the_sentences_of_an_epoch_once():
    sentences = some_sentences()
    row_by_row = read_rows(itertools.islice(Rows(Sentences(sentences), options(), seed=1), 100))
    begun = [forward[k + 1][0] for forward, _ in row_by_row for k
             in range(len(forward) - 1) if forward[k][0] == "<S>"]
    counts = [begun.count(words[0]) for words in sentences]
    assert 2 <= min(counts) <= max(counts) <= min(counts) + 1
    assert sum(len(list(sentences_of_row(row))) for row in row_by_row) >= len(begun) - 3


def test_a_window_names_each_word_once_and_is_full():
    windows = Rows(Sentences(some_sentences()), options(), seed=0)
    for words, place, target, real in itertools.islice(windows, 30):
        assert len(set(words)) == len(words) and set(place.ravel()) == set(range(len(words)))
        assert place.shape == target.shape == (2, 4, 3) and real.all() and real.shape == (4, 3)
        assert place.dtype == target.dtype == np.int32


def test_one_seed_gives_one_stream_and_another_seed_another():
    corpus, o = Sentences(some_sentences()), options(dropout=0.1)
    slots = Slots.measure(Rows(corpus, o, 5), o)

    def batches(seed):
        return list(itertools.islice(data.training_batches(corpus, slots, len(VOCABULARY), o, seed), 20))
    for (rows, batch, position), (rows_, batch_, position_) in zip(batches(5), batches(5)):
        assert (rows == rows_).all() and same(batch, batch_) and (position == position_).all()
    for (rows, batch, _), (rows_, batch_, _) in zip(batches(5), batches(6)):
        assert not (batch.chars[batch.words] == batch_.chars[batch_.words]).all()
        assert not (batch.keep == batch_.keep).all() and not (rows[batch.drawn] == rows_[batch_.drawn]).all()


def test_the_stream_goes_on_from_any_position_with_the_very_same_batches():
    corpus, o = Sentences(some_sentences()), options(dropout=0.1)
    slots = Slots.measure(Rows(corpus, o, 5), o)
    # 3 epochs
    stream = list(itertools.islice(data.training_batches(corpus, slots, len(VOCABULARY), o, 5), 60))
    for k in (1, 7, 16, 17, 18, 19, 20, 40):
        again = data.training_batches(corpus, slots, len(VOCABULARY), o, 5, step=k, position=stream[k - 1][2])
        again = itertools.islice(again, 12)
        for (rows, batch, position), (rows_, batch_, position_) in zip(stream[k:], again):
            assert (rows == rows_).all() and same(batch, batch_) and (position == position_).all()


def test_every_words_characters_come_back_through_place():
    words = ["a", "I", "the", "cats", "tokens", "x" * 10, "y" * 48, "z" * 60, "日本語", "<S>", "</S>"]
    place = np.random.default_rng(0).integers(0, len(words), (2, 4, 3))
    lengths = sorted(int((char_ids(word) != data.PADDING + 1).sum()) for word in words)
    assert lengths == [3, 3, 3, 3, 5, 6, 8, 11, 12, 50, 50]
    # all fit exactly; much room; one too many of 12; one slot too few; no tiers
    for tiers, size in ((((4, 3), (3, 8), (4, 50)), 11), (((20, 6), (20, 50)), 40), (((9, 11), (2, 50)), 267),
                        (((6, 6), (4, 50)), 266), (((11, 50),), 11)):
        slots = Slots(tiers)
        chars, slot = slots.fill(words, place)
        assert chars.shape == (size, 50) and slot.shape == place.shape and chars.dtype == slot.dtype == np.int32
        assert all((chars[s] == char_ids(words[p])).all() for p, s in zip(place.ravel(), slot.ravel()))
        first = 0
        for number, longest in tiers[:-1]:
            assert np.isin(chars[first:first + number, longest:], (0, data.PADDING + 1)).all()
            first += number


def test_the_slots_have_room_for_the_stream():
    corpus, o = Sentences(some_sentences(200)), options(batch_size=8)
    slots = Slots.measure(Rows(corpus, o, 0), o)
    numbers, lengths = zip(*slots.tiers)
    assert all(numbers) and list(lengths) == sorted(set(lengths)) and lengths[-1] == 50 and lengths[-2] <= 47
    shapes = {tuple(array.shape for array in slots.fill(words, place))
              for words, place, _, _ in itertools.islice(Rows(corpus, o, 0), 100)}
    assert shapes == {((sum(number for number, _ in slots.tiers), 50), (2, 4, 8))}
    wide = options(filters=((49, 5),), projection=4, batch_size=8)
    words, place, _, _ = next(iter(Rows(corpus, wide, 0)))
    chars, slot = Slots.measure(Rows(corpus, wide, 0), wide).fill(words, place)
    assert (chars[slot] == np.array([char_ids(word) for word in words])[place]).all()


def test_each_direction_subtracts_the_expected_counts_of_its_own_draws(monkeypatch):
    draws = itertools.cycle((7, 29))  # of the forward direction, of the backward
    monkeypatch.setattr(data, "log_uniform_sample", lambda rng, number, classes: (np.arange(number), next(draws)))
    corpus, o, V = Sentences(some_sentences()), options(), len(VOCABULARY)
    rows, batch, _ = next(data.training_batches(corpus, Slots(((60, 50),)), V, o, 0))
    for d, n in ((0, 7), (1, 29)):
        for which, log_q in ((batch.drawn, batch.drawn_log_q), (batch.target, batch.target_log_q)):
            k = rows[which[d]]
            p = np.log((k + 2) / (k + 1)) / math.log(V + 1)
            close(log_q[d], np.log(1 - (1 - p) ** n))


@pytest.mark.parametrize("classes, negatives, sample", [(12, 6, True), (500, 6, True), (12, 6, False)])
def test_a_batch_numbers_the_rows_of_the_softmax_that_it_touches(classes, negatives, sample):
    vocabulary = VOCABULARY + [f"rare{k}" for k in range(classes - len(VOCABULARY))]
    o = options(n_negative_samples_batch=negatives, sample_softmax=sample)
    corpus = Sentences(some_sentences(), vocabulary)
    slots, shapes, drawn_sets = Slots.measure(Rows(corpus, o, 0), o), set(), set()
    windows = iter(Rows(corpus, o, seed=0))
    for rows, batch, _ in itertools.islice(data.training_batches(corpus, slots, classes, o, 0), 10):
        words, place, target, _ = next(windows)
        target = target.reshape(2, -1)
        assert len(set(rows)) == len(rows) == min(classes, 2 * (12 + (negatives if sample else classes)))
        assert rows.min() >= 0 and rows.max() < classes
        assert (rows[batch.target] == target).all()
        assert (batch.fresh == [words[p] == "<S>" for p in place[0, 0]]).all()
        drawn = rows[batch.drawn]
        for d in (0, 1):
            assert (batch.undrawn[d] == [t not in drawn[d] for t in target[d]]).all()
            assert len(set(drawn[d])) == len(drawn[d])
            drawn_sets.add(tuple(drawn[d]))
            if not sample:
                assert sorted(drawn[d]) == list(range(classes))
                assert not batch.drawn_log_q.any() and not batch.target_log_q.any()
        shapes.add(tuple((array.shape, array.dtype.str) for array in (rows, *batch)))
    assert len(shapes) == 1  # one static graph
    assert len(drawn_sets) == (20 if sample else 1)  # fresh negatives for each step and direction


def test_dropout_masks_are_fresh_at_every_time_step_and_keep_the_share_asked_for():
    o = options(dropout=0.1, batch_size=16, unroll_steps=10, projection=12)
    corpus = Sentences(some_sentences(300))
    slots = Slots.measure(Rows(corpus, o, 0), o)
    batches = data.training_batches(corpus, slots, len(VOCABULARY), o, 0)
    keep = np.array([batch.keep for _, batch, _ in itertools.islice(batches, 5)])
    # [steps, layers + 1, 2, time, batch, projection]
    assert keep.shape == (5, 3, 2, 10, 16, 12) and keep.dtype == bool
    assert abs(keep.mean() - 0.9) < 6 * math.sqrt(0.09 / keep.size)
    for axis in range(5):
        a, b = keep.take(0, axis), keep.take(1, axis)  # two steps, layers, directions, times, rows
        assert abs((a == b).mean() - 0.82) < 6 * math.sqrt(0.82 * 0.18 / a.size)  # 0.9² + 0.1²: independent


def test_items_made_ahead_are_the_same_and_exceptions_come_through():
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert list(ahead(iter([]))) == []

    def failing():
        yield 1
        raise data.InputError("the disk is gone")
    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(data.InputError, match="the disk is gone"):
        next(items)


def test_no_more_than_a_few_items_are_made_ahead():
    made = []
    items = ahead((made.append(k) or k for k in range(100)), 2)
    assert next(items) == 0
    time.sleep(0.2)  # for the thread to make what it will
    assert len(made) <= 4  # the one taken, two that wait, one in the making
    assert list(items) == list(range(1, 100))

# ---------------------------------------------------------------------------------------------------------
# 8. One training step, and many
# ---------------------------------------------------------------------------------------------------------


def numpy_training_loss(w, text, target, state, o, negatives=None, keep=None):
    """The loss of a window and the LSTMs' state after it: text [2, time, batch], target [2, time · batch].

    negatives: for each direction the arguments of the sampled softmax, None for the full one."""
    loss, states = 0.0, []
    for d in (0, 1):
        x = numpy_encoder(np.array([[char_ids(word) for word in row] for row in text[d]]), w, o)
        outputs, state_after = numpy_direction(x, w, d, o, state[d], None if keep is None else keep[:, d])
        y = outputs[-1] if keep is None else outputs[-1] * keep[-1, d] / (1 - o.dropout)
        y, W, b = y.reshape(-1, o.projection), w["softmax/W"], w["softmax/b"]
        if negatives is None:
            losses = numpy_softmax(y, W, b, target[d])
        else:
            losses = numpy_sampled_softmax(y, W, b, target[d], *negatives[d])
        loss, states = loss + losses.mean() / 2, states + [state_after]
    return loss, np.array(states)


def trajectory(o, steps, vocabulary, loss_scale):
    """Trains a model with MindSpore and with numpy, there by dense Adagrad with gradients by complex steps.

    Yields, after each step: loss, norm of the gradient, weights, accumulators, LSTM state; the `Run`."""
    sentences = [words.split() for words in (
        "the cat sat .", "a dog", "dog dog dog dog dog", "the xy", "cat", "of the a sat")]
    corpus, run = Sentences(sentences, vocabulary), elmo.Run(o, len(vocabulary))
    randomize(run.bilm, 1), randomize(run.softmax, 2)
    w = weights(run.bilm, run.softmax)
    squares, state = {name: np.ones(array.shape) for name, array in w.items()}, np.zeros(run.lstm_state.shape)
    letters = {n - 1 for word in itertools.chain(["<S>", "</S>"], *sentences) for n in char_ids(word)}
    slots = Slots.measure(Rows(corpus, o, 0), o)
    step = elmo.make_step(run.bilm, run.accumulators, slots, loss_scale=loss_scale)
    batches = data.training_batches(corpus, slots, len(vocabulary), o, seed=0)
    both = zip(batches, Rows(corpus, o, seed=0))
    for (rows, batch, _), (words, place, target, _) in itertools.islice(both, steps):
        text, target = np.array(words)[place], target.reshape(2, -1)
        state = state * (text[0, 0] != "<S>")[:, None]  # a sentence that begins the window is read from zero
        negatives = keep = None
        if o.sample_softmax:
            negatives = [(rows[batch.drawn[d]], batch.target_log_q[d], batch.drawn_log_q[d]) for d in (0, 1)]
        if o.dropout:
            keep = batch.keep

        def loss_of(w):
            return numpy_training_loss(w, text, target, state, o, negatives, keep)
        (loss, state_after) = loss_of(w)
        gradient = complex_step_gradient(lambda w: loss_of(w)[0], w, letters)
        norm = math.sqrt(sum(((o.unroll_steps * g) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = o.unroll_steps * g * min(1, o.all_clip_norm_val / norm)
            squares[name] += g ** 2
            w[name] = w[name] - o.learning_rate * g / np.sqrt(squares[name])
        state = state_after
        run.advance(step, rows, batch)
        yield loss, norm, w, squares, state, run


def tiny_options(**changes):
    return options(**{**dict(filters=((1, 1), (2, 2)), char_dim=2, dim=3, projection=2, batch_size=2,
                             unroll_steps=3,
                             cell_clip=0.5, proj_clip=0.25), **changes})


def compiled_graphs():
    """How many graphs MindSpore has compiled so far."""
    from mindspore.graph import api
    return len(api.ms_compile_cache)


def check_trajectory(o, steps, vocabulary, loss_scale=1.0):
    clipped, graphs, states = [], [], []
    for loss, norm, w, squares, state, run in trajectory(o, steps, vocabulary, loss_scale):
        close(run.losses[-1], loss)
        close(run.lstm_state, state)
        actual = weights(run.bilm, run.softmax)
        assert actual.keys() == w.keys()
        for name in w:
            close(actual[name], w[name])
        for p in [*run.accumulators, *run.tables[2:]]:
            close(p, squares[p.name[len("adagrad/"):]], 1e-4)
        clipped.append(norm > o.all_clip_norm_val)
        graphs.append(compiled_graphs())
        states.append(state)
    h, c = np.split(np.array(states), [o.projection], -1)
    for x, limit in ((h, o.proj_clip), (c, o.cell_clip)):
        assert (np.abs(x) == limit).any() and (np.abs(x) < limit).any()
    assert any(clipped) and not all(clipped)
    assert len(set(graphs)) == 1  # nothing is compiled after the first step


def test_ten_steps_with_the_full_softmax_equal_numpy_in_every_weight():
    check_trajectory(tiny_options(sample_softmax=False, all_clip_norm_val=0.9), 10,
                     [*SPECIAL, "the", "cat", "sat", "dog"])


def test_steps_with_negatives_and_dropout_equal_numpy_in_every_weight():
    # not all are touched in a step
    vocabulary = [*SPECIAL, "the", "cat", "sat", "dog", *(f"r{k}" for k in range(17))]
    check_trajectory(tiny_options(n_negative_samples_batch=3, dropout=0.3, all_clip_norm_val=1.7), 4, vocabulary,
                     loss_scale=1024.0)  # which the gradient is divided by again


def test_only_the_rows_that_a_batch_touches_change():
    o = options(n_negative_samples_batch=3)
    vocabulary = VOCABULARY + [f"r{k}" for k in range(188)]
    corpus, run = Sentences(some_sentences(), vocabulary), elmo.Run(o, 200)
    slots = Slots.measure(Rows(corpus, o, 0), o)
    rows, batch, _ = next(data.training_batches(corpus, slots, 200, o, 0))
    before = [table.asnumpy().copy() for table in run.tables]

    def step(state, *touched_and_batch):  # in place of the compiled one: sees these rows, and adds 1 to them
        for table, seen in zip(before, touched_and_batch[:4]):
            assert (seen.asnumpy() == table[rows]).all()
        return Tensor(1.0), Tensor(1.0), state, *(seen + 1 for seen in touched_and_batch[:4])
    run.advance(step, rows, batch)
    others = np.setdiff1d(np.arange(200), rows)
    assert len(others) > 100
    for table, old in zip(run.tables, before):
        new = table.asnumpy()
        assert (new[others] == old[others]).all() and (new[rows] == old[rows] + 1).all()


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_the_softmax():
    o = options()
    corpus, run = Sentences(some_sentences()), elmo.Run(o, len(VOCABULARY))
    slots = Slots.measure(Rows(corpus, o, 0), o)
    rows, batch, _ = next(data.training_batches(corpus, slots, len(VOCABULARY), o, 0))
    before = [table.asnumpy().copy() for table in run.tables]

    def step(state, *touched_and_batch):
        return Tensor(math.nan), Tensor(1.0), state, *(seen * math.nan for seen in touched_and_batch[:4])
    with pytest.raises(data.InputError, match="step 1: the loss is nan.*--lr"):
        run.advance(step, rows, batch)
    assert all((table.asnumpy() == old).all() for table, old in zip(run.tables, before))

# ---------------------------------------------------------------------------------------------------------
# 9. A run and its checkpoints
# ---------------------------------------------------------------------------------------------------------


def test_training_logs_its_steps_and_the_heldout_perplexity_of_each_epoch(trained):
    with open(trained.model / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "step,epoch,loss,tokens_per_second,heldout_forward,heldout_backward,heldout_average"
    assert list(rows[0]) == columns.split(",")
    ends = [epoch * trained.predictions // (8 * 3) for epoch in range(1, EPOCHS + 1)]
    assert [int(row["step"]) for row in rows] == sorted({*range(10, ends[-1] + 1, 10), *ends})
    assert [int(row["epoch"]) for row in rows] == [1 + (int(row["step"]) > ends[0]) for row in rows]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.1
    at_ends = [row for row in rows if row["heldout_average"]]
    assert [int(row["step"]) for row in at_ends] == ends
    forward, backward, average = ([float(row[f"heldout_{name}"]) for row in at_ends] for name in
                                  ("forward", "backward", "average"))
    assert average[1] < average[0] < len(trained.vocabulary)
    close(average[1], math.sqrt(forward[1] * backward[1]), 1e-3)
    found = [match.groups() for match in re.finditer(f"held-out {PERPLEXITY}", trained.out)]
    expected = trained.heldout.tokens + trained.heldout.sentences
    assert found == [(f"{f:.2f}", f"{b:.2f}", f"{a:.2f}", str(expected)) for f, b, a
                     in zip(forward, backward, average)]
    assert len(re.findall(r"^step \d+ of \d+ .*sampled loss [\d.]+ .*tokens/s", trained.out,
                          re.M)) == len(rows)


def test_the_training_step_is_compiled_once(trained):
    first_epoch = trained.predictions // 24
    assert len(trained.graphs) > first_epoch > 30 and trained.graphs[0] < trained.graphs[-1]  # it can count
    # then the held-out text is read, by a graph of its own
    assert len(set(trained.graphs[:first_epoch])) == 1
    assert len(set(trained.graphs[first_epoch:])) == 1


def test_the_folder_of_a_run_holds_what_the_other_commands_need(trained):
    assert {"log.csv", "options.json", "vocab", "best.npz"} <= set(os.listdir(trained.model))
    assert not [name for name in os.listdir(trained.model) if name.endswith(".part")]
    assert elmo.read_options(str(trained.model / "options.json")) == \
        replace(trained.options, n_tokens_vocab=len(trained.vocabulary))
    assert (trained.model / "vocab").read_bytes() == (trained.folder / "vocab").read_bytes()


def test_the_last_two_checkpoints_are_kept_and_the_best_stays_the_best(trained, monkeypatch, tmp_path):
    def kept():
        return [Path(path).name for path in elmo.checkpoints(out)]
    averages = iter((10.0, 20.0, 15.0))
    monkeypatch.setattr(elmo, "make_step", lambda *args: idle_step)
    monkeypatch.setattr(elmo, "perplexities", lambda *args: elmo.Perplexities(1.0, 1.0, next(averages), 1))
    out, ends = tmp_path / "model", [trained.predictions * epoch // 24 for epoch in (1, 2, 3)]
    command = [*training(trained.folder, out), "--epochs", 3]
    killed(monkeypatch, elmo.Run, "advance", ends[1] + 2, *command)
    assert kept() == [f"step-{k}.npz" for k in (ends[1] // 15 * 15, ends[1])]
    succeed(*command, "--resume")
    assert kept() == [f"step-{k}.npz" for k in (ends[2] // 15 * 15, ends[2])]
    with np.load(out / "best.npz") as best:
        assert best["run/step"] == ends[0] and best["run/best"] == 10


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step-9.npz", "step-100.npz", "step-10.npz", "step-11.npz.part", "best.npz"):
        (tmp_path / name).touch()
    assert elmo.checkpoints(tmp_path) == [str(tmp_path / f"step-{k}.npz") for k in (9, 10, 100)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed(monkeypatch, place, name, times, *command):
    """Runs a command that is killed when a function is called for the n-th time."""
    original, calls = getattr(place, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == times:
            raise Killed
        return original(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, dying)
        with pytest.raises(Killed):
            run(*command)


def same_runs(a, b):
    """Whether two runs' folders hold the same checkpoints, bit by bit, and the same log but for the speeds."""
    logs = []
    for folder in (a, b):
        with open(folder / "log.csv", newline="") as file:
            logs.append([row[:3] + row[4:] for row in csv.reader(file)])
    names = [sorted(path.name for path in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1] and not any(name.endswith(".part") for name in names[0])
    return logs[0] == logs[1] and all((a / n).read_bytes() == (b / n).read_bytes() for n in names[0] if "npz" in n)


def test_a_run_killed_at_six_places_and_resumed_ends_bit_by_bit_as_one_that_was_not(trained, monkeypatch, tmp_path):
    out = tmp_path / "model"
    command, end_of_epoch = training(trained.folder, out), trained.predictions // 24
    out.mkdir()
    (out / "options.json.part").write_text("what a kill at the very start leaves behind")
    killed(monkeypatch, shutil, "copyfileobj", 1, *command)  # before the vocabulary is there
    killed(monkeypatch, elmo.Run, "advance", 10, *command, "--resume")  # before the first checkpoint
    killed(monkeypatch, elmo.Run, "advance", 35, *command, "--resume")  # between two
    assert sorted(path.name for path in out.glob("step-*")) == ["step-15.npz", "step-30.npz"]
    (out / "step-45.npz.part").write_text("what a kill leaves behind")
    killed(monkeypatch, np.lib.format, "write_array", 40, *command, "--resume")  # in the middle of a checkpoint
    killed(monkeypatch, elmo, "perplexities", 1, *command, "--resume")  # in a test, at the end of an epoch
    killed(monkeypatch, elmo, "write_npz", 2, *command, "--resume")  # between the best and the last checkpoint
    with np.load(out / "best.npz") as best:
        assert best["run/step"] == end_of_epoch and not (out / f"step-{end_of_epoch}.npz").exists()
    newest = elmo.checkpoints(str(out))[-1]
    os.truncate(newest, os.path.getsize(newest) // 2)
    with open(out / "log.csv", "ab") as file:
        file.write(b"\n\xff;edited,1\n7;1;1\n")
    printed = succeed(*command, "--resume")
    assert f"{newest}: damaged" in printed and "resuming after step" in printed
    assert same_runs(trained.model, out)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1:]


@pytest.mark.parametrize("harm", [
    lambda content: content[:-7],
    lambda content: flipped(content, len(content) // 2),
    lambda content: flipped(content, content.index(b"PK\x01\x02") + 10),  # the method of compression
    lambda content: content.replace(b"run/step", b"run/stop"),
    lambda content: content.replace(b"char_embed", b"char_embad"),
    lambda content: content[content.index(b"\x93NUMPY"):],  # no .npz, an .npy
    lambda content: None,  # a folder
])
def test_a_checkpoint_with_any_damage_is_told_and_the_one_before_is_taken(trained, tmp_path, harm):
    older, newest = (int(Path(path).stem[5:]) for path in elmo.checkpoints(str(trained.model)))
    shutil.copyfile(trained.model / f"step-{older}.npz", tmp_path / f"step-{older}.npz")
    content = (trained.model / f"step-{newest}.npz").read_bytes()
    damaged = harm(content)
    assert damaged != content
    if damaged is None:
        (tmp_path / f"step-{newest}.npz").mkdir()
    else:
        (tmp_path / f"step-{newest}.npz").write_bytes(damaged)
    resumed = elmo.Run(trained.options, len(trained.vocabulary))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        resumed.resume(str(tmp_path))
    assert resumed.step == older
    assert f"step-{newest}.npz: damaged" in out.getvalue() and out.getvalue().count("\n") == 1


def test_a_large_array_with_a_damaged_header_is_not_read_from_the_wrong_place(tmp_path):
    softmax, path = elmo.Softmax(300, 400), tmp_path / "step-1.npz"
    elmo.write_npz(str(path), [("softmax/W", random(300, 400))])
    elmo.load_npz(str(path), [softmax.W])
    content = path.read_bytes()
    path.write_bytes(flipped(content, content.index(b"NUMPY") + 7))  # the header's length
    with np.load(path) as arrays:
        assert (arrays["softmax/W"] != random(300, 400)).any()  # numpy does not notice
    with pytest.raises(data.InputError, match="step-1.npz: damaged"):
        elmo.load_npz(str(path), [softmax.W])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_run_after_a_checkpoint_and_tells_how_to_go_on(trained, monkeypatch, tmp_path, name):
    advance, out = elmo.Run.advance, tmp_path / "model"

    def signalled(self, *args):
        advance(self, *args)
        if self.step == 7:
            os.kill(os.getpid(), getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(elmo.Run, "advance", signalled)
        printed = succeed(*training(trained.folder, out), "--epochs", 1)
    assert "stopped after step 7" in printed and f"--out {out}" in printed and "--resume" in printed
    assert elmo.checkpoints(str(out)) == [str(out / "step-7.npz")]
    if name == "SIGTERM":  # more epochs, as if it had been begun with them
        succeed(*training(trained.folder, out), "--epochs", EPOCHS, "--resume")
        assert same_runs(trained.model, out)


def test_resuming_a_run_that_is_over_changes_nothing(trained):
    before = tree(trained.model)
    assert "all steps are done" in succeed("train", "--device", "CPU", "--data", trained.folder / "train.mindrecord",
                                           "--heldout", trained.folder / "heldout.mindrecord", "--out", trained.model,
                                           "--resume")
    assert tree(trained.model) == before


@pytest.mark.parametrize("change, message", [
    (["--lr", 0.5], "learning_rate 0.2, not 0.5"),
    (["--batch-size", 4], "batch_size 8, not 4"),
    (["--seed", 1], "run.seed 0, not 1"),
    (["--amp", "float16"], "run.amp None, not 'float16'"),
    (["--options", "dim8.json"], "lstm.dim 7, not 8"),
    (["--data", "heldout.mindrecord"], "run.data"),
    (["--heldout", "train.mindrecord"], "run.heldout"),
    (["--weights", "elmo_weights.hdf5"], "run.weights None, not '"),
    (["--vocab", "other_vocab", "--data", "other.mindrecord", "--heldout", "other.mindrecord"], "run.vocabulary"),
])
def test_another_run_is_not_resumed(trained, monkeypatch, tmp_path, change, message):
    monkeypatch.chdir(trained.folder)
    if "other_vocab" in change:
        words = Path("vocab").read_text(encoding="utf-8").split()
        Path("other_vocab").write_text("\n".join(words[:3] + words[:2:-1]), encoding="utf-8")
        succeed("--input", "text.txt", "--output", "other.mindrecord", "--vocab", "other_vocab", program=data)
    elmo.write_json("dim8.json", elmo.as_json(replace(trained.options, dim=8)))
    before = tree(trained.model)
    status, _, errors = run(*training(trained.folder, trained.model), "--resume", *change)
    assert status == 2 and errors.count("\n") == 1 and message in errors
    assert tree(trained.model) == before


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoints(trained, monkeypatch, tmp_path):
    write_array, calls = np.lib.format.write_array, itertools.count()

    def full(*args, **kwargs):
        if next(calls) > 60:  # in the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        write_array(*args, **kwargs)
    monkeypatch.setattr(np.lib.format, "write_array", full)
    status, _, errors = run(*training(trained.folder, tmp_path / "model"))
    assert status == 2 and errors.count("\n") == 1
    assert "step-30.npz: could not be written (No space left on device)" in errors
    assert [path.name for path in (tmp_path / "model").glob("*.npz*")] == ["step-15.npz"]


def test_a_disk_too_full_for_hdf5_is_one_line(trained, exported, monkeypatch, tmp_path):
    (tmp_path / "in.txt").write_text("the cat\n")
    monkeypatch.setattr(elmo.shutil, "disk_usage", lambda path: FullDisk)
    common = ["--device", "CPU", "--out", trained.model]
    for command in (["embed", "--input", tmp_path / "in.txt", "--output", tmp_path / "new.hdf5"],
                    ["export", "--weights", tmp_path / "new.hdf5"]):
        status, _, errors = run(*command, *common)
        assert status == 2 and "new.hdf5: could not be written (No space left on device)" in errors
        assert errors.splitlines()[-1].startswith("elmo.py: error: ")
        assert os.listdir(tmp_path) == ["in.txt"]


def test_a_disk_too_full_for_the_log_is_one_line(monkeypatch, tmp_path):
    log = elmo.Log(str(tmp_path), types.SimpleNamespace(step=3, losses=[1.0]), 24)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(elmo, "open", full, raising=False)
    with pytest.raises(data.InputError, match="log.csv: No space left on device; .*--resume"):
        log.line(1, 5, None)

# ---------------------------------------------------------------------------------------------------------
# 10. Test: perplexity
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, unroll_steps", [(2, 4), (5, 7), (50, 7)])  # the last: more rows than sentences
def test_the_perplexity_is_that_of_numpy_over_every_prediction_once(batch_size, unroll_steps):
    o = options(batch_size=batch_size, unroll_steps=unroll_steps, dropout=0.1)  # no dropout when testing
    corpus = Sentences(some_sentences(23))
    bilm, softmax = randomize(elmo.BiLM(o)), randomize(elmo.Softmax(len(VOCABULARY), o.projection), 1)
    w, losses = weights(bilm, softmax), ([], [])
    for row in filter(all, read_rows(Rows(corpus, o))):  # but for rows without a sentence
        for d in (0, 1):  # the whole row in one go, no windows
            x = numpy_encoder(np.array([char_ids(word) for word, _ in row[d]]), w, o)
            target = [VOCABULARY.index(target) for _, target in row[d]]
            losses[d].extend(numpy_softmax(numpy_direction(x, w, d, o)[0][-1], w["softmax/W"], w["softmax/b"],
                                           target))
    assert len(losses[0]) % (batch_size * unroll_steps) != 0  # the last window is not full
    result = elmo.perplexities(bilm, softmax, corpus)
    assert result.predictions == len(losses[0]) == corpus.tokens + corpus.sentences
    np.testing.assert_allclose(result[:3], np.exp([np.mean(losses[0]), np.mean(losses[1]), np.mean(losses)]),
                               rtol=1e-5)


def test_the_perplexity_of_a_model_that_has_gone_astray_is_infinite_and_no_error():
    o = options(batch_size=2, unroll_steps=4)
    softmax = randomize(elmo.Softmax(len(VOCABULARY), o.projection), 1, scale=1e6)
    assert elmo.perplexities(elmo.BiLM(o), softmax, Sentences(some_sentences(3))).average == math.inf


def test_perplexities_are_printed_in_the_form_that_other_programs_read():
    line = str(elmo.Perplexities(252.3149, 242.189, 247.2, 61244))
    assert line == "perplexity forward 252.31 backward 242.19 average 247.20 over 61244 predictions"


def test_testing_prints_last_the_perplexities_of_the_best_epoch(trained):
    out = succeed("test", "--device", "CPU", "--data", trained.folder / "heldout.mindrecord", "--out",
                  trained.model)
    last = out.splitlines()[-1]
    assert re.fullmatch(PERPLEXITY, last)
    assert f"held-out {last}" in trained.out.splitlines()[-1]

# ---------------------------------------------------------------------------------------------------------
# 10. Embed
# ---------------------------------------------------------------------------------------------------------


LINES = ["the cat sat on the mat .", "", "Stranger", " ".join(f"w{k % 7}" for k in range(300)), "   ", "a b",
         "z" * 80 + " 日本語"]


@pytest.fixture(scope="module")
def embedded(trained):
    """LINES and their vectors, as `embed` wrote them."""
    text, vectors = trained.folder / "sentences.txt", trained.folder / "vectors.npz"
    text.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    succeed("embed", "--device", "CPU", "--out", trained.model, "--input", text, "--output", vectors)
    with np.load(vectors) as file:
        assert file.files == [str(k) for k in range(len(LINES))]
        return [file[name] for name in file.files]


def test_embedding_gives_an_array_for_each_line_blank_ones_too(embedded):
    assert [array.shape for array in embedded] == [(3, len(line.split()), 10) for line in LINES]
    assert all(array.dtype == np.float32 for array in embedded)


def test_embedded_sentences_equal_numpy_and_the_bilm(trained_bilm, embedded):
    bilm, w, o = trained_bilm, weights(trained_bilm), trained_bilm.options
    for line, array in zip(LINES, embedded):
        close(array, numpy_layers(line.split(), w, o)[0])
    layers, _, _ = bilm(batch_to_ids([LINES[0].split(), LINES[2].split()]))
    for k, n in ((0, 0), (1, 2)):
        for h, array in zip(layers, embedded[n]):
            close(array, h.asnumpy()[k, :len(array)], 1e-6)


def test_an_hdf5_file_holds_the_same_vectors_in_any_order_of_the_sentences(trained, embedded, exported):
    import h5py
    text, vectors = trained.folder / "reversed.txt", trained.folder / "vectors.hdf5"
    text.write_text("\n".join(LINES[::-1]), encoding="utf-8")  # no line end at the end
    succeed("embed", "--device", "CPU", "--options", trained.folder / "elmo_options.json", "--weights",
            exported,
            "--input", text, "--output", vectors)
    with h5py.File(vectors, "r") as file:
        assert sorted(file, key=int) == [str(k) for k in range(len(LINES))]
        for k, array in enumerate(embedded[::-1]):
            close(file[str(k)][...], array, 1e-6)
            assert file[str(k)].dtype == np.float32


def test_lines_are_numbered_on_from_block_to_block(tmp_path):
    embedder, path = elmo.Embedder(randomize(elmo.BiLM(options()))), tmp_path / "text.txt"
    text = "a b\n\n \nc\u2028d \x0c e\r f\n" + "g h i\n" * 20  # none but \n ends a line
    path.write_text(text, encoding="utf-8", newline="")
    shapes = [(name, len(vectors[0])) for name, vectors in elmo.sentence_vectors(embedder, str(path), 10)]
    assert shapes == [(str(k), n) for k, n in enumerate([2, 0, 0, 4] + 20 * [3])]
    path.write_bytes(text.encode() + b"\xff\n")
    with pytest.raises(data.InputError, match="line 25 is not UTF-8"):
        list(elmo.sentence_vectors(embedder, str(path), 10))


def test_sentences_of_one_to_five_thousand_tokens_and_many_at_once_equal_numpy():
    bilm, rng = randomize(elmo.BiLM(options())), np.random.default_rng(0)
    long, short = [f"w{n}" for n in rng.integers(0, 90, 5000)], [[f"w{k % 50}"] for k in range(12_100)]
    vectors, w = elmo.Embedder(bilm)([long, *short]), weights(bilm)
    close(vectors[0], numpy_layers(long, w, bilm.options)[0])
    expected = [numpy_layers(words, w, bilm.options)[0] for words in short[:50]]
    assert len(vectors) == 12_101
    close(np.array(vectors[1:]), np.array([expected[k % 50] for k in range(12_100)]))


def test_an_embedder_of_few_rows_and_small_memory_gives_the_same_vectors(monkeypatch):
    bilm, rng = randomize(elmo.BiLM(options())), np.random.default_rng(0)
    sentences = [[f"w{n}" for n in rng.integers(0, 90, rng.integers(0, 20))] for _ in range(60)]
    monkeypatch.setattr(elmo.Embedder, "ROWS", 4)
    monkeypatch.setattr(elmo.Embedder, "WORDS", 50)
    embedder, w = elmo.Embedder(bilm), weights(bilm)
    graphs = None
    for block in (sentences[:30], sentences[30:], sentences[:2]):
        for words, array in zip(block, embedder(block)):
            close(array, numpy_layers(words, w, bilm.options)[0])
        graphs = graphs or compiled_graphs()
    assert compiled_graphs() == graphs
    assert embedder([]) == []

# ---------------------------------------------------------------------------------------------------------
# More than one device
# ---------------------------------------------------------------------------------------------------------


def test_several_workers_share_each_window_and_the_negatives():
    corpus, one, two = Sentences(some_sentences()), options(batch_size=6), options(batch_size=3)
    slots = Slots(((60, 50),))
    whole = data.training_batches(corpus, slots, len(VOCABULARY), one, 0)
    parts = [data.training_batches(corpus, slots, len(VOCABULARY), two, 0, worker=w, workers=2) for w in (0, 1)]
    for (rows, batch, position), *shares in itertools.islice(zip(whole, *parts), 20):
        for share_rows, _, share_position in shares:
            assert (share_rows == rows).all() and (share_position == position).all()
        for name, axis in (("fresh", 0), ("target", 2), ("target_log_q", 2), ("undrawn", 2)):
            joined = [getattr(share, name) for _, share, _ in shares]
            if axis == 2:
                joined = [array.reshape(2, 4, 3) for array in joined]
            assert (np.concatenate(joined, axis).reshape(getattr(batch, name).shape) == getattr(batch, name)).all()
        assert all((share.drawn == batch.drawn).all() for _, share, _ in shares)
        text = [share.chars[share.words] for _, share, _ in shares]
        assert (np.concatenate(text, 2) == batch.chars[batch.words]).all()


def test_two_workers_train_as_one_with_twice_the_rows(trained, tmp_path):
    o = replace(trained.options, dropout=0.0)
    elmo.write_json(str(tmp_path / "options.json"), elmo.as_json(o))
    losses = []
    for workers in (1, 2):
        out = tmp_path / f"workers{workers}"
        command = [elmo.__file__, "train", "--device", "CPU", "--data", trained.folder / "train.mindrecord", "--vocab",
                   trained.folder / "vocab", "--heldout", trained.folder / "heldout.mindrecord", "--options",
                   tmp_path / "options.json", "--out", out, "--log-every", 1, "--steps", 20, "--batch-size",
                   8 // workers]
        if workers == 1:
            succeed(*command[1:])
        else:
            programs = os.path.dirname(sys.executable)
            environment = {**os.environ, "PATH": programs + os.pathsep + os.environ["PATH"]}  # msrun's `python` is ours
            with socket.create_server(("localhost", 0)) as server:
                port = server.getsockname()[1]
            subprocess.run(list(map(str, [f"{programs}/msrun", "--worker_num=2", "--local_worker_num=2", "--join=True",
                                          f"--master_port={port}", f"--log_dir={tmp_path}", *command])),
                           check=True, capture_output=True, timeout=300, env=environment)
        with open(out / "log.csv", newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert len(losses[0]) == 20
    close(losses[1], losses[0], 1e-4)

# ---------------------------------------------------------------------------------------------------------
# Half precision
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp, eps", [("float16", 2.0 ** -11), ("bfloat16", 2.0 ** -8)])
def test_amp_rounds_what_is_multiplied_and_nothing_else(amp, eps):
    x, y = random(5, 64, seed=1), random(64, 7, seed=2)
    product = elmo.MatMul(amp)(Tensor(x), Tensor(y)).asnumpy()
    assert product.dtype == np.float32
    error, bound = np.abs(product - x.astype(float) @ y), np.abs(x) @ np.abs(y)
    assert eps / 100 < (error / bound).max() < 3 * eps
    plain, half = elmo.BiLM(options(), seed=1), elmo.BiLM(options(), seed=1, amp=amp)
    ids = batch_to_ids([["the", "cat", "sat"]])
    a, b = (bilm(ids)[0][-1].asnumpy() for bilm in (plain, half))
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 100 * eps * np.abs(a).max()


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_training_in_half_precision_follows_training_in_float32(trained, tmp_path, amp):
    printed = succeed(*training(trained.folder, tmp_path / "model"), "--amp", amp)
    averages = [[float(match[3]) for match in re.finditer(PERPLEXITY, text)] for text in (trained.out, printed)]
    assert len(averages[1]) == EPOCHS
    assert "all steps are done" in succeed(*training(trained.folder, tmp_path / "model"), "--resume")  # amp as it was
    close(np.log(averages[1]), np.log(averages[0]), 0.02)

# ---------------------------------------------------------------------------------------------------------
# Ascend, as far as it can be known without one
# ---------------------------------------------------------------------------------------------------------


# No "Supported Platforms" in their documentation; each is named in MindSpore's library for Ascend.
UNDOCUMENTED = {"ClampScalar", "Divs", "InplaceAddExt", "LessScalar", "Muls", "ReluGrad", "SigmoidGrad",
                "SplitWithSize", "StridedSliceGrad", "SumExt"}
# Of the graph itself; they compute nothing.
STRUCTURE = {"Depend", "Load", "MakeTuple", "StopGradient", "TupleGetItem", "UpdateState"}


def platforms(operator):
    """What an operator's documentation says of the platforms that it runs on, None where it says nothing."""
    for place in (ops, ops.operations, ops.auto_generate):
        found = getattr(place, operator, None)
        while found is not None:
            text = inspect.getdoc(found) or ""
            supported = re.search(r"Supported Platforms:\s*(.*)", text)
            if supported:
                return supported[1]
            elsewhere = re.search(r"Refer to :func:`mindspore\.ops\.(\w+)`", text)
            found = getattr(ops, elsewhere[1], None) if elsewhere else None
    return None


def test_the_graphs_of_training_testing_and_embedding_are_static_and_made_for_ascend(trained, tmp_path):
    environment = {**os.environ, "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(tmp_path / "graphs")}
    (tmp_path / "text.txt").write_text("the cat\n")
    program = f"""if True:
        import sys; sys.path.insert(0, {os.path.dirname(elmo.__file__)!r}); import elmo
        out = {str(tmp_path / 'model')!r}
        assert elmo.main({list(map(str, training(trained.folder, tmp_path / 'model')))!r} + ["--steps", "1"]) == 0
        assert elmo.main(["embed", "--device", "CPU", "--out", out, "--input", {str(tmp_path / 'text.txt')!r},
                          "--output", {str(tmp_path / 'vectors.npz')!r}]) == 0"""
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    graphs = [path.read_text() for path in (tmp_path / "graphs").rglob("*jit_opt_b*.ir")]
    assert len(graphs) == 4  # training, testing; encoding and reading of the embedder
    shapes = set(re.findall(r"<Tensor\[\w+\], \(([^)]*)\)>", "".join(graphs)))
    assert len(shapes) > 50 and not any("-" in shape for shape in shapes)
    operators = set(re.findall(r"= (?:PrimFunc_)?([A-Z]\w*)\(", "".join(graphs))) - STRUCTURE
    assert len(operators) > 30
    found = {operator: platforms(operator) for operator in operators}
    assert [operator for operator, text in found.items() if text and "Ascend" not in text] == []
    assert {operator for operator, text in found.items() if not text} <= UNDOCUMENTED

# ---------------------------------------------------------------------------------------------------------
# 11. Command line: bad input
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(trained, files, exported):
    """A folder of things that cannot be used; the names in the table below are those in it."""
    import h5py
    folder = trained.folder / "bad"
    folder.mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes("a b\nnaïve\n".encode("latin-1"))
    (folder / "fine.txt").write_text("a b\n")
    (folder / "exists.npz").write_text("precious")
    (folder / "exists.hdf5").write_text("precious")
    (folder / "folder.npz").mkdir()
    (folder / "other_vocab").write_text("\n".join([*SPECIAL, "the", "cat"]) + "\n")
    (folder / "wide.json").write_text(with_value("lstm", "projection_dim", 13))
    elmo.write_json(str(folder / "dim8.json"), elmo.as_json(replace(trained.options, dim=8)))
    elmo.write_json(str(folder / "large_batch.json"), elmo.as_json(replace(trained.options, batch_size=1000)))
    elmo.write_json(str(folder / "negatives.json"),
                    elmo.as_json(replace(trained.options, n_negative_samples_batch=10_000)))
    (folder / "text.hdf5").write_text("no HDF5 at all")
    content = exported.read_bytes()
    (folder / "cut.hdf5").write_bytes(content[:len(content) // 2])
    with h5py.File(exported, "r") as whole, h5py.File(folder / "lacking.hdf5", "w") as file:
        for name in whole:
            if name != "CNN_proj":
                whole.copy(name, file)
    for name in ("cut.mindrecord", "alone.mindrecord"):
        content = (trained.folder / "train.mindrecord").read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2] if name == "cut.mindrecord" else content)
    (folder / "cut.mindrecord.db").write_bytes((trained.folder / "train.mindrecord.db").read_bytes())
    (folder / "run").mkdir()
    for name in os.listdir(trained.model):
        content = (trained.model / name).read_bytes()
        (folder / "run" / name).write_bytes(content[:len(content) // 2] if name.endswith("npz") else content)
    for name, change in (("float64", lambda array: array.astype(float)), ("scalar", lambda array: array.sum())):
        shutil.copyfile(exported, folder / f"{name}.hdf5")
        with h5py.File(folder / f"{name}.hdf5", "r+") as file:
            changed = change(file["char_embed"][...])
            del file["char_embed"]
            file["char_embed"] = changed
    shutil.copyfile(exported, folder / "null.hdf5")
    with h5py.File(folder / "null.hdf5", "r+") as file:
        del file["char_embed"]
        file["char_embed"] = h5py.Empty("f")
    shutil.copyfile(exported, folder / "group.hdf5")
    with h5py.File(folder / "group.hdf5", "r+") as file:
        del file["char_embed"]
        file.create_group("char_embed/deeper")
    for name, content in (("pickle", {"char_embed": np.array([print, {}], dtype=object)}), ("lacking", {"x": 1}),
                          ("shapes", {"char_embed": np.zeros((3, 3), np.float32)})):
        shutil.copytree(folder / "run", folder / f"run_{name}")
        np.savez(folder / f"run_{name}" / "best.npz", **content)
    (folder / "binary").write_bytes(bytes(range(256)) * 4096)
    for name, change in (("seed", -1), ("amp", "float8"), ("weights", 1)):
        shutil.copytree(folder / "run", folder / f"run_{name}")
        content = json.loads((folder / "run" / "options.json").read_text())
        content["run"][name] = change
        (folder / f"run_{name}" / "options.json").write_text(json.dumps(content))
    (folder / "run_none").mkdir()
    shutil.copyfile(folder / "dim8.json", folder / "run_none" / "options.json")
    shutil.copytree(folder / "run", folder / "run_vocab")
    (folder / "run_vocab" / "vocab").write_bytes(b"")
    (folder / "huge.json").write_text(with_value("lstm", "dim", 65536))
    return folder


TRAIN = "train --device CPU --data ../train.mindrecord --vocab ../vocab --options ../options.json --out new"
EMBED = "embed --device CPU --out ../model --input fine.txt --output new.npz"


@pytest.mark.parametrize("command, message", [
    (TRAIN.replace("CPU", "TPU"), "TPU"),
    ("train --sizes", "--sizes"),
    ("fly", "fly"),
    (TRAIN + " --epochs 0", "--epochs"), (TRAIN + " --steps -1", "--steps"),
    (TRAIN + " --batch-size x", "--batch-size"),
    (TRAIN + " --lr -1", "lr"), (TRAIN + " --lr nan", "lr"), (TRAIN + " --batch-size 100000", "batch"),
    (TRAIN + " --seed -1", "seed"),
    (TRAIN.replace("../options.json", "gone.json"), "gone.json: "),
    (TRAIN.replace("../options.json", "wide.json"), "projection_dim 13"),
    (TRAIN.replace("../options.json", "large_batch.json"), "less than one batch of 1000 × 3 = 3,000"),
    (TRAIN.replace("../options.json", "negatives.json"), "n_negative_samples_batch"),
    (TRAIN.replace("../train.mindrecord", "gone.mindrecord"), "gone.mindrecord: no such file"),
    (TRAIN.replace("../train.mindrecord", "alone.mindrecord"), "alone.mindrecord.db: no such file"),
    (TRAIN.replace("../train.mindrecord", "cut.mindrecord"), "cut.mindrecord: damaged"),
    (TRAIN.replace("../vocab", "gone_vocab"), "gone_vocab: "),
    (TRAIN.replace("../vocab", "fine.txt"), "fine.txt: "),
    (TRAIN.replace("../vocab", "other_vocab"), "made with another vocabulary"),
    (TRAIN + " --heldout gone.mindrecord", "gone.mindrecord: no such file"),
    (TRAIN.replace("--out new", "--out ../model"), "../model: is not empty"),
    (TRAIN.replace("--out new", "--out fine.txt"), "fine.txt: "),
    (TRAIN + " --weights gone.hdf5", "gone.hdf5: no such file"),
    (TRAIN + " --weights text.hdf5", "text.hdf5: not a readable HDF5 file"),
    (TRAIN + " --weights cut.hdf5", "cut.hdf5: not a readable HDF5 file"),
    (TRAIN + " --weights lacking.hdf5", "lacking.hdf5: has no dataset CNN_proj/W_proj"),
    (TRAIN.replace("../options.json", "dim8.json") + " --weights ../elmo_weights.hdf5",
     "Cell0/LSTMCell/W_0 is float32 [10, 28], but these options ask for float32 [10, 32]"),
    (TRAIN.replace("../options.json", "binary"), "binary: not JSON"),
    (TRAIN.replace("../options.json", "../vocab"), "vocab: not JSON"),
    (TRAIN.replace("../options.json", "."), ".: "),
    (TRAIN.replace("../train.mindrecord", "binary"), "binary.db: no such file"),
    (TRAIN.replace("../train.mindrecord", "."), ".: no such file"),
    (TRAIN.replace("../vocab", "binary"), "binary: not UTF-8 at byte"),
    (TRAIN.replace("../vocab", "../train.mindrecord"), "train.mindrecord: "),
    (TRAIN.replace("../vocab", "."), ".: "),
    (TRAIN + " --amp float8", "--amp"),
    (TRAIN + " --resume", "new: no run to resume"),
    (TRAIN + " --seed 1e3", "--seed"), (TRAIN + " --lr inf", "--lr"),
    (TRAIN + " --epochs 99999999999999999999", "--epochs"),
    (TRAIN + " --epochs 2000000", "--epochs"), (TRAIN + " --lr 1e-300", "--lr"),
    (TRAIN + " --batch-size 99999999999999999999", "--batch-size"),
    (TRAIN + " --weights binary", "binary: not a readable HDF5 file"),
    (TRAIN + " --weights .", ".: "),
    (TRAIN + " --weights float64.hdf5", "char_embed is float64 [261, 4], but these options ask for float32 [261, 4]"),
    (TRAIN + " --weights scalar.hdf5", "char_embed is float32 []"),
    (TRAIN + " --weights group.hdf5", "has no dataset char_embed"),
    (TRAIN + " --weights null.hdf5", "null.hdf5: not a readable HDF5 file"),
    (TRAIN.replace("--out new", "--out /proc/none/new"), "/proc/none"),
    (TRAIN.replace("--out new", "--out run") + " --resume --heldout ../heldout.mindrecord",
     "run: all of its checkpoints are damaged"),
    (TRAIN.replace("--out new", "--out run_seed") + " --resume", "options.json: damaged"),
    (TRAIN.replace("--out new", "--out run_amp") + " --resume", "options.json: damaged"),
    (TRAIN.replace("--out new", "--out run_weights") + " --resume", "options.json: damaged"),
    (TRAIN.replace("--out new", "--out run_none") + " --resume", "options.json: damaged"),
    ("test --device CPU --out run_pickle --data ../heldout.mindrecord", "best.npz: damaged"),
    ("test --device CPU --out run_lacking --data ../heldout.mindrecord", "best.npz: damaged"),
    ("test --device CPU --out run_shapes --data ../heldout.mindrecord", "best.npz: damaged"),
    ("test --device CPU --out run_vocab --data ../heldout.mindrecord", "vocab: lines 1 to 3 must be"),
    (EMBED.replace("fine.txt", "binary"), "binary: line 2 is not UTF-8"),
    (EMBED.replace("--out ../model", "--options huge.json --weights ../elmo_weights.hdf5"), "these options ask for"),
    (EMBED.replace("new.npz", "/proc/none/new.npz"), "/proc/none"),
    ("test --device CPU --out gone --data ../heldout.mindrecord", "gone: no such folder"),
    ("test --device CPU --out run --data ../heldout.mindrecord", "best.npz: damaged"),
    ("test --device CPU --out ../model --data gone.mindrecord", "gone.mindrecord: no such file"),
    ("test --device CPU --weights ../elmo_weights.hdf5 --data ../heldout.mindrecord", "--options"),
    ("test --device CPU --options ../elmo_options.json --weights NO_SOFTMAX --vocab ../vocab "
     "--data ../heldout.mindrecord",
     "softmax"),
    ("test --device CPU --options ../elmo_options.json --weights ../elmo_weights.hdf5 --vocab other_vocab "
     "--data ../heldout.mindrecord", "softmax/W is float32"),
    (EMBED.replace("fine.txt", "gone.txt"), "gone.txt: "),
    (EMBED.replace("fine.txt", "empty.txt"), "empty.txt: is empty"),
    (EMBED.replace("fine.txt", "latin1.txt"), "latin1.txt: line 2 is not UTF-8"),
    (EMBED.replace("fine.txt", "."), ".: "),
    (EMBED.replace("new.npz", "exists.npz"), "exists.npz: exists"),
    (EMBED.replace("new.npz", "folder.npz --overwrite"), "folder.npz: exists; choose another name\n"),
    (EMBED.replace("new.npz", "new.txt"), ".npz"),
    (EMBED.replace("new.npz", "gone/new.npz"), "gone/new.npz"),
    (EMBED.replace("new.npz", "gone/new.hdf5"), "gone/new.hdf5"),
    (EMBED.replace(" --input fine.txt", ""), "--input"),
    ("export --device CPU --out ../model", "--weights"),
    ("export --device CPU --out ../model --weights exists.hdf5", "exists.hdf5: exists"),
    ("export --device CPU --out gone --weights new.hdf5", "gone: no such folder"),
    ("export --device CPU --out ../model --weights gone/new.hdf5", "gone/new.hdf5"),
])
def test_bad_input_of_elmo_py_is_one_line_and_leaves_nothing_behind(trained, files, bad, monkeypatch, command, message):
    monkeypatch.chdir(bad)
    before = tree(trained.folder)
    try:
        status, _, errors = run(*command.replace("NO_SOFTMAX", files.weights).split())
    finally:
        after = tree(trained.folder)
        shutil.rmtree("new", ignore_errors=True)  # the next command of the table must not stumble over it
    assert status == 2
    assert errors.startswith("elmo.py: error: ") and errors.count("\n") == 1 and message in errors
    assert after == before


def test_the_names_that_other_programs_rely_on_are_accepted():
    args = elmo.parse_arguments("--device_target CPU --data_url D --heldout H --vocab_path V --options_path O"
                                " --train_url T --epoch_num 3 --steps 4 --lr 0.5 --batch-size 6 --seed 7 --log-every 8"
                                " --save-every 9 --weights W".split())
    assert (args.command, args.device, args.data, args.heldout, args.vocab) == ("train", "CPU", "D", "H", "V")
    assert (args.options, args.out, args.n_epochs, args.steps, args.learning_rate) == ("O", "T", 3, 4, 0.5)
    assert (args.batch_size, args.seed, args.log_every, args.save_every, args.weights) == (6, 7, 8, 9, "W")
    assert elmo.parse_arguments([]).device == "Ascend"


def test_a_machine_without_ascend_is_told_of_the_cpu(monkeypatch):
    def set_device(name):
        raise RuntimeError("many\nlines")
    monkeypatch.setattr(ms, "set_device", set_device)
    status, _, errors = run("train")
    assert status == 2 and errors.count("\n") == 1 and "Ascend" in errors and "--device CPU" in errors

# ---------------------------------------------------------------------------------------------------------
# README
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme():
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "README.md"), encoding="utf-8") as file:
        return file.read()


def test_the_programs_of_the_readme_run_as_written(readme, files, tmp_path):
    for name in (files.options, files.weights):
        shutil.copy(name, tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "brown").mkdir()
    for name, sentences in (("train_12k", 20), ("heldout", 2400)):  # in place of Brown and its vectors
        text = rng.choice(["play/nn", "play/vb-hl", "the/at", "1\\/2/cd", "new/jj"], (sentences, 40))
        (tmp_path / "brown" / f"{name}.tagged").write_text("\n".join(map(" ".join, text)))
        (tmp_path / f"{name}.txt").write_text("\n".join(" ".join(t.rpartition("/")[0] for t in line) for line in text))
        elmo.write_npz(str(tmp_path / f"{name}.npz"),
                       ((str(k), rng.normal(size=(3, 40, 6))) for k in range(sentences)))
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(programs) == 4 and all(len(program.splitlines()) <= 30 for program in programs)
    assert len(next(program for program in programs if "Classifier" in program).splitlines()) <= 25
    for program in programs:
        (tmp_path / "program.py").write_text(program, encoding="utf-8")
        result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": os.path.dirname(elmo.__file__)})
        assert result.returncode == 0 and result.stdout, result.stderr


def test_the_commands_of_the_readme_are_understood(readme):
    commands = re.findall(r"^ *python (data|elmo)\.py (.*?)(?: +#.*)?$", "\n".join(
        re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)), re.MULTILINE)
    assert len(commands) > 8
    for program, arguments in commands:
        {"data": data, "elmo": elmo}[program].parse_arguments(arguments.replace("'", "").split())


def test_the_table_of_the_readme_says_where_the_paper_is(readme):
    rows = re.findall(r"^\| .* \| `([\w.]+)` \| (\d+) \|$", readme, re.MULTILINE)
    assert len(rows) > 8
    for name, lines in rows:
        part = functools.reduce(getattr, name.split("."), elmo)
        assert (name, len(inspect.getsource(part).splitlines())) == (name, int(lines))
