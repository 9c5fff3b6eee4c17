"""The commands `sweep` and `tune`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import (
    MOST,
    ROUNDING,
    Directory,
    cache_directory,
    calibration_passages,
    emit,
    json_option,
    model_options,
    options,
    parse_numbers,
    refuse_given,
)
from jaxgpt2.errors import InputError
from jaxgpt2.progress import counting, note, seconds, step

if TYPE_CHECKING:
    from jaxgpt2.sweeps.runner import Experiment


text_options = options(
    click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
                 help="Evaluation text, one passage a line.  [default: bundled]"),
    click.option("--limit", type=click.IntRange(1), help="Only the first N passages."),
    click.option("--max-tokens", type=click.IntRange(1), help="Only the first N tokens of each passage."),
    click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                 help="Text to calibrate on, one passage a line.  [default: bundled]"),
)  # fmt: skip
width_options = options(
    click.option("--input-bits", metavar="N[,N-N...]", help="Bits of inputs."),
    click.option("--weight-bits", metavar="N[,N-N...]", help="Bits of weights."),
    click.option("--activation-bits", metavar="N[,N-N...]", help="Bits of activations, as --bits."),
    click.option("--rounding-threshold-bits", metavar="N[,N-N...]|none",
                 help="Top bits of a sum that a lookup sees, none for all."),
    click.option("--set", "changes", multiple=True, metavar="NAME=N[,N-N...]",
                 help="An option of a method, as score_rank=8,16; may be repeated."),
)  # fmt: skip
cost_options = options(
    click.option("--seq-len", default=6, show_default=True, help="Tokens of the text whose encrypted cost is counted."),
    click.option("--batch", type=click.IntRange(0), default=0, metavar="N",
                 help="Configurations measured together.  [default: as many as memory lets]"),
    click.option("--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler whose workers measure."),
)  # fmt: skip


def parse_widths(
    bits: str, input_bits: str | None, weight_bits: str | None, activation_bits: str | None, threshold: str | None
) -> tuple[tuple[int, ...], list[dict[str, int | None]]]:
    """Numbers of bits, and what to change in the widths that a method has with each, as `grid` takes both."""
    together = ("--bits", bits) if activation_bits is None else ("--activation-bits", activation_bits)
    apart: dict[str, tuple[int | None, ...]] = {}
    for name, option, text in (("inputs", "--input-bits", input_bits), ("weights", "--weight-bits", weight_bits),
                               ("rounding_threshold", "--rounding-threshold-bits", threshold)):  # fmt: skip
        if text is not None:
            apart[name] = (None,) if (name, text) == ("rounding_threshold", "none") else parse_numbers(option, text)
    if math.prod(map(len, apart.values())) > MOST:
        raise InputError(f"the bits name more than {MOST:,} combinations: give fewer")
    changes = [dict(zip(apart, values, strict=True)) for values in itertools.product(*apart.values())]
    return parse_numbers(*together), changes


def parse_grid_changes(changes: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """`NAME=VALUES` options of methods."""
    parsed = {}
    for change in changes:
        name, _, values = change.partition("=")
        parsed[name.strip()] = parse_numbers("--set", values)
    return parsed


def parse_axis(option: str, text: str, count: int) -> tuple[int, ...]:
    """Layers or heads: numbers and ranges, or `all`.

    Raises:
        ModuleError: one that the model does not have.
    """
    from jaxgpt2.modules import ModuleError

    if text == "all":
        return tuple(range(count))
    numbers = parse_numbers(option, text)
    if max(numbers) >= count:
        raise ModuleError(f"{option} {text}: there is no {max(numbers)}, the model has 0 to {count - 1}")
    return numbers


def chosen_passages(text: Path | None, limit: int | None) -> list[str]:
    """The evaluation text."""
    from jaxgpt2.evaluation import bundled_passages, read_passages

    return (bundled_passages("eval") if text is None else read_passages(text))[:limit]


def make_experiment(model: str, text: Path | None, limit: int | None, max_tokens: int | None,
                    calibration: Path | None, ks: str, seq_len: int, rounding: Any,
                    batch: int) -> Experiment:  # fmt: skip
    from jaxgpt2.sweeps.runner import Experiment

    passages = tuple(chosen_passages(text, limit))
    numbers = parse_numbers("--top-k", ks)
    texts = tuple(calibration_passages(calibration))
    return Experiment(model, passages, texts, numbers, seq_len, rounding, batch, max_tokens)


@contextlib.contextmanager
def stoppable(said: str) -> Iterator[None]:
    """Ctrl-C ends the program with a line that says so."""
    try:
        yield
    except KeyboardInterrupt:
        note(said)
        sys.exit(130)


def read_config(model: str) -> Any:
    """A model's configuration, without its weights."""
    import weights
    from jaxgpt2.models.gpt2 import pretrained

    return pretrained.read_config(weights.locate(model))


@click.command()
@options(model_options)
@click.option("--encrypt", metavar="linear",
              help="Sweep widths of all linear layers (--weight-bits, --input-bits) instead of heads.")  # fmt: skip
@click.option("--configs", type=click.Path(path_type=Path), metavar="FILE",
              help="Measure the heads of this file, as tune writes it, alone and together.")  # fmt: skip
@click.option("--layers", default="all", show_default=True, metavar="N[,N-N...]|all", help="Layers, from 0.")
@click.option("--heads", default="all", show_default=True, metavar="N[,N-N...]|all", help="Heads of each, from 0.")
@click.option("--attention", "methods", default="lowrank", show_default=True, metavar="NAME[,NAME...]",
              help="Attention methods: names, see info, or FILE.py:NAME.")  # fmt: skip
@click.option("--bits", default="2-8", show_default=True, metavar="N[,N-N...]",
              help="Bits of activations, and of all else what the method has with them.")  # fmt: skip
@options(width_options, text_options)
@click.option("--top-k", "ks", default="1,5,10", show_default=True, metavar="K[,K...]", help="Agreement at these k.")
@click.option("--rounding", type=ROUNDING, default="approximate", show_default=True,
              help="How low bits are rounded away before an encrypted lookup.")  # fmt: skip
@options(cost_options)
@click.option("--out", type=Directory(), required=True, metavar="DIR", help="Table and figures go here.")
@click.option("--resume", is_flag=True, help="Go on with the same sweep in DIR.")
@json_option
@click.pass_context
def sweep(context: click.Context, model: str, encrypt: str | None, configs: Path | None, layers: str, heads: str,
          methods: str, bits: str, input_bits: str | None, weight_bits: str | None, activation_bits: str | None,
          rounding_threshold_bits: str | None, changes: tuple[str, ...], text: Path | None, limit: int | None,
          max_tokens: int | None, calibration: Path | None, ks: str, rounding: str, seq_len: int, batch: int,
          scheduler: str | None, out: Path, resume: bool, as_json: bool) -> None:  # fmt: skip
    """Measure a grid of heads, bit widths and methods, and what each would cost encrypted."""
    from jaxgpt2.methods import named
    from jaxgpt2.modules import Module, read_configs
    from jaxgpt2.sweeps import runner
    from jaxgpt2.sweeps import sweep as sweeping

    if encrypt is not None:
        if encrypt != linear.LINEAR:
            raise InputError(f"--encrypt {encrypt!r}: a sweep takes linear there; name heads with --layers and --heads")
        passages, texts = chosen_passages(text, limit), calibration_passages(calibration)
        linear.sweep_linear(
            model, parse_numbers("--weight-bits", weight_bits or "8,10,12"),
            parse_numbers("--input-bits", input_bits or "8,12,16"), passages, texts, parse_numbers("--top-k", ks),
            max_tokens, out, resume, as_json,
        )  # fmt: skip
        return
    widths, apart = parse_widths(bits, input_bits, weight_bits, activation_bits, rounding_threshold_bits)
    experiment = make_experiment(model, text, limit, max_tokens, calibration, ks, seq_len, rounding, batch)
    config = read_config(model)
    known = {}
    if configs is not None:
        names = ("layers", "heads", "methods", "bits", "input_bits", "weight_bits", "activation_bits",
                 "rounding_threshold_bits", "changes")  # fmt: skip
        refuse_given(context, "the file says what is measured", names, beside="--configs")
        known = read_configs(configs, config)
        configurations = [runner.Configuration(module, own) for module, own in known.items()]
    else:
        chosen = itertools.product(
            parse_axis("--layers", layers, config.n_layer), parse_axis("--heads", heads, config.n_head)
        )
        configurations = runner.grid(
            (Module(layer, head) for layer, head in chosen),
            [named(name.strip()) for name in methods.split(",")],
            widths,
            parse_grid_changes(changes),
            apart,
        )
    started = time.monotonic()
    stopped = f"stopped; the rows so far are in {out}: the same command with --resume goes on"
    with stoppable(stopped), counting("configurations", len(configurations)) as progress:
        frame = sweeping.sweep(experiment, configurations, out, resume, scheduler, progress)
    took = time.monotonic() - started
    failed = int(frame["error"].notna().sum())
    both = measured_together(experiment, known, frame, out) if known else {}
    drawn = sorted(str(path) for path in out.glob("*.png"))
    result = {"rows": len(frame), "failed": failed, "table": str(out / "rows.parquet"), "csv": str(out / "rows.csv"),
              "figures": drawn, "seconds": took, **both}  # fmt: skip
    lines = [
        f"{len(frame)} configurations of {model} in {seconds(took)}: {result['table']}, {result['csv']}",
        *([f"{failed} of them cannot be calibrated, see the column error"] if failed else []),
        *(
            f"{name}: recovered KL {each['recovered_kl']:.4f} ({each['kl']:.2e} of {each['kl_ablated']:.2e} nats)"
            for name, each in both.items()
        ),
        *drawn,
    ]
    emit(as_json, result, lines)


def measured_together(experiment: Experiment, configs: Any, frame: Any, out: Path) -> dict[str, dict[str, float]]:
    """What the heads of a file lose, each alone and all of them at the same time; kept in `together.json`."""
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.sweeps.sweep import together
    from weights.checkpoint import write_text_atomically

    with step("measuring all of them together"):
        cache = cache_directory(None) / "calibrated"
        found = together(experiment, configs, GPT2.from_pretrained(experiment.model), cache)
    alone = {name: float(frame[name].sum()) for name in ("kl", "kl_ablated")}
    both = {
        "alone": alone | {"recovered_kl": 1 - alone["kl"] / alone["kl_ablated"]},
        "together": {name: getattr(found, name) for name in ("kl", "kl_ablated", "recovered_kl")},
    }
    text = json.dumps(both, indent=2) + "\n"
    write_text_atomically(out / "together.json", text)
    return both
