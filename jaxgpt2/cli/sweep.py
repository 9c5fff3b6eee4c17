"""The commands `sweep` and `tune`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli import ROUNDING, calibration_passages, describe_recipe, emit, json_option, model_options, options
from jaxgpt2.errors import InputError
from jaxgpt2.progress import counting, note, seconds

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.sweeps.runner import Experiment
    from jaxgpt2.sweeps.tune import Encryption

# Widths that `tune` tries: every one more is a training for each head and choice of ranks.
TUNED_BITS = "3-5"

text_options = options(
    click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
                 help="Evaluation text, one passage a line.  [default: bundled]"),
    click.option("--limit", type=click.IntRange(1), help="Only the first N passages."),
    click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                 help="Text to calibrate on, one passage a line.  [default: bundled]"),
)  # fmt: skip
width_options = options(
    click.option("--input-bits", metavar="N[,N-N...]", help="Bits of inputs."),
    click.option("--weight-bits", metavar="N[,N-N...]", help="Bits of weights."),
    click.option("--activation-bits", metavar="N[,N-N...]", help="Bits of activations, as --bits."),
    click.option("--lookup-bits", metavar="N[,N-N...]|none",
                 help="Top bits of a sum that a lookup sees, none for all."),
    click.option("--set", "settings", multiple=True, metavar="NAME=N[,N-N...]",
                 help="An option of a method, as score_rank=8,16; may be repeated."),
)  # fmt: skip
cost_options = options(
    click.option("--seq-len", default=6, show_default=True, help="Tokens of the text whose encrypted cost is counted."),
    click.option("--batch", type=click.IntRange(0), default=0, metavar="N",
                 help="Configurations measured together.  [default: as many as memory lets]"),
    click.option("--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler whose workers measure."),
)  # fmt: skip


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """`2-4,8` as (2, 3, 4, 8).

    Raises:
        InputError: it is not of that form, or names nothing.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise InputError(f"{option} {text!r} cannot be read: wanted numbers and ranges, as 2-4,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"{option} {text!r} names nothing: {first} is more than {last}")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def parse_widths(bits: str, input_bits: str | None, weight_bits: str | None, activation_bits: str | None,
                 lookup_bits: str | None) -> tuple[tuple[int, ...], list[dict[str, int | None]]]:  # fmt: skip
    """Numbers of bits, and what to change in the widths that a method has with each, as `grid` takes both."""
    together = ("--bits", bits) if activation_bits is None else ("--activation-bits", activation_bits)
    apart: dict[str, tuple[int | None, ...]] = {}
    for name, option, text in (("inputs", "--input-bits", input_bits), ("weights", "--weight-bits", weight_bits),
                               ("lookup", "--lookup-bits", lookup_bits)):  # fmt: skip
        if text is not None:
            apart[name] = (None,) if (name, text) == ("lookup", "none") else parse_numbers(option, text)
    changes = [dict(zip(apart, values, strict=True)) for values in itertools.product(*apart.values())]
    return parse_numbers(*together), changes


def parse_grid_settings(settings: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """`NAME=VALUES` options of methods."""
    parsed = {}
    for setting in settings:
        name, _, values = setting.partition("=")
        parsed[name.strip()] = parse_numbers("--set", values)
    return parsed


def parse_axis(option: str, text: str, count: int) -> tuple[int, ...]:
    """Layers or heads: numbers and ranges, or `all`.

    Raises:
        ModuleError: one that the model does not have.
    """
    from jaxgpt2.encrypted import ModuleError

    if text == "all":
        return tuple(range(count))
    numbers = parse_numbers(option, text)
    if max(numbers) >= count:
        raise ModuleError(f"{option} {text}: there is no {max(numbers)}, the model has 0 to {count - 1}")
    return numbers


def make_experiment(model: str, text: Path | None, limit: int | None, calibration: Path | None, ks: str, seq_len: int,
                    rounding: Any, batch: int) -> Experiment:  # fmt: skip
    from jaxgpt2.evaluation import read_passages
    from jaxgpt2.sweeps.runner import Experiment
    from weights.checkpoint import TINY

    passages = tuple(read_passages(text or TINY / "eval.txt")[:limit])
    numbers = parse_numbers("--top-k", ks)
    return Experiment(model, passages, tuple(calibration_passages(calibration)), numbers, seq_len, rounding, batch)


@contextlib.contextmanager
def stoppable(said: str) -> Iterator[None]:
    """Ctrl-C ends the program with a line that says so."""
    try:
        yield
    except KeyboardInterrupt:
        note(said)
        sys.exit(130)


def read_config(model: str) -> Any:
    """A model's sizes, without its weights."""
    import weights
    from jaxgpt2.models.gpt2.config import GPT2Config

    return GPT2Config.from_dict(weights.load_config(weights.locate(model)))


@click.command()
@options(model_options)
@click.option("--layers", default="all", show_default=True, metavar="N[,N-N...]|all", help="Layers, from 0.")
@click.option("--heads", default="all", show_default=True, metavar="N[,N-N...]|all", help="Heads of each, from 0.")
@click.option("--attention", "methods", default="lowrank", show_default=True, metavar="NAME[,NAME...]",
              help="Attention methods; see info.")  # fmt: skip
@click.option("--bits", default="2-8", show_default=True, metavar="N[,N-N...]",
              help="Bits of activations, and of all else what the method has with them.")  # fmt: skip
@options(width_options, text_options)
@click.option("--top-k", "ks", default="1,5,10", show_default=True, metavar="K[,K...]", help="Agreement at these k.")
@click.option("--rounding", type=ROUNDING, default="approximate", show_default=True,
              help="How low bits are rounded away before an encrypted lookup.")  # fmt: skip
@options(cost_options)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="LookupTable and figures go here."
)
@click.option("--resume", is_flag=True, help="Go on with the same sweep in DIR.")
@json_option
def sweep(model: str, layers: str, heads: str, methods: str, bits: str, input_bits: str | None,
          weight_bits: str | None, activation_bits: str | None, lookup_bits: str | None, settings: tuple[str, ...],
          text: Path | None, limit: int | None, calibration: Path | None, ks: str, rounding: str, seq_len: int,
          batch: int, scheduler: str | None, out: Path, resume: bool, as_json: bool) -> None:  # fmt: skip
    """Measure a grid of heads, bit widths and methods, and what each would cost encrypted."""
    from jaxgpt2 import sweep as sweeping
    from jaxgpt2.encrypted import Module

    widths, apart = parse_widths(bits, input_bits, weight_bits, activation_bits, lookup_bits)
    experiment = make_experiment(model, text, limit, calibration, ks, seq_len, rounding, batch)
    config = read_config(model)
    chosen = itertools.product(
        parse_axis("--layers", layers, config.n_layer), parse_axis("--heads", heads, config.n_head)
    )
    configurations = sweeping.grid(
        (Module(layer, head) for layer, head in chosen),
        [name.strip() for name in methods.split(",")],
        widths,
        parse_grid_settings(settings),
        apart,
    )
    started = time.monotonic()
    stopped = f"stopped; the rows so far are in {out}: the same command with --resume goes on"
    with stoppable(stopped), counting("configurations", len(configurations)) as progress:
        frame = sweeping.sweep(experiment, configurations, out, resume, scheduler, progress)
    took = time.monotonic() - started
    failed = int(frame["error"].notna().sum())
    drawn = sorted(str(path) for path in out.glob("*.png"))
    result = {"rows": len(frame), "failed": failed, "table": str(out / "rows.parquet"), "csv": str(out / "rows.csv"),
              "figures": drawn, "seconds": took}  # fmt: skip
    lines = [
        f"{len(frame)} configurations of {model} in {seconds(took)}: {result['table']}, {result['csv']}",
        *([f"{failed} of them cannot be calibrated, see the column error"] if failed else []),
        *drawn,
    ]
    emit(as_json, result, lines)


@click.command()
@options(model_options)
@click.option("--head", "heads", required=True, metavar="L.H[,L.H...]", help="Heads to find configs for, or all.")
@click.option(
    "--recovered-kl",
    "wanted",
    default=0.95,
    show_default=True,
    help="What must be kept of all these heads together, each measured alone.",
)
@click.option("--attention", "methods", default="lowrank", show_default=True, metavar="NAME[,NAME...]",
              help="Attention methods to try.")  # fmt: skip
@click.option("--bits", default=TUNED_BITS, show_default=True, metavar="N[,N-N...]", help="Widths to try.")
@options(width_options, text_options, cost_options)
@click.option("--sweep", "sweeps", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Choose among the rows of this sweep instead of measuring a grid; may be repeated.")  # fmt: skip
@click.option("--p-error", "p_errors", default="1e-5,1e-3,1e-2,3e-2,1e-1", show_default=True, metavar="P[,P...]",
              help="Probabilities of a wrong encrypted lookup to try.")  # fmt: skip
@click.option("--rounding", "roundings", default="approximate,exact", show_default=True, metavar="NAME[,NAME...]",
              help="Ways to round low bits away before a lookup to try: exact, approximate, none. Costs in the grid "
                   "are counted with the first.")  # fmt: skip
@click.option("--noise", default=0.01, show_default=True,
              help="Recovered KL that these two may cost, all heads together.")  # fmt: skip
@click.option("--simulated", default=16, show_default=True, type=click.IntRange(0), metavar="N",
              help="Passages that the chosen heads read in simulation for that, cut to --seq-len tokens; 0 leaves "
                   "error probability and rounding to the method.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the configs here, for --configs.")
@json_option
def tune(model: str, heads: str, wanted: float, methods: str, bits: str, input_bits: str | None,
         weight_bits: str | None, activation_bits: str | None, lookup_bits: str | None, settings: tuple[str, ...],
         text: Path | None, limit: int | None, calibration: Path | None, seq_len: int, batch: int,
         scheduler: str | None, sweeps: tuple[Path, ...], p_errors: str, roundings: str, noise: float, simulated: int,
         out: Path | None, as_json: bool) -> None:  # fmt: skip
    """Find the cheapest configs of heads that keep most of what the heads do, and how to encrypt their lookups."""
    import fhe
    from jaxgpt2 import methods, tuning
    from jaxgpt2.encrypted import Module, ModuleError, parse_modules
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.sweeps.runner import check, grid, measured
    from weights.checkpoint import write_atomically

    if not wanted < 1:
        raise InputError(f"--recovered-kl must be below 1, got {wanted}: 1 is the float model itself")
    if out is not None and out.exists():
        raise InputError(f"{out} exists: give another --out, or remove it")
    candidates = parse_encryptions(p_errors, roundings)
    config = read_config(model)
    if heads == "all":
        heads = ",".join(
            f"{module[0]}.{module[1]}" for module in itertools.product(range(config.n_layer), range(config.n_head))
        )
    modules = parse_modules(heads, config)
    if any(module.head is None for module in modules):
        raise ModuleError("tune finds configs for single heads: name them, as 0.3")

    @functools.cache
    def loaded() -> tuple[Experiment, GPT2]:
        """Texts and model, where something is measured."""
        experiment = make_experiment(model, text, limit, calibration, "1", seq_len, candidates[0].rounding, batch)
        gpt2 = GPT2.from_pretrained(model)
        check(experiment, gpt2)
        return experiment, gpt2

    rows: list[dict[str, Any]] = []
    names = [name.strip() for name in methods.split(",")]
    if sweeps:
        rows = [row for row in rows_of_sweeps(sweeps) if Module(row["layer"], row["head"]) in modules]
        names = sorted({row["attention"] for row in rows})
    simulable = [name for name in dict.fromkeys(names) if simulated and methods.get(name).by_lookups]
    try:  # what is not installed is said now, and not after all heads were measured
        for name in simulable:
            fhe.get_backend(methods.get(name).backend)
    except fhe.BackendUnavailable as error:
        raise InputError(f"{error}, or leave error probability and rounding to the method: --simulated 0") from None
    if not sweeps:
        widths, apart = parse_widths(bits, input_bits, weight_bits, activation_bits, lookup_bits)
        searched = {name: values for method in names for name, values in methods.get(method).search.items()}
        configurations = grid(modules, names, widths, searched | parse_grid_settings(settings), apart)
        experiment, gpt2 = loaded()
        with stoppable("stopped"), counting("configurations", len(configurations)) as progress:
            progress(0)
            for some in measured(experiment, configurations, gpt2, scheduler):
                rows += some
                progress(len(some))
    found = tuning.cheapest(
        {
            str(module): [row for row in rows if (row["layer"], row["head"]) == (module.layer, module.head)]
            for module in modules
        },
        wanted,
    )
    configs = {
        module: methods.MethodConfig.from_json(json.loads(found[str(module)]["key"].partition(" ")[2]))
        for module in modules
    }
    encryptions: dict[str, list[tuning.Encryption]] = {}
    for name in simulable:
        own = {module: config for module, config in configs.items() if config.method == name}
        if not own:
            continue
        experiment, gpt2 = loaded()
        with stoppable("stopped"), counting("circuits", len(own) * len(candidates)) as progress:
            progress(0)
            encryptions[name] = tuning.measure_encryption(
                gpt2, own, candidates, experiment.passages[:simulated], experiment.calibration, seq_len, progress
            )
        chosen = tuning.cheapest_encryption(encryptions[name], noise).settings
        configs |= {module: dataclasses.replace(config, encryption=chosen) for module, config in own.items()}
    columns = ("recovered_kl", "kl", "kl_ablated", "head_error", "top_1", "pbs_count", "max_bit_width",
               "rotations", "products", "levels", "estimated_seconds", "estimated_seconds_per_token", "machine",
               "seq_len", "rounding")  # fmt: skip
    result = {
        "model": model,
        "wanted_recovered_kl": wanted,
        "heads": {
            str(module): config.to_json()
            | {"measured": {name: row[name] for name in columns if (row := found[str(module)]).get(name) is not None}}
            for module, config in configs.items()
        },
        "encryptions": {name: [each.to_json() for each in tried] for name, tried in encryptions.items()},
    }
    kept = 1 - sum(row["kl"] for row in found.values()) / sum(row["kl_ablated"] for row in found.values())
    result["recovered_kl"] = kept
    if out is not None:
        text_of = json.dumps(result, indent=2) + "\n"
        write_atomically(out, lambda name: Path(name).write_text(text_of))
        note(f"wrote {out}: for --configs of generate, compile and eval")
    lines = [
        f"head {module}: {describe_recipe(config)}: recovers {row['recovered_kl']:.4f}, "
        f"about {seconds(row['estimated_seconds'])} for {row['seq_len']} tokens, "
        f"{seconds(row['estimated_seconds_per_token'])} for one more ({row['machine']})"
        for module, config in configs.items()
        for row in (found[str(module)],)
    ]
    if len(found) > 1:
        lines.append(f"together they recover {kept:.4f}")
    for name, tried in encryptions.items():
        lines += encryption_lines(name, tried, min(simulated, len(loaded()[0].passages)), seq_len)
    emit(as_json, result, lines)


def encryption_lines(method: str, tried: Sequence[Encryption], passages: int, tokens: int) -> list[str]:
    """A table of what was tried, dearest first."""
    working = sorted((each for each in tried if each.error is None), key=lambda each: -each.complexity)
    return [
        "",
        f"{method} on encrypted lookups, simulated on {passages} passages of {tokens} tokens:",
        f"{'error per lookup':18}{'rounding':14}{'complexity':>12}{'KL lost':>10}",
        *(
            f"{each.settings.p_error:<18g}{each.settings.rounding:14}{each.complexity:>12.2e}{each.lost:>10.4f}"
            for each in working
        ),
        *(
            f"{each.settings.p_error:<18g}{each.settings.rounding:14}{each.error}"
            for each in tried
            if each.error is not None
        ),
    ]


def parse_encryptions(p_errors: str, roundings: str) -> list[fhe.FHEConfig]:
    """All pairs of a probability and a rounding.

    Raises:
        InputError: something that is neither, or out of range.
    """
    import fhe

    try:
        numbers = [float(part) for part in p_errors.split(",")]
    except ValueError:
        raise InputError(f"--p-error {p_errors!r} cannot be read: wanted probabilities, as 1e-3,1e-2") from None
    names: list[Any] = [name.strip() for name in roundings.split(",")]
    try:
        found = [fhe.FHEConfig(number, name) for name in names for number in numbers]
    except ValueError as error:
        raise InputError(str(error)) from None
    return list(dict.fromkeys(found))


def rows_of_sweeps(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """All rows of some sweeps of the same model on the same texts.

    Raises:
        InputError: one of them is no sweep, or of something else than the first.
    """
    from jaxgpt2.sweeps.store import read_rows, read_sweep

    first, rows = {}, {}
    for path in paths:
        identity = {name: value for name, value in read_sweep(path).items() if name not in ("grid", "configurations")}
        first = first or identity
        if identity != first:
            differing = ", ".join(sorted(name for name in first if first[name] != identity.get(name)))
            raise InputError(f"{path} and {paths[0]} are sweeps of other {differing}: their rows cannot be compared")
        rows |= read_rows(path)
    return list(rows.values())
