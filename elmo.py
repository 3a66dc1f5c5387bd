"""ELMo in one file: "Deep contextualized word representations" (Peters et al., NAACL 2018) in MindSpore.

    python data.py --input corpus/            text to train.mindrecord
    python elmo.py --device Ascend            train the paper's biLM on it
    python elmo.py embed --input sentences.txt --output vectors.npz

Read this: the paper                          Skip on first reading: what surrounds it
  1. Options (section 3.4)                      8. MindSpore's peculiarities, and speed
  2. Character CNN (3.1, 3.4)                   9. Embedding files of sentences
  3. LSTM with projection (3.1, 3.4)           10. The file formats of bilm-tf and AllenNLP
  4. Bidirectional language model (3.1)        11. A run's folder: checkpoints, resuming, the log
  5. Softmax, full and sampled (3.1)           12. Several devices
  6. ELMo: the scalar mix (3.2, 3.3)           13. Command line
  7. Training and perplexity (3.1, 3.4)

Where the paper is silent, bilm-tf decides, the authors' program in TensorFlow, unless a comment says otherwise.

For readers of PyTorch: an nn.Cell is a Module and its construct is forward; a ParameterTuple is a ParameterList, here
for parameters that are to keep their names, which are bilm-tf's; ms.jit compiles a function to a static graph; a cell's
bprop, where there is one, is its own backward pass; ops.gather(p, i, 0) is p[i], and ops.scatter_add(p, i, d) is
p.index_add_(0, i, d).

`matmul`, `bias_add` (x + b), `log`, `tanh`, `log_sum_exp(y, W, b)` (log Σ_k exp(y · W_k + b_k)), `compiled` and
`parameter` are what their names say; part 8 tells why MindSpore's own would not do. `make_matmul(amp)` returns the
product of matrices in the type amp (None: float32). data.py reads the text.
"""
import argparse
import contextlib
import errno
import functools
import heapq
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from data import (MAX_CHARS, RUN_FILE, SPECIAL, ArgumentParser, Corpus, InputError, Vocabulary, char_ids, check_outputs,
                  check_sentences, file_name, fill_tiers, has_room, measure_tiers, natural, open_text, prefetch,
                  read_chunks, run_program, with_progress)  # before mindspore: it quiets MindSpore's log
import mindspore as ms
from mindspore import Parameter, Tensor, communication, nn, ops
from mindspore.ops.auto_generate import SigmoidGrad, TanhGrad

# ---- 1. Options: every hyperparameter of the paper's model -----------------------------------------------------------

@dataclass(frozen=True)
class Options:
    """The hyperparameters; the defaults are the paper's, or else bilm-tf's. InputError where a value makes no sense
    (`check_options`)."""
    # "The context insensitive type representation uses 2048 character n-gram convolutional filters followed by two
    # highway layers ... and a linear projection down to a 512 representation." (section 3.4; the rest is bilm-tf's)
    filters: tuple = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))  # (width, number of filters)
    n_highway: int = 2
    char_dim: int = 16
    activation: str = "relu"  # or tanh
    # "The final model uses L = 2 biLSTM layers with 4096 units and 512 dimension projections and a residual connection
    # from the first to second layer." (3.4)
    n_layers: int = 2
    dim: int = 4096
    projection: int = 512
    use_skip_connections: bool = True
    n_epochs: int = 10  # "After training for 10 epochs on the 1B Word Benchmark" (3.4)
    # What follows is not in the paper but in bilm-tf.
    cell_clip: float = 3.0               # the cell state c of an LSTM stays within ± this,
    proj_clip: float = 3.0               # and its output h within ± this
    dropout: float = 0.1                 # of the input of each LSTM layer and of the last one's output
    batch_size: int = 128                # streams of text, read side by side by each device
    unroll_steps: int = 20               # tokens of each stream in a training step; gradients go back no further
    sample_softmax: bool = True          # False: train with the full softmax, for small vocabularies
    n_negative_samples_batch: int = 8192
    all_clip_norm_val: float = 10.0      # limit of the gradient's norm over all parameters together
    learning_rate: float = 0.2           # of Adagrad
    n_tokens_vocab: int = 0              # the vocabulary file decides

    def __post_init__(self):
        check_options(self)


# ---- 2. Character CNN: a word's characters to a context-independent token representation x_k -------------------------

class CharEncoder(nn.Cell):
    """"... a context-independent token representation x_k^LM (via token embeddings or a CNN over characters)" (section
    3.1). The biLM's is `FastCharEncoder` (part 8), which computes the same in less time."""

    def __init__(self, options, rng, amp=None):
        super().__init__()
        o, n_filters = options, sum(n for _, n in options.filters)
        uniform = lambda limit, *shape: rng.uniform(-limit, limit, shape)
        normal = lambda *shape: rng.normal(0, math.sqrt(1 / math.prod(shape[:-1])), shape)  # shape: inputs .., outputs
        initial_filters = lambda *shape: uniform(0.05, *shape) if o.activation == "relu" else normal(*shape)
        self.filters, self.char_dim = o.filters, o.char_dim
        self.matmul = make_matmul(amp)
        self.activation = ops.relu if o.activation == "relu" else tanh
        self.char_embed = parameter("char_embed", uniform(1.0, 261, o.char_dim))  # of ids 1 to 261
        # [1, width, char_dim, n] is the shape that TensorFlow's conv2d takes.
        self.W_cnn = ms.ParameterTuple([parameter(f"CNN/W_cnn_{k}", initial_filters(1, width, o.char_dim, n))
                                        for k, (width, n) in enumerate(o.filters)])
        self.b_cnn = ms.ParameterTuple([parameter(f"CNN/b_cnn_{k}", np.zeros(n)) for k, (_, n) in enumerate(o.filters)])
        highway = []
        for name in [f"CNN_high_{k}/" for k in range(o.n_highway)]:
            highway += [parameter(name + "W_carry", normal(n_filters, n_filters)),
                        parameter(name + "b_carry", np.full(n_filters, -2.0)),  # so that g is small at first
                        parameter(name + "W_transform", normal(n_filters, n_filters)),
                        parameter(name + "b_transform", np.zeros(n_filters))]
        self.highway = ms.ParameterTuple(highway)
        # Always there. bilm-tf leaves it out where it would not change the size; such a model cannot be read here.
        self.projection = ms.ParameterTuple([parameter("CNN_proj/W_proj", normal(n_filters, o.projection)),
                                             parameter("CNN_proj/b_proj", np.zeros(o.projection))])

    def construct(self, chars, tiers=()):
        """chars int32 [words, 50] -> x_k [words, projection].

        chars, see data.char_ids: 1 to 256 are bytes, 257 and 258 stand for <S> and </S>, 259 and 260 for a word's begin
        and end; 261 is padding, and embedded like any other; 0 is no word, and embedded as zeros. tiers is
        ignored here; to `FastCharEncoder` it tells how long the words are at most (see `Batch`).
        """
        embedding = ops.concat((ops.zeros((1, self.char_dim), ms.float32), self.char_embed))  # [262, char_dim]
        x = self.features(embedding, chars, tiers)  # [words, filters]
        # y = g · relu(x · W_t + b_t) + (1 - g) · x. bilm-tf calls W_c "carry", although g is the share not carried.
        for k in range(0, len(self.highway), 4):
            W_c, b_c, W_t, b_t = self.highway[k:k + 4]
            g = ops.sigmoid(bias_add(self.matmul(x, W_c), b_c))
            x = g * ops.relu(bias_add(self.matmul(x, W_t), b_t)) + (1 - g) * x  # [words, filters]
        W_proj, b_proj = self.projection
        return bias_add(self.matmul(x, W_proj), b_proj)  # [words, projection]

    def features(self, embedding, chars, tiers):
        """"2048 character n-gram convolutional filters" (3.4), each of them at its best position: [words, filters]."""
        e, features = ops.gather(embedding, chars, 0), []  # [words, 50, char_dim]
        for (width, n), W, b in zip(self.filters, self.W_cnn, self.b_cnn):
            n_positions = MAX_CHARS - width + 1
            # score[p] = [e[p], ..., e[p + width - 1]] · W, for p = 0 ... 50 - width
            patches = ops.concat([e[:, k:k + n_positions] for k in range(width)], 2)  # [words, positions, ..]
            scores = self.matmul(patches.reshape(-1, width * self.char_dim), W.reshape(-1, n))
            max_scores = scores.reshape(-1, n_positions, n).amax(1)  # [words, n]
            features.append(self.activation(max_scores + b))
        return ops.concat(features, 1)


# ---- 3. LSTM with projection -----------------------------------------------------------------------------------------

class Recurrence(nn.Cell):
    """One direction of one layer: the LSTM of section 3.1, its output projected (Sak et al., 2014). At each time step

        i, j, f, o = [x_t; h] · W + B                   input gate, candidate, forget gate, output gate
        c = clip(sigmoid(f + 1) · c + sigmoid(i) · tanh(j))
        h = clip((sigmoid(o) · tanh(c)) · W_P)          the forget gate's + 1 and the clips are bilm-tf's

    The weights are inputs because `FastRecurrence` (part 8) is the same with a backward pass of its own, and such a
    pass can return gradients of inputs only.
    """

    def __init__(self, cell_clip, proj_clip, amp=None):
        super().__init__()
        self.cell_clip, self.proj_clip = cell_clip, proj_clip
        self.matmul = make_matmul(amp)

    def construct(self, x, h, c, W, B, W_P):
        """x [time, batch, input], h [batch, projection], c [batch, dim], W [input + projection, 4 dim], B [4 dim],
        W_P [dim, projection] -> (y, hs, cs, saved): y, [time, batch, projection], is h of all time steps; hs is the
        same as a tuple, since indexing y would be slow; cs is the tuple of c; saved is what else the backward pass of
        `FastRecurrence` needs."""
        hs, cs, saved = (), (), ()
        for x_t in ops.unstack(x):  # x[t] would be slow
            gates = bias_add(self.matmul(ops.concat((x_t, h), 1), W), B)  # [batch, 4 dim]
            i, j, f, o = ops.split(gates, c.shape[1], 1)
            i, j, f, o = ops.sigmoid(i), tanh(j), ops.sigmoid(f + 1.0), ops.sigmoid(o)
            c = ops.clamp(f * c + i * j, -self.cell_clip, self.cell_clip)
            u = tanh(c)
            h = ops.clamp(self.matmul(o * u, W_P), -self.proj_clip, self.proj_clip)  # [batch, projection]
            hs, cs, saved = hs + (h,), cs + (c,), saved + ((i, j, f, o, u),)
        return ops.stack(hs), hs, cs, saved


class ProjectedLSTM(nn.Cell):
    """One direction of one layer with its weights, which begin Glorot-uniform, biases 0 (bilm-tf). The projection
    is always there; bilm-tf's models that lack it, as it would not reduce the size, cannot be read."""

    def __init__(self, name, options, rng, recurrence):
        super().__init__()
        glorot = lambda m, n: rng.uniform(-math.sqrt(6 / (m + n)), math.sqrt(6 / (m + n)), (m, n))
        self.weights = ms.ParameterTuple([
            parameter(name + "W_0", glorot(2 * options.projection, 4 * options.dim)),
            parameter(name + "B", np.zeros(4 * options.dim)),
            parameter(name + "W_P_0", glorot(options.dim, options.projection))])
        self.recurrence = recurrence

    def construct(self, x, state, lengths=None):
        """x [time, batch, projection]; state [batch, projection + dim], h beside c. Returns h of all time steps, of the
        shape of x, and the new state, without a gradient: the one after the last time step or, given lengths, int32
        [batch], for each row the one after so many time steps."""
        W, B, W_P = self.weights
        h, c = ops.split(state, [W_P.shape[1], W_P.shape[0]], 1)
        y, hs, cs, _ = self.recurrence(x, h, c, W, B, W_P)
        if lengths is None:
            return y, ops.stop_gradient(ops.concat((hs[-1], cs[-1]), 1))
        states = ops.stop_gradient(ops.concat((y, ops.stack(cs)), 2))  # [time, batch, projection + dim]
        return y, states[lengths - 1, ops.arange(len(lengths))]  # [batch, projection + dim]


# ---- 4. Bidirectional language model ---------------------------------------------------------------------------------

class BiLM(nn.Cell):
    """"We tie the parameters for both the token representation (Θx) and Softmax layer (Θs) in the forward and backward
    direction while maintaining separate parameters for the LSTMs in each direction" (section 3.1): the character
    encoder and 2 · L LSTMs; for Θs see `Softmax`.

    options: an `Options` or the path of an options file; weight_file: weights in bilm-tf's format (.hdf5), or None for
    the initial values of training, drawn from `seed`; amp: None, "float16" or "bfloat16", see `make_matmul`.
    """

    def __init__(self, options, weight_file=None, seed=0, amp=None):
        super().__init__()
        self.options = o = options if isinstance(options, Options) else read_options(options)
        rng = np.random.default_rng(seed)
        self.encoder = FastCharEncoder(o, rng, amp)
        recurrence = FastRecurrence(o.cell_clip, o.proj_clip, amp)  # one for all, so that it is compiled once
        self.lstms = nn.CellList([  # layer 0 forward, layer 0 backward, layer 1 forward, ...
            ProjectedLSTM(f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/", o, rng, recurrence)
            for layer in range(o.n_layers) for direction in (0, 1)])
        self.begin, self.end = (Tensor(char_ids(word)).reshape(1, 1, -1) for word in SPECIAL[:2])  # <S>, </S>
        if weight_file is not None:
            load_weights(weight_file, self.get_parameters())

    def contextualize(self, x, state, lengths=None, masks=None):
        """The LSTMs over a chunk of text -> [[→h_1, ..., →h_L], [←h_1, ..., ←h_L]], each [time, batch, projection], and
        the new state.

        x [2, time, batch, projection], both directions in their own reading order; state [2, layers, batch,
        projection + dim]; lengths: see `ProjectedLSTM`; masks[layer][direction]: of dropout, for each layer's input,
        with one more for the output (see `make_loss`).
        """
        o, outputs, states = self.options, [], []
        for direction, (y, old_states) in enumerate(zip(ops.unstack(x), ops.unstack(state))):
            layers = []
            for layer, old_state in enumerate(ops.unstack(old_states)):
                y_in = y if masks is None else drop(y, masks[layer][direction], o.dropout)
                y, new_state = self.lstms[2 * layer + direction](y_in, old_state, lengths)
                if layer > 0 and o.use_skip_connections:
                    # "a residual connection from the first to second layer" (3.4): of its dropped-out input (bilm-tf)
                    y = y + y_in
                layers.append(y)
                states.append(new_state)
            outputs.append(layers)
        return outputs, ops.stack(states).reshape(state.shape)

    def construct(self, ids, state=None, keep_sentence_boundaries=False):
        """Sentences of any lengths: ids int [batch, tokens, 50] from `data.batch_to_ids` -> (layers, mask, state).

        layers: R_k = {h_k,j | j = 0, ..., L} (section 3.2), each [batch, tokens, 2 · projection], forward beside
        backward; h_k,0 is x_k twice. mask: bool [batch, tokens], where there is a token. state [2, layers, batch,
        projection + dim]: the LSTMs' after they have read each sentence, without a gradient. Given to the next call, it
        is where the LSTMs of both directions begin (as in bilm-tf). <S> and </S> are added, and left out of the result
        unless keep_sentence_boundaries says otherwise: then there are 2 tokens more.
        """
        o, (batch, tokens, _) = self.options, ids.shape
        room_for_end = ops.zeros((batch, 1, MAX_CHARS), ms.int32)
        ids = ops.concat((self.begin.tile((batch, 1, 1)), ids.astype(ms.int32), room_for_end), 1)
        n_words = (ids > 0).any(-1).sum(1, keepdims=True, dtype=ms.int32) - 1  # [batch, 1], without <S>
        position = ops.arange(tokens + 2).astype(ms.int32).reshape(1, -1)
        is_end = position == n_words + 1  # behind <S> at position 0 and the words
        ids = ops.where(is_end.reshape(batch, -1, 1), self.end, ids)  # [batch, tokens + 2, 50]
        lengths = n_words.reshape(-1) + 2  # [batch]
        x = self.encoder(ids.reshape(-1, MAX_CHARS)).reshape(batch, tokens + 2, -1)
        reversed_x = ops.reverse_sequence(x, lengths, seq_dim=1, batch_dim=0)
        both = ops.stack((x, reversed_x)).swapaxes(1, 2)  # [2, time, batch, projection]
        state = zero_state(o, batch) if state is None else state
        (forward, backward), state = self.contextualize(both, state, lengths)
        layers = [ops.concat((x, x), -1)]
        for f, b in zip(forward, backward):
            b = ops.reverse_sequence(b.swapaxes(0, 1), lengths, seq_dim=1, batch_dim=0)
            layers.append(ops.concat((f.swapaxes(0, 1), b), -1))  # [batch, tokens + 2, 2 · projection]
        if not keep_sentence_boundaries:
            layers, lengths = [layer[:, 1:-1] for layer in layers], lengths - 2
        mask = ops.arange(layers[0].shape[1]).astype(ms.int32) < lengths.reshape(-1, 1)  # [batch, tokens]
        return [layer * mask.astype(layer.dtype).reshape(*mask.shape, 1) for layer in layers], mask, state


def zero_state(options, batch):
    """The state of LSTMs that have read nothing: h beside c, of each direction and layer."""
    return ops.zeros((2, options.n_layers, batch, options.projection + options.dim), ms.float32)


def drop(x, mask, rate):
    """Dropout: x where mask is 1, 0 where it is 0, scaled so that the mean stays."""
    return x * (mask.astype(x.dtype) * (1 / (1 - rate)))


# ---- 5. Softmax, full and sampled ------------------------------------------------------------------------------------

class Softmax(nn.Cell):
    """"The top layer LSTM output ... is used to predict the next token t_k+1 with a Softmax layer" (section 3.1), of
    parameters Θs for both directions: W [classes, projection], b [classes], a class for each word of the vocabulary."""

    def __init__(self, n_classes, projection, seed=0):
        super().__init__()
        W = np.random.default_rng(seed).standard_normal((n_classes, projection), np.float32)
        self.W = parameter("softmax/W", W * np.float32(math.sqrt(1 / projection)))
        self.b = parameter("softmax/b", np.zeros(n_classes))
        self.max_logits = 2 ** 25 if on_cpu() else 2 ** 30  # computed at once: they must fit in memory

    def construct(self, y, target):
        """-log p(target) under the full softmax: y [n, projection], target int32 [n] -> [n]."""
        n = max(1, self.max_logits // self.b.shape[0])  # positions at once
        log_z = ops.concat([log_sum_exp(y[k:k + n], self.W, self.b) for k in range(0, y.shape[0], n)])
        return log_z - (y * self.W[target]).sum(1) - self.b[target]


# Training does not sum over all classes but over the target and a sample of classes, the negatives: one sample for all
# positions of a direction, drawn without regard to their targets (bilm-tf).

def draw_negatives(rng, n, n_classes):
    """-> n distinct classes, int64 [n], and how many draws it took to find them (as TensorFlow's
    log_uniform_candidate_sampler). n must not exceed n_classes.

    A draw is log-uniform, P(k) = log((k + 2) / (k + 1)) / log(n_classes + 1): nearly Zipf's law, since vocabularies
    begin with the most frequent words.
    """
    drawn = np.empty(0, np.int64)
    while True:
        # exp(v) rounds down to k + 1 where v is between log(k + 1) and log(k + 2). The probability of this, for v
        # uniform between 0 and log(n_classes + 1), is P(k).
        v = rng.random(2 * n) * np.log(n_classes + 1)
        k = np.minimum(np.exp(v).astype(np.int64) - 1, n_classes - 1)  # rounding errors could give n_classes
        drawn = np.append(drawn, k)
        _, firsts = np.unique(drawn, return_index=True)  # where each class is drawn for the first time,
        firsts.sort()                                    # in order: of the draws 5 0 5 3 they are 0 1 3
        if len(firsts) >= n:
            return drawn[firsts[:n]], int(firsts[n - 1]) + 1  # the draws behind the n-th class do not count


def log_expected_count(k, n_draws, n_classes):
    """log q(k) for classes k, an array: q(k) = 1 - (1 - P(k))^n_draws, P as in `draw_negatives`, is the probability
    that n_draws draws hold class k, and so its expected count among the negatives, which are distinct. (n_draws is
    random, but taken as given, as in TensorFlow.)"""
    p = np.log((k + 2) / (k + 1)) / np.log(n_classes + 1)
    return np.log(-np.expm1(n_draws * np.log1p(-p)))


def sampled_softmax(y, W_target, b_target, W_negatives, b_negatives, target_log_q, negative_log_q, not_drawn):
    """The cross entropy of the target among itself and the negatives, log(exp t + Σ_k exp s_k) - t, its mean over
    positions: t is the target's logit minus its log q, s_k is a negative's logit minus its own log q.

    A class that is drawn often is often a wrong answer. To make up for it log q is subtracted, from the target's logit
    as from a negative's (TensorFlow does the same): so the logits learn log p, as under the full softmax. README,
    "Questions", has the proof.
    Where the target is itself one of the negatives (an "accidental hit"), that negative's s_k is t, and exp t is not
    added to Σ_k exp s_k again: not_drawn is 0 there, else 1. (TensorFlow drops the negative instead: the same sum.)

    y [n, projection]; rows of Θs: W_target [n, projection], b_target [n], W_negatives [N, projection], b_negatives [N];
    log q of the classes, [n] and [N]; not_drawn [n].
    """
    t = (y * W_target).sum(1) + b_target - target_log_q  # [n]
    log_sum = log_sum_exp(y, W_negatives, b_negatives - negative_log_q)  # [n], log Σ_k exp s_k
    m = ops.stop_gradient(ops.maximum(log_sum, t))  # so that no exp overflows; m cancels, and so do its gradients
    return (log(ops.exp(log_sum - m) + not_drawn * ops.exp(t - m)) + m - t).mean()


# ---- 6. ELMo: a task-specific combination of the biLM's layers (sections 3.2, 3.3) -----------------------------------

class ScalarMix(nn.Cell):
    """Equation 1: ELMo_k = γ Σ_j s_j h_{k,j}, s = softmax(w).

    w and γ are trained with the task, unless trainable is False; w begins with initial_scalar_parameters, or zeros.
    "... to regularize the ELMo weights by adding λ‖w‖²₂ to the loss" (section 3.3): add to your task's loss
    `lam * (mix.scalar_parameters ** 2).sum()`.
    """

    def __init__(self, mixture_size, do_layer_norm=False, initial_scalar_parameters=None, trainable=True):
        super().__init__()
        w = np.zeros(mixture_size) if initial_scalar_parameters is None else np.asarray(initial_scalar_parameters)
        if w.shape != (mixture_size,) or not mixture_size or not np.isfinite(w).all():
            raise ValueError(f"a mix of {mixture_size} layers takes {mixture_size} finite parameters, not {w.tolist()}")
        self.mixture_size, self.do_layer_norm = mixture_size, do_layer_norm
        self.scalar_parameters, self.gamma = parameter("scalar_parameters", w), parameter("gamma", np.ones(1))
        self.scalar_parameters.requires_grad = self.gamma.requires_grad = trainable

    def construct(self, layers):
        """layers: `mixture_size` tensors of one shape [..., n] -> [..., n]."""
        if len(layers) != self.mixture_size:
            raise ValueError(f"this mix is of {self.mixture_size} layers, not of {len(layers)}")
        if self.do_layer_norm:
            layers = [layer_norm(h) for h in layers]
        s = ops.softmax(self.scalar_parameters, 0)
        return self.gamma * sum([s[j] * h for j, h in enumerate(layers)])


def layer_norm(h):
    """"... in some cases it also helped to apply layer normalization ... to each biLM layer before weighting" (section
    3.2): each token by itself, so that its vector does not depend on its batch. (bilm-tf and AllenNLP take one mean and
    variance of all tokens of the batch.)"""
    centered = h - h.mean(-1, keep_dims=True)
    return centered / ops.sqrt(ops.square(centered).mean(-1, keep_dims=True) + 1e-12)


class Elmo(nn.Cell):
    """ELMo vectors as a layer of a task's network, with the arguments of AllenNLP's `Elmo`, without `module`. It is for
    the network to "concatenate the ELMo vector ELMo_k^task with x_k", here its own embedding of the token, "and pass
    the ELMo enhanced representation [x_k; ELMo_k^task] into the task RNN" (section 3.3).

    options_file, weight_file: see `BiLM`; num_output_representations: how many mixes of the layers, each with its own s
    and γ; requires_grad: train the biLM too; do_layer_norm: see `layer_norm`; dropout: of the vectors, in training mode
    (`set_train()`); vocab_to_cache: ignored; keep_sentence_boundaries: leave <S> and </S> in; scalar_mix_parameters:
    fixed w for all mixes, for example [-9e10, -9e10, 1] for the top layer alone. Unlike AllenNLP's it keeps no state
    between calls.
    """

    def __init__(self, options_file, weight_file, num_output_representations, requires_grad=False, do_layer_norm=False,
                 dropout=0.5, vocab_to_cache=None, keep_sentence_boundaries=False, scalar_mix_parameters=None):
        super().__init__()
        if num_output_representations < 1:
            raise ValueError(f"num_output_representations is {num_output_representations}; ask for 1 or more")
        if vocab_to_cache is not None:
            print("Elmo: vocab_to_cache is not needed: a batch's words are encoded as they come", file=sys.stderr)
        self.bilm = BiLM(options_file, weight_file)
        for p in self.bilm.get_parameters():
            p.requires_grad = requires_grad
        self.requires_grad, self.keep_sentence_boundaries = requires_grad, keep_sentence_boundaries
        self.scalar_mixes = nn.CellList([
            ScalarMix(self.bilm.options.n_layers + 1, do_layer_norm, scalar_mix_parameters,
                      trainable=scalar_mix_parameters is None) for _ in range(num_output_representations)])
        self.dropout = nn.Dropout(p=dropout)

    def construct(self, ids):
        """ids int [batch, tokens, 50] from `data.batch_to_ids` -> {'elmo_representations': one [batch, tokens,
        2 · projection] for each mix, 'mask': bool [batch, tokens]}; with sentence boundaries, tokens + 2."""
        layers, mask, _ = self.bilm(ids, None, self.keep_sentence_boundaries)
        if not self.requires_grad:  # "we first freeze the weights of the biLM" (3.3): its backward pass is not compiled
            layers = [ops.stop_gradient(layer) for layer in layers]
        return {"elmo_representations": [self.dropout(mix(layers)) for mix in self.scalar_mixes], "mask": mask}


# ---- 7. Training and perplexity (sections 3.1, 3.4) ------------------------------------------------------------------

class Batch(NamedTuple):
    """What one training step reads: a chunk of text (data.Chunk) and what is random. n = time · batch, N negatives.

    A stream is one sentence after the other; the backward direction reads each of them from its end. Of "cats sleep"
    and "dogs bark" the forward direction reads <S> cats sleep <S> dogs bark and predicts cats sleep </S> dogs bark
    </S>; the backward one reads </S> sleep cats </S> bark dogs and predicts sleep cats <S> bark dogs <S>, in the same
    time steps. (In bilm-tf the two directions read different text.)

    Each distinct word of the chunk is encoded once, in a row of chars. There are more rows than words: a fixed number
    for short words, a fixed number for longer ones, and so on (the tiers). So batches have the same shapes, but for the
    few that need more rows (the step is compiled again for them), and short words can be encoded in less time.
    """
    chars: np.ndarray           # int32 [words, 50], the distinct words; rows that are left over are 0
    word_index: np.ndarray      # int32 [2, time, batch], the row of the word that is read
    reset_state: np.ndarray     # bool [batch], where the LSTMs of both directions begin from zero (see `make_loss`)
    target: np.ndarray          # int32 [2, n], the class to predict
    negatives: np.ndarray       # int32 [2, N]
    target_log_q: np.ndarray    # float32 [2, n]
    negative_log_q: np.ndarray  # float32 [2, N]
    not_drawn: np.ndarray       # float32 [2, n], see `sampled_softmax`
    masks: np.ndarray           # uint8 (not all devices unstack bool) [layers + 1, 2, time, batch, projection], of
                                # dropout; empty without it


def make_batch(chunk, step, tiers, n_classes, options, seed, rank=0):
    """A chunk of text -> the `Batch` of a step. What is random depends on the seed and the step, so that a run can be
    resumed. All workers have the same negatives, so that a step changes fewer rows of Θs (bilm-tf draws them for each
    device); each has masks of its own."""
    o, target = options, chunk.target.reshape(2, -1)
    if o.sample_softmax:
        rng = np.random.default_rng([seed, step, 1])  # 1 for negatives; 2 for masks, which need other numbers
        samples = [draw_negatives(rng, o.n_negative_samples_batch, n_classes) for _ in range(2)]
        negatives = np.stack([classes for classes, _ in samples])
        n_draws = np.array([[count] for _, count in samples])  # [2, 1]
        target_log_q, negative_log_q = (log_expected_count(k, n_draws, n_classes) for k in (target, negatives))
    else:  # the full softmax is the sampled one with every class drawn, for sure: q = 1, and each target is a negative
        negatives = np.tile(np.arange(n_classes), (2, 1))
        target_log_q, negative_log_q = np.zeros(target.shape), np.zeros(negatives.shape)
    chars, word_index = fill_tiers(tiers, chunk.words, chunk.word_index)  # rows of chars, and the row of each token
    shape = (o.n_layers + 1, *chunk.word_index.shape, o.projection) if o.dropout else (0,)
    return Batch(chars, word_index, chunk.reset_state, target, negatives.astype(np.int32),
                 target_log_q.astype(np.float32), negative_log_q.astype(np.float32),
                 not_drawn=np.array([~np.isin(t, k) for t, k in zip(target, negatives)], np.float32),
                 masks=random_masks([seed, step, 2, rank], shape, o.dropout))


def training_batches(run, corpus, tiers):
    """The endless stream of (`Batch`, position of the text streams after it), from where the `Run` (part 11) stands;
    threads make a few batches ahead."""
    rank, size = run.workers.rank, run.workers.size

    def make(step_and_chunk):
        step, chunk = step_and_chunk
        return make_batch(chunk, step, tiers, len(run.vocabulary), run.options, run.seed, rank), chunk.position

    chunks = read_chunks(corpus, run.vocabulary, run.options, run.seed, run.position, rank, size)
    return prefetch(enumerate(chunks, run.step), make)


def make_step(run, tiers):
    """-> a function that does one training step with a `Batch` (loss, gradient, clipping, Adagrad) and returns the loss
    and the gradient's norm, tensors that the device may still be computing.

    It changes, of the `Run` (part 11),
        bilm          the weights of character CNN and LSTMs
        accumulators  Adagrad's sums of their squared gradients
        tables        W and b of run.softmax (Θs), and the accumulators of these two
        lstm_state    what the LSTMs hand on to the next chunk of their stream
        loss_scaler   with float16, its scale

    The tables are too large to be updated whole: for 793,471 words, W alone is 1.6 GB. But only the rows of the classes
    that the batch names as negatives or targets change. They are copied out, a row for each time that a class is named,
    so that all steps have the same shapes; `make_update` finds how they change, and this is added to the tables.
    """
    update = make_update(run, tiers)

    def step(batch):
        tensors = Batch(*map(Tensor, batch))
        # All workers name the same classes: the negatives, which they share, and the targets of all of them. So row k
        # is of the same class everywhere, and their gradients (0 where only others use a row) can be averaged.
        targets = run.workers.gather(tensors.target)  # [workers, 2, n]
        classes = ops.concat((tensors.negatives.reshape(-1), targets.reshape(-1)))  # [2N + workers · 2n]
        # Rows of W, b, W_sum, b_sum. (Read here, changed below: one graph that did both would copy the whole tables.)
        rows = [ops.gather(table, classes, 0) for table in run.tables]
        # places[k] is the last row of the same class as row k: 2 1 2 for classes 70 50 70. There the gradient's parts
        # are summed. (Any one row of the class would do.)
        places = run.last_places(classes)
        loss, norm, run.lstm_state, changes = update(*rows, places, run.lstm_state, *tensors)
        for table, change in zip(run.tables, changes):
            ops.scatter_add(table, classes, change)
        return loss, norm

    return step


def make_loss(bilm, tiers, workers):
    """-> the function of a batch that returns loss_scale · unroll_steps · loss, which is differentiated; the loss; and
    the LSTMs' state after the batch.

    "Our formulation jointly maximizes the log likelihood of the forward and backward directions" (section 3.1). So the
    loss is the mean of -(log p(t_k | t_1, ..., t_k-1; Θx, →Θ_LSTM, Θs) + log p(t_k | t_k+1, ...; Θx, ←Θ_LSTM, Θs)) / 2,
    here with p of the sampled softmax, unless `make_batch` made it the full one.
    """
    o = bilm.options

    def loss_of(W, b, loss_scale, state, chars, word_index, reset_state, target, negatives, target_log_q,
                negative_log_q, not_drawn, masks):
        """W [rows, projection], b [rows]: the rows of Θs that `make_step` copied out; loss_scale: 1, or with float16 a
        number that keeps gradients from underflow; the rest: the fields of `Batch`, in its order."""
        # The rows are: negatives forward, negatives backward; worker 0's targets forward, backward; worker 1's; ...
        sizes = 2 * [negatives.shape[1]] + 2 * workers.size * [target.shape[1]]
        W, b = ops.split(W, sizes), ops.split(b, sizes)
        own = 2 + 2 * workers.rank  # the first of these parts with this worker's targets
        W_negatives, b_negatives, W_targets, b_targets = W[:2], b[:2], W[own:own + 2], b[own:own + 2]
        x = ops.gather(bilm.encoder(chars, tiers), word_index, 0)  # [2, time, batch, projection]
        # bilm-tf's LSTMs begin from zero in the first step and never again; but `Elmo` and `embed` begin each sentence
        # from zero. So that the LSTMs learn this, a stream's state is set to zero here, for both directions, where a
        # chunk starts at a sentence's start. (Most sentences start within a chunk, and inherit the state before them.)
        state = state * (1 - reset_state.astype(state.dtype)).reshape(-1, 1)
        masks = [ops.unstack(mask) for mask in ops.unstack(masks)] if o.dropout else None
        outputs, state = bilm.contextualize(x, state, masks=masks)
        loss = 0.0
        for d in (0, 1):
            y = drop(outputs[d][-1], masks[-1][d], o.dropout) if o.dropout else outputs[d][-1]
            loss += sampled_softmax(y.reshape(-1, o.projection), W_targets[d], b_targets[d], W_negatives[d],
                                    b_negatives[d], target_log_q[d], negative_log_q[d], not_drawn[d]) / 2
        # bilm-tf differentiates the loss summed over time. Its limit of the gradient's norm is meant for that.
        return loss_scale * o.unroll_steps * loss, loss, state

    return loss_of


def make_update(run, tiers):
    """-> the computation of a training step as one static graph: loss, gradient, clipping, Adagrad. Its W, b, W_sum and
    b_sum are the rows that `make_step` copied out; dW, db and grads the gradients by W, b and the biLM's weights."""
    o, workers, loss_scaler = run.options, run.workers, run.loss_scaler  # loss_scaler: of float16, else None
    weights, accumulators = ms.ParameterTuple(run.bilm.trainable_params()), run.accumulators
    adagrad = ops.ApplyAdagrad()
    # -> the three results of `loss_of`; the gradients of the first, by arguments 0 and 1 (W, b) and by the weights
    gradient = ms.value_and_grad(make_loss(run.bilm, tiers, workers), (0, 1), weights, has_aux=True)

    @compiled
    def update(W, b, W_sum, b_sum, places, state, *batch):
        loss_scale = 1.0 if loss_scaler is None else loss_scaler.scale_value  # a Parameter, read in each step
        (_, loss, new_state), ((dW, db), grads) = gradient(W, b, loss_scale, state, *batch)
        loss, dW, db, *grads = workers.mean((loss, dW, db, *grads))
        # Of the classes 70 50 70 (places 2 1 2), rows 0 and 2 have a part of class 70's gradient each. Adagrad must
        # square their sum (as in bilm-tf): row 2 gets it, and row 0 gets 0, and so changes by 0.
        dW, db = [ops.unsorted_segment_sum(g, places, g.shape[0]) for g in (dW, db)]
        norm = ops.sqrt(sum([sum_of_squares(g) for g in (*grads, dW, db)]))
        if loss_scaler is not None:  # removes loss_scale, and adjusts it; on overflow: norm ∞, gradients 0, old state
            norm, new_state, dW, db, *grads = undo_loss_scale(loss_scaler, norm, state, new_state, [dW, db, *grads])
        scale = ops.minimum(o.all_clip_norm_val / norm, 1.0)  # clips the norm over all parameters together (bilm-tf)
        # Adagrad, in place for all but Θs: sum += g², w -= learning rate · g / √sum; the sums begin at 1 (bilm-tf).
        for w, total, g in zip(weights, accumulators, grads):
            adagrad(w, total, o.learning_rate, scale * g)
        # For the rows of Θs the changes are returned.
        dW, db = scale * dW, scale * db
        dW_sum, db_sum = ops.square(dW), ops.square(db)
        step_W = -o.learning_rate * dW / ops.sqrt(W_sum + dW_sum)
        step_b = -o.learning_rate * db / ops.sqrt(b_sum + db_sum)
        return loss, norm, new_state, (step_W, step_b, dW_sum, db_sum)

    return update


def train(args):
    """Trains a biLM or, with --weights, trains one further: "fine tuning the biLM on domain specific data" (3.4)."""
    run, corpus, heldout = open_run(args)  # part 11: options, text and weights, and where a resumed run stands
    if run.step >= run.n_steps:
        print("all steps are done; more --epochs or --steps train further")
        return
    print(f"{run.n_steps:,} steps of {run.tokens_per_step:,} tokens; compiling the training step", flush=True)

    # The first chunks tell how many rows of each length the words of a chunk need.
    tiers = measure_tiers(read_chunks(corpus, run.vocabulary, run.options, run.seed))
    step = make_step(run, tiers)
    perplexity = make_perplexity(run.bilm, run.softmax, run.vocabulary, heldout, run.workers) if heldout else None
    batches, first_step = training_batches(run, corpus, tiers), run.step + 1
    with stop_signals() as signals, contextlib.closing(batches):  # signals: a list of those that ask to stop
        for batch, position in batches:
            loss, norm = step(batch)  # forward and backward, clipping, Adagrad
            run.step, run.position = run.step + 1, position
            run.losses.append((loss, norm))
            epoch_is_over = run.step in run.epoch_ends or run.step == run.n_steps  # or the run is over
            log_is_due = epoch_is_over or run.step % args.log_every == 0
            if log_is_due:
                run.log_loss(args.out)  # the mean of run.losses, which it empties; waits for the device
            # Without held-out text the latest epoch counts as the best.
            is_best = epoch_is_over and (perplexity is None or run.log_and_compare(args.out, perplexity()))
            # Several workers must stop in the same step. They ask each other only in steps that log: it takes time.
            is_asked_to_stop = (log_is_due or run.workers.size == 1) and run.workers.any(len(signals) > 0)
            if epoch_is_over or is_asked_to_stop or (args.save_every and run.step % args.save_every == 0):
                run.save(args.out, is_best)
            if is_asked_to_stop or run.step == run.n_steps:
                break
            if log_is_due or run.step == first_step:
                run.start_clock()  # the next line's tokens/s count from here: without compiling and testing
    if run.step < run.n_steps:
        command = shlex.join(args.argv) + ("" if args.resume else " --resume")
        print(f"stopped after step {run.step:,}, which is saved; to go on: python {command}", flush=True)


class Perplexities(NamedTuple):
    forward: float
    backward: float
    average: float  # exp of the mean loss of both directions (bilm-tf); the paper has an average of 39.7 (3.4)
    predictions: int  # of each direction

    def __str__(self):
        return (f"perplexity forward {self.forward:.2f} backward {self.backward:.2f} average {self.average:.2f} "
                f"over {self.predictions} predictions")


def make_perplexity(bilm, softmax, vocabulary, corpus, workers):
    """-> the function that measures the `Perplexities` of a corpus: every prediction counted once, without dropout, and
    under the full softmax, since exp of the sampled loss is no perplexity. Several workers share the corpus."""
    chunks = functools.partial(read_chunks, corpus, vocabulary, bilm.options)  # without a seed: once, in order
    tiers = measure_tiers(chunks())

    @compiled
    def losses(state, chars, word_index, target):
        """-> -log p of a chunk's predictions, [2, time · batch], and the new state."""
        x = ops.gather(bilm.encoder(chars, tiers), word_index, 0)  # [2, time, batch, projection]
        outputs, state = bilm.contextualize(x, state)
        return ops.stack([softmax(layers[-1].reshape(-1, x.shape[-1]), target[direction].reshape(-1))
                          for direction, layers in enumerate(outputs)]), state

    def inputs(chunk):
        return (*fill_tiers(tiers, chunk.words, chunk.word_index), chunk.target), chunk.valid

    def perplexity():
        # As in bilm-tf, and unlike in training here, a stream's state is never reset: so the figures can be compared.
        total, n, state = np.zeros(2), 0, zero_state(bilm.options, bilm.options.batch_size)
        for arrays, valid in prefetch(chunks(rank=workers.rank, size=workers.size), inputs):
            loss, state = losses(state, *map(Tensor, arrays))
            # `valid` leaves out what is beyond the text's end, in the same time steps of both directions.
            total += loss.asnumpy().astype(np.float64)[:, valid.reshape(-1)].sum(1)
            n += int(valid.sum())
        *total, n = workers.sum([*total, n])
        with np.errstate(over="ignore"):  # inf for a model that has diverged
            return Perplexities(*np.exp([total[0] / n, total[1] / n, sum(total) / (2 * n)]).tolist(), int(n))

    return perplexity


# ---- 8. MindSpore's peculiarities, and what is written out for speed -------------------------------------------------

@ops.constexpr  # a graph computes it once, when it is compiled
def on_cpu():
    return ms.get_context("device_target") == "CPU"


def compiled(function):
    """The function as a static graph. On Ascend level O1 fuses kernels: each launch takes time."""
    return ms.jit(function, jit_level="O0" if on_cpu() else "O1")


def parameter(name, array):
    """A float32 parameter with its name in bilm-tf's files."""
    return Parameter(Tensor(np.asarray(array, np.float32)), name=name)


def matmul(x, y, transpose_x=False, transpose_y=False):
    """x · y, either of them transposed on request. (The gradient of ops.matmul writes out transposed copies.)"""
    return ops.MatMul(transpose_x, transpose_y)(x, y)


def make_matmul(amp):
    """-> `matmul`, with x and y rounded to "float16" or "bfloat16" unless amp is None; float32 in, float32 out."""
    if amp is None:
        return matmul
    if amp not in ("float16", "bfloat16"):
        raise ValueError(f'amp is {amp!r}, but must be None, "float16" or "bfloat16"')
    half = getattr(ms, amp)
    multiplied_as = ms.float32 if on_cpu() else half  # a CPU is slow at half precision

    def rounded_matmul(x, y, transpose_x=False, transpose_y=False):
        x, y = x.astype(half).astype(multiplied_as), y.astype(half).astype(multiplied_as)
        return matmul(x, y, transpose_x, transpose_y).astype(ms.float32)

    return rounded_matmul


# x + b, [n, outputs] + [outputs]: + itself is slow on a CPU, ops.bias_add does not compile where a cell has a bprop.
bias_add = ops.BiasAdd()
sigmoid_grad, tanh_grad = SigmoidGrad(), TanhGrad()  # (y, dy) -> dy · y · (1 - y) and dy · (1 - y²), one kernel each


def log(x):
    return ops.xlogy(ops.ones_like(x), x)  # the last bits of the CPU's ops.log depend on how threads share the work


def tanh(x):
    # On a CPU MindSpore's own is off by 1e-4 beyond |x| = 4.
    return 2 * ops.sigmoid(2 * x) - 1 if on_cpu() else ops.tanh(x)


def random_masks(seed, shape, rate):
    """uint8, 0 with probability `rate`, else 1. From random bits, 16 for each: much faster than from floats."""
    bits = np.random.SFC64(seed).random_raw(math.prod(shape) // 4 + 1).view(np.uint16)
    return (bits[:math.prod(shape)].reshape(shape) >= np.uint16(rate * 2 ** 16)).view(np.uint8)


def sum_of_squares(x):
    return ops.square(x.reshape(x.shape[0], -1)).sum(1).sum()  # one axis at a time: several are many times slower


def undo_loss_scale(loss_scaler, norm, state, new_state, gradients):
    """For float16 -> the norm without the loss scale, the new state, the gradients without the scale. Where these
    overflowed the norm is infinite, the state the old one and the gradients are 0, so that the scale alone changes."""
    finite, scale = ops.isfinite(norm), loss_scaler.scale_value
    results = [ops.where(finite, norm / scale, math.inf), ops.where(finite, new_state, state),
               *[ops.where(finite, g / scale, ops.zeros_like(g)) for g in gradients]]
    loss_scaler.adjust(finite)
    return results


class FastCharEncoder(CharEncoder):
    """`CharEncoder` with one product for the filters of all widths, and less work for short words.

    The words stand in tiers: ((800, 10), (100, 50)) says that the first 800 have at most 10 characters, the next 100 at
    most 50. Behind a word's end all filters see padding alone, and score the same at each such position. The maximum
    needs but one of them: so a tier leaves out the others. (data.measure_tiers chooses tiers; data.fill_tiers finds for
    each word a row that is long enough, and appends rows for the few chunks that need more.)
    """

    def __init__(self, options, rng, amp=None):
        super().__init__(options, rng, amp)
        self.widest = max(width for width, _ in options.filters)
        # Added to the scores, so that no filter wins where it reaches beyond character 50.
        widths = np.repeat(*zip(*options.filters))  # of each filter
        self.beyond = Tensor(np.where(np.arange(MAX_CHARS)[:, None] + widths > MAX_CHARS, -1e4, 0), ms.float32)

    def features(self, embedding, chars, tiers):
        """As `CharEncoder.features`. tiers = ((number of words, their characters), ...), marks of begin and end
        included; whatever is left belongs to the last tier, at full length."""
        # All filters side by side; rows of zeros make each as wide as the widest. (By concat, here and below: ops.pad
        # has a wrong gradient in MindSpore 2.10 from the second run on.)
        kernel = ops.concat([
            ops.concat((W, ops.zeros((1, self.widest - width, self.char_dim, n), ms.float32)), 1).reshape(-1, n)
            for (width, n), W in zip(self.filters, self.W_cnn)], 1)  # [widest · char_dim, filters]
        # The widened filters reach beyond character 50, where there are none.
        chars = ops.concat((chars, ops.zeros((chars.shape[0], self.widest - 1), ms.int32)), 1)
        max_scores, first = [], 0
        for n, limit in (*tiers[:-1], (chars.shape[0], MAX_CHARS)):  # the last takes what is left
            # `limit` positions that see characters, and one that sees padding alone
            max_scores.append(self.max_scores(embedding, chars[first:first + n], kernel, min(limit + 1, MAX_CHARS)))
            first += n
        return self.activation(bias_add(ops.concat(max_scores), ops.concat(list(self.b_cnn))))

    def max_scores(self, embedding, chars, kernel, n_positions):
        """The maximum over the first positions: chars int32 [words, 50 + widest - 1] -> [words, filters]."""
        patches = ops.stack([chars[:, k:k + n_positions] for k in range(self.widest)], -1)  # [words, positions, widest]
        e = ops.gather(embedding, patches, 0).reshape(chars.shape[0] * n_positions, -1)  # [.., widest · char_dim]
        scores = self.matmul(e, kernel).reshape(chars.shape[0], n_positions, -1)  # [words, positions, filters]
        if n_positions + self.widest - 1 > MAX_CHARS:  # only then a widened filter may stand beyond character 50
            scores = scores + self.beyond[:n_positions]
        # On a CPU pooling makes a training step some 4 % faster (small); on Ascend it may not compute in float32.
        if on_cpu():
            return ops.MaxPool((n_positions, 1))(scores.expand_dims(0)).reshape(chars.shape[0], -1)
        return ops.max(scores, 1)[0]


class FastRecurrence(Recurrence):
    """`Recurrence`, but each weight's gradient is one product over all time steps, not the sum of one for each."""

    def bprop(self, x, h, c, W, B, W_P, out, dout):
        """dz is the gradient of z. Only dout[0] is used: the last h and c go on to the next chunk, and
        backpropagation ends there."""
        _, hs, cs, saved = out
        cs = (c,) + cs  # cs[t] is what step t begins with, cs[t + 1] what it makes
        W_x, W_h = W[:x.shape[2]], W[x.shape[2]:]
        dh_outside, dh, dc = ops.unstack(dout[0]), ops.zeros_like(h), ops.zeros_like(c)
        dgates, ous, dhs = (), (), ()
        for t in range(len(saved) - 1, -1, -1):
            i, j, f, o, u = saved[t]
            dh = ops.select(ops.abs(hs[t]) < self.proj_clip, dh_outside[t] + dh, ops.zeros_like(dh))  # 0 where clipped
            dou = self.matmul(dh, W_P, transpose_y=True)
            dc = ops.select(ops.abs(cs[t + 1]) < self.cell_clip, dc + tanh_grad(u, dou * o), ops.zeros_like(dc))
            dgate = ops.concat((sigmoid_grad(i, dc * j), tanh_grad(j, dc * i), sigmoid_grad(f, dc * cs[t]),
                                sigmoid_grad(o, dou * u)), 1)  # of what i, j, f, o are made from, [batch, 4 dim]
            dgates, ous, dhs = (dgate,) + dgates, (o * u,) + ous, (dh,) + dhs
            dc, dh = dc * f, self.matmul(dgate, W_h, transpose_y=True)
        # Of all time steps, [time · batch, ..]
        xs, hs, dgates = x.reshape(-1, x.shape[2]), ops.concat((h,) + hs[:-1]), ops.concat(dgates)
        dW = ops.concat((self.matmul(xs, dgates, transpose_x=True), self.matmul(hs, dgates, transpose_x=True)))
        dB = self.matmul(ops.ones((1, dgates.shape[0]), dgates.dtype), dgates)[0]  # twice as fast as dgates.sum(0)
        dW_P = self.matmul(ops.concat(ous), ops.concat(dhs), transpose_x=True)
        dx = self.matmul(dgates, W_x, transpose_y=True).reshape(x.shape)
        return dx, ops.zeros_like(h), ops.zeros_like(c), dW, dB, dW_P


class LogSumExp(nn.Cell):
    """log Σ_k exp(y · W_k): y [n, projection], W [classes, projection] -> [n]. The logits, [n, classes], are the
    largest tensor of a step: to save memory, bprop computes them again."""

    def construct(self, y, W):
        z = matmul(y, W, transpose_y=True)  # [n, classes]
        # softmax(z)_k = exp z_k / Σ exp z, so log Σ exp z = z_k - log softmax(z)_k; softmax is one kernel, and its
        # largest number the most precise.
        return z.max(axis=1) - log(ops.Softmax()(z).max(axis=1))

    def bprop(self, y, W, out, dout):
        p, dout = ops.Softmax()(matmul(y, W, transpose_y=True)), dout.reshape(-1, 1)  # p = d log Σ exp z / dz
        return dout * matmul(p, W), matmul(p, dout * y, transpose_x=True)


log_sum_exp_of_product = LogSumExp()


def log_sum_exp(y, W, b):
    """log Σ_k exp(y · W_k + b_k): y [n, projection], W [classes, projection], b [classes] -> [n]."""
    # As one more column of W: to add b to the logits takes longer.
    y = ops.concat((y, ops.ones((y.shape[0], 1), y.dtype)), 1)
    return log_sum_exp_of_product(y, ops.concat((W, b.reshape(-1, 1)), 1))


# ---- 9. Embedding files of sentences ---------------------------------------------------------------------------------

class Embedder:
    """The biLM's layers for any sentences: the same sentence always gets the same vectors.

    Sentences are read in streams side by side, a few time steps at once; where one ends, the stream's next begins. The
    shapes are fixed, so that little is compiled, and each distinct word is encoded once.
    """
    STREAMS, TIME = 256, 4  # few time steps, since a sentence leaves the rest of its last ones empty
    MAX_WORDS = 1 << 17     # word representations that are kept for the next call
    WORDS = 128             # that are encoded at once
    TIERS = ((96, 14), (32, MAX_CHARS))

    def __init__(self, bilm):
        self.options, self.index = bilm.options, {}
        self.x = np.empty((0, bilm.options.projection), np.float32)  # representations of the words in index

        @compiled
        def encode(chars):
            return bilm.encoder(chars, self.TIERS)

        @compiled
        def read(x, begins, state):
            outputs, state = bilm.contextualize(x, state * (1 - begins.astype(state.dtype)).reshape(-1, 1))
            return ops.stack([ops.stack(layers) for layers in outputs]), state  # [2, layers, time, streams, projection]

        self.encode, self.read = encode, read

    def __call__(self, sentences):
        """Lists of words -> a list of float32 [layers + 1, words, 2 · projection], h_0 ... h_L of equation 1."""
        check_sentences(sentences)
        n_layers, size = self.options.n_layers, self.options.projection
        text = [["<S>", *words, "</S>"] for words in sentences]
        ends = np.cumsum([0, *map(len, text)])
        row = self.rows_of(itertools.chain.from_iterable(text))  # of x, for each token of all sentences
        layers = np.empty((n_layers + 1, len(row), 2 * size), np.float32)
        layers[0, :, :size] = layers[0, :, size:] = self.x[row]
        schedule, state = self.schedule(ends), zero_state(self.options, self.STREAMS)
        begins = np.zeros(len(row) + 1, np.uint8)
        begins[ends[:-1]] = 1
        for t in with_progress(range(0, schedule.shape[1], self.TIME), lambda n, seconds: (
                f"reading: {n * self.TIME:,} of {schedule.shape[1]:,} time steps, {seconds:.0f} s")):
            now = schedule[:, t:t + self.TIME]  # [2, time, streams]
            outputs, state = self.read(Tensor(self.x[row[now]]), Tensor(begins[now[0, 0]]), state)
            for direction, h in enumerate(outputs.asnumpy()):
                filled = now[direction] >= 0
                layers[1:, now[direction][filled], direction * size:(direction + 1) * size] = h[:, filled]
        return [layers[:, begin + 1:end - 1] for begin, end in zip(ends, ends[1:])]

    def schedule(self, ends):
        """Which token each stream reads at each time step, int [2, time, streams], -1 for none; direction 1 reads each
        sentence from its end. The longest sentences come first, each in the stream that is free first."""
        lengths, free, starts = np.diff(ends), [(0, stream) for stream in range(self.STREAMS)], []
        for k in np.argsort(-lengths, kind="stable"):
            if lengths[k] > 2:  # not only <S> and </S>
                t, stream = heapq.heappop(free)
                starts.append((t, stream, k))
                heapq.heappush(free, (t + -(-lengths[k] // self.TIME) * self.TIME, stream))
        schedule = np.full((2, max(free)[0], self.STREAMS), -1, np.int32)
        for t, stream, k in starts:
            tokens = np.arange(ends[k], ends[k + 1])
            schedule[:, t:t + len(tokens), stream] = tokens, tokens[::-1]
        return schedule

    def rows_of(self, words):
        """The rows of x where words stand, int [words]; those not seen before are encoded."""
        if len(self.index) > self.MAX_WORDS:
            self.index, self.x = {}, self.x[:0]
        known = len(self.index)
        rows = np.array([self.index.setdefault(word, len(self.index)) for word in words], np.int32)
        new, x = list(itertools.islice(self.index, known, None)), [self.x]
        for k in range(0, len(new), self.WORDS):
            some = new[k:k + self.WORDS]
            chars, row = fill_tiers(self.TIERS, some, np.arange(len(some)))
            x.append(self.encode(Tensor(chars)).asnumpy()[row])
        self.x = np.concatenate(x)
        return rows


def embed(args):
    """Writes the vectors of a file of sentences, one array for each line: '0', '1', ..."""
    if not args.output.endswith((".npz", ".hdf5")):
        raise InputError(f"{args.output}: the name must end in .npz or .hdf5")
    check_outputs([args.output], [args.input, *model_files(args)], args.overwrite)
    bilm, _, _ = open_model(args, with_softmax=False)
    write_arrays(args.output, sentence_vectors(Embedder(bilm), args.input))


def sentence_vectors(embedder, path, tokens_at_once=1 << 15):
    """Yields ("0", vectors of line 0), ... of a file of tokenized sentences."""
    start, n, n_tokens, block, size = time.perf_counter(), 0, 0, [], 0
    for line in itertools.chain(open_text(path), [None]):
        if line is not None:
            block.append(line.split())
            size += len(block[-1]) + 2
        if block and (line is None or size >= tokens_at_once):
            for vectors in map(np.copy, embedder(block)):  # parts of one array: the last would keep it all in memory
                yield str(n), vectors
                n, n_tokens = n + 1, n_tokens + vectors.shape[1]
            speed = n_tokens / (time.perf_counter() - start)
            print(f"{n:,} sentences, {n_tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr)
            block, size = [], 0
    if not n:
        raise InputError(f"{path}: is empty; give one sentence a line")


# ---- 10. The file formats of bilm-tf and AllenNLP --------------------------------------------------------------------

JSON_KEYS = {f.name: f.name for f in fields(Options)} | {
    "filters": "char_cnn.filters", "n_highway": "char_cnn.n_highway", "char_dim": "char_cnn.embedding.dim",
    "activation": "char_cnn.activation", "n_layers": "lstm.n_layers", "dim": "lstm.dim",
    "projection": "lstm.projection_dim", "use_skip_connections": "lstm.use_skip_connections",
    "cell_clip": "lstm.cell_clip", "proj_clip": "lstm.proj_clip"}
VALID = {"n_highway": (0, 16), "char_dim": (1, 1024), "n_layers": (1, 16), "dim": (1, 65536), "projection": (1, 65536),
         "n_epochs": (1, 1 << 20), "cell_clip": (0.01, 1e9), "proj_clip": (0.01, 1e9), "dropout": (0, 0.99),
         "batch_size": (1, 65536), "unroll_steps": (1, 1024), "n_negative_samples_batch": (1, 1 << 24),
         "all_clip_norm_val": (1e-9, 1e9), "learning_rate": (1e-9, 1e9), "n_tokens_vocab": (0, 1 << 30)}


def check_options(options):
    """InputError where an option's value makes no sense."""
    for f in fields(Options):
        value, key = getattr(options, f.name), JSON_KEYS[f.name]
        if f.name == "filters":
            rule = f"[[width, number], ...] (tuples in Python), a width 1 to {MAX_CHARS}"
            valid = isinstance(value, tuple) and value and all(
                isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
                and 1 <= pair[0] <= MAX_CHARS and 1 <= pair[1] <= 65536 for pair in value)
        elif f.name == "activation":
            rule, valid = "relu or tanh", value in ("relu", "tanh")
        elif f.type is bool:
            rule, valid = "true or false", type(value) is bool
        else:
            low, high = VALID[f.name]
            rule = f"{f.type.__name__}, {low} to {high}"
            valid = (type(value) is f.type or f.type is float and type(value) is int) and low <= value <= high
        if not valid:
            raise InputError(f"{key} is {value!r:.40}, but must be {rule}")
    if options.projection > sum(n for _, n in options.filters):
        raise InputError(f"lstm.projection_dim {options.projection} is more than there are filters")


SIZES = {"tiny": Options(filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)), n_highway=1, dim=256, projection=64,
                         n_negative_samples_batch=1024, learning_rate=0.1),  # 0.2 is too much for little text
         "small": Options(n_highway=1, dim=1024, projection=128),
         "medium": Options(n_highway=1, dim=2048, projection=256),
         "original": Options()}


def read_options(path):
    """The `Options` of a JSON file in bilm-tf's format; InputError where it cannot be used. What is about training may
    be missing, since AllenNLP's files lack it, and takes bilm-tf's values."""
    content, values = read_json(path), {}
    for name, key in JSON_KEYS.items():
        if content.get(key) is not None:
            values[name] = content[key]
        elif "." in key:
            raise InputError(f"{path}: lacks {key}, which the model's shape depends on")
    fixed = {"char_cnn.max_characters_per_token": (MAX_CHARS,), "char_cnn.n_characters": (261, 262),
             "bidirectional": (True,)}
    for key, known in fixed.items():
        if content.get(key) not in (None, *known):
            raise InputError(f"{path}: {key} must be {json.dumps(known[0])}, as in every published model")
    unknown = sorted(key for key in {*content} - {*fixed, *JSON_KEYS.values()} if not key.startswith("run."))
    if unknown:
        print(f"{path}: ignores {', '.join(unknown)}", file=sys.stderr)
    if isinstance(values["filters"], list):
        values["filters"] = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in values["filters"])
    try:
        return Options(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_json(path):
    """A file of nested dictionaries, see `flat`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return flat(json.load(file))
    except (ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{path}: not JSON ({error}); correct it, or choose a --size") from None


def flat(content, prefix=""):
    """Nested dictionaries as one, the keys of which are a.b.c."""
    return {name: value for key, inner in content.items() for name, value in (
        flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}).items()}


def as_json(options, **run):
    """bilm-tf's JSON format, as nested dictionaries; a run's folder adds what else the run consists of."""
    content = {"char_cnn": {"max_characters_per_token": MAX_CHARS, "n_characters": 262}}
    for name, path in JSON_KEYS.items():
        *outer, key = path.split(".")
        node = content
        for part in outer:
            node = node.setdefault(part, {})
        node[key] = getattr(options, name)
    return json.loads(json.dumps({**content, **({"run": run} if run else {})}))  # tuples become lists, as read back


def write_text(path, text):
    with written(path) as draft, open(draft, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def published_name(p):
    """A parameter's name in bilm-tf's files: its own, less what the cells around it prefix."""
    return p.name.rpartition(".")[2]


def import_h5py(path):
    try:
        import h5py
        return h5py
    except ImportError:
        raise InputError(f"{path}: .hdf5 files need h5py; install it with: pip install h5py") from None


@contextlib.contextmanager
def open_arrays(path):
    """Opens a .npz or .hdf5 file -> the names in it, and a function that reads the array of a name."""
    if os.fspath(path).endswith(".npz"):
        with zipfile.ZipFile(path) as archive:
            def read(name):
                with archive.open(name + ".npy") as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):  # at the end its checksum is compared
                        raise ValueError(f"{name} is longer than it says")
                    return array
            yield [name[:-len(".npy")] for name in archive.namelist()], read
    else:
        h5py, names = import_h5py(path), []
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            yield names, lambda name: file[name][...]


def load_weights(path, parameters, about=()):
    """Reads parameters from a .npz or .hdf5 -> the arrays of the names in `about`. InputError where one is missing, of
    another shape or not finite, or where the file holds more layers."""
    wanted = {published_name(p): p for p in parameters}
    try:
        with open_arrays(path) as (names, read):
            for name in names:
                if re.match("CNN|RNN", name) and name not in wanted and any("RNN" in other for other in wanted):
                    raise InputError(f"{path}: holds {name}, which these options do not ask for; correct the options")
            for name, p in wanted.items():
                if name not in names:
                    raise InputError(f"{path}: has no array {name}, which these options ask for")
                array = read(name)
                if array.shape != p.shape or array.dtype != np.float32:
                    raise InputError(f"{path}: {name} is {array.dtype} {list(array.shape)}, but these options ask for "
                                     f"float32 {list(p.shape)}")
                if not np.isfinite(array).all():
                    raise InputError(f"{path}: {name} holds numbers that are not finite; the model has diverged")
                p.set_data(Tensor(array))
            return [read("run/" + name) for name in about]
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # whatever numpy, zipfile and h5py raise, each with errors of its own
        raise InputError(f"{path}: damaged, or not such a file ({str(error).splitlines()[:1]!r:.200})") from None


def write_arrays(path, arrays):
    """Writes (name, array) pairs one by one to a .npz or .hdf5 file, which appears under its name when it is whole."""
    with written(path) as draft:
        if path.endswith(".npz"):
            with open(draft, "wb") as file:
                with zipfile.ZipFile(file, "w") as archive:
                    for name, array in arrays:
                        with archive.open(name + ".npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        else:
            with import_h5py(path).File(draft, "w") as file:
                for name, array in arrays:
                    if not has_room(path, array.nbytes):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    file.create_dataset(name, data=array)


@contextlib.contextmanager
def written(path):
    """A name to write a file under. In the end the file is moved to `path`, whole; after an error it is removed."""
    draft = f"{path}.{os.getpid()}.part"
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        if error.filename not in (None, draft, path):
            raise
        raise InputError(f"{path}: could not be written ({error.strerror or str(error).splitlines()[0]}); is the disk "
                         "full? Files written before are intact") from None
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def export(args):
    """Writes a run's best weights as an .hdf5 that bilm-tf and AllenNLP read, and its options beside it."""
    if not args.output.endswith((".hdf5", ".h5")):
        raise InputError(f"{args.output}: the name must end in .hdf5")
    options_file = re.sub(r"(_?weights)?\.(hdf5|h5)$", "", args.output) + "_options.json"
    check_outputs([args.output, options_file], model_files(args), args.overwrite)
    bilm, softmax, _ = open_model(args)
    everything = [*bilm.get_parameters(), *softmax.get_parameters()]
    write_arrays(args.output, ((published_name(p), p.asnumpy()) for p in everything))
    write_text(options_file, json.dumps(as_json(bilm.options), indent=1))
    print(f"wrote {args.output} and {options_file}")


# ---- 11. A run's folder: checkpoints, resuming, the log --------------------------------------------------------------

class Run:
    """What a training run consists of: the model, Adagrad's accumulators, and where it stands."""

    def __init__(self, options, vocabulary, seed=0, amp=None, workers=None):
        self.options, self.vocabulary, self.seed, self.amp = options, vocabulary, seed, amp
        self.workers, n_classes = workers or Workers(), len(vocabulary)
        self.bilm, self.softmax = BiLM(options, seed=seed, amp=amp), Softmax(n_classes, options.projection, seed)
        self.accumulators = ms.ParameterTuple([accumulator(p) for p in self.bilm.trainable_params()])
        self.tables = [self.softmax.W, self.softmax.b, accumulator(self.softmax.W), accumulator(self.softmax.b)]
        self.last_place = Parameter(Tensor(np.full(n_classes, -1, np.int32)), requires_grad=False)  # see last_places
        # float16 underflows below 6e-8 and overflows above 65,504: the scale doubles until it does, then halves.
        self.loss_scaler = ms.amp.DynamicLossScaler(64, 2, 1000) if amp == "float16" else None
        self.lstm_state = zero_state(options, options.batch_size)
        self.step, self.position, self.best = 0, None, math.inf
        self.losses = []   # (loss, norm) of each step since the last line of the log
        self.log = []      # lines of log.csv
        self.own_checkpoints = set()  # those that stood in the folder when this process last looked
        self.clock = None  # (step, time) from which the speed is measured

    def plan(self, corpus, n_steps=None):
        """How long to train: the options' epochs, which are counted from the text, or n_steps if these are fewer."""
        o, n_predictions = self.options, corpus.tokens + corpus.sentences  # a sentence of n tokens has n + 1
        self.tokens_per_step = o.batch_size * o.unroll_steps * self.workers.size
        self.epoch_ends = [epoch * n_predictions // self.tokens_per_step for epoch in range(1, o.n_epochs + 1)]
        self.n_steps = min(self.epoch_ends[-1], n_steps or self.epoch_ends[-1])

    def last_places(self, classes):
        """The last place at which each of the classes [n] stands in this list, int32 [n]: for 70 50 70 60, 2 1 2 3."""
        ops.scatter_max(self.last_place, classes, ops.arange(len(classes)).astype(ms.int32))
        places = ops.gather(self.last_place, classes, 0)
        ops.scatter_update(self.last_place, classes, ops.full_like(classes, -1))
        return places

    def fetch_losses(self):
        """-> losses as numbers, float [steps, 2]; waits for the device. InputError where the run must not go on."""
        self.losses = [[float(x.asnumpy()) if isinstance(x, Tensor) else x for x in pair] for pair in self.losses]
        numbers = np.reshape(self.losses, (-1, 2))
        finite = np.isfinite(numbers).all(1)
        if not finite.all() and (self.loss_scaler is None or not finite.any()):
            k = int(finite.argmin())
            raise InputError(f"step {self.step - len(numbers) + k + 1}: the loss is {numbers[k, 0]}, the gradient's "
                             f"norm {numbers[k, 1]}; checkpoints from before are good; train with a lower --lr")
        return numbers[finite]

    def epoch(self):
        """The number of the epoch that the last step belonged to, from 1."""
        return 1 + sum(end < self.step for end in self.epoch_ends)  # the ends are numbers of last steps

    def start_clock(self):
        self.clock = self.step, time.perf_counter()

    def log_loss(self, folder):
        """One line on the console and in log.csv: the mean loss since the last, tokens a second, the time left."""
        epoch, loss, speed, left = self.epoch(), self.fetch_losses()[:, 0].mean(), "", ""
        if self.clock:
            rate = (self.step - self.clock[0]) / (time.perf_counter() - self.clock[1])
            speed = f"{rate * self.tokens_per_step:.0f}"
            left = f"{int(speed):,} tokens/s  {math.ceil((self.n_steps - self.step) / rate / 60)} min left"
        print(f"step {self.step:,} of {self.n_steps:,}  epoch {epoch}  sampled loss {loss:.4f}  {left}", flush=True)
        self.losses = []
        self.log.append(f"{self.step},{epoch},{loss:.6f},{speed},,,")
        self.write_log(folder)

    def log_and_compare(self, folder, scores):
        """At an epoch's end: adds the held-out `Perplexities` to the last line -> whether it is the best so far."""
        print(f"epoch {self.epoch()}: held-out {scores}", flush=True)
        self.log[-1] = self.log[-1][:-2] + f"{scores.forward:.4f},{scores.backward:.4f},{scores.average:.4f}"
        self.write_log(folder)
        is_best, self.best = scores.average < self.best, min(self.best, scores.average)
        return is_best

    def write_log(self, folder):
        if self.workers.rank == 0:
            write_text(os.path.join(folder, "log.csv"), "\n".join([
                "step,epoch,loss,tokens_per_second,heldout_forward,heldout_backward,heldout_average", *self.log, ""]))

    def parameters(self):
        scale = [self.loss_scaler.scale_value] if self.loss_scaler else []
        return [*self.bilm.get_parameters(), *self.accumulators, *self.tables, *scale]

    def save(self, folder, is_best):
        """Writes step-N.npz, keeps the last two of these, and the best as best.npz. Worker 0 does it for all."""
        losses = self.fetch_losses()
        states = self.workers.gather(self.lstm_state).asnumpy()
        positions = self.workers.gather(Tensor(self.position)).asnumpy()
        if self.workers.rank:
            return
        if not set(checkpoints(folder)) <= self.own_checkpoints:
            raise InputError(f"{folder}: another process trains this run, too; it goes on, this one stops")
        about = {"run/step": self.step, "run/positions": positions, "run/best": self.best, "run/losses": losses,
                 "run/lstm_states": states, "run/log": "\n".join(self.log).encode(),
                 "run/trained_with": trained_with(self.options, self.vocabulary),
                 "run/n_finite": self.loss_scaler.counter.asnumpy() if self.loss_scaler else 0}
        # The best first: after a crash between the two, this epoch ends again and is the best again.
        for name in ["best.npz"] * is_best + [f"step-{self.step}.npz"]:
            write_arrays(os.path.join(folder, name), itertools.chain(
                about.items(), ((published_name(p), p.asnumpy()) for p in self.parameters())))
        for old in checkpoints(folder)[:-2]:
            os.remove(old)
        self.own_checkpoints = set(checkpoints(folder))

    def resume(self, folder):
        """Takes over the last checkpoint that is whole; where there is none yet, the run begins."""
        self.own_checkpoints = set(checkpoints(folder))
        for path in reversed(checkpoints(folder)):
            try:
                step, best, losses, positions, states, log, n_finite = load_weights(path, self.parameters(), (
                    "step", "best", "losses", "positions", "lstm_states", "log", "n_finite"))
            except InputError as error:
                print(f"{error}; trying the one before", flush=True)
                continue
            check_trained_with(path, self.options, self.vocabulary)
            self.step, self.best, self.losses = int(step), float(best), losses.tolist()
            self.log = str(log.astype(str)).splitlines()
            self.position, self.lstm_state = positions[self.workers.rank], Tensor(states[self.workers.rank])
            if self.loss_scaler:
                self.loss_scaler.counter.set_data(Tensor(n_finite))
            return
        if checkpoints(folder):
            raise InputError(f"{folder}: all of its checkpoints are damaged; train into another --out")
        if os.path.exists(os.path.join(folder, "best.npz")):
            raise InputError(f"{folder}: has best.npz, but no checkpoint to go on from; train into another --out, and "
                             "give it as --weights after export to go on from its weights")


def accumulator(p):
    """Adagrad's sum of squares for a parameter, 1 at first as in bilm-tf."""
    return Parameter(ops.ones_like(p), name="adagrad/" + published_name(p), requires_grad=False)


def trained_with(options, vocabulary=None):
    """The checksums, in every checkpoint, of the options (but for n_epochs, which may grow) and of the vocabulary."""
    texts = [json.dumps(as_json(replace(options, n_epochs=1, n_tokens_vocab=0)))]
    texts += ["\n".join(vocabulary.words)] if vocabulary else []
    return [zlib.crc32(text.encode()) for text in texts]


def check_trained_with(path, options, vocabulary=None):
    """InputError unless the options and the vocabulary are those with which a checkpoint was trained."""
    now = trained_with(options, vocabulary)
    with open_arrays(path) as (names, read):  # earlier versions did not note it
        if "run/trained_with" in names and read("run/trained_with")[:len(now)].tolist() != now:
            raise InputError(f"{path}: was trained with another options.json or vocab than stands there; restore it")


def checkpoints(folder):
    """The paths of a run's checkpoints, oldest first."""
    found = [re.fullmatch(r"step-(\d+)\.npz", name) for name in os.listdir(folder)]
    return [os.path.join(folder, match[0]) for match in sorted(filter(None, found), key=lambda match: int(match[1]))]


def open_run(args):
    """Reads and checks what training needs -> the `Run`, its corpus and its held-out corpus (or None)."""
    workers = Workers()
    if workers.rank:
        sys.stdout = open(os.devnull, "w")  # worker 0 speaks for all
    options = read_options(args.options) if args.options else SIZES[args.size or "original"]
    given = {name: getattr(args, name) for name in ("batch_size", "learning_rate", "n_epochs")}
    options = replace(options, **{name: value for name, value in given.items() if value is not None})
    vocabulary, corpus = Vocabulary(args.vocab), Corpus(args.data)
    heldout, n_words = Corpus(args.heldout) if args.heldout else None, len(vocabulary)
    n_streams, n_steps = options.batch_size * workers.size, options.unroll_steps
    if corpus.tokens + corpus.sentences < n_streams * n_steps or corpus.sentences < workers.size:
        raise InputError(f"{args.data}: {corpus.tokens:,} tokens in {corpus.sentences:,} sentences are less than one "
                         f"batch of {n_streams} × {n_steps} = {n_streams * n_steps:,}; add text, or lower --batch-size")
    if options.sample_softmax and options.n_negative_samples_batch > n_words:
        raise InputError(f"{args.vocab}: {n_words:,} words are fewer than n_negative_samples_batch, "
                         f'{options.n_negative_samples_batch:,}; lower it, or set "sample_softmax" to false')
    if options.n_tokens_vocab not in (0, n_words):
        print(f"{args.options}: n_tokens_vocab is {options.n_tokens_vocab:,}, but {args.vocab} has {n_words:,} words, "
              "which decides", flush=True)
    run = Run(replace(options, n_tokens_vocab=n_words), vocabulary, args.seed, args.amp, workers)
    run.plan(corpus, args.steps)
    if args.weights and not (args.resume and checkpoints(args.out)):
        load_weights(args.weights, run.bilm.get_parameters())
        with open_arrays(args.weights) as (names, _):
            if any(name.startswith("softmax/") for name in names):
                load_weights(args.weights, run.softmax.get_parameters())
            else:
                print(f"{args.weights} has no softmax: that table starts fresh", flush=True)
    if workers.rank == 0:
        prepare_folder(args, run, corpus, heldout)
    if args.resume:
        run.resume(args.out)
        print(f"{args.out}: resuming after step {run.step:,}", flush=True)
    print(f"{corpus.sentences:,} sentences, {corpus.tokens:,} tokens, {n_words:,} words; "
          f"{sum(p.size for p in run.bilm.get_parameters()):,} parameters and "
          f"{run.softmax.W.size + run.softmax.b.size:,} of the softmax", flush=True)
    if args.weights and heldout and not run.step:
        scores = make_perplexity(run.bilm, run.softmax, vocabulary, heldout, workers)()
        print(f"before training: held-out {scores}", flush=True)
    return run, corpus, heldout


def prepare_folder(args, run, corpus, heldout):
    """Makes the folder of a new run, or checks that the one to be resumed is this very run. options.json is the last
    file that is written: with it, a folder is a run."""
    identity = lambda c: c and f"{c.sentences:,} sentences, {c.tokens:,} tokens, checksum {c.checksum:08x}"
    options_file, vocabulary = (os.path.join(args.out, name) for name in ("options.json", "vocab"))
    paths = {name: os.path.abspath(path) for name in ("data", "heldout", "weights") if (path := getattr(args, name))}
    content = as_json(
        run.options, seed=run.seed, amp=run.amp, workers=run.workers.size, data=identity(corpus),
        heldout=identity(heldout), weights=args.weights and os.path.realpath(args.weights),
        vocabulary=f"{trained_with(run.options, run.vocabulary)[1]:08x}", arguments=[
            f"--{key}={x}" for key, x in {**paths, "seed": args.seed, "amp": args.amp}.items() if x is not None])
    if not args.resume:
        os.makedirs(args.out, exist_ok=True)
        if any(not re.fullmatch(rf"vocab|{RUN_FILE}\.\d+\.part", name) for name in os.listdir(args.out)):
            raise InputError(f"{args.out}: is not empty; give another --out, or --resume to go on with its run")
        if os.path.exists(vocabulary) and Vocabulary(vocabulary).words != run.vocabulary.words:
            raise InputError(f"{vocabulary}: exists and is another than --vocab; give another --out")
    else:
        begun = read_json(options_file)
        for key, new in flat(content).items():
            old = begun.get(key)
            if old != new and key != "run.arguments" and not (key == "n_epochs" and type(old) is int and old <= new):
                raise InputError(f"{args.out}: its run has {key} {old!r:.80}, not {new!r:.80}; resume it as it was "
                                 "begun, or train into another --out")
    for name in os.listdir(args.out):
        if re.fullmatch(rf"{RUN_FILE}\.\d+\.part", name):  # of a run that was killed
            os.remove(os.path.join(args.out, name))
    if not os.path.exists(vocabulary):
        write_text(vocabulary, "\n".join([*run.vocabulary.words, ""]))  # not copied: --vocab may be compressed
    write_text(options_file, json.dumps(content, indent=1))


@contextlib.contextmanager
def stop_signals():
    """A list to which SIGINT and SIGTERM add, instead of ending the program; the next one ends it."""
    received = []

    def note(number, frame):
        received.append(number)
        print(f"{signal.Signals(number).name}: stopping soon", file=sys.stderr, flush=True)
        signal.signal(number, signal.default_int_handler)

    before = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield received
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def model_files(args):
    """The options, vocabulary and weights that `open_model` reads."""
    if args.weights:
        return [args.options, args.vocab, args.weights]
    return [os.path.join(args.out, name) for name in ("options.json", "vocab", "best.npz")]


def open_model(args, with_softmax=True):
    """The model of --options and --weights, or the best of the training run in --out -> its `BiLM`, `Softmax` and
    `Vocabulary` (the last two None where they are not asked for)."""
    options, vocabulary_file, weights = model_files(args)
    if not args.weights and not os.path.isdir(args.out):
        raise InputError(f"{args.out}: no such folder; train with --out {args.out} first")
    if not args.weights and not os.path.exists(weights):
        raise InputError(f"{weights}: no such file; " + (
            "it is written at the end of an epoch: go on training with --resume" if checkpoints(args.out)
            else f"train with --out {args.out} first"))
    bilm, softmax, vocabulary = BiLM(options, weights), None, None
    if with_softmax:
        vocabulary = Vocabulary(vocabulary_file)
        softmax = Softmax(len(vocabulary), bilm.options.projection)
        load_weights(weights, softmax.get_parameters())
    if not args.weights:
        check_trained_with(weights, bilm.options, vocabulary)
    return bilm, softmax, vocabulary


def test(args):
    """Prints the perplexities of held-out text."""
    bilm, softmax, vocabulary = open_model(args)
    print(make_perplexity(bilm, softmax, vocabulary, Corpus(args.data), Workers())())


# ---- 12. Several devices ---------------------------------------------------------------------------------------------

@ms.jit_class  # so that graphs may call it
class Workers:
    """The processes that msrun started together (data parallelism), each with its own streams of text, as if they were
    one device with `size` times the streams. Without msrun, there is one."""

    def __init__(self):
        self.rank, self.size = 0, 1
        if "MS_ROLE" in os.environ:  # msrun's
            # Seconds that workers wait for each other: compiling, reading and testing take some longer than others.
            for name, seconds in (("MS_CPU_COMM_OP", "86400"), ("HCCL_CONNECT", "7200"), ("HCCL_EXEC", "17340")):
                os.environ.setdefault(name + "_TIMEOUT", seconds)
            communication.init()
            self.rank, self.size = communication.get_rank(), communication.get_group_size()
            self.all_reduce, self.all_gather = ops.AllReduce(), ops.AllGather()
            self.gather(Tensor([0.0])).asnumpy()  # connects, while all of them are here

    def gather(self, x):
        """x of each worker, [size, *x.shape]."""
        x = x.reshape(1, *x.shape)
        return x if self.size == 1 else self.all_gather(x)

    def mean(self, tensors):
        """Each tensor's mean over the workers, all in one collective."""
        if self.size == 1:
            return tensors
        flat = self.all_reduce(ops.concat([x.reshape(-1) for x in tensors])) / self.size
        return [part.reshape(x.shape) for part, x in zip(ops.split(flat, [x.size for x in tensors]), tensors)]

    def sum(self, numbers):
        """The sums of numbers over the workers."""
        if self.size == 1:
            return numbers
        high = np.array(numbers, np.float32)  # in two float32, which all devices can add
        return self.all_reduce(Tensor(np.float32([high, numbers - high]))).asnumpy().sum(0, np.float64).tolist()

    def any(self, condition):
        """Whether a condition holds for any worker."""
        return self.sum([int(condition)])[0] > 0


# ---- 13. Command line ------------------------------------------------------------------------------------------------

COMMANDS = {"train": (train, "train (the default)"), "test": (test, "perplexity of held-out text"),
            "embed": (embed, "vectors of sentences"), "export": (export, "a run's weights as .hdf5")}


def make_parser():
    parser = ArgumentParser(prog="elmo.py", usage="elmo.py [train] | test | embed | export [options]",
                            description="Train ELMo's biLM, test it, embed sentences with it, or export its weights.",
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(options=None, vocab=None, weights=None)  # for commands without these flags
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {name: commands.add_parser(name, prog=f"elmo.py {name}", help=about, allow_abbrev=False)
               for name, (_, about) in COMMANDS.items()}
    file = {"metavar": "FILE", "type": file_name}

    def add(names, *flags, **rest):
        for name in names.split():
            parsers[name].add_argument(*flags, **rest)

    add("train test embed export", "--device", "--device_target", default="Ascend", choices=("Ascend", "CPU"),
        help="default: %(default)s")
    add("train test embed export", "--out", "--train_url", metavar="DIR", type=file_name,
        help="folder of a training run: train writes it, the others read its best model (default: model)")
    add("train test", "--vocab", "--vocab_path", **file, help="the vocabulary (default: vocab; of a run, its own)")
    add("train test embed", "--options", "--options_path", **file, help="options in bilm-tf's JSON format")
    add("train test embed", "--weights", **file, help="weights in bilm-tf's format, .hdf5. train: start from them; "
        "test, embed: use them, with --options, instead of --out")
    add("export", "--weights", dest="output", **file, required=True, help="file to write, .hdf5")
    add("train test", "--data", "--data_url", **file, default="train.mindrecord",
        help="text that data.py converted (default: %(default)s)")
    parsers["test"].set_defaults(data="heldout.mindrecord")
    add("train", "--heldout", **file,
        help="text to test on after each epoch (default: heldout.mindrecord, if there is one)")
    add("train", "--size", choices=SIZES, help="of the model, where there are no --options (default: original)")
    add("train", "--epochs", "--epoch_num", dest="n_epochs", metavar="N", type=int,
        help="passes over the text (default: as in the options, 10)")
    add("train", "--steps", metavar="N", type=natural, help="stop after N steps")
    add("train", "--lr", dest="learning_rate", metavar="X", type=float,
        help="learning rate (default: as in the options, 0.2)")
    add("train", "--batch-size", metavar="N", type=int, help="streams of text (default: as in the options, 128)")
    add("train", "--seed", metavar="N", type=lambda text: natural(text, least=0), default=0,
        help="decides all that is random (default: 0)")
    add("train", "--log-every", metavar="K", type=natural, default=100,
        help="steps from one line of the log to the next (default: %(default)s)")
    add("train", "--save-every", metavar="K", type=natural,
        help="steps from one checkpoint to the next (default: one after each epoch)")
    add("train", "--resume", action="store_true",
        help="go on with the run in --out from its last checkpoint, as if it had not stopped")
    add("train", "--amp", choices=("float16", "bfloat16"), help="matrix products in this type (default: float32)")
    add("embed", "--input", **file, required=True, help="tokenized sentences, one a line")
    add("embed", "--output", **file, required=True, help="vectors to write, one array a line: .npz or .hdf5")
    add("embed export", "--overwrite", action="store_true", help="replace files that exist")
    parser.epilog = "\n".join(p.format_help() for p in parsers.values())
    return parser


def parse_arguments(argv):
    """The command line's arguments, with the defaults that depend on others; InputError where they make no sense."""
    parser = make_parser()
    with_command = argv if argv and argv[0] in (*COMMANDS, "-h", "--help") else ["train", *argv]
    args = parser.parse_args(with_command)
    out = args.out or "model"
    if args.command == "train" and args.resume:  # what the command line leaves open is as it was
        options_file = os.path.join(out, "options.json")
        if not os.path.isfile(options_file):
            raise InputError(f"{out}: no run to resume; leave out --resume to begin one")
        begun = read_json(options_file).get("run.arguments")
        if not isinstance(begun, list) or not all(isinstance(text, str) for text in begun):
            raise InputError(f"{options_file}: damaged; train into another --out")
        args = parser.parse_args(["train", *begun, *with_command[1:]])
        args.options = args.options or (None if args.size else options_file)
        of_run = os.path.join(out, "vocab")
        args.vocab = args.vocab or (of_run if os.path.exists(of_run) else None)
    elif args.command == "train":
        if args.heldout is None and os.path.exists("heldout.mindrecord"):
            args.heldout = "heldout.mindrecord"
        if args.size and args.options:
            parser.error("--size and --options exclude each other")
    else:
        if bool(args.weights) != bool(args.options):
            parser.error("--weights and --options go together")
        if args.weights and args.out:
            parser.error("--out and --weights exclude each other")
        if args.vocab and not args.weights:
            parser.error("--vocab goes with --weights; a run has its own")
    args.out, args.vocab, args.argv = out, args.vocab or "vocab", [sys.argv[0], *argv]
    return args


def run_command(argv):
    args = parse_arguments(argv)
    try:
        ms.set_device(args.device)
    except RuntimeError:
        raise InputError(f"--device {args.device}: there is none on this machine; use --device CPU") from None
    if args.device == "Ascend":  # float32 products in float32: the first 910 would silently compute in float16
        ms.device_context.ascend.op_precision.precision_mode("must_keep_origin_dtype")
        ms.device_context.ascend.op_precision.matmul_allow_hf32(False)
    COMMANDS[args.command][0](args)


def main(argv=None):
    """Runs the command line -> the exit status."""
    return run_program("elmo.py", lambda: run_command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that drafts of files are removed
    sys.exit(main())
