"""What `jaxgpt2 compile` hands to two machines.

    OUT/server/                       who holds the weights
      bundle.json                     format, identity, circuits with their signatures, hashes of all files
      circuits/L.H/                   a compiled circuit, with weights; from Concrete with machine code
    OUT/client/                       the user
      bundle.json                     the same, and how to decode
      circuits/L.H/                   the circuit's client half
      modules/NAME.safetensors         scales and decoding
      model/                          the float model, in Hugging Face's format, without the encrypted modules' weights

No bundle holds Python code: circuits name functions of methods that are registered where they are loaded. A server
bundle of Concrete holds the machine code that its compiler made: load only what you trust. A client bundle holds none.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fhe
import jaxgpt2
from jaxgpt2.errors import InputError

MANIFEST = "bundle.json"

# Of bundles, requests and answers. A client and a server of different formats do not try to understand each other.
FORMAT = 3

# The key of a manifest that says what linear layers are served, instead of circuits.
LINEAR = "linear"


class BundleError(InputError):
    """A directory that is no bundle, a damaged one, or one that other versions made."""


@dataclass(frozen=True)
class CircuitEntry:
    """What both sides know of a circuit.

    module: what it computes, as "0.1"; id: the circuit's; backend: its engine; signatures: its functions.
    """

    module: str
    id: str
    backend: str
    signatures: fhe.Signatures


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. id: the same on both sides, and nowhere else. methods: those of files that a server computes
    with, by name: the SHA-256 of their files. content: all of its manifest."""

    directory: Path
    kind: str
    id: str
    circuits: tuple[CircuitEntry, ...]
    methods: Mapping[str, str]
    content: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path, kind: str) -> Bundle:
        """A bundle of a kind, "server" or "client", whose files are those that were written.

        Raises:
            BundleError: one line that says what is wrong.
        """
        try:
            content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        except OSError as error:
            hint = f": give {directory / kind}" if (directory / kind / MANIFEST).exists() else ""
            reason = (error.strerror or str(error)).lower()
            raise BundleError(f"{directory} is no {kind} bundle ({MANIFEST}: {reason}){hint}") from None
        except (ValueError, RecursionError):
            raise BundleError(f"{directory / MANIFEST} is damaged") from None
        try:
            if content["kind"] != kind:
                raise BundleError(f"{directory} is a {content['kind']} bundle, wanted the {kind}'s")
            if content["format"] != FORMAT:
                raise BundleError(
                    f"{directory} has format {content['format']}, this jaxgpt2 reads {FORMAT}: compile it again"
                )
            _check_files(directory, content["files"])
            _check_versions(directory, content["versions"])
            circuits = tuple(
                CircuitEntry(module, facts["id"], facts["backend"], fhe.Signatures.from_json(facts["signatures"]))
                for module, facts in content["circuits"].items()
            )
            if not re.fullmatch("[0-9a-f]{64}", content["id"]):  # it names directories
                raise BundleError(f"{directory / MANIFEST} is damaged: its identity is no SHA-256")
            methods = {name: str(digest) for name, digest in content.get("methods", {}).items()}
            return cls(directory, kind, content["id"], circuits, methods, content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{directory / MANIFEST} is damaged: {error!r:.200}") from None

    @property
    def is_linear(self) -> bool:
        """Whether it is of linear layers, and not of circuits."""
        return LINEAR in self.content

    def method_files(self, given: Sequence[str]) -> tuple[tuple[str, str, bytes], ...]:
        """Of `FILE.py:NAME`, given for every method of a file that a server computes with: path, name and content.

        Raises:
            BundleError: one is missing, or of another content than was compiled, or is not needed.
        """
        needed = {(name.rpartition("@")[0].rpartition(":")[2], digest): name for name, digest in self.methods.items()}
        found = {}
        for text in given:
            match = re.fullmatch(r"(.+\.py):(\w+)", text)
            if match is None:
                raise BundleError(f"--attention {text!r:.80}: wanted FILE.py:NAME")
            path, name = match.groups()
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {error.strerror}") from None
            found[name, hashlib.sha256(content).hexdigest()] = path, name, content
        for name, digest in needed.keys() - found.keys():
            came = ", ".join(f"{path} with {other}" for (_, other), (path, _, _) in found.items()) or "no file"
            file = needed[name, digest].rpartition(":")[0]
            raise BundleError(
                f"{self.directory} computes with the method {name} of {file} with SHA-256 {digest}, got {came}: give "
                f"the file that was compiled, as --attention {file}:{name}"
            )
        for name, digest in found.keys() - needed.keys():
            raise BundleError(f"--attention {found[name, digest][0]}:{name}: {self.directory} needs no such method")
        return tuple(found.values())

    def circuit_directory(self, module: str) -> Path:
        return self.directory / "circuits" / module


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A temporary directory that takes this one's name at the end, whole, or not at all.

    Raises:
        BundleError: the directory exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BundleError(f"{directory} exists and is not an empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_report(directory: Path, report: Mapping[str, Any], identity: str) -> None:
    """`report.json`, with the bundles' identity."""
    text = json.dumps({**report, "bundle": identity}, indent=2) + "\n"
    (directory / "report.json").write_text(text, encoding="utf-8")


def write(
    directory: Path,
    kind: str,
    identity: str,
    circuits: Mapping[str, fhe.Circuit],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """A bundle of a kind, with circuits by module, in a directory that may hold more of it already.

    facts: what else its manifest shall say.
    """
    for module, circuit in circuits.items():
        circuit.save(directory / "circuits" / module, server=kind == "server")
    content = {
        "format": FORMAT,
        "kind": kind,
        "id": identity,
        "jaxgpt2": jaxgpt2.__version__,
        "versions": {
            package: version
            for circuit in circuits.values()
            for package, version in circuit.report.versions.items()
            if package != "numpy"  # any will do
        },
        "circuits": {
            module: {"id": circuit.id, "backend": circuit.report.backend, "signatures": circuit.signatures.to_json()}
            for module, circuit in circuits.items()
        },
        **(facts or {}),
        "files": hashes(directory),
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by its path there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(directory: Path, files: Mapping[str, str]) -> None:
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    if unknown := sorted(there - {*files, MANIFEST}):
        raise BundleError(f"{directory / unknown[0]} is not part of the bundle: remove it, or get the bundle again")
    for name, digest in files.items():
        path = directory / name
        if name not in there or not path.is_file():
            raise BundleError(f"{directory} lacks {name}")
        if _digest(path) != digest:
            raise BundleError(f"{path} is damaged: it is not what was written")


def _check_versions(directory: Path, versions: Mapping[str, str]) -> None:
    """The engine's library is the one that the circuits were compiled with: ciphertexts and code depend on it."""
    for package, wanted in versions.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise BundleError(f"{directory} was made with {package} {wanted}, here is {found}: install {wanted}")
