"""The command `eval`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import (
    MODES,
    announce_run,
    cache_directory,
    calibrated,
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
from jaxgpt2.progress import note, step

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.encrypted import Mode
    from jaxgpt2.evaluation import Evaluation
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
@click.option("--max-tokens", type=click.IntRange(1), help="Only the first N tokens of each passage.")
@click.option("--strict", is_flag=True,
              help="End at the first passage whose decrypted numbers are refused; else it is left out.")  # fmt: skip
@json_option
def evaluate_command(calibration: Path | None, mode: Mode, backend: str | None, p_error: float | None,
                     rounding: str | None, cache: Path | None, text: Path | None, ks: str, limit: int | None,
                     max_tokens: int | None, strict: bool, as_json: bool, **chosen: Any) -> None:  # fmt: skip
    """Measure how much encrypted modules change the model on a text."""
    from jaxgpt2 import evaluation

    numbers = parse_numbers("--top-k", ks)
    passages = (evaluation.bundled_passages("eval") if text is None else evaluation.read_passages(text))[:limit]
    calibrating = calibration_passages(calibration)
    evaluation.check_disjoint(calibrating, passages)
    if chosen["modules"] == linear.LINEAR:
        linear.refuse_unused(backend=backend, p_error=p_error, rounding=rounding, cache=cache)
        linear.evaluate(passages, numbers, max_tokens, mode, as_json, chosen | {"calibration": calibration})
        return
    cache = cache_directory(cache)
    with step("loading the model"):
        encrypted = make_encrypted(**chosen, backend=backend)
    fhe_configs = make_fhe_configs(encrypted, p_error, rounding)
    longest = evaluation.longest_passage(encrypted.model, passages, max_tokens)
    encrypted = calibrated(encrypted, calibrating, longest, cache)
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
        runners: dict[str, Any] = {"quantized": encrypted.runner("quantized"), mode: runner}
        each = evaluation.measure(encrypted, passages, runners, numbers, longest, strict)
    measured, quantized = each.evaluation(mode), each.evaluation("quantized")
    for number, reason in sorted(each.refused[mode].items()):
        note(f"{text or 'the bundled text'}, line {number + 1}: refused: {reason}")
    result = {
        **with_recovered(measured),
        **({} if mode == "quantized" else {"quantized": with_recovered(quantized)}),
        "refused_passages": {str(number + 1): reason for number, reason in sorted(each.refused[mode].items())},
        "mode": mode,
        "model": chosen["model"],
        **modules_of(encrypted),
        "seconds": time.monotonic() - started,
    }
    # Beside what was decrypted or simulated stands what the same integers give in JAX.
    columns = {"decrypted" if mode == "encrypted" else "simulated" if mode == "simulate" else mode: measured}
    columns |= {"quantized": quantized}
    wide = "".join(f"{name:>12}" for name in columns)

    def row(name: str, value: Callable[[Evaluation], float], ablated: float, form: str) -> str:
        cells = "".join(f"{value(one):>12{form}}" for one in columns.values())
        return f"{name:22}{cells}{ablated:>12{form}}"

    lines = [
        f"{result['modules']} of {chosen['model']}, {describe(encrypted)}, {mode}: "
        f"{measured.positions} positions in {measured.passages} passages",
        "",
        f"{'':22}{wide}{'ablated':>12}",
        *(row(f"top-{k} agreement", lambda one, k=k: one.top_k[k], measured.top_k_ablated[k], ".4f") for k in each.ks),
        row("KL from float (nats)", lambda one: one.kl, measured.kl_ablated, ".2e"),
        row("recovered KL", lambda one: one.recovered_kl, 0.0, ".4f"),
        row("head error", lambda one: one.head_error, 1.0, ".4f"),
        f"{'passages refused':22}{measured.refused:>12}",
    ]
    emit(as_json, result, lines)


def with_recovered(measured: Evaluation) -> dict[str, Any]:
    """The measures, those that follow from others too."""
    return dataclasses.asdict(measured) | {"recovered_kl": measured.recovered_kl}
