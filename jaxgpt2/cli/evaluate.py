"""The command `eval`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import (
    MODES,
    announce_run,
    cache_directory,
    calibration_passages,
    compile_options,
    compiled,
    describe,
    emit,
    json_option,
    make_encrypted,
    make_fhe_configs,
    make_keys,
    model_options,
    module_options,
    modules_of,
    options,
    parse_numbers,
)
from jaxgpt2.progress import step

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.encrypted import Mode
    from jaxgpt2.modules import Module


@click.command("eval")
@options(model_options, module_options)
@click.option("--mode", type=click.Choice(MODES[1:]), default="quantized", show_default=True,
              help="How the encrypted modules are computed.")  # fmt: skip
@options(compile_options)
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="Evaluation text, one passage a line.  [default: bundled]")  # fmt: skip
@click.option("--top-k", "ks", default="1,5,10", show_default=True, metavar="K[,K...]", help="Agreement at these k.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N passages.")
@json_option
def evaluate_command(calibration: Path | None, mode: Mode, backend: str | None, p_error: float | None,
                     rounding: str | None, cache: Path | None, text: Path | None, ks: str, limit: int | None,
                     as_json: bool, **chosen: Any) -> None:  # fmt: skip
    """How much encrypted modules change the model on a text."""
    from jaxgpt2 import evaluation

    numbers = parse_numbers("--top-k", ks)
    passages = (evaluation.bundled_passages("eval") if text is None else evaluation.read_passages(text))[:limit]
    calibrating = calibration_passages(calibration)
    evaluation.check_disjoint(calibrating, passages)
    if chosen["modules"] == linear.LINEAR:
        linear.refuse_unused(backend=backend, p_error=p_error, rounding=rounding, cache=cache)
        linear.evaluate(passages, numbers, mode, as_json, chosen | {"calibration": calibration})
        return
    if mode != "quantized":
        cache = cache_directory(cache)
    with step("loading the model"):
        encrypted = make_encrypted(**chosen, backend=backend)
    fhe_configs = make_fhe_configs(encrypted, p_error, rounding)
    longest = evaluation.longest_passage(encrypted.model, passages)
    with step("calibrating"):
        encrypted = encrypted.calibrate(calibrating, longest)
    keys: dict[Module, fhe.Keys] = {}
    if mode != "quantized":
        encrypted = compiled(encrypted, calibrating, longest, fhe_configs, backend, cache)
    if mode == "encrypted":
        keys = make_keys(encrypted, cache)
        announce_run(encrypted, longest)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(encrypted.over_cores(keys)) if keys else encrypted.runner(mode)
        stack.enter_context(step(f"evaluating {len(passages)} passages"))
        measured = evaluation.evaluate(encrypted, passages, runner, numbers)
    result = {
        **dataclasses.asdict(measured),
        "recovered_kl": measured.recovered_kl,
        "mode": mode,
        "model": chosen["model"],
        **modules_of(encrypted),
        "seconds": time.monotonic() - started,
    }
    lines = [
        f"{result['modules']} of {chosen['model']}, {describe(encrypted)}, {mode}: "
        f"{measured.positions} positions in {measured.passages} passages",
        "",
        f"{'':22}{'quantized':>12}{'ablated':>12}",
        *(
            f"{f'top-{k} agreement':22}{measured.top_k[k]:>12.4f}{measured.top_k_ablated[k]:>12.4f}"
            for k in measured.top_k
        ),
        f"{'KL from float (nats)':22}{measured.kl:>12.2e}{measured.kl_ablated:>12.2e}",
        f"{'recovered KL':22}{measured.recovered_kl:>12.4f}{0:>12}",
        f"{'head error':22}{measured.head_error:>12.4f}{1:>12}",
    ]
    emit(as_json, result, lines)
