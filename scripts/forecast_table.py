"""The table of docs/forecast.md: what circuits of this project would take on other machines.

python scripts/forecast_table.py
"""

from __future__ import annotations

from collections.abc import Mapping

import fhe
from jaxgpt2.forecast import PUBLISHED, forecasts
from jaxgpt2.progress import seconds
from machine import table

# {input bits: lookups} of six tokens at 4-bit activations, as `compile` reports: README.md and docs/zama-2023.md.
LAYER = {3: 18, 4: 540, 5: 23208, 6: 20130, 7: 288}
CIRCUITS: dict[str, Mapping[int, int]] = {
    "`lowrank`, head 0.1 of the bundled model": {5: 312, 6: 20},
    "`softmax` (Zama 2023), a head of GPT-2's shape": {5: 5940, 6: 5034, 7: 72},
    "`softmax`, the attention of a layer of the bundled model": LAYER,
    "`softmax`, the attention of its four layers": {bits: 4 * count for bits, count in LAYER.items()},
}


def table_of_forecasts() -> str:
    """A table in Markdown, a row for every circuit and machine."""
    rows: list[tuple[str, ...]] = []
    for name, lookups in CIRCUITS.items():
        here = fhe.Cost(pbs_by_stage={"": dict(lookups)})
        rows.append((name, here.machine, seconds(here.estimated_run_seconds), "estimated from times measured here"))
        for found in forecasts(lookups):
            took = f"none for lookups of {found.widest} bits" if found.seconds is None else seconds(found.seconds)
            rows.append(("", found.machine.machine, took, PUBLISHED))
    return table(("circuit, six tokens", "machine", "time", ""), rows)


if __name__ == "__main__":
    print(table_of_forecasts())
