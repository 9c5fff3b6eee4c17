"""Slot operations and linear algebra on slots, compared with NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fhe.ckks.linalg import (
    Layout,
    evaluate_polynomial,
    power_of_two,
    project,
    split_real_imaginary,
    steps_of,
    sum_blocks,
)
from fhe.ckks.slots import CleartextSimulator
from fhe.errors import CompilationError
from layouts import SHAPES, numbers, simulator_and_layout


@given(st.integers(1, 2000), st.integers(1, 128), st.integers(1, 64))
def test_a_fitted_layout_holds_what_it_is_asked_for(width, outputs, tokens):
    layout = Layout.fit(16384, width, outputs, tokens)
    assert 2 * layout.features >= width and layout.outputs >= outputs
    assert layout.diagonals * layout.runs == layout.features
    assert layout.tokens <= power_of_two(tokens)
    assert layout.blocks >= layout.tokens
    assert layout.features * layout.tokens <= layout.slots
    assert layout.capacity * 2 * layout.outputs == layout.slots


def test_a_layout_that_does_not_fit_says_so():
    with pytest.raises(CompilationError, match="too few for tiles of 1 tokens"):
        Layout.fit(512, 1100, 64)
    with pytest.raises(CompilationError, match="powers of two"):
        Layout(1024, 3, 32, 8)


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_packing_follows_the_layout(seed, tokens):
    layout = Layout.fit(1024, 20, 4, 8)
    x = numbers(seed, tokens, 20)
    packed = layout.pack(x)
    padded = np.zeros((layout.tokens, 2 * layout.features))
    padded[:tokens, :20] = x
    for position in (0, 5, 19, 101, layout.positions - 1):
        run, inside = divmod(position, layout.outputs)
        feature = run * layout.diagonals + inside % layout.diagonals
        for token in range(layout.tokens):
            expected = padded[token, feature] + 1j * padded[token, layout.features + feature]
            assert packed[position * layout.tokens + token] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonals_meet_every_feature_once(shape):
    layout = Layout.fit(*shape)
    for start in range(layout.outputs):
        runs = np.arange(layout.runs)[:, None] * layout.outputs
        met = layout.feature[(runs + start + np.arange(layout.diagonals)) % layout.positions]
        assert sorted(met.reshape(-1)) == list(range(layout.features))


@pytest.mark.parametrize("shape", SHAPES)
def test_projections_of_real_and_of_complex_numbers(shape):
    simulator, layout = simulator_and_layout(*shape)
    width, size = shape[1], shape[2]
    x = numbers(0, layout.tokens, width)
    matrices = [numbers(1, width, size), numbers(2, width, size) + 1j * numbers(3, width, size)]
    packed = simulator.load(layout.pack(x))
    for matrix, y in zip(matrices, project(simulator, layout, packed, matrices), strict=True):
        found = y.values.reshape(layout.runs, layout.outputs, layout.tokens)
        assert np.allclose(found[:, :size], (x @ matrix).T)  # in every run
    assert simulator.counts.depth == 1


def test_the_cost_of_a_projection():
    simulator, layout = simulator_and_layout(8192, 768, 64, 8)
    matrices = [numbers(1, 768, 64), numbers(1, 768, 64) + 1j]
    project(simulator, layout, simulator.load(layout.pack(numbers(0, 8, 768))), matrices)
    baby, giant = steps_of(layout)
    assert (baby, giant) == (8, 4)
    assert simulator.counts.total("rotation") == baby - 1 + 3 * (giant - 1) + 2 * 4 + 2  # of which two conjugations
    assert simulator.counts.total("clear product") == 3 * 32
    assert simulator.counts.rotations == {8, 8 * baby, 512, 1024, 2048, 4096}


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_projection_of_any_matrix(seed, width, outputs, tokens):
    simulator, layout = simulator_and_layout(1024, width, outputs, tokens)
    random = np.random.default_rng(seed)
    shape = width, layout.outputs
    matrix = random.normal(size=shape) * (random.random(shape) < 0.5)
    matrix[0, 0] = 1.0  # at least one weight
    x = random.normal(size=(layout.tokens, width))
    (y,) = project(simulator, layout, simulator.load(layout.pack(x)), [matrix])
    assert np.allclose(layout.unpack(y.values), np.tile((x @ matrix).T, (2, 1)))


def test_weights_that_are_all_zero_are_refused():
    simulator, layout = simulator_and_layout(1024, 20, 4, 4)
    with pytest.raises(CompilationError, match="all zero"):
        project(simulator, layout, simulator.load(np.zeros(1024)), [np.zeros((20, 4))])


@given(st.floats(-2, 2), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_a_polynomial_costs_a_level_for_each_constant(start, constants):
    simulator = CleartextSimulator(16)
    x = np.linspace(-1, 1, 16)
    found = evaluate_polynomial(simulator, simulator.load(x), start, constants)
    wanted = x + start
    for constant in constants:
        wanted = wanted**2 + constant
    assert np.allclose(found.values, wanted)
    assert simulator.counts.depth == len(constants)


def test_the_simulator_counts_by_stage_and_depth():
    simulator = CleartextSimulator(8)
    x = simulator.load(np.arange(8))
    with simulator.tag("first"):
        y = simulator.sum_of_plaintext_products([x, simulator.rotate(x, -1)], [2.0, np.arange(2)])
    with simulator.tag("second"):
        z = simulator.sum_of_products([y, y], [x, y])  # x is dropped to y's depth
    assert simulator.counts.by_stage() == {
        "first": {"rotation": 1, "clear product": 2, "rescaling": 1},
        "second": {"product": 2, "clear product": 1, "rescaling": 2},  # of which a level drop takes one each
    }
    assert simulator.counts.depth == 2 and z.depth == 2
    assert np.allclose(y.values, 2 * np.arange(8) + np.roll(np.arange(8), 1) * (np.arange(8) >= 4))
    assert simulator.rotate(x, 8) is x and simulator.counts.total("rotation") == 1
    assert simulator.largest[0] == 7


def test_clear_vectors_must_divide_the_slots():
    simulator = CleartextSimulator(8)
    with pytest.raises(CompilationError, match="does not divide"):
        simulator.add_plain(simulator.load(np.zeros(8)), np.ones(3))
    with pytest.raises(CompilationError, match="zeros only"):
        simulator.sum_of_plaintext_products([simulator.load(np.zeros(8))], [np.zeros(8)])
    with pytest.raises(ValueError, match="shape"):
        simulator.load(np.zeros(4))


def test_real_and_imaginary_parts_apart():
    simulator, z = CleartextSimulator(16), numbers(1, 16) + 1j * numbers(2, 16)
    u, v = split_real_imaginary(simulator, simulator.load(z))
    assert np.allclose(u.values, 2 * z.real) and np.allclose(v.values, 2j * z.imag)
    assert simulator.counts.depth == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_of_blocks_is_in_every_block(shape):
    simulator, layout = simulator_and_layout(*shape)
    x = numbers(1, layout.slots)
    found = layout.unpack(sum_blocks(simulator, layout, simulator.load(x)).values)
    assert np.allclose(found, layout.unpack(x).sum(axis=0))
