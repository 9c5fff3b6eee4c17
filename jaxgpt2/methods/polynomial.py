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
  sums appear in slots that nobody reads, and must not overflow (`fhe.ckks.slots.scores`).

`run_head` is the head in floating point, rounded to the engine's precision: what sweeps use. `prompt` and `step` are
the same head as slot functions, which engines run on ciphertexts, and `Slots` calls them.

Shapes: T tokens, C width, D head_dim, R slots for the outputs of a projection, S slots.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fhe.ckks.slots import (
    CleartextSimulator,
    Layout,
    SlotOps,
    V,
    split_real_imaginary,
    power_of_two,
    mask_pairs,
    project,
    evaluate_polynomial,
    scores,
    broadcast_tokens,
    weighted_sum,
    weighted_sum_by_lane,
)
from scipy.optimize import minimize

from fhe import Function, Output
from fhe.errors import FHEError
from jaxgpt2.decoding import Executor, Reader, check_length, common
from jaxgpt2.methods.lowrank import factor_scores, factor_values, predict_row_maxima, rotation
from jaxgpt2.methods.method import HeadWeights, Method, QuantizedFunction, QuantizedModule
from jaxgpt2.quantize import Bits, CalibrationError, scale_for

# What the polynomial alone may change, relative to the head's output, and the squarings tried to get there.
POLYNOMIAL_ERROR = 0.01
SQUARINGS = (3, 4, 5)

# The client rounds its input to so many bits of the largest that calibration saw; in CKKS that costs nothing.
INPUT_BITS = 12
BITS = Bits.of(INPUT_BITS)

# Binary digits of numerators and denominators: rounding to them is of the size of the engine's noise on small ones.
RESULT_BITS = 18

# Calibration scales the polynomial so that the largest denominator is this. SLACK times as much must fit what the
# engine can hold (`fhe.ckks.circuit.CKKSBackend.headroom_bits`), and 2**(31 - RESULT_BITS).
LARGEST_DENOMINATOR = 128.0

# Texts that tell how large the numbers in the functions become, for which there is room to spare (SLACK): functions of
# whole texts, and those of one more token, of which there are many.
PROMPT_TEXTS, STEP_TEXTS = 8, 1

# Levels used up when keys and values stand beside queries, and when they are cached: the projection's, and a mask's.
SPREAD_DEPTH = 2

# A decrypted denominator outside the range of calibration by more than this factor is refused.
SLACK = 32.0

# So is a smaller one: noise would be a few hundredths of it.
LEAST_DENOMINATOR = 2.0**-14

# Decrypted numbers that must be equal may differ by so much, and by so much of the largest of their lane. The noise of
# the worst slot stays below, with ten levels of 34 bits too; what overflows the modulus is thousands of times as large.
TOLERANCES = 2.0**-10, 2.0**-6


class OutOfRange(FHEError):
    """Decrypted numbers that no activation like those of calibration can give: the result would be wrong."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolynomialParams:
    """The head's weights; what the server knows. n: squarings."""

    input_step: np.ndarray  # (C,): real value of one step of the input, for `run_head` only
    query: np.ndarray  # (C, R): with the score's scale and the row's shift
    query_bias: np.ndarray  # (R,)
    key: np.ndarray  # (C, R)
    key_bias: np.ndarray  # (R,)
    value: np.ndarray  # (C, W)
    value_bias: np.ndarray  # (W,)
    start: np.ndarray  # (): h
    constants: np.ndarray  # (n,): g; the last is 0


class PolynomialDecoding(NamedTuple):
    """What a client needs to know, beside the input's scale, to lay out a text and to read results."""

    basis: np.ndarray  # (W, D)
    mean: np.ndarray  # (D,): the mean value
    least: np.ndarray  # (): denominators that calibration saw
    largest: np.ndarray  # ()
    outputs: np.ndarray  # (): R


# --- in floating point --------------------------------------------------------------------------


def attend(params: PolynomialParams, x: Any) -> tuple[Any, Any]:
    """The head's numerators (T, W) and denominators (T, 1) from its input (T, C), unrounded, in NumPy or JAX."""
    q, k = x @ params.query + params.query_bias, x @ params.key + params.key_bias
    e = q @ k.T + params.start
    for i in range(params.constants.shape[0]):
        e = e * e + params.constants[i]
    e = e * np.tri(x.shape[0], dtype=np.float32)
    return e @ (x @ params.value + params.value_bias), e.sum(axis=1)[:, None]


def run_head(ops: Any, params: PolynomialParams, x: Any) -> tuple[Any, Any]:
    """(T, C) input integers -> numerators (T, W) and denominators (T, 1), in steps of 2**-RESULT_BITS.

    Computed in float32, whose error is below one such step.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    with jax.default_matmul_precision("highest"), ops.tag("attention"):
        numerators, denominators = attend(params, x * params.input_step)
    return in_steps(numerators), in_steps(denominators)


def in_steps(x: Any) -> Any:
    """Numbers as int32, in steps of 2**-RESULT_BITS."""
    limit = 2.0**30
    return ((x * 2.0**RESULT_BITS).clip(-limit, limit) + 0.5).__floordiv__(1).astype(np.int32)


def decode(decoding: PolynomialDecoding, outputs: tuple[jax.Array, ...]) -> jax.Array:
    """Numerators (T, W) and denominators (T, 1), in steps of 2**-RESULT_BITS, to the head's output (T, D)."""
    numerators, denominators = (jnp.asarray(output, jnp.float32) for output in outputs)
    ratios = numerators / jnp.maximum(denominators, 1.0)
    return ratios @ jnp.asarray(decoding.basis, jnp.float32) + jnp.asarray(decoding.mean, jnp.float32)


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
    input_step = np.array([scale_for(feature, INPUT_BITS) for feature in real.T])
    params = PolynomialParams(
        input_step=input_step,
        query=query / balance,
        query_bias=query_bias / balance,
        key=key * balance,
        key_bias=key_bias * balance,
        value=weights.value @ p_value / v_scale,
        value_bias=-v_mean @ p_value / v_scale,
        start=np.asarray(start * factor),
        constants=constants,
    )
    decoding = PolynomialDecoding(
        basis * v_scale,
        v_mean + weights.value_bias,
        denominators.min(),
        denominators.max(),
        np.asarray(slots),
    )
    return QuantizedModule(params, input_step, decoding, BITS, max_tokens)


# --- on slots -----------------------------------------------------------------------------------


def layout_for(client: QuantizedModule, slots: int) -> Layout:
    """The layout with the largest tiles."""
    return Layout.fit(slots, len(client.input_scale), int(client.decoding.outputs))


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
    """Of a tile: queries, halved as keys will come doubled, at the depth of `broadcast_tokens`; and keys + i * values, without
    their biases."""
    bias, _ = _biases(layout, params)
    with ops.tag("projection"):
        q, z = project(ops, layout, x, [params.query / 2, _joined(layout, params.key, params.value)])
        return ops.add_plain(ops.level_drop(q, SPREAD_DEPTH), layout.fill(bias)), z


def _weights(ops: SlotOps[V], params: PolynomialParams, layout: Layout, q: V, k: V) -> V:
    with ops.tag("scores"):
        s = scores(ops, layout, q, k)
    with ops.tag("exponential"):
        return evaluate_polynomial(ops, s, float(params.start), [float(constant) for constant in params.constants])


def prompt(layout: Layout, ops: SlotOps[V], params: PolynomialParams, *tiles: V) -> tuple[V, ...]:
    """The head on a text in tiles of T tokens: a slot function, bound to its layout.

    Returns:
        for each tile, in every block, and in the first copy of outputs: numerators + i * denominators; then the caches
        of the text's keys and values (see `step`).
    """
    block, _, lane = layout.axes
    causal = layout.mask((block <= lane) & (block < layout.tokens))
    everything = layout.mask(block < layout.tokens)
    bias = layout.fill(_biases(layout, params)[1])
    # The deepest that values can wait: as deep as the weights that they meet, less the level of their mask.
    deep = SPREAD_DEPTH + len(params.constants)
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
        weights = [_weights(ops, params, layout, q, k) for k, _ in seen]
        with ops.tag("output"):
            results.append(weighted_sum(ops, layout, weights, [v for _, v in seen]))
    return *results, *caches


def step(layout: Layout, count: int, ops: SlotOps[V], params: PolynomialParams, x: V, *caches: V) -> tuple[V, ...]:
    """One more token, with the keys and values of the `count` tokens before it in caches: a slot function.

    Token j's keys + i * values lie in lane j mod T of block (j // T) mod B of cache j // (T * B); the input fhe_config in
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
        weights = _weights(ops, params, layout, q, k)
        with ops.tag("output"):
            v = ops.level_drop(v, ops.depth(weights) - 1)
            for at, pairs in enumerate(lanes):
                if (chosen := there & (lane == at)).any():
                    pairs.append((weights, mask_pairs(ops, layout, v, layout.mask(chosen))))
    with ops.tag("output"):
        return weighted_sum_by_lane(ops, layout, lanes), *updated


# --- a text through the functions ---------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """A text in tiles at once, and each later token by itself, with all keys and values before it kept encrypted.

    The functions are "prompt_M" for a text of M tiles, and "step_N" for one more token after N, which takes caches
    from the prompt before it or from the step before it.

    slots: of a ciphertext, half the ring's degree.
    """

    slots: int = 8192

    def functions(
        self, program: QuantizedFunction, calibrated: QuantizedModule, inputs: Sequence[np.ndarray], length: int
    ) -> dict[str, Function]:
        """The numbers in the circuit follow from texts of all its tokens.

        Raises:
            CalibrationError: all inputs together have fewer.
        """
        texts = of_length(inputs, length)[:PROMPT_TEXTS]
        layout, params = layout_for(calibrated, self.slots), calibrated.params
        run = functools.partial(prompt, layout)
        tiled = [tuple(pack(layout, x)) for x in texts]
        made = {f"prompt_{count}": Function(run, [x[:count] for x in tiled]) for count in range(1, len(tiled[0]) + 1)}
        # The caches that a step takes are what the steps before it make.
        machine, some = CleartextSimulator(self.slots), texts[:STEP_TEXTS]
        caches = [run(machine, params, machine.load(layout.pack(x[:1])))[1:] for x in some]
        for count in range(1, length):
            body = functools.partial(step, layout, count)
            new = [layout.pack_one(x[count]) for x in some]
            inputset = [(x, *(vector.values for vector in kept)) for x, kept in zip(new, caches, strict=True)]
            before = -(-count // layout.tokens)  # tiles of a prompt of so many tokens
            sources = [[Output(f"prompt_{before}", before + i)] for i in range(len(caches[0]))]
            if count > 1:
                earlier = -(-(count - 1) // layout.capacity) + (count % layout.capacity == 1)
                for number in range(min(earlier, len(sources))):
                    sources[number].append(Output(f"step_{count - 1}", 1 + number))
            made[f"step_{count}"] = Function(body, inputset, [[], *sources])
            caches = [body(machine, params, machine.load(x), *kept)[1:] for x, kept in zip(new, caches, strict=True)]
        return made

    def calls(self, client: QuantizedModule, known: int, length: int) -> Mapping[str, int]:
        if known:
            return {f"step_{count}": 1 for count in range(known, length)}
        return {f"prompt_{-(-length // layout_for(client, self.slots).tokens)}": 1}

    def reader(self, client: QuantizedModule, party: Executor, length: int) -> Reader:
        return SlotReader(client, party, length, layout_for(client, self.slots))


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


@dataclass
class SlotReader:
    """Of a text that begins with the last one, reads the rest only, token by token; any other in one call.

    All calls are made before the first result is decrypted.
    """

    client: QuantizedModule
    party: Executor
    length: int
    layout: Layout
    _seen: list[np.ndarray] = field(default_factory=list)
    _caches: list[Any] = field(default_factory=list)
    _results: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def read(self, x: np.ndarray) -> list[np.ndarray]:
        """Numerators (T, W) and denominators (T, 1), in steps of 2**-RESULT_BITS.

        Raises:
            NotReady: the text is longer than the circuit; OutOfRange: see `check`.
        """
        check_length(len(x), self.length)
        known, real = common(self._seen, x), x * self.client.input_scale
        caches, results, tiles = self._caches, list(self._results), []
        if not known:
            packed = pack(self.layout, real)
            name = f"prompt_{len(packed)}"
            made = self.party.run(name, self.party.encrypt(name, *packed))
            tiles, caches = made[: len(packed)], list(made[len(packed) :])
        steps = []
        for count in range(known or len(x), len(x)):
            inputs = self.party.encrypt(f"step_{count}", self.layout.pack_one(real[count]))
            result, *caches = self.party.run(f"step_{count}", [*inputs, *caches])
            steps.append(result)

        width, decoding = len(self.client.decoding.basis), self.client.decoding
        if tiles:
            decrypted = self.party.decrypt(f"prompt_{len(tiles)}", tiles)
            results = [unpack(self.layout, width, decoding, decrypted, len(x))]
        for count, result in enumerate(steps, known):
            (decrypted,) = self.party.decrypt(f"step_{count}", [result])
            results.append(unpack_step(self.layout, width, decoding, decrypted))
        # Only now: where a number is out of range, the last text is still the one that was read.
        self._seen, self._caches, self._results = list(x), caches, results
        return [in_steps(np.concatenate(parts)) for parts in zip(*results, strict=True)]


def pack(layout: Layout, x: np.ndarray) -> list[np.ndarray]:
    """A text (T, C), real, in tiles, each a slot vector (S,)."""
    return [layout.pack(x[start : start + layout.tokens]) for start in range(0, len(x), layout.tokens)]


def unpack(
    layout: Layout, width: int, decoding: PolynomialDecoding, results: Sequence[np.ndarray], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decrypted results of `head` to checked numerators (T, W) and denominators (T, 1).

    Raises OutOfRange (see `check`).
    """
    parts = []
    for number, values in enumerate(results):
        count = min(layout.tokens, tokens - number * layout.tokens)
        parts.append(_read(layout, decoding, layout.unpack(values)[:, :, :count]))
    return _split(np.concatenate(parts), width)


def unpack_step(
    layout: Layout, width: int, decoding: PolynomialDecoding, result: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The decrypted result of `step` to checked numerators (1, W) and denominators (1, 1). Raises OutOfRange."""
    return _split(_read(layout, decoding, layout.unpack(result)[:, :, -1:]), width)


def _read(layout: Layout, decoding: PolynomialDecoding, part: np.ndarray) -> np.ndarray:
    """A checked result (B, 2R, n) to (n, R).

    Of each number the median over all blocks: SEAL's errors are largest in a few slots, slot 0 above all.
    """
    check(layout, decoding, part)
    first = part[:, : layout.outputs]
    return (np.median(first.real, axis=0) + 1j * np.median(first.imag, axis=(0, 1))).T


def _split(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    return values[:, :width].real, values[:, :1].imag


def check(layout: Layout, decoding: PolynomialDecoding, part: np.ndarray) -> None:
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
    least, largest = max(float(decoding.least) / SLACK, LEAST_DENOMINATOR), float(decoding.largest) * SLACK
    if denominators.min() < least or denominators.max() > largest:
        raise OutOfRange(
            f"sums of attention weights are {denominators.min():.3g} to {denominators.max():.3g}, calibration saw "
            f"{decoding.least:.3g} to {decoding.largest:.3g}: calibrate on text more like this"
        )


POLYNOMIAL = Method(
    "polynomial",
    head=QuantizedFunction(run_head, calibrate, decode, Slots()),
    needs=frozenset({"slots"}),
    backend="ckks",
    options={"score_rank": 0, "value_rank": 0, "squarings": 0},
    bits=lambda n: BITS,
)
