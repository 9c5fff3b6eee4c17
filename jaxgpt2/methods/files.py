"""Attention methods from a file: `./mine.py:name`, for a method that is nobody's package."""

from __future__ import annotations

import dataclasses
import hashlib
import linecache
import re
import sys
import types
from pathlib import Path

from jaxgpt2.methods import method
from jaxgpt2.methods.method import Method
from jaxgpt2.methods.values import MethodError, one_line, place_of

# Files that methods were loaded from, by their modules: path and content. A module's name ends in the file's SHA-256.
SOURCES: dict[str, tuple[str, bytes]] = {}
MODULE = "jaxgpt2_attention_"

# Of a file's SHA-256, in the names of its methods.
DIGITS = 16


def named(text: str) -> str:
    """The name of a method, as `methods.get` takes it: of a registered one, or of `FILE.py:NAME`, which is loaded.

    Loading runs the file. So only what a person typed may come here, never what a file or a bundle says.
    """
    return load(text).name if re.search(r"\.py:\w+$", text) else text


def load(text: str) -> Method:
    """The method NAME of `FILE.py:NAME`, registered as `FILE.py:NAME@` and the first digits of the file's SHA-256.

    Raises:
        MethodError: one line that says what is wrong, and in which line of the file.
    """
    path, _, name = text.rpartition(":")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise MethodError(f"{path} cannot be read: {error.strerror}") from None
    return from_source(path, name, source)


def from_source(path: str, name: str, source: bytes) -> Method:
    """`load`, of a file's content; path: how messages name it."""
    found = hashlib.sha256(source).hexdigest()
    full = f"{Path(path).name}:{name}@{found[:DIGITS]}"
    if full in method.names():
        return method.get(full)
    module = MODULE + found
    if module not in sys.modules:
        _run(path, source, module)
    made = getattr(sys.modules[module], name, None)
    if not isinstance(made, Method):
        there = ", ".join(key for key, value in vars(sys.modules[module]).items() if isinstance(value, Method))
        have = f"it has: {there}" if there else "it has none: put @attention above a function"
        raise MethodError(f"{path} has no attention method {name!r}; {have}")
    made = dataclasses.replace(made, name=full)
    method.register(made)
    return made


def digest_of(name: str) -> str | None:
    """SHA-256 of the file that a method of this name was loaded from; None if it was not."""
    beginning = MODULE + name.rpartition("@")[2]
    return next((module.removeprefix(MODULE) for module in SOURCES if module.startswith(beginning)), None)


def _run(path: str, source: bytes, module: str) -> None:
    """Runs a file as a module. Its functions know it by the path that messages show."""
    made = types.ModuleType(module)
    made.__file__ = path
    sys.modules[module], SOURCES[module] = made, (path, source)
    linecache.cache[path] = (len(source), None, source.decode(errors="replace").splitlines(keepends=True), path)
    try:
        exec(compile(source, path, "exec"), vars(made))
    except BaseException as error:
        del sys.modules[module]
        if isinstance(error, SyntaxError):
            raise MethodError(f"{path}:{error.lineno}: {error.msg}") from None
        if isinstance(error, MethodError):
            raise
        if isinstance(error, Exception):
            raise MethodError(f"{place_of(error, path)}: {one_line(error)}") from None
        raise
