"""What is going on, on standard error: standard output belongs to results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
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


@contextlib.contextmanager
def counting(text: str, total: int, interval: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` things are done, how fast, and how long the rest will take.

    Yields:
        a function to be told how many more are done; the first call says how many were done before.
    """
    done = before = 0
    started = said = time.monotonic()
    first = True
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done, before, started, said, first
            done += count
            now = time.monotonic()
            if first:
                before, started, first = done, now, False
            speed = (done - before) / (now - started) if now > started else 0.0
            rate = f"{speed:.3g} a second" if speed >= 1 or not speed else f"{seconds(1 / speed)} each"
            progress.update(task, completed=done, rate=rate)
            if not console.is_terminal and speed and (now - said > interval or done == total):
                said = now
                note(f"{text}: {done} of {total}, {rate}, {seconds((total - done) / speed)} left")

        yield advance
