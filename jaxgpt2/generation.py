"""Choosing tokens: greedy, or drawn from the model's distribution with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from jaxgpt2.errors import InputError

NextLogits = Callable[[list[int]], np.ndarray]  # all tokens so far -> logits (V,) of the next one


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 is greedy (the most likely token, the first of equals).
        top_k: only the k most likely tokens; None for all.
        top_p: only the smallest set of most likely tokens whose probabilities reach p ("nucleus", Holtzman et al.,
            2019); None for all. Applied after top_k.
        seed: of the random draws; the same seed gives the same text.

    Raises:
        InputError: a negative temperature, a top_k below 1, a top_p outside (0, 1], a negative seed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise InputError(f"a seed must be 0 or more, got {self.seed}")


GREEDY = Sampling()


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """The next token, given its logits (V,)."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]  # most likely first
    ahead = logits[order].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature takes all but the likeliest to minus infinity, which is right
        probabilities = np.exp((ahead - ahead[0]) / sampling.temperature)
    probabilities /= probabilities.sum()
    if sampling.top_p is not None:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(random.choice(order, p=probabilities))


def padded_length(count: int, limit: int) -> int:
    """The next power of two, so that few lengths are compiled."""
    return min(limit, 1 << (count - 1).bit_length())


def read_once(read: Callable[[np.ndarray, int], np.ndarray], size: int) -> NextLogits:
    """A function from all tokens so far to the next token's logits that reads each token once.

    Args:
        read: takes new tokens (1, T), of which the first `count` are text and the rest padding; gives logits (V,) after
            the last token of text. It remembers what it has read.
        size: room for tokens and padding.
    """
    known = 0

    def next_logits(tokens: list[int]) -> np.ndarray:
        nonlocal known
        new = tokens[known:]
        padded = np.zeros((1, padded_length(len(new), size - known)), np.int32)
        padded[0, : len(new)] = new
        logits = read(padded, len(new))
        known = len(tokens)
        return logits

    return next_logits


def generate_tokens(
    next_logits: NextLogits,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    ends_of_text: Collection[int] = (),
) -> Iterator[int]:
    """Yields new tokens as they are chosen; stops after `max_new_tokens`, or before a token that ends the text."""
    random = np.random.default_rng(sampling.seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        token = choose(next_logits(tokens), sampling, random)
        if token in ends_of_text:
            return
        tokens.append(token)
        yield token
