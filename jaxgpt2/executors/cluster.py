"""Encrypted modules on the workers of a Dask cluster. Tasks may run twice without harm.

A task is one call of a circuit: every worker gets the circuit and the evaluation keys, once, and no secret key. A
worker that dies has its tasks done by another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fhe import Circuit, Keys
from jaxgpt2.errors import InputError, MissingExtra
from jaxgpt2.executors import LocalExecutor
from jaxgpt2.executors.processes import Parts, compute, parts_of


class ClusterError(InputError):
    """A scheduler that does not answer, or a task that no worker survives."""


def connect(address: str) -> Any:
    """A client of the Dask scheduler at an address, as `tcp://host:8786`; its workers have this package.

    Raises:
        MissingExtra: Dask is not there; ClusterError: the scheduler is not.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtra(error, "--scheduler", "cluster") from None
    try:
        return Client(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"no Dask scheduler answers at {address}: {error}") from None


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
            # Always the same worker while it lives: it has the keys loaded. Other modules' are likely elsewhere.
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
                raise ClusterError(f"several workers died while they ran {name}, see their logs: {error}") from None
            except CancelledError:  # no other worker had the parts yet
                self.sent[0] = scatter(self.client, self.parts)
        raise ClusterError(f"workers died {LOSSES} times while they ran {name}, see their logs")


def scatter(client: Any, parts: Parts) -> Any:
    """A future of parts, for all workers of a cluster."""
    # In a list: a tuple would be taken apart, into futures that can be lost one by one.
    return client.scatter([parts], broadcast=True, hash=False)[0]


def send(client: Any, circuit: Circuit, keys: Keys) -> DaskExecutor:
    """Gives every worker of a cluster a circuit and its evaluation keys."""
    parts = parts_of(circuit, keys)
    return DaskExecutor(circuit, keys, client, parts, [scatter(client, parts)])
