"""The command `tune`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli.options import File, describe_config, emit, json_option, model_options, options
from jaxgpt2.cli.sweep import (
    cost_options,
    make_experiment,
    parse_grid_changes,
    parse_widths,
    read_config,
    stoppable,
    text_options,
    width_options,
)
from jaxgpt2.errors import InputError, MissingExtra
from jaxgpt2.progress import counting, note, seconds

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.sweeps.runner import Experiment
    from jaxgpt2.sweeps.tune import Encryption

# Widths that `tune` tries: every one more is a training for each head and choice of ranks.
TUNED_BITS = "3-5"


@click.command()
@options(model_options)
@click.option("--encrypt", "modules_text", required=True, metavar="MODULES", help="Heads to find configs for, or all.")
@click.option(
    "--recovered-kl",
    "wanted",
    default=0.95,
    show_default=True,
    help="What must be kept of all these heads together, each measured alone.",
)
@click.option("--attention", "names", default="lowrank", show_default=True, metavar="NAME[,NAME...]",
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
@click.option("--out", type=File(), metavar="FILE", help="Write the configs here, for --configs.")
@json_option
def tune(model: str, modules_text: str, wanted: float, names: str, bits: str, input_bits: str | None,
         weight_bits: str | None, activation_bits: str | None, rounding_threshold_bits: str | None,
         changes: tuple[str, ...], text: Path | None, limit: int | None, calibration: Path | None, seq_len: int,
         batch: int, scheduler: str | None, sweeps: tuple[Path, ...], p_errors: str, roundings: str,
         noise: float, simulated: int, out: Path | None, as_json: bool) -> None:  # fmt: skip
    """Find the cheapest configs of heads that keep most of what the heads do, and how to encrypt their lookups."""
    from jaxgpt2 import methods
    from jaxgpt2.encrypted import get_backend
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.modules import Module, ModuleError, parse_modules
    from jaxgpt2.sweeps import tune as tuning
    from jaxgpt2.sweeps.runner import check, grid
    from jaxgpt2.sweeps.sweep import measured
    from weights.checkpoint import write_atomically

    if not wanted < 1:
        raise InputError(f"--recovered-kl must be below 1, got {wanted}: 1 is the float model itself")
    if out is not None and out.exists():
        raise InputError(f"{out} exists: give another --out, or remove it")
    candidates = parse_encryptions(p_errors, roundings)
    config = read_config(model)
    if modules_text == "all":
        modules_text = ",".join(
            f"{module[0]}.{module[1]}" for module in itertools.product(range(config.n_layer), range(config.n_head))
        )
    modules = parse_modules(modules_text, config)
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
    chosen = [name.strip() for name in names.split(",")]
    if sweeps:
        rows = [row for row in rows_of_sweeps(sweeps) if Module(row["layer"], row["head"]) in modules]
        chosen = sorted({row["attention"] for row in rows})
    simulable = [name for name in dict.fromkeys(chosen) if simulated and methods.get(name).by_lookups]
    try:  # what is not installed is said now, and not after all heads were measured
        for name in simulable:
            get_backend(methods.get(name).backend)
    except MissingExtra as error:
        raise InputError(f"{error}, or leave error probability and rounding to the method: --simulated 0") from None
    if not sweeps:
        widths, apart = parse_widths(bits, input_bits, weight_bits, activation_bits, rounding_threshold_bits)
        searched = {option: values for name in chosen for option, values in methods.get(name).search.items()}
        configurations = grid(modules, chosen, widths, searched | parse_grid_changes(changes), apart)
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
        chosen = tuning.cheapest_encryption(encryptions[name], noise).fhe_config
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
        f"head {module}: {describe_config(config)}: recovers {row['recovered_kl']:.4f}, "
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
            f"{each.fhe_config.p_error:<18g}{each.fhe_config.rounding:14}{each.complexity:>12.2e}{each.lost:>10.4f}"
            for each in working
        ),
        *(
            f"{each.fhe_config.p_error:<18g}{each.fhe_config.rounding:14}{each.error}"
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
        rows |= (found := read_rows(path))
        if strange := [key for key, row in found.items() if not _is_of_a_head(row)]:
            raise InputError(f"{path} is no sweep of heads: {strange[0]!r:.80} is another row")
    return list(rows.values())


def _is_of_a_head(row: dict[str, Any]) -> bool:
    """Whether a row, which may be anybody's JSON, has what is chosen by."""
    names = {"layer": int, "head": int, "attention": str, "key": str}
    if row.get("recovered_kl") is not None:
        numbers = ("kl", "kl_ablated", "recovered_kl", "estimated_seconds", "estimated_seconds_per_token")
        names |= dict.fromkeys(numbers, int | float) | {"machine": str, "seq_len": int}
    return all(isinstance(row.get(name), kind) for name, kind in names.items())
