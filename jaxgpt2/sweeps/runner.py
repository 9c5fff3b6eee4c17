"""Many configurations of encrypted modules, measured against the float model in stacks.

A configuration is a module and how it is computed. The float model reads the passages once, layer by layer. At every
layer the configurations of its modules are calibrated and their parameters are stacked. One compiled program runs the
whole stack: the integer modules, what is left of the model after that layer, and every metric. It is compiled once for
all layers.

A module's input comes out of the very programs that `EncryptedGPT2.forward` runs. So the integers are those of the mode
`quantized`, and a row's metrics are those of `evaluate` up to float32 rounding.

Shapes: K configurations of a stack, B passages, T tokens of the longest, N real tokens of all of them, C width,
H heads, D head_dim, V vocabulary. Nothing but attention runs over padding: N tokens are packed side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fhe
from jaxgpt2 import methods
from jaxgpt2.calibration import CalibrationData, HiddenStates, fisher_information
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.errors import InputError
from jaxgpt2.evaluation import check_disjoint, check_ks, longest_passage
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import MethodConfig, QuantizedFunction, QuantizedModule
from jaxgpt2.models.gpt2.branches import contribution, leave
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import causal_attention
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module
from jaxgpt2.quantize import Bits, CalibrationError
from jaxgpt2.sweeps.store import Row

# More configurations than anybody measures: most likely a slip of the hand.
MOST_CONFIGURATIONS = 1_000_000

# Tokens that go through the model together; more passages go in several packs of one shape.
PACK_TOKENS = 2048

# Elements of the logits that are there at once on a device: 128 MB in float32.
LOGITS = 2**25

# Heads whose inputs are kept, pack by pack, for the next stack.
HEADS = 16

# No table of a stack is padded to fewer entries, so that few lengths are compiled.
TABLE_ENTRIES = 1024


class SweepError(InputError):
    """A sweep that cannot be made: an empty grid, or a directory of another sweep."""


@dataclass(frozen=True)
class Configuration:
    """A module and how it is computed."""

    module: Module
    config: MethodConfig

    @property
    def key(self) -> str:
        """Names it: equal for equal configurations, whatever process made them."""
        return f"{self.module} {json.dumps(self.config.to_json(), sort_keys=True)}"

    def columns(self) -> dict[str, Any]:
        """The part of a row that says what was measured."""
        bits = dataclasses.asdict(self.config.bits)
        return {
            "layer": self.module.layer,
            "head": self.module.head,
            "attention": self.config.method,
            **{f"{name.removesuffix('s')}_bits": value for name, value in bits.items()},
            **self.config.options,
        }


@dataclass(frozen=True)
class Experiment:
    """What every row of a sweep has in common.

    Args:
        model: a name that `GPT2.from_pretrained` takes.
        passages: evaluation text.
        calibration: calibration text; none of it may be among the passages.
        ks: agreement is measured at these.
        seq_len: tokens of the text whose encrypted cost is counted.
        rounding: of that encrypted run, see `fhe.FHEConfig`.
        batch: configurations in a stack, 0 for as many as memory lets (see `stack_size`).
        max_tokens: longer passages are cut to so many tokens, None cuts none.
    """

    model: str
    passages: tuple[str, ...]
    calibration: tuple[str, ...]
    ks: tuple[int, ...] = (1, 5, 10)
    seq_len: int = 6
    rounding: fhe.Rounding = "approximate"
    batch: int = 0
    max_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal for rows to belong into one table; texts by their hashes."""
        data = dataclasses.asdict(self)
        del data["batch"]
        if self.max_tokens is None:
            del data["max_tokens"]
        for name in ("passages", "calibration"):
            data[name] = hashlib.sha256("\n".join(data[name]).encode()).hexdigest()
        return json.loads(json.dumps(data))


def check(experiment: Experiment, gpt2: GPT2) -> int:
    """Tokens of the longest passage, where everything that was given can be used.

    Raises:
        PromptError: passages that are empty, too long, or calibration text too; InputError: a k out of range, or a
        length or a stack that there is not.
    """
    check_ks(experiment.ks, gpt2.config.vocab_size)
    check_disjoint(experiment.calibration, experiment.passages)
    if not 1 <= experiment.seq_len <= gpt2.config.n_positions:
        raise SweepError(f"--seq-len must be 1 to {gpt2.config.n_positions}, got {experiment.seq_len}")
    if experiment.batch < 0:
        raise SweepError(f"--batch must be 0 or more, got {experiment.batch}")
    return longest_passage(gpt2, experiment.passages, experiment.max_tokens)


def grid(
    modules: Iterable[Module],
    names: Iterable[str],
    widths: Iterable[Bits | int],
    options: Mapping[str, Iterable[int]],
    apart: Iterable[Mapping[str, int | None]] = ({},),
) -> list[Configuration]:
    """All combinations; an option concerns the methods that have it.

    Args:
        names: of methods.
        widths: a number means activations of so many bits, and what the method has with them.
        apart: fields of `Bits` that are changed after that.

    Raises:
        SweepError: there are none, or too many, or an option that none of the methods has; MethodError: an unknown
            method.
    """
    modules, names, widths, apart = tuple(modules), tuple(names), tuple(widths), tuple(apart)
    options = {option: tuple(values) for option, values in options.items()}
    most = math.prod(map(len, (modules, names, widths, apart, *options.values())))
    if most > MOST_CONFIGURATIONS:
        raise SweepError(f"the grid has up to {most:,} configurations: name at most {MOST_CONFIGURATIONS:,}")
    for option in options:
        if not any(option in methods.get(name).options for name in names):
            raise SweepError(f"none of the methods {', '.join(names)} has an option {option!r}")
    configs = []
    for name in names:
        own = {option: values for option, values in options.items() if option in methods.get(name).options}
        for bits, changes, chosen in itertools.product(widths, apart, itertools.product(*own.values())):
            config = MethodConfig.of(name, bits, dict(zip(own, chosen, strict=True)))
            configs.append(dataclasses.replace(config, bits=dataclasses.replace(config.bits, **changes)))
    # A default that is also named is the same configuration.
    found = {each.key: each for each in (Configuration(module, config) for module in modules for config in configs)}
    if not found:
        raise SweepError("the grid is empty: name at least one layer, head, method and width")
    return list(found.values())


# --- packing ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pack:
    """Where the tokens of padded passages (B, T) are when packed side by side.

    Args:
        index: (B, T), the packed position of every token; 0 for padding, which nothing reads (heads are causal).
        row, column: (N,), where every packed token is in the passages.
        mask: (N,), 0 for a packed position that fills the last chunk of logits.
    """

    index: np.ndarray
    row: np.ndarray
    column: np.ndarray
    mask: np.ndarray


def pack(lengths: np.ndarray, longest: int, size: int) -> Pack:
    """Packs passages of these lengths (B,), padded to `longest` tokens each, into `size` positions."""
    row, column = np.nonzero(np.arange(longest)[None, :] < lengths[:, None])
    index = np.zeros((len(lengths), longest), np.int32)
    index[row, column] = np.arange(len(row))
    fill = (0, size - len(row))
    mask = np.pad(np.ones(len(row), np.float32), fill)
    return Pack(index, np.pad(row, fill).astype(np.int32), np.pad(column, fill).astype(np.int32), mask)


def group(count: int, lengths: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Ranges of batches, `count` tokens and the like apiece: (start, stop), all of one size but for the last."""
    total = sum(int(batch.sum()) for batch in lengths)
    parts = min(len(lengths), -(-total // count))
    step = -(-len(lengths) // parts)
    return [(start, min(start + step, len(lengths))) for start in range(0, len(lengths), step)]


# --- stacking -----------------------------------------------------------------------------------


class StackedBits(NamedTuple):
    """What `encode` asks of a module's bits, as an array."""

    inputs: np.ndarray


class Stackable(NamedTuple):
    """A QuantizedModule whose every leaf is an array, the number of bits of its input too."""

    params: Any
    input_scale: np.ndarray
    bits: StackedBits
    dequantization: Any


def is_table(leaf: Any) -> bool:
    return isinstance(leaf, fhe.LookupTable)


def stackable(module: QuantizedModule) -> Stackable:
    """Tables saturate at their ends, so repeating the last entry changes none; scalars become arrays."""

    def padded(leaf: Any) -> Any:
        if not is_table(leaf):
            return np.asarray(leaf)
        size = max(TABLE_ENTRIES, 1 << (len(leaf.values) - 1).bit_length())
        values = np.pad(leaf.values, (0, size - len(leaf.values)), mode="edge")
        low: Any = np.asarray(leaf.low)
        shift: Any = np.asarray(leaf.shift)
        return fhe.LookupTable(values, low, shift)

    params, dequantization = (
        jax.tree.map(padded, part, is_leaf=is_table) for part in (module.params, module.dequantization)
    )
    bits = StackedBits(np.asarray(module.bits.inputs))
    return Stackable(params, np.asarray(module.input_scale), bits, dequantization)


def shapes(stack: Stackable) -> tuple[Any, ...]:
    """Stackables of equal shapes fit into one stack."""
    leaves, tree = jax.tree.flatten(stack)
    return tree, *(np.shape(leaf) for leaf in leaves)


def stacks(members: Sequence[tuple[QuantizedFunction, Stackable]], largest: int, devices: int) -> list[list[int]]:
    """Indices of members that run together: equal functions and shapes, at most `largest`.

    Sizes are powers of two times the number of devices, so that few are compiled and none runs half empty; where
    there are fewer members than devices, the last one is repeated.
    """
    alike: dict[Any, list[int]] = {}
    for index, (function, stack) in enumerate(members):
        alike.setdefault((function, shapes(stack)), []).append(index)
    found = []
    for indices in alike.values():
        while indices:
            size = devices << max(0, (min(len(indices), largest) // devices).bit_length() - 1)
            found.append((indices + indices[-1:] * devices)[:size])
            indices = indices[size:]
    return found


def memory() -> float:
    """Bytes that all local devices together may use: a device's own limit, or what the machine has free."""
    devices = jax.local_devices()
    limits = [int((device.memory_stats() or {}).get("bytes_limit", 0)) for device in devices]
    if all(limits):
        return float(sum(limits))
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def stack_size(config: GPT2Config, tokens: int) -> int:
    """Configurations of a stack whose activations fit in a third of the memory, 1 to 16 a device."""
    count = len(jax.local_devices())
    # Residual stream, queries, keys and values packed and padded, scores, both sides of the MLP: with room for copies.
    each = 4 * tokens * (16 * config.n_embd + 3 * config.inner_dim + 2 * config.n_head * 64)
    fits = int(memory() / 3 / each)
    return max(count, min(fits, 16 * count))


# --- the programs -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("function", "graph", "layer"))
def _enter(
    function: QuantizedFunction,
    graph: nnx.GraphDef,
    state: nnx.State,
    stack: Stackable,
    heads: jax.Array,
    x: jax.Array,
    base: jax.Array,
    in_float: jax.Array,
    packed: Pack,
    layer: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The quantized modules of a stack.

    Args:
        stack: with K in front of every leaf; heads: (K,), which play no part where `layer` says that whole layers are
            computed.
        x: (B, T, C), the layer's head input.
        base: (K, N, C), the residual stream without the head; in_float: (K, N, C), what the float head adds to it.

    Returns:
        the residual stream with the integer head (K, N, C); squared norms (K,) of its error and of the float head; how
        many texts the engine refuses (K,).
    """

    def one(stack: Stackable, head: jax.Array, base: jax.Array, in_float: jax.Array):
        module: Any = stack
        output, refused = jax.vmap(lambda x: function.whole(JaxOps(), module, x))(x)  # (B, T, D), of a layer (B, T, C)
        output = output[packed.row, packed.column]
        refused = refused[packed.row, packed.column] & (packed.mask > 0)
        texts = jnp.zeros(x.shape[0]).at[packed.row].max(refused.astype(float))  # (B,)
        added = output if layer else contribution(graph, state, output, head)  # (N, C)
        weight = packed.mask[:, None]
        return base + added, jnp.sum((added - in_float) ** 2 * weight), jnp.sum(in_float**2 * weight), texts.sum()

    return jax.vmap(one)(stack, heads, base, in_float)


def _one_by_one(mesh: Mesh, function: Callable[[jax.Array], Any], h: jax.Array) -> Any:
    """A function of (N, C) over (K, N, C). Every device takes its configurations one after the other: the activations
    of one fill a device, and those of several a CPU's cache."""
    split = PartitionSpec(mesh.axis_names)
    return jax.shard_map(lambda h: jax.lax.map(function, h), mesh=mesh, in_specs=split, out_specs=split)(h)


@functools.partial(jax.jit, static_argnames=("graph", "mesh"), donate_argnames="h")
def _leave(graph: nnx.GraphDef, state: nnx.State, mesh: Mesh, h: jax.Array) -> jax.Array:
    """The rest of a block after its attention: (K, N, C) -> (K, N, C)."""
    return _one_by_one(mesh, lambda h: leave(graph, state, h), h)


@functools.partial(jax.jit, static_argnames=("graph", "mesh"), donate_argnames="h")
def _block(graph: nnx.GraphDef, state: nnx.State, mesh: Mesh, h: jax.Array, packed: Pack) -> jax.Array:
    """A block over packed tokens: (K, N, C) -> (K, N, C). Only attention sees passages, (B, T)."""
    block = nnx.merge(graph, state)
    batch, time = packed.index.shape

    def one(h: jax.Array) -> jax.Array:
        qkv = block.attn.c_attn(block.ln_1(h))[packed.index]  # (B, T, 3C)
        qkv = qkv.reshape(batch, time, 3, block.attn.n_head, -1).transpose(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        q, k, v = qkv
        heads = causal_attention(q, k, v)  # (B, H, T, D)
        heads = heads.transpose(0, 2, 1, 3)[packed.row, packed.column]  # (N, H, D)
        return leave(graph, state, h + block.attn.c_proj(heads.reshape(h.shape)))

    return _one_by_one(mesh, one, h)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reference:
    """The float model's distributions p over the vocabulary at N positions, in what a comparison needs of them.

    Args:
        final: (N, C), the final layer norm's output, of which logits are products.
        expected: (N, C), the mean of the output embeddings under p, so that a mean of logits is a product too.
        shift: (N,), the logarithm of the sum of exponentials; best: (N,), the likeliest token.
    """

    final: jax.Array
    expected: jax.Array
    shift: jax.Array
    best: jax.Array


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(N, ...) -> (N / chunk, chunk, ...)."""
    return x.reshape(-1, chunk, *x.shape[1:])


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _refer(graph: nnx.GraphDef, state: nnx.State, h: jax.Array, chunk: int) -> Reference:
    """Of the float model's residual stream after the last block, (N, C).

    chunk: positions whose logits are there at once; it divides N.
    """
    model = nnx.merge(graph, state)

    def one(h: jax.Array) -> Reference:
        final = model.ln_f(h)  # (P, C)
        logits = model.output_table @ final.T  # (V, P)
        shift = jax.nn.logsumexp(logits, axis=0)
        return Reference(final, jnp.exp(logits - shift).T @ model.output_table, shift, jnp.argmax(logits, axis=0))

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one, _chunks(h, chunk)))


@functools.partial(jax.jit, static_argnames=("graph", "mesh", "chunk"))
def _compare(
    graph: nnx.GraphDef,
    state: nnx.State,
    mesh: Mesh,
    h: jax.Array,
    reference: Reference,
    mask: jax.Array,
    ks: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the packed tokens of KL(float || quantized), (K,), and of agreements, (K, len(ks)).

    Args:
        h: (K, N, C), the residual stream after the last block; mask: (N,).
        chunk: positions whose logits are there at once; it divides N.
    """
    model = nnx.merge(graph, state)
    # The vocabulary comes first: CPUs reduce a leading axis many elements at a time, the last one element by element.
    token = jnp.arange(model.output_table.shape[0])[:, None]

    def one(part: tuple[Reference, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reference, mask, h = part  # (P, ...), (P,), (P, C)
        final = model.ln_f(h)
        got = model.output_table @ final.T  # (V, P)
        # sum p (log p - log q): the difference of the logits is taken before their mean. Where the rest cancels, what
        # is left is rounding, and no KL is negative.
        mean = jnp.sum(reference.expected * (reference.final - final), axis=1)
        kl = jnp.maximum(mean + jax.nn.logsumexp(got, axis=0) - reference.shift, 0.0)
        # The rank of the float model's best token: how many are likelier, the first of equals being likelier.
        own = jnp.take_along_axis(got, reference.best[None], axis=0)
        rank = jnp.sum((got > own) | ((got == own) & (token < reference.best)), axis=0)  # (P,)
        return jnp.sum(kl * mask), jnp.sum((rank[:, None] < ks) & (mask[:, None] > 0), axis=0)

    def each(h: jax.Array) -> tuple[jax.Array, jax.Array]:
        kl, agreement = jax.lax.map(one, jax.tree.map(lambda x: _chunks(x, chunk), (reference, mask, h)))
        return kl.sum(), agreement.sum(axis=0)

    return _one_by_one(mesh, each, h)


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer of the float model, with everything that its configurations share.

    Args:
        index: which layer.
        states: the evaluation's passages.
        data: what its heads are calibrated on; cost_inputs: calibration inputs (T, C) of the length whose cost
            counts.
    """

    index: int
    states: HiddenStates
    data: CalibrationData
    cost_inputs: list[np.ndarray]


class Sums(NamedTuple):
    """Sums over positions, float64: kl (K,), agreement (K, len(ks)), error and norm (K,). refused: (K,), texts."""

    kl: np.ndarray
    agreement: np.ndarray
    error: np.ndarray
    norm: np.ndarray
    refused: np.ndarray


class Prepared(NamedTuple):
    """A configuration in integers, and what its row says of what calibration chose and of its cost."""

    function: QuantizedFunction
    stackable: Stackable
    cost: Row


class SweepRunner:
    """A model with passages to measure configurations on.

    The only state is how far the passages have been read, so that layers in rising order are each read once, and what
    the last heads read.

    Raises:
        PromptError: passages that are empty, too long, or calibration text too; InputError: a k out of range.
    """

    def __init__(self, experiment: Experiment, gpt2: GPT2 | None = None):
        self.experiment = experiment
        self.gpt2 = gpt2 or GPT2.from_pretrained(experiment.model)
        self.ks = experiment.ks
        longest = check(experiment, self.gpt2)
        self.max_tokens = max(longest, experiment.seq_len)
        self._start = (
            HiddenStates.read(self.gpt2, experiment.passages, longest),
            HiddenStates.read(self.gpt2, experiment.calibration, self.max_tokens),
            HiddenStates.read(self.gpt2, experiment.calibration, experiment.seq_len),
        )
        self._reached = self._start
        self._fisher = fisher_information(self.gpt2, self._start[1])
        self._ablated: dict[Module, Sums] = {}
        self._heads: dict[tuple[int, int | None, int], tuple[jax.Array, jax.Array, jax.Array]] = {}
        lengths = self._start[0].lengths
        self._groups = group(PACK_TOKENS, lengths)
        tokens = max(sum(int(n.sum()) for n in lengths[start:stop]) for start, stop in self._groups)
        self.batch = experiment.batch or stack_size(self.gpt2.config, tokens)
        devices = len(jax.local_devices())
        self.batch = max(devices, self.batch // devices * devices)
        self._chunk = min(tokens, max(16, LOGITS // self.gpt2.config.vocab_size))
        self._chunk = -(-tokens // -(-tokens // self._chunk))
        size = -(-tokens // self._chunk) * self._chunk
        rows = max(stop - start for start, stop in self._groups)
        self._packs = [
            pack(self._padded(lengths[start:stop], rows).reshape(-1), longest, size) for start, stop in self._groups
        ]
        self._mesh = Mesh(np.array(jax.local_devices()), ("configurations",))
        self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec("configurations"))
        self._state = jax.device_put(self.gpt2.state, self._whole)
        self._blocks = [nnx.split(block)[1] for block in nnx.merge(self.gpt2.graph, self._state).h]
        final = self._start[0].at(self.gpt2, self.gpt2.config.n_layer)
        self._reference = [
            _refer(self.gpt2.graph, self._state, self._flat(final.hidden[start:stop], i), self._chunk)
            for i, (start, stop) in enumerate(self._groups)
        ]
        self.positions = sum(int(batch.sum()) for batch in lengths)

    # Where tokens are ----------------------------------------------------------------------------

    @staticmethod
    def _padded(batches: Sequence[Any], rows: int) -> Any:
        """Batches stacked, with batches of zeros where there are too few: (rows, B, ...)."""
        return np.stack([np.asarray(batch) for batch in batches] + [np.zeros_like(batches[0])] * (rows - len(batches)))

    def _passages(self, batches: Sequence[jax.Array], index: int) -> jax.Array:
        """The passages of a pack, given by batch: (B, T, C), on all devices."""
        rows = len(self._packs[index].index) // batches[0].shape[0]
        stacked = self._padded(batches, rows)
        return jax.device_put(stacked.reshape(-1, *stacked.shape[2:]), self._whole)

    def _flat(self, batches: Sequence[jax.Array], index: int) -> jax.Array:
        """The same, packed: (N, C)."""
        packed = self._packs[index]
        return self._passages(batches, index)[packed.row, packed.column]

    def layer(self, index: int) -> Layer:
        """The passages at a layer."""
        if index < self._reached[0].layer:
            self._reached = self._start
        self._reached = tuple(states.at(self.gpt2, index) for states in self._reached)
        states, calibration, cost = self._reached
        data = CalibrationData(calibration.inputs(self.gpt2), self._fisher[index])
        return Layer(index, states, data, cost.inputs(self.gpt2))

    # One configuration ---------------------------------------------------------------------------

    def calibrate(self, layer: Layer, configuration: Configuration) -> Prepared:
        """A configuration in integers, and what it would cost encrypted.

        Raises:
            CalibrationError: it cannot be had, as where a sum would leave int32.
        """
        module = configuration.module
        encrypted = EncryptedGPT2(self.gpt2, {module: configuration.config})
        encrypted = encrypted.calibrate_on({layer.index: layer.data}, self.max_tokens)
        fhe_config = fhe.FHEConfig(rounding=self.experiment.rounding)
        method = methods.get(configuration.config.method)
        # Lookups are counted on plain integers; another engine says what it would do when it compiles.
        length, backend = self.experiment.seq_len, "clear" if method.by_lookups else method.backend
        compiled = encrypted.compile_on({layer.index: layer.cost_inputs}, length, fhe_config, backend)
        whole = compiled.costs(length)[module]
        last = compiled.costs(length, length - 1)[module]
        chosen = encrypted.function(module).chosen(encrypted.quantized[module])
        spent: Row = {
            **{f"{name}_chosen": value for name, value in chosen.items()},
            "seq_len": length,
            "rounding": self.experiment.rounding if method.by_lookups else None,
            "machine": whole.machine,
            "estimated_seconds": whole.estimated_run_seconds,
            "estimated_seconds_per_token": last.estimated_run_seconds,
            **whole.counts,
        }
        return Prepared(encrypted.function(module), stackable(encrypted.quantized[module]), spent)

    # Stacks of them ------------------------------------------------------------------------------

    def _head(self, layer: Layer, head: int | None, index: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A pack at one head, or (None) at all of a layer's: the heads' input (B, T, C), the residual stream without
        the head, what it adds."""
        key = (layer.index, head, index)
        if key not in self._heads:
            while len(self._heads) >= HEADS:
                del self._heads[next(iter(self._heads))]
            start, stop = self._groups[index]
            heads = np.arange(self.gpt2.config.n_head) if head is None else np.array([head])
            # One module at a time, as `forward` does it: the same program, so the same integers.
            each = [self.gpt2.attend(layer.index, h, heads) for h in layer.states.hidden[start:stop]]
            x, base, in_float, _ = zip(*each, strict=True)
            self._heads[key] = (
                self._passages(x, index),
                self._flat(base, index),
                self._flat([part.sum(axis=0) for part in in_float], index),
            )
        return self._heads[key]

    def _inputs(self, layer: Layer, heads: Sequence[int | None], index: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A pack's head inputs (B, T, C), and the residual stream without each head and what each adds: (K, N, C)."""
        parts = [self._head(layer, head, index) for head in heads]
        base, in_float = (jnp.stack([part[which] for part in parts]) for which in (1, 2))
        return parts[0][0], jax.device_put(base, self._split), jax.device_put(in_float, self._split)

    def _measure(
        self,
        layer: Layer,
        function: QuantizedFunction | None,
        members: Sequence[Stackable],
        heads: Sequence[int | None],
    ) -> Sums:
        """A stack of configurations of one layer; without a function, its heads are left out."""
        graph, state = self.gpt2.block_graph, self._blocks[layer.index]
        numbers = jax.device_put(np.asarray([head or 0 for head in heads], np.int32), self._split)
        if function is not None:
            stack = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *members), self._split)
        total: Sums | None = None
        for index, packed in enumerate(self._packs):
            x, h, in_float = self._inputs(layer, heads, index)
            error = norm = refused = np.zeros(len(heads))
            if function is not None:
                h, error, norm, refused = _enter(
                    function, graph, state, stack, numbers, x, h, in_float, packed, layer=heads[0] is None
                )
            h = _leave(graph, state, self._mesh, h)
            for later in self._blocks[layer.index + 1 :]:
                h = _block(graph, later, self._mesh, h, packed)
            kl, agreement = _compare(
                self.gpt2.graph,
                self._state,
                self._mesh,
                h,
                self._reference[index],
                packed.mask,
                np.asarray(self.ks),
                self._chunk,
            )
            part = Sums(*(np.asarray(value, np.float64) for value in (kl, agreement, error, norm, refused)))
            total = part if total is None else Sums(*(a + b for a, b in zip(total, part, strict=True)))
        assert total is not None
        return total

    def forget(self) -> None:
        """Measures again what configurations share, when it is next needed: for timings."""
        self._ablated.clear()
        self._heads.clear()

    def _ablate(self, layer: Layer, heads: Iterable[int | None]) -> None:
        """Measures the model without each of these heads, once."""
        missing = [head for head in dict.fromkeys(heads) if Module(layer.index, head) not in self._ablated]
        nothing: Any = (None, ())
        for indices in stacks([nothing] * len(missing), self.batch, len(jax.local_devices())):
            sums = self._measure(layer, None, (), [missing[index] for index in indices])
            for position, index in enumerate(indices):
                module = Module(layer.index, missing[index])
                self._ablated[module] = Sums(*(value[position] for value in sums))

    def rows(self, layer: Layer, prepared: Sequence[tuple[Configuration, Prepared | CalibrationError]]) -> list[Row]:
        """Measures configurations of one layer; one that cannot be calibrated gets a row that says so."""
        rows = {}
        working = []
        for configuration, member in prepared:
            if isinstance(member, CalibrationError):
                rows[configuration.key] = self._row(configuration) | {"error": str(member)}
            else:
                working.append((configuration, member))
        self._ablate(layer, (configuration.module.head for configuration, _ in working))
        for indices in stacks([member[:2] for _, member in working], self.batch, len(jax.local_devices())):
            chosen = [working[index] for index in indices]
            sums = self._measure(
                layer,
                chosen[0][1].function,
                [member.stackable for _, member in chosen],
                [configuration.module.head for configuration, _ in chosen],
            )
            for position, (configuration, member) in enumerate(chosen):
                measured = self._metrics(
                    Sums(*(value[position] for value in sums)), self._ablated[configuration.module]
                )
                rows[configuration.key] = self._row(configuration) | measured | member.cost
        return [rows[configuration.key] for configuration, _ in prepared]

    def _row(self, configuration: Configuration) -> Row:
        return {"key": configuration.key, "model": self.experiment.model, **configuration.columns()}

    def _metrics(self, sums: Sums, ablated: Sums) -> Row:
        count = self.positions
        kl, kl_ablated = float(sums.kl) / count, float(ablated.kl) / count
        return {
            **{f"top_{k}": float(value) / count for k, value in zip(self.ks, sums.agreement, strict=True)},
            **{f"top_{k}_ablated": float(value) / count for k, value in zip(self.ks, ablated.agreement, strict=True)},
            "kl": kl,
            "kl_ablated": kl_ablated,
            "recovered_kl": 1.0 - kl / kl_ablated if kl_ablated > 0 else None,
            "head_error": float(np.sqrt(sums.error / sums.norm)) if sums.norm else None,
            "refused": int(sums.refused),
            "positions": count,
            "passages": len(self.experiment.passages),
        }

    # All of them ---------------------------------------------------------------------------------

    def run(
        self, configurations: Iterable[Configuration], calibrated: Callable[[Configuration], object] = lambda _: None
    ) -> Iterator[list[Row]]:
        """Measures configurations, in any order; yields the rows of a batch as soon as they are there.

        calibrated: is told of every one that waits to be measured only.

        While a batch is measured, the next one is calibrated, on as many threads as there are cores.
        """
        waiting: deque[tuple[Layer, list[tuple[Configuration, Future[Prepared]]]]] = deque()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for index, batch in batches(configurations, self.batch):
                    layer = waiting[-1][0] if waiting and waiting[-1][0].index == index else self.layer(index)
                    waiting.append((layer, [(each, pool.submit(self.calibrate, layer, each)) for each in batch]))
                    if len(waiting) > 1:
                        yield self._finish(*waiting.popleft(), calibrated)
                while waiting:
                    yield self._finish(*waiting.popleft(), calibrated)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _finish(
        self,
        layer: Layer,
        futures: Sequence[tuple[Configuration, Future[Prepared]]],
        calibrated: Callable[[Configuration], object],
    ) -> list[Row]:
        prepared: list[tuple[Configuration, Prepared | CalibrationError]] = []
        for configuration, future in futures:
            try:
                prepared.append((configuration, future.result()))
            except CalibrationError as error:
                prepared.append((configuration, error))
            calibrated(configuration)
        return self.rows(layer, prepared)


def batches(configurations: Iterable[Configuration], size: int) -> Iterator[tuple[int, list[Configuration]]]:
    """(layer, at most `size` configurations of it that are likely to stack), layers rising."""

    def order(configuration: Configuration) -> tuple[Any, ...]:
        config = configuration.config
        return configuration.module.layer, config.method, tuple(config.options.items())

    alike = sorted(configurations, key=order)
    while alike:
        layer = alike[0].module.layer
        batch = [each for each in alike[:size] if each.module.layer == layer]
        yield layer, batch
        alike = alike[len(batch) :]
