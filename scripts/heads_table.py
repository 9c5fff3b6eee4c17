"""All heads of a model in a row: what sweeps of one configuration a head recover together, at what cost.

    jaxgpt2 sweep --bits 4 --out runs/tiny-sweep
    python scripts/heads_table.py runs/tiny-sweep

Recovered KL of all heads is 1 - sum of KL / sum of KL without the head. A head that takes more than `--lookups` is
named, with the ranks that calibration found it to need.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click

from jaxgpt2.sweeps.store import read_rows
from jaxgpt2.sweeps.tune import recovered
from machine import environment, table


@click.command(help=__doc__)
@click.argument("directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--lookups", default=1500, show_default=True)
def main(directories: tuple[Path, ...], lookups: int) -> None:
    lines: list[tuple[str, ...]] = []
    for directory in directories:
        rows: list[dict[str, Any]] = list(read_rows(directory).values())
        names = {f"{row['layer']}.{row['head']}": row for row in rows}
        if len(names) < len(rows):
            raise click.ClickException(f"{directory} has several configurations of a head: wanted one of each")
        model = json.loads((directory / "sweep.json").read_text())["model"]
        kl = {name: row["recovered_kl"] for name, row in names.items()}
        worst = min(kl, key=kl.__getitem__)
        dear = [
            f"{name} ({row.get('score_rank_chosen')}, {row.get('value_rank_chosen')})"
            for name, row in names.items()
            if row["pbs_count"] > lookups
        ]
        lines.append((
            Path(model).name, str(len(names)), f"{recovered(rows):.3f}", f"{kl[worst]:.2f} ({worst})",
            f"{statistics.mean(row['pbs_count'] for row in rows):,.0f}", ", ".join(dear),
        ))  # fmt: skip
    click.echo(f"{environment('jax', 'numpy')}\n")
    header = (
        "model",
        "heads",
        "recovered KL",
        "worst head",
        "lookups, mean",
        f"heads of more than {lookups:,} (ranks)",
    )
    click.echo(table(header, lines))


if __name__ == "__main__":
    main()
