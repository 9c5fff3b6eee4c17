"""The store of masks: none goes out twice, whatever dies, fills up or is copied; and nothing secret stays behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import killed
from fhe import rlwe
from helpers import one_line
from jaxgpt2.serving import masks
from jaxgpt2.serving.masked import LocalOwner, alone, prepare, store_for
from jaxgpt2.serving.masks import MaskError, MaskStore
from killed import IDENTITY, OUTPUTS, fill, store_in

N = rlwe.Parameters().poly_modulus_degree


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with contextlib.closing(store_in(tmp_path)) as store:
        fill(store)
        yield store


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: who dies hundreds of times should not wait for a disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def sent(directory: Path) -> list[bytes]:
    return [bytes.fromhex(line) for line in (directory / "sent").read_text().splitlines()]


def in_database(directory: Path) -> list[bytes]:
    with contextlib.closing(sqlite3.connect(directory / "masks" / "masks.sqlite")) as database:
        return [seed for (seed,) in database.execute("SELECT seed FROM tokens")]


# --- processes ------------------------------------------------------------------------------------


def run_killed(what: str, directory: Path) -> int:
    """A run of `killed.py`; nothing that it sent may have been sent twice, or be there still."""
    path = os.pathsep.join([str(Path(killed.__file__).parent), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, killed.__file__, what, directory], env={**os.environ, "PYTHONPATH": path}, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    seeds = sent(directory)
    assert len(set(seeds)) == len(seeds) > 0
    if what != "make":
        assert not set(seeds) & set(in_database(directory))
    return int(found.stdout or 0)


def test_killed_at_every_step_of_a_claim(memory):
    assert run_killed("claim", memory) > 50
    with contextlib.closing(store_in(memory)) as store:
        assert store.left() > 0
        killed.send(store, memory, store.left())
    assert len(set(sent(memory))) == len(sent(memory))


def test_killed_at_any_time(memory):
    assert run_killed("any time", memory) == 20
    assert len(sent(memory)) > 5


def test_killed_at_every_step_of_making(memory):
    """Whatever was made when a process was killed, the next one finishes it, and all masks and products are right."""
    steps = run_killed("make", memory)
    assert steps > 60
    assert len(sent(memory)) == steps * 16  # its batches are small


def test_processes_that_claim_at_once(tmp_path):
    run_killed("at once", tmp_path)
    assert len(sent(tmp_path)) == N
    assert not list((tmp_path / "masks").glob("*.products"))  # and nobody missed the file that the last one removed
    with contextlib.closing(store_in(tmp_path)) as store:
        assert store._ledger.read_text() == f"{N}\n"


def test_one_process_prepares(tmp_path):
    with contextlib.closing(store_in(tmp_path)) as one, contextlib.closing(store_in(tmp_path)) as other:
        with (
            one.preparing(),
            one_line(MaskError, "another process prepares masks in", str(tmp_path)),
            other.preparing(),
        ):
            pass
        with other.preparing():
            pass


# --- making ---------------------------------------------------------------------------------------


class Interrupted:
    """An owner of matrices who stops after so many answers."""

    def __init__(self, owner: LocalOwner, answers: int):
        self._owner, self._left = owner, answers

    def ahead(self, name: str, request: Iterable[bytes], size: int) -> bytes:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._owner.ahead(name, request, size)

    def online(self, name: str, masked: np.ndarray) -> np.ndarray:
        raise AssertionError


def test_prepare_goes_on_where_it_was(linear_gpt2, tmp_path):
    model = linear_gpt2
    owner = LocalOwner(model.weights)
    progress: list[float] = []
    with contextlib.closing(store_for(model.client, tmp_path / "masks", tmp_path / "ledgers")) as store:
        with pytest.raises(KeyboardInterrupt):
            prepare(model.client, store, alone(Interrupted(owner, 3)), 1, progress.append)
        assert store.left() == 0
        seeds = in_database(tmp_path)
    with contextlib.closing(store_for(model.client, tmp_path / "masks", tmp_path / "ledgers")) as store:
        del progress[:]
        prepare(model.client, store, alone(Interrupted(owner, 5)), 1, progress.append)  # of eight
        assert sum(progress) == pytest.approx(N)
        assert in_database(tmp_path) == seeds
        claimed = store.claim(N)
    for number, (name, weight) in enumerate(model.weights.items()):
        r = rlwe.masks(claimed.seeds, number, len(weight)).T
        wanted = (r.astype(np.int64) @ weight.astype(np.int64)).astype(np.uint32)
        assert np.array_equal(claimed.products[name], wanted)


def test_files_are_their_owners_alone(tmp_path):
    old = os.umask(0)
    try:
        with contextlib.closing(store_in(tmp_path)) as store:
            fill(store)
            store.claim(1)
            with store._transaction():
                store._database.execute("DELETE FROM tokens")
                paths = [*(tmp_path / "masks").iterdir(), *(tmp_path / "ledgers").iterdir()]
                modes = {stat.S_IMODE(path.stat().st_mode) for path in paths}
    finally:
        os.umask(old)
    names = {path.name for path in paths}
    assert names >= {"masks.sqlite", "masks.sqlite-journal", "1.products", "prepare.lock"}
    assert modes == {0o600}
    for directory in (tmp_path / "masks", tmp_path / "ledgers"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with contextlib.closing(store_in(tmp_path)) as store:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with one_line(MaskError, "the disk is too full", "make room"):
            fill(store)
        monkeypatch.undo()
        assert not list((tmp_path / "masks").glob("*.products")) and not in_database(tmp_path)
        pages = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count = {pages + 3}")
        with one_line(MaskError, "the disk is too full", "make room"):
            fill(store)
        assert not list((tmp_path / "masks").glob("*.products")) and not in_database(tmp_path)
        store._database.execute("PRAGMA max_page_count = 1000000")
        fill(store)
        assert store.left() == N
        # A ledger that cannot be written: the masks are lost, and never given again.
        monkeypatch.setattr(masks, "write_whole", full)
        before = set(in_database(tmp_path))
        with one_line(MaskError, "the disk is too full"):
            store.claim(3)
        monkeypatch.undo()
        lost = before - set(in_database(tmp_path))
        assert len(lost) == 3
        assert not lost & set(store.claim(5).seeds)


def test_damaged_files(store, tmp_path):
    path = tmp_path / "masks" / "1.products"
    os.truncate(path, path.stat().st_size // 2)
    with one_line(MaskError, "damaged"):
        store.claim(N)
    assert store.left() == N
    path.unlink()
    with one_line(MaskError, "cannot be used", "No such file"):
        store.claim(1)
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "masks" / "masks.sqlite")) as database, database:
        database.execute("UPDATE facts SET value = '' WHERE name = 'claimed'")
    with one_line(MaskError, "damaged"):
        store_in(tmp_path)
    (tmp_path / "masks" / "masks.sqlite").write_bytes(b"junk" * 1000)
    with one_line(MaskError, "cannot be used", "not a database"):
        store_in(tmp_path)


def test_products_of_another_size_are_not_added_to(tmp_path):
    with contextlib.closing(store_in(tmp_path)) as store, store.preparing():
        batch = store.pending()
        os.truncate(tmp_path / "masks" / "1.products", 100)
        with one_line(MaskError, "damaged"):
            store.add(batch, "a", rlwe.masks(batch.seeds, 0, 3))


# --- using ----------------------------------------------------------------------------------------


def test_used_masks_leave_nothing_behind(store, tmp_path):
    path, database = tmp_path / "masks" / "1.products", tmp_path / "masks" / "masks.sqlite"
    seeds = in_database(tmp_path)
    assert all(seed in database.read_bytes() for seed in seeds)
    claimed = store.claim(N - 1)
    assert list(claimed.seeds) == seeds[:-1]  # in order
    rows = np.fromfile(path, np.uint32).reshape(N, sum(OUTPUTS.values()))
    assert not rows[:-1].any() and rows[-1].any()
    left = database.read_bytes()
    assert not any(seed in left for seed in seeds[:-1]) and seeds[-1] in left
    store.claim(1)
    assert not path.exists() and seeds[-1] not in database.read_bytes()
    with one_line(MaskError, "needs masks for 1 tokens and 0 are left", "jaxgpt2 prepare"):
        store.claim(1)


def test_too_few_masks_are_not_touched(store):
    with one_line(MaskError, f"needs masks for {N + 1} tokens and {N} are left"):
        store.claim(N + 1)
    assert store.left() == N


# --- copies ---------------------------------------------------------------------------------------

COPY = "are a copy, or were put back from a backup"


def test_a_copied_directory(store, tmp_path):
    store.close()
    shutil.copytree(tmp_path / "masks", tmp_path / "copy")
    with one_line(MaskError, COPY, "using a mask twice"):
        MaskStore(tmp_path / "copy", IDENTITY, OUTPUTS, tmp_path / "ledgers")
    (tmp_path / "masks").rename(tmp_path / "moved")
    MaskStore(tmp_path / "moved", IDENTITY, OUTPUTS, tmp_path / "ledgers").close()


@pytest.mark.parametrize("open_meanwhile", [False, True])
def test_a_backup_that_is_put_back(store, tmp_path, open_meanwhile):
    store.claim(2)
    subprocess.run(["cp", "-a", tmp_path / "masks", tmp_path / "backup"], check=True)
    store.claim(3)
    other = store_in(tmp_path) if open_meanwhile else None
    store.close()
    before = (tmp_path / "masks" / "masks.sqlite").stat().st_ino
    subprocess.run(["cp", "-a", f"{tmp_path / 'backup'}/.", tmp_path / "masks"], check=True)
    assert (tmp_path / "masks" / "masks.sqlite").stat().st_ino == before
    if other is not None:  # a process that has it open finds out, too
        with contextlib.closing(other), one_line(MaskError, COPY):
            other.claim(1)
    with one_line(MaskError, COPY, "remove the directory, and prepare new ones"):
        store_in(tmp_path)


@pytest.mark.parametrize("text", [None, "", "junk"])
def test_a_missing_ledger(store, tmp_path, text):
    (ledger,) = (tmp_path / "ledgers").iterdir()
    if text is None:
        ledger.unlink()
    else:
        ledger.write_text(text)
    with one_line(MaskError, COPY):
        store.claim(1)
    with one_line(MaskError, COPY):
        store_in(tmp_path)


def test_a_store_of_another_model(store, tmp_path):
    with one_line(MaskError, "of another model", IDENTITY[:12], "ffffffffffff"):
        MaskStore(tmp_path / "masks", "f" * 64, OUTPUTS, tmp_path / "ledgers")


def test_a_place_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with one_line(MaskError, "cannot be used"):
        MaskStore(tmp_path / "file", IDENTITY, OUTPUTS, tmp_path / "ledgers")
