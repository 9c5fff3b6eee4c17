"""Where arrays enter and leave a circuit's functions, and the envelopes that say so."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fhe.envelope import pack, unpack


@dataclass(frozen=True)
class Output:
    """One result of one of a circuit's functions."""

    function: str
    position: int = 0


@dataclass(frozen=True)
class Signature:
    """Where arrays enter and leave a function.

    sources: for every input the results that may be handed to it; none for what the client encrypts. outputs: how
    many results there are.
    """

    sources: tuple[tuple[Output, ...], ...]
    outputs: int

    @property
    def client_inputs(self) -> list[int]:
        """The positions of the inputs that the client encrypts."""
        return [position for position, sources in enumerate(self.sources) if not sources]


@dataclass(frozen=True)
class Signatures:
    """The functions of a circuit by name, and the envelopes of their arrays: one each, labelled by where it is from.

    An array whose label does not fit is a CircuitFormatError; see `unpack` for what else is noticed.
    """

    functions: dict[str, Signature]

    def __getitem__(self, name: str) -> Signature:
        if name not in self.functions:
            raise ValueError(f"there is no function {name!r} in this circuit; there are: {', '.join(self.functions)}")
        return self.functions[name]

    @property
    def server_state(self) -> frozenset[Output]:
        """The results that some input may be handed: they stay on the server. All others are for the client."""
        return frozenset(o for port in self.functions.values() for group in port.sources for o in group)

    def pack_inputs(self, name: str, circuit: str, keys: str, parts: Sequence[bytes]) -> list[bytes]:
        """What the client encrypted for a function."""
        positions = self[name].client_inputs
        return [pack(_input(name, i), circuit, keys, [part]) for i, part in zip(positions, parts, strict=True)]

    def unpack_inputs(self, name: str, circuit: str, keys: str, arrays: Sequence[bytes]) -> list[bytes]:
        """All inputs of a function, the client's and the wired ones."""
        sources = self[name].sources
        check_count(f"the inputs of {name}", len(arrays), len(sources))
        kinds = [[_output(o) for o in group] or [_input(name, i)] for i, group in enumerate(sources)]
        return [unpack(array, kind, circuit, keys, 1).parts[0] for array, kind in zip(arrays, kinds, strict=True)]

    def pack_outputs(self, name: str, circuit: str, keys: str, parts: Sequence[bytes]) -> list[bytes]:
        """What a function returned."""
        return [pack(_output(Output(name, i)), circuit, keys, [part]) for i, part in enumerate(parts)]

    def unpack_outputs(self, name: str, circuit: str, keys: str, arrays: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Some of the results of a function, each with its position."""
        kinds = [_output(Output(name, i)) for i in range(self[name].outputs)]
        envelopes = [unpack(array, kinds, circuit, keys, 1) for array in arrays]
        return [(kinds.index(envelope.kind), envelope.parts[0]) for envelope in envelopes]

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        return {name: asdict(port) for name, port in self.functions.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Signatures":
        """What `to_json` wrote."""
        return cls(
            {
                name: Signature(tuple(tuple(Output(**o) for o in group) for group in port["sources"]), port["outputs"])
                for name, port in data.items()
            }
        )


def check_count(what: str, got: int, wanted: int) -> None:
    """ValueError unless there are as many arrays as there must be."""
    if got != wanted:
        raise ValueError(f"{what} are {wanted} arrays, not {got}")


def _input(function: str, position: int) -> str:
    return f"input {position} of {function}"


def _output(output: Output) -> str:
    return f"output {output.position} of {output.function}"
