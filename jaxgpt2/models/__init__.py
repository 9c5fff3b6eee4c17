"""Float models, and what the rest of the package needs of one.

Shapes: B batch, T tokens, C width, D head_dim, L layers, P heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import jax
    from tokenizers import Tokenizer

    from jaxgpt2.generation import Sampling


class Decoder(Protocol):
    """A decoder-only language model of blocks with attention, cut where modules may be encrypted.

    `config` has n_layer, n_head, n_embd, head_dim, n_positions, vocab_size and ends_of_text. A layer's cache holds its
    float keys and values; without one (None) texts are read whole. `sampling` is how tokens are chosen by default.
    """

    config: Any
    tokenizer: Tokenizer
    sampling: Sampling

    def encode(self, text: str, room: int = 0) -> list[int]:
        """Token ids that leave `room` tokens of the context free. Raises PromptError."""
        ...

    def text(self, tokens: Sequence[int]) -> str: ...

    def stream(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and gives the text that each completes."""
        ...

    def fingerprint(self) -> str:
        """A hash of the weights."""
        ...

    def empty_layers(self, batch: int, size: int) -> tuple[Any, ...]:
        """An empty cache of every layer, with room for `size` tokens of `batch` texts."""
        ...

    def embed(self, tokens: Any, start: Any = 0) -> jax.Array:
        """Ids (B, T), the first at position `start` -> (B, T, C)."""
        ...

    def block(self, layer: int, h: jax.Array, cache: Any = None, start: Any = 0) -> tuple[jax.Array, Any]:
        """(B, T, C) -> (B, T, C) and the layer's new cache."""
        ...

    def attend(
        self, layer: int, h: jax.Array, heads: np.ndarray, cache: Any = None, start: Any = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """A block's attention without these heads (P,): their input (B, T, C), the residual stream without them
        (B, T, C), what they would add to it in float (P, B, T, C), and the layer's new cache."""
        ...

    def contribution(self, layer: int, output: jax.Array, head: int) -> jax.Array:
        """What a head's output (..., D) adds to the residual stream: (..., C)."""
        ...

    def leave(self, layer: int, h: jax.Array) -> jax.Array:
        """The rest of a block after its attention: (..., C) -> (..., C)."""
        ...

    def unembed(self, h: jax.Array) -> jax.Array:
        """(..., C) -> logits (..., V)."""
        ...

    def head_weights(self, layer: int, head: int) -> dict[str, np.ndarray]:
        """A head's query, key, value (C, D), their biases (D,), and output (D, C), float64."""
        ...

    def likelihood_gradients(self, h: jax.Array, mask: np.ndarray) -> jax.Array:
        """Of the log probability of tokens that the model draws itself, at the residual stream after each block's
        attention: embedded tokens h (B, T, C), mask (B, T) of the text -> (L, B, T, C)."""
        ...

    def generate(self, prompt: str, max_new_tokens: int, sampling: Sampling | None = None) -> Any:
        """The tokens that continue a prompt, in float."""
        ...
