"""Cached circuits and keys on disk."""

import dataclasses
import enum
import functools
import hashlib
import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from fhe.backend import Backend, Circuit, FHEConfig, Function, Keys, check_functions
from fhe.errors import CircuitFormatError, KeyMismatch
from fhe.storage import register_functions

logger = logging.getLogger(__name__)


def compile_cached(
    backend: Backend,
    functions: Mapping[str, Function],
    params: Any,
    config: FHEConfig,
    directory: str | Path,
) -> Circuit:
    """`backend.compile`, or the saved result of an equal earlier call.

    directory: holds one directory for each circuit, named by its `fingerprint`. An entry appears complete or not at
    all. A damaged one is compiled again, with a warning in the log.

    Raises what `backend.compile` raises, and TypeError if params hold something that cannot be hashed.
    """
    functions = check_functions(functions)
    register_functions(*(function.run for function in functions.values()))
    entry = Path(directory) / fingerprint(backend, functions, params, config)
    if entry.exists():
        try:
            return backend.load(entry)
        except CircuitFormatError as error:
            logger.warning("compiling again: %s", error)
            shutil.rmtree(entry)
    circuit = backend.compile(functions, params, config)
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    try:
        circuit.save(temporary)
        os.replace(temporary, entry)
    except OSError:
        if not entry.exists():  # otherwise another process was faster, and its entry is equal
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return circuit


def cached_keys(circuit: Circuit, directory: str | Path) -> Keys:
    """The circuit's keys from a directory of mode 0700; made and saved there if missing or unusable.

    They are secret: whoever has them can decrypt.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)
    path = directory / f"{circuit.id}.keys"
    if path.exists():
        try:
            return circuit.load_keys(path)
        except (CircuitFormatError, KeyMismatch) as error:
            logger.warning("making new keys: %s", error)
    keys = circuit.make_keys()
    keys.save(path)
    return keys


def fingerprint(backend: Backend, functions: Mapping[str, Function], params: Any, config: FHEConfig) -> str:
    """SHA-256 of everything that a circuit is made from.

    That is: the backend and its version, the source of this package, the functions with the source of their modules
    and what they close over, their input sets and sources, params and config.
    """
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return content_hash((backend.name, backend.version(), sources, dict(functions), params, config))


def content_hash(value: Any) -> str:
    """SHA-256 of a value: numbers, text, arrays, dataclasses, functions with the source of what they are made of, and
    tuples, lists and dicts of these.

    Raises:
        TypeError: it holds something else.
    """
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    """Feed a value into a digest, with its type and size, so that different values give different bytes."""
    digest.update(f"{type(value).__module__}.{type(value).__qualname__}:".encode())
    if value is None or isinstance(value, bool | int | float | str | bytes):
        data = repr(value).encode()
        digest.update(f"{len(data)}:".encode() + data)
    elif isinstance(value, enum.Enum):
        _update(digest, value.name)
    elif isinstance(value, tuple | list):
        items = cast("Sequence[Any]", value)
        digest.update(f"{len(items)}:".encode())
        for item in items:
            _update(digest, item)
    elif isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        _update(digest, sorted(entries))
        for key in sorted(entries):
            _update(digest, entries[key])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _update(digest, field.name)
            _update(digest, getattr(value, field.name))
    elif hasattr(value, "__array__"):
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise TypeError("an array of Python objects cannot be hashed")
        digest.update(f"{array.dtype.str}{array.shape}:".encode() + array.tobytes())
    elif isinstance(value, functools.partial):
        _update(digest, (value.func, value.args, value.keywords))
    elif inspect.isfunction(value):
        module = inspect.getmodule(value)
        sources = {"": inspect.getsource(value)} if module is None else {}
        if module is not None:
            _collect_sources(module, sources)
        _update(digest, (value.__module__, value.__qualname__, sources, value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            _update(digest, cell.cell_contents)
    else:
        raise TypeError(f"cannot hash a {type(value).__qualname__} for a cache")


def _collect_sources(module: ModuleType, sources: dict[str, str]) -> None:
    """The source of a module, and of the modules of its package from which it imports functions and classes."""
    sources[module.__name__] = inspect.getsource(module)
    package = module.__name__.partition(".")[0]
    for value in vars(module).values():
        other = inspect.getmodule(value) if inspect.isfunction(value) or inspect.isclass(value) else None
        if other is not None and other.__name__.partition(".")[0] == package and other.__name__ not in sources:
            _collect_sources(other, sources)
