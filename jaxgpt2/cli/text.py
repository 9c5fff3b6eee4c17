"""Tokens as they come."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import click

from jaxgpt2.cli.options import emit
from jaxgpt2.progress import console, step


class Speaker(Protocol):
    """What makes text of tokens."""

    def text(self, tokens: Sequence[int]) -> str: ...

    def stream(self) -> Callable[[int], str]: ...


def write_tokens(
    model: Speaker, result: dict[str, Any], iterator: Iterator[int], as_json: bool,
    waiting: Callable[[int], str] | None = None, facts: Callable[[], dict[str, Any]] = dict,
) -> None:  # fmt: skip
    """Writes tokens as they come, then the result with what became of its prompt.

    waiting: what to say while the token of this number is made, if that takes a while. facts: what the result says
    beside that.
    """
    tokens: list[int] = []
    stream = model.stream()
    # On a terminal, what is said while waiting takes the line of the text: so it says the text too.
    alive = waiting is not None and not as_json and console.is_terminal and sys.stdout.isatty()
    shown = result["prompt"]
    if not as_json and not alive:
        click.echo(shown, nl=False)
    started = time.monotonic()
    try:
        while True:
            saying = contextlib.nullcontext()
            if waiting is not None:
                label = waiting(len(tokens) + 1)
                saying = step(f"{shown}  [{label}]", lasting=False) if alive else step(label)
            with saying:
                token = next(iterator, None)
            if token is None:
                break
            tokens.append(token)
            piece = stream(token)
            shown += piece
            if not as_json and not alive:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    finally:
        if alive:
            click.echo(shown, nl=False)
    took = time.monotonic() - started
    result |= {
        "text": model.text(tokens),
        "tokens": tokens,
        "seconds": took,
        "seconds_per_token": took / len(tokens) if tokens else None,
        **facts(),
    }
    emit(as_json, result, [""])
