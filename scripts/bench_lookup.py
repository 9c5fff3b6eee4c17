"""Measures what a lookup (programmable bootstrap) costs on this machine, by the bits of its input.

    python scripts/bench_lookup.py
    python scripts/bench_lookup.py --out fhe/tfhe/lookup_times.json   # replaces the table that estimates are made from

The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import fhe
from machine import environment, processor, table
from weights.checkpoint import write_text_atomically


def lookups(ops: Any, params: fhe.LookupTable, x: Any) -> tuple[Any, ...]:
    return (ops.lookup(params, x),)


def milliseconds(bits: int, at_a_time: int, p_error: float, repeats: int) -> float:
    """Of one lookup among so many: the median of a few runs on ciphertexts."""
    table = fhe.LookupTable.build(lambda x: 2**bits - 1 - x, 0, 2**bits - 1)
    random = np.random.default_rng(0)
    x = random.integers(0, 2**bits, at_a_time)
    x[:2] = 0, 2**bits - 1
    functions = {"lookups": fhe.Function(lookups, [(x,)])}
    circuit = fhe.get_backend("concrete").compile(functions, table, fhe.FHEConfig(p_error, "none"))
    keys = circuit.make_keys()
    sent, evaluation = circuit.encrypt(keys, "lookups", x), keys.evaluation
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        circuit.run("lookups", sent, evaluation)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1000 / at_a_time  # the first one loads the keys


@click.command(help=__doc__)
@click.option("--bits", default=8, show_default=True, help="The widest lookup.")
@click.option("--at-a-time", default=64, show_default=True, help="Lookups of one run.")
@click.option("--p-error", default=1e-5, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the table as JSON.")
def main(bits: int, at_a_time: int, p_error: float, repeats: int, out: Path | None) -> None:
    times = {}
    for width in range(1, bits + 1):
        times[str(width)] = round(milliseconds(width, at_a_time, p_error, repeats), 2)
        print(f"{width} bits: {times[str(width)]} ms", file=sys.stderr)
    report = {
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "versions": {"concrete-python": version("concrete-python")},
        "date": str(datetime.date.today()),
        "p_error": p_error,
        "security_bits": 128,
        "at_a_time": at_a_time,
        "milliseconds": times,
    }
    if out is not None:
        write_text_atomically(out, json.dumps(report, indent=2) + "\n")
    print(f"milliseconds a lookup, {at_a_time} at a time, p_error {p_error:g}; {environment('concrete-python')}\n")
    print(table(("bits", *times), [("milliseconds", *map(str, times.values()))]))


if __name__ == "__main__":
    main()
