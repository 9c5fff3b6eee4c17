"""What this project reads of bytes that others wrote, each with a good example and the errors that it may raise:
shared by a test and by `scripts/attack_parsers.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import fhe
import served
from fhe import envelope, rlwe
from jaxgpt2.errors import InputError
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.models.gpt2.pretrained import read_config, read_sampling
from jaxgpt2.models.gpt2.tokenizer import load_tokenizer
from jaxgpt2.modules import read_configs
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.bundle import Bundle
from jaxgpt2.serving.linear_bundle import read_client, read_weights, write_bundles
from jaxgpt2.serving.masks import MaskStore
from jaxgpt2.serving.protocol import Answer, Batch, KeyStatus, Problem, SessionOpened, pack, unpack
from jaxgpt2.sweeps.store import read_rows, read_sweep
from weights import CheckpointError

CIRCUIT, KEYS = "c" * 64, "k" * 32


@dataclass(frozen=True)
class Parser:
    """read: takes bytes; what it does with `sample` is fine, and what it may raise for others is in `errors`."""

    sample: bytes
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = (InputError,)


def parsers(directory: Path, model: LinearGPT2, checkpoint: Path) -> dict[str, Parser]:
    """All of them. directory: room for files."""
    parameters = rlwe.Parameters()
    residues = np.arange(2 * parameters.poly_modulus_degree, dtype=np.uint64)[None]
    circuit = served.small_circuit()
    write_bundles(model, directory / "linear", {})
    circuit.save(directory / "circuit")
    (directory / "configs").write_text(
        json.dumps(
            {"modules": {"0.1": {"attention": "softmax", "bits": {"inputs": 4, "weights": 4, "activations": 4}}}}
        )
    )
    (directory / "sweep").mkdir()
    (directory / "sweep" / "sweep.json").write_text('{"model": "tiny"}')
    (directory / "sweep" / "rows.jsonl").write_text('{"key": "a", "kl": 0.1}\n')
    shutil.copytree(checkpoint, directory / "checkpoint")

    def file(path: Path, read: Callable[[], object], *errors: type[Exception]) -> Parser:
        """What is read of a file, in a directory that is otherwise as it should be."""

        def written(data: bytes) -> object:
            path.write_bytes(data)
            return read()

        return Parser(path.read_bytes(), written, errors or (InputError,))

    def listed(kind: str, name: str, read: Callable[[Bundle], object]) -> Parser:
        """A file of a bundle whose manifest has the right hash of it."""
        place = directory / "linear" / kind
        original = json.loads((place / bundles.MANIFEST).read_text())

        def whole() -> object:
            (place / bundles.MANIFEST).unlink()
            text = json.dumps({**original, "files": bundles.hashes(place)})
            (place / bundles.MANIFEST).write_text(text)
            return read(Bundle.read(place, kind))

        sample = (place / name).read_bytes()

        def restored() -> object:
            try:
                return whole()
            finally:
                (place / name).write_bytes(sample)

        return file(place / name, restored)

    def manifest(data: bytes) -> object:
        place = directory / "linear" / "client"
        good = (place / bundles.MANIFEST).read_bytes()
        (place / bundles.MANIFEST).write_bytes(data)
        try:
            return read_client(Bundle.read(place, "client"))
        finally:
            (place / bundles.MANIFEST).write_bytes(good)

    def store() -> None:
        MaskStore(directory / "masks", "e" * 64, {"a": 3}, directory / "ledgers").close()

    store()
    batch = Batch(request="a" * 32, calls=[], uploads=[b"u"], results=[])
    answer = Answer(results=[b"one", b"two"])
    status = KeyStatus(received=5, complete=False)
    opened = SessionOpened(session="a" * 32, expires_after=1.0)
    return {
        "envelope": Parser(
            envelope.pack("keys", CIRCUIT, KEYS, [b"part", b""]),
            lambda data: envelope.unpack(data, "keys", CIRCUIT, KEYS),
            (fhe.FHEError,),
        ),
        "envelope with the right checksum": Parser(
            envelope.pack("keys", CIRCUIT, KEYS, [b"part", b""])[:-32],
            lambda data: envelope.unpack(data + digest(data), "keys", CIRCUIT, KEYS),
            (fhe.FHEError,),
        ),
        "rlwe request": Parser(
            rlwe.pack_request(residues, parameters),
            lambda data: rlwe.unpack_request(data, 1, parameters),
            (fhe.FHEError,),
        ),
        "rlwe answer": Parser(
            rlwe.pack_answer(residues, parameters),
            lambda data: rlwe.unpack_answer(data, 1, parameters),
            (fhe.FHEError,),
        ),
        "batch": Parser(pack(batch), lambda data: unpack(Batch, data)),
        "answer": Parser(pack(answer), lambda data: unpack(Answer, data)),
        "key status": Parser(status.model_dump_json().encode(), KeyStatus.model_validate_json, (ValueError,)),
        "session": Parser(opened.model_dump_json().encode(), SessionOpened.model_validate_json, (ValueError,)),
        "problem": Parser(
            Problem(code="a", detail="b").model_dump_json().encode(), Problem.model_validate_json, (ValueError,)
        ),
        "bundle": Parser((directory / "linear" / "client" / bundles.MANIFEST).read_bytes(), manifest),
        "tensors of a client": listed("client", "client.safetensors", read_client),
        "matrices of a server": listed("server", "weights.safetensors", read_weights),
        "tokenizer of a client": listed("client", "tokenizer.json", read_client),
        "generation configuration of a client": listed("client", "generation_config.json", read_client),
        "circuit": file(
            directory / "circuit" / "circuit.json",
            lambda: fhe.get_backend("clear").load(directory / "circuit", server=False),
            fhe.FHEError,
        ),
        "configurations": file(directory / "configs", lambda: read_configs(directory / "configs", model.client.config)),
        "sweep": file(directory / "sweep" / "sweep.json", lambda: read_sweep(directory / "sweep")),
        "rows": file(directory / "sweep" / "rows.jsonl", lambda: read_rows(directory / "sweep")),
        "checkpoint's configuration": file(
            directory / "checkpoint" / "config.json", lambda: read_config(directory / "checkpoint"),
            InputError, CheckpointError,
        ),
        "generation configuration": file(
            directory / "checkpoint" / "generation_config.json", lambda: read_sampling(directory / "checkpoint"),
            InputError, CheckpointError,
        ),
        "vocabulary": file(
            directory / "checkpoint" / "vocab.json", lambda: load_tokenizer(directory / "checkpoint", 300)
        ),
        "masks": file(directory / "masks" / "masks.sqlite", store),
    }  # fmt: skip


def digest(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


NASTY = [
    b"\0", b"\xff" * 8, b"[" * 100_000, b'{"a":' * 100_000, b"-1", b"1e400", b"9" * 5000, b"null", b"NaN",
    b'"\\ud800"', b"\n", b"../../x", b"1000000000000", b"true", b"[]", b"{}", b'"text"',
]  # fmt: skip


# A change of bytes: what is done, where (as a part of all, of at most 20,000 bytes), how many bytes, which.
Edit = tuple[str, float, int, bytes]


def edits() -> st.SearchStrategy[list[Edit]]:
    """A few changes that can be made to any bytes."""
    one = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "overwrite", "end", "value"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=64) | st.sampled_from(NASTY),
    )
    return st.lists(one, min_size=1, max_size=4)


def damaged(sample: bytes, changes: list[Edit]) -> bytes:
    """Bytes turned over, cut out, put in, overwritten, cut off, or a value of JSON exchanged."""
    data = bytearray(sample)
    for what, where, count, words in changes:
        room = min(len(data), 20_000)
        at = int(where * room)
        if what == "flip" and room:
            data[at] ^= 1 << count % 8
        elif what == "cut":
            del data[at : at + count]
        elif what == "insert":
            data[at:at] = words
        elif what == "overwrite":
            data[at : at + count] = words
        elif what == "end":
            del data[at:]
        elif what == "value" and (colons := [spot for spot in range(room) if data[spot] == ord(":")]):
            start = colons[int(where * len(colons))] + 1
            end = next((spot for spot in range(start, min(len(data), start + 200)) if data[spot] in b",}]"), start)
            data[start:end] = words
    return bytes(data)


def outcome(parser: Parser, data: bytes) -> tuple[str, str | None]:
    """What became of these bytes, in a word, and what is wrong with that, if anything."""
    try:
        parser.read(data)
    except parser.errors as error:
        message = str(error)
        if parser.errors != (ValueError,) and ("\n" in message or len(message) > 2000):
            return "refused", f"not one line: {message[:200]!r}"
        return "refused", None
    except Exception as error:
        return "raised", f"{type(error).__name__}: {str(error)[:200]}"
    return "taken", None


def problem(parser: Parser, data: bytes) -> str | None:
    return outcome(parser, data)[1]
