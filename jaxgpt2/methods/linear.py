"""Every linear layer of every block in integers, so that somebody else can compute them on masked numbers.

A layer's weights are integers with a scale for each output channel, its inputs integers with a scale for each token,
and their product is exact (`jaxgpt2.linear` says who computes it). What stays outside is bare: layer norms without
gains and shifts, which go into the matrix and the bias behind them, attention, GELU, residuals.

Inputs have outliers, a few features that are far larger than the others, and a token has one scale. So features are
divided by factors that calibration finds, and rows of the matrix multiplied by them, which changes no product (Xiao and
others, "SmoothQuant", ICML 2023). The factors are fixed: the shape of what is sent does not depend on any text.

Shapes: B batch, T tokens, C width, H heads, D head_dim, d inputs and m outputs of a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt2.errors import InputError
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import ACTIVATION_FUNCTIONS, LayerCache, causal_attention

# A block's matrices in the order in which a token meets them, each with the layer norm before it, if there is one.
MATRICES: dict[str, str | None] = {
    "attn.c_attn": "ln_1",
    "attn.c_proj": None,
    "mlp.c_fc": "ln_2",
    "mlp.c_proj": None,
}


@dataclass(frozen=True)
class LinearBits:
    """Bit widths of all linear layers.

    Args:
        weights: 2 to 12. inputs: 2 to 16.

    Raises:
        InputError: a width outside.
    """

    weights: int = 10
    inputs: int = 12

    def __post_init__(self) -> None:
        for name, largest in (("weights", 12), ("inputs", 16)):
            value = getattr(self, name)
            if type(value) is not int or not 2 <= value <= largest:
                raise InputError(f"bits of {name} of linear layers must be 2 to {largest}, got {value}")

    @property
    def largest_input(self) -> int:
        return 2 ** (self.inputs - 1) - 1


class LayerParams(NamedTuple):
    """What the client needs of one matrix: nothing of its size."""

    smoothing: np.ndarray  # (d,): what its inputs are divided by
    scale: np.ndarray  # (m,): real value of one step of the product, for an input scale of one
    bias: np.ndarray  # (m,)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClientParams:
    """What the client holds of the model: embeddings, final norm, and vectors for every matrix. No matrix of a block.

    layers: for each block, by the names of MATRICES.
    """

    wte: np.ndarray  # (V, C)
    wpe: np.ndarray  # (n_positions, C)
    output: np.ndarray  # (V, C): logits are products with its rows
    ln_f: tuple[np.ndarray, np.ndarray]  # gain and shift, (C,) each
    layers: tuple[Mapping[str, LayerParams], ...]


class QuantizedLinear(NamedTuple):
    """A model with linear layers in integers: the client's half, and the server's, int16 (d, m) by full name."""

    client: ClientParams
    weights: dict[str, np.ndarray]


def matrix_names(config: GPT2Config) -> list[str]:
    """All matrices, in the order in which a token meets them: "h.0.attn.c_attn" and so on."""
    return [f"h.{layer}.{name}" for layer in range(config.n_layer) for name in MATRICES]


def quantize_matrix(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A real matrix (d, m), float64, as integers, int16, and the scale of each output channel (m,).

    The same everywhere, to the last bit: a client that verifies makes the matrix anew.
    """
    limit = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-30) / limit
    return np.rint(weight / scale).astype(np.int16), scale


def folded(tensors: Mapping[str, np.ndarray], layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (d, m) and its bias (m,), float64, with the gain and the shift of the layer norm before it."""
    weight, bias = (np.asarray(tensors[f"h.{layer}.{name}.{part}"], np.float64) for part in ("weight", "bias"))
    norm = MATRICES[name]
    if norm is None:
        return weight, bias
    gain, shift = (np.asarray(tensors[f"h.{layer}.{norm}.{part}"], np.float64) for part in ("weight", "bias"))
    return gain[:, None] * weight, bias + shift @ weight


def smoothing_for(largest: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Factors (d,) that share the range of a feature, given its largest magnitude (d,), between it and its row."""
    rows = np.maximum(np.abs(weight).max(axis=1), 1e-9)
    factors = np.sqrt(np.maximum(largest, 1e-9) / rows)
    # As float32, because the client divides by these very numbers.
    return np.asarray(factors / np.exp(np.log(factors).mean()), np.float32)


def quantize(
    config: GPT2Config,
    tensors: Mapping[str, np.ndarray],
    bits: LinearBits,
    smoothing: Mapping[str, np.ndarray],
) -> QuantizedLinear:
    """A float model's linear layers in integers.

    Args:
        tensors: under Hugging Face's names. smoothing: factors (d,) of every matrix, by full name.
    """
    layers, weights = [], {}
    for layer in range(config.n_layer):
        params = {}
        for name in MATRICES:
            full = f"h.{layer}.{name}"
            weight, bias = folded(tensors, layer, name)
            weights[full], scale = quantize_matrix(smoothing[full].astype(np.float64)[:, None] * weight, bits.weights)
            params[name] = LayerParams(smoothing[full], scale.astype(np.float32), bias.astype(np.float32))
        layers.append(params)
    wte = np.asarray(tensors["wte.weight"], np.float32)
    output = wte if config.tie_word_embeddings else np.asarray(tensors["lm_head.weight"], np.float32)
    ln_f = (np.asarray(tensors["ln_f.weight"], np.float32), np.asarray(tensors["ln_f.bias"], np.float32))
    client = ClientParams(wte, np.asarray(tensors["wpe.weight"], np.float32), output, ln_f, tuple(layers))
    return QuantizedLinear(client, weights)


# --- the product, where the weights are at hand ---------------------------------------------------


def _float64() -> AbstractContextManager[Any]:
    """JAX has no float64 unless asked."""
    if hasattr(jax, "enable_x64"):  # JAX 0.8 and later
        return jax.enable_x64(True)  # pyright: ignore[reportAttributeAccessIssue]
    from jax.experimental import enable_x64

    return enable_x64()


@jax.jit
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.float64), weight).astype(jnp.int32)


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Integers x (..., d) times a matrix (d, m) of integers in float64: int32 (..., m), exact where they fit int32."""
    with _float64():
        return _product(x, weight)


def prepared(weight: np.ndarray) -> jax.Array:
    """A matrix of integers as `product` takes it."""
    with _float64():
        return jnp.asarray(weight, jnp.float64)


# --- between the matrices -------------------------------------------------------------------------


class Quantized(NamedTuple):
    """Inputs of a matrix: integers (B, T, d), and the real value of one step of each token (B, T, 1)."""

    integers: jax.Array
    scale: jax.Array


def _quantize(x: jax.Array, params: LayerParams, largest: int) -> Quantized:
    x = x / params.smoothing
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / largest
    return Quantized(jnp.clip(jnp.rint(x / scale), -largest, largest).astype(jnp.int32), scale)


def _real(y: jax.Array, scale: jax.Array, params: LayerParams) -> jax.Array:
    """A product (B, T, m) of integers in reals."""
    return y.astype(jnp.float32) * scale * params.scale + params.bias


def _norm(h: jax.Array, epsilon: float) -> jax.Array:
    """A layer norm without gain and shift."""
    centred = h - h.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)


_sized = functools.partial(jax.jit, static_argnames="config")
_piece = functools.partial(jax.jit, static_argnames=("config", "largest"))


@_sized
def embed(client: ClientParams, tokens: jax.Array, start: jax.Array | int, config: GPT2Config) -> jax.Array:
    """(B, T) -> (B, T, C)."""
    return client.wte[tokens] + client.wpe[start + jnp.arange(tokens.shape[1])]


@_piece
def before_attention(h: jax.Array, params: LayerParams, config: GPT2Config, largest: int) -> Quantized:
    """The residual stream (B, T, C) to the inputs of c_attn."""
    return _quantize(_norm(h, config.layer_norm_epsilon), params, largest)


@_piece
def attention(
    y: jax.Array,
    scale: jax.Array,
    params: LayerParams,
    following: LayerParams,
    cache: LayerCache | None,
    start: jax.Array | int,
    config: GPT2Config,
    largest: int,
) -> tuple[Quantized, LayerCache | None]:
    """c_attn's product (B, T, 3C) to the inputs of c_proj, and the cache with the new keys and values."""
    qkv = _real(y, scale, params)
    batch, time, _ = qkv.shape
    q, k, v = qkv.reshape(batch, time, 3, config.n_head, -1).transpose(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, start, axis=2)  # (B, H, S, D)
        v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, start, axis=2)
        cache = LayerCache(k, v)
    heads = causal_attention(q, k, v, start)  # (B, H, T, D)
    return _quantize(heads.transpose(0, 2, 1, 3).reshape(batch, time, -1), following, largest), cache


@_piece
def before_mlp(
    h: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    params: LayerParams,
    following: LayerParams,
    config: GPT2Config,
    largest: int,
) -> tuple[jax.Array, Quantized]:
    """The residual stream with c_proj's product (B, T, C) added, and the inputs of c_fc."""
    h = h + _real(y, scale, params)
    return h, _quantize(_norm(h, config.layer_norm_epsilon), following, largest)


@_piece
def activation(
    y: jax.Array, scale: jax.Array, params: LayerParams, following: LayerParams, config: GPT2Config, largest: int
) -> Quantized:
    """c_fc's product (B, T, 4C) to the inputs of the MLP's c_proj."""
    return _quantize(ACTIVATION_FUNCTIONS[config.activation_function](_real(y, scale, params)), following, largest)


@jax.jit
def add(h: jax.Array, y: jax.Array, scale: jax.Array, params: LayerParams) -> jax.Array:
    """The residual stream with a product (B, T, C) added."""
    return h + _real(y, scale, params)


@_sized
def unembed(client: ClientParams, h: jax.Array, config: GPT2Config) -> jax.Array:
    """(B, T, C) -> logits (B, T, V)."""
    gain, shift = client.ln_f
    return (_norm(h, config.layer_norm_epsilon) * gain + shift) @ client.output.T
