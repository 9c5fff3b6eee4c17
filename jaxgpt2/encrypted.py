"""GPT-2 of which chosen attention heads run in integers: quantized, simulated, or on ciphertexts.

The float model is cut at every layer with a protected head. What runs between the cuts is the same compiled code in
every mode, so that the integers that reach a head, and with them the text, are the same in every mode too.

Shapes: B batch, T tokens, C width, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fhe
from jaxgpt2 import methods
from jaxgpt2.decoding import Executor, LocalExecutor, NotReady, SimulatedExecutor, quantize_input
from jaxgpt2.errors import InputError
from jaxgpt2.executors.processes import over_cores
from jaxgpt2.generation import GREEDY, Sampling, generate_tokens
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import HeadWeights, MethodConfig, QuantizedFunction, QuantizedModule
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import Transformer
from jaxgpt2.models.gpt2.pretrained import GPT2, PromptError
from jaxgpt2.models.gpt2.state_dict import disassemble
from jaxgpt2.quantize import Bits, CalibrationError

Mode = Literal["float", "quantized", "simulate", "encrypted"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Sensitivities settle with few gradients, and those of a large model are dear.
FISHER_TOKENS = 4096


class ModuleError(InputError):
    """A head that the model does not have, or a choice of heads that cannot be read."""


@dataclass(frozen=True, order=True)
class Module:
    """What one circuit computes: a head, or (head None) a layer's whole attention block with its projection."""

    layer: int
    head: int | None

    def __str__(self) -> str:
        return f"{self.layer}.{'all' if self.head is None else self.head}"


def parse_modules(text: str, config: GPT2Config) -> tuple[Module, ...]:
    """`L.H[,L.H...]`, counted from 0, or `L.all` for a layer's whole block, as modules in order.

    Raises:
        ModuleError: not of this form, a layer or head that the model does not have, or one named twice.
    """
    modules = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\.(\d+|all)\s*", part)
        if match is None:
            raise ModuleError(f"cannot read head {part!r}: wanted LAYER.HEAD, as 0.3, or LAYER.all for a whole block")
        layer, head = int(match[1]), None if match[2] == "all" else int(match[2])
        if layer >= config.n_layer or (head or 0) >= config.n_head:
            raise ModuleError(
                f"there is no head {part.strip()}: the model has layers 0 to {config.n_layer - 1}, "
                f"heads 0 to {config.n_head - 1}"
            )
        modules.append(Module(layer, head))
    for module in modules:
        twice = modules.count(module) > 1 or (module.head is not None and Module(module.layer, None) in modules)
        if twice:
            raise ModuleError(f"head {module} is named twice")
    return tuple(sorted(modules, key=lambda module: (module.layer, module.head or 0)))


def read_configs(path: str | os.PathLike[str], config: GPT2Config) -> dict[Module, MethodConfig]:
    """The configs of a JSON file `{"heads": {"L.H": {"attention": ..., "bits": ...}, ...}}`.

    A config may also have "options" and "encryption".

    Raises:
        ModuleError: not such a file, or a head that the model does not have; MethodError: a config that cannot be read.
    """
    try:
        heads = json.loads(Path(path).read_text(encoding="utf-8"))["heads"]
        configs = {parse_modules(name, config)[0]: methods.MethodConfig.from_json(data) for name, data in heads.items()}
    except OSError as error:
        raise ModuleError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise ModuleError(f'{path} is no file of configs: wanted {{"heads": {{"L.H": {{...}}}}}} in JSON') from None
    return dict(sorted(configs.items()))


def head_weights(model: Transformer, layer: int, head: int, fisher: np.ndarray | None = None) -> HeadWeights:
    """A head's own weights, cut out of its block.

    Args:
        fisher: (C, C), what an error of the residual stream after the block's attention costs; None counts its
            square.
    """
    tensors = disassemble(model)

    def tensor(name: str) -> np.ndarray:
        return np.asarray(tensors[f"h.{layer}.attn.{name}"], np.float64)

    width, size = model.config.n_embd, model.config.head_dim
    query, key, value = (slice(start, start + size) for start in range(head * size, 3 * width, width))
    kernel, bias = tensor("c_attn.weight"), tensor("c_attn.bias")
    output = tensor("c_proj.weight")[query]
    return HeadWeights(
        query=kernel[:, query],
        query_bias=bias[query],
        key=kernel[:, key],
        key_bias=bias[key],
        value=kernel[:, value],
        value_bias=bias[value],
        output=output,
        metric=output @ (np.eye(width) if fisher is None else fisher) @ output.T,
    )


# --- the float model, cut in pieces -------------------------------------------------------------


# A piece takes the structure (a constant of the compiled code) and the state of what it runs: the whole model, or one
# block, so that one compiled program serves all layers.
_piece = functools.partial(jax.jit, static_argnames="graph")


@_piece
def embed(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    """(B, T) -> (B, T, C)."""
    return nnx.merge(graph, state).embed(tokens)


@_piece
def _block(graph: nnx.GraphDef, state: nnx.State, h: jax.Array) -> jax.Array:
    """One block: (B, T, C) -> (B, T, C)."""
    return nnx.merge(graph, state)(h)[0]


def blocks(gpt2: GPT2, h: jax.Array, start: int, stop: int) -> jax.Array:
    """Blocks start to stop - 1: (B, T, C) -> (B, T, C)."""
    for state in gpt2.block_states[start:stop]:
        h = _block(gpt2.block_graph, state, h)
    return h


@_piece
def attend(graph: nnx.GraphDef, state: nnx.State, h: jax.Array, heads: jax.Array):
    """A block's attention with the protected heads left out.

    Args:
        h: the block's input (B, T, C).
        heads: which ones are protected, (P,).

    Returns:
        the heads' input x (B, T, C); h plus what the other heads and the projection's bias add to it (B, T, C); and
        what the protected heads would add in float, (P, B, T, C).
    """
    block = nnx.merge(graph, state)
    x = block.ln_1(h)
    outputs, _ = block.attn.heads(x)  # (B, H, T, D)
    others = outputs.at[:, heads].set(0.0)
    projection = block.attn.c_proj.kernel[...].reshape(outputs.shape[1], -1, x.shape[-1])  # (H, D, C)
    protected = jnp.einsum("bptd,pdc->pbtc", outputs[:, heads], projection[heads])
    return x, h + block.attn.project(others), protected


@_piece
def contribution(graph: nnx.GraphDef, state: nnx.State, output: jax.Array, head: jax.Array | int) -> jax.Array:
    """What one head's output (..., D) adds to the residual stream: (..., C)."""
    kernel = nnx.merge(graph, state).attn.c_proj.kernel[...]
    size = output.shape[-1]
    return output @ jax.lax.dynamic_slice_in_dim(kernel, head * size, size)


@_piece
def leave(graph: nnx.GraphDef, state: nnx.State, h: jax.Array) -> jax.Array:
    """The rest of a block after its attention: (..., C) -> (..., C)."""
    block = nnx.merge(graph, state)
    return h + block.mlp(block.ln_2(h))


@_piece
def _unembed(graph: nnx.GraphDef, state: nnx.State, h: jax.Array) -> jax.Array:
    """(B, T, C) -> (B, T, V)."""
    return nnx.merge(graph, state).unembed(h)


@functools.partial(jax.jit, static_argnames=("graph", "layer"))
def _gradients(graph: nnx.GraphDef, state: nnx.State, h: jax.Array, mask: jax.Array, layer: int) -> jax.Array:
    """Gradients of the log probability of tokens that the model draws itself, at the residual stream after a block's
    attention: h (B, T, C) before the block, mask (B, T) of the text -> (B, T, C)."""
    model = nnx.merge(graph, state)
    block = model.h[layer]
    heads, _ = block.attn.heads(block.ln_1(h))
    h = h + block.attn.project(heads)

    def logits(error: jax.Array) -> jax.Array:
        rest = h + error
        rest = rest + block.mlp(block.ln_2(rest))
        for later in model.h[layer + 1 :]:
            rest, _ = later(rest)
        return jax.nn.log_softmax(model.unembed(rest))

    drawn = jax.random.categorical(jax.random.key(0), logits(jnp.zeros_like(h)))

    def likelihood(error: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(logits(error), drawn[..., None], axis=-1)[..., 0]
        return jnp.sum(chosen * mask)

    return jax.grad(likelihood)(jnp.zeros_like(h))


@functools.partial(jax.jit, static_argnames="program")
def _run_in_jax(program: QuantizedFunction, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """The integer function on a batch (B, T, C)."""
    return jax.vmap(lambda row: program.run(JaxOps(), params, row))(x)


@functools.partial(jax.jit, static_argnames="program")
def _decode(program: QuantizedFunction, decoding: Any, outputs: tuple[jax.Array, ...]) -> jax.Array:
    return jax.vmap(lambda *row: program.decode(decoding, row))(*outputs)


# --- passages on their way through the float model ----------------------------------------------


def token_batches(
    gpt2: GPT2, passages: Sequence[str], max_tokens: int, size: int = 16
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Passages as padded token ids (size, T), all of one shape, with their lengths (size,), 0 for a row of filling.

    Each is cut to max_tokens.

    Raises:
        PromptError: no passages, or an empty one.
    """
    texts = [gpt2.tokenizer.encode(passage).ids[:max_tokens] for passage in passages]
    if not texts or not all(texts):
        raise PromptError("there are no passages, or one is empty: give a text file with one passage a line")
    longest = max(map(len, texts))
    for start in range(0, len(texts), size):
        group = texts[start : start + size]
        padded, lengths = np.zeros((size, longest), np.int32), np.zeros(size, np.int32)
        for index, text in enumerate(group):
            padded[index, : len(text)], lengths[index] = text, len(text)
        yield padded, lengths


@dataclass(frozen=True)
class HiddenStates:
    """Passages that the float model has read up to a layer.

    Args:
        layer: the block that they reach next.
        hidden: the residual stream, (B, T, C) for each batch of `token_batches`.
        lengths: tokens of each row, (B,) for each batch; 0 for a row of filling.
    """

    layer: int
    hidden: tuple[jax.Array, ...]
    lengths: tuple[np.ndarray, ...]


def read(gpt2: GPT2, passages: Sequence[str], max_tokens: int) -> HiddenStates:
    """Embeds passages, each cut to max_tokens."""
    batches = list(token_batches(gpt2, passages, max_tokens))
    hidden = tuple(embed(gpt2.graph, gpt2.state, tokens) for tokens, _ in batches)
    return HiddenStates(0, hidden, tuple(lengths for _, lengths in batches))


def advance(gpt2: GPT2, stream: HiddenStates, layer: int) -> HiddenStates:
    """The same passages at a later layer."""
    hidden = tuple(blocks(gpt2, h, stream.layer, layer) for h in stream.hidden)
    return HiddenStates(layer, hidden, stream.lengths)


def stream_inputs(gpt2: GPT2, stream: HiddenStates) -> list[np.ndarray]:
    """What reaches the heads of the layer that a stream is at: (T, C) float64, an array for every passage."""
    inputs = []
    for h, lengths in zip(stream.hidden, stream.lengths, strict=True):
        x, _, _ = attend(gpt2.block_graph, gpt2.block_states[stream.layer], h, np.array([0]))
        inputs += [np.asarray(row[:n], np.float64) for row, n in zip(x, lengths, strict=True) if n]
    return inputs


@dataclass(frozen=True)
class CalibrationData:
    """What calibration knows of the heads of a layer.

    Args:
        inputs: what reaches them in the float model, (T, C) float64, an array for every passage.
        fisher: what an error of the residual stream after the layer's attention costs, (C, C).
    """

    inputs: list[np.ndarray]
    fisher: np.ndarray


def sample(gpt2: GPT2, stream: HiddenStates) -> CalibrationData:
    """A stream's passages as calibration of the layer that it is at.

    error @ fisher @ error is KL(float || model with that error at one position) to second order, in nats and
    averaged over positions: half the Fisher information (Amari, "Natural gradient works efficiently in learning",
    1998), from the gradients of tokens drawn from the model's own predictions. Errors at different positions are
    taken as independent.
    """
    total, count = np.zeros((gpt2.config.n_embd,) * 2), 0
    for h, lengths in zip(stream.hidden, stream.lengths, strict=True):
        mask = np.arange(h.shape[1]) < lengths[:, None]
        gradients = np.asarray(_gradients(gpt2.graph, gpt2.state, h, mask, stream.layer), np.float64)[mask]
        total, count = total + gradients.T @ gradients, count + len(gradients)
        if count >= FISHER_TOKENS:
            break
    return CalibrationData(stream_inputs(gpt2, stream), total / (2 * count))


# --- the hybrid model ---------------------------------------------------------------------------

# A module, its input integers (B, T, C) and how many of the T are text (B,) -> its output integers, B first.
Engine = Callable[[Module, jax.Array, np.ndarray], tuple[Any, ...]]

# What an engine is compared with: the heads as GPT-2 computes them, and the model without them.
Baseline = Literal["float", "ablated"]


@dataclass(frozen=True)
class Trace:
    """A forward pass: logits (B, T, V), and what the protected modules added to the residual stream (modules, B, T, C)."""

    logits: jax.Array
    contributions: jax.Array


@dataclass(frozen=True)
class EncryptedGPT2:
    """A GPT-2 with protected heads. Frozen: `calibrate` and `compile` return a new one.

    Args:
        gpt2: the float model; it computes everything but the protected heads.
        configs: what is protected, and how it is computed.
        calibrated: the integer programs, by module; made by `calibrate`.
        circuits: the compiled ones; made by `compile`.
    """

    gpt2: GPT2
    configs: Mapping[Module, MethodConfig]
    calibrated: Mapping[Module, QuantizedModule] = dataclasses.field(default_factory=dict)
    circuits: Mapping[Module, fhe.Circuit] = dataclasses.field(default_factory=dict)
    seq_len: int | None = None

    def __post_init__(self) -> None:
        for module in self.modules:
            self._program(module)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "tiny",
        heads: str = "0.0",
        bits: Bits | int = 4,
        method: str = "lowrank",
        **options: int,
    ) -> EncryptedGPT2:
        """A model by name (see `GPT2.from_pretrained`) with protected heads, as `"0.3"`, `"0.0,1.2"` or `"0.all"`.

        All heads get the same config, see `methods.MethodConfig.of`.
        """
        return cls.protect(GPT2.from_pretrained(name), heads, methods.MethodConfig.of(method, bits, options))

    @classmethod
    def protect(cls, gpt2: GPT2, heads: str, config: MethodConfig) -> EncryptedGPT2:
        """A model with protected heads, as `"0.3"`, `"0.0,1.2"` or `"0.all"`, all of one config."""
        return cls(gpt2, dict.fromkeys(parse_modules(heads, gpt2.config), config))

    @property
    def modules(self) -> tuple[Module, ...]:
        """What is protected, in order."""
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
                f"the heads' methods are made for several backends ({', '.join(sorted(made_for))}): protect heads of "
                "one of them at a time, or name a backend that runs all"
            )
        return made_for.pop()

    def _program(self, module: Module) -> QuantizedFunction:
        method = methods.get(self.configs[module].method)
        if module.head is not None:
            return method.head
        if method.block is None:
            raise methods.MethodError(f"method {method.name!r} has no whole-block form: name single heads")
        return method.block

    def _heads(self, module: Module) -> tuple[int, ...]:
        return tuple(range(self.gpt2.config.n_head)) if module.head is None else (module.head,)

    # Calibration ---------------------------------------------------------------------------------

    def head_inputs(self, passages: Sequence[str], max_tokens: int) -> dict[int, list[np.ndarray]]:
        """What reaches the protected layers' heads in the float model: layer to (T, C) float64 arrays."""
        stream = read(self.gpt2, passages, max_tokens)
        inputs = {}
        for layer in sorted({module.layer for module in self.modules}):
            stream = advance(self.gpt2, stream, layer)
            inputs[layer] = stream_inputs(self.gpt2, stream)
        return inputs

    def calibrate(self, passages: Sequence[str], max_tokens: int) -> EncryptedGPT2:
        """The protected heads in integers, their scales and tables made from these passages.

        Args:
            passages: text like what the model will read, and not what it will be evaluated on.
            max_tokens: longest text that the heads will read; longer passages are cut.

        Raises:
            CalibrationError: a sum that int32 cannot hold; PromptError: no text.
        """
        self._check_length(max_tokens)
        stream = read(self.gpt2, passages, max_tokens)
        samples = {}
        for layer in sorted({module.layer for module in self.modules}):
            stream = advance(self.gpt2, stream, layer)
            samples[layer] = sample(self.gpt2, stream)
        return self.calibrate_on(samples, max_tokens)

    def _check_length(self, max_tokens: int) -> None:
        if not 1 <= max_tokens <= self.gpt2.config.n_positions:
            raise CalibrationError(f"max_tokens must be 1 to {self.gpt2.config.n_positions}, got {max_tokens}")

    def calibrate_on(self, samples: Mapping[int, CalibrationData], max_tokens: int) -> EncryptedGPT2:
        """`calibrate`, on samples that are there already, by layer; their texts have at most max_tokens."""
        self._check_length(max_tokens)
        model = self.gpt2.model
        calibrated = {}
        for module in self.modules:
            own = samples[module.layer]
            parts = tuple(head_weights(model, module.layer, head, own.fisher) for head in self._heads(module))
            weights = parts if module.head is None else parts[0]
            config = self.configs[module]
            calibrated[module] = self._program(module).calibrate(
                weights, own.inputs, config.bits, max_tokens, **config.settings
            )
        return dataclasses.replace(self, calibrated=calibrated, circuits={}, seq_len=None)

    def _calibrated(self, module: Module) -> QuantizedModule:
        if module not in self.calibrated:
            raise NotReady(f"head {module} is not calibrated: call calibrate(passages, max_tokens) first")
        return self.calibrated[module]

    # Compilation ---------------------------------------------------------------------------------

    def settings(
        self, p_error: float | None = None, rounding: fhe.Rounding | None = None
    ) -> dict[Module, fhe.FHEConfig]:
        """What every module's config says, with what is given instead.

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
        settings: fhe.FHEConfig | Mapping[Module, fhe.FHEConfig] | None = None,
        backend: str | None = None,
        cache: Path | None = None,
    ) -> EncryptedGPT2:
        """Compiles the protected heads for texts of up to `seq_len` tokens.

        Args:
            passages: calibration text; what it makes of the circuit's values decides their bit widths.
            seq_len: tokens; a method without steps pads shorter texts, at the same cost.
            settings: error probability and rounding, for all modules or each; None for what their configs say.
            backend: name of an FHE backend; None for the one that the methods are made for.
            cache: directory in which compiled circuits are kept; None compiles anew.
        """
        return self.compile_on(self.head_inputs(passages, seq_len), seq_len, settings, backend, cache)

    def compile_on(
        self,
        inputs: Mapping[int, Sequence[np.ndarray]],
        seq_len: int,
        settings: fhe.FHEConfig | Mapping[Module, fhe.FHEConfig] | None = None,
        backend: str | None = None,
        cache: Path | None = None,
    ) -> EncryptedGPT2:
        """`compile`, with head inputs that are there already: layer to (T, C) arrays of at most seq_len rows."""
        engine = fhe.get_backend(backend or self.backend)
        for name in sorted({config.method for config in self.configs.values()}):
            lacking = methods.get(name).needs - engine.offers
            if lacking:
                fitting = [other for other in methods.names() if methods.get(other).needs <= engine.offers]
                raise methods.MethodError(
                    f"method {name!r} needs {', '.join(sorted(lacking))}, which backend {engine.name!r} lacks; "
                    f"methods that fit it: {', '.join(fitting) or 'none'}"
                )
        if settings is None:
            settings = self.settings()
        elif isinstance(settings, fhe.FHEConfig):
            settings = dict.fromkeys(self.modules, settings)
        circuits = {}
        for module in self.modules:
            calibrated = self._calibrated(module)
            if seq_len > calibrated.max_tokens:
                raise NotReady(f"calibrated for {calibrated.max_tokens} tokens, cannot be compiled for {seq_len}")
            program = self._program(module)
            functions = program.reading.functions(program, calibrated, inputs[module.layer], seq_len)
            if cache is None:
                circuits[module] = engine.compile(functions, calibrated.params, settings[module])
            else:
                circuits[module] = fhe.compile_cached(engine, functions, calibrated.params, settings[module], cache)
        return dataclasses.replace(self, circuits=circuits, seq_len=seq_len)

    def costs(self, length: int, known: int = 0) -> dict[Module, fhe.RunCost]:
        """What the compiled modules take to read a text of so many tokens.

        known: how many were read before; then the others are read one by one, as `generate` reads, else all at once.
        """
        calls = {
            module: self._program(module).reading.calls(self._calibrated(module).client, known, length)
            for module in self.circuits
        }
        return {module: circuit.report.cost_of(calls[module]) for module, circuit in self.circuits.items()}

    # Running -------------------------------------------------------------------------------------

    def trace(
        self, tokens: np.ndarray, engine: Engine | Baseline, lengths: np.ndarray | Sequence[int] | None = None
    ) -> Trace:
        """A forward pass over token ids (B, T).

        Args:
            engine: computes the protected modules; "float" computes them as GPT-2 does, "ablated" leaves them out.
            lengths: how many tokens of each row are text, (B,); what follows is filling, whose results mean nothing.
                None: all of them.
        """
        lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        gpt2 = self.gpt2
        h, at = embed(gpt2.graph, gpt2.state, tokens), 0
        contributions: dict[Module, jax.Array] = {}
        for layer in sorted({module.layer for module in self.modules}):
            modules = [module for module in self.modules if module.layer == layer]
            h = blocks(gpt2, h, at, layer)
            block = gpt2.block_graph, gpt2.block_states[layer]
            x, h, in_float = attend(*block, h, np.array([head for module in modules for head in self._heads(module)]))
            if engine == "ablated":
                added = [jnp.zeros_like(h)] * len(modules)
            elif engine == "float":
                added = [
                    in_float.sum(axis=0) if module.head is None else in_float[index]
                    for index, module in enumerate(modules)
                ]
            else:
                # Heads of a layer have the same input: an engine may compute them at the same time.
                with ThreadPoolExecutor(len(modules)) as pool:
                    one = functools.partial(self._contribution_of, x=x, engine=engine, lengths=lengths)
                    added = list(pool.map(one, modules))
            for module, part in zip(modules, added, strict=True):
                contributions[module] = part
                h = h + part
            h, at = leave(*block, h), layer + 1
        h = blocks(gpt2, h, at, gpt2.config.n_layer)
        return Trace(_unembed(gpt2.graph, gpt2.state, h), jnp.stack([contributions[module] for module in self.modules]))

    def _contribution_of(self, module: Module, x: jax.Array, engine: Engine, lengths: np.ndarray) -> jax.Array:
        calibrated = self._calibrated(module)
        outputs = engine(module, quantize_input(calibrated.client, x), lengths)
        output = _decode(self._program(module), calibrated.decoding, tuple(jnp.asarray(o, jnp.int32) for o in outputs))
        if module.head is None:
            return output
        return contribution(self.gpt2.block_graph, self.gpt2.block_states[module.layer], output, module.head)

    def engine(self, mode: Mode, keys: Mapping[Module, fhe.Keys] | None = None) -> Engine | Literal["float"]:
        """What computes the protected modules in a mode.

        Args:
            keys: for `encrypted`, those that `make_keys` returned.

        Raises:
            NotReady: the mode needs circuits or keys that are not there. No mode ever fhe_config in for another.
            InputError: there is no such mode.
        """
        if mode not in MODES:
            raise InputError(f"no mode {mode!r}, there are: {', '.join(MODES)}")
        if mode == "float":
            return "float"
        if mode == "quantized":
            return lambda module, x, _: _run_in_jax(self._program(module), self._calibrated(module).params, x)
        missing = [str(module) for module in self.modules if module not in self.circuits]
        if missing:
            raise NotReady(f"mode {mode} needs compiled heads, and {', '.join(missing)} is not: call compile first")
        if mode == "encrypted" and (keys is None or any(module not in keys for module in self.modules)):
            raise NotReady("mode encrypted needs keys: call make_keys first")
        if mode == "simulate":
            return self.engine_of({module: SimulatedExecutor(circuit) for module, circuit in self.circuits.items()})
        return self.engine_of(
            {module: LocalExecutor(circuit, (keys or {})[module]) for module, circuit in self.circuits.items()}
        )

    @contextlib.contextmanager
    def over_cores(self, keys: Mapping[Module, fhe.Keys]) -> Iterator[Engine]:
        """The engine of mode `encrypted`, which computes the heads of a layer at the same time, whatever computes one:
        an engine that uses one core runs in processes (see `elsewhere.over_cores`). They end with the context."""
        self.engine("encrypted", keys)  # raises where something is missing
        at_once = max(Counter(module.layer for module in self.modules).values())
        with over_cores(self.circuits, keys, at_once) as parties:
            yield self.engine_of(parties)

    def engine_of(self, parties: Mapping[Module, Executor]) -> Engine:
        """An engine whose circuits these parties call, compiled for texts of `seq_len`. It needs no `params`."""
        readers = {
            module: self._program(module).reading.reader(self._calibrated(module).client, party, self.seq_len or 0)
            for module, party in parties.items()
        }

        def engine(module: Module, x: jax.Array, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
            """One text at a time; filling gives zeros."""
            texts = np.asarray(x, np.int64)
            results = [readers[module].read(text[:length]) for text, length in zip(texts, lengths, strict=True)]
            return tuple(
                np.stack([np.pad(part, ((0, x.shape[1] - len(part)), (0, 0))) for part in parts])
                for parts in zip(*results, strict=True)
            )

        return engine

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
        sampling: Sampling = GREEDY,
        keys: Mapping[Module, fhe.Keys] | None = None,
    ) -> Iterator[int]:
        """Yields the tokens that continue a prompt.

        A protected head reads each token once, if its method can (see `QuantizedFunction.reading`), else all of the text again.

        Raises:
            NotReady: the mode needs `calibrate`, `compile` or keys, or was made for shorter texts.
        """
        if mode == "float":
            return self.gpt2.generate(prompt, max_new_tokens, sampling)
        return self.continue_text(prompt, max_new_tokens, self.engine(mode, keys), sampling)

    def continue_text(
        self, prompt: str, max_new_tokens: int, engine: Engine | Baseline, sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """`generate`, with an engine that is there already."""
        tokens = self.gpt2.encode(prompt, room=max_new_tokens)
        # The last token is never read, only written.
        length = self.seq_len or max(len(tokens) + max_new_tokens - 1, 1)
        limit = min(length, *(self._calibrated(module).max_tokens for module in self.modules))
        if len(tokens) + max_new_tokens - 1 > limit:
            raise NotReady(
                f"{len(tokens)} prompt tokens and {max_new_tokens} new ones need heads made for "
                f"{len(tokens) + max_new_tokens - 1} tokens, these are made for {limit}"
            )

        def next_logits(text: list[int]) -> np.ndarray:
            padded = np.zeros((1, length), np.int32)
            padded[0, : len(text)] = text
            return np.asarray(self.trace(padded, engine, [len(text)]).logits[0, len(text) - 1])

        return generate_tokens(next_logits, tokens, max_new_tokens, sampling, self.gpt2.config.eos_token_id)
