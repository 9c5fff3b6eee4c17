"""A sweep on other machines, through Dask: a task is a batch of configurations, and it may run twice without harm.

Every worker process loads the model by its name and reads the passages itself, once; rows come back as they are ready.
A worker that dies has its tasks done by another one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence

from jaxgpt2.errors import InputError
from jaxgpt2.sweep import Configuration, Experiment, Workbench, batches
from jaxgpt2.table import Row, need_extra

# Configurations of a task where the experiment leaves it open: what one worker's death costs.
TASK = 16

_busy = threading.Lock()


class ClusterError(InputError):
    """A scheduler that does not answer, or a task that no worker survives."""


@functools.lru_cache(maxsize=1)
def _workbench(experiment: Experiment) -> Workbench:
    return Workbench(experiment)


def measure(experiment: Experiment, configurations: Sequence[Configuration]) -> list[Row]:
    """On a worker: the rows of one batch. One batch at a time, for it uses all cores and devices."""
    with _busy:
        return [row for rows in _workbench(experiment).run(configurations) for row in rows]


def run(address: str, experiment: Experiment, configurations: Sequence[Configuration]) -> Iterator[list[Row]]:
    """Rows of configurations, in the order in which workers finish them.

    Args:
        address: of a Dask scheduler, as `tcp://host:8786`; its workers have this package and the model.

    Raises:
        MissingExtra: Dask is not there; ClusterError: the scheduler is not, or a batch killed several workers.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise need_extra(error, "--scheduler", "cluster") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address}: {error}") from None
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
