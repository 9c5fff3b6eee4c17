"""Who calls the functions of a compiled circuit: a simulation, this process, other processes, a cluster, a server.

A strategy hands an executor what it got from it before: arrays, ciphertexts, or names of ciphertexts that stay on a
server. It looks into none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import fhe


class StateLost(Exception):
    """A server has lost what it kept of a text: the text is to be read again from its beginning."""


class Executor(Protocol):
    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        """The client's inputs of a function, in order."""
        ...

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        """All results of a function, of the client's inputs and results of other runs."""
        ...

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        """Some results of a function in clear, in the order given.

        Raises:
            StateLost: the results that this one depends on are not there any more.
        """
        ...


@dataclass(frozen=True)
class SimulatedExecutor:
    """A circuit's functions on clear numbers."""

    circuit: fhe.Circuit

    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        return arrays

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        return self.circuit.simulate(name, *arrays)

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        return results


@dataclass(frozen=True)
class LocalExecutor:
    """A circuit's functions on ciphertexts: client and server in one process."""

    circuit: fhe.Circuit
    keys: fhe.Keys

    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        return self.circuit.encrypt(self.keys, name, *arrays)

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        return self.circuit.run(name, arrays, self.keys.evaluation)

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        return self.circuit.decrypt(self.keys, name, results)
