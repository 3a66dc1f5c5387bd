"""The specification of this project, as tests: `python -m pytest test_elmo.py`.

It follows the README. First the paper's parts, each against plain numpy, and ELMo as a layer of a network; then
published weights; characters, vocabulary and the stream of batches; training, step by step against numpy; resuming;
several workers, half precision, perplexity, embedding; text files, the graphs for Ascend, the command line, the
README itself; last a table of malformed inputs.
"""
import concurrent.futures
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
from unittest import mock

import numpy as np
import pytest

import data
import elmo
from data import SPECIAL, Chunk, Vocabulary, batch_to_ids, char_ids, fill_tiers, measure_tiers, prefetch, read_chunks
import mindspore as ms
from mindspore import Tensor, nn, ops

ms.set_device("CPU")  # once; MindSpore refuses it once something has been computed
ms.runtime.launch_blocking()  # what is not compiled takes a fraction of the time

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURE = Path(HERE, "..", "shared", "allennlp_fixture")
README = Path(HERE, "README.md").read_text(encoding="utf-8")
GRAPHS = ms.graph.api.ms_compile_cache  # a set of all that MindSpore has compiled so far

# ---- Set-up that tests share -----------------------------------------------------------------------------------------

def write(path, content):
    """Writes str, bytes, or JSON of a dictionary to a path, whose folder it makes; returns the path as a str."""
    content = json.dumps(content, indent=1) if isinstance(content, dict) else content  # as elmo.py does
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


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
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# The options of a model that is tiny but has everything, both clips included; a call may change any of them.
options = functools.partial(
    elmo.Options, filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5, cell_clip=0.5,
    proj_clip=0.3, dropout=0.0, batch_size=3, unroll_steps=4, n_negative_samples_batch=6)

tiny_options = functools.partial(  # smaller still: numpy computes its gradient weight by weight
    options, filters=((1, 1), (2, 2)), char_dim=2, dim=3, projection=2, batch_size=2, unroll_steps=3, proj_clip=0.25)


def randomize(cell, seed=0, scale=0.5):
    """Random values for all parameters of a cell, biases too, which are 0 at first."""
    rng = np.random.default_rng(seed)
    for p in cell.get_parameters():  # assigned in place: a compiled graph does not see what set_data sets
        ops.assign(p, Tensor(rng.normal(0, scale, p.shape).astype(np.float32)))
    return cell


def weights(*cells):
    """The parameters of cells in float64, by their published names."""
    return {p.name.rpartition(".")[2]: p.asnumpy().astype(np.float64) for cell in cells for p in cell.get_parameters()}


def random(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def run(*argv, program=elmo):
    """Runs a command line in this process -> its exit status, what it printed, what it printed as errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        return program.main([str(arg) for arg in argv]), out.getvalue(), errors.getvalue()


def succeed(*argv, program=elmo):
    status, out, errors = run(*argv, program=program)
    assert status == 0, errors
    return out


def fail(*argv, program=elmo):
    """Runs a command line that must end in one clear line of error -> that line."""
    status, _, errors = run(*argv, program=program)
    assert status == 2 and errors.startswith(f"{program.__name__}.py: error: ") and errors.count("\n") == 1, errors
    return errors


convert = functools.partial(succeed, program=data)

EPOCHS = 2
PERPLEXITY = r"perplexity forward (\d+\.\d\d) backward (\d+\.\d\d) average (\d+\.\d\d) over (\d+) predictions"
VOCABULARY = [*SPECIAL, "the", "of", "a", "cat", "dog", "sat", "on", "mat", "."]
RAGGED = [["The", "cat", "sat", "."], ["one"], [], ["naïve", "日本語", "z" * 60], ["a", "a", "a", "a", "a", "b"]]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a corpus that data.py made, its vocabulary, and the options of a tiny model."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    animals, verbs, places = "cat dog cow naïve-fox".split(), "sat ran slept".split(), "mat hill road".split()
    write(folder / "text.txt", "".join(f"the {rng.choice(animals)} {rng.choice(verbs)} on the {rng.choice(places)} "
                                       f"number {k} .\n" for k in range(130)))
    convert("--input", folder / "text.txt", "--output", folder / "train.mindrecord", "--vocab", folder / "vocab",
            "--build-vocab", "--min-count", 2, "--heldout", folder / "heldout.mindrecord", "--heldout-share", 0.1)
    o = options(dropout=0.1, batch_size=12, unroll_steps=2, n_epochs=EPOCHS)
    write(folder / "options.json", elmo.as_json(o))
    corpus, heldout = (data.Corpus(str(folder / f"{name}.mindrecord")) for name in ("train", "heldout"))
    n_predictions = corpus.tokens + corpus.sentences
    return types.SimpleNamespace(folder=folder, options=o, vocabulary=Vocabulary(str(folder / "vocab")), corpus=corpus,
                                 heldout=heldout, ends=[n * n_predictions // (12 * 2) for n in range(1, EPOCHS + 2)])


def training(text, out, *more):
    """The command line that trains on `text`."""
    return ["train", "--device", "CPU", "--data", text.folder / "train.mindrecord", "--vocab", text.folder / "vocab",
            "--heldout", text.folder / "heldout.mindrecord", "--options", text.folder / "options.json", "--out", out,
            "--log-every", 10, "--save-every", 15, *more]


@pytest.fixture(scope="module")
def trained(text):
    """The model trained on `text`, what was printed, the number of graphs after each step, the folder after step 30."""
    folder, graphs, training_batches = text.folder, [], elmo.training_batches

    def watched(its_run, *args):
        for item in training_batches(its_run, *args):
            yield item  # the loop takes the next one after the step, its line of the log, a test and a checkpoint
            graphs.append(len(GRAPHS))
            if its_run.step == 30:
                shutil.copytree(folder / "model", folder / "killed")
    with mock.patch.object(elmo, "training_batches", watched):
        out = succeed(*training(text, folder / "model"))
    graphs.append(len(GRAPHS))
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
def files(tmp_path_factory, h5py):
    """A tiny model's options and weights in the published format, without a softmax, and the model."""
    folder, bilm = tmp_path_factory.mktemp("published"), randomize(elmo.BiLM(options()), 3)
    write(folder / "options.json", elmo.as_json(bilm.options))
    with h5py.File(folder / "weights.hdf5", "w") as file:
        file.update({name: array.astype(np.float32) for name, array in weights(bilm).items()})
    return types.SimpleNamespace(options=str(folder / "options.json"), weights=str(folder / "weights.hdf5"), bilm=bilm)


@pytest.fixture(scope="module")
def beside():
    """start(command, folder, **more_environment): a queue runs one command at a time -> the future of its output."""
    queue = concurrent.futures.ThreadPoolExecutor(1)

    def output_of(command, folder, **environment):
        process = subprocess.run([*map(str, command)], cwd=folder, env={**os.environ, **environment},
                                 capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout
    yield functools.partial(queue.submit, output_of)
    queue.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def two_workers(text, beside, tmp_path_factory):
    """15 steps of training by two workers that msrun starts, without dropout: the folder of their logs, the job."""
    folder, programs = tmp_path_factory.mktemp("two_workers"), os.path.dirname(sys.executable)
    write(folder / "options.json", elmo.as_json(replace(text.options, dropout=0.0, batch_size=6)))
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = training(text, folder / "model", "--options", folder / "options.json", "--steps", 15, "--log-every", 1)
    return folder, beside([f"{programs}/msrun", "--worker_num=2", "--local_worker_num=2", "--join=True",
                           f"--master_port={port}", f"--log_dir={folder}", elmo.__file__, *command],
                          folder, PATH=programs + os.pathsep + os.environ["PATH"])  # msrun's `python` is ours


@pytest.fixture(scope="module")
def half_precision(text, beside, tmp_path_factory):
    """Training on `text` with --amp, without held-out text: for each type the model and the job."""
    folder, jobs = tmp_path_factory.mktemp("half_precision"), {}
    for amp in ("float16", "bfloat16"):
        command = [arg for arg in training(text, folder / amp, "--amp", amp) if "heldout" not in str(arg)]
        jobs[amp] = folder / amp, beside([sys.executable, elmo.__file__, *command], folder)
    return jobs


@pytest.fixture(scope="module")
def resumed(trained, beside):
    """`trained` resumed from step 30 in another process, which also embeds a sentence, and writes what it compiles."""
    write(trained.folder / "one.txt", "the cat\n")
    embed = "embed --device CPU --out killed --input one.txt --output one.npz".split()  # it runs in trained.folder
    commands = [list(map(str, training(trained, trained.killed, "--resume"))), embed]
    program = f"import sys; sys.path.insert(0, {HERE!r}); import elmo; sys.exit(max(map(elmo.main, {commands!r})))"
    return beside([sys.executable, "-c", program], trained.folder, MS_DEV_SAVE_GRAPHS="1",
                  MS_DEV_SAVE_GRAPHS_PATH=str(trained.folder / "graphs"), MS_DEV_DUMP_IR_PASSES="jit_opt_b.ir")


@pytest.fixture(scope="module", autouse=True)
def in_the_background(request):
    """What other processes do for later tests begins at once, where such a test is selected."""
    for name in ("two_workers", "half_precision", "resumed", "readme_programs"):
        if any(name in item.fixturenames for item in request.session.items):
            with contextlib.suppress(pytest.skip.Exception):  # it will skip those tests only
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

    def __init__(self, bilm, softmax, *_):
        self.cells = bilm, softmax

    def __call__(self):
        self.seen.append(weights(*self.cells))
        return elmo.Perplexities(2.0, 2.0, 2 + abs(sum(map(np.sum, self.seen[-1].values()))).item() % 1, 7)


def fake_embedder(bilm):
    """In place of the embedder: zeros, and as there parts of larger arrays."""
    return lambda sentences: [np.zeros((3, 2 + len(words), 10), np.float32)[:, 1:-1] for words in sentences]


fakes = mock.patch.multiple(elmo, make_step=FakeStep, make_perplexity=FakePerplexity, Embedder=fake_embedder)


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
    """At the n-th call of a function, a step unless told, does something before it, or returns its result instead."""
    original, calls = getattr(place, name), itertools.count(1)

    def acting(*its_args, **its_kwargs):
        result = act(*args) if next(calls) == n else None
        return original(*its_args, **its_kwargs) if result is None else result
    monkeypatch.setattr(place, name, acting)


def killed(place, name, times, *command, program=elmo):
    """Runs a command that is killed when a function is called for the n-th time."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        at_call(monkeypatch, times, mock.Mock(side_effect=Killed), place=place, name=name)
        run(*command, program=program)


# ---- The model once more, in plain numpy: one word, one time step after the other, in float64 ------------------------
# complex_step_gradient runs it on complex numbers, which np.max, np.maximum and np.clip order by their real parts.

def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_encoder(chars, w, o):
    """The representation of words, chars int [..., 50]."""
    embedded = np.concatenate((np.zeros((1, o.char_dim)), w["char_embed"]))[chars]  # [..., 50, char_dim]; 0: masked
    features = []
    for k, (width, _) in enumerate(o.filters):
        kernel = w[f"CNN/W_cnn_{k}"][0]
        scores = sum(embedded[..., n:n + 51 - width, :] @ kernel[n] for n in range(width))  # [..., positions, filters]
        features.append(np.max(scores, axis=-2) + w[f"CNN/b_cnn_{k}"])
    x = np.concatenate(features, -1)
    x = np.maximum(x, 0) if o.activation == "relu" else np.tanh(x)
    for k in range(o.n_highway):
        g = sigmoid(x @ w[f"CNN_high_{k}/W_carry"] + w[f"CNN_high_{k}/b_carry"])
        x = g * np.maximum(x @ w[f"CNN_high_{k}/W_transform"] + w[f"CNN_high_{k}/b_transform"], 0) + (1 - g) * x
    return x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]


def numpy_lstm(x, h, c, W, B, W_P, cell_clip, proj_clip):
    """h and c of every step, x [time, ..., size]."""
    hs, cs = [], []
    for x_t in x:
        i, j, f, o = np.split(np.concatenate((x_t, h), -1) @ W + B, 4, -1)
        c = np.clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), -cell_clip, cell_clip)
        h = np.clip(sigmoid(o) * np.tanh(c) @ W_P, -proj_clip, proj_clip)
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
    layers = np.array([np.concatenate((f, b[::-1]), -1) for f, b in zip([x, *forward], [x[::-1], *backward])])
    return layers if boundaries else layers[:, 1:-1], np.array((forward_state, backward_state))


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


def complex_step_gradient(loss, w, words=()):
    """The gradient of loss(w), w a dict of arrays, correct to the last digits: Im loss(w + ih) / h. words: all that the
    loss reads; it depends on no other rows of char_embed than theirs."""
    rows = {n - 1 for word in words for n in char_ids(word)}
    gradient = {name: np.zeros(array.shape) for name, array in w.items()}
    for name, array in w.items():
        for index in np.ndindex(array.shape):
            if name != "char_embed" or index[0] in rows:
                moved = array.astype(complex)
                moved[index] += 1e-30j
                gradient[name][index] = loss({**w, name: moved}).imag / 1e-30
    return gradient


# ---- 1. Options (section 3.4) ----------------------------------------------------------------------------------------

def test_the_default_is_the_papers_model_and_the_named_sizes_are_the_published_ones():
    paper = elmo.Options(
        filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)), n_highway=2, char_dim=16,
        activation="relu", n_layers=2, dim=4096, projection=512, use_skip_connections=True, cell_clip=3, proj_clip=3,
        dropout=0.1, batch_size=128, unroll_steps=20, sample_softmax=True, n_negative_samples_batch=8192,
        learning_rate=0.2, all_clip_norm_val=10, n_epochs=10)
    assert elmo.Options() == elmo.SIZES["original"] == paper
    assert elmo.SIZES["medium"] == replace(paper, dim=2048, projection=256, n_highway=1)
    assert elmo.SIZES["small"] == replace(paper, dim=1024, projection=128, n_highway=1)


def test_what_an_options_file_lacks_takes_the_papers_values_and_keys_that_mean_nothing_here_are_named(tmp_path, capsys):
    cnn = {"filters": [[1, 3], [2, 4], [3, 5]], "embedding": {"dim": 4}, "activation": "relu", "n_highway": 1,
           "max_characters_per_token": 50}
    lstm = {"dim": 7, "projection_dim": 5, "n_layers": 2, "use_skip_connections": True, "cell_clip": 4, "proj_clip": 2}
    published = {"char_cnn": {**cnn, "n_characters": 262}, "lstm": lstm}  # what AllenNLP's option files hold
    expected = replace(elmo.Options(), filters=((1, 3), (2, 4), (3, 5)), char_dim=4, n_highway=1, dim=7, projection=5,
                       cell_clip=4, proj_clip=2)
    for content, message in (
            (published, ""), ({**published, "bidirectional": True}, ""), (elmo.as_json(expected), ""),
            ({**published, "lr": 5, "x": {"y": 1}}, "ignores lr, x.y"), ({**published, "char_cnn": cnn}, ""),
            ({**published, "char_cnn": {**cnn, "n_characters": 261}}, "")):  # 261, 262, no number: all the same
        path = write(tmp_path / "options.json", "\ufeff" + json.dumps(content))
        assert elmo.read_options(path) == expected
        assert capsys.readouterr().err == (f"{path}: {message}\n" if message else "")


def test_an_option_that_makes_no_sense_is_a_value_error_in_python_too():
    for name, value in dict(n_highway=-1, activation="ReLU", dim="7", filters=[(1, 8)], sample_softmax=1).items():
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}, but must be")):
            elmo.Options(**{name: value})


# ---- 2. Character CNN (sections 3.1 and 3.4) -------------------------------------------------------------------------

@pytest.mark.parametrize("activation, n_highway, filters", [
    ("tanh", 0, ((40, 8),)), ("tanh", 2, ((2, 4), (7, 6), (5, 3))),  # the second: not by width
    ("relu", 3, ((50, 2), (1, 4)))])                                 # as wide as a token
def test_the_character_encoder_equals_numpy_also_for_words_in_tiers_of_length(activation, n_highway, filters):
    o = options(activation=activation, n_highway=n_highway, filters=filters)
    words = ["a", "The", "I", "elephants", "x" * 47, "x" * 48, "y" * 49, "long" * 30, "naïve", "Δημοκρατία", "日本語",
             "🙂", "ภาษาไทย" * 4, "<S>", "</S>", "<UNK>", "..."]
    plain, encoder = (randomize(kind(o, np.random.default_rng(0))) for kind in (elmo.CharEncoder, elmo.FastCharEncoder))
    chars, n = np.array([*map(char_ids, words), np.zeros(50, np.int32)]), len(words)  # the last is masked
    expected = numpy_encoder(chars, weights(encoder), o)
    close(plain(Tensor(chars)), expected)
    close(encoder(Tensor(chars)), expected)
    for limits in ([3], [11], [43], [3, 11, 43]):
        n_short = [(data.word_chars(words)[1] <= limit).sum() for limit in limits]
        tiers = [*zip(np.diff([0, *n_short, n]).tolist(), [*limits, 50])]
        chars, rows = fill_tiers(tiers, words, np.arange(n))
        assert len(chars) == n  # each tier is full
        close(encoder(Tensor(chars), tuple(tiers)).asnumpy()[rows], expected[:n])


@pytest.mark.parametrize("activation, filters", [("relu", ((1, 2), (3, 3))), ("tanh", ((4, 2), (2, 3)))])
def test_the_gradient_of_the_character_encoder_is_right_for_every_weight_at_every_call(activation, filters):
    o = options(activation=activation, filters=filters, char_dim=2, projection=3, n_highway=2)
    encoder, dy, all_expected = elmo.FastCharEncoder(o, np.random.default_rng(0)), random(4, 3), []
    parameters, tiers = ms.ParameterTuple(encoder.trainable_params()), ((2, 5), (2, 50))

    def loss(chars, dy):
        return (encoder(chars, tiers) * dy).sum()
    gradient = ms.jit(ms.grad(loss, None, parameters))  # compiled, as in training
    # One graph, called again and again: MindSpore's ops.pad had a gradient that was right at the first call only.
    for seed, words in enumerate((["a", "it", "x" * 60, "naïve"], ["on", "I", "cats", "y" * 48], list("uvw") + ["no"])):
        randomize(encoder, seed)
        chars, _ = fill_tiers(tiers, words, np.arange(4))
        expected = complex_step_gradient(lambda w: (numpy_encoder(chars, w, o) * dy).sum(), weights(encoder), words)
        for p, actual in zip(parameters, gradient(Tensor(chars), Tensor(dy))):
            close(actual, expected[p.name])
        all_expected.append(expected)
    assert all(max(np.abs(expected[p.name]).max() for expected in all_expected) > 1e-3 for p in parameters)


@pytest.mark.parametrize("on_cpu", [True, False])  # each device has a form of the maximum
def test_the_gradient_of_the_maximum_goes_to_one_position_where_several_are_equal(on_cpu, monkeypatch):
    monkeypatch.setattr(elmo, "on_cpu", ops.constexpr(lambda: on_cpu))
    rng, o = np.random.default_rng(0), options(filters=((3, 7),), char_dim=2, n_highway=0)
    encoder, dy, expected = elmo.FastCharEncoder(o, rng), random(4, o.projection), np.zeros((261, 2))
    for p in encoder.get_parameters():  # small integers, so that many scores are equal
        p.set_data(Tensor(rng.integers(-1, 2, p.shape).astype(np.float32)))
    encoder.b_cnn[0].set_data(Tensor(np.full(7, 99, np.float32)))  # the relu after it changes nothing
    w, chars = weights(encoder), np.array([char_ids(word) for word in ("abcabcabca", "hello", "xyzzy" * 12, "ab")])
    kernel, d_max = w["CNN/W_cnn_0"][0], dy @ w["CNN_proj/W_proj"].T
    scores = sum(w["char_embed"][chars[:, m:m + 48] - 1] @ kernel[m] for m in range(3))  # [words, positions, filters]
    assert ((scores == scores.max(1, keepdims=True)).sum(1) > 1).sum() > 12
    for (word, k), p in np.ndenumerate(scores.argmax(1)):  # the first of them
        np.add.at(expected, chars[word, p:p + 3] - 1, kernel[:, :, k] * d_max[word, k])

    def loss(chars, dy):
        return (encoder(chars) * dy).sum()
    close(ms.jit(ms.grad(loss, None, ms.ParameterTuple([encoder.char_embed])))(Tensor(chars), Tensor(dy))[0], expected)


# ---- 3. LSTM with projection -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("recurrence", [elmo.FastRecurrence, elmo.Recurrence])
def test_the_lstm_and_its_gradient_equal_numpy_where_it_is_clipped_and_where_not(recurrence):
    time, batch, size, dim, projection, cell_clip, proj_clip = 6, 3, 4, 5, 3, 0.4, 0.2
    shapes = {"x": (time, batch, size), "h": (batch, projection), "c": (batch, dim), "W": (size + projection, 4 * dim),
              "B": (4 * dim,), "W_P": (dim, projection)}
    inputs = {name: random(*shape, seed=k, scale=0.5) for k, (name, shape) in enumerate(shapes.items())}
    w = {name: array.astype(np.float64) for name, array in inputs.items()}
    lstm, dy = recurrence(cell_clip, proj_clip), random(time, batch, projection, seed=9)
    hs, cs = numpy_lstm(*w.values(), cell_clip, proj_clip)
    assert 0.1 < (np.abs(hs) == proj_clip).mean() < 0.9 and 0.1 < (np.abs(cs) == cell_clip).mean() < 0.9
    y, h_of_each, c_of_each, _ = lstm(*map(Tensor, inputs.values()))
    for actual, expected in ((y, hs), (h_of_each, hs), (c_of_each, cs)):
        close(actual, expected, 1e-6)

    def loss(*inputs):
        return (lstm(*inputs)[0] * Tensor(dy)).sum()
    gradient = ms.jit(ms.grad(loss, (0, 1, 2, 3, 4, 5)))(*map(Tensor, inputs.values()))
    expected = complex_step_gradient(lambda w: (numpy_lstm(*w.values(), cell_clip, proj_clip)[0] * dy).sum(), w)
    for name, actual in zip(inputs, gradient):
        ends = recurrence is elmo.FastRecurrence and name in ("h", "c")  # its gradients stop where the chunk begins
        close(actual, 0 * expected[name] if ends else expected[name])
        assert np.abs(expected[name]).max() > 1e-2


# ---- 4. Bidirectional language model (section 3.1) -------------------------------------------------------------------

@pytest.mark.parametrize("changes, dtype, boundaries, sentences", [
    (dict(n_layers=1), ms.int32, False, RAGGED), (dict(n_layers=3), ms.int32, True, RAGGED),
    (dict(activation="tanh"), ms.int64, False, RAGGED[::-1]),  # numpy's own type, and torch's
    (dict(use_skip_connections=False), ms.int32, False, RAGGED[3:4]),
    (dict(n_layers=1), ms.int32, False, [[], []]), (dict(n_layers=1), ms.int32, False, [[]])])
def test_the_bilm_equals_numpy_whatever_was_read_before_or_is_beside_a_sentence(changes, dtype, boundaries, sentences):
    bilm, ids = randomize(elmo.BiLM(options(**changes))), batch_to_ids(sentences).astype(dtype)
    o, w, lengths = bilm.options, weights(bilm), [len(words) + 2 * boundaries for words in sentences]
    given, states = random(2, o.n_layers, len(sentences), o.projection + o.dim, scale=0.2), []
    for start, before in ((Tensor(given), given), (None, 0 * given)):  # a given state is read on from, but not kept
        layers, mask, state = bilm(ids, start, boundaries)
        assert [layer.shape for layer in layers] == (o.n_layers + 1) * [(*mask.shape, 2 * o.projection)]
        assert mask.asnumpy().tolist() == [[k < n for k in range(max(lengths))] for n in lengths]
        for k, (words, n) in enumerate(zip(sentences, lengths)):
            expected, expected_state = numpy_layers(words, w, o, before[:, :, k], boundaries)
            close(np.array(layers)[:, k, :n], expected)
            close(state[:, :, k], expected_state)
            assert (np.array(layers)[:, k, n:] == 0).all()
        states.append(state.asnumpy())
    assert np.abs(states[0] - states[1]).max() > 1e-2
    h, c = np.split(states[1], [o.projection], -1)  # both clips are active
    assert np.isclose(np.abs(h), o.proj_clip).any() and np.isclose(np.abs(c), o.cell_clip).any()


def test_the_gradient_of_a_ragged_batch_is_that_of_each_sentence_alone_and_the_state_has_none():
    o, sentences = tiny_options(n_layers=2), [["a", "cat", "a"], ["b"], []]
    bilm, dy = randomize(elmo.BiLM(o)), random(3, 3, 3, 4)  # [layers, batch, tokens, 2 · projection]
    expected = complex_step_gradient(
        lambda w: sum((numpy_layers(s, w, o)[0] * dy[:, k, :len(s)]).sum() for k, s in enumerate(sentences)),
        weights(bilm), ["a", "cat", "b", "<S>", "</S>"])

    def loss(ids):
        layers, _, state = bilm(ids)
        return (ops.stack(layers) * Tensor(dy)).sum() + state.sum()
    for name, gradient in zip(expected, ms.grad(loss, None, bilm.trainable_params())(batch_to_ids(sentences))):
        close(gradient, expected[name])
    assert all(np.abs(gradient).max() > 1e-3 for gradient in expected.values())


@pytest.mark.parametrize("use_skip_connections", [True, False])
def test_dropout_drops_the_input_of_each_layer_and_the_residual_adds_what_is_left(use_skip_connections):
    o = options(dropout=0.4, use_skip_connections=use_skip_connections)
    bilm, x = randomize(elmo.BiLM(o)), random(2, 4, 3, o.projection)
    keep = np.random.default_rng(0).random((3, 2, 4, 3, o.projection)) > o.dropout
    outputs, _ = bilm.contextualize(Tensor(x), elmo.zero_state(o, 3), masks=Tensor(keep.view(np.uint8)))
    for d in (0, 1):
        expected, _ = numpy_direction(x[d], weights(bilm), d, o, keep=keep[:, d])
        close(outputs[d], expected)
        assert np.abs(expected[1] - numpy_direction(x[d], weights(bilm), d, o)[0][1]).max() > 0.1


def test_weights_begin_with_the_values_of_bilm_tf():
    o, cell = replace(elmo.SIZES["tiny"], n_highway=2), "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/"
    w = weights(elmo.BiLM(o), elmo.Softmax(5000, 64))
    w["tanh"] = weights(elmo.BiLM(replace(o, activation="tanh")))["CNN/W_cnn_4"]
    for name, limit in {"char_embed": 1.0, "CNN/W_cnn_4": 0.05, cell + "W_0": math.sqrt(6 / (128 + 1024)),
                        cell + "W_P_0": math.sqrt(6 / (256 + 64))}.items():  # uniform
        assert 0.98 * limit < np.abs(w[name]).max() <= limit and abs(w[name].std() / limit - math.sqrt(1 / 3)) < 0.02
    for name, n in {"CNN_high_1/W_carry": 496, "CNN_high_1/W_transform": 496, "CNN_proj/W_proj": 496, "softmax/W": 64,
                    "tanh": 5 * 16}.items():  # normal; n inputs
        assert abs(w[name].std() * math.sqrt(n) - 1) < 0.03 and np.abs(w[name]).max() * math.sqrt(n) > 3
    for name in ("CNN/b_cnn_0", "CNN_high_0/b_transform", "CNN_proj/b_proj", cell + "B", "softmax/b"):
        assert not w[name].any()
    assert all((w[f"CNN_high_{k}/b_carry"] == -2).all() for k in (0, 1))


# ---- 5. Softmax, full and sampled ------------------------------------------------------------------------------------

def test_the_full_and_the_sampled_softmax_equal_numpy_and_accidental_hits_are_left_out_and_nothing_overflows():
    softmax, target = randomize(elmo.Softmax(12, 5)), np.array([0, 3, 7, 7, 5, 11, 6], np.int32)
    w = {"y": random(7, 5).astype(np.float64), **weights(softmax)}
    y, W, b = (Tensor(array.astype(np.float32)) for array in w.values())
    full = numpy_softmax(*w.values(), target)
    close(softmax(y, Tensor(target)), full)
    softmax.max_logits = 3 * 12  # more positions than fit at once: 3, 3 and 1
    close(softmax(y, Tensor(target)), full)
    some, everything = np.array([4, 0, 7, 2, 11], np.int32), np.arange(12, dtype=np.int32)
    log_q = [elmo.log_expected_count(k, 9, 12) for k in (target, some)]

    def loss(y, W, b, negatives=some, log_q=log_q):
        rest = (Tensor(array.astype(np.float32)) for array in (*log_q, ~np.isin(target, negatives)))
        return elmo.sampled_softmax(y, W[Tensor(target)], b[Tensor(target)], W[Tensor(negatives)],
                                    b[Tensor(negatives)], *rest)

    def numpy_loss(w):
        return numpy_sampled_softmax(*w.values(), target, some, *log_q).mean()
    close(loss(y, W, b), numpy_loss(w))
    close(loss(300 * y, W, b) / 300, numpy_loss({**w, "y": 300 * w["y"]}) / 300)
    close(loss(y, W, b, everything, [np.zeros(7), np.zeros(12)]), full.mean())  # every class drawn: the full softmax
    for expected, gradient in zip(complex_step_gradient(numpy_loss, w).values(), ms.grad(loss, (0, 1, 2))(y, W, b)):
        close(gradient, expected, 1e-6)


def test_classes_are_drawn_log_uniformly_and_are_expected_as_often_as_not_every_draw_misses_them():
    k, n, rng = np.arange(10), 20_000, np.random.default_rng(0)
    p = np.log((k + 2) / (k + 1)) / np.log(10 + 1)
    counts = np.bincount([elmo.draw_negatives(rng, 1, 10)[0][0] for _ in range(n)], minlength=10)
    assert len(counts) == 10 and ((counts - n * p) ** 2 / (n * p)).sum() < 27.9  # chi-square, 0.1 %
    close(np.exp(elmo.log_expected_count(k, 4, 10)), 1 - (1 - p) ** 4, 1e-12)
    k, n, V = 793_470, 12_000, 793_471  # for a rare class, p · n to the first order
    assert np.isclose(elmo.log_expected_count(k, n, V), np.log(n * np.log1p(1 / (k + 1)) / np.log(V + 1)), atol=1e-3)


def test_drawn_classes_are_distinct_and_the_draws_are_counted():
    for n, expected, n_draws in ((1, [4], 1), (2, [4, 0], 3), (3, [4, 0, 9], 6), (4, [4, 0, 9, 1], 12)):
        drawn = np.array([4, 4, 0, 4, 0, 9, 9, 0, 4, 9, 0, 1])  # of 10 classes; then 0 for ever
        numbers = itertools.chain(np.log(drawn + 1.5) / np.log(10 + 1), itertools.repeat(0.0))
        rng = types.SimpleNamespace(random=functools.partial(np.fromiter, numbers, float))
        found, count = elmo.draw_negatives(rng, n, 10)
        assert found.tolist() == expected and count == n_draws
    found, count = elmo.draw_negatives(np.random.default_rng(0), 50, 50)
    assert sorted(found) == list(range(50)) and count > 50


# ---- 6. ELMo, a layer of a task's network (sections 3.2 and 3.3) -----------------------------------------------------

def test_the_scalar_mix_is_equation_1_with_each_tokens_mean_0_and_variance_1_where_that_is_asked_for():
    layers, w = random(3, 2, 4, 6), np.array([0.5, -1, 2])
    normal = (layers - layers.mean(-1, keepdims=True)) / layers.std(-1, keepdims=True)
    for mix, expected in ((elmo.ScalarMix(3), layers.mean(0)), (elmo.ScalarMix(3, False, w), numpy_mix(layers, w, 1)),
                          (elmo.ScalarMix(3, True, w), numpy_mix(normal, w, 1))):
        close(mix([Tensor(h) for h in layers]), expected, 1e-6)
        mix.gamma.set_data(Tensor(np.array([0.7], np.float32)))
        close(mix([Tensor(h) for h in layers]), 0.7 * expected, 1e-6)
        assert len(mix.trainable_params()) == 2
    close(elmo.ScalarMix(3, True)(3 * [ops.ones((1, 2, 6), ms.float32)]), np.zeros((1, 2, 6)))  # as padding: all equal
    assert not elmo.ScalarMix(3, trainable=False).trainable_params()  # as it was given, for ever


def test_the_arguments_are_allennlps_and_wrong_numbers_of_layers_are_value_errors():
    assert str(inspect.signature(elmo.Elmo)) == (
        "(options_file, weight_file, num_output_representations, requires_grad=False, do_layer_norm=False, "
        "dropout=0.5, vocab_to_cache=None, keep_sentence_boundaries=False, scalar_mix_parameters=None)")
    assert str(inspect.signature(elmo.ScalarMix)) == \
        "(mixture_size, do_layer_norm=False, initial_scalar_parameters=None, trainable=True)"
    for message, function, *arguments in (
            ("of 3 layers, not of 2", elmo.ScalarMix(3), [Tensor(h) for h in random(2, 2, 4, 6)]),
            ("a mix of 3 layers", elmo.ScalarMix, 3, False, [1, 2]),
            ("a mix of 3 layers", elmo.ScalarMix, 3, False, [1, 2, math.nan]),
            ("a mix of 0 layers", elmo.ScalarMix, 0), ("num_output_representations is 0", elmo.Elmo, None, None, 0)):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_each_of_elmos_representations_is_a_mix_of_the_bilms_layers_dropped_from_only_while_training(files, capsys):
    net, ids = elmo.Elmo(files.options, files.weights, 2, dropout=0.5), batch_to_ids(4 * RAGGED[:3])
    net.scalar_mixes[1].scalar_parameters.set_data(Tensor(np.array([1, 2, 3], np.float32)))
    result, layers = net(ids), np.array(files.bilm(ids)[0])
    assert result.keys() == {"elmo_representations", "mask"} and capsys.readouterr().err == ""
    assert result["mask"].asnumpy().tolist() == 4 * [[k < n for k in range(4)] for n in (4, 1, 0)]
    quiet = np.array(result["elmo_representations"])
    close(quiet, [numpy_mix(layers, np.array(w), 1) for w in ([0, 0, 0], [1, 2, 3])])
    net.set_train()
    noisy, other = (np.array(net(ids)["elmo_representations"]) for _ in range(2))
    assert 0.35 < (noisy[quiet != 0] == 0).mean() < 0.65 and (noisy != other).any()
    close(noisy[noisy != 0], 2 * quiet[noisy != 0])
    net.set_train(False)
    assert (np.array(net(ids)["elmo_representations"]) == quiet).all()


def test_elmo_keeps_boundaries_normalizes_layers_and_fixes_the_mix_where_that_is_asked_for(files, capsys):
    net = elmo.Elmo(files.options, files.weights, 2, False, True, 0.0, ["the"], True, [-9e10, -9e10, 1])
    result, layers = net(batch_to_ids(RAGGED[:3])), np.array(files.bilm(batch_to_ids(RAGGED[:3]), None, True)[0])
    top = (layers[2] - layers[2].mean(-1, keepdims=True)) / (layers[2].std(-1, keepdims=True) + 1e-12)
    close(result["elmo_representations"], [top, top], 1e-4)
    assert result["mask"].asnumpy().tolist() == [[k < n for k in range(6)] for n in (6, 3, 2)]
    assert not net.trainable_params()
    assert re.fullmatch("Elmo: vocab_to_cache is not needed.*\n", capsys.readouterr().err)


class Classifier(nn.Cell):
    """A user's network, and its loss: is there a "good" in the sentence?"""

    def __init__(self, files, requires_grad):
        super().__init__()
        self.elmo = elmo.Elmo(files.options, files.weights, 1, requires_grad, dropout=0.0)
        self.dense = nn.Dense(10, 2)

    def construct(self, ids, labels):
        result = self.elmo(ids)
        vectors = result["elmo_representations"][0] * result["mask"].astype(ms.float32)[:, :, None]
        return ops.cross_entropy(self.dense(vectors.sum(1)), labels)


def test_gradients_reach_the_mix_and_the_bilm_if_that_is_asked_for_and_a_compiled_network_learns_a_toy_task(files):
    words = np.random.default_rng(0).choice(["a", "b", "good", "bad"], (16, 3))
    task = batch_to_ids(words.tolist()), Tensor((words == "good").any(1).astype(np.int32))
    for requires_grad in (True, False):
        net = Classifier(files, requires_grad)
        before, everything = weights(net), ms.ParameterTuple(net.get_parameters())
        to_train = set(before) if requires_grad else {"scalar_parameters", "gamma", "weight", "bias"}
        assert {p.name.rpartition(".")[2] for p in net.trainable_params()} == to_train
        gradients = zip(before, ms.grad(net, None, everything)(*task))
        assert {name for name, gradient in gradients if np.abs(gradient.asnumpy()).max() > 1e-5} == to_train
    optimizer = nn.Adam(net.trainable_params(), 0.05)
    gradient = ms.value_and_grad(net, None, optimizer.parameters)

    @ms.jit
    def step(ids, labels):
        loss, grads = gradient(ids, labels)
        optimizer(grads)
        return loss
    losses = [float(step(*task).asnumpy()) for _ in range(50)]
    assert losses[-1] < losses[0] / 2
    assert {name for name, array in weights(net).items() if (array != before[name]).any()} == to_train


# ---- 7. Published weights --------------------------------------------------------------------------------------------

@pytest.mark.skipif(not FIXTURE.exists(), reason=f"{FIXTURE} is not there: it is no part of this repository")
def test_allennlps_fixture_ten_rows_of_text_whose_states_are_carried_and_its_first_from_a_fresh_start(h5py):
    bilm = elmo.BiLM(FIXTURE / "options.json", FIXTURE / "lm_weights.hdf5")
    columns = json.loads((FIXTURE / "lm_embeddings_sentences.json").read_bytes())  # three streams of text
    rows = [[line.split() for line in row] for row in zip(*columns)]
    expected = [h5py.File(FIXTURE / f"lm_embeddings_{k}.hdf5") for k in range(3)]  # what bilm-tf computed
    read, state = ms.jit(bilm), elmo.zero_state(bilm.options, 3)
    for n, row in enumerate(rows):  # all rows in the shape of the longest: compiled once
        layers, _, state = read(batch_to_ids([*row, ["padding"] * 53])[:3], state)
        for vectors, words, file in zip(layers[2].asnumpy(), row, expected):
            close(vectors[:len(words)], np.hstack(file[str(n)][...]))  # forward beside backward
    for file, layers in zip(expected, elmo.Embedder(bilm)(rows[0])):
        close(layers[2], np.hstack(file["0"][...]))


def test_an_export_holds_the_published_names_and_shapes_and_the_best_weights(trained, exported, h5py):
    n_words, found, best = len(trained.vocabulary), {}, dict(np.load(trained.model / "best.npz"))
    shapes = {"char_embed": (261, 4), "CNN_high_0/W_carry": (12, 12), "CNN_high_0/b_carry": (12,),
              "CNN_high_0/W_transform": (12, 12), "CNN_high_0/b_transform": (12,), "CNN_proj/W_proj": (12, 5),
              "CNN_proj/b_proj": (5,), "softmax/W": (n_words, 5), "softmax/b": (n_words,)}
    for k, n_filters in enumerate((3, 4, 5)):
        shapes.update({f"CNN/W_cnn_{k}": (1, k + 1, 4, n_filters), f"CNN/b_cnn_{k}": (n_filters,)})
    with h5py.File(exported) as file:
        file.visititems(lambda name, item: found.update({name: item[...]} if isinstance(item, h5py.Dataset) else {}))
    for direction, layer in itertools.product((0, 1), (0, 1)):
        cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
        shapes.update({cell + "W_0": (10, 28), cell + "B": (28,), cell + "W_P_0": (7, 5)})
        assert np.abs(found[cell + "B"].reshape(4, 7)[2]).max() < 0.5  # f began at 0; 1 is added when run
    assert {name: array.shape for name, array in found.items()} == shapes
    assert all(array.dtype == np.float32 for array in found.values())
    np.testing.assert_equal(found, {name: best[name] for name in shapes})
    content = json.loads((trained.folder / "elmo_options.json").read_text())
    cnn, lstm = content["char_cnn"], content["lstm"]
    assert cnn["n_characters"] in (261, 262) and cnn["filters"] == [[1, 3], [2, 4], [3, 5]]
    assert (lstm["dim"], lstm["projection_dim"]) == (7, 5) and "run" not in content


def test_published_weights_are_tested_and_fine_tuned_which_begins_with_them_again_if_it_is_killed_before_it_saves(
        trained, files, exported, fake):
    folder, best = trained.folder, dict(np.load(trained.model / "best.npz"))
    model = ["--device", "CPU", "--options", folder / "elmo_options.json", "--vocab", folder / "vocab"]
    out = succeed("test", *model, "--weights", exported, "--data", folder / "heldout.mindrecord")
    assert re.fullmatch(PERPLEXITY, out.splitlines()[-1])
    # The test runs where there is no heldout.mindrecord, which would be taken by itself.
    command = ["train", *model, "--data", folder / "train.mindrecord", "--steps", 1]
    out = succeed(*command, "--weights", files.weights, "--out", "without")
    assert "has no softmax: that table starts fresh" in out and "held-out" not in out
    assert "fresh" not in succeed("train", "--device", "CPU", "--out", "without", "--resume", "--steps", 2)
    command += ["--heldout", folder / "heldout.mindrecord", "--out", "with"]
    killed(FakeStep, "__call__", 1, *command, "--weights", exported)
    out = succeed(*command, "--resume")
    assert "fresh" not in out and re.search(f"before training: held-out {PERPLEXITY}", out)
    *seen, _ = FakePerplexity.seen  # by the test, before the kill, after it; the last: after step 1
    np.testing.assert_equal(seen, 3 * [{name: best[name] for name in seen[0]}])


def test_a_missing_h5py_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(data.InputError, match="pip install h5py"):
        elmo.BiLM(options(), "weights.hdf5")


# ---- 8. Characters and vocabulary ------------------------------------------------------------------------------------

def test_character_ids_are_those_of_bilm_tf_plus_1_bytes_between_the_marks_of_a_word_cut_to_48():
    for word, ids in {"th": [258, 116, 104, 259], "<S>": [258, 256, 259], "</S>": [258, 257, 259], "": [258, 259],
                      "<UNK>": [258, *b"<UNK>", 259], "é": [258, 0xC3, 0xA9, 259], "x" * 60: [258, *[120] * 48, 259],
                      "x" * 47 + "é": [258, *[120] * 47, 0xC3, 259],  # cut inside a character
                      "a\ud800b": [258, 97, 98, 259]}.items():        # a lone surrogate is no byte
        assert (char_ids(word) - 1).tolist() == ids + [260] * (50 - len(ids)) and char_ids(word).dtype == np.int32


def test_batch_to_ids_takes_lists_of_words_pads_with_zeros_and_refuses_anything_else_as_embedders_do():
    ids = batch_to_ids([["a", "cat"], ("the",)])
    assert np.array_equal(ids.asnumpy(), [[char_ids("a"), char_ids("cat")], [char_ids("the"), np.zeros(50)]])
    assert ids.dtype == ms.int32
    assert [batch_to_ids(s).shape for s in ([], [[], []], [[], ["a"]])] == [(0, 0, 50), (2, 0, 50), (2, 1, 50)]
    for sentences in ("the cat", ["the cat", "a dog"], [["a"], "dog"], [["a", 5]]):
        for function in (batch_to_ids, elmo.Embedder(elmo.BiLM(options()))):
            with pytest.raises(ValueError, match="lists of words"):
                function(sentences)


def test_vocabulary_reads_any_line_ends_and_a_byte_order_mark(folder):
    plain = Vocabulary(Path("vocab"))
    assert len(plain) == 10 and plain.index["the"] == 3
    assert [plain.index.get(word, data.UNK) for word in ("dog", "cow", "<S>")] == [9, 2, 0]
    content = (folder / "vocab").read_text()
    for name, other in (("no_end", content[:-1]), ("windows", content.replace("\n", "\r\n")),
                        ("mark", "\ufeff" + content), ("packed.gz", gzip.compress(content.encode()))):
        assert Vocabulary(write(name, other)).words == plain.words


# ---- 9. The stream of training batches -------------------------------------------------------------------------------

@functools.lru_cache(None)
def vocabulary_of(*words):
    with tempfile.TemporaryDirectory() as folder:
        return Vocabulary(write(os.path.join(folder, "vocab"), "\n".join(words)))


def corpus_of(sentences):
    """A corpus in memory, with what is used of a data.Corpus."""
    return types.SimpleNamespace(records=sentences, sentences=len(sentences), tokens=sum(map(len, sentences)),
                                 read=lambda records: (sentences[k] for k in records))


def some_sentences(n=40):
    """Sentences of words inside and outside the vocabulary, all different."""
    rng = np.random.default_rng(0)
    words = [*VOCABULARY[3:], "Stranger", "日本語", "donaudampfschifffahrtsgesellschaft", "y" * 60]
    return [[f"n{k}", *rng.choice(words, rng.integers(0, 9)).tolist()] for k in range(n)]


def stream(corpus, o, *arguments, n=None, **more):
    """The first n chunks (None: all)."""
    return itertools.islice(read_chunks(corpus, vocabulary_of(*VOCABULARY), o, *arguments, **more), n)


def read_streams(chunks):
    """What chunks say -> for each stream and direction, its [(word, target), ...] from begin to end."""
    chunks = list(chunks)
    return [[[(chunk.words[p], VOCABULARY[t]) for chunk in chunks for p, t, valid in zip(
                chunk.word_index[d, :, k], chunk.target[d, :, k], chunk.valid[:, k]) if valid]
             for d in (0, 1)] for k in range(chunks[0].valid.shape[1])]


def read_sentences(*arguments, **more):
    """The complete sentences of a `stream`, one row after the other; checks that both directions read them rightly."""
    found = []
    for forward, backward in read_streams(stream(*arguments, **more)):
        begins = [k for k, (word, _) in enumerate(forward) if word == "<S>"]
        assert begins == [k for k, (word, _) in enumerate(backward) if word == "</S>"] and begins[0] == 0
        for begin, end in zip(begins, begins[1:] + [None]):
            words = [word for word, _ in forward[begin + 1:end]]
            if end or forward[-1][1] == "</S>":  # else it goes on beyond the last chunk
                found.append(words)
                for steps, text in ((forward, ["<S>", *words, "</S>"]), (backward, ["</S>", *words[::-1], "<S>"])):
                    assert steps[begin:end] == [(a, b if b in VOCABULARY else "<UNK>") for a, b in zip(text, text[1:])]
    return found


def test_without_a_seed_every_prediction_comes_once_in_streams_that_carry_on_and_workers_share_them():
    corpus = corpus_of(some_sentences())
    assert sum(chunk.valid.sum() for chunk in stream(corpus, options())) == corpus.tokens + corpus.sentences
    assert sorted(read_sentences(corpus, options())) == sorted(corpus.records)
    assert read_sentences(corpus, options(batch_size=1)) == corpus.records  # in order; words are not made <UNK>
    shares = [read_sentences(corpus, options(), rank=rank, size=3) for rank in range(3)]
    assert [len(share) for share in shares] == [14, 13, 13] and sorted(sum(shares, [])) == sorted(corpus.records)


def test_with_a_seed_each_epoch_has_an_order_of_its_own_of_which_streams_and_workers_take_every_sentence_once():
    corpus, one = corpus_of(some_sentences()), options(batch_size=1)
    found = read_sentences(corpus, one, 1, n=3 * (corpus.tokens + corpus.sentences) // 4 + 1)
    epochs = [found[k:k + 40] for k in (0, 40, 80)]
    assert all(sorted(epoch) == sorted(corpus.records) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != corpus.records
    for rank in range(3):
        assert read_sentences(corpus, one, 1, n=40, rank=rank, size=3)[:8] == epochs[0][rank::3][:8]
    found = read_sentences(corpus, options(), 1, n=100)  # by three streams, side by side
    counts = [found.count(words) for words in corpus.records]
    assert 2 <= min(counts) <= max(counts) <= min(counts) + 1


def batches_of(corpus, o, n, seed=0, first=0, position=None, rank=0, size=1):
    """n batches of a run, from step `first` on, and the chunks they come from."""
    tiers, chunks = measure_tiers(stream(corpus, o, 0)), stream(corpus, o, seed, position, rank, size, n=n)
    return [(elmo.make_batch(chunk, k, tiers, len(VOCABULARY), o, seed, rank), chunk)
            for k, chunk in enumerate(chunks, first)]


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
def test_one_seed_gives_one_stream_that_goes_on_from_any_position_and_another_seed_another(rank, size):
    corpus, o = corpus_of(some_sentences()), options(dropout=0.1)
    batches = batches_of(corpus, o, 60, 5, rank=rank, size=size)  # 3 epochs, or 6
    for k in (0, 1, 7, 16, 17, 18, 19, 20, 40):
        position = batches[k - 1][1].position if k else None
        np.testing.assert_equal(batches_of(corpus, o, 12, 5, k, position, rank, size), batches[k:k + 12])
    for (batch, _), (other, _) in zip(batches, batches_of(corpus, o, 20, 6, rank=rank, size=size)):
        assert not np.array_equal(batch.chars[batch.word_index], other.chars[other.word_index])
        assert not np.array_equal(batch.masks, other.masks) and not np.array_equal(batch.negatives, other.negatives)


def test_every_words_characters_come_back_through_the_tiers_which_have_room_for_the_stream():
    words = ["a", "I", "the", "cats", "tokens", "x" * 10, "y" * 48, "z" * 60, "日本語", "<S>", "</S>"]
    word_index = np.random.default_rng(0).integers(0, len(words), (2, 4, 3))
    # All fit exactly; much room; one too many of 12; one row too few; a single tier.
    for tiers, size in ((((4, 3), (3, 8), (4, 50)), 11), (((20, 6), (20, 50)), 40), (((9, 11), (2, 50)), 267),
                        (((6, 6), (4, 50)), 266), (((11, 50),), 11)):
        chars, rows = fill_tiers(tiers, words, word_index)
        assert chars.shape == (size, 50) and chars.dtype == rows.dtype == np.int32
        assert np.array_equal(chars[rows], np.array([char_ids(word) for word in words])[word_index])
        limits = itertools.chain(*([longest] * n for n, longest in tiers))
        assert all(np.isin(row[longest:], (0, data.PADDING + 1)).all() for row, longest in zip(chars, limits))
    chunks = list(stream(corpus_of(some_sentences(200)), options(batch_size=8), 0, n=100))
    tiers = measure_tiers(chunks)
    counts, limits = zip(*tiers)
    assert all(counts) and list(limits) == sorted(set(limits)) and limits[-1] == 50 and 1 < len(limits) < 5
    for chunk in chunks:
        assert fill_tiers(tiers, chunk.words, chunk.word_index)[0].shape == (sum(counts), 50)


def test_each_direction_subtracts_the_expected_counts_of_its_own_draws(monkeypatch):
    draws = iter((7, 29))  # of the forward direction, of the backward
    monkeypatch.setattr(elmo, "draw_negatives", lambda rng, n, n_classes: (np.arange(n), next(draws)))
    (batch, _), = batches_of(corpus_of(some_sentences()), options(), 1)
    for d, n in ((0, 7), (1, 29)):
        for k, log_q in ((batch.negatives, batch.negative_log_q), (batch.target, batch.target_log_q)):
            p = np.log((k[d] + 2) / (k[d] + 1)) / math.log(len(VOCABULARY) + 1)
            close(log_q[d], np.log(1 - (1 - p) ** n))


@pytest.mark.parametrize("sample, n_negatives", [(True, 6), (False, len(VOCABULARY))])
def test_a_batch_holds_targets_negatives_and_which_targets_were_not_drawn(sample, n_negatives):
    corpus, o = corpus_of(some_sentences()), options(sample_softmax=sample)
    batches = batches_of(corpus, o, 10) + batches_of(corpus, o, 10, rank=1)
    for batch, chunk in batches:
        assert chunk.valid.all() and chunk.valid.shape == (4, 3) and len(set(chunk.words)) == len(chunk.words)
        assert (batch.target == chunk.target.reshape(2, 12)).all() and chunk.target.dtype == np.int32
        assert np.array_equal(batch.chars[batch.word_index], batch_to_ids([chunk.words]).asnumpy()[0][chunk.word_index])
        words = np.array(chunk.words)[chunk.word_index]
        assert batch.reset_state.tolist() == (words[0, 0] == "<S>").tolist() == (words[1, 0] == "</S>").tolist()
        for target, negatives, not_drawn in zip(batch.target, batch.negatives, batch.not_drawn):
            assert len(set(negatives)) == len(negatives) == n_negatives and set(negatives) <= set(range(12))
            assert (not_drawn == [t not in negatives for t in target]).all()
        assert sample or not batch.negative_log_q.any() and not batch.target_log_q.any()
    drawn = {tuple(negatives) for batch, _ in batches for negatives in batch.negatives}
    assert len(drawn) == (20 if sample else 1)  # others for each step and direction, the same for both workers
    assert len({tuple((x.shape, x.dtype.str) for x in batch) for batch, _ in batches}) == 1  # one static graph


def test_dropout_masks_are_new_at_every_time_step_and_keep_the_share_asked_for():
    corpus, o = corpus_of(some_sentences(300)), options(dropout=0.1, batch_size=16, unroll_steps=10, projection=12)
    keep = np.array([[batch.masks for batch, _ in batches_of(corpus, o, 5, rank=rank)] for rank in (0, 1)])
    assert keep.shape == (2, 5, 3, 2, 10, 16, 12)  # [workers, steps, layers + 1, 2, time, batch, projection]
    assert keep.dtype == np.uint8 and set(np.unique(keep)) == {0, 1}
    assert abs(keep.mean() - 0.9) < 6 * math.sqrt(0.09 / keep.size)
    for axis in range(6):
        a, b = keep.take(0, axis), keep.take(1, axis)  # two workers, steps, layers, directions, times, streams
        assert abs((a == b).mean() - 0.82) < 6 * math.sqrt(0.82 * 0.18 / a.size)  # 0.9² + 0.1²: independent


def test_a_few_items_are_prefetched_side_by_side_and_come_in_their_order_as_do_exceptions():
    read, both = [], threading.Barrier(2)  # which is passed only where two are made at once
    items = prefetch((read.append(k) or k for k in range(100)), lambda k: (2 * k, both.wait(30)), 2)
    assert next(items)[0] == 0
    time.sleep(0.2)  # for the threads to read what they will
    assert len(read) <= 3  # the one taken and the two that wait
    assert [doubled for doubled, _ in items] == list(range(2, 200, 2))
    assert list(prefetch([], str)) == [] and list(prefetch([None, 0], lambda item: item)) == [None, 0]
    for items in (prefetch((1 // k for k in (1, 0)), int), prefetch((1, 0), lambda k: 1 // k)):
        assert next(items) == 1
        with pytest.raises(ZeroDivisionError):
            next(items)


# ---- 10. Training, step by step against numpy ------------------------------------------------------------------------

def numpy_training_loss(w, o, chunk, batch, state):
    """The loss of a chunk and the LSTMs' state after it. Of the batch only what is random is used."""
    x = numpy_encoder(np.array([char_ids(word) for word in chunk.words]), w, o)[chunk.word_index]
    losses, states = [], []
    for d in (0, 1):
        keep = batch.masks[:, d] if o.dropout else None
        outputs, state_after = numpy_direction(x[d], w, d, o, state[d], keep)
        y = outputs[-1] * keep[-1] / (1 - o.dropout) if o.dropout else outputs[-1]
        of_softmax = y.reshape(-1, o.projection), w["softmax/W"], w["softmax/b"], chunk.target[d].ravel()
        losses.append(numpy_softmax(*of_softmax) if not o.sample_softmax else numpy_sampled_softmax(
            *of_softmax, batch.negatives[d], batch.target_log_q[d], batch.negative_log_q[d]))
        states.append(state_after)
    return np.mean(losses), np.array(states)


def values_of(run):
    """All that a step changes, by name."""
    parameters = [*run.bilm.get_parameters(), *run.softmax.get_parameters(), *run.accumulators, *run.tables[2:]]
    return {"state": run.lstm_state.asnumpy(), **{p.name.rpartition(".")[2]: p.asnumpy() for p in parameters}}


def check_trajectory(run, n_steps):
    """Trains a run with MindSpore and with numpy, there by dense Adagrad with gradients by complex steps; compares all
    that there is after each step. Returns the step function and the last batch."""
    sentences = [text.split() for text in "the cat sat .|a dog|dog dog dog dog dog|the xy|cat|of the a sat".split("|")]
    o, tiers, history = run.options, ((40, 50),), []
    w = weights(randomize(run.bilm, 1), randomize(run.softmax, 2))
    squares, state = {name: np.ones(array.shape) for name, array in w.items()}, np.zeros(run.lstm_state.shape)
    step, chunks = elmo.make_step(run, tiers), read_chunks(corpus_of(sentences), run.vocabulary, o, 0)
    for n, chunk in enumerate(itertools.islice(chunks, n_steps)):
        batch = elmo.make_batch(chunk, n, tiers, len(run.vocabulary), o, 0)
        # A sentence that begins the chunk is read from zero.
        state = state * (np.array(chunk.words)[chunk.word_index[0, 0]] != "<S>")[:, None]
        gradient = complex_step_gradient(lambda w: numpy_training_loss(w, o, chunk, batch, state)[0], w, chunk.words)
        loss, state = numpy_training_loss(w, o, chunk, batch, state)
        norm = math.sqrt(sum(((o.unroll_steps * g) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = o.unroll_steps * g * min(1, o.all_clip_norm_val / norm)
            squares[name] += g ** 2
            w[name] = w[name] - o.learning_rate * g / np.sqrt(squares[name])

        before = [table.asnumpy().copy() for table in run.tables]
        actual_loss, actual_norm = step(batch)
        others = np.setdiff1d(np.arange(len(run.vocabulary)), [*batch.negatives.ravel(), *batch.target.ravel()])
        assert (len(others) > 0) == o.sample_softmax  # rows of the softmax that the batch does not touch
        assert all((table.asnumpy()[others] == old[others]).all() for table, old in zip(run.tables, before))
        close(actual_loss, loss)
        close(actual_norm, norm, 1e-4)
        actual = values_of(run)
        assert actual.keys() == {*w, *("adagrad/" + name for name in squares), "state"}
        close(actual["state"], state)
        for name in w:
            close(actual[name], w[name])
            close(actual["adagrad/" + name], squares[name], 1e-4)
        history.append((state, norm > o.all_clip_norm_val, len(GRAPHS)))
    states, clipped, graphs = zip(*history)
    h, c = np.split(np.abs(states), [o.projection], -1)
    assert h.min() < h.max() == o.proj_clip and c.min() < c.max() == o.cell_clip
    assert any(clipped) and not all(clipped)
    assert len(set(graphs)) == 1  # nothing is compiled after the first step
    return step, batch


def test_ten_steps_with_the_full_softmax_equal_numpy_in_every_weight():
    o = tiny_options(sample_softmax=False, all_clip_norm_val=0.9)
    check_trajectory(elmo.Run(o, vocabulary_of(*SPECIAL, "the", "cat", "sat", "dog")), 10)


def test_steps_with_negatives_dropout_and_a_loss_scale_equal_numpy_in_every_weight():
    o = tiny_options(n_negative_samples_batch=3, dropout=0.3, all_clip_norm_val=1.7)
    run = elmo.Run(o, vocabulary_of(*SPECIAL, "the", "cat", "sat", "dog", *(f"r{k}" for k in range(17))))
    run.loss_scaler = ms.amp.DynamicLossScaler(1024, 2, 2)  # as float16 has it; doubled after two finite steps
    step, batch = check_trajectory(run, 4)
    before, (_, norm) = values_of(run), step(batch._replace(negative_log_q=batch.negative_log_q * np.float32(np.nan)))
    assert not np.isfinite(norm.asnumpy()) and run.loss_scaler.scale_value.asnumpy() == 2048  # half of 1024 · 2 · 2
    assert all((array == before[name]).all() for name, array in values_of(run).items())  # the scale alone changes
    _, norm = step(batch)
    assert np.isfinite(norm.asnumpy()) and any((array != before[name]).any() for name, array in values_of(run).items())


def test_a_class_that_occurs_more_than_once_has_one_row_its_last():
    run = elmo.Run(options(), vocabulary_of(*VOCABULARY))
    for classes, rows in (([3, 0, 3, 7, 0, 3], [5, 4, 5, 3, 4, 5]), ([7, 7, 3], [1, 1, 2]), ([5], [0])):
        assert run.last_places(Tensor(np.array(classes, np.int32))).asnumpy().tolist() == rows


# ---- 11. A run: its log, its folder, its checkpoints -----------------------------------------------------------------

def read_log(folder):
    return list(csv.DictReader(Path(folder, "log.csv").read_text(encoding="utf-8").splitlines()))


def test_training_compiles_its_step_once_and_logs_the_loss_and_each_epochs_heldout_perplexity(trained):
    rows, out, graphs, ends = read_log(trained.model), trained.out, trained.graphs, trained.ends[:EPOCHS]
    assert ",".join(rows[0]) == "step,epoch,loss,tokens_per_second,heldout_forward,heldout_backward,heldout_average"
    assert [(int(row["step"]), int(row["epoch"])) for row in rows] == [
        (step, 1 + (step > ends[0])) for step in sorted({*range(10, ends[-1] + 1, 10), *ends})]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.1
    assert all(int(row["tokens_per_second"]) > 0 for row in rows)
    assert len(rows) == len(re.findall(r"(?m)^step \d+ of \d+ .*sampled loss [\d.]+ .*tokens/s +\d+ min left", out))
    scores = {int(row["step"]): list(map(float, list(row.values())[4:])) for row in rows if row["heldout_average"]}
    assert list(scores) == ends
    n = trained.heldout.tokens + trained.heldout.sentences
    printed = np.array(re.findall(f"(?m)held-out {PERPLEXITY}$", out), float)
    close(printed, [(*at_end, n) for at_end in scores.values()], 0.0051)  # rounded to two decimals, and to four
    (_, _, first), (forward, backward, second) = scores.values()
    assert second < first < len(trained.vocabulary)
    close(second, math.sqrt(forward * backward), 1e-3)
    assert ends[0] > 30  # after the first step no graph is compiled but the test's, at the end of the first epoch
    assert [k - graphs[0] for k in graphs] == (ends[0] - 1) * [0] + (ends[1] - ends[0] + 1) * [1]


def test_the_folder_of_a_run_holds_what_the_other_commands_need_and_the_last_two_checkpoints(trained):
    steps = [f"step-{k}.npz" for k in (trained.ends[1] // 15 * 15, trained.ends[1])]
    assert sorted(os.listdir(trained.model)) == sorted(["log.csv", "options.json", "vocab", "best.npz", *steps])
    assert elmo.read_options(str(trained.model / "options.json")) == \
        replace(trained.options, n_tokens_vocab=len(trained.vocabulary))
    assert (trained.model / "vocab").read_bytes() == (trained.folder / "vocab").read_bytes()


def test_the_best_epoch_stays_the_best_and_without_heldout_text_the_last_one_is(text, fake, monkeypatch):
    averages = iter((10.0, 20.0, 15.0))
    monkeypatch.setattr(FakePerplexity, "__call__", lambda self: elmo.Perplexities(1.0, 1.0, next(averages), 1))
    succeed(*training(text, "model"))
    succeed(*training(text, "model", "--resume", "--epochs", 3))
    best = dict(np.load("model/best.npz"))
    assert (best["run/step"], best["run/best"]) == (text.ends[0], 10)
    printed = succeed(*(arg for arg in training(text, "alone") if "heldout" not in str(arg)))
    assert dict(np.load("alone/best.npz"))["run/step"] == text.ends[1]
    assert "held-out" not in printed and read_log("alone")[-1]["heldout_average"] == ""


@pytest.mark.parametrize("more, saved", [(["--save-every", 4], ["step-4.npz"]), (["--log-every", 5], [])])
@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(text, fake, monkeypatch, more, saved, loss, norm):
    at_call(monkeypatch, 7, lambda: (Tensor(np.float32(loss)), Tensor(np.float32(norm))))
    error = fail(*training(text, "model", *more))
    assert re.search(rf"step 7: the loss is {loss}, the gradient's norm {norm}; .*--lr", error)
    assert [path.name for path in Path("model").glob("*.npz")] == saved


def test_the_logged_loss_is_the_mean_since_the_last_line_of_steps_that_did_not_overflow(text, fake, monkeypatch):
    def returning_its_number(self, batch):
        n = self.run.step + 1
        return Tensor(np.float32(n)), Tensor(np.float32(math.inf if n in (1, 2, 3, 11, 13) or n > 25 else 1))
    monkeypatch.setattr(FakeStep, "__call__", returning_its_number)
    command = training(text, "model", "--amp", "float16")
    killed(FakeStep, "__call__", 18, *command)  # two steps are lost
    succeed(*command, "--resume", "--steps", 25)
    assert [(row["step"], float(row["loss"])) for row in read_log("model")] == [("10", 7), ("20", 16.375), ("25", 23)]
    assert "step 26: the loss is 26.0, the gradient's norm inf" in fail(*command, "--resume")  # all of them overflow
    assert elmo.checkpoints("model")[-1] == "model/step-25.npz"


# ---- 12. Exact resume ------------------------------------------------------------------------------------------------

def result_of(folder):
    """What is in a run's folder: its checkpoints, bit by bit, and its log but for the speeds."""
    log = [{**row, "tokens_per_second": None} for row in read_log(folder)]
    arrays = {(path.name, name): array.tobytes() for path in Path(folder).glob("*.npz")
              for name, array in np.load(path).items() if name != "run/log"}
    return sorted(os.listdir(folder)), log, arrays


def test_a_run_resumed_in_another_process_ends_bit_by_bit_as_one_that_was_not_stopped(trained, resumed):
    assert "resuming after step 30" in resumed.result()
    assert result_of(trained.model) == result_of(trained.killed)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The folder of a run with steps that are not compiled, from begin to end."""
    out = tmp_path_factory.mktemp("uninterrupted") / "model"
    with fakes:
        succeed(*training(text, out))
    return out


def test_a_run_killed_at_eight_places_and_resumed_ends_as_one_that_was_not(text, uninterrupted, fake):
    out, command, end = Path("model"), training(text, "model"), text.ends[0]
    write(out / "vocab.1.part", "what a kill at the very start leaves behind")
    killed(os, "replace", 1, *command)  # before the vocabulary is there
    killed(elmo, "write_text", 2, *command)  # before the folder is a run
    fail(*command, "--resume")
    killed(FakeStep, "__call__", 10, *command)  # before the first checkpoint
    killed(FakeStep, "__call__", 35, *command, "--resume")  # between two
    assert sorted(path.name for path in out.glob("step-*")) == ["step-15.npz", "step-30.npz"]
    (out / "step-45.npz.7.part").write_text("what a kill leaves behind")
    killed(np.lib.format, "write_array", 40, *command, "--resume")  # in the middle of a checkpoint
    killed(FakePerplexity, "__call__", 1, *command, "--resume")  # in a test, at the end of an epoch
    killed(elmo, "write_arrays", 2, *command, "--resume")  # between the best and the last checkpoint
    assert dict(np.load(out / "best.npz"))["run/step"] == end and not (out / f"step-{end}.npz").exists()
    killed(FakeStep, "__call__", 20, *command, "--resume")
    newest = elmo.checkpoints(out)[-1]
    os.truncate(newest, os.path.getsize(newest) // 2)
    write(out / "log.csv", (out / "log.csv").read_bytes() + b"\n\xff;edited,1\n7;1;1\n")
    printed = succeed(*command, "--resume")
    assert f"{newest}: damaged" in printed and "resuming after step" in printed
    assert result_of(uninterrupted) == result_of(out)
    before = tree(out)  # to resume a run that is over changes nothing
    assert "all steps are done" in succeed("train", "--device", "CPU", "--resume") and tree(out) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_run_which_is_saved_and_tells_how_to_go_on(text, uninterrupted, fake, monkeypatch, number):
    handler = signal.getsignal(number)
    at_call(monkeypatch, 7, signal.raise_signal, number)
    printed = succeed(*training(text, "my run"), "--epochs", 1)
    assert "stopped after step 7" in printed and elmo.checkpoints("my run") == ["my run/step-7.npz"]
    assert signal.getsignal(number) == handler
    # The command that it tells, with more epochs, as if it had been begun with them.
    succeed(*shlex.split(printed.splitlines()[-1].partition("to go on: python ")[2])[1:], "--epochs", EPOCHS)
    assert result_of(uninterrupted) == result_of("my run")


def test_a_second_signal_ends_the_program_at_once(text, fake, monkeypatch):
    for _ in range(2):  # both at the same step
        at_call(monkeypatch, 7, signal.raise_signal, signal.SIGINT)
    assert run(*training(text, "model"))[0] == 130 and not elmo.checkpoints("model")


def test_of_two_processes_that_train_one_run_one_stops(text, fake, monkeypatch):
    at_call(monkeypatch, 21, os.link, "model/step-15.npz", "model/step-25.npz")  # the other one's
    assert "another process trains this run" in fail(*training(text, "model"))
    assert not os.path.exists("model/step-30.npz")


def test_resuming_takes_what_the_command_line_leaves_open_from_the_run_and_the_vocabulary_too(text, fake):
    write("v.gz", gzip.compress((text.folder / "vocab").read_bytes()))
    succeed("train", "--device", "CPU", "--data", text.folder / "train.mindrecord", "--options",
            text.folder / "options.json", "--vocab", "v.gz", "--seed", 3, "--lr", 0.3, "--batch-size", 4, "--steps", 3)
    os.symlink(text.folder / "heldout.mindrecord", "heldout.mindrecord")  # nobody named it on the command line
    assert "resuming after step 3" in succeed("--device", "CPU", "--resume", "--steps", 5)
    assert elmo.checkpoints("model") == ["model/step-3.npz", "model/step-5.npz"] and FakePerplexity.seen == []
    assert Path("model/vocab").read_bytes() == (text.folder / "vocab").read_bytes()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1:]


def test_of_the_checkpoints_the_last_whole_one_is_taken_and_each_damaged_one_is_told(text, uninterrupted, fake, capsys):
    older, newest = map(Path, elmo.checkpoints(uninterrupted))
    content, resumed = newest.read_bytes(), elmo.Run(text.options, text.vocabulary)
    shutil.copyfile(older, "step-9.npz")
    for n, damaged in enumerate((
            content[:-7], flipped(content, len(content) // 2), content.replace(b"char_embed", b"char_embad"),
            flipped(content, content.index(b"PK\x01\x02") + 10),  # the method of compression
            content.replace(b"run/step", b"run/stop"), content[content.index(b"\x93NUMPY"):]), 10):  # no .npz, an .npy
        assert damaged != content
        write(f"step-{n}.npz", damaged)
    os.mkdir("step-100.npz")
    write("step-101.npz.part", "no checkpoint")
    resumed.resume(".")
    told = [line.partition(".npz: ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"./step-{n}" for n in (100, *range(15, 9, -1))] and older.stem == f"step-{resumed.step}"
    close(resumed.lstm_state, np.load(older)["run/lstm_states"][0], 0)
    # One of an earlier version is whole, although it has no trained_with.
    write("step-101.npz", content.replace(b"run/trained_with", b"run/another_note"))
    resumed.resume(".")
    assert newest.stem == f"step-{resumed.step}" and capsys.readouterr().out == ""
    # Of several workers, each takes its own place in the text.
    arrays = dict(np.load(older))
    for name in ("run/positions", "run/lstm_states"):
        arrays[name] = np.stack((arrays[name][0], arrays[name][0] + 1))
    elmo.write_arrays("step-102.npz", arrays.items())
    second = elmo.Run(text.options, text.vocabulary, workers=types.SimpleNamespace(rank=1, size=2))
    second.resume(".")
    assert (second.position == arrays["run/positions"][1]).all()
    close(second.lstm_state, arrays["run/lstm_states"][1], 0)


def test_a_large_array_with_a_damaged_header_is_not_read_from_the_wrong_place(tmp_path):
    softmax, path, W = elmo.Softmax(300, 400), str(tmp_path / "step-1.npz"), random(300, 400)
    elmo.write_arrays(path, [("softmax/W", W), ("softmax/b", random(300))])
    elmo.load_weights(path, softmax.get_parameters())
    assert (softmax.W.asnumpy() == W).all()
    content = Path(path).read_bytes()
    for place in (content.index(b"NUMPY") + 7, content.index(b"(300, 400)") + 6):  # the header's length; 400 as 000
        write(path, flipped(content, place))
        assert not np.array_equal(np.load(path)["softmax/W"], W)  # numpy does not notice
        with pytest.raises(data.InputError, match="step-1.npz: damaged"):
            elmo.load_weights(path, softmax.get_parameters())


def test_a_full_disk_is_one_line_and_leaves_what_there_was(trained, h5py, fake, monkeypatch):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    write("in.txt", "the cat\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 20))
    for command in ("embed --input in.txt --output new.hdf5", "export --weights new.hdf5"):
        error = fail(*command.split(), "--device", "CPU", "--out", trained.model)
        assert "new.hdf5: could not be written (No space left on device)" in error and os.listdir() == ["in.txt"]
    at_call(monkeypatch, 30, monkeypatch.setattr, np.lib.format, "write_array", full)
    assert "step-30.npz: could not be written (No space left on device)" in fail(*training(trained, "model"))
    assert [path.name for path in Path("model").glob("*.npz*")] == ["step-15.npz"]


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(tmp_path):
    with mock.patch.object(elmo, "os", wraps=os) as watched:
        elmo.write_arrays(str(tmp_path / "a.npz"), [("x", np.arange(3))])
    assert [name for name, _, _ in watched.mock_calls if name in ("fsync", "replace")] == ["fsync", "replace"]


# ---- 13. Several workers ---------------------------------------------------------------------------------------------

@mock.patch.object(elmo, "compiled", lambda function: function)  # the two are compiled; the one need not be
def test_two_workers_compute_what_one_does_that_reads_the_streams_of_both(text, two_workers):
    (folder, job), n_steps, chunks = two_workers, 15, []
    o = elmo.read_options(str(folder / "options.json"))
    shares = [read_chunks(text.corpus, text.vocabulary, o, 0, rank=rank, size=2) for rank in (0, 1)]
    for a, b in itertools.islice(zip(*shares), n_steps):  # side by side: one chunk, with the streams of both
        b = b._replace(word_index=b.word_index + len(a.words))
        chunks.append(Chunk(a.words + b.words, *(np.concatenate(pair, -1) for pair in zip(a[1:], b[1:]))))
    run, tiers = elmo.Run(replace(o, batch_size=12), text.vocabulary), measure_tiers(chunks)
    step = elmo.make_step(run, tiers)
    losses = [step(elmo.make_batch(chunk, k, tiers, len(text.vocabulary), run.options, 0))[0].asnumpy()
              for k, chunk in enumerate(chunks)]
    job.result()
    rows, last = read_log(folder / "model"), dict(np.load(folder / "model" / f"step-{n_steps}.npz"))
    close(np.array([float(row["loss"]) for row in rows]), losses, 1e-4)
    for p in run.parameters():
        close(p, last[p.name.rpartition(".")[2]], 1e-4)
    assert last["run/positions"].shape == (2, 2 + 2 * 6)  # each worker's own, as are their LSTMs' states
    close(np.concatenate(last["run/lstm_states"], 2), run.lstm_state.asnumpy(), 1e-4)
    # What both measure of their shares of the held-out text, one after the other, is together what they measured.
    bilm, worker = elmo.BiLM(o, folder / "model" / "best.npz"), types.SimpleNamespace(rank=0, size=2, sum=list)
    perplexity = elmo.make_perplexity(bilm, run.softmax, text.vocabulary, text.heldout, worker)
    _, _, averages, n = np.transpose([perplexity() for worker.rank in (0, 1)])
    assert n.sum() == text.heldout.tokens + text.heldout.sentences
    close(float(rows[-1]["heldout_average"]), np.exp(np.average(np.log(averages), weights=n)), 1e-3)


def test_sums_over_workers_have_more_digits_than_float32():
    workers = elmo.Workers()
    workers.size, workers.all_reduce = 2, lambda x: 2 * x  # as if another worker had the same numbers
    close(np.array(workers.sum([2.0 ** 25 + 1, 0.1])), [2.0 ** 26 + 2, 0.2], 1e-7)


# ---- 14. Half precision ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("amp, eps", [("float16", 2.0 ** -11), ("bfloat16", 2.0 ** -8)])
def test_amp_rounds_what_is_multiplied_forward_and_backward_and_nothing_else(amp, eps):
    x, y, dz = (random(*shape, seed=k) for k, shape in enumerate(((5, 64), (64, 7), (5, 7))))
    matmul = elmo.make_matmul(amp)

    def loss(x, y):
        return (matmul(x, y) * Tensor(dz)).sum()
    dx, dy = ms.jit(ms.grad(loss, (0, 1)))(Tensor(x), Tensor(y))
    # To the nearest number of n binary digits, eps = 2 ** -n; ties to even.
    half_x, half_y = (np.ldexp(np.rint(m / eps) * eps, e) for m, e in map(np.frexp, (np.float64(x), np.float64(y))))
    close(matmul(Tensor(x), Tensor(y)), half_x @ half_y)
    for actual, expected in ((dx, dz @ half_y.T), (dy, half_x.T @ dz)):  # rounded once more by the backward pass
        assert actual.dtype == ms.float32
        close(actual, expected, 2 * eps * np.abs(expected).max())
    ids = batch_to_ids([["the", "cat", "sat"]])
    plain, half = (elmo.BiLM(options(), seed=1, amp=name)(ids)[0][-1].asnumpy() for name in (None, amp))
    assert half.dtype == np.float32 and 0 < np.abs(plain - half).max() < 100 * eps * np.abs(plain).max()
    with pytest.raises(ValueError, match="amp is 'int32'"):
        elmo.BiLM(options(), amp="int32")


def test_training_in_half_precision_follows_training_in_float32(trained, half_precision):
    for amp, (model, job) in half_precision.items():
        job.result()
        losses, expected = ([float(row["loss"]) for row in read_log(folder)] for folder in (model, trained.model))
        close(losses, expected, 0.02)
        assert losses != expected
        assert "all steps are done" in succeed("--device", "CPU", "--out", model, "--resume")  # amp as it was
        last, run = dict(np.load(elmo.checkpoints(model)[-1])), elmo.Run(trained.options, trained.vocabulary, amp=amp)
        assert ("scale_value" in " ".join(last)) == (amp == "float16") == (last["run/n_finite"] > 0)
        run.resume(str(model))
        assert run.loss_scaler is None or run.loss_scaler.counter.asnumpy() == last["run/n_finite"]


# ---- 15. Test: perplexity --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, unroll_steps, compiled", [
    (2, 4, elmo.compiled), (50, 7, lambda function: function)])  # more streams than sentences; uncompiled, for speed
def test_the_perplexity_is_that_of_numpy_over_every_prediction_once(batch_size, unroll_steps, compiled, monkeypatch):
    monkeypatch.setattr(elmo, "compiled", compiled)
    o = options(batch_size=batch_size, unroll_steps=unroll_steps, dropout=0.1)  # no dropout when testing
    corpus = corpus_of(some_sentences(23))
    bilm, softmax = randomize(elmo.BiLM(o)), randomize(elmo.Softmax(len(VOCABULARY), o.projection), 1)
    w, losses = weights(bilm, softmax), ([], [])
    for both in filter(all, read_streams(stream(corpus, o))):  # but for streams without a sentence
        for d in (0, 1):  # the whole stream in one go, no chunks
            x = numpy_encoder(np.array([char_ids(word) for word, _ in both[d]]), w, o)
            target = [VOCABULARY.index(target) for _, target in both[d]]
            losses[d].extend(numpy_softmax(numpy_direction(x, w, d, o)[0][-1], w["softmax/W"], w["softmax/b"], target))
    n = len(losses[0])
    assert n == corpus.tokens + corpus.sentences and n % (batch_size * unroll_steps) != 0  # the last chunk is not full
    perplexity = elmo.make_perplexity(bilm, softmax, vocabulary_of(*VOCABULARY), corpus, elmo.Workers())
    for _ in range(2):  # no state is left from one time to the next
        np.testing.assert_allclose(perplexity(), [*np.exp([*np.mean(losses, 1), np.mean(losses)]), n], rtol=1e-5)
    randomize(softmax, 1, scale=1e6)  # that of a model that has diverged is infinite, and no error
    assert perplexity().average == math.inf


def test_testing_prints_last_the_perplexities_of_the_best_epoch_in_the_form_that_other_programs_read(trained):
    line = str(elmo.Perplexities(252.3149, 242.189, 247.2, 61244))
    assert line == "perplexity forward 252.31 backward 242.19 average 247.20 over 61244 predictions"
    out = succeed("test", "--device", "CPU", "--data", trained.folder / "heldout.mindrecord", "--out", trained.model)
    last = out.splitlines()[-1]
    assert re.fullmatch(PERPLEXITY, last) and f"held-out {last}" in trained.out.splitlines()[-1]


# ---- 16. Embed -------------------------------------------------------------------------------------------------------

def test_the_vectors_of_each_line_equal_numpy_and_the_bilm_in_both_formats_and_any_order(exported, h5py, monkeypatch):
    lines = ["the cat sat on the mat .", "", "Stranger", " ".join(f"w{k % 7}" for k in range(300)), "   ", "a b",
             "z" * 80 + " 日本語"]
    monkeypatch.chdir(exported.parent)
    write("sentences.txt", "\ufeff" + "\n".join(lines) + "\n")  # a byte order mark is no part of a word
    write("reversed.txt", "\n".join(lines[::-1]))  # no line end at the end
    write("vectors.npz.part", "precious")
    for flags in ("--out model --input sentences.txt --output vectors.npz",
                  "--options elmo_options.json --weights elmo_weights.hdf5 --input reversed.txt --output vectors.hdf5"):
        succeed("embed", "--device", "CPU", *flags.split())
    assert Path("vectors.npz.part").read_text() == "precious"
    vectors, bilm = dict(np.load("vectors.npz")), elmo.BiLM("elmo_options.json", exported)
    w = weights(bilm)
    assert list(vectors) == [str(k) for k in range(len(lines))]
    with h5py.File("vectors.hdf5", "r") as file:
        assert sorted(file, key=int) == list(vectors)
        for line, array, other in zip(lines, vectors.values(), map(file.get, reversed(vectors))):
            assert array.shape == (3, len(line.split()), 10)  # blank lines have an array, too
            assert array.dtype == other.dtype == np.float32
            close(array, numpy_layers(line.split(), w, bilm.options)[0])
            close(other[...], array, 1e-6)
    layers, _, _ = bilm(batch_to_ids([lines[0].split(), lines[2].split()]))
    for k, array in enumerate((vectors["0"], vectors["2"])):
        close(np.array(layers)[:, k, :array.shape[1]], array, 1e-6)


def test_lines_are_numbered_on_from_block_to_block(fake):
    write("text.txt", "\ufeffa b\n\n \nc\u2028d \x0c e\r f\n" + "g h i\n" * 20)  # none but \n ends a line
    seen, embedder = [], fake_embedder(None)
    vectors = list(elmo.sentence_vectors(lambda block: seen.extend(block) or embedder(block), "text.txt", 10))
    assert [name for name, _ in vectors] == [str(k) for k in range(24)]
    assert all(array.base is None for _, array in vectors)  # each alone: none keeps its block in memory
    assert seen == [["a", "b"], [], [], ["c", "d", "e", "f"]] + 20 * [["g", "h", "i"]]
    write("text.txt", Path("text.txt").read_bytes() + b"\xff\n")
    with pytest.raises(data.InputError, match="line 25 is not UTF-8"):
        list(elmo.sentence_vectors(embedder, "text.txt", 10))


def test_reading_takes_no_more_time_steps_than_the_longest_sentence_and_none_for_empty_ones(monkeypatch):
    monkeypatch.setattr(elmo.Embedder, "STREAMS", 5)
    ends = np.cumsum([0, 2, 9, 3, 30, 2, 4, 4, 8, 5, 3, 12])  # 2: only <S> and </S>
    schedule = elmo.Embedder(elmo.BiLM(options())).schedule(ends)
    assert schedule.shape == (2, 32, 5) and elmo.Embedder.TIME == 4  # 30 in steps of 4
    tokens = [k for k in range(ends[-1]) if k not in (0, 1, 44, 45)]
    assert [sorted(read[read >= 0]) for read in schedule] == [tokens, tokens]


@mock.patch.multiple(elmo.Embedder, STREAMS=12, WORDS=50, MAX_WORDS=60, TIERS=((30, 14), (20, 50)))
def test_sentences_of_any_length_and_number_equal_numpy_also_with_few_rows_and_small_memory():
    bilm, rng = randomize(elmo.BiLM(tiny_options(n_layers=1))), np.random.default_rng(0)
    embedder, w, graphs = elmo.Embedder(bilm), weights(bilm), None
    *some, long = [" ".join(f"w{k}" for k in rng.integers(0, 90, n)) for n in [*rng.integers(0, 20, 60), 5000]]
    many = [f"w{k % 90}" for k in range(12_100)]
    expected = {line: numpy_layers(line.split(), w, bilm.options)[0] for line in {*some, long, *many}}
    shortest_first = sorted(some[:30], key=lambda line: (not line, len(line)))  # the first is not read first
    for block in (shortest_first, some[30:], some[:2], [long, *many], []):
        vectors = embedder([line.split() for line in block])
        assert len(vectors) == len(block)
        for line, array in zip(block, vectors):
            close(array, expected[line])
        graphs = graphs or len(GRAPHS)
        assert len(GRAPHS) == graphs
    assert len(embedder.index) == len(embedder.x) == 0  # more than MAX_WORDS are forgotten at the next call


def test_work_that_takes_long_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(data.time, "monotonic", mock.Mock(side_effect=itertools.count(0, 4)))  # 4 s from call to call
    assert list(data.with_progress("abcdefgh", lambda n, seconds: f"{n} in {seconds}")) == list("abcdefgh")
    assert capsys.readouterr().err == "3 in 12\n6 in 24\n"


# ---- 17. Text files --------------------------------------------------------------------------------------------------

def sentences_of(path="train.mindrecord"):
    """The sentences of a MindRecord, each its words joined by spaces."""
    corpus = data.Corpus(str(path))
    return [" ".join(words) for words in corpus.read(range(corpus.sentences))]


def test_tokenization_is_penn_treebank_loses_nothing_and_leaves_its_own_result_alone():
    for divided in (  # | is where words are divided and the text has no space
            "I ca|n't say it|'s John|'s|.", "WO|N'T you|? They|'ll|; we|'ve|, I|'d|, I|'m", "it|’s “|so|” do|n’t",
            'He said "|Yes|" (|or [|no|]|) {|x|}|.', "Mr. J. Smith of the U.S. rose at 9 a.m. e.g. today|.",
            "No. 5 said no|. U.S.-led plan B|.", "$|3.14 for 1,000 or 50|% at 10:30|, -3.5 (|-|5|) in 1990s",
            "See https://x.org/a?b=c#d|, or www.x.org (|me@ex-ample.co.uk|)|.", "O'Donnell a_b.c|(|d|) == x|[|0|]",
            "A well-known rock'n'roll O'Neil AT&T and/or", "Wait|... what -- no|--|yes|? the dogs|'", "他来了|。|我走了|！",
            "यह हिन्दी है|। مرحبا|، نعم|؟ می‌خواهم", ""):
        words = divided.replace("|", " ").split()
        assert data.tokenize(divided.replace("|", "")) == data.tokenize(" ".join(words)) == words
    rng = np.random.default_rng(0)
    pieces = [*"abJCIds.,'’\"-_/:&@!?()[]$%*~+019  \n\u00a0。ह\u093f\u200c\x00\u2028", "n't", "'s", "N'T", "http://",
              "www.", "U.S.", "e.g.", "Mr.", "No.", "x@y.z", "1,000", "Word", "--", "..."]
    for _ in range(3000):
        text = "".join(rng.choice(pieces, rng.integers(1, 14)))
        words = data.tokenize(text)
        assert data.tokenize(" ".join(words)) == words and "".join(words) == "".join(text.split()), repr(text)


def test_sentences_of_prose_end_where_they_should_and_run_over_lines_but_not_over_blank_ones(folder):
    write("a.txt", 'He said "Go." Then Mr. Smith left. "Why?" she asked. It was 5 p.m. Dr. No (who?) came... and went. '
                   "So do I. 他来了。我走了！\n\nA title\n\nOne sentence\nover lines. Another\r\n \r\nend\n")
    convert("--input", "a.txt", "--raw")
    assert sentences_of() == ['He said " Go . "', "Then Mr. Smith left .", '" Why ? " she asked .', "It was 5 p.m.",
                              "Dr. No ( who ? ) came ... and went .", "So do I .", "他来了 。", "我走了 ！",
                              "A title", "One sentence over lines .", "Another", "end"]


def test_input_is_files_folders_globs_gz_pipes_and_standard_input_each_read_once(folder, monkeypatch):
    write("a1.txt", "the one")  # without a line end: the next file begins a sentence of its own
    write("a2.txt", "\ufeffthe two\n")
    write("b/z", "the four\n")
    write("b/c/x.gz", gzip.compress("\ufeffthe three\n".encode()))
    os.symlink("x.gz", "b/c/y.gz")
    os.mkfifo("pipe")
    inputs = ["--input", "a*.txt", "./a1.txt", "--input", "b", "-", "pipe", "--overwrite"]
    for vocabulary in ([], ["--build-vocab", "--min-count", "1", "--vocab", "new"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the five\n")))
        threading.Thread(target=write, args=("pipe", "the six\nthe six\n")).start()
        convert(*inputs, *vocabulary)
        assert sentences_of() == ["the one", "the two", "the three", "the four", "the five", "the six", "the six"]
    assert Vocabulary("new").words[3:5] == ["the", "six"]
    monkeypatch.setattr(sys, "stdin", None)
    assert fail(*inputs, program=data) == "data.py: error: -: standard input is closed; name a file\n"


def test_lines_of_65536_bytes_stay_whole_and_lines_without_end_do_not_fill_the_memory(folder, monkeypatch):
    for n_bytes in (65_535, 65_536, 65_537):
        words = [*["ab"] * 21_844, "z" * (n_bytes - 3 * 21_844)]
        *line, following = data.read_sentences([write("a.txt", " ".join(words) + "\nnext one\n")], raw=False)
        assert following == ["next", "one"] and sum(line, []) == words
        assert len(line) == 1 or n_bytes > 65_536
    monkeypatch.setattr(data, "MAX_LINE", 1000)
    words = [f"wörd{k}" for k in range(3000)]
    write("a.txt", " ".join([*words, "x" * 5000]) + "\n\nover\nlines\n")
    for raw, longest, end in ((False, 2000, [["over"], ["lines"]]), (True, 3000, [["over", "lines"]])):
        sentences = list(data.read_sentences(["a.txt"], raw))
        assert sentences[-len(end):] == end
        found = sum(sentences[:-len(end)], [])
        assert found[:3000] == words and "".join(found[3000:]) == "x" * 5000
        assert max(len(" ".join(words)) for words in sentences) <= longest


def test_without_input_the_docstrings_of_the_library_are_converted(folder, monkeypatch):
    write("lib/a.py", '"""The cat sat.\n\n    >>> run()\n    5\n\nOn\nit\n==\nA dog.\n"""\ndef f():\n    "Go"\n')
    write("lib/broken.py", "def (:")
    write("lib/site-packages/b.py", '"""Foreign."""')
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(folder / "lib")})
    assert str(folder / "lib") in convert("--heldout-share", "0.5")
    assert sorted(sentences_of() + sentences_of("heldout.mindrecord")) == ["A dog .", "Go", "On it", "The cat sat ."]


def test_a_vocabulary_is_by_falling_count_then_code_point_and_one_in_another_order_is_warned_of(folder):
    write("a.txt", "b b b a a é é <UNK> <UNK> Z Z <S> rare\n")
    for more, expected in (([], "b\nZ\na\né\n"), (["--max-vocab", "2"], "b\nZ\n")):
        convert("--input", "a.txt", "--build-vocab", "--overwrite", "--min-count", "2", *more)
        assert Path("vocab").read_text(encoding="utf-8") == "<S>\n</S>\n<UNK>\n" + expected
    words = [f"w{k:03}" for k in range(200)]
    write("a.txt", "\n".join(" ".join(words[:length]) for length in (1, 2, 4, 8, 15, 30, 60, 200)))
    for order, warned in ((words, False), (words[::-1], True), (words[100:] + words[:100], True)):
        write("vocab", "\n".join([*SPECIAL, *order]))
        status, _, errors = run("--input", "a.txt", "--overwrite", program=data)
        assert status == 0 and ("WARNING" in errors) == warned
    for counts in ([5, 3, 1, 0], [0, 0], [7], []):  # the best order scores 1, and so does the only one
        assert data.frequency_order(np.array(counts, int)) == 1
    assert data.frequency_order(np.array([0, 1, 3, 5])) < 0


def test_converted_text_comes_back_in_any_order_and_the_summary_tells_of_it(folder):
    lines = ["the cat sat .", "<S> the\u00a0dog\tsat </S>", "", "café 北京 .", " \t ", "the " * 3000 + "."]
    write("a.txt", "\r\n".join(lines))
    status, out, errors = run("--input", "a.txt", "--output", "x.mindrecord", program=data)
    assert status == 0 and "x.mindrecord: 4 sentences, 3,011 tokens, 0.07% out of vocabulary" in out
    assert "tokens a second, 10 words in vocab" in out and errors == ""
    corpus = data.Corpus("x.mindrecord")
    assert (corpus.sentences, corpus.tokens) == (4, 4 + 3 + 3 + 3001)
    expected = [["the", "cat", "sat", "."], ["the", "dog", "sat"], ["café", "北京", "."], ["the"] * 3000 + ["."]]
    corpus.CHUNK = 2  # records that are read at once
    for order in (np.array([3, 0, 2, 1, 0]), [2], []):
        assert list(corpus.read(order)) == [expected[k] for k in order]
    write("a.txt", "\r\n".join(["a", *lines[1:]]))
    convert("--input", "a.txt")
    assert data.Corpus("train.mindrecord").checksum != corpus.checksum  # of every sentence, not of the last alone


def test_heldout_sentences_are_a_fixed_share_never_in_both_and_not_counted_in_the_vocabulary(folder):
    lines = [f"the cat {k}" for k in range(3000)]
    write("a.txt", "\n".join(lines + lines[:100]))
    write("b.txt", "\n".join(reversed(lines)))
    command = ["--heldout", "heldout.mindrecord", "--heldout-share", "0.1", "--overwrite", "--input"]
    convert(*command, "a.txt", "--build-vocab", "--min-count", "1", "--vocab", "new")
    train, heldout = set(sentences_of()), set(sentences_of("heldout.mindrecord"))
    assert train | heldout == set(lines) and not train & heldout and 225 < len(heldout) < 375
    assert heldout == {line for line in lines if zlib.crc32(line.encode()) < 0.1 * 2 ** 32}  # in every process the same
    assert set(Vocabulary("new").words) == {*SPECIAL, *" ".join(train).split()}
    convert(*command, "b.txt")
    assert set(sentences_of("heldout.mindrecord")) == heldout


def test_a_mindrecord_opens_moved_and_through_links_but_not_damaged_renamed_replaced_or_removed(folder):
    write("a.txt", "the cat sat .\n" * 500)
    convert("--input", "a.txt")
    for end, start, stop, content in (  # what stands there instead
            ("", 0, None, b""), ("", 10_000_000, None, b""), ("", 0, 4096, b"\xff" * 4096), ("", -1, None, b"\x01"),
            ("", 0, None, b"the cat sat .\n" * 500), (".db", 8192, None, b""), (".db", 10_000, 10_003, b"\xfe\xfd\xfc"),
            ("", 16 << 20, 17 << 20, b"\xff" * (1 << 20)), ("", -data.TOTALS - 4, -data.TOTALS - 2, b"[4")):
        whole = Path(f"train.mindrecord{end}").read_bytes()
        write(f"train.mindrecord{end}", whole[:start] + content + (whole[stop:] if stop else b""))
        with pytest.raises(data.InputError, match=r"train\.mindrecord.*: damaged"):
            data.Corpus("train.mindrecord")
        write(f"train.mindrecord{end}", whole)
    opened = data.Corpus("train.mindrecord")
    (folder / "new" / "links").mkdir(parents=True)
    os.symlink("../train.mindrecord", "new/links/other.mindrecord")  # relative, under another name
    os.symlink("new", "link")
    for end in ("", ".db"):
        shutil.copy(f"train.mindrecord{end}", "new")
        os.replace(f"train.mindrecord{end}", f"old.mindrecord{end}")
    for path in ("new/train.mindrecord", "new/links/other.mindrecord", "link/train.mindrecord"):
        assert sentences_of(path) == ["the cat sat ."] * 500
    with pytest.raises(data.InputError, match="can no longer be read"):
        list(opened.read([0]))
    write("b.txt", "on the mat\n" * 500)
    convert("--input", "b.txt")  # its own name now belongs to another
    assert sentences_of() == ["on the mat"] * 500
    with pytest.raises(data.InputError, match="can no longer be read"):
        list(opened.read([0]))
    with pytest.raises(data.InputError, match="old.mindrecord: was written as train.mindrecord"):
        data.Corpus("old.mindrecord")
    for name in ("train.mindrecord.db", "train.mindrecord"):
        os.remove(name)
        with pytest.raises(data.InputError, match=f"{name}: no such file"):
            data.Corpus("train.mindrecord")


def test_a_program_that_is_stopped_or_lacks_memory_or_disk_is_one_line_and_cleans_up(trained, folder, monkeypatch):
    write("a.txt", "the cat\n")
    os.symlink(trained.model, "model")
    killed(os, "replace", 2, "--input", "a.txt", program=data)  # when the first of two files is in place
    assert not os.path.exists("train.mindrecord")  # which is the one that is not opened
    os.remove("train.mindrecord.db")
    before = tree(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 20))
    for finish, status, line in (
            (data.Writer.finish, 2, "data.py: error: train.mindrecord: could not be written; is the disk full?\n"),
            (mock.Mock(side_effect=KeyboardInterrupt()), 130, "data.py: interrupted\n"),
            (mock.Mock(side_effect=MemoryError("9 TiB")), 2,
             "data.py: error: not enough memory (9 TiB); use a smaller model or batch\n")):
        monkeypatch.setattr(data.Writer, "finish", finish)
        assert run("--input", "a.txt", program=data) == (status, "", line)
        assert tree(folder) == before
    for program, function, command in (  # terminated in this function, when a part of the output is written
            ("data", "shutil.disk_usage", "--input a.txt"),
            ("elmo", "numpy.lib.format.write_array", "embed --device CPU --out model --input a.txt --output a.npz")):
        code = ("import os, runpy, shutil, signal, sys, numpy.lib.format; "
                f"{function} = lambda *_, **__: len(os.listdir()) > 3 and os.kill(os.getpid(), signal.SIGTERM); "
                f"sys.path.insert(0, {HERE!r}); runpy.run_path('{HERE}/{program}.py', run_name='__main__')")
        assert subprocess.run([sys.executable, "-c", code, *command.split()]).returncode == 143
        assert tree(folder) == before


# ---- 18. Ascend, as far as it can be known without one ---------------------------------------------------------------

# No "Supported Platforms" in their documentation; each is named in MindSpore's library for Ascend.
UNDOCUMENTED = {"BiasAddGrad", "ClampScalar", "Divs", "InplaceAddExt", "LessScalar", "MaxPoolGrad", "Muls", "ReluGrad",
                "SigmoidGrad", "SplitWithSize", "StridedSliceGrad", "SumExt", "TanhGrad"}
STRUCTURE = {"Depend", "Load", "MakeTuple", "StopGradient", "TupleGetItem", "UpdateState"}  # they compute nothing


def test_the_graphs_of_training_testing_and_embedding_are_static_and_made_for_ascend(trained, resumed):
    resumed.result()
    graphs = [path.read_text() for path in (trained.folder / "graphs").rglob("*jit_opt_b*.ir")]
    assert len(graphs) == 4  # training, testing; encoding and reading of the embedder
    shapes = set(re.findall(r"<Tensor\[\w+\], \(([^)]*)\)>", "".join(graphs)))
    assert len(shapes) > 50 and not any("-" in shape for shape in shapes)
    operators = set(re.findall(r"= (?:PrimFunc_)?([A-Z]\w*)\(", "".join(graphs))) - STRUCTURE
    assert len(operators) > 30
    for name in operators:
        texts = [inspect.getdoc(getattr(place, name, None)) or "" for place in (ops, ops.operations, ops.auto_generate)]
        for elsewhere in re.findall(r"Refer to :func:`mindspore\.ops\.(\w+)`", "".join(texts)):
            texts.append(inspect.getdoc(getattr(ops, elsewhere, None)) or "")
        found = re.findall(r"Supported Platforms:\s*(.*)", "\n".join(texts))  # a str for each place that tells of them
        assert all("Ascend" in text for text in found) and (found or name in UNDOCUMENTED), name


# ---- 19. The command line --------------------------------------------------------------------------------------------

def test_the_names_that_other_programs_rely_on_are_accepted(fake):
    def check(program, line, **expected):
        assert vars(program.parse_arguments(line.split())).items() >= expected.items()
    check(elmo, "--device_target CPU --data_url D --heldout H --vocab_path V --options_path O --train_url T"
          " --epoch_num 3 --steps 4 --lr 0.5 --batch-size 6 --seed 7 --log-every 8 --save-every 9 --weights W",
          command="train", device="CPU", data="D", heldout="H", vocab="V", options="O", out="T", n_epochs=3, steps=4,
          learning_rate=0.5, batch_size=6, seed=7, log_every=8, save_every=9, weights="W")
    check(data, "--input_file a b --output_file O --vocab_path V --heldout H",
          input=["a", "b"], output="O", vocab="V", heldout="H")
    check(elmo, "", command="train", device="Ascend", data="train.mindrecord", out="model", vocab="vocab", heldout=None)
    check(data, "", vocab=os.path.join(HERE, "vocab"))
    for name in ("heldout.mindrecord", "vocab"):
        write(name, "")
    check(elmo, "train", heldout="heldout.mindrecord")
    check(elmo, "test", data="heldout.mindrecord")
    check(data, "", vocab="vocab")


@pytest.mark.parametrize("program", [data, elmo])
def test_help_explains_every_flag(program, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    out, flags = capsys.readouterr().out, set(re.findall(r'"(--[a-z_-]+)"', inspect.getsource(program)))
    assert end.value.code == 0 and len(flags) > 8 and all(flag in out for flag in flags - {"--help"})


def test_a_machine_without_ascend_is_told_of_the_cpu(monkeypatch):
    monkeypatch.setattr(ms, "set_device", mock.Mock(side_effect=RuntimeError("many\nlines")))
    assert re.search("Ascend.*--device CPU", fail("train"))


# ---- 20. README ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def readme_programs(files, beside, tmp_path_factory):
    """The README's programs, and the jobs that run them, beside small files in place of those that they name."""
    folder, rng = tmp_path_factory.mktemp("readme"), np.random.default_rng(0)
    for path, name in ((files.options, "brown_options.json"), (files.weights, "brown.hdf5")):
        shutil.copy(path, folder)
        shutil.copy(path, folder / name)
    for name, n in (("train", 20), ("valid", 2), ("test", 2)):  # in place of CoNLL-2003
        write(folder / "conll" / f"{name}.txt", "-DOCSTART- -X- -X- O\n\n" + n * (
            "EU NNP B-NP B-ORG\nleft VBD B-VP O\nNew NNP B-NP B-LOC\nYork NNP I-NP I-LOC\n. . O O\n\n"))
    for name, n in (("train_12k", 20), ("heldout", 2400)):  # in place of Brown and its vectors
        text = rng.choice(["play/nn", "play/vb-hl", "the/at", "1\\/2/cd", "new/jj"], (n, 40))
        write(folder / "brown" / f"{name}.tagged", "\n".join(map(" ".join, text)))
        write(folder / f"{name}.txt", "\n".join(" ".join(t.rpartition("/")[0] for t in line) for line in text))
        elmo.write_arrays(str(folder / f"{name}.npz"), ((str(k), rng.normal(size=(3, 40, 6))) for k in range(n)))
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return programs, [beside([sys.executable, write(folder / f"program{k}.py", program), "--epochs", "1"], folder,
                             PYTHONPATH=HERE) for k, program in enumerate(programs)]


def test_the_programs_of_the_readme_are_short_and_run_as_written(readme_programs):
    programs, jobs = readme_programs
    assert len(programs) >= 3 and "Classifier" in "".join(programs)
    assert all(program.count("\n") <= (25 if "Classifier" in program else 90) for program in programs)
    assert all([job.result() for job in jobs])


def test_the_commands_of_the_readme_are_understood():
    commands = re.findall(r"^ *python (data|elmo)\.py (.*?)(?: +#.*)?$", "\n".join(
        re.findall(r"```bash\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
    assert len(commands) > 8
    for program, arguments in commands:
        {"data": data, "elmo": elmo}[program].parse_arguments(arguments.replace("'", "").split())


def test_the_table_of_the_readme_says_where_the_paper_is():
    table = re.search(r"^\| paper \|.*\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    names = re.findall(r"`([\w.]+)`", "".join(row.split("|")[2] for row in table.splitlines()))
    assert len(names) > 8 and all(functools.reduce(getattr, name.split("."), elmo) for name in names)


# ---- 21. Malformed inputs: one clear line, and nothing is changed ----------------------------------------------------

WRONG_OPTIONS = [  # of an options file: a key, its value, and what is said of that key
    ("lstm.dim", "7", "is '7'"), ("lstm.dim", 7.5, "is 7.5"), ("lstm.dim", True, "is True"), ("dropout", 1.0, "is 1.0"),
    ("lstm.n_layers", 0, "is 0"), ("lstm.cell_clip", math.nan, "is nan"), ("lstm.use_skip_connections", 1, "is 1"),
    ("unroll_steps", -20, "is -20"), ("lstm.projection_dim", 13, "13 is more than there are filters"),
    ("char_cnn.n_characters", 100, "must be 261"), ("char_cnn.max_characters_per_token", 40, "must be 50"),
    ("bidirectional", False, "must be true"), ("char_cnn.activation", "gelu", "is 'gelu', but must be relu or tanh"),
    ("char_cnn.filters", "all", "is 'all', but must be"), ("char_cnn.filters", [1, 8], "is (1, 8), but must be"),
    ("char_cnn.filters", [[1]], "is ((1,),), but must be [[width, number], ...]"),
    ("char_cnn.filters", [[51, 8]], "is ((51, 8),), but must be [[width, number], ...] (tuples in Python), a width 1")]


@pytest.fixture(scope="module")
def bad(trained, files, exported, h5py):
    """A folder of things that cannot be used; the names in the table below are those in it. The run is ../model."""
    folder, words, corpus = trained.folder / "bad", trained.vocabulary.words, Path(trained.corpus.path).read_bytes()
    for name in ("run", "begun", "best_only", "no_run", "arguments", "clip", "swapped", "pickle"):  # to be spoilt
        shutil.copytree(trained.model, folder / name)
    for name in ("links", "pipes"):
        (folder / name).mkdir()
    os.symlink("../other", folder / "links" / "up")
    os.mkfifo(folder / "pipes" / "pipe")
    compressed, special = gzip.compress(b"the cat\n" * 999), "<S>\n</S>\n<UNK>\n"
    for name, content in {
            "fine.txt": "a b\n", "empty.txt": "", "blank.txt": "\n \n", "latin1.txt": "a b\nnaïve\n".encode("latin-1"),
            "utf16.txt": "the cat\n".encode("utf-16-le"), "plain.gz": "the cat\n", "cut.gz": compressed[:-9],
            "flipped.gz": flipped(compressed, 20), "no_special": "the\ncat\n", "repeats": special + "b\na\nb",
            "gap": special + "\nb", "space": special + "b 5", "other/vocab": special + "the\ncat\n",
            "swapped/vocab": "\n".join(words[:3] + words[:2:-1]), "beside.db": "precious", "alone": corpus,
            "moved": corpus, "moved.db": Path(trained.corpus.path + ".db").read_bytes(),
            "no_softmax.hdf5": Path(files.weights).read_bytes(), "cut.hdf5": exported.read_bytes()[:5000],
            "brace.json": "{", "list.json": "[]", "deep.json": "[" * 100_000, "bytes.json": b"\xff\xfe"}.items():
        write(folder / name, content)
    for name, key, value in (
            *((f"wrong{k}", key, value) for k, (key, value, _) in enumerate(WRONG_OPTIONS)), ("lacks", "lstm", {}),
            ("number", "char_cnn", 5), ("dim8", "lstm.dim", 8), ("one_layer", "lstm.n_layers", 1),
            ("no_highway", "char_cnn.n_highway", 0), ("negatives", "n_negative_samples_batch", 10_000),
            ("clip/options", "lstm.cell_clip", 9), ("no_run/options", "run", {}),
            ("arguments/options", "run.arguments", 5)):
        content, (*outer, last) = json.loads((trained.model / "options.json").read_text()), key.split(".")
        functools.reduce(dict.get, outer, content)[last] = value
        write(folder / f"{name}.json", content)
    for name, key, array in (
            ("float64", "char_embed", np.zeros((261, 4))), ("null", "char_embed", h5py.Empty("f")),
            ("nan", "char_embed", np.float32(260 * [4 * [0]] + [4 * [np.nan]])), ("lacking", "other", 0),
            ("inf", "char_embed", np.float32(260 * [4 * [0]] + [4 * [np.inf]])), ("group", "char_embed/deeper", 0)):
        shutil.copyfile(exported, folder / f"{name}.hdf5")
        with h5py.File(folder / f"{name}.hdf5", "r+") as file:
            del file["char_embed"]
            file[key] = array
    for file in (folder / "begun" / "best.npz", *(folder / "best_only").glob("step-*")):
        file.unlink()
    for file in (folder / "run").glob("*.npz"):
        os.truncate(file, 999)
    np.savez(folder / "pickle" / "best.npz", char_embed=np.array([print, {}], dtype=object))
    return folder


def each(command, flag, errors):
    """{error: names} -> {command with the flag and a name: the name, error}. Of a flag given twice the last counts."""
    return {f"{command} {flag} {name}": name + error for error, names in errors.items() for name in names.split()}


CONVERT = "data --vocab ../vocab --output new.mindrecord"
FINE = CONVERT + " --input fine.txt"
TRAIN = "elmo train --device CPU --data ../train.mindrecord --vocab ../vocab --options ../options.json --out new"
TEST = "elmo test --device CPU --data ../heldout.mindrecord"
RESUME = "elmo train --device CPU --out ../model --resume"
EMBED = "elmo embed --device CPU --input fine.txt --output new.npz"
RUN, WEIGHTS = " --out ../model", " --options ../elmo_options.json --weights ../elmo_weights.hdf5"
MALFORMED = {
    # Text and what is made of it
    **each(CONVERT, "--input", {
        ": no such file": "gone.txt", ": an empty file": "empty.txt", ": line 2 is not UTF-8": "latin1.txt",
        ": line 1 holds zero bytes": "utf16.txt", ": damaged gzip file": "plain.gz cut.gz flipped.gz",
        "/up: neither a file nor a folder": "links", "/pipe: neither a file nor a folder": "pipes"}),
    **each(EMBED + RUN, "--input", {": No such file": "gone.txt", ": is empty": "empty.txt"}),
    CONVERT + " --input blank.txt": "new.mindrecord: no sentence", TRAIN + " --heldout gone": "gone: no such file",
    FINE + " --heldout h --heldout-share 1e-6": "h: no sentence",
    **each(FINE, "--vocab", {
        ": No such file": "gone", ": lines 1 to 3 must be <S> </S> <UNK>": "no_special",
        ": line 4 is blank or holds white space": "gap space", ": line 6 repeats 'b' of line 4": "repeats"}),
    FINE + " --build-vocab --vocab v --min-count 9": "--min-count 9: no word",
    **each(TRAIN, "--data", {
        ": no such file": "gone", ".db: no such file": "alone", ": was written as train.mindrecord": "moved"}),
    # Options
    **each(TRAIN, "--options", {
        ": No such file": "gone.json", ": not JSON": "brace.json list.json deep.json bytes.json",
        ": lacks lstm.n_layers": "lacks.json", ": lacks char_cnn.filters": "number.json",
        **{f": {key} {error}": f"wrong{k}.json" for k, (key, _, error) in enumerate(WRONG_OPTIONS)}}),
    TRAIN + " --options negatives.json": "fewer than n_negative_samples_batch, 10,000",
    TRAIN + " --batch-size 1000": "are less than one batch of 1000 × 2 = 2,000", TRAIN + " --epochs 0": "n_epochs is 0",
    TRAIN + " --batch-size 70000": "batch_size is 70000", TRAIN + " --lr nan": "learning_rate is nan",
    # Weights
    **each(TRAIN, "--weights", {
        ": no such file": "gone.hdf5", ": char_embed holds numbers that are not finite": "nan.hdf5 inf.hdf5",
        ": damaged, or not such a file": "cut.hdf5 null.hdf5", ": has no array char_embed": "lacking.hdf5 group.hdf5",
        ": char_embed is float64 [261, 4], but these options ask for float32": "float64.hdf5"}),
    TEST + WEIGHTS + " --vocab ../vocab --weights no_softmax.hdf5": "no_softmax.hdf5: has no array softmax/W",
    TEST + WEIGHTS + " --vocab other/vocab": "elmo_weights.hdf5: softmax/W is float32",
    TRAIN + WEIGHTS + " --options dim8.json": "W_0 is float32 [10, 28], but these options ask for float32 [10, 32]",
    EMBED + WEIGHTS + " --options one_layer.json": "Cell1/LSTMCell/B, which these options do not ask for",
    EMBED + WEIGHTS + " --options no_highway.json": "holds CNN_high_0/W_carry, which these options do not ask for",
    # Runs
    **each(TRAIN, "--out", {
        ": is not empty": "../model", ": File exists": "fine.txt", "/vocab: exists and is another than": "other"}),
    **each(RESUME, "--out", {
        ": no run to resume": "new", "/options.json: damaged": "no_run arguments", ": all of its checkpoints": "run",
        ": has best.npz, but no checkpoint": "best_only", "/step-97.npz: was trained with another options": "clip"}),
    RESUME + " --lr 0.5": "learning_rate 0.2, not 0.5", RESUME + " --batch-size 4": "batch_size 12, not 4",
    RESUME + " --seed 1": "run.seed 0, not 1", RESUME + " --amp float16": "run.amp None, not 'float16'",
    RESUME + " --options dim8.json": "lstm.dim 7, not 8", RESUME + " --size tiny": "batch of 128 × 20",
    RESUME + " --weights no_softmax.hdf5": "run.weights None, not '", RESUME + " --epochs 1": "n_epochs 2, not 1",
    RESUME + " --data ../heldout.mindrecord": "run.data", RESUME + " --vocab swapped/vocab": "run.vocabulary",
    RESUME + " --heldout ../train.mindrecord": "run.heldout",
    **each(TEST, "--out", {
        ": no such folder; train with --out gone first": "gone", "/best.npz: no such file; train with": "other",
        "/best.npz: damaged": "run pickle", "/best.npz: was trained with another options.json or": "clip swapped"}),
    **each(EMBED, "--out", {"/best.npz: was trained with another options.json": "clip",
                            "/best.npz: no such file; it is written at the end of an epoch": "begun"}),
    # Outputs
    **each(FINE, "--output", {
        ": exists; choose another name or say --overwrite": "../heldout.mindrecord", ".db: exists": "beside",
        ": its folder does not exist": "gone/x", ": exists, and is not a file": "."}),
    **each(FINE, "--overwrite --output", {": is an input": "fine.txt ../vocab"}),
    FINE + " --output h --heldout ./h": "./h: is an input or another output of this command",
    **each(FINE, "--build-vocab --vocab", {
        ": exists": "../vocab", ": is an input or": "new.mindrecord", ": --build-vocab does not compress": "v.gz"}),
    FINE + " --build-vocab --overwrite --vocab ../model/vocab": "../model/vocab: belongs to a training run",
    **each(FINE, "--heldout", {": a name that MindRecord does not take": "a&b " + "x" * 201}),
    FINE + " --output 'new '": "new : a name that MindRecord does not take",
    **each(EMBED, "--output", {": exists": "nan.hdf5", ": the name must end in .npz or .hdf5": "new.txt",
                               ": belongs to a training run": "begun/step-999.npz"}),
    EMBED + RUN + " --overwrite --output ../model/best.npz": "../model/best.npz: is an input",
    EMBED + WEIGHTS + " --overwrite --output ../elmo_weights.hdf5": "../elmo_weights.hdf5: is an input",
    "elmo export --device CPU --overwrite --weights ../model/best.npz": "best.npz: the name must end in .hdf5",
    "elmo export --device CPU --out ../model --weights ../elmo.hdf5": "../elmo_options.json: exists",
    # Flags
    FINE + " --what": "unrecognized arguments: --what", FINE + " --output ''": "--output/--output_file: an empty path",
    FINE + " --output a\udcff": "--output_file: a name that is not UTF-8", "elmo fly": "unrecognized arguments: fly",
    FINE + " --min-count 0": "argument --min-count: '0' is not a whole number, 1 or more",
    **{FINE + flag: "--min-count and --max-vocab go with" for flag in (" --min-count 2", " --max-vocab 2")},
    FINE + " --heldout h --heldout-share 1": "--heldout-share X goes with --heldout, 0 < X < 1",
    FINE + " --heldout-share 0.5": "--heldout-share X goes with", TEST + " --vocab v": "--vocab goes with --weights",
    **{TEST + flag: "--weights and --options go" for flag in (" --weights w", " --options o")},
    TRAIN + " --device TPU": "argument --device/--device_target: invalid choice: 'TPU'",
    TRAIN + " --amp float8": "argument --amp: invalid choice", TRAIN + " --seed -1": "argument --seed: '-1' is not",
    TRAIN + " --steps -1": "argument --steps: '-1' is not", TRAIN + " --out ''": "--train_url: an empty path",
    TRAIN + " --size tiny": "--size and --options exclude each other", "elmo export": "are required: --weights",
    TEST + RUN + WEIGHTS: "--out and --weights exclude each other", "elmo embed --output x": "are required: --input",
    EMBED + " --resume": "unrecognized arguments: --resume",
}


@pytest.mark.parametrize("command, error", MALFORMED.items(), ids=[
    re.sub(r"[^\w.-]+", "_", f"{command.split()[0]}_{error}")[:70] for command, error in MALFORMED.items()])
def test_a_malformed_input_is_one_clear_line_and_changes_nothing(trained, bad, monkeypatch, command, error):
    monkeypatch.chdir(bad)
    shutil.rmtree("new", ignore_errors=True)  # where a test before this one failed
    (program, *arguments), before = shlex.split(command), tree(trained.folder)
    assert error in fail(*arguments, program={"data": data, "elmo": elmo}[program])
    assert tree(trained.folder) == before
