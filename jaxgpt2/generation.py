"""Choosing tokens: greedy or drawn, with the settings of Hugging Face's generation configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt2.errors import InputError

log = logging.getLogger(__name__)

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
        repetition_penalty: of every token that the text has, prompt included, a positive logit is divided by it and a
            negative one multiplied (Keskar et al., "CTRL", 2019); 1 changes nothing.
        no_repeat_ngram_size: no so many tokens in a row come twice in a text, prompt included; 0 for no limit.

    Raises:
        InputError: a negative temperature, a top_k below 1, a top_p outside (0, 1], a negative seed, a penalty that is
            not positive, a negative no_repeat_ngram_size.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature, 0, sys.float_info.max):
            raise InputError(f"temperature must be 0 (greedy) or more, got {self.temperature!r:.40}")
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise InputError(f"top_k must be 1 or more, got {self.top_k!r:.40}")
        if self.top_p is not None and not (_is_number(self.top_p, 0, 1) and self.top_p > 0):
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r:.40}")
        if self.seed < 0:
            raise InputError(f"a seed must be 0 or more, got {self.seed}")
        if not _is_number(self.repetition_penalty, 1e-30, 1e30):
            raise InputError(f"repetition_penalty must be above 0 (1 for none), got {self.repetition_penalty!r:.40}")
        if not (type(self.no_repeat_ngram_size) is int and self.no_repeat_ngram_size >= 0):
            raise InputError(
                f"no_repeat_ngram_size must be 0 (no limit) or more, got {self.no_repeat_ngram_size!r:.40}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampling:
        """From the parsed `generation_config.json`, with Hugging Face's defaults. How long a text becomes is the
        caller's; a setting that would change it and is not implemented is ignored with a warning.

        Raises:
            InputError: a value that cannot be.
        """
        given = {name: value for name, value in values.items() if value is not None}
        for name in sorted(_NOT_IMPLEMENTED & given.keys()):
            if given[name] not in (0, 1):  # what says nothing: 0, False, a penalty of 1, one beam
                log.warning("generation_config.json: %s is not implemented, and ignored", name)
        chosen = {name: given[name] for name in ("repetition_penalty", "no_repeat_ngram_size") if name in given}
        if given.get("do_sample"):
            drawn = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
            chosen |= {name: given.get(name, default) for name, default in drawn.items()}
            chosen["top_k"] = chosen["top_k"] or None  # 0 is all of them there
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads; the seed is not part of it."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        return {
            "do_sample": self.temperature > 0,
            **(drawn if self.temperature > 0 else {}),
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
        }


# Settings of a generation configuration that change which tokens are chosen.
_NOT_IMPLEMENTED = {
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "min_length",
    "min_new_tokens", "min_p", "num_beams", "penalty_alpha", "sequence_bias", "suppress_tokens", "top_h", "typical_p",
}  # fmt: skip


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


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


def penalize(logits: np.ndarray, tokens: list[int], sampling: Sampling) -> np.ndarray:
    """The next token's logits (V,) with what the text so far changes in them: in float32, as `transformers` does it."""
    if sampling.repetition_penalty != 1:
        seen, logits = np.unique(tokens), logits.copy()
        own, penalty = logits[seen], np.float32(sampling.repetition_penalty)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            logits[seen] = np.where(own < 0, own * penalty, own / penalty)
    size = sampling.no_repeat_ngram_size
    if 0 < size <= len(tokens):
        last = tokens[len(tokens) + 1 - size :]
        ends = range(size - 1, len(tokens))
        banned = [tokens[end] for end in ends if tokens[end + 1 - size : end] == last]
        if len(set(banned)) < len(logits):  # else nothing is left to choose
            logits = logits.copy()
            logits[banned] = -np.inf
    return logits


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
        token = choose(penalize(next_logits(tokens), tokens, sampling), sampling, random)
        if token in ends_of_text:
            return
        tokens.append(token)
        yield token
