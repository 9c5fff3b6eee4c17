"""The command `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import (
    announce_run,
    cache_directory,
    calibrated,
    calibration_passages,
    compile_options,
    compiled,
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
    sampling_options,
    server_options,
)
from jaxgpt2.cli.text import write_tokens
from jaxgpt2.errors import InputError
from jaxgpt2.progress import step

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.encrypted import Mode
    from jaxgpt2.modules import Module


@click.command()
@click.argument("prompt")
@options(model_options, module_options, mode_option, compile_options, server_options)
@click.option("--max-new-tokens", type=click.IntRange(1), default=20, show_default=True)
@options(sampling_options)
@click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler, whose workers compute what is encrypted.")
@json_option
@click.pass_context
def generate(context: click.Context, prompt: str, mode: Mode, backend: str | None, p_error: float | None,
             rounding: str | None, cache: Path | None, max_new_tokens: int, temperature: float | None,
             top_k: int | None, top_p: float | None, repetition_penalty: float | None,
             no_repeat_ngram_size: int | None, seed: int, scheduler: str | None, as_json: bool, server: str | None,
             client: Path | None, secret_keys: Path | None, masks: Path | None, verify: str | None, token: str | None,
             authority: Path | None, certificate: Path | None, certificate_key: Path | None, insecure: bool,
             send_my_text_unencrypted: bool, **chosen: Any) -> None:  # fmt: skip
    """Continue PROMPT; with --server and --client, a server computes what is encrypted, and never sees the text."""
    from jaxgpt2.generation import Sampling

    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given)  # before anything takes its time

    if server is not None or client is not None:
        from jaxgpt2.cli.serve import generate_remotely

        if server is None or client is None:
            raise InputError("a server needs a client bundle, and a client bundle a server: give --server and --client")
        refuse_given(context, "the client bundle says what the model is", chosen, "mode", "backend", "p_error",
                     "rounding", "cache", "scheduler")  # fmt: skip
        connecting = {"token": token, "authority": authority, "certificate": certificate,
                      "certificate_key": certificate_key, "insecure": insecure}  # fmt: skip
        generate_remotely(prompt, server, client, secret_keys, masks, verify, send_my_text_unencrypted, connecting,
                          max_new_tokens, given, as_json)  # fmt: skip
        return
    for name, value in (("keys", secret_keys), ("masks", masks), ("verify", verify)):
        if value is not None:
            raise InputError(f"--{name} is for a server: give --server and --client, or leave it out")
    if chosen["modules"] == linear.LINEAR:
        linear.refuse_unused(backend=backend, p_error=p_error, rounding=rounding, cache=cache, scheduler=scheduler)
        linear.generate_here(prompt, mode, max_new_tokens, given, as_json, chosen)
        return
    calibration = chosen.pop("calibration")
    if scheduler is not None and mode != "encrypted":
        raise InputError(f"--scheduler is for --mode encrypted, not for {mode}: leave it out")
    kept = None if mode == "float" else cache_directory(cache)
    with step("loading the model"):
        encrypted = make_encrypted(**chosen, backend=backend)
    sampling = dataclasses.replace(encrypted.model.sampling, **given)
    fhe_configs = make_fhe_configs(encrypted, p_error, rounding)
    result: dict[str, Any] = {"prompt": prompt, "mode": mode, "model": chosen["model"]}
    keys: dict[Module, fhe.Keys] = {}
    if kept is not None:
        length = len(encrypted.model.encode(prompt, room=max_new_tokens)) + max_new_tokens - 1
        passages = calibration_passages(calibration)
        encrypted = calibrated(encrypted, passages, length, kept)
        if mode != "quantized":
            encrypted = compiled(encrypted, passages, length, fhe_configs, backend, kept)
            result["reports"] = {str(module): each.report.to_json() for module, each in encrypted.circuits.items()}
        if mode == "encrypted":
            keys = make_keys(encrypted, kept)
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
