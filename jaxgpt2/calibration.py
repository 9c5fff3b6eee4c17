"""What calibration knows of a layer: the inputs that reach it in the float model, and what its errors cost.

Shapes: B batch, T tokens, C width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt2.errors import PromptError
from jaxgpt2.models import Decoder

# Fisher information settles with few gradients, and those of a large model are dear.
FISHER_TOKENS = 4096

# Tokens that the model is read on without one of its heads, and how many heads of a large model this is done with.
ABLATED_TOKENS = 256
ABLATED_HEADS = 48


@jax.jit
def _mean_kl(exact: jax.Array, logits: jax.Array) -> jax.Array:
    """The mean KL(exact || other) over positions; both are logits (N, V)."""
    log_p = jax.nn.log_softmax(exact)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits)), axis=-1))


def token_batches(
    model: Decoder, passages: Sequence[str], max_tokens: int, size: int = 16
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Passages as padded token ids (size, T), all of one shape, with their lengths (size,), 0 for a row of padding.

    Each is cut to max_tokens.

    Raises:
        PromptError: no passages, or an empty one.
    """
    texts = [model.tokenizer.encode(passage).ids[:max_tokens] for passage in passages]
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
        lengths: tokens of each row, (B,) for each batch; 0 for a row of padding.
    """

    layer: int
    hidden: tuple[jax.Array, ...]
    lengths: tuple[np.ndarray, ...]

    @classmethod
    def read(cls, model: Decoder, passages: Sequence[str], max_tokens: int) -> HiddenStates:
        """Embeds passages, each cut to max_tokens."""
        batches = list(token_batches(model, passages, max_tokens))
        hidden = tuple(model.embed(tokens) for tokens, _ in batches)
        return cls(0, hidden, tuple(lengths for _, lengths in batches))

    def at(self, model: Decoder, layer: int) -> HiddenStates:
        """The same passages at a later layer."""
        hidden = self.hidden
        for index in range(self.layer, layer):
            hidden = tuple(model.block(index, h)[0] for h in hidden)
        return HiddenStates(layer, hidden, self.lengths)

    def average_head(self, model: Decoder) -> float:
        """Nats of KL a token that the model loses without one of its heads, the mean over heads.

        On the first ABLATED_TOKENS tokens or so of the first batch; of states at layer 0. All heads count, or, of more
        than ABLATED_HEADS, every second, every third, ...
        """
        h, lengths = self.hidden[0], self.lengths[0]
        rows = int(np.searchsorted(np.cumsum(lengths), ABLATED_TOKENS)) + 1
        h, mask = h[:rows], np.arange(h.shape[1]) < lengths[:rows, None]

        def logits(layer: int, h: jax.Array) -> jax.Array:
            h = model.leave(layer, h)
            for later in range(layer + 1, model.config.n_layer):
                h, _ = model.block(later, h)
            return model.unembed(h[mask])

        layers, per_layer = model.config.n_layer, model.config.n_head
        every = -(-layers * per_layer // ABLATED_HEADS)
        lost, exact = [], None
        for layer in range(layers):
            for head in range(-layer * per_layer % every, per_layer, every):
                _, without, own, _ = model.attend(layer, h, np.array([head]))
                exact = logits(layer, without + own[0]) if exact is None else exact
                lost.append(float(_mean_kl(exact, logits(layer, without))))
            h, _ = model.block(layer, h)
        return float(np.mean(lost))

    def inputs(self, model: Decoder) -> list[np.ndarray]:
        """What reaches the heads of the layer: (T, C) float64, an array for every passage."""
        inputs = []
        for h, lengths in zip(self.hidden, self.lengths, strict=True):
            x, _, _, _ = model.attend(self.layer, h, np.array([0]))
            inputs += [np.asarray(row[:n], np.float64) for row, n in zip(x, lengths, strict=True) if n]
        return inputs


@dataclass(frozen=True)
class CalibrationData:
    """Of a layer.

    Args:
        inputs: what reaches its heads in the float model, (T, C) float64, an array for every passage.
        fisher: (C, C), see `fisher_information`.
    """

    inputs: list[np.ndarray]
    fisher: np.ndarray


def fisher_information(model: Decoder, states: HiddenStates) -> np.ndarray:
    """What errors cost the model, layer by layer: (L, C, C); of states at layer 0.

    error @ fisher[layer] @ error is KL(float || model with that error of the residual stream after the layer's
    attention at one position) to second order, averaged over positions, as a share of what the model loses without one
    of its heads (`HiddenStates.average_head`).

    It is half the Fisher information (Amari, "Natural gradient works efficiently in learning", 1998), from the
    gradients of tokens drawn from the model's own predictions. Errors at different positions are taken as independent.
    """
    total, count = np.zeros((model.config.n_layer, *(model.config.n_embd,) * 2)), 0
    for h, lengths in zip(states.hidden, states.lengths, strict=True):
        mask = np.arange(h.shape[1]) < lengths[:, None]
        gradients = np.asarray(model.likelihood_gradients(h, mask))
        for layer, own in enumerate(gradients):
            some = own[mask].astype(np.float64)
            total[layer] += some.T @ some
        count += int(mask.sum())
        if count >= FISHER_TOKENS:
            break
    return total / (2 * count * max(states.average_head(model), 1e-9))
