"""Encrypted modules in other processes: what one needs to compute with a circuit, and processes of this machine.

An engine that computes on one core, and holds Python's lock while it does, computes the modules of a layer one after
the other in one process. In several, each module has a core.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fhe import Circuit, Keys, get_backend, register_functions
from jaxgpt2.errors import InputError
from jaxgpt2.executors import LocalExecutor

K = TypeVar("K")


class ProcessDied(InputError):
    """A process that computed for this one ended before it was done."""


class Parts(NamedTuple):
    """What a worker needs of a circuit: its saved files, the functions that they may name, and what the client sends a
    server."""

    identity: str
    backend: str
    files: tuple[tuple[str, bytes], ...]
    functions: tuple[Callable[..., Any], ...]
    evaluation: bytes


def parts_of(circuit: Circuit, keys: Keys) -> Parts:
    from jaxgpt2 import methods  # a server imports this module, and does without JAX

    with tempfile.TemporaryDirectory() as directory:
        circuit.save(directory)
        files = tuple((path.name, path.read_bytes()) for path in sorted(Path(directory).iterdir()))
    return Parts(circuit.id, circuit.report.backend, files, methods.bodies(), keys.evaluation)


# On a worker --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _loaded(identity: str, backend: str, files: tuple[tuple[str, bytes], ...]) -> Circuit:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files:
            (Path(directory) / name).write_bytes(content)
        return get_backend(backend).load(directory)


def compute(parts: Parts, name: str, arrays: Sequence[bytes]) -> list[bytes]:
    """One call of a circuit's function."""
    register_functions(*parts.functions)
    return _loaded(parts.identity, parts.backend, parts.files).run(name, arrays, parts.evaluation)


# Parts that came when the process started: they are large, and needed in every call.
_parts: dict[str, Parts] = {}


def _start(parts: Sequence[Parts]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that started them decides
    _parts.update({each.identity: each for each in parts})


def _compute(identity: str, name: str, arrays: Sequence[bytes]) -> list[bytes]:
    return compute(_parts[identity], name, arrays)


# On this side -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessPoolExecutor(LocalExecutor):
    """A circuit whose functions run in another process of this machine; the secret key stays here."""

    pool: futures.ProcessPoolExecutor

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        try:
            return self.pool.submit(_compute, self.circuit.id, name, arrays).result()
        except BrokenProcessPool:
            raise ProcessDied(
                f"a process died while it ran {name}: is there too little memory to compute on several cores?"
            ) from None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def over_cores(circuits: Mapping[K, Circuit], keys: Mapping[K, Keys], at_once: int) -> Iterator[dict[K, LocalExecutor]]:
    """Executors that compute so many circuits at the same time: in processes, where the engine uses one core.

    The processes are spawned: a script that calls this needs the usual `if __name__ == "__main__":`.

    at_once: circuits that are called at the same time, next to each other in `circuits`.
    """
    number = min(at_once, cores())
    if number < 2 or any("cores" in get_backend(circuit.report.backend).offers for circuit in circuits.values()):
        yield {name: LocalExecutor(circuit, keys[name]) for name, circuit in circuits.items()}
        return
    names = list(circuits)
    with ExitStack() as stack:
        pools = []
        for first in range(number):
            parts = [parts_of(circuits[name], keys[name]) for name in names[first::number]]
            pools.append(
                stack.enter_context(
                    futures.ProcessPoolExecutor(
                        1, multiprocessing.get_context("spawn"), initializer=_start, initargs=(parts,)
                    )
                )
            )
        yield {
            name: ProcessPoolExecutor(circuits[name], keys[name], pools[index % number])
            for index, name in enumerate(names)
        }
