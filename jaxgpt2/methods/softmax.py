"""The attention of "Towards Encrypted Large Language Models with FHE" (Zama and Hugging Face, 2023), in integers.

Every step of softmax(q k^T / sqrt(D)) v is done under encryption: row maximum, subtraction, exponential, sum,
reciprocal, product. Every operation's result is requantized by a lookup, also where the levels stay what they
are: such lookups (78 of 11,046 at 6 tokens) change no integer; they are a guess at how Zama comes to its count.
Nothing is shared or skipped: it is the baseline that cheaper methods are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fhe import LookupTable, NumpyOps, Ops
from jaxgpt2.decoding import FullSequence
from jaxgpt2.methods.method import HeadWeights, Method, QuantizedFunction, QuantizedModule
from jaxgpt2.methods.requantize import (
    Projection,
    calibrate_projection,
    project,
    requantization,
    unsigned_table,
)
from jaxgpt2.quantize import (
    Bits,
    check_accumulator,
    largest_level,
    scale_for,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightsParams:
    """From queries and keys to attention weights."""

    scores: LookupTable  # q k^T -> score level
    scaled: LookupTable  # the score divided by sqrt(D), and the row maximum: levels that stay what they are
    below: LookupTable  # score level - row maximum, 0 and less: likewise
    exponential: LookupTable  # that -> exp, unsigned
    reciprocal: LookupTable  # row sum of exponentials -> its reciprocal, unsigned
    normalize: LookupTable  # exponential * reciprocal -> attention weight, unsigned
    lowest: int  # what a masked score is set to: no score level is below it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftmaxParams:
    query: Projection
    key: Projection
    value: Projection
    weights: WeightsParams
    output: LookupTable  # weights @ values -> output level


class Scale(NamedTuple):
    scale: np.ndarray  # (): real value of one step of an output


def attention_weights(ops: Ops, params: WeightsParams, q: Any, k: Any) -> Any:
    """Queries and keys (T, D) -> attention weights (T, T), unsigned, zero where a query may not look."""
    tokens = q.shape[0]
    causal = np.tri(tokens, dtype=np.int64)  # 1 where a query may look
    with ops.tag("scores"):
        scores = ops.lookup(params.scores, ops.matmul(q, k.transpose((1, 0))))
        scores = ops.lookup(params.scaled, scores)
    with ops.tag("softmax"):
        scores = scores * causal + params.lowest * (1 - causal)
        largest = ops.lookup(params.scaled, ops.max(scores, axis=1, keepdims=True))  # (T, 1)
        below = ops.lookup(params.below, scores - largest)  # 0 at the row's maximum
        exponentials = ops.lookup(params.exponential, below) * causal
        sums = exponentials.sum(axis=1).reshape((tokens, 1))
        return ops.lookup(params.normalize, exponentials * ops.lookup(params.reciprocal, sums))


def run_head(ops: Ops, params: SoftmaxParams, x: Any) -> tuple[Any]:
    """(T, C) input integers -> output integers (T, D)."""
    with ops.tag("query"):
        q = project(ops, params.query, x)  # (T, D)
    with ops.tag("key"):
        k = project(ops, params.key, x)  # (T, D)
    with ops.tag("value"):
        v = project(ops, params.value, x)  # (T, D)
    weights = attention_weights(ops, params.weights, q, k)  # (T, T)
    with ops.tag("output"):
        return (ops.lookup(params.output, ops.matmul(weights, v)),)  # (T, D)


def calibrate_head(weights: HeadWeights, inputs: Sequence[np.ndarray], bits: Bits, max_tokens: int) -> QuantizedModule:
    """Scales by the largest magnitude that the calibration inputs reach at every stage."""
    ops = NumpyOps()
    levels = largest_level(bits.activations)
    unsigned = 2**bits.activations - 1  # largest exponential, reciprocal and attention weight
    head_dim = weights.query.shape[1]

    x = np.concatenate(inputs)
    input_scale = scale_for(x, bits.inputs)
    x = np.rint(x / input_scale).astype(np.int64)
    starts = np.cumsum([len(passage) for passage in inputs])[:-1]
    query, q, query_scale = calibrate_projection(
        "query", input_scale * weights.query, weights.query_bias, x, bits, scale_for
    )
    key, k, key_scale = calibrate_projection("key", input_scale * weights.key, weights.key_bias, x, bits, scale_for)
    value, v, value_scale = calibrate_projection(
        "value", input_scale * weights.value, weights.value_bias, x, bits, scale_for
    )
    passages = list(zip(np.split(q, starts), np.split(k, starts), np.split(v, starts), strict=True))

    products = [a @ b.T for a, b, _ in passages]  # (T, T) each
    causal = np.concatenate([product[np.tri(len(product), dtype=bool)] for product in products])
    product_scale = query_scale * key_scale / np.sqrt(head_dim)
    score_scale = scale_for(causal * product_scale, bits.activations)
    scores = requantization(
        "scores",
        product_scale,
        score_scale,
        bits.activations,
        max(int(np.abs(product).max()) for product in products),
        head_dim * levels**2,
        bits.rounding_threshold,
    )
    exponential = LookupTable.build(lambda below: unsigned * np.exp(below * score_scale), -2 * levels, 0)
    # The row's maximum contributes `unsigned` to its sum, so that sum / unsigned is 1 to max_tokens.
    largest_sum = check_accumulator("softmax", unsigned * max_tokens)
    reciprocal = unsigned_table(
        lambda total: np.rint(unsigned * unsigned / np.maximum(total, unsigned)), largest_sum, bits.rounding_threshold
    )
    normalize = unsigned_table(lambda product: product / unsigned, unsigned * unsigned, bits.rounding_threshold)

    attention = WeightsParams(
        scores=scores,
        scaled=LookupTable.build(lambda level: level, -levels, levels),
        below=LookupTable.build(lambda level: level, -2 * levels, 0),
        exponential=exponential,
        reciprocal=reciprocal,
        normalize=normalize,
        lowest=-levels,
    )
    sums = np.concatenate([attention_weights(ops, attention, a, b) @ c for a, b, c in passages])
    output_scale = scale_for(sums * (value_scale / unsigned), bits.activations)
    output = requantization(
        "output",
        value_scale / unsigned,
        output_scale,
        bits.activations,
        int(np.abs(sums).max()),
        unsigned * max_tokens * levels,
        bits.rounding_threshold,
    )
    return QuantizedModule(
        params=SoftmaxParams(query, key, value, attention, output),
        input_scale=np.asarray(input_scale),
        dequantization=Scale(np.asarray(output_scale)),
        bits=bits,
        max_tokens=max_tokens,
    )


def decode(dequantization: Scale, outputs: tuple[jax.Array, ...]) -> jax.Array:
    """Output integers (..., T, D or C) to reals."""
    return outputs[0].astype(jnp.float32) * jnp.asarray(dequantization.scale, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParams:
    heads: tuple[SoftmaxParams, ...]
    projections: tuple[np.ndarray, ...]  # (D, C) a head


def run_layer(ops: Ops, params: LayerParams, x: Any) -> tuple[Any]:
    """(T, C) input integers -> what the block adds to the residual stream, (T, C): Zama's multi-head model."""
    outputs = [run_head(ops, head, x)[0] for head in params.heads]
    with ops.tag("projection"):
        total = ops.matmul(outputs[0], params.projections[0])
        for output, projection in zip(outputs[1:], params.projections[1:], strict=True):
            total = total + ops.matmul(output, projection)
    return (total,)


def calibrate_layer(
    weights: Sequence[HeadWeights], inputs: Sequence[np.ndarray], bits: Bits, max_tokens: int
) -> QuantizedModule:
    """Each head as alone; the scales of their outputs go into the projection, so that its sum has one scale."""
    heads = [calibrate_head(head, inputs, bits, max_tokens) for head in weights]
    projections = [
        head.output * calibrated.dequantization.scale for head, calibrated in zip(weights, heads, strict=True)
    ]
    scale = scale_for(np.concatenate(projections), bits.weights)
    integers = tuple(np.rint(projection / scale).astype(np.int64) for projection in projections)
    largest = largest_level(bits.activations)
    check_accumulator("projection", sum(int(np.abs(integer).sum(axis=0).max()) * largest for integer in integers))
    return QuantizedModule(
        params=LayerParams(tuple(head.params for head in heads), integers),
        input_scale=heads[0].input_scale,
        dequantization=Scale(np.asarray(scale)),
        bits=bits,
        max_tokens=max_tokens,
    )


SOFTMAX = Method(
    "softmax",
    head=QuantizedFunction(FullSequence(run_head), calibrate_head, decode),
    layer=QuantizedFunction(FullSequence(run_layer), calibrate_layer, decode),
)
