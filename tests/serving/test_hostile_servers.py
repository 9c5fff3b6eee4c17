"""What a hostile server can do to a client: waste its time, within patience, and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

import linears
import tampering
from helpers import one_line
from jaxgpt2.serving import remote as remote_module
from jaxgpt2.serving.bundle import FORMAT
from jaxgpt2.serving.remote import Connection, Mismatch, Refused, Remote, RemoteOwner, ServerError
from linears import Request, Said
from served import small_circuit

DEEP = b"[" * 100_000 + b"]" * 100_000
SESSION = "a" * 32


@contextlib.contextmanager
def connected(say: Callable[[Request], Said], patience: float = 2.0) -> Any:
    with linears.serving(say) as url, contextlib.closing(Connection(url, patience=patience)) as connection:
        yield connection


def always(status: int, content: bytes = b"", **headers: Any) -> Callable[[Request], Said]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: (status, named, content)


def problem(status: int, code: str, detail: str = "no", **headers: Any) -> Callable[[Request], Said]:
    return always(status, json.dumps({"code": code, "detail": detail}).encode(), **headers)


# --- any request ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["specification", "check", "linear", "upload"])
@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"\xff\xfe", b"null", b"[]", b"5", b'"text"', b"{}", b'{"circuits": 5}', DEEP, b'{"a":' * 99_999],
)
def test_junk_is_one_clear_line(path, content):
    shapes = {"h.0.attn.c_attn": (32, 96)}
    with connected(always(200, content)) as connection:
        use = {
            "specification": connection.specification,
            "check": lambda: connection.check("b" * 64, []),
            "linear": lambda: RemoteOwner(connection, shapes).check("b" * 64),
            "upload": lambda: connection.upload(b"keys"),
        }[path]
        if path == "specification" and content.startswith(b"{") and len(content) < 100:
            use()
            return
        with one_line(ServerError):
            use()


@pytest.mark.parametrize("chunked", [True, False])
def test_endless_answers_end(chunked, monkeypatch):
    monkeypatch.setattr(remote_module, "MOST_JSON", 10_000)
    body = b"\n".join([b"400\r\n" + b"x" * 1024 + b"\r"] * 1000) if chunked else b"x" * 1_000_000
    headers = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": 10**15}
    with connected(lambda request: (200, headers, body)) as connection:
        with one_line(ServerError, "answers with more than 5,000 bytes"):
            connection.request("GET", "/specification", limit=5000)
        assert connection.traffic.received == 0


def test_refusals_have_a_size_too():
    with connected(always(422, b"x" * 10_000_000)) as connection, one_line(ServerError, "more than 65,536 bytes"):
        connection.request("GET", "/specification")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP"])
def test_compressed_answers_are_refused(encoding):
    bomb = gzip.compress(bytes(10_000_000))
    asked = []

    def say(request: Request) -> Said:
        asked.append(request)
        return 200, {"Content-Encoding": encoding}, bomb

    with connected(say) as connection, one_line(ServerError, "compressed"):
        connection.specification()
    assert len(asked) == 1


@contextlib.contextmanager
def dripping(first: bytes, drop: bytes, pause: float) -> Iterator[str]:
    """A server that answers anything with some bytes, and then with a few more again and again; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(1 << 16)
            connection.sendall(first)
            while True:
                connection.sendall(drop)
                time.sleep(pause)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(
    ("first", "drop", "pause"),
    [
        (b"", b"", 0.05),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02),  # a header without end
        (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n", 0.02),  # headers without end
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.02),  # answers before the answer
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.02),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x", 0.02),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 60000\r\n\r\n", b"x", 0.02),
    ],
)
def test_answers_that_hardly_move(first, drop, pause):
    """A byte now and then keeps no client for ever."""
    with dripping(first, drop, pause) as url, contextlib.closing(Connection(url, patience=0.4)) as connection:
        started = time.monotonic()
        with one_line(ServerError, "does not answer"):
            connection.request("GET", "/specification")
        assert time.monotonic() - started < 10


def test_patience_is_that_of_a_whole_text():
    """A server that fails now and then wastes no more time with many requests than with one."""
    asked = []

    def say(request: Request) -> Said:
        asked.append(request)
        return (200, {}, b"{}") if len(asked) % 2 else problem(503, "busy")(request)

    with connected(say, patience=1.5) as connection:
        started = time.monotonic()
        with one_line(Refused, "503 busy"):
            for _ in range(1000):
                connection.specification()
        assert time.monotonic() - started < 10


def test_requests_that_fail_at_the_same_time_count_once():
    connection = Connection("http://127.0.0.1:1")
    assert connection._wasted(0.0, 3.0) == 3.0
    assert connection._wasted(1.0, 2.0) == 3.0
    assert connection._wasted(2.0, 5.0) == 5.0
    assert connection._wasted(10.0, 11.0) == 6.0
    assert connection._wasted(4.0, 10.5) == 11.0
    assert connection._wasted(4000.0, 4001.0) == 1.0  # what is long ago is forgiven
    connection.close()


@pytest.mark.parametrize("after", ["\xb2", "-1", "1e400", "inf", "nan", "9" * 400, "99999", "soon",
                                   "Wed, 21 Oct 2099 07:28:00 GMT"])  # fmt: skip
def test_a_pause_that_is_no_small_number_is_ignored(after):
    with connected(problem(429, "busy", Retry_After=after)) as connection:
        started = time.monotonic()
        with one_line(Refused, "429 busy"):
            connection.request("GET", "/specification")
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("status", [429, 503, 408, 502])
def test_not_now_for_ever_ends_with_patience(status):
    asked = []

    def say(request: Request) -> Said:
        asked.append(request)
        return problem(status, "busy", Retry_After=1 if status == 429 else "x")(request)

    with connected(say, patience=1.5) as connection:
        started = time.monotonic()
        with one_line(Refused, f"{status} busy"):
            connection.request("GET", "/specification")
        assert time.monotonic() - started < 3
    assert len(asked) > 1


def test_a_server_that_hangs_up_for_ever():
    # Pauses are random: three tries take up to 2.6 s.
    with connected(lambda request: None, 10.0) as connection, one_line(ServerError, "takes connections and ends them"):
        connection.specification()


def test_words_of_a_server_are_harmless(caplog):
    nasty = "a\r\nb\x1b[2J\x9b\u202e" + "c" * 5000
    found = {"format": nasty, "version": nasty, "bundle": nasty, "circuits": {nasty: {"id": nasty}}}
    for say in (
        problem(422, "x\x1b", nasty),
        problem(429, "x", nasty, Retry_After=1),
        always(200, json.dumps(found).encode()),
    ):
        with connected(say, patience=0.5) as connection, caplog.at_level(logging.WARNING):
            for use in (lambda: connection.check("b" * 64, []), lambda: RemoteOwner(connection, {}).check("b" * 64)):
                with pytest.raises(ServerError) as caught:
                    use()
                assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_no_cookie_is_kept():
    seen = []

    def say(request: Request) -> Said:
        seen.append(request)
        return 200, {"Set-Cookie": "who=you; Path=/"}, b"{}"

    with connected(say) as connection:
        connection.specification()
        connection.specification()
    assert len(seen) == 2 and not any("cookie" in request.headers.lower() for request in seen)


# --- circuits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circuit() -> Any:
    return small_circuit()


def talking(batches: Callable[[Request], Said], keys: Callable[[Request], Said] | None = None) -> Any:
    """A server of circuits that is honest until a batch comes."""
    asked: list[str] = []

    def say(request: Request) -> Said:
        asked.append(f"{request.method} {re.sub('[0-9a-f]{32,}', '*', request.path)}")
        if request.path.startswith("/keys"):
            return (keys or always(200, b'{"received": 0, "complete": true}'))(request)
        if request.path == "/sessions":
            return 201, {}, json.dumps({"session": SESSION, "expires_after": 60.0}).encode()
        return batches(request)

    return say, asked


def run(connection: Connection, circuit: Any) -> Any:
    party = Remote(connection, circuit, circuit.make_keys())
    return party.decrypt("nap", party.run("nap", party.encrypt("nap", np.zeros((1, 1), int))))


def test_computing_for_ever(circuit, monkeypatch):
    monkeypatch.setattr(remote_module, "LONGEST", 0.5)
    monkeypatch.setattr(remote_module, "PAUSE", 0.1)
    say, asked = talking(always(202))
    with connected(say) as connection, one_line(ServerError, "does not end"):
        run(connection, circuit)
    assert 3 < len(asked) < 12  # and not thousands of times


def test_keys_missing_again_and_again(circuit):
    """What a batch may ask for again, a text may ask for as often."""
    honest, asked = tampering.Circuits(circuit), []

    def say(request: Request) -> Said:
        if request.path.endswith("/batches"):
            asked.append(request)
            if len(asked) % 2:
                return problem(409, "keys_missing")(request)
        return honest(request)

    keys = circuit.make_keys()
    honest.evaluation = keys.evaluation
    with connected(say) as connection:
        party = Remote(connection, circuit, keys)
        with one_line(Refused, "409 keys_missing"):
            for _ in range(100):
                party.decrypt("nap", party.run("nap", party.encrypt("nap", np.zeros((1, 1), int))))


def test_keys_missing_for_ever(circuit):
    say, asked = talking(problem(409, "keys_missing"))
    with connected(say) as connection, one_line(Refused, "409 keys_missing"):
        run(connection, circuit)
    assert sum(line.startswith("POST /sessions/*/batches") for line in asked) == 1 + remote_module.EVICTIONS


def test_a_worker_that_dies_for_ever(circuit):
    say, asked = talking(problem(500, "worker_died"))
    with connected(say) as connection, one_line(Refused, "500 worker_died"):
        run(connection, circuit)
    assert sum(line.startswith("POST /sessions/*/batches") for line in asked) == 1 + remote_module.DEATHS


def test_a_session_that_is_lost_for_ever(circuit):
    say, _ = talking(problem(404, "no_session"))
    with connected(say) as connection, one_line(ServerError, "404 no_session"):
        run(connection, circuit)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"junk", DEEP, b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", msgpack.packb({"results": []}),
        msgpack.packb({"results": [b"a", b"b"]}), msgpack.packb({"results": 5}), msgpack.packb({"results": [5]}),
    ],
)  # fmt: skip
def test_answers_to_batches_that_are_none(circuit, content):
    say, _ = talking(always(200, content))
    with connected(say) as connection, one_line(ServerError, "answers with"):
        run(connection, circuit)


@pytest.mark.parametrize("received", [-1, 10**12, "5", 0.5, None])
def test_a_server_that_lies_about_keys(circuit, received):
    content = json.dumps({"received": received, "complete": False}).encode()
    say, asked = talking(always(202), always(200, content))
    with connected(say) as connection, one_line(ServerError, "does not say which keys it has"):
        run(connection, circuit)
    assert len(asked) == 1


def test_keys_that_never_arrive(circuit):
    def keys(request: Request) -> Said:
        if request.method == "GET":
            return 200, {}, b'{"received": 0, "complete": false}'
        return problem(409, "offset")(request)

    say, _ = talking(always(202), keys)
    with connected(say, patience=1.0) as connection:
        started = time.monotonic()
        with one_line(Refused, "409 offset"):
            run(connection, circuit)
        assert time.monotonic() - started < 5


def test_a_session_without_a_name(circuit):
    for content in (b"", DEEP, b'{"session": "../../x", "expires_after": 1.0}'):

        def say(request: Request, content: bytes = content) -> Said:
            return 200, {}, b'{"received": 0, "complete": true}' if request.path.startswith("/keys") else content

        with connected(say) as connection, one_line(ServerError, "opens no session"):
            run(connection, circuit)


def test_a_mismatch_is_told_as_one(circuit):
    content = {"format": FORMAT, "bundle": "c" * 64, "version": "9", "circuits": {"0.1": {"id": "d" * 64}}}
    say = always(200, json.dumps(content).encode())
    with connected(say) as connection, one_line(Mismatch, "another bundle (cccccccccccc, of 0.1)"):
        connection.check("b" * 64, [circuit.id])
