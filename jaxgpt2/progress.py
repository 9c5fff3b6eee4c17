"""What is going on, on standard error: standard output belongs to results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

console = Console(stderr=True, highlight=False)


def seconds(value: float) -> str:
    """A duration for people: `0.42 s`, `17 s`, `3 min 20 s`."""
    if value < 10:
        return f"{value:.2g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def note(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def step(text: str, expected: float | None = None, lasting: bool = True) -> Iterator[None]:
    """Shows that something is under way and for how long; on a file or pipe, one line when it is done.

    Args:
        text: what is done.
        expected: about how many seconds it will take, where that is known.
        lasting: whether a line stays that says how long it took.
    """
    label = text if expected is None else f"{text} (about {seconds(expected)})"
    started = time.monotonic()
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(label, total=None)
            yield
    else:
        if expected is not None and expected > 2:
            note(f"{label} ...")
        yield
    took = time.monotonic() - started
    if took > 2 and lasting:
        note(f"{text}: {seconds(took)}")


def megabytes(count: float) -> str:
    """Bytes for people: `0.12 MB`, `148 MB`."""
    return f"{count / 1e6:.3g} MB"


@contextlib.contextmanager
def sending(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are there; on a file or pipe, one line if it took a while.

    Yields:
        a function to be told how many more there are.
    """
    started, done = time.monotonic(), 0
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done)

        yield advance
    took = time.monotonic() - started
    if took > 2:
        note(f"{text}, {megabytes(total)}: {seconds(took)}")


class Pace:
    """How long things take, by their kind, and so how long those that are left will.

    left: how many there are of each kind.
    """

    def __init__(self, left: Mapping[str, float]):
        self.left = dict(left)
        self._done: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def add(self, kind: str, count: float, took: float) -> None:
        """So many more of a kind are done; took: seconds since something was done before."""
        self.left[kind] = max(0.0, self.left.get(kind, 0.0) - count)
        self._done[kind] = self._done.get(kind, 0.0) + count
        self._took[kind] = self._took.get(kind, 0.0) + took

    def remaining(self) -> float | None:
        """Seconds that the rest will take; a kind of which none was seen takes the mean of the others. None where
        nothing was seen."""
        done = sum(self._done.values())
        if not done:
            return None
        mean = sum(self._took.values()) / done
        each = {kind: self._took[kind] / count for kind, count in self._done.items() if count}
        return sum(count * each.get(kind, mean) for kind, count in self.left.items())


class Counting(Protocol):
    def __call__(self, count: float, kind: str = "", left: Mapping[str, float] | None = None) -> object:
        """So many more of a kind are done, a part of one too. The first call says how many were done before, and (left)
        how many there are to do of each kind, where kinds take different times."""
        ...


@contextlib.contextmanager
def counting(text: str, total: int, interval: float = 10.0) -> Iterator[Counting]:
    """Shows how many of `total` things are done, and how long the rest will take.

    Yields:
        a function to be told what is done.
    """
    done = 0.0
    said = last = time.monotonic()
    pace: Pace | None = None
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total, count=f"0/{total}", left="")

        def advance(count: float, kind: str = "", left: Mapping[str, float] | None = None) -> None:
            nonlocal done, said, last, pace
            done += count
            now = time.monotonic()
            if pace is None:  # what was done before says nothing of the pace
                pace = Pace({"": total - done} if left is None else left)
            else:
                pace.add(kind, count, now - last)
            last = now
            remaining = pace.remaining()
            rest = "" if remaining is None else f"{seconds(remaining)} left"
            whole = int(done + 1e-6)
            progress.update(task, completed=done, count=f"{whole}/{total}", left=rest)
            if not console.is_terminal and rest and (now - said > interval or whole == total):
                said = now
                note(f"{text}: {whole} of {total}, {rest}")

        yield advance
