"""A client's masks and the products that hide behind them, on its disk: each used once, whatever happens.

    DIR/masks.sqlite     seeds of tokens whose masks are free, batches, how many masks were ever claimed
    DIR/BATCH.products   W r of every matrix, a row of uint32 for each token of a batch

A mask is claimed by deleting its seed in one transaction that is on the disk before anything is sent: a crash loses
masks and never repeats one. A claimed row of products is overwritten. A store that was copied, or put back from a
backup, would repeat masks: it knows its file's identity on this machine, and a ledger outside of it knows how many
masks it has given. `docs/security.md` says what that cannot see.
"""

from __future__ import annotations

import contextlib
import errno
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
    """Masks for one model. Several processes may use it at once.

    Args:
        directory: made if missing, readable by its owner alone.
        identity: of the matrices. outputs: m of every matrix by name, in order.
        ledgers: directory outside of the store that remembers how many masks each store has given.

    Raises:
        MaskError: the directory holds masks of another model, is a copy, or was put back from a backup.
    """

    def __init__(self, directory: Path, identity: str, outputs: Mapping[str, int], ledgers: Path):
        self.directory, self.outputs = directory, dict(outputs)
        self._width = sum(outputs.values())
        try:
            for path in (directory, ledgers):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            directory.chmod(0o700)
            path = directory / "masks.sqlite"
            if new := not path.exists():
                path.touch(mode=0o600)
            self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            # A claim is on the disk, its journal's removal too, before COMMIT returns; what is deleted is overwritten.
            self._database.executescript(
                "PRAGMA synchronous=EXTRA; PRAGMA secure_delete=ON; PRAGMA journal_mode=DELETE;"
            )
            if new:
                with self._transaction():
                    for statement in filter(str.strip, SCHEMA.split(";")):
                        self._database.execute(statement)
                    facts = {"format": FORMAT, "model": identity, "store": secrets.token_hex(16), "claimed": 0,
                             "file": _identity_of(path)}  # fmt: skip
                    self._database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            self._ledger = ledgers / f"{self._fact('store')}.claimed"
            if new:
                self._write_ledger(0)
        except (OSError, sqlite3.Error) as error:
            raise MaskError(f"the masks in {directory} cannot be used: {error}") from None
        self._check(identity, path)

    def _check(self, identity: str, path: Path) -> None:
        if self._fact("format") != str(FORMAT) or self._fact("model") != identity:
            raise MaskError(
                f"the masks in {self.directory} are of another model ({self._fact('model')[:12]}, not "
                f"{identity[:12]}): remove the directory, and prepare new ones"
            )
        copied = self._fact("file") != _identity_of(path)
        try:
            known = int(self._ledger.read_text())
        except (OSError, ValueError):
            known = None
        # The ledger is written after the claim is committed: behind by a claim is what a crash leaves, ahead is not.
        if copied or known is None or known > int(self._fact("claimed")):
            raise MaskError(
                f"the masks in {self.directory} are a copy, or were put back from a backup: some may have been used "
                "already, and using a mask twice gives texts away; remove the directory, and prepare new ones"
            )

    def _fact(self, name: str) -> str:
        found = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return "" if found is None else str(found[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _write_ledger(self, claimed: int) -> None:
        write_whole(self._ledger, f"{claimed}\n".encode())

    # Making them -----------------------------------------------------------------------------------

    def pending(self) -> Batch:
        """The batch that was begun and not finished, or a new one, with room for it on the disk.

        Raises:
            MaskError: the disk is full.
        """
        size = Parameters().poly_modulus_degree
        with self._transaction():
            found = self._database.execute(
                "SELECT id, done FROM batches WHERE done < ? ORDER BY id LIMIT 1", (len(self.outputs),)
            ).fetchone()
            if found is None:
                batch = self._database.execute("INSERT INTO batches (done) VALUES (0)").lastrowid
                assert batch is not None
                self._allocate(batch, size)
                seeds = [(batch, row, new_seed()) for row in range(size)]
                self._database.executemany("INSERT INTO tokens (batch, row, seed) VALUES (?, ?, ?)", seeds)
                found = batch, 0
        rows = self._database.execute("SELECT seed FROM tokens WHERE batch = ? ORDER BY row", found[:1]).fetchall()
        return Batch(found[0], found[1], [seed for (seed,) in rows])

    def _allocate(self, batch: int, size: int) -> None:
        path = self._path(batch)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, 4 * size * self._width)
            finally:
                os.close(descriptor)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise MaskError(
                f"the disk is too full for masks of {size} tokens, {4 * size * self._width / 1e6:,.0f} MB: make room, "
                "or give another directory"
            ) from None

    def add(self, batch: Batch, name: str, products: np.ndarray) -> Batch:
        """Notes a matrix's products (m, N) with a batch's masks, on the disk when this returns; the last matrix makes
        the batch's masks free. Matrices come in the store's order."""
        assert name == list(self.outputs)[batch.done]
        start = sum(list(self.outputs.values())[: batch.done])
        rows = self._rows(batch.id)
        rows[:, start : start + len(products)] = products.T
        rows.flush()
        with self._transaction():
            self._database.execute("UPDATE batches SET done = done + 1 WHERE id = ?", (batch.id,))
        return Batch(batch.id, batch.done + 1, batch.seeds)

    def _path(self, batch: int) -> Path:
        return self.directory / f"{batch}.products"

    def _rows(self, batch: int) -> np.memmap:
        size = Parameters().poly_modulus_degree
        return np.memmap(self._path(batch), np.uint32, "r+", shape=(size, self._width))

    # Using them ------------------------------------------------------------------------------------

    def left(self) -> int:
        """Masks that nobody has claimed."""
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
        with self._transaction():
            found = self._database.execute(
                "SELECT tokens.id, batch, row, seed FROM tokens JOIN batches ON batches.id = tokens.batch"
                " WHERE done = ? ORDER BY tokens.id LIMIT ?",
                (len(self.outputs), count),
            ).fetchall()
            if len(found) < count:
                raise MaskError(
                    f"the text needs masks for {count} tokens and {len(found)} are left: make more with jaxgpt2 prepare"
                )
            self._database.executemany("DELETE FROM tokens WHERE id = ?", [(token,) for token, *_ in found])
            claimed = int(self._fact("claimed")) + count
            self._database.execute("UPDATE facts SET value = ? WHERE name = 'claimed'", (claimed,))
        self._write_ledger(claimed)
        rows = np.empty((count, self._width), np.uint32)
        for index, (_, batch, row, _) in enumerate(found):
            stored = self._rows(batch)
            rows[index] = stored[row]
            stored[row] = 0  # W r is as secret as r
            stored.flush()
        for batch in {batch for _, batch, _, _ in found}:
            left = self._database.execute("SELECT COUNT(*) FROM tokens WHERE batch = ?", (batch,)).fetchone()[0]
            if not left:
                self._path(batch).unlink(missing_ok=True)
        ends = np.cumsum(list(self.outputs.values()))[:-1]
        parts = dict(zip(self.outputs, np.split(rows, ends, axis=1), strict=True))
        return Claimed([seed for *_, seed in found], parts)

    def close(self) -> None:
        self._database.close()


def _identity_of(path: Path) -> str:
    """A file's identity on this machine: a copy has another."""
    facts = path.stat()
    return f"{facts.st_dev}:{facts.st_ino}"
