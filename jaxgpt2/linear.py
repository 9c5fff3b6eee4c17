"""GPT-2 of which somebody else computes every linear layer of every block, and never sees what goes through it.

The client keeps tokenizer, embeddings, layer norms, attention and activations, and no matrix of a block. The matrices'
owner sees masked numbers only (`fhe.rlwe`). Who computes the products is a `Products`: JAX in mode "quantized", a
matrix's owner in this process or behind HTTP in mode "encrypted". The integers are the same, to the last bit.

Shapes: B batch, T tokens, C width, V vocabulary, d inputs and m outputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fhe import rlwe
from jaxgpt2.calibration import token_batches
from jaxgpt2.generation import GREEDY, Sampling, generate_tokens, padded_length, read_once
from jaxgpt2.methods import linear
from jaxgpt2.methods.linear import MATRICES, ClientParams, LinearBits
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import LayerCache
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import disassemble
from jaxgpt2.models.gpt2.text import encode

# Computes a matrix's product, by its full name: integers (B, T, d) of which the first `count` tokens are text -> (B, T,
# m), int32. What comes out for padding means nothing.
Products = Callable[[str, jax.Array, int], ArrayLike]


class Cache(NamedTuple):
    """Float keys and values of every layer, with room for S tokens, of which `length` are filled."""

    layers: tuple[LayerCache, ...]
    length: int


@dataclass(frozen=True)
class LinearClient:
    """The client's half of a model with remote linear layers.

    Args:
        config: sizes. tokenizer: text to ids and back. params: embeddings, and vectors for every matrix. bits: widths.
        identity: SHA-256 of the matrices that it belongs to. sampling: how tokens are chosen by default.
    """

    config: GPT2Config
    tokenizer: Tokenizer
    params: ClientParams
    bits: LinearBits
    identity: str
    sampling: Sampling = GREEDY

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d, m) of every matrix, by its full name, in the order in which a token meets them."""
        return {
            f"h.{layer}.{name}": (len(params[name].smoothing), len(params[name].bias))
            for layer, params in enumerate(self.params.layers)
            for name in MATRICES
        }

    @functools.cached_property
    def _on_device(self) -> ClientParams:
        return jax.device_put(self.params)

    def empty_cache(self, batch: int, size: int) -> Cache:
        """Room for `size` tokens of `batch` texts."""
        shape = (batch, self.config.n_head, size, self.config.head_dim)
        layers = tuple(LayerCache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.config.n_layer))
        return Cache(layers, 0)

    def forward(
        self, tokens: np.ndarray, products: Products, cache: Cache | None = None, count: int | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """A forward pass over token ids (B, T), after those in the cache.

        Args:
            count: how many of the T are text, the rest being padding; None for all.

        Returns:
            logits (B, T, V), with a `count` (B, 1, V) of the last token of text; and the cache with the new tokens.
        """
        config, largest, start = self.config, self.bits.largest_input, 0 if cache is None else cache.length
        on_device = self._on_device
        text = tokens.shape[1] if count is None else count
        h = linear.embed(on_device, tokens, start, config)
        layers = []
        for index, params in enumerate(on_device.layers):
            c_attn, c_proj, c_fc, mlp_proj = (params[name] for name in MATRICES)
            multiply = [functools.partial(products, f"h.{index}.{name}") for name in MATRICES]
            own = None if cache is None else cache.layers[index]
            x = linear.before_attention(h, c_attn, config, largest)
            y = multiply[0](x.integers, text)
            x, own = linear.attention(y, x.scale, c_attn, c_proj, own, start, config, largest)
            y = multiply[1](x.integers, text)
            h, x = linear.before_mlp(h, y, x.scale, c_proj, c_fc, config, largest)
            y = multiply[2](x.integers, text)
            x = linear.activation(y, x.scale, c_fc, mlp_proj, config, largest)
            y = multiply[3](x.integers, text)
            h = linear.add(h, y, x.scale, mlp_proj)
            layers.append(own)
        if count is not None:
            h = h[:, count - 1 : count]
        after = None if cache is None else Cache(tuple(layers), start + text)
        return linear.unembed(on_device, h, config), after

    def encode(self, text: str, room: int = 0) -> list[int]:
        """Token ids that leave `room` tokens of the context free. Raises PromptError."""
        return encode(self.tokenizer, text, self.config.n_positions, room)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and gives the text that each completes."""
        decoder = DecodeStream(skip_special_tokens=False)
        return lambda token: decoder.step(self.tokenizer, token) or ""

    def masks_needed(self, prompt: str, max_new_tokens: int) -> int:
        """Tokens that will be read, each under a mask of its own: the last one is only written."""
        return len(self.encode(prompt, room=max_new_tokens)) + max_new_tokens - 1

    def generate(
        self,
        prompt: str,
        max_new_tokens: int,
        products: Products,
        sampling: Sampling | None = None,
        keep_count: bool = True,
    ) -> Iterator[int]:
        """Yields the tokens that continue a prompt, see `continue_tokens`. Raises PromptError."""
        tokens = self.encode(prompt, room=max_new_tokens)
        return self.continue_tokens(tokens, max_new_tokens, products, sampling, keep_count)

    def continue_tokens(
        self,
        tokens: list[int],
        max_new_tokens: int,
        products: Products,
        sampling: Sampling | None = None,
        keep_count: bool = True,
    ) -> Iterator[int]:
        """Yields the tokens that continue others.

        sampling: how they are chosen; None for the model's own way.
        keep_count: read `masks_needed` tokens whatever the model says, so that when a text ends tells nobody anything;
        what follows the end of the text is not yielded.
        """
        wanted = len(tokens) + max_new_tokens - 1
        size = padded_length(max(wanted, 1), self.config.n_positions)
        cache = self.empty_cache(1, size)

        def read(new: np.ndarray, count: int) -> np.ndarray:
            nonlocal cache
            logits, after = self.forward(new, products, cache, count)
            assert after is not None
            cache = after
            return np.nan_to_num(np.asarray(logits[0, 0]))  # wrong products may make anything of them

        def read_the_rest() -> None:
            while keep_count and cache.length < wanted:
                read(np.zeros((1, 1), np.int32), 1)

        try:
            yield from generate_tokens(
                read_once(read, size), tokens, max_new_tokens, sampling or self.sampling, self.config.ends_of_text
            )
        except GeneratorExit:  # whoever reads the text wants no more of it; but not if reading it failed
            read_the_rest()
            raise
        read_the_rest()


@dataclass(frozen=True)
class LinearGPT2:
    """Both halves of a model with remote linear layers: what its owner has.

    Args:
        client: the half that users get. weights: the server's, int16 (d, m) by full name.
    """

    client: LinearClient
    weights: Mapping[str, np.ndarray]

    @classmethod
    def quantize(cls, gpt2: GPT2, passages: Sequence[str], bits: LinearBits | None = None) -> LinearGPT2:
        """A float model with its linear layers in integers.

        Args:
            passages: calibration text, which says how large features become.

        Raises:
            CompilationError: a product could leave int32, or a batch of masks decrypt wrongly, with the numbers.
        """
        bits = bits or LinearBits()
        tensors = {name: np.asarray(tensor) for name, tensor in disassemble(gpt2.model).items()}
        largest = largest_features(gpt2, passages)
        smoothing = {
            f"h.{layer}.{name}": linear.smoothing_for(
                largest[f"h.{layer}.{name}"], linear.folded(tensors, layer, name)[0]
            )
            for layer in range(gpt2.config.n_layer)
            for name in MATRICES
        }
        quantized = linear.quantize(gpt2.config, tensors, bits, smoothing)
        client = LinearClient(gpt2.config, gpt2.tokenizer, quantized.client, bits, "", gpt2.sampling)
        model = cls(dataclasses.replace(client, identity=fingerprint(quantized.weights)), quantized.weights)
        model.reports()
        return model

    def reports(self) -> dict[str, rlwe.MatrixReport]:
        """Of every matrix: how large its products can become, and how likely a batch of masks decrypts wrongly.

        Raises:
            fhe.CompilationError: too large, or too likely.
        """
        largest = self.client.bits.largest_input
        return {name: rlwe.check_matrix(weight, largest) for name, weight in self.weights.items()}

    def products(self) -> Products:
        """Mode "quantized": the products in JAX."""
        matrices = {name: linear.prepared(weight) for name, weight in self.weights.items()}
        return lambda name, x, _: linear.product(x, matrices[name])


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """A hash of all matrices."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.shape} {weight.dtype}\n".encode())
        digest.update(np.ascontiguousarray(weight).data)
    return digest.hexdigest()


def largest_features(gpt2: GPT2, passages: Sequence[str], max_tokens: int = 128) -> dict[str, np.ndarray]:
    """The largest magnitude of every input feature of every matrix (d,) in the float model, by full name.

    Of layer norms, of what they give without gain and shift.
    """
    model, config = gpt2.model, gpt2.config
    found: dict[str, np.ndarray] = {}

    def note(name: str, x: jax.Array, mask: np.ndarray) -> None:
        largest = np.asarray(jnp.max(jnp.abs(x) * mask[..., None], axis=(0, 1)), np.float64)
        found[name] = np.maximum(found.get(name, 0.0), largest)

    for tokens, lengths in token_batches(gpt2, passages, min(max_tokens, config.n_positions)):
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        h = model.embed(jnp.asarray(tokens))
        for index, block in enumerate(model.h):
            note(f"h.{index}.attn.c_attn", linear._norm(h, config.layer_norm_epsilon), mask)
            heads, _ = block.attn.heads(block.ln_1(h))  # (B, H, T, D)
            joined = heads.transpose(0, 2, 1, 3).reshape(h.shape)
            note(f"h.{index}.attn.c_proj", joined, mask)
            h = h + block.attn.c_proj(joined)
            note(f"h.{index}.mlp.c_fc", linear._norm(h, config.layer_norm_epsilon), mask)
            inner = block.mlp.activation(block.mlp.c_fc(block.ln_2(h)))
            note(f"h.{index}.mlp.c_proj", inner, mask)
            h = h + block.mlp.c_proj(inner)
    return found
