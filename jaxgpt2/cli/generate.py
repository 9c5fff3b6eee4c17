"""The command `generate`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import (
    announce_run,
    calibration_passages,
    compile_options,
    compiled,
    emit,
    json_option,
    make_encrypted,
    make_fhe_configs,
    make_keys,
    mode_option,
    model_options,
    module_options,
    modules_of,
    options,
    refuse_given,
    server_options,
)
from jaxgpt2.errors import InputError
from jaxgpt2.progress import console, step

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.encrypted import Mode
    from jaxgpt2.modules import Module


class Speaker(Protocol):
    """What makes text of tokens."""

    def text(self, tokens: Sequence[int]) -> str: ...

    def stream(self) -> Callable[[int], str]: ...


@click.command()
@click.argument("prompt")
@options(model_options, module_options, mode_option, compile_options, server_options)
@click.option("--max-new-tokens", type=click.IntRange(1), default=20, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw among the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens that reach this probability only.")
@click.option("--seed", default=0, show_default=True)
@click.option("--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler whose workers run encrypted heads.")
@json_option
@click.pass_context
def generate(context: click.Context, prompt: str, mode: Mode, backend: str | None, p_error: float | None,
             rounding: str | None, cache: Path | None, max_new_tokens: int, temperature: float, top_k: int | None,
             top_p: float | None, seed: int, scheduler: str | None, as_json: bool, server: str | None,
             client: Path | None, secret_keys: Path | None, masks: Path | None, verify: str | None, token: str | None,
             authority: Path | None, certificate: Path | None, certificate_key: Path | None, insecure: bool,
             **chosen: Any) -> None:  # fmt: skip
    """Continue PROMPT; with --server and --client, a server computes what is encrypted, and never sees the text."""
    from jaxgpt2.generation import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    if server is not None or client is not None:
        from jaxgpt2.cli.serve import generate_remotely

        if server is None or client is None:
            raise InputError("a server needs a client bundle, and a client bundle a server: give --server and --client")
        refuse_given(context, "the client bundle says what the model is", chosen, "mode", "backend", "p_error",
                     "rounding", "cache", "scheduler")  # fmt: skip
        connecting = {"token": token, "authority": authority, "certificate": certificate,
                      "certificate_key": certificate_key, "insecure": insecure}  # fmt: skip
        generate_remotely(prompt, server, client, secret_keys, masks, verify, connecting, max_new_tokens, sampling,
                          as_json)  # fmt: skip
        return
    for name, value in (("keys", secret_keys), ("masks", masks), ("verify", verify)):
        if value is not None:
            raise InputError(f"--{name} is for a server: give --server and --client, or leave it out")
    if chosen["modules"] == linear.LINEAR:
        linear.refuse_unused(backend=backend, p_error=p_error, rounding=rounding, cache=cache, scheduler=scheduler)
        linear.generate_here(prompt, mode, max_new_tokens, sampling, as_json, chosen)
        return
    calibration = chosen.pop("calibration")
    if scheduler is not None and mode != "encrypted":
        raise InputError(f"--scheduler is for --mode encrypted, not for {mode}: leave it out")
    with step("loading the model"):
        encrypted = make_encrypted(**chosen, backend=backend)
    fhe_configs = make_fhe_configs(encrypted, p_error, rounding)
    result: dict[str, Any] = {"prompt": prompt, "mode": mode, "model": chosen["model"]}
    keys: dict[Module, fhe.Keys] = {}
    if mode != "float":
        length = len(encrypted.model.encode(prompt, room=max_new_tokens)) + max_new_tokens - 1
        passages = calibration_passages(calibration)
        with step("calibrating"):
            encrypted = encrypted.calibrate(passages, length)
        if mode != "quantized":
            encrypted = compiled(encrypted, passages, length, fhe_configs, backend, cache)
            result["reports"] = {str(module): each.report.to_json() for module, each in encrypted.circuits.items()}
        if mode == "encrypted":
            keys = make_keys(encrypted, cache)
            announce_run(encrypted, length, length - max_new_tokens + 1)
        result |= modules_of(encrypted)
    waiting = (lambda n: f"token {n} of {max_new_tokens}") if mode in ("simulate", "encrypted") else None
    with contextlib.ExitStack() as stack:
        if scheduler is not None:
            from jaxgpt2.executors import cluster

            connection = cluster.connect(scheduler)
            with step("sending circuits and evaluation keys"):
                sent = {m: cluster.send(connection, each, keys[m]) for m, each in encrypted.circuits.items()}
            text = encrypted.continue_text(prompt, max_new_tokens, encrypted.run_by(sent), sampling)
        elif mode == "encrypted":
            runner = stack.enter_context(encrypted.over_cores(keys))
            text = encrypted.continue_text(prompt, max_new_tokens, runner, sampling)
        else:
            text = encrypted.generate(prompt, max_new_tokens, mode, sampling)
        write_tokens(encrypted.model, result, text, as_json, waiting)


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
