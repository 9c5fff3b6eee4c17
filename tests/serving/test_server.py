"""The server as clients meet it: its protocol, its limits, what it survives. Nothing is encrypted, so it is fast."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import msgpack
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fhe
import served
from fhe import clear, envelope
from jaxgpt2.cli import main
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving import remote as remote_module
from jaxgpt2.serving.files import APIError, KeyStore, SessionStore
from jaxgpt2.serving.protocol import Answer, Batch, unpack
from jaxgpt2.serving.remote import Connection, Mismatch, Refused, Remote, ServerError
from jaxgpt2.serving.server import Server, ServerSettings, make_app
from jaxgpt2.serving.work import Done, Job, perform
from jaxgpt2.serving.workers import Scheduler, WorkerDied
from served import FATAL, PARAMS, Running, certificates, running, small_circuit

IDENTITY = "b" * 64
TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob", "metrics": "token-of-metrics"}
ROW = np.array([[1, -2, 3, 0]])


@pytest.fixture(scope="module")
def circuit() -> Any:
    return small_circuit()


@pytest.fixture(scope="module")
def bundle(circuit, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "server"
    bundles.write(directory, "server", IDENTITY, {"0.1": circuit})
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    lines = [f"{name} {hashlib.sha256(token.encode()).hexdigest()}" for name, token in TOKENS.items()]
    path.write_text("\n".join(["# name, SHA-256 of the token", "", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def server(bundle, tokens, tmp_path_factory):
    with running(bundle, tmp_path_factory.mktemp("server") / "state", "--tokens", tokens, "--body", 1) as one:
        yield one


def connection(server: Running, name: str | None = "alice", patience: float = 30.0) -> Connection:
    return Connection(server.url, TOKENS[name] if name else None, patience=patience)


def remote(server: Running, circuit: Any, name: str | None = "alice") -> Any:
    return Remote(connection(server, name), circuit, circuit.make_keys())


def raw(server: Running, name: str | None = "alice") -> httpx2.Client:
    headers = {"Authorization": f"Bearer {TOKENS[name]}"} if name else {}
    return httpx2.Client(base_url=server.url, headers=headers, timeout=60)


def batch_of(party: Any, name: str, x: np.ndarray, call: int = 0, **changes: Any) -> bytes:
    """A batch with one call, of this number, as it goes over the wire."""
    content = {
        "request": secrets.token_hex(16),
        "calls": [{"id": call, "function": name, "inputs": [0]}],
        "uploads": list(party.encrypt(name, x)),
        "results": [{"call": call, "output": 0}],
    }
    return packed(content | changes)


def packed(content: Any) -> bytes:
    data = msgpack.packb(content)
    assert data is not None
    return data


def run(party: Any, name: str, x: np.ndarray) -> np.ndarray:
    (result,) = party.decrypt(name, party.run(name, party.encrypt(name, x))[:1])
    return result


def expected(x: np.ndarray) -> np.ndarray:
    ops = fhe.NumpyOps()
    return served.attend(ops, PARAMS, *served.project(ops, PARAMS, x))[0]


def session_of(server: Running, party: Any, client: httpx2.Client) -> str:
    """A session opened by hand."""
    keys = party.keys.evaluation
    digest = hashlib.sha256(keys).hexdigest()
    span = {"Content-Range": f"bytes 0-{len(keys) - 1}/{len(keys)}"}
    assert client.put(f"/keys/{digest}", content=keys, headers=span).is_success
    return client.post("/sessions", json={"circuit": party.circuit.id, "keys": digest}).json()["session"]


# --- the protocol -------------------------------------------------------------------------------


def test_results_stay_on_the_server_and_calls_travel_together(server, circuit):
    party = remote(server, circuit)
    party.connection.check(IDENTITY, [circuit.id])
    run(party, "nap", np.zeros((1, 1), int))
    before = party.connection.traffic.requests
    q, k = party.run("project", party.encrypt("project", ROW))
    (result,) = party.decrypt("attend", party.run("attend", [q, k]))
    assert np.array_equal(result, expected(ROW))
    assert party.connection.traffic.requests == before + 1  # both calls in one round trip
    (again,) = party.decrypt("attend", party.run("attend", [q, k]))  # from what the server kept
    assert np.array_equal(again, expected(ROW))
    with pytest.raises(ServerError, match="stays on the server"):  # what is kept for later calls is not given away
        party.decrypt("project", [k])

    def kept() -> list[str]:
        state = server.log.parent / "state" / "sessions" / str(party._session)
        return sorted(path.name for path in state.glob("[0-9]*"))

    assert len(kept()) == 2
    del q
    run(party, "nap", np.zeros((1, 1), int))
    assert len(kept()) == 1  # what the client dropped, the server drops
    party.close()
    assert not kept()


def test_a_call_number_used_twice_opens_nothing(server, circuit):
    """Else what the first call left on the server would be handed out under the second one's name."""
    party = remote(server, circuit)
    row, still = party.encrypt("project", ROW), party.encrypt("nap", np.zeros((1, 1), int))
    project = {"id": 0, "function": "project", "inputs": [0]}
    nap = {"id": 0, "function": "nap", "inputs": [1]}
    both = {"calls": [project, nap], "uploads": [*row, *still]}
    with raw(server) as client:
        path = f"/sessions/{session_of(server, party, client)}/batches"
        for output in (0, 1):
            answer = client.post(path, content=batch_of(party, "nap", np.zeros((1, 1), int), **both,
                                                        results=[{"call": 0, "output": output}]))  # fmt: skip
            assert (answer.status_code, answer.json()["code"]) == (422, "call_twice")
        assert client.post(path, content=batch_of(party, "project", ROW, results=[])).is_success
        answer = client.post(path, content=batch_of(party, "nap", np.zeros((1, 1), int)))
        assert (answer.status_code, answer.json()["code"]) == (422, "call_twice")


def test_a_worker_puts_nothing_into_an_answer_that_stays_on_the_server(circuit, tmp_path):
    """Whatever the checks before it let through."""
    circuit.save(tmp_path / "circuit")
    keys = circuit.make_keys()
    (tmp_path / "keys").write_bytes(keys.evaluation)
    uploads = [*circuit.encrypt(keys, "project", ROW), *circuit.encrypt(keys, "nap", np.zeros((1, 1), int))]
    calls = [{"id": 0, "function": "project", "inputs": [0]}, {"id": 0, "function": "nap", "inputs": [1]}]
    for output in (0, 1):
        content = {"request": "0" * 32, "calls": calls, "uploads": uploads, "results": [{"call": 0, "output": output}]}
        job = Job("clear", tmp_path / "circuit", tmp_path / "keys", tmp_path, packed(content), 1, 10**6)
        done = perform(job)
        if output == 0:  # the second call's own, for the client
            answer = unpack(Answer, (tmp_path / f"answer.{'0' * 32}").read_bytes())
            (found,) = circuit.decrypt(keys, "nap", answer.results)
            assert done.error is None and not found.any()
        else:
            assert done.error is not None and done.error[1] == "kept"


def test_the_api_describes_itself(server):
    client = raw(server, None)
    assert client.get("/healthz").json() == {"status": "ok"}
    description = client.get("/openapi.json").json()
    assert {"/specification", "/keys/{digest}", "/sessions", "/sessions/{identity}/batches"} <= set(
        description["paths"]
    )
    body = description["paths"]["/sessions/{identity}/batches"]["post"]["requestBody"]["content"]
    assert set(body["application/vnd.msgpack"]["schema"]["properties"]) == set(Batch.model_fields)
    assert "$defs" not in json.dumps(body)
    found = raw(server).get("/specification").json()
    assert found["bundle"] == IDENTITY
    assert set(found["circuits"]["0.1"]["functions"]) == {"project", "attend", "nap", "crash", "widen"}


def test_a_server_does_without_jax():
    """It would take longer to start, and three times the memory."""
    code = "import sys, jaxgpt2.serving.server; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_metrics_are_for_their_own_token(server):
    assert b"jaxgpt2_requests_total" in raw(server, "metrics").get("/metrics").content
    assert raw(server, "alice").get("/metrics").status_code == 403
    assert raw(server, None).get("/metrics").status_code == 401
    assert raw(server, "metrics").get("/specification").status_code == 403


def test_without_tokens_metrics_are_for_all_and_with_them_for_no_other_name(bundle, tmp_path):
    from starlette.testclient import TestClient

    own = bundles.Bundle.read(bundle, "server")
    for tokens, status in [(None, 200), ({hashlib.sha256(b"token").hexdigest(): "anybody"}, 403)]:
        app = make_app(Server(own, ServerSettings(tmp_path, tokens=tokens), []))
        with TestClient(app, headers={"Authorization": "Bearer token"}) as client:
            assert client.get("/metrics").status_code == status


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic YTpi", "Bearer", "Bearer token-of-alice extra"])
def test_without_a_token_nothing_is_said(server, header):
    headers = {} if header is None else {"Authorization": header}
    client = httpx2.Client(base_url=server.url, headers=headers)
    for method, path in [("GET", "/specification"), ("GET", f"/keys/{'a' * 64}"), ("PUT", f"/keys/{'a' * 64}"),
                         ("POST", "/sessions"), ("DELETE", f"/sessions/{'a' * 32}"),
                         ("POST", f"/sessions/{'a' * 32}/batches")]:  # fmt: skip
        response = client.request(method, path)
        assert response.status_code == 401
        assert response.json() == {
            "code": "unauthorized", "detail": "this server wants a bearer token that it knows"
        }  # fmt: skip
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_session_is_its_owners(server, circuit):
    alice, bob = remote(server, circuit), raw(server, "bob")
    run(alice, "nap", np.zeros((1, 1), int))
    content = batch_of(alice, "nap", np.zeros((1, 1), int))
    for response in (
        bob.post(f"/sessions/{alice._session}/batches", content=content),
        bob.delete(f"/sessions/{alice._session}"),
    ):
        assert response.status_code == 403
        assert response.json() == {"code": "not_yours", "detail": "this session belongs to another client"}
    assert bob.post(f"/sessions/{'0' * 32}/batches", content=content).status_code == 404
    # Nor are Alice's keys Bob's, though he knows their name.
    digest = hashlib.sha256(alice.keys.evaluation).hexdigest()
    assert bob.get(f"/keys/{digest}").json() == {"received": 0, "complete": False}
    assert bob.post("/sessions", json={"circuit": circuit.id, "keys": digest}).json()["code"] == "keys_missing"
    run(alice, "nap", np.zeros((1, 1), int))


def test_a_client_of_another_bundle_is_told_at_once(server, circuit):
    with pytest.raises(Mismatch, match=r"another bundle \(bbbbbbbbbbbb, of 0.1\), this client is of cccccccccccc"):
        connection(server).check("c" * 64, [circuit.id])
    with pytest.raises(Mismatch, match="another bundle"):
        connection(server).check(IDENTITY, ["d" * 64])
    other = fhe.get_backend("clear").compile({"nap": fhe.Function(served.nap, [(ROW,)])}, None, fhe.FHEConfig())
    with pytest.raises(Refused, match="no such circuit"):
        run(remote(server, other), "nap", ROW * 0)


def test_a_batch_is_computed_once(server, circuit):
    party, client = remote(server, circuit), raw(server)
    session = session_of(server, party, client)

    def naps() -> float:
        text = raw(server, "metrics").get("/metrics").text
        lines = [
            line for line in text.splitlines() if line.startswith('jaxgpt2_function_seconds_count{function="nap"}')
        ]
        return float(lines[0].split()[-1]) if lines else 0.0

    before, content = naps(), batch_of(party, "nap", np.full((1, 1), 5))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: client.post(f"/sessions/{session}/batches", content=content), range(4)))
    answers.append(client.post(f"/sessions/{session}/batches", content=content))
    assert all(answer.status_code == 200 and answer.content == answers[0].content for answer in answers)
    assert naps() == before + 1


def test_long_work_is_waited_for_in_short_requests(server, circuit, monkeypatch):
    party, client = remote(server, circuit), raw(server)
    run(party, "nap", np.zeros((1, 1), int))
    request = secrets.token_hex(16)
    content = batch_of(party, "nap", np.full((1, 1), 8), call=party._count, request=request)
    party._count += 1
    path = f"/sessions/{party._session}/batches"
    assert client.get(f"{path}/{request}").json()["code"] == "no_batch"
    with pytest.raises(httpx2.ReadTimeout):  # the line is lost
        client.post(path, content=content, timeout=0.3)
    assert client.get(f"{path}/{request}").status_code == 200

    sent, once = [], party.connection.once

    def broken(method: str, *arguments: Any, **options: Any) -> httpx2.Response:
        """Loses the first answer to a batch."""
        response = once(method, *arguments, **options)
        sent.append(method)
        if sent == ["POST"]:
            raise remote_module._Again(ServerError("lost"))
        return response

    monkeypatch.setattr(party.connection, "once", broken)
    assert np.array_equal(run(party, "nap", np.full((1, 1), 2)), [[2]])
    assert sent == ["POST", "GET"]  # what arrived is not sent again


def test_another_batch_of_a_session_waits_its_turn(server, circuit):
    party, client = remote(server, circuit), raw(server)
    session = session_of(server, party, client)
    first = threading.Thread(
        target=client.post, args=[f"/sessions/{session}/batches"],
        kwargs={"content": batch_of(party, "nap", np.full((1, 1), 10))},
    )  # fmt: skip
    first.start()
    time.sleep(0.4)
    refused = client.post(f"/sessions/{session}/batches", content=batch_of(party, "nap", np.zeros((1, 1), int)))
    assert (refused.status_code, refused.json()["code"]) == (409, "in_order")
    assert client.delete(f"/sessions/{session}").json()["code"] == "in_order"
    first.join()


# --- keys ---------------------------------------------------------------------------------------


def test_an_upload_goes_on_where_it_broke(server):
    client, keys = raw(server), os.urandom(300_000)
    digest = hashlib.sha256(keys).hexdigest()

    def put(data: Any, start: int) -> httpx2.Response:
        span = {"Content-Range": f"bytes {start}-{len(keys) - 1}/{len(keys)}"}
        return client.put(f"/keys/{digest}", content=data, headers=span)

    def breaks():
        yield keys[:100_000]
        raise OSError("the line is cut")

    with pytest.raises(OSError, match="cut"):
        put(breaks(), 0)
    deadline = time.monotonic() + 5
    while (status := client.get(f"/keys/{digest}").json())["received"] != 100_000:
        assert time.monotonic() < deadline, status
    assert put(keys, 0).json()["code"] in ("offset", "arriving")
    time.sleep(0.2)
    assert (put(keys[100_000:], 100_000).json()) == {"received": 300_000, "complete": True}
    assert client.get(f"/keys/{digest}").json() == {"received": 300_000, "complete": True}


def test_keys_are_what_their_name_says(server):
    client, digest = raw(server), "a" * 64

    def put(data: bytes, span: str) -> tuple[int, str]:
        response = client.put(f"/keys/{digest}", content=data, headers={"Content-Range": span})
        return response.status_code, response.json()["code"]

    assert put(b"12345", "bytes 0-4/5") == (422, "digest")
    assert client.get(f"/keys/{digest}").json() == {"received": 0, "complete": False}
    assert put(b"123456", "bytes 0-4/5") == (413, "too_large")
    assert put(b"1", "bytes 0-99999999999999/100000000000000") == (413, "too_large")
    assert put(b"1", "bytes 7-9/10")[1] == "offset"
    assert put(b"", "bytes 5-4/5") == (409, "offset")
    for span in ("", "bytes", "bytes 0-4/*", "bytes 6-4/5", "bytes 0-3/5", "bytes -1-4/5", "words 0-4/5"):
        assert put(b"12345", span) == (400, "range")


class Store(KeyStore):
    """A store that is easy to fill, and tells who has what: the first letter of every set, in order of use."""

    def __init__(self, path: Path, **changes: Any):
        super().__init__(path, **{"capacity": 1000, "per_client": 4, "idle": 1000.0, **changes})
        self.now = time.time() - 100

    def add(self, client: str, letter: str, size: int) -> str:
        """Keys that come whole."""
        data = letter.encode() * size
        digest = hashlib.sha256(data).hexdigest()
        with self.receive(client, digest, 0, size) as upload:
            upload.take(size)
            upload.write(data)
        self.check(client, digest)
        self.finish(client, digest)
        self.touch(self.path(client, digest))
        return digest

    def touch(self, path: Path) -> None:
        self.now += 1
        os.utime(path, (self.now, self.now))

    def kept(self) -> str:
        paths = sorted(self.directory.glob("*/*"), key=lambda path: path.stat().st_mtime)
        return "".join(path.read_text()[:1] for path in paths)


def test_keys_have_so_many_bytes(tmp_path):
    store = Store(tmp_path)
    store.add("alice", "a", 1000)
    for size in (1001, 100 * 1000):
        with pytest.raises(APIError, match="this server keeps 1000 in all"):
            store.add("alice", "b", size)
    assert store.kept() == "a"


def test_a_client_has_so_many_sets_of_keys(tmp_path):
    store = Store(tmp_path, per_client=2)
    for letter in "abcd":
        store.add("alice", letter, 10)
    assert store.kept() == "cd"
    store.touch(next(path for path in tmp_path.glob("*/*") if path.read_text()[0] == "c"))
    store.add("alice", "e", 10)
    assert store.kept() == "ce"
    for number in range(200):
        store.add("alice", chr(200 + number), 10)
        assert len(store.kept()) == 2


def test_a_clients_keys_go_for_its_own(tmp_path):
    store = Store(tmp_path)
    first = store.add("alice", "a", 500)
    store.add("alice", "b", 400)
    with pytest.raises(APIError, match="upload them"):
        store.use("alice", "0" * 64)
    store.use("alice", first)
    store.add("alice", "c", 500)
    assert store.kept() in ("ac", "ca")
    assert store.size == 1000


def test_another_clients_keys_stay_within_its_share(tmp_path):
    """And what is beyond it goes to whoever has less than a share, not to who would have more."""
    store = Store(tmp_path)
    store.add("alice", "a", 400)
    store.add("alice", "b", 400)
    with pytest.raises(APIError, match="leave no room") as refused:
        store.add("bob", "c", 501)  # more than half of all
    assert (refused.value.status, refused.value.retry_after) == (503, 5)
    assert store.kept() == "ab"
    store.add("bob", "d", 500)
    assert store.kept() == "bd"
    with pytest.raises(APIError, match="leave no room"):
        store.add("carol", "e", 334)
    store.add("carol", "f", 300)  # within a third of all; alice and bob have more, and alice's were used before
    assert store.kept() == "df"
    store.add("carol", "g", 200)
    store.add("carol", "h", 200)  # beyond her share: her own go
    assert store.kept() == "dgh"


def test_keys_that_nobody_uses_go_for_anybodys(tmp_path):
    store = Store(tmp_path, idle=50.0)  # alice's were used longer ago
    store.add("alice", "a", 900)
    store.now = time.time()
    store.add("bob", "b", 900)
    assert store.kept() == "b"


def test_three_clients_with_room_for_one(tmp_path):
    """Those that come late are told before they send."""
    store = Store(tmp_path)
    with store.receive("alice", "1", 0, 800) as upload:
        upload.take(1)
        for client in ("bob", "carol"):
            with pytest.raises(APIError, match="leave no room"), store.receive(client, "1", 0, 800):
                pytest.fail("it is received")
        upload.take(799)


def test_keys_that_are_announced_take_no_room(tmp_path):
    store = Store(tmp_path)
    store.add("alice", "a", 600)
    with store.receive("bob", "1", 0, 500):  # and sends nothing
        assert store.kept() == "a" and store.size == 600
        store.add("alice", "b", 300)
        assert store.kept() == "ab"
    with store.receive("bob", "1", 0, 500) as upload:
        upload.take(99)
        upload.write(b"c" * 99)
        assert store.kept() == "abc"
        upload.take(2)
        assert store.kept() == "bc"  # alice had more than half
        with pytest.raises(APIError, match="more bytes than were announced"):
            upload.take(400)


def test_what_arrives_is_not_removed(tmp_path):
    store = Store(tmp_path, per_client=2)
    for digest in ("1", "2", "3"):  # begun, and left
        with store.receive("alice", digest, 0, 300) as upload:
            upload.take(1)
            upload.write(digest.encode())
        store.touch(store.path("alice", f"{digest}.partial"))
    assert [store.status("alice", digest)[0] for digest in ("1", "2", "3")] == [0, 1, 1]
    with store.receive("alice", "4", 0, 600) as four, store.receive("alice", "5", 0, 300) as five:
        for upload in (four, five):
            upload.take(1)
            upload.write(b"x")
        assert sorted(path.name for path in tmp_path.glob("*/*")) == ["4.partial", "5.partial"]
        with pytest.raises(APIError, match="2 sets of keys") as refused, store.receive("alice", "6", 0, 300):
            pass
        assert (refused.value.status, refused.value.retry_after) == (429, 5)
        four.take(599)
        with pytest.raises(APIError, match="leave no room"), store.receive("bob", "7", 0, 500):
            pass  # it is within bob's share, but what arrives stays
        store.add("bob", "b", 300)


def test_an_upload_of_which_only_the_check_is_missing_goes_on(bundle, circuit, tmp_path):
    """The server was killed between the last byte and its answer."""
    with running(bundle, tmp_path / "state") as server:
        party = remote(server, circuit, None)
        keys = party.keys.evaluation
        path = tmp_path / "state" / "keys" / "anybody" / hashlib.sha256(keys).hexdigest()
        path.parent.mkdir()
        path.with_name(f"{path.name}.partial").write_bytes(keys)
        assert np.array_equal(run(party, "nap", np.ones((1, 1), int)), [[1]])
        assert path.read_bytes() == keys
        assert party.connection.traffic.keys == 0


def test_keys_that_were_evicted_are_sent_again(bundle, circuit, tmp_path):
    with running(bundle, tmp_path / "state") as server:
        party = remote(server, circuit, None)
        run(party, "nap", np.zeros((1, 1), int))
        for path in (tmp_path / "state" / "keys").glob("*/*"):
            path.unlink()
        assert np.array_equal(run(party, "nap", np.ones((1, 1), int)), [[1]])


# --- limits -------------------------------------------------------------------------------------


def test_limits(bundle, circuit, tmp_path):
    limits = ["--sessions-per-client", 1, "--calls-per-minute", 6, "--idle", 2, "--body", 1,
              "--requests-per-client", 1]  # fmt: skip
    with running(bundle, tmp_path / "state", *limits) as server:
        party, client = remote(server, circuit, None), raw(server, None)
        session = session_of(server, party, client)
        keys = hashlib.sha256(party.keys.evaluation).hexdigest()
        path, zero = f"/sessions/{session}/batches", np.zeros((1, 1), int)

        def alone(content: bytes) -> Any:
            """A request's answer. The place of the one before is free a moment after its client has the answer."""
            deadline = time.monotonic() + 10
            while (response := client.post(path, content=content)).status_code == 429:
                if response.json()["code"] != "in_flight" or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            return response

        response = client.post("/sessions", json={"circuit": circuit.id, "keys": keys})
        assert (response.status_code, response.json()["code"]) == (429, "sessions")
        assert int(response.headers["Retry-After"]) >= 1

        assert client.post(path, content=bytes(1_000_001)).status_code == 413
        assert client.post(path, content=iter([bytes(600_000)] * 2)).status_code == 413
        wide = {"uploads": [bytes(900_000)] * 1, "calls": [], "results": []}
        assert alone(batch_of(party, "nap", zero, **wide)).status_code == 200

        def naps(first: int, count: int) -> dict[str, Any]:
            calls = [{"id": n, "function": "nap", "inputs": [0]} for n in range(first, first + count)]
            return {"calls": calls, "results": [{"call": first, "output": 0}]}

        with concurrent.futures.ThreadPoolExecutor() as pool:
            sleeping = batch_of(party, "nap", zero + 2, **naps(0, 5))
            asleep = pool.submit(alone, sleeping)
            time.sleep(0.5)
            response = client.post(path, content=sleeping)
            assert (response.status_code, response.json()["code"]) == (429, "in_flight")
            assert asleep.result().status_code == 200
        response = alone(batch_of(party, "nap", zero, **naps(5, 5)))
        assert (response.status_code, response.json()["code"]) == (429, "rate")
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        response = alone(batch_of(party, "nap", zero, **naps(5, 10)))
        assert (response.status_code, response.json()["code"]) == (422, "rate")

        deadline = time.monotonic() + 10
        while list((tmp_path / "state" / "sessions").iterdir()):  # expired, and gone before anyone asks
            assert time.monotonic() < deadline
            time.sleep(0.1)
        response = client.post(path, content=batch_of(party, "nap", zero))
        assert (response.status_code, response.json()["code"]) == (404, "no_session")


def test_a_session_has_room_for_so_many_bytes(server, circuit, tmp_path):
    party = remote(server, circuit)
    job = Job(
        "clear", server.bundle / "circuits" / "0.1", tmp_path / "keys", tmp_path / "session",
        batch_of(party, "project", ROW, results=[]), 1, 10**6,
    )  # fmt: skip
    job.session.mkdir()
    job.keys.write_bytes(party.keys.evaluation)

    def kept() -> int:
        return sum(path.stat().st_size for path in job.session.glob("[0-9]*"))

    full = (413, "session_full", "the session would hold more bytes than this server allows")
    assert perform(job).error is None
    size = kept()
    shutil.rmtree(job.session)
    job.session.mkdir()
    assert perform(dataclasses.replace(job, room=size - 1)).error == full
    assert not list(job.session.iterdir())  # nothing of a batch that does not fit
    assert perform(dataclasses.replace(job, room=size)).error is None
    # What the client wants back has its place there too.
    calls = [{"id": number, "function": "nap", "inputs": [0]} for number in range(1000)]
    nap = {"calls": calls, "results": [{"call": number, "output": 0} for number in range(1000)]}
    job = dataclasses.replace(job, batch=batch_of(party, "nap", np.zeros((1, 1), int), **nap))
    assert perform(dataclasses.replace(job, room=50_000)).error == full
    assert perform(job).error is None


def test_a_full_queue_says_when_to_come_back(bundle, circuit, tmp_path):
    with running(bundle, tmp_path / "state", "--queue", 1, "--workers", 1) as server:
        parties = [remote(server, circuit, None) for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            results = [pool.submit(run, party, "nap", np.full((1, 1), 4)) for party in parties]
            assert all(np.array_equal(result.result(), [[4]]) for result in results)  # they came back
        refused = [event for event in server.events() if event.get("status") == 503]
        assert refused


class Fake:
    """A worker that notes whose jobs it got."""

    def __init__(self):
        self.order: list[str] = []

    async def run(self, job: Any) -> Done:
        self.order.append(job.backend)
        await asyncio.sleep(0)
        if job.batch is not None:
            raise job.batch
        return Done()

    def close(self) -> None:
        self.order.append("closed")


def job_of(name: str, keys: str = "k", error: Any = None) -> Job:
    return Job(name, Path(), Path(keys), Path(), error, 1, 0)


def test_clients_take_turns():
    async def play() -> list[str]:
        worker = Fake()
        scheduler = Scheduler([worker], limit=10)
        jobs = [scheduler.run("a", job_of(f"a{n}")) for n in range(4)]
        jobs += [scheduler.run("b", job_of("b0")), scheduler.run("c", job_of("c0", error=WorkerDied("it"))),
                 scheduler.run("b", job_of("b1"))]  # fmt: skip
        done = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(result) for result in done] == [Done] * 5 + [WorkerDied, Done]
        await scheduler.finish()
        return worker.order

    # a0 begins before anyone else is there
    assert asyncio.run(play()) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "closed"]


def test_jobs_return_to_the_worker_that_has_their_keys():
    async def play() -> tuple[list[str], list[str]]:
        first, second = Fake(), Fake()
        scheduler = Scheduler([first, second], limit=10)
        for _ in range(3):
            await asyncio.gather(scheduler.run("a", job_of("a", "ka")), scheduler.run("b", job_of("b", "kb")))
        await scheduler.run("b", job_of("b", "kb"))
        await scheduler.run("a", job_of("a", "ka"))
        return first.order, second.order

    assert sorted(map(set, asyncio.run(play()))) == [{"a"}, {"b"}]


def test_a_full_queue_refuses():
    async def play() -> None:
        scheduler = Scheduler([Fake()], limit=1)
        jobs = [asyncio.ensure_future(scheduler.run("a", job_of("a"))) for _ in range(3)]
        done = await asyncio.gather(*jobs, return_exceptions=True)
        assert [getattr(result, "status", None) for result in done] == [None, None, 503]
        assert done[2].retry_after >= 1  # pyright: ignore[reportAttributeAccessIssue]

    asyncio.run(play())


# --- what breaks --------------------------------------------------------------------------------


def test_a_worker_that_dies_takes_one_request_with_it(server, circuit):
    party, client = remote(server, circuit), raw(server)
    session = session_of(server, party, client)
    path, fatal = f"/sessions/{session}/batches", np.full((1, 1), FATAL)
    response = client.post(path, content=batch_of(party, "crash", fatal))
    assert response.status_code == 500
    assert response.json() == {
        "code": "worker_died", "detail": "the process that computed this died; it has been replaced"
    }  # fmt: skip
    assert {event["event"] for event in server.events()} >= {"worker died"}  # all of the log can be read
    assert client.post(path, content=batch_of(party, "crash", fatal * 0)).status_code == 200
    with pytest.raises(Refused, match="died"):  # after a few tries
        run(party, "crash", fatal)
    assert np.array_equal(run(party, "nap", np.ones((1, 1), int)), [[1]])


def test_a_worker_killed_at_work_is_replaced_and_the_client_notices_nothing(bundle, circuit, tmp_path):
    with running(bundle, tmp_path / "state", "--workers", 1) as server:
        party = remote(server, circuit, None)
        run(party, "nap", np.zeros((1, 1), int))
        (worker,) = server.workers()
        timer = threading.Timer(0.5, os.kill, [worker, signal.SIGKILL])
        timer.start()
        assert np.array_equal(run(party, "nap", np.full((1, 1), 15)), [[15]])
        assert server.workers() != [worker]
        assert [event["event"] for event in server.events()].count("worker died") == 1


def test_too_long_a_batch_is_stopped(bundle, circuit, tmp_path):
    with running(bundle, tmp_path / "state", "--job", 3, "--workers", 1) as server:
        party = remote(server, circuit, None)
        run(party, "nap", np.zeros((1, 1), int))
        with pytest.raises(Refused, match="longer than 3 s"):
            run(party, "nap", np.full((1, 1), 600))
        assert np.array_equal(run(party, "nap", np.ones((1, 1), int)), [[1]])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_killed_and_started_again_goes_on(bundle, circuit, tmp_path):
    port = free_port()
    with running(bundle, tmp_path / "state", port=port) as server:
        party = remote(server, circuit, None)
        q, k = party.run("project", party.encrypt("project", ROW))
        party.decrypt("attend", party.run("attend", [q, k]))
        sent = party.connection.traffic.keys
        workers = server.workers()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            result = pool.submit(run, party, "nap", np.full((1, 1), 20))  # under way when the server dies
            time.sleep(0.5)
            server.process.kill()
            server.process.wait()
            with running(bundle, tmp_path / "state", port=port):
                assert np.array_equal(result.result(), [[20]])
                (again,) = party.decrypt("attend", party.run("attend", [q, k]))
                assert np.array_equal(again, expected(ROW))
                assert party.connection.traffic.keys == sent
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they end without their server
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_server_told_to_stop_finishes_what_it_does(bundle, circuit, tmp_path):
    with running(bundle, tmp_path / "state") as server:
        party = remote(server, circuit, None)
        run(party, "nap", np.zeros((1, 1), int))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            result = pool.submit(run, party, "nap", np.full((1, 1), 15))
            time.sleep(0.5)
            server.process.terminate()
            assert np.array_equal(result.result(), [[15]])
        assert server.process.wait(20) == 0
        assert server.events()[-1]["event"] == "stopped"
    with pytest.raises(ServerError, match="does not answer"):
        connection(server, None, patience=1).check(IDENTITY, [])


def test_a_state_directory_has_one_server(bundle, server):
    command = [sys.executable, "-m", "jaxgpt2.cli", "serve", str(bundle), "--state", str(server.log.parent / "state")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("jaxgpt2: another server uses")


def test_sessions_half_begun_are_swept(tmp_path):
    (tmp_path / "half").mkdir()
    old = SessionStore(tmp_path, idle=60, per_client=5, total=5, capacity=1)
    assert not list(tmp_path.iterdir())
    session = old.open("a", "c", "k")
    new = SessionStore(tmp_path, idle=60, per_client=5, total=5, capacity=1)
    assert new.get("a", session.id).circuit == "c"
    os.utime(session.path / "session.json", (1, 1))
    assert not SessionStore(tmp_path, idle=60, per_client=5, total=5, capacity=1).sessions


def test_sessions_of_another_bundle_are_gone(bundle, tmp_path):
    own = bundles.Bundle.read(bundle, "server")
    store = SessionStore(tmp_path / "sessions", idle=60, per_client=5, total=5, capacity=1)
    kept, _ = store.open("a", own.circuits[0].id, "k"), store.open("a", "c" * 64, "k")
    assert list(Server(own, ServerSettings(tmp_path), []).sessions.sessions) == [kept.id]


# --- TLS ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Path:
    return certificates(tmp_path_factory.mktemp("tls"))


def pair(authority: Path, name: str) -> tuple[Path, Path]:
    return authority / f"{name}.pem", authority / f"{name}.key"


def problem_of(url: str, **options: Any) -> str:
    """What a client says that asks a server of which it gets nothing."""
    with contextlib.closing(Connection(url, **options)) as line, pytest.raises(ServerError) as refused:
        line.check(IDENTITY, [])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_tls(bundle, circuit, authority, tmp_path):
    certificate, key = pair(authority, "server")
    with running(bundle, tmp_path / "state", "--tls-cert", certificate, "--tls-key", key) as server:
        assert server.url.startswith("https://")
        with contextlib.closing(Connection(server.url, authority=authority / "authority.pem")) as line:
            party = Remote(line, circuit, circuit.make_keys())
            assert np.array_equal(run(party, "nap", np.ones((1, 1), int)), [[1]])
        for trusted in (None, authority / "stranger.pem"):
            assert "its certificate is not trusted" in problem_of(server.url, authority=trusted)
        assert "is it https://?" in problem_of(server.url.replace("https", "http"))


def test_clients_need_a_certificate_where_the_server_says_so(bundle, circuit, authority, tmp_path):
    certificate, key = pair(authority, "server")
    trusted = authority / "authority.pem"
    options = ["--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", trusted]
    with running(bundle, tmp_path / "state", *options) as server:
        own = Connection(server.url, authority=trusted, certificate=pair(authority, "client"))
        with contextlib.closing(own):
            own.check(IDENTITY, [circuit.id])
        for other in (None, pair(authority, "stranger")):
            problem = problem_of(server.url, authority=trusted, certificate=other)
            assert "it wants a certificate of the client, or not this client's" in problem
        assert {event["event"] for event in server.events()} == {"listening", "request"}


def test_a_server_without_tls_says_so(server):
    assert "it does not speak TLS" in problem_of(server.url.replace("http", "https"))


# --- hostile bytes ------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@st.composite
def broken_batches(draw: st.DrawFn, party: Any) -> bytes:
    """A good batch with something wrong: a field, a type, a length, a ciphertext cut or with a bit turned."""
    (array,) = party.encrypt("project", ROW)
    content: dict[str, Any] = {
        "request": secrets.token_hex(16),
        "calls": [{"id": 0, "function": "project", "inputs": [0]},
                  {"id": 1, "function": "attend", "inputs": [{"call": 0, "output": 0}, {"call": 0, "output": 1}]}],
        "uploads": [array],
        "results": [{"call": 1, "output": 0}],
        "forget": [],
    }  # fmt: skip
    match draw(st.integers(0, 8)):
        case 0:
            content[draw(st.sampled_from(list(content)))] = draw(PLAIN)
        case 1:
            call = draw(st.integers(0, 1))
            content["calls"][call][draw(st.sampled_from(["id", "function", "inputs", "more"]))] = draw(PLAIN)
        case 2:
            content["uploads"] = [array[: draw(st.integers(0, len(array) - 1))]]
        case 3:
            turned = bytearray(array)
            turned[draw(st.integers(0, len(array) - 1))] ^= 1 << draw(st.integers(0, 7))
            content["uploads"] = [bytes(turned)]
        case 4:  # rightly summed, and wrong within
            body = bytearray(array[:-32])
            body[draw(st.integers(0, len(body) - 1))] ^= 1 << draw(st.integers(0, 7))
            content["uploads"] = [bytes(body) + hashlib.sha256(body).digest()]
        case 5:
            content["calls"][1]["inputs"][0] = {"call": draw(st.integers(-5, 2**40)), "output": draw(st.integers(0, 9))}
        case 6:
            del content[draw(st.sampled_from(["request", "calls", "uploads", "results"]))]
        case 7:
            x = np.zeros(draw(st.lists(st.integers(0, 4), max_size=4)), np.int64)
            content["uploads"] = party.circuit.signatures.pack_inputs(
                "project", party.circuit.id, party.keys.id, [clear._to_bytes(x)]
            )
        case 8:
            content["results"] = [{"call": draw(st.integers(0, 3)), "output": draw(st.integers(0, 2**31))}]
    data = packed(content)
    if draw(st.booleans()) and draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=5))
    return data


@pytest.mark.slow
def test_thousands_of_malformed_requests(server, circuit):
    """None is answered with 500, none kills the server, none spoils the next good request."""
    party, client = remote(server, circuit), raw(server)
    session = session_of(server, party, client)
    seen: dict[int, int] = {}

    def note(response: httpx2.Response) -> None:
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        assert response.status_code < 500, response.text
        if not response.is_success:
            problem = response.json()
            assert set(problem) == {"code", "detail"} and problem["detail"] and "\n" not in problem["detail"]
        if sum(seen.values()) % 100 == 0:
            q, k = party.run("project", party.encrypt("project", ROW))
            assert np.array_equal(party.decrypt("attend", party.run("attend", [q, k]))[0], expected(ROW))

    calm = settings(
        deadline=None,
        database=None,
        max_examples=1200,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

    @calm
    @given(content=broken_batches(party))
    def batches(content: bytes) -> None:
        note(client.post(f"/sessions/{session}/batches", content=content))

    @settings(calm, max_examples=400)
    @given(content=st.binary(max_size=300) | PLAIN.map(packed))
    def garbage(content: bytes) -> None:
        note(client.post(f"/sessions/{session}/batches", content=content))

    named = st.fixed_dictionaries({"circuit": st.text(), "keys": st.text()}).map(json.dumps)

    @settings(calm, max_examples=300)
    @given(content=st.binary(max_size=100) | (PLAIN.map(repr) | named).map(str.encode))
    def sessions(content: bytes) -> None:
        note(client.post("/sessions", content=content))

    @settings(calm, max_examples=300)
    @given(content=st.binary(max_size=100), name=st.from_regex(r"[0-9a-f]{64}|[ -~]{1,70}", fullmatch=True),
           span=st.from_regex(r"bytes [0-9]{1,3}-[0-9]{1,3}/[0-9]{1,3}|[ -~]{0,30}", fullmatch=True))  # fmt: skip
    def keys(content: bytes, name: str, span: str) -> None:
        note(client.put(f"/keys/{quote(name)}", content=content, headers={"Content-Range": span.strip()}))

    @settings(calm, max_examples=60)
    @given(content=st.binary(max_size=60))
    def sockets(content: bytes) -> None:
        with socket.create_connection(("127.0.0.1", httpx2.URL(server.url).port or 0), timeout=5) as line:
            line.sendall(content)

    for attack in (batches, garbage, sessions, keys, sockets):
        attack()
    assert sum(seen.values()) > 2000, seen
    assert server.process.poll() is None
    assert all(event.get("status", 0) < 500 or event.get("route") == "none" for event in server.events()[-2000:])


def test_strange_keys_are_refused_when_they_are_used(server, circuit):
    party, client = remote(server, circuit), raw(server)
    stranger = circuit.make_keys().evaluation
    other = envelope.pack("evaluation keys", "c" * 64, party.keys.id, [])
    for keys, reason in [
        (stranger, "made with keys"), (other, "made for circuit"), (b"nothing", "do not begin"),
        (stranger[:-1], "damaged"),
        (envelope.pack("keys", circuit.id, party.keys.id, []), "expected evaluation keys"),
    ]:  # fmt: skip
        digest = hashlib.sha256(keys).hexdigest()
        span = {"Content-Range": f"bytes 0-{len(keys) - 1}/{len(keys)}"}
        assert client.put(f"/keys/{digest}", content=keys, headers=span).is_success
        session = client.post("/sessions", json={"circuit": circuit.id, "keys": digest}).json()["session"]
        response = client.post(f"/sessions/{session}/batches", content=batch_of(party, "project", ROW, results=[]))
        assert (response.status_code, response.json()["code"]) == (422, "refused")
        assert reason in response.json()["detail"]
        assert client.delete(f"/sessions/{session}").status_code == 204


def test_logs_hold_no_payload_and_no_token(server, circuit):
    party, client = remote(server, circuit), raw(server)
    session = session_of(server, party, client)
    marker = b"PLANTED-MARKER"
    client.post(f"/sessions/{session}/batches", content=batch_of(party, "nap", ROW[:, :1], uploads=[marker]))
    client.post(f"/sessions/{session}/batches", content=packed({"request": marker.decode(), "x": marker}))
    client.post("/sessions", content=b'{"circuit": "PLANTED-MARKER", "PLANTED-MARKER": 1}')
    client.get("/keys/PLANTED-MARKER")
    text = server.log.read_text()
    for secret in (marker.decode(), session, hashlib.sha256(party.keys.evaluation).hexdigest(), *TOKENS.values()):
        assert secret not in text
    assert all("event" in json.loads(line) for line in text.splitlines())


def test_a_failure_within_is_answered_and_logged_without_its_text(bundle, tmp_path, monkeypatch):
    """What no one foresaw is a 500 with a reason."""
    from starlette.testclient import TestClient

    inner = Server(bundles.Bundle.read(bundle, "server"), ServerSettings(tmp_path), [])
    monkeypatch.setattr(inner.keys, "status", lambda *_: 1 / 0)
    with TestClient(make_app(inner)) as client:
        response = client.get(f"/keys/{'a' * 64}")
    assert response.status_code == 500
    assert response.json() == {"code": "failed", "detail": "the server failed: ZeroDivisionError"}


# --- the command line ---------------------------------------------------------------------------


def test_bad_options_are_one_line(bundle, tokens, tmp_path):
    (tmp_path / "bad").write_text("alice\n")
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "bundle.json").write_text("{")
    for arguments, message in [
        ([tmp_path], "is no server bundle (bundle.json: no such file or directory)"),
        ([bundle.parent], f"give {bundle}"),
        ([tmp_path / "torn"], "is damaged"),
        ([bundle, "--host", "0.0.0.0"], "anybody could use the server: give --tokens FILE, or --anybody"),
        ([bundle, "--tokens", tmp_path / "absent"], "cannot be read: No such file"),
        ([bundle, "--tokens", tmp_path / "bad"], "line 1: wanted NAME and the token's SHA-256"),
        ([bundle, "--tokens", tmp_path / "empty"], "has no token"),
        ([bundle, "--tls-cert", tokens], "TLS takes --tls-cert and --tls-key"),
        ([bundle, "--tls-cert", tokens, "--tls-key", tokens, "--state", tmp_path / "s"], "certificate or its key"),
        ([bundle, "--workers", 0], "nobody to compute"),
    ]:
        result = CliRunner().invoke(main, ["serve", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("jaxgpt2: ") and message in line


def test_a_token_is_made_and_works(bundle, tmp_path):
    file = tmp_path / "tokens"
    made = [CliRunner().invoke(main, ["token", name, str(file)]) for name in ("carol", "dave")]
    assert all(result.exit_code == 0 for result in made)
    again = CliRunner().invoke(main, ["token", "carol", str(file)])
    assert again.exit_code == 2 and "twice" in again.stderr
    assert len(file.read_text().splitlines()) == 2
    with running(bundle, tmp_path / "state", "--tokens", file) as server:
        Connection(server.url, made[1].stdout.strip()).check(IDENTITY, [])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:1", "is no server"),
        ("ftp://host", "is no server"),
        ("http://example.org", "is not encrypted"),
        ("https://", "is no server"),
    ],
)
def test_urls_that_are_no_servers(url, message):
    with pytest.raises(ServerError, match=message):
        Connection(url)


def test_a_damaged_bundle_is_refused(circuit, tmp_path):
    bundles.write(tmp_path, "server", IDENTITY, {"0.1": circuit})
    found = bundles.Bundle.read(tmp_path, "server")
    assert (found.id, found.circuits[0].signatures) == (IDENTITY, circuit.signatures)
    with pytest.raises(bundles.BundleError, match="is a server bundle, wanted the client's"):
        bundles.Bundle.read(tmp_path, "client")
    manifest = tmp_path / "bundle.json"
    good = json.loads(manifest.read_text())
    for changes, message in [
        ({"format": 99}, f"has format 99, this jaxgpt2 reads {bundles.FORMAT}"),
        ({"circuits": []}, "is damaged"),
        ({"versions": {"numpy": "0.1"}}, "was made with numpy 0.1, here is"),
    ]:
        manifest.write_text(json.dumps(good | changes))
        with pytest.raises(bundles.BundleError, match=message):
            bundles.Bundle.read(tmp_path, "server")
    manifest.write_text(json.dumps(good))
    (tmp_path / "circuits" / "0.1" / "server.bin").write_bytes(b"other")
    with pytest.raises(bundles.BundleError, match=r"server\.bin is damaged"):
        bundles.Bundle.read(tmp_path, "server")
