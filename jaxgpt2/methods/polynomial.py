"""A head made for CKKS: sums, products and rotations of long vectors of approximate numbers, and nothing else.

What it does differently from GPT-2's own, each exact or fitted on calibration activations:

- The exponential is a polynomial of degree 2^n, n squarings with a constant added after each:
  e = ((((s + h)^2 + g_1)^2 + g_2)^2 ...)^2. That costs n levels and no product with a constant, is never negative, and
  holds (1 + u + u^2/2)^8, up to a factor, among much better ones. h, g and the scale of s are fitted for least
  error of the attention weights, n is the least that reaches a tolerance.
- It is good on the range of scores that calibration saw, so rows of scores are shifted to their maximum, which is
  predicted by a linear regression on the row's input (`predict_row_maxima`): one more dimension of queries and keys.
- The client divides: the server returns sum_j e_ij v_j and sum_j e_ij.
- Queries and keys are rotated at random, so that a sum over half of their dimensions is about half of the whole: such
  sums appear in slots that nobody reads, and must not overflow (`packed.scores`).

`attention_weights` is the one statement of its mathematics. On arrays (`DenseOps`) it is what JAX runs, with a cache of
keys and values; on slots (`PackedOps`) it is part of `prefill` and `decode_step`, which engines run on ciphertexts.

Shapes: T tokens, C width, D head_dim, R slots for the outputs of a projection, S slots.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from fhe import Function, Output
from fhe.ckks.linalg import Layout, evaluate_polynomial, power_of_two, project, split_real_imaginary
from fhe.ckks.slots import CleartextSimulator, SlotOps, V
from jaxgpt2.decoding import Body, CircuitCache, OutOfRange, appended, write
from jaxgpt2.executors import Executor
from jaxgpt2.methods.lowrank import factor_scores, factor_values, predict_row_maxima, rotation
from jaxgpt2.methods.method import HeadWeights, Method, QuantizedFunction, QuantizedModule
from jaxgpt2.methods.packed import broadcast_tokens, mask_pairs, scores, weighted_sum, weighted_sum_by_lane
from jaxgpt2.quantize import Bits, CalibrationError

# What the polynomial alone may change, relative to the head's output, and the squarings tried to get there.
POLYNOMIAL_ERROR = 0.01
SQUARINGS = (3, 4, 5)

# Numbers are approximate, of whatever precision the engine has: widths say nothing here.
BITS = Bits.of(12)

# Calibration scales the polynomial so that the largest denominator is this. SLACK times as much must fit what the
# engine can hold (`fhe.ckks.circuit.CKKSBackend.headroom_bits`).
LARGEST_DENOMINATOR = 128.0

# Texts that tell how large the numbers in the functions become; there is room to spare (SLACK). For prefill, and for
# each of the many decode steps.
PREFILL_TEXTS, DECODE_TEXTS = 8, 1

# Levels used up when keys and values stand beside queries, and when they are cached: the projection's, and a mask's.
BROADCAST_DEPTH = 2

# A decrypted denominator outside the range of calibration by more than this factor is refused.
SLACK = 32.0

# So is a smaller one: noise would be a few hundredths of it.
LEAST_DENOMINATOR = 2.0**-14

# Decrypted numbers that must be equal may differ by so much, and by so much of the largest of their lane. The noise of
# the worst slot stays below, with ten levels of 34 bits too; what overflows the modulus is thousands of times as large.
TOLERANCES = 2.0**-10, 2.0**-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolynomialParams:
    """The head's weights; what the server knows. n: squarings."""

    query: np.ndarray  # (C, R): with the score's scale and the row's shift
    query_bias: np.ndarray  # (R,)
    key: np.ndarray  # (C, R)
    key_bias: np.ndarray  # (R,)
    value: np.ndarray  # (C, W)
    value_bias: np.ndarray  # (W,)
    start: np.ndarray  # (): h
    constants: np.ndarray  # (n,): g; the last is 0


class PolynomialDequantization(NamedTuple):
    """What a client needs to know, beside the input's scale, to lay out a text and to read results."""

    basis: np.ndarray  # (W, D)
    mean: np.ndarray  # (D,): the mean value
    least: np.ndarray  # (): denominators that calibration saw
    largest: np.ndarray  # ()
    outputs: np.ndarray  # (): R


# --- one statement, two kinds of operations -----------------------------------------------------


class DenseOps:
    """The operations on arrays, in NumPy or JAX."""

    def tag(self, name: str) -> AbstractContextManager[Any]:
        return jax.named_scope(name)

    def scores(self, q: Any, k: Any) -> Any:
        """Queries (T, R) and keys (S, R) -> (T, S)."""
        return q @ k.T

    def evaluate_polynomial(self, x: Any, start: Any, constants: Sequence[Any]) -> Any:
        """(x + start)**2 + constants[0], squared + constants[1], ..."""
        x = x + start
        for constant in constants:
            x = x * x + constant
        return x


@dataclass(frozen=True)
class PackedOps(Generic[V]):
    """The operations on slot vectors of a layout."""

    ops: SlotOps[V]
    layout: Layout

    def tag(self, name: str) -> AbstractContextManager[Any]:
        return self.ops.tag(name)

    def scores(self, q: V, k: V) -> V:
        return scores(self.ops, self.layout, q, k)

    def evaluate_polynomial(self, x: V, start: Any, constants: Sequence[Any]) -> V:
        return evaluate_polynomial(self.ops, x, float(start), [float(constant) for constant in constants])


def attention_weights(ops: DenseOps | PackedOps[Any], params: PolynomialParams, q: Any, k: Any) -> Any:
    """What every query makes of every key that stands beside it, unnormalized."""
    with ops.tag("scores"):
        s = ops.scores(q, k)
    with ops.tag("exponential"):
        return ops.evaluate_polynomial(s, params.start, [params.constants[i] for i in range(params.constants.shape[0])])


def decode(dequantization: PolynomialDequantization, results: tuple[jax.Array, ...]) -> jax.Array:
    """Numerators (T, W) and denominators (T, 1) to the head's output (T, D)."""
    numerators, denominators = (jnp.asarray(part, jnp.float32) for part in results)
    basis, mean = (jnp.asarray(part, jnp.float32) for part in (dequantization.basis, dequantization.mean))
    # Padding has a denominator of zero, and nobody reads it.
    return numerators / jnp.maximum(denominators, LEAST_DENOMINATOR / 2) @ basis + mean


# --- the polynomial -----------------------------------------------------------------------------


class Pairs(NamedTuple):
    """All causal pairs of some texts, row after row."""

    scores: np.ndarray  # (N,): less the row's predicted maximum
    weights: np.ndarray  # (N,): what softmax makes of them
    starts: np.ndarray  # (rows,): where each row begins


def causal_pairs(scores: Sequence[np.ndarray], shifts: Sequence[np.ndarray]) -> Pairs:
    """From each text's scores (T, T) and its rows' shifts (T,)."""
    below, weights, lengths = [], [], []
    for s, shift in zip(scores, shifts, strict=True):
        for row in range(len(s)):
            some = s[row, : row + 1]
            e = np.exp(some - some.max())
            below.append(some - shift[row])
            weights.append(e / e.sum())
            lengths.append(row + 1)
    return Pairs(np.concatenate(below), np.concatenate(weights), np.cumsum([0, *lengths[:-1]]))


def polynomial(scale: float, start: float, constants: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The polynomial of scores s."""
    x = scale * s + start
    for constant in constants:
        x = x * x + constant
    return x


def fit(pairs: Pairs, squarings: int) -> tuple[float, float, np.ndarray, float]:
    """scale, start, constants (squarings,), and the mean over rows of the squared error of the attention weights.

    Least squares by L-BFGS from (1 + s / reach)^(2^n), which tends to exp(s) where n is large; with two reaches, as
    the least is not the only local one. The fit's constants leave a common factor of all weights open: it starts at 1.
    """
    lengths = np.diff([*pairs.starts, len(pairs.scores)])

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        steps = [theta[0] * pairs.scores + theta[1]]
        for constant in (*theta[2:], 0.0):
            steps.append(steps[-1] ** 2 + constant)
        e = steps[-1]
        totals = np.repeat(np.add.reduceat(e, pairs.starts) + 1e-12, lengths)
        p = e / totals
        error = p - pairs.weights
        means = np.repeat(np.add.reduceat(error * p, pairs.starts), lengths)
        gradient, slope = np.zeros(squarings + 1), 2 * (error - means) / totals
        for index in range(squarings, 0, -1):
            if index < squarings:
                gradient[1 + index] = slope.sum()
            slope = 2 * slope * steps[index - 1]
        gradient[0], gradient[1] = slope @ pairs.scores, slope.sum()
        count = len(pairs.starts)
        return float(error @ error) / count, gradient / count

    reach = max(2.0, -float(pairs.scores.min()))
    with np.errstate(over="ignore", invalid="ignore"):  # a step too far of the search is taken back
        found = [
            minimize(
                loss, [1 / r, 1.0, *[0.0] * (squarings - 1)], jac=True, method="L-BFGS-B", options={"maxiter": 200}
            )
            for r in (2.0**squarings, max(8.0, reach / 1.5))
        ]
    best = min(found, key=lambda result: result.fun if np.isfinite(result.fun) else np.inf)
    return float(best.x[0]), float(best.x[1]), np.append(best.x[2:], 0.0), float(best.fun)


def calibrate(
    weights: HeadWeights,
    inputs: Sequence[np.ndarray],
    bits: Bits,
    max_tokens: int,
    *,
    score_rank: int,
    value_rank: int,
    squarings: int,
) -> QuantizedModule:
    """Ranks of 0 are the head's own, of which the scores give one dimension to the shift.

    squarings: of the polynomial; 0 for the fewest, 3 to 5, whose error on the calibration activations is at most
    POLYNOMIAL_ERROR of the head's output. `bits` play no part: the engine's numbers have the precision that they have.
    """
    head_dim = weights.query.shape[1]
    width = min(value_rank or head_dim, head_dim)
    slots = power_of_two(max(min(score_rank + 1, head_dim) if score_rank else head_dim, width))
    rank = min(score_rank or head_dim, slots - 1)
    real = np.concatenate(inputs)
    cuts = np.cumsum([len(passage) for passage in inputs])[:-1]

    q = real @ weights.query + weights.query_bias
    k = real @ weights.key  # its bias shifts whole rows of scores
    v = real @ weights.value
    k_mean, v_mean = k.mean(axis=0), v.mean(axis=0)
    p_query, p_key = factor_scores(q, k - k_mean, rank)
    p_value, basis = factor_values(v - v_mean, weights.output, width)
    q, k, v = q @ p_query, (k - k_mean) @ p_key, (v - v_mean) @ p_value

    texts = [a @ b.T for a, b in zip(np.split(q, cuts), np.split(k, cuts), strict=True)]
    maxima = np.concatenate([np.where(np.tri(len(s), dtype=bool), s, -np.inf).max(axis=1) for s in texts])
    shift_weight, shift_bias = predict_row_maxima(real, maxima)
    pairs = causal_pairs(texts, np.split(real @ shift_weight + shift_bias, cuts))

    columns = np.concatenate([np.concatenate([np.arange(r + 1) for r in range(len(s))]) for s in texts])
    first = np.repeat([0, *cuts], [len(s) * (len(s) + 1) // 2 for s in texts])
    taken = v[first + columns]  # (N, W): the value of each pair
    wanted = np.add.reduceat(pairs.weights[:, None] * taken, pairs.starts)
    for count in (squarings,) if squarings else SQUARINGS:
        scale, start, constants, _ = fit(pairs, count)
        e = polynomial(scale, start, constants, pairs.scores)
        denominators = np.add.reduceat(e, pairs.starts)
        given = np.add.reduceat(e[:, None] * taken, pairs.starts) / denominators[:, None]
        if np.linalg.norm(given - wanted) <= POLYNOMIAL_ERROR * np.linalg.norm(wanted):
            break

    # (c x)^2 + c^2 g = c^2 (x^2 + g): a factor of the weights costs nothing.
    factor = (LARGEST_DENOMINATOR / denominators.max()) ** 0.5 ** len(constants)
    constants = constants * factor**2.0 ** np.arange(1, len(constants) + 1)
    v_scale = np.abs(v).max(initial=1e-9)
    denominators = denominators * LARGEST_DENOMINATOR / denominators.max()

    # The shift is one more dimension, of the same size on both sides; then both sides are turned.
    size = np.sqrt(np.abs(maxima).mean() + 1e-9)
    turn = rotation(slots, 2)[: rank + 1]
    query = np.column_stack([weights.query @ p_query, -shift_weight / size]) @ turn * (scale * factor)
    query_bias = np.append(weights.query_bias @ p_query, -shift_bias / size) @ turn * (scale * factor)
    key = np.column_stack([weights.key @ p_key, np.zeros(len(weights.key))]) @ turn
    key_bias = np.append(-k_mean @ p_key, size) @ turn
    balance = np.sqrt(
        np.linalg.norm(real @ query + query_bias) / max(np.linalg.norm(real @ key + key_bias), 1e-9) + 1e-9
    )
    params = PolynomialParams(
        query=query / balance,
        query_bias=query_bias / balance,
        key=key * balance,
        key_bias=key_bias * balance,
        value=weights.value @ p_value / v_scale,
        value_bias=-v_mean @ p_value / v_scale,
        start=np.asarray(start * factor),
        constants=constants,
    )
    dequantization = PolynomialDequantization(
        basis * v_scale,
        v_mean + weights.value_bias,
        denominators.min(),
        denominators.max(),
        np.asarray(slots),
    )
    return QuantizedModule(params, np.ones(real.shape[1]), dequantization, BITS, max_tokens)


# --- on slots -----------------------------------------------------------------------------------


def layout_for(client: QuantizedModule, slots: int) -> Layout:
    """The layout with the largest tiles."""
    return Layout.fit(slots, len(client.input_scale), int(client.dequantization.outputs))


def _joined(layout: Layout, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Keys + i * values, (..., R)."""
    both = np.zeros((*key.shape[:-1], layout.outputs), np.complex128)
    both[..., : key.shape[-1]] += key
    both[..., : value.shape[-1]] += 1j * value
    return both


def _biases(layout: Layout, params: PolynomialParams) -> tuple[np.ndarray, np.ndarray]:
    """Of queries, halved, and of keys + i * values, (2R, 1)."""
    joined = _joined(layout, params.key_bias, params.value_bias)
    return np.tile(params.query_bias / 2, 2)[:, None], np.tile(joined, 2)[:, None]


def _project(ops: SlotOps[V], params: PolynomialParams, layout: Layout, x: V) -> tuple[V, V]:
    """Of a tile: queries, halved as keys will come doubled, at the depth of `broadcast_tokens`; and keys + i * values,
    without their biases."""
    bias, _ = _biases(layout, params)
    with ops.tag("projection"):
        q, z = project(ops, layout, x, [params.query / 2, _joined(layout, params.key, params.value)])
        return ops.add_plain(ops.level_drop(q, BROADCAST_DEPTH), layout.fill(bias)), z


def prefill(layout: Layout, ops: SlotOps[V], params: PolynomialParams, *tiles: V) -> tuple[V, ...]:
    """The head on a text in tiles of T tokens: a slot function, bound to its layout.

    Returns:
        for each tile, in every block, and in the first copy of outputs: numerators + i * denominators; then the caches
        of the text's keys and values (see `decode_step`).
    """
    block, _, lane = layout.axes
    causal = layout.mask((block <= lane) & (block < layout.tokens))
    everything = layout.mask(block < layout.tokens)
    bias = layout.fill(_biases(layout, params)[1])
    # The deepest that values can wait: as deep as the weights that they meet, less the level of their mask.
    deep = BROADCAST_DEPTH + len(params.constants)
    queries, own, earlier, caches = [], [], [], []

    def pairs(z: V, chosen: np.ndarray) -> tuple[V, V]:
        k, v = split_real_imaginary(ops, z)
        return k, mask_pairs(ops, layout, ops.level_drop(v, deep), chosen)

    for number, x in enumerate(tiles):
        q, z = _project(ops, params, layout, x)
        queries.append(q)
        with ops.tag("cache"):
            cached = ops.sum_of_plaintext_products([z], [layout.mask(block == number % layout.blocks)])
            caches[-1:] = [ops.add(caches[-1], cached)] if number % layout.blocks else [*caches[-1:], cached]
        later = number < len(tiles) - 1  # some tile comes after this one, and attends to all of it
        with ops.tag("pairs"):
            below, above = broadcast_tokens(ops, layout, ops.add_plain(z, bias), wrapped=later)
            own.append(pairs(below, causal))
            if later:
                earlier.append(pairs(below if above is None else ops.add(below, above), everything))
    results = []
    for number, q in enumerate(queries):
        seen = [*earlier[:number], own[number]]
        weights = [attention_weights(PackedOps(ops, layout), params, q, k) for k, _ in seen]
        with ops.tag("output"):
            results.append(weighted_sum(ops, layout, weights, [v for _, v in seen]))
    return *results, *caches


def decode_step(
    layout: Layout, count: int, ops: SlotOps[V], params: PolynomialParams, x: V, *caches: V
) -> tuple[V, ...]:
    """One more token, with the keys and values of the `count` tokens before it in caches: a slot function.

    Token j's keys + i * values lie in lane j mod T of block (j // T) mod B of cache j // (T * B); the input stands in
    every lane, so that query and new key are everywhere, and joining the cache takes a mask and no rotation. Caches
    hold keys and values without their biases, which leaves zero where no token is: weights there must not be large, as
    they multiply the noise of zero values.

    Returns:
        the head's output, in the last lane: numerators + i * denominators; then the caches with the new token, one more
        if they were full.
    """
    block, _, lane = layout.axes
    place, here = block * layout.tokens + lane, count % layout.capacity
    q, z = _project(ops, params, layout, x)
    bias, updated = layout.fill(_biases(layout, params)[1]), list(caches)
    with ops.tag("cache"):
        new = ops.sum_of_plaintext_products([z], [layout.mask(place == here)])
        updated[-1:] = [ops.add(updated[-1], new)] if here else [*updated[-1:], new]
    lanes: list[list[tuple[V, V]]] = [[] for _ in range(layout.tokens)]
    for number, cache in enumerate(updated):
        there = place <= count - number * layout.capacity
        with ops.tag("pairs"):
            k, v = split_real_imaginary(ops, ops.add_plain(cache, layout.mask(there) * bias))
        weights = attention_weights(PackedOps(ops, layout), params, q, k)
        with ops.tag("output"):
            v = ops.level_drop(v, ops.depth(weights) - 1)
            for at, pairs in enumerate(lanes):
                if (chosen := there & (lane == at)).any():
                    pairs.append((weights, mask_pairs(ops, layout, v, layout.mask(chosen))))
    with ops.tag("output"):
        return weighted_sum_by_lane(ops, layout, lanes), *updated


# --- a text through the functions ---------------------------------------------------------------


@dataclass(frozen=True)
class PackedSequence:
    """A text in tiles at once, and each later token by itself, with all keys and values before it kept encrypted.

    The functions are "prefill_M" for a text of M tiles, and "decode_N" for one more token after N, which takes caches
    from the prefill before it or from the decode step before it.

    slots: of a ciphertext, half of poly_modulus_degree.
    """

    slots: int = 8192

    @property
    def bodies(self) -> tuple[Body, ...]:
        return prefill, decode_step

    # In JAX: numerators (T, W) and denominators (T, 1), in float32.

    def whole(self, ops: Any, params: PolynomialParams, x: Any) -> tuple[Any, ...]:
        return self.extend(ops, params, x, self.empty_cache(ops, params, x, x.shape[0]), 0)[0]

    def empty_cache(self, ops: Any, params: PolynomialParams, x: Any, size: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((size, params.key.shape[1])), jnp.zeros((size, params.value.shape[1]))

    def extend(
        self, ops: Any, params: PolynomialParams, x: jax.Array, cache: tuple[jax.Array, jax.Array],
        start: jax.Array | int,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:  # fmt: skip
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        with jax.default_matmul_precision("highest"):
            q = x @ params.query + params.query_bias
            keys = write(cache[0], x @ params.key + params.key_bias, start)
            values = write(cache[1], x @ params.value + params.value_bias, start)
            e = attention_weights(DenseOps(), params, q, keys)
            e = e * (start + jnp.arange(x.shape[0])[:, None] >= jnp.arange(keys.shape[0]))
            return (e @ values, e.sum(axis=1, keepdims=True)), (keys, values)

    # In a circuit.

    def functions(self, module: QuantizedModule, inputs: Sequence[np.ndarray], length: int) -> dict[str, Function]:
        """The numbers in the circuit follow from texts of all its tokens.

        Raises:
            CalibrationError: all inputs together have fewer.
        """
        texts = of_length(inputs, length)[:PREFILL_TEXTS]
        layout, params = layout_for(module, self.slots), module.params
        run = functools.partial(prefill, layout)
        tiled = [tuple(pack(layout, x)) for x in texts]
        made = {f"prefill_{count}": Function(run, [x[:count] for x in tiled]) for count in range(1, len(tiled[0]) + 1)}
        # The caches that a decode step takes are what the steps before it make.
        simulator, some = CleartextSimulator(self.slots), texts[:DECODE_TEXTS]
        caches = [run(simulator, params, simulator.load(layout.pack(x[:1])))[1:] for x in some]
        for count in range(1, length):
            body = functools.partial(decode_step, layout, count)
            new = [layout.pack_one(x[count]) for x in some]
            inputset = [(x, *(vector.values for vector in kept)) for x, kept in zip(new, caches, strict=True)]
            before = -(-count // layout.tokens)  # tiles of a prompt of so many tokens
            sources = [[Output(f"prefill_{before}", before + i)] for i in range(len(caches[0]))]
            if count > 1:
                earlier = -(-(count - 1) // layout.capacity) + (count % layout.capacity == 1)
                for number in range(min(earlier, len(sources))):
                    sources[number].append(Output(f"decode_{count - 1}", 1 + number))
            made[f"decode_{count}"] = Function(body, inputset, [[], *sources])
            caches = [
                body(simulator, params, simulator.load(x), *kept)[1:] for x, kept in zip(new, caches, strict=True)
            ]
        return made

    def calls(self, client: QuantizedModule, known: int, length: int) -> Mapping[str, int]:
        if known:
            return {f"decode_{count}": 1 for count in range(known, length)}
        return {f"prefill_{-(-length // layout_for(client, self.slots).tokens)}": 1}

    def read(
        self, client: QuantizedModule, executor: Executor, x: np.ndarray, cache: CircuitCache | None, length: int
    ) -> tuple[list[np.ndarray], CircuitCache]:
        """All calls are made before the first result is decrypted.

        Raises:
            OutOfRange: see `check`.
        """
        inputs, layout = appended(cache, x, length), layout_for(client, self.slots)
        state: Sequence[Any] = () if cache is None else cache.state
        issued: list[tuple[str, Sequence[Any]]] = []
        if cache is None:
            packed = pack(layout, x)
            name = f"prefill_{len(packed)}"
            made = executor.run(name, executor.encrypt(name, *packed))
            issued.append((name, made[: len(packed)]))
            state = made[len(packed) :]
        else:
            for count in range(len(cache.inputs), len(inputs)):
                name = f"decode_{count}"
                result, *state = executor.run(name, [*executor.encrypt(name, layout.pack_one(inputs[count])), *state])
                issued.append((name, [result]))
        width, client_side = len(client.dequantization.basis), client.dequantization
        results = []
        for name, arrays in issued:
            decrypted = executor.decrypt(name, arrays)
            if cache is None:
                results.append(unpack(layout, width, client_side, decrypted, len(x)))
            else:
                results.append(unpack_step(layout, width, client_side, decrypted[0]))
        return [np.concatenate(parts) for parts in zip(*results, strict=True)], CircuitCache(inputs, tuple(state))


def of_length(inputs: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """The texts that are so long; where there are none, all texts joined and cut to pieces of that length."""
    texts = [x for x in inputs if len(x) == length]
    if not texts:
        joined = np.concatenate(inputs)
        if len(joined) < length:
            raise CalibrationError(
                f"the calibration texts have {len(joined)} tokens together, and the circuit shall read {length}: give "
                "more text, or use fewer tokens"
            )
        texts = np.split(joined[: len(joined) // length * length], len(joined) // length)
    return texts


def pack(layout: Layout, x: np.ndarray) -> list[np.ndarray]:
    """A text (T, C), real, in tiles, each a slot vector (S,)."""
    return [layout.pack(x[start : start + layout.tokens]) for start in range(0, len(x), layout.tokens)]


def unpack(
    layout: Layout, width: int, dequantization: PolynomialDequantization, results: Sequence[np.ndarray], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decrypted results of `prefill` to checked numerators (T, W) and denominators (T, 1).

    Raises OutOfRange (see `check`).
    """
    parts = []
    for number, values in enumerate(results):
        count = min(layout.tokens, tokens - number * layout.tokens)
        parts.append(_read(layout, dequantization, layout.unpack(values)[:, :, :count]))
    return _split(np.concatenate(parts), width)


def unpack_step(
    layout: Layout, width: int, dequantization: PolynomialDequantization, result: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The decrypted result of `decode_step` to checked numerators (1, W) and denominators (1, 1). Raises OutOfRange."""
    return _split(_read(layout, dequantization, layout.unpack(result)[:, :, -1:]), width)


def _read(layout: Layout, dequantization: PolynomialDequantization, part: np.ndarray) -> np.ndarray:
    """A checked result (B, 2R, n) to (n, R).

    Of each number the median over all blocks: SEAL's errors are largest in a few slots, slot 0 above all.
    """
    check(layout, dequantization, part)
    first = part[:, : layout.outputs]
    return (np.median(first.real, axis=0) + 1j * np.median(first.imag, axis=(0, 1))).T


def _split(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    return values[:, :width].real, values[:, :1].imag


def check(layout: Layout, dequantization: PolynomialDequantization, part: np.ndarray) -> None:
    """OutOfRange unless a decrypted result (B, 2R, n) has its redundancy, and denominators like calibration's.

    Every block holds the same, every output of the first copy the same denominator, and the second copy is zero. An
    overflow of the modulus, which scrambles all slots, breaks that all but surely.
    """
    size = layout.outputs
    middle = np.median(part.real, axis=0) + 1j * np.median(part.imag, axis=0)  # (2R, n)
    denominators = np.median(middle[:size].imag, axis=0)  # (n,)
    differences = np.max(
        [
            np.abs(part - middle).max(axis=(0, 1)),
            np.abs(part[:, size:]).max(axis=(0, 1)),
            np.abs(part[:, :size].imag - denominators).max(axis=(0, 1)),
        ],
        axis=0,
    )
    allowed = TOLERANCES[0] + TOLERANCES[1] * np.abs(middle).max(axis=0)
    if not (differences <= allowed).all():
        worst = int(np.argmax(differences / allowed))
        raise OutOfRange(
            f"decrypted copies of one number differ by {differences[worst]:.3g}, and noise by {allowed[worst]:.3g} at "
            f"most: the input is far outside what the head was calibrated for"
        )
    if not np.all(readable(dequantization, denominators)):
        raise OutOfRange(
            f"sums of attention weights are {denominators.min():.3g} to {denominators.max():.3g}, calibration saw "
            f"{dequantization.least:.3g} to {dequantization.largest:.3g}: calibrate on text more like this"
        )


def readable(dequantization: PolynomialDequantization, denominators: Any) -> Any:
    """Which denominators (...) are like calibration's."""
    least, largest = jnp.asarray(dequantization.least), jnp.asarray(dequantization.largest)
    return (denominators >= jnp.maximum(least / SLACK, LEAST_DENOMINATOR)) & (denominators <= largest * SLACK)


def refuses(dequantization: PolynomialDequantization, results: tuple[jax.Array, ...]) -> jax.Array:
    """Which rows of results (T, ...) `check` refuses for their denominators: (T,)."""
    return ~readable(dequantization, results[1][:, 0])


POLYNOMIAL = Method(
    "polynomial",
    head=QuantizedFunction(PackedSequence(), calibrate, decode, encode=lambda _, x: x, refuses=refuses),
    needs=frozenset({"slots"}),
    backend="ckks",
    options={"score_rank": 0, "value_rank": 0, "squarings": 0},
    bits=lambda n: BITS,
)
