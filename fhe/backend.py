"""The interface between functions of numbers and the engines that run them on encrypted data.

A function is written once:

    function(ops, params, *inputs) -> tuple of arrays

`ops` (a `fhe.tfhe.tables.Ops`, or a `fhe.ckks.slots.SlotOps`) holds the few operations that engines do differently,
`params` are clear numbers known when the circuit is compiled, `inputs` are encrypted. A `Backend` turns one such
function, or several that share their keys, into a `Circuit`; a `Circuit` makes `Keys` and takes ciphertexts from client
to server and back, as bytes, one byte string an array. What a function returns may stay on the server and be handed to
another one (`Function.sources`): encrypted state. A backend says in `offers` what it can do, so that an engine without
integers or lookups fits the same interface.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from fhe.signatures import Output, Signatures

Rounding = Literal["exact", "approximate", "none"]


@dataclass(frozen=True)
class FHEConfig:
    """What may be chosen when a function is compiled.

    p_error: probability that one lookup gives a wrong result.
    rounding: how a LookupTable's shift is done under encryption.
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
    def signatures(self) -> Signatures:
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
    functions take a `fhe.ckks.slots.SlotOps`; "exact": results equal NumPy's, up to p_error; "encrypted": the
    server learns nothing; "cores": one run uses all cores, where without it several circuits need a process each for that.
    """

    @property
    def name(self) -> str: ...

    @property
    def offers(self) -> frozenset[str]: ...

    def version(self) -> str:
        """Of the library beneath, for reports and caches."""
        ...

    def compile(self, functions: Mapping[str, Function], params: Any, config: FHEConfig) -> Circuit:
        """Compile functions that share keys and params, and hand each other their results.

        functions: by name, a Python identifier, written for the operations that the engine offers. params: whatever
        they take, with NumPy arrays as leaves. config: of lookups; an engine without any leaves them aside.

        Raises CompilationError, or ValueError for functions that do not fit together (see `check_functions`).
        """
        ...

    def load(self, directory: str | Path, server: bool = True) -> Circuit:
        """A saved circuit, or the client's half of one, whichever is there. Raises CircuitFormatError.

        server: False loads the client's half alone, and opens no file of the server's, wherever it lies. The server's
        half holds code: load only what you trust.
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
