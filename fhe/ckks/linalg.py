"""Linear algebra on slot vectors.

Sources: diagonals with baby and giant steps are Halevi and Shoup's ("Algorithms in HElib", CRYPTO 2014; "Faster
homomorphic linear transformations in HElib", CRYPTO 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fhe.ckks.slots import SlotOps, V
from fhe.errors import CompilationError


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """The places of a tile of tokens, the rows of a matrix, in a slot vector. All four numbers are powers of two.

        slot     0 1 ... T-1 | T ...                                    S-1
        token    0 1 ... T-1 | 0 1 ... T-1 | ...
        position      0      |      1      | ...   P-1,  P = S / T

    The token varies fastest, so a rotation by r * T slots moves positions and keeps every token in its lane. Positions
    fill the whole vector, so that rotation is cyclic.

    Input: F complex features, a token's first F numbers + i * the others; n = F * R / P of them, repeated, in each run
    of R positions:

        position      0 .. n-1 | n .. 2n-1 | ... R-1 |  R .. R+n-1  | ...
        feature       0 .. n-1 | 0 ..  n-1 | ... n-1 |  n ..  2n-1  | ...

    So n consecutive positions, from any position on and taken in all P / R runs, hold every feature once. Projected:
    position p holds output p mod R, in every run. As blocks of two runs, with two copies of the R outputs each:

        block         0         |         1         | ...  B-1,  B = P / 2R
        output   0 .. R-1 0 .. R-1 | 0 .. R-1 0 .. R-1 | ...

    With two copies, rotations by 1, 2, 4 ... R/2 positions and sums give position p the sum over p .. p + R - 1: the
    sum over all outputs, at every position of the first copy.

    Args:
        slots: S, half the polynomial degree.
        tokens: T, tokens in a tile.
        features: F, at least half the width of the input.
        outputs: R, at least the number of outputs of each projection.
    """

    slots: int
    tokens: int
    features: int
    outputs: int

    def __post_init__(self) -> None:
        numbers = self.slots, self.tokens, self.features, self.outputs
        if any(n < 1 or n & (n - 1) for n in numbers):
            raise CompilationError(f"a layout's numbers must be powers of two, got {numbers}")
        if not self.runs <= self.features <= self.positions or self.blocks < self.tokens:
            raise CompilationError(
                f"{self.slots} slots are too few for tiles of {self.tokens} tokens with {2 * self.features} features "
                f"and {self.outputs} outputs: use smaller tiles, fewer outputs or a larger polynomial degree"
            )

    @classmethod
    def fit(cls, slots: int, width: int, outputs: int, tokens: int | None = None) -> "Layout":
        """The layout with the largest tiles, of at most `tokens` tokens, for inputs of `width` numbers.

        Raises CompilationError if not even a tile of one token fits.
        """
        outputs, features = power_of_two(outputs), power_of_two(-(-width // 2))
        size = power_of_two(tokens) if tokens else slots
        while size > 1 and (features * size > slots or 2 * outputs * size * size > slots):
            size //= 2
        return cls(slots, size, max(features, slots // size // outputs), outputs)

    @property
    def positions(self) -> int:
        """P: slots of a lane."""
        return self.slots // self.tokens

    @property
    def runs(self) -> int:
        """P / R: groups of R positions."""
        return self.positions // self.outputs

    @property
    def diagonals(self) -> int:
        """n: diagonals of a projection's matrix."""
        return self.features // self.runs

    @property
    def blocks(self) -> int:
        """B: pairs of runs."""
        return self.positions // (2 * self.outputs)

    @property
    def capacity(self) -> int:
        """B * T: places for outputs of one token, a block and a lane each."""
        return self.blocks * self.tokens

    @property
    def feature(self) -> NDArray[Any]:
        """The complex feature at each position of the input, (P,)."""
        position = np.arange(self.positions)
        return position // self.outputs * self.diagonals + position % self.diagonals

    def pack(self, x: NDArray[Any]) -> NDArray[Any]:
        """Up to T tokens (n, C) -> (S,): token t in lane t, zeros in the lanes beyond n."""
        lanes = np.zeros((2 * self.features, self.tokens))
        lanes[: x.shape[1], : len(x)] = x.T
        return (lanes[: self.features] + 1j * lanes[self.features :])[self.feature].reshape(-1)

    def pack_one(self, x: NDArray[Any]) -> NDArray[Any]:
        """One token (C,) -> (S,), in every lane."""
        return self.pack(np.tile(x, (self.tokens, 1)))

    def unpack(self, values: NDArray[Any]) -> NDArray[Any]:
        """(S,) -> (B, 2R, T): block, output (two copies), lane."""
        return values.reshape(self.blocks, 2 * self.outputs, self.tokens)

    def fill(self, values: Any) -> NDArray[Any]:
        """(B, 2R, T), or what broadcasts to it, -> (S,)."""
        return np.broadcast_to(values, (self.blocks, 2 * self.outputs, self.tokens)).reshape(-1)

    def mask(self, chosen: Any) -> NDArray[Any]:
        """A condition on `axes` -> (S,), zeros and ones."""
        return self.fill(chosen).astype(np.float64)

    @property
    def axes(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Block (B, 1, 1), output (1, 2R, 1) and lane (1, 1, T) of a slot, for conditions of masks."""
        block, output, lane = np.ogrid[: self.blocks, : 2 * self.outputs, : self.tokens]
        return block, output, lane


def steps_of(layout: Layout) -> tuple[int, int]:
    """Baby and giant steps for n diagonals: (baby, giant) with baby * giant = n.

    Baby steps are done once for all matrices of a projection, giant steps for each of them, so there are more of the
    former.
    """
    giant = 1 << max(0, (layout.diagonals.bit_length() - 2) // 2)
    return layout.diagonals // giant, giant


def project(ops: SlotOps[V], layout: Layout, x: V, matrices: Sequence[NDArray[Any]]) -> list[V]:
    """Linear maps of every token of a packed input, each to R outputs; one level.

    Real numbers lie in pairs in complex ones, z = u + iv. A map W (C, R) is then y = Az + conj(Bz), with
    A = (W_u - iW_v) / 2 and conj(B) = (W_u + iW_v) / 2; if W is real, B = A. Position p holds feature f(p) of z (see
    `Layout`). The n diagonals

        D_r[p] = A[f(p + r), p mod R],   y[p] = sum_r D_r[p] * z[p + r]

    give position p the contribution of n features to output p mod R. A sum over all runs completes it; that sum is
    cyclic, so every run holds it. r = giant * b + baby, and giant steps follow Horner's rule: all baby steps share one
    rotation key, all giant steps another.

    Args:
        matrices: (C, R) each, real or complex. Output o of token t is x_t @ matrix[:, o].

    Returns:
        For each matrix a vector with output o at position o of every run.
    """
    rotated = [x]
    for _ in range(1, steps_of(layout)[0]):
        rotated.append(ops.rotate(rotated[-1], layout.tokens))
    results: list[V] = []
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


def _by_diagonals(ops: SlotOps[V], layout: Layout, rotated: Sequence[V], matrix: NDArray[Any]) -> V:
    """The sum over r of diagonal r of a complex matrix (F, R) times the input rotated by r.

    rotated: the input, rotated by every baby step.
    """
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
        raise CompilationError("the weights of a projection are all zero")
    return y


def evaluate_polynomial(ops: SlotOps[V], x: V, start: float, constants: Sequence[float]) -> V:
    """x + start, then for each constant its square plus the constant: p = p**2 + c. One level for each constant."""
    x = ops.add_plain(x, start)
    for constant in constants:
        x = ops.sum_of_products([x], [x])
        if constant:
            x = ops.add_plain(x, constant)
    return x


def split_real_imaginary(ops: SlotOps[V], z: V) -> tuple[V, V]:
    """z = u + iv -> 2u and 2iv; no level."""
    mirrored = ops.conjugate(z)
    return ops.add(z, mirrored), ops.subtract(z, mirrored)


def sum_blocks(ops: SlotOps[V], layout: Layout, x: V) -> V:
    """The sum over all blocks, in every block; no level."""
    step = 2 * layout.outputs * layout.tokens
    while step < layout.slots:
        x = ops.add(x, ops.rotate(x, step))
        step *= 2
    return x
