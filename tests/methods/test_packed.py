"""Attention on slots, compared with NumPy."""

import numpy as np
import pytest

from fhe.ckks.linalg import split_real_imaginary
from fhe.errors import CompilationError
from jaxgpt2.methods.packed import broadcast_tokens, mask_pairs, scores, weighted_sum, weighted_sum_by_lane
from layouts import SHAPES, numbers, simulator_and_layout


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_is_paired_with_those_before_it(shape):
    simulator, layout = simulator_and_layout(*shape)
    z = numbers(1, layout.outputs, layout.tokens)
    everywhere = np.broadcast_to(np.concatenate([z, z]), (layout.blocks, 2 * layout.outputs, layout.tokens))
    causal, wrapped = broadcast_tokens(simulator, layout, simulator.load(everywhere.reshape(-1)), wrapped=True)
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
    simulator, layout = simulator_and_layout(*shape)
    size = layout.blocks, layout.outputs, layout.tokens
    q, k = numbers(1, *size), numbers(2, *size)
    packed = [simulator.load(np.concatenate([x, x], axis=1).reshape(-1)) for x in (q, k)]
    found = layout.unpack(scores(simulator, layout, *packed).values)[:, : layout.outputs]
    assert np.allclose(found, (q * k).sum(axis=1, keepdims=True))


def test_a_weighted_sum_gives_numerators_and_denominators():
    simulator, layout = simulator_and_layout(1024, 20, 4, 4)
    size = layout.blocks, layout.outputs, layout.tokens
    k, v, e = numbers(1, *size), numbers(2, *size), numbers(3, layout.blocks, 1, layout.tokens)
    pairs = layout.mask(layout.axes[0] < 3)
    both = np.concatenate([k + 1j * v] * 2, axis=1).reshape(-1) * pairs
    keys, rest = split_real_imaginary(simulator, simulator.load(both))
    assert np.allclose(keys.values, 2 * both.real)
    values = mask_pairs(simulator, layout, rest, pairs)
    # As `scores` leaves them: the second copy means nothing.
    weights = np.concatenate([np.tile(e, (1, layout.outputs, 1)), 1e3 * numbers(4, *size)], axis=1)
    result = layout.unpack(weighted_sum(simulator, layout, [simulator.load(weights.reshape(-1))], [values]).values)
    assert np.allclose(result[:, : layout.outputs].real, (e * v)[:3].sum(axis=0))
    assert np.allclose(result[:, : layout.outputs].imag, e[:3].sum(axis=0))
    assert not result[:, layout.outputs :].any()


def test_a_weighted_sum_by_lane_leaves_one_lane_and_no_partial_sum():
    simulator, layout = simulator_and_layout(1024, 20, 4, 8)
    size = layout.blocks, 1, layout.tokens
    e, v = numbers(1, *size), numbers(2, *size)
    _, output, lane = layout.axes
    weights = simulator.load(layout.fill(e))

    def pairs(at: int) -> list:
        return [(weights, simulator.load(layout.fill(v * (lane == at) * (output < layout.outputs))))]

    lanes = [pairs(at) if at < 5 else [] for at in range(layout.tokens)]  # three lanes without a token
    found = layout.unpack(weighted_sum_by_lane(simulator, layout, lanes).values)
    assert np.allclose(found[:, : layout.outputs, -1], (e * v)[:, :, :5].sum())
    assert not found[:, :, :-1].any() and not found[:, layout.outputs :].any()
    assert simulator.counts.depth == 1
    with pytest.raises(CompilationError, match="nothing to"):
        weighted_sum_by_lane(simulator, layout, [[]])
