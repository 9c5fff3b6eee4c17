"""Linear algebra on vectors of slots, for engines whose ciphertexts are long vectors of approximate numbers (CKKS).

Such an engine adds, multiplies and rotates whole vectors of complex numbers. A product uses up one *level*, of which
there are few; a rotation costs ten times a product with a clear vector; sums are free. A slot function is written once:

    function(ops, params, *inputs) -> tuple of slot vectors

`ops` (a `SlotOps`) is what the engine can do: `CleartextSimulator` does it in NumPy and encrypts nothing, an engine
does it on ciphertexts. Both count rotations, products and levels in the same lines of code.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from fhe.errors import CompilationError

V = TypeVar("V")

# What a cost can be: "rotation" (conjugation too: the same work), "product" of two vectors that both are encrypted,
# "clear product" with a clear vector, "rescaling" after one or more products.
KINDS = ("rotation", "product", "clear product", "rescaling")


@dataclass(frozen=True)
class OperationCost:
    """One kind of operation at one place of a function. depth: levels used up before it (a deeper one is cheaper)."""

    stage: str
    kind: str
    depth: int


@dataclass
class OperationCounts:
    """What a run did: how often each `OperationCost`, by how many slots it rotated, and how many levels it used."""

    costs: Counter[OperationCost] = field(default_factory=Counter)
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
    """The operations on slot vectors of type V, counted in `counts`.

    A clear vector is a NumPy array of n real or complex entries, where n divides the number of slots: entry i stands
    for the slots i * slots / n to (i + 1) * slots / n - 1 (`np.repeat`), so that one entry is a constant.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.counts = OperationCounts()
        self._stages: list[str] = []

    # What an engine provides. All operands of one operation have the same depth.

    @abstractmethod
    def depth(self, x: V) -> int:
        """Levels used up."""

    @abstractmethod
    def _level_drop(self, x: V, depth: int) -> V: ...

    @abstractmethod
    def _rotate(self, x: V, steps: int) -> V: ...

    @abstractmethod
    def _conjugate(self, x: V) -> V: ...

    @abstractmethod
    def _add(self, x: V, y: V) -> V: ...

    @abstractmethod
    def _subtract(self, x: V, y: V) -> V: ...

    @abstractmethod
    def _add_plain(self, x: V, vector: np.ndarray) -> V: ...

    @abstractmethod
    def _sum_of_plaintext_products(self, xs: Sequence[V], vectors: Sequence[np.ndarray]) -> V: ...

    @abstractmethod
    def _sum_of_products(self, xs: Sequence[V], ys: Sequence[V]) -> V: ...

    # What a function uses.

    def rotate(self, x: V, steps: int) -> V:
        """Slot i of the result is slot (i + steps) mod slots of x."""
        steps %= self.slots
        if steps == 0:
            return x
        self.counts.rotations.add(steps)
        self._note("rotation", x)
        return self._rotate(x, steps)

    def conjugate(self, x: V) -> V:
        self.counts.conjugates = True
        self._note("rotation", x)
        return self._conjugate(x)

    def add(self, x: V, y: V) -> V:
        return self._add(*self._align(x, y))

    def subtract(self, x: V, y: V) -> V:
        return self._subtract(*self._align(x, y))

    def add_plain(self, x: V, vector: Any) -> V:
        """x plus a clear vector."""
        return self._add_plain(x, self._clear(vector))

    def sum_of_plaintext_products(self, xs: Sequence[V], vectors: Sequence[Any]) -> V:
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
        return self._deepened(xs[0], self._sum_of_plaintext_products(xs, [vector for _, vector in pairs]))

    def sum_of_products(self, xs: Sequence[V], ys: Sequence[V]) -> V:
        """The sum of x_i * y_i, slot by slot: one level for the whole sum."""
        both = self._align(*xs, *ys)
        self._note("product", both[0], len(xs))
        return self._deepened(both[0], self._sum_of_products(both[: len(xs)], both[len(xs) :]))

    def level_drop(self, x: V, depth: int) -> V:
        """x at a depth that it has not reached yet; operands of one operation are brought to one depth this way.

        It takes a product with one at the last step, so that every vector of a depth has the same scale.
        """
        if depth <= self.depth(x):
            return x
        stage = ".".join(self._stages)
        self.counts.costs.update(OperationCost(stage, kind, depth - 1) for kind in ("clear product", "rescaling"))
        return self._level_drop(x, depth)

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
        return tuple(self.level_drop(x, deepest) for x in xs)

    def _deepened(self, before: V, after: V) -> V:
        self._note("rescaling", before)
        self.counts.depth = max(self.counts.depth, self.depth(after))
        return after

    def _note(self, kind: str, x: V, count: int = 1) -> None:
        self.counts.costs[OperationCost(".".join(self._stages), kind, self.depth(x))] += count

    def _clear(self, vector: Any) -> np.ndarray:
        vector = np.ascontiguousarray(np.atleast_1d(vector), np.complex128)
        if vector.ndim != 1 or self.slots % len(vector):
            raise CompilationError(f"a clear vector of shape {vector.shape} does not divide {self.slots} slots")
        return vector


@dataclass(frozen=True, eq=False)
class Slots:
    """A slot vector of `CleartextSimulator`: complex128 values (slots,), and the levels that it has used up."""

    values: np.ndarray
    depth: int = 0


class CleartextSimulator(SlotOps[Slots]):
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

    def _level_drop(self, x: Slots, depth: int) -> Slots:
        return self._made(x.values, depth)

    def _rotate(self, x: Slots, steps: int) -> Slots:
        return Slots(np.roll(x.values, -steps), x.depth)

    def _conjugate(self, x: Slots) -> Slots:
        return Slots(x.values.conj(), x.depth)

    def _add(self, x: Slots, y: Slots) -> Slots:
        return self._made(x.values + y.values, x.depth)

    def _subtract(self, x: Slots, y: Slots) -> Slots:
        return self._made(x.values - y.values, x.depth)

    def _add_plain(self, x: Slots, vector: np.ndarray) -> Slots:
        return self._made(x.values + self._repeat(vector), x.depth)

    def _sum_of_plaintext_products(self, xs: Sequence[Slots], vectors: Sequence[np.ndarray]) -> Slots:
        total = sum(x.values * self._repeat(vector) for x, vector in zip(xs, vectors, strict=True))
        return self._made(np.asarray(total), xs[0].depth + 1)

    def _sum_of_products(self, xs: Sequence[Slots], ys: Sequence[Slots]) -> Slots:
        total = sum(x.values * y.values for x, y in zip(xs, ys, strict=True))
        return self._made(np.asarray(total), xs[0].depth + 1)

    def _repeat(self, vector: np.ndarray) -> np.ndarray:
        return np.repeat(vector, self.slots // len(vector))
