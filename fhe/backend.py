"""The interface between functions of numbers and the engines that run them on encrypted data.

A function is written once:

    function(ops, params, *inputs) -> tuple of arrays

`ops` (a `fhe.tfhe.tables.Ops` or a `fhe.ckks.slots.SlotOps`) has the operations that engines do differently. `params`
are clear numbers, known when the circuit is compiled. `inputs` are encrypted. A `Backend` compiles one such function,
or several that share their keys, to a `Circuit`. A `Circuit` makes `Keys`, encrypts, runs and decrypts; ciphertexts are
bytes, one byte string for each array. A result may stay on the server as the input of another function
(`Function.sources`): server state. `Backend.offers` says what an engine can do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from fhe.signatures import Output, Signatures

Rounding = Literal["exact", "approximate", "none"]


@dataclass(frozen=True)
class FHEConfig:
    """Options of compilation.

    p_error: probability that one lookup gives a wrong result, from 2**-128 on: below it, guessing a key is likelier.
    rounding: how the shift of a `LookupTable` is done under encryption.
        "exact": one more small lookup per removed bit; the same integers as everywhere else.
        "approximate": free, but an input near a rounding boundary may land on the neighbouring entry.
        "none": the lookup is as wide as its input; the same integers, slow beyond 8 bits, impossible beyond 16.
    """

    p_error: float = 1e-5
    rounding: Rounding = "exact"

    def __post_init__(self) -> None:
        if not 2.0**-128 <= self.p_error < 1:
            raise ValueError(f"p_error must lie between 2**-128 and 1, not {self.p_error}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, not {self.rounding!r}")


class RunCost(Protocol):
    """The cost of some runs, in the units of an engine. Costs of one engine can be added. Sizes are in bytes."""

    @property
    def input_ciphertext_bytes(self) -> int: ...

    @property
    def output_ciphertext_bytes(self) -> int: ...

    @property
    def estimated_run_seconds(self) -> float:
        """On the `machine`; an order of magnitude for others."""
        ...

    @property
    def machine(self) -> str: ...

    @property
    def counts(self) -> dict[str, int]:
        """Operations by name. No two engines use one name for different operations."""
        ...

    def describe(self) -> str:
        """The counts, in one line of text."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        ...

    def __add__(self, other: Any) -> Any: ...


class CircuitReport(Protocol):
    """What every engine reports about a circuit. Sizes are in bytes, fields as in `fhe.tfhe.cost.Report`."""

    backend: str
    versions: dict[str, str]
    noise: str
    evaluation_key_bytes: int
    evaluation_key_source: str
    compile_seconds: float

    def cost_of(self, calls: Mapping[str, int]) -> RunCost:
        """The cost of calling functions, {name: number of calls}."""
        ...

    def to_json(self) -> dict[str, Any]: ...


class Keys(Protocol):
    """A client's keys for one circuit."""

    @property
    def evaluation(self) -> bytes:
        """What the server needs to compute. It does not decrypt."""
        ...

    def save(self, path: str | Path) -> None:
        """Write all keys, secret ones included, to a file that only its owner can read (mode 0600)."""
        ...


class Circuit(Protocol):
    """Compiled functions. Everything between client and server is bytes, one byte string for each array.

    Methods raise
        KeyMismatch: keys, arrays and circuit do not belong together;
        CircuitFormatError: damaged bytes or files, or an array in the wrong place, such as a result that is not among
            the sources of this input;
        NoWeights: the client's half cannot compute;
        ValueError: an unknown function, a wrong number of arrays, or inputs of another shape or range than those of
            the input set.
    """

    @property
    def id(self) -> str:
        """Identifies the circuit: equal for a circuit and its saved copy, different for any other."""
        ...

    @property
    def report(self) -> Any:
        """A `CircuitReport`; from an engine of lookups, a `Report`."""
        ...

    @property
    def signatures(self) -> Signatures:
        """The inputs and outputs of every function."""
        ...

    def simulate(self, name: str, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The backend's own simulation of a function on clear numbers. Takes all inputs of the function."""
        ...

    def make_keys(self, seed: int | None = None) -> Keys:
        """New keys for all functions. A seed fixes the secret keys and makes them insecure: for tests only."""
        ...

    def load_keys(self, path: str | Path) -> Keys: ...

    def encrypt(self, keys: Keys, name: str, *inputs: NDArray[Any]) -> list[bytes]:
        """Encrypt those inputs of a function that the client provides, in order."""
        ...

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        """The server's part: all results of a function from all its inputs, in order.

        An array may be used again in any later run. Two threads may run at once.
        """
        ...

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[NDArray[Any], ...]:
        """Decrypt some or all results of a function, in the order given."""
        ...

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write the circuit to a directory for `Backend.load`; the directory is made if missing.

        server: False writes the client's half only: it makes keys, encrypts and decrypts, and holds no weights.
        """
        ...


FunctionBody = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Function:
    """One of a circuit's functions.

    run: run(ops, params, *inputs) -> tuple of arrays.
    inputset: samples, each a tuple with one array for each input; all samples have the same shapes. Bit widths are
        taken from it, so it must reach the extremes of every input, also of those that come from other functions.
        Beyond them an encrypted result is undefined.
    sources: for each input, the results that it may be; empty for an input that the client encrypts. Inputs beyond the
        end of `sources` are the client's.
    """

    run: FunctionBody
    inputset: Sequence[tuple[NDArray[Any], ...]]
    sources: Sequence[Sequence[Output]] = ()


class Backend(Protocol):
    """An engine. `offers` says what its circuits can do:

    "integers": functions take an `Ops`, and results are integers; "lookup": any function of one integer;
    "slots": functions take a `fhe.ckks.slots.SlotOps`; "exact": results equal NumPy's, up to p_error;
    "encrypted": the server learns nothing; "cores": one run uses all cores (without it, use a process for each core);
    "compiled": a saved circuit is machine code (without it, whoever runs it must have registered its functions).
    """

    @property
    def name(self) -> str: ...

    @property
    def offers(self) -> frozenset[str]: ...

    def version(self) -> str:
        """The version of the library, for reports and caches."""
        ...

    def compile(self, functions: Mapping[str, Function], params: Any, config: FHEConfig) -> Circuit:
        """Compile functions that share keys and params.

        functions: by name, a Python identifier. params: whatever the functions take, with NumPy arrays as leaves.
        config: options for lookups; an engine without lookups ignores them.

        Raises CompilationError, or ValueError for functions that do not fit together (see `check_functions`).
        """
        ...

    def load(self, directory: str | Path, server: bool = True) -> Circuit:
        """A saved circuit, or its client's half if the directory holds no more. Raises CircuitFormatError.

        server: False loads the client's half and never opens a file of the server's half, even if one is there. An
        engine whose compiler makes machine code has it in the server's half: load it only from a source that you trust.
        """
        ...


def check_functions(functions: Mapping[str, Function]) -> dict[str, Function]:
    """The functions, with input sets as lists of tuples of arrays, and one tuple of sources for every input.

    Raises ValueError for no function, a name that is not an identifier, an input set that is empty or mixes shapes,
    more sources than inputs, or a source that is not a function of the circuit.
    """
    if not functions:
        raise ValueError("a circuit needs at least one function")
    checked: dict[str, Function] = {}
    for name, function in functions.items():
        if not name.isidentifier():
            raise ValueError(f"a function's name must be an identifier, not {name!r}")
        samples = [tuple(np.asarray(value) for value in sample) for sample in function.inputset]
        if not samples:
            raise ValueError(f"the input set of {name} is empty: bit widths are taken from it")
        shapes = {tuple(value.shape for value in sample) for sample in samples}
        if len(shapes) != 1:
            raise ValueError(f"the input set of {name} mixes shapes: {sorted(shapes)}")
        free = len(samples[0]) - len(function.sources)
        if free < 0:
            raise ValueError(f"{name} has {len(samples[0])} inputs, and sources for {len(function.sources)}")
        sources: list[tuple[Output, ...]] = [*map(tuple, function.sources), *[()] * free]
        unknown = {source.function for group in sources for source in group} - set(functions)
        if unknown:
            raise ValueError(
                f"an input of {name} comes from {', '.join(sorted(unknown))}, which is not a function of this circuit"
            )
        checked[name] = Function(function.run, samples, sources)
    return checked
