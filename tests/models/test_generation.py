"""Choosing tokens follows the distribution that was asked for, and generation ends where it should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import END_OF_TEXT, edit_json, one_line
from jaxgpt2.errors import PromptError
from jaxgpt2.generation import GREEDY, Sampling, choose, generate_tokens, penalize
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
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": True}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size"),
    ],
)
def test_sampling_refuses(values: dict[str, Any], name: str):
    with one_line(ValueError, name, str(next(iter(values.values())))):
        Sampling(**values)


# --- what a text has already ------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    penalty=st.floats(0.5, 3),
    size=st.integers(0, 5),
)
def test_penalties_are_those_of_transformers(tokens: list[int], logits: list[float], penalty: float, size: int):
    ids: Any = torch.tensor([tokens])
    wanted: Any = torch.tensor([logits])
    for processor in (
        transformers.RepetitionPenaltyLogitsProcessor(penalty),
        *([transformers.NoRepeatNGramLogitsProcessor(size)] if size else []),
    ):
        wanted = processor(ids, wanted)
    values = np.array(logits, np.float32)
    before = values.copy()
    found = penalize(values, tokens, Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size))
    np.testing.assert_allclose(found, wanted[0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(values, before)


def test_where_every_token_would_repeat_one_is_chosen_all_the_same():
    once = Sampling(temperature=1.0, no_repeat_ngram_size=1)
    text = list(generate_tokens(lambda _: np.zeros(4, np.float32), [0], 6, once))
    assert len(text) == 6 and set(text[:3]) == {1, 2, 3}


PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}


def test_a_text_with_penalties_is_that_of_transformers(gpt2: GPT2, small_readonly: Path):
    theirs: Any = transformers.GPT2LMHeadModel.from_pretrained(small_readonly)
    prompt = gpt2.encode("the cat the cat")
    generated = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None, **PENALTIES
    )
    found = list(gpt2.generate("the cat the cat", 40, Sampling(**PENALTIES)))
    assert found == generated[0, len(prompt) :].tolist()
    assert found != list(gpt2.generate("the cat the cat", 40))


def test_a_checkpoints_generation_config_is_obeyed(small: Path, gpt2: GPT2):
    assert gpt2.sampling == GREEDY
    plain = list(gpt2.generate("The key", 12))
    edit_json(small / "generation_config.json", **PENALTIES, eos_token_id=None, max_length=3)
    told = GPT2.from_pretrained(small)
    assert told.sampling == Sampling(**PENALTIES)
    assert list(told.generate("The key", 12)) == list(gpt2.generate("The key", 12, told.sampling)) != plain
    assert list(told.generate("The key", 12, GREEDY)) == plain
    edit_json(small / "generation_config.json", eos_token_id=list(told.generate("The key", 12))[5])
    assert len(list(GPT2.from_pretrained(small).generate("The key", 12))) <= 5
    (small / "generation_config.json").unlink()
    assert GPT2.from_pretrained(small).sampling == GREEDY


def test_reads_generation_configs_as_transformers_does(caplog: pytest.LogCaptureFixture):
    """Its settings of draws say nothing unless it draws, and have defaults where it does."""
    assert Sampling.from_dict({}) == GREEDY
    assert Sampling.from_dict({"temperature": 0.5, "top_k": 3, "top_p": 0.9}) == GREEDY
    assert Sampling.from_dict({"do_sample": True}) == Sampling(1.0, top_k=50, top_p=1.0)
    drawn = Sampling.from_dict({"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": None})
    assert drawn == Sampling(0.5, top_k=None, top_p=1.0)
    assert not caplog.records
    assert Sampling.from_dict({"num_beams": 1, "typical_p": 1.0, "min_length": 0, "bos_token_id": 7}) == GREEDY
    assert not caplog.records
    assert Sampling.from_dict({"num_beams": 4}) == GREEDY
    assert "num_beams is not implemented" in caplog.text


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(**PENALTIES), Sampling(0.7, top_k=5, top_p=0.9), Sampling(2.0)])
def test_generation_configs_are_written_as_they_are_read(sampling: Sampling):
    again = Sampling.from_dict(json.loads(json.dumps(sampling.to_dict())))
    assert dataclasses.replace(again, top_p=sampling.top_p) == sampling  # all of the probability is 1.0 there
    assert transformers.GenerationConfig(**sampling.to_dict()).repetition_penalty == sampling.repetition_penalty


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"repetition_penalty": "much"}', ["generation_config.json", "repetition_penalty", "'much'"]),
        ('{"do_sample": true, "top_k": -1}', ["generation_config.json", "top_k", "-1"]),
        ("[1]", ["generation_config.json", "list"]),
        ("{", ["generation_config.json"]),
    ],
)
def test_refuses_a_generation_config(small: Path, content: str, parts: list[str]):
    (small / "generation_config.json").write_text(content)
    with one_line(ValueError, *parts):
        GPT2.from_pretrained(small)


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
