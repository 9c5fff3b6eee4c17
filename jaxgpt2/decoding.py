"""How a protected head reads a text: the functions that its circuit has, and the order in which they are called.

A `Reading` is one way to do it; a `Reader` does it for one text after the other, with what a client knows and a `Executor`
that encrypts, runs and decrypts: by simulation, in this process, or on a server. What a reader gets from its party and
hands back to it may be anything: arrays, ciphertexts, or the names of ciphertexts that stay on the server.

Shapes: T tokens, C width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import fhe
from jaxgpt2.errors import InputError
from jaxgpt2.quantize import quantize

if TYPE_CHECKING:
    from jaxgpt2.methods.method import QuantizedFunction, QuantizedModule

# A circuit of lookups has room for the values that its input set reaches, and beyond them it is wrong without notice.
# So the calibration inputs go into it a second time, this much larger.
STRETCH = 1.1


class NotReady(InputError):
    """A mode that needs `calibrate` or `compile` first, or heads made for longer texts."""


class Executor(Protocol):
    """Who calls a circuit's functions."""

    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        """The client's inputs of a function, in order."""
        ...

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        """All results of a function, of the client's inputs and results of other runs."""
        ...

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        """Some results of a function in clear, in the order given."""
        ...


class Reader(Protocol):
    """Reads texts with one head. What must be remembered of a text is in the reader, so it has one user at a time."""

    def read(self, x: np.ndarray) -> list[np.ndarray]:
        """The results of all rows of a text of integers (T, C): integer arrays (T, ...), for `QuantizedFunction.decode`.

        Raises:
            NotReady: the text is longer than the circuit; fhe.FHEError: decrypted numbers that cannot be right.
        """
        ...


class Reading(Protocol):
    """A way to take texts through a circuit. Hashable: it is part of a program, and programs are compiled in JAX.

    `length` is the longest text that the circuit reads.
    """

    def functions(
        self, program: QuantizedFunction, calibrated: QuantizedModule, inputs: Sequence[np.ndarray], length: int
    ) -> dict[str, fhe.Function]:
        """What to compile, by name: the owner's side. inputs: calibration inputs (T, C), float64, T <= length."""
        ...

    def calls(self, client: QuantizedModule, known: int, length: int) -> Mapping[str, int]:
        """How often each function runs until a text of `length` tokens is read: all at once, or, if `known` of them
        were read before, the others one by one."""
        ...

    def reader(self, client: QuantizedModule, party: Executor, length: int) -> Reader:
        """client: without `params`, which only the owner has (`QuantizedModule.client`)."""
        ...


@jax.jit
def quantize_input(calibrated: QuantizedModule, x: jax.Array) -> jax.Array:
    """The input (..., C) as the integers that the client encrypts."""
    return quantize(x, jnp.asarray(calibrated.input_scale, jnp.float32), calibrated.bits.inputs)


def stretched(calibrated: QuantizedModule, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Calibration inputs as integers (T, C), each as it is and STRETCH as large."""
    client = calibrated.client
    return [
        np.asarray(quantize_input(client, jnp.asarray(x * stretch, jnp.float32)), np.int64)
        for x in inputs
        for stretch in (1.0, STRETCH)
    ]


def check_length(tokens: int, length: int) -> None:
    """NotReady unless a circuit for texts of `length` can read so many tokens."""
    if tokens > length:
        raise NotReady(f"compiled for {length} tokens, got {tokens}")


# --- whole texts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """One function, "head", which reads all of a text at once; shorter texts are padded."""

    def functions(
        self, program: QuantizedFunction, calibrated: QuantizedModule, inputs: Sequence[np.ndarray], length: int
    ) -> dict[str, fhe.Function]:
        texts = [(np.pad(x, ((0, length - len(x)), (0, 0))),) for x in stretched(calibrated, inputs)]
        return {"head": fhe.Function(program.run, texts)}

    def calls(self, client: QuantizedModule, known: int, length: int) -> Mapping[str, int]:
        return {"head": length - known if known else 1}

    def reader(self, client: QuantizedModule, party: Executor, length: int) -> Reader:
        return WholeReader(party, length)


@dataclass(frozen=True)
class WholeReader:
    party: Executor
    length: int

    def read(self, x: np.ndarray) -> list[np.ndarray]:
        check_length(len(x), self.length)
        arrays = self.party.encrypt("head", np.pad(x, ((0, self.length - len(x)), (0, 0))))
        return [part[: len(x)] for part in self.party.decrypt("head", self.party.run("head", arrays))]


# --- token by token -----------------------------------------------------------------------------


def common(seen: Sequence[np.ndarray], x: np.ndarray) -> int:
    """How many rows of a text a reader need not read again: all that it has seen if the text begins so, else none."""
    same = len(seen) <= len(x) and all(np.array_equal(old, new) for old, new in zip(seen, x, strict=False))
    return len(seen) if same else 0


@dataclass(frozen=True)
class TokenByToken:
    """A function for a new token, and functions that add up what earlier ones left, kept encrypted (`fhe.Steps`)."""

    steps: fhe.Steps

    def functions(
        self, program: QuantizedFunction, calibrated: QuantizedModule, inputs: Sequence[np.ndarray], length: int
    ) -> dict[str, fhe.Function]:
        return self.steps.functions(calibrated.params, stretched(calibrated, inputs))

    def calls(self, client: QuantizedModule, known: int, length: int) -> Mapping[str, int]:
        before = self.steps.calls(known) if known else {}
        return {name: times - before.get(name, 0) for name, times in self.steps.calls(length).items()}

    def reader(self, client: QuantizedModule, party: Executor, length: int) -> Reader:
        return StepReader(party, length, self.steps)


@dataclass
class StepReader:
    """Of a text that begins with the last one, reads the rest only. All calls for new tokens are made before the first
    result is decrypted."""

    party: Executor
    length: int
    steps: fhe.Steps
    _seen: list[np.ndarray] = dataclasses.field(default_factory=list)
    _state: list[Sequence[Any]] = dataclasses.field(default_factory=list)
    _results: list[list[np.ndarray]] = dataclasses.field(default_factory=list)

    def read(self, x: np.ndarray) -> list[np.ndarray]:
        check_length(len(x), self.length)
        known = common(self._seen, x)
        state, results = self._state[:known], self._results[:known]
        issued = [
            self.steps.advance(self.party.run, state, self.party.encrypt("project", row[None])) for row in x[known:]
        ]
        for sums in issued:
            decrypted = [self.party.decrypt(name, arrays) for name, arrays in sums]
            results.append([np.sum(parts, axis=0) for parts in zip(*decrypted, strict=True)])
        # Only now: where something fails, the last text is still the one that was read.
        self._seen, self._state, self._results = list(x), state, results
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]


# --- parties ------------------------------------------------------------------------------------


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
