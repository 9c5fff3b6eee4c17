"""The clear backend: the interface of an encrypted run, on plain integers. **It encrypts nothing.**

It needs NumPy only. With it everything around a circuit can be tested, and its report counts what the same function
would cost on Concrete: lookups and products of ciphertexts by stage, with bit widths taken from the input set.
"""

import hashlib
import io
import pickle
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import wire
from .backend import IntegerFunction, Keys, Report, Settings, Table, check_inputset
from .errors import CircuitFormatError, CompilationError, KeyMismatch

UNTAGGED = "untagged"


class NumpyOps:
    """`Ops` on NumPy arrays of int64."""

    def lookup(self, table: Table, x: Any) -> Any:
        return table(x)

    def matmul(self, a: Any, b: Any) -> Any:
        return np.matmul(a, b)

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        return np.max(x, axis=axis, keepdims=keepdims)

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        return np.concatenate(tuple(arrays), axis=axis)

    @contextmanager
    def tag(self, name: str) -> Iterator[None]:
        yield


@dataclass
class Site:
    """One operation of a function, as an input set saw it.

    kind: "lookup", "product" of two encrypted arrays, or "join" (a concatenation, which costs nothing); count: how
    many elements or products; inputs: the least and the greatest input (of a product: of a + b and of a - b);
    results: the least and the greatest result (of a lookup); shift: bits a lookup rounds away first.
    """

    kind: str
    stage: str
    count: int
    inputs: tuple[int, int]
    results: tuple[int, int] = (0, 0)
    shift: int = 0


class _Encrypted(np.ndarray):
    """Marks what derives from an input: NumPy hands a subclass on through arithmetic, slicing and reshaping."""

    observer: "Observer | None" = None

    def __array_finalize__(self, source: Any) -> None:
        self.observer = getattr(source, "observer", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc in (np.multiply, np.matmul) and all(isinstance(value, _Encrypted) for value in inputs):
            assert self.observer is not None
            self.observer.product(ufunc, np.asarray(inputs[0]), np.asarray(inputs[1]))
        kwargs.pop("out", None)  # x += y names a new array, as it does for tracers
        plain = [np.asarray(value) if isinstance(value, _Encrypted) else value for value in inputs]
        result = getattr(ufunc, method)(*plain, **kwargs)
        return self.observer.mark(result) if self.observer is not None else result


class Observer(NumpyOps):
    """`NumpyOps` that also notes every `Site`, in order of execution."""

    def __init__(self):
        self.sites: list[Site] = []
        self.largest = 0
        self._next = 0
        self._stages: list[str] = []

    def start_sample(self) -> None:
        """The same function begins anew, on another sample."""
        self._next = 0

    def mark(self, x: Any) -> Any:
        """x as an encrypted array."""
        x = np.asarray(x)
        self.largest = max(self.largest, signed_bits(*_range(x)))
        x = x.view(_Encrypted)
        x.observer = self
        return x

    def lookup(self, table: Table, x: Any) -> Any:
        return self.univariate(table, int(table.shift), x)

    def univariate(self, function: Callable[[Any], np.ndarray], shift: int, x: Any) -> Any:
        """function(x), an integer function of x with its lowest `shift` bits rounded away, as one lookup each."""
        if not isinstance(x, _Encrypted):
            return function(x)
        x = np.asarray(x)
        results = function(x)
        self._note("lookup", x.size, _range(x), _range(results), shift)
        return self.mark(results)

    def product(self, ufunc: np.ufunc, a: np.ndarray, b: np.ndarray) -> None:
        """Note a * b or a @ b of encrypted arrays."""
        size = ufunc(a, b).size * (a.shape[-1] if ufunc is np.matmul else 1)
        self._note("product", size, product_range(_range(a), _range(b)))

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        return maximum_by_lookups(self, x, axis, keepdims)

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        joined = np.concatenate([np.asarray(array) for array in arrays], axis=axis)
        self._note("join", joined.size, _range(joined))
        return self.mark(joined)

    @contextmanager
    def tag(self, name: str) -> Iterator[None]:
        self._stages.append(name)
        try:
            yield
        finally:
            self._stages.pop()

    def _note(
        self, kind: str, count: int, inputs: tuple[int, int], results: tuple[int, int] = (0, 0), shift: int = 0
    ) -> None:
        stage = ".".join(self._stages) or UNTAGGED
        if self._next == len(self.sites):
            self.sites.append(Site(kind, stage, count, inputs, results, shift))
        site = self.sites[self._next]
        if (site.kind, site.stage, site.count) != (kind, stage, count):
            raise ValueError(f"stage {stage}: the function takes another path for another input")
        site.inputs, site.results = _hull(site.inputs, inputs), _hull(site.results, results)
        self._next += 1


def _range(x: np.ndarray) -> tuple[int, int]:
    return int(x.min()), int(x.max())


def _hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


def observe(function: IntegerFunction, params: Any, samples: list[tuple[np.ndarray, ...]]) -> Observer:
    """Run a function on samples and note what it costs and the range of every lookup's input."""
    observer = Observer()
    for sample in samples:
        observer.start_sample()
        function(observer, params, *(observer.mark(value) for value in sample))
    return observer


def product_range(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[int, int]:
    """The range of a + b and a - b, whose squares make a product, of two (least, greatest)."""
    return int(min(a[0] + b[0], a[0] - b[1])), int(max(a[1] + b[1], a[1] - b[0]))


def signed_bits(low: int, high: int) -> int:
    """Bits of an integer between low and high: two's complement if low is negative, else unsigned; at least 1."""
    return max(1, (max(high, -low - 1)).bit_length() + (low < 0))


def maximum_by_lookups(ops: Any, x: Any, axis: int, keepdims: bool) -> Any:
    """The largest element along an axis, as a knockout of max(a, b) = b + relu(a - b): one lookup per comparison."""
    axis %= len(x.shape)

    def part(start: int, stop: int) -> Any:
        return x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(x.shape)))]

    while (size := x.shape[axis]) > 1:
        first, second, rest = part(0, size // 2), part(size // 2, size // 2 * 2), part(size // 2 * 2, size)
        winners = second + ops.univariate(_relu, 0, first - second)
        x = ops.concatenate((winners, rest), axis) if size % 2 else winners
    return x if keepdims else x.reshape(x.shape[:axis] + x.shape[axis + 1 :])


def _relu(x: Any) -> np.ndarray:
    return np.maximum(np.asarray(x, np.int64), 0)


def lookup_slots(low: int, high: int, shift: int, rounding: str) -> tuple[int, int]:
    """How a lookup of inputs low..high is laid out: (first rounded input, bits), 2**bits entries from the first.

    Rounding approximately leaves half a step free at both ends, because noise that pushed an input past either end
    would give a wrong result, not a neighbouring one. Entries to spare are shared between both ends.
    """
    if rounding == "none":
        shift = 0
    step = 1 << shift
    first = low >> shift
    last = -(-high >> shift) if rounding == "approximate" else (high + step // 2) >> shift
    bits = max(1, (last - first).bit_length())
    spare = (1 << bits) - 1 - (last - first)
    return first - spare // 2, bits


def count_lookups(sites: Iterable[Site], rounding: str) -> dict[str, dict[int, int]]:
    """{stage: {bits: lookups}} as Concrete would charge for sites; bits are estimates."""
    stages: dict[str, dict[int, int]] = {}

    def add(stage: str, bits: int, count: int) -> None:
        widths = stages.setdefault(stage, {})
        widths[bits] = widths.get(bits, 0) + count

    for site in sites:
        if site.kind == "product":
            add(site.stage, signed_bits(*site.inputs), 2 * site.count)
        elif site.kind == "lookup":
            add(site.stage, lookup_slots(*site.inputs, site.shift, rounding)[1], site.count)
            if rounding == "exact" and site.shift:
                add(site.stage, 1, site.count * site.shift)
    return stages


@dataclass(frozen=True)
class ClearKeys:
    """No keys at all: an id, so that mixing up clients is noticed here as it would be there."""

    circuit: str
    id: str

    @property
    def evaluation(self) -> bytes:
        return wire.pack("evaluation keys", self.circuit, self.id, [])

    def save(self, path: str | Path) -> None:
        wire.write_private(path, wire.pack("keys", self.circuit, self.id, []))


@dataclass(frozen=True)
class ClearCircuit:
    """A function and its parameters. `encrypt` only writes the integers down: **anyone can read them**."""

    id: str
    report: Report
    function: IntegerFunction
    params: Any
    shapes: tuple[tuple[int, ...], ...]

    def simulate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        if tuple(np.shape(value) for value in inputs) != self.shapes:
            raise ValueError(f"inputs of shapes {[np.shape(value) for value in inputs]}; wanted {list(self.shapes)}")
        outputs = self.function(NumpyOps(), self.params, *(np.asarray(value, np.int64) for value in inputs))
        return tuple(np.asarray(value, np.int64) for value in outputs)

    def make_keys(self, seed: int | None = None) -> ClearKeys:
        return ClearKeys(self.id, secrets.token_hex(16) if seed is None else f"{seed:032x}")

    def load_keys(self, path: str | Path) -> ClearKeys:
        return ClearKeys(self.id, wire.unpack(wire.read_file(path, "keys"), "keys", self.id)[0])

    def encrypt(self, keys: Keys, *inputs: np.ndarray) -> bytes:
        key_id = self._id_of(keys)
        return wire.pack("ciphertexts", self.id, key_id, [_to_bytes(value) for value in inputs])

    def run(self, ciphertexts: bytes, evaluation_keys: bytes) -> bytes:
        key_id, _ = wire.unpack(evaluation_keys, "evaluation keys", self.id)
        _, parts = wire.unpack(ciphertexts, "ciphertexts", self.id, key_id)
        outputs = self.simulate(*(_from_bytes(part) for part in parts))
        return wire.pack("results", self.id, key_id, [_to_bytes(value) for value in outputs])

    def decrypt(self, keys: Keys, ciphertexts: bytes) -> tuple[np.ndarray, ...]:
        _, parts = wire.unpack(ciphertexts, "results", self.id, self._id_of(keys))
        return tuple(_from_bytes(part) for part in parts)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            content = pickle.dumps((self.report, self.function, self.params, self.shapes))
        except (pickle.PicklingError, AttributeError) as error:
            raise CompilationError(f"a clear circuit is saved with its function's name: {error}") from error
        (directory / "circuit.bin").write_bytes(wire.pack("clear circuit", "", "", [self.id.encode(), content]))

    def _id_of(self, keys: Keys) -> str:
        if not isinstance(keys, ClearKeys):
            raise KeyMismatch(f"these are {type(keys).__name__}, not keys of the clear backend")
        wire.check_circuit("keys", keys.circuit, self.id)
        return keys.id


class ClearBackend:
    """Plain integers in NumPy; no encryption."""

    name = "clear"
    offers = frozenset({"integers", "lookup", "exact"})

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def compile(
        self, function: IntegerFunction, params: Any, inputset: Iterable[tuple[np.ndarray, ...]], settings: Settings
    ) -> ClearCircuit:
        start = time.perf_counter()
        samples = check_inputset(inputset)
        observer = observe(function, params, samples)
        stages = count_lookups(observer.sites, settings.rounding)
        widths = [bits for stage in stages.values() for bits in stage]
        report = Report(
            backend=self.name,
            versions={"numpy": np.__version__},
            p_error=0.0,
            rounding=settings.rounding,
            pbs_count=sum(count for stage in stages.values() for count in stage.values()),
            max_bit_width=max(widths, default=0),
            max_integer_bits=observer.largest,
            pbs_by_stage=stages,
            noise="none: nothing is encrypted, and rounding is exact",
            compile_seconds=time.perf_counter() - start,
        )
        shapes = tuple(value.shape for value in samples[0])
        name = getattr(function, "__qualname__", repr(function))
        identity = hashlib.sha256(pickle.dumps((name, params, shapes, settings))).hexdigest()
        return ClearCircuit(identity, report, function, params, shapes)

    def load(self, directory: str | Path) -> ClearCircuit:
        data = wire.read_file(Path(directory) / "circuit.bin", "clear circuit")
        _, (identity, content) = wire.unpack(data, "clear circuit", "")
        try:
            report, function, params, shapes = pickle.loads(content)
        except Exception as error:
            raise CircuitFormatError(f"the circuit in {directory} needs code that is not here: {error}") from error
        return ClearCircuit(identity.decode(), report, function, params, shapes)


def _to_bytes(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value, np.int64), allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
