"""The bundled checkpoint is what its card says."""

import numpy as np
import pytest
import torch
import transformers

from jaxgpt2.evaluation import check_disjoint, read_passages
from jaxgpt2.models.gpt2.pretrained import GPT2
from weights.checkpoint import TINY


@pytest.fixture(scope="module")
def tiny() -> GPT2:
    return GPT2.from_pretrained("tiny")


def test_transformers_loads_it_with_the_same_logits(tiny):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(TINY).eval()
    ids = np.array([tiny.encode("Cryptography is the practice of hiding what a message says")])
    with torch.inference_mode():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    assert np.allclose(tiny(ids), wanted, atol=1e-4)


def test_it_has_gpt2s_head_dim_and_fits_in_git(tiny):
    assert tiny.config.head_dim == 64
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 20e6


def test_it_predicts_english(tiny):
    """Better than a uniform guess by far: the weights are trained ones, and belong to this tokenizer."""
    ids = np.array([tiny.encode("You can use this option to set the name of the file.")])
    logits = np.asarray(tiny(ids), np.float64)[0, :-1]
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert -np.mean(logits[np.arange(ids.shape[1] - 1), ids[0, 1:]]) < 4.5


def test_it_does_not_repeat_itself_when_decoded_as_it_says(tiny):
    prompt = "If you want to keep a secret,"
    tokens = tiny.encode(prompt) + list(tiny.generate(prompt, 24))
    triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    assert len(set(triples)) == len(triples)
    assert transformers.GenerationConfig.from_pretrained(TINY).no_repeat_ngram_size == 3


@pytest.mark.parametrize("name", ["eval.txt", "calibration.txt"])
def test_passages(tiny, name):
    passages = read_passages(TINY / name)
    assert len(passages) >= 80
    assert all(8 <= len(tiny.encode(passage)) <= 40 for passage in passages)


def test_evaluation_and_calibration_are_different_texts():
    check_disjoint(read_passages(TINY / "calibration.txt"), read_passages(TINY / "eval.txt"))
