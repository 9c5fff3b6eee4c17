"""Sweeps and encrypted heads on other machines, through Dask. Tasks may run twice without harm.

A task of a sweep is a batch of configurations: every worker process loads the model by its name and reads the passages
itself, once; rows come back as they are ready. A task of an encrypted head is one call of its circuit: every worker
gets the circuit and the evaluation keys, once, and no secret key. A worker that dies has its tasks done by another one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fhe import Circuit, Keys
from jaxgpt2.decoding import LocalExecutor
from jaxgpt2.errors import InputError
from jaxgpt2.executors.processes import Parts, compute, parts_of
from jaxgpt2.sweeps.runner import Configuration, Experiment, SweepRunner, batches
from jaxgpt2.sweeps.store import Row, need_extra

# Configurations of a task where the experiment leaves it open: what one worker's death costs.
TASK = 16

_busy = threading.Lock()


class ClusterError(InputError):
    """A scheduler that does not answer, or a task that no worker survives."""


@functools.lru_cache(maxsize=1)
def _workbench(experiment: Experiment) -> SweepRunner:
    return SweepRunner(experiment)


def measure(experiment: Experiment, configurations: Sequence[Configuration]) -> list[Row]:
    """On a worker: the rows of one batch. One batch at a time, for it uses all cores and devices."""
    with _busy:
        return [row for rows in _workbench(experiment).run(configurations) for row in rows]


def connect(address: str) -> Any:
    """A client of the Dask scheduler at an address, as `tcp://host:8786`; its workers have this package.

    Raises:
        MissingExtra: Dask is not there; ClusterError: the scheduler is not.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise need_extra(error, "--scheduler", "cluster") from None
    try:
        return Client(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address}: {error}") from None


# --- sweeps -------------------------------------------------------------------------------------


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


# --- encrypted heads ----------------------------------------------------------------------------

# How often what a call needs may be lost with a worker before the call is given up.
LOSSES = 3


@dataclass(frozen=True)
class DaskExecutor(LocalExecutor):
    """A circuit whose functions run on the workers of a Dask cluster; the secret key stays here.

    Make it with `send`.
    """

    client: Any
    parts: Parts
    sent: list[Any]  # the future of parts on the workers; another one when its workers have died

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        from distributed import CancelledError, KilledWorker

        for _ in range(LOSSES):
            # Always the same worker while it lives: it has the keys loaded. Those of other heads are likely elsewhere.
            workers = sorted(self.client.scheduler_info(n_workers=-1)["workers"])
            if not workers:
                raise ClusterError("the Dask cluster has no workers: start some with `dask worker ADDRESS`")
            at = workers[int(self.circuit.id[:8], 16) % len(workers)]
            task = self.client.submit(
                compute, self.sent[0], name, arrays, pure=False, workers=[at], allow_other_workers=True, retries=2
            )
            try:
                return task.result()
            except KilledWorker as error:
                raise ClusterError(f"several workers died over {name}, see their logs: {error}") from None
            except CancelledError:  # no other worker had the parts yet
                self.sent[0] = scatter(self.client, self.parts)
        raise ClusterError(f"workers died {LOSSES} times over {name}, see their logs")


def scatter(client: Any, parts: Parts) -> Any:
    """A future of parts, for all workers of a cluster."""
    # In a list: a tuple would be taken apart, into futures that can be lost one by one.
    return client.scatter([parts], broadcast=True, hash=False)[0]


def send(client: Any, circuit: Circuit, keys: Keys) -> DaskExecutor:
    """Gives every worker of a cluster a circuit and its evaluation keys."""
    parts = parts_of(circuit, keys)
    return DaskExecutor(circuit, keys, client, parts, [scatter(client, parts)])
