"""Linear algebra on vectors of slots, for engines whose ciphertexts are long vectors of approximate numbers (CKKS).

Such an engine adds, multiplies and rotates whole vectors of complex numbers. A product uses up one *level*, of which
there are few; a rotation costs ten times a product with a clear vector; sums are free. A slot function is written once:

    function(ops, params, *inputs) -> tuple of slot vectors

`ops` (a `SlotOps`) is what the engine can do: `SlotMachine` does it in NumPy and encrypts nothing, an engine does it on
ciphertexts. Both count rotations, products and levels in the same lines of code.

This module has the operations, the layout (`Layout`) and the pieces of attention on it: `project`, `apart`, `spread`,
`scores`, `quadratics`, `weigh`. Sources: diagonals with baby and giant steps are Halevi and Shoup's ("Algorithms in
HElib", CRYPTO 2014; "Faster homomorphic linear transformations in HElib", CRYPTO 2018).
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

    Input: position p holds feature p mod F. Projected: position p holds output p mod 2R of two maps side by side, and
    once they are apart output p mod R of one, so that every output stands P / R times. Read as blocks of 2R positions,
    two copies of the R outputs each:

        block         0         |         1         | ...  B-1,  B = P / 2R
        output   0 .. R-1 0 .. R-1 | 0 .. R-1 0 .. R-1 | ...

    Two copies make a sum over R outputs whole at every output of the first, not at the first alone: rotating by 1, 2,
    4 ... R/2 positions and adding gives position p the sum over p .. p + R - 1.

    Args:
        slots: S, half the ring's degree.
        tokens: T, tokens in a tile.
        features: F, at least the width of the input, and 2R.
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
        if not 2 * self.outputs <= self.features <= self.positions or self.blocks < self.tokens:
            raise CompilationError(
                f"{self.slots} slots are too few for tiles of {self.tokens} tokens with {self.features} features and "
                f"{self.outputs} outputs: use smaller tiles, a lower rank or a larger ring"
            )

    @classmethod
    def fit(cls, slots: int, width: int, outputs: int, tokens: int | None = None) -> "Layout":
        """The layout with the largest tiles, of at most `tokens` tokens, for inputs of this width.

        Raises CompilationError if not even a tile of one token fits.
        """
        outputs = power_of_two(outputs)
        features = max(power_of_two(width), 2 * outputs)
        size = power_of_two(tokens) if tokens else slots
        while size > 1 and (features * size > slots or 2 * outputs * size * size > slots):
            size //= 2
        return cls(slots, size, features, outputs)

    @property
    def positions(self) -> int:
        return self.slots // self.tokens

    @property
    def blocks(self) -> int:
        return self.positions // (2 * self.outputs)

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values fit one cache vector: one for each block and lane."""
        return self.blocks * self.tokens

    def pack(self, x: np.ndarray) -> np.ndarray:
        """Up to T tokens (n, C) -> (S,): token t in lane t, the lanes beyond n zero."""
        lanes = np.zeros((self.features, self.tokens))
        lanes[: x.shape[1], : len(x)] = x.T
        return np.tile(lanes.reshape(-1), self.positions // self.features)

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
    """How 2R diagonals are cut into baby and giant steps, (baby, giant) with baby * giant = 2R."""
    giant = 1 << ((2 * layout.outputs).bit_length() - 1) // 2
    return 2 * layout.outputs // giant, giant


def project(ops: SlotOps[V], layout: Layout, x: V, matrix: np.ndarray) -> V:
    """A linear map of every token of a packed input, to 2R outputs; one level.

    With x at position p feature p mod F, and W padded by zeros to (F, 2R), the 2R diagonals

        D_r[p] = W[(p + r) mod F, p mod 2R],   y[p] = sum_r D_r[p] * x[p + r]

    reach 2R of the F features from position p; adding y's rotations by 2R, 4R ... F/2 positions reaches them all, and
    as that sum is cyclic it leaves the outputs in all blocks. r = giant * b + baby, and the giant steps go by Horner's
    rule, so that one rotation key does for all baby steps and another for all giant ones.

    Args:
        matrix: (C, 2R), real or complex: output o of token t is x_t @ matrix[:, o].

    Returns:
        output o at position o of every block. Of two maps side by side, `apart` makes two vectors.
    """
    lanes, size = layout.tokens, 2 * layout.outputs
    baby, _ = steps_of(layout)
    rotated = [x]
    for _ in range(1, baby):
        rotated.append(ops.rotate(rotated[-1], lanes))
    position = np.arange(layout.positions)
    padded = np.zeros((layout.features, size), np.complex128)
    padded[: len(matrix)] = matrix
    y = None
    for step in reversed(range(0, size, baby)):
        back = position - step  # the giant step rotates the product, so its diagonal is rotated back
        diagonals = [padded[(back + step + r) % layout.features, back % size] for r in range(baby)]
        y = None if y is None else ops.rotate(y, baby * lanes)
        if any(diagonal.any() for diagonal in diagonals):
            inner = ops.combine(rotated, diagonals)
            y = inner if y is None else ops.add(inner, y)
    if y is None:
        raise CompilationError("a projection's weights are all zero")
    fold = size
    while fold < layout.features:
        y = ops.add(y, ops.rotate(y, fold * lanes))
        fold *= 2
    return y


def apart(ops: SlotOps[V], layout: Layout, y: V, masks: Sequence[tuple[int, Any]]) -> list[V]:
    """From R outputs of one map in the first copy and R of another in the second, vectors of one map; one level.

    Args:
        masks: for each vector the copy it is made of, 0 or 1, and the clear vector (S,) or number it is multiplied by.

    Returns:
        vectors with the chosen outputs in both copies.
    """
    moved = ops.rotate(y, layout.outputs * layout.tokens)
    _, output, _ = layout.axes
    results = []
    for copy, mask in masks:
        own = layout.mask(output // layout.outputs == copy)
        results.append(ops.combine([y, moved], [mask * own, mask * (1 - own)]))
    return results


def spread(ops: SlotOps[V], layout: Layout, z: V, wrapped: bool = False) -> tuple[V, V | None]:
    """Every token beside the tokens before it; one level.

        lane        0    1    2    3              0    1    2    3
        block 0    z_0  z_1  z_2  z_3
        block 1     .   z_0  z_1  z_2            z_3   .    .    .
        block 2     .    .   z_0  z_1            z_2  z_3   .    .
        block 3     .    .    .   z_0            z_1  z_2  z_3   .
                        causal                        wrapped

    Block d of lane t holds token t - d of the tile, rotated there by d slots and masked; the dots are zero.

    Returns:
        The causal half, which pairs a tile with itself; and, if wanted, the wrapped half: the sum of both pairs every
        lane with all tokens of this tile, for lanes of a later one.
    """
    block, _, lane = layout.axes
    moved = [z]
    for _ in range(1, layout.tokens):
        moved.append(ops.rotate(moved[-1], -1))
    causal = ops.combine(moved, [layout.mask((block == d) & (lane >= d)) for d in range(layout.tokens)])
    if not wrapped or layout.tokens == 1:
        return causal, None
    over = [ops.rotate(z, layout.tokens - 1)]
    for _ in range(2, layout.tokens):
        over.append(ops.rotate(over[-1], -1))
    masks = [layout.mask((block == d) & (lane < d)) for d in range(1, layout.tokens)]
    return causal, ops.combine(over, masks)


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


def halves(ops: SlotOps[V], layout: Layout, z: V, present: np.ndarray) -> tuple[V, V]:
    """Keys + i * values, apart: twice the keys (no level), and values + i * present in the first copy (one level).

    `present` (S,) is one where there is a pair: multiplied by a pair's weight, the real part is its numerator and the
    imaginary part its denominator. Elsewhere the values become zero, and in the second copy too, where `scores` mean
    nothing.
    """
    _, output, _ = layout.axes
    mirrored = ops.conjugate(z)
    shown = present * layout.mask(output < layout.outputs)
    values = ops.combine([ops.subtract(z, mirrored)], [-0.5j * shown])
    return ops.add(z, mirrored), ops.offset(values, 1j * shown)


def weigh(ops: SlotOps[V], layout: Layout, weights: Sequence[V], values: Sequence[V]) -> V:
    """The sum over blocks, and over all given vectors, of weight * value; one level.

    Blocks are the slowest axis, so that sum is cyclic: every block of the result holds it.
    """
    total = ops.dot(weights, values)
    step = 2 * layout.outputs * layout.tokens
    while step < layout.slots:
        total = ops.add(total, ops.rotate(total, step))
        step *= 2
    return total


def gather(ops: SlotOps[V], layout: Layout, x: V) -> V:
    """The sum over all lanes, in the last lane; zero in the others, and in the second copy of outputs; one level."""
    _, output, lane = layout.axes
    total = x
    for _ in range(1, layout.tokens):
        total = ops.add(x, ops.rotate(total, -1))
    return ops.combine([total], [layout.mask((lane == layout.tokens - 1) & (output < layout.outputs))])
