"""Every limit of the servers: at the limit, one beyond, and a hundred times beyond.

Whatever is asked for, the server's memory grows by less than ROOM, and another client waits less than WAIT. Both are
far above what was measured (60 MB, 0.3 s), and far below what requests without these limits took (4 GB, 22 s).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgpack
import numpy as np
import pytest

from fhe import rlwe
from jaxgpt2.serving import accounts, asgi, linear_server
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.accounts import Accounts
from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.limits import Limits
from jaxgpt2.serving.protocol import MAX_CALLS, MAX_INPUTS, MAX_ITEMS, MAX_PARTS
from linears import random_matrices
from served import Running, running, small_circuit, tokens_file

MEGABYTE = 10**6
ROOM, WAIT = 200 * MEGABYTE, 5.0
BODY, KEYS, SMALL = 20 * MEGABYTE, 3 * MEGABYTE, MEGABYTE
PATIENCE = 3.0
TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("tokens"), TOKENS)


@pytest.fixture(scope="module")
def circuit() -> Any:
    return small_circuit()


@contextlib.contextmanager
def impatient(*arguments: Any) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATIENCE", str(PATIENCE))
        with running(*arguments) as server:
            yield server


@pytest.fixture(scope="module")
def server(circuit, tokens, tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("circuits")
    bundles.write(directory / "server", "server", "b" * 64, {"0.1": circuit})
    limits = ["--body", BODY // MEGABYTE, "--keys", KEYS // MEGABYTE, "--keys-per-client", 2, "--session-size", 30,
              "--sessions", 5, "--sessions-per-client", 3, "--requests", 6, "--requests-per-client", 4]  # fmt: skip
    with impatient(directory / "server", directory / "state", "--tokens", tokens, "--workers", 1, *limits) as one:
        yield one


@pytest.fixture(scope="module")
def linear(tokens, tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("linear")
    limits = ["--requests", 6, "--requests-per-client", 4]
    with impatient(random_matrices(directory / "server"), directory / "state", "--tokens", tokens, *limits) as one:
        yield one


def client_of(server: Running, name: str = "alice") -> httpx2.Client:
    headers = {"Authorization": f"Bearer {TOKENS[name]}"}
    return httpx2.Client(base_url=server.url, headers=headers, timeout=60)


def packed(content: Any) -> bytes:
    data = msgpack.packb(content)
    assert data is not None
    return data


@contextlib.contextmanager
def bounded(server: Running) -> Iterator[None]:
    """Bounds for the server's peak of resident memory, and for the wait of another client's requests meanwhile."""
    memory = Path(f"/proc/{server.process.pid}")

    def peak() -> int:
        lines = (memory / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    over, waits = threading.Event(), [0.0]

    def ask() -> None:
        with client_of(server, "bob") as bob:
            while True:
                started = time.monotonic()
                assert bob.get("/specification").status_code == 200
                waits.append(time.monotonic() - started)
                if over.wait(0.02):
                    break

    (memory / "clear_refs").write_text("5")  # the peak is what there is now
    before, other = peak(), threading.Thread(target=ask)
    other.start()
    try:
        yield
    finally:
        over.set()
        other.join()
    assert len(waits) > 1
    assert max(waits) < WAIT and peak() - before < ROOM, (max(waits), peak() - before)
    assert server.process.poll() is None


@contextlib.contextmanager
def begun(server: Running, method: str, path: str, *headers: str, name: str = "alice") -> Iterator[socket.socket]:
    """A request of which only the head was sent, on a connection that has little room."""
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(30)
        line.connect(("127.0.0.1", httpx2.URL(server.url).port))
        lines = [f"{method} {path} HTTP/1.1", "Host: it", f"Authorization: Bearer {TOKENS[name]}", *headers]
        line.sendall("\r\n".join([*lines, "", ""]).encode())
        yield line


def status_of(line: socket.socket) -> int:
    return int(line.recv(12).split()[1])


# --- a server of circuits -------------------------------------------------------------------------


class Caller:
    """A client with keys and, while it is used, a session."""

    def __init__(self, server: Running, circuit: Any, name: str = "alice"):
        self.server, self.circuit, self.keys = server, circuit, circuit.make_keys(1)
        self.client = client_of(server, name)
        evaluation = self.keys.evaluation
        self.digest = hashlib.sha256(evaluation).hexdigest()
        self.put(self.digest, evaluation)
        zero = np.zeros((1, 1), int)
        self.uploads = [circuit.encrypt(self.keys, name, zero)[0] for name in ("nap", "widen")]

    def put(self, digest: str, content: bytes) -> httpx2.Response:
        span = f"bytes 0-{len(content) - 1}/{len(content)}"
        return self.client.put(f"/keys/{digest}", content=content, headers={"Content-Range": span})

    def open(self) -> httpx2.Response:
        return self.client.post("/sessions", json={"circuit": self.circuit.id, "keys": self.digest})

    def __enter__(self) -> Caller:
        self.session = self.open().json()["session"]
        self.path = f"/sessions/{self.session}/batches"
        return self

    def __exit__(self, *_: Any) -> None:
        while self.client.delete(f"/sessions/{self.session}").status_code == 409:
            time.sleep(0.1)

    def batch(self, **changes: Any) -> bytes:
        content = {"request": secrets.token_hex(16), "calls": [], "uploads": self.uploads, "results": []}
        return packed(content | changes)

    def post(self, content: bytes) -> tuple[int, str]:
        answer = self.client.post(self.path, content=content)
        return answer.status_code, "" if answer.is_success else answer.json()["code"]


@pytest.fixture(scope="module")
def caller(server, circuit) -> Caller:
    return Caller(server, circuit)


def call(number: int, function: str = "nap", inputs: Any = (0,)) -> dict[str, Any]:
    return {"id": number, "function": function, "inputs": list(inputs)}


def widen(number: int) -> dict[str, Any]:
    return call(number, "widen", [1])


def results(count: int) -> list[dict[str, int]]:
    return [{"call": number, "output": 0} for number in range(count)]


def repeated(item: Any, count: int) -> bytes:
    """A list in MessagePack, of one thing many times."""
    return b"\xdd" + count.to_bytes(4, "big") + packed(item) * count


def message(**fields: bytes) -> bytes:
    """A batch in MessagePack, of which some fields are that already."""
    empty = {"request": packed(secrets.token_hex(16)), "calls": b"\x90", "uploads": b"\x90", "results": b"\x90"}
    content = {**empty, **fields}
    return bytes([0x80 + len(content)]) + b"".join(packed(name) + value for name, value in content.items())


def one_call(count: int) -> bytes:
    inputs = packed("inputs") + repeated(0, count)
    return b"\x91\x83" + packed("id") + packed(0) + packed("function") + packed("nap") + inputs


OK, MALFORMED = (200, ""), (422, "malformed")
RESULT = {"call": 7, "output": 0}


@pytest.mark.parametrize(
    ("make", "limit", "at"),
    [
        (lambda n: message(calls=repeated(call(0), n)), MAX_CALLS, (422, "inputs")),
        (lambda n: message(calls=one_call(n)), MAX_INPUTS, (422, "inputs")),
        (lambda n: message(uploads=repeated(b"", n)), MAX_ITEMS, OK),
        (lambda n: message(results=repeated(RESULT, n)), MAX_ITEMS, (422, "result_twice")),
        (lambda n: message(forget=repeated(RESULT, n)), MAX_ITEMS, OK),
        (lambda n: message(calls=repeated([{}] * 999, n // 1000)), MAX_PARTS, MALFORMED),
    ],
    ids=["calls", "inputs", "uploads", "results", "forget", "parts"],
)
def test_numbers_of_a_batch(server, caller, make, limit, at):
    # Where a hundred times as many are too many bytes, as many as there is room for.
    hundredfold = min(100 * limit, BODY * limit // len(make(limit)))
    with caller, bounded(server):
        for number in (limit, limit + 1, hundredfold):
            assert caller.post(make(number)) == (at if number == limit else MALFORMED)


def test_as_many_calls_as_a_batch_may_have(server, caller):
    with caller, bounded(server):
        content = caller.batch(calls=[call(number) for number in range(MAX_CALLS)], results=results(MAX_CALLS))
        assert caller.post(content) == OK


@pytest.mark.parametrize(
    "content",
    [
        b"\xdc\xff\xff" + (b"\xdc\xff\xff" + b"\x80" * 65535) * (BODY // 65538 - 1),  # empty maps
        b"\xdd\x00\x00\x4e\x20" * 1000 + b"\xc0" * (BODY - 5000),  # lists, each of them the first of another
        b"\x91" * BODY,
        b"\xdf\xff\xff\xff\xff" * (BODY // 5),
        b"\xc6\xff\xff\xff\xff" + bytes(BODY - 5),
        packed("a" * (BODY - 5)),
        bytes(BODY),
    ],
    ids=["maps", "lists", "deep", "long map", "long bytes", "text", "zeros"],
)
def test_bodies_that_are_larger_within(server, caller, content):
    with caller, bounded(server):
        assert caller.post(content) == MALFORMED


def test_bytes_of_a_batch(server, caller):
    with caller, bounded(server):
        rest = BODY - len(caller.batch(uploads=[bytes(BODY - 1000)]))
        for more, wanted in [(0, OK), (1, (413, "too_large"))]:
            content = caller.batch(uploads=[bytes(BODY - 1000 + rest + more)])
            assert (len(content), caller.post(content)) == (BODY + more, wanted)
        assert caller.client.post(caller.path, content=iter([bytes(MEGABYTE)] * 21)).status_code == 413
        with begun(server, "POST", caller.path, f"Content-Length: {100 * BODY}") as line:
            assert status_of(line) == 413


def test_a_result_is_asked_for_once(server, caller):
    for times, wanted in [(1, OK), (2, (422, "result_twice")), (100, (422, "result_twice"))]:
        with caller:
            content = caller.batch(calls=[widen(0)], results=results(1) * times)
            with bounded(server):
                assert caller.post(content) == wanted


def test_bytes_of_a_session(server, caller):
    """Of 30 MB, where an answer of 1.6 MB has its place too."""
    for calls, wanted in [(18, OK), (19, (413, "session_full")), (1000, (413, "session_full"))]:
        with caller:
            content = caller.batch(calls=[widen(number) for number in range(calls)], results=results(calls))
            with bounded(server):
                assert caller.post(content) == wanted


def test_sessions(server, circuit, caller):
    with caller, bounded(server):
        opened = [caller.open() for _ in range(3 + 97)]
        assert [answer.status_code for answer in opened] == [201] * 2 + [429] * 98
        bob = Caller(server, circuit, "bob")
        assert [bob.open().status_code for _ in range(20)] == [201] * 2 + [429] * 18  # of both together
        for answer in opened[:2]:
            caller.client.delete(f"/sessions/{answer.json()['session']}")
        for path in (server.log.parent / "state" / "sessions").iterdir():
            bob.client.delete(f"/sessions/{path.name}")


def refusals_while_full(server: Running, path: str, size: int) -> list[int]:
    """The statuses of a hundred requests of a client that has as many in flight as it may: 4. Then those four, of which
    only heads were sent, are given up."""
    head = ["POST", path, f"Content-Length: {size}"]
    for _ in range(5):
        refused: list[int] = []
        with contextlib.ExitStack() as stack:
            lines = [stack.enter_context(begun(server, *head)) for _ in range(4)]
            time.sleep(0.2)
            while len(refused) < 100 and not select.select(lines, [], [], 0)[0]:
                with begun(server, *head) as line:
                    refused.append(status_of(line))
            if len(refused) == 100:
                assert [status_of(line) for line in lines] == [408] * 4
                return refused
    pytest.fail("they are given up before a hundred others are refused")


def test_requests_at_once(server, caller):
    """Those that send too little lose their places."""
    with caller, bounded(server):
        assert refusals_while_full(server, caller.path, 1000) == [429] * 100
        assert caller.post(caller.batch()) == OK


def test_keys(server, caller):
    def put(size: int) -> int:
        content = secrets.token_bytes(min(size, 2 * KEYS))
        digest = hashlib.sha256(content).hexdigest()
        with begun(server, "PUT", f"/keys/{digest}", f"Content-Range: bytes 0-{size - 1}/{size}",
                   f"Content-Length: {size}") as line:  # fmt: skip
            if size <= KEYS:
                line.sendall(content)
            return status_of(line)

    keys = server.log.parent / "state" / "keys"
    share = KEYS // len({path.parent for path in keys.glob("*/*")})
    with bounded(server):
        assert [put(size) for size in (share, KEYS + 1, 100 * KEYS)] == [200, 413, 413]
    assert sum(path.stat().st_size for path in keys.glob("*/*")) <= KEYS
    caller.put(caller.digest, caller.keys.evaluation)


def test_an_announced_upload_takes_nothing_and_loses_its_place(server, caller):
    with bounded(server), contextlib.ExitStack() as stack:
        lines = [
            stack.enter_context(
                begun(server, "PUT", f"/keys/{n:064x}", f"Content-Range: bytes 0-{SMALL - 1}/{SMALL}",
                      f"Content-Length: {SMALL}")
            )
            for n in range(2)
        ]  # fmt: skip
        assert caller.client.get(f"/keys/{caller.digest}").json()["complete"]
        started = time.monotonic()
        while time.monotonic() - started < 0.8 * PATIENCE:  # a byte now and then is not enough
            for line in lines:
                line.sendall(b"x")
            time.sleep(0.2)
        assert [status_of(line) for line in lines] == [408, 408]
    assert caller.put(caller.digest, caller.keys.evaluation).status_code in (200, 409)


def test_readers_that_do_not_read(server, caller):
    """They are requests in flight, until they are given up."""
    with caller, bounded(server), contextlib.ExitStack() as stack:
        content = caller.batch(calls=[widen(number) for number in range(18)], results=results(18))
        assert caller.post(content) == OK
        lines = []
        for _ in range(4):
            line = stack.enter_context(begun(server, "POST", caller.path, f"Content-Length: {len(content)}"))
            line.sendall(content)
            assert status_of(line) == 200
            lines.append(line)
        assert caller.post(content) == (429, "in_flight")
        deadline = time.monotonic() + 10 * PATIENCE
        while caller.post(content) != OK:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for line in lines:  # the rest of their answers is not there any more
            with contextlib.suppress(ConnectionError):
                while line.recv(1 << 20):
                    pass


# --- a server of linear layers --------------------------------------------------------------------

FEATURE, OUTPUT = rlwe.Parameters().feature_bytes, rlwe.Parameters().output_bytes
INPUTS, OUTPUTS = 32, 96  # of matrix 0


@pytest.mark.parametrize(
    ("phase", "limit", "step"),
    [("online", 4 * INPUTS * linear_server.MOST_ROWS, 4 * INPUTS), ("ahead", INPUTS * FEATURE, 1)],
)
def test_bytes_of_linear_requests(linear, phase, limit, step):
    path = f"/matrices/0/{phase}"
    with bounded(linear), client_of(linear) as client:
        assert client.post(path, content=bytes(limit)).status_code == 200
        for size in (limit + step, 100 * limit):
            with begun(linear, "POST", path, f"Content-Length: {size}") as line:
                assert status_of(line) == 413


def test_linear_requests_at_once(linear):
    with bounded(linear), client_of(linear) as client:
        assert refusals_while_full(linear, "/matrices/0/ahead", INPUTS * FEATURE) == [429] * 100
        assert client.post("/matrices/0/online", content=bytes(4 * INPUTS)).status_code == 200


def test_linear_metrics(linear):
    with client_of(linear) as client:
        assert client.get("/metrics").status_code == 403


# --- both -----------------------------------------------------------------------------------------


def test_room_for_bodies(monkeypatch):
    monkeypatch.setattr(accounts, "MOST_HELD", 1000)
    own = Accounts(None, Limits())
    with own.room("alice") as first, own.room("alice") as second, own.room("bob") as third:
        first(300)
        second(200)
        for size in (1, 100 * 1000):
            with pytest.raises(APIError, match="leave no room"), own.room("alice") as fourth:
                fourth(size)
        third(500)
        for size in (1, 100 * 1000):
            with pytest.raises(APIError, match="leave no room"), own.room("carol") as fourth:
                fourth(size)
        assert own.held == {"alice": 500, "bob": 500}
    assert not own.held
    with own.room("alice") as alone:  # larger than all room: better than never
        alone(5000)


def test_bytes_are_counted_as_they_go(monkeypatch):
    """And not as they are announced; a client that takes nothing is given up, and its place is free."""
    monkeypatch.setattr(asgi, "PATIENCE", 0.05)
    metrics, places = asgi.Metrics(), Accounts(None, Limits())

    async def application(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        message = await receive()
        asgi.until_answered(asgi.Request(scope, receive), places.admitted("alice"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(3 * asgi.CHUNK + 1) + message["body"]})

    async def run(taken: int) -> list[int]:
        sizes: list[int] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"12345", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                if len(sizes) == taken:
                    await asyncio.Event().wait()
                assert places.in_flight == {"alice": 1}
                sizes.append(len(message["body"]))

        headers = [(b"content-length", str(2**64 - 1).encode())]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        await asgi.Watch(application, metrics, ())(scope, receive, send)
        assert not places.in_flight
        return sizes

    assert asyncio.run(run(4)) == [asgi.CHUNK] * 3 + [6]
    assert asyncio.run(run(2)) == [asgi.CHUNK] * 2
    text = bytes(metrics.answer().body).decode()
    assert 'jaxgpt2_received_bytes_total{route="none"} 10.0' in text
    assert json.loads(text.partition('jaxgpt2_sent_bytes_total{route="none"} ')[2].split()[0]) == 5 * asgi.CHUNK + 6
