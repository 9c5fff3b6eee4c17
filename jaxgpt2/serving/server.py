"""The HTTP server: it knows circuits, ciphertexts and clients' names, and neither the model nor a secret key."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import prometheus_client
import structlog
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from filelock import FileLock, Timeout

import fhe
import jaxgpt2
from jaxgpt2.errors import InputError
from jaxgpt2.serving import asgi
from jaxgpt2.serving.accounts import Accounts
from jaxgpt2.serving.bundle import FORMAT, Bundle, CircuitEntry
from jaxgpt2.serving.files import APIError, KeyStore, Session, SessionStore
from jaxgpt2.serving.limits import Limits
from jaxgpt2.serving.protocol import (
    MSGPACK,
    Answer,
    BadRequest,
    Batch,
    Digest,
    Identity,
    KeyStatus,
    NewSession,
    Problem,
    Result,
    SessionOpened,
    read,
    unpack,
)
from jaxgpt2.serving.work import Job
from jaxgpt2.serving.workers import LocalWorker, Scheduler, TookTooLong, Worker, WorkerDied, dask_workers

log = structlog.get_logger()

T = TypeVar("T")

# Seconds that a request waits for an answer before it is told to ask again.
POLL = 20.0

# Expired sessions are looked for so often, in seconds.
SWEEP = 60.0


class TokenError(InputError):
    """A file of tokens that cannot be read."""


@dataclass(frozen=True)
class ServerSettings:
    """How a bundle is served.

    state: directory for keys and sessions. tokens: client's name by the SHA-256 of its token; None asks for none.
    workers: processes, None for one per core. threads: of each, None for as many as there are cores. scheduler: of
    more workers, by Dask's address. files: of attention methods, see `Bundle.method_files`. certificate, key: files for
    TLS. client_authority: certificates of whom clients must have theirs from.
    """

    state: Path
    tokens: Mapping[str, str] | None = None
    workers: int | None = None
    threads: int | None = None
    scheduler: str | None = None
    files: tuple[tuple[str, str, bytes], ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    client_authority: Path | None = None
    limits: Limits = field(default_factory=Limits)


def read_tokens(path: Path) -> dict[str, str]:
    """The clients of a file with a line `NAME SHA256-OF-TOKEN` for each, by that hash. Empty lines and # are left out.

    Raises:
        TokenError: the file cannot be read, or a line of it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]{0,63})\s+([0-9a-f]{64})\s*", line, re.ASCII)
        if match is None:
            raise TokenError(f"{path}, line {number}: wanted NAME and the token's SHA-256 in hexadecimal digits")
        if match[2] in tokens or match[1] in tokens.values():
            raise TokenError(f"{path}, line {number}: {match[1]} or its token is there twice")
        tokens[match[2]] = match[1]
    if not tokens:
        raise TokenError(f"{path} has no token: nobody could use the server")
    return tokens


class Metrics(asgi.Metrics):
    """Those of a server of circuits."""

    def __init__(self, server: "Server"):
        super().__init__()
        registry = self.registry

        def gauge(name: str, text: str, value: Any) -> None:
            prometheus_client.Gauge(f"jaxgpt2_{name}", text, registry=registry).set_function(value)

        gauge("batches_waiting", "Batches in the queue.", lambda: server.scheduler.waiting)
        gauge("batches_running", "Batches being computed.", lambda: server.scheduler.running)
        gauge("workers", "Worker processes.", lambda: len(server.scheduler.workers))
        gauge("sessions", "Open sessions.", lambda: len(server.sessions.sessions))
        gauge("key_bytes", "Evaluation keys on disk.", lambda: server.keys.size)
        self.seconds = prometheus_client.Histogram(
            "jaxgpt2_function_seconds", "Runs of a circuit's functions.", ["function"], registry=registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )  # fmt: skip
        self.died = prometheus_client.Counter("jaxgpt2_worker_deaths", "Workers that died at work.", registry=registry)


class Server(Accounts):
    """A bundle's state and workers; `make_app` makes its HTTP interface."""

    def __init__(self, bundle: Bundle, settings: ServerSettings, workers: Sequence[Worker]):
        super().__init__(settings.tokens, settings.limits)
        self.bundle, self.settings = bundle, settings
        self.circuits: dict[str, CircuitEntry] = {entry.id: entry for entry in bundle.circuits}
        own = self.limits
        self.keys = KeyStore(settings.state / "keys", own.keys, own.keys_per_client, own.idle)
        self.sessions = SessionStore(
            settings.state / "sessions", own.idle, own.sessions_per_client, own.sessions, own.session_size
        )
        for session in list(self.sessions.sessions.values()):
            if session.circuit not in self.circuits:  # of another bundle that was served from here
                self.sessions.close(session)
        self.metrics = Metrics(self)
        self.scheduler = Scheduler(workers, own.queue)
        self.reader = ThreadPoolExecutor(1)  # of batches, one at a time: it takes turns with the event loop
        self.turns: dict[str, asyncio.Lock] = {}

    async def read(self, client: str, function: Callable[..., T], *arguments: Any) -> T:
        """What a function makes of a batch, where clients take turns too."""
        async with self.turns.setdefault(client, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self.reader, function, *arguments)

    def check_batch(self, session: Session, batch: Batch) -> None:
        """What can be known of a batch before it is computed. Raises APIError."""
        signatures = self.circuits[session.circuit].signatures
        made: set[Result] = set()
        there = {path.name for path in session.path.iterdir()}

        def known(result: Result) -> None:
            if result not in made and session.result(result).name not in there:
                raise APIError(422, "no_result", f"there is no result {result.output} of call {result.call}")

        functions: dict[int, str] = {}
        for call in batch.calls:
            # A number names one call for ever: results of two calls under one name could not be told apart.
            if call.id in functions or call.id < session.next_call:
                raise APIError(422, "call_twice", f"there is a call {call.id} already in this session")
            functions[call.id] = call.function
            if call.function not in signatures.functions:
                raise APIError(
                    422, "no_function", f"there is no such function; there are: {', '.join(signatures.functions)}"
                )
            port = signatures[call.function]
            if len(call.inputs) != len(port.sources):
                detail = f"{call.function} takes {len(port.sources)} inputs, not {len(call.inputs)}"
                raise APIError(422, "inputs", detail)
            for source in call.inputs:
                if isinstance(source, Result):
                    known(source)
                elif source >= len(batch.uploads):
                    raise APIError(422, "inputs", f"there is no upload {source}")
            made |= {Result(call=call.id, output=output) for output in range(port.outputs)}
        if len(set(batch.results)) < len(batch.results):
            raise APIError(422, "result_twice", "a result is asked for twice")
        for result in batch.results:
            known(result)
            # The client's key opens what the server keeps for later calls: queries, keys, values one by one.
            if (
                result.call not in functions
                or fhe.Output(functions[result.call], result.output) in signatures.server_state
            ):
                raise APIError(403, "kept", f"result {result.output} of call {result.call} stays on the server")

    def begin(self, session: Session, batch: Batch, body: bytes) -> asyncio.Task[None] | None:
        """Begins to check and to compute a batch, if it is not computed already or being computed; `answer` says what
        becomes of it.

        Returns:
            the new task, if there is one.

        Raises APIError for another batch while one is computed.
        """
        if session.running is not None:
            if session.running[0] != batch.request:
                raise APIError(409, "in_order", "this session is computing another batch", retry_after=1)
            return None
        if session.answer(batch.request).exists():
            return None
        task = asyncio.create_task(self._compute(session, batch, body))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # if nobody waits for it
        session.running = batch.request, task
        return task

    async def answer(self, session: Session, request: str) -> Path | None:
        """The file with the answer to a batch that has begun; None if it takes longer than POLL.

        Raises APIError: the batch was refused, or is not known here.
        """
        if session.running is not None and session.running[0] == request:
            task = session.running[1]
            # Whoever waits may go away; the work goes on.
            await asyncio.wait([task], timeout=POLL)
            if not task.done():
                return None
            task.result()
        path = session.answer(request)
        if not path.exists():
            raise APIError(404, "no_batch", "there is no such batch, or its answer has been dropped: send it again")
        return path

    async def sweep(self) -> None:
        """Closes expired sessions, as long as the server runs: whoever sends nothing more gives room too."""
        while True:
            await asyncio.sleep(min(self.limits.idle, SWEEP))
            self.sessions.sweep()

    async def _compute(self, session: Session, batch: Batch, body: bytes) -> None:
        try:
            await self.read(session.client, self.check_batch, session, batch)
            batch.uploads.clear()  # they are in the body, which the worker reads
            self.scheduler.check()
            self.keys.use(session.client, session.keys)
            self.count_calls(session.client, len(batch.calls))
            await self._finish(session, batch, self._job(session, body))
        finally:
            session.running = None
            session.used = time.time()

    def _job(self, session: Session, body: bytes) -> Job:
        entry = self.circuits[session.circuit]
        return Job(
            entry.backend,
            self.bundle.circuit_directory(entry.module).absolute(),
            self.keys.path(session.client, session.keys).absolute(),
            session.path.absolute(),
            body,
            self.limits.keys_in_memory,
            self.limits.session_size - session.size,
            self.settings.files,
        )

    async def _finish(self, session: Session, batch: Batch, job: Job) -> None:
        started = time.monotonic()
        module = self.circuits[session.circuit].module
        facts = {"client": session.client, "circuit": module, "calls": len(batch.calls)}
        try:
            done = await self.scheduler.run(session.client, job)
        except WorkerDied as error:
            self.metrics.died.inc()
            log.error("worker died", reason=str(error), **facts)
            raise APIError(500, "worker_died", "the process that computed this died; it has been replaced") from None
        except TookTooLong:
            log.warning("batch stopped", **facts)
            raise APIError(500, "too_long", f"this took longer than {self.limits.job:g} s, and was stopped") from None
        if done.error is not None:
            status, code, detail = done.error
            log.warning("batch refused", code=code, **facts)
            raise APIError(status, code, detail)
        for function, seconds in done.seconds:
            self.metrics.seconds.labels(function).observe(seconds)
        await asyncio.to_thread(self._tidy, session, batch)
        log.info("batch done", seconds=round(time.monotonic() - started, 3), **facts)

    @staticmethod
    def _tidy(session: Session, batch: Batch) -> None:
        """Removes answers but the last, and what the client will not use again."""
        for path in session.path.glob("answer.*"):
            if path != session.answer(batch.request):
                path.unlink(missing_ok=True)
        for result in batch.forget:
            session.result(result).unlink(missing_ok=True)
        session.passed(max((call.id for call in batch.calls), default=-1) + 1)
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            session.measure()


RANGE = r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})"


def content_range(request: Request) -> tuple[int, int]:
    """First byte and number of all bytes, from `Content-Range: bytes FIRST-LAST/ALL`. Raises APIError.

    FIRST may be ALL: then no byte is missing, and what is here is to be checked.
    """
    value = request.headers.get("content-range", "")
    match = re.fullmatch(RANGE, value)
    if match is None or not int(match[1]) <= int(match[2]) + 1 == int(match[3]):
        raise APIError(400, "range", "wanted Content-Range: bytes FIRST-LAST/ALL, to the last byte of all")
    return int(match[1]), int(match[3])


DESCRIPTION = """Runs functions of compiled circuits on encrypted data. It holds weights and evaluation keys; it cannot
decrypt. Batches of calls and their answers are MessagePack of the schemas `Batch` and `Answer`."""

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "A body that ends early, or a Content-Range that is none",
        401: "No token, or one that is not known",
        403: "Another client's",
        404: "Not here, or not any more",
        405: "Another method; see Allow",
        408: "The request stopped coming",
        409: "Out of step; the code says how",
        413: "Too large",
        422: "Not a request of this protocol, or arrays that do not belong here",
        429: "Too often, or too much at once; see Retry-After",
        500: "The computation failed; the code says how",
        503: "The queue is full; see Retry-After",
    }.items()
}


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer", "content": {MSGPACK: {"schema": Answer.model_json_schema()}}},
    202: {"description": "Still in the queue, or being computed: ask again"},
}


UPLOAD: dict[str, Any] = {
    "parameters": [
        {
            "name": "Content-Range",
            "in": "header",
            "required": True,
            "description": "The first byte that is missing, the last, and the number of all. The first may be the "
            "number of all: then no byte is missing, and what is here is checked.",
            "schema": {"type": "string", "pattern": f"^{RANGE}$"},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
}


bearer = HTTPBearer(auto_error=False)


async def token_of(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str | None:
    return credentials.credentials if credentials else None


async def client_of(request: Request, token: Annotated[str | None, Depends(token_of)]) -> str:
    """Whose token a request has."""
    return request.app.state.server.user(token)


Client = Annotated[str, Depends(client_of)]


def make_app(server: Server) -> FastAPI:
    """The HTTP interface of a server."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(server.sweep())
        yield
        sweeping.cancel()
        await server.scheduler.finish()

    app = FastAPI(
        title="jaxgpt2", version=jaxgpt2.__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None,
        redoc_url=None, redirect_slashes=False, responses=PROBLEMS,
    )  # fmt: skip
    app.state.server = server

    app.add_middleware(asgi.Watch, metrics=server.metrics, quiet={"/healthz", "/metrics"})
    for kind, handler in asgi.HANDLERS.items():
        app.add_exception_handler(kind, handler)

    @app.exception_handler(BadRequest)
    async def on_bad_request(_: Request, error: BadRequest) -> JSONResponse:
        return asgi.refused(APIError(422, "malformed", str(error)))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return asgi.refused(APIError(422, "malformed", f"{first['loc'][-1]}: {first['msg']}"))

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(token: Annotated[str | None, Depends(token_of)]) -> Response:
        """For Prometheus; with the token of the client named `metrics`, where the server asks for tokens."""
        server.check_reads_metrics(token)
        return server.metrics.answer()

    @app.get("/specification")
    async def specification(client: Client) -> dict[str, Any]:
        """What this server serves, and the limits that a client should know."""
        return {
            "format": FORMAT,
            "bundle": server.bundle.id,
            "version": jaxgpt2.__version__,
            "circuits": {
                entry.module: {"id": entry.id, "backend": entry.backend, "functions": entry.signatures.to_json()}
                for entry in server.bundle.circuits
            },
            "limits": {
                "body": server.limits.body,
                "idle": server.limits.idle,
                "calls_per_minute": server.limits.calls_per_minute,
            },
        }

    @app.get("/keys/{digest}")
    async def key_status(client: Client, digest: Digest) -> KeyStatus:
        """How much of a set of evaluation keys, named by its SHA-256, is here."""
        received, complete = server.keys.status(client, digest)
        return KeyStatus(received=received, complete=complete)

    @app.put("/keys/{digest}", openapi_extra=UPLOAD)
    async def upload_keys(client: Client, digest: Digest, request: Request) -> KeyStatus:
        """Evaluation keys from the byte on that is missing, to the last. What has arrived when the connection breaks
        stays here."""
        start, total = content_range(request)
        with server.admitted(client), server.keys.receive(client, digest, start, total) as upload:
            async for chunk in asgi.chunks_of(request):
                upload.take(len(chunk))
                await asyncio.to_thread(upload.write, chunk)
                start += len(chunk)
            if start == total:
                await asyncio.to_thread(server.keys.check, client, digest)
                server.keys.finish(client, digest)
        return KeyStatus(received=start, complete=start == total)

    @app.post("/sessions", status_code=201, openapi_extra=_body(NewSession, "application/json"))
    async def open_session(client: Client, request: Request) -> SessionOpened:
        """A session for calls of one circuit under keys that were uploaded."""
        try:
            content = json.loads(await asgi.body_of(request, 10_000))
        except (ValueError, RecursionError):
            raise BadRequest("this is no JSON") from None
        wanted = read(NewSession, content)
        if wanted.circuit not in server.circuits:
            raise APIError(409, "no_circuit", "this server has no such circuit: client and server are of other bundles")
        server.keys.use(client, wanted.keys)
        session = server.sessions.open(client, wanted.circuit, wanted.keys)
        return SessionOpened(session=session.id, expires_after=server.limits.idle)

    @app.delete("/sessions/{identity}", status_code=204)
    async def close_session(client: Client, identity: Identity) -> None:
        """Forgets a session and all that it holds."""
        session = server.sessions.get(client, identity)
        if session.running is not None:
            raise APIError(409, "in_order", "this session is computing a batch", retry_after=1)
        server.sessions.close(session)

    @app.post(
        "/sessions/{identity}/batches",
        response_class=Response,
        openapi_extra=_body(Batch, MSGPACK),
        responses=ANSWERS,
    )
    async def run_batch(client: Client, identity: Identity, request: Request) -> Response:
        """Runs a batch's calls, once, however often it is sent."""
        session = server.sessions.get(client, identity)
        asgi.until_answered(request, server.admitted(client))
        with contextlib.ExitStack() as held:
            take = held.enter_context(server.room(client))
            body = bytes(await asgi.body_of(request, server.limits.body, take))
            batch = await server.read(client, unpack, Batch, body)
            task = server.begin(session, batch, body)
            if task is not None:  # what it computes with is held until it is done
                rest = held.pop_all()
                task.add_done_callback(lambda _: rest.close())
        return _answered(request, await server.answer(session, batch.request))

    @app.get("/sessions/{identity}/batches/{batch}", response_class=Response, responses=ANSWERS)
    async def wait_for_batch(client: Client, identity: Identity, batch: Identity, request: Request) -> Response:
        """The answer to a batch that was sent before."""
        session = server.sessions.get(client, identity)
        asgi.until_answered(request, server.admitted(client))
        return _answered(request, await server.answer(session, batch))

    return app


def _answered(request: Request, path: Path | None) -> Response:
    if path is None:
        return Response(status_code=202)
    try:
        file = asgi.until_answered(request, path.open("rb"))
        pieces = iter(functools.partial(file.read, asgi.CHUNK), b"")
        size = os.fstat(file.fileno()).st_size
        return StreamingResponse(pieces, media_type=MSGPACK, headers={"Content-Length": str(size)})
    except FileNotFoundError:  # the session's next batch is done, or the session closed
        raise APIError(404, "no_batch", "the answer to this batch has been dropped") from None


def _body(message: type[Any], media: str) -> dict[str, Any]:
    """A request's body for the API's description, of routes that read it themselves."""
    schema = message.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    if definitions:  # written out in place: they appear nowhere else
        text = json.dumps(schema)
        for name, definition in definitions.items():
            definitions[name] = json.loads(_inline(json.dumps(definition), definitions))
        schema = json.loads(_inline(text, definitions))
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def _inline(text: str, definitions: Mapping[str, Any]) -> str:
    for name, definition in definitions.items():
        text = text.replace(f'{{"$ref": "#/components/schemas/{name}"}}', json.dumps(definition))
    return text


def start_workers(settings: ServerSettings) -> list[Worker]:
    """Raises InputError if a cluster is wanted and does not answer."""
    count = settings.workers if settings.workers is not None else len(os.sched_getaffinity(0))
    workers: list[Worker] = [LocalWorker(settings.limits.job, settings.threads) for _ in range(count)]
    if settings.scheduler is not None:
        workers += dask_workers(settings.scheduler, settings.limits.job)
    return workers


def places_only(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Of an exception its type and where it was raised: its text and its variables may hold what no log shall."""
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event["error"] = type(error).__name__
        event["at"] = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return event


def configure_logs() -> None:
    """JSON lines on standard error, uvicorn's own among them."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        places_only,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def serve(bundle: Bundle, settings: ServerSettings, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what is running.

    Raises:
        InputError: the state directory is another server's, or the certificate cannot be used.
    """
    configure_logs()
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(settings.state / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another server uses {settings.state}: give another --state") from None
    with lock:
        server = Server(bundle, settings, start_workers(settings))
        run(make_app(server), bundle, settings, listener)


def run(app: Any, bundle: Bundle, settings: ServerSettings, listener: socket.socket) -> None:
    """Serves an ASGI application until SIGINT or SIGTERM.

    Raises:
        InputError: the certificate cannot be used.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=settings.limits.grace, limit_concurrency=2 * settings.limits.requests + 16,
        ssl_certfile=settings.certificate, ssl_keyfile=settings.key,
        ssl_ca_certs=None if settings.client_authority is None else str(settings.client_authority),
        ssl_cert_reqs=ssl.CERT_NONE if settings.client_authority is None else ssl.CERT_REQUIRED,
    )  # fmt: skip
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the certificate or its key cannot be used: {error}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a connection whose other end takes nothing is ended
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * asgi.PATIENCE))
    scheme, (host, port) = "http" if settings.certificate is None else "https", listener.getsockname()[:2]
    log.info("listening", url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", bundle=bundle.id)
    for number in (signal.SIGINT, signal.SIGTERM):  # once stopped, uvicorn raises again what stopped it
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])
    log.info("stopped")
