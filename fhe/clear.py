"""The clear backend: the interface of an encrypted run, on plain integers. **It encrypts nothing.**

It needs NumPy only. With it everything around a circuit can be tested, and its report counts what the same function
would cost on Concrete: lookups and products of ciphertexts by stage, with bit widths taken from the input set.
"""

import hashlib
import io
import json
import pickle
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import wire
from .backend import Cost, Function, FunctionBody, Keys, Report, Settings, Table, check_functions
from .errors import CircuitFormatError, CompilationError, KeyMismatch, NoWeights

FORMAT = 1

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


class _Extremes(NumpyOps):
    """`NumpyOps` that notes which rows hold the extremes of every lookup's input."""

    def __init__(self):
        self.rows: set[int] = set()

    def note(self, x: np.ndarray) -> None:
        for flat in (int(x.argmin()), int(x.argmax())):
            self.rows.add(int(np.unravel_index(flat, x.shape)[0]))

    def lookup(self, table: Table, x: Any) -> Any:
        self.note(x)
        return table(x)


def extreme_samples(function: FunctionBody, params: Any, inputs: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """An input set, out of very many samples, that reaches their extremes.

    function: works on rows that do not meet (leading axis N); inputs: arrays (N, ...).

    Returns samples (1, ...) that hold the least and the greatest of every input, of all that is looked up, and of
    every result.
    """
    inputs = [np.asarray(x, np.int64) for x in inputs]
    extremes = _Extremes()
    for array in (*inputs, *function(extremes, params, *inputs)):
        extremes.note(array)
    return [tuple(x[row : row + 1] for x in inputs) for row in sorted(extremes.rows)]


def _range(x: np.ndarray) -> tuple[int, int]:
    return int(x.min()), int(x.max())


def _hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


def observe(functions: Mapping[str, Function], params: Any) -> tuple[dict[str, Observer], wire.Ports]:
    """Run checked functions on their input sets, as int64: what each costs, the range of every lookup's input, and
    where its arrays come from.

    Raises ValueError for a wire from a result that does not exist or has another shape than its input.
    """
    observers, shapes = {}, {}
    for name, function in functions.items():
        observers[name] = observer = Observer()
        for sample in function.inputset:
            observer.start_sample()
            results = function.run(observer, params, *(observer.mark(np.asarray(x, np.int64)) for x in sample))
        shapes[name] = [np.shape(result) for result in results]
    for name, function in functions.items():
        for position, (sources, x) in enumerate(zip(function.sources, function.inputset[0], strict=True)):
            for source in sources:
                given = shapes[source.function][source.position : source.position + 1]
                if given != [x.shape]:
                    raise ValueError(
                        f"input {position} of {name} has shape {x.shape}; output {source.position} of"
                        f" {source.function}, which is wired to it, {f'has {given[0]}' if given else 'does not exist'}"
                    )
    ports = {name: wire.Port(tuple(map(tuple, f.sources)), len(shapes[name])) for name, f in functions.items()}
    return observers, wire.Ports(ports)


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

    Every width in a circuit has evaluation keys of its own, a third of those of a head. A lookup of four bits takes but
    a twentieth less time than one of five (`MILLISECONDS_PER_LOOKUP`), so it is laid out as one of five.
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


Shapes = dict[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class ClearCircuit:
    """Functions and their parameters. `encrypt` only writes the integers down: **anyone can read them**.

    shapes: of every input of every function. functions: None in the client's half, whose params are None too.
    """

    id: str
    report: Report
    shapes: Shapes
    ports: wire.Ports
    functions: dict[str, FunctionBody] | None = None
    params: Any = None

    def simulate(self, name: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        wire.check_count(f"the inputs of {name}", len(inputs), len(self.ports[name].sources))
        self._check_shapes(name, range(len(inputs)), inputs)
        if self.functions is None:
            raise _no_weights()
        outputs = self.functions[name](NumpyOps(), self.params, *(np.asarray(value, np.int64) for value in inputs))
        return tuple(np.asarray(value, np.int64) for value in outputs)

    def make_keys(self, seed: int | None = None) -> ClearKeys:
        return ClearKeys(self.id, secrets.token_hex(16) if seed is None else f"{seed:032x}")

    def load_keys(self, path: str | Path) -> ClearKeys:
        return ClearKeys(self.id, wire.unpack(wire.read_file(path, "keys"), "keys", self.id).keys)

    def encrypt(self, keys: Keys, name: str, *inputs: np.ndarray) -> list[bytes]:
        key_id = self._id_of(keys)
        positions = self.ports[name].client_inputs
        wire.check_count(f"the client's inputs of {name}", len(inputs), len(positions))
        self._check_shapes(name, positions, inputs)
        return self.ports.pack_inputs(name, self.id, key_id, [_to_bytes(value) for value in inputs])

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        key_id = wire.unpack(evaluation_keys, "evaluation keys", self.id).keys
        inputs = self.ports.unpack_inputs(name, self.id, key_id, arrays)
        outputs = self.simulate(name, *map(_from_bytes, inputs))
        return self.ports.pack_outputs(name, self.id, key_id, [_to_bytes(value) for value in outputs])

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[np.ndarray, ...]:
        results = self.ports.unpack_outputs(name, self.id, self._id_of(keys), arrays)
        return tuple(_from_bytes(part) for _, part in results)

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write `circuit.json`, all that a client needs, and `server.bin`, which holds the functions' parameters."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "id": self.id, "shapes": self.shapes, "ports": self.ports.to_json()}
        (directory / "circuit.json").write_text(json.dumps(content | {"report": self.report.to_json()}, indent=1))
        if server:
            if self.functions is None:
                raise _no_weights()
            try:
                data = pickle.dumps((self.functions, self.params))
            except (pickle.PicklingError, AttributeError) as error:
                raise CompilationError(f"a clear circuit is saved with its functions' names: {error}") from error
            (directory / "server.bin").write_bytes(wire.pack("clear circuit", self.id, "", [data]))

    def _check_shapes(self, name: str, positions: Iterable[int], inputs: Sequence[np.ndarray]) -> None:
        shapes = [self.shapes[name][position] for position in positions]
        if [np.shape(value) for value in inputs] != shapes:
            raise ValueError(f"{name} has inputs of shapes {[np.shape(value) for value in inputs]}; wanted {shapes}")

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

    def compile(self, functions: Mapping[str, Function], params: Any, settings: Settings) -> ClearCircuit:
        start = time.perf_counter()
        functions = check_functions(functions)
        observers, ports = observe(functions, params)
        report = Report.of(
            {
                name: Cost(
                    pbs_by_stage=count_lookups(observer.sites, settings.rounding), max_integer_bits=observer.largest
                )
                for name, observer in observers.items()
            },
            backend=self.name,
            versions={"numpy": np.__version__},
            p_error=0.0,
            rounding=settings.rounding,
            noise="none: nothing is encrypted, and rounding is exact",
            compile_seconds=time.perf_counter() - start,
        )
        shapes = {name: tuple(value.shape for value in f.inputset[0]) for name, f in functions.items()}
        names = {name: getattr(function.run, "__qualname__", "") for name, function in functions.items()}
        identity = hashlib.sha256(pickle.dumps((names, params, shapes, ports, settings))).hexdigest()
        bodies = {name: function.run for name, function in functions.items()}
        return ClearCircuit(identity, report, shapes, ports, bodies, params)

    def load(self, directory: str | Path) -> ClearCircuit:
        directory = Path(directory)
        try:
            content = json.loads(wire.read_file(directory / "circuit.json", "circuit"))
            if content["format"] != FORMAT:
                raise CircuitFormatError(f"the circuit in {directory} has format {content['format']}, not {FORMAT}")
            shapes = {name: tuple(map(tuple, inputs)) for name, inputs in content["shapes"].items()}
            report, ports = Report.from_json(content["report"]), wire.Ports.from_json(content["ports"])
            half = ClearCircuit(content["id"], report, shapes, ports)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
        if not (directory / "server.bin").exists():
            return half
        data = wire.read_file(directory / "server.bin", "clear circuit")
        (code,) = wire.unpack(data, "clear circuit", half.id, parts=1).parts
        try:
            functions, params = pickle.loads(code)
        except Exception as error:
            raise CircuitFormatError(f"the circuit in {directory} needs code that is not here: {error}") from error
        return replace(half, functions=functions, params=params)


def _no_weights() -> NoWeights:
    return NoWeights("this circuit was loaded without its weights: it can encrypt and decrypt only")


def _to_bytes(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value, np.int64), allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> np.ndarray:
    try:
        value = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # what NumPy's reader raises on bytes that are no array is not one kind
        raise CircuitFormatError(f"these bytes are no array: {' '.join(str(error).split()):.80}") from None
    if not isinstance(value, np.ndarray) or value.dtype != np.int64:
        raise CircuitFormatError("these bytes are no array of int64")
    return value
