"""The interface between functions of numbers and the engines that run them on encrypted data.

A function is written once:

    function(ops, params, *inputs) -> tuple of arrays

`ops` (an `Ops`, or a `fhe.packing.SlotOps`) holds the few operations that engines do differently, `params` are clear
numbers known when the circuit is compiled, `inputs` are encrypted. A `Backend` turns one such function, or several that
share their keys, into a `Circuit`; a `Circuit` makes `Keys` and takes ciphertexts from client to server and back, as
bytes, one byte string an array. What a function returns may stay on the server and be handed to another one
(`Function.sources`): encrypted state, such as the keys and values of the tokens read so far. A backend says in `offers`
what it can do, so that an engine without integers or lookups fits the same interface.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

import numpy as np

from .errors import UnknownBackend

if TYPE_CHECKING:
    from .wire import Ports

Rounding = Literal["exact", "approximate", "none"]


@dataclass(frozen=True, eq=False)
class Table:
    """An integer function of one integer: `values[clip(((x + half) >> shift) - low, 0, n - 1)]`.

    `half` is 2**(shift - 1), or 0 where shift is 0: round half up, then saturate at the ends. Every namespace and
    every backend gives exactly this integer (a backend that rounds approximately says so in its report).

    values: integer array (n,), the results; low: the rounded input of the first entry; shift: how many low bits are
    rounded away before the lookup.
    """

    values: Any
    low: int = 0
    shift: int = 0

    @classmethod
    def build(cls, function: Callable[[np.ndarray], np.ndarray], low: int, high: int, shift: int = 0) -> "Table":
        """Tabulate a float function at the rounded inputs low..high (both included).

        `function` gets the input values `arange(low, high + 1) << shift` as float64 and gives as many float64
        results, which are rounded half to even (`np.rint`) and stored as int32.

        Raises ValueError for an empty range, a negative shift, or a result that is not finite or exceeds int32.
        """
        if high < low or shift < 0:
            raise ValueError(f"a table needs low <= high and shift >= 0; got low {low}, high {high}, shift {shift}")
        inputs = np.arange(low, high + 1, dtype=np.int64) << shift
        results = np.asarray(function(inputs.astype(np.float64)), np.float64)
        if results.shape != inputs.shape:
            raise ValueError(f"a table function must keep the shape: gave {results.shape} for {inputs.shape}")
        rounded = np.rint(results)
        limit = np.iinfo(np.int32)
        bad = ~np.isfinite(rounded) | (rounded < limit.min) | (rounded > limit.max)
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(f"the table of input {inputs[first]} is {results[first]}, which is not an int32")
        return cls(rounded.astype(np.int32), int(low), int(shift))

    def __call__(self, x: Any) -> np.ndarray:
        """Look up integers of any shape, in NumPy; int64 of the same shape."""
        values = np.asarray(self.values, np.int64)
        half = (1 << self.shift) >> 1
        index = ((np.asarray(x, np.int64) + half) >> self.shift) - self.low
        return values[np.clip(index, 0, len(values) - 1)]


class Ops(Protocol):
    """The operations handed to an integer function.

    Its arrays also take + - * (with arrays and numbers, clear or encrypted), slicing, `.shape`, `.sum(axis,
    keepdims)`, `.reshape(shape)` and `.transpose(axes)`.
    """

    def lookup(self, table: Table, x: Any) -> Any:
        """The table at every element of x; same shape."""
        ...

    def matmul(self, a: Any, b: Any) -> Any:
        """(..., m, k) @ (..., k, n) -> (..., m, n); either or both may be encrypted."""
        ...

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        """The largest element along an axis."""
        ...

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        """Arrays joined along an existing axis."""
        ...

    def tag(self, name: str) -> AbstractContextManager[Any]:
        """Names the stage that the operations inside belong to, for the cost report."""
        ...


@dataclass(frozen=True)
class Settings:
    """What may be chosen when a function is compiled.

    p_error: probability that one lookup gives a wrong result.
    rounding: how a Table's shift is done under encryption.
        "exact": one more small lookup per removed bit; the same integers as everywhere else.
        "approximate": free, but an input near a rounding boundary may land on the neighbouring entry.
        "none": the lookup is as wide as its input; the same integers, dear beyond 8 bits, impossible beyond 16.
    """

    p_error: float = 1e-5
    rounding: Rounding = "exact"

    def __post_init__(self):
        if not 0 < self.p_error < 1:
            raise ValueError(f"p_error must lie between 0 and 1, not {self.p_error}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, not {self.rounding!r}")


# Milliseconds per lookup by input bits, with the machine they were measured on: scripts/bench_lookup.py writes them.
# Beyond the table every bit costs as much more as the last one did.
LOOKUP_TIMES: dict[str, Any] = json.loads(Path(__file__).with_name("lookup_times.json").read_text(encoding="utf-8"))
MILLISECONDS_PER_LOOKUP = {int(bits): float(ms) for bits, ms in LOOKUP_TIMES["milliseconds"].items()}


class RunCost(Protocol):
    """What runs take, whatever an engine counts; costs of one engine can be added. Sizes are in bytes."""

    @property
    def input_ciphertext_bytes(self) -> int: ...

    @property
    def output_ciphertext_bytes(self) -> int: ...

    @property
    def estimated_run_seconds(self) -> float:
        """On the `machine`; its order of magnitude elsewhere."""
        ...

    @property
    def machine(self) -> str: ...

    @property
    def counts(self) -> dict[str, int]:
        """What is counted, by names that no two engines give to different things."""
        ...

    def describe(self) -> str:
        """The counts in a line."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        ...

    def __add__(self, other: Any) -> Any: ...


class CircuitReport(Protocol):
    """What every engine says of a circuit that it compiled. Sizes are in bytes, fields as in `Report`."""

    backend: str
    versions: dict[str, str]
    noise: str
    evaluation_key_bytes: int
    evaluation_key_source: str
    compile_seconds: float

    def cost_of(self, calls: Mapping[str, int]) -> RunCost:
        """What it takes to run functions so many times each, by name."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What it takes to run a function once: a `RunCost` of lookups. Sizes are 0 where a backend cannot know.

    pbs_by_stage: {stage: {input bits: lookups}}, where a product of two ciphertexts counts as its two lookups. A stage
    "compiler" holds, at 0 bits, what the engine's compiler added or, negative, merged away, so that all add up.
    max_integer_bits: of the widest integer anywhere.
    """

    pbs_by_stage: dict[str, dict[int, int]] = field(default_factory=dict)
    max_integer_bits: int = 0
    input_ciphertext_bytes: int = 0
    output_ciphertext_bytes: int = 0

    @property
    def pbs_by_bit_width(self) -> dict[int, int]:
        """{input bits: lookups} over all stages."""
        totals: dict[int, int] = {}
        for widths in self.pbs_by_stage.values():
            for bits, count in widths.items():
                totals[bits] = totals.get(bits, 0) + count
        return dict(sorted(totals.items()))

    @property
    def pbs_count(self) -> int:
        """All lookups."""
        return sum(self.pbs_by_bit_width.values())

    @property
    def max_bit_width(self) -> int:
        """Bits of the widest lookup input; 0 without lookups."""
        return max(self.pbs_by_bit_width, default=0)

    @property
    def estimated_run_seconds(self) -> float:
        """Seconds of one encrypted run on the machine of MILLISECONDS_PER_LOOKUP: its order of magnitude elsewhere."""
        widest = max(MILLISECONDS_PER_LOOKUP)
        growth = MILLISECONDS_PER_LOOKUP[widest] / MILLISECONDS_PER_LOOKUP[widest - 1]
        return sum(
            count * MILLISECONDS_PER_LOOKUP[min(max(bits, 1), widest)] * growth ** max(0, bits - widest) / 1000
            for bits, count in self.pbs_by_bit_width.items()
        )

    @property
    def machine(self) -> str:
        return LOOKUP_TIMES["machine"]

    @property
    def counts(self) -> dict[str, int]:
        by_width = {f"pbs_{bits}": count for bits, count in self.pbs_by_bit_width.items()}
        return {"pbs_count": self.pbs_count, "max_bit_width": self.max_bit_width} | by_width

    def describe(self) -> str:
        return f"{self.pbs_count:,} lookups of up to {self.max_bit_width} bits"

    def __add__(self, other: "Cost") -> "Cost":
        return total_cost({"": self, "other": other}, {"": 1, "other": 1})

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes, with the derived numbers; bit widths become strings."""
        data = {name: getattr(self, name) for name in Cost.__dataclass_fields__}
        data["pbs_by_stage"] = {
            stage: {str(bits): count for bits, count in sorted(widths.items())}
            for stage, widths in self.pbs_by_stage.items()
        }
        data["pbs_by_bit_width"] = {str(bits): count for bits, count in self.pbs_by_bit_width.items()}
        return data | {name: getattr(self, name) for name in ("pbs_count", "max_bit_width", "estimated_run_seconds")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        data = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        stages = data["pbs_by_stage"].items()
        data["pbs_by_stage"] = {stage: {int(bits): count for bits, count in by.items()} for stage, by in stages}
        return cls(**data)


def total_cost(functions: Mapping[str, Cost], calls: Mapping[str, int]) -> Cost:
    """What it takes to run functions so many times each, by name."""
    costs = [(functions[name], times) for name, times in calls.items()]
    stages: dict[str, dict[int, int]] = {}
    for cost, times in costs:
        for stage, widths in cost.pbs_by_stage.items():
            total = stages.setdefault(stage, {})
            for bits, count in widths.items():
                total[bits] = total.get(bits, 0) + times * count
    return Cost(
        pbs_by_stage=stages,
        max_integer_bits=max((cost.max_integer_bits for cost, _ in costs), default=0),
        input_ciphertext_bytes=sum(times * cost.input_ciphertext_bytes for cost, times in costs),
        output_ciphertext_bytes=sum(times * cost.output_ciphertext_bytes for cost, times in costs),
    )


@dataclass(frozen=True, kw_only=True)
class Report(Cost):
    """What a circuit costs: its functions one by one, and, in the fields of a `Cost`, each of them run once.

    Sizes are in bytes; 0 or None where a backend cannot know.
    evaluation_key_bytes: see evaluation_key_source: "compiler" (uncompressed, before keys exist) or "serialized"
    (what a client sends). All functions share one set of keys.
    noise: in words, how a decrypted result may differ from the function's; empty if only by p_error.
    """

    functions: dict[str, Cost]
    backend: str
    versions: dict[str, str]
    p_error: float
    rounding: str
    noise: str = ""
    complexity: float = 0.0
    global_p_error: float | None = None
    evaluation_key_bytes: int = 0
    evaluation_key_source: str = "compiler"
    secret_key_bytes: int = 0
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, functions: dict[str, Cost], **facts: Any) -> "Report":
        """The report of a circuit of these functions; `facts` are the fields that are no sums."""
        once = total_cost(functions, dict.fromkeys(functions, 1))
        return cls(functions=functions, **{name: getattr(once, name) for name in Cost.__dataclass_fields__}, **facts)

    def cost_of(self, calls: Mapping[str, int]) -> Cost:
        """What it takes to run functions so many times each, by name."""
        return total_cost(self.functions, calls)

    def to_json(self) -> dict[str, Any]:
        functions = {name: cost.to_json() for name, cost in self.functions.items()}
        return asdict(self) | super().to_json() | {"functions": functions}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        functions = {name: Cost.from_json(cost) for name, cost in data["functions"].items()}
        return replace(super().from_json(data), functions=functions)


class Keys(Protocol):
    """A client's keys for one circuit."""

    @property
    def evaluation(self) -> bytes:
        """What the server needs to compute; it cannot decrypt with it."""
        ...

    def save(self, path: str | Path) -> None:
        """Write all keys, the secret ones too, to a file only its owner can read (mode 0600)."""
        ...


class Circuit(Protocol):
    """Compiled functions. Everything between client and server is bytes, one byte string an array.

    Methods raise KeyMismatch where keys, arrays and circuit do not belong together; CircuitFormatError for damaged
    bytes or files, and for an array handed to where it does not belong (a result that no wire leads to this input,
    an input among results); NoWeights where the client's half is asked to compute; ValueError for an unknown
    function, for too many or too few arrays, and for inputs of another shape or range than the input set's.
    """

    @property
    def id(self) -> str:
        """Names the circuit: equal for a circuit and its saved copy, different for any other."""
        ...

    @property
    def report(self) -> Any:
        """A `CircuitReport`; from an engine of lookups, a `Report`."""
        ...

    @property
    def ports(self) -> "Ports":
        """The functions by name, and where arrays enter and leave them."""
        ...

    def simulate(self, name: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The backend's own simulation of one function on clear numbers, the inputs that are wired among them."""
        ...

    def make_keys(self, seed: int | None = None) -> Keys:
        """New keys, for all functions; a seed fixes the secret ones, which makes them insecure: for tests only."""
        ...

    def load_keys(self, path: str | Path) -> Keys: ...

    def encrypt(self, keys: Keys, name: str, *inputs: np.ndarray) -> list[bytes]:
        """The client's inputs of a function, in order and without the wired ones."""
        ...

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        """The server's part: a function's results from all its inputs, the client's and the wired ones.

        Any array may be used again, in any later run. Two threads may run at once.
        """
        ...

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[np.ndarray, ...]:
        """What some or all results of a function hold, in the order given."""
        ...

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write the circuit to a directory that `Backend.load` reads; made if missing.

        server: False writes the client's half alone, which makes keys, encrypts and decrypts. No weights are in it,
        and no code.
        """
        ...


FunctionBody = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Output:
    """One result of one of a circuit's functions."""

    function: str
    position: int = 0


@dataclass(frozen=True, eq=False)
class Function:
    """One of a circuit's functions.

    run: run(ops, params, *inputs) -> tuple of arrays.
    inputset: tuples of arrays, one array an input, the same shapes throughout. Widths follow from it, so it must
    reach the extremes that the circuit will meet, of what other functions hand over too: beyond them an encrypted
    result is undefined.
    sources: for every input, the results that the server may hand to it; none for an input that the client encrypts.
    Inputs beyond its end are the client's.
    """

    run: FunctionBody
    inputset: Sequence[tuple[np.ndarray, ...]]
    sources: Sequence[Sequence[Output]] = ()


class Backend(Protocol):
    """An engine. `offers` says what its circuits can do.

    "integers": functions take an `Ops`, and results are integers; "lookup": any function of one integer; "slots":
    functions take a `fhe.packing.SlotOps`; "exact": results equal NumPy's, up to p_error; "encrypted": the server
    learns nothing; "cores": one run uses all cores, where without it several circuits need a process each for that.
    """

    @property
    def name(self) -> str: ...

    @property
    def offers(self) -> frozenset[str]: ...

    def version(self) -> str:
        """Of the library beneath, for reports and caches."""
        ...

    def compile(self, functions: Mapping[str, Function], params: Any, settings: Settings) -> Circuit:
        """Compile functions that share keys and params, and hand each other their results.

        functions: by name, a Python identifier, written for the operations that the engine offers. params: whatever
        they take, with NumPy arrays as leaves. settings: of lookups; an engine without any leaves them aside.

        Raises CompilationError, or ValueError for functions that do not fit together (see `check_functions`).
        """
        ...

    def load(self, directory: str | Path) -> Circuit:
        """A saved circuit, or the client's half of one, whichever is there. Raises CircuitFormatError.

        The server's half holds code: load only what you trust.
        """
        ...


def check_functions(functions: Mapping[str, Function]) -> dict[str, Function]:
    """The functions with their input sets as lists of tuples of arrays, and one tuple of sources for every input.

    Raises ValueError for no function, a name that is no identifier, an input set that is empty or of uneven shapes,
    more sources than inputs, or a source that is no function.
    """
    if not functions:
        raise ValueError("a circuit needs a function")
    checked = {}
    for name, function in functions.items():
        if not name.isidentifier():
            raise ValueError(f"a function's name must be an identifier, not {name!r}")
        samples = [tuple(np.asarray(value) for value in sample) for sample in function.inputset]
        if not samples:
            raise ValueError(f"the input set of {name} is empty: a circuit's bit widths are taken from it")
        shapes = {tuple(value.shape for value in sample) for sample in samples}
        if len(shapes) != 1:
            raise ValueError(f"the input set of {name} mixes shapes: {sorted(shapes)}")
        free = len(samples[0]) - len(function.sources)
        if free < 0:
            raise ValueError(f"{name} has {len(samples[0])} inputs, and sources for {len(function.sources)}")
        sources = (*map(tuple, function.sources), *[()] * free)
        unknown = {source.function for group in sources for source in group} - set(functions)
        if unknown:
            raise ValueError(f"an input of {name} is wired to {', '.join(sorted(unknown))}, which is no function")
        checked[name] = Function(function.run, samples, sources)
    return checked


@dataclass
class _Registry:
    factories: dict[str, Callable[[], Backend]] = field(default_factory=dict)


_registry = _Registry()


def register_backend(name: str, factory: Callable[[], Backend], replace: bool = False) -> None:
    """Make `get_backend(name)` give `factory()`. ValueError if the name is taken, unless replace."""
    if name in _registry.factories and not replace:
        raise ValueError(f"a backend named {name!r} exists already; pass replace=True to replace it")
    _registry.factories[name] = factory


def get_backend(name: str) -> Backend:
    """The backend of a name. UnknownBackend, or BackendUnavailable if its library is not installed."""
    if name not in _registry.factories:
        raise UnknownBackend(f"unknown backend {name!r}; known: {', '.join(backends())}")
    return _registry.factories[name]()


def backends() -> tuple[str, ...]:
    """The names of all registered backends, installed or not."""
    return tuple(sorted(_registry.factories))
