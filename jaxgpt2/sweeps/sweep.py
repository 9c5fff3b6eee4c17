"""A whole sweep: rows measured into a directory, then its table and figures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import disassemble
from jaxgpt2.sweeps import cluster, plots
from jaxgpt2.sweeps.runner import Configuration, Experiment, SweepRunner, check
from jaxgpt2.sweeps.store import Row, SweepDirectory, require_extra


def fingerprint(gpt2: GPT2) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(disassemble(gpt2.model).items()):
        digest.update(name.encode())
        digest.update(np.asarray(tensor).tobytes())
    return digest.hexdigest()


def measured(
    experiment: Experiment, configurations: Sequence[Configuration], gpt2: GPT2, scheduler: str | None = None
) -> Iterator[list[Row]]:
    """Rows of configurations, here or (by the address of a Dask scheduler) on other machines, as they come."""
    if scheduler is None:
        return SweepRunner(experiment, gpt2).run(configurations)
    return cluster.run(scheduler, experiment, configurations)


def sweep(
    experiment: Experiment,
    configurations: Sequence[Configuration],
    path: Path,
    resume: bool = False,
    scheduler: str | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Any:
    """Measures configurations into a directory; when all are there, writes the table and figures.

    Args:
        path: a new directory, or with `resume` the one of this very sweep: rows that are there are not measured again.
        progress: is told how many rows more there are, first how many there were.

    Returns:
        the table, a pandas DataFrame.

    Raises:
        InputError: something given cannot be used; one line says what.
    """
    require_extra()
    gpt2 = GPT2.from_pretrained(experiment.model)
    check(experiment, gpt2)
    keys = [each.key for each in configurations]
    identity = experiment.identity() | {
        "weights": fingerprint(gpt2),
        "configurations": len(keys),
        "grid": hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest(),
    }
    directory = SweepDirectory.open(path, identity, resume)
    progress(len(directory.rows))
    missing = [each for each in configurations if each.key not in directory.rows]
    if missing:
        for rows in measured(experiment, missing, gpt2, scheduler):
            directory.append(rows)
            progress(len(rows))
    frame = directory.finish(keys)
    plots.draw(frame, path)
    return frame
