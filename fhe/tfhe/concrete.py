"""The Concrete backend: TFHE through Zama's `concrete-python`. The only file that imports it.

It does the following for every function:

- The entries of a lookup cover the range of its input on the input set, from the least value on and unsigned. So a
  range such as -15..0 costs 4 bits and not 5, and neither rounding nor its noise leaves the table.
- max(a, b) is b + relu(a - b): one lookup per comparison, whatever the width.
- Products and slices of arrays that differ in sign are repaired where concrete-python 2.11.0 is wrong or fails.
- Results are a tuple of int64 arrays, also where Concrete returns a bare number.
- A result and the input of another function that takes it get the same sign. Concrete requires it when it runs, but
  does not arrange it.

Functions of one circuit share parameters and keys. A result that another function takes must come out of a lookup. A
sum of results of lookups is fine; an input in that sum is not, because Concrete takes the noise of a result from the
last lookup before it. Results for the client may contain inputs.

Beyond the ranges of the input set an encrypted result is undefined: integers wrap silently. So does what a wrong lookup
gives at the end of a full table, encrypted and simulated.
"""

# concrete-python has no type stubs, types its own code in part, and hides some of what is needed here.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportPrivateUsage=false

import hashlib
import inspect
import json
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

# HPX, inside Concrete, takes over SIGPIPE, which Python ignores: a write to a closed connection would end the process.
os.environ.setdefault("HPX_HANDLE_SIGNALS", "0")

from concrete import fhe
from concrete.compiler import ClientProgram, ServerProgram  # pyright: ignore[reportUnknownVariableType]
from concrete.compiler import Value as NativeValue  # pyright: ignore[reportUnknownVariableType]
from concrete.fhe.compilation.composition import CompositionClause, CompositionRule
from concrete.fhe.compilation.module import FheModule
from concrete.fhe.compilation.module_compiler import FunctionDef, ModuleCompiler
from concrete.fhe.dtypes import Integer
from concrete.fhe.extensions.tag import tag_context
from concrete.fhe.representation import Graph, GraphProcessor, MultiGraphProcessor
from concrete.fhe.tracing import Tracer

from fhe import envelope, storage
from fhe.backend import FHEConfig, Function, Keys, check_functions
from fhe.errors import CircuitFormatError, CompilationError, KeyMismatch
from fhe.signatures import Signatures, check_count
from fhe.tfhe.cost import Cost, Report
from fhe.tfhe.tables import LookupTable
from fhe.tfhe.tracer import (
    UNTAGGED,
    OperationRecord,
    RangeTracer,
    lookup_slots,
    maximum_by_lookups,
    product_range,
    signed_bits,
    trace,
)

MAX_LOOKUP_BITS = 16  # of a Concrete lookup's input
FORMAT = 3
CLIENT_FILE = "client.json"
SERVER_FILES = ("server.zip", "circuit.mlir")
NOISE = {
    "approximate": "a lookup whose input lies near a rounding boundary may give the neighbouring entry of its table",
    "exact": "",
    "none": "",
}
_compiling = threading.Lock()  # Concrete traces with global state


class ConcreteOps:
    """`Ops` on Concrete's tracer. records: of the same function, from `fhe.tfhe.tracer.trace`."""

    def __init__(self, records: list[OperationRecord], rounding: str):
        self._records = iter([record for record in records if record.kind != "product"])
        self._rounding = rounding

    def lookup(self, table: LookupTable, x: Any) -> Any:
        return self.univariate(table, int(table.shift), x)

    def univariate(self, function: Callable[[Any], NDArray[Any]], shift: int, x: Any) -> Any:
        """function(x), an integer function of x with its lowest `shift` bits rounded away, as one lookup each."""
        if not isinstance(x, Tracer):
            return function(x)
        record = next(self._records)
        if self._rounding == "none":
            shift = 0
        first, bits = lookup_slots(*record.inputs, shift, self._rounding)
        if bits > MAX_LOOKUP_BITS:
            raise CompilationError(
                f"stage {record.stage}: a lookup on {bits} bits, and Concrete's limit is {MAX_LOOKUP_BITS}:"
                " use fewer bits for inputs or weights, or round more of them away"
            )
        origin = first << shift
        x = x - origin  # even if 0: the hint must hold for this lookup only
        fhe.hint(x, bit_width=bits + shift)
        if shift:
            approximate = self._rounding == "approximate"
            exactness = fhe.Exactness.APPROXIMATE if approximate else fhe.Exactness.EXACT
            # The entries leave room for rounding up; Concrete's protection against overflow costs a bit or a lookup.
            x = cast("Any", fhe.round_bit_pattern)(x, shift, overflow_protection=False, exactness=exactness)
        # Entries that only noise can reach are clipped, so that the results need no more bits.
        return fhe.univariate(lambda value: np.clip(function(value + origin), *record.results))(x)

    def matmul(self, a: Any, b: Any) -> Any:
        return np.matmul(a, b)

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        return maximum_by_lookups(self, x, axis, keepdims)

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        # Concrete cannot join a signed and an unsigned array: make both unsigned, join, and move back.
        origin = min(0, next(self._records).inputs[0])
        return np.concatenate(tuple(array - origin for array in arrays), axis=axis) + origin

    def tag(self, name: str) -> AbstractContextManager[Any]:
        return fhe.tag(name)


def _sum(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    return np.sum(x, axis=axis, keepdims=keepdims)


# Concrete traces np.sum(x) but, unlike every other array type, has no x.sum().
if not hasattr(Tracer, "sum"):
    Tracer.sum = _sum  # pyright: ignore[reportAttributeAccessIssue]


def _is_product(graph: Graph, node: Any) -> bool:
    """Whether a node multiplies ciphertexts, by lookups."""
    return node.properties.get("name") in ("multiply", "matmul", "dot") and all(
        operand.output.is_encrypted for operand in graph.ordered_preds_of(node)
    )


class _Repair(GraphProcessor):
    """Repairs two faults of concrete-python 2.11.0 in the graph, before bit widths are assigned."""

    def apply(self, graph: Graph) -> None:
        nodes: list[Any] = graph.query_nodes(ordered=True)
        for node in nodes:
            operands: list[Any] = graph.ordered_preds_of(node)
            name = node.properties.get("name")
            if name in ("index_static", "reshape", "transpose", "expand_dims", "squeeze", "broadcast_to"):
                self.keep_sign(node, operands[0])
            elif _is_product(graph, node):
                self.widen_mixed(operands)

    @staticmethod
    def keep_sign(node: Any, operand: Any) -> None:
        """An operation that only moves elements keeps their type: a part without negative values stays signed."""
        if operand.output.dtype.is_signed and not node.output.dtype.is_signed:
            node.output.dtype = Integer(is_signed=True, bit_width=node.output.dtype.bit_width + 1)

    @staticmethod
    def widen_mixed(factors: list[Any]) -> None:
        """Room for a + b and a - b where one factor of a product of ciphertexts is signed and the other is not.

        Concrete computes ab from the squares of both, with one bit more than the wider factor has. That is one bit too
        few if the wider factor is unsigned, because it becomes signed first.
        """
        unsigned = [factor for factor in factors if not factor.output.dtype.is_signed]
        if len(unsigned) == 1:
            low, high = product_range(*(factor.bounds for factor in factors))
            properties = unsigned[0].properties
            properties["bit_width_hint"] = max(properties.get("bit_width_hint", 0), signed_bits(low, high))


@dataclass(frozen=True)
class _Compositions:
    """Concrete's composition policy: the results that other functions take."""

    rules: tuple[CompositionRule, ...]

    @classmethod
    def of(cls, signatures: Signatures) -> "_Compositions":
        return cls(
            tuple(
                CompositionRule(CompositionClause(source.function, source.position), CompositionClause(name, position))
                for name, signature in signatures.functions.items()
                for position, sources in enumerate(signature.sources)
                for source in sources
            )
        )

    def get_rules_iter(self, funcs: list[Graph]) -> Iterable[CompositionRule]:
        return self.rules


class _AgreeOnSign(MultiGraphProcessor):
    """Makes a result and the input that takes it signed if either is; refuses a result that contains an input.

    Concrete gives both the same width, but refuses when it runs if their signs differ.
    """

    def __init__(self, compositions: _Compositions):
        self._compositions = compositions

    def apply_many(self, graphs: dict[str, Graph]) -> None:
        ends: list[tuple[Any, Any]] = []
        for rule in self._compositions.rules:
            result = graphs[rule.from_.func].ordered_outputs()[rule.from_.pos]
            if inputs := _inputs_within(graphs[rule.from_.func], result):
                raise CompilationError(
                    f"output {rule.from_.pos} of {rule.from_.func} is an input of {rule.to.func} and contains input"
                    f" {', '.join(map(str, inputs))} unchanged: it must come out of a lookup, if only of the identity"
                )
            taken = graphs[rule.to.func].ordered_inputs()[rule.to.pos]
            if taken not in graphs[rule.to.func].graph:
                raise _unused(rule)
            ends.append((result, taken))
        changed = True
        while changed:  # a result may be the source of several inputs, and an input have several sources
            unequal = [pair for pair in ends if pair[0].output.dtype.is_signed != pair[1].output.dtype.is_signed]
            changed = bool(unequal)
            for node in (node for pair in unequal for node in pair if not node.output.dtype.is_signed):
                node.output.dtype = Integer(is_signed=True, bit_width=node.output.dtype.bit_width + 1)


def _inputs_within(graph: Graph, result: Any) -> list[int]:
    """The positions of the inputs that reach a node without a lookup."""
    pending: list[Any] = [result]
    reached: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in reached or node.output.is_clear or node.converted_to_table_lookup or _is_product(graph, node):
            continue
        reached.add(node)
        pending += graph.ordered_preds_of(node)
    return sorted(position for position, node in graph.input_nodes.items() if node in reached)


@dataclass(frozen=True)
class ConcreteKeys:
    """A client's keys. `keys` holds the secret ones; `evaluation` is for the server and does not decrypt."""

    circuit: str
    id: str
    keys: fhe.Keys
    evaluation: bytes

    def save(self, path: str | Path) -> None:
        envelope.write_whole(path, envelope.pack("keys", self.circuit, self.id, [self.keys.serialize()]))


@dataclass(frozen=True)
class _ServerHalf:
    """The server's half of a circuit: machine code, its source in MLIR, and the configuration."""

    server: fhe.Server
    mlir: str
    configuration: fhe.Configuration


@dataclass(frozen=True)
class _Simulator:
    """A circuit compiled for simulation.

    circuits: of every function, the client's and the server's part. `fhe.Client` and `fhe.Server` make them anew at
    every call, which takes longer than the simulation.
    """

    circuits: Mapping[str, tuple[Any, Any]]
    server: fhe.Server  # whose directory is removed with it

    @classmethod
    def of(cls, half: _ServerHalf, signatures: Signatures) -> "_Simulator":
        rules = _Compositions.of(signatures).rules
        server = fhe.Server.create(half.mlir, half.configuration, is_simulated=True, composition_rules=rules)
        weakref.finalize(server, shutil.rmtree, _directory_of(server), ignore_errors=True)
        client = cast("Any", ClientProgram).create_simulated(server.client_specs.program_info)
        program = cast("Any", ServerProgram)(server._library, True)
        circuits = {
            name: (client.get_client_circuit(name), program.get_server_circuit(name)) for name in signatures.functions
        }
        return cls(circuits, server)


class ConcreteCircuit:
    """Compiled functions (see `fhe.Circuit`).

    specs: what encryption and decryption need. half: what the server needs; None in the client's half.
    """

    def __init__(
        self,
        identity: str,
        specs: fhe.ClientSpecs,
        signatures: Signatures,
        report: Report,
        half: _ServerHalf | None,
    ):
        self.id = identity
        self.signatures = signatures
        self.report = report
        self._specs = specs
        self._half = half
        self._simulator: _Simulator | None = None
        self._server_keys: tuple[bytes, fhe.EvaluationKeys, str] | None = None
        if half is not None:
            weakref.finalize(half.server, shutil.rmtree, _directory_of(half.server), ignore_errors=True)

    @classmethod
    def of(cls, half: _ServerHalf, signatures: Signatures, report: Report) -> "ConcreteCircuit":
        """The whole circuit."""
        specs = half.server.client_specs
        content = specs.serialize() + half.mlir.encode() + json.dumps(signatures.to_json(), sort_keys=True).encode()
        return cls(hashlib.sha256(content).hexdigest(), specs, signatures, report, half)

    @property
    def half(self) -> _ServerHalf:
        """The server's half. Raises NoWeights."""
        if self._half is None:
            raise storage.no_weights()
        return self._half

    def simulate(self, name: str, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        check_count(f"the inputs of {name}", len(inputs), len(self.signatures[name].sources))
        if self._simulator is None:  # compiled at the first call: it takes as long as the circuit itself
            self._simulator = _Simulator.of(self.half, self.signatures)
        arrays = [np.asarray(x, np.int64) for x in inputs]
        own = self.signatures[name].client_inputs
        client, server = self._simulator.circuits[name]
        values = [
            client.simulate_prepare_input(
                NativeValue((self._own if position in own else self._state)(name, position, x)), position
            )
            for position, x in enumerate(arrays)
        ]
        results = [
            np.asarray(client.simulate_process_output(value, position).to_py_val(), np.int64)
            for position, value in enumerate(server.simulate(values))
        ]
        return tuple(self._unwrapped(name, position, x) for position, x in enumerate(results))

    def make_keys(self, seed: int | None = None) -> ConcreteKeys:
        # Concrete's default is seed 0, so all 128 bits are drawn here, from the operating system.
        secret, encryption = (secrets.randbits(128), secrets.randbits(128)) if seed is None else (seed, seed + 1)
        keys = fhe.Keys(self._specs)
        keys.generate(secret_seed=secret, encryption_seed=encryption)
        return self._with_evaluation(keys, secrets.token_hex(16))

    def load_keys(self, path: str | Path) -> ConcreteKeys:
        key_id, _, (data,) = envelope.unpack(envelope.read_file(path, "keys"), "keys", self.id, parts=1)
        with _refusals("keys"):
            keys = fhe.Keys.deserialize(data)
        return self._with_evaluation(keys, key_id)

    @cached_property
    def _types(self) -> dict[str, dict[str, list[Any]]]:
        """Width, sign and shape of every function's "inputs" and "outputs"."""

        def type_of(end: Any) -> dict[str, Any]:
            of_ciphertext = end["typeInfo"]["lweCiphertext"]
            shape = tuple(of_ciphertext["abstractShape"]["dimensions"])
            return of_ciphertext["encoding"]["integer"] | {"shape": shape}

        circuits = json.loads(cast("Any", self._specs).program_info.serialize())["circuits"]
        return {
            circuit["name"]: {side: [type_of(end) for end in circuit[side]] for side in ("inputs", "outputs")}
            for circuit in circuits
        }

    def _unwrapped(self, name: str, position: int, x: NDArray[Any]) -> NDArray[Any]:
        """A result of which a wrong lookup made a negative number of an unsigned type: modulo twice its range, one
        beyond its range."""
        encoding = self._types[name]["outputs"][position]
        width = encoding["width"]
        return x if encoding["isSigned"] else np.where(x >> width, x - (2 << width), x)

    def _own(self, name: str, position: int, x: NDArray[Any]) -> NDArray[Any]:
        """The client's integers, if they are of their type: Concrete refuses others when it encrypts."""
        wanted = self._types[name]["inputs"][position]
        low = -(1 << wanted["width"] - 1) if wanted["isSigned"] else 0
        high = low + (1 << wanted["width"])
        if x.shape != wanted["shape"] or (x.size and not low <= x.min() <= x.max() < high):
            raise ValueError(
                f"input {position} of {name}: wanted integers {low} to {high - 1} of shape {wanted['shape']}, got "
                f"{x.min(initial=0)} to {x.max(initial=0)} of shape {x.shape}"
            )
        return x

    def _state(self, name: str, position: int, x: NDArray[Any]) -> NDArray[Any]:
        """The integers that a simulated ciphertext which stays on the server stands for, of any integers.

        A wrong lookup past the end of a table gives minus the entry at the other end. A ciphertext of it goes on as it
        is, modulo twice the range of its type, and so must this; Concrete's simulation of encryption refuses it.
        """
        wanted = self._types[name]["inputs"][position]
        if x.shape != wanted["shape"]:
            raise ValueError(f"input {position} of {name}: wanted shape {wanted['shape']}, got {x.shape}")
        return x if wanted["isSigned"] else x % (2 << wanted["width"])

    def encrypt(self, keys: Keys, name: str, *inputs: NDArray[Any]) -> list[bytes]:
        keys = self._checked(keys)
        signature = self.signatures[name]
        check_count(f"the client's inputs of {name}", len(inputs), len(signature.client_inputs))
        places: list[NDArray[Any] | None] = [None] * len(signature.sources)  # Concrete skips None
        for position, x in zip(signature.client_inputs, inputs, strict=True):
            places[position] = np.asarray(x, np.int64)
        values = _as_values(self._client(keys).encrypt(*places, function_name=name))
        parts = [value.serialize() for value in values if value is not None]
        return self.signatures.pack_inputs(name, self.id, keys.id, parts)

    def run(self, name: str, arrays: Sequence[bytes], evaluation_keys: bytes) -> list[bytes]:
        server, held = self.half.server, self._server_keys
        if held is None or held[0] is not evaluation_keys:
            key_id, _, (data,) = envelope.unpack(evaluation_keys, "evaluation keys", self.id, parts=1)
            with _refusals("evaluation keys"):
                self._server_keys = held = evaluation_keys, fhe.EvaluationKeys.deserialize(data), key_id
        _, server_keys, key_id = held
        parts = self.signatures.unpack_inputs(name, self.id, key_id, arrays)
        with _refusals(f"the inputs of {name}"):
            values = [fhe.Value.deserialize(part) for part in parts]
            results = server.run(*values, evaluation_keys=server_keys, function_name=name)
        return self.signatures.pack_outputs(name, self.id, key_id, [value.serialize() for value in _as_values(results)])

    def decrypt(self, keys: Keys, name: str, arrays: Sequence[bytes]) -> tuple[NDArray[Any], ...]:
        keys = self._checked(keys)
        parts = self.signatures.unpack_outputs(name, self.id, keys.id, arrays)
        # Client.decrypt takes all results of a function or the first ones only; this is what it does with each.
        program = cast("Any", ClientProgram).create_encrypted(self._specs.program_info, keys.keys._keyset)
        circuit = program.get_client_circuit(name)
        with _refusals(f"the results of {name}"):
            values = [
                (position, circuit.process_output(fhe.Value.deserialize(part)._inner, position).to_py_val())
                for position, part in parts
            ]
        return tuple(self._unwrapped(name, position, np.asarray(value, np.int64)) for position, value in values)

    def save(self, directory: str | Path, server: bool = True) -> None:
        """Write `circuit.json` and `client.json`, all that a client needs, and `server.zip` and `circuit.mlir`, which
        hold the weights."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CLIENT_FILE).write_bytes(self._specs.serialize())
        if server:
            self.half.server.save(directory / "server.zip")
            (directory / "circuit.mlir").write_text(self.half.mlir)
        files = {name: _digest(directory / name) for name in (CLIENT_FILE, *(SERVER_FILES if server else ()))}
        fhe_config = {"p_error": self.report.p_error, "rounding": self.report.rounding}
        content = {"format": FORMAT, "id": self.id, "fhe_config": fhe_config, "report": self.report.to_json()}
        content["signatures"] = self.signatures.to_json()
        (directory / "circuit.json").write_text(json.dumps(content | {"files": files}, indent=1))

    def _checked(self, keys: Keys) -> ConcreteKeys:
        if not isinstance(keys, ConcreteKeys):
            raise KeyMismatch(f"these are {type(keys).__name__}, not keys of the concrete backend")
        envelope.check_circuit("keys", keys.circuit, self.id)
        return keys

    def _client(self, keys: ConcreteKeys) -> fhe.Client:
        client = fhe.Client(self._specs)
        client.keys = keys.keys
        return client

    def _with_evaluation(self, keys: fhe.Keys, key_id: str) -> ConcreteKeys:
        evaluation = envelope.pack("evaluation keys", self.id, key_id, [keys.evaluation.serialize()])
        self.report = replace(self.report, evaluation_key_bytes=len(evaluation), evaluation_key_source="serialized")
        return ConcreteKeys(self.id, key_id, keys, evaluation)


class ConcreteBackend:
    """TFHE: small integers and exact lookups. The time of a lookup about doubles with every bit."""

    name = "concrete"
    offers = frozenset({"integers", "lookup", "exact", "encrypted", "cores", "compiled"})

    def version(self) -> str:
        return f"concrete-python {version('concrete-python')}"

    def compile(self, functions: Mapping[str, Function], params: Any, config: FHEConfig) -> ConcreteCircuit:
        start = time.perf_counter()
        functions = check_functions(functions)
        tracers, signatures = trace(functions, params)
        compositions = _Compositions.of(signatures)
        configuration = _configuration(config)
        samples: dict[str, Any] = {
            name: [tuple(np.asarray(x, np.int64) for x in sample) for sample in function.inputset]
            for name, function in functions.items()
        }
        with _compiling:
            # Concrete makes its stack of tags only for the thread that imported it.
            tag_context.stack = []
            try:
                definitions = [
                    _definition(name, function, params, tracers[name].records, config.rounding)
                    for name, function in functions.items()
                ]
                processors = [_AgreeOnSign(compositions), _Repair()]
                compiled = ModuleCompiler(definitions, compositions).compile(
                    samples, configuration, additional_pre_processors=processors
                )
            except CompilationError:
                raise
            except RuntimeError as error:
                records = [record for tracer in tracers.values() for record in tracer.records]
                raise CompilationError(_explain(error, records, config)) from error
            finally:
                Tracer._is_tracing = False  # it stays set when a trace fails
        _check_compositions(compositions, compiled.server.client_specs)
        report = _report(compiled, config, tracers, time.perf_counter() - start)
        return ConcreteCircuit.of(_ServerHalf(compiled.server, compiled.mlir, configuration), signatures, report)

    def load(self, directory: str | Path, server: bool = True) -> ConcreteCircuit:
        directory = Path(directory)
        content = storage.load_description(directory, FORMAT)
        try:
            names = set(content["files"]) if server else {CLIENT_FILE}
            damaged = [name for name in sorted(names) if _digest(directory / name) != content["files"][name]]
            if damaged:
                raise CircuitFormatError(f"the circuit in {directory} is damaged: {', '.join(damaged)}")
            report = Report.from_json(content["report"])
            configuration = _configuration(FHEConfig(**content["fhe_config"]))
            signatures = Signatures.from_json(content["signatures"])
            if not set(SERVER_FILES) & names:
                specs = fhe.ClientSpecs.deserialize((directory / CLIENT_FILE).read_bytes())
                return ConcreteCircuit(content["id"], specs, signatures, report, None)
            half = _ServerHalf(
                fhe.Server.load(directory / "server.zip"), (directory / "circuit.mlir").read_text(), configuration
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
            raise CircuitFormatError(f"the circuit in {directory} is damaged: {error}") from error
        return ConcreteCircuit.of(half, signatures, report)


@contextmanager
def _refusals(what: str) -> Generator[None, None, None]:
    """Turn Concrete's errors about bytes into CircuitFormatError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise CircuitFormatError(f"Concrete refuses {what}: {' '.join(str(error).split()):.200}") from error


def _configuration(config: FHEConfig) -> fhe.Configuration:
    return fhe.Configuration(
        p_error=config.p_error,
        compress_evaluation_keys=True,
        compress_input_ciphertexts=True,
        dump_artifacts_on_unexpected_failures=False,
        # The cost of a lookup depends on the width of its own input, not of what that is added to.
        optimize_tlu_based_on_original_bit_width=True,
    )


def _definition(
    name: str, function: Function, params: Any, records: list[OperationRecord], rounding: str
) -> FunctionDef:
    """The function for Concrete, which takes name and inputs from its Python signature."""
    inputs = [f"input{i}" for i in range(len(function.sources))]

    def circuit(**values: Any) -> Any:
        return tuple(function.run(ConcreteOps(records, rounding), params, *(values[name] for name in inputs)))

    circuit.__name__ = name
    circuit.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs]
    )
    return FunctionDef(circuit, dict.fromkeys(inputs, "encrypted"))


def _unused(rule: CompositionRule) -> CompilationError:
    return CompilationError(
        f"output {rule.from_.pos} of {rule.from_.func} cannot be input {rule.to.pos} of {rule.to.func}: no result of"
        f" {rule.to.func} depends on it"
    )


def _check_compositions(compositions: _Compositions, specs: fhe.ClientSpecs) -> None:
    """Raise CompilationError if a result and the input that takes it differ in key or encoding.

    Concrete itself only says so when it runs.
    """
    circuits = {
        circuit["name"]: circuit for circuit in json.loads(cast("Any", specs).program_info.serialize())["circuits"]
    }
    for rule in compositions.rules:
        ends = circuits[rule.from_.func]["outputs"][rule.from_.pos], circuits[rule.to.func]["inputs"][rule.to.pos]
        result, taken = (end["typeInfo"]["lweCiphertext"] for end in ends)
        if any(result[part] != taken[part] for part in ("encryption", "encoding")):
            raise _unused(rule)


def _report(compiled: FheModule, config: FHEConfig, tracers: dict[str, RangeTracer], seconds: float) -> Report:
    server = compiled.server
    functions: dict[str, Cost] = {}
    for name, stages in _lookups_by_stage(compiled.mlir_module).items():
        total = server.programmable_bootstrap_count(name)
        counted = sum(count for widths in stages.values() for count in widths.values())
        if counted != total:  # Concrete merges successive lookups
            stages["compiler"] = {0: total - counted}
        functions[name] = Cost(
            pbs_by_stage=stages,
            max_integer_bits=tracers[name].largest,
            input_ciphertext_bytes=server.size_of_inputs(name),
            output_ciphertext_bytes=server.size_of_outputs(name),
        )
    return Report.of(
        functions,
        backend="concrete",
        versions={name: version(name) for name in ("concrete-python", "numpy")},
        p_error=config.p_error,
        rounding=config.rounding,
        noise=NOISE[config.rounding],
        complexity=server.complexity,
        global_p_error=server.global_p_error,
        evaluation_key_bytes=server.size_of_bootstrap_keys + server.size_of_keyswitch_keys,
        secret_key_bytes=server.size_of_secret_keys,
        compile_seconds=seconds,
    )


def _lookups_by_stage(module: Any) -> dict[str, dict[str, dict[int, int]]]:
    """{function: {stage: {input bits: lookups}}} of an MLIR module, without operations that no result depends on."""
    return {function.name.value: _lookups_of(function) for function in module.body.operations}


def _lookups_of(function: Any) -> dict[str, dict[int, int]]:
    stages: dict[str, dict[int, int]] = {}

    def add(operation: Any, bits: int, count: int) -> None:
        tag = re.match(r'loc\("@([\w.]+)', str(operation.location))
        widths = stages.setdefault(tag.group(1) if tag else UNTAGGED, {})
        widths[bits] = widths.get(bits, 0) + count

    needed: set[Any] = set()
    for operation in reversed(list(function.regions[0].blocks[0].operations)):
        name = operation.operation.name.partition(".")[2]
        if name != "return" and not any(result in needed for result in operation.results):
            continue
        needed.update(operation.operands)
        if name not in ("apply_lookup_table", "round", "mul_eint", "matmul_eint_eint", "dot_eint_eint"):
            continue
        shape, bits = _shape_and_bits(operation.operands[0])
        result_shape, result_bits = _shape_and_bits(operation.results[0])
        count = int(np.prod(result_shape))
        if name == "apply_lookup_table":
            add(operation, bits, count)
        elif name == "round":  # looks up and subtracts one bit after the other
            add(operation, 1, count * (bits - result_bits))
        else:
            terms = 1 if name == "mul_eint" else shape[-1]
            add(operation, bits, 2 * count * terms)  # xy = ((x + y)^2 - (x - y)^2) / 4
    return dict(reversed(stages.items()))


def _shape_and_bits(value: Any) -> tuple[tuple[int, ...], int]:
    """((2, 4), 7) of an MLIR value such as tensor<2x4x!FHE.esint<7>>."""
    match = re.fullmatch(r"(?:tensor<((?:\d+x)*))?!FHE\.es?int<(\d+)>>?", str(value.type))
    assert match is not None, value.type
    return tuple(int(size) for size in (match.group(1) or "").split("x") if size), int(match.group(2))


def _explain(error: RuntimeError, records: list[OperationRecord], config: FHEConfig) -> str:
    """One line for an error of Concrete, whose text may contain the whole circuit."""
    widths: dict[str, int] = {}
    for record in records:
        bits = (
            lookup_slots(*record.inputs, record.shift, config.rounding)[1]
            if record.kind == "lookup"
            else signed_bits(*record.inputs)
        )
        widths[record.stage] = max(bits, widths.get(record.stage, 0))
    stage = max(widths, key=lambda name: widths[name], default=None)
    where = (
        "" if stage is None else f"; the widest numbers are in stage {stage}: fewer bits there, as by a lookup before"
    )
    if any(reason in str(error) for reason in ("NoParametersFound", "Unfeasible noise")):
        return f"no secure parameters exist for p_error {config.p_error}{where}, or a larger p_error"
    reasons = dict.fromkeys(re.findall(r"\^+ (.*)", str(error))) or [str(error).strip().splitlines()[0]]
    return f"Concrete cannot compile this: {'; '.join(reasons)}{where}"


def _directory_of(server: fhe.Server) -> str:
    """The directory of a server's files, which Concrete never removes."""
    return cast("Any", server)._library.get_output_dir_path()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _as_values(values: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", values) if isinstance(values, tuple) else (values,)
