"""Which method, at how many bits, for one head? A table, and its figures.

python examples/sweep.py --out sweep          # a minute; needs the extras sweep and ckks
"""

from __future__ import annotations

from pathlib import Path

import click

from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.methods import MethodConfig
from jaxgpt2.modules import Module
from jaxgpt2.sweeps.runner import Configuration, Experiment
from jaxgpt2.sweeps.sweep import sweep


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("sweep"), show_default=True)
@click.option("--passages", default=40, show_default=True, help="How many texts are read.")
def main(out: Path, passages: int) -> None:
    head = Module(layer=0, head=1)
    configurations = [
        Configuration(head, MethodConfig.of(method, bits)) for method in ("softmax", "lowrank") for bits in (3, 4, 5, 6)
    ]
    # Its numbers are not integers, so widths do not concern it.
    configurations.append(Configuration(head, MethodConfig.of("polynomial", 4)))
    # Calibration text is never the evaluation text.
    experiment = Experiment("tiny", tuple(bundled_passages("eval")[:passages]), tuple(bundled_passages("calibration")))
    table = sweep(experiment, configurations, out)
    columns = ["attention", "activation_bits", "top_1", "recovered_kl", "estimated_seconds_per_token"]
    click.echo(table[columns].round(3).to_string(index=False))
    click.echo(f"\nFigures and table are in {out}.")


if __name__ == "__main__":
    main()
