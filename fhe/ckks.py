"""CKKS, through SEAL: ciphertexts are vectors of thousands of approximate complex numbers (see `fhe.packing`).

Sources: Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers", ASIACRYPT 2017;
SEAL's own documentation for levels, scales and what its moduli must satisfy. This is the only file that imports
tenseal, and of that only `tenseal.sealapi`, the thin binding of SEAL.

A circuit is a set of named slot functions that share one set of keys. Everything between client and server is bytes,
one blob for each ciphertext; a result that a function keeps is a blob too, which the server hands to a later run.
"""

import hashlib
import json
import math
import os
import pickle
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tenseal.sealapi as seal

from . import wire
from .backend import Function, Keys, Settings, check_functions
from .errors import CircuitFormatError, CompilationError, InsecureParameters, KeyMismatch, NoWeights
from .packing import SlotMachine, SlotOps, Tally

FORMAT = 1
SECURITY = 128

Run = Callable[..., tuple[Any, ...]]

# SEAL's classes, of which the binding gives no types.
Ciphertext: TypeAlias = Any
Plaintext: TypeAlias = Any
SecretKey: TypeAlias = Any
RelinKeys: TypeAlias = Any
GaloisKeys: TypeAlias = Any
SEALContext: TypeAlias = Any

# Milliseconds on one core of an AMD EPYC (Zen 4) at ring 16384, by the number of primes of the ciphertext, tenseal
# 0.3.18; a product includes its relinearization. Other rings cost in proportion to their degree.
MILLISECONDS = {
    "rotation": {1: 1.5, 3: 5.0, 5: 10.6, 7: 17.8, 9: 25.0},
    "product": {1: 1.7, 3: 5.7, 5: 11.8, 7: 19.4, 9: 27.6},
    "clear product": {1: 0.12, 9: 1.06},
    "rescaling": {1: 0.4, 9: 3.9},
}
MACHINE = "one core of an AMD EPYC (Zen 4)"


@dataclass(frozen=True)
class Parameters:
    """A ring and a chain of moduli, checked for 128-bit security when made.

    Security is what SEAL's table allows for the sum of all bits, which is that of the Homomorphic Encryption Standard
    (2018) for ternary secrets and classical attackers. Raises InsecureParameters beyond it.

    ring: degree N of the polynomials, a power of two; a ciphertext has N / 2 slots.
    levels: how many products can follow each other; each uses up one prime of scale_bits.
    """

    ring: int
    levels: int
    scale_bits: int
    headroom_bits: int

    def __post_init__(self):
        if self.total_bits > most_bits(self.ring):
            raise InsecureParameters(
                f"{self.levels} levels of {self.scale_bits} bits with {self.headroom_bits} bits of headroom need "
                f"{self.total_bits} bits of moduli; ring {self.ring} allows {most_bits(self.ring)} at {SECURITY}-bit "
                f"security: use a larger ring, fewer levels or a smaller scale"
            )

    @classmethod
    def choose(cls, ring: int, levels: int, headroom_bits: int, scale_bits: int | None = None) -> "Parameters":
        """These bits of scale, or as many as are secure.

        Raises InsecureParameters if that leaves fewer than 25 bits, where SEAL's noise reaches the third decimal.
        """
        scale = scale_bits
        if scale is None:
            scale = min(40, (most_bits(ring) - 2 * headroom_bits) // (levels + 2))
            if scale < 25:
                raise InsecureParameters(
                    f"{levels} levels at ring {ring} leave {max(scale, 0)} bits a level at {SECURITY}-bit security, "
                    f"too few to compute with: use a larger ring or fewer levels"
                )
        return cls(ring, levels, scale, headroom_bits)

    @property
    def slots(self) -> int:
        return self.ring // 2

    @property
    def moduli_bits(self) -> tuple[int, ...]:
        """The last modulus first, one for each level, and the one for switching keys, which must be the largest."""
        last = self.scale_bits + self.headroom_bits
        return (last, *(self.scale_bits,) * self.levels, last)

    @property
    def total_bits(self) -> int:
        return sum(self.moduli_bits)

    def context(self, seed: int | None = None) -> SEALContext:
        """SEAL's context; a seed fixes all that is random in what is made with it."""
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(self.ring)
        try:
            parameters.set_coeff_modulus(seal.CoeffModulus.Create(self.ring, list(self.moduli_bits)))
        except (RuntimeError, ValueError) as error:
            raise CompilationError(f"no such moduli at ring {self.ring}: {error}") from error
        if seed is not None:
            words = np.frombuffer(hashlib.sha512(str(seed).encode()).digest(), np.uint64)
            parameters.set_random_generator(seal.Blake2xbPRNGFactory([int(word) for word in words]))
        context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():  # SEAL checks security once more
            raise InsecureParameters(f"SEAL refuses these parameters: {context.parameters_error_message()}")
        return context


def most_bits(ring: int) -> int:
    """The most bits that all moduli of a ring may have together for 128-bit security; 0 for an unknown ring."""
    return seal.CoeffModulus.MaxBitCount(ring, seal.SEC_LEVEL_TYPE.TC128)


@dataclass(frozen=True)
class SlotCost:
    """What it takes to run functions: a `fhe.RunCost` of operations on slot vectors.

    stages: {stage: {kind: count}}, kinds as in `fhe.packing.KINDS`; levels: that the deepest function uses.
    Results that stay on the server are no output.
    """

    stages: dict[str, dict[str, int]] = field(default_factory=dict)
    levels: int = 0
    estimated_run_seconds: float = 0.0
    input_ciphertext_bytes: int = 0
    output_ciphertext_bytes: int = 0

    @property
    def machine(self) -> str:
        return MACHINE

    def total(self, kind: str) -> int:
        return sum(kinds.get(kind, 0) for kinds in self.stages.values())

    @property
    def counts(self) -> dict[str, int]:
        return {"rotations": self.total("rotation"), "products": self.total("product"), "levels": self.levels}

    def describe(self) -> str:
        return f"{self.total('rotation'):,} rotations and {self.total('product'):,} products on {self.levels} levels"

    def __add__(self, other: "SlotCost") -> "SlotCost":
        stages = {stage: dict(kinds) for stage, kinds in self.stages.items()}
        for stage, kinds in other.stages.items():
            for kind, count in kinds.items():
                own = stages.setdefault(stage, {})
                own[kind] = own.get(kind, 0) + count
        return SlotCost(
            stages,
            max(self.levels, other.levels),
            self.estimated_run_seconds + other.estimated_run_seconds,
            self.input_ciphertext_bytes + other.input_ciphertext_bytes,
            self.output_ciphertext_bytes + other.output_ciphertext_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SlotReport:
    """What a circuit costs: a `fhe.CircuitReport`. Sizes are in bytes.

    evaluation_key_bytes: see evaluation_key_source: "estimated", or "serialized" (what a client sends) once keys exist.
    largest: the largest number that the input set made of each depth; beyond `room`, at that depth, results are wrong.
    """

    backend: str
    versions: dict[str, str]
    security_bits: int
    ring: int
    modulus_bits: int
    scale_bits: int
    levels: int
    functions: dict[str, SlotCost]
    rotation_keys: int
    largest: dict[int, float]
    room: dict[int, float]
    evaluation_key_bytes: int
    evaluation_key_source: str
    noise: str = "approximate: every number carries an error of about 2**(15 - scale_bits)"
    compile_seconds: float = 0.0

    def cost_of(self, calls: Mapping[str, int]) -> SlotCost:
        """What it takes to run functions so many times each, by name."""
        return sum((self.functions[name] for name, times in calls.items() for _ in range(times)), SlotCost())

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes; depths become strings."""
        data = asdict(self)
        for name in ("largest", "room"):
            data[name] = {str(depth): value for depth, value in data[name].items()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SlotReport":
        """The report that `to_json` wrote."""
        data = dict(data)
        for name in ("largest", "room"):
            data[name] = {int(depth): value for depth, value in data[name].items()}
        data["functions"] = {name: SlotCost(**cost) for name, cost in data["functions"].items()}
        return cls(**data)


def estimated_seconds(tally: Tally, parameters: Parameters) -> float:
    """Seconds on one core of the machine of MILLISECONDS: an order of magnitude elsewhere."""
    total = 0.0
    for cost, count in tally.costs.items():
        table = MILLISECONDS[cost.kind]
        primes = parameters.levels + 1 - cost.depth
        slope = primes / max(table) if primes > max(table) else 1.0
        total += count * slope * float(np.interp(primes, list(table), list(table.values())))
    return total * parameters.ring / 16384 / 1000


# --- bytes --------------------------------------------------------------------------------------


@contextmanager
def _file() -> Iterator[Path]:
    """A file that SEAL, which writes to paths only, can write a secret to: in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ckks", os.MFD_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as directory:  # of mode 0700
            yield Path(directory) / "data"


def _to_bytes(item: Any) -> bytes:
    with _file() as path:
        item.save(str(path))
        return path.read_bytes()


def _from_bytes(item: Any, context: SEALContext, data: bytes, kind: str) -> Any:
    with _file() as path:
        path.write_bytes(data)
        try:
            item.load(context, str(path))
        except (RuntimeError, ValueError) as error:
            raise CircuitFormatError(f"SEAL cannot read these {kind}: {error}") from error
    return item


# --- the machine --------------------------------------------------------------------------------


class Engine:
    """What all runs at the same parameters share: SEAL's objects, and clear vectors as SEAL encodes them.

    Encoding a vector takes four times as long as multiplying by it, and every run of a function needs the same ones.
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.context = parameters.context()
        self.encoder = seal.CKKSEncoder(self.context)
        self.evaluator = seal.Evaluator(self.context)
        self.scale = 2.0**parameters.scale_bits
        self.ids: dict[int, Any] = {}
        self.primes: dict[int, float] = {}
        data = self.context.first_context_data()
        for size in range(parameters.levels + 1, 0, -1):
            self.ids[size] = data.parms_id()
            self.primes[size] = float(data.parms().coeff_modulus()[-1].value())
            data = data.next_context_data()
        self.scales = {parameters.levels + 1: self.scale}
        for size in range(parameters.levels + 1, 1, -1):
            self.scales[size - 1] = self.scales[size] ** 2 / self.primes[size]
        self._encoded: dict[tuple[bytes, int, bool], Plaintext] = {}

    def switched(self, x: Ciphertext, size: int) -> Ciphertext:
        """x with fewer primes, of the same scale."""
        result = seal.Ciphertext()
        self.evaluator.mod_switch_to(x, self.ids[size], result)
        return result

    def rescaled(self, x: Ciphertext) -> Ciphertext:
        """x, a product, divided by its last prime."""
        self.evaluator.rescale_to_next_inplace(x)
        x.scale = self.scales[x.coeff_modulus_size()]  # SEAL's own may be off by float64's rounding
        return x

    def addend(self, vector: np.ndarray, size: int) -> Plaintext:
        """A clear vector to be added to ciphertexts of so many primes; kept."""
        return self._encode(vector, size, False)

    def factor(self, vector: np.ndarray, size: int) -> Plaintext:
        """A clear vector to multiply ciphertexts by, at the scale that gives the product its depth's; kept."""
        return self._encode(vector, size, True)

    def correction(self, before: int, size: int) -> Plaintext:
        """What to multiply by after switching from `before` primes to `size`, which leaves the scale of the former."""
        return self.factor(np.full(1, self.scales[size] / self.scales[before], np.complex128), size)

    def _encode(self, vector: np.ndarray, size: int, product: bool) -> Plaintext:
        key = vector.tobytes(), size, product
        if key not in self._encoded:
            scale = self.scales[size]
            scale = self.scales[size - 1] * self.primes[size] / scale if product else scale
            self._encoded[key] = self.encode_once(vector, size, scale)
        return self._encoded[key]

    def encode_once(self, vector: np.ndarray, size: int, scale: float) -> Plaintext:
        plain = seal.Plaintext()
        if len(vector) == 1:
            self.encoder.encode(complex(vector[0]), self.ids[size], scale, plain)
        else:
            values = np.repeat(vector, self.parameters.slots // len(vector)).tolist()
            self.encoder.encode(values, self.ids[size], scale, plain)
        return plain


class CKKSOps(SlotOps[Ciphertext]):
    """`SlotOps` on ciphertexts.

    Scales: SEAL refuses to add ciphertexts of different scales, and a product's scale, s * s / prime, is not quite s,
    as no prime is exactly a power of two. So every depth has one scale, that of products of the depth above
    (`Engine.scales`), and clear vectors are encoded at what makes their products have it too.
    """

    def __init__(self, engine: Engine, relinearization: RelinKeys, rotations: GaloisKeys):
        super().__init__(engine.parameters.slots)
        self.engine = engine
        self.relinearization = relinearization
        self.rotations = rotations

    def depth(self, x: Ciphertext) -> int:
        return self.engine.parameters.levels + 1 - x.coeff_modulus_size()

    def _lower(self, x: Ciphertext, depth: int) -> Ciphertext:
        size = self.engine.parameters.levels + 2 - depth
        result = self.engine.switched(x, size)
        result.scale = self.engine.scales[size]
        self.engine.evaluator.multiply_plain_inplace(result, self.engine.correction(x.coeff_modulus_size(), size))
        return self.engine.rescaled(result)

    def _rotate(self, x: Ciphertext, steps: int) -> Ciphertext:
        result = seal.Ciphertext()
        self.engine.evaluator.rotate_vector(x, steps, self.rotations, result)
        return result

    def _conjugate(self, x: Ciphertext) -> Ciphertext:
        result = seal.Ciphertext()
        self.engine.evaluator.complex_conjugate(x, self.rotations, result)
        return result

    def _add(self, x: Ciphertext, y: Ciphertext) -> Ciphertext:
        result = seal.Ciphertext()
        self.engine.evaluator.add(x, y, result)
        return result

    def _subtract(self, x: Ciphertext, y: Ciphertext) -> Ciphertext:
        result = seal.Ciphertext()
        self.engine.evaluator.sub(x, y, result)
        return result

    def _offset(self, x: Ciphertext, vector: np.ndarray) -> Ciphertext:
        result = seal.Ciphertext()
        self.engine.evaluator.add_plain(x, self.engine.addend(vector, x.coeff_modulus_size()), result)
        return result

    def _combine(self, xs: Sequence[Ciphertext], vectors: Sequence[np.ndarray]) -> Ciphertext:
        size = xs[0].coeff_modulus_size()
        evaluator = self.engine.evaluator
        total, term = seal.Ciphertext(), seal.Ciphertext()
        for number, (x, vector) in enumerate(zip(xs, vectors, strict=True)):
            evaluator.multiply_plain(x, self.engine.factor(vector, size), term if number else total)
            if number:
                evaluator.add_inplace(total, term)
        return self.engine.rescaled(total)

    def _dot(self, xs: Sequence[Ciphertext], ys: Sequence[Ciphertext]) -> Ciphertext:
        evaluator = self.engine.evaluator
        total, term = seal.Ciphertext(), seal.Ciphertext()
        for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
            target = term if number else total
            if x is y:
                evaluator.square(x, target)
            else:
                evaluator.multiply(x, y, target)
            if number:
                evaluator.add_inplace(total, term)
        evaluator.relinearize_inplace(total, self.relinearization)
        return self.engine.rescaled(total)


class _Rehearsal(SlotOps[int]):
    """A run on nothing but depths, which encodes the clear vectors of a function before its first real run."""

    def __init__(self, engine: Engine):
        super().__init__(engine.parameters.slots)
        self.engine = engine

    def _size(self, depth: int) -> int:
        return self.engine.parameters.levels + 1 - depth

    def depth(self, x: int) -> int:
        return x

    def _lower(self, x: int, depth: int) -> int:
        self.engine.correction(self._size(x), self._size(depth) + 1)
        return depth

    def _rotate(self, x: int, steps: int) -> int:
        return x

    def _conjugate(self, x: int) -> int:
        return x

    def _add(self, x: int, y: int) -> int:
        return x

    def _subtract(self, x: int, y: int) -> int:
        return x

    def _offset(self, x: int, vector: np.ndarray) -> int:
        self.engine.addend(vector, self._size(x))
        return x

    def _combine(self, xs: Sequence[int], vectors: Sequence[np.ndarray]) -> int:
        for vector in vectors:
            self.engine.factor(vector, self._size(xs[0]))
        return xs[0] + 1

    def _dot(self, xs: Sequence[int], ys: Sequence[int]) -> int:
        return xs[0] + 1


# --- keys and circuits --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CKKSKeys:
    """A client's keys. `evaluation` holds a key for each rotation that the circuit uses, and no secret."""

    circuit: str
    id: str
    secret: SecretKey
    evaluation: bytes

    def save(self, path: str | Path) -> None:
        """Write all keys, the secret one too, to a file only its owner can read (mode 0600)."""
        wire.write_private(path, wire.pack("keys", self.circuit, self.id, [_to_bytes(self.secret), self.evaluation]))


@dataclass(frozen=True)
class _Description:
    """What client and server share of a circuit; it holds no weights."""

    id: str
    parameters: Parameters
    ports: wire.Ports
    depths: dict[str, tuple[int, ...]]  # of every input of every function: levels used up when it comes
    rotations: tuple[int, ...]
    conjugates: bool
    report: SlotReport

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"format": FORMAT, "ports": self.ports.to_json(), "report": self.report.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "_Description":
        if data["format"] != FORMAT:
            raise CircuitFormatError(f"the circuit has format {data['format']}, not {FORMAT}")
        return cls(
            data["id"],
            Parameters(**data["parameters"]),
            wire.Ports.from_json(data["ports"]),
            {name: tuple(depths) for name, depths in data["depths"].items()},
            tuple(data["rotations"]),
            data["conjugates"],
            SlotReport.from_json(data["report"]),
        )


@dataclass
class _Server:
    """The evaluation keys used last, as SEAL holds them: loading them takes longer than a short run."""

    evaluation: bytes | None = None
    key_id: str = ""
    relinearization: Any = None
    rotations: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class CKKSCircuit:
    """Named slot functions, compiled for one set of keys. A circuit loaded without its weights serves a client only."""

    def __init__(self, description: _Description, functions: Mapping[str, Run] | None = None, params: Any = None):
        self._description = description
        self._functions = functions
        self._params = params
        self._engine = Engine(description.parameters)
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
    def ports(self) -> wire.Ports:
        return self._description.ports

    def simulate(self, name: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The function on clear slot vectors, in float64 and without noise: complex128 results (slots,)."""
        wire.check_count(f"the inputs of {name}", len(inputs), len(self.ports[name].sources))
        function, machine = self._function(name), SlotMachine(self.parameters.slots)
        loaded = [machine.load(x, depth) for x, depth in zip(inputs, self._description.depths[name], strict=True)]
        return tuple(result.values for result in function(machine, self._params, *loaded))

    # The client's part.

    def make_keys(self, seed: int | None = None) -> CKKSKeys:
        """New keys, with the rotations that the functions use and no others.

        A seed fixes the secret ones, which makes them insecure: for tests only.
        """
        context = self._engine.context if seed is None else self.parameters.context(seed)
        generator = seal.KeyGenerator(context)
        degree = 2 * self.parameters.ring
        elements = [pow(3, steps, degree) for steps in self._description.rotations]
        elements += [degree - 1] if self._description.conjugates else []
        # Saved this way, half of every key is the seed it was drawn from.
        parts = [_to_bytes(generator.create_relin_keys()), _to_bytes(generator.create_galois_keys(elements))]
        key_id = secrets.token_hex(16) if seed is None else f"{seed:032x}"
        evaluation = wire.pack("evaluation keys", self.id, key_id, parts)
        return self._with_keys(CKKSKeys(self.id, key_id, generator.secret_key(), evaluation))

    def load_keys(self, path: str | Path) -> CKKSKeys:
        key_id, _, (secret, evaluation) = wire.unpack(wire.read_file(path, "keys"), "keys", self.id, parts=2)
        key = _from_bytes(seal.SecretKey(), self._engine.context, secret, "keys")
        return self._with_keys(CKKSKeys(self.id, key_id, key, evaluation))

    def encrypt(self, keys: Keys, name: str, *inputs: np.ndarray) -> list[bytes]:
        """The inputs that the client encrypts, in their order, each (slots,): one blob each."""
        own = self._checked(keys)
        wire.check_count(f"the client's inputs of {name}", len(inputs), len(self.ports[name].client_inputs))
        encryptor = seal.Encryptor(self._engine.context, own.secret)
        parts = []
        for x in inputs:
            x = np.asarray(x, np.complex128)
            if x.shape != (self.parameters.slots,) or not np.isfinite(x).all():
                raise ValueError(f"an input must hold {self.parameters.slots} finite numbers, got shape {x.shape}")
            # What a client encrypts is kept nowhere.
            plain = self._engine.encode_once(x, self.parameters.levels + 1, self._engine.scale)
            parts.append(_to_bytes(encryptor.encrypt_symmetric(plain)))  # half of it is a seed
        return self.ports.pack_inputs(name, self.id, own.id, parts)

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[np.ndarray, ...]:
        """What some or all results of a function hold, in the order given: complex128 (slots,) each."""
        own = self._checked(keys)
        parts = self.ports.unpack_outputs(name, self.id, own.id, arrays)
        decryptor = seal.Decryptor(self._engine.context, own.secret)
        results = []
        for _, data in parts:
            plain = seal.Plaintext()
            decryptor.decrypt(self._ciphertext(data), plain)
            results.append(np.asarray(self._engine.encoder.decode_complex(plain), np.complex128))
        return tuple(results)

    # The server's part.

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        """Compute on ciphertexts: all inputs in, all results out, those that stay on the server among them."""
        return self.run_counted(name, arrays, evaluation_keys)[0]

    def run_counted(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> tuple[list[bytes], Tally]:
        """`run`, and what it did."""
        function, depths = self._function(name), self._description.depths[name]
        server = self._with_evaluation_keys(evaluation_keys)
        ops = CKKSOps(self._engine, server.relinearization, server.rotations)
        parts = self.ports.unpack_inputs(name, self.id, server.key_id, arrays)
        inputs = [self._ciphertext(part) for part in parts]
        for number, (x, depth) in enumerate(zip(inputs, depths, strict=True)):
            if ops.depth(x) != depth:
                raise CircuitFormatError(f"input {number} of {name} comes at depth {ops.depth(x)}, wanted {depth}")
        kept = {(source.function, source.position) for source in self.ports.kept}
        results = [
            # One modulus is all that decryption needs.
            _to_bytes(result if (name, number) in kept else self._engine.switched(result, 1))
            for number, result in enumerate(function(ops, self._params, *inputs))
        ]
        return self.ports.pack_outputs(name, self.id, server.key_id, results), ops.tally

    def prepare(self, name: str) -> None:
        """Encode the clear vectors of a function, which its first run would do else: about as long as that run."""
        self._function(name)(_Rehearsal(self._engine), self._params, *self._description.depths[name])

    # Files.

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write `circuit.json`, all that a client needs, and `server.bin`, which holds the weights."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "circuit.json").write_text(json.dumps(self._description.to_json(), indent=1))
        if server:
            if self._functions is None:
                raise _no_weights()
            try:
                content = pickle.dumps((self._functions, self._params))
            except (pickle.PicklingError, AttributeError) as error:
                raise CompilationError(f"a CKKS circuit is saved with its functions' names: {error}") from error
            (directory / "server.bin").write_bytes(wire.pack("CKKS circuit", self.id, "", [content]))

    # Inside.

    def _function(self, name: str) -> Run:
        if self._functions is None:
            raise _no_weights()
        assert self.ports[name] is not None  # raises for a function that is not there
        return self._functions[name]

    def _checked(self, keys: Keys) -> CKKSKeys:
        if not isinstance(keys, CKKSKeys):
            raise KeyMismatch(f"these are {type(keys).__name__}, not keys of the ckks backend")
        wire.check_circuit("keys", keys.circuit, self.id)
        return keys

    def _ciphertext(self, data: bytes) -> Ciphertext:
        return _from_bytes(seal.Ciphertext(), self._engine.context, data, "ciphertexts")

    def _with_evaluation_keys(self, evaluation: bytes) -> _Server:
        with self._server.lock:
            if self._server.evaluation is not evaluation:
                key_id, _, (relinearization, rotations) = wire.unpack(evaluation, "evaluation keys", self.id, parts=2)
                context = self._engine.context
                self._server = _Server(
                    evaluation,
                    key_id,
                    _from_bytes(seal.RelinKeys(), context, relinearization, "evaluation keys"),
                    _from_bytes(seal.GaloisKeys(), context, rotations, "evaluation keys"),
                )
            return self._server

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

    def compile(self, functions: Mapping[str, Function], params: Any, settings: Settings | None = None) -> CKKSCircuit:
        """Compile slot functions, `run(ops, params, *inputs)` (see `fhe.packing`).

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
        levels = max(trace.tally.depth for trace in traced.values())
        parameters = Parameters.choose(2 * slots, levels, self.headroom_bits, self.scale_bits)
        ports = wire.Ports(
            {
                name: wire.Port(tuple(map(tuple, function.sources)), len(traced[name].results))
                for name, function in functions.items()
            }
        )
        depths = {name: traced[name].inputs for name in functions}
        rotations = tuple(sorted(set().union(*(trace.tally.rotations for trace in traced.values()))))
        conjugates = any(trace.tally.conjugates for trace in traced.values())
        report = _report(parameters, traced, ports)
        report = replace(report, compile_seconds=time.perf_counter() - start)
        content = pickle.dumps((ports.to_json(), depths, params, parameters, rotations, conjugates))
        identity = hashlib.sha256(content).hexdigest()
        description = _Description(identity, parameters, ports, depths, rotations, conjugates, report)
        return CKKSCircuit(description, {name: function.run for name, function in functions.items()}, params)

    def load(self, directory: str | Path) -> CKKSCircuit:
        """A saved circuit, or a client's half of it. `server.bin` holds code: load only what you trust."""
        directory = Path(directory)
        try:
            description = _Description.from_json(json.loads(wire.read_file(directory / "circuit.json", "circuit")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
        if not (directory / "server.bin").exists():
            return CKKSCircuit(description)
        data = wire.read_file(directory / "server.bin", "CKKS circuit")
        (content,) = wire.unpack(data, "CKKS circuit", description.id, parts=1).parts
        try:
            functions, params = pickle.loads(content)
        except Exception as error:
            raise CircuitFormatError(f"the circuit in {directory} needs code that is not here: {error}") from error
        return CKKSCircuit(description, functions, params)


@dataclass(frozen=True)
class _Trace:
    """What a function does: its costs, depths of inputs and results, and the largest number at each depth.

    shown: the largest number among the results that no function takes: the client's are switched to the last modulus.
    """

    tally: Tally
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    largest: dict[int, float]
    shown: float


def _no_weights() -> NoWeights:
    return NoWeights("this circuit was loaded without its weights: it can encrypt and decrypt only")


def _trace_all(functions: Mapping[str, Function], params: Any, slots: int) -> dict[str, _Trace]:
    """Traces every function after one that its inputs come from; a source not traced yet is checked afterwards."""
    traced: dict[str, _Trace] = {}
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
) -> _Trace:
    largest: dict[int, float] = {}
    shown, machine, results = 0.0, SlotMachine(slots), ()
    inputs = [min(group) for group in depths]
    for sample in function.inputset:
        machine = SlotMachine(slots)
        loaded = [machine.load(x, depth) for x, depth in zip(sample, inputs, strict=True)]
        results = function.run(machine, params, *loaded)
        for depth, value in machine.largest.items():
            largest[depth] = max(largest.get(depth, 0.0), value)
        for number, result in enumerate(results):
            if (name, number) not in kept:
                shown = max(shown, float(np.abs(result.values).max()))
    return _Trace(machine.tally, tuple(inputs), tuple(result.depth for result in results), largest, shown)


def _report(parameters: Parameters, traced: Mapping[str, _Trace], ports: wire.Ports) -> SlotReport:
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
    rotation_keys = len(set().union(*(trace.tally.rotations for trace in traced.values())))
    rotation_keys += any(trace.tally.conjugates for trace in traced.values())
    size = (levels + 1) * parameters.total_bits * parameters.ring // 8  # a key, half of which is a seed
    sent = (parameters.total_bits - parameters.moduli_bits[-1]) * parameters.ring // 8  # half of it is a seed
    received = 2 * parameters.moduli_bits[0] * parameters.ring // 8
    kept = {(source.function, source.position) for source in ports.kept}
    functions = {
        name: SlotCost(
            trace.tally.by_stage(),
            trace.tally.depth,
            estimated_seconds(trace.tally, parameters),
            len(ports[name].client_inputs) * sent,
            sum((name, number) not in kept for number in range(len(trace.results))) * received,
        )
        for name, trace in traced.items()
    }
    return SlotReport(
        backend="ckks",
        versions={name: version(name) for name in ("tenseal", "numpy")},
        security_bits=SECURITY,
        ring=parameters.ring,
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
