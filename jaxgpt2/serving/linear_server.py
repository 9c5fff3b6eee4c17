"""The HTTP server of linear layers: matrices, and nothing of a client's: no keys, no sessions, no ciphertexts.

    GET  /specification            what it serves
    POST /matrices/NUMBER/online   masked numbers, uint32 (T, d) -> their products, uint32 (T, m)
    POST /matrices/NUMBER/ahead    an encrypted request (`fhe.rlwe`) -> its answer

Bodies are bare numbers, little-endian. Every request carries all that it needs, so any replica answers, and a request
may be sent again without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from threadpoolctl import threadpool_limits

import jaxgpt2
from fhe import FHEError, rlwe
from jaxgpt2.executors.processes import cores
from jaxgpt2.serving.accounts import Accounts
from jaxgpt2.serving.bundle import FORMAT, Bundle
from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.linear_bundle import read_weights
from jaxgpt2.serving.server import METRICS, PATIENCE, ServerSettings, chunks_of, configure_logs, listen, refused

log = structlog.get_logger()

# Rows of an online request: a prompt is no longer than a model's context.
MOST_ROWS = 4096

# Bytes of requests ahead that are here at once, the one in work among them.
MOST_ARRIVING = 10**9

# Products of so few numbers take less time than handing them to a thread, and nobody waits long for them.
INLINE = 2**22

# Outputs of an answer that are computed, sent and forgotten at a time.
BLOCK = 128


class LinearServer(Accounts):
    """A bundle's matrices. array: whose arrays compute ahead, "numpy" or "jax"."""

    def __init__(self, bundle: Bundle, settings: ServerSettings, array: str = "numpy"):
        super().__init__(settings.tokens, settings.limits)
        self.bundle = bundle
        kind = "jax" if array == "jax" else "numpy"
        self.parameters = rlwe.Parameters()
        weights = read_weights(bundle)
        self.matrices = [(name, rlwe.Matrix(weight, self.parameters, kind)) for name, weight in weights.items()]
        # Products ahead at once, each on one core, or one on the whole device; online ones do not wait for them.
        self.ahead = asyncio.Semaphore(cores() if kind == "numpy" else 1)
        self.arriving = 0  # bytes of requests ahead that are here, or on their way
        self.threads = ThreadPoolExecutor(4)

    def matrix(self, request: Request) -> rlwe.Matrix:
        """Raises APIError."""
        text = request.path_params["number"]
        if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) < len(self.matrices)):
            raise APIError(404, "no_matrix", f"there is no such matrix; there are {len(self.matrices)}, from 0")
        return self.matrices[int(text)][1]

    @contextlib.contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """A request ahead of so many bytes is here, or arrives. Raises APIError if the others leave no room."""
        if self.arriving and self.arriving + size > MOST_ARRIVING:
            raise APIError(503, "busy", "other requests ahead leave no room for this one", retry_after=1)
        self.arriving += size
        try:
            yield
        finally:
            self.arriving -= size

    def caller(self, request: Request) -> str:
        """Whose token a request has. Raises APIError."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        name = self.client(token if scheme.lower() == "bearer" else None)
        if name == METRICS:
            raise APIError(403, "metrics_only", "this token reads /metrics, which this server does not have")
        return name


def announced_size(request: Request) -> int:
    """A body's size, as it is announced. Raises APIError."""
    announced = request.headers.get("content-length", "")
    if not (announced.isascii() and announced.isdigit()):
        raise APIError(411, "length", "wanted a body with a Content-Length")
    return int(announced[:20])


async def body_of(request: Request, size: int) -> bytearray:
    """A body of exactly so many bytes, whose place is taken as it comes. Raises APIError."""
    announced = announced_size(request)
    if announced != size:
        raise APIError(413 if announced > size else 422, "size", f"wanted {size} bytes")
    body = bytearray()
    async for chunk in chunks_of(request):
        if len(body) + len(chunk) > size:
            raise APIError(413, "size", f"wanted {size} bytes")
        body += chunk
    if len(body) != size:
        raise APIError(422, "size", f"wanted {size} bytes, got {len(body)}")
    return body


class Answer(Response):
    """Pieces of known size in all, computed in a thread and sent one after the other. A client that stops reading is
    given up."""

    def __init__(self, server: LinearServer, pieces: Iterator[bytes], size: int):
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(size)
        self._server, self._pieces = server, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while (piece := await loop.run_in_executor(self._server.threads, next, self._pieces, None)) is not None:
            async with asyncio.timeout(PATIENCE):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def make_app(server: LinearServer) -> Starlette:
    """The HTTP interface of a server."""
    loop_threads = server.threads

    async def specification(request: Request) -> Response:
        server.caller(request)
        return JSONResponse(
            {
                "format": FORMAT,
                "bundle": server.bundle.id,
                "version": jaxgpt2.__version__,
                "linear": {name: [matrix.inputs, matrix.outputs] for name, matrix in server.matrices},
            }
        )

    async def online(request: Request) -> Response:
        client, matrix = server.caller(request), server.matrix(request)
        row, announced = 4 * matrix.inputs, announced_size(request)
        rows, rest = divmod(announced, row)
        if rest or not 1 <= rows <= MOST_ROWS:
            status = 413 if rows > MOST_ROWS else 422
            raise APIError(status, "size", f"wanted 1 to {MOST_ROWS} rows of {row} bytes, got {announced} bytes")
        with server.admitted(client):
            server.count_calls(client, 1)
            body = await body_of(request, rows * row)
            masked = np.frombuffer(body, "<u4").reshape(rows, matrix.inputs).astype(np.uint32, copy=False)
            if rows * matrix.inputs * matrix.outputs <= INLINE:
                products = matrix.online(masked)
            else:
                products = await asyncio.get_running_loop().run_in_executor(loop_threads, matrix.online, masked)
        return Response(products.astype("<u4", copy=False).tobytes(), media_type="application/octet-stream")

    async def ahead(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        client, matrix = server.caller(request), server.matrix(request)
        parameters, started = server.parameters, time.monotonic()
        with server.admitted(client):
            server.count_calls(client, 1)
            size = matrix.inputs * parameters.feature_bytes
            with server.room_for(size):
                body = await body_of(request, size)
                async with server.ahead:
                    try:
                        pieces = await asyncio.to_thread(matrix.answer, memoryview(body), BLOCK)
                    except FHEError as error:
                        raise APIError(422, "refused", str(error)) from None
                    await Answer(server, pieces, matrix.outputs * parameters.output_bytes)(scope, receive, send)
        log.info("product ahead", client=client, seconds=round(time.monotonic() - started, 3))

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    app = Starlette(
        routes=[
            Route("/healthz", health),
            Route("/specification", specification),
            Route("/matrices/{number}/online", online, methods=["POST"]),
            Route("/matrices/{number}/ahead", _Raw(ahead), methods=["POST"]),
        ],
        exception_handlers={APIError: _on_error, ClientDisconnect: _on_disconnect, HTTPException: _on_http},
    )
    return app


class _Raw:
    """An ASGI endpoint, for a route that answers by itself."""

    def __init__(self, endpoint: Any):
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return refused(error)


def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(APIError(error.status_code, "http", str(error.detail)))


def _on_disconnect(_: Request, error: Exception) -> Response:
    return refused(APIError(400, "disconnected", "the request ended before its body"))


def serve_linear(bundle: Bundle, settings: ServerSettings, array: str = "numpy") -> None:
    """Serves until SIGINT or SIGTERM. Raises InputError: address, certificate or bundle cannot be used."""
    configure_logs()
    # A product of one row waits for memory, and more threads of BLAS only spin beside it.
    with contextlib.suppress(KeyboardInterrupt), threadpool_limits(1, "blas"):
        listen(make_app(LinearServer(bundle, settings, array)), bundle, settings)
