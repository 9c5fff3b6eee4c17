"""A server of linear layers as its clients meet it: the commands of two machines, and requests of anybody."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner, Result

import linears
from fhe import rlwe
from helpers import one_line
from jaxgpt2.cli import main
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.serving.bundle import Bundle
from jaxgpt2.serving.limits import Limits
from jaxgpt2.serving.linear_bundle import write_bundles
from jaxgpt2.serving.linear_server import LinearServer, make_app
from jaxgpt2.serving.masked import Masked
from jaxgpt2.serving.remote import Connection, Mismatch, RemoteOwner
from jaxgpt2.serving.server import ServerSettings
from linears import PROMPT
from served import Running, running, tokens_file

TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob", "metrics": "token-of-metrics"}
FEATURE = rlwe.Parameters().feature_bytes
OUTPUT = rlwe.Parameters().output_bytes


@pytest.fixture(scope="module")
def home(small_readonly: Path, tmp_path_factory) -> Any:
    """A directory with what `compile` makes, and for what commands else keep in the home of whoever runs them."""
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory / "state"))
        patch.setenv("XDG_DATA_HOME", str(directory / "data"))
        compile_into(directory, small_readonly)
        yield directory


def compile_into(directory: Path, model: Path) -> None:
    linears.calibration_file(directory)
    facts = jaxgpt2("compile", "--encrypt", "linear", "--model", model, "--calibration",
                    directory / "passages.txt", "--out", directory / "out", "--json")  # fmt: skip
    assert json.loads(facts.stdout)["matrices"] == 8


@pytest.fixture(scope="module")
def model(linear_gpt2) -> LinearGPT2:
    """The same model as the bundles hold."""
    return linear_gpt2


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("tokens"), TOKENS)


@pytest.fixture(scope="module")
def server(home, tokens, tmp_path_factory) -> Any:
    state = tmp_path_factory.mktemp("server") / "state"
    with running(home / "out" / "server", state, "--tokens", tokens) as server:
        yield server


@pytest.fixture(scope="module")
def masks(home, server) -> Path:
    """A store that `prepare` filled."""
    found = jaxgpt2("prepare", "--server", server.url, "--client", home / "out" / "client", "--masks", home / "masks",
                    "--tokens", 100, "--json", token="alice")  # fmt: skip
    facts = json.loads(found.stdout)
    assert facts["made"] == facts["left"] == 2048
    assert facts["stored_bytes"] == 4 * (96 + 32 + 128 + 32) * 2
    return home / "masks"


def jaxgpt2(*arguments: object, token: str | None = None, status: int = 0) -> Result:
    env = {} if token is None else {"JAXGPT2_TOKEN": TOKENS[token]}
    found = CliRunner().invoke(main, [str(argument) for argument in arguments], env=env)
    assert found.exit_code == status, (found.stderr, found.exception)
    if status:
        assert not found.stdout.strip().startswith("{")
        assert len(found.stderr.strip().splitlines()[-1:]) == 1 and "Traceback" not in found.stderr
    return found


def generate(url: str, home: Path, count: int = 4, *more: object, token: str | None = None, status: int = 0) -> Result:
    return jaxgpt2("generate", PROMPT, "--server", url, "--client", home / "out" / "client", "--masks", home / "masks",
                   "--max-new-tokens", count, "--json", *more, token=token, status=status)  # fmt: skip


def requests_of(count: int) -> int:
    """Requests of a text of so many new tokens, with two layers: the prompt, and all new tokens but the last."""
    return 4 * 2 * count


# --- the commands ---------------------------------------------------------------------------------


def test_text_is_that_of_quantized_layers(server, home, masks, model, small_readonly):
    found = json.loads(generate(server.url, home, token="alice").stdout)
    assert found["tokens"] == linears.quantized_tokens(model, PROMPT, 4)
    assert found["mode"] == "server" and found["modules"] == "linear"
    assert found["requests"] == 1 + requests_of(4)
    assert found["sent"] == 4 * (32 + 32 + 32 + 128) * 2 * (len(PROMPT) + 3)
    verified = generate(server.url, home, 4, "--verify", small_readonly, token="alice")
    assert json.loads(verified.stdout)["tokens"] == found["tokens"]
    assert "every product verified" in verified.stderr
    assert json.loads(verified.stdout)["masks_left"] == found["masks_left"] - len(PROMPT) - 3


def test_a_server_killed_in_the_middle_of_a_text(home, masks, model, tmp_path, monkeypatch):
    """It is asked again with the very bytes that it was asked with before."""
    asked: list[tuple[str, bytes]] = []
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(running(home / "out" / "server", tmp_path / "state"))
        port, once = int(first.url.rsplit(":", 1)[1]), Connection.once

        def watched(self: Connection, method: str, path: str, limit: int, content: Any, headers: Any) -> Any:
            if method == "POST":
                asked.append((path, content))
                if len(asked) == 12:
                    first.process.kill()
                    first.process.wait()
                elif len(asked) == 14:  # two requests went nowhere
                    stack.enter_context(running(home / "out" / "server", tmp_path / "state", port=port))
            return once(self, method, path, limit, content, headers)

        monkeypatch.setattr(Connection, "once", watched)
        found = json.loads(generate(first.url, home).stdout)
    assert found["tokens"] == linears.quantized_tokens(model, PROMPT, 4)
    assert asked[11] == asked[12] == asked[13]
    # A busy machine may need more tries, of this request or another one: each with the very bytes of the first.
    assert len([key for key, _ in itertools.groupby(asked)]) == requests_of(4)
    bodies = [body for _, body in asked]
    assert len(set(bodies)) == len(bodies) - 2


def test_round_trips(server, home, masks, model, tokens):
    """Over a line with a delay: four for every layer and token."""
    delay = 0.025  # in either direction
    with linears.delayed(int(server.url.rsplit(":", 1)[1]), delay) as url:
        started = time.monotonic()
        found = json.loads(generate(url, home, 3, token="alice").stdout)
        took = time.monotonic() - started
    assert found["tokens"] == linears.quantized_tokens(model, PROMPT, 3)
    trips = requests_of(3) + 1
    assert found["requests"] == trips
    assert took > trips * 2 * delay


def test_masks_run_out(server, home, masks):
    where = home / "few"
    options = ["--server", server.url, "--client", home / "out" / "client", "--masks", where]
    found = jaxgpt2("generate", PROMPT, *options, "--max-new-tokens", 2, token="alice", status=2)
    assert f"needs masks for {len(PROMPT) + 1} tokens and 0 are left: make more with jaxgpt2 prepare" in found.stderr


def test_a_server_of_other_weights(home, model, server, masks, tmp_path, gpt2):
    other = LinearGPT2.quantize(gpt2, linears.PASSAGES[:1])
    write_bundles(other, tmp_path / "out", {})
    options = ["--server", server.url, "--client", tmp_path / "out" / "client", "--masks", tmp_path / "masks"]
    for command in (["generate", PROMPT, "--max-new-tokens", 2], ["prepare"]):
        found = jaxgpt2(*command, *options, token="alice", status=2)
        assert "the server has other matrices" in found.stderr and model.client.identity[:12] in found.stderr
    assert not (tmp_path / "masks").exists()


def test_other_formats_and_circuits(model):
    for changes, part in [({"format": 99}, "speaks format 99"), ({"linear": {}}, "other matrices"),
                          ({"bundle": "0" * 64}, "other matrices (000000000000)")]:  # fmt: skip
        content = json.dumps(linears.specification(model.client) | changes).encode()
        with linears.serving(lambda request, content=content: (200, {}, content)) as url:
            owner = RemoteOwner(Connection(url, patience=2), model.client.shapes)
            with one_line(Mismatch, part):
                owner.check(model.client.identity)


# --- accounts and limits --------------------------------------------------------------------------


def raw(server: Running, name: str | None = "alice") -> httpx2.Client:
    headers = {"Authorization": f"Bearer {TOKENS[name]}"} if name else {}
    return httpx2.Client(base_url=server.url, headers=headers, timeout=30)


ONLINE = np.ones((1, 32), np.uint32).tobytes()


def test_who_has_no_token(server, home, masks):
    left = json.loads(generate(server.url, home, 1, token="alice").stdout)["masks_left"]
    found = generate(server.url, home, status=2)
    assert "the server refused: this server wants a bearer token that it knows (401 unauthorized)" in found.stderr
    assert json.loads(generate(server.url, home, 1, token="alice").stdout)["masks_left"] == left - len(PROMPT)
    with raw(server, None) as client:
        for method, path in [("GET", "/specification"), ("POST", "/matrices/0/online"), ("POST", "/matrices/0/ahead")]:
            answer = client.request(method, path, content=ONLINE if method == "POST" else None)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/healthz").json() == {"status": "ok"}
    with raw(server, "metrics") as client:
        assert client.post("/matrices/0/online", content=ONLINE).json()["code"] == "metrics_only"


def app_of(home: Path, **limits: Any) -> tuple[LinearServer, Any]:
    """A server in this process."""
    by_hash = {hashlib.sha256(token.encode()).hexdigest(): name for name, token in TOKENS.items()}
    settings = ServerSettings(home / "state", tokens=by_hash, limits=Limits(**limits))
    server = LinearServer(Bundle.read(home / "out" / "server", "server"), settings)
    return server, make_app(server)


def client_of(app: Any, name: str) -> httpx2.AsyncClient:
    headers = {"Authorization": f"Bearer {TOKENS[name]}"}
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://it", headers=headers)


def test_calls_per_minute(home):
    async def calls() -> None:
        _, app = app_of(home, calls_per_minute=2)
        async with client_of(app, "alice") as alice, client_of(app, "bob") as bob:
            for path, size in (("online", 128), ("ahead", 32 * FEATURE)):
                assert (await alice.post(f"/matrices/0/{path}", content=bytes(size))).status_code == 200
            for path in ("online", "ahead"):
                answer = await alice.post(f"/matrices/0/{path}", content=bytes(128))
                assert answer.status_code == 429 and answer.json()["code"] == "rate"
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert (await bob.post("/matrices/0/online", content=ONLINE)).status_code == 200

    asyncio.run(calls())


def test_requests_at_once(home, model):
    """One client's product ahead runs: others are answered, and it is, up to its limit."""

    async def calls() -> None:
        server, app = app_of(home, requests_per_client=2, requests=4)
        begun, go = threading.Event(), threading.Event()

        def slow(answer: Any) -> Any:
            def answered(*arguments: Any) -> Any:
                for piece in answer(*arguments):
                    begun.set()
                    go.wait(600)  # as long as a machine may stand still
                    yield piece

            return answered

        for _, matrix in server.matrices[:2]:  # either is in flight until both were seen
            matrix.answer = slow(matrix.answer)
        async with client_of(app, "alice") as alice, client_of(app, "bob") as bob:
            ahead = [asyncio.create_task(alice.post("/matrices/0/ahead", content=bytes(32 * FEATURE)))]
            assert await asyncio.to_thread(begun.wait, 30)
            for client in (alice, bob):
                found = await client.post("/matrices/0/online", content=ONLINE)
                wanted = model.weights["h.0.attn.c_attn"].sum(axis=0, dtype=np.int64).astype(np.uint32)
                assert np.array_equal(np.frombuffer(found.content, np.uint32), wanted)
            ahead.append(asyncio.create_task(alice.post("/matrices/1/ahead", content=bytes(32 * FEATURE))))
            while server.in_flight["alice"] < 2:
                assert not any(each.done() for each in ahead)
                await asyncio.sleep(0.01)
            found = await alice.post("/matrices/0/online", content=ONLINE)
            assert (found.status_code, found.json()["code"]) == (429, "in_flight")
            assert found.headers["Retry-After"] == "1"
            assert (await bob.post("/matrices/0/online", content=ONLINE)).status_code == 200
            go.set()
            sizes = [len((await each).content) for each in ahead]
            assert sizes == [96 * OUTPUT, 32 * OUTPUT]
            assert not server.in_flight

    asyncio.run(calls())


# --- requests of anybody --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        ("0/online", b"", 422, "size"),
        ("0/online", ONLINE[:-1], 422, "size"),
        ("0/online", ONLINE + b"\0", 422, "size"),
        ("0/online", b'{"numbers": [1, 2, 3]}', 422, "size"),
        ("0/online", bytes(128 * 5000), 413, "size"),
        ("0/ahead", b"", 422, "size"),
        ("0/ahead", bytes(32 * FEATURE - 1), 422, "size"),
        ("0/ahead", bytes(32 * FEATURE + 1), 413, "size"),
        ("0/ahead", b"\xff" * (32 * FEATURE), 422, "refused"),
        ("8/online", ONLINE, 404, "no_matrix"),
        ("-1/online", ONLINE, 404, "no_matrix"),
        ("0x0/ahead", ONLINE, 404, "no_matrix"),
        ("%C2%B2/online", ONLINE, 404, "no_matrix"),
        ("9999999999999999999999/online", ONLINE, 404, "no_matrix"),
        ("0/nothing", ONLINE, 404, "http"),
        ("0", ONLINE, 404, "http"),
    ],
)
def test_malformed_requests(server, path, content, status, code):
    with raw(server) as client:
        answer = client.post(f"/matrices/{path}", content=content)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.json()["detail"]
        assert client.get("/matrices/0/online").json()["code"] == "http"  # 405


@pytest.mark.parametrize("phase", ["online", "ahead"])
@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ("", b"", "411"),
        ("Transfer-Encoding: chunked", b"80\r\n" + ONLINE + b"\r\n0\r\n\r\n", "411"),
        ("Content-Length: 99999999999999999999", b"", "413"),
        ("Content-Length: 999999999999999999999999999999", b"", "4"),
        ("Content-Length: twelve", b"", "400"),
        ("Content-Length: -1", b"", "400"),
        ("Content-Length: +128", ONLINE, "400"),
        ("Content-Length: 128\r\nContent-Length: 127", ONLINE, "400"),
    ],
)
def test_malformed_sizes(server, phase, headers, body, status):
    where = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((where[0], int(where[1])), 20) as line:
        head = f"POST /matrices/0/{phase} HTTP/1.1\r\nHost: it\r\nAuthorization: Bearer {TOKENS['alice']}\r\n"
        line.sendall(
            f"{head}Connection: close\r\n{headers}\r\n\r\n".replace("\r\n\r\n\r\n", "\r\n\r\n").encode() + body
        )
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := line.recv(1 << 16):
                answer += data
    assert answer.startswith(f"HTTP/1.1 {status}".encode())


def test_a_body_that_ends_early(server):
    where = server.url.removeprefix("http://").rsplit(":", 1)
    for phase, size in (("online", 128), ("ahead", 32 * FEATURE)):
        with socket.create_connection((where[0], int(where[1])), 20) as line:
            line.sendall(
                f"POST /matrices/0/{phase} HTTP/1.1\r\nHost: it\r\nAuthorization: Bearer {TOKENS['alice']}\r\n"
                f"Content-Length: {size}\r\n\r\nabc".encode()
            )
    with raw(server) as client:
        assert client.post("/matrices/0/online", content=ONLINE).is_success
    assert not [event for event in server.events() if event.get("level") == "error" or "exc_info" in event]


def test_refusals_of_large_requests_are_heard(server, home):
    """A server that does not read a body says why before it hangs up, and the client hears it."""
    with contextlib.closing(Connection(server.url, patience=5)) as line, one_line(Exception, "401 unauthorized"):
        line.request("POST", "/matrices/0/ahead", content=bytes(32 * FEATURE))


# --- hostile servers ------------------------------------------------------------------------------


def text_from(home: Path, owner: linears.Owner, *more: object, count: int = 4, status: int = 0) -> Result:
    with linears.serving(owner) as url:
        return generate(url, home, count, *more, status=status)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda answer: answer[:-1], "answers with"),
        (lambda answer: b"", "answers with 0 bytes"),
        (lambda answer: answer + b"\0", "answers with more than"),
        (lambda answer: (200, {"Content-Encoding": "gzip"}, answer), "compressed"),
        (lambda answer: (202, {}, b""), "answers with 0 bytes"),
        (lambda answer: (302, {"Location": "/"}, b""), "answers 302 and no reason"),
        (lambda answer: (500, {}, b"[" * 60000), "answers 500 and no reason"),
        (lambda answer: (422, {}, json.dumps({"code": "x", "detail": "a\n\x1b[2Jb" * 5000}).encode()), "refused: a"),
        (lambda answer: (418, {}, json.dumps({"code": "x", "detail": 5}).encode()), "answers 418 and no reason"),
    ],
)
def test_answers_that_are_none(home, masks, model, change, part):
    """One clear line; no request is repeated and none follows; masks are lost, and the next text takes others."""
    owner = linears.Owner(model, lambda phase, name, answer: change(answer) if name == "h.1.attn.c_proj" else answer)
    found = text_from(home, owner, status=2)
    assert part in found.stderr.splitlines()[-1]
    assert "\x1b" not in found.stderr and len(found.stderr) < 3000
    assert len(owner.requests) == 6
    again = linears.Owner(model)
    assert json.loads(text_from(home, again).stdout)["tokens"] == linears.quantized_tokens(model, PROMPT, 4)
    assert not {request.body for request in again.requests} & {request.body for request in owner.requests}


def add_one(products: np.ndarray) -> None:
    products[5] += np.uint32(1)


@pytest.mark.parametrize("verify", [True, False])
def test_wrong_products_online(home, masks, model, small_readonly, verify):
    owner = linears.Owner(model, linears.one_number_wrong("online", add_one))
    more = ["--verify", small_readonly] if verify else []
    found = text_from(home, owner, *more, status=2 if verify else 0)
    if verify:
        assert "products of 1 matrices are not those of the verified weights, h.0.attn.c_attn" in found.stderr
        assert found.stdout == ""
    else:
        assert len(json.loads(found.stdout)["tokens"]) == 4
    assert len(owner.requests) == requests_of(4)  # to the announced end


def test_products_as_wrong_as_can_be(home, masks, model):
    """Whatever numbers come back, the text goes on to its end."""
    owner = linears.Owner(model, lambda phase, name, answer: b"\xff\xff\xff\x7f" * (len(answer) // 4))
    found = text_from(home, owner, "--temperature", 1, "--top-p", 0.9)
    assert len(json.loads(found.stdout)["tokens"]) == 4
    assert len(owner.requests) == requests_of(4)


@pytest.mark.parametrize("verify", [True, False])
def test_wrong_products_ahead(home, model, small_readonly, tmp_path, verify):
    """An error in all coefficients of one output's ciphertext, so that any mask shows it."""

    def add_errors(residues: np.ndarray) -> None:
        residues[7, : rlwe.Parameters().poly_modulus_degree] += np.uint64(1 << 45)

    owner = linears.Owner(model, linears.one_number_wrong("ahead", add_errors))
    options = ["--client", home / "out" / "client", "--masks", tmp_path / "masks"]
    with linears.serving(owner) as url:
        jaxgpt2("prepare", "--server", url, *options)
        del owner.requests[:]
        more = ["--verify", small_readonly] if verify else []
        found = jaxgpt2("generate", PROMPT, "--server", url, *options, "--max-new-tokens", 3, *more,
                        status=2 if verify else 0)  # fmt: skip
    assert ("are not those of the verified weights" in found.stderr) == verify
    assert len(owner.requests) == requests_of(3)
    assert [len(request.body) for request in owner.requests[::8]] == [128 * len(PROMPT), 128, 128]


def test_the_end_of_a_text_is_not_seen(home, masks, model, monkeypatch):
    """A model that ends its text early reads on, as many tokens as were announced."""
    wanted = linears.quantized_tokens(model, PROMPT, 6)
    end = next(index for index, token in enumerate(wanted) if token not in wanted[:index] and index > 1)
    changed = with_end(model, wanted[end])
    for client, tokens in ((model.client, wanted), (changed.client, wanted[:end])):
        owner = linears.Owner(model)
        with linears.serving(owner) as url, contextlib.closing(linears.opened_store(client, home)) as store:
            remote = RemoteOwner(Connection(url), client.shapes)
            masked = Masked(client, remote, store.claim(client.masks_needed(PROMPT, 6)))
            assert list(client.generate(PROMPT, 6, masked)) == tokens
            remote.connection.close()
        assert [len(request.body) for request in owner.requests[::8]] == [128 * len(PROMPT)] + 5 * [128]


def with_end(model: LinearGPT2, end: int) -> LinearGPT2:
    config = dataclasses.replace(model.client.config, eos_token_id=end)
    return dataclasses.replace(model, client=dataclasses.replace(model.client, config=config))


def test_a_reader_that_stops_is_not_seen(home, masks, model):
    owner = linears.Owner(model)
    with linears.serving(owner) as url, contextlib.closing(linears.opened_store(model.client, home)) as store:
        remote = RemoteOwner(Connection(url), model.client.shapes)
        masked = Masked(model.client, remote, store.claim(model.client.masks_needed(PROMPT, 4)))
        text = model.client.generate(PROMPT, 4, masked)
        next(text)
        text.close()
        remote.connection.close()
    assert len(owner.requests) == requests_of(4)


@pytest.mark.parametrize("where", ["answer", "residue"])
def test_answers_ahead_that_are_none(home, model, tmp_path, where):
    def change(phase: str, name: str, answer: bytes) -> bytes:
        return answer[:-1] if where == "answer" else b"\xff" * len(answer)

    options = ["--client", home / "out" / "client", "--masks", tmp_path / "masks"]
    with linears.serving(linears.Owner(model, change)) as url:
        found = jaxgpt2("prepare", "--server", url, *options, status=2)
        assert {"answer": "answers with", "residue": "not below the modulus"}[where] in found.stderr
    with linears.serving(linears.Owner(model)) as url:
        jaxgpt2("prepare", "--server", url, *options)
        found = jaxgpt2("generate", PROMPT, "--server", url, *options, "--max-new-tokens", 3, "--json")
    assert json.loads(found.stdout)["tokens"] == linears.quantized_tokens(model, PROMPT, 3)
