"""The command `tune`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli.options import File, cache_directory, describe_config, emit, json_option, model_options, options
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
from jaxgpt2.progress import counting, note, seconds, step

if TYPE_CHECKING:
    import fhe
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.sweeps.runner import Configuration, Experiment
    from jaxgpt2.sweeps.tune import Table, Trial

# Widths that `tune` tries.
TUNED_BITS = "3-5"

# Passages that a first look at a configuration takes, at least, or a quarter of them; and as many of calibration.
SCREENED = 32


@click.command()
@options(model_options)
@click.option("--encrypt", "modules_text", required=True, metavar="MODULES", help="Heads to find configs for, or all.")
@click.option(
    "--recovered-kl",
    "wanted",
    default=0.95,
    show_default=True,
    help="Recovered KL that all these heads must keep together, by the sum of what each does alone.",
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
              help="Share of its KL that these two may cost a head, as simulation must show.")  # fmt: skip
@click.option("--simulated", default=64, show_default=True, type=click.IntRange(0), metavar="N",
              help="Passages, at most, that a chosen head reads in simulation for that, cut to --seq-len tokens; 0 "
                   "leaves error probability and rounding to the method.")  # fmt: skip
@click.option("--out", type=File(), metavar="FILE",
              help="Write the configs here, for --configs; rows go into FILE.rows as they are measured.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the rows of FILE.rows.")
@json_option
def tune(model: str, modules_text: str, wanted: float, names: str, bits: str, input_bits: str | None,
         weight_bits: str | None, activation_bits: str | None, rounding_threshold_bits: str | None,
         changes: tuple[str, ...], text: Path | None, limit: int | None, max_tokens: int | None,
         calibration: Path | None, seq_len: int, batch: int, scheduler: str | None, sweeps: tuple[Path, ...],
         p_errors: str, roundings: str, noise: float, simulated: int, out: Path | None, resume: bool,
         as_json: bool) -> None:  # fmt: skip
    """Find the cheapest configs of heads that keep most of what the heads do, and how to encrypt their lookups."""
    from jaxgpt2 import methods
    from jaxgpt2.encrypted import get_backend
    from jaxgpt2.evaluation import longest_passage
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.modules import Module, ModuleError, parse_modules
    from jaxgpt2.sweeps import tune as tuning
    from jaxgpt2.sweeps.runner import check
    from jaxgpt2.sweeps.store import SweepDirectory
    from jaxgpt2.sweeps.sweep import identity_of
    from weights.checkpoint import write_text_atomically

    if not wanted < 1:
        raise InputError(f"--recovered-kl must be below 1, got {wanted}: 1 is the float model itself")
    if out is not None and out.exists():
        raise InputError(f"{out} exists: give another --out, or remove it")
    if resume and out is None:
        raise InputError("--resume goes on with the rows beside --out FILE: give it")
    encryptions = parse_encryptions(p_errors, roundings)
    config = read_config(model)
    if modules_text == "all":
        modules_text = ",".join(
            f"{module[0]}.{module[1]}" for module in itertools.product(range(config.n_layer), range(config.n_head))
        )
    modules = parse_modules(modules_text, config)
    if any(module.head is None for module in modules):
        raise ModuleError("tune finds configs for single heads: name them, as 0.3")

    @functools.cache
    def loaded() -> tuple[Experiment, GPT2, tuning.Table]:
        """Texts, model and what was measured before, where something is measured."""
        experiment = make_experiment(model, text, limit, max_tokens, calibration, "1", seq_len,
                                     encryptions[0].rounding, batch)  # fmt: skip
        gpt2 = GPT2.from_pretrained(model)
        check(experiment, gpt2)
        if out is None:
            return experiment, gpt2, tuning.Table({})
        directory = SweepDirectory.open(Path(f"{out}.rows"), identity_of(experiment, gpt2), resume)
        return experiment, gpt2, tuning.Table(dict(directory.rows), directory)

    rows: list[dict[str, Any]] = []
    chosen = [methods.named(name.strip()) for name in names.split(",")]
    if sweeps:
        rows = [row for row in rows_of_sweeps(sweeps) if Module(row["layer"], row["head"]) in modules]
        chosen = sorted({row["attention"] for row in rows})
    simulable = [name for name in dict.fromkeys(chosen) if simulated and methods.get(name).by_lookups]
    try:  # what is not installed is said now, and not after all heads were measured
        for name in simulable:
            get_backend(methods.get(name).backend)
    except MissingExtra as error:
        raise InputError(f"{error}, or leave error probability and rounding to the method: --simulated 0") from None
    stopped = "stopped" + ("" if out is None else f"; the rows so far are in {out}.rows: --resume goes on")
    if not sweeps:
        widths, apart = parse_widths(bits, input_bits, weight_bits, activation_bits, rounding_threshold_bits)
        options = parse_grid_changes(changes)
        experiment, gpt2, table = loaded()
        with stoppable(stopped):
            with step("looking at the heads' spectra"):
                length = max(seq_len, longest_passage(gpt2, experiment.passages, max_tokens))
                configurations = tuning.candidates(
                    gpt2, modules, chosen, widths, options, apart, experiment.calibration, length
                )
            rows = tuning.search(
                configurations, wanted,
                lambda some: screen_rows(experiment, gpt2, table, some, scheduler),
                lambda some: final_rows(experiment, gpt2, table, some, scheduler, "configurations"),
            )  # fmt: skip
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
    tried: dict[str, list[Trial]] = {}
    own = {module: config for module, config in configs.items() if config.method in simulable}
    if own:
        experiment, gpt2, table = loaded()
        with stoppable(stopped), counting("heads simulated", len(own)) as progress:
            progress(0)
            encrypted = tuning.tune_encryption(
                gpt2, own, encryptions, experiment.passages[:simulated], experiment.calibration, seq_len, noise, table,
                cache_directory(None) / "calibrated", progress,
            )  # fmt: skip
        for module, (best, trials) in encrypted.items():
            configs[module] = dataclasses.replace(configs[module], encryption=best)
            tried[str(module)] = trials
    columns = ("recovered_kl", "kl", "kl_ablated", "head_error", "top_1", "refused", "pbs_count", "max_bit_width",
               "rotations", "products", "levels", "estimated_seconds", "estimated_seconds_per_token", "machine",
               "seq_len", "rounding")  # fmt: skip
    result = {
        "model": model,
        "wanted_recovered_kl": wanted,
        "modules": {
            str(module): config.to_json()
            | {"measured": {name: row[name] for name in columns if (row := found[str(module)]).get(name) is not None}}
            for module, config in configs.items()
        },
        "encryptions": {head: [dataclasses.asdict(each) for each in trials] for head, trials in tried.items()},
    }
    kept = result["recovered_kl"] = tuning.recovered(found.values())
    if out is not None:
        write_text_atomically(out, json.dumps(result, indent=2) + "\n")
        note(f"wrote {out}: for --configs of generate, compile, eval and sweep")
    lines = [
        f"head {module}: {describe_config(config)}: recovers {row['recovered_kl']:.4f}, "
        f"about {seconds(row['estimated_seconds'])} for {row['seq_len']} tokens, "
        f"{seconds(row['estimated_seconds_per_token'])} for one more ({row['machine']})"
        + (f"; {row['refused']} of {row['passages']} passages refused" if row.get("refused") else "")
        for module, config in configs.items()
        for row in (found[str(module)],)
    ]
    if len(found) > 1:
        lines.append(f"together they recover {kept:.4f}")
    if tried:
        lines += trial_lines(tried, seq_len)
    emit(as_json, result, lines)


def final_rows(experiment: Experiment, gpt2: GPT2, table: Table, configurations: Sequence[Configuration],
               scheduler: str | None, name: str) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of configurations; what is in the table is not measured again."""
    from jaxgpt2.sweeps.sweep import kind, measured

    missing = list({each.key: each for each in configurations if each.key not in table.rows}.values())
    if missing:
        with counting(name, len(missing)) as progress:
            progress(0, left=Counter(map(kind, missing)))
            for some in measured(experiment, missing, gpt2, scheduler, progress):
                table.add(some)
    return [table.rows[each.key] for each in configurations]


def screen_rows(experiment: Experiment, gpt2: GPT2, table: Table, configurations: Sequence[Configuration],
                scheduler: str | None) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of configurations, calibrated fast, on some of the text, and measured on some of the passages."""
    from jaxgpt2.sweeps.tune import screened

    some, text = (
        passages[: max(SCREENED, len(passages) // 4)] for passages in (experiment.passages, experiment.calibration)
    )
    fewer = dataclasses.replace(experiment, passages=some, calibration=text)
    own = table.under(f"first {len(some)} passages, calibrated on {len(text)}: ")
    return final_rows(fewer, gpt2, own, [screened(each) for each in configurations], scheduler, "screened")


def trial_lines(tried: Mapping[str, Sequence[Trial]], tokens: int) -> list[str]:
    """A table of what was tried for each head."""
    return [
        "",
        f"encrypted lookups, simulated on passages of {tokens} tokens; KL lost is a share of the head's, with bounds:",
        f"{'head':8}{'error per lookup':18}{'rounding':14}{'texts':>6}{'complexity':>12}{'KL lost':>10}",
        *(
            f"{head:8}{each.fhe_config.p_error:<18g}{each.fhe_config.rounding:14}"
            + (
                f"{each.texts:>6}{each.complexity:>12.2e}{each.lost:>10.4f}  {each.low:.4f} to {each.high:.4f}"
                if each.error is None
                else each.error
            )
            for head, trials in tried.items()
            for each in trials
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
        # A directory of tune also has rows of circuits, and of some of the passages.
        of_heads = {key: row for key, row in found.items() if key[:1].isdigit()}
        if strange := [key for key, row in of_heads.items() if not _is_of_a_head(row)]:
            raise InputError(f"{path} is no sweep of heads: {strange[0]!r:.80} is another row")
    return [row for key, row in rows.items() if key[:1].isdigit()]


def _is_of_a_head(row: dict[str, Any]) -> bool:
    """Whether a row, which may be anybody's JSON, has what is chosen by."""
    names = {"layer": int, "head": int, "attention": str, "key": str}
    if row.get("recovered_kl") is not None:
        numbers = ("kl", "kl_ablated", "recovered_kl", "estimated_seconds", "estimated_seconds_per_token")
        names |= dict.fromkeys(numbers, int | float) | {"machine": str, "seq_len": int}
    return all(isinstance(row.get(name), kind) for name, kind in names.items())
