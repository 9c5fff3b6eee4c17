"""GPT-2 in Flax NNX, in the order in which data flows through it.

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) for the model, and the layout of
Hugging Face's GPT-2 checkpoints for the names of its parts, so that weights load without renaming.

Shapes in comments: B batch, T tokens, C width (n_embd), H heads, D head_dim, S cache length, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt2.models.gpt2.config import GPT2Config

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

# Flax from 0.12 on wants modules in a list to stand in its own; before, in Python's.
ModuleList = getattr(nnx, "List", list)


class LayerCache(NamedTuple):
    """Keys and values of the tokens a block has seen."""

    keys: jax.Array  # (B, H, S, D)
    values: jax.Array  # (B, H, S, D)


class Cache(NamedTuple):
    """Key/value cache of a model: room for S tokens, of which `length` are filled."""

    layers: tuple[LayerCache, ...]
    length: jax.Array  # () int32


def causal_attention(queries: jax.Array, keys: jax.Array, values: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, where query i stands at position `first + i` and sees keys up to its own.

    Args:
        queries: (B, H, T, D).
        keys, values: (B, H, S, D) with S >= first + T; entries after `first + i` are never read by query i.
        first: position of the first query.

    Returns:
        (B, H, T, D).
    """
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys) / math.sqrt(queries.shape[-1])  # (B, H, T, S)
    position = first + jnp.arange(queries.shape[2])[:, None]
    seen = jnp.arange(keys.shape[2])[None, :] <= position  # (T, S)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)  # (B, H, T, S)
    return jnp.einsum("bhts,bhsd->bhtd", weights, values)  # (B, H, T, D)


class Attention(nnx.Module):
    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        normal = nnx.initializers.normal
        self.n_head = config.n_head
        self.c_attn = nnx.Linear(config.n_embd, 3 * config.n_embd, kernel_init=normal(0.02), rngs=rngs)
        # Residual projections start smaller, so that the stream's variance does not grow with depth.
        residual = normal(0.02 / math.sqrt(2 * config.n_layer))
        self.c_proj = nnx.Linear(config.n_embd, config.n_embd, kernel_init=residual, rngs=rngs)

    def heads(self, x: jax.Array, cache: LayerCache | None = None, first: jax.Array | int = 0):
        """What every head says, before the output projection.

        Args:
            x: (B, T, C), the block's input after its first layer norm.
            cache: keys and values so far; the new ones are written at `first`.

        Returns:
            heads (B, H, T, D) and the new cache (None without one).
        """
        qkv = self.c_attn(x)  # (B, T, 3C)
        batch, time, _ = qkv.shape
        q, k, v = qkv.reshape(batch, time, 3, self.n_head, -1).transpose(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, first, axis=2)  # (B, H, S, D)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, first, axis=2)  # (B, H, S, D)
            cache = LayerCache(k, v)
        return causal_attention(q, k, v, first), cache

    def project(self, heads: jax.Array) -> jax.Array:
        """(B, H, T, D) -> (B, T, C): the heads side by side through the output projection."""
        batch, _, time, _ = heads.shape
        return self.c_proj(heads.transpose(0, 2, 1, 3).reshape(batch, time, -1))


class MLP(nnx.Module):
    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        normal = nnx.initializers.normal
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]
        self.c_fc = nnx.Linear(config.n_embd, config.inner_dim, kernel_init=normal(0.02), rngs=rngs)
        residual = normal(0.02 / math.sqrt(2 * config.n_layer))
        self.c_proj = nnx.Linear(config.inner_dim, config.n_embd, kernel_init=residual, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, rngs=rngs)

        self.ln_1 = norm()
        self.attn = Attention(config, rngs)
        self.ln_2 = norm()
        self.mlp = MLP(config, rngs)

    def __call__(self, h: jax.Array, cache: LayerCache | None = None, first: jax.Array | int = 0):
        """(B, T, C) -> (B, T, C) and the new cache."""
        heads, cache = self.attn.heads(self.ln_1(h), cache, first)
        return self.leave(h + self.attn.project(heads)), cache

    def leave(self, h: jax.Array) -> jax.Array:
        """The second half, after attention was added to h: (..., C) -> (..., C)."""
        return h + self.mlp(self.ln_2(h))


class Transformer(nnx.Module):
    """GPT-2's network: token ids in, logits out."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        normal = nnx.initializers.normal
        self.config = config
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, embedding_init=normal(0.02), rngs=rngs)
        self.wpe = nnx.Embed(config.n_positions, config.n_embd, embedding_init=normal(0.02), rngs=rngs)
        self.h = ModuleList([Block(config, rngs) for _ in range(config.n_layer)])
        self.ln_f = nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Embed(config.vocab_size, config.n_embd, embedding_init=normal(0.02), rngs=rngs)

    def embed(self, tokens: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """(B, T) token ids, the first of them at position `first` -> (B, T, C)."""
        return self.wte(tokens) + self.wpe(first + jnp.arange(tokens.shape[1]))

    @property
    def output_table(self) -> jax.Array:
        """(V, C): logits are products with its rows."""
        return (self.wte if self.config.tie_word_embeddings else self.lm_head).embedding[...]

    def unembed(self, h: jax.Array) -> jax.Array:
        """(..., C) -> logits (..., V)."""
        return self.ln_f(h) @ self.output_table.T

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B, T) token ids -> logits (B, T, V)."""
        h = self.embed(tokens)
        for block in self.h:
            h, _ = block(h)
        return self.unembed(h)

    def empty_cache(self, batch: int, size: int) -> Cache:
        """Room for `size` tokens of `batch` texts."""
        shape = (batch, self.config.n_head, size, self.config.head_dim)
        layers = tuple(LayerCache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.config.n_layer))
        return Cache(layers, jnp.zeros((), jnp.int32))

    def extend(self, tokens: jax.Array, cache: Cache, count: jax.Array | int) -> tuple[jax.Array, Cache]:
        """Reads `count` more tokens after those in the cache.

        Args:
            tokens: (B, T) ids, of which the first `count` are text and the rest padding; the cache has room for T.
            count: 1 to T.

        Returns:
            logits (B, V) after the last token of text, and the cache with `count` more tokens.
        """
        h = self.embed(tokens, cache.length)
        layers = []
        for block, layer in zip(self.h, cache.layers, strict=True):
            h, layer = block(h, layer, cache.length)
            layers.append(layer)
        last = jax.lax.dynamic_index_in_dim(h, count - 1, axis=1, keepdims=False)  # (B, C)
        # Padding after the text was written to the cache too; the next tokens overwrite it before anyone reads it.
        return self.unembed(last), Cache(tuple(layers), cache.length + count)
