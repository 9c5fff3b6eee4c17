"""What a server keeps on disk: evaluation keys under a size cap, and sessions that outlive a restart.

    state/
      keys/CLIENT/SHA256          complete keys; SHA256.partial while they arrive
      sessions/ID/session.json    whose it is, and for which circuit and keys
      sessions/ID/next_call       the least number that a later call may have
      sessions/ID/CALL.OUTPUT     a result that later calls may take
      sessions/ID/answer.REQUEST  the last answer

Every file appears under its name whole or not at all, save `.partial`. Nothing here is secret: what the server has it
cannot decrypt.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fhe.envelope import write_whole
from jaxgpt2.serving.protocol import Result

PARTIAL = ".partial"


class APIError(Exception):
    """A request that is not done: HTTP status, a word for programs, a line for people.

    retry_after: seconds after which it may be sent again.
    """

    def __init__(self, status: int, code: str, detail: str, retry_after: float | None = None):
        super().__init__(detail)
        self.status, self.code, self.detail, self.retry_after = status, code, detail, retry_after


@dataclass
class KeySet:
    """A client's set of keys, complete or not.

    size: its bytes; of one that arrives, those that have a place. total: those that it shall have.
    """

    client: str
    path: Path
    size: int
    used: float
    total: int


class Upload:
    """Keys that arrive."""

    def __init__(self, store: KeyStore, keys: KeySet, received: int, total: int, file: BinaryIO):
        self._store, self._keys, self._received, self._total, self._file = store, keys, received, total, file

    def take(self, size: int) -> None:
        """Room for so many bytes more, before they are written. Raises APIError: there is none."""
        self._received += size
        if self._received > self._total:
            raise APIError(413, "too_large", "more bytes than were announced")
        if self._received > self._keys.size:
            wanted = min(self._total, self._received + self._store.step)
            self._store.make_room(self._keys, wanted)
            self._keys.size = wanted

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()  # what came is there, whatever becomes of the connection


class KeyStore:
    """Evaluation keys, every client's in a directory of its own.

    Keys take room as their bytes come. Where there is no more, a client's own keys go for its new ones, those used
    longest ago first; and those of other clients only if they have not been used for long, or if that client has more
    than its share and this one has not: all room, divided among the clients that have keys here.

    capacity: bytes of all keys together. per_client: sets of keys that one client may have here, complete or not. idle:
    seconds after which keys that nobody uses go for anybody's.
    """

    def __init__(self, directory: Path, capacity: int, per_client: int, idle: float):
        self.directory, self.capacity, self.per_client, self.idle = directory, capacity, per_client, idle
        self.step = capacity // 1000  # bytes that a place grows by
        directory.mkdir(parents=True, exist_ok=True)
        self._arriving: dict[Path, KeySet] = {}

    def path(self, client: str, digest: str) -> Path:
        return self.directory / client / digest

    def status(self, client: str, digest: str) -> tuple[int, bool]:
        """Bytes received, and whether these are all."""
        path = self.path(client, digest)
        for candidate, complete in ((path, True), (path.with_name(digest + PARTIAL), False)):
            with contextlib.suppress(FileNotFoundError):
                return candidate.stat().st_size, complete
        return 0, False

    def use(self, client: str, digest: str) -> Path:
        """The file of complete keys, now the most recently used ones.

        Raises:
            APIError: they are not here, or not any more.
        """
        path = self.path(client, digest)
        try:
            os.utime(path)
        except FileNotFoundError:
            raise APIError(409, "keys_missing", "these evaluation keys are not here: upload them") from None
        return path

    @contextlib.contextmanager
    def receive(self, client: str, digest: str, start: int, total: int) -> Iterator[Upload]:
        """Opens the keys' file for the bytes from `start` on.

        Nothing is removed until bytes come; but what could not have room is refused. `check` and `finish` are for when
        all is here.

        Raises:
            APIError: too large, out of step with what has arrived, arriving already on another connection, or there is
            no room.
        """
        if total > self.capacity:
            raise APIError(413, "too_large", f"keys of {total} bytes, and this server keeps {self.capacity} in all")
        partial = self.path(client, digest).with_name(digest + PARTIAL)
        if partial in self._arriving:
            raise APIError(409, "arriving", "these keys arrive on another connection already", retry_after=1)
        received, complete = self.status(client, digest)
        if complete or start != received:
            raise APIError(409, "offset", f"{received} bytes are here, the upload begins at {start}")
        keys = KeySet(client, partial, received, time.time(), total)
        self._leaving(keys, total, promised=True)
        partial.parent.mkdir(exist_ok=True)
        self._arriving[partial] = keys
        try:
            with partial.open("ab") as file:
                yield Upload(self, keys, received, total, file)
        finally:
            self._arriving.pop(partial, None)

    def check(self, client: str, digest: str) -> None:
        """Checks what has arrived; it takes a while for large keys.

        Raises:
            APIError: these are not the bytes that were announced; they are thrown away.
        """
        partial = self.path(client, digest).with_name(digest + PARTIAL)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # what has a name is on disk, even if the power fails
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            partial.unlink()
            raise APIError(422, "digest", "the bytes received are not those of this SHA-256: upload them again")

    def finish(self, client: str, digest: str) -> None:
        """Takes what has arrived, and was checked, for the client's keys."""
        path = self.path(client, digest)
        partial = path.with_name(digest + PARTIAL)
        self._arriving.pop(partial, None)
        os.replace(partial, path)
        os.utime(path)

    @property
    def size(self) -> int:
        """Bytes of all keys."""
        return sum(keys.size for keys in self._sets())

    def make_room(self, keys: KeySet, size: int) -> None:
        """Removes what must go so that these keys can have so many bytes. Raises APIError: that is not enough."""
        for each in self._leaving(keys, size, promised=False):
            each.path.unlink(missing_ok=True)

    def _leaving(self, keys: KeySet, size: int, promised: bool) -> list[KeySet]:
        """What must go so that these keys can have so many bytes. Raises APIError: that is not enough.

        promised: other keys that arrive have all the room that they shall have, up to their client's share.
        """
        others = [each for each in self._sets() if each.path != keys.path]
        others.sort(key=lambda each: each.used)
        arriving = set(self._arriving)
        sets = self.per_client - 1 - sum(each.client == keys.client and each.path in arriving for each in others)
        if sets < 0:
            raise APIError(429, "keys", f"a client may have {self.per_client} sets of keys, so many arrive", 5)
        own = [each for each in others if each.client == keys.client and each.path not in arriving]
        leaving = own[: max(0, len(own) - sets)]
        bytes_of = Counter({keys.client: size})
        for each in others:
            if each not in leaving:
                bytes_of[each.client] += each.size
        share, now = self.capacity / len(bytes_of), time.time()
        for each in self._arriving.values() if promised else ():
            if each.size:  # what is only announced counts for nothing
                bytes_of[each.client] += max(0, min(each.total - each.size, int(share) - bytes_of[each.client]))

        def may_go(each: KeySet) -> bool:
            if each.client == keys.client or now - each.used > self.idle:
                return True
            return bytes_of[keys.client] <= share < bytes_of[each.client]

        # Nobody's first, the client's own last.
        for each in sorted(others, key=lambda each: (now - each.used <= self.idle) + (each.client == keys.client)):
            if bytes_of.total() <= self.capacity:
                break
            if each not in leaving and each.path not in arriving and may_go(each):
                leaving.append(each)
                bytes_of[each.client] -= each.size
        if bytes_of.total() > self.capacity:
            raise APIError(503, "busy", "the keys of others leave no room for these", retry_after=5)
        return leaving

    def _sets(self) -> list[KeySet]:
        """All sets that are here."""
        found = []
        for path in self.directory.glob("*/*"):
            if path in self._arriving:
                continue
            with contextlib.suppress(FileNotFoundError):  # complete since, under another name
                facts = path.stat()
                found.append(KeySet(path.parent.name, path, facts.st_size, facts.st_mtime, facts.st_size))
        return [*found, *self._arriving.values()]


@dataclass(eq=False)
class Session:
    """One client's calls of one circuit under one set of keys.

    running: the batch that is being computed, by its identity; a session computes one at a time.
    """

    id: str
    client: str
    circuit: str
    keys: str
    path: Path
    used: float
    running: tuple[str, asyncio.Task[None]] | None = None
    size: int = 0
    next_call: int = 0

    def result(self, result: Result) -> Path:
        return self.path / f"{result.call}.{result.output}"

    def answer(self, request: str) -> Path:
        return self.path / f"answer.{request}"

    def passed(self, next_call: int) -> None:
        """Calls up to this number are done with, in this process and in the next."""
        self.next_call = max(self.next_call, next_call)
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            write_whole(self.path / "next_call", str(self.next_call).encode(), durable=False)

    def measure(self) -> None:
        self.size = sum(path.stat().st_size for path in self.path.iterdir())


class SessionStore:
    """All sessions; those on disk from before a restart are here again.

    idle: seconds without a request after which a session is gone. per_client, total: sessions at most. capacity:
    bytes that a session may hold.
    """

    def __init__(self, directory: Path, idle: float, per_client: int, total: int, capacity: int):
        self.directory, self.idle, self.per_client, self.total = directory, idle, per_client, total
        self.capacity = capacity
        directory.mkdir(parents=True, exist_ok=True)
        self.sessions: dict[str, Session] = {}
        for path in directory.iterdir():
            try:
                facts = json.loads((path / "session.json").read_text())
                session = Session(path.name, path=path, used=(path / "session.json").stat().st_mtime, **facts)
                session.measure()
                if (path / "next_call").exists():
                    session.next_call = int((path / "next_call").read_bytes())
                self.sessions[session.id] = session
            except (OSError, ValueError, TypeError):  # begun when the server died
                shutil.rmtree(path, ignore_errors=True)
        self.sweep()

    def open(self, client: str, circuit: str, keys: str) -> Session:
        self.sweep()
        own = [session for session in self.sessions.values() if session.client == client]
        if len(own) >= self.per_client or len(self.sessions) >= self.total:
            raise APIError(429, "sessions", "too many sessions are open: close some, or wait for them to expire", 5)
        session = Session(secrets.token_hex(16), client, circuit, keys, Path(), time.time())
        session.path = self.directory / session.id
        session.path.mkdir()
        facts = {"client": client, "circuit": circuit, "keys": keys}
        write_whole(session.path / "session.json", json.dumps(facts).encode(), durable=False)
        self.sessions[session.id] = session
        return session

    def get(self, client: str, identity: str) -> Session:
        """A client's own session, now used.

        Raises:
            APIError: there is none of that id, not any more, or it is another client's.
        """
        self.sweep()
        session = self.sessions.get(identity)
        if session is None:
            raise APIError(404, "no_session", "there is no such session, or it has expired")
        if session.client != client:
            raise APIError(403, "not_yours", "this session belongs to another client")
        session.used = time.time()
        os.utime(session.path / "session.json")
        return session

    def close(self, session: Session) -> None:
        self.sessions.pop(session.id, None)
        shutil.rmtree(session.path, ignore_errors=True)

    def sweep(self) -> None:
        """Closes the sessions that nobody used for too long."""
        now = time.time()
        for session in list(self.sessions.values()):
            if session.running is None and now - session.used > self.idle:
                self.close(session)
