"""Operations on slot vectors: the long vectors of approximate complex numbers that a CKKS ciphertext holds.

An engine adds, multiplies and rotates whole vectors. A product uses up one *level*, of which there are few. A rotation
costs ten times as much as a product with a clear vector; sums cost next to nothing. A slot function is written once:

    function(ops, params, *inputs) -> tuple of slot vectors

`ops` is a `SlotOps`: `CleartextSimulator` computes in NumPy and encrypts nothing, an engine computes on ciphertexts.
The base class counts rotations, products and levels for both.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fhe.errors import CompilationError

V = TypeVar("V")

# Kinds of operations: "rotation" (a conjugation counts as one: the same work), "product" of two encrypted vectors,
# "clear product" of an encrypted and a clear vector, "rescaling" after a product or a sum of products.
KINDS = ("rotation", "product", "clear product", "rescaling")


@dataclass(frozen=True)
class OperationCost:
    """A kind of operation in a stage of a function. depth: levels used up before it; deeper ones are cheaper."""

    stage: str
    kind: str
    depth: int


@dataclass
class OperationCounts:
    """The operations of a run: how many of each kind, the steps of its rotations, the levels that it used."""

    costs: Counter[OperationCost] = field(default_factory=Counter[OperationCost])
    rotations: set[int] = field(default_factory=set[int])
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
    """Operations on slot vectors of type V, counted in `counts`.

    A clear vector is a NumPy array of n real or complex entries, where n divides the number of slots. Entry i is
    repeated for slots i * slots / n to (i + 1) * slots / n - 1 (`np.repeat`), so a single entry is a constant.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.counts = OperationCounts()
        self._stages: list[str] = []

    # An engine implements these. All operands of one operation have the same depth.

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
    def _add_plain(self, x: V, vector: NDArray[Any]) -> V: ...

    @abstractmethod
    def _sum_of_plaintext_products(self, xs: Sequence[V], vectors: Sequence[NDArray[Any]]) -> V: ...

    @abstractmethod
    def _sum_of_products(self, xs: Sequence[V], ys: Sequence[V]) -> V: ...

    # A slot function uses these.

    def rotate(self, x: V, steps: int) -> V:
        """Slot i of the result is slot (i + steps) mod slots of x."""
        steps %= self.slots
        if steps == 0:
            return x
        self.counts.rotations.add(steps)
        self._note("rotation", x)
        return self._rotate(x, steps)

    def conjugate(self, x: V) -> V:
        """The complex conjugate of every slot."""
        self.counts.conjugates = True
        self._note("rotation", x)
        return self._conjugate(x)

    def add(self, x: V, y: V) -> V:
        """x + y, slot by slot."""
        return self._add(*self._align(x, y))

    def subtract(self, x: V, y: V) -> V:
        """x - y, slot by slot."""
        return self._subtract(*self._align(x, y))

    def add_plain(self, x: V, vector: Any) -> V:
        """x plus a clear vector."""
        return self._add_plain(x, self._clear(vector))

    def sum_of_plaintext_products(self, xs: Sequence[V], vectors: Sequence[Any]) -> V:
        """The sum of x_i * vector_i, slot by slot, with clear vectors. One level for the whole sum.

        Terms with a vector of zeros are skipped, because SEAL refuses them: the product would not be encrypted. Raises
        CompilationError if all vectors are zero.
        """
        pairs = [(x, self._clear(vector)) for x, vector in zip(xs, vectors, strict=True)]
        pairs = [(x, vector) for x, vector in pairs if vector.any()]
        if not pairs:
            raise CompilationError("all vectors of a sum of plaintext products are zeros only: are weights missing?")
        xs = self._align(*(x for x, _ in pairs))
        self._note("clear product", xs[0], len(xs))
        return self._deepened(xs[0], self._sum_of_plaintext_products(xs, [vector for _, vector in pairs]))

    def sum_of_products(self, xs: Sequence[V], ys: Sequence[V]) -> V:
        """The sum of x_i * y_i, slot by slot. One level for the whole sum."""
        both = self._align(*xs, *ys)
        self._note("product", both[0], len(xs))
        return self._deepened(both[0], self._sum_of_products(both[: len(xs)], both[len(xs) :]))

    def level_drop(self, x: V, depth: int) -> V:
        """x at a larger depth; x itself if it is there already. Operands of one operation are aligned this way.

        It ends in a product with one, so that all vectors of a depth have the same scale.
        """
        if depth <= self.depth(x):
            return x
        stage = ".".join(self._stages)
        self.counts.costs.update(OperationCost(stage, kind, depth - 1) for kind in ("clear product", "rescaling"))
        return self._level_drop(x, depth)

    @contextmanager
    def tag(self, name: str) -> Generator[None, None, None]:
        """Name the stage of the operations inside."""
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

    def _clear(self, vector: Any) -> NDArray[Any]:
        vector = np.ascontiguousarray(np.atleast_1d(vector), np.complex128)
        if vector.ndim != 1 or self.slots % len(vector):
            raise CompilationError(f"a clear vector of shape {vector.shape} does not divide {self.slots} slots")
        return vector


@dataclass(frozen=True, eq=False)
class Slots:
    """A slot vector of `CleartextSimulator`: complex128 values (slots,), and the levels used up."""

    values: NDArray[Any]
    depth: int = 0


class CleartextSimulator(SlotOps[Slots]):
    """Slot vectors in NumPy, exact to float64. It encrypts nothing.

    largest: the largest absolute value at each depth; it must fit the modulus that is left there.
    """

    def __init__(self, slots: int):
        super().__init__(slots)
        self.largest: dict[int, float] = {}

    def load(self, values: Any, depth: int = 0) -> Slots:
        """An input, as a client would encrypt it."""
        values = np.asarray(values, np.complex128)
        if values.shape != (self.slots,):
            raise ValueError(f"an input has shape {values.shape}; wanted ({self.slots},)")
        return self._made(values, depth)

    def depth(self, x: Slots) -> int:
        return x.depth

    def _made(self, values: NDArray[Any], depth: int) -> Slots:
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

    def _add_plain(self, x: Slots, vector: NDArray[Any]) -> Slots:
        return self._made(x.values + self._repeat(vector), x.depth)

    def _sum_of_plaintext_products(self, xs: Sequence[Slots], vectors: Sequence[NDArray[Any]]) -> Slots:
        total = sum(x.values * self._repeat(vector) for x, vector in zip(xs, vectors, strict=True))
        return self._made(np.asarray(total), xs[0].depth + 1)

    def _sum_of_products(self, xs: Sequence[Slots], ys: Sequence[Slots]) -> Slots:
        total = sum(x.values * y.values for x, y in zip(xs, ys, strict=True))
        return self._made(np.asarray(total), xs[0].depth + 1)

    def _repeat(self, vector: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(vector, self.slots // len(vector))
