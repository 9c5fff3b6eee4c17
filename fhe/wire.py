"""The envelope of everything that leaves a process: who it belongs to, and whether it arrived whole."""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

from .errors import CircuitFormatError, KeyMismatch

MAGIC = b"FHEWIRE1"
DIGEST = 32


def pack(kind: str, circuit: str, keys: str, parts: Sequence[bytes]) -> bytes:
    """Byte strings in one envelope.

    kind: what it is ("keys", "evaluation keys", "ciphertexts", "results"); circuit, keys: what it belongs to.
    Layout: magic, header length (uint32), header (JSON), the parts, SHA-256 of all that.
    """
    header = json.dumps({"kind": kind, "circuit": circuit, "keys": keys, "sizes": [len(p) for p in parts]}).encode()
    body = b"".join([MAGIC, struct.pack("<I", len(header)), header, *parts])
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes, kind: str, circuit: str, keys: str | None = None) -> tuple[str, list[bytes]]:
    """The id of the keys an envelope belongs to, and its parts.

    Raises CircuitFormatError if damaged or of another kind, KeyMismatch if of another circuit or other keys.
    """
    if not data.startswith(MAGIC):
        raise CircuitFormatError(f"these bytes are no {kind}: they do not begin with {MAGIC.decode()}")
    body = memoryview(data)[:-DIGEST]
    if hashlib.sha256(body).digest() != data[-DIGEST:]:
        raise CircuitFormatError(f"the {kind} are damaged or cut short: their checksum does not match")
    start = len(MAGIC) + 4
    (length,) = struct.unpack("<I", body[len(MAGIC) : start])
    header = json.loads(bytes(body[start : start + length]))
    if header["kind"] != kind:
        raise CircuitFormatError(f"expected {kind}, got {header['kind']}")
    check_circuit(kind, header["circuit"], circuit)
    if keys is not None and header["keys"] != keys:
        raise KeyMismatch(f"the {kind} belong to keys {header['keys'][:12]}, not to these, {keys[:12]}")
    parts, position = [], start + length
    for size in header["sizes"]:
        parts.append(bytes(body[position : position + size]))
        position += size
    return header["keys"], parts


def check_circuit(kind: str, theirs: str, ours: str) -> None:
    """KeyMismatch unless both are the same circuit."""
    if theirs != ours:
        raise KeyMismatch(f"the {kind} belong to circuit {theirs[:12]}, not to this one, {ours[:12]}")


def write_private(path: str | Path, data: bytes) -> None:
    """Write a file of mode 0600 whole or not at all; nobody else can read it at any moment."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_file(path: str | Path, kind: str) -> bytes:
    """A file's bytes; CircuitFormatError, with the path, if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CircuitFormatError(f"cannot read the {kind} in {path}: {error.strerror}") from error
