"""A server in the middle, by hypothesis: shared by tests and by `scripts/attack_client.py`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

import fhe
import linears
import parsers
import served
from fhe import envelope, rlwe
from jaxgpt2.errors import InputError
from jaxgpt2.executors import StateLost
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.serving.bundle import FORMAT
from jaxgpt2.serving.protocol import Answer, Batch, pack, unpack
from jaxgpt2.serving.remote import Connection, Remote, RemoteOwner
from linears import Request, Said

BUNDLE, SESSION = "b" * 64, "a" * 32

# What a client may raise, whatever a server says.
OWN = (InputError, fhe.FHEError, StateLost)

STATUSES = [100, 101, 103, 199, 200, 201, 202, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 408, 409, 413, 418]
STATUSES += [422, 429, 500, 502, 503, 504, 599, 999]
HEADERS = ["Retry-After", "Location", "Content-Encoding", "Content-Length", "Transfer-Encoding", "Set-Cookie"]
HEADERS += ["Content-Type", "Connection", "X" * 300]
VALUES = ["", "0", "1", "-1", "\xb2", "9" * 400, "chunked", "gzip", "identity", "close", "http://[::1", "//", "\x1b[2J"]
VALUES += ["http://127.0.0.1:1/", "a=b; Domain=.", "1, 2", "é", "x" * 5000]
CODES = ["keys_missing", "worker_died", "no_session", "no_batch", "offset", "digest", "in_order", "queue", "x", "\x1b"]


@dataclass(frozen=True)
class Change:
    """What is done to which answer. which: answers counted from 0, taken modulo how many there are; once: only to the
    first of its kind."""

    which: int
    once: bool
    apply: Callable[[Said], Said]


def _with(
    said: Said, status: int | None = None, headers: Mapping[str, Any] | None = None, body: bytes | None = None
) -> Said:
    assert said is not None
    return status or said[0], {**said[1], **(headers or {})}, said[2] if body is None else body


@st.composite
def changes(draw: Any) -> Change:
    """A change of status, of headers, of bytes, of what a batch's answer holds, or no answer at all."""
    status, edits = draw(st.sampled_from(STATUSES)), draw(parsers.edits())
    header = {draw(st.sampled_from(HEADERS)): draw(st.sampled_from(VALUES))}
    code, after = draw(st.sampled_from(CODES)), draw(st.sampled_from([{}, {"Retry-After": "0"}, {"Retry-After": "1"}]))
    how = draw(st.sampled_from(["swap", "drop", "twice", "empty", "inside"]))
    kinds: dict[str, Callable[[Said], Said]] = {
        "status": lambda said: _with(said, status),
        "header": lambda said: _with(said, headers=header),
        "problem": lambda said: _with(said, status, after, json.dumps({"code": code, "detail": "no"}).encode()),
        "bytes": lambda said: _with(said, body=parsers.damaged(said[2] if said else b"", edits)),
        "results": lambda said: _other_results(said, how, edits),
        "hang up": lambda said: None,
    }
    return Change(draw(st.integers(0, 12)), draw(st.booleans()), kinds[draw(st.sampled_from(list(kinds)))])


def _other_results(said: Said, how: str, edits: list[parsers.Edit]) -> Said:
    """The answer to a batch with results exchanged, left out, or damaged inside an envelope with a right checksum."""
    assert said is not None
    try:
        results = list(unpack(Answer, said[2]).results)
    except InputError:
        return said
    if how == "inside":
        damaged = parsers.damaged(results[0][: -envelope.DIGEST], edits)
        results[0] = damaged + parsers.digest(damaged)
    elif how == "swap":
        results.reverse()
    elif how == "drop":
        del results[0]
    elif how == "twice":
        results.append(results[0])
    else:
        results[0] = b""
    return _with(said, body=pack(Answer(results=results)))


@dataclass
class Middle:
    """Says what `honest` says, changed."""

    honest: Callable[[Request], Said]
    change: Change
    period: int
    asked: int = 0
    changed: int = 0

    def __call__(self, request: Request) -> Said:
        said, at = self.honest(request), self.asked
        self.asked += 1
        if self.asked > 200:
            raise AssertionError("a client that asks for ever")
        if at % self.period != self.change.which % self.period or (self.change.once and self.changed):
            return said
        self.changed += 1
        return self.change.apply(said)


# --- circuits -------------------------------------------------------------------------------------


@dataclass
class Circuits:
    """An honest server of one circuit, in a few lines."""

    circuit: Any
    evaluation: bytes = b""
    results: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def __call__(self, request: Request) -> Said:
        if request.path == "/specification":
            known = {"0.1": {"id": self.circuit.id}}
            found = {"format": FORMAT, "bundle": BUNDLE, "version": "0", "circuits": known}
            return 200, {}, json.dumps(found).encode()
        if request.path.startswith("/keys"):
            return 200, {}, b'{"received": 0, "complete": true}'
        if request.path == "/sessions":
            return 201, {}, json.dumps({"session": SESSION, "expires_after": 60.0}).encode()
        if request.method != "POST":
            return 404, {}, b'{"code": "no_batch", "detail": "not here"}'
        batch = unpack(Batch, request.body)
        for call in batch.calls:
            inputs = [
                batch.uploads[each] if isinstance(each, int) else self.results[each.call, each.output]
                for each in call.inputs
            ]
            for number, result in enumerate(self.circuit.run(call.function, inputs, self.evaluation)):
                self.results[call.id, number] = result
        return 200, {}, pack(Answer(results=[self.results[each.call, each.output] for each in batch.results]))


@functools.cache
def _small_circuit() -> tuple[Any, Any]:
    circuit = served.small_circuit()
    return circuit, circuit.make_keys()


def outcome_of_circuits(change: Change) -> tuple[str, str | None]:
    """What became of a text with changed answers, in a word, and what is wrong with that, if anything."""
    circuit, keys = _small_circuit()
    x = np.ones((1, 4), int)
    middle = Middle(Circuits(circuit, keys.evaluation), change, 5)
    with linears.serving(middle) as url, contextlib.closing(Connection(url, patience=0.3)) as connection:
        try:
            connection.check(BUNDLE, [circuit.id])
            executor = Remote(connection, circuit, keys)
            for _ in range(2):
                q, k = executor.run("project", executor.encrypt("project", x))
                (result,) = executor.decrypt("attend", executor.run("attend", [q, k]))
                np.asarray(result)
            executor.close()
        except OWN as error:
            return "refused", _not_one_line(error)
        except Exception as error:
            return "raised", f"{type(error).__name__}: {str(error)[:200]}"
    return "done", None


def _not_one_line(error: BaseException) -> str | None:
    message = str(error)
    return None if message.isprintable() and len(message) <= 1200 else f"not one line: {message[:200]!r}"


# --- linear layers ----------------------------------------------------------------------------------


def outcome_of_linear_layers(model: LinearGPT2, change: Change) -> tuple[str, str | None]:
    """The same for one matrix's products, ahead and online."""
    name, (inputs, outputs) = next(iter(model.client.shapes.items()))
    owner = _owner(model)
    middle = Middle(owner, change, 3)
    with linears.serving(middle) as url, contextlib.closing(Connection(url, patience=0.3)) as connection:
        try:
            remote = RemoteOwner(connection, model.client.shapes)
            remote.check(model.client.identity)
            request = _request(inputs)
            with rlwe.ClientBatch(rlwe.Parameters()) as keys:
                keys.decrypt(remote.ahead(name, [request], len(request)), outputs)
            products = remote.online(name, np.ones((2, inputs), np.uint32))
            assert products.shape == (2, outputs) and products.dtype == np.uint32
        except OWN as error:
            return "refused", _not_one_line(error)
        except Exception as error:
            return "raised", f"{type(error).__name__}: {str(error)[:200]}"
    return "done", None


_owners: dict[int, Any] = {}


def _owner(model: LinearGPT2) -> Any:
    """An honest server, which answers the same request again from memory."""
    if id(model) not in _owners:
        _owners[id(model)] = functools.cache(linears.Owner(model))
    return _owners[id(model)]


@functools.cache
def _request(inputs: int) -> bytes:
    masks = rlwe.masks([rlwe.new_seed() for _ in range(rlwe.Parameters().poly_modulus_degree)], 0, inputs)
    with rlwe.ClientBatch(rlwe.Parameters()) as keys:
        return b"".join(keys.encrypt_blocks(masks))


# --- ciphertexts of an engine ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """An engine's circuit with keys, and the results of one of its functions."""

    circuit: Any
    keys: Any
    name: str
    results: list[bytes]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, backend: str) -> Results:
        """Of a small function, compiled anew."""
        rng = np.random.default_rng(0)
        if backend == "ckks":
            values = rng.uniform(-1, 1, 4096)
            run, params = _rotated, None
        else:
            values = rng.integers(-4, 4, (1, 4))
            run, params = _looked_up, served.PARAMS
        function = fhe.Function(run, [(values,), (-values,)])
        circuit = fhe.get_backend(backend).compile({"run": function}, params, fhe.FHEConfig(rounding="approximate"))
        keys = circuit.make_keys()
        return cls.made(circuit, keys, "run", values)

    @classmethod
    def made(cls, circuit: Any, keys: Any, name: str, *inputs: np.ndarray) -> Results:
        """Of a function whose inputs all come from the client; its first result is the client's."""
        results = circuit.run(name, circuit.encrypt(keys, name, *inputs), keys.evaluation)
        return cls(circuit, keys, name, results[:1], circuit.decrypt(keys, name, results[:1])[0].shape)

    def outcome(self, edits: list[parsers.Edit]) -> tuple[str, str | None]:
        """What became of a damaged result in an envelope that is right, and what is wrong with that, if anything."""
        opened = envelope.unpack(self.results[0], f"output 0 of {self.name}", self.circuit.id)
        part = parsers.damaged(opened.parts[0], edits)
        try:
            data = envelope.pack(opened.kind, self.circuit.id, opened.keys, [part])
            (found,) = self.circuit.decrypt(self.keys, self.name, [data])
        except fhe.FHEError as error:
            return "refused", _not_one_line(error)
        except Exception as error:
            return "raised", f"{type(error).__name__}: {str(error)[:200]}"
        return "decrypted", None if found.shape == self.shape else f"a result of shape {found.shape}"


def _rotated(ops: Any, params: Any, x: Any) -> tuple[Any]:
    return (ops.sum_of_products([ops.rotate(x, 1)], [x]),)


def _looked_up(ops: Any, params: Any, x: Any) -> tuple[Any]:
    return (ops.lookup(params["table"], x),)
