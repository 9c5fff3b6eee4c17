"""Circuits of slot functions under CKKS (see `fhe.ckks.slots`); the library beneath is in `fhe.ckks.seal` alone.

Sources: Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers", ASIACRYPT 2017;
SEAL's own documentation for levels, scales and what its moduli must satisfy.

A circuit is a set of named slot functions that share one set of keys. Everything between client and server is bytes,
one byte string for each ciphertext; a result that stays on the server is one too, which a later run may take.
"""

import hashlib
import math
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fhe import envelope, storage
from fhe.backend import FHEConfig, Function, Keys, check_functions
from fhe.ckks.cost import SlotCost, SlotReport, estimated_seconds
from fhe.ckks.parameters import SECURITY, Parameters
from fhe.ckks.seal import CKKSContext, CKKSOps, EvaluationKeys, PreEncoding, SecretKey
from fhe.ckks.slots import CleartextSimulator, OperationCounts
from fhe.errors import CircuitFormatError, CompilationError, KeyMismatch
from fhe.signatures import Signature, Signatures, check_count

FORMAT = 2
KIND = "CKKS circuit"

Run = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class CKKSKeys:
    """A client's keys. `evaluation` holds a key for each rotation that the circuit uses, and no secret."""

    circuit: str
    id: str
    secret: SecretKey
    saved_secret: bytes
    evaluation: bytes

    def save(self, path: str | Path) -> None:
        """Write all keys, the secret one too, to a file only its owner can read (mode 0600)."""
        envelope.write_whole(path, envelope.pack("keys", self.circuit, self.id, [self.saved_secret, self.evaluation]))


@dataclass(frozen=True)
class _Description:
    """What client and server share of a circuit; it holds no weights."""

    id: str
    parameters: Parameters
    signatures: Signatures
    depths: dict[str, tuple[int, ...]]  # of every input of every function: levels used up when it comes
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
        if data["format"] != FORMAT:
            raise CircuitFormatError(f"the circuit has format {data['format']}, not {FORMAT}")
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
    """The evaluation keys used last, ready to compute with: loading them takes longer than a short run."""

    evaluation: bytes | None = None
    key_id: str = ""
    keys: EvaluationKeys | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class CKKSCircuit:
    """Named slot functions, compiled for one set of keys. A circuit loaded without its weights serves a client only."""

    def __init__(self, description: _Description, functions: Mapping[str, Run] | None = None, params: Any = None):
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
        """The function on clear slot vectors, in float64 and without noise: complex128 results (slots,)."""
        check_count(f"the inputs of {name}", len(inputs), len(self.signatures[name].sources))
        function, machine = self._function(name), CleartextSimulator(self.parameters.slots)
        loaded = [machine.load(x, depth) for x, depth in zip(inputs, self._description.depths[name], strict=True)]
        return tuple(result.values for result in function(machine, self._params, *loaded))

    # The client's part.

    def make_keys(self, seed: int | None = None) -> CKKSKeys:
        """New keys, with the rotations that the functions use and no others.

        A seed fixes the secret ones, which makes them insecure: for tests only.
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
        """The inputs that the client encrypts, in their order, each (slots,): one blob each."""
        own = self._checked(keys)
        check_count(f"the client's inputs of {name}", len(inputs), len(self.signatures[name].client_inputs))
        parts = []
        for x in inputs:
            x = np.asarray(x, np.complex128)
            if x.shape != (self.parameters.slots,) or not np.isfinite(x).all():
                raise ValueError(f"an input must hold {self.parameters.slots} finite numbers, got shape {x.shape}")
            parts.append(self._context.encrypt(own.secret, x))
        return self.signatures.pack_inputs(name, self.id, own.id, parts)

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[NDArray[Any], ...]:
        """What some or all results of a function hold, in the order given: complex128 (slots,) each."""
        own = self._checked(keys)
        parts = self.signatures.unpack_outputs(name, self.id, own.id, arrays)
        return tuple(self._context.decrypt(own.secret, data) for _, data in parts)

    # The server's part.

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        """Compute on ciphertexts: all inputs in, all results out, those that stay on the server among them."""
        return self.run_counted(name, arrays, evaluation_keys)[0]

    def run_counted(
        self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes
    ) -> tuple[list[bytes], OperationCounts]:
        """`run`, and what it did."""
        function, depths = self._function(name), self._description.depths[name]
        key_id, keys = self._with_evaluation_keys(evaluation_keys)
        ops = CKKSOps(self._context, keys)
        parts = self.signatures.unpack_inputs(name, self.id, key_id, arrays)
        inputs = [self._context.load(part) for part in parts]
        for number, (x, depth) in enumerate(zip(inputs, depths, strict=True)):
            if ops.depth(x) != depth:
                raise CircuitFormatError(f"input {number} of {name} comes at depth {ops.depth(x)}, wanted {depth}")
        kept = {(source.function, source.position) for source in self.signatures.server_state}
        results = [
            # One modulus is all that decryption needs.
            self._context.save(result if (name, number) in kept else self._context.switched(result, 1))
            for number, result in enumerate(function(ops, self._params, *inputs))
        ]
        return self.signatures.pack_outputs(name, self.id, key_id, results), ops.counts

    def prepare(self, name: str) -> None:
        """Encode the clear vectors of a function, which its first run would do else: about as long as that run."""
        self._function(name)(PreEncoding(self._context), self._params, *self._description.depths[name])

    # Files.

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write `circuit.json`, all that a client needs, and `server.bin`, which holds the weights."""
        half = (self._functions, self._params) if server else None
        if server and self._functions is None:
            raise storage.no_weights()
        storage.save(directory, KIND, self.id, self._description.to_json(), half)

    # Inside.

    def _function(self, name: str) -> Run:
        if self._functions is None:
            raise storage.no_weights()
        assert self.signatures[name] is not None  # raises for a function that is not there
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
    """CKKS: vectors of approximate numbers; products are cheap, depth is dear, there are no lookups.

    headroom_bits: bits of the last modulus beyond the scale: results must stay below 2**(headroom_bits - 1).
    scale_bits: binary digits of a number; None for as many as security leaves room for, at most 40.
    """

    headroom_bits: int = 14
    scale_bits: int | None = None

    # No annotations, which would make them fields.
    name = "ckks"
    offers = frozenset({"slots", "encrypted"})

    def version(self) -> str:
        # A circuit depends on both numbers as it does on the library, so caches must tell them apart.
        return f"tenseal {version('tenseal')}, headroom {self.headroom_bits}, scale {self.scale_bits or 'chosen'}"

    def compile(self, functions: Mapping[str, Function], params: Any, config: FHEConfig | None = None) -> CKKSCircuit:
        """Compile slot functions, `run(ops, params, *inputs)` (see `fhe.ckks.slots`).

        All slot vectors must have the same length, which fixes the ring. From the input sets come levels and rotations,
        and the largest numbers, which must fit the moduli. What the server keeps for an input must have the same depth
        whichever function it comes from. `settings` are of lookups, and there are none.

        Raises CompilationError (numbers too large for the headroom, kept results of several depths),
        InsecureParameters, or ValueError for functions that do not fit together.
        """
        start = time.perf_counter()
        functions = check_functions(functions)
        lengths = {np.shape(x) for function in functions.values() for sample in function.inputset for x in sample}
        if len(lengths) != 1 or len(next(iter(lengths))) != 1:
            raise ValueError(f"input sets must hold slot vectors of one length, got shapes {sorted(lengths)}")
        ((slots,),) = lengths
        traced = _trace_all(functions, params, slots)
        levels = max(trace.counts.depth for trace in traced.values())
        parameters = Parameters.choose(2 * slots, levels, self.headroom_bits, self.scale_bits)
        signatures = Signatures(
            {
                name: Signature(tuple(map(tuple, function.sources)), len(traced[name].results))
                for name, function in functions.items()
            }
        )
        depths = {name: traced[name].inputs for name in functions}
        rotations = tuple(sorted(set().union(*(trace.counts.rotations for trace in traced.values()))))
        conjugates = any(trace.counts.conjugates for trace in traced.values())
        report = _report(parameters, traced, signatures)
        report = replace(report, compile_seconds=time.perf_counter() - start)
        content = pickle.dumps((signatures.to_json(), depths, params, parameters, rotations, conjugates))
        identity = hashlib.sha256(content).hexdigest()
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
    """What a function does: its costs, depths of inputs and results, and the largest number at each depth.

    shown: the largest number among the results that no function takes: the client's are switched to the last modulus.
    """

    counts: OperationCounts
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    largest: dict[int, float]
    shown: float


def _trace_all(functions: Mapping[str, Function], params: Any, slots: int) -> dict[str, _Traced]:
    """Traces every function after one that its inputs come from; a source not traced yet is checked afterwards."""
    traced: dict[str, _Traced] = {}
    kept = {(o.function, o.position) for function in functions.values() for group in function.sources for o in group}

    def depths(name: str) -> list[set[int]]:
        """For each input with sources, the depths of those that are known."""
        known = []
        for group in functions[name].sources:
            found = [source for source in group if source.function in traced]
            if any(source.position >= len(traced[source.function].results) for source in found):
                raise CompilationError(f"an input of {name} comes from a result that is not there: {group}")
            known.append({traced[source.function].results[source.position] for source in found} if group else {0})
        return known

    while len(traced) < len(functions):
        ready = [name for name in functions if name not in traced and all(depths(name))]
        if not ready:
            raise CompilationError(
                f"no first function: {', '.join(functions)} wait for each other or for none of these"
            )
        for name in ready:
            traced[name] = _trace(name, functions[name], params, slots, depths(name), kept)
    for name in functions:
        if any(len(group) != 1 for group in depths(name)):
            raise CompilationError(f"an input of {name} comes at several depths: {depths(name)}")
    return traced


def _trace(
    name: str, function: Function, params: Any, slots: int, depths: list[set[int]], kept: set[tuple[str, int]]
) -> _Traced:
    largest: dict[int, float] = {}
    shown, machine, results = 0.0, CleartextSimulator(slots), ()
    inputs = [min(group) for group in depths]
    for sample in function.inputset:
        machine = CleartextSimulator(slots)
        loaded = [machine.load(x, depth) for x, depth in zip(sample, inputs, strict=True)]
        results = function.run(machine, params, *loaded)
        for depth, value in machine.largest.items():
            largest[depth] = max(largest.get(depth, 0.0), value)
        for number, result in enumerate(results):
            if (name, number) not in kept:
                shown = max(shown, float(np.abs(result.values).max()))
    return _Traced(machine.counts, tuple(inputs), tuple(result.depth for result in results), largest, shown)


def _report(parameters: Parameters, traced: Mapping[str, _Traced], signatures: Signatures) -> SlotReport:
    """The report; CompilationError where numbers do not fit."""
    levels = parameters.levels
    largest = {levels: max(trace.shown for trace in traced.values())}
    for trace in traced.values():
        for depth, value in trace.largest.items():
            largest[depth] = max(largest.get(depth, 0.0), value)
    # A number times its scale must stay below half the modulus; another factor of 2 is left for noise and new data.
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
    rotation_keys = len(set().union(*(trace.counts.rotations for trace in traced.values())))
    rotation_keys += any(trace.counts.conjugates for trace in traced.values())
    size = (levels + 1) * parameters.total_bits * parameters.poly_modulus_degree // 8  # a key, half of which is a seed
    sent = (
        (parameters.total_bits - parameters.moduli_bits[-1]) * parameters.poly_modulus_degree // 8
    )  # half of it is a seed
    received = 2 * parameters.moduli_bits[0] * parameters.poly_modulus_degree // 8
    kept = {(source.function, source.position) for source in signatures.server_state}
    functions = {
        name: SlotCost(
            trace.counts.by_stage(),
            trace.counts.depth,
            estimated_seconds(trace.counts, parameters),
            len(signatures[name].client_inputs) * sent,
            sum((name, number) not in kept for number in range(len(trace.results))) * received,
        )
        for name, trace in traced.items()
    }
    return SlotReport(
        backend="ckks",
        versions={name: version(name) for name in ("tenseal", "numpy")},
        security_bits=SECURITY,
        poly_modulus_degree=parameters.poly_modulus_degree,
        modulus_bits=parameters.total_bits,
        scale_bits=parameters.scale_bits,
        levels=levels,
        functions=functions,
        rotation_keys=rotation_keys,
        largest=dict(sorted(largest.items())),
        room=room,
        evaluation_key_bytes=(rotation_keys + 1) * size,
        evaluation_key_source="estimated",
    )
