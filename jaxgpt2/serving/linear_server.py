"""The HTTP server of linear layers: matrices, and nothing of a client's: no keys, no sessions, no ciphertexts.

    GET  /specification            what it serves
    GET  /metrics                  for Prometheus
    POST /matrices/NUMBER/online   masked numbers, uint32 (T, d) -> their products, uint32 (T, m)
    POST /matrices/NUMBER/ahead    an encrypted request (`fhe.rlwe`) -> its answer

Bodies are bare numbers, little-endian. Every request carries all that it needs, so any replica answers, and a request
may be sent again without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from threadpoolctl import threadpool_limits

import jaxgpt2
from fhe import FHEError, rlwe
from jaxgpt2.executors.processes import cores
from jaxgpt2.serving import asgi
from jaxgpt2.serving.accounts import Accounts
from jaxgpt2.serving.bundle import FORMAT, Bundle
from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.linear_bundle import read_weights
from jaxgpt2.serving.server import ServerSettings, configure_logs, run

# Rows of an online request: a prompt is no longer than a model's context.
MOST_ROWS = 4096

# Products of so few numbers take less time than handing them to a thread, and nobody waits long for them.
INLINE = 2**22

# Outputs of an answer that are computed at a time.
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
        self.threads = ThreadPoolExecutor(4)
        self.metrics = asgi.Metrics()

    def matrix(self, request: Request) -> rlwe.Matrix:
        """Raises APIError."""
        text = request.path_params["number"]
        if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) < len(self.matrices)):
            raise APIError(404, "no_matrix", f"there is no such matrix; there are {len(self.matrices)}, from 0")
        return self.matrices[int(text)][1]


def token_of(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else None


def announced_size(request: Request) -> int:
    """A body's size, as it is announced. Raises APIError."""
    announced = request.headers.get("content-length", "")
    if not (announced.isascii() and announced.isdigit()):
        raise APIError(411, "length", "wanted a body with a Content-Length")
    return int(announced[:20])


async def body_of(request: Request, size: int, take: Callable[[int], None]) -> bytearray:
    """A body of exactly so many bytes. Raises APIError."""
    announced = announced_size(request)
    if announced != size:
        raise APIError(413 if announced > size else 422, "size", f"wanted {size} bytes")
    body = await asgi.body_of(request, size, take)
    if len(body) != size:
        raise APIError(422, "size", f"wanted {size} bytes, got {len(body)}")
    return body


def make_app(server: LinearServer) -> Starlette:
    """The HTTP interface of a server."""
    loop_threads = server.threads

    async def specification(request: Request) -> Response:
        server.user(token_of(request))
        return JSONResponse(
            {
                "format": FORMAT,
                "bundle": server.bundle.id,
                "version": jaxgpt2.__version__,
                "linear": {name: [matrix.inputs, matrix.outputs] for name, matrix in server.matrices},
            }
        )

    async def online(request: Request) -> Response:
        client, matrix = server.user(token_of(request)), server.matrix(request)
        row, announced = 4 * matrix.inputs, announced_size(request)
        rows, rest = divmod(announced, row)
        if rest or not 1 <= rows <= MOST_ROWS:
            status = 413 if rows > MOST_ROWS else 422
            raise APIError(status, "size", f"wanted 1 to {MOST_ROWS} rows of {row} bytes, got {announced} bytes")
        asgi.until_answered(request, server.admitted(client))
        server.count_calls(client, 1)
        body = await body_of(request, rows * row, asgi.until_answered(request, server.room(client)))
        masked = np.frombuffer(body, "<u4").reshape(rows, matrix.inputs).astype(np.uint32, copy=False)
        if rows * matrix.inputs * matrix.outputs <= INLINE:
            products = matrix.online(masked)
        else:
            products = await asyncio.get_running_loop().run_in_executor(loop_threads, matrix.online, masked)
        return Response(products.astype("<u4", copy=False).tobytes(), media_type="application/octet-stream")

    async def ahead(request: Request) -> Response:
        client, matrix = server.user(token_of(request)), server.matrix(request)
        asgi.until_answered(request, server.admitted(client))
        server.count_calls(client, 1)
        take = asgi.until_answered(request, server.room(client))
        body = await body_of(request, matrix.inputs * server.parameters.feature_bytes, take)
        take(size := matrix.outputs * server.parameters.output_bytes)
        # All of it is computed before any of it is sent: others must not wait for a client that reads slowly.
        async with server.ahead:
            try:
                pieces = await asyncio.to_thread(lambda: list(matrix.answer(memoryview(body), BLOCK)))
            except FHEError as error:
                raise APIError(422, "refused", str(error)) from None
        headers = {"Content-Length": str(size)}
        return StreamingResponse(iter(pieces), media_type="application/octet-stream", headers=headers)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        server.check_reads_metrics(token_of(request))
        return server.metrics.answer()

    return Starlette(
        routes=[
            Route("/healthz", health),
            Route("/metrics", metrics),
            Route("/specification", specification),
            Route("/matrices/{number}/online", online, methods=["POST"]),
            Route("/matrices/{number}/ahead", ahead, methods=["POST"]),
        ],
        exception_handlers=asgi.HANDLERS,
        # Online requests are many, and short.
        middleware=[Middleware(asgi.Watch, server.metrics, {"/healthz", "/metrics", "/matrices/{number}/online"})],
    )


def serve_linear(bundle: Bundle, settings: ServerSettings, listener: socket.socket, array: str = "numpy") -> None:
    """Serves until SIGINT or SIGTERM. Raises InputError: certificate or bundle cannot be used."""
    configure_logs()
    # A product of one row waits for memory, and more threads of BLAS only spin beside it.
    with contextlib.suppress(KeyboardInterrupt), threadpool_limits(1, "blas"):
        run(make_app(LinearServer(bundle, settings, array)), bundle, settings, listener)
