"""Fine-tunes a model all of whose attention is a method, through the integers that encryption computes.

A run of the method is the method's own function, on integers in float32. Where it rounds, and where it looks something
up, gradients take the slope of the table (a straight-through estimator: Bengio et al., 2013, arXiv 1308.3432). The
scales and tables stay those of calibration; weights move. What is learned is to predict what the float model predicts
(Hinton et al., 2015), on text that the float model writes: no corpus is needed.

Shapes: B texts, T tokens, C width, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fhe
from jaxgpt2 import methods
from jaxgpt2.calibration import token_batches
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages, longest_passage
from jaxgpt2.methods import MethodConfig, QuantizedModule
from jaxgpt2.methods.formula import PROJECTIONS, Formula, attend_to_text, decode, formula_of
from jaxgpt2.methods.jax_ops import JaxOps, straight_through
from jaxgpt2.models.gpt2.model import Transformer
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import assemble, disassemble
from jaxgpt2.modules import Module
from jaxgpt2.progress import note, step
from jaxgpt2.quantize import largest_level, scale_for

# Texts that the float model writes: how many, and of how many tokens.
TEXTS, TOKENS, BATCH = 1024, 32, 16

# Of Adam; it falls to 0 as a cosine.
RATE = 5e-4

# Entries to either side over which a table's slope is taken, and entries that all tables are padded to.
WINDOW, ENTRIES = 2, 2048


class StraightThroughOps(JaxOps):
    """Lookup tables in float32 arrays that hold integers: their values, with the gradients of their slopes."""

    def lookup(self, table: Any, x: jax.Array) -> jax.Array:
        values = jnp.asarray(table.values, jnp.float32)
        step = jnp.exp2(jnp.asarray(table.shift, jnp.float32))
        index = (jnp.floor((x + jnp.floor(step / 2)) / step) - table.low).astype(jnp.int32)
        index = jnp.clip(index, 0, len(values) - 1)
        ends = jnp.clip(jnp.stack([index - WINDOW, index + WINDOW]), 0, len(values) - 1)
        slope = jax.lax.stop_gradient((values[ends[1]] - values[ends[0]]) / (2 * WINDOW * step))
        return values[index] + slope * (x - jax.lax.stop_gradient(x))  # exactly an integer

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b)


def rounded(x: jax.Array, limit: int) -> jax.Array:
    """Integers of magnitudes up to a limit, whose gradients are those of x."""
    clipped = jnp.clip(x, -limit, limit)
    return straight_through(clipped, jnp.rint(clipped))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """A calibrated head, as training needs it.

    steps: (3,), the real value of one step of the weights of query, key and value, each times input_scale.
    """

    module: QuantizedModule
    steps: np.ndarray


def integer_weights(tensors: Mapping[str, jax.Array], head: Head, layer: int, number: Any, config: Any) -> Any:
    """The projections of a head, cut out of the model's tensors and rounded."""
    width, size = config.n_embd, config.head_dim
    weight = tensors[f"h.{layer}.attn.c_attn.weight"].reshape(width, 3, -1, size)[:, :, number]
    bias = tensors[f"h.{layer}.attn.c_attn.bias"].reshape(3, -1, size)[:, number]
    limit, projections = largest_level(head.module.bits.weights), []
    for part, projection in enumerate(head.module.params.projections):
        integers = rounded(weight[:, part] * head.module.input_scale / head.steps[part], limit)
        step = bias[part] / head.steps[part]
        projections.append(
            dataclasses.replace(projection, weight=integers, bias=straight_through(step, jnp.rint(step)))
        )
    return dataclasses.replace(head.module.params, projections=tuple(projections))


def forward(
    formula: Formula, model: Transformer, tensors: Mapping[str, jax.Array], heads: tuple[Head, ...], tokens: jax.Array
) -> jax.Array:
    """Logits (B, T, V) of a model all of whose heads are computed by the formula; heads are stacked, (H,) a layer."""
    h = model.embed(tokens)
    for layer, (block, stacked) in enumerate(zip(model.h, heads, strict=True)):
        x = block.ln_1(h)

        def one(head: Head, number: jax.Array, x: jax.Array = x, layer: int = layer) -> jax.Array:
            params = integer_weights(tensors, head, layer, number, model.config)
            integers = rounded(x / head.module.input_scale, largest_level(head.module.bits.inputs))
            run = functools.partial(attend_to_text, formula, StraightThroughOps(), params)
            return jax.vmap(lambda x: decode(head.module.dequantization, run(x)))(integers)

        outputs = jax.vmap(one)(stacked, jnp.arange(model.config.n_head))  # (H, B, T, D)
        h = block.leave(h + block.attn.project(outputs.transpose(1, 0, 2, 3)))
    return model.unembed(h)


def padded(table: Any) -> Any:
    """Tables of one size can be stacked; they saturate at their ends."""
    if not isinstance(table, fhe.LookupTable):
        return np.asarray(table)
    size = max(ENTRIES, len(table.values))
    low: Any = np.asarray(table.low)
    shift: Any = np.asarray(table.shift)
    return fhe.LookupTable(np.pad(table.values, (0, size - len(table.values)), mode="edge"), low, shift)


def stacked(encrypted: EncryptedGPT2) -> tuple[Head, ...]:
    """The calibrated heads of a model, all of them, by layer."""
    tensors, config = disassemble(encrypted.model.model), encrypted.model.config  # pyright: ignore
    layers, constants = [], encrypted.quantized[Module(0, 0)].params.constants
    for layer in range(config.n_layer):
        weight = np.asarray(tensors[f"h.{layer}.attn.c_attn.weight"], np.float64)
        weight = weight.reshape(config.n_embd, 3, config.n_head, config.head_dim)
        heads = []
        for number in range(config.n_head):
            own = encrypted.quantized[Module(layer, number)]
            steps = [scale_for(weight[:, part, number] * own.input_scale, own.bits.weights) for part in range(3)]
            # Heads are stacked, so they have one value of each constant: what tables hold is not changed by it.
            own = dataclasses.replace(own, params=dataclasses.replace(own.params, constants=constants))
            own = dataclasses.replace(
                own, params=jax.tree.map(padded, own.params, is_leaf=lambda leaf: isinstance(leaf, fhe.LookupTable))
            )
            heads.append(Head(own, np.array(steps)))
        layers.append(jax.tree.map(lambda *leaves: np.stack(leaves), *heads))
    return tuple(layers)


def write_texts(gpt2: GPT2, count: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Texts (count, tokens) that a model writes: each begins with the end of another, and tokens are drawn."""

    @jax.jit
    def draw(carry: Any, key: jax.Array) -> Any:
        cache, last = carry
        logits, cache = gpt2.model.extend(last[:, None], cache, 1)
        last = jax.random.categorical(key, logits)
        return (cache, last), last

    parts, size = [], min(count, 256)
    for index in range(0, count, size):
        start = jnp.full(size, (gpt2.config.ends_of_text or (0,))[0])
        keys = jax.random.split(jax.random.key(seed + index), tokens)
        _, drawn = jax.lax.scan(draw, (gpt2.model.empty_cache(size, tokens), start), keys)
        parts.append(np.asarray(drawn.T))
    return np.concatenate(parts)[:count]


def fine_tune(
    gpt2: GPT2,
    config: MethodConfig,
    encrypted: EncryptedGPT2,
    minutes: float,
    report: Callable[[int, float, float], None],
) -> tuple[EncryptedGPT2, int]:
    """The model with all heads by the method, trained for so many minutes, and after how many steps that was.

    encrypted: it, calibrated.
    report: is told the step, the loss and how many percent of the time are over, every 50 steps.

    Raises:
        MethodError: the method was not made of a formula of q, k and v.
    """
    method = methods.get(config.method)
    formula = formula_of(method)
    if formula.projects:
        raise methods.MethodError(f"{config.method} makes its own projections, which are not trained")
    structure, heads = gpt2.config, stacked(encrypted)
    texts = write_texts(gpt2, TEXTS, TOKENS)
    teacher = jax.jit(lambda tokens: jax.nn.log_softmax(gpt2(tokens)))

    def loss(tensors: Any, heads: Any, tokens: jax.Array, wanted: jax.Array) -> jax.Array:
        got = jax.nn.log_softmax(forward(formula, assemble(structure, tensors), tensors, heads, tokens))
        return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - got), axis=-1))

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), optax.scale(-rate))

    @jax.jit
    def advance(tensors: Any, state: Any, heads: Any, rate: jax.Array, tokens: jax.Array, wanted: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(tensors, heads, tokens, wanted)
        updates, state = optimizer(rate).update(gradients, state, tensors)
        return optax.apply_updates(tensors, updates), state, value

    tensors: Any = dict(disassemble(gpt2.model))
    state, random, count, losses = optimizer(RATE).init(tensors), np.random.default_rng(0), 0, []
    started: float | None = None
    share = 0.0
    while share < 1.0:
        tokens = jnp.asarray(texts[random.choice(len(texts), BATCH, replace=False)])
        rate = RATE * min(1.0, (count + 1) / 50) * 0.5 * (1 + np.cos(np.pi * share))
        tensors, state, value = advance(tensors, state, heads, jnp.asarray(rate), tokens, teacher(tokens))
        losses.append(float(value))
        count += 1
        started = time.monotonic() if started is None else started  # compiling does not count
        share = (time.monotonic() - started) / (60 * minutes)
        if count % 50 == 0 or count == 2:
            report(count, float(np.mean(losses[-50:])), 100 * min(share, 1.0))
    return with_weights(encrypted, tensors), count


def with_weights(encrypted: EncryptedGPT2, tensors: Mapping[str, jax.Array]) -> EncryptedGPT2:
    """The model with other weights; its heads keep their scales and tables."""
    before = encrypted.model
    assert isinstance(before, GPT2)
    quantized = {}
    for layer, heads in enumerate(stacked(encrypted)):
        for number in range(before.config.n_head):
            head = jax.tree.map(lambda leaf, number=number: leaf[number], heads)
            projections = integer_weights(tensors, head, layer, number, before.config).projections
            own = encrypted.quantized[Module(layer, number)]
            projections = tuple(
                dataclasses.replace(
                    old, weight=np.asarray(new.weight).astype(np.int64), bias=np.asarray(new.bias).astype(np.int64)
                )
                for old, new in zip(own.params.projections, projections, strict=True)
            )
            assert len(projections) == len(PROJECTIONS)
            quantized[Module(layer, number)] = dataclasses.replace(
                own, params=dataclasses.replace(own.params, projections=projections)
            )
    model = GPT2(before.config, assemble(before.config, dict(tensors)), before.tokenizer)
    return EncryptedGPT2(model, encrypted.configs, quantized)


def kl_from(
    gpt2: GPT2, encrypted: EncryptedGPT2, passages: Sequence[str], longest: int, runner: Any = None
) -> tuple[float, float]:
    """KL(float model || quantized model) in nats, and how often their best tokens agree, over all positions.

    The float model is another one than the quantized model's own after training. runner: "ablated", or None for the
    quantized heads.
    """
    runner = runner or encrypted.runner("quantized")
    kl = agreement = 0.0
    positions = 0
    for tokens, lengths in token_batches(gpt2, passages, longest):
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        wanted = jax.nn.log_softmax(gpt2(tokens))
        logits = encrypted.forward(tokens, runner, lengths=lengths).logits
        got = jax.nn.log_softmax(logits)
        kl += float(jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - got), axis=-1) * mask))
        agreement += float(jnp.sum((jnp.argmax(wanted, axis=-1) == jnp.argmax(got, axis=-1)) * mask))
        positions += int(lengths.sum())
    return kl / positions, agreement / positions


def compare(attention: str, bits: int, minutes: float) -> dict[str, Any]:
    """Fine-tunes the bundled model with a method in all heads: KL from the float model before and after."""
    gpt2, passages = GPT2.from_pretrained("tiny"), bundled_passages("eval")
    longest, config = longest_passage(gpt2, passages), MethodConfig.of(methods.named(attention), bits)
    modules = ",".join(f"{layer}.{head}" for layer in range(gpt2.config.n_layer) for head in range(gpt2.config.n_head))
    with step("calibrating"):
        encrypted = EncryptedGPT2.encrypt(gpt2, modules, config).calibrate(bundled_passages("calibration"), longest)
    before = kl_from(gpt2, encrypted, passages, longest)
    note(f"{config.method}, all heads, before: KL {before[0]:.3f}, top-1 {before[1]:.3f}")

    def report(count: int, loss: float, share: float) -> None:
        note(f"step {count}: KL {loss:.4f} on text of the model's own, {share:.0f}% of the time")

    tuned, steps = fine_tune(gpt2, config, encrypted, minutes, report)
    after = kl_from(gpt2, tuned, passages, longest)
    ablated, _ = kl_from(gpt2, encrypted, passages, longest, "ablated")
    return {
        "attention": config.method,
        "bits": bits,
        "minutes": minutes,
        "steps": steps,
        "kl_before": before[0],
        "kl_after": after[0],
        "top_1_before": before[1],
        "top_1_after": after[1],
        "kl_ablated": ablated,
    }
