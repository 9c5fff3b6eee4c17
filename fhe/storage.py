"""A circuit's directory: `circuit.json` is all that a client needs, `server.bin` is the server's half.

`server.bin`, and whatever else `pack` makes, holds arrays, numbers and names, and no code. A name stands for a function
that was registered here, or for a class of records, a dataclass or a NamedTuple, of a module that is loaded; nothing is
imported, and no method of a class is called. A client never opens it.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fhe import envelope
from fhe.errors import CircuitFormatError, CompilationError, NoWeights, UnknownName

DESCRIPTION, SERVER = "circuit.json", "server.bin"

_functions: dict[str, Callable[..., Any]] = {}


def register_functions(*functions: Callable[..., Any]) -> None:
    """Functions that a saved circuit may name, by module and name; of a `functools.partial` what it calls.

    A function without a name of its own, such as a lambda, cannot be named, and is left out.
    """
    for function in functions:
        while isinstance(function, functools.partial):
            function = cast("functools.partial[Any]", function).func
        if "<" not in (name := _name(function)):
            _functions[name] = function


def save(directory: str | Path, kind: str, identity: str, description: dict[str, Any], half: Any | None) -> None:
    """Write a circuit. half: the server's objects; None writes the client's half only.

    Raises CompilationError if an object or a function of the half cannot be named.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1))
    if half is not None:
        (directory / SERVER).write_bytes(pack(kind, identity, half))


def pack(kind: str, identity: str, value: Any) -> bytes:
    """Objects as bytes that `unpack` reads. Raises CompilationError if one of them cannot be named."""
    try:
        return envelope.pack(kind, identity, "", _encode(value, check=True))
    except (TypeError, RecursionError) as error:
        raise CompilationError(f"a {kind} is saved with the names of its functions: {error}") from error


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
    """The server's objects, or None if the directory does not hold them.

    Raises CircuitFormatError; UnknownName if a function or a class is not known here.
    """
    path = directory / SERVER
    return unpack(path, kind, identity) if path.exists() else None


def unpack(path: Path, kind: str, identity: str) -> Any:
    """The objects in a file of what `pack` made. Raises what `load_half` raises; KeyMismatch for another identity."""
    parts = envelope.unpack(envelope.read_file(path, kind), kind, identity).parts
    try:
        return _decode(json.loads(parts[0]), [_from_npy(part) for part in parts[1:]])
    except LookupError as error:
        raise UnknownName(f"the {kind} in {path} needs {error.args[0]}, which is not here") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CircuitFormatError(f"the {kind} in {path} is damaged: {error}") from None


def digest(value: Any) -> str:
    """SHA-256 of what `save` could write. Raises TypeError for an object that cannot be named."""
    hasher = hashlib.sha256()
    for part in _encode(value, check=False):
        hasher.update(f"{len(part)}:".encode() + part)
    return hasher.hexdigest()


def no_weights() -> NoWeights:
    """The error for a client's half that is asked to compute."""
    return NoWeights("this circuit was loaded without its weights: it can encrypt and decrypt only")


# --- objects as a tree of names and arrays --------------------------------------------------------


def _encode(value: Any, check: bool) -> list[bytes]:
    """JSON, then arrays in NumPy's format. check: refuse functions that are not registered. Raises TypeError."""
    arrays: list[bytes] = []
    tree = json.dumps(_tree(value, arrays, check))
    return [tree.encode(), *arrays]


def _tree(value: Any, arrays: list[bytes], check: bool) -> Any:
    def inner(value: Any) -> Any:
        return _tree(value, arrays, check)

    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        arrays.append(_to_npy(np.asarray(value)))
        return {"scalar" if isinstance(value, np.generic) else "array": len(arrays) - 1}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if _is_record(cast("Any", type(value))):
        return {"record": _name(type(value)), "fields": {name: inner(getattr(value, name)) for name in _fields(value)}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [inner(item) for item in value]}
    if type(value) is dict:
        items = cast("dict[Any, Any]", value)
        return {"dict": [[inner(key), inner(item)] for key, item in items.items()]}
    if isinstance(value, functools.partial):
        bound = cast("functools.partial[Any]", value)
        return {"partial": [inner(bound.func), inner(bound.args), inner(bound.keywords)]}
    if inspect.isfunction(value):
        name = _name(value)
        if check and _functions.get(name) is not value:
            raise TypeError(f"{name} is not among the registered ones (fhe.register_functions)")
        return {"function": name}
    raise TypeError(f"a {type(value).__qualname__} cannot be saved")


def _decode(tree: Any, arrays: list[NDArray[Any]]) -> Any:
    """Raises LookupError with what is missing; ValueError, TypeError, AttributeError for a tree that is none."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree

    def inner(tree: Any) -> Any:
        return _decode(tree, arrays)

    match tree:
        case {"array": int(number)}:
            return _at(arrays, number)
        case {"scalar": int(number)}:
            return _at(arrays, number)[()]
        case {"list": [*items]}:
            return [inner(item) for item in items]
        case {"tuple": [*items]}:
            return tuple(inner(item) for item in items)
        case {"dict": [*items]}:
            return {inner(key): inner(item) for key, item in items}
        case {"partial": [function, args, keywords]}:
            return functools.partial(inner(function), *inner(args), **inner(keywords))
        case {"function": str(name)}:
            if name not in _functions:
                raise LookupError(f"the function {name}")
            return _functions[name]
        case {"record": str(name), "fields": fields}:
            return _record(name, {field: inner(value) for field, value in fields.items()})
        case _:
            raise ValueError("a part of it is of no known kind")


def _record(name: str, values: dict[str, Any]) -> Any:
    module, _, own = name.partition(":")
    found = vars(sys.modules[module]).get(own) if module in sys.modules else None
    kind = cast("Any", found)
    if not (isinstance(found, type) and _is_record(found)):
        raise LookupError(f"the class {name}")
    if list(values) != list(_fields(kind)):
        raise ValueError(f"{name} has other fields here")
    if not dataclasses.is_dataclass(kind):
        make: Any = cast("Any", tuple).__new__
        return make(kind, tuple(values.values()))
    make = cast("Any", object).__new__
    record: Any = make(kind)
    for field, value in values.items():
        object.__setattr__(record, field, value)
    return record


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(cast("Any", kind), "_fields"))


def _fields(record: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(record):
        return (field.name for field in dataclasses.fields(cast("Any", record)))
    return iter(cast("tuple[str, ...]", record._fields))


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _at(arrays: list[NDArray[Any]], number: int) -> NDArray[Any]:
    if not 0 <= number < len(arrays):
        raise ValueError("it lacks an array")
    return arrays[number]


def _to_npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        np.save(buffer, array, allow_pickle=False)
    except ValueError:
        raise TypeError("an array of Python objects cannot be saved") from None
    return buffer.getvalue()


def _from_npy(data: bytes) -> NDArray[Any]:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy's reader raises errors of many kinds
        raise ValueError(f"one of its arrays cannot be read: {' '.join(str(error).split()):.80}") from None
