"""The CKKS backend: circuits of slot functions (see `fhe.ckks.slots`) on SEAL (see `fhe.ckks.seal`).

Sources: Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers", ASIACRYPT 2017;
SEAL's documentation for levels, scales and the conditions on moduli.
"""

import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fhe import envelope, storage
from fhe.backend import FHEConfig, Function, FunctionBody, Keys, check_functions
from fhe.ckks.cost import SlotCost, SlotReport, estimated_seconds
from fhe.ckks.parameters import SECURITY, Parameters
from fhe.ckks.seal import CKKSContext, CKKSOps, EvaluationKeys, PreEncoding, SecretKey
from fhe.ckks.slots import CleartextSimulator, OperationCounts
from fhe.errors import CircuitFormatError, CompilationError, KeyMismatch
from fhe.signatures import Output, Signature, Signatures, check_count

FORMAT = 3
KIND = "CKKS circuit"


@dataclass(frozen=True, eq=False)
class CKKSKeys:
    """A client's keys. `evaluation` has a key for each rotation of the circuit, and nothing secret."""

    circuit: str
    id: str
    secret: SecretKey
    saved_secret: bytes
    evaluation: bytes

    def save(self, path: str | Path) -> None:
        """Write all keys, the secret one included, to a file that only its owner can read (mode 0600)."""
        envelope.write_whole(path, envelope.pack("keys", self.circuit, self.id, [self.saved_secret, self.evaluation]))


@dataclass(frozen=True)
class _Description:
    """What client and server both know of a circuit. It holds no weights.

    depths: of every input of every function, the levels used up before it.
    """

    id: str
    parameters: Parameters
    signatures: Signatures
    depths: dict[str, tuple[int, ...]]
    rotations: tuple[int, ...]
    conjugates: bool
    report: SlotReport

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "format": FORMAT,
            "signatures": self.signatures.to_json(),
            "report": self.report.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "_Description":
        return cls(
            data["id"],
            Parameters(**data["parameters"]),
            Signatures.from_json(data["signatures"]),
            {name: tuple(depths) for name, depths in data["depths"].items()},
            tuple(data["rotations"]),
            data["conjugates"],
            SlotReport.from_json(data["report"]),
        )


@dataclass
class _Server:
    """The evaluation keys of the last run, loaded: loading takes longer than a short run."""

    evaluation: bytes | None = None
    key_id: str = ""
    keys: EvaluationKeys | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class CKKSCircuit:
    """Named slot functions, compiled for one set of keys. The client's half has no functions and no params."""

    def __init__(
        self, description: _Description, functions: Mapping[str, FunctionBody] | None = None, params: Any = None
    ):
        self._description = description
        self._functions = functions
        self._params = params
        self._context = CKKSContext(description.parameters)
        self._server = _Server()

    @property
    def id(self) -> str:
        return self._description.id

    @property
    def report(self) -> SlotReport:
        return self._description.report

    @property
    def parameters(self) -> Parameters:
        return self._description.parameters

    @property
    def signatures(self) -> Signatures:
        return self._description.signatures

    def simulate(self, name: str, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The function on clear slot vectors (slots,), without noise. Results are complex128 (slots,)."""
        check_count(f"the inputs of {name}", len(inputs), len(self.signatures[name].sources))
        function, ops = self._function(name), CleartextSimulator(self.parameters.slots)
        loaded = [ops.load(x, depth) for x, depth in zip(inputs, self._description.depths[name], strict=True)]
        return tuple(result.values for result in function(ops, self._params, *loaded))

    # The client's part.

    def make_keys(self, seed: int | None = None) -> CKKSKeys:
        """New keys, for the rotations that the functions use and no others.

        A seed fixes all of them and makes them insecure: for tests only. What `encrypt` draws stays random.
        """
        own = self._description
        secret, parts = self._context.make_keys(own.rotations, own.conjugates, seed)
        key_id = secrets.token_hex(16) if seed is None else f"{seed:032x}"
        evaluation = envelope.pack("evaluation keys", self.id, key_id, parts)
        return self._with_keys(self._keys(key_id, secret, evaluation))

    def load_keys(self, path: str | Path) -> CKKSKeys:
        key_id, _, (secret, evaluation) = envelope.unpack(envelope.read_file(path, "keys"), "keys", self.id, parts=2)
        return self._with_keys(self._keys(key_id, self._context.load_secret_key(secret), evaluation))

    def encrypt(self, keys: Keys, name: str, *inputs: NDArray[Any]) -> list[bytes]:
        """Encrypt those inputs that the client provides, in order, each (slots,)."""
        own = self._checked(keys)
        check_count(f"the client's inputs of {name}", len(inputs), len(self.signatures[name].client_inputs))
        parts: list[bytes] = []
        for x in inputs:
            x = np.asarray(x, np.complex128)
            if x.shape != (self.parameters.slots,) or not np.isfinite(x).all():
                raise ValueError(f"an input must be {self.parameters.slots} finite numbers, got shape {x.shape}")
            parts.append(self._context.encrypt(own.secret, x))
        return self.signatures.pack_inputs(name, self.id, own.id, parts)

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[NDArray[Any], ...]:
        """Decrypt some or all results of a function, in the order given: complex128 (slots,) each."""
        own = self._checked(keys)
        parts = self.signatures.unpack_outputs(name, self.id, own.id, arrays)
        return tuple(self._context.decrypt(own.secret, data) for _, data in parts)

    # The server's part.

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        """All results of a function from all its inputs, in order."""
        return self.run_counted(name, arrays, evaluation_keys)[0]

    def run_counted(
        self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes
    ) -> tuple[list[bytes], OperationCounts]:
        """`run`, and the operations that it did."""
        function, depths = self._function(name), self._description.depths[name]
        key_id, keys = self._with_evaluation_keys(evaluation_keys)
        ops = CKKSOps(self._context, keys)
        parts = self.signatures.unpack_inputs(name, self.id, key_id, arrays)
        inputs = [self._context.load(part) for part in parts]
        for number, (x, depth) in enumerate(zip(inputs, depths, strict=True)):
            if ops.depth(x) != depth:
                raise CircuitFormatError(f"input {number} of {name} has depth {ops.depth(x)}, wanted {depth}")
        state = self.signatures.server_state
        results = [
            # One modulus is enough for decryption.
            self._context.save(result if Output(name, number) in state else self._context.switched(result, 1))
            for number, result in enumerate(function(ops, self._params, *inputs))
        ]
        return self.signatures.pack_outputs(name, self.id, key_id, results), ops.counts

    def prepare(self, name: str) -> None:
        """Encode the clear vectors of a function ahead of its first run. Takes about as long as a run."""
        self._function(name)(PreEncoding(self._context), self._params, *self._description.depths[name])

    # Files.

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write `circuit.json`, all that a client needs, and `server.bin`, which holds the weights."""
        half = (self._functions, self._params) if server else None
        if server and self._functions is None:
            raise storage.no_weights()
        storage.save(directory, KIND, self.id, self._description.to_json(), half)

    def _function(self, name: str) -> FunctionBody:
        if self._functions is None:
            raise storage.no_weights()
        assert self.signatures[name] is not None  # raises ValueError for an unknown function
        return self._functions[name]

    def _checked(self, keys: Keys) -> CKKSKeys:
        if not isinstance(keys, CKKSKeys):
            raise KeyMismatch(f"these are {type(keys).__name__}, not keys of the ckks backend")
        envelope.check_circuit("keys", keys.circuit, self.id)
        return keys

    def _keys(self, key_id: str, secret: SecretKey, evaluation: bytes) -> CKKSKeys:
        return CKKSKeys(self.id, key_id, secret, self._context.save_secret_key(secret), evaluation)

    def _with_evaluation_keys(self, evaluation: bytes) -> tuple[str, EvaluationKeys]:
        server = self._server
        with server.lock:
            if server.keys is None or server.evaluation is not evaluation:
                key_id, _, parts = envelope.unpack(evaluation, "evaluation keys", self.id, parts=2)
                server.keys = self._context.load_evaluation_keys(parts)
                server.evaluation, server.key_id = evaluation, key_id
            return server.key_id, server.keys

    def _with_keys(self, keys: CKKSKeys) -> CKKSKeys:
        size = len(keys.evaluation)
        report = replace(self.report, evaluation_key_bytes=size, evaluation_key_source="serialized")
        self._description = replace(self._description, report=report)
        return keys


@dataclass(frozen=True)
class CKKSBackend:
    """CKKS: vectors of approximate numbers. Products are cheap, depth is expensive, there are no lookups.

    headroom_bits: bits of the last modulus beyond the scale; results must stay below 2**(headroom_bits - 2).
    scale_bits: binary digits of a number after the point; None for as many as are secure, at most 40.
    """

    headroom_bits: int = 14
    scale_bits: int | None = None

    # Without annotations: these are not fields.
    name = "ckks"
    offers = frozenset({"slots", "encrypted"})

    def version(self) -> str:
        # Circuits depend on both numbers, so caches must distinguish them.
        return f"tenseal {version('tenseal')}, headroom {self.headroom_bits}, scale {self.scale_bits or 'chosen'}"

    def compile(self, functions: Mapping[str, Function], params: Any, config: FHEConfig | None = None) -> CKKSCircuit:
        """Compile slot functions, `run(ops, params, *inputs)` (see `fhe.ckks.slots`).

        All slot vectors must have the same length, half the polynomial degree. The input sets give levels, rotations
        and the largest numbers, which must fit the moduli. All sources of an input must have the same depth. `config`
        is ignored: it has options for lookups only.

        Raises CompilationError (numbers too large for the headroom, sources of several depths), InsecureParameters, or
        ValueError for functions that do not fit together.
        """
        start = time.perf_counter()
        functions = check_functions(functions)
        lengths = {np.shape(x) for function in functions.values() for sample in function.inputset for x in sample}
        if len(lengths) != 1 or len(next(iter(lengths))) != 1:
            raise ValueError(f"input sets must hold slot vectors of one length, got shapes {sorted(lengths)}")
        ((slots,),) = lengths
        traced = _trace_all(functions, params, slots)
        levels = max(one.counts.depth for one in traced.values())
        parameters = Parameters.choose(2 * slots, levels, self.headroom_bits, self.scale_bits)
        signatures = Signatures(
            {
                name: Signature(tuple(map(tuple, function.sources)), len(traced[name].results))
                for name, function in functions.items()
            }
        )
        depths = {name: traced[name].inputs for name in functions}
        rotations = tuple(sorted({steps for one in traced.values() for steps in one.counts.rotations}))
        conjugates = any(one.counts.conjugates for one in traced.values())
        report = _report(parameters, traced, signatures, len(rotations) + conjugates)
        report = replace(report, compile_seconds=time.perf_counter() - start)
        identity = storage.digest((signatures, depths, params, parameters, rotations, conjugates))
        description = _Description(identity, parameters, signatures, depths, rotations, conjugates, report)
        return CKKSCircuit(description, {name: function.run for name, function in functions.items()}, params)

    def load(self, directory: str | Path, server: bool = True) -> CKKSCircuit:
        directory = Path(directory)
        data = storage.load_description(directory, FORMAT)
        try:
            description = _Description.from_json(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
        half = storage.load_half(directory, KIND, description.id) if server else None
        return CKKSCircuit(description, *(half or (None, None)))


@dataclass(frozen=True)
class _Traced:
    """A function's operations, depths of its inputs and results, and the largest absolute value at each depth.

    decrypted: the largest absolute value of the results for the client, which are switched to the last modulus.
    """

    counts: OperationCounts
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    largest: dict[int, float]
    decrypted: float


def _trace_all(functions: Mapping[str, Function], params: Any, slots: int) -> dict[str, _Traced]:
    """Trace every function after one of the sources of each of its inputs. The other sources are checked at the end."""
    traced: dict[str, _Traced] = {}
    state = {source for function in functions.values() for group in function.sources for source in group}

    def depths(name: str) -> list[set[int]]:
        """For each input the depths of its sources, as far as they are traced; 0 for an input of the client."""
        known: list[set[int]] = []
        for group in functions[name].sources:
            found = [source for source in group if source.function in traced]
            if any(source.position >= len(traced[source.function].results) for source in found):
                raise CompilationError(f"an input of {name} comes from a result that does not exist: {group}")
            known.append({traced[source.function].results[source.position] for source in found} if group else {0})
        return known

    while len(traced) < len(functions):
        ready = [name for name in functions if name not in traced and all(depths(name))]
        if not ready:
            raise CompilationError(f"{', '.join(functions)} need each other's results: no function can be the first")
        for name in ready:
            traced[name] = _trace(name, functions[name], params, slots, depths(name), state)
    for name in functions:
        if any(len(group) != 1 for group in depths(name)):
            raise CompilationError(f"an input of {name} has sources of several depths: {depths(name)}")
    return traced


def _trace(
    name: str, function: Function, params: Any, slots: int, depths: list[set[int]], state: set[Output]
) -> _Traced:
    largest: dict[int, float] = {}
    decrypted, ops, results = 0.0, CleartextSimulator(slots), ()
    inputs = [min(group) for group in depths]
    for sample in function.inputset:
        ops = CleartextSimulator(slots)
        loaded = [ops.load(x, depth) for x, depth in zip(sample, inputs, strict=True)]
        results = function.run(ops, params, *loaded)
        for depth, value in ops.largest.items():
            largest[depth] = max(largest.get(depth, 0.0), value)
        for number, result in enumerate(results):
            if Output(name, number) not in state:
                decrypted = max(decrypted, float(np.abs(result.values).max()))
    return _Traced(ops.counts, tuple(inputs), tuple(result.depth for result in results), largest, decrypted)


def _report(
    parameters: Parameters, traced: Mapping[str, _Traced], signatures: Signatures, rotation_keys: int
) -> SlotReport:
    """The report. Raises CompilationError if numbers do not fit the moduli."""
    levels = parameters.levels
    largest = {levels: max(one.decrypted for one in traced.values())}
    for one in traced.values():
        for depth, value in one.largest.items():
            largest[depth] = max(largest.get(depth, 0.0), value)
    # A number times its scale must stay below half the modulus. Another factor of 2 is left for noise and new inputs.
    room = {
        depth: 2.0 ** (parameters.headroom_bits + (levels - depth) * parameters.scale_bits - 2)
        for depth in range(levels + 1)
    }
    for depth, value in sorted(largest.items()):
        if value > room[depth]:
            raise CompilationError(
                f"after {depth} of {levels} levels numbers reach {value:.3g}, and there is room for {room[depth]:.3g}: "
                f"use {math.ceil(math.log2(value / room[depth]))} more bits of headroom, or smaller numbers"
            )
    degree, state = parameters.poly_modulus_degree, signatures.server_state
    # Bytes; half of a key and of a ciphertext from the client is a seed.
    key = (levels + 1) * parameters.total_bits * degree // 8
    sent = (parameters.total_bits - parameters.moduli_bits[-1]) * degree // 8
    received = 2 * parameters.moduli_bits[0] * degree // 8
    functions = {
        name: SlotCost(
            one.counts.by_stage(),
            one.counts.depth,
            estimated_seconds(one.counts, parameters),
            len(signatures[name].client_inputs) * sent,
            sum(Output(name, number) not in state for number in range(len(one.results))) * received,
        )
        for name, one in traced.items()
    }
    return SlotReport(
        backend="ckks",
        versions={name: version(name) for name in ("tenseal", "numpy")},
        security_bits=SECURITY,
        poly_modulus_degree=degree,
        modulus_bits=parameters.total_bits,
        scale_bits=parameters.scale_bits,
        levels=levels,
        functions=functions,
        rotation_keys=rotation_keys,
        largest=dict(sorted(largest.items())),
        room=room,
        evaluation_key_bytes=(rotation_keys + 1) * key,
        evaluation_key_source="estimated",
    )
