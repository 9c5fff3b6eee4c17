"""Linear algebra on slots, against the NumPy that it stands for, at many shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fhe.errors import CompilationError
from fhe.packing import (
    Layout,
    SlotMachine,
    apart,
    gather,
    halves,
    power_of_two,
    project,
    quadratics,
    scores,
    spread,
    steps_of,
    weigh,
)

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


def machine_and_layout(slots: int, width: int, outputs: int, tokens: int) -> tuple[SlotMachine, Layout]:
    return SlotMachine(slots), Layout.fit(slots, width, outputs, tokens)


@given(st.integers(1, 2000), st.integers(1, 128), st.integers(1, 64))
def test_a_fitted_layout_holds_what_it_is_asked_for(width, outputs, tokens):
    layout = Layout.fit(16384, width, outputs, tokens)
    assert layout.features >= width and layout.outputs >= outputs
    assert layout.tokens <= power_of_two(tokens)
    assert layout.blocks >= layout.tokens
    assert layout.features * layout.tokens <= layout.slots
    assert layout.capacity * 2 * layout.outputs == layout.slots


def test_a_layout_that_does_not_fit_says_so():
    with pytest.raises(CompilationError, match="too few for tiles of 1 tokens"):
        Layout.fit(512, 768, 64)
    with pytest.raises(CompilationError, match="powers of two"):
        Layout(1024, 3, 32, 8)


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_packing_puts_every_feature_where_the_drawing_says(seed, tokens):
    layout = Layout.fit(1024, 20, 4, 8)
    x = numbers(seed, tokens, 20)
    packed = layout.pack(x)
    for position in (0, 5, 19, layout.features + 3):
        for token in range(layout.tokens):
            feature = position % layout.features
            expected = x[token, feature] if token < tokens and feature < 20 else 0.0
            assert packed[position * layout.tokens + token] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_two_maps_side_by_side_and_then_apart(shape):
    machine, layout = machine_and_layout(*shape)
    width, size = shape[1], layout.outputs
    x = numbers(0, layout.tokens, width)
    maps = [numbers(i, width, size) + 1j * numbers(9 + i, width, size) for i in (1, 2)]
    y = project(machine, layout, machine.load(layout.pack(x)), np.concatenate(maps, axis=1))
    assert np.allclose(layout.unpack(y.values), np.concatenate([(x @ part).T for part in maps]))
    assert machine.tally.depth == 1
    mask = layout.mask(layout.axes[0] == 0)
    first, second, masked = apart(machine, layout, y, [(0, 1.0), (1, 1.0), (1, mask)])
    for part, result in zip(maps, (first, second), strict=True):
        assert np.allclose(layout.unpack(result.values), np.tile((x @ part).T, (2, 1)))
    assert np.allclose(masked.values, second.values * mask)
    assert machine.tally.depth == 2


def test_projection_costs_what_it_says():
    machine, layout = machine_and_layout(8192, 768, 64, 8)
    y = project(machine, layout, machine.load(layout.pack(numbers(0, 8, 768))), numbers(1, 768, 128))
    baby, giant = steps_of(layout)
    assert machine.tally.total("rotation") == baby - 1 + giant - 1 + 3
    assert machine.tally.total("clear product") == 128
    assert machine.tally.rotations == {8, 8 * baby, 1024, 2048, 4096}
    apart(machine, layout, y, [(0, 1.0), (1, 1.0)])
    assert machine.tally.total("rotation") == baby + giant + 2


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_projection_of_any_matrix(seed, width, outputs, tokens):
    machine, layout = machine_and_layout(1024, width, outputs, tokens)
    random = np.random.default_rng(seed)
    shape = width, 2 * layout.outputs
    matrix = random.normal(size=shape) * (random.random(shape) < 0.5)
    matrix[0, 0] = 1.0  # at least one weight
    x = random.normal(size=(layout.tokens, width))
    y = project(machine, layout, machine.load(layout.pack(x)), matrix)
    assert np.allclose(layout.unpack(y.values), (x @ matrix).T)


def test_weights_that_are_all_zero_are_refused():
    machine, layout = machine_and_layout(1024, 20, 4, 4)
    with pytest.raises(CompilationError, match="all zero"):
        project(machine, layout, machine.load(np.zeros(1024)), np.zeros((20, 8)))


@pytest.mark.parametrize("shape", SHAPES)
def test_spread_puts_every_token_beside_those_before_it(shape):
    machine, layout = machine_and_layout(*shape)
    z = numbers(1, layout.outputs, layout.tokens)
    everywhere = np.broadcast_to(np.concatenate([z, z]), (layout.blocks, 2 * layout.outputs, layout.tokens))
    causal, wrapped = spread(machine, layout, machine.load(everywhere.reshape(-1)), wrapped=True)
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
    machine = SlotMachine(16)
    x = np.linspace(-1, 1, 16)
    found = quadratics(machine, machine.load(x), start, constants)
    wanted = x + start
    for constant in constants:
        wanted = wanted**2 + constant
    assert np.allclose(found.values, wanted)
    assert machine.tally.depth == len(constants)


def test_halves_and_weighing_give_numerators_and_denominators():
    machine, layout = machine_and_layout(1024, 20, 4, 4)
    size = layout.blocks, layout.outputs, layout.tokens
    k, v, e = numbers(1, *size), numbers(2, *size), numbers(3, layout.blocks, 1, layout.tokens)
    present = layout.mask(layout.axes[0] < 3)
    both = np.concatenate([k + 1j * v] * 2, axis=1).reshape(-1) * present
    keys, values = halves(machine, layout, machine.load(both), present)
    assert np.allclose(keys.values, 2 * both.real)
    junk = np.concatenate(
        [np.tile(e, (1, layout.outputs, 1)), 1e3 * numbers(4, *size)], axis=1
    )  # as `scores` leaves it
    result = layout.unpack(weigh(machine, layout, [machine.load(junk.reshape(-1))], [values]).values)
    assert np.allclose(result[:, : layout.outputs].real, (e * v)[:3].sum(axis=0))
    assert np.allclose(result[:, : layout.outputs].imag, e[:3].sum(axis=0))
    assert not result[:, layout.outputs :].any()


def test_gathering_leaves_one_lane():
    machine, layout = machine_and_layout(1024, 20, 4, 8)
    x = numbers(1, layout.blocks, 2 * layout.outputs, layout.tokens)
    found = layout.unpack(gather(machine, layout, machine.load(x.reshape(-1))).values)
    assert np.allclose(found[:, : layout.outputs, -1], x.sum(axis=2)[:, : layout.outputs])
    assert not found[:, :, :-1].any() and not found[:, layout.outputs :].any()


def test_the_machine_counts_by_stage_and_depth():
    machine = SlotMachine(8)
    x = machine.load(np.arange(8))
    with machine.tag("first"):
        y = machine.combine([x, machine.rotate(x, -1)], [2.0, np.arange(2)])
    with machine.tag("second"):
        z = machine.dot([y, y], [x, y])  # x is lowered to y's depth
    assert machine.tally.by_stage() == {
        "first": {"rotation": 1, "clear product": 2, "rescaling": 1},
        "second": {"product": 2, "clear product": 1, "rescaling": 2},  # lowering takes one of each
    }
    assert machine.tally.depth == 2 and z.depth == 2
    assert np.allclose(y.values, 2 * np.arange(8) + np.roll(np.arange(8), 1) * (np.arange(8) >= 4))
    assert machine.rotate(x, 8) is x and machine.tally.total("rotation") == 1
    assert machine.largest[0] == 7


def test_clear_vectors_must_divide_the_slots():
    machine = SlotMachine(8)
    with pytest.raises(CompilationError, match="does not divide"):
        machine.offset(machine.load(np.zeros(8)), np.ones(3))
    with pytest.raises(CompilationError, match="zeros only"):
        machine.combine([machine.load(np.zeros(8))], [np.zeros(8)])
    with pytest.raises(ValueError, match="shape"):
        machine.load(np.zeros(4))
