"""Linear algebra on slot vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fhe.ckks.slots import SlotOps, V
from fhe.errors import CompilationError


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """How a tile of tokens lies in a vector of slots. All four numbers are powers of two.

        slot     0 1 ... T-1 | T ...                                    S-1
        token    0 1 ... T-1 | 0 1 ... T-1 | ...
        position      0      |      1      | ...   P-1,  P = S / T

    The token varies fastest, so that a rotation by r * T slots moves positions and leaves every token in its lane; as
    positions run through the whole vector, that rotation is cyclic and nothing is lost at an end.

    Input: F complex features, a token's first F numbers + i * the others, n = F * R / P of them in each run of R
    positions, over and over:

        position      0 .. n-1 | n .. 2n-1 | ... R-1 |  R .. R+n-1  | ...
        feature       0 .. n-1 | 0 ..  n-1 | ... n-1 |  n ..  2n-1  | ...

    so that the n positions from any position on, taken in all P / R runs, hold every feature once. Projected: position
    p holds output p mod R, in every run. Read as blocks of two runs, two copies of the R outputs each:

        block         0         |         1         | ...  B-1,  B = P / 2R
        output   0 .. R-1 0 .. R-1 | 0 .. R-1 0 .. R-1 | ...

    Two copies make a sum over R outputs whole at every output of the first, not at the first alone: rotating by 1, 2,
    4 ... R/2 positions and adding gives position p the sum over p .. p + R - 1.

    Args:
        slots: S, half the ring's degree.
        tokens: T, tokens in a tile.
        features: F, at least half the width of the input.
        outputs: R, at least the number of outputs of each projection.
    """

    slots: int
    tokens: int
    features: int
    outputs: int

    def __post_init__(self):
        numbers = self.slots, self.tokens, self.features, self.outputs
        if any(n < 1 or n & (n - 1) for n in numbers):
            raise CompilationError(f"a layout's numbers must be powers of two, got {numbers}")
        if not self.runs <= self.features <= self.positions or self.blocks < self.tokens:
            raise CompilationError(
                f"{self.slots} slots are too few for tiles of {self.tokens} tokens with {2 * self.features} features "
                f"and {self.outputs} outputs: use smaller tiles, a lower rank or a larger ring"
            )

    @classmethod
    def fit(cls, slots: int, width: int, outputs: int, tokens: int | None = None) -> "Layout":
        """The layout with the largest tiles, of at most `tokens` tokens, for inputs of this width.

        Raises CompilationError if not even a tile of one token fits.
        """
        outputs, features = power_of_two(outputs), power_of_two(-(-width // 2))
        size = power_of_two(tokens) if tokens else slots
        while size > 1 and (features * size > slots or 2 * outputs * size * size > slots):
            size //= 2
        return cls(slots, size, max(features, slots // size // outputs), outputs)

    @property
    def positions(self) -> int:
        return self.slots // self.tokens

    @property
    def runs(self) -> int:
        """P / R."""
        return self.positions // self.outputs

    @property
    def diagonals(self) -> int:
        """n."""
        return self.features // self.runs

    @property
    def blocks(self) -> int:
        return self.positions // (2 * self.outputs)

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values fit one cache vector: one for each block and lane."""
        return self.blocks * self.tokens

    @property
    def feature(self) -> np.ndarray:
        """The complex feature at each position of the input, (P,)."""
        position = np.arange(self.positions)
        return position // self.outputs * self.diagonals + position % self.diagonals

    def pack(self, x: np.ndarray) -> np.ndarray:
        """Up to T tokens (n, C) -> (S,): token t in lane t, the lanes beyond n zero."""
        lanes = np.zeros((2 * self.features, self.tokens))
        lanes[: x.shape[1], : len(x)] = x.T
        return (lanes[: self.features] + 1j * lanes[self.features :])[self.feature].reshape(-1)

    def pack_one(self, x: np.ndarray) -> np.ndarray:
        """One token (C,) -> (S,): in every lane."""
        return self.pack(np.tile(x, (self.tokens, 1)))

    def unpack(self, values: np.ndarray) -> np.ndarray:
        """(S,) -> (B, 2R, T): block, output (two copies), lane."""
        return values.reshape(self.blocks, 2 * self.outputs, self.tokens)

    def fill(self, values: Any) -> np.ndarray:
        """(B, 2R, T), or what broadcasts to it -> (S,)."""
        return np.broadcast_to(values, (self.blocks, 2 * self.outputs, self.tokens)).reshape(-1)

    def mask(self, chosen: Any) -> np.ndarray:
        """Zeros and ones: a condition on `axes` -> (S,)."""
        return self.fill(chosen).astype(np.float64)

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The block (B, 1, 1), output (1, 2R, 1) and lane (1, 1, T) of a slot, to write masks with."""
        block, output, lane = np.ogrid[: self.blocks, : 2 * self.outputs, : self.tokens]
        return block, output, lane


def steps_of(layout: Layout) -> tuple[int, int]:
    """How n diagonals are cut into baby and giant steps, (baby, giant) with baby * giant = n.

    Baby steps are taken once, giant ones in each of the three maps that queries, keys and values need.
    """
    giant = 1 << max(0, (layout.diagonals.bit_length() - 2) // 2)
    return layout.diagonals // giant, giant


def project(ops: SlotOps[V], layout: Layout, x: V, matrices: Sequence[np.ndarray]) -> list[V]:
    """Linear maps of every token of a packed input, each to R outputs; one level.

    A map W (C, R) of real numbers that lie in pairs in complex ones, z = u + iv, is y = Az + conj(Bz) with
    A = (W_u - iW_v) / 2 and conj(B) = (W_u + iW_v) / 2; where W is real, B is A. With z at position p feature f(p) (see
    `Layout`), the n diagonals

        D_r[p] = A[f(p + r), p mod R],   y[p] = sum_r D_r[p] * z[p + r]

    give position p the part of output p mod R that n features make; a sum over all runs makes it whole, and as that
    is cyclic it leaves the outputs in all of them. r = giant * b + baby, and the giant steps go by Horner's rule, so
    that one rotation key does for all baby steps and another for all giant ones.

    Args:
        matrices: (C, R) each, real or complex: output o of token t is x_t @ matrix[:, o].

    Returns:
        for each matrix, output o at position o of every run.
    """
    rotated = [x]
    for _ in range(1, steps_of(layout)[0]):
        rotated.append(ops.rotate(rotated[-1], layout.tokens))
    results = []
    for matrix in matrices:
        padded = np.zeros((2, layout.features, layout.outputs), np.complex128)
        padded.reshape(-1, layout.outputs)[: len(matrix), : matrix.shape[1]] = matrix / 2
        direct, mirrored = padded[0] - 1j * padded[1], (padded[0] + 1j * padded[1]).conj()
        y = _by_diagonals(ops, layout, rotated, direct)
        y = ops.add(y, ops.conjugate(_by_diagonals(ops, layout, rotated, mirrored) if np.iscomplexobj(matrix) else y))
        fold = layout.outputs
        while fold < layout.positions:
            y = ops.add(y, ops.rotate(y, fold * layout.tokens))
            fold *= 2
        results.append(y)
    return results


def _by_diagonals(ops: SlotOps[V], layout: Layout, rotated: Sequence[V], matrix: np.ndarray) -> V:
    """The sum over r of a complex matrix's (F, R) diagonals times the input rotated by r, of which the baby steps are
    given."""
    position, baby, y = np.arange(layout.positions), len(rotated), None
    for step in reversed(range(0, layout.diagonals, baby)):
        back = position - step  # the giant step rotates the product, so its diagonal is rotated back
        diagonals = [
            matrix[layout.feature[(position + r) % layout.positions], back % layout.outputs] for r in range(baby)
        ]
        y = None if y is None else ops.rotate(y, baby * layout.tokens)
        if any(diagonal.any() for diagonal in diagonals):
            inner = ops.sum_of_plaintext_products(rotated, diagonals)
            y = inner if y is None else ops.add(inner, y)
    if y is None:
        raise CompilationError("a projection's weights are all zero")
    return y


def evaluate_polynomial(ops: SlotOps[V], x: V, start: float, constants: Sequence[float]) -> V:
    """(x + start)**2 + constants[0], squared + constants[1], ...; one level for each constant."""
    x = ops.add_plain(x, start)
    for constant in constants:
        x = ops.sum_of_products([x], [x])
        if constant:
            x = ops.add_plain(x, constant)
    return x


def split_real_imaginary(ops: SlotOps[V], z: V) -> tuple[V, V]:
    """Keys + i * values, apart and doubled: 2 * keys and 2i * values; no level."""
    mirrored = ops.conjugate(z)
    return ops.add(z, mirrored), ops.subtract(z, mirrored)


def sum_blocks(ops: SlotOps[V], layout: Layout, x: V) -> V:
    step = 2 * layout.outputs * layout.tokens
    while step < layout.slots:
        x = ops.add(x, ops.rotate(x, step))
        step *= 2
    return x
