"""Choosing tokens follows the distribution that was asked for, and generation ends where it should."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import END_OF_TEXT, one_line
from jaxgpt2.errors import PromptError
from jaxgpt2.generation import GREEDY, Sampling, choose, generate_tokens
from jaxgpt2.models.gpt2.pretrained import GPT2

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3.0
DRAWS = 4000


def frequencies(sampling: Sampling, logits: np.ndarray = LOGITS) -> np.ndarray:
    random = np.random.default_rng(sampling.seed)
    drawn = [choose(logits, sampling, random) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits)) / DRAWS


# --- one token --------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_most_likely_and_the_first_of_equals():
    random = np.random.default_rng(0)
    assert choose(LOGITS, GREEDY, random) == 1
    assert choose(np.array([0.0, 2.0, 2.0, 1.0]), GREEDY, random) == 1


def near(wanted: list[float] | np.ndarray) -> Any:
    """Within five standard deviations of a frequency."""
    return pytest.approx(np.asarray(wanted) / np.sum(wanted), abs=5 * 0.5 / np.sqrt(DRAWS))


def test_temperature_one_draws_from_the_distribution():
    assert frequencies(Sampling(temperature=1.0)) == near(PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float):
    assert frequencies(Sampling(temperature=temperature)) == near(PROBABILITIES ** (1 / temperature))


def test_a_tiny_temperature_is_greedy():
    for temperature in (1e-3, 1e-300, 5e-324):
        assert frequencies(Sampling(temperature=temperature))[1] == 1.0


def test_top_k_keeps_the_k_most_likely():
    assert frequencies(Sampling(temperature=1.0, top_k=2)) == near([0, 0.4, 0, 0.25, 0])
    assert frequencies(Sampling(temperature=1.0, top_k=1))[1] == 1.0
    assert frequencies(Sampling(temperature=1.0, top_k=99)) == near(PROBABILITIES)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert frequencies(Sampling(temperature=1.0, top_p=0.6)) == near([0, 0.4, 0, 0.25, 0])
    assert frequencies(Sampling(temperature=1.0, top_p=0.66)) == near([0, 0.4, 0, 0.25, 0.2])
    assert frequencies(Sampling(temperature=1.0, top_p=0.01))[1] == 1.0
    assert frequencies(Sampling(temperature=1.0, top_p=1.0)) == near(PROBABILITIES)


def test_top_p_reaches_p_of_what_top_k_left():
    # 0.4 of the 0.65 that two tokens have is 0.62: enough for p = 0.6 alone.
    assert frequencies(Sampling(temperature=1.0, top_k=2, top_p=0.6))[1] == 1.0


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(0, 1e4),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
)
def test_chooses_a_token_that_is_allowed(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
):
    values = np.array(logits, np.float32)
    token = choose(values, Sampling(temperature, top_k, top_p), np.random.default_rng(0))
    assert np.sum(values > values[token]) < min(top_k or len(values), len(values))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -3}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_sampling_refuses(values: dict[str, Any], name: str):
    with one_line(ValueError, name, str(next(iter(values.values())))):
        Sampling(**values)


# --- many tokens ------------------------------------------------------------------------------------------------------


def counting(tokens: list[int]) -> np.ndarray:
    """Logits of a model that counts up to 9."""
    return np.eye(10, dtype=np.float32)[min(tokens[-1] + 1, 9)] * 50


def test_the_model_reads_what_was_chosen():
    read = []

    def model(tokens: list[int]) -> np.ndarray:
        read.append(list(tokens))
        return counting(tokens)

    assert list(generate_tokens(model, [2, 3], 3)) == [4, 5, 6]
    assert read == [[2, 3], [2, 3, 4], [2, 3, 4, 5]]


def test_stops_before_the_end_of_text():
    assert list(generate_tokens(counting, [3], 20, ends_of_text=(9, 6))) == [4, 5]
    assert list(generate_tokens(counting, [3], 20, ends_of_text=(4,))) == []


@pytest.mark.parametrize("count", [0, 1, 7])
def test_stops_after_max_new_tokens(count: int):
    assert len(list(generate_tokens(counting, [3], count))) == count


def test_tokens_come_one_by_one():
    asked = []
    stream = generate_tokens(lambda tokens: (asked.append(1), counting(tokens))[1], [0], 5)
    assert not asked
    assert next(stream) == 1
    assert len(asked) == 1


def test_the_same_seed_gives_the_same_text():
    def flat(_: list[int]) -> np.ndarray:
        return np.zeros(1000, np.float32)

    def text(seed: int) -> list[int]:
        return list(generate_tokens(flat, [0], 10, Sampling(temperature=1.0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_repeats_itself_with_a_seed_only(gpt2: GPT2):
    warm = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=3)
    first = list(gpt2.generate("The key", 50, warm))
    assert len(first) == 50
    assert list(gpt2.generate("The key", 50, warm)) == first
    assert list(gpt2.generate("The key", 50, dataclasses.replace(warm, seed=4))) != first


def test_a_model_stops_at_its_end_of_text(gpt2: GPT2):
    tokens = list(gpt2.generate("The key", 50))
    end = next(token for token in tokens if token != tokens[0])
    stopping = GPT2(dataclasses.replace(gpt2.config, eos_token_id=end), gpt2.model, gpt2.tokenizer)
    assert list(stopping.generate("The key", 50)) == tokens[: tokens.index(end)]


def test_text_fills_the_context_and_no_more(gpt2: GPT2):
    size = gpt2.config.n_positions
    assert len(list(gpt2.generate("x" * (size - 5), 5))) == 5
    assert list(gpt2.generate("x" * size, 0)) == []
    with one_line(PromptError, f"{size - 4} tokens", "5 more", f"{size}"):
        gpt2.generate("x" * (size - 4), 5)


@pytest.mark.parametrize(
    ("prompt", "count", "part"), [("", 5, "empty"), ("x", -1, "-1"), ("x\udc80", 5, "Unicode"), ("x", 10**9, "context")]
)
def test_refuses_a_prompt(gpt2: GPT2, prompt: str, count: int, part: str):
    with one_line(PromptError, part):
        gpt2.generate(prompt, count)


def test_text_of_tokens(gpt2: GPT2):
    text = f"Émile 🙂{END_OF_TEXT}"
    assert gpt2.text(gpt2.encode(text)) == text
    assert json.dumps(gpt2.text([gpt2.encode("é")[0]]))  # half a letter is still text
