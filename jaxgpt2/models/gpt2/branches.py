"""GPT-2 in pieces, each compiled by itself: what runs between encrypted modules.

The pieces are the same compiled code in every mode, so that what reaches an encrypted module, and with it the text, is
the same in every mode too. A piece takes the structure (a constant of the compiled code) and the state of what it runs:
the whole model, or one block, so that one compiled program serves all layers.

Shapes: B batch, T tokens, C width, H heads, D head_dim, L layers, P encrypted heads, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt2.models.gpt2.model import LayerCache

_piece = functools.partial(jax.jit, static_argnames="graph")


@_piece
def embed(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """(B, T) -> (B, T, C)."""
    return nnx.merge(graph, state).embed(tokens, start)


@_piece
def block(
    graph: nnx.GraphDef, state: nnx.State, h: jax.Array, cache: LayerCache | None = None, start: jax.Array | int = 0
) -> tuple[jax.Array, LayerCache | None]:
    """One block: (B, T, C) -> (B, T, C) and its new cache."""
    return nnx.merge(graph, state)(h, cache, start)


@_piece
def attend(
    graph: nnx.GraphDef,
    state: nnx.State,
    h: jax.Array,
    heads: jax.Array,
    cache: LayerCache | None = None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array, LayerCache | None]:
    """A block's attention with the encrypted heads left out.

    Args:
        h: the block's input (B, T, C).
        heads: which ones are encrypted, (P,).

    Returns:
        the heads' input x (B, T, C); h plus what the other heads and the projection's bias add to it (B, T, C); what
        the encrypted heads would add in float, (P, B, T, C); the block's new cache.
    """
    block = nnx.merge(graph, state)
    x = block.ln_1(h)
    outputs, cache = block.attn.heads(x, cache, start)  # (B, H, T, D)
    others = outputs.at[:, heads].set(0.0)
    projection = block.attn.c_proj.kernel[...].reshape(outputs.shape[1], -1, x.shape[-1])  # (H, D, C)
    encrypted = jnp.einsum("bptd,pdc->pbtc", outputs[:, heads], projection[heads])
    return x, h + block.attn.project(others), encrypted, cache


@_piece
def contribution(graph: nnx.GraphDef, state: nnx.State, output: jax.Array, head: jax.Array | int) -> jax.Array:
    """What one head's output (..., D) adds to the residual stream: (..., C)."""
    kernel = nnx.merge(graph, state).attn.c_proj.kernel[...]
    size = output.shape[-1]
    return output @ jax.lax.dynamic_slice_in_dim(kernel, head * size, size)


@_piece
def leave(graph: nnx.GraphDef, state: nnx.State, h: jax.Array) -> jax.Array:
    """The rest of a block after its attention: (..., C) -> (..., C)."""
    return nnx.merge(graph, state).leave(h)


@_piece
def unembed(graph: nnx.GraphDef, state: nnx.State, h: jax.Array) -> jax.Array:
    """(..., C) -> (..., V)."""
    return nnx.merge(graph, state).unembed(h)


@_piece
def likelihood_gradients(graph: nnx.GraphDef, state: nnx.State, h: jax.Array, mask: jax.Array) -> jax.Array:
    """Gradients of the log probability of tokens that the model draws itself, at the residual stream after each
    block's attention: embedded tokens h (B, T, C), mask (B, T) of the text -> (L, B, T, C)."""
    model = nnx.merge(graph, state)

    def log_probabilities(errors: jax.Array) -> jax.Array:
        rest = h
        for block, error in zip(model.h, errors, strict=True):
            heads, _ = block.attn.heads(block.ln_1(rest))
            rest = block.leave(rest + block.attn.project(heads) + error)
        return jax.nn.log_softmax(model.unembed(rest))

    exact, pull_back = jax.vjp(log_probabilities, jnp.zeros((len(model.h), *h.shape)))
    drawn = jax.random.categorical(jax.random.key(0), exact)
    (gradients,) = pull_back(jax.nn.one_hot(drawn, exact.shape[-1]) * mask[..., None])
    return gradients
