"""What both servers do with requests: how bodies come, how answers go, what is counted of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Container
from typing import Any, TypeVar

import prometheus_client
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.protocol import Problem

log = structlog.get_logger()

# A body of which less than LEAST bytes come in so many seconds is given up; so is an answer of which less than CHUNK is
# taken.
PATIENCE = 60.0
LEAST = 100_000

# Bytes of an answer that are handed to a connection at a time.
CHUNK = 1 << 18

T = TypeVar("T")


async def chunks_of(request: Request) -> AsyncIterator[bytes]:
    """A request's body as it comes. Raises APIError if it comes too slowly."""
    stream = request.stream().__aiter__()
    loop = asyncio.get_running_loop()
    deadline, came = loop.time() + PATIENCE, 0
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise APIError(408, "slow", f"{came} bytes came in {PATIENCE:g} s") from None
        came += len(chunk)
        if came >= LEAST:
            deadline, came = loop.time() + PATIENCE, 0
        if chunk:
            yield chunk


async def body_of(request: Request, limit: int, take: Callable[[int], None] = lambda size: None) -> bytearray:
    """A request's body.

    take: is told of every piece before it is kept, and may refuse (see `Accounts.room`).

    Raises:
        APIError: it is larger than the limit, known before all of it is here, or it comes too slowly.
    """
    too_large = APIError(413, "too_large", f"a request may have {limit} bytes here")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    async for chunk in chunks_of(request):
        if len(body) + len(chunk) > limit:
            raise too_large
        take(len(chunk))
        body += chunk
    return body


def until_answered(request: Request, context: contextlib.AbstractContextManager[T]) -> T:
    """Enters a context that ends when the answer is with the client, or the client is given up."""
    return request.scope["jaxgpt2.until_answered"].enter_context(context)


class Metrics:
    """What Prometheus may ask for. No metric names a client."""

    def __init__(self) -> None:
        registry = self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        self.requests = prometheus_client.Counter(
            "jaxgpt2_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.received = prometheus_client.Counter(
            "jaxgpt2_received_bytes", "Bodies of requests.", ["route"], registry=registry
        )
        self.sent = prometheus_client.Counter("jaxgpt2_sent_bytes", "Bodies of answers.", ["route"], registry=registry)

    def answer(self) -> Response:
        text = prometheus_client.generate_latest(self.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


class Watch:
    """Around an application: counts, logs, gives up who does not read, and answers for what fails.

    quiet: paths of routes that have no line in the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, quiet: Container[str]):
        self._app, self._metrics, self._quiet = app, metrics, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, received, sent = time.monotonic(), 0, 0, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def patient(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            # A connection takes all that it is given, and then waits: so it is given a little at a time.
            body, more = message.get("body", b""), message.get("more_body", False)
            for start in range(0, len(body) or 1, CHUNK):
                piece, end = message, start + CHUNK
                if len(body) > CHUNK:
                    piece = {**message, "body": body[start:end], "more_body": more or end < len(body)}
                async with asyncio.timeout(PATIENCE):
                    await send(piece)
                sent += len(piece.get("body", b""))

        with contextlib.ExitStack() as stack:
            scope["jaxgpt2.until_answered"] = stack
            try:
                await self._app(scope, counted, patient)
            except Exception as error:
                if status and isinstance(error, TimeoutError | ClientDisconnect):
                    log.warning("given up", reason="the client does not read")
                else:
                    log.error("failed", exc_info=error)
                if not status:
                    await refused(APIError(500, "failed", f"the server failed: {type(error).__name__}"))(
                        scope, receive, patient
                    )
        route = _path_of(scope)
        self._metrics.requests.labels(route, status).inc()
        self._metrics.received.labels(route).inc(received)
        self._metrics.sent.labels(route).inc(sent)
        if route not in self._quiet:
            log.info(
                "request", method=scope["method"], route=route, status=status, received=received, sent=sent,
                seconds=round(time.monotonic() - started, 3),
            )  # fmt: skip


def _path_of(scope: Scope) -> str:
    """The path of the route that answered, as it was declared; "none" if there is none."""
    if "endpoint" not in scope:
        return "none"
    return next(route.path for route in scope["app"].routes if route.endpoint is scope["endpoint"])


def refused(error: APIError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(int(-(-error.retry_after // 1)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(Problem(code=error.code, detail=error.detail).model_dump(), error.status, headers)


def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return refused(error)


def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = refused(APIError(error.status_code, "http", str(error.detail)))
    if error.status_code == 405:
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        matching = [route.methods or () for route in routes if route.path_regex.match(request.url.path)]
        response.headers["Allow"] = ", ".join(sorted({method for methods in matching for method in methods}))
    return response


def _on_disconnect(_: Request, error: Exception) -> Response:
    return refused(APIError(400, "disconnected", "the request ended before its body"))


HANDLERS: dict[Any, Callable[[Request, Exception], Response]] = {
    APIError: _on_error,
    HTTPException: _on_http,
    ClientDisconnect: _on_disconnect,
}
