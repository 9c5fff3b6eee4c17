"""Attention methods in one table: what each does to heads over bits, and what it costs encrypted.

    python scripts/attention_table.py                                      # the package's and examples/attention
    python scripts/attention_table.py ./mine.py:mine softmax --bits 4,6    # these
    python scripts/attention_table.py --encrypted 120                      # and run each that takes no longer

Fidelity is the recovered KL of the heads, each replaced alone: 1 - sum of KL / sum of KL without the head (see
`jaxgpt2 eval`). Costs are those of the first head at `--run-bits`: the lookups of a text, and the seconds of its last
token alone, estimated and measured. Beside the measured ones stands how far the decrypted output of that token is from
the one in clear integers, ||difference|| / ||output||: methods round approximately unless they say otherwise.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np

import fhe
from jaxgpt2 import methods
from jaxgpt2.calibration import HiddenStates
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.executors import LocalExecutor
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module, parse_modules
from jaxgpt2.progress import counting, note
from jaxgpt2.sweeps.runner import Experiment, SweepRunner, grid
from jaxgpt2.sweeps.tune import recovered
from machine import environment, table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "attention"
KNOWN = ("softmax", *(f"{path}:{path.stem}" for path in sorted(EXAMPLES.glob("*.py"))))


def run_encrypted(gpt2: GPT2, method: str, head: str, bits: int, tokens: int) -> tuple[float, float]:
    """Seconds that the last token of a text takes on ciphertexts, and how far its output is from that in the clear."""
    calibration = bundled_passages("calibration")
    encrypted = EncryptedGPT2.encrypt(gpt2, head, MethodConfig.of(method, bits)).calibrate(calibration, tokens)
    encrypted = encrypted.compile(calibration, tokens, backend="concrete")
    (module,) = encrypted.modules
    function, quantized, circuit = encrypted.function(module), encrypted.quantized[module], encrypted.circuits[module]
    inputs = HiddenStates.read(gpt2, calibration, tokens).at(gpt2, module.layer).inputs(gpt2)
    x = function.samples(quantized, [next(x for x in inputs if len(x) == tokens)])[0]
    executor = LocalExecutor(circuit, circuit.make_keys())
    _, cache = function.strategy.read(quantized.client, executor, x[:-1], None, tokens)
    started = time.perf_counter()
    results, _ = function.strategy.read(quantized.client, executor, x[-1:], cache, tokens)
    seconds = time.perf_counter() - started
    whole = function.strategy.whole(fhe.NumpyOps(), quantized.params, x)
    wanted = np.asarray(function.decode(quantized.dequantization, tuple(jnp.asarray(part[-1:]) for part in whole)))
    found = np.asarray(function.decode(quantized.dequantization, tuple(map(jnp.asarray, results))))
    return seconds, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--heads", default="all", show_default=True, metavar="L.H[,L.H...]|all")
@click.option("--bits", default="3,4,6,8", show_default=True, help="Widths whose fidelity is measured.")
@click.option("--run-bits", default=4, show_default=True, help="Width whose cost counts; one of them.")
@click.option("--tokens", default=6, show_default=True, help="Of the text whose cost counts.")
@click.option("--limit", default=120, show_default=True, help="Evaluation passages.")
@click.option("--encrypted", "longest_run", default=0.0, metavar="SECONDS",
              help="Run each method on Concrete whose last token takes no longer, as estimated.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], heads: str, bits: str, run_bits: int, tokens: int, limit: int, longest_run: float,
         as_json: bool) -> None:  # fmt: skip
    gpt2 = GPT2.from_pretrained("tiny")
    chosen, widths = [methods.named(name) for name in names or KNOWN], [int(width) for width in bits.split(",")]
    every = itertools.product(range(gpt2.config.n_layer), range(gpt2.config.n_head))
    modules = parse_modules(heads, gpt2.config) if heads != "all" else tuple(itertools.starmap(Module, every))
    passages = tuple(bundled_passages("eval")[:limit])
    experiment = Experiment("tiny", passages, tuple(bundled_passages("calibration")), (1,), seq_len=tokens, batch=1)
    configurations, found = grid(modules, chosen, widths, {}), []
    with counting("configurations", len(configurations)) as progress:
        progress(0)
        for rows in SweepRunner(experiment, gpt2).run(configurations):
            found += rows
            progress(len(rows))
    found_methods: list[dict[str, Any]] = []
    for name in chosen:
        own = [row for row in found if row["attention"] == name and "error" not in row]
        row: dict[str, Any] = {"method": name}
        for width in widths:
            some = [each for each in own if each["activation_bits"] == width]
            row[f"recovered_kl_{width}"] = recovered(some)
        first = next(
            each
            for each in own
            if each["activation_bits"] == run_bits
            and (each["layer"], each["head"]) == (modules[0].layer, modules[0].head)
        )
        row |= {key: first[key] for key in ("pbs_count", "estimated_seconds", "estimated_seconds_per_token", "machine")}
        if first["estimated_seconds_per_token"] <= longest_run:
            row["measured_seconds_per_token"], row["decrypted_error"] = run_encrypted(
                gpt2, name, str(modules[0]), run_bits, tokens
            )
        note(f"{row}")
        found_methods.append(row)
    if as_json:
        click.echo(json.dumps(found_methods))
        return
    click.echo(f"heads {heads} of tiny, {len(passages)} passages; {environment('jax', 'numpy', 'concrete-python')}\n")
    header = (
        "recovered KL", *(f"{width} bits" for width in widths), f"lookups, {tokens} tokens", "last token, s estimated",
        "measured", "decrypted, off by",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for row in found_methods:
        seconds = row.get("measured_seconds_per_token")
        lines.append((
            row["method"].partition("@")[0].rpartition(":")[2],
            *(f"{row[f'recovered_kl_{width}']:.3f}" for width in widths),
            f"{row['pbs_count']:,}",
            f"{row['estimated_seconds_per_token']:.1f}",
            "" if seconds is None else f"{seconds:.1f}",
            "" if seconds is None else f"{row['decrypted_error']:.3f}",
        ))  # fmt: skip
    click.echo(table(header, lines))


if __name__ == "__main__":
    main()
