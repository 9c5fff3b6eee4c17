"""What a circuit of lookups would take on other machines, from published times of one lookup.

`forecast.json` has the times, with their sources. Nothing in it was measured by this project, and every line that is
made of it says so. There is no forecast for CKKS: no source that was read gives the times of its operations by level.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt2.progress import seconds as in_words

PUBLISHED = "published, not measured here"


@dataclass(frozen=True)
class Machine:
    """Published times of a lookup.

    milliseconds: by the bits of its input. operation: what exactly they are times of.
    """

    machine: str
    operation: str
    milliseconds: Mapping[int, float]
    year: str
    source: str


@functools.cache
def machines() -> tuple[Machine, ...]:
    """All machines of `forecast.json`."""
    entries = json.loads(Path(__file__).with_name("forecast.json").read_text(encoding="utf-8"))
    return tuple(
        Machine(**entry | {"milliseconds": {int(bits): ms for bits, ms in entry["milliseconds"].items()}})
        for entry in entries
    )


@dataclass(frozen=True)
class Forecast:
    """What a machine would take.

    seconds: None if no time is published for lookups of `widest` bits, the widest that the circuit needs.
    """

    machine: Machine
    seconds: float | None
    widest: int

    def describe(self) -> str:
        """One line."""
        if self.seconds is None:
            return f"{PUBLISHED}: no time of lookups of {self.widest} bits on {self.machine.machine}"
        return f"{PUBLISHED}: {in_words(self.seconds)} on {self.machine.machine}"

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        known = {name: getattr(self.machine, name) for name in ("machine", "operation", "year", "source")}
        return {**known, "note": PUBLISHED, "seconds": self.seconds, "widest": self.widest}


def forecast(lookups: Mapping[int, int], machine: Machine) -> Forecast:
    """What a machine takes for lookups, {input bits: count}.

    A lookup takes the time of the narrowest published width that holds it.
    """
    widest, total = max(lookups, default=0), 0.0
    for bits, count in lookups.items():
        wide_enough = [width for width in machine.milliseconds if width >= bits]
        if not wide_enough:
            return Forecast(machine, None, widest)
        total += count * machine.milliseconds[min(wide_enough)] / 1000
    return Forecast(machine, total, widest)


def forecasts(lookups: Mapping[int, int]) -> list[Forecast]:
    """What every machine takes."""
    return [forecast(lookups, machine) for machine in machines()]
