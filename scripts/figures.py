"""Draws the figures of README and documentation from a sweep's table.

jaxgpt2 sweep --layers all --heads all --bits 2-6 --attention softmax,lowrank,polynomial --top-k 1 --out sweep
python scripts/figures.py sweep/rows.csv --out docs/figures
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd

from jaxgpt2.sweeps import plots


@click.command(help=__doc__)
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("docs/figures"), show_default=True
)
@click.option("--kind", type=click.Choice(["svg", "png"]), default="svg", show_default=True)
def main(table: Path, out: Path, kind: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in plots.draw(pd.read_csv(table).convert_dtypes(), out, kind):
        click.echo(out / name)


if __name__ == "__main__":
    main()
