"""The clear backend: the interface of an encrypted run on plain integers. **It encrypts nothing.**

It needs NumPy only. It serves to test everything around a circuit. Its report counts what the same function costs on
Concrete: lookups and products of ciphertexts by stage, with bit widths taken from the input set.
"""

import io
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fhe import envelope, storage
from fhe.backend import FHEConfig, Function, FunctionBody, Keys, check_functions
from fhe.errors import CircuitFormatError, KeyMismatch
from fhe.signatures import Signatures, check_count
from fhe.tfhe.cost import Cost, Report
from fhe.tfhe.tables import NumpyOps
from fhe.tfhe.tracer import count_lookups, trace

FORMAT = 3
KIND = "clear circuit"


@dataclass(frozen=True)
class ClearKeys:
    """Only an id, so that keys of another client are refused as they are by an engine that encrypts."""

    circuit: str
    id: str

    @property
    def evaluation(self) -> bytes:
        return envelope.pack("evaluation keys", self.circuit, self.id, [])

    def save(self, path: str | Path) -> None:
        envelope.write_whole(path, envelope.pack("keys", self.circuit, self.id, []))


Shapes = dict[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class ClearCircuit:
    """Functions and their parameters. `encrypt` only serializes the integers: **anyone can read them**.

    shapes: of every input of every function. functions, params: None in the client's half.
    """

    id: str
    report: Report
    shapes: Shapes
    signatures: Signatures
    functions: dict[str, FunctionBody] | None = None
    params: Any = None

    def simulate(self, name: str, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        check_count(f"the inputs of {name}", len(inputs), len(self.signatures[name].sources))
        self._check_shapes(name, range(len(inputs)), inputs)
        if self.functions is None:
            raise storage.no_weights()
        outputs = self.functions[name](NumpyOps(), self.params, *(np.asarray(value, np.int64) for value in inputs))
        return tuple(np.asarray(value, np.int64) for value in outputs)

    def make_keys(self, seed: int | None = None) -> ClearKeys:
        return ClearKeys(self.id, secrets.token_hex(16) if seed is None else f"{seed:032x}")

    def load_keys(self, path: str | Path) -> ClearKeys:
        return ClearKeys(self.id, envelope.unpack(envelope.read_file(path, "keys"), "keys", self.id).keys)

    def encrypt(self, keys: Keys, name: str, *inputs: NDArray[Any]) -> list[bytes]:
        key_id = self._id_of(keys)
        positions = self.signatures[name].client_inputs
        check_count(f"the client's inputs of {name}", len(inputs), len(positions))
        self._check_shapes(name, positions, inputs)
        return self.signatures.pack_inputs(name, self.id, key_id, [_to_bytes(value) for value in inputs])

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        key_id = envelope.unpack(evaluation_keys, "evaluation keys", self.id).keys
        inputs = self.signatures.unpack_inputs(name, self.id, key_id, arrays)
        outputs = self.simulate(name, *map(_from_bytes, inputs))
        return self.signatures.pack_outputs(name, self.id, key_id, [_to_bytes(value) for value in outputs])

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[NDArray[Any], ...]:
        results = self.signatures.unpack_outputs(name, self.id, self._id_of(keys), arrays)
        return tuple(_from_bytes(part) for _, part in results)

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write `circuit.json`, all that a client needs, and `server.bin`, which holds functions and parameters."""
        content = {"format": FORMAT, "id": self.id, "shapes": self.shapes, "signatures": self.signatures.to_json()}
        if server and self.functions is None:
            raise storage.no_weights()
        half = (self.functions, self.params) if server else None
        storage.save(directory, KIND, self.id, content | {"report": self.report.to_json()}, half)

    def _check_shapes(self, name: str, positions: Iterable[int], inputs: Sequence[NDArray[Any]]) -> None:
        shapes = [self.shapes[name][position] for position in positions]
        if [np.shape(value) for value in inputs] != shapes:
            raise ValueError(f"{name} has inputs of shapes {[np.shape(value) for value in inputs]}; wanted {shapes}")

    def _id_of(self, keys: Keys) -> str:
        if not isinstance(keys, ClearKeys):
            raise KeyMismatch(f"these are {type(keys).__name__}, not keys of the clear backend")
        envelope.check_circuit("keys", keys.circuit, self.id)
        return keys.id


class ClearBackend:
    """Plain integers in NumPy; no encryption."""

    name = "clear"
    offers = frozenset({"integers", "lookup", "exact"})

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def compile(self, functions: Mapping[str, Function], params: Any, config: FHEConfig) -> ClearCircuit:
        start = time.perf_counter()
        functions = check_functions(functions)
        traced, signatures = trace(functions, params)
        report = Report.of(
            {
                name: Cost(pbs_by_stage=count_lookups(tracer.records, config.rounding), max_integer_bits=tracer.largest)
                for name, tracer in traced.items()
            },
            backend=self.name,
            versions={"numpy": np.__version__},
            p_error=0.0,
            rounding=config.rounding,
            noise="none: nothing is encrypted, and rounding is exact",
            compile_seconds=time.perf_counter() - start,
        )
        shapes = {name: tuple(value.shape for value in f.inputset[0]) for name, f in functions.items()}
        names = {name: getattr(function.run, "__qualname__", "") for name, function in functions.items()}
        identity = storage.digest((names, params, shapes, signatures, config))
        bodies = {name: function.run for name, function in functions.items()}
        return ClearCircuit(identity, report, shapes, signatures, bodies, params)

    def load(self, directory: str | Path, server: bool = True) -> ClearCircuit:
        directory = Path(directory)
        content = storage.load_description(directory, FORMAT)
        try:
            shapes: Shapes = {name: tuple(map(tuple, inputs)) for name, inputs in content["shapes"].items()}
            signatures = Signatures.from_json(content["signatures"])
            circuit = ClearCircuit(content["id"], Report.from_json(content["report"]), shapes, signatures)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
        half = storage.load_half(directory, KIND, circuit.id) if server else None
        return circuit if half is None else replace(circuit, functions=half[0], params=half[1])


def _to_bytes(value: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(value, np.int64), allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> NDArray[Any]:
    try:
        value: Any = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy's reader raises errors of many kinds
        raise CircuitFormatError(f"these bytes are not an array: {' '.join(str(error).split()):.80}") from None
    if getattr(value, "dtype", None) != np.int64:
        raise CircuitFormatError("these bytes are not an array of int64")
    return value
