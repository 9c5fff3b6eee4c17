"""A circuit's directory: `circuit.json` is all that a client needs, `server.bin` is the server's half.

`server.bin` is a pickle, functions by their names: loading it can run any code, so load it only from a source that you
trust. A client never opens it.
"""

import json
import pickle
from pathlib import Path
from typing import Any

from fhe import envelope
from fhe.errors import CircuitFormatError, CompilationError, NoWeights

DESCRIPTION, SERVER = "circuit.json", "server.bin"


def save(directory: str | Path, kind: str, identity: str, description: dict[str, Any], half: Any | None) -> None:
    """Write a circuit. half: the server's objects; None writes the client's half only."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1))
    if half is not None:
        try:
            data = pickle.dumps(half)
        except (pickle.PicklingError, AttributeError) as error:
            raise CompilationError(f"a {kind} is saved with the names of its functions: {error}") from error
        (directory / SERVER).write_bytes(envelope.pack(kind, identity, "", [data]))


def load_description(directory: Path, format: int) -> dict[str, Any]:
    """The content of `circuit.json`. Raises CircuitFormatError if it is damaged or has another format."""
    try:
        description = json.loads(envelope.read_file(directory / DESCRIPTION, "circuit"))
        found = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
    if found != format:
        raise CircuitFormatError(f"the circuit in {directory} has format {found}, not {format}")
    return description


def load_half(directory: Path, kind: str, identity: str) -> Any | None:
    """The server's objects, or None if the directory does not hold them. Raises CircuitFormatError."""
    if not (directory / SERVER).exists():
        return None
    (content,) = envelope.unpack(envelope.read_file(directory / SERVER, kind), kind, identity, parts=1).parts
    try:
        return pickle.loads(content)
    except Exception as error:
        raise CircuitFormatError(f"the circuit in {directory} needs code that is not installed: {error}") from error


def no_weights() -> NoWeights:
    """The error for a client's half that is asked to compute."""
    return NoWeights("this circuit was loaded without its weights: it can encrypt and decrypt only")
