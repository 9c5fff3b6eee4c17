"""The inputs and outputs of a circuit's functions, and the envelopes that label their arrays."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fhe.envelope import pack, unpack

# Results of a function, of a circuit that somebody else may have made.
MAX_OUTPUTS = 10_000


@dataclass(frozen=True)
class Output:
    """One result of a function, by its position."""

    function: str
    position: int = 0


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a function.

    sources: for each input, the results that it may be; empty for an input that the client encrypts.
    outputs: number of results.
    """

    sources: tuple[tuple[Output, ...], ...]
    outputs: int

    @property
    def client_inputs(self) -> list[int]:
        """The positions of the inputs that the client encrypts."""
        return [position for position, sources in enumerate(self.sources) if not sources]


@dataclass(frozen=True)
class Signatures:
    """The signatures of a circuit's functions, by name.

    Every array travels in an envelope that says which input or output it is. Unpacking raises CircuitFormatError for
    an array in the wrong place, and what `fhe.envelope.unpack` raises.
    """

    functions: dict[str, Signature]

    def __getitem__(self, name: str) -> Signature:
        if name not in self.functions:
            raise ValueError(f"there is no function {name!r} in this circuit; there are: {', '.join(self.functions)}")
        return self.functions[name]

    @property
    def server_state(self) -> frozenset[Output]:
        """The results that some input may be: they stay on the server. All others go to the client."""
        return frozenset(o for signature in self.functions.values() for group in signature.sources for o in group)

    def pack_inputs(self, name: str, circuit: str, keys: str, parts: Sequence[bytes]) -> list[bytes]:
        """The inputs that the client encrypted for a function."""
        positions = self[name].client_inputs
        return [pack(_input(name, i), circuit, keys, [part]) for i, part in zip(positions, parts, strict=True)]

    def unpack_inputs(self, name: str, circuit: str, keys: str, arrays: Sequence[bytes]) -> list[bytes]:
        """All inputs of a function."""
        sources = self[name].sources
        check_count(f"the inputs of {name}", len(arrays), len(sources))
        kinds = [[_output(o) for o in group] or [_input(name, i)] for i, group in enumerate(sources)]
        return [unpack(array, kind, circuit, keys, 1).parts[0] for array, kind in zip(arrays, kinds, strict=True)]

    def pack_outputs(self, name: str, circuit: str, keys: str, parts: Sequence[bytes]) -> list[bytes]:
        """All results of a function."""
        return [pack(_output(Output(name, i)), circuit, keys, [part]) for i, part in enumerate(parts)]

    def unpack_outputs(self, name: str, circuit: str, keys: str, arrays: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Some results of a function, each with its position."""
        kinds = [_output(Output(name, i)) for i in range(self[name].outputs)]
        envelopes = [unpack(array, kinds, circuit, keys, 1) for array in arrays]
        return [(kinds.index(envelope.kind), envelope.parts[0]) for envelope in envelopes]

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        return {name: asdict(signature) for name, signature in self.functions.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Signatures":
        """The signatures that `to_json` wrote. Raises ValueError, TypeError or KeyError for what it did not write."""
        functions = {
            name: Signature(tuple(tuple(Output(**o) for o in group) for group in entry["sources"]), entry["outputs"])
            for name, entry in data.items()
        }
        for name, signature in functions.items():
            if not name.isidentifier():
                raise ValueError(f"a function's name must be an identifier, not {name!r:.40}")
            if type(signature.outputs) is not int or not 0 < signature.outputs <= MAX_OUTPUTS:
                raise ValueError(f"{name} must have 1 to {MAX_OUTPUTS} results, not {signature.outputs!r:.40}")
        for source in cls(functions).server_state:
            known = functions[source.function].outputs
            if type(source.position) is not int or not 0 <= source.position < known:
                raise ValueError(f"{source.function} has {known} results, and none {source.position!r:.40}")
        return cls(functions)


def check_count(what: str, got: int, wanted: int) -> None:
    """Raise ValueError unless the number of arrays is right."""
    if got != wanted:
        raise ValueError(f"{what} are {wanted} arrays, not {got}")


def _input(function: str, position: int) -> str:
    return f"input {position} of {function}"


def _output(output: Output) -> str:
    return f"output {output.position} of {output.function}"
