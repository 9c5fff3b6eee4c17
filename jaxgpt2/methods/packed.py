"""Attention on slot vectors."""

from collections.abc import Sequence

import numpy as np

from fhe.ckks.linalg import Layout, V, sum_blocks
from fhe.ckks.slots import SlotOps
from fhe.errors import CompilationError


def broadcast_tokens(ops: SlotOps[V], layout: Layout, z: V, wrapped: bool = False) -> tuple[V, V | None]:
    """Every token beside the tokens before it; one level.

        lane        0    1    2    3              0    1    2    3
        block 0    z_0  z_1  z_2  z_3
        block 1     .   z_0  z_1  z_2            z_3   .    .    .
        block 2     .    .   z_0  z_1            z_2  z_3   .    .
        block 3     .    .    .   z_0            z_1  z_2  z_3   .
                        causal                        wrapped

    Block d of lane t holds token t - d of the tile, rotated there by d slots and masked; the dots are zero. d goes by
    baby and giant steps too. A lane that wraps has come out in the position before its own.

    Returns:
        The causal half, which pairs a tile with itself; and, if wanted, the wrapped half: the sum of both pairs every
        lane with all tokens of this tile, for lanes of a later one.
    """
    block, _, lane = layout.axes
    baby = 1 << layout.tokens.bit_length() // 2
    moved = [z]
    for _ in range(1, min(baby, layout.tokens)):
        moved.append(ops.rotate(moved[-1], -1))

    def masked(chosen: np.ndarray, back: int) -> V:
        """The sum over d of z, rotated by -d and masked where chosen, all rotated by `back`."""
        total = None
        for step in reversed(range(0, layout.tokens, baby)):
            masks = [np.roll(layout.mask((block == step + d) & chosen), back - step) for d in range(len(moved))]
            inner = ops.sum_of_plaintext_products(moved, masks)
            total = inner if total is None else ops.add(inner, ops.rotate(total, -baby))
        assert total is not None
        return ops.rotate(total, back)

    causal = masked(lane >= block, 0)
    return causal, masked(lane < block, layout.tokens) if wrapped and layout.tokens > 1 else None


def scores(ops: SlotOps[V], layout: Layout, q: V, k: V) -> V:
    """Dot products of queries and keys; one level.

    Slot (block, output, lane) of the result is the sum over all R outputs of q * k of that block and lane, for outputs
    0 to R - 1; outputs R to 2R - 1 mix two blocks and mean nothing.
    """
    s = ops.sum_of_products([q], [k])
    step = 1
    while step < layout.outputs:
        s = ops.add(s, ops.rotate(s, step * layout.tokens))
        step *= 2
    return s


def mask_pairs(ops: SlotOps[V], layout: Layout, values: V, pairs: np.ndarray) -> V:
    """From 2i * values, values + i * pairs in the first copy; one level.

    `pairs` (S,) is one where there is a pair: multiplied by a pair's weight, the real part is its numerator and the
    imaginary part its denominator. Elsewhere the values become zero, and in the second copy too, where `scores` mean
    nothing.
    """
    _, output, _ = layout.axes
    shown = pairs * layout.mask(output < layout.outputs)
    return ops.add_plain(ops.sum_of_plaintext_products([values], [-0.5j * shown]), 1j * shown)


def weighted_sum(ops: SlotOps[V], layout: Layout, weights: Sequence[V], values: Sequence[V]) -> V:
    """The sum over blocks, and over all given vectors, of weight * value; one level.

    Blocks are the slowest axis, so that sum is cyclic: every block of the result holds it.
    """
    return sum_blocks(ops, layout, ops.sum_of_products(weights, values))


def weighted_sum_by_lane(ops: SlotOps[V], layout: Layout, lanes: Sequence[Sequence[tuple[V, V]]]) -> V:
    """The sum over blocks and lanes, and over all given pairs, of weight * value; one level.

    A sum over lanes is not cyclic, and partial sums must not be seen. So every lane has a product of its own.

    Args:
        lanes: for each of the T lanes weights, and values that are zero in all other lanes; the first one has some.

    Returns:
        the sum in the last lane of every block, zero in the others.
    """
    total = None
    for pairs in lanes:
        total = None if total is None else ops.rotate(total, -1)
        if pairs:
            weights, values = zip(*pairs, strict=True)
            part = ops.sum_of_products(weights, values)
            total = part if total is None else ops.add(part, total)
    if total is None:
        raise CompilationError("there is nothing to weighted_sum")
    return sum_blocks(ops, layout, total)
