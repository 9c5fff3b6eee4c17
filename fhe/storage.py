"""A circuit's directory: what a client needs in `circuit.json`, what only the server may have in `server.bin`.

`server.bin` holds Python objects, functions by their names: load it only where you trust who wrote it. A client never
opens it.
"""

import json
import pickle
from pathlib import Path
from typing import Any

from fhe import envelope
from fhe.errors import CircuitFormatError, CompilationError, NoWeights

DESCRIPTION, SERVER = "circuit.json", "server.bin"


def save(directory: str | Path, kind: str, identity: str, description: dict[str, Any], half: Any | None) -> None:
    """Write a circuit. half: the server's objects; None writes the client's half alone."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1))
    if half is not None:
        try:
            data = pickle.dumps(half)
        except (pickle.PicklingError, AttributeError) as error:
            raise CompilationError(f"a {kind} is saved with its functions' names: {error}") from error
        (directory / SERVER).write_bytes(envelope.pack(kind, identity, "", [data]))


def load_description(directory: Path, format: int) -> dict[str, Any]:
    """The description of a saved circuit. Raises CircuitFormatError: it is damaged, or of another format."""
    try:
        description = json.loads(envelope.read_file(directory / DESCRIPTION, "circuit"))
        found = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
    if found != format:
        raise CircuitFormatError(f"the circuit in {directory} has format {found}, not {format}")
    return description


def load_half(directory: Path, kind: str, identity: str) -> Any | None:
    """The server's objects, or None where they are not. Raises CircuitFormatError."""
    if not (directory / SERVER).exists():
        return None
    (content,) = envelope.unpack(envelope.read_file(directory / SERVER, kind), kind, identity, parts=1).parts
    try:
        return pickle.loads(content)
    except Exception as error:
        raise CircuitFormatError(f"the circuit in {directory} needs code that is not here: {error}") from error


def no_weights() -> NoWeights:
    return NoWeights("this circuit was loaded without its weights: it can encrypt and decrypt only")
