"""How much encrypted modules change the model.

Agreement with the float model's best token alone misleads: deleting a head often keeps nearly all of it. So every
measure stands beside that of the model with the encrypted modules' output set to zero.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt2.calibration import token_batches
from jaxgpt2.encrypted import Baseline, EncryptedGPT2, Runner
from jaxgpt2.errors import InputError, PromptError
from jaxgpt2.linear import LinearClient, Products
from jaxgpt2.models import Decoder
from jaxgpt2.models.gpt2.pretrained import GPT2
from weights.checkpoint import TINY


@dataclass(frozen=True)
class Evaluation:
    """Means over all positions of all passages.

    Args:
        top_k: for each k, how often the float model's most likely token is among the k most likely of the other.
        top_k_ablated: the same for the model without the encrypted modules.
        kl: KL(float || quantized) in nats.
        kl_ablated: KL(float || model without the encrypted modules) in nats.
        head_error: ||quantized - float|| / ||float||, of what the encrypted modules add to the residual stream.
        positions: how many there were.
        passages: how many texts they come from.
    """

    top_k: dict[int, float]
    top_k_ablated: dict[int, float]
    kl: float
    kl_ablated: float
    head_error: float
    positions: int
    passages: int

    @property
    def recovered_kl(self) -> float:
        """1 - kl / kl_ablated: 1 is perfect, 0 no better than deleting the modules, below 0 worse."""
        return 1.0 - self.kl / self.kl_ablated if self.kl_ablated > 0 else float("nan")


def read_passages(path: str | Path) -> list[str]:
    """The passages of a text file, one a line.

    Raises:
        PromptError: a file that cannot be read or is no text, or an empty line in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise PromptError(f"{path} is empty: wanted one passage a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise PromptError(f"{path}, line {number}: empty passage")
        if "\0" in line:
            raise PromptError(f"{path}, line {number}: it holds a zero byte, so it is no text")
    return lines


def bundled_passages(name: Literal["calibration", "eval"]) -> list[str]:
    """The bundled model's own text to calibrate or to evaluate on."""
    return read_passages(TINY / f"{name}.txt")


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Refuses to evaluate on what was calibrated on.

    Raises:
        PromptError: a passage is in both.
    """
    shared = {text.strip() for text in calibration} & {text.strip() for text in evaluation}
    if shared:
        example = min(shared)
        raise PromptError(
            f"{len(shared)} passages are in the calibration text and in the evaluation text, one begins "
            f"{example[:40]!r}: evaluate on other text"
        )


@functools.partial(jax.jit, static_argnames="ks")
def _compare(logits: jax.Array, reference: jax.Array, mask: jax.Array, ks: tuple[int, ...]):
    """Sums over the positions in mask (B, T): KL(reference || logits), and agreement for each k, (len(ks),)."""
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    best = jnp.argmax(reference, axis=-1)[..., None]  # (B, T, 1)
    # The rank of the float model's best token: how many tokens are likelier, the first of equals being likelier.
    own = jnp.take_along_axis(logits, best, axis=-1)
    before = (logits > own) | ((logits == own) & (jnp.arange(logits.shape[-1]) < best))
    rank = jnp.sum(before, axis=-1)
    agreement = jnp.stack([jnp.sum((rank < k) & mask) for k in ks])
    return jnp.sum(kl * mask), agreement


@jax.jit
def _distance(contributions: jax.Array, reference: jax.Array, mask: jax.Array):
    """Squared norms, over the positions in mask, of the difference and of the reference (modules, B, T, C)."""
    weight = mask[None, :, :, None]
    return jnp.sum((contributions - reference) ** 2 * weight), jnp.sum(reference**2 * weight)


def evaluate(
    encrypted: EncryptedGPT2,
    passages: Sequence[str],
    runner: Runner | Baseline,
    ks: Sequence[int] = (1, 5, 10),
    max_tokens: int | None = None,
) -> Evaluation:
    """Compares an encrypted model with its float model on every token of every passage, in one pass.

    Args:
        encrypted: calibrated, on other text.
        passages: each at most as long as the modules were made for.
        runner: computes the encrypted modules; from `encrypted.runner(mode)`.
        ks: 1 or more each.
        max_tokens: longer passages are cut to so many tokens; None refuses those that are too long.

    Raises:
        PromptError: a passage that is empty or too long; InputError: a k below 1.
    """
    ks = check_ks(ks, encrypted.model.config.vocab_size)
    limit = min(quantized.max_tokens for quantized in encrypted.quantized.values())
    longest = longest_passage(encrypted.model, passages)
    if max_tokens is not None:
        longest = min(longest, max_tokens)
    if longest > limit:
        raise PromptError(f"the longest passage has {longest} tokens, the modules are made for {limit}: shorten it")
    kl = kl_ablated = error = norm = 0.0
    agreement, agreement_ablated = np.zeros(len(ks)), np.zeros(len(ks))
    positions = 0
    for tokens, lengths in token_batches(encrypted.model, passages, longest):
        if encrypted.seq_len is not None:  # texts take their time one by one, rows of padding too
            count = np.count_nonzero(lengths)
            tokens, lengths = tokens[:count], lengths[:count]
        mask = jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None])
        reference = encrypted.forward(tokens, "float")
        ablated = encrypted.forward(tokens, "ablated")
        quantized = encrypted.forward(tokens, runner, lengths=lengths)
        some, agree = _compare(ablated.logits, reference.logits, mask, ks)
        kl_ablated, agreement_ablated = kl_ablated + float(some), agreement_ablated + np.asarray(agree)
        some, agree = _compare(quantized.logits, reference.logits, mask, ks)
        kl, agreement = kl + float(some), agreement + np.asarray(agree)
        difference, size = _distance(quantized.contributions, reference.contributions, mask)
        error, norm = error + float(difference), norm + float(size)
        positions += int(lengths.sum())
    return Evaluation(
        top_k={k: float(value) / positions for k, value in zip(ks, agreement, strict=True)},
        top_k_ablated={k: float(value) / positions for k, value in zip(ks, agreement_ablated, strict=True)},
        kl=kl / positions,
        kl_ablated=kl_ablated / positions,
        head_error=float(np.sqrt(error / norm)) if norm else float("nan"),
        positions=positions,
        passages=len(passages),
    )


@dataclass(frozen=True)
class LinearEvaluation:
    """Means over all positions of all passages, of a model with quantized linear layers beside the float model.

    Args:
        top_k: for each k, how often the float model's most likely token is among the k most likely of the other.
        kl: KL(float || quantized) in nats.
        perplexity, perplexity_float: exp of the mean negative log probability of the next token, of both.
    """

    top_k: dict[int, float]
    kl: float
    perplexity: float
    perplexity_float: float
    positions: int
    passages: int


@jax.jit
def _surprise(logits: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of negative log probabilities of next tokens, where both are text."""
    own = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(own * mask[:, 1:])


def evaluate_linear(
    gpt2: GPT2, client: LinearClient, products: Products, passages: Sequence[str], ks: Sequence[int] = (1, 5, 10)
) -> LinearEvaluation:
    """Compares a model with quantized linear layers with its float model on every token of every passage.

    Raises:
        PromptError: a passage that is empty or too long; InputError: a k below 1.
    """
    ks = check_ks(ks, gpt2.config.vocab_size)
    longest = longest_passage(gpt2, passages)
    kl = surprise = surprise_float = 0.0
    agreement, positions, predicted = np.zeros(len(ks)), 0, 0
    for tokens, lengths in token_batches(gpt2, passages, longest):
        mask = jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None])
        reference, (logits, _) = gpt2(tokens), client.forward(tokens, products)
        some, agree = _compare(logits, reference, mask, ks)
        kl, agreement = kl + float(some), agreement + np.asarray(agree)
        surprise += float(_surprise(logits, tokens, mask))
        surprise_float += float(_surprise(reference, tokens, mask))
        positions += int(lengths.sum())
        predicted += int(np.maximum(lengths - 1, 0).sum())
    return LinearEvaluation(
        top_k={k: float(value) / positions for k, value in zip(ks, agreement, strict=True)},
        kl=max(kl, 0.0) / positions,
        perplexity=float(np.exp(surprise / max(predicted, 1))),
        perplexity_float=float(np.exp(surprise_float / max(predicted, 1))),
        positions=positions,
        passages=len(passages),
    )


def check_ks(ks: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """The ks at which agreement is measured.

    Raises:
        InputError: none, or one outside 1 to the vocabulary.
    """
    if not ks or any(not 1 <= k <= vocabulary for k in ks):
        raise InputError(f"every k must be 1 to {vocabulary} (the vocabulary), got {', '.join(map(str, ks)) or 'none'}")
    return tuple(ks)


def longest_passage(model: Decoder, passages: Sequence[str]) -> int:
    """Tokens of the longest passage.

    Raises:
        PromptError: one is longer than the model's context, or there are none.
    """
    if not passages:
        raise PromptError("there are no passages to evaluate on")
    return max(len(model.encode(passage)) for passage in passages)
