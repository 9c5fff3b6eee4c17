"""What is going on, on standard error: standard output belongs to results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
def step(text: str, expected: float | None = None) -> Iterator[None]:
    """Shows that something is under way and for how long; on a file or pipe, one line when it is done.

    Args:
        text: what is done.
        expected: about how many seconds it will take, where that is known.
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
    if took > 2:
        note(f"{text}: {seconds(took)}")
