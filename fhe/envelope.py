"""The envelope of everything that leaves a process: what it is, whose it is, and a checksum."""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fhe.errors import CircuitFormatError, KeyMismatch

MAGIC = b"FHEWIRE1"
DIGEST = 32


def pack(kind: str, circuit: str, keys: str, parts: Sequence[bytes]) -> bytes:
    """Put byte strings in one envelope.

    kind: what they are ("keys", "evaluation keys", "input 0 of head"); circuit, keys: the ids that they belong to.
    Layout: magic, header length (uint32, little-endian), header (JSON), the parts, SHA-256 of all before it.
    """
    header = json.dumps({"kind": kind, "circuit": circuit, "keys": keys, "sizes": [len(p) for p in parts]}).encode()
    body = b"".join([MAGIC, struct.pack("<I", len(header)), header, *parts])
    return body + hashlib.sha256(body).digest()


class Envelope(NamedTuple):
    """The content of an envelope: the id of its keys, its kind, its parts."""

    keys: str
    kind: str
    parts: list[bytes]


def unpack(
    data: bytes, kinds: str | Sequence[str], circuit: str, keys: str | None = None, parts: int | None = None
) -> Envelope:
    """Open an envelope.

    kinds: the kind, or kinds, that it may have. circuit, keys, parts: what it must belong to, and hold.

    Raises CircuitFormatError if it is damaged or of another kind, KeyMismatch if it belongs to another circuit or to
    other keys.
    """
    wanted = [kinds] if isinstance(kinds, str) else kinds
    what = " or ".join(wanted)
    if not data.startswith(MAGIC):
        raise CircuitFormatError(f"these bytes are not {what}: they do not begin with {MAGIC.decode()}")
    body = memoryview(data)[:-DIGEST]
    if hashlib.sha256(body).digest() != data[-DIGEST:]:
        raise CircuitFormatError(f"the bytes of {what} are damaged or cut short: their checksum does not match")
    kind, their_circuit, their_keys, content = _open(body, what)
    if kind not in wanted:
        raise CircuitFormatError(f"expected {what}, got {kind:.40}")
    check_circuit(kind, their_circuit, circuit)
    if keys is not None and their_keys != keys:
        raise KeyMismatch(f"{kind}: made with keys {their_keys[:12]}, not with these, {keys[:12]}")
    if parts is not None and len(content) != parts:
        raise CircuitFormatError(f"{kind} has {len(content)} parts; wanted {parts}")
    return Envelope(their_keys, kind, content)


def _open(body: memoryview, what: str) -> tuple[str, str, str, list[bytes]]:
    """Kind, circuit, keys and parts. A checksum is not a signature, so nothing in the header is trusted."""
    try:
        start = len(MAGIC) + 4
        (length,) = struct.unpack("<I", body[len(MAGIC) : start])
        header = json.loads(bytes(body[start : start + length]))
        kind, circuit, keys, sizes = (header[name] for name in ("kind", "circuit", "keys", "sizes"))
        if not all(isinstance(value, str) for value in (kind, circuit, keys)):
            raise ValueError("its header does not name kind, circuit and keys")
        parts: list[bytes] = []
        position = start + length
        for size in sizes:
            if not isinstance(size, int) or not 0 <= size <= len(body) - position:
                raise ValueError("a part is not where its header says")
            parts.append(bytes(body[position : position + size]))
            position += size
        if position != len(body):
            raise ValueError("it holds more than its parts")
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise CircuitFormatError(f"the bytes of {what} are not an envelope: {error}") from None
    return kind, circuit, keys, parts


def check_circuit(kind: str, theirs: str, ours: str) -> None:
    """Raise KeyMismatch unless both circuits are the same."""
    if theirs != ours:
        raise KeyMismatch(f"{kind}: made for circuit {theirs[:12]}, not for this one, {ours[:12]}")


def write_whole(path: str | Path, data: bytes, mode: int = 0o600, durable: bool = True) -> None:
    """Write a file completely or not at all, at no moment with wider permissions than `mode`.

    durable: wait until it is on the disk, so that it survives a power failure.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_file(path: str | Path, kind: str) -> bytes:
    """The bytes of a file. Raises CircuitFormatError, with the path, if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CircuitFormatError(f"cannot read the {kind} in {path}: {error.strerror}") from error
