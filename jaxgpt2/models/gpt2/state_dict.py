"""Between a Transformer and its tensors under Hugging Face's names."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
from flax import nnx

from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import Transformer
from weights import huggingface_name


@functools.cache
def _blueprint(config: GPT2Config) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a Transformer, without allocating it."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every tensor of a model to its shape."""
    _, state = _blueprint(config)
    return {huggingface_name(path): tuple(variable.shape) for path, variable in nnx.to_flat_state(state)}


def assemble(config: GPT2Config, tensors: Mapping[str, jax.Array]) -> Transformer:
    """The model made of these tensors; they may be tracers, so a training step can assemble inside `jit`."""
    graph, state = _blueprint(config)
    leaves = [(path, variable.replace(tensors[huggingface_name(path)])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def disassemble(model: Transformer) -> dict[str, jax.Array]:
    """The inverse of `assemble`."""
    return {huggingface_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
