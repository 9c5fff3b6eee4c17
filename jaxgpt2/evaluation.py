"""How much encrypted modules change the model.

Agreement with the float model's best token alone misleads: deleting a head often keeps nearly all of it. So every
measure stands beside that of the model with the encrypted modules' output set to zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt2.calibration import token_batches
from jaxgpt2.decoding import OutOfRange
from jaxgpt2.encrypted import Baseline, CircuitRunner, EncryptedGPT2, QuantizedRunner, Runner
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
        refused: how many texts the engine refuses. In mode "quantized", which computes them all the same, they are in
            the means; else they are not.
    """

    top_k: dict[int, float]
    top_k_ablated: dict[int, float]
    kl: float
    kl_ablated: float
    head_error: float
    positions: int
    passages: int
    refused: int = 0

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


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats over the last axis. No rounding makes it negative: it sums p (d + exp(-d) - 1), where d is
    log p - log q, and p and q sum to one."""
    d = log_p - log_q
    # Near zero the terms of d + exp(-d) - 1 cancel; there it is its series.
    series = d * d * (1 / 2 - d / 6 + d * d / 24)
    return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.abs(d) < 0.03, series, jnp.maximum(d + jnp.expm1(-d), 0.0)), axis=-1)


@functools.partial(jax.jit, static_argnames="ks")
def _compare(logits: jax.Array, reference: jax.Array, mask: jax.Array, ks: tuple[int, ...]):
    """Of each text, sums over the positions in mask (B, T): KL(reference || logits) (B,), and agreement for each k
    (B, len(ks))."""
    kl = divergence(jax.nn.log_softmax(reference), jax.nn.log_softmax(logits))
    best = jnp.argmax(reference, axis=-1)[..., None]  # (B, T, 1)
    # The rank of the float model's best token: how many tokens are likelier, the first of equals being likelier.
    own = jnp.take_along_axis(logits, best, axis=-1)
    before = (logits > own) | ((logits == own) & (jnp.arange(logits.shape[-1]) < best))
    rank = jnp.sum(before, axis=-1)
    agreement = jnp.stack([jnp.sum((rank < k) & mask, axis=1) for k in ks], axis=1)
    return jnp.sum(jnp.where(mask, kl, 0.0), axis=1), agreement


@jax.jit
def _distance(contributions: jax.Array, reference: jax.Array, mask: jax.Array):
    """Of each text, squared norms over the positions in mask of the difference and of the reference (modules, B, T,
    C): (B,) each."""
    inside = mask[None, :, :, None]
    error, norm = (
        jnp.sum(jnp.where(inside, x, 0.0) ** 2, axis=(0, 2, 3)) for x in (contributions - reference, reference)
    )
    return error, norm


class Sums(NamedTuple):
    """Of each text, sums over its positions, float64.

    kl: (N,), nats. agreement: (N, len(ks)). error, norm: (N,), squared, of what the encrypted modules add.
    """

    kl: np.ndarray
    agreement: np.ndarray
    error: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True)
class Measured:
    """An encrypted model beside its float model, text by text.

    Args:
        ks: at which agreement was measured.
        positions: of each text, (N,).
        ablated: without the encrypted modules.
        runs: of every runner, by its name.
        refused: of every runner the texts that an engine refuses, by their number from 0, and why.
        left_out: (N,), which texts are in no mean, for they were refused in one of the runs.
    """

    ks: tuple[int, ...]
    positions: np.ndarray
    ablated: Sums
    runs: Mapping[str, Sums]
    refused: Mapping[str, Mapping[int, str]]
    left_out: np.ndarray

    def evaluation(self, name: str) -> Evaluation:
        """Means of one of the runs.

        Raises:
            OutOfRange: all texts were refused.
        """
        kept, own = ~self.left_out, self.runs[name]
        positions = int(self.positions[kept].sum())
        if not positions:
            reasons = [reason for some in self.refused.values() for reason in some.values()]
            raise OutOfRange(f"all passages are refused, the first: {reasons[0]}")

        def agreement(sums: Sums) -> dict[int, float]:
            return {
                k: float(value) for k, value in zip(self.ks, sums.agreement[kept].sum(axis=0) / positions, strict=True)
            }

        norm = float(own.norm[kept].sum())
        return Evaluation(
            top_k=agreement(own),
            top_k_ablated=agreement(self.ablated),
            kl=float(own.kl[kept].sum()) / positions,
            kl_ablated=float(self.ablated.kl[kept].sum()) / positions,
            head_error=float(np.sqrt(own.error[kept].sum() / norm)) if norm else float("nan"),
            positions=positions,
            passages=int(kept.sum()),
            refused=len(self.refused[name]),
        )


def measure(
    encrypted: EncryptedGPT2,
    passages: Sequence[str],
    runners: Mapping[str, Runner | Baseline],
    ks: Sequence[int] = (1, 5, 10),
    max_tokens: int | None = None,
    strict: bool = False,
) -> Measured:
    """Compares an encrypted model with its float model on every token of every passage, in one pass.

    Args:
        encrypted: calibrated, on other text.
        passages: each at most as long as the modules were made for.
        runners: compute the encrypted modules; from `encrypted.runner(mode)`.
        ks: 1 or more each.
        max_tokens: longer passages are cut to so many tokens; None refuses those that are too long.
        strict: a text that a circuit's client refuses is an error. Else it is counted, and all runs leave it out.

    Raises:
        PromptError: a passage that is empty or too long; InputError: a k below 1; OutOfRange: strict, and a text is
        refused; the message says which.
    """
    ks = check_ks(ks, encrypted.model.config.vocab_size)
    limit = min(quantized.max_tokens for quantized in encrypted.quantized.values())
    longest = longest_passage(encrypted.model, passages, max_tokens)
    if longest > limit:
        raise PromptError(f"the longest passage has {longest} tokens, the modules are made for {limit}: shorten it")
    start = 0
    refused: dict[str, dict[int, str]] = {name: {} for name in runners}

    def refuse(row: int, reason: str) -> None:
        raise OutOfRange(f"passage {start + row + 1} is refused: {reason}")

    def told(name: str, runner: Runner | Baseline) -> Runner | Baseline:
        """A runner that says what is refused."""

        def note(row: int, reason: str) -> None:
            refused[name].setdefault(start + row, reason)

        if isinstance(runner, QuantizedRunner):
            return dataclasses.replace(runner, refused=note)
        return (
            dataclasses.replace(runner, refused=refuse if strict else note)
            if isinstance(runner, CircuitRunner)
            else runner
        )

    listening = {name: told(name, runner) for name, runner in runners.items()}
    parts: dict[str, list[Sums]] = {name: [] for name in ("ablated", *listening)}
    assert len(parts) == len(runners) + 1, "ablated is no runner's name"
    counts, missing = [], []
    for tokens, lengths in token_batches(encrypted.model, passages, longest):
        if encrypted.seq_len is not None:  # texts take their time one by one, rows of padding too
            count = np.count_nonzero(lengths)
            tokens, lengths = tokens[:count], lengths[:count]
        mask = jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None])
        reference = encrypted.forward(tokens, "float")
        lost = np.zeros(len(tokens), bool)
        for name, runner in {"ablated": "ablated", **listening}.items():
            try:
                output = encrypted.forward(tokens, runner, lengths=lengths)
            except OutOfRange:
                if strict or not all(start + row in refused[name] for row in range(np.count_nonzero(lengths))):
                    raise
                output = encrypted.forward(tokens, "ablated")  # every text is left out
                lost[:] = True
            lost |= np.asarray(jnp.isnan(output.contributions[:, :, 0]).any(axis=(0, 2)))
            sums = (
                *_compare(output.logits, reference.logits, mask, ks),
                *_distance(output.contributions, reference.contributions, mask),
            )
            parts[name].append(Sums(*(np.asarray(part, np.float64) for part in sums)))
        counts.append(lengths)
        missing.append(lost & (lengths > 0))
        start += len(tokens)
    real = np.concatenate(counts) > 0
    joined = {
        name: Sums(*(np.concatenate(column)[real] for column in zip(*some, strict=True)))
        for name, some in parts.items()
    }
    ablated = joined.pop("ablated")
    return Measured(ks, np.concatenate(counts)[real], ablated, joined, refused, np.concatenate(missing)[real])


def evaluate(
    encrypted: EncryptedGPT2,
    passages: Sequence[str],
    runner: Runner | Baseline,
    ks: Sequence[int] = (1, 5, 10),
    max_tokens: int | None = None,
    strict: bool = False,
) -> Evaluation:
    """The means of `measure`, of one runner. Raises what it raises."""
    return measure(encrypted, passages, {"": runner}, ks, max_tokens, strict).evaluation("")


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
    gpt2: GPT2,
    client: LinearClient,
    products: Products,
    passages: Sequence[str],
    ks: Sequence[int] = (1, 5, 10),
    max_tokens: int | None = None,
) -> LinearEvaluation:
    """Compares a model with quantized linear layers with its float model on every token of every passage.

    max_tokens: longer passages are cut to so many tokens; None cuts none.

    Raises:
        PromptError: a passage that is empty or too long; InputError: a k below 1.
    """
    ks = check_ks(ks, gpt2.config.vocab_size)
    longest = longest_passage(gpt2, passages, max_tokens)
    kl = surprise = surprise_float = 0.0
    agreement, positions, predicted = np.zeros(len(ks)), 0, 0
    for tokens, lengths in token_batches(gpt2, passages, longest):
        mask = jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None])
        reference, (logits, _) = gpt2(tokens), client.forward(tokens, products)
        some, agree = _compare(logits, reference, mask, ks)
        kl, agreement = kl + float(some.sum()), agreement + np.asarray(agree).sum(axis=0)
        surprise += float(_surprise(logits, tokens, mask))
        surprise_float += float(_surprise(reference, tokens, mask))
        positions += int(lengths.sum())
        predicted += int(np.maximum(lengths - 1, 0).sum())
    return LinearEvaluation(
        top_k={k: float(value) / positions for k, value in zip(ks, agreement, strict=True)},
        kl=kl / positions,
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


def longest_passage(model: Decoder, passages: Sequence[str], max_tokens: int | None = None) -> int:
    """Tokens of the longest passage, where longer ones are cut to max_tokens.

    Raises:
        PromptError: one is longer than the model's context, or there are none.
    """
    if not passages:
        raise PromptError("there are no passages to evaluate on")
    if max_tokens is not None and max_tokens <= model.config.n_positions:
        return max(len(model.tokenizer.encode(passage).ids[:max_tokens]) for passage in passages)
    return max(len(model.encode(passage)) for passage in passages)
