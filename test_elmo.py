"""The specification of this project, as tests: `python -m pytest test_elmo.py`.

It follows the README. First the paper's parts, each against plain numpy, and ELMo as a layer of a network; then
published weights; characters, vocabulary and the stream of batches; training, step by step against numpy; resuming;
several workers, half precision, perplexity, embedding; text files, the graphs for Ascend, the command line; last a
table of malformed inputs, and the README itself.
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
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
import elmo
from data import SPECIAL, Chunk, Vocabulary, batch_to_ids, char_ids, fill_tiers, measure_tiers, prefetch, read_chunks
import mindspore as ms
from mindspore import Tensor, nn, ops

ms.set_device("CPU")  # once; MindSpore refuses it once something has been computed

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURE = os.path.join(HERE, "..", "shared", "allennlp_fixture")

# ---- Set-up that tests share -----------------------------------------------------------------------------------------


def write(path, text):
    """Writes text (str or bytes) to a path; returns the path as a str."""
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_json(path, content):
    write(path, json.dumps(content, indent=1))


def tree(folder):
    """Every path under a folder, hidden ones included; of files their content, of large ones size and time."""
    def content(path):
        about = path.stat()
        return path.read_bytes() if about.st_size < 1 << 20 else (about.st_size, about.st_mtime_ns)
    return {str(path): path.is_file() and content(path) for path in sorted(Path(folder).rglob("*"))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a vocabulary of its own."""
    monkeypatch.chdir(tmp_path)
    write("vocab", "\n".join([*SPECIAL, "the", "cat", "sat", ".", "on", "mat", "dog"]) + "\n")
    return tmp_path


def close(actual, expected, tolerance=1e-5):
    actual = actual.asnumpy() if isinstance(actual, Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def options(**changes):
    """The options of a model that is tiny but has everything, both clips included."""
    tiny = dict(filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5, cell_clip=0.5,
                proj_clip=0.3, dropout=0.0, batch_size=3, unroll_steps=4, n_negative_samples_batch=6)
    return elmo.Options(**{**tiny, **changes})


def tiny_options(**changes):
    """Smaller still: numpy computes its gradient weight by weight."""
    return options(**{**dict(filters=((1, 1), (2, 2)), char_dim=2, dim=3, projection=2, batch_size=2, unroll_steps=3,
                             cell_clip=0.5, proj_clip=0.25), **changes})


def randomize(cell, seed=0, scale=0.5):
    """Random values for all parameters of a cell, biases too, which are 0 at first."""
    rng = np.random.default_rng(seed)
    for p in cell.get_parameters():  # assigned in place: a compiled graph does not see what set_data sets
        ops.assign(p, Tensor(rng.normal(0, scale, p.shape).astype(np.float32)))
    return cell


def weights(*cells):
    """The parameters of cells in float64, by their published names."""
    parameters = itertools.chain(*(cell.get_parameters() for cell in cells))
    return {p.name.rpartition(".")[2]: p.asnumpy().astype(np.float64) for p in parameters}


def random(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def gradient_of(function, positions=None, parameters=None):
    """ms.grad, compiled as in training."""
    return ms.jit(ms.grad(function, positions, parameters))


def compiled_graphs():
    """How many graphs MindSpore has compiled so far."""
    from mindspore.graph import api
    return len(api.ms_compile_cache)


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


def convert(*argv):
    return succeed(*argv, program=data)


EPOCHS = 2
PERPLEXITY = r"perplexity forward (\d+\.\d\d) backward (\d+\.\d\d) average (\d+\.\d\d) over (\d+) predictions"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a corpus that data.py made, its vocabulary, and the options of a tiny model."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    animals, verbs, places = "cat dog cow naïve-fox".split(), "sat ran slept".split(), "mat hill road".split()
    write(folder / "text.txt", "".join(f"the {rng.choice(animals)} {rng.choice(verbs)} on the {rng.choice(places)} "
                                       f"number {k} .\n" for k in range(130)))
    convert("--input", folder / "text.txt", "--output", folder / "train.mindrecord", "--vocab", folder / "vocab",
            "--build-vocab", "--min-count", 2, "--heldout", folder / "heldout.mindrecord", "--heldout-share", 0.1)
    o = options(dropout=0.1, batch_size=8, unroll_steps=3, n_epochs=EPOCHS)
    write_json(str(folder / "options.json"), elmo.as_json(o))
    corpus, heldout = (data.Corpus(str(folder / f"{name}.mindrecord")) for name in ("train", "heldout"))
    n_predictions = corpus.tokens + corpus.sentences
    return types.SimpleNamespace(folder=folder, options=o, vocabulary=Vocabulary(str(folder / "vocab")), corpus=corpus,
                                 heldout=heldout, ends=[n * n_predictions // (8 * 3) for n in range(1, EPOCHS + 2)])


def training(text, out, *more):
    """The command line that trains on `text`."""
    return ["train", "--device", "CPU", "--data", text.folder / "train.mindrecord", "--vocab", text.folder / "vocab",
            "--heldout", text.folder / "heldout.mindrecord", "--options", text.folder / "options.json", "--out", out,
            "--log-every", 10, "--save-every", 15, *more]


@pytest.fixture(scope="module")
def trained(text):
    """The model that elmo.py trained on `text`, with what it printed, how many graphs there were after each step, and
    a copy of its folder as it was after step 30."""
    folder, graphs, make_step, save = text.folder, [], elmo.make_step, elmo.Run.save

    def counting(*args):
        step = make_step(*args)

        def counted(batch):
            result = step(batch)
            graphs.append(compiled_graphs())
            return result
        return counted

    def copying(self, *args):
        save(self, *args)
        if self.step == 30:
            shutil.copytree(folder / "model", folder / "killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(elmo, "make_step", counting)
        patch.setattr(elmo.Run, "save", copying)
        out = succeed(*training(text, "model"))
    return types.SimpleNamespace(**vars(text), model=folder / "model", killed=folder / "killed", out=out, graphs=graphs)


@pytest.fixture(scope="module")
def h5py():
    return pytest.importorskip("h5py", reason="h5py, which .hdf5 files need, is not installed")


@pytest.fixture(scope="module")
def exported(trained, h5py):
    """The weights of `trained` in the published format; elmo_options.json is beside them."""
    succeed("export", "--device", "CPU", "--out", trained.model, "--weights", trained.folder / "elmo_weights.hdf5")
    return trained.folder / "elmo_weights.hdf5"


@pytest.fixture(scope="module")
def trained_bilm(trained, exported):
    return elmo.BiLM(trained.folder / "elmo_options.json", exported)


@pytest.fixture(scope="module")
def files(tmp_path_factory, h5py):
    """A tiny model's options and weights in the published format, without a softmax, and the model."""
    folder, bilm = tmp_path_factory.mktemp("published"), randomize(elmo.BiLM(options()), 3)
    write_json(str(folder / "options.json"), elmo.as_json(bilm.options))
    with h5py.File(folder / "weights.hdf5", "w") as file:
        for name, array in weights(bilm).items():
            file[name] = array.astype(np.float32)
    return types.SimpleNamespace(options=str(folder / "options.json"), weights=str(folder / "weights.hdf5"), bilm=bilm)


@pytest.fixture(scope="module")
def resumed(trained):
    """The folder of `trained` after step 30, resumed in another process, which embeds a sentence, too, and writes the
    graphs that it compiles."""
    write(trained.folder / "one.txt", "the cat\n")
    environment = {**os.environ, "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(trained.folder / "graphs")}
    embed = ["embed", "--device", "CPU", "--out", trained.killed, "--input", trained.folder / "one.txt", "--output",
             trained.folder / "one.npz"]
    commands = [list(map(str, command)) for command in (training(trained, trained.killed, "--resume"), embed)]
    program = f"import sys; sys.path.insert(0, {HERE!r}); import elmo; sys.exit(max(map(elmo.main, {commands!r})))"
    yield from started([sys.executable, "-c", program], trained.folder, environment)


@pytest.fixture(scope="module")
def two_workers(text, tmp_path_factory):
    """15 steps of training by two workers that msrun starts, without dropout."""
    folder, programs = tmp_path_factory.mktemp("two_workers"), os.path.dirname(sys.executable)
    write_json(str(folder / "options.json"), elmo.as_json(replace(text.options, dropout=0.0, batch_size=4)))
    environment = {**os.environ, "PATH": programs + os.pathsep + os.environ["PATH"]}  # msrun's `python` is ours
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    yield from started([
        f"{programs}/msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", f"--master_port={port}",
        f"--log_dir={folder}", elmo.__file__, *training(text, folder / "model", "--options", folder / "options.json",
                                                        "--steps", 15, "--log-every", 1)], folder, environment)


def started(command, folder, environment):
    """For a fixture: yields a process that runs in the background, and ends it where it is still running."""
    with open(folder / "output", "w+") as output, subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment, stdout=output, stderr=output) as process:
        yield types.SimpleNamespace(process=process, folder=folder)
        process.terminate()


def finished(job):
    """What a process of `started` printed, when it is through."""
    assert job.process.wait(300) == 0, (job.folder / "output").read_text()
    return (job.folder / "output").read_text()


@pytest.fixture(scope="module", autouse=True)
def in_the_background(request):
    """What other processes do for later tests begins at once, where such a test is selected."""
    selected = {name for item in request.session.items for name in item.fixturenames}
    for name in ("two_workers", "resumed"):
        if name in selected:
            request.getfixturevalue(name)


class FakeStep:
    """In place of a compiled training step: the batch decides what becomes of all that a run consists of."""

    def __init__(self, run, tiers):
        self.run, self.parameters = run, [*run.bilm.get_parameters(), *run.accumulators, *run.tables]

    def __call__(self, batch):
        number = zlib.crc32(b"".join(np.ascontiguousarray(x).tobytes() for x in batch)) / 2 ** 32
        for k, p in enumerate(self.parameters):
            if (k + self.run.step) % 8 == 0:  # a part of them, for speed
                p.set_data(Tensor(p.asnumpy() * np.float32(0.9) + np.float32(number)))
        self.run.lstm_state = Tensor(self.run.lstm_state.asnumpy() * np.float32(0.5) + np.float32(number))
        return Tensor(np.float32(number)), Tensor(np.float32(1))


class FakePerplexity:
    """In place of the perplexity, which is compiled: the weights decide it."""
    seen = []

    def __init__(self, bilm, softmax, vocabulary, corpus, workers):
        self.bilm, self.softmax = bilm, softmax

    def __call__(self):
        w = weights(self.bilm, self.softmax)
        self.seen.append(w)
        average = 2 + abs(sum(float(array.sum()) for array in w.values())) % 1
        return elmo.Perplexities(2.0, 2.0, average, 7)


class FakeEmbedder:
    """In place of the embedder: zeros, and the sentences that it was asked for."""
    seen = []

    def __init__(self, bilm):
        self.bilm = bilm

    def __call__(self, sentences):
        self.seen.extend(sentences)
        return [np.zeros((3, len(words), 10), np.float32) for words in sentences]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed(monkeypatch, place, name, times, *command, program=elmo):
    """Runs a command that is killed when a function is called for the n-th time."""
    original, calls = getattr(place, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == times:
            raise Killed
        return original(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, dying)
        with pytest.raises(Killed):
            run(*command, program=program)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Nothing is compiled in this test, which works in an empty folder."""
    monkeypatch.setattr(elmo, "make_step", FakeStep)
    monkeypatch.setattr(elmo, "make_perplexity", FakePerplexity)
    monkeypatch.setattr(elmo, "Embedder", FakeEmbedder)
    monkeypatch.setattr(FakePerplexity, "seen", [])
    monkeypatch.setattr(FakeEmbedder, "seen", [])
    monkeypatch.chdir(tmp_path)


# ---- The model once more, in plain numpy: one word, one time step after the other, in float64 ------------------------


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
        scores = [sum(embedded[..., p + n, :] @ kernel[n] for n in range(width)) for p in range(50 - width + 1)]
        features.append(np.max(scores, axis=0) + w[f"CNN/b_cnn_{k}"])
    x = np.concatenate(features, -1)
    x = relu(x) if o.activation == "relu" else np.tanh(x)
    for k in range(o.n_highway):
        g = sigmoid(x @ w[f"CNN_high_{k}/W_carry"] + w[f"CNN_high_{k}/b_carry"])
        x = g * relu(x @ w[f"CNN_high_{k}/W_transform"] + w[f"CNN_high_{k}/b_transform"]) + (1 - g) * x
    return x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]


def numpy_lstm(x, h, c, W, B, W_P, cell_clip, proj_clip):
    """h and c of every step, x [time, ..., size]."""
    hs, cs = [], []
    for x_t in x:
        i, j, f, o = np.split(np.concatenate((x_t, h), -1) @ W + B, 4, -1)
        c = clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), cell_clip)
        h = clip(sigmoid(o) * np.tanh(c) @ W_P, proj_clip)
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
        hs, cs = numpy_lstm(x, h, c, w[cell + "W_0"], w[cell + "B"], w[cell + "W_P_0"], o.cell_clip, o.proj_clip)
        x = hs + x if layer > 0 and o.use_skip_connections else hs
        outputs.append(x)
        states.append(np.concatenate((hs[-1], cs[-1]), -1))
    return outputs, np.array(states)


def numpy_layers(words, w, o, state=(None, None), boundaries=False):
    """h_0 ... h_L of one sentence, [layers + 1, words, 2 · projection], and the LSTMs' state after it."""
    x = numpy_encoder(np.array([char_ids(word) for word in ["<S>", *words, "</S>"]]), w, o)
    forward, forward_state = numpy_direction(x, w, 0, o, state[0])
    backward, backward_state = numpy_direction(x[::-1], w, 1, o, state[1])
    layers = [np.concatenate((x, x), -1)]
    layers += [np.concatenate((f, b[::-1]), -1) for f, b in zip(forward, backward)]
    layers = np.array(layers) if boundaries else np.array(layers)[:, 1:-1]
    return layers, np.array((forward_state, backward_state))


def log_sum_exp(x):
    m = x.real.max(-1, keepdims=True)
    return np.log(np.exp(x - m).sum(-1)) + m[..., 0]


def numpy_softmax(y, W, b, target):
    """-log p(target) of y [n, projection] -> [n]."""
    logits = y @ W.T + b
    return log_sum_exp(logits) - logits[np.arange(len(y)), target]


def numpy_sampled_softmax(y, W, b, target, negatives, target_log_q, negative_log_q):
    """As TensorFlow: true and sampled logits side by side, accidental hits among the latter at -1e30."""
    true = (y * W[target]).sum(-1) + b[target] - target_log_q  # [n]
    sampled = y @ W[negatives].T + b[negatives] - negative_log_q  # [n, N]
    sampled = np.where(negatives[None, :] == target[:, None], -1e30, sampled)
    return log_sum_exp(np.concatenate((true[:, None], sampled), 1)) - true


def numpy_mix(layers, w, gamma):
    s = np.exp(w - np.max(w)) / np.exp(w - np.max(w)).sum()
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


def letters(*words):
    """The rows of char_embed that words need."""
    return {n - 1 for word in words for n in char_ids(word)}


# ---- 1. Options (section 3.4) ----------------------------------------------------------------------------------------


PUBLISHED = {"char_cnn": {"filters": [[1, 3], [2, 4], [3, 5]], "embedding": {"dim": 4}, "activation": "relu",
                          "n_highway": 1, "n_characters": 262, "max_characters_per_token": 50},
             "lstm": {"dim": 7, "projection_dim": 5, "n_layers": 2, "use_skip_connections": True, "cell_clip": 3,
                      "proj_clip": 3}}  # what AllenNLP's option files hold


def test_the_default_is_the_papers_model_and_the_named_sizes_are_the_published_ones():
    o = elmo.Options()
    assert (o.n_layers, o.dim, o.projection, o.n_highway, o.use_skip_connections) == (2, 4096, 512, 2, True)
    assert sum(n for _, n in o.filters) == 2048 and [width for width, _ in o.filters] == [1, 2, 3, 4, 5, 6, 7]
    assert (o.char_dim, o.activation, o.cell_clip, o.proj_clip, o.dropout) == (16, "relu", 3, 3, 0.1)
    assert (o.batch_size, o.unroll_steps, o.n_negative_samples_batch, o.sample_softmax) == (128, 20, 8192, True)
    assert (o.learning_rate, o.all_clip_norm_val, o.n_epochs) == (0.2, 10, 10)
    assert elmo.SIZES["original"] == o
    assert elmo.SIZES["medium"] == replace(o, dim=2048, projection=256, n_highway=1)
    assert elmo.SIZES["small"] == replace(o, dim=1024, projection=128, n_highway=1)


def test_what_published_options_lack_takes_the_papers_values(tmp_path):
    path = write(tmp_path / "options.json", json.dumps(PUBLISHED))
    o, paper = elmo.read_options(path), elmo.Options()
    assert o == replace(paper, filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5)
    write_json(path, elmo.as_json(o))
    assert elmo.read_options(path) == o


def test_keys_that_mean_nothing_here_are_named(tmp_path, capsys):
    known = {**PUBLISHED, "bidirectional": True}
    for content, message in ((known, ""), ({**known, "lr": 5, "x": {"y": 1}}, "ignores lr, x.y")):
        path = write(tmp_path / "options.json", "\ufeff" + json.dumps(content))
        elmo.read_options(path)
        assert capsys.readouterr().err == (f"{path}: {message}\n" if message else "")


def test_an_option_that_makes_no_sense_is_a_value_error_in_python_too():
    for wrong in (dict(activation="ReLU"), dict(dim="7"), dict(filters=[(1, 8)]), dict(sample_softmax=1)):
        with pytest.raises(ValueError, match="must be"):
            elmo.Options(**wrong)
    with pytest.raises(ValueError, match="n_highway is -1"):
        replace(elmo.Options(), n_highway=-1)


# ---- 2. Character CNN (sections 3.1 and 3.4) -------------------------------------------------------------------------


ODD_WORDS = ["a", "The", "I", "elephants", "x" * 47, "x" * 48, "y" * 49, "long" * 30, "naïve", "Δημοκρατία", "日本語",
             "🙂", "ภาษาไทย" * 4, "<S>", "</S>", "<UNK>", "..."]


@pytest.mark.parametrize("activation, n_highway, filters", [
    ("relu", 1, ((1, 3), (2, 4), (3, 5))),
    ("tanh", 2, ((2, 4), (7, 6), (5, 3))),  # not by width
    ("relu", 3, ((50, 2), (1, 4))),         # as wide as a token
    ("tanh", 0, ((40, 8),)),
])
def test_the_character_encoder_equals_numpy_also_for_words_in_tiers_of_length(activation, n_highway, filters):
    o, n = options(activation=activation, n_highway=n_highway, filters=filters), len(ODD_WORDS)
    plain, encoder = (randomize(kind(o, np.random.default_rng(0))) for kind in (elmo.CharEncoder, elmo.FastCharEncoder))
    chars = np.array([*map(char_ids, ODD_WORDS), np.zeros(50, np.int32)])  # the last is masked
    expected = numpy_encoder(chars, weights(encoder), o)
    close(plain(Tensor(chars)), expected)
    close(encoder(Tensor(chars)), expected)
    limits = (3, 11, 43)
    for some in [*([limit] for limit in limits), limits]:
        n_short = [(data.word_chars(ODD_WORDS)[1] <= limit).sum() for limit in some]
        tiers = [*zip(np.diff([0, *n_short, n]).tolist(), [*some, 50])]
        chars, rows = fill_tiers(tiers, ODD_WORDS, np.arange(n))
        assert len(chars) == n  # each tier is full
        close(encoder(Tensor(chars), tuple(tiers)).asnumpy()[rows], expected[:n])


@pytest.mark.parametrize("activation, filters", [("relu", ((1, 2), (3, 3))), ("tanh", ((4, 2), (2, 3)))])
def test_the_gradient_of_the_character_encoder_is_right_for_every_weight_at_every_call(activation, filters):
    o = options(activation=activation, filters=filters, char_dim=2, projection=3, n_highway=2)
    encoder = randomize(elmo.FastCharEncoder(o, np.random.default_rng(0)))
    parameters, tiers, dy = ms.ParameterTuple(encoder.trainable_params()), ((2, 5), (2, 50)), random(4, 3)

    def loss(chars, dy):
        return (encoder(chars, tiers) * dy).sum()
    gradient = gradient_of(loss, None, parameters)
    largest = dict.fromkeys(weights(encoder), 0)
    # One graph, called again and again: MindSpore's ops.pad had a gradient that was right at the first call only.
    texts = ["a", "it", "x" * 60, "naïve"], ["on", "I", "cats", "y" * 48], ["u", "v", "w", "no"]
    for seed, words in enumerate(texts):
        randomize(encoder, seed)
        chars, _ = fill_tiers(tiers, words, np.arange(4))
        expected = complex_step_gradient(lambda w: (numpy_encoder(chars, w, o) * dy).sum(), weights(encoder),
                                         letters(*words))
        for p, actual in zip(parameters, gradient(Tensor(chars), Tensor(dy))):
            close(actual, expected[p.name])
            largest[p.name] = max(largest[p.name], np.abs(expected[p.name]).max())
    assert min(largest.values()) > 1e-3


@pytest.mark.parametrize("on_cpu", [True, False])  # each device has a form of the maximum and of tanh
def test_the_gradient_of_the_maximum_goes_to_one_position_where_several_are_equal(on_cpu, monkeypatch):
    monkeypatch.setattr(elmo, "on_cpu", lambda: on_cpu)
    o, rng = options(filters=((1, 4), (3, 3)), char_dim=2, n_highway=0, projection=7), np.random.default_rng(0)
    encoder, words = elmo.FastCharEncoder(o, rng), ["abcabcabca", "hello", "xyzzy" * 12, "ab"]
    for p in encoder.get_parameters():  # small integers, so that there are many ties
        p.set_data(Tensor(rng.integers(-1, 2, p.shape).astype(np.float32)))
    chars, dm, w = np.array([char_ids(word) for word in words]), random(4, 7), weights(encoder)
    embedded, expected, n_ties, first = w["char_embed"][chars - 1], np.zeros((261, 2)), 0, 0
    for k, (width, n) in enumerate(o.filters):
        kernel = w[f"CNN/W_cnn_{k}"][0]
        scores = np.array([sum(embedded[:, p + m] @ kernel[m] for m in range(width)) for p in range(51 - width)])
        n_ties += ((scores == scores.max(0)).sum(0) > 1).sum()
        for word, f in np.ndindex(4, n):
            p = scores[:, word, f].argmax()
            for m in range(width):
                expected[chars[word, p + m] - 1] += kernel[m, :, f] * dm[word, first + f]
        first += n
    assert n_ties > 12

    for p, array in ((encoder.b_cnn[0], np.full(4, 99)), (encoder.b_cnn[1], np.full(3, 99)),  # relu changes nothing,
                     (encoder.projection[0], np.eye(7))):                                      # nor the projection
        p.set_data(Tensor(array.astype(np.float32)))

    def loss(chars, dm):
        return (encoder(chars) * dm).sum()
    close(gradient_of(loss, None, ms.ParameterTuple([encoder.char_embed]))(Tensor(chars), Tensor(dm))[0], expected)


# ---- 3. LSTM with projection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrence", [elmo.FastRecurrence, elmo.Recurrence])
@pytest.mark.parametrize("cell_clip, proj_clip, active", [(100, 100, False), (0.4, 0.2, True)])
def test_the_lstm_and_its_gradient_equal_numpy(cell_clip, proj_clip, active, recurrence):
    time, batch, size, dim, projection = 6, 3, 4, 5, 3
    shapes = {"x": (time, batch, size), "h": (batch, projection), "c": (batch, dim), "W": (size + projection, 4 * dim),
              "B": (4 * dim,), "W_P": (dim, projection)}
    inputs = {name: random(*shape, seed=k, scale=0.5) for k, (name, shape) in enumerate(shapes.items())}
    lstm, dy = recurrence(cell_clip, proj_clip), random(time, batch, projection, seed=9)
    w = {name: array.astype(np.float64) for name, array in inputs.items()}
    hs, cs = numpy_lstm(*w.values(), cell_clip, proj_clip)
    assert active == (np.abs(hs) == proj_clip).any() == (np.abs(cs) == cell_clip).any()
    assert not (np.abs(hs) == proj_clip).all() and not (np.abs(cs) == cell_clip).all()
    actual, h_of_each, c_of_each, _ = lstm(*map(Tensor, inputs.values()))
    close(actual, hs, 1e-6)
    close(np.array([h.asnumpy() for h in h_of_each]), hs, 1e-6)
    close(np.array([c.asnumpy() for c in c_of_each]), cs, 1e-6)

    def loss(x, h, c, W, B, W_P):
        return (lstm(x, h, c, W, B, W_P)[0] * Tensor(dy)).sum()
    gradient = gradient_of(loss, (0, 1, 2, 3, 4, 5))(*map(Tensor, inputs.values()))
    expected = complex_step_gradient(lambda w: (numpy_lstm(*w.values(), cell_clip, proj_clip)[0] * dy).sum(), w)
    for name, actual in zip(inputs, gradient):
        ends = recurrence is elmo.FastRecurrence and name in ("h", "c")  # its gradients stop where the chunk begins
        close(actual, 0 * expected[name] if ends else expected[name])
        assert np.abs(expected[name]).max() > 1e-2


# ---- 4. Bidirectional language model (section 3.1) -------------------------------------------------------------------


RAGGED = [["The", "cat", "sat", "."], ["one"], [], ["naïve", "日本語", "z" * 60], ["a", "a", "a", "a", "a", "b"]]


def arrays(layers):
    return np.array([layer.asnumpy() for layer in layers])


@pytest.mark.parametrize("n_layers, use_skip_connections, activation, dtype, boundaries", [
    (1, True, "relu", ms.int32, False), (2, True, "tanh", ms.int64, False), (2, False, "relu", ms.int32, False),
    (3, True, "relu", ms.int32, True)])  # int64 is numpy's own type, and torch's
def test_the_bilm_equals_numpy_sentence_by_sentence(n_layers, use_skip_connections, activation, dtype, boundaries):
    o = options(n_layers=n_layers, use_skip_connections=use_skip_connections, activation=activation)
    bilm, more = randomize(elmo.BiLM(o)), 2 * boundaries
    layers, mask, state = bilm(batch_to_ids(RAGGED).astype(dtype), keep_sentence_boundaries=boundaries)
    assert len(layers) == n_layers + 1
    assert mask.asnumpy().tolist() == [[k < len(words) + more for k in range(6 + more)] for words in RAGGED]
    layers, w = arrays(layers), weights(bilm)
    for k, words in enumerate(RAGGED):
        expected, expected_state = numpy_layers(words, w, o, boundaries=boundaries)
        close(layers[:, k, :len(words) + more], expected)
        close(state[:, :, k], expected_state)
        assert (layers[:, k, len(words) + more:] == 0).all()
    h, c = np.split(state.asnumpy(), [o.projection], -1)  # both clips are active
    assert np.isclose(np.abs(h), o.proj_clip).any() and np.isclose(np.abs(c), o.cell_clip).any()


def test_a_sentence_gets_the_same_vectors_whatever_was_read_before_or_stands_beside_it():
    bilm = randomize(elmo.BiLM(options()))

    def vectors(sentences):
        layers = arrays(bilm(batch_to_ids(sentences))[0])
        return [layers[:, k, :len(words)] for k, words in enumerate(sentences)]
    together, again, reversed_order = vectors(RAGGED), vectors(RAGGED), vectors(RAGGED[::-1])[::-1]
    for k, words in enumerate(RAGGED):
        assert (again[k] == together[k]).all()  # no hidden state between calls
        close(reversed_order[k], together[k], 1e-6)
    for k in (1, 3):
        close(vectors(RAGGED[k:k + 1])[0], together[k], 1e-6)  # neither neighbours nor padding


def test_the_gradient_of_a_ragged_batch_is_that_of_each_sentence_alone():
    o, sentences = tiny_options(n_layers=2), [["a", "cat", "a"], ["b"], []]
    bilm, dy = randomize(elmo.BiLM(o)), random(3, 3, 3, 4)  # [layers, batch, tokens, 2 · projection]

    def numpy_loss(w):
        return sum((numpy_layers(words, w, o)[0] * dy[:, k, :len(words)]).sum() for k, words in enumerate(sentences))
    expected = complex_step_gradient(numpy_loss, weights(bilm), letters("a", "cat", "b", "<S>", "</S>"))
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
    bilm = randomize(elmo.BiLM(options()))
    before, after, o, w = [["a", "b", "c"], ["d"]], [["e"], ["f", "g"]], bilm.options, weights(bilm)
    layers, _, state = bilm(batch_to_ids(after), bilm(batch_to_ids(before))[2])
    for k in range(2):
        expected, expected_state = numpy_layers(after[k], w, o, numpy_layers(before[k], w, o)[1])
        close(arrays(layers)[:, k, :len(after[k])], expected)
        close(state[:, :, k], expected_state)
        assert np.abs(expected - numpy_layers(after[k], w, o)[0]).max() > 1e-2
    gradients = ms.grad(lambda ids: bilm(ids)[2].sum(), None, bilm.trainable_params())(batch_to_ids(after))
    assert not any(g.asnumpy().any() for g in gradients)  # backpropagation ends there


@pytest.mark.parametrize("use_skip_connections", [True, False])
def test_dropout_drops_the_input_of_each_layer_and_the_residual_adds_what_is_left(use_skip_connections):
    o = options(dropout=0.4, use_skip_connections=use_skip_connections)
    bilm, x = randomize(elmo.BiLM(o)), random(2, 4, 3, o.projection)
    keep = np.random.default_rng(0).random((3, 2, 4, 3, o.projection)) > o.dropout
    outputs, _ = bilm.contextualize(Tensor(x), elmo.zero_state(o, 3), masks=Tensor(keep.view(np.uint8)))
    for d in (0, 1):
        expected, _ = numpy_direction(x[d], weights(bilm), d, o, keep=keep[:, d])
        for layer in (0, 1):
            close(outputs[d][layer], expected[layer])
        assert np.abs(expected[1] - numpy_direction(x[d], weights(bilm), d, o)[0][1]).max() > 0.1


def test_weights_begin_with_the_values_of_bilm_tf():
    bilm, softmax = elmo.BiLM(replace(elmo.SIZES["tiny"], n_highway=2)), elmo.Softmax(5000, 64)
    w = weights(bilm, softmax)

    def is_uniform(x, limit):
        return 0.98 * limit < np.abs(x).max() <= limit and abs(x.std() / limit - math.sqrt(1 / 3)) < 0.02

    def is_normal(x, std):
        return abs(x.std() / std - 1) < 0.03 and np.abs(x).max() > 3 * std
    assert is_uniform(w["char_embed"], 1.0) and is_uniform(w["CNN/W_cnn_4"], 0.05)
    assert is_normal(w["CNN_high_1/W_carry"], 496 ** -0.5) and is_normal(w["CNN_high_1/W_transform"], 496 ** -0.5)
    assert is_normal(w["CNN_proj/W_proj"], 496 ** -0.5) and is_normal(w["softmax/W"], 64 ** -0.5)
    cell = "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/"
    assert is_uniform(w[cell + "W_0"], math.sqrt(6 / (128 + 1024)))
    assert is_uniform(w[cell + "W_P_0"], math.sqrt(6 / (256 + 64)))
    assert all((w[f"CNN_high_{k}/b_carry"] == -2).all() for k in range(2))
    zero = ("CNN/b_cnn_0", "CNN_high_0/b_transform", "CNN_proj/b_proj", cell + "B", "softmax/b")
    assert not any(w[name].any() for name in zero)
    tanh = weights(elmo.BiLM(replace(elmo.SIZES["tiny"], activation="tanh")))
    assert is_normal(tanh["CNN/W_cnn_4"], (5 * 16) ** -0.5)


# ---- 5. Softmax, full and sampled ------------------------------------------------------------------------------------


def test_the_full_softmax_equals_numpy():
    softmax = randomize(elmo.Softmax(11, 5))
    y, target, w = random(7, 5), np.array([0, 3, 10, 3, 1, 2, 9], np.int32), weights(softmax)
    expected = numpy_softmax(y, w["softmax/W"], w["softmax/b"], target)
    close(softmax(Tensor(y), Tensor(target)), expected)
    softmax.max_logits = 3 * 11  # more positions than fit at once: 3, 3 and 1
    close(softmax(Tensor(y), Tensor(target)), expected)


def sampled_inputs(classes=12, n=6, negatives=(4, 0, 7, 2, 11)):
    y, W, b = random(n, 5), random(classes, 5, seed=1), random(classes, seed=2)
    target, negatives = np.array([0, 3, 7, 7, 5, 11][:n], np.int32), np.array(negatives, np.int32)
    target_log_q, negative_log_q = (elmo.log_expected_count(k, 9, classes) for k in (target, negatives))
    return y, W, b, target, negatives, target_log_q, negative_log_q


def sampled_loss(y, W, b, target, negatives, target_log_q, negative_log_q):
    """The program's, for arrays."""
    y, W, b, target_log_q, negative_log_q, not_drawn = (Tensor(np.asarray(array, np.float32)) for array in (
        y, W, b, target_log_q, negative_log_q, ~np.isin(target, negatives)))
    return elmo.sampled_softmax(y, W, b, Tensor(target), Tensor(negatives), target_log_q, negative_log_q, not_drawn)


def test_the_sampled_softmax_equals_numpy_leaves_accidental_hits_out_and_does_not_overflow():
    y, W, b, target, negatives, *log_q = sampled_inputs()
    assert 0 < np.isin(target, negatives).sum() < len(target)
    for scale in (1, 300):
        inputs = scale * y, W, b, target, negatives, *log_q
        close(sampled_loss(*inputs) / scale, numpy_sampled_softmax(*inputs).mean() / scale)
    everything, zero = np.arange(12, dtype=np.int32), np.zeros(12)  # with every class drawn it is the full one
    close(sampled_loss(y, W, b, target, everything, zero[:6], zero), numpy_softmax(y, W, b, target).mean())


def test_the_gradient_of_the_sampled_softmax_is_right():
    y, W, b, target, negatives, *log_q = sampled_inputs()
    w, rest = {"y": y, "W": W, "b": b}, [Tensor(target), Tensor(negatives)]
    rest += [Tensor(x.astype(np.float32)) for x in (*log_q, ~np.isin(target, negatives))]

    def numpy_loss(w):
        return numpy_sampled_softmax(w["y"], w["W"], w["b"], target, negatives, *log_q).mean()
    expected = complex_step_gradient(numpy_loss, {name: array.astype(float) for name, array in w.items()})

    def loss(y, W, b):
        return elmo.sampled_softmax(y, W, b, *rest)
    for name, gradient in zip(w, ms.grad(loss, (0, 1, 2))(*map(Tensor, w.values()))):
        close(gradient, expected[name], 1e-6)


def test_classes_are_drawn_log_uniformly():
    classes, n, rng = 10, 20_000, np.random.default_rng(0)
    counts = np.bincount([elmo.draw_negatives(rng, 1, classes)[0][0] for _ in range(n)], minlength=classes)
    expected = n * np.log((np.arange(classes) + 2) / (np.arange(classes) + 1)) / np.log(classes + 1)
    # chi-square, 9 degrees of freedom, 0.1 %
    assert len(counts) == classes and ((counts - expected) ** 2 / expected).sum() < 27.9


def test_drawn_classes_are_distinct_and_the_draws_are_counted():
    class Fixed:
        """Random numbers that stand for these classes, then for 0 for ever."""
        def __init__(self, classes, *drawn):
            self.numbers = iter(np.log(np.array(drawn) + 1.5) / np.log(classes + 1))

        def random(self, n):
            return np.array([next(self.numbers, 0.0) for _ in range(n)])
    for n, expected, n_draws in ((1, [4], 1), (2, [4, 0], 3), (3, [4, 0, 9], 6), (4, [4, 0, 9, 1], 12)):
        found, count = elmo.draw_negatives(Fixed(10, 4, 4, 0, 4, 0, 9, 9, 0, 4, 9, 0, 1), n, 10)
        assert found.tolist() == expected and count == n_draws
    found, count = elmo.draw_negatives(np.random.default_rng(0), 50, 50)
    assert sorted(found) == list(range(50)) and count > 50


def test_a_class_is_expected_as_often_as_it_is_not_missed_by_every_draw():
    classes, draws, rng = 6, 4, np.random.default_rng(0)
    p = np.log((np.arange(classes) + 2) / (np.arange(classes) + 1)) / np.log(classes + 1)
    assert np.isclose(p.sum(), 1)
    counts = np.exp(elmo.log_expected_count(np.arange(classes), draws, classes))
    close(counts, 1 - (1 - p) ** draws, 1e-12)
    simulated = rng.choice(classes, (100_000, draws), p=p)
    close(counts, [(simulated == k).any(1).mean() for k in range(classes)], 0.006)
    k, n, V = 793_470, 12_000, 793_471  # for a rare class, p · n to the first order
    assert np.isclose(elmo.log_expected_count(k, n, V), np.log(n * np.log1p(1 / (k + 1)) / np.log(V + 1)), atol=1e-3)


# ---- 6. ELMo, a layer of a task's network (sections 3.2 and 3.3) -----------------------------------------------------


def test_the_scalar_mix_is_equation_1():
    layers, mix = random(3, 2, 4, 6), elmo.ScalarMix(3)
    close(mix([Tensor(h) for h in layers]), layers.mean(0), 1e-6)  # at first
    mix.scalar_parameters.set_data(Tensor(np.array([0.5, -1, 2], np.float32)))
    mix.gamma.set_data(Tensor(np.array([0.7], np.float32)))
    close(mix([Tensor(h) for h in layers]), numpy_mix(layers, np.array([0.5, -1, 2]), 0.7), 1e-6)
    begun = elmo.ScalarMix(3, initial_scalar_parameters=[0.5, -1, 2])
    close(begun([Tensor(h) for h in layers]), numpy_mix(layers, np.array([0.5, -1, 2]), 1), 1e-6)
    assert len(begun.trainable_params()) == 2
    assert not elmo.ScalarMix(3, False, None, False).trainable_params()  # as it was given, for ever


def test_layer_normalization_makes_each_tokens_mean_0_and_variance_1_before_the_mix():
    layers, mix = 3 * random(3, 2, 4, 6) + 5, elmo.ScalarMix(3, do_layer_norm=True)
    mix.scalar_parameters.set_data(Tensor(np.array([0.5, -1, 2], np.float32)))
    normal = (layers - layers.mean(-1, keepdims=True)) / layers.std(-1, keepdims=True)
    close(mix([Tensor(h) for h in layers]), numpy_mix(normal, np.array([0.5, -1, 2]), 1))
    equal = [Tensor(np.full((1, 2, 6), 3, np.float32))] * 3  # padding, say
    close(mix(equal), np.zeros((1, 2, 6)))


def test_a_mix_of_another_number_of_layers_is_a_value_error():
    layers = [Tensor(h) for h in random(2, 2, 4, 6)]
    with pytest.raises(ValueError, match="of 3 layers, not of 2"):
        elmo.ScalarMix(3)(layers)
    for n, initial in ((3, [1, 2]), (3, [1, 2, math.nan]), (0, None)):
        with pytest.raises(ValueError, match=f"a mix of {n} layers"):
            elmo.ScalarMix(n, initial_scalar_parameters=initial)
    with pytest.raises(ValueError, match="num_output_representations is 0"):
        elmo.Elmo(None, None, 0)


SENTENCES = [["The", "cat", "sat"], ["one"], []]


def test_the_arguments_are_allennlps():
    assert str(inspect.signature(elmo.Elmo)) == (
        "(options_file, weight_file, num_output_representations, requires_grad=False, do_layer_norm=False, "
        "dropout=0.5, vocab_to_cache=None, keep_sentence_boundaries=False, scalar_mix_parameters=None)")
    assert str(inspect.signature(elmo.ScalarMix)) == \
        "(mixture_size, do_layer_norm=False, initial_scalar_parameters=None, trainable=True)"


def test_elmo_gives_a_mix_of_the_bilms_layers_for_each_representation(files):
    net = elmo.Elmo(files.options, files.weights, 2, False, False, 0.0)
    net.scalar_mixes[1].scalar_parameters.set_data(Tensor(np.array([1, 2, 3], np.float32)))
    ids = batch_to_ids(SENTENCES)
    result = net(ids)
    layers, mask, _ = files.bilm(ids)
    assert set(result) == {"elmo_representations", "mask"} and len(result["elmo_representations"]) == 2
    assert result["elmo_representations"][0].shape == (3, 3, 10)
    assert (result["mask"].asnumpy() == mask.asnumpy()).all()
    close(result["elmo_representations"][0], numpy_mix(arrays(layers), np.zeros(3), 1))
    close(result["elmo_representations"][1], numpy_mix(arrays(layers), np.arange(1.0, 4), 1))


def test_elmo_keeps_boundaries_normalizes_layers_and_fixes_the_mix_where_that_is_asked_for(files, capsys):
    net = elmo.Elmo(files.options, files.weights, 2, False, True, 0.0, None, True, [-9e10, -9e10, 1])
    result, (layers, mask, _) = net(batch_to_ids(SENTENCES)), files.bilm(batch_to_ids(SENTENCES), None, True)
    top = layers[-1].asnumpy()
    expected = (top - top.mean(-1, keepdims=True)) / (top.std(-1, keepdims=True) + 1e-12)
    for vectors in result["elmo_representations"]:
        close(vectors, expected, 1e-4)  # the top layer alone
    assert result["mask"].asnumpy().tolist() == mask.asnumpy().tolist() and mask.shape == (3, 5)
    assert not net.trainable_params() and capsys.readouterr().err == ""
    elmo.Elmo(files.options, files.weights, 1, vocab_to_cache=["the"])
    assert capsys.readouterr().err.count("\n") == 1


def test_elmo_drops_only_while_training(files):
    net, ids = elmo.Elmo(files.options, files.weights, 1, dropout=0.5), batch_to_ids([["a", "b"]] * 16)
    quiet = net(ids)["elmo_representations"][0].asnumpy()
    assert (quiet != 0).all()
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
        self.elmo = elmo.Elmo(files.options, files.weights, 1, dropout=0.0, requires_grad=requires_grad)
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


# ---- 7. Published weights --------------------------------------------------------------------------------------------


def fixture_file(name):
    path = os.path.join(FIXTURE, name)
    if not os.path.exists(path):
        pytest.skip(f"{path} is not there: the fixture is no part of this repository")
    return path


@pytest.fixture(scope="module")
def published(h5py):
    """AllenNLP's weights, sentences and the vectors bilm-tf gave them, in three columns of ten rows."""
    with open(fixture_file("lm_embeddings_sentences.json"), encoding="utf-8") as file:
        columns = [[line.split() for line in column] for column in json.load(file)]
    vectors = []
    for k in range(3):
        with h5py.File(fixture_file(f"lm_embeddings_{k}.hdf5"), "r") as file:
            both = [file[str(n)][...] for n in range(10)]  # [2, words, 16]
        vectors.append([np.concatenate((forward, backward), 1) for forward, backward in both])
    bilm = elmo.BiLM(fixture_file("options.json"), fixture_file("lm_weights.hdf5"))
    return types.SimpleNamespace(bilm=bilm, columns=columns, vectors=vectors)


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
    bilm = elmo.BiLM(write(tmp_path / "options.json", json.dumps(content)), fixture_file("lm_weights.hdf5"))
    assert bilm.options == published.bilm.options
    expected = weights(published.bilm)
    assert all((array == expected[name]).all() for name, array in weights(bilm).items())


def test_an_export_holds_the_published_names_and_shapes_and_the_best_weights(trained, exported, h5py):
    o, n = trained.options, 12
    shapes = {"char_embed": (261, 4), "CNN/W_cnn_0": (1, 1, 4, 3), "CNN/W_cnn_1": (1, 2, 4, 4),
              "CNN/W_cnn_2": (1, 3, 4, 5), "CNN/b_cnn_0": (3,), "CNN/b_cnn_1": (4,), "CNN/b_cnn_2": (5,),
              "CNN_high_0/W_carry": (n, n), "CNN_high_0/b_carry": (n,), "CNN_high_0/W_transform": (n, n),
              "CNN_high_0/b_transform": (n,), "CNN_proj/W_proj": (n, 5), "CNN_proj/b_proj": (5,),
              "softmax/W": (len(trained.vocabulary), 5), "softmax/b": (len(trained.vocabulary),)}
    for d, layer in itertools.product(range(2), range(2)):
        cell = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
        shapes.update({cell + "W_0": (10, 28), cell + "B": (28,), cell + "W_P_0": (7, 5)})
    found = {}
    with h5py.File(exported, "r") as file:
        file.visititems(lambda name, item: found.update({name: item[...]} if isinstance(item, h5py.Dataset) else {}))
    assert {name: array.shape for name, array in found.items()} == shapes
    assert all(array.dtype == np.float32 for array in found.values())
    with np.load(trained.model / "best.npz") as best:
        assert all((best[name] == array).all() for name, array in found.items())
    forget = [array.reshape(4, o.dim)[2] for name, array in found.items() if name.endswith("/B")]  # i, j, f, o
    assert all(np.abs(array).max() < 0.5 for array in forget)  # it began at 0; 1 is added when run
    with open(trained.folder / "elmo_options.json", encoding="utf-8") as file:
        content = json.load(file)
    assert content["char_cnn"]["n_characters"] in (261, 262) and content["lstm"]["projection_dim"] == 5
    assert content["char_cnn"]["filters"] == [[1, 3], [2, 4], [3, 5]] and content["lstm"]["dim"] == 7
    assert "run" not in content


def test_testing_published_weights_reads_the_weights_of_the_run_they_come_from(trained, trained_bilm, exported, fake):
    out = succeed("test", "--device", "CPU", "--data", trained.folder / "heldout.mindrecord", "--vocab",
                  trained.folder / "vocab", "--options", trained.folder / "elmo_options.json", "--weights", exported)
    seen, = FakePerplexity.seen
    with np.load(trained.model / "best.npz") as best:
        assert len(seen) == 27 and all((best[name] == array).all() for name, array in seen.items())
    assert re.fullmatch(PERPLEXITY, out.splitlines()[-1])


def test_fine_tuning_prints_the_perplexity_before_and_says_where_the_softmax_is_new(trained, files, exported, fake):
    # The test runs where there is no heldout.mindrecord, which would be taken by itself.
    command = ["train", "--device", "CPU", "--data", trained.folder / "train.mindrecord", "--vocab",
               trained.folder / "vocab", "--steps", "1", "--options", trained.folder / "elmo_options.json"]
    fresh = succeed(*command, "--weights", files.weights, "--out", "fine1")
    assert "has no softmax: that table starts fresh" in fresh and "held-out" not in fresh
    assert FakePerplexity.seen == []
    full = succeed(*command, "--weights", exported, "--out", "fine2", "--heldout",
                   trained.folder / "heldout.mindrecord")
    assert "fresh" not in full and re.search(f"before training: held-out {PERPLEXITY}", full)
    with np.load(trained.model / "best.npz") as best:  # it goes on where that run ended
        assert all((best[name] == array).all() for name, array in FakePerplexity.seen[0].items())


def test_fine_tuning_stopped_before_its_first_checkpoint_starts_from_the_same_weights(trained, exported, fake,
                                                                                      monkeypatch):
    command = training(trained, "fine")
    for arguments in (["--weights", exported], ["--resume"]):
        killed(monkeypatch, FakeStep, "__call__", 1, *command, *arguments)
    with np.load(trained.model / "best.npz") as best:
        assert all((w["softmax/W"] == best["softmax/W"]).all() for w in FakePerplexity.seen)
    assert len(FakePerplexity.seen) == 2


def test_a_missing_h5py_is_told_with_its_remedy(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(data.InputError, match="pip install h5py"):
        elmo.BiLM(options(), files.weights)


# ---- 8. Characters and vocabulary ------------------------------------------------------------------------------------


def test_character_ids_are_those_bilm_tf_publishes():
    assert (char_ids("th")[:5] - 1).tolist() == [258, 116, 104, 259, 260]
    assert (char_ids("<S>")[:5] - 1).tolist() == [258, 256, 259, 260, 260]
    assert (char_ids("</S>")[:5] - 1).tolist() == [258, 257, 259, 260, 260]
    assert char_ids("th").dtype == np.int32 and char_ids("th").shape == (50,) and (char_ids("")[2:] == 261).all()


def test_character_ids_are_bytes_and_long_words_are_cut_to_48():
    assert (char_ids("é")[:5] - 1).tolist() == [258, 0xC3, 0xA9, 259, 260]
    assert (char_ids("x" * 60) - 1).tolist() == [258] + [120] * 48 + [259]
    assert (char_ids("x" * 47 + "é")[-3:] - 1).tolist() == [120, 0xC3, 259]  # cut inside a character
    assert (char_ids("a\ud800b")[:5] - 1).tolist() == [258, 97, 98, 259, 260]  # a lone surrogate is no byte
    assert (char_ids("")[:3] - 1).tolist() == [258, 259, 260]
    assert (char_ids("<UNK>")[:7] - 1).tolist() == [258, *b"<UNK>", 259]


def test_batch_to_ids_pads_with_zeros():
    ids = batch_to_ids([["a", "cat"], ("the",)]).asnumpy()
    assert ids.shape == (2, 2, 50) and ids.dtype == np.int32
    assert (ids[0, 1] == char_ids("cat")).all() and (ids[1, 0] == char_ids("the")).all()
    assert not ids[1, 1].any()
    assert batch_to_ids([]).shape == (0, 0, 50)
    assert batch_to_ids([[], []]).shape == (2, 0, 50)
    assert batch_to_ids([[], ["a"]]).shape == (2, 1, 50)


@pytest.mark.parametrize("sentences", ["the cat", ["the cat", "a dog"], [["a"], "dog"], [["a", 5]]])
def test_what_is_no_list_of_lists_of_words_is_a_value_error(trained_bilm, sentences):
    for function in (batch_to_ids, elmo.Embedder(trained_bilm)):
        with pytest.raises(ValueError, match="lists of words"):
            function(sentences)


def test_vocabulary_reads_any_line_ends_and_a_byte_order_mark(folder):
    plain = Vocabulary(Path("vocab"))
    assert len(plain) == 10 and plain.index["the"] == 3
    assert plain.ids(["dog", "cow", "<S>"]).tolist() == [9, data.UNK, 0] and plain.ids([]).dtype == np.int32
    assert plain.known(["dog", "cow", "<S>"]) == ["dog", "<UNK>", "<S>"]
    content = (folder / "vocab").read_text()
    for other in (content[:-1], content.replace("\n", "\r\n"), "\ufeff" + content):
        assert Vocabulary(write("other", other)).words == plain.words
    assert Vocabulary(write("other.gz", gzip.compress(content.encode()))).words == plain.words


# ---- 9. The stream of training batches -------------------------------------------------------------------------------


VOCABULARY = [*SPECIAL, "the", "of", "a", "cat", "dog", "sat", "on", "mat", "."]


@functools.lru_cache(None)
def vocabulary_of(*words):
    with tempfile.TemporaryDirectory() as folder:
        return Vocabulary(write(os.path.join(folder, "vocab"), "\n".join(words)))


class Sentences:
    """A corpus in memory, with what is used of a data.Corpus."""

    def __init__(self, sentences):
        self.records, self.sentences, self.tokens = sentences, len(sentences), sum(map(len, sentences))

    def read(self, records):
        for k in records:
            yield self.records[k]


def some_sentences(n=40, seed=0, longest=9):
    """Sentences of words inside and outside the vocabulary, all different."""
    rng = np.random.default_rng(seed)
    words = [*VOCABULARY[3:], "Stranger", "日本語", "donaudampfschifffahrtsgesellschaft", "y" * 60]
    return [[f"n{k}", *rng.choice(words, rng.integers(0, longest)).tolist()] for k in range(n)]


def stream(corpus, o, *arguments, n=None, **more):
    """The first n chunks (None: all)."""
    return itertools.islice(read_chunks(corpus, vocabulary_of(*VOCABULARY), o, *arguments, **more), n)


def read_streams(chunks):
    """What chunks say -> for each stream and direction, its [(word, target), ...] from begin to end."""
    streams = None
    for chunk in chunks:
        streams = streams or [([], []) for _ in range(chunk.valid.shape[1])]
        for (k, both), d in itertools.product(enumerate(streams), (0, 1)):
            both[d].extend((chunk.words[p], VOCABULARY[t]) for p, t, valid in zip(
                chunk.word_index[d, :, k], chunk.target[d, :, k], chunk.valid[:, k]) if valid)
    return streams


def sentences_of_stream(both):
    """The complete sentences of a stream of `read_streams`; checks that both directions read them rightly."""
    forward, backward = both
    begins = [k for k, (word, _) in enumerate(forward) if word == "<S>"]
    assert begins == [k for k, (word, _) in enumerate(backward) if word == "</S>"] and begins[0] == 0
    known = vocabulary_of(*VOCABULARY).known
    for begin, end in zip(begins, begins[1:] + [None]):
        words = [word for word, _ in forward[begin:end]][1:]
        if end is None and forward[-1][1] != "</S>":  # goes on beyond the last chunk
            return
        assert [target for _, target in forward[begin:end]] == known([*words, "</S>"])
        assert [word for word, _ in backward[begin:end]] == ["</S>", *words[::-1]]
        assert [target for _, target in backward[begin:end]] == known([*words[::-1], "<S>"])
        yield words


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_without_a_seed_every_prediction_comes_once_in_streams_that_carry_on():
    sentences = some_sentences()
    corpus = Sentences(sentences)
    assert data.both_directions(["a", "b"]) == [
        ("<S>", "a", "</S>", "b"), ("a", "b", "b", "a"), ("b", "</S>", "a", "<S>")]
    chunks = list(stream(corpus, options()))
    assert sum(chunk.valid.sum() for chunk in chunks) == corpus.tokens + corpus.sentences
    found = [words for both in read_streams(chunks) for words in sentences_of_stream(both)]
    assert sorted(found) == sorted(sentences)
    one, = read_streams(stream(corpus, options(batch_size=1)))
    assert list(sentences_of_stream(one)) == sentences  # in the order of the corpus
    # The input of a word outside the vocabulary is its own characters.
    assert ("Stranger" in [word for word, _ in one[0]]) and "Stranger" not in [target for _, target in one[0]]


def test_each_epoch_shuffles_the_sentences_anew():
    sentences = some_sentences()
    corpus, o = Sentences(sentences), options(batch_size=1)
    one, = read_streams(stream(corpus, o, 1, n=3 * (corpus.tokens + corpus.sentences) // 4 + 1))
    found = list(sentences_of_stream(one))
    epochs = [found[k:k + 40] for k in (0, 40, 80)]
    assert all(sorted(epoch) == sorted(sentences) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != sentences


def test_streams_side_by_side_take_the_sentences_of_an_epoch_once():
    sentences = some_sentences()
    streams = read_streams(stream(Sentences(sentences), options(), 1, n=100))
    begun = [forward[k + 1][0] for forward, _ in streams for k in range(len(forward) - 1) if forward[k][0] == "<S>"]
    counts = [begun.count(words[0]) for words in sentences]
    assert 2 <= min(counts) <= max(counts) <= min(counts) + 1
    assert sum(len(list(sentences_of_stream(both))) for both in streams) >= len(begun) - 3


def test_of_several_workers_each_reads_its_share_of_the_sentences():
    sentences = some_sentences(41)
    shares = [[words for both in read_streams(stream(Sentences(sentences), options(), rank=rank, size=3))
               for words in sentences_of_stream(both)] for rank in range(3)]
    assert [len(share) for share in shares] == [14, 14, 13] and sorted(sum(shares, [])) == sorted(sentences)

    def begun(**more):
        one, = read_streams(stream(Sentences(sentences), options(batch_size=1), 5, n=40, **more))
        return [words[0] for words in sentences_of_stream(one)]
    order = begun()
    for rank in range(3):  # of the order of one seed, every third
        assert begun(rank=rank, size=3)[:8] == order[rank::3][:8]


@functools.lru_cache(None)
def tiers_of(corpus, o, **more):
    return measure_tiers(stream(corpus, o, 0, n=20, **more))


def batches_of(corpus, o, seed, n, first=0, position=None, rank=0, size=1, words=None):
    """The first n batches of a run and the chunks they come from."""
    tiers, chunks = tiers_of(corpus, o), stream(corpus, o, seed, position, rank, size, n=n)
    return [(elmo.make_batch(chunk, k, tiers, len(VOCABULARY), o, seed, rank), chunk)
            for k, chunk in enumerate(chunks, first)]


def test_one_seed_gives_one_stream_and_another_seed_another():
    corpus, o = Sentences(some_sentences()), options(dropout=0.1)
    runs = [batches_of(corpus, o, seed, 20) for seed in (5, 5, 6)]
    for (batch, chunk), (again, _), (other, other_chunk) in zip(*runs):
        assert same(batch, again)
        assert not same(batch.chars[batch.word_index], other.chars[other.word_index])
        assert not same(batch.masks, other.masks) and not same(batch.negatives, other.negatives)


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
def test_the_stream_goes_on_from_any_position_with_the_very_same_batches(rank, size):
    corpus, o = Sentences(some_sentences()), options(dropout=0.1)
    batches = batches_of(corpus, o, 5, 60, rank=rank, size=size)  # 3 epochs, or 6
    for k in (1, 7, 16, 17, 18, 19, 20, 40):
        again = batches_of(corpus, o, 5, 12, k, batches[k - 1][1].position, rank, size)
        assert len(again) == 12
        for (batch, chunk), (batch_again, chunk_again) in zip(batches[k:], again):
            assert same(batch, batch_again) and (chunk.position == chunk_again.position).all()


def test_every_words_characters_come_back_through_the_tiers():
    words = ["a", "I", "the", "cats", "tokens", "x" * 10, "y" * 48, "z" * 60, "日本語", "<S>", "</S>"]
    word_index = np.random.default_rng(0).integers(0, len(words), (2, 4, 3))
    assert sorted(data.word_chars(words)[1]) == [3, 3, 3, 3, 5, 6, 8, 11, 12, 50, 50]
    # All fit exactly; much room; one too many of 12; one row too few; a single tier.
    for tiers, size in ((((4, 3), (3, 8), (4, 50)), 11), (((20, 6), (20, 50)), 40), (((9, 11), (2, 50)), 267),
                        (((6, 6), (4, 50)), 266), (((11, 50),), 11)):
        chars, rows = fill_tiers(tiers, words, word_index)
        assert chars.shape == (size, 50) and rows.shape == word_index.shape and chars.dtype == rows.dtype == np.int32
        assert all((chars[r] == char_ids(words[p])).all() for p, r in zip(word_index.ravel(), rows.ravel()))
        first = 0
        for n, longest in tiers[:-1]:
            assert np.isin(chars[first:first + n, longest:], (0, data.PADDING + 1)).all()
            first += n


def test_the_tiers_have_room_for_the_stream():
    corpus, o = Sentences(some_sentences(200)), options(batch_size=8)
    tiers = measure_tiers(stream(corpus, o, 0, n=20))
    counts, limits = zip(*tiers)
    assert all(counts) and list(limits) == sorted(set(limits)) and limits[-1] == 50 and 1 < len(limits) < 5
    shapes = {tuple(array.shape for array in fill_tiers(tiers, chunk.words, chunk.word_index))
              for chunk in stream(corpus, o, 0, n=100)}
    assert shapes == {((sum(counts), 50), (2, 4, 8))}


def test_each_direction_subtracts_the_expected_counts_of_its_own_draws(monkeypatch):
    draws = itertools.cycle((7, 29))  # of the forward direction, of the backward
    monkeypatch.setattr(elmo, "draw_negatives", lambda rng, n, n_classes: (np.arange(n), next(draws)))
    (batch, _), = batches_of(Sentences(some_sentences()), options(), 0, 1)
    for d, n in ((0, 7), (1, 29)):
        for k, log_q in ((batch.negatives, batch.negative_log_q), (batch.target, batch.target_log_q)):
            p = np.log((k[d] + 2) / (k[d] + 1)) / math.log(len(VOCABULARY) + 1)
            close(log_q[d], np.log(1 - (1 - p) ** n))


@pytest.mark.parametrize("sample", [True, False])
def test_a_batch_holds_targets_negatives_and_which_targets_were_not_drawn(sample):
    corpus, o = Sentences(some_sentences()), options(sample_softmax=sample)
    shapes, drawn, batches = set(), set(), batches_of(corpus, o, 0, 10)
    for batch, chunk in batches:
        assert (batch.target == chunk.target.reshape(2, 12)).all()
        assert len(set(chunk.words)) == len(chunk.words) and chunk.valid.all() and chunk.valid.shape == (4, 3)
        words = np.array(chunk.words)[chunk.word_index]
        assert batch.reset_state.tolist() == (words[0, 0] == "<S>").tolist() == (words[1, 0] == "</S>").tolist()
        text = batch.chars[batch.word_index]
        assert (text == np.array([char_ids(word) for word in chunk.words])[chunk.word_index]).all()
        for d in (0, 1):
            assert (batch.not_drawn[d] == [t not in batch.negatives[d] for t in batch.target[d]]).all()
            assert len(set(batch.negatives[d])) == len(batch.negatives[d]) == (6 if sample else len(VOCABULARY))
            drawn.add(tuple(batch.negatives[d]))
        if not sample:
            assert (np.sort(batch.negatives) == np.arange(len(VOCABULARY))).all()
            assert not batch.negative_log_q.any() and not batch.target_log_q.any()
        shapes.add(tuple((array.shape, array.dtype.str) for array in batch))
    assert len(shapes) == 1  # one static graph
    assert len(drawn) == (20 if sample else 1)  # other negatives for each step and direction
    assert sample == any(batch.not_drawn.any() for batch, _ in batches)


def test_dropout_masks_are_new_at_every_time_step_and_keep_the_share_asked_for():
    o = options(dropout=0.1, batch_size=16, unroll_steps=10, projection=12)
    corpus = Sentences(some_sentences(300))
    batches = batches_of(corpus, o, 0, 5)
    keep = np.array([batch.masks for batch, _ in batches])
    assert keep.shape == (5, 3, 2, 10, 16, 12)  # [steps, layers + 1, 2, time, batch, projection]
    assert keep.dtype == np.uint8 and set(np.unique(keep)) == {0, 1}
    assert abs(keep.mean() - 0.9) < 6 * math.sqrt(0.09 / keep.size)
    for axis in range(5):
        a, b = keep.take(0, axis), keep.take(1, axis)  # two steps, layers, directions, times, streams
        assert abs((a == b).mean() - 0.82) < 6 * math.sqrt(0.82 * 0.18 / a.size)  # 0.9² + 0.1²: independent
    other = elmo.make_batch(batches[0][1], 0, tiers_of(corpus, o), len(VOCABULARY), o, 0, rank=1)  # another worker's
    assert same(other[:-1], batches[0][0][:-1]) and abs((other.masks == keep[0]).mean() - 0.82) < 0.02


def test_prefetched_items_are_the_same_and_exceptions_come_through():
    assert list(prefetch(range(100), lambda k: 2 * k)) == list(range(0, 200, 2))
    assert list(prefetch([], str)) == []
    assert list(prefetch([None, 0], lambda item: item)) == [None, 0]

    def failing():
        yield 1
        raise data.InputError("the disk is gone")
    for items in (prefetch(failing(), lambda k: k), prefetch([1, 0], lambda k: 1 // k or [][0])):
        assert next(items) == 1
        with pytest.raises((data.InputError, ZeroDivisionError)):
            next(items)


def test_no_more_than_a_few_items_are_prefetched_and_they_are_made_side_by_side():
    read, made, both = [], [], threading.Barrier(2)

    def make(k):
        if k < 2:
            both.wait(30)  # passes only where two are made at once
        made.append(k)
        return k
    items = prefetch((read.append(k) or k for k in range(100)), make, 2)
    assert next(items) == 0
    time.sleep(0.2)  # for the threads to make what they will
    assert len(made) <= len(read) <= 3  # the one taken and the two that wait
    assert list(items) == list(range(1, 100))


# ---- 10. Training, step by step against numpy ------------------------------------------------------------------------


def numpy_training_loss(w, text, target, state, o, negatives=None, keep=None):
    """The loss of a chunk and the LSTMs' state after it: text [2, time, batch], target [2, time · batch].

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


def values_of(run):
    """All that a step changes, by name."""
    tables = {"adagrad/softmax/W": run.tables[2], "adagrad/softmax/b": run.tables[3], "state": run.lstm_state}
    return {**weights(run.bilm, run.softmax), **{p.name: p.asnumpy() for p in run.accumulators},
            **{name: p.asnumpy() for name, p in tables.items()}}


def check_trajectory(o, n_steps, vocabulary, loss_scaler=None):
    """Trains a model with MindSpore and with numpy, there by dense Adagrad with gradients by complex steps; compares
    all that there is after each step. Returns the run, its step function and its next batch."""
    sentences = [words.split() for words in (
        "the cat sat .", "a dog", "dog dog dog dog dog", "the xy", "cat", "of the a sat")]
    corpus, run = Sentences(sentences), elmo.Run(o, vocabulary)
    run.loss_scaler = loss_scaler
    randomize(run.bilm, 1), randomize(run.softmax, 2)
    w = weights(run.bilm, run.softmax)
    squares, state = {name: np.ones(array.shape) for name, array in w.items()}, np.zeros(run.lstm_state.shape)
    tiers = ((40, 50),)
    step, clipped, graphs, states = elmo.make_step(run, tiers), [], [], []
    for n, chunk in enumerate(read_chunks(corpus, vocabulary, o, 0)):
        batch = elmo.make_batch(chunk, n, tiers, len(vocabulary), o, 0)
        if n == n_steps:
            break
        text, target = np.array(chunk.words)[chunk.word_index], chunk.target.reshape(2, -1)
        state = state * (text[0, 0] != "<S>")[:, None]  # a sentence that begins the chunk is read from zero
        negatives = [(batch.negatives[d], batch.target_log_q[d], batch.negative_log_q[d]) for d in (0, 1)]

        def loss_of(w):
            return numpy_training_loss(w, text, target, state, o, negatives if o.sample_softmax else None,
                                       batch.masks if o.dropout else None)
        (loss, state_after) = loss_of(w)
        gradient = complex_step_gradient(lambda w: loss_of(w)[0], w, letters("<S>", "</S>", *sum(sentences, [])))
        norm = math.sqrt(sum(((o.unroll_steps * g) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = o.unroll_steps * g * min(1, o.all_clip_norm_val / norm)
            squares[name] += g ** 2
            w[name] = w[name] - o.learning_rate * g / np.sqrt(squares[name])
        state, before = state_after, [table.asnumpy().copy() for table in run.tables]

        updates, scatter_update = [], ops.scatter_update
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "scatter_update", lambda *args: [scatter_update(*args), updates.append(args)][0])
            actual_loss, actual_norm = step(batch)
        for _, classes, rows in updates:  # a class that stands there twice has one value, whichever is written last
            classes, rows = classes.asnumpy(), rows.asnumpy()
            assert len(updates) == 5 and all((rows[classes == k] == rows[classes == k][0]).all() for k in classes)
        run.step += 1
        close(actual_loss, loss)
        close(actual_norm, norm, 1e-4)
        actual = values_of(run)
        assert actual.keys() == {*w, *("adagrad/" + name for name in squares), "state"}
        close(actual["state"], state)
        for name in w:
            close(actual[name], w[name])
            close(actual["adagrad/" + name], squares[name], 1e-4)
        others = np.setdiff1d(np.arange(len(vocabulary)), [*batch.negatives.ravel(), *target.ravel()])
        assert (len(others) > 0) == o.sample_softmax  # rows of the softmax that the batch does not touch
        assert all((table.asnumpy()[others] == old[others]).all() for table, old in zip(run.tables, before))
        clipped.append(norm > o.all_clip_norm_val)
        graphs.append(compiled_graphs())
        states.append(state)
    h, c = np.split(np.array(states), [o.projection], -1)
    for x, limit in ((h, o.proj_clip), (c, o.cell_clip)):
        assert (np.abs(x) == limit).any() and (np.abs(x) < limit).any()
    assert any(clipped) and not all(clipped)
    assert len(set(graphs)) == 1  # nothing is compiled after the first step
    return run, step, batch


def test_ten_steps_with_the_full_softmax_equal_numpy_in_every_weight():
    check_trajectory(tiny_options(sample_softmax=False, all_clip_norm_val=0.9), 10,
                     vocabulary_of(*SPECIAL, "the", "cat", "sat", "dog"))


def test_steps_with_negatives_dropout_and_a_loss_scale_equal_numpy_in_every_weight():
    scaler = ms.amp.DynamicLossScaler(1024, 2, 1000)  # as float16 has it; the gradient is divided by it again
    run, step, batch = check_trajectory(
        tiny_options(n_negative_samples_batch=3, dropout=0.3, all_clip_norm_val=1.7), 4,
        vocabulary_of(*SPECIAL, "the", "cat", "sat", "dog", *(f"r{k}" for k in range(17))), scaler)
    before, (_, norm) = values_of(run), step(batch._replace(negative_log_q=batch.negative_log_q * np.float32(np.nan)))
    assert not np.isfinite(norm.asnumpy()) and scaler.scale_value.asnumpy() == 512
    assert all((array == before[name]).all() for name, array in values_of(run).items())  # the scale alone changes
    _, norm = step(batch)
    assert np.isfinite(norm.asnumpy()) and any((array != before[name]).any() for name, array in values_of(run).items())


def test_a_class_that_occurs_more_than_once_has_one_row_its_last():
    run = elmo.Run(options(), vocabulary_of(*VOCABULARY))
    for classes, rows in (([3, 0, 3, 7, 0, 3], [5, 4, 5, 3, 4, 5]), ([7, 7, 3], [1, 1, 2]), ([5], [0])):
        assert run.last_places(Tensor(np.array(classes, np.int32))).asnumpy().tolist() == rows


# ---- 11. A run: its log, its folder, its checkpoints -----------------------------------------------------------------


def read_log(folder):
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_training_logs_its_steps_and_the_heldout_perplexity_of_each_epoch(trained):
    rows, ends = read_log(trained.model), trained.ends[:EPOCHS]
    columns = "step,epoch,loss,tokens_per_second,heldout_forward,heldout_backward,heldout_average"
    assert list(rows[0]) == columns.split(",")
    assert [int(row["step"]) for row in rows] == sorted({*range(10, ends[-1] + 1, 10), *ends})
    assert [int(row["epoch"]) for row in rows] == [1 + (int(row["step"]) > ends[0]) for row in rows]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.1
    assert all(int(row["tokens_per_second"]) > 0 for row in rows)
    at_ends = [row for row in rows if row["heldout_average"]]
    assert [int(row["step"]) for row in at_ends] == ends
    forward, backward, average = ([float(row[f"heldout_{name}"]) for row in at_ends] for name in
                                  ("forward", "backward", "average"))
    assert average[1] < average[0] < len(trained.vocabulary)
    close(average[1], math.sqrt(forward[1] * backward[1]), 1e-3)
    found = [match.groups() for match in re.finditer(f"held-out {PERPLEXITY}", trained.out)]
    n = trained.heldout.tokens + trained.heldout.sentences
    assert found == [(f"{f:.2f}", f"{b:.2f}", f"{a:.2f}", str(n)) for f, b, a in zip(forward, backward, average)]
    assert len(re.findall(r"^step \d+ of \d+ .*sampled loss [\d.]+ .*tokens/s +\d+ min left", trained.out,
                          re.M)) == len(rows)


def test_the_training_step_is_compiled_once(trained):
    end = trained.ends[0]
    assert len(trained.graphs) > end > 30 and trained.graphs[0] < trained.graphs[-1]  # it can count
    assert len(set(trained.graphs[:end])) == len(set(trained.graphs[end:])) == 1  # between them comes the test's graph


def test_the_folder_of_a_run_holds_what_the_other_commands_need(trained):
    steps = [f"step-{k}.npz" for k in (trained.ends[1] // 15 * 15, trained.ends[1])]
    assert sorted(os.listdir(trained.model)) == sorted(["log.csv", "options.json", "vocab", "best.npz", *steps])
    assert elmo.read_options(str(trained.model / "options.json")) == \
        replace(trained.options, n_tokens_vocab=len(trained.vocabulary))
    assert (trained.model / "vocab").read_bytes() == (trained.folder / "vocab").read_bytes()


def test_the_loss_that_is_logged_is_the_mean_since_the_last_line(text, fake, monkeypatch):
    losses, call = [], FakeStep.__call__

    def noting(self, batch):
        losses.append(float(call(self, batch)[0].asnumpy()))
        return Tensor(np.float32(losses[-1])), Tensor(np.float32(1))
    monkeypatch.setattr(FakeStep, "__call__", noting)
    killed(monkeypatch, FakeStep, "__call__", 18, *training(text, "model"))
    succeed(*training(text, "model"), "--resume", "--steps", 25)
    losses = losses[:15] + losses[17:]  # two steps were lost
    rows = [(int(row["step"]), float(row["loss"])) for row in read_log(Path("model"))]
    assert [step for step, _ in rows] == [10, 20, 25] and len(losses) == 25
    close(np.array([loss for _, loss in rows]), [np.mean(losses[a:b]) for a, b in ((0, 10), (10, 20), (20, 25))], 1e-6)


def test_the_last_two_checkpoints_are_kept_and_the_best_stays_the_best(text, fake, monkeypatch):
    def kept():
        return [Path(path).name for path in elmo.checkpoints("model")]
    averages = iter((10.0, 20.0, 15.0))
    monkeypatch.setattr(FakePerplexity, "__call__", lambda self: elmo.Perplexities(1.0, 1.0, next(averages), 1))
    command = training(text, "model", "--epochs", 3)
    killed(monkeypatch, FakeStep, "__call__", text.ends[1] + 3, *command)
    assert kept() == [f"step-{k}.npz" for k in (text.ends[1] // 15 * 15, text.ends[1])]
    succeed(*command, "--resume")
    assert kept() == [f"step-{k}.npz" for k in (text.ends[2] // 15 * 15, text.ends[2])]
    with np.load("model/best.npz") as best:
        assert best["run/step"] == text.ends[0] and best["run/best"] == 10


def test_without_heldout_text_the_last_epoch_is_the_best(text, fake):
    command = [arg for arg in training(text, "model", "--epochs", 1) if arg not in (
        "--heldout", text.folder / "heldout.mindrecord")]
    printed = succeed(*command)
    with np.load("model/best.npz") as best:
        assert best["run/step"] == text.ends[0]
    assert "held-out" not in printed and read_log(Path("model"))[-1]["heldout_average"] == ""


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step-9.npz", "step-100.npz", "step-10.npz", "step-11.npz.part", "best.npz"):
        (tmp_path / name).touch()
    assert elmo.checkpoints(tmp_path) == [str(tmp_path / f"step-{k}.npz") for k in (9, 10, 100)]


@pytest.mark.parametrize("more, saved", [([], []), (["--save-every", 4], [4]), (["--log-every", 5], [])])
@pytest.mark.parametrize("loss, norm", [(math.nan, 1), (1, math.inf)])
def test_a_step_that_is_not_finite_stops_the_run_before_anything_is_saved(text, fake, monkeypatch, more, saved, loss,
                                                                          norm):
    def diverging(self, batch):
        at_7 = self.run.step + 1 == 7
        return Tensor(np.float32(loss if at_7 else 1)), Tensor(np.float32(norm if at_7 else 1))
    monkeypatch.setattr(FakeStep, "__call__", diverging)
    status, _, errors = run(*training(text, "model", *more))
    assert status == 2 and errors.count("\n") == 1
    assert re.search(rf"step 7: the loss is {float(loss)}, the gradient's norm {float(norm)}; .*--lr", errors)
    assert [Path(path).name for path in elmo.checkpoints("model")] == [f"step-{k}.npz" for k in saved]
    assert not os.path.exists("model/best.npz")


def test_in_float16_steps_may_overflow_but_not_all_of_them(text, fake, monkeypatch):
    overflowing = {1, 2, 3, 12}
    monkeypatch.setattr(FakeStep, "__call__", lambda self, batch: (Tensor(np.float32(1)), Tensor(np.float32(
        math.inf if self.run.step + 1 in overflowing else 1))))
    succeed(*training(text, "good", "--amp", "float16", "--steps", 15))
    assert [float(row["loss"]) for row in read_log(Path("good"))] == [1, 1]
    overflowing = set(range(11, 30))
    status, _, errors = run(*training(text, "bad", "--amp", "float16", "--save-every", 20))
    assert status == 2 and "step 11: the loss is 1.0, the gradient's norm inf" in errors
    assert not elmo.checkpoints("bad")


# ---- 12. Exact resume ------------------------------------------------------------------------------------------------


def same_runs(a, b):
    """Whether two runs' folders hold the same checkpoints, bit by bit, and the same log but for the speeds."""
    def log(folder):
        return [{**row, "tokens_per_second": None} for row in read_log(folder)]

    def content(path):
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files if name != "run/log"}
    names = [sorted(path.name for path in folder.iterdir()) for folder in (a, b)]
    return names[0] == names[1] and log(a) == log(b) and all(
        content(a / name) == content(b / name) for name in names[0] if name.endswith(".npz"))


def test_a_run_resumed_in_another_process_ends_bit_by_bit_as_one_that_was_not_stopped(trained, resumed):
    assert "resuming after step 30" in finished(resumed)
    assert same_runs(trained.model, trained.killed)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The folder of a run with steps that are not compiled, from begin to end."""
    out = tmp_path_factory.mktemp("uninterrupted") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elmo, "make_step", FakeStep)
        patch.setattr(elmo, "make_perplexity", FakePerplexity)
        succeed(*training(text, out))
    return out


def test_a_run_killed_at_eight_places_and_resumed_ends_as_one_that_was_not(text, uninterrupted, fake, monkeypatch):
    out, command, end = Path("model"), training(text, "model"), text.ends[0]
    out.mkdir()
    (out / "vocab.1.part").write_text("what a kill at the very start leaves behind")
    killed(monkeypatch, os, "replace", 1, *command)  # before the vocabulary is there
    killed(monkeypatch, elmo, "write_text", 2, *command)  # before the folder is a run
    assert run(*command, "--resume")[0] == 2
    killed(monkeypatch, FakeStep, "__call__", 10, *command)  # before the first checkpoint
    killed(monkeypatch, FakeStep, "__call__", 35, *command, "--resume")  # between two
    assert sorted(path.name for path in out.glob("step-*")) == ["step-15.npz", "step-30.npz"]
    (out / "step-45.npz.7.part").write_text("what a kill leaves behind")
    killed(monkeypatch, np.lib.format, "write_array", 40, *command, "--resume")  # in the middle of a checkpoint
    killed(monkeypatch, FakePerplexity, "__call__", 1, *command, "--resume")  # in a test, at the end of an epoch
    killed(monkeypatch, elmo, "write_arrays", 2, *command, "--resume")  # between the best and the last checkpoint
    with np.load(out / "best.npz") as best:
        assert best["run/step"] == end and not (out / f"step-{end}.npz").exists()
    killed(monkeypatch, FakeStep, "__call__", 20, *command, "--resume")
    newest = elmo.checkpoints(str(out))[-1]
    os.truncate(newest, os.path.getsize(newest) // 2)
    with open(out / "log.csv", "ab") as file:
        file.write(b"\n\xff;edited,1\n7;1;1\n")
    printed = succeed(*command, "--resume")
    assert f"{newest}: damaged" in printed and "resuming after step" in printed
    assert same_runs(uninterrupted, out)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_run_after_a_checkpoint_and_tells_how_to_go_on(text, uninterrupted, fake, monkeypatch, name):
    call, handlers = FakeStep.__call__, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def signalled(self, batch):
        if self.run.step + 1 == 7:
            os.kill(os.getpid(), getattr(signal, name))
        return call(self, batch)
    with monkeypatch.context() as patch:
        patch.setattr(FakeStep, "__call__", signalled)
        printed = succeed(*training(text, "model"), "--epochs", 1)
    assert "stopped after step 7" in printed and "--out model" in printed and "--resume" in printed
    assert elmo.checkpoints("model") == ["model/step-7.npz"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    # The command that it tells, with more epochs, as if it had been begun with them.
    *_, again = shlex.split(printed.splitlines()[-1].partition("to go on: python ")[2]),
    succeed(*again[1:], "--epochs", EPOCHS)
    assert same_runs(uninterrupted, Path("model"))


def test_a_second_signal_ends_the_program_at_once(text, fake, monkeypatch):
    def twice(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    monkeypatch.setattr(FakeStep, "__call__", twice)
    assert run(*training(text, "model"))[0] == 130
    assert not elmo.checkpoints("model")


def test_resuming_takes_what_the_command_line_leaves_open_from_the_run(text, uninterrupted, fake):
    given = ["--data", text.folder / "train.mindrecord", "--options", text.folder / "options.json", "--vocab",
             text.folder / "vocab", "--seed", 3, "--lr", 0.3, "--batch-size", 4, "--out", "model"]
    succeed("train", "--device", "CPU", *given, "--steps", 3)
    for end in ("", ".db"):  # that nobody named on the command line
        os.symlink(text.folder / f"heldout.mindrecord{end}", f"heldout.mindrecord{end}")
    assert "resuming after step 3" in succeed("--device", "CPU", "--out", "model", "--resume", "--steps", 5)
    assert elmo.checkpoints("model") == ["model/step-3.npz", "model/step-5.npz"] and FakePerplexity.seen == []


def test_a_run_with_a_compressed_vocabulary_is_resumed(text, fake):
    write("v.gz", gzip.compress((text.folder / "vocab").read_bytes()))
    succeed(*training(text, "model", "--vocab", "v.gz", "--steps", 3))
    assert "resuming after step 3" in succeed("--device", "CPU", "--out", "model", "--resume", "--steps", 5)
    assert Path("model/vocab").read_bytes() == (text.folder / "vocab").read_bytes()


def test_of_two_processes_that_train_one_run_one_stops(text, fake, monkeypatch):
    call = FakeStep.__call__

    def beside_another(self, batch):
        if self.run.step == 20:
            shutil.copyfile("model/step-15.npz", "model/step-25.npz")
        return call(self, batch)
    monkeypatch.setattr(FakeStep, "__call__", beside_another)
    status, _, errors = run(*training(text, "model"))
    assert status == 2 and "another process trains this run" in errors and not os.path.exists("model/step-30.npz")


def test_resuming_a_run_that_is_over_changes_nothing(uninterrupted, fake):
    before = tree(uninterrupted)
    assert "all steps are done" in succeed("train", "--device", "CPU", "--out", uninterrupted, "--resume")
    assert tree(uninterrupted) == before


@pytest.mark.parametrize("change, message", [
    (["--lr", 0.5], "learning_rate 0.2, not 0.5"),
    (["--batch-size", 4], "batch_size 8, not 4"),
    (["--seed", 1], "run.seed 0, not 1"),
    (["--amp", "float16"], "run.amp None, not 'float16'"),
    (["--options", "dim8.json"], "lstm.dim 7, not 8"),
    (["--data", "heldout.mindrecord"], "run.data"),
    (["--heldout", "train.mindrecord"], "run.heldout"),
    (["--weights", "w.hdf5"], "run.weights None, not '"),
    (["--vocab", "other_vocab"], "run.vocabulary"),
    (["--epochs", 1], "n_epochs 2, not 1"),
])
def test_another_run_is_not_resumed(text, uninterrupted, fake, files, monkeypatch, change, message):
    words = text.vocabulary.words
    write("other_vocab", "\n".join(words[:3] + words[:2:-1]))
    write_json("dim8.json", elmo.as_json(replace(text.options, dim=8)))
    shutil.copyfile(files.weights, "w.hdf5")
    for name in ("train.mindrecord", "heldout.mindrecord"):
        os.symlink(text.folder / name, name)
    before, command = tree(uninterrupted), ["train", "--device", "CPU", "--out", uninterrupted, "--resume", *change]
    status, _, errors = run(*command)
    assert status == 2 and errors.count("\n") == 1 and message in errors
    assert tree(uninterrupted) == before


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
], ids=["cut", "bit", "compression", "no step", "no char_embed", "npy", "folder"])
def test_a_checkpoint_with_any_damage_is_told_and_the_one_before_is_taken(text, uninterrupted, tmp_path, harm):
    older, newest = (int(Path(path).stem[5:]) for path in elmo.checkpoints(str(uninterrupted)))
    shutil.copyfile(uninterrupted / f"step-{older}.npz", tmp_path / f"step-{older}.npz")
    content = (uninterrupted / f"step-{newest}.npz").read_bytes()
    damaged = harm(content)
    assert damaged != content
    if damaged is None:
        (tmp_path / f"step-{newest}.npz").mkdir()
    else:
        write(tmp_path / f"step-{newest}.npz", damaged)
    resumed = elmo.Run(text.options, text.vocabulary)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        resumed.resume(str(tmp_path))
    assert resumed.step == older
    assert f"step-{newest}.npz: " in out.getvalue() and out.getvalue().count("\n") == 1


def test_a_checkpoint_of_an_earlier_version_is_taken(text, uninterrupted, tmp_path):
    newest = Path(elmo.checkpoints(str(uninterrupted))[-1])
    write(tmp_path / newest.name, newest.read_bytes().replace(b"run/trained_with", b"run/another_note"))
    resumed = elmo.Run(text.options, text.vocabulary)
    resumed.resume(str(tmp_path))
    assert newest.name == f"step-{resumed.step}.npz"


def test_a_large_array_with_a_damaged_header_is_not_read_from_the_wrong_place(tmp_path):
    softmax, path = elmo.Softmax(300, 400), str(tmp_path / "step-1.npz")
    elmo.write_arrays(path, [("softmax/W", random(300, 400)), ("softmax/b", random(300))])
    elmo.load_weights(path, softmax.get_parameters())
    assert (softmax.W.asnumpy() == random(300, 400)).all()
    content = Path(path).read_bytes()
    write(path, flipped(content, content.index(b"NUMPY") + 7))  # the header's length
    with np.load(path) as found:
        assert (found["softmax/W"] != random(300, 400)).any()  # numpy does not notice
    with pytest.raises(data.InputError, match="step-1.npz: damaged"):
        elmo.load_weights(path, softmax.get_parameters())


def full_after(n, function):
    """The function, until the disk is full at its n-th call."""
    calls = itertools.count(1)

    def full(*args, **kwargs):
        if next(calls) >= n:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)
    return full


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoints(text, fake, monkeypatch):
    monkeypatch.setattr(np.lib.format, "write_array", full_after(70, np.lib.format.write_array))
    status, _, errors = run(*training(text, "model"))
    assert status == 2 and errors.count("\n") == 1
    assert "step-30.npz: could not be written (No space left on device)" in errors
    assert [path.name for path in Path("model").glob("*.npz*")] == ["step-15.npz"]


class FullDisk:
    free = 1 << 20


def test_a_disk_too_full_for_hdf5_is_one_line(trained, exported, monkeypatch, tmp_path):
    write(tmp_path / "in.txt", "the cat\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: FullDisk)
    monkeypatch.setattr(elmo, "Embedder", FakeEmbedder)
    common = ["--device", "CPU", "--out", trained.model]
    for command in (["embed", "--input", tmp_path / "in.txt", "--output", tmp_path / "new.hdf5"],
                    ["export", "--weights", tmp_path / "new.hdf5"]):
        status, _, errors = run(*command, *common)
        assert status == 2 and "new.hdf5: could not be written (No space left on device)" in errors
        assert errors.splitlines()[-1].startswith("elmo.py: error: ")
        assert os.listdir(tmp_path) == ["in.txt"]


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(monkeypatch, tmp_path):
    events, fsync, replace_file = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("replace") or replace_file(*names))
    elmo.write_arrays(str(tmp_path / "a.npz"), [("x", np.arange(3))])
    assert events == ["fsync", "replace"]


# ---- 13. Several workers ---------------------------------------------------------------------------------------------


def side_by_side(chunks):
    """The chunks of several workers as one chunk, with the streams of all of them."""
    words = list(dict.fromkeys(itertools.chain.from_iterable(chunk.words for chunk in chunks)))
    index = [np.array([words.index(word) for word in chunk.words])[chunk.word_index] for chunk in chunks]
    joined = [np.concatenate([getattr(chunk, name) for chunk in chunks], axis) for name, axis in (
        ("target", 2), ("valid", 1), ("reset_state", 0))]
    return Chunk(words, np.concatenate(index, 2), *joined, None)


def test_two_workers_compute_what_one_does_that_reads_the_streams_of_both(text, two_workers):
    o, n_steps = elmo.read_options(str(two_workers.folder / "options.json")), 15
    run, losses = elmo.Run(replace(o, batch_size=8), text.vocabulary), []
    chunks = [side_by_side(pair) for pair in itertools.islice(zip(*(
        read_chunks(text.corpus, text.vocabulary, o, 0, rank=rank, size=2) for rank in (0, 1))), n_steps)]
    tiers = measure_tiers(chunks)
    step = elmo.make_step(run, tiers)
    for k, chunk in enumerate(chunks):
        losses.append(step(elmo.make_batch(chunk, k, tiers, len(text.vocabulary), run.options, 0))[0])
    finished(two_workers)
    model = two_workers.folder / "model"
    rows = read_log(model)
    assert len(rows) == n_steps
    close(np.array([float(row["loss"]) for row in rows]), [float(loss.asnumpy()) for loss in losses], 1e-4)
    # What both measure of their shares of the held-out text, one after the other, is together what they measured.
    bilm, worker, scores = elmo.BiLM(o), types.SimpleNamespace(rank=0, size=2, sum=list), []
    elmo.load_weights(str(model / "best.npz"), bilm.get_parameters())
    perplexity = elmo.make_perplexity(bilm, run.softmax, text.vocabulary, text.heldout, worker)
    for worker.rank in (0, 1):
        scores.append(perplexity())
    n, averages = (np.array([getattr(s, name) for s in scores]) for name in ("predictions", "average"))
    assert n.sum() == text.heldout.tokens + text.heldout.sentences
    close(float(rows[-1]["heldout_average"]), np.exp((n * np.log(averages)).sum() / n.sum()), 1e-3)
    with np.load(model / f"step-{n_steps}.npz") as last:
        for p in run.parameters():
            close(p, last[p.name.rpartition(".")[2]], 1e-4)
        # Each worker's own position and state, side by side with the other's.
        assert last["run/positions"].shape == (2, 2 + 2 * 4)
        close(np.concatenate(last["run/lstm_states"], 2), run.lstm_state.asnumpy(), 1e-4)


# ---- 14. Half precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp, eps", [("float16", 2.0 ** -11), ("bfloat16", 2.0 ** -8)])
def test_amp_rounds_what_is_multiplied_and_nothing_else(amp, eps):
    x, y = random(5, 64, seed=1), random(64, 7, seed=2)
    product = elmo.make_matmul(amp)(Tensor(x), Tensor(y)).asnumpy()
    assert product.dtype == np.float32
    error, bound = np.abs(product - x.astype(float) @ y), np.abs(x) @ np.abs(y)
    assert eps / 100 < (error / bound).max() < 3 * eps
    plain, half = elmo.BiLM(options(), seed=1), elmo.BiLM(options(), seed=1, amp=amp)
    ids = batch_to_ids([["the", "cat", "sat"]])
    a, b = (bilm(ids)[0][-1].asnumpy() for bilm in (plain, half))
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 100 * eps * np.abs(a).max()
    with pytest.raises(ValueError, match="amp is 'int32'"):
        elmo.BiLM(options(), amp="int32")


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_training_in_half_precision_follows_training_in_float32(trained, tmp_path, amp):
    command = [arg for arg in training(trained, tmp_path / "model", "--amp", amp) if "heldout" not in str(arg)]
    succeed(*command)
    losses = [[float(row["loss"]) for row in read_log(folder)] for folder in (trained.model, tmp_path / "model")]
    close(losses[1], losses[0], 0.02)
    assert losses[1] != losses[0]
    assert "all steps are done" in succeed("--device", "CPU", "--out", tmp_path / "model", "--resume")  # amp as it was
    with np.load(elmo.checkpoints(str(tmp_path / "model"))[-1]) as last:
        assert ("scale_value" in " ".join(last.files)) == (amp == "float16")


# ---- 15. Test: perplexity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, unroll_steps", [(2, 4), (50, 7)])  # the second: more streams than sentences
def test_the_perplexity_is_that_of_numpy_over_every_prediction_once(batch_size, unroll_steps):
    o = options(batch_size=batch_size, unroll_steps=unroll_steps, dropout=0.1)  # no dropout when testing
    corpus, vocabulary = Sentences(some_sentences(23)), vocabulary_of(*VOCABULARY)
    bilm, softmax = randomize(elmo.BiLM(o)), randomize(elmo.Softmax(len(VOCABULARY), o.projection), 1)
    w, losses = weights(bilm, softmax), ([], [])
    for both in filter(all, read_streams(stream(corpus, o))):  # but for streams without a sentence
        for d in (0, 1):  # the whole stream in one go, no chunks
            x = numpy_encoder(np.array([char_ids(word) for word, _ in both[d]]), w, o)
            target = [VOCABULARY.index(target) for _, target in both[d]]
            losses[d].extend(numpy_softmax(numpy_direction(x, w, d, o)[0][-1], w["softmax/W"], w["softmax/b"], target))
    assert len(losses[0]) % (batch_size * unroll_steps) != 0  # the last chunk is not full
    perplexity = elmo.make_perplexity(bilm, softmax, vocabulary, corpus, elmo.Workers())
    for _ in range(2):  # no state is left from one time to the next
        result = perplexity()
        assert result.predictions == len(losses[0]) == corpus.tokens + corpus.sentences
        np.testing.assert_allclose(result[:3], np.exp([np.mean(losses[0]), np.mean(losses[1]), np.mean(losses)]),
                                   rtol=1e-5)
    randomize(softmax, 1, scale=1e6)  # that of a model that has diverged is infinite, and no error
    assert perplexity().average == math.inf


def test_perplexities_are_printed_in_the_form_that_other_programs_read():
    line = str(elmo.Perplexities(252.3149, 242.189, 247.2, 61244))
    assert line == "perplexity forward 252.31 backward 242.19 average 247.20 over 61244 predictions"


def test_testing_prints_last_the_perplexities_of_the_best_epoch(trained):
    out = succeed("test", "--device", "CPU", "--data", trained.folder / "heldout.mindrecord", "--out", trained.model)
    last = out.splitlines()[-1]
    assert re.fullmatch(PERPLEXITY, last)
    assert f"held-out {last}" in trained.out.splitlines()[-1]


# ---- 16. Embed -------------------------------------------------------------------------------------------------------


LINES = ["the cat sat on the mat .", "", "Stranger", " ".join(f"w{k % 7}" for k in range(300)), "   ", "a b",
         "z" * 80 + " 日本語"]


@pytest.fixture(scope="module")
def embedded(trained):
    """LINES and their vectors, as `embed` wrote them."""
    vectors = trained.folder / "vectors.npz"
    # A byte order mark is no part of the first word.
    write(trained.folder / "sentences.txt", "\ufeff" + "\n".join(LINES) + "\n")
    write(f"{vectors}.part", "precious")
    succeed("embed", "--device", "CPU", "--out", trained.model, "--input", trained.folder / "sentences.txt", "--output",
            vectors)
    assert Path(f"{vectors}.part").read_text() == "precious"
    with np.load(vectors) as file:
        assert file.files == [str(k) for k in range(len(LINES))]
        return [file[name] for name in file.files]


def test_embedded_sentences_equal_numpy_and_the_bilm(trained_bilm, embedded):
    w, o = weights(trained_bilm), trained_bilm.options
    assert [(array.shape, array.dtype) for array in embedded] == [
        ((3, len(line.split()), 10), np.float32) for line in LINES]  # blank lines have an array, too
    for line, array in zip(LINES, embedded):
        close(array, numpy_layers(line.split(), w, o)[0])
    layers, _, _ = trained_bilm(batch_to_ids([LINES[0].split(), LINES[2].split()]))
    for k, n in ((0, 0), (1, 2)):
        close(arrays(layers)[:, k, :embedded[n].shape[1]], embedded[n], 1e-6)


def test_an_hdf5_file_holds_the_same_vectors_in_any_order_of_the_sentences(trained, embedded, exported, h5py):
    write(trained.folder / "reversed.txt", "\n".join(LINES[::-1]))  # no line end at the end
    succeed("embed", "--device", "CPU", "--options", trained.folder / "elmo_options.json", "--weights", exported,
            "--input", trained.folder / "reversed.txt", "--output", trained.folder / "vectors.hdf5")
    with h5py.File(trained.folder / "vectors.hdf5", "r") as file:
        assert sorted(file, key=int) == [str(k) for k in range(len(LINES))]
        for k, array in enumerate(embedded[::-1]):
            close(file[str(k)][...], array, 1e-6)
            assert file[str(k)].dtype == np.float32


def test_lines_are_numbered_on_from_block_to_block(folder):
    content = "\ufeffa b\n\n \nc\u2028d \x0c e\r f\n" + "g h i\n" * 20  # none but \n ends a line
    FakeEmbedder.seen = []
    write("text.txt", content)
    names = [name for name, _ in elmo.sentence_vectors(FakeEmbedder(None), "text.txt", 10)]
    assert names == list(map(str, range(24)))
    assert FakeEmbedder.seen == [["a", "b"], [], [], ["c", "d", "e", "f"]] + 20 * [["g", "h", "i"]]
    write("text.txt", content.encode() + b"\xff\n")
    with pytest.raises(data.InputError, match="line 25 is not UTF-8"):
        list(elmo.sentence_vectors(FakeEmbedder(None), "text.txt", 10))


def test_the_schedule_reads_every_token_once_in_both_directions(monkeypatch):
    monkeypatch.setattr(elmo.Embedder, "ROWS", 5)
    lengths = [2, 9, 3, 30, 2, 4, 4, 8, 5, 3, 12]  # 2: only <S> and </S>
    ends = np.cumsum([0, *lengths])
    place = elmo.Embedder(elmo.BiLM(options())).schedule(ends)
    assert place.shape[0] == 2 and place.shape[2] == 5 and place.shape[1] % elmo.Embedder.TIME == 0
    assert place.shape[1] <= 32 + 4  # as little more than the longest sentence as can be
    for begin, end in zip(ends, ends[1:]):
        for direction, tokens in ((0, np.arange(begin, end)), (1, np.arange(begin, end)[::-1])):
            found = np.argwhere(np.isin(place[direction], tokens))
            if end - begin == 2:
                assert len(found) == 0
                continue
            t, row = found[:, 0].min(), found[0, 1]
            assert len(found) == end - begin and t % elmo.Embedder.TIME == 0
            assert (place[direction, t:t + end - begin, row] == tokens).all()
    assert (place >= 0).sum() == 2 * sum(n for n in lengths if n > 2)


def test_sentences_of_one_to_five_thousand_tokens_and_many_at_once_equal_numpy(monkeypatch):
    monkeypatch.setattr(elmo.Embedder, "ROWS", 64)
    bilm, rng = randomize(elmo.BiLM(options())), np.random.default_rng(0)
    long, short = [f"w{n}" for n in rng.integers(0, 90, 5000)], [[f"w{k % 50}"] for k in range(12_100)]
    vectors, w = elmo.Embedder(bilm)([long, *short]), weights(bilm)
    close(vectors[0], numpy_layers(long, w, bilm.options)[0])
    expected = [numpy_layers(words, w, bilm.options)[0] for words in short[:50]]
    assert len(vectors) == 12_101
    close(np.array(vectors[1:]), np.array([expected[k % 50] for k in range(12_100)]))


def test_an_embedder_of_few_rows_and_small_memory_gives_the_same_vectors(monkeypatch):
    bilm, rng = randomize(elmo.BiLM(options(n_layers=1))), np.random.default_rng(0)
    sentences = [[f"w{n}" for n in rng.integers(0, 90, rng.integers(0, 20))] for _ in range(60)]
    for name, value in (("ROWS", 4), ("WORDS", 50), ("MAX_WORDS", 60), ("TIERS", ((30, 14), (20, 50)))):
        monkeypatch.setattr(elmo.Embedder, name, value)
    embedder, w, graphs = elmo.Embedder(bilm), weights(bilm), None
    for block in (sentences[:30], sentences[30:], sentences[:2]):
        for words, array in zip(block, embedder(block)):
            close(array, numpy_layers(words, w, bilm.options)[0])
        graphs = graphs or compiled_graphs()
    assert compiled_graphs() == graphs
    assert embedder([]) == []


def test_work_that_takes_long_tells_how_far_it_is(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(now))
    assert list(data.with_progress("abcdefgh", lambda n, seconds: f"{n} in {seconds}")) == list("abcdefgh")
    assert capsys.readouterr().err == "3 in 12\n6 in 24\n"


# ---- 17. Text files --------------------------------------------------------------------------------------------------


def sentences_of(path="train.mindrecord"):
    corpus = data.Corpus(str(path))
    return list(corpus.read(range(corpus.sentences)))


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
    write("a.txt", "A title\n\nOne sentence\nover lines. Another\r\n \r\nend\n")
    convert("--input", "a.txt", "--raw")
    assert list(map(" ".join, sentences_of())) == ["A title", "One sentence over lines .", "Another", "end"]


def test_input_is_files_folders_globs_gz_and_standard_input(folder, monkeypatch):
    (folder / "b" / "c").mkdir(parents=True)
    write("a1.txt", "the one")  # without a line end: the next file begins a sentence of its own
    write("a2.txt", "\ufeffthe two\n")
    write("b/z", "the four\n")
    write("b/c/x.gz", gzip.compress("\ufeffthe three\n".encode()))
    os.symlink("x.gz", "b/c/y.gz")
    for extra in ([], ["--build-vocab", "--min-count", "1", "--vocab", "new"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the five\n")))
        convert("--input", "a*.txt", "./a1.txt", "--input", "b", "-", "--overwrite", *extra)
        assert sentences_of() == [["the", word] for word in ("one", "two", "three", "four", "five")]


def test_a_pipe_is_read_once_also_where_the_vocabulary_is_built(folder):
    os.mkfifo("pipe")
    thread = threading.Thread(target=write, args=("pipe", "the six\nthe six\n"))
    thread.start()
    convert("--input", "pipe", "--build-vocab", "--min-count", "2", "--vocab", "new")
    thread.join()
    assert sentences_of() == [["the", "six"]] * 2 and "six" in Vocabulary("new").words


def test_lines_without_end_do_not_fill_the_memory(folder, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    words = [f"wörd{i}" for i in range(3000)] + ["x" * 5000]
    path = write("a.txt", " ".join(words))
    sentences = list(data.read_sentences([path], raw=False))
    assert sum(sentences, [])[:3000] == words[:3000] and max(len(" ".join(s)) for s in sentences) <= 2000
    assert "".join(sum(sentences, [])[3000:]) == words[3000]
    assert sum(data.read_sentences([path], raw=True), [])[:3000] == words[:3000]


@pytest.mark.parametrize("n_bytes", [65_535, 65_536, 65_537])
def test_a_line_of_65536_bytes_stays_whole(folder, n_bytes):
    words = ["ab"] * (n_bytes // 3 - 1)
    words.append("z" * (n_bytes - len(" ".join(words)) - 1))
    line = " ".join(words)
    assert len(line) == n_bytes
    path = write("a.txt", f"{line}\nnext one\n")
    sentences = list(data.read_sentences([path], raw=False))
    assert sentences[-1] == ["next", "one"] and sum(sentences[:-1], []) == words
    assert n_bytes > 65_536 or len(sentences) == 2


def test_without_input_the_docstrings_of_the_library_are_converted(folder, monkeypatch):
    library = folder / "lib"
    (library / "site-packages").mkdir(parents=True)
    write(library / "a.py", '"""The cat sat.\n\n    >>> run()\n    5\n\nOn\nit\n==\nA dog.\n"""\ndef f():\n    "Go"\n')
    write(library / "broken.py", "def (:")
    write(library / "site-packages" / "b.py", '"""Foreign."""')
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert str(library) in convert("--heldout-share", "0.5")
    everything = sentences_of() + sentences_of("heldout.mindrecord")
    assert sorted(map(" ".join, everything)) == ["A dog .", "Go", "On it", "The cat sat ."]


def test_a_vocabulary_is_by_falling_count_then_code_point(folder):
    write("a.txt", "b b b a a é é <UNK> <UNK> Z Z <S> rare\n")
    command = ["--input", "a.txt", "--build-vocab", "--overwrite", "--min-count", "2"]
    convert(*command)
    assert (folder / "vocab").read_text(encoding="utf-8") == "<S>\n</S>\n<UNK>\nb\nZ\na\né\n"
    convert(*command, "--max-vocab", "2")
    assert Vocabulary("vocab").words == ["<S>", "</S>", "<UNK>", "b", "Z"]


def test_a_vocabulary_counts_only_the_training_part(folder):
    write("a.txt", "\n".join(f"the word{i}" for i in range(500)))
    convert("--input", "a.txt", "--build-vocab", "--min-count", "1", "--vocab", "new", "--heldout",
            "heldout.mindrecord", "--heldout-share", "0.1")
    words = Vocabulary("new").words
    assert not any(s[1] in words for s in sentences_of("heldout.mindrecord"))
    assert all(s[1] in words for s in sentences_of())


def test_a_vocabulary_out_of_frequency_order_is_warned_of(folder):
    words = [f"w{i:03}" for i in range(200)]
    write("a.txt", "\n".join(" ".join(words[:length]) for length in (1, 2, 4, 8, 15, 30, 60, 200)))
    for order, warned in ((words, False), (words[::-1], True), (words[100:] + words[:100], True)):
        write("vocab", "\n".join([*SPECIAL, *order]))
        status, _, errors = run("--input", "a.txt", "--overwrite", program=data)
        assert status == 0 and ("WARNING" in errors) == warned


def test_frequency_order_is_1_for_the_best_order_and_defined_for_any_counts():
    assert data.frequency_order(np.array([5, 3, 1, 0])) == 1
    assert data.frequency_order(np.array([0, 1, 3, 5])) < 0
    assert data.frequency_order(np.array([0, 0])) == data.frequency_order(np.array([7])) == 1
    assert data.frequency_order(np.zeros(0, int)) == 1


def test_converted_text_comes_back_in_any_order(folder):
    lines = ["the cat sat .", "<S> the\u00a0dog\tsat </S>", "", "café 北京 .", " \t ", "the " * 3000 + "."]
    write("a.txt", "\r\n".join(lines))
    convert("--input_file", "a.txt", "--output_file", "x.mindrecord", "--vocab_path", "vocab")
    corpus = data.Corpus("x.mindrecord")
    assert (corpus.sentences, corpus.tokens) == (4, 4 + 3 + 3 + 3001)
    expected = [["the", "cat", "sat", "."], ["the", "dog", "sat"], ["café", "北京", "."], ["the"] * 3000 + ["."]]
    order = np.array([3, 0, 2, 1, 0])
    corpus.CHUNK = 2  # records that are read at once
    assert list(corpus.read(order)) == [expected[k] for k in order]
    assert list(corpus.read([2])) == [expected[2]] and list(corpus.read([])) == []


def test_heldout_sentences_are_a_fixed_share_and_never_in_both(folder):
    lines = [f"the cat {i}" for i in range(2000)]
    write("a.txt", "\n".join(lines + lines[:100]))
    write("b.txt", "\n".join(reversed(lines)))
    command = ["--heldout", "heldout.mindrecord", "--heldout-share", "0.1", "--overwrite"]
    convert("--input", "a.txt", *command)
    train, heldout = ({" ".join(s) for s in sentences_of(f"{part}.mindrecord")} for part in ("train", "heldout"))
    assert train | heldout == set(lines) and not train & heldout and 150 < len(heldout) < 250
    convert("--input", "b.txt", *command)
    assert {" ".join(s) for s in sentences_of("heldout.mindrecord")} == heldout


def test_the_summary_tells_what_was_converted(folder):
    write("a.txt", "the cat sat . a cow a\nthe owl .\n")
    status, out, errors = run("--input", "a.txt", program=data)
    assert status == 0 and "train.mindrecord: 2 sentences, 10 tokens, 40.00% out of vocabulary" in out
    assert "tokens a second, 10 words in vocab" in out and errors == ""


@pytest.fixture
def converted(folder):
    """A corpus of 500 equal sentences in the folder."""
    write("a.txt", b"the cat sat .\n" * 500)
    convert("--input", "a.txt")
    return folder


def test_a_mindrecord_opens_where_it_is_moved_and_through_links(converted):
    (converted / "new" / "links").mkdir(parents=True)
    for name in ("train.mindrecord", "train.mindrecord.db"):
        os.replace(name, f"new/{name}")
    os.symlink("../train.mindrecord", "new/links/other.mindrecord")  # relative, under another name
    os.symlink("new", "link")
    for path in ("new/train.mindrecord", "new/links/other.mindrecord", "link/train.mindrecord"):
        assert sentences_of(path) == [["the", "cat", "sat", "."]] * 500


def test_a_renamed_mindrecord_is_not_confused_with_the_one_that_has_its_name(converted):
    for end in ("", ".db"):
        os.replace("train.mindrecord" + end, "old.mindrecord" + end)
    write("b.txt", "on the mat\n")
    convert("--input", "b.txt")  # its own name now belongs to another
    assert sentences_of() == [["on", "the", "mat"]]
    with pytest.raises(data.InputError, match="old.mindrecord: was written as train.mindrecord"):
        sentences_of("old.mindrecord")


@pytest.mark.parametrize("harm", [
    lambda: os.remove("train.mindrecord"),
    lambda: os.remove("train.mindrecord.db"),
    lambda: os.truncate("train.mindrecord", 10_000_000),
    lambda: os.truncate("train.mindrecord", 0),
    lambda: os.truncate("train.mindrecord.db", 8192),
    lambda: os.replace("a.txt", "train.mindrecord"),
    lambda: overwrite("train.mindrecord", 0, b"\xff" * 4096),
    lambda: overwrite("train.mindrecord", 16 << 20, b"\xff" * (1 << 20)),
    lambda: overwrite("train.mindrecord.db", 10_000, b"\xfe\xfd\xfc"),
    lambda: overwrite("train.mindrecord", os.path.getsize("train.mindrecord") - data.TOTALS - 4, b"[4"),
    lambda: overwrite("train.mindrecord", os.path.getsize("train.mindrecord") - 1, b"\x01"),
], ids=lambda harm: inspect.getsource(harm).strip())
def test_a_damaged_mindrecord_is_one_line(converted, harm):
    harm()
    with pytest.raises(data.InputError, match=r"train\.mindrecord.*: (no such file|damaged)"):
        sentences_of()


def overwrite(path, start, content):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def test_a_mindrecord_that_goes_away_or_is_replaced_while_it_is_read_is_one_line(converted):
    corpus = data.Corpus("train.mindrecord")
    write("b.txt", "on the mat\n" * 500)
    for harm in (lambda: convert("--input", "b.txt", "--overwrite"), lambda: os.remove("train.mindrecord")):
        harm()
        with pytest.raises(data.InputError, match="can no longer be read"):
            list(corpus.read([0]))


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def interrupted(paths, raw):
        yield ["the"]
        raise KeyboardInterrupt
    write("a.txt", "the cat\n")
    before = tree(folder)
    monkeypatch.setattr(data, "read_sentences", interrupted)
    assert run("--input", "a.txt", program=data)[0] == 130
    assert tree(folder) == before


def test_a_terminated_embedding_cleans_up(trained, folder):
    command = ["embed", "--device", "CPU", "--out", trained.model, "--input", write("a.txt", "the cat\n"), "--output",
               "a.npz"]
    program = ("import os, runpy, signal, sys, numpy.lib.format as f; "
               "f.write_array = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM); "
               f"sys.path.insert(0, {HERE!r}); sys.argv[1:] = {list(map(str, command))!r}; "
               f"runpy.run_path({elmo.__file__!r}, run_name='__main__')")
    assert subprocess.run([sys.executable, "-c", program]).returncode == 143
    assert sorted(os.listdir()) == ["a.txt", "vocab"]


def test_a_closed_standard_input_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert run("--input", "-", program=data)[2] == "data.py: error: -: standard input is closed; name a file\n"


def test_a_terminated_conversion_cleans_up(folder):
    process = subprocess.Popen([sys.executable, data.__file__, "--input", "-"], stdin=subprocess.PIPE)
    before, deadline = tree(folder), time.monotonic() + 60
    process.stdin.write(b"the cat\n" * 5000)  # more than are written at once
    process.stdin.flush()
    while not list(folder.glob(".data-*/train.mindrecord")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdin.close()
    assert tree(folder) == before


def test_a_disk_too_full_for_data_py_is_one_line(folder, monkeypatch):
    write("a.txt", "the cat\n")
    before = tree(folder)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: FullDisk)
    status, _, errors = run("--input", "a.txt", program=data)
    assert status == 2 and errors == "data.py: error: train.mindrecord: could not be written; is the disk full?\n"
    assert tree(folder) == before


def test_too_little_memory_is_one_line(capsys):
    def command():
        raise MemoryError("Unable to allocate 9 TiB")
    assert data.run_program("elmo.py", command) == 2
    assert capsys.readouterr().err == \
        "elmo.py: error: not enough memory (Unable to allocate 9 TiB); use a smaller model or batch\n"


# ---- 18. Ascend, as far as it can be known without one ---------------------------------------------------------------


# No "Supported Platforms" in their documentation; each is named in MindSpore's library for Ascend.
UNDOCUMENTED = {"BiasAddGrad", "ClampScalar", "Divs", "InplaceAddExt", "LessScalar", "MaxPoolGrad", "Muls", "ReluGrad",
                "SigmoidGrad", "SplitWithSize", "StridedSliceGrad", "SumExt", "TanhGrad"}
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


def test_the_graphs_of_training_testing_and_embedding_are_static_and_made_for_ascend(resumed):
    finished(resumed)
    graphs = [path.read_text() for path in (resumed.folder / "graphs").rglob("*jit_opt_b*.ir")]
    assert len(graphs) == 4  # training, testing; encoding and reading of the embedder
    shapes = set(re.findall(r"<Tensor\[\w+\], \(([^)]*)\)>", "".join(graphs)))
    assert len(shapes) > 50 and not any("-" in shape for shape in shapes)
    operators = set(re.findall(r"= (?:PrimFunc_)?([A-Z]\w*)\(", "".join(graphs))) - STRUCTURE
    assert len(operators) > 30
    found = {operator: platforms(operator) for operator in operators}
    assert [operator for operator, text in found.items() if text and "Ascend" not in text] == []
    assert {operator for operator, text in found.items() if not text} <= UNDOCUMENTED


# ---- 19. The command line --------------------------------------------------------------------------------------------


def test_the_names_that_other_programs_rely_on_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = elmo.parse_arguments("--device_target CPU --data_url D --heldout H --vocab_path V --options_path O"
                                " --train_url T --epoch_num 3 --steps 4 --lr 0.5 --batch-size 6 --seed 7 --log-every 8"
                                " --save-every 9 --weights W".split())
    assert (args.command, args.device, args.data, args.heldout, args.vocab) == ("train", "CPU", "D", "H", "V")
    assert (args.options, args.out, args.n_epochs, args.steps, args.learning_rate) == ("O", "T", 3, 4, 0.5)
    assert (args.batch_size, args.seed, args.log_every, args.save_every, args.weights) == (6, 7, 8, 9, "W")
    args = elmo.parse_arguments([])
    assert (args.command, args.device, args.data, args.out, args.vocab, args.heldout) == (
        "train", "Ascend", "train.mindrecord", "model", "vocab", None)
    write("heldout.mindrecord", "")
    assert elmo.parse_arguments(["train"]).heldout == "heldout.mindrecord"
    args = data.parse_arguments("--input_file a b --output_file O --vocab_path V --heldout H".split())
    assert (args.input, args.output, args.vocab, args.heldout) == (["a", "b"], "O", "V", "H")
    assert data.parse_arguments([]).vocab == os.path.join(HERE, "vocab")
    write("vocab", "")
    assert data.parse_arguments([]).vocab == "vocab"


@pytest.mark.parametrize("program", [data, elmo])
def test_help_explains_every_flag(program, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    out, flags = capsys.readouterr().out, set(re.findall(r'"(--[a-z_-]+)"', inspect.getsource(program)))
    assert end.value.code == 0 and len(flags) > 8 and all(flag in out for flag in flags - {"--help"})


def test_a_machine_without_ascend_is_told_of_the_cpu(monkeypatch):
    def set_device(name):
        raise RuntimeError("many\nlines")
    monkeypatch.setattr(ms, "set_device", set_device)
    status, _, errors = run("train")
    assert status == 2 and errors.count("\n") == 1 and "Ascend" in errors and "--device CPU" in errors


# ---- 20. Malformed inputs: one clear line, and nothing is changed ----------------------------------------------------


def without(*keys):
    """The content of a published options file without a key."""
    content = json.loads(json.dumps(PUBLISHED))
    functools.reduce(dict.get, keys[:-1], content).pop(keys[-1])
    return json.dumps(content)


def with_value(*keys_and_value):
    *keys, key, value = keys_and_value
    content = json.loads(json.dumps(PUBLISHED))
    functools.reduce(dict.get, keys, content)[key] = value
    return json.dumps(content)


WRONG_OPTIONS = [
    ("{", "not JSON"), ("[]", "not JSON"), ("[" * 100_000, "not JSON"), (b"\xff\xfe", "not JSON"),
    (without("lstm", "dim"), "lacks lstm.dim"), (without("char_cnn", "embedding"), "lacks char_cnn.embedding.dim"),
    (with_value("char_cnn", 5), "lacks char_cnn.filters"),
    (with_value("char_cnn", "n_characters", 100), "n_characters must be 261"),
    (with_value("char_cnn", "max_characters_per_token", 40), "must be 50"),
    (with_value("lstm", "projection_dim", 13), "projection_dim 13 is more than there are filters"),
    (with_value("char_cnn", "activation", "gelu"), "activation is 'gelu', but must be relu or tanh"),
    (with_value("char_cnn", "filters", [[51, 8]]), "width 1 to 50"),
    (with_value("char_cnn", "filters", [[1]]), "but must be [[width, number]"),
    (with_value("char_cnn", "filters", "all"), "but must be [[width, number]"),
    (with_value("char_cnn", "filters", [1, 8]), "but must be [[width, number]"),
    (with_value("lstm", "dim", "7"), "dim is '7'"), (with_value("lstm", "dim", 7.5), "dim is 7.5"),
    (with_value("lstm", "dim", True), "dim is True"), (with_value("lstm", "n_layers", 0), "n_layers is 0"),
    (with_value("lstm", "cell_clip", math.nan), "cell_clip is nan"),
    (with_value("lstm", "use_skip_connections", 1), "use_skip_connections is 1"),
    (with_value("bidirectional", False), "bidirectional must be true"),
    (with_value("dropout", 1.0), "dropout is 1.0"), (with_value("unroll_steps", -20), "unroll_steps is -20"),
]


@pytest.fixture(scope="module")
def bad(trained, files, exported, h5py):
    """A folder of things that cannot be used; the names in the table below are those in it. The run is ../model."""
    folder = trained.folder / "bad"
    folder.mkdir()
    for k, (content, _) in enumerate(WRONG_OPTIONS):
        write(folder / f"wrong{k}.json", content)
    for name, content in {
            "fine.txt": "a b\n", "empty.txt": "", "blank.txt": "\n \n", "latin1.txt": "a b\nnaïve\n".encode("latin-1"),
            "utf16.txt": "the cat\n".encode("utf-16-le"), "plain.gz": "the cat\n",
            "corpus.tar.gz": gzip.compress(b"name\0\0\0\0ustar"),
            "cut.gz": gzip.compress(os.urandom(9999).hex().encode())[:-5000],
            "flipped.gz": flipped(gzip.compress(b"the cat\n" * 999), 20), "binary": bytes(range(256)) * 4096,
            "exists.npz": "precious", "exists.mindrecord": "precious",
            "beside.mindrecord.db": "precious", "no_special": "the\ncat\n",
            "repeats": "<S>\n</S>\n<UNK>\nb\na\nb", "gap": "<S>\n</S>\n<UNK>\n\nb",
            "space": "<S>\n</S>\n<UNK>\nb 5", "other_vocab": "<S>\n</S>\n<UNK>\nthe\ncat\n"}.items():
        write(folder / name, content)
    (folder / "folder.npz").mkdir()
    for name, change in (("dim8", dict(dim=8)), ("large_batch", dict(batch_size=1000)), ("one_layer", dict(n_layers=1)),
                         ("negatives", dict(n_negative_samples_batch=10_000))):
        write_json(str(folder / f"{name}.json"), elmo.as_json(replace(trained.options, **change)))
    write(folder / "cut.hdf5", exported.read_bytes()[:5000])
    for name, array in (("float64", np.zeros((261, 4))), ("scalar", np.float32(0)), ("null", h5py.Empty("f")),
                        ("nan", np.full((261, 4), np.nan, np.float32)), ("lacking", None), ("group", "group")):
        shutil.copyfile(exported, folder / f"{name}.hdf5")
        with h5py.File(folder / f"{name}.hdf5", "r+") as file:
            del file["char_embed"]
            if name == "group":
                file.create_group("char_embed/deeper")
            elif array is not None:
                file["char_embed"] = array
    shutil.copyfile(trained.folder / "train.mindrecord", folder / "alone.mindrecord")
    for end in ("", ".db"):
        shutil.copyfile(trained.folder / f"train.mindrecord{end}", folder / f"renamed.mindrecord{end}")
    (folder / "links").mkdir()
    os.symlink("..", folder / "links" / "up")
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "pipe")
    for name in ("clip", "swapped"):
        shutil.copytree(trained.model, folder / name)
    content = json.loads((trained.model / "options.json").read_text())
    content["lstm"]["cell_clip"] = 9
    write_json(str(folder / "clip" / "options.json"), content)
    *words, last = trained.vocabulary.words
    write(folder / "swapped" / "vocab", "\n".join([*words[:-1], last, words[-1]]))
    for name in ("run", "begun", "best_only", "no_run", "no_arguments", "pickle", "zeros", "vocab"):
        shutil.copytree(trained.model, folder / name)
        for file in (folder / name).glob("step-*" if name != "begun" else "best.npz"):
            file.unlink()
    for file in (trained.model).glob("*.npz"):
        write(folder / "run" / file.name, file.read_bytes()[:999])
    np.savez(folder / "pickle" / "best.npz", char_embed=np.array([print, {}], dtype=object))
    np.savez(folder / "zeros" / "best.npz", char_embed=np.zeros((3, 3), np.float32))
    write(folder / "vocab" / "vocab", "")
    shutil.copyfile(folder / "dim8.json", folder / "no_run" / "options.json")
    content = json.loads((trained.model / "options.json").read_text())
    content["run"]["arguments"] = 5
    write(folder / "no_arguments" / "options.json", json.dumps(content))
    (folder / "other").mkdir()
    shutil.copyfile(folder / "other_vocab", folder / "other" / "vocab")
    return folder


TRAIN = "train --device CPU --data ../train.mindrecord --vocab ../vocab --options ../options.json --out new"
EMBED = "embed --device CPU --out ../model --input fine.txt --output new.npz"
TEST = "test --device CPU --out ../model --data ../heldout.mindrecord"
EXPORT = "export --device CPU --out ../model --weights new.hdf5"
WEIGHTS = "--options ../elmo_options.json --weights ../elmo_weights.hdf5"
CONVERT = "--input fine.txt --vocab ../vocab --output new.mindrecord"


def changed(command, old, new):
    assert old in command
    return command.replace(old, new)


MALFORMED = [
    # Text
    (data, changed(CONVERT, "fine.txt", "gone.txt"), "gone.txt: no such file"),
    (data, changed(CONVERT, "fine.txt", "gone*.txt"), "gone*.txt: no such file"),
    (data, changed(CONVERT, "fine.txt", "empty.txt"), "empty.txt: an empty file"),
    (data, changed(CONVERT, "fine.txt", "blank.txt"), "new.mindrecord: no sentence"),
    (data, changed(CONVERT, "fine.txt", "latin1.txt"), "latin1.txt: line 2 is not UTF-8"),
    (data, changed(CONVERT, "fine.txt", "utf16.txt"), "utf16.txt: line 1 holds zero bytes"),
    (data, changed(CONVERT, "fine.txt", "corpus.tar.gz"), "corpus.tar.gz: line 1 holds zero bytes"),
    (data, changed(CONVERT, "fine.txt", "plain.gz"), "plain.gz: damaged gzip file"),
    (data, changed(CONVERT, "fine.txt", "cut.gz"), "cut.gz: damaged gzip file"),
    (data, changed(CONVERT, "fine.txt", "flipped.gz"), "flipped.gz: damaged gzip file"),
    (data, changed(CONVERT, "fine.txt", "links"), "links/up: neither a file nor a folder"),
    (data, changed(CONVERT, "fine.txt", "pipes"), "pipes/pipe: neither a file nor a folder"),
    (elmo, changed(EMBED, "fine.txt", "gone.txt"), "gone.txt: "),
    (elmo, changed(EMBED, "fine.txt", "empty.txt"), "empty.txt: is empty"),
    (elmo, changed(EMBED, "fine.txt", "utf16.txt"), "utf16.txt: line 1 holds zero bytes"),
    # Vocabularies
    (data, changed(CONVERT, "../vocab", "gone"), "gone: No such file"),
    (data, changed(CONVERT, "../vocab", "no_special"), "no_special: lines 1 to 3 must be <S> </S> <UNK>"),
    (data, changed(CONVERT, "../vocab", "repeats"), "repeats: line 6 repeats 'b' of line 4"),
    (data, changed(CONVERT, "../vocab", "gap"), "gap: line 4 is blank"),
    (data, changed(CONVERT, "../vocab", "space"), "space: line 4 is blank or holds white space"),
    (elmo, changed(TRAIN, "../vocab", "binary"), "binary: line 1 holds zero bytes"),
    (elmo, changed(TEST, "../model", "vocab"), "vocab: lines 1 to 3 must be"),
    # MindRecords
    (elmo, changed(TRAIN, "../train.mindrecord", "gone.mindrecord"), "gone.mindrecord: no such file"),
    (elmo, changed(TRAIN, "../train.mindrecord", "alone.mindrecord"), "alone.mindrecord.db: no such file"),
    (elmo, changed(TRAIN, "../train.mindrecord", "renamed.mindrecord"), "was written as train.mindrecord"),
    (elmo, TRAIN + " --heldout gone.mindrecord", "gone.mindrecord: no such file"),
    # Options
    *((elmo, changed(TRAIN, "../options.json", f"wrong{k}.json"), f"wrong{k}.json: |{message}")
      for k, (_, message) in enumerate(WRONG_OPTIONS)),
    (elmo, changed(TRAIN, "../options.json", "gone.json"), "gone.json: No such file"),
    (elmo, changed(TRAIN, "../options.json", "."), ".: "),
    (elmo, changed(TRAIN, "../options.json", "large_batch.json"), "less than one batch of 1000 × 3 = 3,000"),
    (elmo, changed(TRAIN, "../options.json", "negatives.json"), "fewer than n_negative_samples_batch, 10,000"),
    (elmo, TRAIN + " --epochs 0", "n_epochs is 0"), (elmo, TRAIN + " --lr nan", "learning_rate is nan"),
    (elmo, TRAIN + " --batch-size 100000", "batch_size is 100000"),
    # Weights
    (elmo, TRAIN + " --weights gone.hdf5", "gone.hdf5: no such file"),
    (elmo, TRAIN + " --weights cut.hdf5", "cut.hdf5: damaged, or not such a file"),
    (elmo, TRAIN + " --weights lacking.hdf5", "lacking.hdf5: has no array char_embed"),
    (elmo, TRAIN + " --weights group.hdf5", "group.hdf5: has no array char_embed"),
    (elmo, TRAIN + " --weights float64.hdf5", "char_embed is float64 [261, 4], but these options ask for float32"),
    (elmo, TRAIN + " --weights scalar.hdf5", "char_embed is float32 []"),
    (elmo, TRAIN + " --weights null.hdf5", "null.hdf5: "),
    (elmo, TRAIN + " --weights nan.hdf5", "char_embed holds numbers that are not finite"),
    (elmo, changed(TEST, "--out ../model", "--options ../elmo_options.json --vocab ../vocab --weights nan.hdf5"),
     "char_embed holds numbers that are not finite"),
    (elmo, changed(TRAIN, "../options.json", "dim8.json") + " --weights ../elmo_weights.hdf5",
     "Cell0/LSTMCell/W_0 is float32 [10, 28], but these options ask for float32 [10, 32]"),
    (elmo, changed(EMBED, "--out ../model", "--options one_layer.json --weights ../elmo_weights.hdf5"),
     "Cell1/LSTMCell/B, which these options do not ask for"),
    (elmo, changed(TEST, "--out ../model", "--options ../elmo_options.json --vocab ../vocab --weights NO_SOFTMAX"),
     "has no array softmax/W"),
    (elmo, changed(TEST, "--out ../model", WEIGHTS + " --vocab other_vocab"), "softmax/W is float32"),
    (elmo, changed(TEST, "../model", "run"), "run/best.npz: |damaged"),
    (elmo, changed(TEST, "../model", "pickle"), "best.npz: |damaged"),
    (elmo, changed(TEST, "../model", "zeros"), "best.npz: char_embed is float32 [3, 3]"),
    # Runs
    (elmo, changed(TRAIN, "--out new", "--out ../model"), "../model: is not empty"),
    (elmo, changed(TRAIN, "--out new", "--out other"), "other/vocab: exists and is another than --vocab"),
    (elmo, changed(TRAIN, "--out new", "--out fine.txt"), "fine.txt: "),
    (elmo, changed(TRAIN, "--out new", "--out /proc/none/new"), "/proc/none"),
    (elmo, TRAIN + " --resume", "new: no run to resume"),
    (elmo, "train --device CPU --out run --resume", "run: all of its checkpoints are damaged"),
    (elmo, "train --device CPU --out best_only --resume", "best_only: has best.npz, but no checkpoint"),
    (elmo, "train --device CPU --out no_run --resume", "no_run/options.json: damaged"),
    (elmo, "train --device CPU --out no_arguments --resume", "no_arguments/options.json: damaged"),
    (elmo, changed(TEST, "../model", "clip"), "clip/best.npz: was trained with another options.json or vocab"),
    (elmo, changed(EMBED, "../model", "clip"), ": was trained with another options.json"),
    (elmo, "train --device CPU --out clip --resume", ": was trained with another options.json"),
    (elmo, changed(TEST, "../model", "swapped"), "swapped/best.npz: was trained with another"),
    (elmo, changed(TEST, "../model", "gone"), "gone: no such folder; train with --out gone first"),
    (elmo, changed(TEST, "../model", "folder.npz"), "folder.npz/best.npz: no such file; train with"),
    (elmo, changed(EMBED, "../model", "begun"), "begun/best.npz: no such file; it is written at the end of an epoch"),
    # Outputs
    (data, changed(CONVERT, "new", "exists"), "exists.mindrecord: exists; choose another name or say --overwrite"),
    (data, changed(CONVERT, "new", "beside"), "beside.mindrecord.db: exists"),
    (data, CONVERT + " --build-vocab", "../vocab: exists"),
    (data, changed(CONVERT, "../vocab", "v.gz") + " --build-vocab", "v.gz: --build-vocab does not compress"),
    (data, changed(CONVERT, "new.mindrecord", "a\udcff"), "argument --output/--output_file: a name that is not UTF-8"),
    (data, changed(CONVERT, "new.mindrecord", "fine.txt") + " --overwrite", "fine.txt: is an input"),
    (data, changed(CONVERT, "new.mindrecord", "../vocab") + " --overwrite", "../vocab: is an input"),
    (data, changed(CONVERT, "new.mindrecord", "h") + " --heldout ./h", "./h: is an input or another output"),
    (data, changed(CONVERT, "../vocab", "new.mindrecord") + " --build-vocab", "new.mindrecord: is an input or another"),
    (data, changed(CONVERT, "../vocab", "../model/vocab") + " --build-vocab --overwrite", "belongs to a training run"),
    (data, changed(CONVERT, "new.mindrecord", "gone/x"), "gone/x: its folder does not exist"),
    (data, changed(CONVERT, "new.mindrecord", "."), ".: exists, and is not a file"),
    (data, changed(CONVERT, "new.mindrecord", "'a&b'"), "a&b: a name that MindRecord does not take"),
    (data, changed(CONVERT, "new.mindrecord", "'new '"), "new : a name that MindRecord does not take"),
    (data, CONVERT + " --heldout " + "x" * 220, "a name that MindRecord does not take"),
    (elmo, changed(EMBED, "new.npz", "exists.npz"), "exists.npz: exists"),
    (elmo, changed(EMBED, "new.npz", "new.txt"), "new.txt: the name must end in .npz or .hdf5"),
    (elmo, changed(EMBED, "--out ../model", WEIGHTS).replace("new.npz", "../elmo_weights.hdf5 --overwrite"),
     "elmo_weights.hdf5: is an input"),
    (elmo, changed(EMBED, "new.npz", "../model/best.npz --overwrite"), "best.npz: is an input"),
    (elmo, changed(EMBED, "new.npz", "begun/step-90.npz --overwrite"), "step-90.npz: belongs to a training run"),
    (elmo, changed(EMBED, "new.npz", "begun/step-999.npz"), "step-999.npz: belongs to a training run"),
    (elmo, changed(EXPORT, "new.hdf5", "../model/best.npz --overwrite"), "best.npz: the name must end in .hdf5"),
    # Flags
    (data, CONVERT + " --what", "unrecognized arguments: --what"),
    (data, changed(CONVERT, "new.mindrecord", "''"), "argument --output/--output_file: an empty path"),
    (data, CONVERT + " --min-count 2", "--min-count and --max-vocab go with --build-vocab"),
    (data, CONVERT + " --max-vocab 2", "--min-count and --max-vocab go with --build-vocab"),
    (data, CONVERT + " --heldout-share 0.5", "--heldout-share X goes with --heldout"),
    (data, CONVERT + " --heldout h --heldout-share 1", "--heldout-share X goes with --heldout, 0 < X < 1"),
    (data, CONVERT + " --heldout h --heldout-share 0.000001", "h: no sentence"),
    (data, changed(CONVERT, "../vocab", "v") + " --build-vocab --min-count 9", "--min-count 9: no word"),
    (data, CONVERT + " --min-count 0", "argument --min-count: '0' is not a whole number, 1 or more"),
    (elmo, "fly", "unrecognized arguments: fly"), (elmo, "train --sizes tiny", "unrecognized arguments: --sizes"),
    (elmo, changed(TRAIN, "CPU", "TPU"), "argument --device/--device_target: invalid choice: 'TPU'"),
    (elmo, changed(TRAIN, "--out new", "--out ''"), "argument --out/--train_url: an empty path"),
    (elmo, TRAIN + " --output new.npz", "unrecognized arguments: --output"),
    (elmo, EMBED + " --resume", "unrecognized arguments: --resume"),
    (elmo, TRAIN + " --size tiny", "--size and --options exclude each other"),
    (elmo, TRAIN + " --steps -1", "argument --steps: '-1' is not"),
    (elmo, TRAIN + " --batch-size x", "argument --batch-size: invalid int value"),
    (elmo, TRAIN + " --seed -1", "argument --seed"), (elmo, TRAIN + " --amp float8", "argument --amp: invalid choice"),
    (elmo, "test --device CPU --weights ../elmo_weights.hdf5", "--weights and --options go together"),
    (elmo, TEST + " " + WEIGHTS, "--out and --weights exclude each other"),
    (elmo, TEST + " --vocab ../vocab", "--vocab goes with --weights"),
    (elmo, changed(EMBED, " --input fine.txt", ""), "the following arguments are required: --input"),
    (elmo, changed(EXPORT, " --weights new.hdf5", ""), "the following arguments are required: --weights"),
]


@pytest.mark.parametrize("program, command, message", MALFORMED, ids=[
    re.sub(r"[^\w.-]+", "_", f"{program.__name__}_{message}")[:70] for program, _, message in MALFORMED])
def test_a_malformed_input_is_one_clear_line_and_changes_nothing(trained, files, bad, monkeypatch, program, command,
                                                                 message):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(elmo, "Embedder", FakeEmbedder)
    before = tree(trained.folder)
    try:
        status, _, errors = run(*shlex.split(command.replace("NO_SOFTMAX", files.weights)), program=program)
        after = tree(trained.folder)
    finally:
        shutil.rmtree("new", ignore_errors=True)  # the next command must not stumble over it
    assert status == 2 and errors.startswith(f"{program.__name__}.py: error: ") and errors.count("\n") == 1
    assert all(part in errors for part in message.split("|")), errors
    assert after == before


# ---- 21. README ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme():
    return Path(HERE, "README.md").read_text(encoding="utf-8")


def test_the_programs_of_the_readme_run_as_written(readme, files, tmp_path):
    for name in (files.options, files.weights):
        shutil.copy(name, tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "brown").mkdir()
    (tmp_path / "conll").mkdir()
    for name, path in (("brown.hdf5", files.weights), ("brown_options.json", files.options)):
        shutil.copy(path, tmp_path / name)
    for name, n in (("train", 20), ("valid", 2), ("test", 2)):  # in place of CoNLL-2003
        write(tmp_path / "conll" / f"{name}.txt", "-DOCSTART- -X- -X- O\n\n" + n * (
            "EU NNP B-NP B-ORG\nleft VBD B-VP O\nNew NNP B-NP B-LOC\nYork NNP I-NP I-LOC\n. . O O\n\n"))
    for name, n in (("train_12k", 20), ("heldout", 2400)):  # in place of Brown and its vectors
        text = rng.choice(["play/nn", "play/vb-hl", "the/at", "1\\/2/cd", "new/jj"], (n, 40))
        write(tmp_path / "brown" / f"{name}.tagged", "\n".join(map(" ".join, text)))
        write(tmp_path / f"{name}.txt", "\n".join(" ".join(t.rpartition("/")[0] for t in line) for line in text))
        elmo.write_arrays(str(tmp_path / f"{name}.npz"), ((str(k), rng.normal(size=(3, 40, 6))) for k in range(n)))
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(programs) >= 3 and all(len(program.splitlines()) <= 90 for program in programs)
    assert len(next(program for program in programs if "Classifier" in program).splitlines()) <= 25
    running = [subprocess.Popen(
        [sys.executable, write(tmp_path / f"program{k}.py", program), "--epochs", "1"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": HERE})
               for k, program in enumerate(programs)]
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0 and out, errors.decode()


def test_the_commands_of_the_readme_are_understood(readme):
    commands = re.findall(r"^ *python (data|elmo)\.py (.*?)(?: +#.*)?$", "\n".join(
        re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)), re.MULTILINE)
    assert len(commands) > 8
    for program, arguments in commands:
        {"data": data, "elmo": elmo}[program].parse_arguments(arguments.replace("'", "").split())


def test_the_table_of_the_readme_says_where_the_paper_is(readme):
    table = re.search(r"^\| paper \|.*\n\|.*\n((?:\|.*\n)+)", readme, re.MULTILINE)[1]
    names = re.findall(r"`([\w.]+)`", "".join(row.split("|")[2] for row in table.splitlines()))
    assert len(names) > 8
    for name in names:
        assert functools.reduce(getattr, name.split("."), elmo)
