"""Processes that use one store of masks, and are killed at any step: `python killed.py WHAT DIRECTORY`.

Products are those of unit matrices, that is, the masks themselves. Every child notes the seeds that it claimed in
DIRECTORY/sent before it would send anything.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fhe import rlwe
from jaxgpt2.serving import masks
from jaxgpt2.serving.masks import MaskStore

OUTPUTS = {"a": 3, "b": 5}
IDENTITY = "e" * 64


def store_in(directory: Path) -> MaskStore:
    return MaskStore(directory / "masks", IDENTITY, OUTPUTS, directory / "ledgers")


def fill(store: MaskStore) -> None:
    """Finishes a batch that was begun, or makes one."""
    with store.preparing():
        batch = store.pending()
        for number, (name, outputs) in list(enumerate(OUTPUTS.items()))[batch.done :]:
            batch = store.add(batch, name, rlwe.masks(batch.seeds, number, outputs))


def send(store: MaskStore, directory: Path, count: int) -> None:
    """Claims masks and notes them; their products must be right."""
    claimed = store.claim(count)
    data = "".join(f"{seed.hex()}\n" for seed in claimed.seeds).encode()
    descriptor = os.open(directory / "sent", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, data)
    os.close(descriptor)
    for number, (name, outputs) in enumerate(OUTPUTS.items()):
        assert np.array_equal(claimed.products[name], rlwe.masks(claimed.seeds, number, outputs).T)


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does some work and ends with 0."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Whether a process that does some work lives that long: it is killed before it comes to so many lines of the
    store's, each counted once."""

    def traced() -> None:
        lines = set()

        def trace(frame: Any, event: str, argument: object) -> Any:
            if Path(frame.f_code.co_filename).name not in ("masks.py", "envelope.py", Path(__file__).name):
                return None
            if event == "line":
                lines.add((frame.f_code, frame.f_lineno))
                if len(lines) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()
        sys.settrace(None)

    _, status = os.waitpid(forked(traced), 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def main(what: str, directory: Path) -> None:
    masks._BATCH = {"make": 16, "claim": 512}.get(what, masks._BATCH)
    if what == "claim":
        fill(store_in(directory))
        step = 1
        while killed_at(step, lambda: send(store_in(directory), directory, 2)):
            step += 1
        print(step - 1)
    elif what == "make":  # the store itself, and then a batch; who comes next finishes it
        step = 1
        while killed_at(step, lambda own=directory / str(step): fill(store_in(own))):
            store = store_in(directory / str(step))
            if not store.left():
                fill(store)
            send(store, directory, store.left())
            store.close()
            shutil.rmtree(directory / str(step))
            step += 1
        print(step - 1)
    elif what == "any time":
        fill(store_in(directory))
        random.seed(0)

        def forever() -> None:
            store = store_in(directory)
            (directory / "ready").touch()
            while True:
                send(store, directory, 1)

        for _ in range(20):
            child = forked(forever)
            wait_for(directory / "ready")
            time.sleep(random.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            (directory / "ready").unlink()
        print(20)
    elif what == "at once":  # from the making of the store to the last mask

        def all_of_them() -> None:
            store = store_in(directory)
            wait_for(directory / "go")
            for _ in range(8):
                send(store, directory, 64)

        children = [forked(all_of_them) for _ in range(4)]
        fill(store_in(directory))
        (directory / "go").touch()
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
