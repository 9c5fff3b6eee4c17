"""Tracing of integer functions on their input sets: every lookup and product, with the range of its inputs."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fhe.backend import Function, FunctionBody
from fhe.signatures import Signature, Signatures
from fhe.tfhe.tables import LookupTable, NumpyOps

UNTAGGED = "untagged"


@dataclass
class OperationRecord:
    """One operation of a function, with ranges over the whole input set.

    kind: "lookup", "product" of two encrypted arrays, or "join" (a concatenation, which costs nothing).
    count: number of elements or products.
    inputs: (least, greatest) input; for a product, of a + b and of a - b.
    results: (least, greatest) result of a lookup.
    shift: bits that a lookup rounds away first.
    """

    kind: str
    stage: str
    count: int
    inputs: tuple[int, int]
    results: tuple[int, int] = (0, 0)
    shift: int = 0


class _Encrypted(np.ndarray[Any, Any]):
    """Marks arrays that depend on an input: NumPy keeps a subclass through arithmetic, slicing and reshaping."""

    tracer: "RangeTracer | None" = None

    def __array_finalize__(self, source: Any) -> None:
        self.tracer = getattr(source, "tracer", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc in (np.multiply, np.matmul) and all(isinstance(value, _Encrypted) for value in inputs):
            assert self.tracer is not None
            self.tracer.product(ufunc, np.asarray(inputs[0]), np.asarray(inputs[1]))
        kwargs.pop("out", None)  # x += y makes a new array, as with Concrete's tracer
        plain: list[Any] = [np.asarray(value) if isinstance(value, _Encrypted) else value for value in inputs]
        result = getattr(ufunc, method)(*plain, **kwargs)
        return self.tracer.mark(result) if self.tracer is not None else result


class RangeTracer(NumpyOps):
    """`NumpyOps` that also records operations, in order of execution.

    largest: bits of the widest integer.
    """

    def __init__(self) -> None:
        self.records: list[OperationRecord] = []
        self.largest = 0
        self._next = 0
        self._stages: list[str] = []

    def start_sample(self) -> None:
        """Begin another run of the same function, on another sample."""
        self._next = 0

    def mark(self, x: Any) -> Any:
        """x as an encrypted array."""
        x = np.asarray(x)
        self.largest = max(self.largest, signed_bits(*_range(x)))
        x = x.view(_Encrypted)
        x.tracer = self
        return x

    def lookup(self, table: LookupTable, x: Any) -> Any:
        return self.univariate(table, int(table.shift), x)

    def univariate(self, function: Callable[[Any], NDArray[Any]], shift: int, x: Any) -> Any:
        """function(x), an integer function of x with its lowest `shift` bits rounded away, as one lookup each."""
        if not isinstance(x, _Encrypted):
            return function(x)
        values: NDArray[Any] = np.asarray(x)
        results = function(values)
        self._note("lookup", values.size, _range(values), _range(results), shift)
        return self.mark(results)

    def product(self, ufunc: np.ufunc, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Record a * b or a @ b of encrypted arrays."""
        size = ufunc(a, b).size * (a.shape[-1] if ufunc is np.matmul else 1)
        self._note("product", size, product_range(_range(a), _range(b)))

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        return maximum_by_lookups(self, x, axis, keepdims)

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        joined = np.concatenate([np.asarray(array) for array in arrays], axis=axis)
        self._note("join", joined.size, _range(joined))
        return self.mark(joined)

    @contextmanager
    def tag(self, name: str) -> Generator[None, None, None]:
        self._stages.append(name)
        try:
            yield
        finally:
            self._stages.pop()

    def _note(
        self, kind: str, count: int, inputs: tuple[int, int], results: tuple[int, int] = (0, 0), shift: int = 0
    ) -> None:
        stage = ".".join(self._stages) or UNTAGGED
        if self._next == len(self.records):
            self.records.append(OperationRecord(kind, stage, count, inputs, results, shift))
        record = self.records[self._next]
        if (record.kind, record.stage, record.count) != (kind, stage, count):
            raise ValueError(f"stage {stage}: the operations of the function depend on its inputs")
        record.inputs, record.results = _hull(record.inputs, inputs), _hull(record.results, results)
        self._next += 1


class _Extremes(NumpyOps):
    """`NumpyOps` that notes the rows with the extremes of every lookup's input."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def note(self, x: NDArray[Any]) -> None:
        for flat in (int(x.argmin()), int(x.argmax())):
            self.rows.add(int(np.unravel_index(flat, x.shape)[0]))

    def lookup(self, table: LookupTable, x: Any) -> Any:
        self.note(x)
        return table(x)


def extreme_samples(
    function: FunctionBody, params: Any, inputs: Sequence[NDArray[Any]]
) -> list[tuple[NDArray[Any], ...]]:
    """A small input set that reaches the extremes of very many samples.

    function: treats rows (leading axis N) independently. inputs: arrays (N, ...).

    Returns samples (1, ...) with the least and the greatest value of every input, of every lookup's input, and of every
    result.
    """
    inputs = [np.asarray(x, np.int64) for x in inputs]
    extremes = _Extremes()
    for array in (*inputs, *function(extremes, params, *inputs)):
        extremes.note(array)
    return [tuple(x[row : row + 1] for x in inputs) for row in sorted(extremes.rows)]


def _range(x: NDArray[Any]) -> tuple[int, int]:
    return int(x.min()), int(x.max())


def _hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


def trace(functions: Mapping[str, Function], params: Any) -> tuple[dict[str, RangeTracer], Signatures]:
    """Run functions on their input sets, as int64.

    functions: as `check_functions` returns them. Returns their tracers, by name, and signatures.

    Raises ValueError for a source that does not exist or has another shape than its input.
    """
    tracers: dict[str, RangeTracer] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, function in functions.items():
        tracers[name] = tracer = RangeTracer()
        for sample in function.inputset:
            tracer.start_sample()
            results = function.run(tracer, params, *(tracer.mark(np.asarray(x, np.int64)) for x in sample))
            shapes[name] = [np.shape(result) for result in results]
    for name, function in functions.items():
        for position, (sources, x) in enumerate(zip(function.sources, function.inputset[0], strict=True)):
            for source in sources:
                given = shapes[source.function][source.position : source.position + 1]
                if given != [x.shape]:
                    raise ValueError(
                        f"input {position} of {name} has shape {x.shape}; its source, output {source.position} of"
                        f" {source.function}, {f'has {given[0]}' if given else 'does not exist'}"
                    )
    signatures = {name: Signature(tuple(map(tuple, f.sources)), len(shapes[name])) for name, f in functions.items()}
    return tracers, Signatures(signatures)


def product_range(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[int, int]:
    """The range of a + b and a - b, whose squares give the product ab. a, b: (least, greatest)."""
    return int(min(a[0] + b[0], a[0] - b[1])), int(max(a[1] + b[1], a[1] - b[0]))


def signed_bits(low: int, high: int) -> int:
    """Bits for integers low..high: two's complement if low is negative, else unsigned; at least 1."""
    return max(1, (max(high, -low - 1)).bit_length() + (low < 0))


def maximum_by_lookups(ops: Any, x: Any, axis: int, keepdims: bool) -> Any:
    """The maximum along an axis, as a knockout of max(a, b) = b + relu(a - b): one lookup per comparison."""
    axis %= len(x.shape)

    def part(start: int, stop: int) -> Any:
        return x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(x.shape)))]

    while (size := x.shape[axis]) > 1:
        first, second, rest = part(0, size // 2), part(size // 2, size // 2 * 2), part(size // 2 * 2, size)
        winners = second + ops.univariate(_relu, 0, first - second)
        x = ops.concatenate((winners, rest), axis) if size % 2 else winners
    return x if keepdims else x.reshape(x.shape[:axis] + x.shape[axis + 1 :])


def _relu(x: Any) -> NDArray[Any]:
    return np.maximum(np.asarray(x, np.int64), 0)


def lookup_slots(low: int, high: int, shift: int, rounding: str) -> tuple[int, int]:
    """The entries of a lookup of inputs low..high: (first rounded input, bits), for 2**bits entries from the first.

    Approximate rounding leaves half a step free at both ends, because noise that pushes an input past an end would give
    a wrong result, not a neighbouring one. Spare entries are divided between both ends.

    Four bits become five: every width in a circuit needs its own evaluation keys, and a lookup of four bits takes only
    a twentieth less time than one of five (`MILLISECONDS_PER_LOOKUP`).
    """
    if rounding == "none":
        shift = 0
    step = 1 << shift
    first = low >> shift
    last = -(-high >> shift) if rounding == "approximate" else (high + step // 2) >> shift
    bits = max(1, (last - first).bit_length())
    bits = 5 if bits == 4 else bits
    spare = (1 << bits) - 1 - (last - first)
    return first - spare // 2, bits


def count_lookups(records: Iterable[OperationRecord], rounding: str) -> dict[str, dict[int, int]]:
    """{stage: {bits: lookups}} of records on Concrete. Bits are estimates."""
    stages: dict[str, dict[int, int]] = {}

    def add(stage: str, bits: int, count: int) -> None:
        widths = stages.setdefault(stage, {})
        widths[bits] = widths.get(bits, 0) + count

    for record in records:
        if record.kind == "product":
            add(record.stage, signed_bits(*record.inputs), 2 * record.count)
        elif record.kind == "lookup":
            add(record.stage, lookup_slots(*record.inputs, record.shift, rounding)[1], record.count)
            if rounding == "exact" and record.shift:
                add(record.stage, 1, record.count * record.shift)
    return stages
