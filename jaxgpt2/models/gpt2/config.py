"""The shape of a GPT-2, read from Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgpt2.errors import InputError

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "quick_gelu", "silu", "relu")


class ConfigError(InputError):
    """A configuration that is not a GPT-2 this package can run."""


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and constants of a GPT-2; the names are Hugging Face's.

    Args:
        vocab_size: tokens in the vocabulary.
        n_positions: longest text in tokens, the context.
        n_embd: width of the residual stream, `n_head * head_dim`.
        n_layer: transformer blocks.
        n_head: attention heads a block.
        n_inner: width of the MLP; None means `4 * n_embd`.
        activation_function: one of `ACTIVATIONS`.
        layer_norm_epsilon: added to the variance in every layer norm.
        tie_word_embeddings: whether the output projection is the token embedding.
        eos_token_id: token at which generation stops, or several, None for no such token.

    Raises:
        ConfigError: a size that is not positive, a width that the heads do not divide, an unknown activation.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: int | tuple[int, ...] | None = 50256

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "inner_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r:.80}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd!r:.80} is not a multiple of n_head {self.n_head!r:.80}")
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function {self.activation_function!r:.80} is not supported, "
                f"one of {', '.join(ACTIVATIONS)} is"
            )
        if not isinstance(self.layer_norm_epsilon, float | int) or not self.layer_norm_epsilon > 0:
            raise ConfigError(f"layer_norm_epsilon must be a positive number, got {self.layer_norm_epsilon!r:.80}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r:.80}")
        if isinstance(self.eos_token_id, list):  # as JSON has it; configurations are hashed
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if any(type(token) is not int for token in self.ends_of_text):
            raise ConfigError(f"eos_token_id must be a token id, a list of them or null, got {self.eos_token_id!r:.80}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def ends_of_text(self) -> tuple[int, ...]:
        """Tokens at which generation stops."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPT2Config:
        """From the parsed `config.json`; keys that do not concern the forward pass are ignored.

        Raises:
            ConfigError: another `model_type`, or a setting whose arithmetic is not implemented.
        """
        model_type = values.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ConfigError(f"model_type is {model_type!r:.80}, wanted 'gpt2'")
        if values.get("add_cross_attention", False):
            raise ConfigError("add_cross_attention is set: a model that reads another one's output is not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def score_factors(values: Mapping[str, Any], config: GPT2Config) -> list[float]:
    """For every layer, what its attention scores are multiplied by, beyond the division by sqrt(head_dim).

    Args:
        values: the parsed `config.json`.

    Raises:
        ConfigError: a setting that is neither true nor false.
    """
    scaled, by_layer = (
        values.get(name, default)
        for name, default in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False))
    )
    for name, value in (("scale_attn_weights", scaled), ("scale_attn_by_inverse_layer_idx", by_layer)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r:.80}")
    factor = 1.0 if scaled else math.sqrt(config.head_dim)
    return [factor / (layer + 1) if by_layer else factor for layer in range(config.n_layer)]
