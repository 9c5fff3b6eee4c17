"""The page's HTTP interface: it tells what the server received, and answers nobody but its own page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jax
import numpy as np
import pytest
from click.testing import CliRunner

import linears
from helpers import one_line
from jaxgpt2.cli import main
from jaxgpt2.errors import InputError
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.serving.page import FILES, Page, make_app
from jaxgpt2.serving.remote import Connection, RemoteOwner
from linears import PROMPT

ORIGIN, TOKEN = "http://127.0.0.1:8344", "a-secret"
NEW = 4
ASKED = {"prompt": PROMPT, "max_new_tokens": NEW, "mode": "private"}


@dataclasses.dataclass
class Open:
    """A page, and the server behind it."""

    page: Page
    app: Any
    owner: linears.Owner

    def asks(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx2.Response]:
        """Answers to requests that are sent at once."""

        async def ask() -> list[httpx2.Response]:
            transport = httpx2.ASGITransport(self.app)
            async with httpx2.AsyncClient(transport=transport, base_url=ORIGIN) as http:
                return await asyncio.gather(
                    *(http.request(method, path, **options) for method, path, options in requests)
                )

        return asyncio.run(ask())

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return self.asks((method, path, options))[0]

    def text(self, **changes: Any) -> list[dict[str, Any]]:
        """The lines of a text."""
        headers = {"Origin": ORIGIN, "Content-Type": "application/json"}
        found = self.ask("POST", f"/{TOKEN}/generate", content=json.dumps({**ASKED, **changes}), headers=headers)
        assert found.status_code == 200, found.text
        return [json.loads(line) for line in found.text.splitlines()]


@pytest.fixture(scope="module")
def model(linear_gpt2) -> LinearGPT2:
    return linear_gpt2


@pytest.fixture(scope="module")
def opened(model, gpt2, tmp_path_factory) -> Iterator[Open]:
    owner = linears.Owner(model)
    with linears.serving(owner) as url, contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(linears.prepared_store(model, tmp_path_factory.mktemp("page"))))
        connection = stack.enter_context(contextlib.closing(Connection(url)))
        page = Page(model.client, RemoteOwner(connection, model.client.shapes), store, gpt2)
        yield Open(page, make_app(page, ORIGIN, TOKEN), owner)


def test_the_page_is_one_piece_without_anybody_elses(opened):
    for path in FILES:
        found = opened.ask("GET", f"/{TOKEN}/{path}")
        assert found.status_code == 200
        assert found.headers["cache-control"] == "no-store" and found.headers["referrer-policy"] == "no-referrer"
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert set(re.findall(r"https?://[^\"' ]+", found.text)) <= {"http://www.w3.org/2000/svg"}
    html = opened.ask("GET", f"/{TOKEN}/").text
    assert re.findall(r"<script[^>]*>", html) == ['<script src="page.js" defer>']
    assert not re.search(r"\son\w+=|\sstyle=|<style", html)
    for name in re.findall(r"<(?:input|textarea)[^>]*\sid=\"(\w+)\"", html):
        assert f'for="{name}"' in html
    state = opened.ask("GET", f"/{TOKEN}/state").json()
    assert state == {
        "server": opened.page.owner.connection.url, "matrices": 8, "first_matrix": "h.0.attn.c_attn", "largest": 2047,
        "context": 64, "masks_left": opened.page.store.left(), "float": True,
    }  # fmt: skip


def true_inputs(model: LinearGPT2) -> list[list[np.ndarray]]:
    """What goes into every matrix at every step of the text, by mode "quantized"."""
    inputs: list[np.ndarray] = []
    products = model.products()

    def noted(name: str, x: jax.Array, count: int) -> Any:
        inputs.append(np.asarray(x)[0, :count])
        return products(name, x, count)

    list(model.client.generate(PROMPT, NEW, noted, keep_count=False))
    each = len(model.client.shapes)
    return [inputs[start : start + each] for start in range(0, len(inputs), each)]


def test_a_private_text_and_what_the_server_received(opened, model):
    before, left = len(opened.owner.requests), opened.page.store.left()
    *lines, end = opened.text()
    tokens = linears.quantized_tokens(model, PROMPT, NEW)
    assert "".join(line["text"] for line in lines) == model.client.text(tokens)
    assert end["end"] and end["seconds"] > 0
    requests, each = opened.owner.requests[before:], len(model.client.shapes)
    assert len(requests) == each * NEW
    needed = model.client.masks_needed(PROMPT, NEW)
    for step, (line, true) in enumerate(zip(lines, true_inputs(model), strict=True)):
        sent = [np.frombuffer(request.body, "<u4") for request in requests[each * step : each * (step + 1)]]
        assert line["sent"] == sum(array.nbytes for array in sent) and line["requests"] == each
        assert line["received"] == 4 * sum(
            len(array) * outputs for array, (_, outputs) in zip(true, model.client.shapes.values(), strict=True)
        )
        assert line["masks_left"] == left - needed == opened.page.store.left()
        assert line["milliseconds"] > 0
        for name, arrays, limits in (("received", sent, (0, 2**32)), ("true", true, (-2047, 2047))):
            numbers = np.concatenate([array.ravel() for array in arrays])
            assert line["seen"][name]["histogram"] == np.histogram(numbers, 32, limits)[0].tolist()
            assert sum(line["seen"][name]["histogram"]) == len(numbers)
            width = true[0].shape[1]
            assert line["seen"][name]["numbers"] == arrays[0].reshape(-1, width)[-1, :24].tolist()


def test_a_text_in_float_sends_nothing(opened, gpt2):
    before, left = len(opened.owner.requests), opened.page.store.left()
    *lines, end = opened.text(mode="float")
    assert "".join(line["text"] for line in lines) == gpt2.text(list(gpt2.generate(PROMPT, NEW)))
    assert all(line.keys() == {"text", "milliseconds"} for line in lines) and end["end"]
    assert len(opened.owner.requests) == before and opened.page.store.left() == left


def test_one_text_at_a_time(opened, monkeypatch):
    reached, go = threading.Event(), threading.Event()

    def wait(phase: str, name: str, answer: bytes) -> bytes:
        reached.set()
        go.wait(30)
        return answer

    monkeypatch.setattr(opened.owner, "change", wait)
    request = ("POST", f"/{TOKEN}/generate", {"json": ASKED, "headers": {"Origin": ORIGIN}})

    async def both() -> tuple[httpx2.Response, httpx2.Response]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(opened.app), base_url=ORIGIN) as http:
            first = asyncio.create_task(http.request(request[0], request[1], **request[2]))
            assert await asyncio.to_thread(reached.wait, 30)
            second = await http.request(request[0], request[1], **request[2])
            go.set()
            return await first, second

    first, second = asyncio.run(both())
    assert (first.status_code, second.status_code) == (200, 409)
    assert "one text at a time" in second.json()["error"]
    monkeypatch.undo()
    assert opened.text()[-1]["end"]  # and the next one is written


def test_what_goes_wrong_is_one_line_on_the_page(opened, monkeypatch):
    for prompt, part in (("", "the prompt is empty"), ("x" * 64, "64 tokens"), ("\ud800", "Unicode")):
        (line,) = opened.text(prompt=prompt)
        assert part in line["error"] and "\n" not in line["error"]
    problem = json.dumps({"code": "broken", "detail": "out of order"}).encode()
    monkeypatch.setattr(opened.owner, "change", lambda *_: (422, {}, problem))
    (line,) = opened.text()
    assert line == {"error": "the server refused: out of order (422 broken)"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", f"/{TOKEN}/", {"Host": "evil.example:8344"}, 403),
        ("GET", f"/{TOKEN}/", {"Host": "127.0.0.1:80"}, 403),
        ("GET", f"/{TOKEN}/state", {"Origin": "http://evil.example"}, 403),
        ("POST", f"/{TOKEN}/generate", {}, 403),
        ("POST", f"/{TOKEN}/generate", {"Origin": "null"}, 403),
        ("POST", f"/{TOKEN}/generate", {"Origin": "https://127.0.0.1:8344"}, 403),
        ("POST", f"/{TOKEN}/generate", {"Origin": "http://127.0.0.1:9000"}, 403),
        ("GET", "/", {}, 404),
        ("GET", "/another/", {}, 404),
        ("GET", "/another/state", {}, 404),
        ("POST", "/another/generate", {"Origin": ORIGIN}, 404),
        ("GET", f"/{TOKEN}/../page.py", {}, 404),
        ("GET", f"/{TOKEN}/generate", {}, 405),
    ],
)
def test_nobody_else_drives_it(opened, method, path, headers, status):
    before = len(opened.owner.requests)
    found = opened.ask(method, path, headers=headers, **({"json": ASKED} if method == "POST" else {}))
    assert found.status_code == status and TOKEN not in found.text
    assert found.headers["content-security-policy"] and "access-control-allow-origin" not in found.headers
    assert len(opened.owner.requests) == before


@pytest.mark.parametrize(
    ("body", "kind", "status", "part"),
    [
        (json.dumps(ASKED), "text/plain", 415, "application/json"),
        ("{", "application/json", 422, "prompt, max_new_tokens and mode"),
        ("[1]", "application/json", 422, "prompt, max_new_tokens and mode"),
        ("[" * 10**5, "application/json", 422, "prompt, max_new_tokens and mode"),
        (json.dumps({**ASKED, "prompt": 3}), "application/json", 422, "text"),
        (json.dumps({**ASKED, "max_new_tokens": 0}), "application/json", 422, "1 to 64"),
        (json.dumps({**ASKED, "max_new_tokens": 10**9}), "application/json", 422, "1 to 64"),
        (json.dumps({**ASKED, "max_new_tokens": True}), "application/json", 422, "1 to 64"),
        (json.dumps({**ASKED, "mode": "simulate"}), "application/json", 422, "private or float"),
        (json.dumps({**ASKED, "prompt": "x" * 2**19}), "application/json", 413, "bytes"),
    ],
)
def test_requests_that_are_none(opened, body, kind, status, part):
    headers = {"Origin": ORIGIN, "Content-Type": kind}
    found = opened.ask("POST", f"/{TOKEN}/generate", content=body, headers=headers)
    assert found.status_code == status and part in found.json()["error"]


def test_float_needs_the_model(opened, gpt2):
    alone = dataclasses.replace(opened.page, gpt2=None)
    assert not alone.state()["float"]
    bare = dataclasses.replace(opened, page=alone, app=make_app(alone, ORIGIN, TOKEN))
    found = bare.ask("POST", f"/{TOKEN}/generate", json={**ASKED, "mode": "float"}, headers={"Origin": ORIGIN})
    assert found.status_code == 422 and "--model" in found.json()["error"]
    other = GPT2(dataclasses.replace(gpt2.config, layer_norm_epsilon=1e-3), gpt2.model, gpt2.tokenizer)
    with one_line(InputError, "--model", "another configuration"):
        dataclasses.replace(opened.page, gpt2=other)


def test_the_command_says_what_it_needs(tmp_path: Path):
    for arguments, part in (
        ([], "page needs --server URL and --client DIR"),
        (["--server", "http://127.0.0.1:1", "--client", tmp_path], "is no client bundle"),
    ):
        found = CliRunner().invoke(main, ["page", *map(str, arguments)])
        assert found.exit_code == 2 and part in found.stderr and found.stderr.count("\n") == 1
