"""A client's masks and the products that hide behind them, on its disk: each used once, whatever happens.

    DIR/masks.sqlite     seeds of tokens whose masks are free, batches, how many masks were ever claimed
    DIR/BATCH.products   W r of every matrix, a row of uint32 for each token of a batch
    DIR/prepare.lock     held by the one process that makes masks

A mask is claimed by deleting its seed in one transaction that is on the disk before anything is sent: a crash loses
masks and never repeats one. A claimed row of products is overwritten. A store that was copied, or put back from a
backup, would repeat masks: it knows its file's identity on this machine, and a ledger outside of it knows how many
masks it has given. `docs/security.md` says what that cannot see.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fhe.envelope import write_whole
from fhe.rlwe import Parameters, new_seed
from jaxgpt2.errors import InputError

FORMAT = 1

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE batches (id INTEGER PRIMARY KEY, done INTEGER NOT NULL);
CREATE TABLE tokens (id INTEGER PRIMARY KEY, batch INTEGER NOT NULL, row INTEGER NOT NULL, seed BLOB NOT NULL);
"""


class MaskError(InputError):
    """A store of masks that cannot be used: another model's, a copy, an old one put back, an empty one, a full disk."""


@dataclass(frozen=True)
class Claimed:
    """Masks that are this process's alone, and used up.

    seeds: one for each token. products: W r of every matrix by name, uint32 (tokens, m).
    """

    seeds: Sequence[bytes]
    products: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """N tokens' masks on their way: which matrices are done, and the seeds of all tokens."""

    id: int
    done: int
    seeds: Sequence[bytes]


class MaskStore:
    """Masks for one model. Several processes may use it at once, and one of them make more.

    Args:
        directory: made if missing, readable by its owner alone.
        identity: of the matrices. outputs: m of every matrix by name, in order.
        ledgers: directory outside of the store that remembers how many masks each store has given.

    Raises:
        MaskError: the directory holds masks of another model, is a copy, or was put back from a backup. So does every
            method, where the disk is full or the store is damaged.
    """

    def __init__(self, directory: Path, identity: str, outputs: Mapping[str, int], ledgers: Path):
        self.directory, self.outputs = directory, dict(outputs)
        self._width = sum(outputs.values())
        with self._explained():
            for path in (directory, ledgers):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            directory.chmod(0o700)
            path = directory / "masks.sqlite"
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            try:
                # A claim is on the disk, its journal's removal too, before COMMIT returns; what is deleted is
                # overwritten.
                self._database.executescript(
                    "PRAGMA synchronous=EXTRA; PRAGMA secure_delete=ON; PRAGMA journal_mode=DELETE;"
                )
                if not self._made():
                    self._make(identity, _identity_of(path), ledgers)
                self._ledger = _ledger_of(ledgers, self._fact("store"))
                self._check(identity, path)
            except BaseException:
                self._database.close()
                raise

    def _made(self) -> bool:
        return bool(self._database.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'facts'").fetchone()[0])

    def _make(self, identity: str, file: str, ledgers: Path) -> None:
        """An empty store, whole or not at all, by the first of several processes that want it."""
        with self._transaction():
            if self._made():
                return
            for statement in filter(str.strip, SCHEMA.split(";")):
                self._database.execute(statement)
            store = secrets.token_hex(16)
            facts = {"format": FORMAT, "model": identity, "store": store, "claimed": 0, "file": file}
            self._database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            # Before the store is there: a store without its ledger is a copy.
            write_whole(_ledger_of(ledgers, store), b"0\n")

    def _check(self, identity: str, path: Path) -> None:
        if self._fact("format") != str(FORMAT) or self._fact("model") != identity:
            raise MaskError(
                f"the masks in {self.directory} are of another model ({self._fact('model')[:12]}, not "
                f"{identity[:12]}): remove the directory, and prepare new ones"
            )
        if self._fact("file") != _identity_of(path):
            raise self._copied()
        self._check_ledger()

    def _check_ledger(self) -> None:
        """The ledger is written after a claim is committed: behind by a claim is what a crash leaves, ahead is not."""
        try:
            known = int(self._ledger.read_text())
        except (OSError, ValueError):
            raise self._copied() from None
        if known > self._claimed():
            raise self._copied()

    def _copied(self) -> MaskError:
        return MaskError(
            f"the masks in {self.directory} are a copy, or were put back from a backup: some may have been used "
            "already, and using a mask twice gives texts away; remove the directory, and prepare new ones"
        )

    def _damaged(self) -> MaskError:
        return MaskError(f"the masks in {self.directory} are damaged: remove the directory, and prepare new ones")

    def _fact(self, name: str) -> str:
        found = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return "" if found is None else str(found[0])

    def _claimed(self) -> int:
        try:
            return int(self._fact("claimed"))
        except ValueError:
            raise self._damaged() from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # on a full disk, SQLite has ended it by itself
                self._database.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What disk and database have against it, as a MaskError."""
        try:
            yield
        except (OSError, sqlite3.Error, UnicodeDecodeError) as error:  # the last: damaged text
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if full or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise MaskError(
                    f"the disk is too full for the masks in {self.directory}: a batch of {_BATCH} takes "
                    f"{4 * _BATCH * self._width / 1e6:,.0f} MB; make room, or give another directory"
                ) from None
            raise MaskError(f"the masks in {self.directory} cannot be used: {error}") from None

    # Making them -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """For the one process that makes masks: two would work on the same batch.

        Raises:
            MaskError: another one is at it.
        """
        with self._explained():
            descriptor = os.open(self.directory / "prepare.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system when a process dies
            except BlockingIOError:
                raise MaskError(
                    f"another process prepares masks in {self.directory}: wait for it, or give another directory"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def pending(self) -> Batch:
        """The batch that was begun and not finished, or a new one, with room for it on the disk. For who is
        `preparing`.

        Raises:
            MaskError: the disk is full.
        """
        with self._explained():
            found = self._database.execute(
                "SELECT id, done FROM batches WHERE done < ? ORDER BY id LIMIT 1", (len(self.outputs),)
            ).fetchone()
            if found is None:
                found = self._begin(), 0
            rows = self._database.execute("SELECT seed FROM tokens WHERE batch = ? ORDER BY row", found[:1]).fetchall()
            return Batch(found[0], found[1], [seed for (seed,) in rows])

    def _begin(self) -> int:
        """A new batch, whole or not at all."""
        path = None
        try:
            with self._transaction():
                batch = self._database.execute("INSERT INTO batches (done) VALUES (0)").lastrowid
                assert batch is not None
                path = self._path(batch)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, 4 * _BATCH * self._width)
                finally:
                    os.close(descriptor)
                seeds = [(batch, row, new_seed()) for row in range(_BATCH)]
                self._database.executemany("INSERT INTO tokens (batch, row, seed) VALUES (?, ?, ?)", seeds)
        except BaseException:
            if path is not None and not self._known(path):
                path.unlink(missing_ok=True)
            raise
        return batch

    def _known(self, path: Path) -> bool:
        """Whether a batch has this file."""
        return bool(self._database.execute("SELECT COUNT(*) FROM batches WHERE id = ?", (path.stem,)).fetchone()[0])

    def add(self, batch: Batch, name: str, products: np.ndarray) -> Batch:
        """Notes a matrix's products (m, N) with a batch's masks, on the disk when this returns; the last matrix makes
        the batch's masks free. Matrices come in the store's order."""
        assert name == list(self.outputs)[batch.done]
        start = sum(list(self.outputs.values())[: batch.done])
        with self._explained():
            path = self._path(batch.id)
            if path.stat().st_size != 4 * _BATCH * self._width:
                raise self._damaged()
            rows = np.memmap(path, np.uint32, "r+", shape=(_BATCH, self._width))
            rows[:, start : start + len(products)] = products.T
            rows.flush()
            with self._transaction():
                self._database.execute("UPDATE batches SET done = ? WHERE id = ?", (batch.done + 1, batch.id))
        return Batch(batch.id, batch.done + 1, batch.seeds)

    def _path(self, batch: int) -> Path:
        return self.directory / f"{batch}.products"

    # Using them ------------------------------------------------------------------------------------

    def left(self) -> int:
        """Masks that nobody has claimed."""
        with self._explained():
            return int(
                self._database.execute(
                    "SELECT COUNT(*) FROM tokens JOIN batches ON batches.id = tokens.batch WHERE done = ?",
                    (len(self.outputs),),
                ).fetchone()[0]
            )

    def claim(self, count: int) -> Claimed:
        """Masks of so many tokens, which nobody will get again.

        Raises:
            MaskError: there are fewer.
        """
        rows = np.empty((count, self._width), np.uint32)
        with self._explained(), contextlib.ExitStack() as stack:
            with self._transaction():
                self._check_ledger()  # a backup may have been put back since the store was opened
                found = self._database.execute(
                    "SELECT tokens.id, batch, row, seed FROM tokens JOIN batches ON batches.id = tokens.batch"
                    " WHERE done = ? ORDER BY tokens.id LIMIT ?",
                    (len(self.outputs), count),
                ).fetchall()
                if len(found) < count:
                    raise MaskError(
                        f"the text needs masks for {count} tokens and {len(found)} are left: make more with jaxgpt2 "
                        "prepare"
                    )
                # Before the claim is committed: then whoever claims a batch's last mask removes the file.
                files = {
                    batch: stack.enter_context(self._path(batch).open("r+b", buffering=0))
                    for batch in {batch for _, batch, _, _ in found}
                }
                for (_, batch, row, _), into in zip(found, rows, strict=True):
                    if os.preadv(files[batch].fileno(), [into], row * into.nbytes) != into.nbytes:
                        raise self._damaged()
                self._database.executemany("DELETE FROM tokens WHERE id = ?", [(token,) for token, *_ in found])
                claimed = self._claimed() + count
                self._database.execute("UPDATE facts SET value = ? WHERE name = 'claimed'", (claimed,))
            with self._transaction():  # others' claims, too: the ledger never goes back
                write_whole(self._ledger, f"{self._fact('claimed')}\n".encode())
            zeros = bytes(4 * self._width)  # W r is as secret as r
            for _, batch, row, _ in found:
                os.pwrite(files[batch].fileno(), zeros, row * len(zeros))
            for batch, file in files.items():
                os.fsync(file.fileno())
                left = self._database.execute("SELECT COUNT(*) FROM tokens WHERE batch = ?", (batch,)).fetchone()[0]
                if not left:
                    self._path(batch).unlink(missing_ok=True)
        ends = np.cumsum(list(self.outputs.values()))[:-1]
        parts = dict(zip(self.outputs, np.split(rows, ends, axis=1), strict=True))
        return Claimed([seed for *_, seed in found], parts)

    def close(self) -> None:
        self._database.close()


# Masks are made so many at a time.
_BATCH = Parameters().poly_modulus_degree


def _ledger_of(ledgers: Path, store: str) -> Path:
    return ledgers / f"{store}.claimed"


def _identity_of(path: Path) -> str:
    """A file's identity on this machine: a copy has another."""
    facts = path.stat()
    return f"{facts.st_dev}:{facts.st_ino}"
