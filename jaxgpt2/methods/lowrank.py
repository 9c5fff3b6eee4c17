"""A head made for TFHE: few lookups, narrow ones, and no bit spent on what softmax does not see.

What it does differently from the baseline (`softmax`), each exact or fitted on calibration activations:

- Only pairs j <= i exist, and the first token attends to itself: no lookup for what causality forbids.
- Scores and values are of low rank (`factor_scores`, `factor_values`): truncated for least error on the activations.
- Queries, keys and values are centred. Softmax does not see a shift of a row of scores, so the keys' mean is free to
  go; the queries' mean is a term linear in the key's input, which costs one lookup a token; weights that sum to one
  carry the mean value through, and the client adds it back.
- 2xy = (x + y)^2 - x^2 - y^2: one lookup a product. The squares of keys and values are shared by all products of a
  token; those of the query shift its whole row, and are never computed.
- The row maximum is predicted by a linear function of the row's input: one lookup, and its error shifts a row.
- The client divides: the server returns sum_j e_ij v_j and sum_j e_ij. The many weights that round to 0 are made up
  for by a small one of the mean value, which the client adds.
- A random rotation of either space evens out the ranges of its axes, so that one scale wastes few levels.
- Every input feature has its own scale, which the weights absorb. So do the steps of queries, keys and values, to the
  effect that a level is a whole number of steps of the accumulator: rounding the low bits away gives the level, and a
  lookup needs to see one bit more than the level has.
- All of these numbers are then trained together (`refine`), through the rounding, for the least harm to the model; the
  client's are at last those of least squares (`fit_output`).

A text is read token by token: `project_token` once, `attend` to blocks of earlier tokens (see `decoding.Cached`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fhe import FHEConfig, LookupTable, Ops
from jaxgpt2.decoding import STRETCH, Cached
from jaxgpt2.methods.jax_ops import straight_through
from jaxgpt2.methods.method import HeadWeights, Method, QuantizedFunction, QuantizedModule, float_head
from jaxgpt2.methods.requantize import Projection, build_table, project
from jaxgpt2.quantize import Bits, CalibrationError, check_accumulator, largest_level, projection_bound, scale_to

# So many more bits than activations has what is added to scores (the row's predicted maximum and the key's own term),
# and what the exponential sees of them.
SCORE_BITS = 2

# Ranks that are looked at, and tokens of calibration text that they are looked at on.
RANKS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56)
LOSS_TOKENS = 2048

# Where ranks are not named, a lookup must save the model such a share of what an average head of it does, so that heads
# which matter get more of them; and no head loses more than a share of what it does itself.
PRICE = 2.7e-5
MOST_LOST = 0.05

# When a head's cheapest configuration is looked for.
PRICES = (1.2e-4, 4e-5, 1.5e-5)
MOST_LOST_CHEAPEST = 0.1

# Lookups are those of a text of so many tokens.
TOKENS = 6

# Training: passages a step, and the steps' size as a share of a parameter's own. Heads are trained with ranks that are
# multiples of COMPILED_RANKS.
BATCH = 20
RATE = 0.03
COMPILED_RANKS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankParams:
    query: Projection  # (C, R)
    key: Projection  # (C, R)
    value: Projection  # (C, S)
    shift: Projection  # (C, 1): the predicted row maximum, in steps of a score
    term: Projection  # (C, 1): the key's own part of its scores, likewise
    level_square: LookupTable  # a level -> a quarter of its square
    sum_square: LookupTable  # the sum of two levels -> a quarter of its square
    exponential: LookupTable  # score - row shift -> attention weight, unnormalized
    weight_square: LookupTable  # attention weight -> a quarter of its square
    mixed_square: LookupTable  # attention weight + level -> a quarter of its square


class LowRankDequantization(NamedTuple):
    basis: Any  # (S, D): of one unit of sum_j e_ij v_j / (prior + sum_j e_ij)
    mean: Any  # (D,): the mean value
    prior: Any  # (): what the mean value weighs, in levels of attention weights


def project_token(ops: Ops, params: LowRankParams, x: Any) -> tuple[Any, ...]:
    """(N, C) integers -> query (N, R), shift (N, 1); key (N, R), term (N, 1), value (N, S), its squares (N, S)."""
    with ops.tag("query"):
        q = project(ops, params.query, x)
        shift = project(ops, params.shift, x)
    with ops.tag("key"):
        k = project(ops, params.key, x)
        squares = ops.matmul(ops.lookup(params.level_square, k), np.ones((k.shape[1], 1), np.int64))  # (N, 1)
        term = project(ops, params.term, x) - squares
    with ops.tag("value"):
        v = project(ops, params.value, x)
        v_squares = ops.lookup(params.level_square, v)
    return q, shift, k, term, v, v_squares


def first_token(ops: Ops, params: LowRankParams, v: Any) -> tuple[Any, Any]:
    """The first token attends to itself: its value, and a denominator that no other row has with a numerator."""
    return v, v[:, :1] * 0


def attend(ops: Ops, params: LowRankParams, q: Any, shift: Any, *state: Any) -> tuple[Any, Any]:
    """A row's (N, ...) sums over a block of B tokens: numerators (N, S), denominators (N, 1)."""
    keys, terms, values, squares = (state[part::4] for part in range(4))
    block, rank, width = len(keys), q.shape[1], values[0].shape[1]
    # The tokens of a block stand side by side, so that each lookup is one of many at a time.
    of_key = np.kron(np.eye(block, dtype=np.int64), np.ones((rank, 1), np.int64))  # (B R, B)
    of_value = np.kron(np.eye(block, dtype=np.int64), np.ones((1, width), np.int64))  # (B, B S)
    of_block = np.kron(np.ones((block, 1), np.int64), np.eye(width, dtype=np.int64))  # (B S, S)
    ones = np.ones((block, 1), np.int64)

    def beside(arrays: Sequence[Any]) -> Any:
        return arrays[0] if block == 1 else ops.concatenate(arrays, axis=1)

    with ops.tag("scores"):
        sums = beside([q + k for k in keys])  # (N, B R)
        scores = ops.matmul(ops.lookup(params.sum_square, sums), of_key)  # (N, B)
        scores = scores + beside(terms) - shift
    with ops.tag("softmax"):
        e = ops.lookup(params.exponential, scores)  # (N, B)
    with ops.tag("output"):
        mixed = ops.lookup(params.mixed_square, ops.matmul(e, of_value) + beside(values))  # (N, B S)
        e_squares = ops.matmul(ops.lookup(params.weight_square, e), ones)  # (N, 1)
        numerators = ops.matmul(mixed, of_block) - e_squares - sum(squares)  # (N, S)
    return numerators, ops.matmul(e, ones)


STRATEGY = Cached(project_token, first_token, attend, row=2, alone=(2,))


def square_root(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square root of a second moment (D, D), and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(moment)
    kept = values > values.max(initial=0.0) * 1e-10
    roots = np.sqrt(np.where(kept, values, 0.0))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=kept)
    return (vectors * roots) @ vectors.T, (vectors * inverses) @ vectors.T


def rotation(size: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return q * np.sign(np.diag(r))


def factor_scores(q: np.ndarray, k: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps P, Q (D, rank) such that (q P) (k Q)^T is the best approximation of q k^T / sqrt(D) of that rank.

    Best in the mean square over the activations q and k (N, D) taken independently: with S_q, S_k the square roots
    of their second moments, S_q S_k / sqrt(D) = U s V^T is truncated, P = S_q^-1 U s^1/2 and
    Q = S_k^-1 V s^1/2, both rotated.
    """
    root_q, inverse_q = square_root(q.T @ q / len(q))
    root_k, inverse_k = square_root(k.T @ k / len(k))
    u, s, vt = np.linalg.svd(root_q @ root_k / np.sqrt(q.shape[1]))
    turn = rotation(rank, 0)
    return inverse_q @ (u[:, :rank] * np.sqrt(s[:rank])) @ turn, inverse_k @ (vt[:rank].T * np.sqrt(s[:rank])) @ turn


def factor_values(v: np.ndarray, output: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps B (D, rank), R (rank, D) such that v B R output is the best approximation of v output of that rank.

    Best in the mean square over the centred values v (N, D): with S the square root of their second moment,
    S output = U s V^T is truncated, B = S^-1 U s, R = s^-1 U^T S, rotated. The singular values are on B's side, so that
    an error of v B reaches the output as it is, whatever its direction.
    """
    root, inverse = square_root(v.T @ v / len(v))
    u, s, _ = np.linalg.svd(root @ output, full_matrices=False)
    u, s = u[:, :rank], np.maximum(s[:rank], s[0] * 1e-9)
    turn = rotation(rank, 1)
    return inverse @ (u * s) @ turn, turn.T @ (u / s).T @ root


def predict_row_maxima(x: np.ndarray, maxima: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (C,) and bias of the ridge regression of the row maxima (N,) on the rows' inputs (N, C)."""
    centre, mean = x.mean(axis=0), maxima.mean()
    centred = x - centre
    gram = centred.T @ centred
    ridge = 1e-2 * np.trace(gram) / len(gram)
    weight = np.linalg.solve(gram + ridge * np.eye(len(gram)), centred.T @ (maxima - mean))
    return weight, float(mean - centre @ weight)


def best_scale(values: np.ndarray, limit: int) -> float:
    """The scale of levels up to a limit that errs least in the mean square: clipping a few large values may be worth
    finer steps for the rest."""
    values = values.ravel()
    scales = scale_to(values, limit) * np.linspace(0.3, 1.0, 29)[:, None]
    errors = np.zeros(len(scales))
    for start in range(0, len(values), 4096):  # what the processor's cache holds
        some = values[start : start + 4096]
        levels = some / scales
        np.clip(np.rint(levels, out=levels), -limit, limit, out=levels)
        levels *= scales
        levels -= some
        errors += np.einsum("ij,ij->i", levels, levels)
    return float(scales[np.argmin(errors), 0])


class Reals(NamedTuple):
    """The head in reals, before its numbers become integers. Levels are the unit of query, key and value."""

    query: Any  # (C, R)
    query_bias: Any  # (R,)
    key: Any  # (C, R)
    key_bias: Any  # (R,)
    value: Any  # (C, S)
    value_bias: Any  # (S,)
    nats: Any  # (): of one product of levels
    term: Any  # (C,): nats, without the key's squares
    term_bias: Any  # ()
    shift: Any  # (C,): nats
    shift_bias: Any  # ()
    basis: Any  # (S, D)
    mean: Any  # (D,)
    prior: Any  # ()


class Widths(NamedTuple):
    """What the rounding of a head in reals depends on."""

    levels: Any  # largest level of queries and keys
    value_levels: Any  # and of values
    terms: Any  # largest of what is added to scores, in its steps
    largest_weight: Any
    term_step: Any  # steps of a score
    shift_step: Any
    cell: Any  # steps of a score that the exponential sees as one


def initial(weights: HeadWeights, real: np.ndarray, texts: list[slice], bits: Bits, rank: int, width: int) -> Reals:
    """The head by the closed formulas above; real (N, C) holds the inputs of all texts."""
    q = real @ weights.query + weights.query_bias
    k, v = real @ weights.key, real @ weights.value
    q_mean, k_mean, v_mean = q.mean(axis=0), k.mean(axis=0), v.mean(axis=0)
    p_query, p_key = factor_scores(q - q_mean, k - k_mean, rank)
    p_value, basis = factor_values(v - v_mean, square_root(weights.metric)[0], width)
    q, k, v = (q - q_mean) @ p_query, (k - k_mean) @ p_key, (v - v_mean) @ p_value
    levels = largest_level(bits.activations)
    q_step, k_step, v_step = map(best_scale, (q, k, v), (levels, levels, largest_value_level(bits)))
    nats = q_step * k_step
    # The row shift stands for the row maximum and for the squares that are not subtracted; the key's term, centred, for
    # the scores of the mean query.
    term = weights.key @ q_mean / np.sqrt(len(q_mean))
    term_bias = -float((real @ term).mean())
    q_squares = nats / 2 * ((q / q_step) ** 2).sum(axis=1)
    own = real @ term + term_bias
    scores = [np.where(np.tri(t.stop - t.start, dtype=bool), q[t] @ k[t].T + own[t], -np.inf) for t in texts]
    maxima = np.concatenate([s.max(axis=1) for s in scores])
    shift, shift_bias = predict_row_maxima(real, maxima + q_squares)
    predicted = real @ shift + shift_bias - q_squares
    offset = best_offset(scores, [s - predicted[t][:, None] for s, t in zip(scores, texts, strict=True)], bits)
    return Reals(
        query=weights.query @ p_query / q_step,
        query_bias=(weights.query_bias - q_mean) @ p_query / q_step,
        key=weights.key @ p_key / k_step,
        key_bias=-k_mean @ p_key / k_step,
        value=weights.value @ p_value / v_step,
        value_bias=-v_mean @ p_value / v_step,
        nats=np.asarray(nats),
        term=term,
        term_bias=np.asarray(term_bias),
        shift=shift,
        shift_bias=np.asarray(shift_bias + offset),
        basis=basis * v_step,
        mean=v_mean + weights.value_bias,
        prior=np.asarray(0.5),
    )


def largest_value_level(bits: Bits) -> int:
    """A little more than a level has bits for: an error of a value costs more than one of an attention weight."""
    return 2 ** (bits.activations - 1) * 9 // 8


def largest_attention_weight(bits: Bits) -> int:
    """Such that the sum of a weight and a value has the values of one bit more than activations have, and no fewer."""
    return 2 ** (bits.activations + 1) - 1 - 2 * largest_value_level(bits)


def best_offset(scores: list[np.ndarray], below: list[np.ndarray], bits: Bits) -> float:
    """Where the exponential's table saturates: the offset (nats above the predicted maximum) of least weight error.

    Args:
        scores: (T, T) real scores, -inf where j > i; below: the same less the predicted row maximum.
    """
    largest_weight = largest_attention_weight(bits)

    def error(offset: float) -> float:
        total = 0.0
        for s, b in zip(scores, below, strict=True):
            wanted = np.exp(s - s.max(axis=1, keepdims=True))
            wanted /= wanted.sum(axis=1, keepdims=True)
            e = np.rint(largest_weight * np.exp(np.minimum(b - offset, 0.0))) * np.isfinite(s)
            got = e / np.maximum(e.sum(axis=1, keepdims=True), 1.0)
            total += float(((got - wanted)[1:] ** 2).sum())
        return total

    return min(np.linspace(-3.0, 8.0, 23), key=error)


def rounding_head(reals: Reals, widths: Widths, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the functions above give for a text of quantized inputs x (T, C): numerators (T, S), denominators (T, 1).

    In float32, rounded where integers meet a table, and with gradients. Products are products: the squares that
    integers take them from are rounded by less than a level.
    """
    unit = 2 * reals.nats  # of one step of a score: q k / 2 and quarters of squares

    def rounded(x: jax.Array, limit: Any, step: Any = 1) -> jax.Array:
        clipped = jnp.clip(x, -limit, limit)
        return straight_through(clipped, jnp.rint(clipped)) * step

    def added(nats: jax.Array, step: Any) -> jax.Array:
        return rounded(nats / unit / step, widths.terms, step)

    # One product is faster than five narrow ones.
    parts = (reals.query, reals.key, reals.value, reals.shift[:, None], reals.term[:, None])
    biases = (reals.query_bias, reals.key_bias, reals.value_bias, reals.shift_bias[None], reals.term_bias[None])
    projected = x @ jnp.concatenate(parts, axis=1) + jnp.concatenate(biases)
    q, k, v, shift, term = jnp.split(projected, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    q, k, v = rounded(q, widths.levels), rounded(k, widths.levels), rounded(v, widths.value_levels)
    shift, term = added(shift, widths.shift_step), added(term, widths.term_step)

    scores = q @ k.T / 2 + jnp.sum(q * q, axis=1, keepdims=True) / 4 - shift + term.T
    nats = straight_through(scores, jnp.rint(scores / widths.cell) * widths.cell) * unit
    e = widths.largest_weight * jnp.exp(jnp.minimum(nats, 0.0))
    # Saturated weights still feel which way they should go.
    smooth = e + 0.05 * widths.largest_weight * jnp.maximum(nats, 0.0)
    e = straight_through(smooth, jnp.rint(e)) * np.tri(len(x), dtype=np.float32)

    first = np.arange(len(x))[:, None] == 0  # reads itself
    return jnp.where(first, v, e @ v / 2), jnp.where(first, 0.0, jnp.sum(e, axis=1, keepdims=True))


def batches(count: int, steps: int) -> np.ndarray:
    """Which of `count` passages each step of training sees, (steps, batch): all of them equally often, at random."""
    batch, random = min(BATCH, count), np.random.default_rng(0)
    epochs = -(-steps * batch // count)
    order = np.concatenate([random.permutation(count) for _ in range(epochs)])
    return order[: steps * batch].reshape(steps, batch)


def step_sizes(reals: Reals) -> Reals:
    """What steps of training are a share of: each array's own size. Biases of levels count in levels, of scores in
    nats."""
    size = jax.tree.map(lambda a: np.sqrt(np.mean(a * a)) if np.ndim(a) == 2 else np.asarray(1.0), reals)
    linear = np.maximum(np.sqrt(np.mean(reals.shift**2)), np.sqrt(np.mean(reals.term**2)))
    size = size._replace(nats=reals.nats, term=linear, shift=linear, mean=np.sqrt(np.mean(reals.mean**2)))
    return jax.tree.map(lambda a: np.maximum(a, 1e-9), size)


def with_ranks(reals: Reals, rank: int, width: int) -> Reals:
    """Cut to these ranks, or filled up to them with zeros, which give nothing and stay zero when they are trained."""

    def resized(a: np.ndarray, axis: int, size: int) -> np.ndarray:
        kept = np.take(a, range(min(size, a.shape[axis])), axis)
        return np.pad(kept, [(0, size - kept.shape[i] if i == axis % a.ndim else 0) for i in range(a.ndim)])

    parts = {name: resized(getattr(reals, name), -1, rank) for name in ("query", "query_bias", "key", "key_bias")}
    parts |= {name: resized(getattr(reals, name), -1, width) for name in ("value", "value_bias")}
    return reals._replace(**parts, basis=resized(reals.basis, 0, width))


@jax.jit
def refine(
    reals: Reals,
    size: Reals,
    widths: Widths,
    x: jax.Array,
    wanted: jax.Array,
    mask: jax.Array,
    metric: jax.Array,
    order: jax.Array,
) -> Reals:
    """Trains a head in reals, through its rounding, for the least error of its output.

    Args:
        size: see `step_sizes`.
        x: (B, T, C) quantized inputs; wanted: (B, T, D) the float head's outputs; mask: (B, T), 1 where there is text.
        metric: (D, D), see `HeadWeights`.
        order: (steps, batch), the passages of each step of Adam (Kingma and Ba, 2014), whose rate is a share of each
            array's own size and falls to 0 as a cosine.
    """

    def head(reals: Reals, x: jax.Array) -> jax.Array:
        dequantization = LowRankDequantization(reals.basis, reals.mean, jnp.abs(reals.prior))
        return decode(dequantization, rounding_head(reals, widths, x))

    def loss(shares: Reals, x: jax.Array, wanted: jax.Array, mask: jax.Array) -> jax.Array:
        error = jax.vmap(head, (None, 0))(jax.tree.map(jnp.multiply, shares, size), x) - wanted
        return jnp.sum(jnp.sum((error @ metric) * error, axis=-1) * mask) / jnp.sum(mask) * scale

    scale = jnp.sum(mask) / jnp.maximum(jnp.sum(jnp.sum((wanted @ metric) * wanted, axis=-1) * mask), 1e-30)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, len(order)), b2=0.99)

    def step(carry: Any, chosen: jax.Array) -> Any:
        shares, state = carry
        gradients = jax.grad(loss)(shares, x[chosen], wanted[chosen], mask[chosen])
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(shares, updates), state), None

    shares = jax.tree.map(jnp.divide, reals, size)
    (shares, _), _ = jax.lax.scan(step, (shares, optimizer.init(shares)), order)
    return jax.tree.map(jnp.multiply, shares, size)


@jax.jit
def sums(reals: Reals, widths: Widths, x: jax.Array) -> jax.Array:
    """What the client makes its output of by `basis` and `mean`: x (B, T, C) -> (B, T, S)."""
    width = reals.basis.shape[0]
    alone = LowRankDequantization(jnp.eye(width), jnp.zeros(width), reals.prior)
    return jax.lax.map(lambda x: decode(alone, rounding_head(reals, widths, x)), x)


def fit_output(reals: Reals, sums: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> Reals:
    """With the basis and mean of least square error, in any metric: sums (B, T, S), wanted (B, T, D), mask (B, T)."""
    seen = mask > 0
    x = np.concatenate([sums[seen], np.ones((int(seen.sum()), 1))], axis=1)
    gram = x.T @ x
    ridge = 1e-6 * np.trace(gram) / len(gram)
    found = np.linalg.solve(gram + ridge * np.eye(len(gram)), x.T @ wanted[seen])
    return reals._replace(basis=found[:-1], mean=found[-1])


def step_for(largest: float, bits: int) -> int:
    """The power of two in which numbers of up to that magnitude fit into so many signed bits."""
    return 2 ** max(0, int(np.ceil(np.log2(max(largest, 1e-9) / (2 ** (bits - 1) - 1)))))


def aligned(
    stage: str,
    weight: np.ndarray,
    bias: np.ndarray,
    bits: Bits,
    level_bits: int,
    saturate: int,
    seen: int,
    step: int = 1,
) -> Projection:
    """A projection (C, D) of input integers in integers, whose accumulator has 2^n steps a level.

    Args:
        weight, bias: of levels.
        level_bits: of a level.
        saturate: largest level.
        seen: bits of the accumulator that the lookup sees: with one more than the levels have, a level is a cell.
        step: of the results, a level's. A product with it would multiply the noise of a lookup too.
    """
    limit = 2 ** (bits.weights - 1) - 1
    exponent = int(np.floor(np.log2(limit / max(float(np.abs(weight).max()), 1e-9))))
    fraction = seen - 1 - level_bits  # bits that the lookup sees below a level
    exponent = max(exponent, fraction, 0)
    integers = np.rint(weight * 2.0**exponent).astype(np.int64)
    integer_bias = np.rint(bias * 2.0**exponent).astype(np.int64)
    check_accumulator(stage, projection_bound(integers, integer_bias, largest_level(bits.inputs)))
    shift = exponent - fraction
    table = build_table(
        lambda x: np.clip(np.rint(x / 2.0**exponent), -saturate, saturate) * step,
        -(2 ** (seen - 1)),
        2 ** (seen - 1) - 1,
        shift,
    )
    return Projection(integers, integer_bias, table)


def calibrate(
    weights: HeadWeights,
    inputs: Sequence[np.ndarray],
    bits: Bits,
    max_tokens: int,
    score_rank: int,
    value_rank: int,
    exponential_bits: int,
    training_steps: int,
) -> QuantizedModule:
    """The head in integers; a head_dim below the ranks bounds them.

    Args:
        score_rank, value_rank: 0 leaves a rank to calibration, see `choose_ranks`.
        exponential_bits: bits of a score that the exponential sees; 0 for SCORE_BITS more than activations have.
        training_steps: of `refine`; 0 keeps the closed formulas.
    """
    term_bits = bits.activations + SCORE_BITS
    for name, value, low, high in (
        ("score_rank", score_rank, 0, 4096),
        ("value_rank", value_rank, 0, 4096),
        ("exponential_bits", exponential_bits or term_bits, 4, 16),
        ("training_steps", training_steps, 0, 100_000),
    ):
        if not low <= value <= high:
            raise CalibrationError(f"{name} must be {low} to {high}, got {value}")
    levels, value_levels = largest_level(bits.activations), largest_value_level(bits)
    largest_weight = largest_attention_weight(bits)
    saturated = largest_level(term_bits)
    exponential_bits = exponential_bits or term_bits
    head_dim = weights.query.shape[1]
    if not score_rank or not value_rank:
        losses = rank_losses(weights, inputs)
        if score_rank:
            losses = losses._replace(by_score={score_rank: 0.0})
        if value_rank:
            losses = losses._replace(by_value={value_rank: 0.0})
        score_rank, value_rank = choose_ranks(losses, PRICE, MOST_LOST)
    rank, width = min(score_rank, head_dim), min(value_rank, head_dim)
    real = np.concatenate(inputs)
    ends = np.cumsum([len(passage) for passage in inputs])
    texts = [slice(end - len(passage), end) for passage, end in zip(inputs, ends, strict=True)]
    limit = largest_level(bits.inputs)
    input_scale = np.array([best_scale(feature, limit) for feature in real.T])
    x = np.clip(np.rint(real / input_scale), -limit, limit).astype(np.int64)

    reals = initial(weights, real, texts, bits, rank, width)
    ranges = score_ranges(reals, levels, x * input_scale, texts)

    def widths_of(ranges: Ranges) -> Widths:
        """Steps in which inputs that are larger than the calibration's still take the bits that they should."""
        return Widths(
            levels=levels,
            value_levels=value_levels,
            terms=saturated,
            largest_weight=largest_weight,
            term_step=step_for(ranges.term * STRETCH, term_bits),
            shift_step=step_for(ranges.shift * STRETCH, term_bits),
            cell=step_for((ranges.high - ranges.low) / 2 * STRETCH**2, exponential_bits),
        )

    widths = widths_of(ranges)
    if training_steps:
        padded, wanted, mask = pad(weights, inputs, x * input_scale)
        # Ranks of a few sizes, so that few are compiled.
        filled = with_ranks(reals, *(-(-size // COMPILED_RANKS) * COMPILED_RANKS for size in (rank, width)))
        given = filled, step_sizes(reals), widths, padded, wanted, mask, weights.metric
        order = jnp.asarray(batches(len(inputs), training_steps))
        trained = refine(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given), order)
        trained = trained._replace(prior=jnp.abs(trained.prior))
        reals = with_ranks(Reals(*(np.asarray(part, np.float64) for part in trained)), rank, width)
        ranges = score_ranges(reals, levels, x * input_scale, texts)
        widths = widths_of(ranges)
        given = trained, widths, padded
        found = np.asarray(sums(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given)), np.float64)
        reals = fit_output(reals, found[..., :width], wanted, mask)

    scaled = input_scale[:, None]
    seen = bits.activations + 1 if bits.rounding_threshold is None else bits.rounding_threshold
    unit = 2 * float(reals.nats)

    def projection(stage: str, weight: np.ndarray, bias: np.ndarray, largest: int) -> Projection:
        """Of levels."""
        return aligned(stage, scaled * weight, bias, bits, bits.activations, largest, seen)

    def added(stage: str, weight: np.ndarray, bias: np.ndarray, step: int) -> Projection:
        """What is added to scores, of nats."""
        weight, bias = scaled * weight[:, None] / unit / step, np.array([float(bias) / unit / step])
        return aligned(stage, weight, bias, bits, term_bits, saturated, term_bits + 1, step)

    exponential = build_table(
        lambda s: largest_weight * np.exp(np.minimum(s * unit, 0.0)),
        int(np.floor(ranges.low / widths.cell)) - 1,
        int(np.ceil(ranges.high / widths.cell)) + 1,
        int(np.log2(widths.cell)),
    )
    check_accumulator("output", max_tokens * 2 * largest_weight * value_levels)
    params = LowRankParams(
        query=projection("query", reals.query, reals.query_bias, levels),
        key=projection("key", reals.key, reals.key_bias, levels),
        value=projection("value", reals.value, reals.value_bias, value_levels),
        shift=added("shift", reals.shift, reals.shift_bias, widths.shift_step),
        term=added("term", reals.term, reals.term_bias, widths.term_step),
        level_square=LookupTable.build(quarter_square, -value_levels, value_levels),
        sum_square=LookupTable.build(quarter_square, -2 * levels, 2 * levels),
        exponential=exponential,
        weight_square=LookupTable.build(quarter_square, 0, largest_weight),
        mixed_square=LookupTable.build(quarter_square, -value_levels, value_levels + largest_weight),
    )
    return QuantizedModule(
        params, input_scale, LowRankDequantization(reals.basis, reals.mean, reals.prior), bits, max_tokens
    )


def quarter_square(x: np.ndarray) -> np.ndarray:
    """x^2 / 4 rounded down: with it (x + y)^2 - x^2 - y^2 gives x y / 2 up to a half, in four times fewer values."""
    return np.floor(x * x / 4)


class Ranges(NamedTuple):
    """Extremes of scores on calibration inputs, in steps of a score."""

    term: float
    shift: float
    low: float
    high: float


def score_ranges(reals: Reals, levels: int, x: np.ndarray, texts: list[slice]) -> Ranges:
    """How far the parts of a score reach; x (N, C) quantized inputs."""
    q = np.rint(np.clip(x @ reals.query + reals.query_bias, -levels, levels))
    k = np.rint(np.clip(x @ reals.key + reals.key_bias, -levels, levels))
    unit = 2 * float(reals.nats)
    q_squares = (q**2).sum(axis=1) / 4
    term = (x @ reals.term + float(reals.term_bias)) / unit
    shift = (x @ reals.shift + float(reals.shift_bias)) / unit
    low, high = 0.0, 1.0
    for t in texts:
        scores = q[t] @ k[t].T / 2 + term[t] + (q_squares - shift)[t][:, None]
        causal = scores[np.tri(len(scores), dtype=bool)]
        low, high = min(low, float(causal.min())), max(high, float(causal.max()))
    return Ranges(float(np.abs(term).max()), float(np.abs(shift).max()), low, high)


def pad(weights: HeadWeights, inputs: Sequence[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantized inputs x (N, C) as (B, T, C), the float head's outputs for the exact ones (B, T, D), mask (B, T)."""
    longest = max(map(len, inputs))
    padded = np.zeros((len(inputs), longest, x.shape[1]))
    wanted = np.zeros((len(inputs), longest, weights.value.shape[1]))
    mask = np.zeros((len(inputs), longest))
    start = 0
    for index, passage in enumerate(inputs):
        n = len(passage)
        padded[index, :n], mask[index, :n] = x[start : start + n], 1.0
        wanted[index, :n] = float_head(weights, passage)
        start += n
    return padded, wanted, mask


def decode(dequantization: LowRankDequantization, outputs: tuple[jax.Array, ...]) -> jax.Array:
    """Numerators (T, S) and denominators (T, 1) to the head's output (T, D).

    The first token's denominator is 0, and so is that of a row whose weights all rounded to zero: its numerators are 0
    too, and it is decoded as the mean value.
    """
    numerators, denominators = (output.astype(jnp.float32) for output in outputs)
    basis, mean, prior = (jnp.asarray(part, jnp.float32) for part in dequantization)
    weighed = 2 * numerators / jnp.maximum(denominators + prior, 1.0)
    return jnp.where(denominators > 0, weighed, numerators) @ basis + mean


class RankLosses(NamedTuple):
    """What the model loses, by `HeadWeights.metric`: shares of what an average head of it does."""

    by_score: dict[int, float]  # by each score rank of a head, with values of full rank
    by_value: dict[int, float]  # by each value rank, with scores of full rank
    ablated: float  # without the head


def rank_losses(weights: HeadWeights, inputs: Sequence[np.ndarray]) -> RankLosses:
    """On the first LOSS_TOKENS tokens or so. Nothing is rounded."""
    ends = np.cumsum([len(passage) for passage in inputs])
    some = inputs[: int(np.searchsorted(ends, LOSS_TOKENS)) + 1]
    real = np.concatenate(some)
    texts = [slice(end - len(x), end) for x, end in zip(some, np.cumsum([len(x) for x in some]), strict=True)]
    q, k, v = real @ weights.query + weights.query_bias, real @ weights.key, real @ weights.value
    q_mean, k_mean, mean = q.mean(axis=0), k.mean(axis=0), v.mean(axis=0)
    q, k, v, size = q - q_mean, k - k_mean, v - mean, q.shape[1]
    own = k @ q_mean / np.sqrt(size)  # the key's own term, which costs no rank
    metric_root = square_root(weights.metric)[0]

    def attention(rank: int) -> np.ndarray:
        """The mean values that the head reads, centred (N, D)."""
        to_query, to_key = factor_scores(q, k, rank)
        left, right, rows = q @ to_query, k @ to_key, []
        for t in texts:
            scores = np.where(np.tri(t.stop - t.start, dtype=bool), left[t] @ right[t].T + own[t], -np.inf)
            e = np.exp(scores - scores.max(axis=1, keepdims=True))
            rows.append(e / e.sum(axis=1, keepdims=True) @ v[t])
        return np.concatenate(rows)

    exact = attention(size)

    def lost(error: np.ndarray) -> float:
        return float(((error @ metric_root) ** 2).sum()) / len(real)

    ranks = (*(rank for rank in RANKS if rank < size), size)
    by_score = {rank: lost(attention(rank) - exact) for rank in ranks}
    by_value = {}
    for rank in ranks:
        there, back = factor_values(v, metric_root, rank)
        by_value[rank] = lost(exact @ there @ back - exact)
    return RankLosses(by_score, by_value, lost(exact + mean + weights.value_bias))


def lookups(tokens: int, score_rank: int, value_rank: int) -> int:
    """Of a text: those of each token, and those of each pair but the first token with itself."""
    pairs = tokens * (tokens + 1) // 2 - 1
    return tokens * (3 * score_rank + 2 * value_rank + 2) + pairs * (score_rank + value_rank + 2)


def choose_ranks(losses: RankLosses, price: float, most: float) -> tuple[int, int]:
    """The score rank and value rank at which what is lost and the price of the lookups are least together.

    Args:
        price: of a lookup, in what `RankLosses` counts in.
        most: share of `RankLosses.ablated` that may be lost at all. Where no ranks lose so little, those of least loss
            are taken.
    """
    lost = {
        (score, value): in_scores + in_values
        for score, in_scores in losses.by_score.items()
        for value, in_values in losses.by_value.items()
    }
    allowed = max(most * losses.ablated, min(lost.values()))
    return min(
        (pair for pair, loss in lost.items() if loss <= allowed),
        key=lambda pair: lost[pair] + price * lookups(TOKENS, *pair),
    )


def chosen_ranks(module: QuantizedModule) -> dict[str, int]:
    return {"score_rank": module.params.query.weight.shape[1], "value_rank": module.params.value.weight.shape[1]}


def propose(weights: HeadWeights, inputs: Sequence[np.ndarray]) -> list[dict[str, int]]:
    """The best ranks at each of PRICES."""
    losses = rank_losses(weights, inputs)
    pairs = {choose_ranks(losses, price, MOST_LOST_CHEAPEST) for price in PRICES}
    return [{"score_rank": score, "value_rank": value} for score, value in sorted(pairs)]


LOWRANK = Method(
    "lowrank",
    head=QuantizedFunction(STRATEGY, calibrate, decode, chosen=chosen_ranks),
    options={"score_rank": 0, "value_rank": 0, "exponential_bits": 0, "training_steps": 300},
    # Clear weights and the client's inputs cost no lookup, whatever their width.
    bits=lambda n: Bits(min(n + 2, 12), min(n + 4, 12), n, n + 1),
    # Found by tune for all heads of the bundled model: a lookup that is one step off now and then is little beside the
    # rounding of 4 bits.
    fhe_config=FHEConfig(3e-2, "approximate"),
    propose=propose,
    quick={"training_steps": 0},
)
