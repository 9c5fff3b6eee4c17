"""config.json in, a shape that the model can run or one clear line out."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from helpers import one_line
from jaxgpt2.models.gpt2.config import ConfigError, GPT2Config


def test_defaults_are_transformers_defaults():
    theirs, ours = transformers.GPT2Config(), GPT2Config()
    for name in GPT2Config.__dataclass_fields__:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_reads_what_transformers_writes():
    written = transformers.GPT2Config(n_embd=96, n_head=3, n_layer=5, n_inner=100, vocab_size=77).to_dict()
    config = GPT2Config.from_dict(written)
    assert (config.n_embd, config.n_head, config.n_layer, config.vocab_size) == (96, 3, 5, 77)
    assert (config.head_dim, config.inner_dim) == (32, 100)


@pytest.mark.parametrize(("given", "ends"), [(None, ()), (7, (7,)), ([7], (7,)), ([7, 9], (7, 9)), ([], ())])
def test_ends_of_text(given: Any, ends: tuple[int, ...]):
    config = GPT2Config.from_dict({"eos_token_id": given})
    assert config.ends_of_text == ends
    assert hash(config) == hash(GPT2Config.from_dict({"eos_token_id": given}))  # programs are compiled for each


def test_inner_width_is_four_times_the_width_unless_set():
    assert GPT2Config(n_embd=96, n_head=3).inner_dim == 384


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
        ({"activation_function": "swish"}, ["activation_function", "'swish'", "gelu_new"]),
        ({"activation_function": ["gelu"]}, ["activation_function"]),
        ({"n_embd": 100, "n_head": 12}, ["n_embd 100", "n_head 12"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"n_layer": -1}, ["n_layer", "-1"]),
        ({"n_head": "12"}, ["n_head", "'12'"]),
        ({"n_positions": 1.5}, ["n_positions", "1.5"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"n_embd": True}, ["n_embd", "True"]),
        ({"n_inner": 0}, ["inner_dim", "0"]),
        ({"layer_norm_epsilon": 0.0}, ["layer_norm_epsilon"]),
        ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'"]),
        ({"eos_token_id": [1, "2"]}, ["eos_token_id", "'2'"]),
        ({"eos_token_id": 1.0}, ["eos_token_id", "1.0"]),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
    ],
)
def test_refuses_what_it_cannot_run(values: dict[str, Any], parts: list[str]):
    with one_line(ConfigError, *parts):
        GPT2Config.from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "[" * 5000},
        {"activation_function": "[" * 5000},
        {"n_embd": 10**4000 + 1, "n_head": 10**4000},
        {"n_layer": "1" * 5000},
        {"layer_norm_epsilon": "1" * 5000},
        {"tie_word_embeddings": "1" * 5000},
        {"eos_token_id": ["1" * 5000]},
    ],
)
def test_what_it_refuses_is_shown_in_part(values: dict[str, Any]):
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_dict(values)
    assert len(str(error.value)) < 400
