"""A whole sweep: rows measured into a directory, then its table and figures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import Evaluation, evaluate
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module
from jaxgpt2.progress import Counting
from jaxgpt2.sweeps import cluster, plots
from jaxgpt2.sweeps.runner import Configuration, Experiment, SweepRunner, check
from jaxgpt2.sweeps.store import Row, SweepDirectory, require_extra


def kind(configuration: Configuration) -> str:
    """What takes about the same time: the same method, with as much of the model after it."""
    return f"{configuration.config.method} {configuration.module.layer}"


def measured(
    experiment: Experiment,
    configurations: Sequence[Configuration],
    gpt2: GPT2,
    scheduler: str | None,
    progress: Counting,
) -> Iterator[list[Row]]:
    """Rows of configurations, here or (by the address of a Dask scheduler) on other machines, as they come.

    progress: is told of every row, of a half when it is calibrated.
    """
    by_key = {each.key: each for each in configurations}
    halves: set[str] = set()

    def calibrated(each: Configuration) -> None:
        halves.add(each.key)
        progress(0.5, kind(each))

    if scheduler is None:
        found = SweepRunner(experiment, gpt2).run(configurations, calibrated)
    else:
        found = cluster.run(scheduler, experiment, configurations)
    for rows in found:
        yield rows
        for row in rows:
            progress(0.5 if row["key"] in halves else 1, kind(by_key[row["key"]]))


def identity_of(experiment: Experiment, gpt2: GPT2) -> Row:
    """What must be equal for rows to belong into one table, whatever their configurations."""
    return experiment.identity() | {"weights": gpt2.fingerprint()}


def sweep(
    experiment: Experiment,
    configurations: Sequence[Configuration],
    path: Path,
    resume: bool = False,
    scheduler: str | None = None,
    progress: Counting = lambda count, kind="", left=None: None,
) -> Any:
    """Measures configurations into a directory; when all are there, writes the table and figures.

    Args:
        path: a new directory, or with `resume` the one of this very sweep: rows that are there are not measured again.
        progress: is told of rows, first how many there were.

    Returns:
        the table, a pandas DataFrame.

    Raises:
        InputError: something given cannot be used; one line says what.
    """
    require_extra()
    gpt2 = GPT2.from_pretrained(experiment.model)
    check(experiment, gpt2)
    keys = [each.key for each in configurations]
    identity = identity_of(experiment, gpt2) | {
        "configurations": len(keys),
        "grid": hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest(),
    }
    directory = SweepDirectory.open(path, identity, resume)
    missing = [each for each in configurations if each.key not in directory.rows]
    progress(len(directory.rows), left=Counter(map(kind, missing)))
    if missing:
        for rows in measured(experiment, missing, gpt2, scheduler, progress):
            directory.append(rows)
    frame = directory.finish(keys)
    plots.draw(frame, path)
    return frame


def together(
    experiment: Experiment, configs: Mapping[Module, MethodConfig], gpt2: GPT2, cache: Path | None = None
) -> Evaluation:
    """Modules that are all quantized at the same time.

    cache: see `EncryptedGPT2.calibrate`.
    """
    longest = check(experiment, gpt2)
    encrypted = EncryptedGPT2(gpt2, configs).calibrate(experiment.calibration, max(longest, experiment.seq_len), cache)
    return evaluate(encrypted, experiment.passages, encrypted.runner("quantized"), experiment.ks, longest)
