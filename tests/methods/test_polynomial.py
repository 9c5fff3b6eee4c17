"""The polynomial method: its fit, and the same head in floating point and on slots."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fhe import Function
from fhe.backend import check_functions
from fhe.ckks.linalg import Layout
from fhe.ckks.slots import CleartextSimulator
from heads import Rehearsal
from jaxgpt2 import methods
from jaxgpt2.decoding import NotReady
from jaxgpt2.methods import polynomial
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import HeadWeights, QuantizedModule, float_head
from jaxgpt2.methods.polynomial import DenseOps, PackedSequence, PolynomialParams
from jaxgpt2.quantize import Bits, CalibrationError

WIDTH, SIZE = 24, 8


def head_and_texts(width: int = WIDTH, size: int = SIZE, texts: int = 30, seed: int = 0):
    """Random weights, and texts whose rows lie near a subspace, as a trained model's activations do."""
    random = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(size=shape) * scale

    scale = 1.3 / width**0.5
    weights = HeadWeights(
        draw(width, size, scale=scale),
        draw(size),
        draw(width, size, scale=scale),
        draw(size),
        draw(width, size, scale=scale),
        draw(size),
        draw(size, width),
        np.eye(size),
    )
    basis = draw(max(4, width // 8), width)
    passages = [draw(n, len(basis)) @ basis for n in random.integers(4, 20, texts)]
    return weights, [x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) for x in passages]


@pytest.fixture(scope="module")
def calibrated() -> tuple[HeadWeights, QuantizedModule, list[np.ndarray]]:
    weights, texts = head_and_texts()
    return weights, calibrate(weights, texts[:20]), texts[20:]


def calibrate(weights: HeadWeights, texts: list[np.ndarray], **options: int) -> QuantizedModule:
    method = methods.get("polynomial")
    return method.head.calibrate(weights, texts, Bits.of(4), 64, **{**method.options, **options})


def error(given: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted))


def outputs(found: QuantizedModule, results: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return results[0] / results[1] @ found.dequantization.basis + found.dequantization.mean


def dense(params: PolynomialParams, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of a text in float64, by the same statement of the weights that runs on slots."""
    q, k = x @ params.query + params.query_bias, x @ params.key + params.key_bias
    e = polynomial.attention_weights(DenseOps(), params, q, k) * np.tri(len(x))
    return e @ (x @ params.value + params.value_bias), e.sum(axis=1, keepdims=True)


def test_the_head_is_close_to_the_softmax_it_stands_for(calibrated):
    weights, found, texts = calibrated
    for x in texts:
        assert error(outputs(found, dense(found.params, x)), float_head(weights, x)) < 0.05


def test_in_jax_it_is_the_same_head(calibrated):
    weights, found, texts = calibrated
    function = methods.get("polynomial").head
    for x in texts[:3]:
        rows = jnp.asarray(x, jnp.float32)
        results = function.strategy.whole(JaxOps(), found.params, function.encode(found, rows))
        for got, wanted in zip(results, dense(found.params, x), strict=True):
            assert error(np.asarray(got), wanted) < 1e-5
        assert error(np.asarray(function.decode(found.dequantization, results)), float_head(weights, x)) < 0.05
        assert error(np.asarray(function.whole(JaxOps(), found, rows)[0]), float_head(weights, x)) < 0.05


@pytest.mark.parametrize("squarings", [2, 3, 4])
def test_squarings_can_be_chosen(squarings):
    weights, texts = head_and_texts(texts=5)
    found = calibrate(weights, texts, squarings=squarings)
    assert found.params.constants.shape == (squarings,) and found.params.constants[-1] == 0


def test_no_row_depends_on_a_later_one(calibrated):
    _, found, texts = calibrated
    x = next(x for x in texts if len(x) > 5)
    changed = x.copy()
    changed[4:] += 1.0
    for a, b in zip(dense(found.params, x), dense(found.params, changed), strict=True):
        assert np.allclose(a[:4], b[:4])


def test_more_squarings_fit_better():
    random = np.random.default_rng(0)
    scores = [random.normal(size=(12, 12)) * 4 for _ in range(20)]
    maxima = [np.where(np.tri(12, dtype=bool), s, -np.inf).max(axis=1) for s in scores]
    pairs = polynomial.causal_pairs(scores, maxima)
    losses = [polynomial.fit(pairs, squarings)[3] for squarings in (2, 3, 4)]
    assert losses[0] > losses[1] > losses[2]
    u = 1 + pairs.scores / 8
    taylor = ((u**2 + 1) / 2) ** 8  # (1 + u + u^2/2)^8
    rows = np.repeat(np.arange(len(pairs.starts)), np.diff([*pairs.starts, len(pairs.scores)]))
    taylor /= np.bincount(rows, taylor)[rows]
    assert losses[2] < np.sum((taylor - pairs.weights) ** 2) / len(pairs.starts)


def test_the_fit_follows_its_gradient():
    scores = [np.random.default_rng(1).normal(size=(6, 6))]
    pairs = polynomial.causal_pairs(scores, [np.zeros(6)])
    scale, start, constants, loss = polynomial.fit(pairs, 3)
    e = polynomial.polynomial(scale, start, constants, pairs.scores)
    p = np.concatenate([row / row.sum() for row in np.split(e, pairs.starts[1:])])
    assert np.sum((p - pairs.weights) ** 2) / 6 == pytest.approx(loss)
    assert loss < 1e-4


# --- on slots -----------------------------------------------------------------------------------


def on_slots(layout: Layout, params: PolynomialParams, x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Results and caches of `prefill`."""
    simulator = CleartextSimulator(layout.slots)
    tiles = [simulator.load(tile) for tile in polynomial.pack(layout, x)]
    results = polynomial.prefill(layout, simulator, params, *tiles)
    return [r.values for r in results[: len(tiles)]], [r.values for r in results[len(tiles) :]]


@functools.cache
def calibrated_at(width: int, size: int) -> tuple[QuantizedModule, list[np.ndarray]]:
    weights, texts = head_and_texts(width, size, texts=12)
    return calibrate(weights, texts), texts


@pytest.mark.parametrize("tokens", [1, 8, 13, 32])
@pytest.mark.parametrize(("width", "size", "slots"), [(24, 8, 2048), (100, 64, 8192), (40, 16, 1024), (256, 128, 8192)])
def test_tiles_are_the_head_in_floating_point(width, size, slots, tokens):
    found, texts = calibrated_at(width, size)
    layout = polynomial.layout_for(found, slots)
    x = np.concatenate(texts)[:tokens]
    results, _ = on_slots(layout, found.params, x)
    got = [], []
    for number, values in enumerate(results):
        part = layout.unpack(values)[0, :, : tokens - number * layout.tokens]
        got[0].append(part[:size].real.T)
        got[1].append(part[0].imag[:, None])
    for a, b in zip(got, dense(found.params, x), strict=True):
        assert np.allclose(np.concatenate(a), b, rtol=1e-9, atol=1e-9)


def test_steps_after_a_prefill_are_the_whole_text(calibrated):
    _, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    assert layout.tokens == 4 and layout.capacity == 32
    x = np.concatenate(texts)[:40]  # tiles end, and so do caches
    numerators, denominators = dense(found.params, x)
    _, caches = on_slots(layout, found.params, x[:6])
    for count in range(6, len(x)):
        simulator = CleartextSimulator(layout.slots)
        inputs = [simulator.load(layout.pack_one(x[count])), *(simulator.load(cache, 2) for cache in caches)]
        result, *updated = polynomial.decode_step(layout, count, simulator, found.params, *inputs)
        values = layout.unpack(result.values)
        assert np.allclose(values[0, :SIZE, -1].real, numerators[count])
        assert np.allclose(values[0, 0, -1].imag, denominators[count])
        assert not values[:, :, :-1].any() and not values[:, layout.outputs :].any()  # and nothing else
        assert [cache.depth for cache in updated] == [2] * (count // 32 + 1)
        caches = [cache.values for cache in updated]


@given(st.integers(0, 10**6), st.floats(0, 10))
@settings(max_examples=20, deadline=None)
def test_the_client_finds_nothing_but_the_heads_output(calibrated, seed, scale):
    _, found, _ = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    (result,), _ = on_slots(layout, found.params, np.random.default_rng(seed).normal(size=(4, WIDTH)) * scale)
    values = layout.unpack(result)
    assert np.allclose(values, values[0])  # every block the same
    assert not values[:, layout.outputs :].any()
    assert np.allclose(values[0, : layout.outputs].imag, values[0, 0].imag)


def decrypted(found: QuantizedModule, layout: Layout, x: np.ndarray) -> list[np.ndarray]:
    return on_slots(layout, found.params, x)[0]


def test_a_client_reads_what_the_slots_hold(calibrated):
    weights, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    x = np.concatenate(texts)[:7]
    results = polynomial.unpack(layout, SIZE, found.dequantization, decrypted(found, layout, x), 7)
    assert error(outputs(found, results), float_head(weights, x)) < 0.05


@pytest.mark.parametrize("spoil", ["overflow", "large", "small", "one slot"])
def test_a_client_refuses_what_no_calibrated_input_can_give(calibrated, spoil):
    _, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    (values,) = decrypted(found, layout, texts[0][:4])
    values = values.copy()
    if spoil == "overflow":
        values += np.random.default_rng(0).normal(size=values.shape) * 100
    elif spoil == "one slot":
        values[17] += 0.1j
    else:
        values *= {"large": 1e4, "small": 1e-6}[spoil]
    with pytest.raises(polynomial.OutOfRange):
        polynomial.unpack(layout, SIZE, found.dequantization, [values], 4)


def test_an_input_far_out_of_range_is_noticed(calibrated):
    _, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    with pytest.raises(polynomial.OutOfRange):
        polynomial.unpack(layout, SIZE, found.dequantization, decrypted(found, layout, texts[0][:4] * 10), 4)


def test_low_rank_reads_more_tokens_with_fewer_products():
    weights, texts = head_and_texts(100, 64)
    calls = {}
    for rank in (0, 15):
        found = calibrate(weights, texts, score_rank=rank, value_rank=rank and 16)
        layout = polynomial.layout_for(found, 8192)
        simulator = CleartextSimulator(layout.slots)
        x = [simulator.load(tile) for tile in polynomial.pack(layout, texts[0][:4])]
        polynomial.prefill(layout, simulator, found.params, *x)
        calls[layout.outputs] = layout.tokens, simulator.counts.by_stage()["projection"]["clear product"]
    assert calls == {64: (8, 12 + 1), 16: (16, 6 + 1)}  # one to lower the queries


STRATEGY = PackedSequence(512)


@pytest.fixture(scope="module")
def compiled(calibrated) -> tuple[QuantizedModule, dict[str, Function], np.ndarray]:
    """For texts of 37 tokens in tiles of 4, where a cache holds 32; and a text."""
    _, found, texts = calibrated
    x = np.concatenate(texts)[:37]
    return found, check_functions(STRATEGY.functions(found, [x], 37)), x


def test_a_circuit_reads_a_text_together_and_then_token_by_token(compiled):
    found, functions, x = compiled
    assert set(functions) == {f"prefill_{n}" for n in range(1, 11)} | {f"decode_{n}" for n in range(1, 37)}
    executor, cache = Rehearsal(functions, found.params), None
    wanted = dense(found.params, x)
    for start, end in ((0, 30), (30, 31), (31, 36), (36, 37)):  # five steps are made before any is decrypted
        executor.calls.clear()
        results, cache = STRATEGY.read(found.client, executor, x[start:end], cache, 37)
        for got, exact in zip(results, wanted, strict=True):
            assert np.allclose(got, exact[start:end], rtol=1e-9, atol=1e-9 * np.abs(exact).max())
        assert np.array_equal(cache.inputs, x[:end])
        if end == 30:
            assert executor.calls == ["prefill_8", "decrypt prefill_8"]
        if end == 36:
            steps = [f"decode_{count}" for count in range(31, 36)]
            assert executor.calls == [*steps, *(f"decrypt {name}" for name in steps)]
    assert STRATEGY.calls(found.client, 30, 37) == {f"decode_{count}": 1 for count in range(30, 37)}
    assert STRATEGY.calls(found.client, 0, 30) == {"prefill_8": 1}
    executor.calls.clear()
    STRATEGY.read(found.client, executor, x[1:4], None, 37)  # another text
    assert executor.calls == ["prefill_1", "decrypt prefill_1"]


def test_what_is_out_of_range_is_refused_and_the_last_cache_stays_good(compiled):
    found, functions, x = compiled
    executor = Rehearsal(functions, found.params)
    wanted = dense(found.params, x)
    _, cache = STRATEGY.read(found.client, executor, x[:9], None, 37)
    with pytest.raises(polynomial.OutOfRange):
        STRATEGY.read(found.client, executor, x[9:10] * 20, cache, 37)
    executor.calls.clear()
    results, after = STRATEGY.read(found.client, executor, x[9:10], cache, 37)
    assert all(np.allclose(part, exact[9:10]) for part, exact in zip(results, wanted, strict=True))
    assert executor.calls == ["decode_9", "decrypt decode_9"]
    with pytest.raises(NotReady, match="compiled for 37 tokens, got 38"):
        STRATEGY.read(found.client, executor, x[9:], after, 37)


def test_every_cache_of_a_step_comes_from_what_is_there(calibrated):
    _, found, texts = calibrated
    functions = check_functions(STRATEGY.functions(found, [np.concatenate(texts)[:40]], 40))
    results = {}
    for name, function in functions.items():
        simulator = CleartextSimulator(512)
        inputs = [
            simulator.load(v, 2 if group else 0)
            for v, group in zip(function.inputset[0], function.sources, strict=True)
        ]
        results[name] = function.run(simulator, found.params, *inputs)
    for name, function in functions.items():
        for group, values in zip(function.sources, function.inputset[0], strict=True):
            for source in group:
                given = results[source.function][source.position]
                assert given.depth == 2, (name, source)
                if source.function.startswith("decode"):  # of the same text: the very cache
                    assert np.allclose(given.values, values)


def test_texts_that_are_too_short_are_joined():
    texts = [np.full((n, 2), float(n)) for n in (3, 2, 4, 4)]
    assert [len(x) for x in polynomial.of_length(texts, 4)] == [4, 4]
    assert [x[:, 0].tolist() for x in polynomial.of_length(texts, 6)] == [[3, 3, 3, 2, 2, 4], [4, 4, 4, 4, 4, 4]]
    with pytest.raises(CalibrationError, match="have 13 tokens together, and the circuit shall read 14"):
        polynomial.of_length(texts, 14)
