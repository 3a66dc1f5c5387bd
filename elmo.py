"""ELMo in one file: "Deep contextualized word representations" (Peters et al., NAACL 2018) in MindSpore.

    python data.py  --input corpus/              text to train.mindrecord
    python elmo.py  --device Ascend              train the paper's biLM on it
    python elmo.py  embed --input sentences.txt --output vectors.npz

The paper                                        The machinery around it
  1. Options (section 3.4)                         7. Published options and weights
  2. Character CNN (3.1, 3.4)                      8. One training step
  3. LSTM with projection (3.1)                    9. A run and its checkpoints
  4. Bidirectional language model (3.1)           10. Train, test, embed
  5. Softmax, full and sampled (3.1)              11. Command line
  6. ELMo: the scalar mix (3.2, equation 1)

For readers of PyTorch: in MindSpore an nn.Cell is a Module and construct its forward; ms.jit compiles a function to a
static graph; bprop(inputs ..., out, dout) is a cell's own backward pass, which returns a gradient for each input.
"""
import argparse
import contextlib
import errno
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np

from data import (MAX_CHARS, SPECIAL, ArgumentParser, Corpus, InputError, Rows, Slots, Vocabulary, ahead, char_ids,
                  natural, training_batches)  # before mindspore, whose log it quiets
import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

# ---------------------------------------------------------------------------------------------------------
# 1. Options: every hyperparameter of the paper's model
# ---------------------------------------------------------------------------------------------------------


def option(place, default, *valid):
    """A field of `Options`: its place in the published JSON, its least and greatest value (False and True are such,
    too), or all of its values where they are strings."""
    return field(default=default, metadata={"place": place, "valid": valid})


@dataclass(frozen=True)
class Options:
    """The hyperparameters; the defaults are the paper's ("original")."""
    # "The context insensitive type representation uses 2048 character n-gram convolutional filters followed by two
    # highway layers ... and a linear projection down to a 512 representation." (section 3.4)
    filters: tuple = option("char_cnn.filters", (  # [width in characters, number of filters]
        (1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)))
    char_dim: int = option("char_cnn.embedding.dim", 16, 1, 1024)
    activation: str = option("char_cnn.activation", "relu", "relu", "tanh")
    n_highway: int = option("char_cnn.n_highway", 2, 0, 16)
    # "The final model uses L = 2 biLSTM layers with 4096 units and 512 dimension projections and a residual connection
    # from the first to second layer." (section 3.4)
    n_layers: int = option("lstm.n_layers", 2, 1, 16)
    dim: int = option("lstm.dim", 4096, 1, 65536)
    projection: int = option("lstm.projection_dim", 512, 1, 65536)
    use_skip_connections: bool = option("lstm.use_skip_connections", True, False, True)
    # What follows is not in the paper but in its reference code, bilm-tf; what is about training may be lacking in a
    # file of published options.
    cell_clip: float = option("lstm.cell_clip", 3.0, 0.01, 1e9)  # |c| of an LSTM never exceeds this,
    proj_clip: float = option("lstm.proj_clip", 3.0, 0.01, 1e9)  # and |h| not this
    dropout: float = option("dropout", 0.1, 0.0, 0.99)
    batch_size: int = option("batch_size", 128, 1, 65536)        # rows of text, read side by side
    unroll_steps: int = option("unroll_steps", 20, 1, 1024)      # tokens of each row in a step; state goes on
    sample_softmax: bool = option("sample_softmax", True, False, True)  # False: the full softmax
    n_negative_samples_batch: int = option("n_negative_samples_batch", 8192, 1, 1 << 24)
    all_clip_norm_val: float = option("all_clip_norm_val", 10.0, 1e-9, 1e9)  # of the gradient's global norm
    learning_rate: float = option("learning_rate", 0.2, 1e-9, 1e9)           # of Adagrad
    n_epochs: int = option("n_epochs", 10, 1, 1 << 20)           # "After training for 10 epochs" (section 3.4)
    n_tokens_vocab: int = option("n_tokens_vocab", 0, 0, 1 << 30)  # the vocabulary file decides; 0: not known


SIZES = {"tiny": Options(filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)), n_highway=1, dim=256, projection=64,
                         n_negative_samples_batch=1024, learning_rate=0.1),  # 0.2 goes astray on little text
         "small": Options(n_highway=1, dim=1024, projection=128),
         "medium": Options(n_highway=1, dim=2048, projection=256),
         "original": Options()}


# ---------------------------------------------------------------------------------------------------------
# 2. Character CNN: a word's characters to a context-independent token representation x_k
# ---------------------------------------------------------------------------------------------------------

BEYOND = 262  # a place after a token's 50 characters, which no filter may reach


class MaxOverTime(nn.Cell):
    """A convolution and its maximum over the positions, m[n, f] = max_t  x[t, n] · kernel[:, f].

    x [positions, words, window], kernel [window, filters] -> m [words, filters].
    The scores of all positions at once would be by far the largest tensor of the model; position by position, each
    is small enough for the processor's cache. The backward pass asks for them again (the compiler decides whether they
    were kept) and knows the position that won by its equality with the maximum: the same product has the same bits.
    """

    def __init__(self, amp=None):
        super().__init__()
        self.matmul, self.matmul_nt, self.matmul_tn = matmuls(amp)

    def construct(self, x, kernel):
        x = ops.unstack(x)
        m = self.matmul(x[0], kernel)
        for x_t in x[1:]:
            m = ops.maximum(m, self.matmul(x_t, kernel))
        return m

    def bprop(self, x, kernel, m, dm):
        dx, dkernel = (), ops.zeros_like(kernel)
        for x_t in ops.unstack(x):
            won = ops.select(self.matmul(x_t, kernel) == m, dm, ops.zeros_like(dm))
            dm = dm - won  # a tie is won by its first position alone
            dx += (self.matmul_nt(won, kernel),)
            dkernel = dkernel + self.matmul_tn(x_t, won)
        return ops.stack(dx), dkernel


class CharEncoder(nn.Cell):
    """x_k, the context-independent representation of a word (sections 3.1 and 3.4): its characters' embeddings -> CNN
    -> maximum over time -> highway layers -> projection."""

    def __init__(self, options, rng, amp=None):
        super().__init__()
        o, n = options, sum(number for _, number in options.filters)
        uniform = lambda limit, *shape: rng.uniform(-limit, limit, shape)
        normal = lambda fan_in, *shape: rng.normal(0, math.sqrt(1 / fan_in), shape)
        self.filters, self.relu = o.filters, o.activation == "relu"
        self.width = max(width for width, _ in o.filters)
        self.char_embed = new_parameter("char_embed", uniform(1.0, 261, o.char_dim))
        self.W_cnn = new_parameters("CNN/W_cnn_{}", [
            uniform(0.05, 1, w, o.char_dim, k) if self.relu else normal(w * o.char_dim, 1, w, o.char_dim, k)
            for w, k in o.filters])
        self.b_cnn = new_parameters("CNN/b_cnn_{}", [np.zeros(k) for _, k in o.filters])
        highways = range(o.n_highway)
        self.W_carry = new_parameters("CNN_high_{}/W_carry", [normal(n, n, n) for _ in highways])
        self.b_carry = new_parameters("CNN_high_{}/b_carry", [np.full(n, -2.0) for _ in highways])
        self.W_transform = new_parameters("CNN_high_{}/W_transform", [normal(n, n, n) for _ in highways])
        self.b_transform = new_parameters("CNN_high_{}/b_transform", [np.zeros(n) for _ in highways])
        self.projection = ms.ParameterTuple([new_parameter("CNN_proj/W_proj", normal(n, n, o.projection)),
                                             new_parameter("CNN_proj/b_proj", np.zeros(o.projection))])
        self.max_over_time, self.matmul = MaxOverTime(amp), MatMul(amp)

    def construct(self, *groups):
        """Groups of words, int32 [words, 50] each (see data.char_ids) -> [words of all groups, projection].

        A group of words of at most s characters may come as [words, s + widest filter]: every further window of
        theirs would hold padding only, as the last one left does, so that the maximum is the same.
        """
        kernel = self.kernel()
        x = ops.concat([self.max_over_time(self.windows(chars), kernel) for chars in groups])
        x = x + ops.concat(list(self.b_cnn))  # monotonic as the activation is, so that the maximum may come first
        x = ops.relu(x) if self.relu else tanh(x)  # [words, filters]
        # Highway layers (Srivastava et al., 2015). g lets the transformed x pass, whatever the name of its weights in
        # the published files; its bias begins at -2, so that x at first is carried through.
        for W_c, b_c, W_t, b_t in zip(self.W_carry, self.b_carry, self.W_transform, self.b_transform):
            g = ops.sigmoid(self.matmul(x, W_c) + b_c)
            x = g * ops.relu(self.matmul(x, W_t) + b_t) + (1 - g) * x  # [words, filters]
        W, b = self.projection
        return self.matmul(x, W) + b  # [words, projection]

    def windows(self, chars):
        """The embedded characters that the filters see at each position, [positions, words, window], each with a mark:
        1 where it is beyond the token's 50 characters, else 0."""
        if chars.shape[1] == MAX_CHARS:
            chars = ops.pad(chars, (0, self.width - 1), value=BEYOND)
        words, positions = chars.shape[0], chars.shape[1] - self.width + 1
        zero = ops.zeros((1, self.char_embed.shape[1]), ms.float32)  # row 0, a masked character, and BEYOND
        marks = Tensor((np.arange(BEYOND + 1) == BEYOND).astype(np.float32)[:, None])
        table = ops.concat((ops.concat((zero, self.char_embed, zero)), marks), 1)  # [characters, char_dim + 1]
        chars = ops.stack([chars.T[k:k + positions] for k in range(self.width)], -1)  # [positions, words, width]
        return ops.gather(table, chars, 0).reshape(positions, words, -1)

    def kernel(self):
        """All filters side by side, [window, filters]. Each is as wide as the widest: its further rows are zero. Its
        own rows weigh the marks of `windows` with -1e4, so that no position where it reaches beyond the token wins.
        """
        kernel = ()
        for (width, number), W in zip(self.filters, self.W_cnn):
            out_of_reach = ops.full((width, 1, number), -1e4, dtype=ms.float32)
            unused = ops.zeros((self.width - width, W.shape[2] + 1, number), ms.float32)
            kernel += (ops.concat((ops.concat((W[0], out_of_reach), 1), unused)).reshape(-1, number),)
        return ops.concat(kernel, 1)


def tanh(x):
    return 2 * ops.sigmoid(2 * x) - 1  # MindSpore's tanh is off by up to 1e-4 on the CPU, beyond |x| = 4


class MatMul(nn.Cell):
    """x · y, either of them transposed on request; float32 in, float32 out.

    With `amp`, "float16" or "bfloat16", x and y are rounded to that type and multiplied in it. On the CPU, where that
    is slow or cannot be done, the rounded numbers are multiplied as float32. A primitive and not ops.matmul, whose
    gradient would write out transposed copies.
    """

    def __init__(self, amp=None, transpose_x=False, transpose_y=False):
        super().__init__()
        self.matmul, self.amp = ops.MatMul(transpose_x, transpose_y), amp and getattr(ms, amp)
        self.multiplied_as = ms.float32 if ms.get_context("device_target") == "CPU" else self.amp

    def construct(self, x, y):
        if self.amp is None:
            return self.matmul(x, y)
        x, y = x.astype(self.amp).astype(self.multiplied_as), y.astype(self.amp).astype(self.multiplied_as)
        return self.matmul(x, y).astype(ms.float32)


def matmuls(amp=None):
    """x · y, x · yᵀ and xᵀ · y."""
    return MatMul(amp), MatMul(amp, transpose_y=True), MatMul(amp, transpose_x=True)


def new_parameter(name, array):
    return Parameter(Tensor(np.asarray(array, np.float32)), name=name)


def new_parameters(names, arrays):
    return ms.ParameterTuple([new_parameter(names.format(k), array) for k, array in enumerate(arrays)])


# ---------------------------------------------------------------------------------------------------------
# 3. LSTM with projection
# ---------------------------------------------------------------------------------------------------------


class ProjectedLSTM(nn.Cell):
    """One direction of one layer over a window of time steps: the LSTM of section 3.1, its output projected (Sak et
    al., 2014). The forget gate's + 1 and the clips are bilm-tf's.

        i, j, f, o = [x_t, h] · kernel + bias        (input gate, candidate, forget gate, output gate)
        c = clip(sigmoid(f + 1) · c + sigmoid(i) · tanh(j))
        h = clip((sigmoid(o) · tanh(c)) · projection)

    x [time, batch, input], h [batch, projection], c [batch, dim], kernel [input + projection, 4 dim],
    bias [4 dim], projection [dim, projection] -> h of every step [time, batch, projection], and again as a tuple; c of
    every step, a tuple of [batch, dim]; what the backward pass needs. Only the first has a gradient, which does not go
    back beyond the window. The own backward pass forms the gradient of each weight as one product over all steps.
    """

    def __init__(self, cell_clip, proj_clip, amp=None):
        super().__init__()
        self.cell_clip, self.proj_clip, self.bias_add = cell_clip, proj_clip, ops.BiasAdd()
        self.matmul, self.matmul_nt, self.matmul_tn = matmuls(amp)

    def construct(self, x, h, c, kernel, bias, projection):
        inputs, hs, cs, gates = (), (), (), ()
        for x_t in ops.unstack(x):
            x_h = ops.concat((x_t, h), 1)  # [batch, input + projection]
            z = self.bias_add(self.matmul(x_h, kernel), bias)
            i, j, f, o = ops.split(z, c.shape[1], 1)  # [batch, dim] each
            i, j, f, o = ops.sigmoid(i), tanh(j), ops.sigmoid(f + 1.0), ops.sigmoid(o)
            c = ops.clamp(f * c + i * j, -self.cell_clip, self.cell_clip)
            u = tanh(c)
            m = o * u
            h = ops.clamp(self.matmul(m, projection), -self.proj_clip, self.proj_clip)
            inputs, hs, cs, gates = inputs + (x_h,), hs + (h,), cs + (c,), gates + ((i, j, f, o, u, m),)
        return ops.stack(hs), hs, cs, (inputs, gates)

    def bprop(self, x, h, c, kernel, bias, projection, out, dout):
        time, batch, size = x.shape
        _, hs, cs, (inputs, gates) = out
        dhs, dh, dc = ops.unstack(dout[0]), ops.zeros_like(h), ops.zeros_like(c)
        dxs, dzs, dps = (), (), ()
        for t in range(time - 1, -1, -1):
            i, j, f, o, u, m = gates[t]
            before = cs[t - 1] if t else c
            dh = dhs[t] + dh
            dp = ops.select(ops.abs(hs[t]) < self.proj_clip, dh, ops.zeros_like(dh))  # through the clip of h
            dm = self.matmul_nt(dp, projection)
            dc = dc + dm * o * (1 - u * u)  # m = o · u, u = tanh(c)
            dc = ops.select(ops.abs(cs[t]) < self.cell_clip, dc, ops.zeros_like(dc))  # through the clip of c
            # of the four gates before their sigmoids and the candidate before its tanh
            dz = ops.concat((dc * i * j * (1 - i), dc * i * (1 - j * j), dc * f * before * (1 - f),
                             dm * o * u * (1 - o)), 1)  # [batch, 4 dim]
            dx_h = self.matmul_nt(dz, kernel)  # [batch, input + projection]
            dc, dh = dc * f, dx_h[:, size:]
            dxs, dzs, dps = (dx_h[:, :size],) + dxs, (dz,) + dzs, (dp,) + dps
        dz = ops.concat(dzs)  # [time · batch, 4 dim]
        dbias = self.matmul(ops.ones((1, time * batch), dz.dtype), dz)[0]  # as a product, twice as fast as dz.sum(0)
        m = ops.concat([gate[-1] for gate in gates])
        return (ops.stack(dxs), ops.zeros_like(h), ops.zeros_like(c),
                self.matmul_tn(ops.concat(inputs), dz), dbias, self.matmul_tn(m, ops.concat(dps)))


# ---------------------------------------------------------------------------------------------------------
# 4. Bidirectional language model
# ---------------------------------------------------------------------------------------------------------


class BiLM(nn.Cell):
    """"We tie the parameters for both the token representation (Θx) and Softmax layer (Θs) in the forward and backward
    direction while maintaining separate parameters for the LSTMs in each direction" (section 3.1): the character
    encoder and two times L layers of LSTMs; for Θs see `Softmax`.

    options: an `Options`, or the path of a published options file; weight_file: published weights (.hdf5), or
    None for the initial values of training, drawn from `seed`; amp: the type of the matrix products' operands, see
    `MatMul`. Stateless: each call begins afresh.
    """

    def __init__(self, options, weight_file=None, seed=0, amp=None):
        super().__init__()
        self.options = o = options if isinstance(options, Options) else read_options(options)
        rng = np.random.default_rng(seed)
        self.encoder = CharEncoder(o, rng, amp)
        glorot = lambda m, n: rng.uniform(-math.sqrt(6 / (m + n)), math.sqrt(6 / (m + n)), (m, n))
        weights = []  # kernel, bias and projection of layer 0 forward, layer 0 backward, layer 1 forward, ...
        for layer, direction in itertools.product(range(o.n_layers), range(2)):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
            weights += [new_parameter(cell + "W_0", glorot(2 * o.projection, 4 * o.dim)),
                        new_parameter(cell + "B", np.zeros(4 * o.dim)),
                        new_parameter(cell + "W_P_0", glorot(o.dim, o.projection))]
        self.weights = ms.ParameterTuple(weights)
        self.lstm = ProjectedLSTM(o.cell_clip, o.proj_clip, amp)
        self.begin, self.end = (Tensor(char_ids(word)).reshape(1, 1, -1) for word in SPECIAL[:2])
        if weight_file is not None:
            load_weights(weight_file, self)

    def construct(self, ids, state=None):
        """ids int32 [batch, tokens, 50] from `data.batch_to_ids` -> (layers, mask, state).

        layers: R_k = {h_k,j | j = 0, ..., L} (section 3.2), each [batch, tokens, 2 · projection], forward beside
        backward; h_k,0 is the token representation twice. mask: bool [batch, tokens], where there is a token. state
        [2, layers, batch, projection + dim]: the LSTMs' after each sentence's end, through which no gradient flows;
        give it to the next call only if its sentences are to be read as going on from these. <S> and </S> are added,
        and left out of the result.
        """
        o = self.options
        batch, tokens, _ = ids.shape
        ids = ops.concat((self.begin.tile((batch, 1, 1)), ids, ops.zeros((batch, 1, MAX_CHARS), ms.int32)), 1)
        filled = (ids > 0).any(-1)  # [batch, tokens + 2]
        mask, lengths = filled[:, 1:-1], filled.astype(ms.int32).sum(1).astype(ms.int32) + 1  # the sum is int64
        is_end = ops.arange(tokens + 2).reshape(1, -1, 1) == (lengths - 1).reshape(-1, 1, 1)
        ids = ops.where(is_end, self.end, ids)  # </S> right behind each sentence, [batch, tokens + 2, 50]
        x = self.encoder(ids.reshape(-1, MAX_CHARS)).reshape(batch, tokens + 2, -1)
        both = ops.stack((x, ops.reverse_sequence(x, lengths, 1, 0))).swapaxes(1, 2)  # [2, time, batch, projection]
        state = zero_state(o, batch) if state is None else state
        (forward, backward), state = self.contextualize(both, state, lengths=lengths)
        layers = [ops.concat((x, x), -1)]
        for f, b in zip(forward, backward):
            b = ops.reverse_sequence(b.swapaxes(0, 1), lengths, 1, 0)
            layers.append(ops.concat((f.swapaxes(0, 1), b), -1))  # [batch, time, 2 · projection]
        return [layer[:, 1:-1] * mask[:, :, None].astype(layer.dtype) for layer in layers], mask, state

    def token_representations(self, chars, words, slots):
        """Encodes each distinct word of a batch once: chars int32 [slots, 50], in the tiers of `data.Slots`, so that
        short words come with few characters; words int32 [...], the slot of the word that stands there -> [...,
        projection]."""
        groups, first = [], 0
        for number, longest in slots.tiers[:-1]:
            groups.append(chars[first:first + number, :longest + self.encoder.width])
            first += number
        return ops.gather(self.encoder(*groups, chars[first:]), words, 0)

    def contextualize(self, x, state, keep=None, lengths=None):
        """The LSTM layers over one window -> h_1 ... h_L of each direction, [time, batch, projection]; the new state.

        x [2, time, batch, projection], direction 1 in its own reading order; state [2, layers, batch, projection +
        dim], h beside c; keep[layer][direction], bool [time, batch, projection], drops that layer's input; with
        lengths, int32 [batch], the new state is that after each row's length, else after the last step.
        """
        o, outputs, states = self.options, [], []
        for direction, (y, state_d) in enumerate(zip(ops.unstack(x), ops.unstack(state))):  # x[0] is slow, unstack not
            layers = []
            for layer, state_l in enumerate(ops.unstack(state_d)):
                x_l = y if keep is None else drop(y, keep[layer][direction], o.dropout)
                h, c = ops.split(state_l, [o.projection, o.dim], 1)
                first = 3 * (2 * layer + direction)
                y, hs, cs, _ = self.lstm(x_l, h, c, *self.weights[first:first + 3])
                if layer > 0 and o.use_skip_connections:
                    y = y + x_l  # "a residual connection from the first to second layer" (3.4), and so on upwards
                layers.append(y)
                states.append(ops.concat((last(hs, lengths), last(cs, lengths)), 1))
            outputs.append(layers)
        return outputs, ops.stack(states).reshape(state.shape)


def last(steps, lengths):
    """Of a tuple of [batch, n], a step each, the last, or that of each row's length, -> [batch, n]."""
    if lengths is None:
        return steps[-1]
    return ops.gather_d(ops.stack(steps), 0, (lengths - 1).reshape(1, -1, 1).tile((1, 1, steps[0].shape[1])))[0]


def drop(x, keep, rate):
    return x * (keep.astype(x.dtype) * (1 / (1 - rate)))


# ---------------------------------------------------------------------------------------------------------
# 5. Softmax, full and sampled
# ---------------------------------------------------------------------------------------------------------


class LogSumExp(nn.Cell):
    """log Σ_k exp(y · W_k + b_k): y [n, projection], W [classes, projection], b [classes] -> [n].

    With its own backward pass, since the logits, [n, classes], are large, and adding something to each row or column
    of them is as slow as the product that makes them.
    """

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax()
        self.matmul, self.matmul_nt, self.matmul_tn = matmuls()

    def construct(self, y, W, b):
        x = self.matmul_nt(*self.with_bias(y, W, b))
        return x.max(axis=1) - ops.log(self.softmax(x).max(axis=1))  # x_k - log p_k, of any class k

    def bprop(self, y, W, b, out, dout):
        y, W = self.with_bias(y, W, b)
        p, dout = self.softmax(self.matmul_nt(y, W)), dout.reshape(-1, 1)
        dW = self.matmul_tn(p, dout * y)
        return dout * self.matmul(p, W)[:, :-1], dW[:, :-1], dW[:, -1]

    def with_bias(self, y, W, b):
        """The bias as one more column of W."""
        one = ops.ones((y.shape[0], 1), y.dtype)
        return ops.concat((y, one), 1), ops.concat((W, b.reshape(-1, 1)), 1)


class Softmax(nn.Cell):
    """"The top layer LSTM output ... is used to predict the next token t_k+1 with a Softmax layer" (section 3.1), of
    parameters Θs for both directions: W [classes, projection], b [classes], a class for each word of the vocabulary."""

    def __init__(self, classes, projection, seed=0):
        super().__init__()
        W = np.random.default_rng(seed).standard_normal((classes, projection), np.float32)
        self.W = new_parameter("softmax/W", W * np.float32(math.sqrt(1 / projection)))
        self.b = new_parameter("softmax/b", np.zeros(classes))
        self.logsumexp = LogSumExp()

    def construct(self, y, target):
        """-log p(target) under the full softmax: y [n, projection], target int32 [n] -> [n]."""
        at_once = max(1, 2 ** 25 // len(self.b))  # positions, so that the logits of a large vocabulary fit in memory
        logsumexp = ops.concat([self.logsumexp(y[k:k + at_once], self.W, self.b) for k in range(0, len(y), at_once)])
        return logsumexp - (y * self.W[target]).sum(1) - self.b[target]


class SampledSoftmaxLoss(nn.Cell):
    """Mean over the positions of log(exp t + Σ_k exp s_k) - t, with t the target's logit and s_k those of the drawn
    negatives (Jean et al., 2015); from both, the log of the class's expected count is subtracted.

    A target that was drawn too must not stand in the sum twice ("accidental hit"). There it has the very logit t,
    so that it is enough not to add exp t again.
    """

    def __init__(self):
        super().__init__()
        self.logsumexp = LogSumExp()

    def construct(self, y, W, b, target, drawn, target_log_q, drawn_log_q, undrawn):
        """y [n, projection], W [rows, projection], b [rows]; target [n] and drawn [N], numbers of rows, and the logs
        of their expected counts; undrawn bool [n], where the target is not among the drawn -> a scalar."""
        t = (y * W[target]).sum(1) + b[target] - target_log_q  # [n]
        s = self.logsumexp(y, W[drawn], b[drawn] - drawn_log_q)  # [n]
        m = ops.stop_gradient(ops.maximum(s, t))
        return (ops.log(ops.exp(s - m) + undrawn.astype(y.dtype) * ops.exp(t - m)) + m - t).mean()


# ---------------------------------------------------------------------------------------------------------
# 6. ELMo: a task-specific combination of the biLM's layers (section 3.2)
# ---------------------------------------------------------------------------------------------------------


class ScalarMix(nn.Cell):
    """Equation 1: ELMo_k = γ Σ_j s_j h_{k,j}, s = softmax(w).

    w and γ are trained with the task. "... to regularize the ELMo weights by adding λ‖w‖²₂ to the loss" (section 3.3)
    is one line of the task: `loss + lam * (mix.scalar_parameters ** 2).sum()`; section 5.1 compares λ = 1, nearly an
    average of the layers, with 0.001.
    """

    def __init__(self, mixture_size, do_layer_norm=False):
        super().__init__()
        self.do_layer_norm = do_layer_norm
        self.scalar_parameters = new_parameter("scalar_parameters", np.zeros(mixture_size))
        self.gamma = new_parameter("gamma", np.ones(1))

    def construct(self, layers):
        """layers: `mixture_size` tensors of one shape [..., n] -> [..., n]."""
        s = ops.softmax(self.scalar_parameters, 0)
        if self.do_layer_norm:
            layers = [layer_norm(h) for h in layers]
        return self.gamma * sum([s[j] * h for j, h in enumerate(layers)])


def layer_norm(h):
    """"... in some cases it also helped to apply layer normalization ... to each biLM layer before weighting" (section
    3.2): each token by itself, where AllenNLP takes one mean and variance of all tokens of the batch."""
    centered = h - h.mean(-1, keep_dims=True)
    return centered / ops.sqrt(ops.square(centered).mean(-1, keep_dims=True) + 1e-12)


class Elmo(nn.Cell):
    """ELMo vectors as a layer of a task's network (section 3.3), with the names of AllenNLP's `Elmo`.

    options_file, weight_file: published files; num_output_representations: how many mixes of the layers, each with
    its own s and γ; dropout: of the vectors, after `set_train()`; requires_grad: train the biLM too; do_layer_norm:
    see `layer_norm`. Unlike AllenNLP's it keeps no state between calls.
    """

    def __init__(self, options_file, weight_file, num_output_representations=1, dropout=0.5, requires_grad=False,
                 do_layer_norm=False):
        super().__init__()
        self.bilm = BiLM(options_file, weight_file)
        for p in self.bilm.get_parameters():
            p.requires_grad = requires_grad
        self.requires_grad = requires_grad
        mixes = [ScalarMix(self.bilm.options.n_layers + 1, do_layer_norm) for _ in range(num_output_representations)]
        self.scalar_mixes = nn.CellList(mixes)
        self.dropout = nn.Dropout(p=dropout)

    def construct(self, ids):
        """ids int32 [batch, tokens, 50] from `data.batch_to_ids` -> {'elmo_representations': one [batch, tokens,
        2 · projection] for each mix, 'mask': bool [batch, tokens]}."""
        layers, mask, _ = self.bilm(ids)
        if not self.requires_grad:  # "we first freeze the weights of the biLM" (3.3); there is no backward pass then
            layers = [ops.stop_gradient(layer) for layer in layers]
        return {"elmo_representations": [self.dropout(mix(layers)) for mix in self.scalar_mixes], "mask": mask}


# ---------------------------------------------------------------------------------------------------------
# 7. Published options and weights
# ---------------------------------------------------------------------------------------------------------


def read_options(path):
    """The `Options` of a published JSON file; InputError where it cannot be used."""
    content, values = read_json(path), {}
    for f in fields(Options):
        place, valid = f.metadata["place"], f.metadata["valid"]
        value = look_up(content, place)
        if value is not None:
            values[f.name] = tuple(map(tuple, value)) if f.name == "filters" and are_filters(value) else value
        elif "." in place:
            raise InputError(f"{path}: lacks {place}, which the model's shape depends on")
        if valid and value is not None and not is_valid(value, f.default, valid):
            raise InputError(f"{path}: {place} is {value!r:.40}, but must be " + (
                " or ".join(valid) if f.type is str else f"{valid[0]} to {valid[-1]}"))
    options = Options(**values)
    if not are_filters(options.filters):
        raise InputError(f"{path}: char_cnn.filters must be [[width, number], ...], a width 1 to {MAX_CHARS}")
    if options.projection > sum(number for _, number in options.filters):
        raise InputError(f"{path}: lstm.projection_dim {options.projection} is more than there are filters")
    for place, known in (("char_cnn.max_characters_per_token", (MAX_CHARS,)), ("char_cnn.n_characters", (261, 262))):
        if look_up(content, place) not in (None, *known):
            raise InputError(f"{path}: {place} must be {known[0]}, as in every published model")
    return options


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); mend it, or choose a --size") from None


def look_up(content, place):
    """The value at a.b.c of nested dictionaries, None where there is none."""
    for key in place.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def is_valid(value, default, valid):
    kind = type(default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        return False
    return value in valid if kind is str else valid[0] <= value <= valid[-1]


def are_filters(value):
    """Whether value is a list of [width, number], not empty."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int for n in pair)
        and 1 <= pair[0] <= MAX_CHARS and 1 <= pair[1] <= 65536 for pair in value)


def as_json(options, **run):
    """The published JSON format, as nested dictionaries; a run's folder adds what else the run consists of."""
    content = {"char_cnn": {"max_characters_per_token": MAX_CHARS, "n_characters": 262}}
    for f in fields(Options):
        *outer, key = f.metadata["place"].split(".")
        node = content
        for name in outer:
            node = node.setdefault(name, {})
        node[key] = getattr(options, f.name)
    return json.loads(json.dumps({**content, **({"run": run} if run else {})}))  # tuples become lists, as read back


def write_json(path, content):
    with written(path) as draft, open(draft, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def import_h5py(path):
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: .hdf5 files need h5py; install it with: pip install h5py") from None
    return h5py


def published_name(p):
    """A parameter's name in the published files: its own, less what the cells around it prefix."""
    return p.name.rpartition(".")[2]


def load_weights(path, cell, optional=False):
    """Reads a cell's parameters from a published .hdf5. InputError where one is missing or of another shape;
    with `optional`, False is returned where all are missing."""
    h5py = import_h5py(path)
    wanted = {published_name(p): p for p in cell.get_parameters()}
    try:
        with h5py.File(path, "r") as file:
            if optional and not any(name in file for name in wanted):
                return False
            for name, p in wanted.items():
                if not isinstance(file.get(name), h5py.Dataset):
                    raise InputError(f"{path}: has no dataset {name}, which these options ask for")
                if file[name].shape != p.shape or file[name].dtype != np.float32:
                    raise InputError(f"{path}: {name} is {file[name].dtype} {list(file[name].shape)}, but these "
                                     f"options ask for float32 {list(p.shape)}")
            for name, p in wanted.items():
                p.set_data(Tensor(file[name][...]))
    except InputError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {'no such file' if not os.path.exists(path) else 'not a readable HDF5 file'} "
                         f"({str(error).splitlines()[0]})") from None
    return True


def write_hdf5(path, arrays):
    """Writes (name, array) pairs as datasets, one by one."""
    h5py = import_h5py(path)
    with written(path) as draft, h5py.File(draft, "w") as file:
        for name, array in arrays:
            if shutil.disk_usage(os.path.dirname(path) or ".").free < (64 << 20) + array.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # HDF5 would crash
            file.create_dataset(name, data=array)


def export(args):
    """Writes a run's best weights as an .hdf5 that bilm-tf and AllenNLP read, and its options beside it."""
    options_file = re.sub(r"(_?weights)?\.(hdf5|h5)$", "", args.weights) + "_options.json"
    for path in (args.weights, options_file):
        refuse_existing(path, args.overwrite)
    bilm, softmax, _ = open_model(args)
    everything = [*bilm.get_parameters(), *softmax.get_parameters()]
    write_hdf5(args.weights, ((published_name(p), p.asnumpy()) for p in everything))
    write_json(options_file, as_json(bilm.options))
    print(f"wrote {args.weights} and {options_file}")


# ---------------------------------------------------------------------------------------------------------
# 8. One training step
# ---------------------------------------------------------------------------------------------------------


LOSS_SCALE = {None: 1.0, "bfloat16": 1.0, "float16": 1024.0}  # the gradients of float16 become 0 below 6e-8


def make_step(bilm, accumulators, slots, workers=1, loss_scale=1.0):
    """The whole training step as one static graph: forward, backward, clipping, Adagrad.

    The rows of the softmax that the batch touches come in and go out as tensors: a graph that both reads and
    writes the table would copy all of it. Of several workers, each gets the mean of all gradients. The loss is
    multiplied by `loss_scale` and the gradient divided by it, so that what is small does not vanish in float16.
    """
    o, weights = bilm.options, ms.ParameterTuple(bilm.trainable_params())
    adagrad, lr, softmax_loss = ops.ApplyAdagrad(), o.learning_rate, SampledSoftmaxLoss()

    # "Our formulation jointly maximizes the log likelihood of the forward and backward directions" (section 3.1), so
    # that the loss is
    #   -1/2N Σ_k (log p(t_k | t_1, ..., t_k-1; Θx, →Θ_LSTM, Θs) + log p(t_k | t_k+1, ..., t_N; Θx, ←Θ_LSTM, Θs))
    def loss_of(W, b, state, chars, words, fresh, target, drawn, target_log_q, drawn_log_q, undrawn, keep):
        """W [rows, projection] and b [rows], the softmax's touched rows; the rest is a `data.Batch` and the state."""
        tokens = bilm.token_representations(chars, words, slots)  # [2, time, batch, projection]
        state = state * (1 - fresh.astype(state.dtype)).reshape(-1, 1)  # [2, layers, batch, n] · [batch, 1]
        keep = [ops.unstack(k) for k in ops.unstack(keep)] if o.dropout else None
        outputs, state = bilm.contextualize(tokens, state, keep)
        loss = 0.0
        for d in range(2):
            y = drop(outputs[d][-1], keep[-1][d], o.dropout) if o.dropout else outputs[d][-1]
            # += and not +: what is done in place keeps its order, without which the step takes half as long again.
            loss += loss_scale / 2 * softmax_loss(y.reshape(-1, o.projection), W, b, target[d], drawn[d],
                                                  target_log_q[d], drawn_log_q[d], undrawn[d])
        return loss, state

    gradient = ms.value_and_grad(loss_of, (0, 1), weights, has_aux=True)
    all_reduce = ops.AllReduce() if workers > 1 else None

    def mean(x):
        x = x / (workers * loss_scale)
        return all_reduce(x) if workers > 1 else x

    @ms.jit
    def step(state, W, b, W_sum, b_sum, *batch):
        (loss, state), ((dW, db), grads) = gradient(W, b, state, *batch)
        if workers * loss_scale != 1:
            loss, dW, db, grads = mean(loss.reshape(1))[0], mean(dW), mean(db), [mean(g) for g in grads]
        # As in bilm-tf the gradient is that of unroll_steps · loss, its global norm clipped to all_clip_norm_val.
        norm = o.unroll_steps * ops.sqrt(sum([sum_of_squares(g) for g in (*grads, dW, db)]))
        scale = o.unroll_steps * o.all_clip_norm_val / ops.maximum(norm, ops.full_like(norm, o.all_clip_norm_val))
        # Adagrad: sum += g², w -= lr · g / √sum
        for w, total, g in zip(weights, accumulators, grads):
            adagrad(w, total, lr, scale * g)
        W_sum, b_sum = W_sum + ops.square(scale * dW), b_sum + ops.square(scale * db)
        W, b = W - lr * scale * dW / ops.sqrt(W_sum), b - lr * scale * db / ops.sqrt(b_sum)
        return loss, norm, state, W, b, W_sum, b_sum

    return step


def sum_of_squares(x):
    return ops.square(x.reshape(x.shape[0], -1)).sum(1).sum()  # one axis at a time: several are many times slower


# ---------------------------------------------------------------------------------------------------------
# 9. A run and its checkpoints
# ---------------------------------------------------------------------------------------------------------


class Workers:
    """The processes that msrun started together (data parallelism), each with its own rows of every batch, as if they
    were one device with `size` times the rows. Without msrun, there is one."""

    def __init__(self):
        self.rank, self.size = 0, 1
        if "MS_ROLE" in os.environ:  # msrun's
            from mindspore import communication
            os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "86400")  # seconds to wait while worker 0 tests
            communication.init()
            self.rank, self.size = communication.get_rank(), communication.get_group_size()

    def gather(self, x):
        """x of each worker, [size, *x.shape]."""
        return (ops.AllGather()(x) if self.size > 1 else x).reshape(self.size, *x.shape)

    def any(self, condition):
        """Whether it holds for any worker."""
        return bool(self.gather(Tensor([float(bool(condition))])).asnumpy().any() if self.size > 1 else condition)


class Run:
    """All that a training run consists of: the model, Adagrad's accumulators, and where it stands."""

    def __init__(self, options, classes, seed=0, amp=None, workers=None):
        self.options, self.workers = options, workers or Workers()
        self.bilm, self.softmax = BiLM(options, seed=seed, amp=amp), Softmax(classes, options.projection, seed)
        self.accumulators = ms.ParameterTuple([accumulator(p) for p in self.bilm.trainable_params()])
        self.tables = [self.softmax.W, self.softmax.b, accumulator(self.softmax.W), accumulator(self.softmax.b)]
        self.lstm_state = zero_state(options, options.batch_size)
        self.step, self.best, self.losses = 0, math.inf, []
        self.position = None  # in the data, see data.Rows

    def advance(self, step, rows, batch):
        """One training step on a batch, `step` being `make_step`'s graph. InputError where it is not finite."""
        rows = Tensor(rows)
        touched = [ops.gather(table, rows, 0) for table in self.tables]
        loss, norm, state, *touched = step(self.lstm_state, *touched, *map(Tensor, batch))
        loss, norm = float(loss.asnumpy()), float(norm.asnumpy())
        if not math.isfinite(loss + norm):
            raise InputError(f"step {self.step + 1}: the loss is {loss}, the gradient's norm {norm}; this step is not "
                             "saved, earlier checkpoints are good; train with a lower --lr")
        for table, new in zip(self.tables, touched):
            ops.scatter_update(table, rows, new)
        self.step, self.lstm_state = self.step + 1, state
        self.losses.append(loss)

    def parameters(self):
        return [*self.bilm.get_parameters(), *self.accumulators, *self.tables]

    def save(self, folder, is_best):
        """Writes step-N.npz, keeps the last two of these, and the best as best.npz. Worker 0 does it for all."""
        states = self.workers.gather(self.lstm_state).asnumpy()
        if self.workers.rank:
            return
        about = {"step": self.step, "position": self.position, "best": self.best, "losses": self.losses,
                 "lstm_states": states}
        # The best first: after a crash between the two, this epoch ends again and is the best again.
        for name in ["best.npz"] * is_best + [f"step-{self.step}.npz"]:
            write_npz(os.path.join(folder, name), itertools.chain(
                (("run/" + key, value) for key, value in about.items()),
                ((published_name(p), p.asnumpy()) for p in self.parameters())))
        for old in checkpoints(folder)[:-2]:
            os.remove(old)

    def resume(self, folder):
        """Takes over the last checkpoint that is whole; where there is none yet, the run begins."""
        for path in reversed(checkpoints(folder)):
            try:
                about = load_npz(path, self.parameters(), ("step", "best", "losses", "position", "lstm_states"))
            except InputError as error:
                print(f"{error}; trying the one before", flush=True)
                continue
            step, best, losses, self.position, states = about
            self.step, self.best, self.losses = int(step), float(best), list(losses)
            self.lstm_state = Tensor(states[self.workers.rank])
            return
        if checkpoints(folder):
            raise InputError(f"{folder}: all of its checkpoints are damaged; train into another --out")


def load_npz(path, parameters, about=()):
    """Reads parameters from a checkpoint -> the arrays of these names about the run. InputError where it is of no use.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if arrays.zip.testzip():  # numpy does not compare all checksums
                raise ValueError("a checksum is wrong")
            for p in parameters:
                p.set_data(Tensor(np.asarray(arrays[published_name(p)], np.float32).reshape(p.shape)))
            return [arrays["run/" + name] for name in about]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; train with --out {os.path.dirname(path)} first") from None
    except Exception as error:  # whatever numpy and zipfile raise, each with errors of its own
        raise InputError(f"{path}: damaged, or not a checkpoint of this model ({error!r:.200})") from None


def accumulator(p):
    """Adagrad's sum of squares for a parameter, 1 at first as in bilm-tf."""
    return Parameter(ops.ones_like(p), name="adagrad/" + published_name(p), requires_grad=False)


def zero_state(options, batch):
    return ops.zeros((2, options.n_layers, batch, options.projection + options.dim), ms.float32)


def write_npz(path, arrays):
    """Writes (name, array) pairs one by one."""
    with written(path) as draft, open(draft, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays:
                with archive.open(name + ".npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def written(path):
    """A name to write a file under; in the end it takes its place at `path`, whole, or, after an error, goes away."""
    draft = path + ".part"
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        if error.filename not in (None, draft, path):
            raise
        raise InputError(f"{path}: could not be written ({error.strerror or str(error).splitlines()[0]}); is the disk "
                         "full? What was written before is intact") from None
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def checkpoints(folder):
    """The paths of a run's checkpoints, oldest first."""
    found = [re.fullmatch(r"step-(\d+)\.npz", name) for name in os.listdir(folder)]
    return [os.path.join(folder, match[0]) for match in sorted(filter(None, found), key=lambda match: int(match[1]))]


def open_model(args, with_softmax=True):
    """The model of --options and --weights, or the best of the training run in --out -> its `BiLM`, `Softmax` and
    `Vocabulary` (the last two None where they are not asked for)."""
    published = args.weights and args.command != "export"
    if published:
        options, vocabulary = args.options, args.vocab
    elif os.path.isdir(args.out):
        options, vocabulary = (os.path.join(args.out, name) for name in ("options.json", "vocab"))
    else:
        raise InputError(f"{args.out}: no such folder; train with --out {args.out} first")
    bilm = BiLM(read_options(options))
    vocabulary = Vocabulary(vocabulary) if with_softmax else None
    softmax = Softmax(len(vocabulary), bilm.options.projection) if with_softmax else None
    cells = [bilm, softmax] if with_softmax else [bilm]
    if published:
        for cell in cells:
            load_weights(args.weights, cell)
    else:
        load_npz(os.path.join(args.out, "best.npz"), [p for cell in cells for p in cell.get_parameters()])
    return bilm, softmax, vocabulary


# ---------------------------------------------------------------------------------------------------------
# 10. Train, test, embed
# ---------------------------------------------------------------------------------------------------------


def train(args):
    """Trains a biLM (section 3.4 and bilm-tf's training) or, with --weights, trains one further, "fine tuning the biLM
    on domain specific data" (3.4)."""
    workers = Workers()
    options, about, corpus, heldout = training_inputs(args, workers)
    run = Run(options, options.n_tokens_vocab, about["seed"], args.amp, workers)
    softmax_is_new = False
    if args.weights and not (args.resume and checkpoints(args.out)):
        load_weights(args.weights, run.bilm)
        softmax_is_new = not load_weights(args.weights, run.softmax, optional=True)
    with contextlib.redirect_stdout(None if workers.rank else sys.stdout), stop_signals() as signals:
        if workers.rank == 0:
            prepare_folder(args, as_json(options, **about))
        if args.resume:
            run.resume(args.out)
            print(f"{args.out}: resuming after step {run.step:,}", flush=True)
        print(f"{corpus.sentences:,} sentences, {corpus.tokens:,} tokens, {options.n_tokens_vocab:,} words; "
              f"{sum(p.size for p in run.bilm.get_parameters()):,} parameters and "
              f"{run.softmax.W.size + run.softmax.b.size:,} of the softmax", flush=True)
        if softmax_is_new:
            print(f"{args.weights} has no softmax: that table starts fresh", flush=True)
        if args.weights and heldout and not run.step:
            print(f"before training: held-out {perplexities(run.bilm, run.softmax, heldout)}", flush=True)
        train_steps(args, run, corpus, heldout, about["seed"], signals)


def train_steps(args, run, corpus, heldout, seed, signals):
    """The steps of a run from where it stands to its end, or to a signal. The loss printed is the sampled one, which
    flatters; the held-out perplexities at the end of each epoch are those of the full softmax."""
    o, workers = run.options, run.workers
    window = o.batch_size * o.unroll_steps * workers.size
    predictions = corpus.tokens + corpus.sentences  # a sentence of n tokens has n + 1 in each direction
    end = o.n_epochs * predictions // window
    end = min(end, args.steps or end)
    if run.step >= end:
        return print("all steps are done; --epochs N trains further")
    print(f"{end:,} steps of {window:,} tokens; compiling the training step", flush=True)
    log = Log(None if workers.rank else args.out, run, window)
    slots = Slots.measure(Rows(corpus, o, seed), o)
    step = make_step(run.bilm, run.accumulators, slots, workers.size, LOSS_SCALE[args.amp])
    for rows, batch, run.position in ahead(training_batches(
            corpus, slots, o.n_tokens_vocab, o, seed, run.step, run.position, workers.rank, workers.size)):
        run.advance(step, rows, batch)
        log.tick()
        stopping, is_best = workers.any(signals), False
        epoch = -(-run.step * window // predictions)  # rounded up: the one that this step belongs to
        epoch_is_over = run.step in (end, epoch * predictions // window)
        if epoch_is_over or run.step % args.log_every == 0:
            scores = perplexities(run.bilm, run.softmax, heldout) if epoch_is_over and heldout else None
            log.line(epoch, end, scores)
            is_best = epoch_is_over and (scores is None or scores.average < run.best)
            run.best = scores.average if is_best and scores else run.best
        if epoch_is_over or stopping or args.save_every and run.step % args.save_every == 0:
            run.save(args.out, is_best)
        if run.step == end:
            return
        if stopping:
            return print(f"stopped after step {run.step:,}, which is saved; to go on: python "
                         f"{shlex.join(args.argv)}{'' if args.resume else ' --resume'}", flush=True)
        log.go_on()


def training_inputs(args, workers):
    """Reads and checks what training needs -> options, what else the run consists of, corpus, held-out corpus (or None;
    worker 0 tests). With --resume, the options, seed, type of products, weights and vocabulary that the command line
    leaves open are as they were."""
    begun = {}
    if args.resume:
        path = os.path.join(args.out, "options.json")
        if not os.path.isfile(path):
            raise InputError(f"{args.out}: no run to resume; leave out --resume to begin one")
        begun = read_json(path)
        seed, amp, weights = (look_up(begun, "run." + key) for key in ("seed", "amp", "weights"))
        if not (is_valid(seed, 0, (0, 1 << 40)) and amp in [*LOSS_SCALE] and isinstance(weights, (str, type(None)))):
            raise InputError(f"{path}: damaged; train into another --out")
        args.options = args.options or (None if args.size else path)
        args.amp, args.weights = args.amp or amp, args.weights or weights
    options = read_options(args.options) if args.options else SIZES[args.size or "original"]
    given = {name: getattr(args, name) for name in ("batch_size", "learning_rate", "n_epochs")}
    options = replace(options, **{name: value for name, value in given.items() if value is not None})
    vocabulary = Vocabulary(args.vocab)
    corpus = open_corpus(args.data, vocabulary)
    heldout = open_corpus(args.heldout, vocabulary) if args.heldout and workers.rank == 0 else None
    needed, words = options.batch_size * options.unroll_steps * workers.size, len(vocabulary)
    if corpus.tokens + corpus.sentences < needed:
        raise InputError(f"{args.data}: {corpus.tokens:,} tokens in {corpus.sentences:,} sentences are less than one "
                         f"batch of {options.batch_size * workers.size} × {options.unroll_steps} = {needed:,}; add "
                         "text, or lower --batch-size")
    if options.sample_softmax and options.n_negative_samples_batch > words:
        raise InputError(f"{args.vocab}: {words:,} words are fewer than n_negative_samples_batch, "
                         f'{options.n_negative_samples_batch:,}; lower it, or set "sample_softmax" to false')
    if options.n_tokens_vocab not in (0, words):
        print(f"{args.options}: n_tokens_vocab is {options.n_tokens_vocab:,}, but {args.vocab} has {words:,} words, "
              "which decides", flush=True)
    identity = lambda c: c and f"{c.sentences:,} sentences, {c.tokens:,} tokens, checksum {c.checksum:08x}"
    about = {"seed": look_up(begun, "run.seed") or 0 if args.seed is None else args.seed, "workers": workers.size,
             "amp": args.amp, "vocabulary": vocabulary.fingerprint, "data": identity(corpus),
             "heldout": identity(heldout), "weights": args.weights and os.path.realpath(args.weights)}
    return replace(options, n_tokens_vocab=words), about, corpus, heldout


def prepare_folder(args, content):
    """Makes the folder of a new run, or checks that the one to be resumed is this very run."""
    path = os.path.join(args.out, "options.json")
    os.makedirs(args.out, exist_ok=True)
    if not args.resume:
        if set(os.listdir(args.out)) - {"options.json.part"}:  # the first file that is written here
            raise InputError(f"{args.out}: is not empty; give another --out, or --resume to go on with its run")
    else:
        begun = read_json(path)
        for place in [f.metadata["place"] for f in fields(Options)] + ["run." + key for key in content["run"]]:
            old, new = look_up(begun, place), look_up(content, place)
            if old != new and place != "n_epochs":
                raise InputError(f"{args.out}: its run has {place} {old!r:.80}, not {new!r:.80}; resume it as it was "
                                 "begun, or train into another --out")
        for name in os.listdir(args.out):
            if name.endswith(".part"):  # of a run that was killed
                os.remove(os.path.join(args.out, name))
    write_json(path, content)
    vocabulary = os.path.join(args.out, "vocab")
    if not os.path.exists(vocabulary):
        with written(vocabulary) as draft, open(args.vocab, "rb") as source, open(draft, "wb") as file:
            shutil.copyfileobj(source, file)


@contextlib.contextmanager
def stop_signals():
    """A list that SIGINT and SIGTERM add to, instead of ending the program; the next one ends it."""
    received = []

    def note(number, frame):
        received.append(signal.Signals(number).name)
        print(f"{received[-1]}: stopping after this step", file=sys.stderr, flush=True)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def open_corpus(path, vocabulary):
    corpus = Corpus(path)
    if corpus.fingerprint != vocabulary.fingerprint:
        raise InputError(f"{path}: made with another vocabulary; give that one as --vocab, or convert the text again")
    return corpus


class Log:
    """A training run's log: lines on the console, rows in log.csv."""
    COLUMNS = "step,epoch,loss,tokens_per_second,heldout_forward,heldout_backward,heldout_average"

    def __init__(self, folder, run, window):
        self.run, self.window, self.steps, self.seconds, self.last = run, window, 0, 0.0, None
        self.path, rows = os.path.join(folder, "log.csv") if folder else os.devnull, [self.COLUMNS + "\n"]
        if os.path.isfile(self.path):  # the run is resumed: what came after its checkpoint comes again
            with open(self.path, encoding="utf-8", errors="replace") as file:
                found = (re.match(r"(\d{1,18}),.*\n", row) for row in file)
                rows += [match[0] for match in found if match and int(match[1]) <= run.step]
        if folder:
            with written(self.path) as draft, open(draft, "w", encoding="utf-8") as file:
                file.writelines(rows)

    def tick(self):
        """Counts a step and its time; not the first step, which is compiled meanwhile."""
        if self.last is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - self.last

    def go_on(self):
        """The next step begins now; what was done since the last, a test perhaps, does not count."""
        self.last = time.perf_counter()

    def line(self, epoch, end, scores):
        """One line on the console and one row in log.csv, with the mean loss since the last."""
        step, loss, speed, left = self.run.step, np.mean(self.run.losses), "", ""
        if self.steps:
            speed = f"{self.window * self.steps / self.seconds:.0f}"
            left = f"{int(speed):,} tokens/s  {math.ceil(self.seconds / self.steps * (end - step) / 60)} min left"
        print(f"step {step:,} of {end:,}  epoch {epoch}  sampled loss {loss:.4f}  {left}", flush=True)
        heldout = f"{scores.forward:.4f},{scores.backward:.4f},{scores.average:.4f}" if scores else ",,"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{step},{epoch},{loss:.6f},{speed},{heldout}\n")
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; mend that, and go on with --resume") from None
        if scores:
            print(f"epoch {epoch}: held-out {scores}", flush=True)
        self.run.losses, self.steps, self.seconds = [], 0, 0.0


class Perplexities(NamedTuple):
    forward: float
    backward: float
    average: float  # exp of the mean loss of both directions, as bilm-tf prints it; the paper's is 39.7 (section 3.4)
    predictions: int  # of each direction

    def __str__(self):
        return (f"perplexity forward {self.forward:.2f} backward {self.backward:.2f} average {self.average:.2f} "
                f"over {self.predictions} predictions")


def perplexities(bilm, softmax, corpus):
    """The perplexities of held-out text under the full softmax, every prediction counted once."""
    o, total, count = bilm.options, np.zeros(2), 0
    slots, state = Slots.measure(Rows(corpus, o), o), zero_state(o, o.batch_size)
    losses = make_losses(bilm, softmax, slots)
    for words, place, target, real in ahead(Rows(corpus, o)):
        loss, state = losses(state, *map(Tensor, slots.fill(words, place)), Tensor(target))
        total += loss.asnumpy().astype(np.float64)[:, real.reshape(-1)].sum(1)
        count += int(real.sum())
    with np.errstate(over="ignore"):  # of a model that has gone astray
        return Perplexities(*np.exp([*total / count, total.sum() / (2 * count)]).tolist(), count)


@functools.lru_cache(maxsize=1)  # one compilation serves all tests of a run
def make_losses(bilm, softmax, slots):
    """A window's -log p of every prediction, [2, time · batch], as one static graph."""
    @ms.jit
    def losses(state, chars, words, target):
        tokens = bilm.token_representations(chars, words, slots)
        outputs, state = bilm.contextualize(tokens, state)
        losses = [softmax(y[-1].reshape(-1, y[-1].shape[-1]), target[d].reshape(-1)) for d, y in enumerate(outputs)]
        return ops.stack(losses), state

    return losses


def test(args):
    """Prints the perplexities of held-out text."""
    bilm, softmax, vocabulary = open_model(args)
    print(perplexities(bilm, softmax, open_corpus(args.data, vocabulary)))


class Embedder:
    """The biLM's layers for any sentences: the same sentence always gets the same vectors.

    Sentences are read side by side, one a row, a window at a time; where one has ended, the next window begins the
    next. The shapes are fixed, so that little is compiled, and each distinct word is encoded once.
    """
    ROWS, TIME = 256, 4  # of a window: short, since sentences leave the rest of their last one empty
    WORDS = 1 << 17      # so many word representations are kept for the next call
    CHUNK = 512          # words that are encoded at once

    def __init__(self, bilm):
        self.options, self.index = bilm.options, {}
        self.vectors = np.empty((0, bilm.options.projection), np.float32)
        few = self.CHUNK // 4  # long words
        self.slots = Slots(((self.CHUNK - few, min(14, MAX_CHARS - bilm.encoder.width)), (few, MAX_CHARS)))

        @ms.jit
        def encode(chars, words):
            return bilm.token_representations(chars, words, self.slots)

        @ms.jit
        def read(x, fresh, state):
            outputs, state = bilm.contextualize(x, state * (1 - fresh).reshape(-1, 1))
            return ops.stack([ops.stack(layers) for layers in outputs]), state  # [2, layers, time, rows, projection]

        self.encode, self.read = encode, read

    def __call__(self, sentences):
        """Lists of words -> a list of float32 [layers + 1, words, 2 · projection], h_0 ... h_L of equation 1."""
        layers, size = self.options.n_layers, self.options.projection
        ids = self.number_words([["<S>", *words, "</S>"] for words in sentences])
        results = [np.empty((layers + 1, len(n) - 2, 2 * size), np.float32) for n in ids]
        waiting = sorted((k for k, words in enumerate(sentences) if words), key=lambda k: len(ids[k]))
        rows, state = [None] * self.ROWS, zero_state(self.options, self.ROWS)  # a row: sentence and position
        while waiting or any(rows):
            rows = [row or ((waiting.pop(), 0) if waiting else None) for row in rows]  # the longest first
            reading = [(r, *row) for r, row in enumerate(rows) if row]
            place, fresh = np.zeros((2, self.TIME, self.ROWS), np.int64), np.zeros(self.ROWS, np.float32)
            for r, k, start in reading:
                fresh[r] = start == 0
                for d, n in enumerate((ids[k], ids[k][::-1])):
                    window = n[start:start + self.TIME]
                    place[d, :len(window), r] = window
            outputs, state = self.read(Tensor(self.vectors[place]), Tensor(fresh), state)
            outputs = outputs.asnumpy()
            # At its position p the backward direction has read the token n + 1 - p of n.
            for r, k, start in reading:
                n, end = len(ids[k]) - 2, start + self.TIME
                here = np.arange(max(start, 1), min(end, n + 1))  # without <S> and </S>
                results[k][1:, here - 1, :size] = outputs[0, :, :, r][:, here - start]
                results[k][1:, n - here, size:] = outputs[1, :, :, r][:, here - start]
                rows[r] = (k, end) if end <= n else None
        for n, result in zip(ids, results):
            result[0] = np.tile(self.vectors[n[1:-1]], 2)
        return results

    def number_words(self, sentences):
        """Each sentence's words as rows of `vectors`, int [words]; words not seen before are encoded."""
        if len(self.index) > self.WORDS:
            self.index, self.vectors = {}, self.vectors[:0]
        known = len(self.index)
        ids = [np.array([self.index.setdefault(word, len(self.index)) for word in words]) for words in sentences]
        new = list(itertools.islice(self.index, known, None))
        vectors = [self.vectors]
        for k in range(0, len(new), self.CHUNK):
            some = new[k:k + self.CHUNK]
            place = np.arange(self.CHUNK) % len(some)  # always as many: another number would be compiled anew
            vectors.append(self.encode(*map(Tensor, self.slots.fill(some, place))).asnumpy()[:len(some)])
        self.vectors = np.concatenate(vectors)
        return ids


def embed(args):
    """Writes the vectors of a file of sentences, one array for each line: '0', '1', ..."""
    if not args.input or not args.output or not args.output.endswith((".npz", ".hdf5")):
        raise InputError("embed needs --input FILE and --output FILE.npz (or .hdf5)")
    refuse_existing(args.output, args.overwrite)
    arrays = sentence_vectors(Embedder(open_model(args, with_softmax=False)[0]), args.input)
    if args.output.endswith(".npz"):
        write_npz(args.output, arrays)
    else:
        write_hdf5(args.output, arrays)


def sentence_vectors(embedder, path, positions_at_once=1 << 15):
    """Yields ("0", vectors of line 0), ... of a file of tokenized sentences, reading so many positions at a time."""
    start, count, tokens, block, positions = time.perf_counter(), 0, 0, [], 0
    with open(path, "rb") as file:  # bytes: no other character than \n ends a line
        for line in itertools.chain(file, [None]):
            if line is not None:
                try:
                    block.append(line.decode("utf-8").split())
                except UnicodeDecodeError:
                    raise InputError(f"{path}: line {count + len(block) + 1} is not UTF-8; convert it") from None
                positions += len(block[-1]) + 2
            if block and (line is None or positions >= positions_at_once):
                for vectors in embedder(block):
                    yield str(count), vectors
                    count, tokens = count + 1, tokens + vectors.shape[1]
                speed = tokens / (time.perf_counter() - start)
                print(f"{count:,} sentences, {tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr)
                block, positions = [], 0
    if not count:
        raise InputError(f"{path}: is empty; give one sentence a line")


def refuse_existing(path, overwrite):
    if os.path.exists(path) and not (overwrite and os.path.isfile(path)):
        raise InputError(f"{path}: exists; choose another name{' or say --overwrite' * os.path.isfile(path)}")


# ---------------------------------------------------------------------------------------------------------
# 11. Command line
# ---------------------------------------------------------------------------------------------------------


def value_of(name):
    """The type of arguments that set the option of this name."""
    default, valid = next((f.default, f.metadata["valid"]) for f in fields(Options) if f.name == name)

    def parse(text):
        value = type(default)(text)
        if not is_valid(value, default, valid):
            raise ValueError
        return value

    parse.__name__ = name  # argparse says it
    return parse


def whole(text):
    """The type of arguments that are 0 or more."""
    return natural(text, 0)


def make_parser():
    parser = ArgumentParser(
        prog="elmo.py", description="Train ELMo's biLM, test it, embed sentences with it, or export its weights.")
    add = parser.add_argument
    add("command", nargs="?", default="train", choices=("train", "test", "embed", "export"),
        help="train (the default); test: perplexity of held-out text; embed: vectors of sentences; "
             "export: a run's weights as .hdf5")
    add("--device", "--device_target", default="Ascend", choices=("Ascend", "CPU"), help="default: %(default)s")
    add("--out", "--train_url", metavar="DIR", default="model",
        help="folder of a training run: train writes it, the others read its best model (default: %(default)s)")
    add("--vocab", "--vocab_path", metavar="FILE",
        help="the vocabulary that data.py used (default: vocab; with --resume, the run's own)")
    add("--options", "--options_path", metavar="FILE", help="options in the published JSON format")
    add("--weights", metavar="FILE",
        help="published weights, .hdf5. train: start from them; test, embed: use them, with --options, instead of "
             "--out; export: write them")
    add = parser.add_argument_group("train, test").add_argument
    add("--data", "--data_url", metavar="FILE",
        help="text that data.py converted (default: train.mindrecord to train, heldout.mindrecord to test)")
    add = parser.add_argument_group("train").add_argument
    add("--heldout", metavar="FILE",
        help="text to test on after each epoch (default: heldout.mindrecord, if there is one)")
    add("--size", choices=SIZES, help="of the model, where there are no --options (default: original)")
    add("--epochs", "--epoch_num", dest="n_epochs", metavar="N", type=value_of("n_epochs"),
        help="passes over the text (default: as in the options, 10)")
    add("--steps", metavar="N", type=natural, help="stop after N steps")
    add("--lr", dest="learning_rate", metavar="X", type=value_of("learning_rate"),
        help="learning rate (default: as in the options, 0.2)")
    add("--batch-size", metavar="N", type=value_of("batch_size"),
        help="rows of text side by side (default: as in the options, 128)")
    add("--seed", metavar="N", type=whole, help="decides all that is random (default: 0)")
    add("--log-every", metavar="K", type=natural, default=100,
        help="steps from one line of the log to the next (default: %(default)s)")
    add("--save-every", metavar="K", type=natural,
        help="steps from one checkpoint to the next (default: one after each epoch)")
    add("--resume", action="store_true",
        help="go on with the run in --out from its last checkpoint, as if nothing had happened")
    add("--amp", choices=("float16", "bfloat16"), help="matrix products in this type (default: float32)")
    add = parser.add_argument_group("embed, export").add_argument
    add("--input", metavar="FILE", help="tokenized sentences, one a line")
    add("--output", metavar="FILE", help="vectors to write, one array a line: .npz or .hdf5")
    add("--overwrite", action="store_true", help="replace files that exist")
    return parser


def parse_arguments(argv):
    """The command line's options, with the defaults that depend on others; InputError where they make no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.argv = [sys.argv[0], *argv]
    if args.vocab is None:
        of_run = os.path.join(args.out, "vocab")
        args.vocab = of_run if args.resume and os.path.exists(of_run) else "vocab"
    if args.data is None:
        args.data = "heldout.mindrecord" if args.command == "test" else "train.mindrecord"
    if args.heldout is None and os.path.exists("heldout.mindrecord"):
        args.heldout = "heldout.mindrecord"
    if args.command in ("test", "embed") and bool(args.weights) != bool(args.options):
        parser.error("--weights and --options go together")
    if args.command == "export" and not args.weights:
        parser.error("export needs --weights FILE.hdf5")
    return args


def main(argv=None):
    """Runs the command line -> the exit status."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        try:
            ms.set_device(args.device)
        except RuntimeError:
            raise InputError(f"--device {args.device}: there is none on this machine; use --device CPU") from None
        {"train": train, "test": test, "embed": embed, "export": export}[args.command](args)
        return 0
    except (InputError, OSError) as error:
        place = getattr(error, "filename", None)
        print(f"elmo.py: error: {f'{place}: {error.strerror}' if place else error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"elmo.py: error: not enough memory ({error}); use a smaller model or batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("elmo.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
