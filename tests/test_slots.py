"""Linear algebra on slots, against the NumPy that it fhe_config for, at many shapes."""

import numpy as np
import pytest
from fhe.ckks.slots import (
    CleartextSimulator,
    Layout,
    split_real_imaginary,
    power_of_two,
    mask_pairs,
    project,
    evaluate_polynomial,
    scores,
    broadcast_tokens,
    steps_of,
    weighted_sum,
    weighted_sum_by_lane,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fhe.errors import CompilationError

SHAPES = [  # slots, width, outputs, tokens
    (8192, 768, 64, 8),
    (8192, 256, 64, 8),
    (16384, 768, 128, 8),
    (16384, 1600, 64, 8),
    (4096, 100, 16, 32),
    (1024, 20, 3, 4),
    (512, 30, 7, 1),
    (256, 3, 1, 2),
]


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def machine_and_layout(slots: int, width: int, outputs: int, tokens: int) -> tuple[CleartextSimulator, Layout]:
    return CleartextSimulator(slots), Layout.fit(slots, width, outputs, tokens)


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
def test_packing_puts_every_feature_where_the_drawing_says(seed, tokens):
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
def test_maps_of_real_and_of_complex_numbers(shape):
    machine, layout = machine_and_layout(*shape)
    width, size = shape[1], shape[2]
    x = numbers(0, layout.tokens, width)
    maps = [numbers(1, width, size), numbers(2, width, size) + 1j * numbers(3, width, size)]
    for part, y in zip(maps, project(machine, layout, machine.load(layout.pack(x)), maps), strict=True):
        found = y.values.reshape(layout.runs, layout.outputs, layout.tokens)
        assert np.allclose(found[:, :size], (x @ part).T)  # in every run
    assert machine.counts.depth == 1


def test_projection_costs_what_it_says():
    machine, layout = machine_and_layout(8192, 768, 64, 8)
    maps = [numbers(1, 768, 64), numbers(1, 768, 64) + 1j]
    project(machine, layout, machine.load(layout.pack(numbers(0, 8, 768))), maps)
    baby, giant = steps_of(layout)
    assert (baby, giant) == (8, 4)
    assert machine.counts.total("rotation") == baby - 1 + 3 * (giant - 1) + 2 * 4 + 2  # of which two conjugations
    assert machine.counts.total("clear product") == 3 * 32
    assert machine.counts.rotations == {8, 8 * baby, 512, 1024, 2048, 4096}


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_projection_of_any_matrix(seed, width, outputs, tokens):
    machine, layout = machine_and_layout(1024, width, outputs, tokens)
    random = np.random.default_rng(seed)
    shape = width, layout.outputs
    matrix = random.normal(size=shape) * (random.random(shape) < 0.5)
    matrix[0, 0] = 1.0  # at least one weight
    x = random.normal(size=(layout.tokens, width))
    (y,) = project(machine, layout, machine.load(layout.pack(x)), [matrix])
    assert np.allclose(layout.unpack(y.values), np.tile((x @ matrix).T, (2, 1)))


def test_weights_that_are_all_zero_are_refused():
    machine, layout = machine_and_layout(1024, 20, 4, 4)
    with pytest.raises(CompilationError, match="all zero"):
        project(machine, layout, machine.load(np.zeros(1024)), [np.zeros((20, 4))])


@pytest.mark.parametrize("shape", SHAPES)
def test_spread_puts_every_token_beside_those_before_it(shape):
    machine, layout = machine_and_layout(*shape)
    z = numbers(1, layout.outputs, layout.tokens)
    everywhere = np.broadcast_to(np.concatenate([z, z]), (layout.blocks, 2 * layout.outputs, layout.tokens))
    causal, wrapped = broadcast_tokens(machine, layout, machine.load(everywhere.reshape(-1)), wrapped=True)
    found = layout.unpack(causal.values)[:, : layout.outputs]
    around = layout.unpack(wrapped.values)[:, : layout.outputs] if wrapped else np.zeros_like(found)
    for block in range(layout.blocks):
        for lane in range(layout.tokens):
            zero = np.zeros(layout.outputs)
            inside = block < layout.tokens
            assert np.allclose(found[block, :, lane], z[:, lane - block] if block <= lane else zero)
            wanted = z[:, (lane - block) % layout.tokens] if block > lane and inside else zero
            assert np.allclose(around[block, :, lane], wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_dot_products_in_the_first_copy(shape):
    machine, layout = machine_and_layout(*shape)
    size = layout.blocks, layout.outputs, layout.tokens
    q, k = numbers(1, *size), numbers(2, *size)
    packed = [machine.load(np.concatenate([x, x], axis=1).reshape(-1)) for x in (q, k)]
    found = layout.unpack(scores(machine, layout, *packed).values)[:, : layout.outputs]
    assert np.allclose(found, (q * k).sum(axis=1, keepdims=True))


@given(st.floats(-2, 2), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_quadratics_are_the_polynomial_and_cost_a_level_each(start, constants):
    machine = CleartextSimulator(16)
    x = np.linspace(-1, 1, 16)
    found = evaluate_polynomial(machine, machine.load(x), start, constants)
    wanted = x + start
    for constant in constants:
        wanted = wanted**2 + constant
    assert np.allclose(found.values, wanted)
    assert machine.counts.depth == len(constants)


def test_halves_and_weighing_give_numerators_and_denominators():
    machine, layout = machine_and_layout(1024, 20, 4, 4)
    size = layout.blocks, layout.outputs, layout.tokens
    k, v, e = numbers(1, *size), numbers(2, *size), numbers(3, layout.blocks, 1, layout.tokens)
    pairs = layout.mask(layout.axes[0] < 3)
    both = np.concatenate([k + 1j * v] * 2, axis=1).reshape(-1) * pairs
    keys, rest = split_real_imaginary(machine, machine.load(both))
    assert np.allclose(keys.values, 2 * both.real)
    values = mask_pairs(machine, layout, rest, pairs)
    junk = np.concatenate(
        [np.tile(e, (1, layout.outputs, 1)), 1e3 * numbers(4, *size)], axis=1
    )  # as `scores` leaves it
    result = layout.unpack(weighted_sum(machine, layout, [machine.load(junk.reshape(-1))], [values]).values)
    assert np.allclose(result[:, : layout.outputs].real, (e * v)[:3].sum(axis=0))
    assert np.allclose(result[:, : layout.outputs].imag, e[:3].sum(axis=0))
    assert not result[:, layout.outputs :].any()


def test_weighing_lanes_leaves_one_and_no_partial_sum():
    machine, layout = machine_and_layout(1024, 20, 4, 8)
    size = layout.blocks, 1, layout.tokens
    e, v = numbers(1, *size), numbers(2, *size)
    _, output, lane = layout.axes
    weights = machine.load(layout.fill(e))

    def pairs(at: int) -> list:
        return [(weights, machine.load(layout.fill(v * (lane == at) * (output < layout.outputs))))]

    lanes = [pairs(at) if at < 5 else [] for at in range(layout.tokens)]  # three lanes where no token is
    found = layout.unpack(weighted_sum_by_lane(machine, layout, lanes).values)
    assert np.allclose(found[:, : layout.outputs, -1], (e * v)[:, :, :5].sum())
    assert not found[:, :, :-1].any() and not found[:, layout.outputs :].any()
    assert machine.counts.depth == 1
    with pytest.raises(CompilationError, match="nothing to sum"):
        weighted_sum_by_lane(machine, layout, [[]])


def test_the_machine_counts_by_stage_and_depth():
    machine = CleartextSimulator(8)
    x = machine.load(np.arange(8))
    with machine.tag("first"):
        y = machine.sum_of_plaintext_products([x, machine.rotate(x, -1)], [2.0, np.arange(2)])
    with machine.tag("second"):
        z = machine.sum_of_products([y, y], [x, y])  # x is lowered to y's depth
    assert machine.counts.by_stage() == {
        "first": {"rotation": 1, "clear product": 2, "rescaling": 1},
        "second": {"product": 2, "clear product": 1, "rescaling": 2},  # lowering takes one of each
    }
    assert machine.counts.depth == 2 and z.depth == 2
    assert np.allclose(y.values, 2 * np.arange(8) + np.roll(np.arange(8), 1) * (np.arange(8) >= 4))
    assert machine.rotate(x, 8) is x and machine.counts.total("rotation") == 1
    assert machine.largest[0] == 7


def test_clear_vectors_must_divide_the_slots():
    machine = CleartextSimulator(8)
    with pytest.raises(CompilationError, match="does not divide"):
        machine.add_plain(machine.load(np.zeros(8)), np.ones(3))
    with pytest.raises(CompilationError, match="zeros only"):
        machine.sum_of_plaintext_products([machine.load(np.zeros(8))], [np.zeros(8)])
    with pytest.raises(ValueError, match="shape"):
        machine.load(np.zeros(4))
