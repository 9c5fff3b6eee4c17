"""The polynomial formula: its fit, and the same head in floating point and on slots."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgpt2.attention as attention
from fhe.backend import check_functions
from fhe.packing import Layout, SlotMachine
from jaxgpt2.attention import polynomial
from jaxgpt2.attention.formula import Calibrated, HeadWeights, float_head, quantize_input
from jaxgpt2.attention.polynomial import PolynomialParams
from jaxgpt2.ops import JaxOps
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
def calibrated() -> tuple[HeadWeights, Calibrated, list[np.ndarray]]:
    weights, texts = head_and_texts()
    return weights, calibrate(weights, texts[:20]), texts[20:]


def calibrate(weights: HeadWeights, texts: list[np.ndarray], **options: int) -> Calibrated:
    formula = attention.get("polynomial")
    return formula.head.calibrate(weights, texts, Bits.of(4), 64, **{**formula.options, **options})


def error(given: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted))


def outputs(found: Calibrated, results: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return results[0] / results[1] @ found.decoding.basis + found.decoding.mean


def test_the_head_is_close_to_the_softmax_it_stands_for(calibrated):
    weights, found, texts = calibrated
    for x in texts:
        assert error(outputs(found, polynomial.attend(found.params, x)), float_head(weights, x)) < 0.05


def test_rounded_in_jax_it_is_the_same_head(calibrated):
    weights, found, texts = calibrated
    program = attention.get("polynomial").head
    for x in texts[:3]:
        levels = quantize_input(found, jnp.asarray(x, jnp.float32))
        output = program.decode(found.decoding, program.run(JaxOps(), found.params, levels))
        assert error(np.asarray(output), float_head(weights, x)) < 0.05


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
    for a, b in zip(polynomial.attend(found.params, x), polynomial.attend(found.params, changed), strict=True):
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
    """Results and caches of `prompt`."""
    machine = SlotMachine(layout.slots)
    tiles = [machine.load(tile) for tile in polynomial.pack(layout, x)]
    results = polynomial.prompt(layout, machine, params, *tiles)
    return [r.values for r in results[: len(tiles)]], [r.values for r in results[len(tiles) :]]


@functools.cache
def calibrated_at(width: int, size: int) -> tuple[Calibrated, list[np.ndarray]]:
    weights, texts = head_and_texts(width, size, texts=12)
    return calibrate(weights, texts), texts


@pytest.mark.parametrize("tokens", [1, 8, 13, 32])
@pytest.mark.parametrize(("width", "size", "slots"), [(24, 8, 2048), (100, 64, 8192), (40, 16, 1024), (256, 128, 8192)])
def test_tiles_are_the_head_in_floating_point(width, size, slots, tokens):
    found, texts = calibrated_at(width, size)
    layout = polynomial.layout_for(found.params, slots)
    x = np.concatenate(texts)[:tokens]
    results, _ = on_slots(layout, found.params, x)
    got = [], []
    for number, values in enumerate(results):
        part = layout.unpack(values)[0, :, : tokens - number * layout.tokens]
        got[0].append(part[:size].real.T)
        got[1].append(part[0].imag[:, None])
    for a, b in zip(got, polynomial.attend(found.params, x), strict=True):
        assert np.allclose(np.concatenate(a), b, rtol=1e-9, atol=1e-9)


def test_steps_after_a_prompt_are_the_whole_text(calibrated):
    _, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    assert layout.tokens == 4 and layout.capacity == 32
    x = np.concatenate(texts)[:40]  # tiles end, and so do caches
    numerators, denominators = polynomial.attend(found.params, x)
    _, caches = on_slots(layout, found.params, x[:6])
    for count in range(6, len(x)):
        machine = SlotMachine(layout.slots)
        inputs = [machine.load(layout.pack_one(x[count])), *(machine.load(cache, 2) for cache in caches)]
        result, *updated = polynomial.step(layout, count, machine, found.params, *inputs)
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


def decrypted(found: Calibrated, layout: Layout, x: np.ndarray) -> list[np.ndarray]:
    return on_slots(layout, found.params, x)[0]


def test_a_client_reads_what_the_slots_hold(calibrated):
    weights, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    x = np.concatenate(texts)[:7]
    results = polynomial.unpack(layout, SIZE, found.decoding, decrypted(found, layout, x), 7)
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
        polynomial.unpack(layout, SIZE, found.decoding, [values], 4)


def test_an_input_far_out_of_range_is_noticed(calibrated):
    _, found, texts = calibrated
    layout = Layout.fit(512, WIDTH, SIZE)
    with pytest.raises(polynomial.OutOfRange):
        polynomial.unpack(layout, SIZE, found.decoding, decrypted(found, layout, texts[0][:4] * 10), 4)


def test_low_rank_takes_fewer_slots_and_products():
    weights, texts = head_and_texts(100, 64)
    calls = {}
    for rank in (0, 15):
        found = calibrate(weights, texts, score_rank=rank, value_rank=rank and 16)
        layout = polynomial.layout_for(found.params, 8192)
        machine = SlotMachine(layout.slots)
        x = [machine.load(tile) for tile in polynomial.pack(layout, texts[0][:4])]
        polynomial.head(layout, machine, found.params, *x)
        calls[layout.outputs] = machine.tally.total("clear product")
    assert set(calls) == {16, 64} and calls[16] < calls[64] / 2


def test_a_circuit_of_prompts_and_steps(calibrated):
    weights, found, texts = calibrated
    x = np.concatenate(texts)[:37]
    whole = polynomial.SlotHead(found, 37, 512, cached=True)
    assert whole.layout.tokens == 4 and whole.layout.capacity == 32
    functions = check_functions(whole.functions([x]))
    assert set(functions) == {f"prompt_{n}" for n in range(1, 11)} | {f"step_{n}" for n in range(1, 37)}

    def run(name: str, *inputs: np.ndarray) -> list[np.ndarray]:
        machine = SlotMachine(512)
        sources = functions[name].sources
        assert len(sources) == len(inputs)
        loaded = [machine.load(v, 2 if group else 0) for v, group in zip(inputs, sources, strict=True)]
        return [result.values for result in functions[name].run(machine, found.params, *loaded)]

    results = run(whole.name(30), *whole.encode(x[:30]))
    assert error(whole.decode(results[:8], 30), float_head(weights, x[:30])) < 0.05
    caches = results[8:]
    for count in range(30, 37):
        result, *caches = run(f"step_{count}", *whole.encode_step(x[count]), *caches)
        assert error(whole.decode_step(result), float_head(weights, x[: count + 1])[-1:]) < 0.1


def test_every_cache_of_a_step_comes_from_what_is_there(calibrated):
    _, found, texts = calibrated
    whole = polynomial.SlotHead(found, 40, 512, cached=True)
    functions = check_functions(whole.functions([np.concatenate(texts)[:40]]))
    results = {}
    for name, function in functions.items():
        machine = SlotMachine(512)
        inputs = [
            machine.load(v, 2 if group else 0) for v, group in zip(function.inputset[0], function.sources, strict=True)
        ]
        results[name] = function.run(machine, found.params, *inputs)
    for name, function in functions.items():
        for group, values in zip(function.sources, function.inputset[0], strict=True):
            for source in group:
                given = results[source.function][source.position]
                assert given.depth == 2, (name, source)
                if source.function.startswith("step"):  # of the same text: the very cache
                    assert np.allclose(given.values, values)


def test_a_head_of_one_length_pads_shorter_texts(calibrated):
    weights, found, texts = calibrated
    whole = polynomial.SlotHead(found, 8, 512)
    functions = whole.functions([x for x in texts if len(x) >= 8])
    machine = SlotMachine(512)
    x = texts[0][:4]
    results = functions["head"].run(machine, found.params, *map(machine.load, whole.encode(x)))
    assert error(whole.decode([r.values for r in results], 4), float_head(weights, x)) < 0.05
    with pytest.raises(CalibrationError, match="no calibration text has 8 tokens"):
        whole.functions([x])
