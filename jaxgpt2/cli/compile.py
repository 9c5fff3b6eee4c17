"""The command `compile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import (
    Directory,
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
    model_options,
    module_options,
    modules_of,
    options,
    total_cost,
)
from jaxgpt2.errors import InputError
from jaxgpt2.progress import note, seconds, step

if TYPE_CHECKING:
    from fhe import RunCost
    from jaxgpt2.encrypted import EncryptedGPT2
    from jaxgpt2.forecast import Forecast


@click.command("compile")
@options(model_options, module_options, compile_options)
@click.option("--seq-len", type=click.IntRange(1), default=6, show_default=True, help="Longest text, in tokens.")
@click.option("--out", type=Directory(), metavar="DIR",
              help="Write server bundle, client bundle and report here.")  # fmt: skip
@json_option
def compile_command(calibration: Path | None, backend: str | None, p_error: float | None, rounding: str | None,
                    cache: Path | None, seq_len: int, out: Path | None, as_json: bool,
                    **chosen: Any) -> None:  # fmt: skip
    """Compile the encrypted modules, and say what they cost."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory: give another --out, or remove it")
    if chosen["modules"] == linear.LINEAR:
        linear.refuse_unused(backend=backend, p_error=p_error, rounding=rounding, cache=cache)
        linear.compile_linear(out, as_json, chosen | {"calibration": calibration})
        return
    cache = cache_directory(cache)
    with step("loading the model"):
        encrypted = make_encrypted(**chosen, backend=backend)
    fhe_configs = make_fhe_configs(encrypted, p_error, rounding)
    passages = calibration_passages(calibration)
    encrypted = calibrated(encrypted, passages, seq_len, cache)
    encrypted = compiled(encrypted, passages, seq_len, fhe_configs, backend, cache)
    result = compile_result(encrypted, seq_len)
    lines = cost_lines(result, describe(encrypted))
    lines += [found.describe() for found in elsewhere(total_cost(encrypted.costs(seq_len)))]
    if out is not None:
        from jaxgpt2.serving.models import write_bundles

        result["bundle"] = write_bundles(encrypted, out, result)
        note(f"wrote {out / 'server'}, with the weights of {result['modules']}, and {out / 'client'}, without them")
    emit(as_json, result, lines)


def compile_result(encrypted: EncryptedGPT2, seq_len: int) -> dict[str, Any]:
    """The cost of all compiled modules together, and each one's own report."""
    from fhe import Report

    reports = [circuit.report for circuit in encrypted.circuits.values()]
    cost = total_cost(encrypted.costs(seq_len))
    if all(isinstance(report, Report) for report in reports):
        own = {
            "complexity": sum(report.complexity for report in reports),
            "p_error": max(report.p_error for report in reports),
            "rounding": reports[0].rounding,
        }
    else:
        facts = [report.to_json() for report in reports]
        own = {
            name: max(each[name] for each in facts)
            for name in (
                "security_bits",
                "poly_modulus_degree",
                "modulus_bits",
                "scale_bits",
                "levels",
                "rotation_keys",
            )
        }
    return {
        **modules_of(encrypted),
        "seq_len": encrypted.seq_len,
        "backend": reports[0].backend,
        **cost.to_json(),
        **own,
        "cost": cost.describe(),
        "machine": cost.machine,
        "forecasts": [found.to_json() for found in elsewhere(cost)],
        "noise": reports[0].noise,
        "evaluation_key_bytes": sum(report.evaluation_key_bytes for report in reports),
        "evaluation_key_source": reports[0].evaluation_key_source,
        "compile_seconds": sum(report.compile_seconds for report in reports),
        "versions": reports[0].versions,
        "reports": {str(module): circuit.report.to_json() for module, circuit in encrypted.circuits.items()},
    }


def elsewhere(cost: RunCost) -> list[Forecast]:
    """What other machines would take by published times, where there are lookups to count."""
    from fhe import Cost
    from jaxgpt2.forecast import forecasts

    return forecasts(cost.pbs_by_bit_width) if isinstance(cost, Cost) else []


def cost_lines(cost: dict[str, Any], configs: str) -> list[str]:
    """A cost report for people."""
    megabyte = 1e6
    lines = [f"{cost['modules']}, {configs}, {cost['seq_len']} tokens, backend {cost['backend']}", ""]
    if "pbs_by_stage" in cost:
        widths = sorted({int(bits) for counts in cost["pbs_by_stage"].values() for bits in counts})
        lines += stage_lines("lookups (PBS) by bits", cost["pbs_by_stage"], list(map(str, widths)))
        rounding = cost["rounding"] + (f" ({cost['noise']})" if cost["noise"] else "")
        facts = [
            f"complexity            {cost['complexity']:.3g}",
            f"error per lookup      {cost['p_error']:g}",
            f"rounding              {rounding}",
        ]
    else:
        kinds = sorted({kind for counts in cost["stages"].values() for kind in counts})
        lines += stage_lines("operations", cost["stages"], kinds)
        facts = [
            f"parameters            poly_modulus_degree {cost['poly_modulus_degree']}, {cost['levels']} levels of "
            f"{cost['scale_bits']} bits, "
            f"{cost['modulus_bits']} bits of moduli, {cost['security_bits']}-bit security",
            f"noise                 {cost['noise']}",
        ]
    kept = {"compiler": " in memory; sent compressed", "estimated": ", about"}.get(cost["evaluation_key_source"], "")
    return [
        *lines,
        "",
        *facts,
        f"evaluation keys       {cost['evaluation_key_bytes'] / megabyte:,.1f} MB{kept}",
        f"ciphertexts           {cost['input_ciphertext_bytes'] / megabyte:,.2f} MB in, "
        f"{cost['output_ciphertext_bytes'] / megabyte:,.2f} MB out",
        f"compiled in           {seconds(cost['compile_seconds'])}",
        f"a run takes about     {seconds(cost['estimated_run_seconds'])} ({cost['machine']})",
    ]


def stage_lines(title: str, stages: Mapping[str, Mapping[str, int]], columns: Sequence[str]) -> list[str]:
    """A table of counts: a row for every stage, a column for everything counted, and sums."""
    sizes = [max(8, len(name) + 2) for name in columns]

    def row(name: str, counts: Mapping[str, int]) -> str:
        cells = "".join(f"{counts.get(column, 0) or '':>{size}}" for column, size in zip(columns, sizes, strict=True))
        return f"{name:24}{cells}{sum(counts.values()):>9,}"

    total = {column: sum(counts.get(column, 0) for counts in stages.values()) for column in columns}
    head = "".join(f"{name:>{size}}" for name, size in zip(columns, sizes, strict=True))
    return [f"{title:24}{head}{'all':>9}", *(row(stage, counts) for stage, counts in stages.items()), row("all", total)]
