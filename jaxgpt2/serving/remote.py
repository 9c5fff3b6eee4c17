"""The client's side of the wire: circuits whose functions run on a server.

What leaves this machine is evaluation keys, ciphertexts and the order in which functions run. Secret keys stay in their
file, and nothing that was decrypted is ever sent: there is no request that could hold it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import secrets
import ssl
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore2
import numpy as np
import tenacity

import fhe
import jaxgpt2
from fhe.rlwe import Parameters
from jaxgpt2.errors import InputError, shown
from jaxgpt2.executors import StateLost
from jaxgpt2.serving.bundle import FORMAT
from jaxgpt2.serving.deadline import Backend, stream_of
from jaxgpt2.serving.protocol import (
    MAX_CALLS,
    MSGPACK,
    Answer,
    BadRequest,
    Batch,
    Call,
    KeyStatus,
    NewSession,
    Problem,
    Result,
    SessionOpened,
    pack,
    unpack,
)

log = logging.getLogger(__name__)

# A server that never answered is given up after so many seconds: most likely it is not there.
FIRST_PATIENCE = 10.0

# Patience is whole again after so many seconds.
PERIOD = 3600.0

# Who waits for longer than this, in seconds, is told why.
SILENCE = 5.0

# Bytes of an upload that are handed to the socket at a time.
PIECE = 1 << 20

# Batches of one text whose worker died are sent again so many times: whatever killed it may have been somebody else's.
DEATHS = 3

# Evaluation keys that the server says it lacks are sent again so many times for one text.
EVICTIONS = 3

# A batch that the server says it is computing is given up after so many seconds.
LONGEST = 3600.0

# A server that says so at once is asked again after so many seconds.
PAUSE = 1.0

# The most bytes of an answer, where the request does not say how many there must be: of JSON, of why a request was
# refused, and of a batch's results.
MOST_JSON = 1 << 24
MOST_PROBLEM = 1 << 16
MOST_RESULTS = 1 << 30

# A request and its answer must keep ahead of so many bytes a second, after the time for which a server may be silent.
SLOWEST = 10_000

# A server that never answered and has hung up so many times, will go on so. With Python's TLS, that is how a server
# refuses a client for its certificate.
HANG_UPS = 3

# Seconds of silence before a request is tried again.
TIMEOUTS = {"timeout": {"connect": 10.0, "read": 60.0, "write": 60.0, "pool": 60.0}}

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerError(InputError):
    """A server that cannot be reached, refuses a request, or does not speak this protocol."""

    def __init__(self, message: str):
        super().__init__(shown(message))  # a server's words are in it


class Mismatch(ServerError):
    """A server of another bundle, or of another version."""


class Refused(ServerError):
    """The server refused a request; `code` is its word for why."""

    def __init__(self, status: int, code: str, detail: str):
        super().__init__(f"the server refused: {detail} ({status} {code})")
        self.status, self.code, self.detail = status, code, detail

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that hand it on."""
        return type(self), (self.status, self.code, self.detail)


class SessionLost(Refused, StateLost):
    """The server does not know the session, or not any more."""


class _Unknown(Refused):
    """The server does not know the batch that it is asked for."""


class _Again(Exception):
    """A request that may succeed later. after: seconds, where the server said."""

    def __init__(self, reason: Exception, after: float | None = None):
        super().__init__(str(reason))
        self.reason, self.after = reason, after


@dataclass
class Traffic:
    """Bytes of bodies that crossed the wire: of evaluation keys, and of everything else up and down; round trips."""

    keys: int = 0
    sent: int = 0
    received: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Reply:
    """What a server answered with success. content: no larger than the request said that it may be."""

    status: int
    content: bytes


class Connection:
    """Requests to one server, each repeated until it is answered: all of them may be sent twice without harm.

    A server is not trusted: its answers are read up to a size that is known before, never unpacked, and no cookie is
    kept.

    Args:
        url: as `https://host:8343`. Unencrypted HTTP is refused beyond this machine, unless `insecure`.
        token: sent as a bearer token.
        authority: a file with the certificate of whom the server has its own from, if the system does not know it.
        certificate: files of the client's own certificate and its key, if the server wants one.
        patience: seconds of a text (of each hour, if it takes hours) that may go by with requests that fail; then the
            server is given up.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        authority: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
        insecure: bool = False,
        patience: float = 300.0,
    ):
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            usable &= re.fullmatch(r"[^\s\x00-\x1f\x7f]+", url) is not None and parts.path.isascii()
            host = (parts.hostname or "").encode("idna")  # as it is looked up
        except ValueError:
            usable, host = False, b""
        if not usable or parts.username is not None or parts.query or parts.fragment:
            raise ServerError(f"{url!r} is no server: wanted https://HOST[:PORT]")
        if parts.scheme == "http" and parts.hostname not in LOOPBACK and not insecure:
            raise ServerError(f"{url} is not encrypted: the token could be read on the way; use https, or --insecure")
        if token is not None and not re.fullmatch("[!-~]{1,1000}", token):
            raise ServerError("the token is none: wanted printable ASCII characters, as the command token prints it")
        try:
            context = ssl.create_default_context(cafile=authority)
            if certificate is not None:
                context.load_cert_chain(*certificate)
        except OSError as error:
            raise ServerError(f"the certificate cannot be used: {error}") from None
        self._headers = {"User-Agent": f"jaxgpt2/{jaxgpt2.__version__}", "Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self.url, self.patience, self.traffic = url, patience, Traffic()
        self._address = parts.scheme, host, parts.port, parts.path.rstrip("/")
        self._hung_up = 0
        self._counting = threading.Lock()  # modules of a layer send at the same time
        self._failing: list[tuple[float, float]] = []
        self._pool = httpcore2.ConnectionPool(
            ssl_context=context, max_connections=100, max_keepalive_connections=20, keepalive_expiry=5.0,
            network_backend=Backend(patience, SLOWEST),
        )  # fmt: skip

    def request(
        self,
        method: str,
        path: str,
        limit: int = MOST_JSON,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """An answer with a status of success, of at most `limit` bytes.

        Raises:
            Refused: the server will not do it, however often it is asked; ServerError: it does not answer.
        """
        return self.persist(lambda: self.once(method, path, limit, content, headers))

    def _wasted(self, start: float, end: float) -> float:
        """Seconds of the last PERIOD that went by with requests that fail, from start to end too. Those of requests
        that fail at the same time count once."""
        with self._counting:
            recent = [each for each in self._failing if each[1] > end - PERIOD]
            apart = [each for each in recent if each[1] < start or each[0] > end]
            joined = [each for each in recent if each not in apart] + [(start, end)]
            self._failing = [*apart, (min(first for first, _ in joined), max(last for _, last in joined))]
            return sum(last - first for first, last in self._failing)

    def persist(self, attempt: Callable[[], Any]) -> Any:
        """`attempt`, again and again while it raises `_Again`, with growing pauses, until patience ends."""

        def patience() -> float:
            return self.patience if self.traffic.requests else min(self.patience, FIRST_PATIENCE)

        backoff = tenacity.wait_exponential_jitter(multiplier=0.2, max=10)
        began, told = time.monotonic(), False

        def tell(state: tenacity.RetryCallState) -> None:
            nonlocal told
            if not told and (state.seconds_since_start or 0) > SILENCE:
                told = True
                error = state.outcome.exception() if state.outcome else None
                log.warning("%s; asking again for up to %d s", error, patience())

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            wait=lambda state: max(backoff(state), _asked_pause(state)),
            stop=lambda state: self._wasted(began, time.monotonic() + state.upcoming_sleep) >= patience(),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except _Again as error:
            raise error.reason from None

    def once(
        self,
        method: str,
        path: str,
        limit: int = MOST_JSON,
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Raises _Again where it is worth another try."""
        scheme, host, port, before = self._address
        own: list[tuple[bytes | str, bytes | str]] = [*self._headers.items(), *(headers or {}).items()]
        url = httpcore2.URL(scheme=scheme, host=host, port=port, target=before + path)
        try:
            with self._pool.stream(method, url, headers=own, content=content, extensions=TIMEOUTS) as response:
                said = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                success = 200 <= response.status < 300
                received = self._read(response, said, limit if success else MOST_PROBLEM)
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            reason = _of_tls(error)
            if isinstance(error, httpcore2.RemoteProtocolError | httpcore2.ReadError) and not self.traffic.requests:
                self._hung_up += 1
                if self._hung_up == HANG_UPS:
                    secure = self.url.startswith("https")
                    reason = _NOT_THIS_CERTIFICATE if secure else "it takes connections and ends them: is it https://?"
            if reason is not None:  # no patience mends it
                raise ServerError(f"{self.url} refuses: {reason}") from None
            hint = "; is jaxgpt2 serve running there?" if isinstance(error, httpcore2.ConnectError) else ""
            raise _Again(ServerError(f"{self.url} does not answer: {error or type(error).__name__}{hint}")) from None
        self.count(requests=1, received=len(received))
        if success:
            return Reply(response.status, received)
        try:
            problem = Problem.model_validate_json(received)
            kind = {"no_batch": _Unknown, "no_session": SessionLost}.get(problem.code, Refused)
            reason = kind(response.status, problem.code, problem.detail)
        except ValueError:
            reason = ServerError(f"{self.url} answers {response.status} and no reason: is it a jaxgpt2 server?")
        after = said.get(b"retry-after", "")
        pause = float(after) if re.fullmatch("[0-9]{1,6}", after) else None
        if (pause is not None and pause <= self.patience) or response.status in (408, 502, 503, 504):
            raise _Again(reason, pause)
        raise reason

    def _read(self, response: httpcore2.Response, said: Mapping[bytes, str], limit: int) -> bytes:
        """The body of an answer. Raises ServerError: it is larger than the limit, or compressed."""
        if said.get(b"content-encoding", "identity").lower() != "identity":
            raise ServerError(f"{self.url} answers with compressed bytes, which nobody asked for")
        body, stream = bytearray(), stream_of(response)
        for chunk in response.iter_stream():
            body += chunk
            stream.moved(len(chunk))
            if len(body) > limit:
                raise ServerError(f"{self.url} answers with more than {limit:,} bytes: is it a jaxgpt2 server?")
        return bytes(body)

    def count(self, **more: int) -> None:
        """Adds to fields of `traffic`."""
        with self._counting:
            for name, number in more.items():
                setattr(self.traffic, name, getattr(self.traffic, name) + number)

    def specification(self) -> dict[str, Any]:
        """What the server says that it serves. Raises ServerError."""
        try:
            found = json.loads(self.request("GET", "/specification").content)
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url} does not say what it serves: is it a jaxgpt2 server?")
        return found

    def check(self, bundle: str, circuits: Sequence[str]) -> None:
        """Asks what the server serves.

        Raises:
            Mismatch: it is not the bundle with these circuits.
        """
        found = self.specification()
        try:
            theirs = {entry["id"] for entry in found["circuits"].values()}
            version, modules = found["version"], ", ".join(found["circuits"])
            if found["format"] != FORMAT:
                raise Mismatch(
                    f"the server speaks format {found['format']}, this client {FORMAT}: one of jaxgpt2 {version} there "
                    f"and {jaxgpt2.__version__} here is too old"
                )
            if found["bundle"] != bundle or not set(circuits) <= theirs:
                raise Mismatch(
                    f"the server has another bundle ({found['bundle'][:12]}, of {modules}), this client is of "
                    f"{bundle[:12]}: use the client bundle that was compiled with the server's"
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise ServerError(f"{self.url} does not say what it serves: is it a jaxgpt2 server?") from None

    def upload(self, keys: bytes, progress: Callable[[int], None] = lambda count: None) -> str:
        """Sends evaluation keys, from the byte on that the server lacks; nothing if it has them.

        progress: is told how many bytes more the server has.

        Returns:
            their name, the SHA-256.
        """
        digest = hashlib.sha256(keys).hexdigest()

        def attempt() -> None:
            status = KeyStatus.model_validate_json(self.once("GET", f"/keys/{digest}").content)
            if not 0 <= status.received <= len(keys):
                raise ValueError("more than there are")
            if status.complete:
                progress(len(keys) - sent)
                return
            place = f"bytes {status.received}-{len(keys) - 1}/{len(keys)}"
            try:
                self.once("PUT", f"/keys/{digest}", content=pieces(status.received), headers={"Content-Range": place})
            except Refused as error:
                if error.code in ("offset", "digest"):  # what was there has changed since it was asked for
                    raise _Again(error) from None
                raise

        sent = 0

        def pieces(start: int) -> Iterator[bytes]:
            nonlocal sent
            for at in range(start, len(keys), PIECE):
                piece = keys[at : at + PIECE]
                yield piece
                self.count(keys=len(piece))
                progress(max(0, at + len(piece) - sent))
                sent = max(sent, at + len(piece))

        try:
            self.persist(attempt)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise ServerError(f"{self.url} does not say which keys it has: is it a jaxgpt2 server?") from None
        return digest

    def close(self) -> None:
        self._pool.close()


_NOT_THIS_CERTIFICATE = "it wants a certificate of the client, or not this client's: see --tls-cert and --tls-key"


def _of_tls(error: BaseException | None) -> str | None:
    """What one side's TLS has against the other, if that is why a request failed."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({error.verify_message}); trust its authority's with --tls-ca"
        if isinstance(error, ssl.SSLError):
            reason = error.reason or ""
            if "CERTIFICATE" in reason:
                return _NOT_THIS_CERTIFICATE
            if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                return "it does not speak TLS: is it http://?"
        error = error.__cause__ or error.__context__
    return None


def _asked_pause(state: tenacity.RetryCallState) -> float:
    """What the server asked for before the next try, in seconds."""
    error = state.outcome.exception() if state.outcome else None
    return (error.after if isinstance(error, _Again) else None) or 0.0


class Handle:
    """A result on the server, or on its way there."""

    def __init__(self, result: Result):
        self.result = result


@dataclass
class Remote:
    """A circuit's functions, run by a server: `encrypt` and `decrypt` here, `run` there.

    `run` only notes what is to run. `decrypt` sends all that was noted, in one request, which brings every result that
    is the client's. What only the server needs stays there, until nothing here refers to it any more.

    Args:
        circuit: the client's half is enough.
        keys: stay here, but for their evaluation keys.
    """

    connection: Connection
    circuit: fhe.Circuit
    keys: fhe.Keys
    _session: str | None = None
    _calls: list[Call] = field(default_factory=list)
    _uploads: list[bytes] = field(default_factory=list)
    _wanted: list[Result] = field(default_factory=list)  # by calls not sent yet
    _results: dict[Result, bytes] = field(default_factory=dict)
    _forgotten: list[Result] = field(default_factory=list)
    _count: int = 0
    _deaths: int = 0
    _evictions: int = 0

    def encrypt(self, name: str, *inputs: np.ndarray) -> Sequence[Any]:
        return self.circuit.encrypt(self.keys, name, *inputs)

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        """Args:
        arrays: what `encrypt` or `run` returned.
        """
        if len(self._calls) == MAX_CALLS:  # a long prompt goes in several batches
            self._flush()
        inputs: list[int | Result] = []
        for array in arrays:
            if isinstance(array, Handle):
                inputs.append(array.result)
            else:
                inputs.append(len(self._uploads))
                self._uploads.append(array)
        call = Call(id=self._count, function=name, inputs=inputs)
        self._count += 1
        self._calls.append(call)
        handles = []
        for output in range(self.circuit.signatures[name].outputs):
            result = Result(call=call.id, output=output)
            handles.append(handle := Handle(result))
            if fhe.Output(name, output) in self.circuit.signatures.server_state:
                weakref.finalize(handle, self._forgotten.append, result).atexit = False
            else:
                self._wanted.append(result)
        return handles

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        """Raises Refused or ServerError."""
        places = [handle.result for handle in results]
        missing = [result for result in places if result not in self._results]
        if missing:
            self._wanted += [result for result in missing if result not in self._wanted]
            self._flush()
        return self.circuit.decrypt(self.keys, name, [self._results.pop(result) for result in places])

    def close(self) -> None:
        """Tells the server that the session is over; it finds out by itself, if it cannot be told."""
        if self._session is not None:
            with contextlib.suppress(ServerError, _Again):
                self.connection.once("DELETE", f"/sessions/{self._session}")
            self._session = None

    def _flush(self) -> None:
        forget = [self._forgotten.pop() for _ in range(len(self._forgotten))]
        batch = Batch(
            request=secrets.token_hex(16), calls=self._calls, uploads=self._uploads, results=self._wanted, forget=forget
        )
        self._calls, self._uploads, self._wanted = [], [], []
        answer = self._send(batch)
        if len(answer.results) != len(batch.results):
            raise ServerError(
                f"{self.connection.url} answers with {len(answer.results)} results of {len(batch.results)}"
            )
        self._results.update(zip(batch.results, answer.results, strict=True))

    def _send(self, batch: Batch) -> Answer:
        """The answer to a batch, which is computed once however often it is sent."""
        content, sent = pack(batch), False
        if self._session is None:
            self._open()
        path = f"/sessions/{self._session}/batches"

        def attempt() -> Reply:
            nonlocal sent
            if sent:
                with contextlib.suppress(_Unknown):
                    return self.connection.once("GET", f"{path}/{batch.request}", MOST_RESULTS)
            sent = True
            self.connection.count(sent=len(content))
            return self.connection.once("POST", path, MOST_RESULTS, content=content, headers={"Content-Type": MSGPACK})

        began = time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                reply = self.connection.persist(attempt)
                if reply.status != 202:
                    return unpack(Answer, reply.content)
                # Still computing. Our server takes its time before it says so.
                if time.monotonic() - began > LONGEST:
                    raise ServerError(f"{self.connection.url} computes a batch for {LONGEST:.0f} s and does not end")
                time.sleep(max(0.0, asked + PAUSE - time.monotonic()))
            except BadRequest as error:
                raise ServerError(f"{self.connection.url} answers with what is no answer: {error}") from None
            except SessionLost:
                self._session = None
                self._results.clear()
                self._forgotten.clear()
                raise
            except Refused as error:
                sent = False
                if error.code == "keys_missing" and self._evictions < EVICTIONS:  # evicted since
                    self._evictions += 1
                    self.connection.upload(self.keys.evaluation)
                elif error.code == "worker_died" and self._deaths < DEATHS:
                    self._deaths += 1
                else:
                    raise

    def _open(self) -> None:
        content = NewSession(circuit=self.circuit.id, keys=self.connection.upload(self.keys.evaluation))
        response = self.connection.request("POST", "/sessions", content=content.model_dump_json().encode())
        try:
            self._session = SessionOpened.model_validate_json(response.content).session
        except ValueError:
            raise ServerError(f"{self.connection.url} opens no session: is it a jaxgpt2 server?") from None


class RemoteOwner:
    """Matrices behind HTTP: a `masked.MatrixOwner`. Every request is stored bytes, which a retry sends again.

    shapes: (d, m) of every matrix by name, in order.
    """

    def __init__(self, connection: Connection, shapes: Mapping[str, tuple[int, int]]):
        self.connection, self.shapes = connection, shapes
        self._numbers = {name: number for number, name in enumerate(shapes)}

    def check(self, identity: str) -> None:
        """Asks what the server serves.

        Raises:
            Mismatch: other matrices than the client's.
        """
        found = self.connection.specification()
        if found.get("format") != FORMAT:
            raise Mismatch(
                f"the server speaks format {found.get('format')!s:.20}, this client {FORMAT}: one of jaxgpt2 "
                f"{found.get('version')!s:.20} there and {jaxgpt2.__version__} here is too old"
            )
        if found.get("bundle") != identity or found.get("linear") != {n: list(s) for n, s in self.shapes.items()}:
            raise Mismatch(
                f"the server has other matrices ({found.get('bundle', '')!s:.12}) than this client "
                f"({identity[:12]}): use the client bundle that was compiled with the server's"
            )

    def ahead(self, name: str, request: Iterable[bytes], size: int) -> bytes:
        content = b"".join(request)
        assert len(content) == size
        answer = self._post(name, "ahead", content, self.shapes[name][1] * Parameters().output_bytes)
        self.connection.count(keys=len(content))
        return answer

    def online(self, name: str, masked: np.ndarray) -> np.ndarray:
        content, outputs = masked.astype("<u4", copy=False).tobytes(), self.shapes[name][1]
        answer = self._post(name, "online", content, 4 * len(masked) * outputs)
        self.connection.count(sent=len(content))
        return np.frombuffer(answer, "<u4").reshape(len(masked), outputs).astype(np.uint32, copy=False)

    def _post(self, name: str, phase: str, content: bytes, wanted: int) -> bytes:
        path = f"/matrices/{self._numbers[name]}/{phase}"
        answer = self.connection.request("POST", path, limit=wanted, content=content).content
        if len(answer) != wanted:
            raise ServerError(
                f"{self.connection.url} answers with {len(answer):,} bytes for {name}, wanted {wanted:,}: is it a "
                "jaxgpt2 server of the same version?"
            )
        return answer
