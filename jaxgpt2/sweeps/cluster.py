"""Sweeps on other machines, through Dask. Tasks may run twice without harm.

A task is a batch of configurations: every worker process loads the model by its name and reads the passages itself,
once; rows come back as they are ready. A worker that dies has its tasks done by another one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence

from jaxgpt2.executors.cluster import ClusterError, connect
from jaxgpt2.sweeps.runner import Configuration, Experiment, SweepRunner, batches
from jaxgpt2.sweeps.store import Row

# Configurations of a task where the experiment leaves it open: what one worker's death costs.
TASK = 16

_busy = threading.Lock()


@functools.lru_cache(maxsize=1)
def _runner(experiment: Experiment) -> SweepRunner:
    return SweepRunner(experiment)


def measure(experiment: Experiment, configurations: Sequence[Configuration]) -> list[Row]:
    """On a worker: the rows of one batch. One batch at a time, for it uses all cores and devices."""
    with _busy:
        return [row for rows in _runner(experiment).run(configurations) for row in rows]


def run(address: str, experiment: Experiment, configurations: Sequence[Configuration]) -> Iterator[list[Row]]:
    """Rows of configurations, in the order in which workers finish them.

    Args:
        address: see `connect`; its workers have the model too.

    Raises:
        MissingExtra, ClusterError: see `connect`; ClusterError too for a batch that killed several workers.
    """
    client = connect(address)
    from distributed import KilledWorker, as_completed

    with client:
        tasks = [
            client.submit(measure, experiment, batch, pure=False)
            for _, batch in batches(configurations, experiment.batch or TASK)
        ]
        try:
            for task in as_completed(tasks):
                yield task.result()
                task.release()
        except KilledWorker as error:
            raise ClusterError(f"several workers died over one batch, see their logs: {error}") from None
        finally:
            client.cancel(tasks)
