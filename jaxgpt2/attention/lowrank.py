"""A head made for TFHE: few lookups, narrow ones, and no bit spent on what softmax does not see.

What it does differently from the post's formula, each exact or fitted on calibration activations:

- Only pairs j <= i exist, and row 0 attends to itself: no lookup for what causality forbids.
- Scores and values are of low rank (`factor_scores`, `factor_values`): truncated for least error on the activations.
- Keys and values are centred: softmax does not see a shift of a row of scores, and weights that sum to one carry the
  mean value through, which the client adds back.
- The row maximum is predicted by a linear regression on the row's input, which is one more output of the projection.
- 2xy = (x + y)^2 - x^2 - y^2: one lookup a product; the squares are shared by all products of a number.
- The client divides: the server returns sum_j e_ij v_j and sum_j e_ij.
- A random rotation of either space evens out the ranges of its axes, so that one scale wastes few levels.
- Every input feature has its own scale, which the weights absorb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fhe import Ops, Table
from jaxgpt2.attention.formula import Calibrated, Formula, HeadWeights, Program
from jaxgpt2.attention.projection import HEADROOM, Projection, calibrate_projection, project, symmetric_table
from jaxgpt2.quantize import Bits, check_accumulator, largest_level, projection_bound, scale_for

# Scores are summed this many times finer than their products' step, so that the row shift can be subtracted finely.
SHIFT_STEPS = 4

# The exponential sees at least and at most so many bits of a score: it is looked up rarely, and 16 bits are plenty.
EXPONENTIAL_BITS = (7, 16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankParams:
    query: Projection  # (C, R)
    key: Projection  # (C, R)
    value: Projection  # (C, S)
    shift_weight: np.ndarray  # (C, 1): the predicted row maximum, in steps of a score / SHIFT_STEPS
    shift_bias: np.ndarray  # (1,)
    level_square: Table  # a level -> its square
    sum_square: Table  # the sum of two levels -> its square
    exponential: Table  # score - row shift -> attention weight, unnormalized
    weight_square: Table  # attention weight -> its square
    mixed_square: Table  # attention weight + level -> its square
    largest_weight: int


class LowRankDecoding(NamedTuple):
    step: np.ndarray  # (): real value of one step of sum_j e_ij v_j / sum_j e_ij
    basis: np.ndarray  # (S, D)
    mean: np.ndarray  # (D,): the mean value


def run_head(ops: Ops, params: LowRankParams, x: Any) -> tuple[Any, Any]:
    """(T, C) input integers -> 2 sum_j e_ij v_j (T, S) and sum_j e_ij (T, 1)."""
    tokens = x.shape[0]
    row, column = np.tril_indices(tokens)
    row, column = row[1:], column[1:]  # row 0 attends to itself alone
    # Choosing rows by a product with clear zeros and ones is free, and every namespace can do it.
    of_row = (row[:, None] == np.arange(tokens)).astype(np.int64)  # (P, T), P pairs
    of_column = (column[:, None] == np.arange(tokens)).astype(np.int64)  # (P, T)
    first = (np.arange(tokens) == 0).astype(np.int64)[:, None]  # (T, 1)
    with ops.tag("query"):
        q = project(ops, params.query, x)  # (T, R)
        shift = ops.matmul(x, params.shift_weight) + params.shift_bias  # (T, 1)
    with ops.tag("key"):
        k = project(ops, params.key, x)  # (T, R)
    with ops.tag("value"):
        v = project(ops, params.value, x)  # (T, S)
    if tokens == 1:
        return v * (2 * params.largest_weight), first * params.largest_weight + (v * 0).sum(axis=1).reshape((1, 1))
    with ops.tag("scores"):
        ones = np.ones((q.shape[1], 1), np.int64)
        q_squares = ops.matmul(ops.lookup(params.level_square, q), ones)  # (T, 1)
        k_squares = ops.matmul(ops.lookup(params.level_square, k), ones)  # (T, 1)
        sums = ops.matmul(of_row, q) + ops.matmul(of_column, k)  # (P, R)
        products = ops.matmul(ops.lookup(params.sum_square, sums), ones)
        products = products - ops.matmul(of_row, q_squares) - ops.matmul(of_column, k_squares)  # (P, 1): 2 q k
    with ops.tag("softmax"):
        e = ops.lookup(params.exponential, products * SHIFT_STEPS - ops.matmul(of_row, shift))  # (P, 1)
        denominators = ops.matmul(of_row.T, e) + first * params.largest_weight  # (T, 1)
    with ops.tag("output"):
        v_squares = ops.lookup(params.level_square, v)  # (T, S)
        e_squares = ops.lookup(params.weight_square, e)  # (P, 1)
        mixed = ops.lookup(params.mixed_square, ops.matmul(of_column, v) + e)  # (P, S)
        products = mixed - e_squares - ops.matmul(of_column, v_squares)  # (P, S): 2 e v
        numerators = ops.matmul(of_row.T, products) + v * first * (2 * params.largest_weight)  # (T, S)
    return numerators, denominators


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


def best_scale(values: np.ndarray, bits: int) -> float:
    """The scale of least mean square error: clipping a few large values may be worth finer steps for the rest."""
    largest, limit = scale_for(values, bits), largest_level(bits)

    def error(scale: float) -> float:
        return float(np.mean((np.clip(np.rint(values / scale), -limit, limit) * scale - values) ** 2))

    return min((largest * factor for factor in np.linspace(0.3, 1.0, 29)), key=error)


def calibrate(
    weights: HeadWeights,
    inputs: Sequence[np.ndarray],
    bits: Bits,
    max_tokens: int,
    score_rank: int,
    value_rank: int,
) -> Calibrated:
    """The head in integers; a head_dim below the ranks bounds them."""
    levels, largest_weight = largest_level(bits.activations), 2**bits.activations - 1
    head_dim = weights.query.shape[1]
    rank, width = min(score_rank, head_dim), min(value_rank, head_dim)
    real = np.concatenate(inputs)
    starts = np.cumsum([len(passage) for passage in inputs])[:-1]
    input_scale = np.array([best_scale(feature, bits.inputs) for feature in real.T])
    limit = largest_level(bits.inputs)
    x = np.clip(np.rint(real / input_scale), -limit, limit).astype(np.int64)

    # Float factors, from float activations.
    q = real @ weights.query + weights.query_bias
    k = real @ weights.key  # its bias shifts whole rows of scores
    v = real @ weights.value
    k_mean, v_mean = k.mean(axis=0), v.mean(axis=0)
    p_query, p_key = factor_scores(q, k - k_mean, rank)
    p_value, basis = factor_values(v - v_mean, weights.output, width)

    # Integer projections. The input scales go into the weights.
    scaled = input_scale[:, None]
    query, q, q_step = calibrate_projection(
        "query", scaled * weights.query @ p_query, weights.query_bias @ p_query, x, bits, best_scale
    )
    key, k, k_step = calibrate_projection("key", scaled * weights.key @ p_key, -k_mean @ p_key, x, bits, best_scale)
    value, _, v_step = calibrate_projection(
        "value", scaled * weights.value @ p_value, -v_mean @ p_value, x, bits, best_scale
    )

    # Scores in steps of 2 q k, the predicted row maximum in SHIFT_STEPS-ths of them.
    step = q_step * k_step / 2 / SHIFT_STEPS
    scores = [2 * SHIFT_STEPS * (a @ b.T) for a, b in zip(np.split(q, starts), np.split(k, starts), strict=True)]
    causal = [np.where(np.tri(len(s), dtype=bool), s * step, -np.inf) for s in scores]
    maxima = np.concatenate([s.max(axis=1) for s in causal])
    shift_weight, shift_bias = predict_row_maxima(x * input_scale, maxima)
    integer_shift = np.rint(shift_weight * input_scale / step).astype(np.int64)[:, None]
    integer_bias = np.rint([shift_bias / step]).astype(np.int64)
    shifts = x @ integer_shift + integer_bias  # (N, 1)
    below = [s - m for s, m in zip(scores, np.split(shifts, starts), strict=True)]
    lower = np.concatenate([b[np.tri(len(b), dtype=bool)] for b in below])
    reach = max(1, min(HEADROOM * int(np.abs(lower).max()), 2**30))
    bound = 2 * SHIFT_STEPS * rank * levels**2 + projection_bound(integer_shift, integer_bias, limit)
    check_accumulator("softmax", bound)
    offset = best_offset(causal, [b * step for b in below], largest_weight)
    exponential = symmetric_table(
        lambda s: np.minimum(largest_weight, np.rint(largest_weight * np.exp(np.minimum(s * step - offset, 0.0)))),
        min(reach, bound),
        EXPONENTIAL_BITS[1] if bits.lookup is None else max(bits.lookup, EXPONENTIAL_BITS[0]),
    )
    check_accumulator("output", max_tokens * 2 * largest_weight * levels)
    params = LowRankParams(
        query=query,
        key=key,
        value=value,
        shift_weight=integer_shift,
        shift_bias=integer_bias,
        level_square=Table.build(np.square, -levels, levels),
        sum_square=Table.build(np.square, -2 * levels, 2 * levels),
        exponential=exponential,
        weight_square=Table.build(np.square, 0, largest_weight),
        mixed_square=Table.build(np.square, -levels, levels + largest_weight),
        largest_weight=largest_weight,
    )
    decoding = LowRankDecoding(np.asarray(v_step / 2), basis, v_mean + weights.value_bias)
    return Calibrated(params, input_scale, decoding, bits, max_tokens)


def best_offset(scores: list[np.ndarray], below: list[np.ndarray], largest_weight: int) -> float:
    """Where the exponential's table saturates: the offset (nats above the predicted maximum) of least weight error.

    Args:
        scores: (T, T) real scores, -inf where j > i; below: the same less the predicted row maximum.
    """

    def error(offset: float) -> float:
        total = 0.0
        for s, b in zip(scores, below, strict=True):
            wanted = np.exp(s - s.max(axis=1, keepdims=True))
            wanted /= wanted.sum(axis=1, keepdims=True)
            e = np.rint(largest_weight * np.exp(np.minimum(b - offset, 0.0))) * np.isfinite(s)
            got = e / np.maximum(e.sum(axis=1, keepdims=True), 1.0)
            total += float(((got - wanted)[1:] ** 2).sum())
        return total

    return min(np.linspace(-3.0, 8.0, 45), key=error)


def decode(decoding: LowRankDecoding, outputs: tuple[jax.Array, ...]) -> jax.Array:
    """Numerators (T, S) and denominators (T, 1) to the head's output (T, D).

    A row whose weights all rounded to zero says nothing; it is decoded as the mean value.
    """
    numerators, denominators = (output.astype(jnp.float32) for output in outputs)
    basis, mean, step = (jnp.asarray(part, jnp.float32) for part in (decoding.basis, decoding.mean, decoding.step))
    return numerators / jnp.maximum(denominators, 1.0) * step @ basis + mean


LOWRANK = Formula("lowrank", head=Program(run_head, calibrate, decode), options={"score_rank": 16, "value_rank": 32})
