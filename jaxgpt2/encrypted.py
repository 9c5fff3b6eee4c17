"""A model of which chosen modules are encrypted: quantized, simulated, or on ciphertexts.

Shapes: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

import fhe
from fhe import storage
from fhe.envelope import write_whole
from jaxgpt2 import methods
from jaxgpt2.calibration import CalibrationData, HiddenStates, fisher_information
from jaxgpt2.decoding import CircuitCache, NotReady, OutOfRange
from jaxgpt2.errors import InputError, MissingExtra
from jaxgpt2.executors import Executor, LocalExecutor, SimulatedExecutor, StateLost
from jaxgpt2.executors.processes import over_cores
from jaxgpt2.generation import Sampling, generate_tokens, padded_length, read_once
from jaxgpt2.methods import HeadWeights, MethodConfig, QuantizedFunction, QuantizedModule
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.models import Decoder
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module, parse_modules
from jaxgpt2.quantize import Bits, CalibrationError

Mode = Literal["float", "quantized", "simulate", "encrypted"]
MODES: tuple[Mode, ...] = get_args(Mode)

# The extra of this package that installs a backend's library.
EXTRAS = {"concrete": "fhe", "ckks": "ckks"}


def get_backend(name: str) -> fhe.Backend:
    """`fhe.get_backend`, where a library that is not installed is an error that says what to install.

    Raises:
        MissingExtra: it is not; fhe.UnknownBackend: there is no such backend.
    """
    try:
        return fhe.get_backend(name)
    except fhe.BackendUnavailable as error:
        missing = ImportError(name=error.package)
        raise MissingExtra(missing, f"the backend {name!r}", EXTRAS.get(name, name)) from error


class Cache(NamedTuple):
    """What a model has read: room for S tokens of B texts, of which `length` are filled.

    Args:
        layers: float keys and values of every layer.
        modules: of every encrypted module, what its runner keeps: arrays, or handles of ciphertexts.
        length: tokens read.
    """

    layers: tuple[Any, ...]
    modules: Mapping[Module, Any]
    length: int

    @property
    def size(self) -> int:
        """S."""
        return jax.tree.leaves(self.layers)[0].shape[2]


class Output(NamedTuple):
    """A forward pass: logits (B, T, V), or (B, 1, V) of the last token alone; what the encrypted modules added to the
    residual stream (modules, B, T, C); and the cache with the new tokens, None where there was none."""

    logits: jax.Array
    contributions: jax.Array
    cache: Cache | None


# --- how a mode computes modules ----------------------------------------------------------------


class Runner(Protocol):
    """Computes the outputs of encrypted modules."""

    def extend(
        self, module: Module, x: jax.Array, lengths: np.ndarray, cache: Any, start: int, size: int | None
    ) -> tuple[jax.Array, Any]:
        """The module's outputs for new tokens.

        Args:
            x: its inputs (B, T, C), in float.
            lengths: how many rows of each text are text, (B,); what follows is padding, whose outputs mean nothing.
            cache: what this function returned for the tokens before; None for none.
            start: how many there were.
            size: room for tokens that the cache shall have; None for no cache.

        Returns:
            outputs (B, T, ...), in reals, and the cache with the new tokens.
        """
        ...


# What modules are compared with: computed as the float model does, and left out.
Baseline = Literal["float", "ablated"]


@functools.partial(jax.jit, static_argnames="function")
def _encode(function: QuantizedFunction, client: QuantizedModule, x: jax.Array) -> jax.Array:
    return function.encode(client, x)


@functools.partial(jax.jit, static_argnames="function")
def _whole(function: QuantizedFunction, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Results of whole texts (B, T, C)."""
    return jax.vmap(lambda x: function.strategy.whole(JaxOps(), params, x))(x)


@functools.partial(jax.jit, static_argnames=("function", "size"))
def _empty(function: QuantizedFunction, params: Any, x: jax.Array, size: int) -> Any:
    one = function.strategy.empty_cache(JaxOps(), params, x[0], size)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (x.shape[0], *leaf.shape)), one)


@functools.partial(jax.jit, static_argnames="function")
def _extend(
    function: QuantizedFunction, params: Any, x: jax.Array, cache: Any, start: jax.Array
) -> tuple[tuple[jax.Array, ...], Any]:
    """Results of new tokens (B, T, C): the same functions that an engine compiles."""
    extend = functools.partial(function.strategy.extend, JaxOps(), params)
    return jax.vmap(lambda x, cache: extend(x, cache, start))(x, cache)


@functools.partial(jax.jit, static_argnames="function")
def _decode(function: QuantizedFunction, dequantization: Any, results: tuple[jax.Array, ...]) -> jax.Array:
    return jax.vmap(lambda *row: function.decode(dequantization, row))(*results)


@functools.partial(jax.jit, static_argnames="function")
def _refused(function: QuantizedFunction, dequantization: Any, results: tuple[jax.Array, ...]) -> jax.Array:
    """Which rows (B, T) a client refuses."""
    refuses = function.refuses
    assert refuses is not None
    return jax.vmap(lambda *row: refuses(dequantization, row))(*results)


# Is told the index of a text that is refused when it is decrypted, and why.
Refusals = Callable[[int, str], object]


@dataclass(frozen=True)
class QuantizedRunner:
    """Modules as quantized functions in JAX.

    refused: is told which texts a client would refuse; they are computed all the same.
    """

    functions: Mapping[Module, QuantizedFunction]
    quantized: Mapping[Module, QuantizedModule]
    refused: Refusals | None = None

    def extend(
        self, module: Module, x: jax.Array, lengths: np.ndarray, cache: Any, start: int, size: int | None
    ) -> tuple[jax.Array, Any]:
        function, own = self.functions[module], self.quantized[module]
        x = _encode(function, own.client, x)
        if size is None:
            results = _whole(function, own.params, x)
        else:
            cache = _empty(function, own.params, x, size) if cache is None else cache
            results, cache = _extend(function, own.params, x, cache, jnp.asarray(start))
        if self.refused is not None and function.refuses is not None:
            rows = np.asarray(_refused(function, own.dequantization, results)) & (
                np.arange(x.shape[1]) < lengths[:, None]
            )
            for index in np.flatnonzero(rows.any(axis=1)):
                self.refused(int(index), f"the engine would refuse what module {module} gives")
        return _decode(function, own.dequantization, results), cache


@dataclass(frozen=True)
class CircuitRunner:
    """Modules as circuits that executors call, one text at a time. It needs no `params`.

    length: tokens that the circuits are compiled for.
    refused: is told which texts are refused, whose outputs are then NaN. None makes a refusal an error, OutOfRange; it
        is one too where all texts are refused.
    """

    functions: Mapping[Module, QuantizedFunction]
    clients: Mapping[Module, QuantizedModule]
    executors: Mapping[Module, Executor]
    length: int
    refused: Refusals | None = None

    def extend(
        self, module: Module, x: jax.Array, lengths: np.ndarray, cache: Any, start: int, size: int | None
    ) -> tuple[jax.Array, Any]:
        try:
            return self._extend(module, x, lengths, cache, size)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            # Input and results have the form that method, circuit and client bundle give them, and may not agree.
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())
            raise methods.MethodError(f"circuit and method of module {module} do not fit: {reason:.200}") from error

    def _extend(self, module: Module, x: jax.Array, lengths: np.ndarray, cache: Any, size: int | None) -> Any:
        function, client = self.functions[module], self.clients[module]
        texts = np.asarray(_encode(function, client, x))
        known: Sequence[CircuitCache | None] = [None] * len(texts) if cache is None else cache
        # What an earlier module refused has no numbers.
        missing = np.isnan(np.asarray(x[:, 0])).any(axis=1) & (self.refused is not None)
        found: list[tuple[list[np.ndarray], CircuitCache | None] | None] = []
        for index, (text, count, before) in enumerate(zip(texts, lengths, known, strict=True)):
            if missing[index]:
                found.append(None)
                continue
            try:
                found.append(self._read(module, np.asarray(text[:count], np.result_type(text.dtype, np.int64)), before))
            except OutOfRange as error:
                if self.refused is None:
                    raise
                self.refused(index, f"module {module}: {error}")
                missing[index] = True
                found.append(None)
        if missing.all():
            raise OutOfRange(f"module {module}: every text is refused")
        nothing: Any = [part[:0] for part in next(each for each in found if each is not None)[0]], None
        read = [each or nothing for each in found]
        # Padding gives zeros, so that what follows is the compiled code of the mode "quantized".
        results = tuple(
            jnp.asarray(np.stack([np.pad(part, ((0, x.shape[1] - len(part)), (0, 0))) for part in parts]), kind)
            for parts in zip(*(results for results, _ in read), strict=True)
            for kind in (jnp.int32 if parts[0].dtype.kind == "i" else jnp.float32,)
        )
        outputs = _decode(function, client.dequantization, results)
        if missing.any():
            outputs = jnp.where(missing[:, None, None], jnp.nan, outputs)
        return outputs, [after for _, after in read]

    def _read(self, module: Module, x: np.ndarray, cache: CircuitCache | None) -> tuple[list[np.ndarray], CircuitCache]:
        read = functools.partial(
            self.functions[module].strategy.read, self.clients[module], self.executors[module], length=self.length
        )
        try:
            return read(x, cache)
        except StateLost:
            if cache is None:
                return read(x, None)
            # The text from its beginning: the results of the tokens before are known already.
            results, after = read(np.concatenate([cache.inputs, x]), None)
            return [part[len(cache.inputs) :] for part in results], after


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncryptedGPT2:
    """A model with encrypted modules. Frozen: `calibrate` and `compile` return a new one.

    Args:
        model: the float model; it computes everything but the encrypted modules.
        configs: what is encrypted, and how it is computed.
        quantized: the quantized modules; made by `calibrate`.
        circuits: the compiled ones; made by `compile`.
        seq_len: tokens that they are compiled for.
    """

    model: Decoder
    configs: Mapping[Module, MethodConfig]
    quantized: Mapping[Module, QuantizedModule] = dataclasses.field(default_factory=dict)
    circuits: Mapping[Module, fhe.Circuit] = dataclasses.field(default_factory=dict)
    seq_len: int | None = None

    def __post_init__(self) -> None:
        for module in self.modules:
            self.function(module)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "tiny",
        modules: str = "0.0",
        bits: Bits | int = 4,
        method: str = "lowrank",
        **options: int,
    ) -> EncryptedGPT2:
        """A model by name (see `GPT2.from_pretrained`) with encrypted modules, as "0.3", "0.0,1.2" or "0.attn".

        All get the same configuration, see `MethodConfig.of`.
        """
        return cls.encrypt(GPT2.from_pretrained(name), modules, MethodConfig.of(method, bits, options))

    @classmethod
    def encrypt(cls, model: Decoder, modules: str, config: MethodConfig) -> EncryptedGPT2:
        """A model with encrypted modules, as "0.3", "0.0,1.2" or "0.attn", all of one configuration."""
        return cls(model, dict.fromkeys(parse_modules(modules, model.config), config))

    @property
    def modules(self) -> tuple[Module, ...]:
        """What is encrypted, in order."""
        return tuple(self.configs)

    @property
    def backend(self) -> str:
        """The backend that the methods are made for.

        Raises:
            MethodError: they are made for several.
        """
        made_for = {methods.get(config.method).backend for config in self.configs.values()}
        if len(made_for) > 1:
            raise methods.MethodError(
                f"the modules' methods are made for several backends ({', '.join(sorted(made_for))}): encrypt modules "
                "of one of them at a time, or name a backend that runs all"
            )
        return made_for.pop()

    def function(self, module: Module) -> QuantizedFunction:
        """What the module's method does with it. Raises MethodError: a whole layer, and the method has heads only."""
        method = methods.get(self.configs[module].method)
        if module.head is not None:
            return method.head
        if method.layer is None:
            raise methods.MethodError(f"method {method.name!r} computes single heads only: name them, as 0.0")
        return method.layer

    def _heads(self, module: Module) -> tuple[int, ...]:
        return tuple(range(self.model.config.n_head)) if module.head is None else (module.head,)

    def _layers(self) -> list[int]:
        return sorted({module.layer for module in self.modules})

    # Calibration ---------------------------------------------------------------------------------

    def calibrate(self, passages: Sequence[str], max_tokens: int, cache: Path | None = None) -> EncryptedGPT2:
        """The encrypted modules quantized, their scales and tables made from these passages.

        Args:
            passages: text like what the model will read, and not what it will be evaluated on.
            max_tokens: longest text that the modules will read; longer passages are cut.
            cache: directory in which quantized modules are kept; None calibrates anew. It holds weights.

        Raises:
            CalibrationError: a sum that int32 cannot hold; PromptError: no text.
        """
        self._check_length(max_tokens)
        paths = {} if cache is None else self._cached(cache, passages, max_tokens)
        found = {module: one for module, path in paths.items() if (one := read_quantized(path)) is not None}
        missing = {module: config for module, config in self.configs.items() if module not in found}
        if missing:
            rest, data = dataclasses.replace(self, configs=missing), {}
            states = HiddenStates.read(self.model, passages, max_tokens)
            fisher = fisher_information(self.model, states)
            for layer in rest._layers():
                states = states.at(self.model, layer)
                data[layer] = CalibrationData(states.inputs(self.model), fisher[layer])
            made = rest.calibrate_on(data, max_tokens).quantized
            for module, path in paths.items():
                if module in made:
                    write_quantized(path, made[module])
            found |= made
        return self._with({module: found[module] for module in self.modules})

    def _with(self, quantized: dict[Module, QuantizedModule]) -> EncryptedGPT2:
        """With these modules; configurations then say what calibration chose."""
        configs = {
            module: config.with_options(self.function(module).chosen(quantized[module]))
            for module, config in self.configs.items()
        }
        return dataclasses.replace(self, configs=configs, quantized=quantized, circuits={}, seq_len=None)

    def _cached(self, directory: Path, passages: Sequence[str], max_tokens: int) -> dict[Module, Path]:
        """Where quantized modules are kept: by a hash of all that they are made from."""
        sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
        model = self.model.config, self.model.fingerprint(), self.model.tokenizer.to_str()
        common = fhe.content_hash((sources, model, list(passages), max_tokens))
        paths = {}
        for module, config in self.configs.items():
            own = (str(module), config.bits, config.options, self.function(module).calibrate)
            # A calibration that cannot be hashed is done anew.
            with contextlib.suppress(TypeError):
                paths[module] = directory / f"{fhe.content_hash((common, own))}.module"
        return paths

    def _check_length(self, max_tokens: int) -> None:
        if not 1 <= max_tokens <= self.model.config.n_positions:
            raise CalibrationError(f"max_tokens must be 1 to {self.model.config.n_positions}, got {max_tokens}")

    def calibrate_on(self, data: Mapping[int, CalibrationData], max_tokens: int) -> EncryptedGPT2:
        """`calibrate`, on data that are there already, by layer; their texts have at most max_tokens."""
        self._check_length(max_tokens)
        quantized = {}
        for module in self.modules:
            own, config = data[module.layer], self.configs[module]
            parts = tuple(head_weights(self.model, module.layer, head, own.fisher) for head in self._heads(module))
            weights = parts if module.head is None else parts[0]
            quantized[module] = self.function(module).calibrate(
                weights, own.inputs, config.bits, max_tokens, **config.options
            )
        return self._with(quantized)

    def _quantized(self, module: Module) -> QuantizedModule:
        if module not in self.quantized:
            raise NotReady(f"module {module} is not calibrated: call calibrate(passages, max_tokens) first")
        return self.quantized[module]

    # Compilation ---------------------------------------------------------------------------------

    def fhe_configs(
        self, p_error: float | None = None, rounding: fhe.Rounding | None = None
    ) -> dict[Module, fhe.FHEConfig]:
        """What every module's configuration says, with what is given instead.

        Raises:
            ValueError: a probability or a rounding that there is not.
        """
        given = {"p_error": p_error, "rounding": rounding}
        given = {name: value for name, value in given.items() if value is not None}
        return {module: dataclasses.replace(config.fhe_config, **given) for module, config in self.configs.items()}

    def compile(
        self,
        passages: Sequence[str],
        seq_len: int,
        fhe_config: fhe.FHEConfig | Mapping[Module, fhe.FHEConfig] | None = None,
        backend: str | None = None,
        cache: Path | None = None,
    ) -> EncryptedGPT2:
        """Compiles the encrypted modules for texts of up to `seq_len` tokens.

        Args:
            passages: calibration text; what it makes of the circuit's values decides their bit widths.
            seq_len: tokens; a method that reads full sequences pads shorter texts, at the same cost.
            fhe_config: error probability and rounding, for all modules or each; None for what they are configured with.
            backend: name of an FHE backend; None for the one that the methods are made for.
            cache: directory in which compiled circuits are kept; None compiles anew.
        """
        states, inputs = HiddenStates.read(self.model, passages, seq_len), {}
        for layer in self._layers():
            states = states.at(self.model, layer)
            inputs[layer] = states.inputs(self.model)
        return self.compile_on(inputs, seq_len, fhe_config, backend, cache)

    def compile_on(
        self,
        inputs: Mapping[int, Sequence[np.ndarray]],
        seq_len: int,
        fhe_config: fhe.FHEConfig | Mapping[Module, fhe.FHEConfig] | None = None,
        backend: str | None = None,
        cache: Path | None = None,
    ) -> EncryptedGPT2:
        """`compile`, with module inputs that are there already: layer to (T, C) arrays of at most seq_len rows."""
        engine = get_backend(backend or self.backend)
        for name in sorted({config.method for config in self.configs.values()}):
            lacking = methods.get(name).needs - engine.offers
            if lacking:
                fitting = [other for other in methods.names() if methods.get(other).needs <= engine.offers]
                raise methods.MethodError(
                    f"method {name!r} needs {', '.join(sorted(lacking))}, which backend {engine.name!r} lacks; "
                    f"methods that fit it: {', '.join(fitting) or 'none'}"
                )
        if fhe_config is None:
            fhe_config = self.fhe_configs()
        elif isinstance(fhe_config, fhe.FHEConfig):
            fhe_config = dict.fromkeys(self.modules, fhe_config)
        circuits = {}
        for module in self.modules:
            quantized, function = self._quantized(module), self.function(module)
            if seq_len > quantized.max_tokens:
                raise NotReady(f"calibrated for {quantized.max_tokens} tokens, cannot be compiled for {seq_len}")
            functions = function.strategy.functions(
                quantized, function.samples(quantized, inputs[module.layer]), seq_len
            )
            if cache is None:
                circuits[module] = engine.compile(functions, quantized.params, fhe_config[module])
            else:
                circuits[module] = fhe.compile_cached(engine, functions, quantized.params, fhe_config[module], cache)
        return dataclasses.replace(self, circuits=circuits, seq_len=seq_len)

    def costs(self, length: int, known: int = 0) -> dict[Module, fhe.RunCost]:
        """What the compiled modules take to read a text of so many tokens.

        known: how many were read before; then the others are read one by one, as `generate` reads, else all at once.
        """
        calls = {
            module: self.function(module).strategy.calls(self._quantized(module).client, known, length)
            for module in self.circuits
        }
        return {module: circuit.report.cost_of(calls[module]) for module, circuit in self.circuits.items()}

    # Running -------------------------------------------------------------------------------------

    def empty_cache(self, batch: int, size: int) -> Cache:
        """Room for `size` tokens of `batch` texts."""
        return Cache(self.model.empty_layers(batch, size), {}, 0)

    def forward(
        self,
        tokens: np.ndarray,
        runner: Runner | Baseline,
        cache: Cache | None = None,
        lengths: np.ndarray | Sequence[int] | None = None,
        last: bool = False,
    ) -> Output:
        """A forward pass over token ids (B, T), after those in the cache.

        Args:
            runner: computes the encrypted modules; "float" computes them as the model does, "ablated" leaves them out.
            cache: None reads whole texts from their beginning.
            lengths: how many tokens of each row are text, (B,); what follows is padding, whose results mean nothing.
                None: all of them. With a cache they are equal.
            last: logits of the last token of text alone.
        """
        counts = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        model, start = self.model, 0 if cache is None else cache.length
        own: dict[Module, Any] = {} if cache is None else dict(cache.modules)
        layers: list[Any] = [None] * model.config.n_layer if cache is None else list(cache.layers)
        contributions: dict[Module, jax.Array] = {}
        h = model.embed(tokens, start)
        for layer in range(model.config.n_layer):
            modules = [module for module in self.modules if module.layer == layer]
            if not modules:
                h, layers[layer] = model.block(layer, h, layers[layer], start)
                continue
            heads = np.array([head for module in modules for head in self._heads(module)])
            x, h, in_float, layers[layer] = model.attend(layer, h, heads, layers[layer], start)
            if runner == "ablated":
                added = [jnp.zeros_like(h)] * len(modules)
            elif runner == "float":
                added = [in_float.sum(axis=0) if m.head is None else in_float[i] for i, m in enumerate(modules)]
            else:
                # Modules of a layer have the same input: a runner may compute them at the same time.
                size = None if cache is None else cache.size
                with ThreadPoolExecutor(len(modules)) as pool:
                    found = list(
                        pool.map(lambda m: runner.extend(m, x, counts, own.get(m), start, size), modules)  # noqa: B023
                    )
                own |= {module: after for module, (_, after) in zip(modules, found, strict=True)}
                for module, (output, _) in zip(modules, found, strict=True):
                    width = model.config.n_embd if module.head is None else model.config.head_dim
                    if output.shape != (*h.shape[:2], width):
                        raise methods.MethodError(
                            f"module {module} is decoded to {output.shape}, wanted {(*h.shape[:2], width)}"
                        )
                added = [
                    output if module.head is None else model.contribution(layer, output, module.head)
                    for module, (output, _) in zip(modules, found, strict=True)
                ]
            for module, part in zip(modules, added, strict=True):
                contributions[module] = part
                h = h + part
            h = model.leave(layer, h)
        if last:
            h = h[:, counts[0] - 1 : counts[0]]
        after = None if cache is None else Cache(tuple(layers), own, start + int(counts[0]))
        return Output(model.unembed(h), jnp.stack([contributions[module] for module in self.modules]), after)

    def runner(self, mode: Mode, keys: Mapping[Module, fhe.Keys] | None = None) -> Runner | Literal["float"]:
        """What computes the encrypted modules in a mode.

        Args:
            keys: for `encrypted`, those that `make_keys` returned.

        Raises:
            NotReady: the mode needs circuits or keys that are not there. No mode ever stands in for another.
            InputError: there is no such mode.
        """
        if mode not in MODES:
            raise InputError(f"no mode {mode!r}, there are: {', '.join(MODES)}")
        if mode == "float":
            return "float"
        if mode == "quantized":
            quantized = {module: self._quantized(module) for module in self.modules}
            return QuantizedRunner({module: self.function(module) for module in self.modules}, quantized)
        missing = [str(module) for module in self.modules if module not in self.circuits]
        if missing:
            raise NotReady(f"mode {mode} needs compiled modules, and {', '.join(missing)} is not: call compile first")
        if mode == "encrypted" and (keys is None or any(module not in keys for module in self.modules)):
            raise NotReady("mode encrypted needs keys: call make_keys first")
        if mode == "simulate":
            return self.run_by({module: SimulatedExecutor(circuit) for module, circuit in self.circuits.items()})
        return self.run_by({m: LocalExecutor(circuit, (keys or {})[m]) for m, circuit in self.circuits.items()})

    @contextlib.contextmanager
    def over_cores(self, keys: Mapping[Module, fhe.Keys]) -> Iterator[Runner]:
        """The runner of mode `encrypted`, which computes the modules of a layer at the same time, whatever computes
        one: an engine that uses one core runs in processes (see `executors.processes`). They end with the context."""
        self.runner("encrypted", keys)  # raises where something is missing
        at_once = max(Counter(module.layer for module in self.modules).values())
        with over_cores(self.circuits, keys, at_once) as executors:
            yield self.run_by(executors)

    def run_by(self, executors: Mapping[Module, Executor]) -> CircuitRunner:
        """A runner whose circuits these executors call, compiled for texts of `seq_len`. It needs no `params`."""
        functions = {module: self.function(module) for module in executors}
        clients = {module: self._quantized(module).client for module in executors}
        return CircuitRunner(functions, clients, executors, self.seq_len or 0)

    def make_keys(self, cache: Path | None = None) -> dict[Module, fhe.Keys]:
        """Keys for every compiled module; from `cache`, a directory, where they were made before."""
        return {
            module: circuit.make_keys() if cache is None else fhe.cached_keys(circuit, cache)
            for module, circuit in self.circuits.items()
        }

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 8,
        mode: Mode = "quantized",
        sampling: Sampling | None = None,
        keys: Mapping[Module, fhe.Keys] | None = None,
    ) -> Iterator[int]:
        """Yields the tokens that continue a prompt.

        An encrypted module reads each token once, if its method can (see `decoding`), else all of the text again.

        sampling: how tokens are chosen; None for the model's own way.

        Raises:
            NotReady: the mode needs `calibrate`, `compile` or keys, or was made for shorter texts.
        """
        if mode == "float":
            return self.model.generate(prompt, max_new_tokens, sampling)
        return self.continue_text(prompt, max_new_tokens, self.runner(mode, keys), sampling)

    def continue_text(
        self, prompt: str, max_new_tokens: int, runner: Runner | Baseline, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """`generate`, with a runner that is there already."""
        tokens = self.model.encode(prompt, room=max_new_tokens)
        # The last token is never read, only written.
        wanted = len(tokens) + max_new_tokens - 1
        limit = min(self.seq_len or wanted, *(self._quantized(module).max_tokens for module in self.modules))
        if wanted > limit:
            raise NotReady(
                f"{len(tokens)} prompt tokens and {max_new_tokens} new ones need modules made for {wanted} tokens, "
                f"these are made for {limit}"
            )
        size = padded_length(max(wanted, 1), self.model.config.n_positions)
        cache = self.empty_cache(1, size)

        def read(new: np.ndarray, count: int) -> np.ndarray:
            nonlocal cache
            output = self.forward(new, runner, cache, [count], last=True)
            assert output.cache is not None
            cache = output.cache
            return np.asarray(output.logits[0, 0])

        sampling = sampling or self.model.sampling
        return generate_tokens(read_once(read, size), tokens, max_new_tokens, sampling, self.model.config.ends_of_text)


# What a file of a quantized module says that it holds.
QUANTIZED = "quantized module"


def read_quantized(path: Path) -> QuantizedModule | None:
    """A quantized module from the user's cache; None where there is none, or it cannot be read."""
    try:
        return storage.unpack(path, QUANTIZED, path.stem)
    except fhe.FHEError:
        return None


def write_quantized(path: Path, module: QuantizedModule) -> None:
    """Keeps a quantized module in the user's cache. One that cannot be saved is calibrated anew the next time."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(fhe.CompilationError):
        write_whole(path, storage.pack(QUANTIZED, path.stem, module))


def head_weights(model: Decoder, layer: int, head: int, fisher: np.ndarray | None = None) -> HeadWeights:
    """A head's own weights, cut out of its block.

    Args:
        fisher: (C, C), what an error of the residual stream after the block's attention costs; None counts its square.
    """
    parts = model.head_weights(layer, head)
    output = parts["output"]
    metric = output @ (np.eye(output.shape[1]) if fisher is None else fisher) @ output.T
    return HeadWeights(**parts, metric=metric)
