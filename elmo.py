"""ELMo in one file: "Deep contextualized word representations" (Peters et al., NAACL 2018), in
MindSpore.

    python data.py --input corpus/            text to train.mindrecord
    python elmo.py --device Ascend            train the paper's biLM on it
    python elmo.py embed --input sentences.txt --output vectors.npz

Read this: the paper                          Skip on first reading: what surrounds it
  1. Options (section 3.4)                      8. MindSpore's peculiarities, and speed
  2. Character CNN (3.1, 3.4)                   9. Embedding files of sentences
  3. LSTM with projection (3.1, 3.4)           10. The file formats of bilm-tf and AllenNLP
  4. Bidirectional language model (3.1)        11. A run: checkpoints, resuming, the log
  5. Softmax, full and sampled (3.1)           12. Several devices
  6. ELMo: the scalar mix (3.2, 3.3)           13. Command line
  7. Training and perplexity (3.1, 3.4)

Where the paper is silent, bilm-tf decides, the authors' program in TensorFlow, unless a comment
says otherwise.

For readers of PyTorch: an nn.Cell is a Module and its construct is forward; a ParameterTuple is a
ParameterList whose parameters keep their names, here bilm-tf's; ms.jit compiles a function to a
static graph; a cell's bprop, where there is one, is its own backward pass; ops.gather(p, i, 0) is
p[i], and ops.scatter_add(p, i, d) is p.index_add_(0, i, d).

Part 8 has small functions, where MindSpore's own are slow or not quite right:

    matmul(x, y), bias_add(x, b), log(x), tanh(x)     bias_add is x + b
    log_sum_exp(y, W, b)                              log Σ_k exp(y · W_k + b_k)
    make_matmul(amp)                                  -> matmul in the type amp (None: float32)
    random_masks(seed, shape, rate)                   of dropout
    parameter(name, initial values), compiled(f)      a Parameter, and ms.jit
    in_pieces(tiers, n_words)                         words in groups: (how many, how long), ...

data.py reads the text.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from data import (  # before mindspore: it quiets MindSpore's log
    MAX_CHARS, SPECIAL, Corpus, InputError, Vocabulary, as_lists, char_ids, check_outputs,
    fill_tiers, measure_tiers, open_text, positive, prefetch, read_chunks, run_program,
    with_progress, word_chars, write_lines, written)
import mindspore as ms
from mindspore import Parameter, Tensor, communication, nn, ops
from mindspore.ops.auto_generate import SigmoidGrad, TanhGrad

# ---- 1. Options: every hyperparameter of the paper's model ---------------------------------------

@dataclass(frozen=True)
class Options:
    """The hyperparameters; the defaults are the paper's, or else bilm-tf's. InputError where a
    value makes no sense (`check_options`)."""
    # "The context insensitive type representation uses 2048 character n-gram convolutional filters
    # followed by two highway layers ... and a linear projection down to a 512 representation."
    # (section 3.4; the rest is bilm-tf's)
    filters: tuple = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    #                (width, number of filters of this width), ...
    n_highway: int = 2
    char_dim: int = 16
    activation: str = "relu"  # or tanh
    # "The final model uses L = 2 biLSTM layers with 4096 units and 512 dimension projections and a
    # residual connection from the first to second layer." (3.4)
    n_layers: int = 2
    dim: int = 4096
    projection: int = 512
    use_skip_connections: bool = True
    n_epochs: int = 10  # "After training for 10 epochs on the 1B Word Benchmark" (3.4)
    # What follows is not in the paper but in bilm-tf.
    cell_clip: float = 3.0     # the cell state c of an LSTM stays within ± this,
    proj_clip: float = 3.0     # and its output h within ± this; None: not clipped
    dropout: float = 0.1                 # of each LSTM layer's input and of the last one's output
    batch_size: int = 128                # streams of text, read side by side by each device
    unroll_steps: int = 20               # tokens of each stream in a training step
    sample_softmax: bool = True          # False: train with the full softmax
    n_negative_samples_batch: int = 8192
    all_clip_norm_val: float = 10.0      # limit of the gradient's norm, all parameters together
    learning_rate: float = 0.2           # of Adagrad

    def __post_init__(self):
        check_options(self)


# ---- 2. Character CNN: a word's characters to a context-independent token representation x_k -----

class CharEncoder(nn.Cell):
    """"... a context-independent token representation x_k^LM (via token embeddings or a CNN over
    characters)" (section 3.1)."""

    def __init__(self, o, rng, amp=None):
        super().__init__()
        self.matmul, self.filters = make_matmul(amp), o.filters
        n_filters = sum(n for _, n in o.filters)

        def normal(*shape):  # [inputs .., outputs], of variance 1 / inputs
            return rng.normal(0, math.sqrt(1 / math.prod(shape[:-1])), shape)

        if o.activation == "relu":
            self.activation = ops.relu
            initial_filters = lambda *shape: rng.uniform(-0.05, 0.05, shape)
        else:
            self.activation, initial_filters = tanh, normal
        # Of ids 1 to 261 (see `construct`); 0, no word, has no row.
        self.char_embed = parameter("char_embed", rng.uniform(-1, 1, (261, o.char_dim)))
        W_cnn, b_cnn, highway = [], [], []
        for k, (width, n) in enumerate(o.filters):
            # [1, width, char_dim, n] is the shape that TensorFlow's conv2d takes.
            W_cnn.append(parameter(f"CNN/W_cnn_{k}", initial_filters(1, width, o.char_dim, n)))
            b_cnn.append(parameter(f"CNN/b_cnn_{k}", np.zeros(n)))
        for k in range(o.n_highway):
            # y = g · new + (1 - g) · x, see `construct`: "carry" makes g, "transform" what is new
            # (bilm-tf's names). -2: g is small at first, and y nearly x.
            for name, bias in (("carry", -2.0), ("transform", 0.0)):
                W = parameter(f"CNN_high_{k}/W_{name}", normal(n_filters, n_filters))
                highway += [W, parameter(f"CNN_high_{k}/b_{name}", np.full(n_filters, bias))]
        self.W_cnn, self.b_cnn = ms.ParameterTuple(W_cnn), ms.ParameterTuple(b_cnn)
        self.highway = ms.ParameterTuple(highway)
        self.projection = ms.ParameterTuple([
            parameter("CNN_proj/W_proj", normal(n_filters, o.projection)),
            parameter("CNN_proj/b_proj", np.zeros(o.projection))])

    def construct(self, chars, tiers=()):
        """chars int32 [words, 50] -> x_k [words, projection].

        chars, see data.char_ids: 1 to 256 are bytes, 257 and 258 stand for <S> and </S>, 259 and
        260 for a word's begin and end; 261 is padding, and embedded like any other; 0 is no word,
        and embedded as zeros. tiers, to save time: ((800, 10), (100, 50)) says that the first 800
        words have at most 10 characters, begin and end marks included, and the next 100 at most 50
        (`data.fill_tiers` puts the short ones first).
        Words after these (without tiers: all) may be of any length; they are read 128 at a time, to
        save memory.
        """
        no_word = ops.zeros_like(self.char_embed[:1])
        embedding = ops.concat((no_word, self.char_embed))  # [262, char_dim]
        features, first = [], 0
        for n, limit in in_pieces(tiers, chars.shape[0]):  # tiers, then (128, 50), ...
            features.append(self.features(embedding, chars[first:first + n], limit))
            first += n
        x = ops.concat(features)  # [words, filters]
        # y = g · relu(x · W_t + b_t) + (1 - g) · x, g = sigmoid(x · W_c + b_c)
        for k in range(0, len(self.highway), 4):
            W_c, b_c, W_t, b_t = self.highway[k:k + 4]
            g = ops.sigmoid(bias_add(self.matmul(x, W_c), b_c))
            x = g * ops.relu(bias_add(self.matmul(x, W_t), b_t)) + (1 - g) * x  # [words, filters]
        W_proj, b_proj = self.projection
        return bias_add(self.matmul(x, W_proj), b_proj)  # [words, projection]

    def features(self, embedding, chars, limit):
        """"2048 character n-gram convolutional filters" (3.4), each one's maximum over positions:
        chars int32 [words, 50] -> [words, filters].

        score[p] = [e[p], ..., e[p + width - 1]] · W, for p = 0 ... 50 - width;
        feature = activation(max_p score[p] + b)

        limit: no word here has more characters, marks included. From p = limit on filters see
        padding alone, with the same score at each p: one of these is enough, p = limit.
        """
        features = []
        for (width, n), W, b in zip(self.filters, self.W_cnn, self.b_cnn):
            n_positions = min(limit, MAX_CHARS - width) + 1  # p = 0 ... limit (or the last)
            # What the filters see at each position: [words, positions, width]
            seen = ops.stack([chars[:, k:k + n_positions] for k in range(width)], 2)
            e = ops.gather(embedding, seen, 0)  # [words, positions, width, char_dim]
            W = W.reshape(-1, n)  # [width · char_dim, n]
            scores = self.matmul(e.reshape(-1, len(W)), W).reshape(-1, n_positions, n)
            features.append(self.activation(bias_add(scores.max(axis=1), b)))
        return ops.concat(features, 1)  # [words, filters]


# ---- 3. LSTM with projection ---------------------------------------------------------------------

class Recurrence(nn.Cell):
    """One direction of one layer: the LSTM of section 3.1, its output projected (Sak et al., 2014).
    At each time step

        i, j, f, o = [x_t; h] · W + B       input gate, candidate, forget gate, output gate
        c = clip(sigmoid(f + 1) · c + sigmoid(i) · tanh(j))
        h = clip((sigmoid(o) · tanh(c)) · W_P)

    The forget gate's + 1 and the clips are bilm-tf's. The weights are inputs, not parameters of
    this cell: `FastRecurrence` (part 8) computes the same with its own backward pass, a bprop, and
    in MindSpore a bprop returns gradients of inputs only.
    """

    def __init__(self, cell_clip, proj_clip, amp=None):
        super().__init__()
        self.cell_clip = math.inf if cell_clip is None else cell_clip
        self.proj_clip = math.inf if proj_clip is None else proj_clip
        self.matmul = make_matmul(amp)

    def construct(self, x, h, c, W, B, W_P):
        """x [time, batch, input], h [batch, projection], c [batch, dim],
        W [input + projection, 4 dim], B [4 dim], W_P [dim, projection] -> h of all time steps,
        [time, batch, projection]; and all that each step computed, for a backward pass."""
        steps = ()
        for x_t in ops.unstack(x):  # x[t] would be slow
            gates = bias_add(self.matmul(ops.concat((x_t, h), 1), W), B)  # [batch, 4 dim]
            i, j, f, o = ops.split(gates, c.shape[1], 1)
            i, j, f, o = ops.sigmoid(i), tanh(j), ops.sigmoid(f + 1.0), ops.sigmoid(o)
            c = ops.clamp(f * c + i * j, -self.cell_clip, self.cell_clip)
            u = tanh(c)
            h = ops.clamp(self.matmul(o * u, W_P), -self.proj_clip, self.proj_clip)
            steps += ((h, c, i, j, f, o, u),)
        return ops.stack([step[0] for step in steps]), steps


class ProjectedLSTM(nn.Cell):
    """One direction of one layer with its weights, which begin Glorot-uniform, biases 0
    (bilm-tf)."""

    def __init__(self, name, o, rng, recurrence):
        super().__init__()

        def glorot(m, n):
            return rng.uniform(-math.sqrt(6 / (m + n)), math.sqrt(6 / (m + n)), (m, n))

        self.weights = ms.ParameterTuple([
            parameter(name + "W_0", glorot(2 * o.projection, 4 * o.dim)),  # of [x; h]
            parameter(name + "B", np.zeros(4 * o.dim)),
            parameter(name + "W_P_0", glorot(o.dim, o.projection))])
        self.recurrence = recurrence

    def construct(self, x, state):
        """x [time, batch, projection]; state [batch, projection + dim], h beside c -> h of all time
        steps, of the shape of x, and the state after the last one, without a gradient."""
        W, B, W_P = self.weights
        h, c = ops.split(state, [W_P.shape[1], W_P.shape[0]], 1)
        y, steps = self.recurrence(x, h, c, W, B, W_P)
        h, c = steps[-1][:2]
        return y, ops.stop_gradient(ops.concat((h, c), 1))


# ---- 4. Bidirectional language model -------------------------------------------------------------

class BiLM(nn.Cell):
    """"We tie the parameters for both the token representation (Θx) and Softmax layer (Θs) in the
    forward and backward direction while maintaining separate parameters for the LSTMs in each
    direction" (section 3.1): the character encoder and 2 · L LSTMs; for Θs see `Softmax`.

    options: an `Options` or the path of an options file; weight_file: weights in bilm-tf's format,
    or None for the initial values of training, drawn from `seed`; amp: None or "bfloat16", see
    `make_matmul`.
    """

    def __init__(self, options, weight_file=None, seed=0, amp=None):
        super().__init__()
        self.options = o = options if isinstance(options, Options) else read_options(options)
        rng = np.random.default_rng(seed)
        self.encoder = CharEncoder(o, rng, amp)
        # One for all, so that it is compiled once.
        recurrence = FastRecurrence(o.cell_clip, o.proj_clip, amp)
        self.lstms = nn.CellList([  # layer 0 forward, layer 0 backward, layer 1 forward, ...
            ProjectedLSTM(f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/", o, rng,
                          recurrence)
            for layer in range(o.n_layers) for direction in (0, 1)])
        self.begin, self.end = (  # <S>, </S>
            Tensor(char_ids(word)).reshape(1, 1, -1) for word in SPECIAL[:2])
        if weight_file is not None:
            load_weights(weight_file, self.get_parameters())

    def contextualize(self, x, state, masks=None):
        """The LSTMs over a piece of text -> [[→h_1, ..., →h_L], [←h_1, ..., ←h_L]], each
        [time, batch, projection], and the new state.

        x [2, time, batch, projection], each direction in its own reading order; state [2, layers,
        batch, projection + dim], what the LSTMs remember from the text before; masks [layers + 1,
        2, time, batch, projection], of dropout, for each layer's input and the last one's output.
        """
        o, outputs, states = self.options, [], []  # states: all of direction 0, then of direction 1
        if masks is not None:
            masks = [ops.unstack(mask) for mask in ops.unstack(masks)]
        for direction, (x_d, old_states) in enumerate(zip(ops.unstack(x), ops.unstack(state))):
            y, layers = x_d, []
            for layer, old_state in enumerate(ops.unstack(old_states)):
                y_in = y if masks is None else drop(y, masks[layer][direction], o.dropout)
                y, new_state = self.lstms[2 * layer + direction](y_in, old_state)
                if layer > 0 and o.use_skip_connections:
                    # "a residual connection from the first to second layer" (3.4): of the input
                    # after dropout (bilm-tf).
                    y = y + y_in
                layers.append(y)
                states.append(new_state)
            if masks is not None:
                layers[-1] = drop(layers[-1], masks[-1][direction], o.dropout)
            outputs.append(layers)
        return outputs, ops.stack(states).reshape(state.shape)

    def layers(self, x, lengths):
        """R_k = {h_k,j | j = 0, ..., L} (section 3.2) of whole sentences.

        x [sentences, time, projection], <S> and </S> included; lengths [sentences], the time steps
        of each, these two included -> layers + 1 tensors [sentences, time, 2 · projection], forward
        beside backward; h_k,0 is x_k twice."""
        both = ops.stack((x, reverse(x, lengths))).swapaxes(1, 2)  # [2, time, sentences, ..]
        # From zero, so that vectors do not depend on earlier calls (bilm-tf's do).
        state = zero_state(self.options, x.shape[0])
        (forward, backward), _ = self.contextualize(both, state)
        layers = [ops.concat((x, x), -1)]
        for f, b in zip(forward, backward):
            b = reverse(b.swapaxes(0, 1), lengths)
            layers.append(ops.concat((f.swapaxes(0, 1), b), -1))
        return layers

    def construct(self, ids, keep_sentence_boundaries=False):
        """Sentences of any lengths: ids int [.., tokens, 50] from `data.batch_to_ids` ->
        (layers, mask): see `layers`, here [.., tokens, 2 · projection] each; mask bool
        [.., tokens], where there is a token. <S> and </S> are added, and left out of the result
        unless keep_sentence_boundaries says otherwise: then there are 2 tokens more. ValueError for
        ids of another shape.
        """
        shape = getattr(ids, "shape", ())
        outer = shape[:-2]
        if not outer or 0 in outer or shape[-1] != MAX_CHARS:
            raise ValueError("ids of sentences are [sentences, tokens, 50 characters], as "
                             f"batch_to_ids makes them, not {list(shape)}")
        ids = ids if isinstance(ids, Tensor) else Tensor(ids)  # numpy's arrays, too
        begin = self.begin.tile((*outer, 1, 1))  # [.., 1, 50]
        room_for_end = ops.zeros((*outer, 1, MAX_CHARS), ms.int32)
        ids = ops.concat((begin, ids.astype(ms.int32), room_for_end), -2)
        time = ids.shape[-2]
        ids = ids.reshape(-1, time, MAX_CHARS)  # [batch, time, 50]
        lengths = (ids > 0).any(-1).sum(1, dtype=ms.int32) + 1  # [batch]: <S>, words, 1 for </S>
        position = ops.arange(time).astype(ms.int32)
        is_token = position < lengths.reshape(-1, 1)  # [batch, time]
        is_last = position == lengths.reshape(-1, 1) - 1
        ids = ops.where(is_last.expand_dims(2), self.end, ids)  # [batch, time, 50]
        x = self.encoder(ids.reshape(-1, MAX_CHARS)).reshape(-1, time, self.options.projection)
        layers = self.layers(x, lengths)
        if not keep_sentence_boundaries:
            # The new step t is the old t + 1. It is a word, not </S>, if something follows it, that
            # is, if the old t + 2 is a token: so the mask begins at 2.
            layers, is_token = [h[:, 1:-1] for h in layers], is_token[:, 2:]
        is_kept = is_token.expand_dims(2).astype(x.dtype)
        layers = [(h * is_kept).reshape(*outer, *h.shape[1:]) for h in layers]
        return layers, is_token.reshape(*outer, -1)


def reverse(x, lengths):
    """Each sentence from its end: x [sentences, time, ..], the first `lengths` steps reversed."""
    return ops.reverse_sequence(x, lengths, seq_dim=1, batch_dim=0)


def zero_state(options, batch):
    """The state of LSTMs that have read nothing: h beside c, of each direction and layer."""
    size = options.projection + options.dim
    return ops.zeros((2, options.n_layers, batch, size), ms.float32)


def reset(state, begins):
    """The state of streams, with zeros for those where begins, [batch], is 1 or True."""
    return state * (1 - begins.astype(state.dtype)).reshape(-1, 1)


def drop(x, mask, rate):
    """Dropout: x where mask is 1, 0 where it is 0, scaled so that the mean stays."""
    return x * (mask.astype(x.dtype) * (1 / (1 - rate)))


# ---- 5. Softmax, full and sampled ----------------------------------------------------------------

class Softmax(nn.Cell):
    """"The top layer LSTM output ... is used to predict the next token t_k+1 with a Softmax layer"
    (section 3.1), of parameters Θs for both directions: W [classes, projection], b [classes], a
    class for each word of the vocabulary."""
    CLASSES_AT_ONCE = 4096  # so that the memory for logits does not grow with the vocabulary

    def __init__(self, n_classes, projection, seed=0):
        super().__init__()
        W = np.random.default_rng(seed).standard_normal((n_classes, projection), np.float32)
        self.W = parameter("softmax/W", W * np.float32(math.sqrt(1 / projection)))
        self.b = parameter("softmax/b", np.zeros(n_classes))

    def construct(self, y, target):
        """-log p(target) under the full softmax: y [n, projection], target int32 [n] -> [n].

        -log p(target) = log Σ_k exp(y · W_k + b_k) - (y · W_target + b_target)."""
        log_sum = ops.full((y.shape[0],), -math.inf, dtype=ms.float32)  # log 0
        n = self.CLASSES_AT_ONCE
        for k in range(0, self.b.shape[0], n):
            W, b = self.W[k:k + n], self.b[k:k + n]
            log_sum = log_add_exp(log_sum, log_sum_exp(y, W, b))
        W, b = ops.gather(self.W, target, 0), ops.gather(self.b, target, 0)
        return log_sum - (y * W).sum(1) - b


def log_add_exp(a, b):
    """log(exp a + exp b)."""
    m = ops.stop_gradient(ops.maximum(a, b))
    return log(ops.exp(a - m) + ops.exp(b - m)) + m


# Training does not sum over all classes but over the target and a sample of classes, the negatives:
# one sample for all positions of a direction, drawn without regard to their targets (bilm-tf).

def draw_negatives(rng, n, n_classes):
    """-> n distinct classes, int64 [n], and how many draws it took to find them (as TensorFlow's
    log_uniform_candidate_sampler). n must not exceed n_classes.

    A draw is log-uniform, P(k) = log((k + 2) / (k + 1)) / log(n_classes + 1): nearly Zipf's law,
    since vocabularies begin with the most frequent words.
    """
    draws = np.empty(0, int)
    while True:
        # If v is uniform from 0 to log(n_classes + 1), it lies between log(k + 1) and log(k + 2)
        # with probability P(k), and then exp v rounds down to k + 1.
        v = rng.random(2 * n) * np.log(n_classes + 1)
        k = np.minimum(np.exp(v).astype(int) - 1, n_classes - 1)  # errors of rounding
        draws = np.append(draws, k)
        # Which draw is the first of class k; len(draws) if none is. (Of several numbers for a class
        # the last one stays; so they are written from the last draw back.)
        first_draw = np.full(n_classes, len(draws))
        first_draw[draws[::-1]] = np.arange(len(draws))[::-1]
        kept = np.sort(first_draw[first_draw < len(draws)])  # of the draws 5 0 5 3 these are 0 1 3
        if len(kept) >= n:
            n_draws = int(kept[n - 1]) + 1  # the draws behind the n-th class do not count
            return draws[kept[:n]], n_draws


def log_expected_count(k, n_draws, n_classes):
    """log q(k) for classes k, an array: q(k) = 1 - (1 - P(k))^n_draws (P: see `draw_negatives`).

    q(k) is the probability that n_draws draws hold class k; also its expected count, since the
    negatives hold a class once or not at all. (n_draws is random, but taken as given, as in
    TensorFlow.)"""
    p = np.log((k + 2) / (k + 1)) / np.log(n_classes + 1)
    return np.log(-np.expm1(n_draws * np.log1p(-p)))  # accurate for small p, too


def sampled_softmax(y, W_target, b_target, W_negatives, b_negatives, target_log_q, negatives_log_q,
                    is_drawn):
    """The mean over positions of the cross entropy of a softmax over the target and the negatives:

        log(exp t + Σ_{k ≠ target} exp s_k) - t

    with t the target's logit less its log q, s_k a negative's logit less its own. Why less log q:
    let p(k) be the softmax over all classes, and C the target and the negatives together, each
    class j drawn with probability q(j), as if independently. If k, in C, is the target, the other
    classes in C were drawn and those outside were not (C is the same whether k was drawn or not):

        P(C | k is the target) = Π_{j in C, j ≠ k} q(j) · Π_{j not in C} (1 - q(j))

    This is 1 / q(k) times something that is the same for each k in C. So, by Bayes' rule,

        P(k is the target | C) ∝ p(k) · P(C | k is the target) ∝ p(k) / q(k)

    The softmax over C of logits less log q equals this when the logits are log p plus a constant:
    the same logits that the full softmax learns.

    y [n, projection]; rows of Θs: W_target [n, projection], b_target [n], W_negatives
    [N, projection], b_negatives [N]; log q of the classes, [n] and [N]; is_drawn float32 [n]: 1
    where the target is itself one of the negatives, else 0.
    """
    t = (y * W_target).sum(1) + b_target - target_log_q  # [n]
    log_sum = log_sum_exp(y, W_negatives, b_negatives - negatives_log_q)  # of all negatives
    # Add exp t. But where the target is one of the negatives, an "accidental hit", the sum has it
    # already, as s_k = t: there add exp(t - 1e9) = 0. (TensorFlow removes the negative instead,
    # with the same result.)
    return (log_add_exp(log_sum, t - 1e9 * is_drawn) - t).mean()


# ---- 6. ELMo: a task-specific combination of the biLM's layers (sections 3.2, 3.3) ---------------

class ScalarMix(nn.Cell):
    """Equation 1: ELMo_k = γ Σ_j s_j h_{k,j}, s = softmax(w).

    w and γ are trained with the task, unless trainable is False; w begins with
    initial_scalar_parameters, or zeros. "... to regularize the ELMo weights by adding λ‖w‖²₂ to
    the loss" (section 3.3): add to your loss `lam * (mix.scalar_parameters ** 2).sum()`.
    """

    def __init__(self, mixture_size, do_layer_norm=False, initial_scalar_parameters=None,
                 trainable=True):
        super().__init__()
        w = initial_scalar_parameters
        w = [0.0] * mixture_size if w is None else list(w)
        if len(w) != mixture_size:
            raise ValueError(f"a mix of {mixture_size} layers takes as many parameters, not {w}")
        self.do_layer_norm = do_layer_norm
        self.scalar_parameters = parameter("scalar_parameters", w)
        self.gamma = parameter("gamma", np.ones(1))
        self.scalar_parameters.requires_grad = self.gamma.requires_grad = trainable

    def construct(self, tensors, mask=None):
        """tensors: `mixture_size` layers of one shape [.., n] -> [.., n]. mask: as AllenNLP has it;
        not needed, since `layer_norm` is of each token by itself."""
        if len(tensors) != len(self.scalar_parameters):
            raise ValueError(f"{len(tensors)} layers, but this mix is of another number")
        s = ops.softmax(self.scalar_parameters, 0)
        mix = 0.0
        for j, h in enumerate(tensors):
            mix += s[j] * (layer_norm(h) if self.do_layer_norm else h)
        return self.gamma * mix


def layer_norm(h):
    """"... in some cases it also helped to apply layer normalization ... to each biLM layer before
    weighting" (section 3.2): each token by itself, so that its vector does not depend on its batch.
    (bilm-tf and AllenNLP take one mean and variance of all tokens of the batch.)"""
    centered = h - h.mean(-1, keep_dims=True)
    return centered / ops.sqrt(ops.square(centered).mean(-1, keep_dims=True) + 1e-12)


class Elmo(nn.Cell):
    """ELMo vectors as a layer of a task's network, with the arguments of AllenNLP's `Elmo`. The
    network itself must "concatenate the ELMo vector ELMo_k^task with x_k", here its own embedding
    of the token, "and pass the ELMo enhanced representation [x_k; ELMo_k^task] into the task RNN"
    (section 3.3).

    options_file, weight_file: see `BiLM`; num_output_representations: how many mixes of the layers,
    each with its own s and γ; requires_grad: train the biLM, too (or set requires_grad of single
    parameters of `bilm` yourself);
    do_layer_norm: see `layer_norm`; dropout: of the vectors, in training mode (`set_train()`);
    vocab_to_cache: ignored; keep_sentence_boundaries: leave <S> and </S> in;
    scalar_mix_parameters: fixed w for all mixes, with γ = 1, for example [-9e10, -9e10, 1] for the
    top layer alone. Unlike AllenNLP's it keeps no state between calls.
    """

    def __init__(self, options_file, weight_file, num_output_representations, requires_grad=False,
                 do_layer_norm=False, dropout=0.5, vocab_to_cache=None,
                 keep_sentence_boundaries=False, scalar_mix_parameters=None):
        super().__init__()
        if vocab_to_cache is not None:
            print("Elmo: vocab_to_cache is not needed: words are encoded as they come",
                  file=sys.stderr)
        self.bilm = BiLM(options_file, weight_file)
        for p in self.bilm.get_parameters():
            p.requires_grad = requires_grad  # "we first freeze the weights of the biLM" (3.3)
        self.keep_sentence_boundaries = keep_sentence_boundaries
        self.scalar_mixes = nn.CellList([
            ScalarMix(self.bilm.options.n_layers + 1, do_layer_norm, scalar_mix_parameters,
                      trainable=scalar_mix_parameters is None)
            for _ in range(num_output_representations)])
        self.dropout = nn.Dropout(p=dropout)

    def get_output_dim(self):
        return 2 * self.bilm.options.projection

    def construct(self, ids):
        """ids int [.., tokens, 50] from `data.batch_to_ids` -> {'elmo_representations': one
        [.., tokens, 2 · projection] for each mix, 'mask': bool [.., tokens]}; with sentence
        boundaries, tokens + 2."""
        layers, mask = self.bilm(ids, self.keep_sentence_boundaries)
        vectors = [self.dropout(mix(layers)) for mix in self.scalar_mixes]
        return {"elmo_representations": vectors, "mask": mask}


# ---- 7. Training and perplexity (sections 3.1, 3.4) ----------------------------------------------

class Batch(NamedTuple):
    """What one training step reads: a chunk of text (data.Chunk) and what is random. N is the
    number of negatives, n = time · batch that of predictions, each of one direction.

    A stream is one sentence after the other; the backward direction reads each of them from its
    end, in the same time steps. "cats sleep" and "dogs bark" are

        forward    read   <S>   cats   sleep  <S>   dogs  bark
                predict   cats  sleep  </S>   dogs  bark  </S>
        backward   read   </S>  sleep  cats   </S>  bark  dogs
                predict   sleep cats   <S>    bark  dogs  <S>

    Each distinct word of the chunk is encoded once, in a row of chars. A static graph needs fixed
    shapes: so there are rows to spare, a fixed number for short words, a fixed number for longer
    ones, and so on (the tiers). A chunk whose words do not all find room, which is rare, gets 256
    rows more behind these, or 512, ..., for words of any length; the step is compiled for it again.
    """
    target: np.ndarray           # int32 [2, n], the class to predict
    negatives: np.ndarray        # int32 [2, N]
    chars: np.ndarray            # int32 [words, 50], the distinct words; rows left over are 0
    word_index: np.ndarray       # int32 [2, time, batch], the row of the word that is read
    reset_state: np.ndarray      # bool [batch], streams that are at <S> in the first time step
    masks: np.ndarray            # uint8 [layers + 1, 2, time, batch, projection], see `drop`
    target_log_q: np.ndarray     # float32 [2, n]
    negatives_log_q: np.ndarray  # float32 [2, N]
    is_drawn: np.ndarray         # float32 [2, n], see `sampled_softmax`


def make_batch(chunk, step, tiers, n_classes, o, seed, rank=0):
    """A chunk of text -> the `Batch` of a step. What is random depends on the seed and the step, so
    that a run can be resumed. All workers have the same negatives, so that a step changes fewer
    rows of Θs (bilm-tf draws them for each device); each has masks of its own."""
    target = chunk.target.reshape(2, -1)
    if o.sample_softmax:
        rng = np.random.default_rng([seed, step, 1])  # 1 for negatives, 2 for masks
        samples = [draw_negatives(rng, o.n_negative_samples_batch, n_classes) for _ in range(2)]
        negatives = np.stack([classes for classes, _ in samples])  # [2, N]
        n_draws = np.array([[n] for _, n in samples])  # [2, 1]
        target_log_q = log_expected_count(target, n_draws, n_classes)
        negatives_log_q = log_expected_count(negatives, n_draws, n_classes)
    else:  # the full softmax is the sampled one with all classes drawn, log q = 0
        negatives = np.tile(np.arange(n_classes), (2, 1))
        target_log_q, negatives_log_q = np.zeros(target.shape), np.zeros(negatives.shape)
    is_drawn = [np.isin(target[d], negatives[d]) for d in (0, 1)]
    chars, word_index = fill_tiers(tiers, chunk.words, chunk.word_index)
    mask_shape = (o.n_layers + 1, *word_index.shape, o.projection) if o.dropout else (0,)
    masks = random_masks([seed, step, 2, rank], mask_shape, o.dropout)
    return Batch(target, negatives.astype(np.int32), chars, word_index, chunk.reset_state, masks,
                 *(np.asarray(x, np.float32) for x in (target_log_q, negatives_log_q, is_drawn)))


def training_batches(run, corpus, tiers):
    """The endless stream of (`Batch`, position of the text streams after it), from where the `Run`
    (part 11) stands; threads make a few batches ahead."""
    rank, size = run.workers.rank, run.workers.size

    def make(step_and_chunk):
        step, chunk = step_and_chunk
        batch = make_batch(chunk, step, tiers, len(run.vocabulary), run.options, run.seed, rank)
        return batch, chunk.position

    chunks = read_chunks(corpus, run.vocabulary, run.options, run.seed, run.position, rank, size)
    return prefetch(enumerate(chunks, run.step), make)


# Four tables (W and b of the softmax, and Adagrad's sums of squared gradients for each of the two)
# are too large to be updated whole: for 793,471 words W alone is 1.6 GB. But only the rows of the
# classes that a batch names, as negatives or as targets, change. A step copies these rows out,
# finds in a static graph how they change, and adds this to the tables. (A graph that both reads and
# changes a table would copy it.)
#
# The order of the rows: negatives forward, negatives backward, worker 0's targets forward, worker
# 0's targets backward, worker 1's targets forward, ... (All workers have the rows of all, so that
# gradients can be averaged; in rows of another worker's targets they are 0.)
#
# The number of rows is the same in every step: a class that is named several times has several
# rows. Adagrad must square the sum of their gradients, so this goes to one of them, no matter
# which: to row place[r], for row r. The others get 0, and change by 0, so that adding all of them
# to the table changes the class once. If rows 0, 1, 2 are of the classes 70, 50, 70, place is 2, 1,
# 2 (or 0, 1, 0).

def make_step(run, tiers):
    """-> a function that does one training step with a `Batch` and returns its loss and the
    gradient's norm, tensors that the device may still be computing. It changes the `Run`'s weights,
    their sums (`accumulators`), and its `tables`: the softmax's W and b, and their sums."""
    o, bilm, workers = run.options, run.bilm, run.workers
    weights = ms.ParameterTuple(bilm.trainable_params())
    row_of_class = Parameter(Tensor(np.zeros(len(run.vocabulary), np.int32)), requires_grad=False)

    def loss_of(rows_W, rows_b, state, chars, word_index, reset_state, masks, target_log_q,
                negatives_log_q, is_drawn):
        sizes = [negatives_log_q.shape[1]] * 2 + [target_log_q.shape[1]] * (2 * workers.size)
        W, b = ops.split(rows_W, sizes), ops.split(rows_b, sizes)  # of N, N, n, n, ... rows
        x = ops.gather(bilm.encoder(chars, tiers), word_index, 0)  # [2, time, batch, projection]
        # `Elmo` and `embed` read each sentence from a zero state. To learn that, streams that are
        # at <S> when the chunk begins start from zero; within it all go on (bilm-tf: always).
        state = reset(state, reset_state)
        outputs, state = bilm.contextualize(x, state, masks if o.dropout else None)
        loss = 0.0
        for d in (0, 1):  # "jointly maximizes the log likelihood of the forward and backward ..."
            y = outputs[d][-1].reshape(-1, o.projection)  # [n, projection]
            own = 2 + 2 * workers.rank + d  # this worker's targets
            loss += sampled_softmax(y, W[own], b[own], W[d], b[d], target_log_q[d],
                                    negatives_log_q[d], is_drawn[d]) / 2
        return o.unroll_steps * loss, state  # the sum over time, mean over streams (bilm-tf)

    # By rows_W and rows_b (inputs 0 and 1), and by the weights; has_aux: the state passes through.
    gradient = ms.value_and_grad(loss_of, (0, 1), weights, has_aux=True)

    @compiled
    def update(rows_W, rows_b, sums_W, sums_b, place, state, *rest):
        (loss, state), ((dW, db), grads) = gradient(rows_W, rows_b, state, *rest)
        loss, dW, db, *grads = workers.mean((loss, dW, db, *grads))
        # The gradients of a class's rows are summed in its row at `place`, as by
        # zeros.index_add_(0, place, g); the others get 0. Only then Adagrad squares (bilm-tf).
        dW, db = [ops.unsorted_segment_sum(g, place, g.shape[0]) for g in (dW, db)]
        norm = ops.sqrt(sum([sum_of_squares(g) for g in (*grads, dW, db)]))
        scale = ops.minimum(o.all_clip_norm_val / norm, 1.0)  # over all parameters (bilm-tf)
        # Adagrad: sum += g², w -= learning rate · g / √sum; the sums begin at 1 (bilm-tf).
        for w, total, g in zip(weights, run.accumulators, grads):
            ops.ApplyAdagrad()(w, total, o.learning_rate, scale * g)
        dW, db = scale * dW, scale * db
        squares_W, squares_b = ops.square(dW), ops.square(db)
        change_W = -o.learning_rate * dW / ops.sqrt(sums_W + squares_W)
        change_b = -o.learning_rate * db / ops.sqrt(sums_b + squares_b)
        return loss / o.unroll_steps, norm, state, (change_W, change_b, squares_W, squares_b)

    def step(batch):
        target, negatives, *rest = map(Tensor, batch)  # rest: chars ... is_drawn, as in `loss_of`
        targets = workers.gather(target)  # [workers, 2, n], so that all workers name the same rows
        classes = ops.concat((negatives.reshape(-1), targets.reshape(-1)))
        # row_of_class[classes] = 0, 1, 2, ...; of several rows of a class any may stay.
        ops.scatter_update(row_of_class, classes, ops.arange(len(classes)).astype(ms.int32))
        place = ops.gather(row_of_class, classes, 0)
        rows = [ops.gather(table, classes, 0) for table in run.tables]  # of W, b, their sums
        loss, norm, run.lstm_state, changes = update(*rows, place, run.lstm_state, *rest)
        for table, change in zip(run.tables, changes):
            ops.scatter_add(table, classes, change)
        return loss, norm

    return step


def train(args):
    """Trains a biLM or, with --weights, trains one further: "fine tuning the biLM on domain
    specific data" (3.4)."""
    run, corpus, heldout = open_run(args)  # part 11
    # The text's first 20 chunks tell how many rows of each length the words of a chunk need.
    tiers = measure_tiers(read_chunks(corpus, run.vocabulary, run.options, run.seed))
    step = make_step(run, tiers)
    if heldout:
        perplexity = make_perplexity(run.bilm, run.softmax, run.vocabulary, heldout, run.workers)
    batches, first_step = training_batches(run, corpus, tiers), run.step + 1
    losses = []  # since the last line of the log
    run.start_clock()
    while run.step < run.n_steps:
        batch, run.position = next(batches)
        losses.append(step(batch))  # forward and backward, clipping, Adagrad
        run.step += 1
        epoch_is_over = run.step in run.epoch_ends or run.step == run.n_steps
        save_is_due = epoch_is_over or run.step % args.save_every == 0
        log_is_due = save_is_due or run.step % args.log_every == 0
        if log_is_due:
            run.log_losses(losses)  # which waits for the device
            losses = []
        if epoch_is_over and heldout:
            is_best = run.log_heldout(perplexity())  # whether it is the best so far
        else:
            is_best = epoch_is_over  # False within an epoch; without held-out text the latest wins
        if log_is_due and run.workers.rank == 0:
            write_lines(f"{args.out}/log.csv", run.log)
        if save_is_due:
            run.save(args.out, is_best)  # worker 0 writes the states of all
        if log_is_due or run.step == first_step:
            run.start_clock()  # again: compiling (first_step), testing and saving do not count


class Perplexities(NamedTuple):
    """"... the average forward and backward perplexities is 39.7" (3.4), on the paper's corpus."""
    forward: float
    backward: float
    average: float    # exp of the mean loss of both (bilm-tf)
    predictions: int  # of each direction

    def __str__(self):
        return (f"perplexity forward {self.forward:.2f} backward {self.backward:.2f} "
                f"average {self.average:.2f} over {self.predictions} predictions")


def make_perplexity(bilm, softmax, vocabulary, corpus, workers):
    """-> the function that measures the `Perplexities` of a corpus: every prediction once, without
    dropout, under the full softmax, since exp of the sampled loss is no perplexity. Several workers
    share the corpus.

    As in bilm-tf, so that figures compare, and unlike in training here, the state goes on from
    sentence to sentence, and is zero only where a stream begins. A stream's first predictions know
    no text before them: fewer streams (batch_size · workers) make the perplexity slightly lower
    (README, "What differs"). bilm-tf leaves out its last batch, and prints the average only.
    """
    o = bilm.options
    tiers = measure_tiers(read_chunks(corpus, vocabulary, o))  # without a seed: once, in order

    @compiled
    def read(state, chars, word_index):
        """-> the top layer's output, [2 · time · batch, projection], and the new state."""
        x = ops.gather(bilm.encoder(chars, tiers), word_index, 0)
        outputs, state = bilm.contextualize(x, state)
        return ops.stack([layers[-1] for layers in outputs]).reshape(-1, o.projection), state

    def make(chunk):
        return chunk, *fill_tiers(tiers, chunk.words, chunk.word_index)

    def perplexity():
        # forward loss, backward loss, number of predictions
        totals, state = np.zeros(3), zero_state(o, o.batch_size)
        chunks = read_chunks(corpus, vocabulary, o, rank=workers.rank, size=workers.size)
        n_predictions = corpus.tokens + corpus.sentences  # a sentence of n words has n + 1
        n_chunks = math.ceil(n_predictions / (o.batch_size * o.unroll_steps * workers.size))
        for chunk, chars, word_index in with_progress(prefetch(chunks, make), "chunks", n_chunks):
            y, state = read(state, Tensor(chars), Tensor(word_index))
            loss = softmax(y, Tensor(chunk.target.reshape(-1))).asnumpy().reshape(2, -1)
            valid = chunk.valid.reshape(-1)  # False beyond the text's end, for both directions
            totals += [*loss[:, valid].sum(1, np.float64), valid.sum()]
        totals = workers.gather(Tensor(totals, ms.float32)).asnumpy().sum(0, np.float64)
        forward, backward = totals[:2] / totals[2]
        with np.errstate(over="ignore"):  # inf for a model that has diverged
            scores = np.exp([forward, backward, (forward + backward) / 2])
        return Perplexities(*scores.tolist(), n_predictions)

    return perplexity


# ---- 8. MindSpore's peculiarities, and what is written out for speed -----------------------------

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
    """x · y. (The gradient of ops.matmul writes out transposed copies.)"""
    return ops.MatMul(transpose_x, transpose_y)(x, y)


def make_matmul(amp):
    """-> `matmul`, with x and y rounded to bfloat16 if amp says so; float32 in, float32 out."""
    if amp is None:
        return matmul
    if amp != "bfloat16":
        raise ValueError(f'amp is {amp!r}, but must be None or "bfloat16"')
    multiplied_as = ms.float32 if on_cpu() else ms.bfloat16  # which a CPU is slow at

    def rounded_matmul(x, y, transpose_x=False, transpose_y=False):
        x = x.astype(ms.bfloat16).astype(multiplied_as)
        y = y.astype(ms.bfloat16).astype(multiplied_as)
        return matmul(x, y, transpose_x, transpose_y).astype(ms.float32)

    return rounded_matmul


# x + b, [n, outputs] + [outputs]: + itself is slow on a CPU, ops.bias_add fails beside a bprop.
bias_add = ops.BiasAdd()
# (y, dy) -> dy · y · (1 - y) and dy · (1 - y²), one kernel each
sigmoid_grad, tanh_grad = SigmoidGrad(), TanhGrad()


def log(x):
    # The last bits of the CPU's ops.log depend on how threads share the work.
    return ops.xlogy(ops.ones_like(x), x)


def tanh(x):
    # On a CPU MindSpore's own is off by 1e-4 beyond |x| = 4.
    return 2 * ops.sigmoid(2 * x) - 1 if on_cpu() else ops.tanh(x)


def random_masks(seed, shape, rate):
    """0 with probability `rate`, else 1. 16 random bits for each: faster than random floats."""
    n = math.prod(shape)
    bits = np.random.SFC64(seed).random_raw(n // 4 + 1).view(np.uint16)[:n].reshape(shape)
    return (bits >= np.uint16(rate * 2 ** 16)).view(np.uint8)  # not all devices unstack bool


def sum_of_squares(x):
    # One axis at a time: several are many times slower.
    return ops.square(x.reshape(x.shape[0], -1)).sum(1).sum()


@ops.constexpr
def in_pieces(tiers, n_words):
    """The tiers and, for the words beyond them, pieces of 128 words of any length."""
    n_beyond = n_words - sum(n for n, _ in tiers)
    return (*tiers, *[(128, MAX_CHARS)] * -(-n_beyond // 128))


class FastRecurrence(Recurrence):
    """`Recurrence`, but each weight's gradient is one product over all time steps, not the sum of
    one for each."""

    def bprop(self, x, h, c, W, B, W_P, out, dout):
        """dgate is the gradient of what i, j, f, o are made from. Only dout[0] is used: the last h
        and c go on to the next piece of text, and backpropagation ends there."""
        y, steps = out
        W_x, W_h = W[:x.shape[2]], W[x.shape[2]:]
        dy, dh, dc = ops.unstack(dout[0]), ops.zeros_like(h), ops.zeros_like(c)
        dgates, ous, dhs = (), (), ()
        for t in range(len(steps) - 1, -1, -1):
            h_new, c_new, i, j, f, o, u = steps[t]
            c_old = steps[t - 1][1] if t > 0 else c
            dh = ops.select(ops.abs(h_new) < self.proj_clip, dy[t] + dh, ops.zeros_like(dh))
            dou = self.matmul(dh, W_P, transpose_y=True)
            dc = dc + tanh_grad(u, dou * o)
            dc = ops.select(ops.abs(c_new) < self.cell_clip, dc, ops.zeros_like(dc))
            dgate = ops.concat((sigmoid_grad(i, dc * j), tanh_grad(j, dc * i),
                                sigmoid_grad(f, dc * c_old), sigmoid_grad(o, dou * u)), 1)
            dgates, ous, dhs = (dgate,) + dgates, (o * u,) + ous, (dh,) + dhs
            dc, dh = dc * f, self.matmul(dgate, W_h, transpose_y=True)
        # Of all time steps, [time · batch, ..]
        dgates, h_old = ops.concat(dgates), ops.concat((h.expand_dims(0), y[:-1]))
        inputs = ops.concat((x, h_old), 2).reshape(dgates.shape[0], -1)
        dW = self.matmul(inputs, dgates, transpose_x=True)
        ones = ops.ones((1, dgates.shape[0]), dgates.dtype)
        dB = self.matmul(ones, dgates)[0]  # twice as fast as dgates.sum(0)
        dW_P = self.matmul(ops.concat(ous), ops.concat(dhs), transpose_x=True)
        dx = self.matmul(dgates, W_x, transpose_y=True).reshape(x.shape)
        return dx, ops.zeros_like(h), ops.zeros_like(c), dW, dB, dW_P


class LogSumExp(nn.Cell):
    """log Σ_k exp(y · W_k): y [n, size], W [classes, size] -> [n]. The logits, [n, classes], are
    the largest tensor of a step: to save memory, bprop computes them again."""

    def construct(self, y, W):
        z = matmul(y, W, transpose_y=True)  # [n, classes]
        # softmax(z)_k = exp z_k / Σ exp z, so log Σ exp z = z_k - log softmax(z)_k; softmax is one
        # kernel, and its largest number the most precise.
        return z.max(axis=1) - log(ops.Softmax()(z).max(axis=1))

    def bprop(self, y, W, out, dout):
        p = ops.Softmax()(matmul(y, W, transpose_y=True))  # d log Σ exp z / dz
        dout = dout.reshape(-1, 1)
        return dout * matmul(p, W), matmul(p, dout * y, transpose_x=True)


log_sum_exp_of_product = LogSumExp()


def log_sum_exp(y, W, b):
    """log Σ_k exp(y · W_k + b_k): y [n, projection], W [classes, projection], b [classes]."""
    # As one more column of W: to add b to the logits takes longer.
    y = ops.concat((y, ops.ones((y.shape[0], 1), y.dtype)), 1)
    return log_sum_exp_of_product(y, ops.concat((W, b.reshape(-1, 1)), 1))


def add_flags(cell, **flags):
    """A network's mixed precision (`to_float`, ms.amp) stops at the biLM, which stays float32."""
    if "fp16" in flags:
        flags = {"fp16": False, "fp32": True, "bf16": False}
    return nn.Cell.add_flags(cell, **flags)


for kind in (CharEncoder, Recurrence, ProjectedLSTM, BiLM):
    kind.add_flags = add_flags


# ---- 9. Embedding files of sentences -------------------------------------------------------------

class Embedder:
    """The biLM's layers for any sentences: the same sentence gets the same vectors (up to rounding)
    whatever is beside it.

    Each distinct word is encoded once. Sentences are read in streams side by side; where one ends,
    the stream's next begins.
    """
    STREAMS, TOKENS = 256, 1 << 15  # at once, at most; so that memory is bounded
    STEPS = 64  # in time; more of them are worth compiling

    def __init__(self, bilm):
        def read(x, begins, state):
            outputs, state = bilm.contextualize(x, reset(state, begins))
            return ops.stack([ops.stack(layers) for layers in outputs]), state

        self.bilm, self.read, self.compiled_read = bilm, read, compiled(read)

    def __call__(self, sentences):
        """Sentences, each some words -> a list of float32 [layers + 1, words, 2 · projection],
        h_0 ... h_L of equation 1. ValueError for what are no sentences."""
        return list(self.each(as_lists(sentences)))

    def each(self, sentences):
        """Yields the vectors of each of any number of sentences, lists of words."""
        block, n_tokens = [], 0
        for words in sentences:
            block.append(["<S>", *words, "</S>"])
            n_tokens += len(block[-1])
            if n_tokens >= self.TOKENS:
                yield from self.embed_block(block)
                block, n_tokens = [], 0
        if block:
            yield from self.embed_block(block)

    def embed_block(self, text):
        """Yields the vectors of each sentence of a text, a list of lists of words, <S> and </S>
        included, which have none."""
        o, lengths = self.bilm.options, np.array([*map(len, text)])
        x = self.encode(set().union(*text))  # {word: x_k}
        # Streams about as long as the longest sentence; a power of 2, as each number is compiled.
        n = min(self.STREAMS, 1 << int(lengths.sum() // lengths.max()).bit_length() - 1)
        # The longest sentences first, each in the stream that is free first, from time step t on.
        free, places = np.zeros(n, int), np.zeros((len(text), 2), int)
        for k in np.argsort(-lengths):
            stream = free.argmin()
            places[k] = stream, free[stream]
            free[stream] += lengths[k]
        # x_k and the layers' outputs, each direction in its reading order.
        h = np.zeros((2, o.n_layers + 1, free.max(), n, o.projection), np.float32)
        begins, state = np.zeros((free.max(), n), np.uint8), zero_state(o, n)
        for words, (stream, t) in zip(text, places):
            rows = [x[word] for word in words]
            h[:, 0, t:t + len(rows), stream] = rows, rows[::-1]
            begins[t, stream] = 1
        read = self.compiled_read if len(begins) > self.STEPS else self.read
        for t in range(len(begins)):
            outputs, state = read(Tensor(h[:, 0, t:t + 1]), Tensor(begins[t]), state)
            h[:, 1:, t:t + 1] = outputs.asnumpy()
        for length, (stream, t) in zip(lengths, places):
            end = t + length - 1  # where </S> stands
            forward, backward = h[0, :, t + 1:end, stream], h[1, :, end - 1:t:-1, stream]
            yield np.concatenate((forward, backward), -1)

    def encode(self, words):
        """-> {word: x_k}. Words of similar lengths together: short ones take less time."""
        words, x = sorted(words, key=len), {}
        for k in range(0, len(words), 256):
            chars, lengths = word_chars(words[k:k + 256])
            tiers = ((len(chars), int(lengths.max())),)
            x.update(zip(words[k:], self.bilm.encoder(Tensor(chars), tiers).asnumpy()))
        return x


def embed(args):
    """Writes the vectors of a file of sentences, one array for each line: '0', '1', ..."""
    if not args.input or not args.output:
        raise InputError("embed needs --input FILE and --output FILE")
    options, weights, _ = model_files(args)
    os.stat(args.input)  # an error before anything is computed
    check_outputs([args.output], [args.input, options, weights], args.overwrite)
    lines = (line.split() for line in with_progress(open_text(args.input), "lines"))
    vectors = Embedder(BiLM(options, weights)).each(lines)
    write_arrays(args.output, ((str(k), h) for k, h in enumerate(vectors)))


# ---- 10. The file formats of bilm-tf and AllenNLP ------------------------------------------------

def check_options(options):
    """InputError where a value would go wrong in silence, or far from here."""
    allowed = {"n_highway": 0, "dropout": 0, "cell_clip": None, "proj_clip": None}
    for field in fields(options):
        name, kind, value = field.name, field.type, getattr(options, field.name)
        if kind in (int, float):
            limit = 1 if name == "dropout" else math.inf
            valid = type(value) in (int, kind) and 0 < value < limit
        elif name == "filters":
            valid = value and all(type(width) is type(n) is int and n > 0 and
                                  1 <= width <= MAX_CHARS for width, n in value)
        else:
            valid = type(value) is kind and (kind is bool or value in ("relu", "tanh"))
        if not valid and (name not in allowed or value != allowed[name]):
            raise InputError(f"{name} is {value!r:.60}, which makes no sense (the default is "
                             f"{field.default!r})")


SIZES = {
    "tiny": Options(filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)), n_highway=1, dim=256,
                    projection=64, n_negative_samples_batch=1024,
                    learning_rate=0.1),  # 0.2 is too much for little text
    "small": Options(n_highway=1, dim=1024, projection=128),
    "medium": Options(n_highway=1, dim=2048, projection=256),
    "original": Options()}


def read_options(path):
    """The `Options` of a JSON file in bilm-tf's format; what it lacks, or has as null, takes the
    value it has in bilm-tf or, where it has none there, in the paper. InputError for what cannot
    be read."""
    def without_null(content):
        return {key: value for key, value in content.items() if value is not None}

    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=without_null)
        cnn, lstm = content["char_cnn"], content["lstm"]
        if cnn.get("max_characters_per_token", MAX_CHARS) != MAX_CHARS:
            raise InputError(f"here words have {MAX_CHARS} characters, max_characters_per_token")
        if cnn.get("n_characters", 261) not in (261, 262):
            raise InputError("here characters are UTF-8 bytes, n_characters 261 or 262")
        if not content.get("bidirectional", True):
            raise InputError("models of one direction are not supported")
        values = {
            **content,
            "n_highway": 0, "n_layers": 1, "use_skip_connections": False,  # where they are lacking
            "cell_clip": None, "proj_clip": None,
            **cnn, **lstm,
            "activation": cnn["activation"], "filters": tuple(map(tuple, cnn["filters"])),
            "char_dim": cnn["embedding"]["dim"], "dim": lstm["dim"],
            "projection": lstm["projection_dim"]}
        return Options(**{f.name: values[f.name] for f in fields(Options) if f.name in values})
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}, which a biLM that reads characters needs"
                         ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: options that cannot be used: {error}") from None


def write_options(path, o):
    """Writes `Options` as bilm-tf and AllenNLP read them."""
    content = {
        "char_cnn": {"filters": o.filters, "n_highway": o.n_highway, "activation": o.activation,
                     "embedding": {"dim": o.char_dim}, "n_characters": 262,
                     "max_characters_per_token": MAX_CHARS},
        "lstm": {"n_layers": o.n_layers, "dim": o.dim, "projection_dim": o.projection,
                 "use_skip_connections": o.use_skip_connections, "cell_clip": o.cell_clip,
                 "proj_clip": o.proj_clip}}
    for name in ("n_epochs", "dropout", "batch_size", "unroll_steps", "sample_softmax",
                 "n_negative_samples_batch", "all_clip_norm_val", "learning_rate"):
        content[name] = getattr(o, name)
    write_lines(path, [json.dumps(content, indent=1)])


def published_name(p):
    """A parameter's name in bilm-tf's files: its own, less what the cells around it prefix."""
    return p.name.rpartition(".")[2]


def import_h5py(path):
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: needs h5py; install it with: pip install h5py") from None
    return h5py


@contextlib.contextmanager
def open_arrays(path):
    """Opens a .npz or .hdf5 file -> a mapping of names to arrays, each read when it is asked for.
    InputError where the file cannot be read."""
    try:
        if str(path).endswith(".npz"):
            with np.load(path) as arrays:
                yield arrays
        else:
            # Some file systems know no locks.
            with import_h5py(path).File(path, "r", locking=False) as file:
                names = []
                file.visit(names.append)
                # bilm-tf names a single layer without MultiRNNCell/Cell0.
                yield {name.replace("/RNN/LSTMCell", "/RNN/MultiRNNCell/Cell0/LSTMCell"): file[name]
                       for name in names if hasattr(file[name], "shape")}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (training writes best.npz when an epoch ends; what "
                         "is at a URL must be downloaded first)") from None
    except Exception as error:  # whatever numpy, zipfile and h5py raise
        raise InputError(f"{path}: cannot be read ({error!r:.200}); is it whole, and no web page "
                         "or pointer of git-lfs?") from None


def load_weights(path, parameters):
    """Reads parameters from a .npz or .hdf5 file, in place, so that compiled functions see them.
    InputError where one is missing, of another shape or not finite, or where the file holds more
    layers."""
    wanted = named(parameters)
    with open_arrays(path) as arrays:
        for name in arrays:
            if re.match("CNN|RNN", name) and name not in wanted and "char_embed" in wanted:
                raise InputError(f"{path}: holds {name}, which these options do not ask for")
        for name, p in wanted.items():
            if name not in arrays:
                raise InputError(f"{path}: has no {name}, which these options ask for (without "
                                 "projections, proj and W_P, a model cannot be read at all)")
            array = np.asarray(arrays[name], np.float32)
            if array.shape != p.shape:
                raise InputError(f"{path}: {name} is {list(array.shape)}, but these options ask "
                                 f"for {list(p.shape)}")
            if not np.isfinite(array).all():
                raise InputError(f"{path}: {name} holds numbers that are not finite")
            ops.assign(p, Tensor(array))


def write_arrays(path, arrays):
    """Writes (name, array or parameter) pairs to a .npz or .hdf5 file, one after the other, since
    all together are as large as the model."""
    if not path.endswith((".npz", ".hdf5")):
        raise InputError(f"{path}: the name must end in .npz or .hdf5")
    with written(path) as draft:
        if path.endswith(".npz"):
            with zipfile.ZipFile(draft, "w") as file:
                for name, array in arrays:
                    with file.open(name + ".npy", "w", force_zip64=True) as member:
                        np.save(member, array)
        else:
            with import_h5py(path).File(draft, "w", locking=False) as file:
                for name, array in arrays:
                    file[name] = np.asarray(array)


def named(parameters):
    """{name: parameter}, whose items `write_arrays` takes: those of a `BiLM` make a file that
    `embed`, bilm-tf and AllenNLP read."""
    return {published_name(p): p for p in parameters}


def load_softmax(path, softmax, vocabulary):
    """Reads a softmax if the file has one of this vocabulary -> whether it has. Of files that do
    not tell their vocabulary, as the published ones, the number of words decides."""
    with open_arrays(path) as arrays:
        if "softmax/W" not in arrays or arrays["softmax/W"].shape != softmax.W.shape:
            return False
        if np.asarray(arrays.get("softmax/vocabulary", vocabulary.checksum)) != vocabulary.checksum:
            return False
    load_weights(path, softmax.get_parameters())
    return True


def export(args):
    """Writes a run's best weights as an .hdf5 that bilm-tf and AllenNLP read, and its options."""
    if not args.weights:
        raise InputError("export needs --weights FILE, an .hdf5 to write")
    best, options = f"{args.out}/best.npz", read_options(f"{args.out}/options.json")
    options_file = re.sub(r"(_?weights)?\.hdf5$", "", args.weights) + "_options.json"
    check_outputs([args.weights, options_file], [best], args.overwrite)
    with open_arrays(best) as arrays:
        write_arrays(args.weights, arrays.items())
    write_options(options_file, options)
    print(f"wrote {args.weights} and {options_file}")


# ---- 11. A run: checkpoints, resuming, the log ---------------------------------------------------
# Its folder holds options.json and vocab; log.csv; last.npz, from which it can be resumed; and
# best.npz, the weights of the best epoch. It is a run's folder once last.npz is there.

class Run:
    """What a training run consists of: the model, Adagrad's sums, and where it stands."""

    def __init__(self, options, vocabulary, seed=0, amp=None, workers=None):
        self.options, self.vocabulary, self.seed = options, vocabulary, seed
        self.workers = workers or Workers()
        self.bilm = BiLM(options, seed=seed, amp=amp)
        self.softmax = Softmax(len(vocabulary), options.projection, seed)
        self.accumulators = ms.ParameterTuple(map(accumulator, self.bilm.trainable_params()))
        tables = self.softmax.trainable_params()  # W, b
        self.tables = [*tables, *map(accumulator, tables)]
        self.lstm_state = zero_state(options, options.batch_size)
        self.step, self.position, self.best = 0, None, math.inf
        self.log = ["step,epoch,loss,tokens_per_second,heldout_forward,heldout_backward,"
                    "heldout_average"]

    def plan(self, corpus, n_steps=None):
        """How long to train: the options' epochs, counted from the text; n_steps if fewer."""
        o, n_predictions = self.options, corpus.tokens + corpus.sentences  # n words have n + 1
        self.tokens_per_step = o.batch_size * o.unroll_steps * self.workers.size
        self.epoch_ends = [epoch * n_predictions // self.tokens_per_step
                           for epoch in range(1, o.n_epochs + 1)]
        self.n_steps = min(self.epoch_ends[-1], n_steps or math.inf)

    def start_clock(self):
        """tokens/s are counted from here."""
        self.clock = self.step, time.perf_counter()

    def log_losses(self, losses):
        """A line of the log: the mean of some steps' losses, (loss, norm) each; tokens a second;
        the time left. InputError where one is not finite."""
        losses = np.array([[float(x.asnumpy()) for x in pair] for pair in losses])
        for step, (loss, norm) in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss + norm):
                raise InputError(f"step {step}: the loss is {loss}, the gradient's norm {norm}; "
                                 "what was saved before is good; train with a lower --lr")
        loss, epoch = losses[:, 0].mean(), 1 + sum(end < self.step for end in self.epoch_ends)
        n, seconds = self.step - self.clock[0], time.perf_counter() - self.clock[1]
        speed, left = n * self.tokens_per_step / seconds, (self.n_steps - self.step) * seconds / n
        name = "sampled loss" if self.options.sample_softmax else "loss"
        print(f"step {self.step:,} of {self.n_steps:,}  epoch {epoch}  {name} {loss:.4f}  "
              f"{speed:,.0f} tokens/s  {math.ceil(left / 60)} min left", flush=True)
        self.log.append(f"{self.step},{epoch},{loss:.6f},{speed:.0f},,,")

    def log_heldout(self, scores):
        """Adds the held-out `Perplexities` to the last line -> whether it is the best so far."""
        print(f"held-out {scores}", flush=True)
        self.log[-1] = self.log[-1][:-2] + ",".join(f"{x:.4f}" for x in scores[:3])
        is_best, self.best = scores.average < self.best, min(self.best, scores.average)
        return is_best

    def parameters(self):
        return [*self.bilm.get_parameters(), *self.accumulators, *self.tables]

    def save(self, folder, is_best):
        """Writes last.npz and, if it is the best so far, best.npz. Worker 0 does it for all."""
        states = self.workers.gather(self.lstm_state).asnumpy()
        positions = self.workers.gather(Tensor(self.position)).asnumpy()
        if self.workers.rank > 0:
            return
        # The best first: after a crash between the two this epoch ends again, and is best again.
        if is_best:
            weights = named([*self.bilm.get_parameters(), *self.softmax.get_parameters()])
            weights["softmax/vocabulary"] = self.vocabulary.checksum  # of which words Θs is
            write_arrays(f"{folder}/best.npz", weights.items())
        state = {"run/state": json.dumps([self.identity, self.step, self.best, self.log]),
                 "run/positions": positions, "run/lstm_states": states}
        write_arrays(f"{folder}/last.npz", {**state, **named(self.parameters())}.items())

    def resume(self, path):
        """Takes over a last.npz. InputError where it is of another run."""
        with open_arrays(path) as arrays:
            before, self.step, self.best, self.log = json.loads(str(arrays["run/state"]))
            for key, value in self.identity.items():
                if before[key] != value:
                    raise InputError(f"{path}: that run has {key} {before[key]!r:.200}, not "
                                     f"{value!r:.200}; resume it with the command that began it")
            self.position = arrays["run/positions"][self.workers.rank]
            self.lstm_state = Tensor(arrays["run/lstm_states"][self.workers.rank])
        load_weights(path, self.parameters())


def accumulator(p):
    """Adagrad's sum of squares for a parameter, 1 at first as in bilm-tf."""
    return Parameter(ops.ones_like(p), name="adagrad/" + published_name(p), requires_grad=False)


def open_run(args):
    """The `Run` that the command line asks for, new or resumed, its corpus and its held-out corpus
    (or None)."""
    workers, last, best = Workers(), f"{args.out}/last.npz", f"{args.out}/best.npz"
    if args.resume and not os.path.exists(last):
        raise InputError(f"{last}: no such file; leave out --resume to begin a run")
    for path in (last, best):
        if os.path.exists(path) and not args.resume:
            raise InputError(f"{path}: exists; --resume goes on with a run that has a last.npz; "
                             "else give another --out")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: give a number from 0")
    vocabulary, corpus = Vocabulary(args.vocab), Corpus(args.data)
    heldout = Corpus(args.heldout) if args.heldout else None
    options = read_options(args.options) if args.options else SIZES[args.size or "original"]
    options = replace(options, **{name: x for name, x in vars(args).items()
                                  if name in vars(options) and x is not None})
    if options.sample_softmax and 2 * options.n_negative_samples_batch > len(vocabulary):
        print(f"{args.vocab}: {len(vocabulary):,} words; {options.n_negative_samples_batch:,} "
              "negatives would save nothing: training with the full softmax", flush=True)
        options = replace(options, sample_softmax=False)
    run = Run(options, vocabulary, args.seed, args.amp, workers)
    run.plan(corpus, args.steps)
    if run.n_steps < 1 or corpus.sentences < workers.size:
        raise InputError(f"{args.data}: {corpus.tokens:,} tokens are less than one batch of "
                         f"{run.tokens_per_step:,}; add text, or lower --batch-size")
    # What a resumed run must have in common with the one that was begun.
    run.identity = {**vars(options), "filters": str(options.filters), "n_epochs": None,
                    "seed": args.seed, "amp": args.amp, "workers": workers.size,
                    "vocabulary": vocabulary.checksum, "text": corpus.checksum,
                    "held-out text": heldout and heldout.checksum,
                    "weights": args.weights}
    if args.resume:
        run.resume(last)
        print(f"{last}: resuming after step {run.step:,} of {run.n_steps:,}", flush=True)
    elif args.weights:
        load_weights(args.weights, run.bilm.get_parameters())
        if not load_softmax(args.weights, run.softmax, vocabulary):
            print(f"{args.weights}: has no softmax of {args.vocab}: that begins anew", flush=True)
    print(f"{corpus.sentences:,} sentences, {corpus.tokens:,} tokens, {len(vocabulary):,} words; "
          f"{run.n_steps:,} steps of {run.tokens_per_step:,} tokens", flush=True)
    if workers.rank == 0 and not args.resume:
        begin_folder(args.out, options, vocabulary)
    return run, corpus, heldout


def begin_folder(folder, options, vocabulary):
    """Writes options.json and vocab. InputError where there are others."""
    options_file, vocab_file = f"{folder}/options.json", f"{folder}/vocab"
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(options_file) and read_options(options_file) != options:
        raise InputError(f"{options_file}: exists, and is another; give another --out")
    if os.path.exists(vocab_file) and Vocabulary(vocab_file).words != vocabulary.words:
        raise InputError(f"{vocab_file}: exists, and is another; give another --out")
    if not os.path.exists(options_file):
        write_options(options_file, options)
    if not os.path.exists(vocab_file):
        write_lines(vocab_file, vocabulary.words)


def model_files(args):
    """The options, weights and vocabulary that test, embed and export read: --out X stands for
    --options X/options.json --weights X/best.npz --vocab X/vocab."""
    if bool(args.options) != bool(args.weights):
        raise InputError("--options and --weights go together")
    return (args.options or f"{args.out}/options.json", args.weights or f"{args.out}/best.npz",
            args.vocab or f"{args.out}/vocab")


def test(args):
    """Prints the perplexities of held-out text."""
    workers, corpus = Workers(), Corpus(args.data)
    options, weights, words = model_files(args)
    bilm, vocabulary = BiLM(options, weights), Vocabulary(words)
    softmax = Softmax(len(vocabulary), bilm.options.projection)
    if not load_softmax(weights, softmax, vocabulary):
        raise InputError(f"{weights}: has no softmax of the words of {words}")
    print(make_perplexity(bilm, softmax, vocabulary, corpus, workers)())


# ---- 12. Several devices -------------------------------------------------------------------------

@ms.jit_class  # so that graphs may call it
class Workers:
    """The processes that msrun started together (data parallelism), each with its own streams of
    text, as if they were one device with `size` times the streams. Without msrun, there is one."""

    def __init__(self):
        self.rank, self.size = 0, 1
        if "MS_ROLE" in os.environ:  # msrun's
            # Seconds that workers wait for each other, which compile, read and test.
            os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "86400")
            os.environ.setdefault("HCCL_CONNECT_TIMEOUT", "7200")
            os.environ.setdefault("HCCL_EXEC_TIMEOUT", "17340")
            communication.init()
            self.rank, self.size = communication.get_rank(), communication.get_group_size()
            if self.rank > 0:
                sys.stdout = open(os.devnull, "w")  # worker 0 speaks for all
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
        parts = ops.split(flat, [x.size for x in tensors])
        return [part.reshape(x.shape) for part, x in zip(parts, tensors)]


# ---- 13. Command line ----------------------------------------------------------------------------

COMMANDS = {"train": train, "test": test, "embed": embed, "export": export}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="elmo.py", allow_abbrev=False,
        description="Train ELMo's biLM (the default), test it, embed sentences with it, or export "
                    "its weights.")
    add = parser.add_argument
    add("command", nargs="?", choices=COMMANDS, default="train")
    add("--device", "--device_target", default="Ascend", choices=("Ascend", "CPU"),
        help="default: %(default)s")
    add("--out", "--train_url", default="model",
        help="folder of a run: train writes it; for the others it stands for --options "
             "DIR/options.json --weights DIR/best.npz --vocab DIR/vocab (default: %(default)s)")
    add("--vocab", "--vocab_path", help="the vocabulary (train: ./vocab)")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--options", "--options_path", help="options in bilm-tf's JSON format")
    add("--weights", help="weights in bilm-tf's format, .hdf5, or a run's best.npz."
        " train: start from them; test, embed: with --options; export: the file to write")
    add("--data", "--data_url", help="text that data.py converted (default: "
        "train.mindrecord; test: heldout.mindrecord)")
    add("--heldout", help="train: text to test on after each epoch (default: "
        "heldout.mindrecord, if there is one)")
    one_of("--size", choices=SIZES, help="train: of the model (default: original)")
    add("--epochs", "--epoch_num", dest="n_epochs", type=positive,
        help="train: passes over the text (default: as in the options, 10)")
    add("--steps", type=positive, help="train: stop after N steps")
    add("--lr", dest="learning_rate", type=float,
        help="train: learning rate (default: as in the options, 0.2)")
    add("--batch-size", type=positive,
        help="train: streams of text of each device (default: as in the options, 128)")
    add("--seed", type=int, default=0, help="train: decides all that is random")
    add("--log-every", type=positive, default=100,
        help="train: steps from one line of the log to the next (default: %(default)s)")
    add("--save-every", type=positive, default=1000,
        help="train: steps from one last.npz to the next; the end of an epoch writes one, too "
             "(default: %(default)s)")
    add("--resume", action="store_true",
        help="train: go on with the run in --out, as if it had not stopped (the same command)")
    add("--amp", choices=("bfloat16",), help="train: matrix products in this type (default: "
        "float32)")
    add("--input", help="embed: tokenized sentences, one a line")
    add("--output", help="embed: vectors to write, one array a line: .npz or .hdf5")
    add("--overwrite", action="store_true", help="embed, export: replace files that exist")
    args = parser.parse_args(argv)

    if args.command == "train":
        args.vocab = args.vocab or "vocab"
        if args.heldout is None and os.path.exists("heldout.mindrecord"):
            args.heldout = "heldout.mindrecord"
    if args.command == "test":
        args.data = args.data or args.heldout or "heldout.mindrecord"
    args.data = args.data or "train.mindrecord"
    return args


def run_command(argv):
    args = parse_arguments(argv)
    try:
        ms.set_device(args.device)
    except RuntimeError:
        raise InputError(f"--device {args.device}: MindSpore finds none (CANN's set_env.sh must be "
                         "sourced); on other machines use --device CPU") from None
    if args.device == "CPU":
        ms.runtime.launch_blocking()  # what is not compiled takes a tenth of the time
    else:  # float32 products in float32: the first 910 would silently compute in float16
        ms.device_context.ascend.op_precision.precision_mode("must_keep_origin_dtype")
        ms.device_context.ascend.op_precision.matmul_allow_hf32(False)
    COMMANDS[args.command](args)


def main(argv=None):
    """Runs the command line -> the exit status."""
    return run_program("elmo.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
