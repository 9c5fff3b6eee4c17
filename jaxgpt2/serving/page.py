"""A page for one person on this machine: a private text, and beside it what the server received of it.

    GET  /TOKEN/           the page; its script and style sheet beside it
    GET  /TOKEN/state      what it shows before there is a text
    POST /TOKEN/generate   {"prompt", "max_new_tokens", "mode": "private" | "float"} -> a line of JSON for every token

It is served by the client, which holds the text anyway. The token in the path keeps other users of the machine out;
the checks of Host and Origin keep other sites out, whose scripts run in the same browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.resources
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fhe import FHEError
from jaxgpt2.errors import InputError
from jaxgpt2.linear import LinearClient
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.serving.masked import Masked
from jaxgpt2.serving.masks import MaskStore
from jaxgpt2.serving.remote import RemoteOwner

log = logging.getLogger(__name__)

# Bytes of a request: any prompt that fits a context.
LARGEST = 1 << 18

BINS = 32  # of a histogram
SHOWN = 24  # numbers that are shown one by one

FILES = {"": "page.html", "page.js": "page.js", "page.css": "page.css"}  # by their paths
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address is a secret
    "X-Content-Type-Options": "nosniff",
}


class Witness:
    """A `masked.MatrixOwner` beside which is noted what it is sent, and what that was before it was masked."""

    def __init__(self, owner: RemoteOwner):
        self._owner = owner
        self.received: list[np.ndarray] = []
        self.true: list[np.ndarray] = []

    def ahead(self, name: str, request: Any, size: int) -> bytes:
        return self._owner.ahead(name, request, size)

    def online(self, name: str, masked: np.ndarray) -> np.ndarray:
        self.received.append(masked)
        return self._owner.online(name, masked)

    def products(self, masked: Masked) -> Callable[[str, jax.Array, int], Any]:
        """A model's products, whose inputs are noted."""

        def multiply(name: str, x: jax.Array, count: int) -> Any:
            self.true.append(np.asarray(x)[0, :count])
            return masked(name, x, count)

        return multiply

    def take(self, largest: int) -> dict[str, Any]:
        """What was noted since the last time: histograms over all matrices, the first numbers of the first matrix for
        the last token read. largest: magnitude of a true number."""
        found = {}
        for name, arrays, limits in (("received", self.received, (0, 2**32)), ("true", self.true, (-largest, largest))):
            counts, _ = np.histogram(np.concatenate([array.ravel() for array in arrays]), BINS, limits)
            found[name] = {"histogram": counts.tolist(), "numbers": arrays[0][-1, :SHOWN].tolist()}
            arrays.clear()
        return found


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page is about.

    gpt2: the float model, to compare with; None where the client has none.
    """

    client: LinearClient
    owner: RemoteOwner
    store: MaskStore
    gpt2: GPT2 | None = None

    def __post_init__(self) -> None:
        if self.gpt2 is not None and self.gpt2.config != self.client.config:
            raise InputError("--model has another configuration than the client bundle: wanted its float model")

    def state(self) -> dict[str, Any]:
        return {
            "server": self.owner.connection.url,
            "matrices": len(self.client.shapes),
            "first_matrix": next(iter(self.client.shapes)),
            "largest": self.client.bits.largest_input,
            "context": self.client.config.n_positions,
            "masks_left": self.store.left(),
            "float": self.gpt2 is not None,
        }

    def tokens(self, prompt: str, max_new_tokens: int, mode: str) -> Iterator[dict[str, Any]]:
        """What is told of every token, and of the text's end. Raises InputError, FHEError."""
        stream, started = self.client.stream(), time.monotonic()
        last = started
        if mode == "float":
            assert self.gpt2 is not None
            for token in self.gpt2.generate(prompt, max_new_tokens, self.client.sampling):
                now = time.monotonic()
                yield {"text": stream(token), "milliseconds": 1e3 * (now - last)}
                last = now
        else:
            traffic, witness = self.owner.connection.traffic, Witness(self.owner)
            masked = Masked(self.client, witness, self.store.claim(self.client.masks_needed(prompt, max_new_tokens)))
            left, before = self.store.left(), dataclasses.replace(traffic)
            for token in self.client.generate(prompt, max_new_tokens, witness.products(masked)):
                now = time.monotonic()
                yield {
                    "text": stream(token),
                    "milliseconds": 1e3 * (now - last),
                    "sent": traffic.sent - before.sent,
                    "received": traffic.received - before.received,
                    "requests": traffic.requests - before.requests,
                    "masks_left": left,
                    "seen": witness.take(self.client.bits.largest_input),
                }
                before, last = dataclasses.replace(traffic), time.monotonic()
        yield {"end": True, "seconds": time.monotonic() - started}


def make_app(page: Page, origin: str, token: str) -> ASGIApp:
    """The page's HTTP interface. origin: its own, as http://127.0.0.1:8344."""
    busy = threading.Lock()

    def file(name: str) -> Callable[[Request], Response]:
        content = (importlib.resources.files("jaxgpt2.serving") / "static" / name).read_bytes()
        kind = next(kind for ending, kind in KINDS.items() if name.endswith(ending))
        return lambda _: Response(content, media_type=kind)

    async def state(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(page.state))

    async def generate(request: Request) -> Response:
        wanted = read_request(await body_of(request), page)
        if not busy.acquire(blocking=False):
            raise HTTPException(409, "one text at a time: wait for the one that is being written")
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

        def write() -> None:
            """To its end, whoever reads: when a text stops tells its server something."""

            def tell(line: dict[str, Any] | None) -> None:
                with contextlib.suppress(RuntimeError):  # the page's server has ended
                    loop.call_soon_threadsafe(lines.put_nowait, line)

            try:
                for line in page.tokens(**wanted):
                    tell(line)
            except (InputError, FHEError) as error:
                tell({"error": " ".join(str(error).split())})
            except Exception as error:
                log.exception("the text failed")
                tell({"error": f"the text failed: {type(error).__name__}"})
            finally:
                busy.release()
                tell(None)

        async def told() -> AsyncIterator[str]:
            while (line := await lines.get()) is not None:
                yield json.dumps(line) + "\n"

        threading.Thread(target=write, daemon=True).start()  # Ctrl-C does not wait for it
        return StreamingResponse(told(), media_type="application/x-ndjson")

    async def on_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    routes = [
        *(Route(f"/{token}/{path}", file(name)) for path, name in FILES.items()),
        Route(f"/{token}/state", state),
        Route(f"/{token}/generate", generate, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={HTTPException: on_error}), origin)


async def body_of(request: Request) -> bytes:
    """Raises HTTPException: it is no JSON, or too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "wanted application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            raise HTTPException(413, f"a request may have {LARGEST:,} bytes")
    return bytes(body)


def read_request(body: bytes, page: Page) -> dict[str, Any]:
    """The arguments of `Page.tokens`. Raises HTTPException."""
    try:
        content = json.loads(body)
        prompt, count, mode = (content[name] for name in ("prompt", "max_new_tokens", "mode"))
    except (ValueError, RecursionError, TypeError, KeyError):
        raise HTTPException(422, "wanted an object with prompt, max_new_tokens and mode") from None
    if not isinstance(prompt, str):
        raise HTTPException(422, "the prompt must be text")
    if type(count) is not int or not 1 <= count <= page.client.config.n_positions:
        raise HTTPException(422, f"wanted 1 to {page.client.config.n_positions} new tokens, got {count!r:.40}")
    if mode not in ("private", "float"):
        raise HTTPException(422, "the mode must be private or float")
    if mode == "float" and page.gpt2 is None:
        raise HTTPException(422, "there is no float model here: start the page with --model")
    return {"prompt": prompt, "max_new_tokens": count, "mode": mode}


class Guard:
    """Around an application: answers its own page and nobody else."""

    def __init__(self, app: ASGIApp, origin: str):
        self._app, self._origin, self._host = app, origin, urlsplit(origin).netloc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        if scope["type"] != "http":  # no sockets here; the server's own start and end
            await self._app(scope, receive, send)
            return
        headers = Request(scope).headers
        # A site whose name was made to point here has its own name as Host; a page of another site, its own Origin.
        # A form or script of another site always has one when it posts.
        origins = (self._origin,) if scope["method"] == "POST" else (self._origin, None)
        app: ASGIApp = self._app
        if headers.get("host") != self._host or headers.get("origin") not in origins:
            app = JSONResponse({"error": f"this page answers {self._origin} alone"}, 403)
        await app(scope, receive, with_headers)


def serve_page(page: Page, listener: socket.socket, tell: Callable[[str], None]) -> None:
    """Serves until Ctrl-C. listener: at an address of this machine. tell: gets the page's address."""
    origin, token = f"http://127.0.0.1:{listener.getsockname()[1]}", secrets.token_urlsafe(32)
    config = uvicorn.Config(
        make_app(page, origin, token), log_config=None, access_log=False, server_header=False,
        limit_concurrency=16, timeout_graceful_shutdown=1, lifespan="off", ws="none",
    )  # fmt: skip
    tell(f"{origin}/{token}/")
    uvicorn.Server(config).run(sockets=[listener])
