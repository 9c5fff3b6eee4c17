"""GPT-2 for users: weights, tokenizer, logits and text."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import weights
from jaxgpt2.errors import InputError, PromptError
from jaxgpt2.generation import GREEDY, NextLogits, Sampling, generate_tokens, padded_length, read_once
from jaxgpt2.models.gpt2 import branches
from jaxgpt2.models.gpt2.config import ConfigError, GPT2Config, score_factors
from jaxgpt2.models.gpt2.model import Cache, LayerCache, Transformer
from jaxgpt2.models.gpt2.state_dict import assemble, disassemble, parameter_shapes
from jaxgpt2.models.gpt2.text import encode as text_ids
from jaxgpt2.models.gpt2.tokenizer import load_tokenizer


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(tokens)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _extend(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, cache: Cache, count: jax.Array):
    return nnx.merge(graph, state).extend(tokens, cache, count)


def _checked(input_ids: np.ndarray | Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """The ids as an array, where every one of them is a token."""
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise PromptError("the texts of a batch differ in length: pad them to one") from None
    if ids.size and ids.dtype.kind not in "iu":
        raise PromptError(f"wanted integer token ids, got {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise PromptError(f"token ids go from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def read_config(directory: Path) -> GPT2Config:
    """The configuration of a checkpoint, no larger than its tensors.

    What is built later takes time and memory by what the configuration says. So it is first compared with the names and
    shapes in the headers of the files, whose sizes bound both.

    Raises:
        ConfigError, weights.CheckpointError: one line that says what is wrong, and where.
    """
    path = directory / "config.json"
    values, end = weights.load_config(directory), weights.load_generation_config(directory).get("eos_token_id")
    if end is not None:  # it wins, as in transformers
        values["eos_token_id"] = end
    try:
        config = GPT2Config.from_dict(values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    shapes = weights.stored_shapes(directory)
    blocks = {name.split(".")[1] for name in shapes if name.startswith("h.")}
    if config.n_layer > len(blocks):
        raise ConfigError(f"{path}: n_layer is {config.n_layer}, but the tensors are those of {len(blocks)} blocks")
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name in ("vocab_size", "n_positions", "n_embd", "inner_dim"):
        if getattr(config, name) > largest:
            raise ConfigError(f"{path}: {name} is {getattr(config, name)}, but no tensor has a side above {largest}")
    return config


def load_checkpoint(directory: Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """The configuration of a checkpoint, and its tensors by Hugging Face's names, float32.

    A checkpoint whose attention scores are scaled in another way than by 1 / sqrt(head_dim) becomes one with other
    queries, so that nothing else need know.

    Raises:
        ConfigError, weights.CheckpointError: one line that says what is wrong, and where.
    """
    config = read_config(directory)
    try:
        factors = score_factors(weights.load_config(directory), config)
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from None
    tensors = weights.load_tensors(directory, parameter_shapes(config))
    for layer, factor in enumerate(factors):
        if factor != 1.0:
            columns = np.where(np.arange(3 * config.n_embd) < config.n_embd, factor, 1.0).astype(np.float32)
            for name in (f"h.{layer}.attn.c_attn.weight", f"h.{layer}.attn.c_attn.bias"):
                tensors[name] = tensors[name] * columns
    return config, tensors


def read_sampling(directory: Path) -> Sampling:
    """How a checkpoint's `generation_config.json` chooses tokens; greedy where there is none.

    Raises:
        ConfigError, weights.CheckpointError: one line that says what is wrong, and where.
    """
    try:
        return Sampling.from_dict(weights.load_generation_config(directory))
    except InputError as error:
        raise ConfigError(f"{directory / weights.GENERATION_FILE}: {error}") from None


class GPT2:
    """A GPT-2 with its tokenizer.

    Args:
        config: sizes.
        model: the network; its parameters are read once, here.
        tokenizer: text to ids and back.
        sampling: how tokens are chosen unless something else is asked for.
    """

    def __init__(self, config: GPT2Config, model: Transformer, tokenizer: Tokenizer, sampling: Sampling = GREEDY):
        self.config = config
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.graph, self.state = nnx.split(model)
        # All blocks share one structure, so that what is compiled for one of them serves every layer.
        self.block_graph = nnx.split(model.h[0])[0]
        self.block_states = tuple(nnx.split(block)[1] for block in model.h)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "tiny") -> GPT2:
        """Loads `tiny` (bundled), a directory in Hugging Face's format, or a model of the Hub by its id.

        Raises:
            weights.CheckpointError, ConfigError, TokenizerError: one line that says what is wrong, and where.
        """
        directory = weights.locate(name)
        config, tensors = load_checkpoint(directory)
        tokenizer = load_tokenizer(directory, config.vocab_size)
        model = assemble(config, {name: jnp.asarray(tensor) for name, tensor in tensors.items()})
        return cls(config, model, tokenizer, read_sampling(directory))

    @property
    def model(self) -> Transformer:
        return nnx.merge(self.graph, self.state)

    def __call__(self, input_ids: jax.Array | np.ndarray | Sequence[Sequence[int]]) -> jax.Array:
        """Logits (B, T, vocab_size) for token ids (B, T).

        Raises:
            PromptError: no tokens, more than fit the context, or ids that are not tokens (of a `jax.Array`, which may
                be traced, only the shape is checked).
        """
        ids = input_ids if isinstance(input_ids, jax.Array) else _checked(input_ids, self.config.vocab_size)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.n_positions:
            raise PromptError(
                f"wanted token ids of shape (batch, 1 to {self.config.n_positions} tokens), got shape {ids.shape}"
            )
        return _logits(self.graph, self.state, ids)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(disassemble(self.model).items()):
            digest.update(name.encode())
            digest.update(np.asarray(tensor).tobytes())
        return digest.hexdigest()

    # Cut into pieces: see `jaxgpt2.models.Decoder`.

    def empty_layers(self, batch: int, size: int) -> tuple[LayerCache, ...]:
        return self.model.empty_cache(batch, size).layers

    def embed(self, tokens: Any, start: jax.Array | int = 0) -> jax.Array:
        # Whole texts begin at a constant, which compiles to less.
        return branches.embed(
            self.graph, self.state, tokens, *((start,) if isinstance(start, jax.Array) or start else ())
        )

    def block(
        self, layer: int, h: jax.Array, cache: LayerCache | None = None, start: jax.Array | int = 0
    ) -> tuple[jax.Array, LayerCache | None]:
        cached = () if cache is None else (cache, start)
        return branches.block(self.block_graph, self.block_states[layer], h, *cached)

    def attend(
        self, layer: int, h: jax.Array, heads: np.ndarray, cache: LayerCache | None = None, start: jax.Array | int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array, LayerCache | None]:
        cached = () if cache is None else (cache, start)
        return branches.attend(self.block_graph, self.block_states[layer], h, jnp.asarray(heads), *cached)

    def contribution(self, layer: int, output: jax.Array, head: int) -> jax.Array:
        return branches.contribution(self.block_graph, self.block_states[layer], output, head)

    def leave(self, layer: int, h: jax.Array) -> jax.Array:
        return branches.leave(self.block_graph, self.block_states[layer], h)

    def unembed(self, h: jax.Array) -> jax.Array:
        return branches.unembed(self.graph, self.state, h)

    def likelihood_gradients(self, h: jax.Array, mask: np.ndarray) -> jax.Array:
        return branches.likelihood_gradients(self.graph, self.state, h, jnp.asarray(mask))

    def head_weights(self, layer: int, head: int) -> dict[str, np.ndarray]:
        tensors, width, size = disassemble(self.model), self.config.n_embd, self.config.head_dim
        kernel, bias, output = (
            np.asarray(tensors[f"h.{layer}.attn.{name}"], np.float64)
            for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
        )
        own = [slice(start, start + size) for start in range(head * size, 3 * width, width)]
        parts = {name: kernel[:, part] for name, part in zip(("query", "key", "value"), own, strict=True)}
        biases = {f"{name}_bias": bias[part] for name, part in zip(parts, own, strict=True)}
        return parts | biases | {"output": output[own[0]]}

    def encode(self, text: str, room: int = 0) -> list[int]:
        """Token ids of a text that leaves `room` tokens of the context free.

        Raises:
            PromptError: an empty text, one that is not Unicode, or one that does not fit.
        """
        return text_ids(self.tokenizer, text, self.config.n_positions, room)

    def cached_logits(self, size: int) -> NextLogits:
        """A function from all tokens so far to the next token's logits that reads each token once.

        Args:
            size: most tokens that will ever be read.
        """
        # Room for padding too: the prompt is read in one padded piece.
        size = padded_length(size, self.config.n_positions)
        cache = self.model.empty_cache(1, size)

        def read(tokens: np.ndarray, count: int) -> np.ndarray:
            nonlocal cache
            logits, cache = _extend(self.graph, self.state, tokens, cache, count)
            return np.asarray(logits[0])

        return read_once(read, size)

    def generate(self, prompt: str, max_new_tokens: int = 50, sampling: Sampling | None = None) -> Iterator[int]:
        """Yields the tokens that continue a prompt, one by one; `text` makes text of them.

        sampling: how they are chosen; None for the model's own way.

        Raises:
            PromptError: an empty prompt, or one that leaves no room for `max_new_tokens`.
        """
        if max_new_tokens < 0:
            raise PromptError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        tokens = self.encode(prompt, room=max_new_tokens)
        logits = self.cached_logits(len(tokens) + max_new_tokens)
        return generate_tokens(logits, tokens, max_new_tokens, sampling or self.sampling, self.config.ends_of_text)

    def stream(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and gives the text that each completes.

        A character may need several tokens; it comes with its last.
        """
        decoder = DecodeStream(skip_special_tokens=False)
        return lambda token: decoder.step(self.tokenizer, token) or ""

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)
