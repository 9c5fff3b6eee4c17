"""Every head of a model with every attention formula: what is recovered, and what it would cost encrypted.

    python scripts/compare_formulas.py --bits 4 --lookup-bits 6 --seq-len 6

Lookups are counted by the clear backend, as Concrete would charge them.
"""

from __future__ import annotations

import click
import numpy as np

import fhe
from jaxgpt2.attention import Recipe
from jaxgpt2.cli import calibration_passages, model_options
from jaxgpt2.evaluation import evaluate, longest_passage, read_passages
from jaxgpt2.gpt2 import GPT2
from jaxgpt2.hybrid import HybridGPT2
from jaxgpt2.quantize import Bits
from machine import environment
from weights.checkpoint import TINY


@click.command(help=__doc__)
@model_options
@click.option("--attention", "formulas", default="softmax,lowrank", show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option("--lookup-bits", type=int, default=6, show_default=True)
@click.option("--seq-len", default=6, show_default=True, help="Tokens, for the cost.")
def main(model: str, formulas: str, bits: int, lookup_bits: int, seq_len: int) -> None:
    gpt2 = GPT2.from_pretrained(model)
    passages, calibration = read_passages(TINY / "eval.txt"), calibration_passages(None)
    longest = max(longest_passage(HybridGPT2.protect(gpt2, "0.0", Recipe.of("softmax", bits)), passages), seq_len)
    heads = [f"{layer}.{head}" for layer in range(gpt2.config.n_layer) for head in range(gpt2.config.n_head)]
    click.echo(f"{len(heads)} heads of {model}, {bits} bits, lookups of {lookup_bits}; {environment('jax', 'numpy')}")
    click.echo(f"{'':10}{'recovered KL':>14}{'worst head':>12}{'head error':>12}{'lookups':>10}{'about':>9}")
    for formula in formulas.split(","):
        measured, reports = [], []
        for head in heads:
            hybrid = HybridGPT2.protect(gpt2, head, Recipe.of(formula, Bits.of(bits, lookup_bits)))
            hybrid = hybrid.calibrate(calibration, longest)
            measured.append(evaluate(hybrid, passages, hybrid.engine("quantized")))
            compiled = hybrid.calibrate(calibration, seq_len).compile(
                calibration, seq_len, fhe.Settings(rounding="approximate"), backend="clear"
            )
            reports += [circuit.report for circuit in compiled.circuits.values()]
        recovered = 1 - sum(m.kl for m in measured) / sum(m.kl_ablated for m in measured)
        worst = min(m.recovered_kl for m in measured)
        error = np.mean([m.head_error for m in measured])
        lookups = np.mean([report.pbs_count for report in reports])
        run = np.mean([report.estimated_run_seconds for report in reports])
        click.echo(f"{formula:10}{recovered:>14.3f}{worst:>12.3f}{error:>12.3f}{lookups:>10,.0f}{run:>7.0f} s")


if __name__ == "__main__":
    main()
