"""Linear algebra on vectors of slots, for engines whose ciphertexts are long vectors of approximate numbers (CKKS).

Such an engine adds, multiplies and rotates whole vectors of complex numbers. A product uses up one *level*, of which
there are few; a rotation costs ten times a product with a clear vector; sums are free. A slot function is written once:

    function(ops, params, *inputs) -> tuple of slot vectors

`ops` (a `SlotOps`) is what the engine can do: `SlotMachine` does it in NumPy and encrypts nothing, an engine does it on
ciphertexts. Both count rotations, products and levels in the same lines of code.

This module has the operations, the layout (`Layout`) and the pieces of attention on it: `project`, `spread`, `halves`,
`scores`, `quadratics`, `present`, `weigh`, `weigh_lanes`. Sources: diagonals with baby and giant steps are Halevi and
Shoup's ("Algorithms in HElib", CRYPTO 2014; "Faster homomorphic linear transformations in HElib", CRYPTO 2018).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from .errors import CompilationError

V = TypeVar("V")

# What a cost can be: "rotation" (conjugation too: the same work), "product" of two vectors that both are encrypted,
# "clear product" with a clear vector, "rescaling" after one or more products.
KINDS = ("rotation", "product", "clear product", "rescaling")


@dataclass(frozen=True)
class Cost:
    """One kind of operation at one place of a function. depth: levels used up before it (a deeper one is cheaper)."""

    stage: str
    kind: str
    depth: int


@dataclass
class Tally:
    """What a run did: how often each `Cost`, by how many slots it rotated, and how many levels it used."""

    costs: Counter[Cost] = field(default_factory=Counter)
    rotations: set[int] = field(default_factory=set)
    conjugates: bool = False
    depth: int = 0

    def total(self, kind: str) -> int:
        return sum(count for cost, count in self.costs.items() if cost.kind == kind)

    def by_stage(self) -> dict[str, dict[str, int]]:
        """{stage: {kind: count}}."""
        stages: dict[str, dict[str, int]] = {}
        for cost, count in self.costs.items():
            kinds = stages.setdefault(cost.stage, {})
            kinds[cost.kind] = kinds.get(cost.kind, 0) + count
        return stages


class SlotOps(ABC, Generic[V]):
    """The operations on slot vectors of type V, counted in `tally`.

    A clear vector is a NumPy array of n real or complex entries, where n divides the number of slots: entry i stands
    for the slots i * slots / n to (i + 1) * slots / n - 1 (`np.repeat`), so that one entry is a constant.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.tally = Tally()
        self._stages: list[str] = []

    # What an engine provides. All operands of `_combine`, `_dot`, `_add` and `_subtract` have the same depth.

    @abstractmethod
    def depth(self, x: V) -> int:
        """Levels used up."""

    @abstractmethod
    def _lower(self, x: V, depth: int) -> V: ...

    @abstractmethod
    def _rotate(self, x: V, steps: int) -> V: ...

    @abstractmethod
    def _conjugate(self, x: V) -> V: ...

    @abstractmethod
    def _add(self, x: V, y: V) -> V: ...

    @abstractmethod
    def _subtract(self, x: V, y: V) -> V: ...

    @abstractmethod
    def _offset(self, x: V, vector: np.ndarray) -> V: ...

    @abstractmethod
    def _combine(self, xs: Sequence[V], vectors: Sequence[np.ndarray]) -> V: ...

    @abstractmethod
    def _dot(self, xs: Sequence[V], ys: Sequence[V]) -> V: ...

    # What a function uses.

    def rotate(self, x: V, steps: int) -> V:
        """Slot i of the result is slot (i + steps) mod slots of x."""
        steps %= self.slots
        if steps == 0:
            return x
        self.tally.rotations.add(steps)
        self._note("rotation", x)
        return self._rotate(x, steps)

    def conjugate(self, x: V) -> V:
        self.tally.conjugates = True
        self._note("rotation", x)
        return self._conjugate(x)

    def add(self, x: V, y: V) -> V:
        return self._add(*self._align(x, y))

    def subtract(self, x: V, y: V) -> V:
        return self._subtract(*self._align(x, y))

    def offset(self, x: V, vector: Any) -> V:
        """x plus a clear vector."""
        return self._offset(x, self._clear(vector))

    def combine(self, xs: Sequence[V], vectors: Sequence[Any]) -> V:
        """The sum of x_i * vector_i, slot by slot, with clear vectors: one level for the whole sum.

        Vectors of zeros are left out, for engines refuse to multiply by them: the result would be no ciphertext.
        Raises CompilationError if all are.
        """
        pairs = [(x, self._clear(vector)) for x, vector in zip(xs, vectors, strict=True)]
        pairs = [(x, vector) for x, vector in pairs if vector.any()]
        if not pairs:
            raise CompilationError("a sum of products with clear vectors has zeros only: are weights missing?")
        xs = self._align(*(x for x, _ in pairs))
        self._note("clear product", xs[0], len(xs))
        return self._deepened(xs[0], self._combine(xs, [vector for _, vector in pairs]))

    def dot(self, xs: Sequence[V], ys: Sequence[V]) -> V:
        """The sum of x_i * y_i, slot by slot: one level for the whole sum."""
        both = self._align(*xs, *ys)
        self._note("product", both[0], len(xs))
        return self._deepened(both[0], self._dot(both[: len(xs)], both[len(xs) :]))

    def lower(self, x: V, depth: int) -> V:
        """x at a depth that it has not reached yet; operands of one operation are brought to one depth this way.

        It takes a product with one at the last step, so that every vector of a depth has the same scale.
        """
        if depth <= self.depth(x):
            return x
        stage = ".".join(self._stages)
        self.tally.costs.update(Cost(stage, kind, depth - 1) for kind in ("clear product", "rescaling"))
        return self._lower(x, depth)

    @contextmanager
    def tag(self, name: str) -> Iterator[None]:
        """Names the stage that the operations inside belong to."""
        self._stages.append(name)
        try:
            yield
        finally:
            self._stages.pop()

    def _align(self, *xs: V) -> tuple[V, ...]:
        deepest = max(self.depth(x) for x in xs)
        return tuple(self.lower(x, deepest) for x in xs)

    def _deepened(self, before: V, after: V) -> V:
        self._note("rescaling", before)
        self.tally.depth = max(self.tally.depth, self.depth(after))
        return after

    def _note(self, kind: str, x: V, count: int = 1) -> None:
        self.tally.costs[Cost(".".join(self._stages), kind, self.depth(x))] += count

    def _clear(self, vector: Any) -> np.ndarray:
        vector = np.ascontiguousarray(np.atleast_1d(vector), np.complex128)
        if vector.ndim != 1 or self.slots % len(vector):
            raise CompilationError(f"a clear vector of shape {vector.shape} does not divide {self.slots} slots")
        return vector


@dataclass(frozen=True, eq=False)
class Slots:
    """A slot vector of `SlotMachine`: complex128 values (slots,), and the levels that it has used up."""

    values: np.ndarray
    depth: int = 0


class SlotMachine(SlotOps[Slots]):
    """Slot vectors in NumPy, exact to float64. It encrypts nothing.

    largest: the largest absolute value seen at each depth, which must fit the modulus that is left there.
    """

    def __init__(self, slots: int):
        super().__init__(slots)
        self.largest: dict[int, float] = {}

    def load(self, values: Any, depth: int = 0) -> Slots:
        """An input, as it would come from a client."""
        values = np.asarray(values, np.complex128)
        if values.shape != (self.slots,):
            raise ValueError(f"an input has shape {values.shape}; wanted ({self.slots},)")
        return self._made(values, depth)

    def depth(self, x: Slots) -> int:
        return x.depth

    def _made(self, values: np.ndarray, depth: int) -> Slots:
        self.largest[depth] = max(self.largest.get(depth, 0.0), float(np.abs(values).max()))
        return Slots(values, depth)

    def _lower(self, x: Slots, depth: int) -> Slots:
        return self._made(x.values, depth)

    def _rotate(self, x: Slots, steps: int) -> Slots:
        return Slots(np.roll(x.values, -steps), x.depth)

    def _conjugate(self, x: Slots) -> Slots:
        return Slots(x.values.conj(), x.depth)

    def _add(self, x: Slots, y: Slots) -> Slots:
        return self._made(x.values + y.values, x.depth)

    def _subtract(self, x: Slots, y: Slots) -> Slots:
        return self._made(x.values - y.values, x.depth)

    def _offset(self, x: Slots, vector: np.ndarray) -> Slots:
        return self._made(x.values + self._repeat(vector), x.depth)

    def _combine(self, xs: Sequence[Slots], vectors: Sequence[np.ndarray]) -> Slots:
        total = sum(x.values * self._repeat(vector) for x, vector in zip(xs, vectors, strict=True))
        return self._made(np.asarray(total), xs[0].depth + 1)

    def _dot(self, xs: Sequence[Slots], ys: Sequence[Slots]) -> Slots:
        total = sum(x.values * y.values for x, y in zip(xs, ys, strict=True))
        return self._made(np.asarray(total), xs[0].depth + 1)

    def _repeat(self, vector: np.ndarray) -> np.ndarray:
        return np.repeat(vector, self.slots // len(vector))


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
            inner = ops.combine(rotated, diagonals)
            y = inner if y is None else ops.add(inner, y)
    if y is None:
        raise CompilationError("a projection's weights are all zero")
    return y


def spread(ops: SlotOps[V], layout: Layout, z: V, wrapped: bool = False) -> tuple[V, V | None]:
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
            inner = ops.combine(moved, masks)
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
    s = ops.dot([q], [k])
    step = 1
    while step < layout.outputs:
        s = ops.add(s, ops.rotate(s, step * layout.tokens))
        step *= 2
    return s


def quadratics(ops: SlotOps[V], x: V, start: float, constants: Sequence[float]) -> V:
    """(x + start)**2 + constants[0], squared + constants[1], ...; one level for each constant."""
    x = ops.offset(x, start)
    for constant in constants:
        x = ops.dot([x], [x])
        if constant:
            x = ops.offset(x, constant)
    return x


def halves(ops: SlotOps[V], z: V) -> tuple[V, V]:
    """Keys + i * values, apart and doubled: 2 * keys and 2i * values; no level."""
    mirrored = ops.conjugate(z)
    return ops.add(z, mirrored), ops.subtract(z, mirrored)


def present(ops: SlotOps[V], layout: Layout, values: V, pairs: np.ndarray) -> V:
    """From 2i * values, values + i * pairs in the first copy; one level.

    `pairs` (S,) is one where there is a pair: multiplied by a pair's weight, the real part is its numerator and the
    imaginary part its denominator. Elsewhere the values become zero, and in the second copy too, where `scores` mean
    nothing.
    """
    _, output, _ = layout.axes
    shown = pairs * layout.mask(output < layout.outputs)
    return ops.offset(ops.combine([values], [-0.5j * shown]), 1j * shown)


def weigh(ops: SlotOps[V], layout: Layout, weights: Sequence[V], values: Sequence[V]) -> V:
    """The sum over blocks, and over all given vectors, of weight * value; one level.

    Blocks are the slowest axis, so that sum is cyclic: every block of the result holds it.
    """
    return _over_blocks(ops, layout, ops.dot(weights, values))


def weigh_lanes(ops: SlotOps[V], layout: Layout, lanes: Sequence[Sequence[tuple[V, V]]]) -> V:
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
            part = ops.dot(weights, values)
            total = part if total is None else ops.add(part, total)
    if total is None:
        raise CompilationError("there is nothing to weigh")
    return _over_blocks(ops, layout, total)


def _over_blocks(ops: SlotOps[V], layout: Layout, x: V) -> V:
    step = 2 * layout.outputs * layout.tokens
    while step < layout.slots:
        x = ops.add(x, ops.rotate(x, step))
        step *= 2
    return x
