"""The specification of this project, as tests: `python -m pytest test_elmo.py`.

First the paper's parts, each against plain numpy, and ELMo as a layer of a network; then published
weights; characters, vocabulary and the stream of batches; training, step by step against numpy;
runs and resuming; several workers, bfloat16, perplexity, embedding; text files, the graphs for
Ascend, the command line, the README itself; last tables of malformed inputs.
"""
import concurrent.futures
import contextlib
import csv
import errno
import fcntl
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import data
import elmo
from data import (
    SPECIAL, Chunk, Vocabulary, batch_to_ids, char_ids, fill_tiers, measure_tiers, prefetch,
    read_chunks)
import mindspore as ms
from mindspore import Tensor, mindrecord, ops

ms.set_device("CPU")  # once; MindSpore refuses it once something has been computed
ms.runtime.launch_blocking()  # what is not compiled takes a fraction of the time

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAMS = os.path.dirname(sys.executable)  # where `python` and msrun are ours
FIXTURE = Path(HERE, "..", "shared", "allennlp_fixture")
README = Path(HERE, "README.md").read_text(encoding="utf-8")

# ---- Set-up that tests share ---------------------------------------------------------------------

def write(path, content):
    """Writes str, bytes, or JSON of a dictionary to a path, whose folder it makes; returns the path
    as a str."""
    content = json.dumps(content) if isinstance(content, dict) else content
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def tree(folder):
    """Every path under a folder, hidden ones included, and what is in the files."""
    return {str(path): path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a vocabulary of its own."""
    monkeypatch.chdir(tmp_path)
    write("vocab", "\n".join([*SPECIAL, "the", "cat", "sat", ".", "on", "mat", "dog"]) + "\n")
    return tmp_path


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# The options of a model that is tiny but has everything, both clips too; a call may change any.
options = functools.partial(
    elmo.Options, filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5,
    cell_clip=0.5, proj_clip=0.3, dropout=0.0, batch_size=3, unroll_steps=4,
    n_negative_samples_batch=6)

tiny_options = functools.partial(  # smaller still: numpy computes its gradient weight by weight
    options, filters=((1, 1), (2, 2)), char_dim=2, dim=3, projection=2, batch_size=2,
    unroll_steps=3, proj_clip=0.25)


def randomize(cell, seed=0, scale=0.5):
    """Random values for all parameters of a cell, biases too, which are 0 at first."""
    rng = np.random.default_rng(seed)
    for p in cell.get_parameters():  # in place: a compiled graph does not see what set_data sets
        ops.assign(p, Tensor(rng.normal(0, scale, p.shape).astype(np.float32)))
    return cell


def weights(*cells):
    """The parameters of cells in float64, by their published names."""
    return {p.name.rpartition(".")[2]: p.asnumpy().astype(np.float64)
            for cell in cells for p in cell.get_parameters()}


def random(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def run(*argv, program=elmo):
    """Runs a command line in this process -> its exit status, what it printed, and as errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        return program.main([*map(str, argv)]), out.getvalue(), errors.getvalue()


def succeed(*argv, program=elmo):
    status, out, errors = run(*argv, program=program)
    assert status == 0, errors
    return out


def fail(*argv, program=elmo):
    """Runs a command line that must end in one clear line of error -> that line."""
    status, _, errors = run(*argv, program=program)
    assert status == 2, errors
    assert re.fullmatch(rf"{program.__name__}\.py: error: .+\n", errors), errors
    return errors


convert = functools.partial(succeed, program=data)
for_the_module = pytest.fixture(scope="module")

PERPLEXITY = (r"perplexity forward (\d+\.\d\d) backward (\d+\.\d\d) average (\d+\.\d\d) "
              r"over (\d+) predictions")
VOCABULARY = [*SPECIAL, *"the of a cat dog sat on mat .".split()]
RAGGED = [line.split() for line in (
    "The cat sat .", "one", "", "naïve 日本語 " + "z" * 60, "a a a a a b")]


@for_the_module
def text(tmp_path_factory):
    """A folder with a corpus that data.py made, its vocabulary, and the options of a tiny model."""
    folder = tmp_path_factory.mktemp("text")
    words = "cat dog naïve-fox ran slept on mat hill".split()
    write(folder / "text.txt", "".join(
        f"the {words[k % 8]} sat {words[k % 5]} the {words[k % 3]} number {k} .\n"
        for k in range(130)))
    convert("--input", folder / "text.txt", "--output", folder / "train.mindrecord",
            "--heldout", folder / "heldout.mindrecord", "--heldout-share", 0.1,
            "--vocab", folder / "vocab", "--build-vocab", "--min-count", 2)
    o = options(dropout=0.1, batch_size=12, unroll_steps=2, n_epochs=2)
    elmo.write_options(folder / "options.json", o)
    corpus, heldout = (data.Corpus(str(folder / f"{name}.mindrecord"))
                       for name in ("train", "heldout"))
    epoch = (corpus.tokens + corpus.sentences) / (o.batch_size * o.unroll_steps)
    return types.SimpleNamespace(
        folder=folder, options=o, corpus=corpus, heldout=heldout,
        vocabulary=Vocabulary(folder / "vocab"), ends=[int(epoch), int(2 * epoch)])


def training(text, out, *more):
    """The command line that trains on `text`."""
    folder = text.folder
    return ["train", "--device", "CPU", "--data", folder / "train.mindrecord", "--vocab",
            folder / "vocab", "--heldout", folder / "heldout.mindrecord", "--options",
            folder / "options.json", "--out", out, "--log-every", 10, "--save-every", 15, *more]


@for_the_module
def trained(text):
    """The model trained on `text`, what was printed, its folder as it was after step 30, and what
    was compiled."""
    model, copy, graphs = (text.folder / name for name in ("model", "killed", "graphs"))
    ms.set_context(save_graphs=1, save_graphs_path=str(graphs))
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_call(monkeypatch, 3, lambda: shutil.copytree(model, copy) and None,
                place=elmo.Run, name="save")
        out = succeed(*training(text, model))
    ms.set_context(save_graphs=0)
    compiled = "".join(path.read_text() for path in graphs.rglob("*jit_opt_b*.ir"))
    shutil.rmtree(graphs)
    return types.SimpleNamespace(**vars(text), model=model, killed=copy, out=out, graphs=compiled)


@for_the_module
def h5py():
    return pytest.importorskip("h5py", reason="h5py, which .hdf5 files need, is not installed")


@for_the_module
def exported(trained, h5py):
    """The weights of `trained` in the published format; elmo_options.json is beside them."""
    path = trained.folder / "elmo_weights.hdf5"
    succeed("export", "--device", "CPU", "--out", trained.model, "--weights", path)
    return path


@for_the_module
def files(tmp_path_factory, h5py):
    """A tiny model's options and weights in the published format, without a softmax; the model."""
    folder, bilm = tmp_path_factory.mktemp("published"), randomize(elmo.BiLM(options()), 3)
    options_file, weight_file = str(folder / "options.json"), str(folder / "weights.hdf5")
    elmo.write_options(options_file, bilm.options)
    elmo.write_arrays(weight_file, elmo.named(bilm.get_parameters()).items())
    return types.SimpleNamespace(options=options_file, weights=weight_file, bilm=bilm)


@for_the_module
def beside():
    """beside(command, folder) -> the future of a command that runs beside the tests, one at a time.
    """
    environment = ["env", f"PYTHONPATH={HERE}", f"PATH={PROGRAMS}:{os.environ['PATH']}"]

    def finish(command, folder):
        process = subprocess.run([*environment, *map(str, command)], cwd=folder, timeout=300,
                                 capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    with concurrent.futures.ThreadPoolExecutor(1) as queue:
        yield functools.partial(queue.submit, finish)


@for_the_module
def two_workers(text, beside, tmp_path_factory):
    """15 steps of training by two workers that msrun starts, without dropout: a folder, the job."""
    folder = tmp_path_factory.mktemp("two_workers")
    elmo.write_options(folder / "options.json", replace(text.options, dropout=0.0, batch_size=6))
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = training(text, "model", "--options", "options.json", "--steps", 15, "--log-every", 1)
    return folder, beside(["msrun", "--worker_num=2", "--local_worker_num=2", "--join=True",
                           f"--master_port={port}", elmo.__file__, *command], folder)


@for_the_module
def in_bfloat16(text, beside):
    """Training on `text` with --amp: the model, the job."""
    model = text.folder / "bfloat16"
    command = training(text, model, "--amp", "bfloat16")
    return model, beside(["python", elmo.__file__, *command], text.folder)


@for_the_module
def resumed(trained, beside):
    """`trained` resumed from step 30 in another process."""
    command = training(trained, trained.killed, "--resume")
    return beside(["python", elmo.__file__, *command], trained.folder)


@pytest.fixture(scope="module", autouse=True)
def in_the_background(request):
    """What other processes do for later tests begins at once, where such a test is selected."""
    for name in ("two_workers", "in_bfloat16", "resumed", "readme_programs"):
        if any(name in item.fixturenames for item in request.session.items):
            with contextlib.suppress(pytest.skip.Exception):  # it will skip those tests only
                request.getfixturevalue(name)


class FakeStep:
    """In place of a compiled training step: the batch decides what becomes of all that a run
    consists of."""

    def __init__(self, run, tiers):
        self.run = run

    def __call__(self, batch):
        number = zlib.crc32(b"".join(x.tobytes() for x in batch)) / 2 ** 32
        for p in self.run.parameters()[self.run.step % 8::8]:  # a part of them, for speed
            ops.assign(p, p * 0.9 + number)
        self.run.lstm_state = self.run.lstm_state * 0.9 + number
        return Tensor(number, ms.float32), Tensor(1.0)


class FakePerplexity:
    """In place of the perplexity, which is compiled: the weights decide it."""
    seen = []

    def __init__(self, bilm, softmax, *_):
        self.cells = bilm, softmax

    def __call__(self):
        self.seen.append(weights(*self.cells))
        total = sum(array.sum() for array in self.seen[-1].values())
        return elmo.Perplexities(2.0, 2.0, 2 + abs(total) % 1, 7)


fakes = mock.patch.multiple(elmo, make_step=FakeStep, make_perplexity=FakePerplexity)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Nothing is compiled in this test, which works in an empty folder."""
    monkeypatch.setattr(FakePerplexity, "seen", [])
    monkeypatch.chdir(tmp_path)
    with fakes:
        yield


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def at_call(monkeypatch, n, act, *args, place=FakeStep, name="__call__"):
    """At the n-th call of a function, a step unless told, does something before it, or returns its
    result instead."""
    original, calls = getattr(place, name), itertools.count(1)

    def acting(*its_args, **more):
        result = act(*args) if next(calls) == n else None
        return original(*its_args, **more) if result is None else result
    monkeypatch.setattr(place, name, acting)


def killed(place, name, times, *command, program=elmo):
    """Runs a command that is killed when a function is called for the n-th time."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        at_call(monkeypatch, times, mock.Mock(side_effect=Killed), place=place, name=name)
        run(*command, program=program)


# ---- The model once more, in plain numpy: one word, one time step after the other, in float64 ----
# complex_step_gradient runs it on complex numbers, which np.max, np.maximum and np.clip order by
# their real parts.

def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_encoder(chars, w, o):
    """The representation of words, chars int [..., 50]."""
    embedded = np.vstack((np.zeros(o.char_dim), w["char_embed"]))[chars]  # 0 is no character
    features = []
    for k, (width, _) in enumerate(o.filters):
        kernel = w[f"CNN/W_cnn_{k}"][0]
        scores = sum(embedded[..., n:n + 51 - width, :] @ kernel[n] for n in range(width))
        features.append(scores.max(-2) + w[f"CNN/b_cnn_{k}"])  # over positions
    x = np.concatenate(features, -1)
    x = np.maximum(x, 0) if o.activation == "relu" else np.tanh(x)
    for k in range(o.n_highway):
        g = sigmoid(x @ w[f"CNN_high_{k}/W_carry"] + w[f"CNN_high_{k}/b_carry"])
        new = x @ w[f"CNN_high_{k}/W_transform"] + w[f"CNN_high_{k}/b_transform"]
        x = g * np.maximum(new, 0) + (1 - g) * x
    return x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]


def numpy_lstm(x, h, c, W, B, W_P, cell_clip, proj_clip):
    """h and c of every step, x [time, ..., size]."""
    hs, cs = [], []
    for x_t in x:
        i, j, f, o = np.split(np.concatenate((x_t, h), -1) @ W + B, 4, -1)
        c = np.clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), -cell_clip, cell_clip)
        h = np.clip(sigmoid(o) * np.tanh(c) @ W_P, -proj_clip, proj_clip)
        hs.append(h)
        cs.append(c)
    return np.array(hs), np.array(cs)


def numpy_direction(x, w, direction, o, state=None, keep=np.ones(9)):
    """The layers of one direction, x [time, ..., projection] in its reading order -> all layers' h,
    the state. keep: what dropout makes of 1 at each layer's input and the last one's output."""
    if state is None:
        state = np.zeros((o.n_layers, *x.shape[1:-1], o.projection + o.dim))
    outputs, states = [], []
    for layer in range(o.n_layers):
        cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
        h, c = np.split(state[layer], [o.projection], -1)
        x = x * keep[layer]
        hs, cs = numpy_lstm(x, h, c, w[cell + "W_0"], w[cell + "B"], w[cell + "W_P_0"],
                            o.cell_clip, o.proj_clip)
        x = hs + x if layer > 0 and o.use_skip_connections else hs
        outputs.append(x)
        states.append(np.concatenate((hs[-1], cs[-1]), -1))
    outputs[-1] = x * keep[-1]
    return outputs, np.array(states)


def numpy_layers(words, w, o, boundaries=False):
    """h_0 ... h_L of one sentence, [layers + 1, words, 2 · projection]."""
    x = numpy_encoder(np.array([char_ids(word) for word in ["<S>", *words, "</S>"]]), w, o)
    forward = [x, *numpy_direction(x, w, 0, o)[0]]
    backward = [x[::-1], *numpy_direction(x[::-1], w, 1, o)[0]]
    layers = np.concatenate((forward, np.flip(backward, 1)), -1)
    return layers if boundaries else layers[:, 1:-1]


def numpy_softmax(y, W, b, target, log_q=0, drawn=True):
    """-log p(target) of y [n, projection] -> [n], among the target and the classes that are drawn;
    drawn and log_q: of each class."""
    logits = y @ W.T + b - log_q
    is_target = np.arange(len(b)) == target[:, None]
    among = np.where(drawn | is_target, logits, -1e30)
    m = among.real.max(-1, keepdims=True)
    return np.log(np.exp(among - m).sum(-1)) + m[:, 0] - logits[is_target]


def numpy_mix(layers, w):
    return np.einsum("l,l...", np.exp(w) / np.exp(w).sum(), layers)


def complex_step_gradient(loss, w, words=()):
    """The gradient of loss(w), w a dict of arrays, correct to the last digits: Im loss(w + ih) / h.
    words: all that the loss reads; it depends on no other rows of char_embed than theirs."""
    rows = {n - 1 for word in words for n in char_ids(word)}
    gradient = {name: np.zeros(array.shape) for name, array in w.items()}
    for name, array in w.items():
        for index in np.ndindex(array.shape):
            if name != "char_embed" or index[0] in rows:
                moved = array.astype(complex)
                moved[index] += 1e-30j
                gradient[name][index] = loss({**w, name: moved}).imag / 1e-30
    return gradient


def check_gradient(loss, numpy_loss, w):
    """A loss of some inputs and its gradient by each of them equal numpy's, w a dict of arrays."""
    inputs = [Tensor(array, ms.float32) for array in w.values()]
    value, gradients = ms.value_and_grad(loss, tuple(range(len(w))))(*inputs)
    close(value, numpy_loss(w))
    for actual, expected in zip(gradients, complex_step_gradient(numpy_loss, w).values()):
        close(actual, expected)


# ---- 1. Options (section 3.4) --------------------------------------------------------------------

def test_the_default_is_the_papers_model_and_the_named_sizes_are_the_published_ones():
    paper = elmo.Options(
        filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)), n_highway=2,
        char_dim=16, activation="relu", n_layers=2, dim=4096, projection=512,
        use_skip_connections=True, cell_clip=3, proj_clip=3, dropout=0.1, batch_size=128,
        unroll_steps=20, sample_softmax=True, n_negative_samples_batch=8192, learning_rate=0.2,
        all_clip_norm_val=10, n_epochs=10)
    assert elmo.Options() == elmo.SIZES["original"] == paper
    assert elmo.SIZES["medium"] == replace(paper, dim=2048, projection=256, n_highway=1)
    assert elmo.SIZES["small"] == replace(paper, dim=1024, projection=128, n_highway=1)


def test_options_are_read_and_written_in_the_published_format(tmp_path):
    content = {
        "char_cnn": {"filters": [[1, 3], [2, 4], [3, 5]], "embedding": {"dim": 4}, "n_highway": 1,
                     "activation": "relu", "max_characters_per_token": 50, "n_characters": 262},
        "lstm": {"dim": 7, "projection_dim": 5, "n_layers": 2, "use_skip_connections": True,
                 "cell_clip": 0.5, "proj_clip": 0.3},
        "dropout": 0, "batch_size": 3, "unroll_steps": 4, "n_negative_samples_batch": 6}
    path = write(tmp_path / "options.json", "\ufeff" + json.dumps(content))
    assert elmo.read_options(path) == options()
    elmo.write_options(path, options())
    assert content.items() <= json.loads(Path(path).read_text()).items()
    assert elmo.read_options(path) == options()


# ---- 2. Character CNN (sections 3.1 and 3.4) -----------------------------------------------------

@pytest.mark.parametrize("activation, n_highway, filters", [
    ("tanh", 2, ((2, 4), (7, 6), (5, 3))),  # not by width
    ("relu", 0, ((50, 2), (1, 4)))])        # as wide as a token
def test_the_character_encoder_equals_numpy_in_tiers_of_length_and_in_pieces_of_128_words(
        activation, n_highway, filters):
    o = options(activation=activation, n_highway=n_highway, filters=filters)
    words = [*(f"w{k}" for k in range(600)), "naïve", "日本語", "x" * 47, "x" * 48, "long" * 30]
    chars = np.array([np.zeros(50, np.int32), *map(char_ids, words)])  # the first is no word
    encoder = randomize(elmo.CharEncoder(o, np.random.default_rng(0)))
    expected = numpy_encoder(chars, weights(encoder), o)
    for tiers in ((), ((100, 5),), ((9, 4), (301, 6), (500, 50))):
        close(encoder(Tensor(chars), tiers), expected)


# ---- 3. LSTM with projection ---------------------------------------------------------------------

@pytest.mark.parametrize("recurrence", [elmo.FastRecurrence, elmo.Recurrence])
def test_the_lstm_and_its_gradient_equal_numpy_where_it_is_clipped_and_where_not(recurrence):
    w = dict(x=random(6, 3, 4), W=random(7, 20, scale=0.5), B=random(20, seed=1), W_P=random(5, 3))
    lstm, h, c, dy = recurrence(0.4, 0.2), random(3, 3), random(3, 5), random(6, 3, 3)

    def numpy_results(x, *weights):
        return numpy_lstm(x, h, c, *weights, 0.4, 0.2)

    def loss(x, *weights):
        return (lstm(x, Tensor(h), Tensor(c), *weights)[0] * Tensor(dy)).sum()
    for array, limit in zip(numpy_results(*w.values()), (0.2, 0.4)):
        assert 0.1 < np.isclose(np.abs(array), limit).mean() < 0.9
    check_gradient(loss, lambda w: (numpy_results(*w.values())[0] * dy).sum(), w)


# ---- 4. Bidirectional language model (section 3.1) -----------------------------------------------

@pytest.mark.parametrize("changes, boundaries, sentences", [
    (dict(n_layers=3), True, RAGGED), (dict(use_skip_connections=False), False, RAGGED),
    (dict(n_layers=1), False, [[], []])])
def test_the_bilm_equals_numpy_whatever_is_beside_a_sentence(changes, boundaries, sentences):
    bilm = randomize(elmo.BiLM(options(**changes)))
    ids = batch_to_ids(sentences).asnumpy().astype(np.int64)[:, None]  # of four dimensions
    layers, mask = bilm(ids, boundaries)
    for k, words in enumerate(sentences):
        vectors, n = np.array(layers)[:, k, 0], len(words) + 2 * boundaries
        close(vectors[:, :n], numpy_layers(words, weights(bilm), bilm.options, boundaries))
        assert not vectors[:, n:].any()
        assert np.array_equal(mask[k, 0], vectors.any((0, 2)))


def test_weights_begin_with_the_values_of_bilm_tf():
    o, cell = replace(elmo.SIZES["tiny"], n_highway=2), "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/"
    w = weights(elmo.BiLM(o), elmo.Softmax(5000, 64))
    variances = {"char_embed": 1 / 3, "CNN/W_cnn_4": 0.05 ** 2 / 3, cell + "W_0": 2 / 1152,
                 cell + "W_P_0": 2 / 320,  # these four uniform, the others normal
                 "CNN_high_1/W_carry": 1 / 496, "CNN_proj/W_proj": 1 / 496, "softmax/W": 1 / 64}
    for k, name in enumerate(variances):
        x = np.abs(w[name]) / math.sqrt(variances[name])
        assert abs((x ** 2).mean() - 1) < 0.05
        assert 1.7 < x.max() < 1.7321 if k < 4 else x.max() > 3  # sqrt(3)
    for name in w:
        if w[name].ndim == 1:  # a bias
            assert (w[name] == (-2 if "carry" in name else 0)).all()


# ---- 5. Softmax, full and sampled ----------------------------------------------------------------

@pytest.mark.parametrize("scale", [1, 300])  # of the logits: nothing overflows
def test_the_sampled_softmax_and_its_gradient_equal_numpy_and_leave_out_accidental_hits(scale):
    target, negatives = np.array([0, 3, 7, 7, 5, 11, 6]), np.array([4, 0, 7, 2, 11])
    log_q, drawn = random(12), np.isin(np.arange(12), negatives)
    w = {"y": scale * random(7, 5), "W": random(12, 5, seed=1), "b": random(12, seed=2)}

    def loss(y, W, b):
        rows = (table[Tensor(k)] for k in (target, negatives) for table in (W, b))
        rest = log_q[target], log_q[negatives], drawn[target]
        return elmo.sampled_softmax(y, *rows, *(Tensor(x, ms.float32) for x in rest)) / scale

    def numpy_loss(w):
        return numpy_softmax(*w.values(), target, log_q, drawn).mean() / scale
    check_gradient(loss, numpy_loss, w)


@pytest.mark.parametrize("n, expected", [(2, ([4, 0], 3)), (4, ([4, 0, 9, 1], 12))])
def test_classes_are_drawn_log_uniformly_until_n_are_distinct_and_the_draws_counted(n, expected):
    draws = np.array([4, 4, 0, 4, 0, 9, 9, 0, 4, 9, 0, 1, 1, 1, 1, 1])  # of 10 classes
    almost = np.tile([0.01, 0.99], 8)  # on the way to the next
    numbers = iter(np.log(draws + 1 + almost) / np.log(11))
    rng = types.SimpleNamespace(random=functools.partial(np.fromiter, numbers, float))
    found, n_draws = elmo.draw_negatives(rng, n, 10)
    assert (found.tolist(), n_draws) == expected


# ---- 6. ELMo, a layer of a task's network (sections 3.2 and 3.3) ---------------------------------

def test_the_scalar_mix_is_equation_1_with_a_mask_or_without():
    layers, w = random(3, 2, 4, 6), [0.5, -1, 2]
    tensors, mix = [Tensor(h) for h in layers], elmo.ScalarMix(3, False, w)
    ops.assign(mix.gamma, Tensor([0.7]))
    for mask in ([], [Tensor(True)]):
        close(mix(tensors, *mask), 0.7 * numpy_mix(layers, w), 1e-6)
    assert not elmo.ScalarMix(3, trainable=False).trainable_params()
    with pytest.raises(ValueError, match="2 layers"):
        mix(tensors[:2])
    with pytest.raises(ValueError, match="3 layers"):
        elmo.ScalarMix(3, False, np.array(w[:2]))


def test_the_arguments_are_allennlps():
    assert str(inspect.signature(elmo.Elmo)) == (
        "(options_file, weight_file, num_output_representations, requires_grad=False, "
        "do_layer_norm=False, dropout=0.5, vocab_to_cache=None, keep_sentence_boundaries=False, "
        "scalar_mix_parameters=None)")
    assert str(inspect.signature(elmo.ScalarMix)) == (
        "(mixture_size, do_layer_norm=False, initial_scalar_parameters=None, trainable=True)")


def test_each_of_elmos_representations_is_a_mix_dropped_from_only_while_training(files):
    net, ids = elmo.Elmo(files.options, files.weights, 2), batch_to_ids(4 * RAGGED[:3])
    ops.assign(net.scalar_mixes[1].scalar_parameters, Tensor([1.0, 2.0, 3.0]))
    result, (layers, mask) = net(ids), files.bilm(ids)
    assert (result["mask"] == mask).all()
    quiet = np.array(result["elmo_representations"])
    close(quiet, [numpy_mix(np.array(layers), w) for w in ([0, 0, 0], [1, 2, 3])])
    assert quiet.shape[-1] == net.get_output_dim()
    assert len(net.trainable_params()) == 4  # of the mixes: the biLM is frozen
    net.set_train()
    noisy = np.array(net(ids)["elmo_representations"])
    assert 0.35 < (noisy[quiet != 0] == 0).mean() < 0.65
    close(noisy[noisy != 0], 2 * quiet[noisy != 0])


def test_elmo_keeps_boundaries_normalizes_tokens_and_fixes_the_mix_if_asked_for(files):
    net = elmo.Elmo(files.options, files.weights, 1, False, True, 0.0, ["the"], True, [-9e10, 1, 1])
    ids = batch_to_ids(RAGGED)
    layers = np.array(files.bilm(ids, True)[0])
    h = (layers - layers.mean(-1, keepdims=True)) / (layers.std(-1, keepdims=True) + 1e-12)
    close(net(ids)["elmo_representations"][0], h[1:].mean(0), 1e-4)
    assert not net.trainable_params()


def test_gradients_equal_numpys_also_after_value_errors_and_compiled_functions_see_loaded_weights(
        tmp_path):
    o, words, dy = tiny_options(n_layers=1), ["a", "cat"], random(2, 2, 4)
    net, ids = elmo.Elmo(o, None, 1, requires_grad=True, dropout=0.0), batch_to_ids([words, []])
    w, path = weights(randomize(net)), str(tmp_path / "weights.npz")
    np.savez(path, **w)

    def numpy_loss(w):
        h = numpy_mix(numpy_layers(words, w, o), w["scalar_parameters"])
        return (w["gamma"] * h * dy[0]).sum()
    expected = complex_step_gradient(numpy_loss, w, [*words, *SPECIAL])

    def loss(ids):
        return (net(ids)["elmo_representations"][0] * Tensor(dy)).sum()

    def gradient():
        return ms.value_and_grad(loss, None, net.trainable_params())

    def check(function):
        value, gradients = function(ids)
        close(value, numpy_loss(w))
        for p, actual in zip(net.trainable_params(), gradients):
            close(actual, expected[elmo.published_name(p)])
    for wrong in (ids[..., :49], ids[0], np.zeros((0, 4, 50)), words):  # tokens of 50
        shape = list(getattr(wrong, "shape", ()))
        with pytest.raises(ValueError, match=re.escape(f"batch_to_ids makes them, not {shape}")):
            net(wrong)
    check(gradient())
    for trained in (False, True):
        for p in net.bilm.get_parameters():
            p.requires_grad = trained
        compiled = ms.jit(gradient())
        check(compiled)
        check(gradient())
    randomize(net.bilm, 1)
    elmo.load_weights(path, net.bilm.get_parameters())
    check(compiled)


def test_a_networks_mixed_precision_stops_at_the_bilm():
    net, ids = elmo.Elmo(tiny_options(), None, 1, True, dropout=0.0), batch_to_ids(RAGGED)

    def loss(ids):
        return net(ids)["elmo_representations"][0].sum()
    gradient = ms.grad(loss, None, net.trainable_params())
    plain = gradient(ids)
    for level in ("O2", "O3"):
        ms.amp.auto_mixed_precision(net, level)  # in place
        for actual, expected in zip(gradient(ids), plain):
            close(actual, expected, 2e-3 * np.abs(expected.asnumpy()).max())  # float16: 11 digits


# ---- 7. Published weights ------------------------------------------------------------------------

@pytest.mark.skipif(not FIXTURE.exists(), reason=f"{FIXTURE} is no part of this repository")
def test_published_files_give_bilm_tfs_vectors_and_are_written_as_they_were_read(tmp_path, h5py):
    bilm = elmo.BiLM(FIXTURE / "options.json", FIXTURE / "lm_weights.hdf5")
    columns = json.loads((FIXTURE / "lm_embeddings_sentences.json").read_bytes())
    expected = [h5py.File(FIXTURE / f"lm_embeddings_{k}.hdf5") for k in range(3)]
    layers, _ = bilm(batch_to_ids([lines[0].split() for lines in columns]))
    for vectors, file in zip(layers[-1].asnumpy(), expected):
        first = np.hstack(file["0"][...])  # forward beside backward
        close(vectors[:len(first)], first)
    # bilm-tf carries the state on from sentence to sentence, as if they were one.
    rows = [["<S>", *line.split(), "</S>"] for line in columns[1][:4]]
    x = ops.stack([bilm.encoder(Tensor(np.array([char_ids(word) for word in sum(read, [])])))
                   for read in (rows, [row[::-1] for row in rows])])
    outputs, _ = bilm.contextualize(x.expand_dims(2), elmo.zero_state(bilm.options, 1))
    f, b = (layers[-1][:, 0].asnumpy() for layers in outputs)
    for k, row in enumerate(rows):
        n = len(row)
        close(np.hstack((f[:n], b[:n][::-1]))[1:-1], np.hstack(expected[1][str(k)][...]))
        f, b = f[n:], b[n:]
    elmo.write_arrays(str(tmp_path / "again.npz"), elmo.named(bilm.get_parameters()).items())
    with h5py.File(FIXTURE / "lm_weights.hdf5") as file:
        for name, array in np.load(tmp_path / "again.npz").items():
            np.testing.assert_equal(array, file[name][...])
    elmo.write_options(tmp_path / "again.json", bilm.options)
    again, before = (json.loads(path.read_bytes())
                     for path in (tmp_path / "again.json", FIXTURE / "options.json"))
    assert again.items() >= before.items()


def test_an_export_holds_the_best_weights(trained, exported, h5py):
    best = dict(np.load(trained.model / "best.npz"))
    assert best["softmax/W"].shape == (len(trained.vocabulary), 5)
    with h5py.File(exported) as file:
        np.testing.assert_equal({name: file[name][...] for name in best}, best)
    assert elmo.read_options(trained.folder / "elmo_options.json") == trained.options


def test_options_that_are_missing_or_null_have_the_values_of_bilm_tf(files, tmp_path):
    expected = options(n_layers=1, cell_clip=None, proj_clip=None, use_skip_connections=False,
                       n_highway=0)
    content = json.loads(Path(files.options).read_text())
    for change in (lambda section, name: section.update({name: None}), dict.pop):
        change(content["char_cnn"], "n_highway")
        for name in ("n_layers", "cell_clip", "proj_clip", "use_skip_connections"):
            change(content["lstm"], name)
        assert elmo.read_options(write(tmp_path / "options.json", content)) == expected


def test_what_named_gives_makes_a_file_and_a_single_layer_is_read_under_bilm_tfs_name(
        tmp_path, h5py):
    task = elmo.Elmo(options(n_layers=1), None, 1)  # in it, MindSpore puts more before the names
    usual, single = str(tmp_path / "usual.npz"), str(tmp_path / "single.hdf5")
    elmo.write_arrays(usual, elmo.named(randomize(task.bilm).get_parameters()).items())
    with h5py.File(single, "w") as file:
        for name, array in weights(task.bilm).items():
            file[name.replace("RNN/MultiRNNCell/Cell0", "RNN")] = array
        assert "RNN_0/RNN/LSTMCell/W_0" in file
    with open(single) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as if the file system knew no locks
        for path in (usual, single):
            found = weights(elmo.BiLM(options(n_layers=1), path))
            np.testing.assert_equal(found, weights(task.bilm))


def begin(*argv):
    """The `Run` that a command line begins, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        its_run, _, _ = elmo.open_run(elmo.parse_arguments([str(arg) for arg in argv]))
    return its_run, out.getvalue()


def test_a_softmax_of_this_vocabulary_is_taken_and_another_begins_anew_or_is_not_tested(
        trained, exported, h5py, fake):
    best, words = dict(np.load(trained.model / "best.npz")), trained.vocabulary.words
    for name, lines in (("same", words), ("more", [*words, "two", "more"]), ("other", words[::-1])):
        write(name, "\n".join(lines))
    for path, name in (("published", "softmax/vocabulary"), ("bare", "softmax")):
        with h5py.File(shutil.copyfile(exported, path), "r+") as file:
            del file[name]
    for path, vocabulary, fits in (
            (exported, "same", True), (exported, "more", False), (exported, "other", False),
            ("published", "other", True), ("published", "more", False), ("bare", "same", False)):
        model = ["--device", "CPU", "--data", trained.corpus.path, "--vocab", vocabulary,
                 "--options", trained.folder / "elmo_options.json", "--weights", path]
        its_run, printed = begin(*model, "--out", f"of {vocabulary}")
        w = weights(its_run.bilm, its_run.softmax)
        assert printed.count("softmax of") == (not fits)
        if fits:
            succeed("test", *model)
            np.testing.assert_equal(FakePerplexity.seen[-1], w)
        else:
            assert "has no softmax of the words of" in fail("test", *model)
            assert not w.pop("softmax/b").any()
            close(w.pop("softmax/W").std(), 0.2 ** 0.5, 0.1)
        np.testing.assert_equal(w, {name: best[name] for name in w})


def test_a_missing_h5py_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(data.InputError, match="pip install h5py"):
        elmo.BiLM(options(), "weights.hdf5")


# ---- 8. Characters and vocabulary ----------------------------------------------------------------

def test_character_ids_are_those_of_bilm_tf_plus_1_bytes_between_marks_cut_to_48():
    for word, codes in {
            "th": b"th", "": b"", "<S>": [256], "</S>": [257], "<UNK>": b"<UNK>", "é": b"\xc3\xa9",
            "x" * 60: b"x" * 48, "x" * 47 + "é": b"x" * 47 + b"\xc3",  # cut inside a character
            "a\ud800b": b"ab"}.items():                                # a lone surrogate is no byte
        ids = [258, *codes, 259] + [260] * 50
        assert (char_ids(word) - 1).tolist() == ids[:50]


def test_batch_to_ids_pads_with_zeros_and_any_iterable_of_words_is_a_sentence():
    sentences, embedder = [["a", "cat"], [], ("the",)], elmo.Embedder(elmo.BiLM(options()))
    ids, none = batch_to_ids(map(iter, sentences)), [0] * 50
    assert ids.dtype == ms.int32
    np.testing.assert_equal(ids.asnumpy(), [[char_ids("a"), char_ids("cat")], [none, none],
                                            [char_ids("the"), none]])
    assert batch_to_ids([[], []]).shape == (2, 0, 50)
    np.testing.assert_equal(embedder(map(iter, sentences)), embedder(sentences))
    for function in (batch_to_ids, embedder):
        for wrong in ("the cat", ["the cat"], [["a"], "dog"], iter([["a", 5]])):
            with pytest.raises(ValueError, match="list of lists of words"):
                function(wrong)


def test_a_vocabularys_lines_keep_their_numbers_whatever_they_hold(folder, capsys):
    path = write("v", "</S>\n<S>\n the \n!!!MAXTERMID\n<UNK>\n\ncat\u00a0dog\nthe\n\u2028sat\x85\n")
    vocabulary = Vocabulary(path)
    line = "v: 3 of 8 lines are blank, hold white space or are repeated"
    assert capsys.readouterr().err.count(line) == 1
    chunk = next(read_chunks(corpus_of([["the", "cow", "cat", "sat"]]), vocabulary,
                             options(batch_size=1, unroll_steps=5)))
    assert chunk.target[:, :, 0].tolist() == [[6, 3, 3, 7, 0], [7, 3, 3, 6, 1]]
    for content in ("\ufeff</S>\r\n<S>\r\nthe\r\n<UNK>\r\n", "</S>\r<S>\rthe\r<UNK>"):
        assert Vocabulary(write("v", content)).words == ["</S>", "<S>", "the", "<UNK>"]


# ---- 9. The stream of training batches -----------------------------------------------------------

def vocabulary_of(*words):
    with mock.patch.object(data, "open_text", lambda path: words):
        return Vocabulary("")


def corpus_of(sentences):
    """A corpus in memory, with what is used of a data.Corpus."""
    return types.SimpleNamespace(
        records=sentences, sentences=len(sentences), tokens=sum(map(len, sentences)),
        read=lambda records: (sentences[k] for k in records))


def some_sentences(n=40):
    """Sentences of words inside and outside the vocabulary, all different."""
    rng = np.random.default_rng(0)
    words = [*VOCABULARY[3:], "Stranger", "日本語", "donaudampfschifffahrtsgesellschaft", "y" * 60]
    return [[f"n{k}", *rng.choice(words, rng.integers(0, 9)).tolist()] for k in range(n)]


def stream(corpus, o, *arguments, n=None, **more):
    """The first n chunks (None: all)."""
    return itertools.islice(
        read_chunks(corpus, vocabulary_of(*VOCABULARY), o, *arguments, **more), n)


def read_streams(chunks):
    """What chunks say -> for each stream and direction, its [(word, target), ...] from begin to
    end."""
    chunks = list(chunks)
    return [[[(chunk.words[w], VOCABULARY[t]) for chunk in chunks for w, t, valid in zip(
                chunk.word_index[d, :, k], chunk.target[d, :, k], chunk.valid[:, k]) if valid]
             for d in (0, 1)] for k in range(chunks[0].valid.shape[1])]


def read_sentences(*arguments, **more):
    """The complete sentences of a `stream`, one row after the other; checks that both directions
    read them rightly."""
    found = []
    for forward, backward in read_streams(stream(*arguments, **more)):
        _, *texts = " ".join(word for word, _ in forward).split("<S>")
        sentences = [text.split() for text in texts]
        if forward[-1][1] != "</S>":
            sentences.pop()  # it goes on beyond the last chunk
        found += sentences
        for steps, turn in ((forward, 1), (backward, -1)):
            marked = [["<S>", *words, "</S>"][::turn] for words in sentences]
            expected = [(word, target if target in VOCABULARY else "<UNK>")
                        for words in marked for word, target in zip(words, words[1:])]
            assert steps[:len(expected)] == expected
    return found


def test_an_epoch_has_every_sentence_once_in_an_order_of_its_own_that_workers_share():
    corpus, one = corpus_of(some_sentences()), options(batch_size=1)
    assert read_sentences(corpus, one) == corpus.records  # in order without a seed
    assert sorted(read_sentences(corpus, options())) == sorted(corpus.records)
    found = read_sentences(corpus, one, 0, n=corpus.tokens)
    first, second = found[:40], found[40:80]
    assert sorted(first) == sorted(second) == sorted(corpus.records)
    assert first != second != corpus.records != first
    for seed, order in ((None, corpus.records), (0, first)):
        for rank in range(3):
            share = read_sentences(corpus, one, seed, n=40, rank=rank, size=3)
            assert share[:13] == order[rank::3][:13]


def test_the_order_of_a_million_sentences_takes_four_megabytes():
    corpus = types.SimpleNamespace(sentences=10 ** 6,
                                   read=lambda records: (["a"] for _ in records))
    tracemalloc.start()
    next(stream(corpus, options(), 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def batches_of(corpus, o, n, seed=0, first=0, position=None, rank=0, size=1):
    """n batches of a run, from step `first` on, and the chunks they come from."""
    tiers = measure_tiers(stream(corpus, o, 0))
    chunks = stream(corpus, o, seed, position, rank, size, n=n)
    return [(elmo.make_batch(chunk, k, tiers, len(VOCABULARY), o, seed, rank), chunk)
            for k, chunk in enumerate(chunks, first)]


def test_a_seed_gives_one_stream_that_goes_on_from_any_position_and_another_another():
    corpus, o = corpus_of(some_sentences()), options(dropout=0.1)
    worker = {"rank": 1, "size": 2}
    batches = batches_of(corpus, o, 60, 5, **worker)  # 6 epochs
    for k in (1, 7, 8, 9, 10, 18, 40):
        again = batches_of(corpus, o, 12, 5, k, batches[k - 1][1].position, **worker)
        np.testing.assert_equal(again, batches[k:k + 12])
    (other, _), = batches_of(corpus, o, 1, 6, **worker)
    for name in ("target", "masks", "negatives"):
        assert not np.array_equal(getattr(batches[0][0], name), getattr(other, name))


def test_every_words_characters_come_back_through_the_tiers_whatever_room_they_have():
    words = ["a", "I", "the", "cats", "tokens", "x" * 10, "y" * 48, "z" * 60, "日本語", *SPECIAL[:2]]
    for size, *tiers in ((11, (4, 3), (3, 8), (4, 50)), (40, (20, 6), (20, 50)),
                         (267, (9, 11), (2, 50)), (266, (6, 6), (4, 50))):  # 256 rows were added
        chars, rows = fill_tiers(tiers, words, np.arange(11))
        assert len(chars) == size and chars.dtype == rows.dtype == np.int32
        np.testing.assert_array_equal(chars[rows], [*map(char_ids, words)])
        counts, limits = zip(*tiers)
        for row, limit in zip(chars, np.repeat(limits, counts)):
            assert set(row[limit:]) <= {0, 261}
    chunk = Chunk(["a"] * 999 + ["x" * 60], *[None] * 5)  # one long word has room, too
    assert [limit for _, limit in measure_tiers([chunk])] == [3, 50]


def test_each_direction_subtracts_the_expected_counts_of_its_own_draws(monkeypatch):
    draws = iter((7, 29))  # of the forward direction, of the backward
    monkeypatch.setattr(elmo, "draw_negatives", lambda rng, n, _: (np.arange(n), next(draws)))
    (batch, _), = batches_of(corpus_of(some_sentences()), options(), 1)
    k = np.hstack((batch.negatives, batch.target))
    p = np.log((k + 2) / (k + 1)) / math.log(13)  # of 12 words
    close(np.hstack((batch.negatives_log_q, batch.target_log_q)),
          np.log(1 - (1 - p) ** [[7], [29]]))


@pytest.mark.parametrize("sample, n_negatives", [(True, 6), (False, 12)])
def test_a_batch_holds_targets_negatives_and_which_targets_were_drawn(sample, n_negatives):
    corpus, o = corpus_of(some_sentences()), options(sample_softmax=sample)
    batches = batches_of(corpus, o, 10) + batches_of(corpus, o, 10, rank=1)
    for batch, chunk in batches:
        assert batch.target.tolist() == chunk.target.reshape(2, 12).tolist()
        words = np.array(chunk.words)[chunk.word_index[0, 0]]
        assert np.array_equal(batch.reset_state, words == "<S>")
        for target, negatives, is_drawn in zip(batch.target, batch.negatives, batch.is_drawn):
            assert len(set(negatives)) == len(negatives) == n_negatives
            assert is_drawn.tolist() == [t in negatives for t in target]
        assert sample or not batch.negatives_log_q.any() and not batch.target_log_q.any()
    drawn = {negatives.tobytes() for batch, _ in batches for negatives in batch.negatives}
    assert len(drawn) == (20 if sample else 1)  # the same for both workers
    shapes = {tuple((x.shape, x.dtype.str) for x in batch) for batch, _ in batches}
    assert len(shapes) == 1 and len(batch.chars) < 256  # one static graph, without extra rows


def test_dropout_masks_are_new_at_every_time_step_and_keep_the_share_asked_for():
    corpus = corpus_of(some_sentences(300))
    o = options(dropout=0.1, batch_size=16, unroll_steps=10, projection=12)
    keep = np.array([[batch.masks for batch, _ in batches_of(corpus, o, 5, rank=rank)]
                     for rank in (0, 1)])
    assert set(np.unique(keep)) == {0, 1}
    assert abs(keep.mean() - 0.9) < 6 * math.sqrt(0.09 / keep.size)
    for axis in range(6):  # workers, steps, layers + 1, directions, time, batch
        same = keep.take(0, axis) == keep.take(1, axis)  # 0.9² + 0.1² where independent
        assert abs(same.mean() - 0.82) < 6 * math.sqrt(0.82 * 0.18 / same.size)


def test_a_few_items_are_prefetched_side_by_side_in_their_order_as_are_exceptions():
    read, both = [], threading.Barrier(2)  # which is passed only where two are made at once
    items = prefetch((read.append(k) or k for k in range(100)), lambda k: (k, both.wait(30)), 2)
    assert next(items)[0] == 0
    time.sleep(0.2)  # for the threads to read what they will
    assert len(read) <= 3  # the one taken and the two that wait
    assert [k for k, _ in items] == list(range(1, 100))
    with pytest.raises(ZeroDivisionError):
        list(prefetch((1, 0), lambda k: 1 // k))


# ---- 10. Training, step by step against numpy ----------------------------------------------------

@pytest.mark.parametrize("o", [
    tiny_options(dropout=0.3, all_clip_norm_val=1.2, sample_softmax=False),
    tiny_options(dropout=0.3, all_clip_norm_val=1.2, n_negative_samples_batch=3, activation="tanh",
                 n_highway=2)])
def test_training_equals_numpy_with_dense_adagrad_in_every_weight_after_every_step(o, monkeypatch):
    if not o.sample_softmax:  # uncompiled, in the forms for Ascend
        monkeypatch.setattr(elmo, "on_cpu", lambda: False)
        monkeypatch.setattr(elmo, "compiled", lambda function: function)
    its_run, tiers = elmo.Run(o, vocabulary_of(*VOCABULARY)), ((12, 5), (6, 50))
    step, norms = elmo.make_step(its_run, tiers), []
    w = weights(randomize(its_run.bilm, 1), randomize(its_run.softmax, 2))
    sums = {"adagrad/" + name: np.ones(w[name].shape) for name in w}
    state = np.zeros(its_run.lstm_state.shape)
    chunks = read_chunks(corpus_of(RAGGED), its_run.vocabulary, o, 0)
    for n, chunk in enumerate(itertools.islice(chunks, 5)):
        batch = elmo.make_batch(chunk, n, tiers, len(VOCABULARY), o, 0)
        # A sentence that begins the chunk is read from zero.
        state = state * (np.array(chunk.words)[chunk.word_index[0, 0]] != "<S>")[:, None]

        def read(w):
            """The loss of the chunk and the LSTMs' state after it."""
            x = numpy_encoder(np.array([char_ids(word) for word in chunk.words]), w, o)
            loss, states = 0, []
            for d, target in enumerate(chunk.target.reshape(2, -1)):
                log_q, drawn = np.zeros((2, len(VOCABULARY)))
                log_q[target] = batch.target_log_q[d]
                log_q[batch.negatives[d]] = batch.negatives_log_q[d]
                drawn[batch.negatives[d]] = 1
                outputs, state_after = numpy_direction(
                    x[chunk.word_index[d]], w, d, o, state[d], batch.masks[:, d] / 0.7)
                loss += numpy_softmax(outputs[-1].reshape(-1, o.projection), w["softmax/W"],
                                      w["softmax/b"], target, log_q, drawn > 0).mean() / 2
                states.append(state_after)
            return loss, np.array(states)
        gradient = complex_step_gradient(lambda w: o.unroll_steps * read(w)[0], w, chunk.words)
        loss, state = read(w)
        norms.append(math.sqrt(sum((g ** 2).sum() for g in gradient.values())))
        for name, g in gradient.items():
            g = g * min(1, o.all_clip_norm_val / norms[n])
            sums["adagrad/" + name] += g ** 2
            w[name] = w[name] - o.learning_rate * g / np.sqrt(sums["adagrad/" + name])
        for actual, expected in zip(step(batch), (loss, norms[n])):
            close(actual, expected)
        close(its_run.lstm_state, state)
        for name, array in elmo.named(its_run.parameters()).items():
            close(array, {**w, **sums}[name])
    assert min(norms) < o.all_clip_norm_val < max(norms)


# ---- 11. A run: its log, its folder --------------------------------------------------------------

def saved_state(folder):
    """What `Run.save` writes as JSON: its identity, step, best perplexity and log."""
    return json.loads(str(np.load(Path(folder, "last.npz"))["run/state"]))


def read_log(folder):
    return list(csv.DictReader(Path(folder, "log.csv").read_text(encoding="utf-8").splitlines()))


def test_training_logs_the_loss_and_each_epochs_heldout_perplexity(trained):
    rows, ends = read_log(trained.model), trained.ends
    assert ",".join(rows[0]) == ("step,epoch,loss,tokens_per_second,heldout_forward,"
                                 "heldout_backward,heldout_average")
    assert [(int(row["step"]), int(row["epoch"])) for row in rows] == [
        (step, 1 + (step > ends[0])) for step in range(1, ends[1] + 1)
        if step % 10 == 0 or step % 15 == 0 or step in ends]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.1
    line = r"(?m)^step \d+ of \d+ .*sampled loss [\d.]+ .*tokens/s +\d+ min left$"
    assert len(re.findall(line, trained.out)) == len(rows)
    scores = {int(row["step"]): [*map(float, [*row.values()][4:])]
              for row in rows if row["heldout_average"]}
    assert list(scores) == ends
    n = trained.heldout.tokens + trained.heldout.sentences
    printed = np.array(re.findall(f"(?m)held-out {PERPLEXITY}$", trained.out), float)
    close(printed, [(*at_end, n) for at_end in scores.values()], 0.0051)  # two decimals, and four
    # They are those of numpy, of the best weights.
    w, n_words = dict(np.load(trained.model / "best.npz")), len(trained.vocabulary)
    losses = numpy_losses(w, trained.options, trained.vocabulary, trained.heldout)
    best = min(scores.values(), key=lambda at_end: at_end[2])
    close(best, np.exp([*losses.mean(1), losses.mean()]), 2e-4)
    assert scores[ends[1]][2] < scores[ends[0]][2] < n_words


def test_the_folder_of_a_run_stands_for_its_options_best_weights_and_vocabulary(trained, fake):
    model = trained.model
    assert sorted(os.listdir(model)) == ["best.npz", "last.npz", "log.csv", "options.json", "vocab"]
    assert elmo.read_options(model / "options.json") == trained.options
    assert (model / "vocab").read_bytes() == (trained.folder / "vocab").read_bytes()
    for flags in ([], ["--options", model / "options.json", "--weights", model / "best.npz",
                       "--vocab", model / "vocab", "--out", "elsewhere"]):
        succeed("test", "--device", "CPU", "--data", trained.heldout.path, "--out", model, *flags)
    best = dict(np.load(model / "best.npz"))
    np.testing.assert_equal(FakePerplexity.seen, 2 * [{
        name: best[name] for name in FakePerplexity.seen[0]}])


def test_the_best_epoch_stays_the_best_and_without_heldout_text_the_last_one_is(
        text, fake, monkeypatch):
    Perplexities, averages = elmo.Perplexities, iter((10.0, 20.0, 15.0))
    monkeypatch.setattr(elmo, "Perplexities",
                        lambda *_: Perplexities(1.0, 1.0, next(averages), 1))

    def saved(path):
        return {name: array for name, array in np.load(path).items()
                if name in FakePerplexity.seen[0]}
    succeed(*training(text, "model"))
    succeed(*training(text, "model", "--resume", "--epochs", 3))
    np.testing.assert_equal(saved("model/best.npz"), FakePerplexity.seen[0])
    printed = succeed(*(arg for arg in training(text, "alone") if "heldout" not in str(arg)))
    np.testing.assert_equal(saved("alone/best.npz"), saved("alone/last.npz"))
    assert "held-out" not in printed and read_log("alone")[-1]["heldout_average"] == ""


@pytest.mark.parametrize("loss, norm, save_every", [(math.nan, 1.0, 4), (1.0, math.inf, 8)])
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(
        text, fake, monkeypatch, loss, norm, save_every):
    at_call(monkeypatch, 7, lambda: (Tensor(loss), Tensor(norm)))
    error = fail(*training(text, "model", "--save-every", save_every))
    assert re.search(rf"step 7: the loss is {loss}, the gradient's norm {norm}; .*--lr", error)
    if save_every == 4:
        assert saved_state("model")[1] == 4
    else:
        assert not os.path.exists("model/last.npz")


def test_the_logged_loss_is_the_mean_since_the_last_line_also_when_resumed(
        text, fake, monkeypatch):
    monkeypatch.setattr(FakeStep, "__call__", lambda self, batch: (
        Tensor(self.run.step + 1.0), Tensor(1.0)))
    command = training(text, "model", "--steps", 25)
    killed(FakeStep, "__call__", 18, *command)  # two steps are lost
    succeed(*command, "--resume")
    assert [(row["step"], float(row["loss"])) for row in read_log("model")] == [
        ("10", 5.5), ("15", 13), ("20", 18), ("25", 23)]


def test_where_negatives_would_save_nothing_the_full_softmax_trains_and_that_is_told(text, fake):
    n = len(text.vocabulary)
    for n_negatives, is_sampled in ((n // 2, True), (n // 2 + 1, False)):
        elmo.write_options("o.json", replace(text.options, n_negative_samples_batch=n_negatives))
        its_run, printed = begin(*training(text, n_negatives, "--options", "o.json"))
        assert its_run.options.sample_softmax == is_sampled
        assert printed.count("full softmax") == (not is_sampled)


# ---- 12. Exact resume ----------------------------------------------------------------------------

def result_of(folder):
    """What is in a run's folder: its arrays, bit by bit, and its log but for the speeds."""
    log = [{**row, "tokens_per_second": None} for row in read_log(folder)]
    arrays = {(path.name, name): array.tobytes() for path in Path(folder).glob("*.npz")
              for name, array in np.load(path).items() if name != "run/state"}
    return sorted(os.listdir(folder)), saved_state(folder)[:3], log, arrays


def test_a_run_resumed_in_another_process_ends_bit_by_bit_as_one_that_was_not_stopped(
        trained, resumed):
    resumed.result()
    assert result_of(trained.model) == result_of(trained.killed)


@for_the_module
def uninterrupted(text, tmp_path_factory):
    """The folder of a run with steps that are not compiled, from begin to end."""
    out = tmp_path_factory.mktemp("uninterrupted") / "model"
    with fakes:
        succeed(*training(text, out))
    return out


def test_a_run_killed_at_many_places_and_resumed_ends_as_one_that_was_not(
        text, uninterrupted, fake):
    out, command = Path("model"), training(text, "model")
    for place, name, times in (  # before there is a last.npz
            (os, "replace", 1), (os, "replace", 2), (FakeStep, "__call__", 10),
            (np.lib.format, "write_array", 40), (os, "replace", 3)):
        killed(place, name, times, *command)
        assert "leave out --resume" in fail(*command, "--resume")
    killed(FakeStep, "__call__", 20, *command)
    assert saved_state(out)[1] == 15
    write(out / ".last.npz.part" / "last.npz", "what SIGKILL leaves of the next one")
    write(out / "log.csv", "\n\xff;edited,1\n7;1;1\n")
    end, before_its_test = text.ends[0], text.ends[0] // 15 * 15
    for place, name, times, step in (  # and the step of the last.npz that it leaves
            (FakeStep, "__call__", 1, 15), (np.lib.format, "write_array", 30, 15),
            (FakePerplexity, "__call__", 1, before_its_test),
            (elmo, "write_arrays", 2, before_its_test)):  # when best.npz is already there
        killed(place, name, times, *command, "--resume")
        assert saved_state(out)[1] == step
    killed(FakeStep, "__call__", 20, *command, "--resume")
    assert f"resuming after step {end}" not in succeed(*command, "--resume")
    assert result_of(uninterrupted) == result_of(out)
    before = tree(out)  # to resume a run that is over changes nothing
    succeed(*command, "--resume")
    assert tree(out) == before


def test_of_several_workers_each_resumes_at_its_own_place_and_their_number_must_be_the_same(
        text, uninterrupted):
    arrays, path = dict(np.load(uninterrupted / "last.npz")), str(uninterrupted.parent / "two.npz")
    its_run = elmo.Run(text.options, text.vocabulary)
    identity, *state = json.loads(str(arrays["run/state"]))
    for name in ("run/positions", "run/lstm_states"):
        arrays[name] = np.concatenate((arrays[name], arrays[name] + 1))
    arrays["run/state"] = json.dumps([{**identity, "workers": 2}, *state])
    elmo.write_arrays(path, arrays.items())
    its_run.identity, its_run.workers = identity, mock.Mock(rank=1)
    with pytest.raises(data.InputError, match="that run has workers 2, not 1"):
        its_run.resume(path)
    identity["workers"] = 2
    its_run.resume(path)
    np.testing.assert_equal(its_run.position, arrays["run/positions"][1])
    close(its_run.lstm_state, arrays["run/lstm_states"][1], 0)


def test_a_full_disk_is_one_line_and_leaves_what_there_was(trained, fake, monkeypatch):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    at_call(monkeypatch, 30, monkeypatch.setattr, np.lib.format, "write_array", full)
    error = fail(*training(trained, "model"))
    assert re.search("last.npz: could not be written.*No space left on device", error)
    assert saved_state("model")[1] == 15
    write("in.txt", "the cat\n")
    before = tree(".")
    for command in (["embed", "--input", "in.txt", "--output"], ["export", "--weights"]):
        error = fail(*command, "new.npz", "--device", "CPU", "--out", trained.model)
        assert re.search("new.npz: could not be written.*No space left on device", error)
        assert tree(".") == before


# ---- 13. Several workers -------------------------------------------------------------------------

@mock.patch.object(elmo, "compiled", lambda function: function)  # the two are, the one need not be
def test_two_workers_compute_what_one_does_that_reads_the_streams_of_both(text, two_workers):
    (folder, job), chunks = two_workers, []
    o = elmo.read_options(folder / "options.json")
    shares = [read_chunks(text.corpus, text.vocabulary, o, 0, rank=rank, size=2) for rank in (0, 1)]
    for a, b in itertools.islice(zip(*shares), 15):  # side by side: one chunk with both's streams
        b = b._replace(word_index=b.word_index + len(a.words))
        both = (np.concatenate(pair, -1) for pair in zip(a[1:], b[1:]))
        chunks.append(Chunk(a.words + b.words, *both))
    its_run, tiers = elmo.Run(replace(o, batch_size=12), text.vocabulary), measure_tiers(chunks)
    step, n = elmo.make_step(its_run, tiers), len(text.vocabulary)
    losses = [step(elmo.make_batch(chunk, k, tiers, n, its_run.options, 0))[0].asnumpy()
              for k, chunk in enumerate(chunks)]
    job.result()
    rows, last = read_log(folder / "model"), dict(np.load(folder / "model" / "last.npz"))
    close([float(row["loss"]) for row in rows], losses, 1e-4)
    for p in its_run.parameters():
        close(p, last[p.name.rpartition(".")[2]], 1e-4)
    assert last["run/positions"].shape == (2, 2 + 2 * 6)  # each worker's own
    close(np.concatenate(last["run/lstm_states"], 2), its_run.lstm_state, 1e-4)
    # Both measure the held-out text, each a share of it.
    w = dict(np.load(folder / "model" / "best.npz"))
    losses = np.hstack([numpy_losses(w, o, text.vocabulary, text.heldout, rank=rank, size=2)
                        for rank in (0, 1)])
    assert losses.shape == (2, text.heldout.tokens + text.heldout.sentences)
    close(float(rows[-1]["heldout_average"]), np.exp(losses.mean()), 2e-4)


# ---- 14. bfloat16 --------------------------------------------------------------------------------

def test_amp_rounds_what_is_multiplied_forward_and_backward_and_nothing_else():
    x, y, dz = (random(*shape, seed=k) for k, shape in enumerate(((5, 64), (64, 7), (5, 7))))
    matmul, eps = elmo.make_matmul("bfloat16"), 2.0 ** -8

    def loss(x, y):
        return (matmul(x, y) * Tensor(dz)).sum()
    dx, dy = ms.jit(ms.grad(loss, (0, 1)))(Tensor(x), Tensor(y))
    # To the nearest number of 8 binary digits; ties to even.
    half_x, half_y = (np.ldexp(np.rint(m / eps) * eps, e)
                      for m, e in map(np.frexp, (np.float64(x), np.float64(y))))
    close(matmul(Tensor(x), Tensor(y)), half_x @ half_y)
    for actual, expected in ((dx, dz @ half_y.T), (dy, half_x.T @ dz)):  # rounded once more
        assert actual.dtype == ms.float32
        close(actual, expected, 2 * eps * np.abs(expected).max())


def test_training_in_bfloat16_follows_training_in_float32(trained, in_bfloat16):
    model, job = in_bfloat16
    job.result()
    losses, expected = ([float(row["loss"]) for row in read_log(folder)]
                        for folder in (model, trained.model))
    close(losses, expected, 0.02)
    assert losses != expected


# ---- 15. Test: perplexity ------------------------------------------------------------------------

def numpy_losses(w, o, vocabulary, corpus, **share):
    """-log p of each prediction of a corpus, in both directions, [2, predictions]."""
    losses, chunks = [], list(read_chunks(corpus, vocabulary, o, **share))
    for stream, valid in enumerate(np.vstack([chunk.valid for chunk in chunks]).T):
        for d in (0, 1):  # the whole stream in one go, no chunks
            words = [chunk.words[k] for chunk in chunks for k in chunk.word_index[d, :, stream]]
            target = np.hstack([chunk.target[d, :, stream] for chunk in chunks])
            x = numpy_encoder(np.array([char_ids(word) for word in words]), w, o)
            y = numpy_direction(x, w, d, o)[0][-1]
            losses.append(numpy_softmax(y, w["softmax/W"], w["softmax/b"], target)[valid])
    return np.array([np.hstack(losses[d::2]) for d in (0, 1)])


@mock.patch.object(elmo, "compiled", lambda function: function)
def test_the_perplexity_is_that_of_numpy_over_every_prediction_once():
    o, vocabulary = options(batch_size=30, unroll_steps=5, dropout=0.1), vocabulary_of(*VOCABULARY)
    corpus = corpus_of(some_sentences(23))  # fewer than streams
    bilm, softmax = randomize(elmo.BiLM(o)), randomize(elmo.Softmax(len(VOCABULARY), 5), 1)
    losses = numpy_losses(weights(bilm, softmax), o, vocabulary, corpus)
    assert losses.shape == (2, corpus.tokens + corpus.sentences)
    perplexity = elmo.make_perplexity(bilm, softmax, vocabulary, corpus, elmo.Workers())
    for _ in range(2):  # no state is left from one time to the next
        np.testing.assert_allclose(
            perplexity(), [*np.exp([*losses.mean(1), losses.mean()]), losses.shape[1]], rtol=1e-5)
    randomize(softmax, 1, scale=1e6)  # that of a model that has diverged is infinite, and no error
    assert perplexity().average == math.inf


@pytest.mark.parametrize("classes_at_once", [1, 5, 12, 13])
def test_the_full_softmax_does_not_depend_on_how_many_classes_are_computed_at_once(
        classes_at_once, monkeypatch):
    monkeypatch.setattr(elmo.Softmax, "CLASSES_AT_ONCE", classes_at_once)
    softmax, y, target = randomize(elmo.Softmax(12, 5), scale=3), random(12, 5), np.arange(12)
    w = weights(softmax)
    expected = numpy_softmax(y, w["softmax/W"], w["softmax/b"], target)
    close(softmax(Tensor(y), Tensor(target, ms.int32)), expected)


@mock.patch.object(elmo, "compiled", lambda function: function)
def test_testing_prints_what_training_printed_of_the_best_epoch(trained):
    out = succeed("test", "--device", "CPU", "--data", trained.heldout.path, "--out", trained.model)
    assert trained.out.endswith(f"held-out {out}")
    assert re.fullmatch(PERPLEXITY + "\n", out)
    assert str(elmo.Perplexities(252.3149, 242.189, 247.2, 61244)) == (
        "perplexity forward 252.31 backward 242.19 average 247.20 over 61244 predictions")


# ---- 16. Embed -----------------------------------------------------------------------------------

def test_the_vectors_of_each_line_equal_numpy_and_the_bilm_in_both_formats_and_any_order(
        exported, h5py, monkeypatch):
    lines = ["the cat sat on the mat .", "", "Stranger", " ".join(f"w{k % 7}" for k in range(40)),
             "   ", "a b", "z" * 80 + " 日本語"]
    monkeypatch.chdir(exported.parent)
    write("sentences.txt", "\ufeff" + "\n".join(lines) + "\n")  # the mark is no part of a word
    write("reversed.txt", "\n".join(lines[::-1]))  # no line end at the end
    for flags in ("--out model --input sentences.txt --output vectors.npz",
                  "--options elmo_options.json --weights elmo_weights.hdf5 --input reversed.txt "
                  "--output vectors.hdf5"):
        succeed("embed", "--device", "CPU", *flags.split())
    vectors, bilm = dict(np.load("vectors.npz")), elmo.BiLM("elmo_options.json", exported)
    w = weights(bilm)
    assert list(vectors) == [str(k) for k in range(len(lines))]
    with h5py.File("vectors.hdf5") as file:
        assert sorted(file, key=int) == list(vectors)
        for line, array, other in zip(lines, vectors.values(), map(file.get, reversed(vectors))):
            assert array.shape == (3, len(line.split()), 10)  # blank lines have an array, too
            assert array.dtype == other.dtype == np.float32
            close(array, numpy_layers(line.split(), w, bilm.options))
            close(other[...], array, 1e-6)


def test_lines_end_at_line_feeds_alone_and_come_in_their_order_from_block_to_block(folder):
    write("text.txt", "\ufeffa b\n\n \nc\u2028d \x0c e\n" + "g h i\n" * 20)
    lines, blocks = [["a", "b"], [], [], ["c", "d", "e"], *20 * [["g", "h", "i"]]], []
    embedder = elmo.Embedder(None)
    embedder.TOKENS, embedder.embed_block = 10, lambda block: blocks.append(block) or block
    found = embedder.each(line.split() for line in data.open_text("text.txt"))
    assert list(found) == [["<S>", *line, "</S>"] for line in lines] and len(blocks) > 5


@pytest.mark.parametrize("streams, steps", [(256, 999), (4, 64)])  # not compiled, compiled
def test_blocks_of_sentences_and_words_of_any_number_and_length_equal_numpy(
        monkeypatch, streams, steps):
    monkeypatch.setattr(elmo.Embedder, "TOKENS", 400)
    monkeypatch.setattr(elmo.Embedder, "STREAMS", streams)
    monkeypatch.setattr(elmo.Embedder, "STEPS", steps)
    o = tiny_options(n_layers=1)
    bilm, rng = randomize(elmo.BiLM(o)), np.random.default_rng(0)
    words = [f"w{k}" * (1 + k % 20) for k in range(300)]
    ends = [0, 0, 1, 4, 40, 100, 160, 220, 300]
    lines = [words[begin:end] for begin, end in zip(ends, ends[1:])]
    expected = [numpy_layers(line, weights(bilm), o) for line in lines]
    order = rng.permutation(16) % 8
    vectors = elmo.Embedder(bilm)(lines[k] for k in order)
    assert len(vectors) == len(order)
    for k, array in zip(order, vectors):
        close(array, expected[k])
    assert elmo.Embedder(bilm)([]) == []


def test_work_that_takes_long_tells_how_far_it_is(monkeypatch, capsys):
    clock = mock.Mock(side_effect=itertools.count(0, 4))  # 4 s from call to call
    monkeypatch.setattr(data.time, "monotonic", clock)
    assert list(data.with_progress("abcdefgh", "letters", 8)) == list("abcdefgh")
    told = capsys.readouterr().err.splitlines()
    assert ["3 of 8, 20 s left" in told[0], "6 of 8, 8 s left" in told[1], len(told)] == [1, 1, 2]


# ---- 17. Text files ------------------------------------------------------------------------------

def sentences_of(path="train.mindrecord"):
    """The sentences of a MindRecord, each its words joined by spaces."""
    corpus = data.Corpus(str(path))
    return [*map(" ".join, corpus.read(range(corpus.sentences)))]


def test_tokenization_is_penn_treebank_loses_nothing_and_leaves_its_own_result_alone():
    for divided in (  # | is where words are divided and the text has no space
            "I ca|n't say it|'s John|'s|.", "WO|N'T you|? They|'ll|; we|'ve|, I|'d|, I|'m",
            'He said "|Yes|" (|or [|no|]|) {|x|}|.', "it|’s “|so|” do|n’t",
            "Mr. J. Smith of the U.S. rose at 9 a.m. e.g. today|.",
            "No. 5 said no|. U.S.-led plan B|.", "See https://x.org/a?b=c#d|, or www.x.org",
            "$|3.14 for 1,000 or 50|% at 10:30|, -3.5 (|-|5|) in 1990s", "(|me@ex-ample.co.uk|)|.",
            "O'Donnell a_b.c|(|d|) == x|[|0|]", "A well-known rock'n'roll O'Neil AT&T and/or",
            "Wait|... what -- no|--|yes|? the dogs|'", "他来了|。|我走了|！",
            "यह हिन्दी है|। مرحبا|، نعم|؟ می‌خواهم", ""):
        words = divided.replace("|", " ").split()
        assert data.tokenize(divided.replace("|", "")) == data.tokenize(" ".join(words)) == words
    rng = np.random.default_rng(0)
    pieces = [*"abJCIds.,'’\"-_/:&@!?()[]$%*~+019  \n\u00a0。ह\u093f\u200c\x00\u2028", "N'T",
              *"n't 's http:// www. U.S. e.g. Mr. No. x@y.z 1,000 Word -- ...".split()]
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 14)))
        words = data.tokenize(text)
        assert "".join(words) == "".join(text.split())
        assert data.tokenize(" ".join(words)) == words


def test_sentences_of_prose_run_over_lines_but_not_over_blank_ones(folder):
    write("a.txt", 'He said "Go." Then Mr. Smith left. "Why?" she asked. It was 5 p.m. Dr. No '
                   "(who?) came... and went. So do I. 他来了。我走了！\n\nA title\n\nOne sentence\n"
                   "over lines. Another\r\n \r\nend\n")
    convert("--input", "a.txt", "--raw")
    assert sentences_of() == [
        'He said " Go . "', "Then Mr. Smith left .", '" Why ? " she asked .', "It was 5 p.m.",
        "Dr. No ( who ? ) came ... and went .", "So do I .", "他来了 。", "我走了 ！", "A title",
        "One sentence over lines .", "Another", "end"]


def test_input_is_files_and_folders_without_hidden_ones_with_any_line_ends(folder):
    write("a.txt", "\ufeffthe one")  # without a line end: the next file begins a new sentence
    for name in ("2/z", "2/c/x", "2/.DS_Store", "2/.git/x", "2/c/.x", ".hidden"):
        write(f"b/.c/{name}", f"in {name}\r\rof the \x1c file\u2028now\r\n")
    convert("--input", "a.txt", "--input", "b/.c", "b/.c/2/.git/x")
    assert sentences_of() == ["the one", "in 2/c/x", "of the file now", "in 2/z", "of the file now",
                              "in 2/.git/x", "of the file now"]


def test_the_longest_lines_stay_whole_and_a_paragraph_without_end_does_not_fill_memory(folder):
    for words in (["a"] * 10_000, ["a" * 20, "b" * ((1 << 18) - 23)]):
        path = write("a.txt", " ".join(words) + "\nnext one\n")
        assert list(data.read_sentences([path], False)) == [words, ["next", "one"]]
    words = ["word"] * 99_999
    sentences = list(data.read_sentences([write("a.txt", "\n".join(words))], True))
    assert sum(sentences, []) == words and max(map(len, sentences)) < 20_000


def test_without_input_the_docstrings_of_the_library_are_converted(folder, monkeypatch):
    write("lib/a.py", '"""The cat sat.\n\n    >>> run()\n    5\n\nOn\nit\n==\nA dog.\n"""\n'
                      'def f():\n    """Go"""\n')
    write("lib/site-packages/b.py", '"""Foreign."""')
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(folder / "lib")})
    convert("--heldout-share", "0.5")
    found = sentences_of() + sentences_of("heldout.mindrecord")
    assert sorted(found) == ["A dog .", "Go", "On it", "The cat sat ."]


def test_a_vocabulary_is_by_falling_count_and_one_in_another_order_is_warned_of(folder):
    write("a.txt", "b b b a a é é <UNK> <UNK> Z Z <S> rare\n")
    command = "--input a.txt --build-vocab --overwrite --min-count 2".split()
    for more, expected in (([], "b\nZ\na\né\n"), (["--max-vocab", "2"], "b\nZ\n")):
        convert(*command, *more)
        assert Path("vocab").read_text(encoding="utf-8") == "<S>\n</S>\n<UNK>\n" + expected
    words = [f"w{k:03}" for k in range(200)]
    write("a.txt", "\n".join(" ".join(words[:n]) for n in (1, 2, 4, 8, 15, 30, 60, 200)))
    for order, n_lines in ((words, 0), (words[100:] + words[:100], 2)):
        write("vocab", "\n".join([*SPECIAL, *order]))
        _, _, errors = run("--input", "a.txt", "--overwrite", program=data)
        assert errors.count("WARNING: ") == n_lines
    assert data.frequency_order(np.zeros(2)) == 1


def test_converted_text_comes_back_in_any_order_and_the_summary_tells_of_it(folder):
    lines = ["the cat sat .", "the\u00a0dog\tsat", "", "café 北京 .", " \t ", "the " * 3000 + "."]
    write("a.txt", "\n".join(lines))
    out = convert("--input", "a.txt", "--output", "x")
    assert "x: 4 sentences, 3,011 tokens\nvocab: 10 words, among them 99.93% of the" in out
    corpus = data.Corpus("x")
    assert (corpus.sentences, corpus.tokens) == (4, 3011)
    expected = [line.split() for line in lines if line.strip()]
    corpus.CHUNK = 2  # records that are read at once
    for order in (np.array([3, 0, 2, 1, 0]), [2], []):
        assert list(corpus.read(order)) == [expected[k] for k in order]


def test_heldout_sentences_are_a_fixed_share_never_in_both_nor_counted_in_the_vocabulary(folder):
    lines = [f"the cat {k}" for k in range(3000)]
    write("a.txt", "\n".join(lines + lines[:100]))
    convert(*("--input a.txt --heldout heldout --heldout-share 0.1 --build-vocab --min-count 1 "
              "--vocab new").split())
    train, heldout = set(sentences_of()), set(sentences_of("heldout"))
    assert train | heldout == set(lines) and not train & heldout and 225 < len(heldout) < 375
    assert set(Vocabulary("new").words) == {*SPECIAL, *" ".join(train).split()}


def test_a_mindrecord_that_is_damaged_foreign_renamed_or_moved_is_refused(folder):
    for name, text in (("x/other", "on the mat\n"), ("x/a", "the cat sat .\n")):
        convert("--input", write("x/text", text * 500), "--output", name)
    for end, places in (("", (0, 300, 5000, 1 << 24, -20, -9, -2)),  # -20: without our end
                        (".db", (0, 8192, 10_000))):
        path = Path("x/a" + end)
        whole, wrong = path.read_bytes(), [Path("x/other" + end).read_bytes(), b"the cat\n" * 500]
        for k in places:
            wrong += whole[:k], whole[:k] + b"\xff" + whole[k:][1:]
        for content in wrong:
            path.write_bytes(content)
            with pytest.raises(data.InputError, match="x/a: it or its .db is damaged"):
                data.Corpus("x/a")
        path.write_bytes(whole)
    opened = data.Corpus("x/a")
    os.rename("x", "y")
    assert sentences_of("y/a") == ["the cat sat ."] * 500
    with pytest.raises(data.InputError, match="can no longer be read"):
        list(opened.read([0]))
    os.rename("y/a", "y/b")
    with pytest.raises(FileNotFoundError, match="y/b.db"):
        data.Corpus("y/b")
    os.rename("y/a.db", "y/b.db")
    with pytest.raises(data.InputError, match="y/b: .* renamed"):
        data.Corpus("y/b")


def test_a_program_that_is_killed_leaves_whole_files_and_can_be_run_again(folder):
    write("a.txt", "".join(f"the cat {k}\n" for k in range(50)))
    command = ("--input a.txt --output t --heldout h --heldout-share 0.5 --build-vocab --vocab v "
               "--min-count 1 --overwrite").split()
    convert(*command)
    whole = {name: Path(name).read_bytes() for name in ("t", "t.db", "h", "h.db", "v")}
    for n in range(1, 6):
        for path in whole:
            os.remove(path)
        with mock.patch.object(shutil, "rmtree"):  # SIGKILL cleans up nothing
            killed(os, "replace", n, *command, program=data)
        found = {path: Path(path).read_bytes() for path in whole if os.path.exists(path)}
        assert len(found) == n - 1 and found.items() <= whole.items()
        assert ("t" in found) <= ("t.db" in found) and ("h" in found) <= ("h.db" in found)
        convert(*command)
        assert len(sentences_of("t") + sentences_of("h")) == 50
        assert len(os.listdir()) == 7


def test_a_disk_that_is_full_is_one_line_and_earlier_files_stay(folder):
    write("a.txt", "the cat\n")
    convert("--input", "a.txt")
    before = tree(folder)
    of_mindspore = RuntimeError("Exception thrown from dataset pipeline.\n\n- Framework Unexpected")
    for place, name, error in (
            (mindrecord.FileWriter, "write_raw_data", of_mindspore),
            (mindrecord.FileWriter, "commit", of_mindspore),
            (os, "replace", OSError(errno.ENOSPC, "No space left on device"))):
        with mock.patch.object(place, name, side_effect=error):
            line = fail("--input", "a.txt", "--overwrite", program=data)
        assert "train.mindrecord: could not be written" in line
        assert tree(folder) == before


# ---- 18. Ascend, as far as it can be known without one -------------------------------------------

# No "Supported Platforms" in their documentation; each is named in MindSpore's library for Ascend.
UNDOCUMENTED = {"BiasAddGrad", "ClampScalar", "Divs", "InplaceAddExt", "LessScalar", "MaxPoolGrad",
                "Muls", "ReluGrad", "SigmoidGrad", "SplitWithSize", "StridedSliceGrad", "SumExt",
                "TanhGrad"}
STRUCTURE = {"Depend", "Load", "MakeTuple", "StopGradient", "TupleGetItem", "UpdateState"}


def test_the_graphs_of_training_and_testing_are_static_and_made_for_ascend(trained):
    graphs = trained.graphs
    assert re.search(r"IR entry: @\w+_update_", graphs) and re.search(r"@\w+_read_", graphs)
    shapes = re.findall(r"<Tensor\[\w+\], \(([^)]*)\)>", graphs)
    assert len(set(shapes)) > 50 and "-" not in "".join(shapes)
    operators = set(re.findall(r"= (?:PrimFunc_)?([A-Z]\w*)\(", graphs)) - STRUCTURE
    for name in operators - UNDOCUMENTED:
        texts = [inspect.getdoc(getattr(place, name, None)) or ""
                 for place in (ops, ops.operations, ops.auto_generate)]
        for function in re.findall(r"Refer to :func:`mindspore\.ops\.(\w+)`", "".join(texts)):
            texts.append(inspect.getdoc(getattr(ops, function)))
        platforms = re.findall(r"Supported Platforms:\s*(.*)", "\n".join(texts))
        assert platforms and all("Ascend" in text for text in platforms), name


# ---- 19. The command line ------------------------------------------------------------------------

def test_the_names_that_other_programs_rely_on_are_accepted(fake):
    def check(program, line, **expected):
        assert vars(program.parse_arguments(line.split())).items() >= expected.items()
    check(elmo, "--device_target CPU --data_url D --heldout H --vocab_path V --options_path O"
          " --train_url T --epoch_num 3 --steps 4 --lr 0.5 --batch-size 6 --seed 7 --log-every 8"
          " --save-every 9 --weights W",
          command="train", device="CPU", data="D", heldout="H", vocab="V", options="O", out="T",
          n_epochs=3, steps=4, learning_rate=0.5, batch_size=6, seed=7, log_every=8, save_every=9,
          weights="W")
    check(data, "--input_file a b --output_file O --vocab_path V --heldout H",
          input=["a", "b"], output="O", vocab="V", heldout="H")
    check(elmo, "", command="train", device="Ascend", data="train.mindrecord", out="model",
          vocab="vocab", heldout=None)
    check(data, "", vocab=os.path.join(HERE, "vocab"))
    for name in ("heldout.mindrecord", "vocab"):
        write(name, "")
    check(elmo, "train", heldout="heldout.mindrecord")
    check(elmo, "test", data="heldout.mindrecord", vocab=None)
    check(data, "", vocab="vocab")


@pytest.mark.parametrize("program", [data, elmo])
def test_help_is_given(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "--overwrite" in capsys.readouterr().out


def test_a_machine_without_ascend_is_told_of_the_cpu(monkeypatch):
    monkeypatch.setattr(ms, "set_device", mock.Mock(side_effect=RuntimeError("many\nlines")))
    assert re.search("Ascend.*--device CPU", fail("train"))


# ---- 20. README ----------------------------------------------------------------------------------

@for_the_module
def readme_programs(files, beside, tmp_path_factory):
    """The jobs that run the README's programs, beside small files in place of those they name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("options.json", "brown_options.json", "model/options.json"):
        write(folder / name, Path(files.options).read_text())
    for name in ("weights.hdf5", "brown.hdf5"):
        shutil.copy(files.weights, folder / name)
    elmo.write_arrays(f"{folder}/model/best.npz", elmo.named(files.bilm.get_parameters()).items())
    for name, n in (("train", 20), ("valid", 2), ("test", 2)):  # in place of CoNLL-2003
        write(folder / "conll" / f"{name}.txt", "-DOCSTART- -X- -X- O\n\n" + n * (
            "EU NNP B-NP B-ORG\nleft VBD B-VP O\nYork NNP B-NP B-LOC\nCity NNP I-NP I-LOC\n\n"))
    for name, n in (("train_12k", 20), ("heldout", 2400)):  # in place of Brown and its vectors
        write(folder / "brown" / f"{name}.tagged", n * (14 * "a/at play/vb-hl play/nn " + "\n"))
        write(folder / f"{name}.txt", n * (14 * "a play play " + "\n"))
        vectors = random(3, 42, 6)
        elmo.write_arrays(str(folder / f"{name}.npz"), ((str(k), vectors + k) for k in range(n)))
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    in_network = programs[1].replace("FINE_TUNE = False", "FINE_TUNE = True")
    lines = [line for line in re.findall(r"`([^`\n]+)`", README)
             if re.search(r"load_weights\(|scalar_|gamma, |_grad = |entropy\(|None, 1", line)
             and "…" not in line]  # that the text tells to add
    assert len(lines) == 9 and in_network != programs[1]
    its_names = ("from elmo import load_weights\nw0, w1, w2, g, n_tags = 1, 2, 3, 4, 5\n"
                 "scores, tags = ops.zeros((2, 2, 5)), Tensor([[0, 1], [3, -100]], ms.int32)")
    programs.append("\n".join([in_network, its_names, *lines]))
    return [beside(["python", write(folder / f"program{k}.py", program), "--epochs", 1], folder)
            for k, program in enumerate(programs)]


def test_the_programs_of_the_readme_run_as_written(readme_programs):
    assert readme_programs
    for job in readme_programs:
        job.result()


def test_the_commands_of_the_readme_are_understood():
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", "")
    commands = re.findall(r"\b(data|elmo)\.py\b([^#&|;>\n]*)", re.sub(r"\$\w+", "1", shell))
    assert len(commands) > 8
    for program, arguments in commands:
        {"data": data, "elmo": elmo}[program].parse_arguments(shlex.split(arguments))


def test_the_table_of_the_readme_says_where_the_paper_is():
    table = re.search(r"^\| paper \|.*\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    names = re.findall(r"`([\w.]+)`", "".join(row.split("|")[2] for row in table.splitlines()))
    assert len(names) > 8
    assert all(functools.reduce(getattr, name.split("."), elmo) for name in names)


# ---- 21. Malformed inputs: one clear line, and nothing is changed --------------------------------

WRONG_OPTIONS = {  # of an options file: a key and its value, and what is said of it
    'lstm.dim "7"': "dim is '7'", "lstm.dim 7.5": "dim is 7.5", "lstm.dim true": "dim is True",
    "lstm.n_layers 0": "n_layers is 0", "lstm.cell_clip NaN": "cell_clip is nan",
    "lstm.use_skip_connections 1": "use_skip_connections is 1", "dropout 1.0": "dropout is 1.0",
    "unroll_steps -20": "unroll_steps is -20", "learning_rate Infinity": "learning_rate is inf",
    "char_cnn.n_characters 100": "characters are UTF-8 bytes, n_characters 261 or 262",
    "char_cnn.max_characters_per_token 40": "words have 50 characters, max_characters_per_token",
    "bidirectional false": "models of one direction are not supported",
    "char_cnn null": "lacks 'char_cnn', which a biLM that reads characters needs",
    "lstm {}": "lacks 'dim'", 'char_cnn.activation "gelu"': "activation is 'gelu'",
    "char_cnn.filters [[51, 8]]": "filters is ((51, 8),)", "char_cnn.filters []": "filters is ()",
    "char_cnn.filters [1, 8]": "options that cannot be used"}


@for_the_module
def bad(trained, exported, h5py):
    """A folder of things that cannot be used; the names in the table below are those in it. The run
    is ../model."""
    folder, model = trained.folder / "bad", trained.model
    options_file, last = (model / "options.json").read_text(), (model / "last.npz").read_bytes()
    flipped = bytearray(last)
    flipped[len(last) // 2] ^= 4
    for name, content in {
            "fine.txt": "a b\n", "latin1.txt": "a b\nnaïve\n".encode("latin-1"), "brace.json": "{",
            "list.json": "[]", "deep.json": "[" * 100_000, "bytes.json": b"\xff\xfe",
            "page.hdf5": "<!DOCTYPE html>", "cut.hdf5": exported.read_bytes()[:5000],
            "begun/options.json": options_file, "flipped/last.npz": flipped,
            "cut/last.npz": last[:-99], "cut/best.npz": last[:-99],
            "cut/options.json": options_file,
            "best/best.npz": (model / "best.npz").read_bytes(),
            "other/vocab": "\n".join(trained.vocabulary.words[::-1])}.items():
        write(folder / name, content)
    for name, change in {
            **{f"wrong{k}": change for k, change in enumerate(WRONG_OPTIONS)},
            "dim8": "lstm.dim 8", "one_layer": "lstm.n_layers 1",
            "no_highway": "char_cnn.n_highway 0"}.items():
        content, (key, value) = json.loads(options_file), change.split(" ", 1)
        *outer, key = key.split(".")
        functools.reduce(dict.get, outer, content)[key] = json.loads(value)
        write(folder / f"{name}.json", content)
    with h5py.File(shutil.copyfile(exported, folder / "nan.hdf5"), "r+") as file:
        file["char_embed"][0] = np.nan
    with h5py.File(shutil.copyfile(exported, folder / "no_projection.hdf5"), "r+") as file:
        del file["RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0"]
    return folder


def each(command, flag, errors):
    """{error: names} -> {command with the flag and a name: the name, error}. Of a flag given twice
    the last counts."""
    return {f"{command} {flag} {name}": name + error
            for error, names in errors.items() for name in names.split()}


TRAIN = ("elmo train --device CPU --data ../train.mindrecord --vocab ../vocab "
         "--options ../options.json --out new")
RESUME = TRAIN + " --heldout ../heldout.mindrecord --out ../model --resume"
TEST = "elmo test --device CPU --data ../heldout.mindrecord --out ../model"
EMBED = "elmo embed --device CPU --out ../model --input fine.txt --output new.npz"
EXPORT = "elmo export --device CPU --out ../model"
WEIGHTS = " --options ../elmo_options.json --weights ../elmo_weights.hdf5"
MALFORMED = {
    # Options and weights
    **each(TRAIN, "--options", {
        ": No such file": "gone.json",
        ": No such file or directory; download it first": "https://x.org/o.json",
        ": options that cannot be used": "brace.json list.json deep.json bytes.json"}),
    **{f"{TRAIN} --options wrong{k}.json": error
       for k, error in enumerate(WRONG_OPTIONS.values())},
    **each(TRAIN, "--weights", {
        ": no such file (training writes best.npz when an epoch ends; what is at a URL must be":
        "gone.hdf5 https://x.org/w.hdf5",
        ": cannot be read": "cut.hdf5 page.hdf5 cut/best.npz",
        ": char_embed holds numbers that are not finite": "nan.hdf5",
        ": has no RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0, which these options ask for "
        "(without projections": "no_projection.hdf5"}),
    TRAIN + WEIGHTS + " --options dim8.json": "is [10, 28], but these options ask for [10, 32]",
    EMBED + WEIGHTS + " --options one_layer.json": "Cell1/LSTMCell/B, which these options do not",
    EMBED + WEIGHTS + " --options no_highway.json": "holds CNN_high_0/W_carry, which these options",
    TRAIN + " --batch-size 9000": "are less than one batch of 18,000",
    TRAIN + " --lr nan": "learning_rate is nan", TRAIN + " --seed -1": "seed",
    # Runs
    **each(TRAIN, "--out", {"/last.npz: exists": "../model", ": File exists": "fine.txt"}),
    TRAIN + " --out other": "other/vocab: exists, and is another",
    TRAIN + " --weights best/best.npz --out best --steps 1": "best/best.npz: exists; --resume",
    **each(RESUME, "--out", {
        "/last.npz: no such file; leave out --resume": "new begun",
        "/last.npz: cannot be read": "cut flipped"}),
    RESUME + " --lr 0.5": "learning_rate 0.2, not 0.5", RESUME + " --seed 1": "seed 0, not 1",
    RESUME + " --batch-size 4": "batch_size 12, not 4",
    RESUME + " --vocab other/vocab": "that run has vocabulary",
    RESUME + " --amp bfloat16": "amp None, not 'bfloat16'",
    RESUME + " --options dim8.json": "dim 7, not 8", RESUME + " --weights nan.hdf5": "weights None",
    RESUME + " --data ../heldout.mindrecord": "that run has text",
    RESUME + " --heldout ../train.mindrecord": "that run has held-out text",
    **each(TEST, "--out", {
        "/options.json: No such file": "gone", "/best.npz: cannot be read": "cut"}),
    **each(EMBED, "--out", {"/best.npz: no such file (training writes best.npz when": "begun"}),
    # What is read and what is written
    **each(EMBED, "--input", {
        ": No such file": "gone.txt", ": line 2 is not UTF-8": "latin1.txt"}),
    **each(EMBED, "--output", {
        ": exists": "nan.hdf5", ": the name must end in .npz or .hdf5": "new.txt"}),
    **each(EMBED, "--overwrite --output", {": is an input": "fine.txt ../model/best.npz"}),
    **each(EXPORT, "--overwrite --weights", {": is an input": "../model/best.npz"}),
    EXPORT + " --weights ../elmo.hdf5": "../elmo_options.json: exists",
    EXPORT: "export needs --weights", TEST + " --weights w": "--options and --weights go together",
    TEST + " --options o": "--options and --weights go together",
    "elmo embed --device CPU --output x": "embed needs --input",
}


@pytest.mark.parametrize("command, error", MALFORMED.items(), ids=[
    re.sub(r"[^\w.-]+", "_", f"{command.split()[1]}_{error}")[:70]
    for command, error in MALFORMED.items()])
def test_a_malformed_input_is_one_clear_line_and_changes_nothing(
        trained, bad, monkeypatch, command, error):
    monkeypatch.chdir(bad)
    (program, *arguments), before = shlex.split(command), tree(trained.folder)
    assert error in fail(*arguments, program={"data": data, "elmo": elmo}[program])
    assert tree(trained.folder) == before


# ---- 22. Malformed text: one clear line, and nothing is changed ----------------------------------

TEXT = {  # files that cannot be used, but for fine.txt and beside.db
    "fine.txt": "a b\n", "blank.txt": "\n \n", "latin1.txt": "a b\nnaïve\n".encode("latin-1"),
    "utf16.txt": "the cat\n".encode("utf-16-le"), "archive": zlib.compress(b"the cat\n" * 99),
    "words.txt": "a b\n" + "a " * 10_001, "long.txt": "a" * (1 << 18), "beside.db": "precious",
    "empty/.x": "a b\n", "no_special": "the\ncat\n",
    "counts": "<S>\n</S>\n<UNK>\nthe 9\nof 7\na 5\nat 3\n"}
INTO_NEW, FINE_TEXT = "--output new --input ", "--output new --input fine.txt "
MALFORMED_TEXT = {
    INTO_NEW + "gone.txt": "gone.txt: No such file",
    INTO_NEW + "https://x.org/text": "download it first",
    INTO_NEW + "empty": "empty: a folder without files",
    INTO_NEW + "blank.txt": "new: no sentence for it",
    INTO_NEW + "latin1.txt": "latin1.txt: line 2 is not UTF-8 text",
    INTO_NEW + "utf16.txt": "utf16.txt: line 1 is not UTF-8 text",
    INTO_NEW + "archive": "archive: line 1 is not UTF-8 text",
    INTO_NEW + "words.txt": "words.txt: line 2 has 10,001 words",
    INTO_NEW + "long.txt": "long.txt: line 1 has 262,144 characters",
    FINE_TEXT + "--heldout h --heldout-share 1e-9": "h: no sentence for it",
    FINE_TEXT + "--vocab gone": "gone: No such file",
    FINE_TEXT + "--vocab no_special": "no_special: one word a line, without counts, and <S>, </S>",
    FINE_TEXT + "--vocab counts": "counts: one word a line, without counts",
    FINE_TEXT + "--build-vocab --vocab v --min-count 9": "--min-count 9: no word",
    FINE_TEXT + "--output h --heldout ./h": "./h: is an input or another output",
    FINE_TEXT + "--output vocab --overwrite": "vocab: is an input",
    FINE_TEXT + "--output fine.txt --overwrite": "fine.txt: is an input",
    "--input . --output long.txt --overwrite": "long.txt: is an input",
    FINE_TEXT + "--output blank.txt": "blank.txt: exists; choose another name or say --overwrite",
    FINE_TEXT + "--output beside": "beside.db: exists",
    FINE_TEXT + "--output . --overwrite": ".: exists",
    FINE_TEXT + "--output gone/new": "gone/new: could not be written",
    FINE_TEXT + "--build-vocab": "vocab: exists",
    FINE_TEXT + "--build-vocab --vocab new": "new: is an input or another output"}


@pytest.mark.parametrize("command, error", MALFORMED_TEXT.items())
def test_text_that_cannot_be_converted_is_one_clear_line_and_changes_nothing(
        folder, command, error):
    for name, content in TEXT.items():
        write(name, content)
    before = tree(folder)
    assert error in fail(*command.split(), program=data)
    assert tree(folder) == before
