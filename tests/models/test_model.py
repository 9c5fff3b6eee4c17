"""Parity with Hugging Face's GPT-2 on random weights of many shapes, and of the cache with the plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from helpers import one_line, random_checkpoint, torch_logits
from jaxgpt2.encrypted import head_weights
from jaxgpt2.errors import PromptError
from jaxgpt2.generation import generate_tokens
from jaxgpt2.methods.method import float_head
from jaxgpt2.models.gpt2.model import causal_attention
from jaxgpt2.models.gpt2.pretrained import GPT2

SHAPES: dict[str, dict[str, Any]] = {
    "odd heads": {"n_head": 3, "n_embd": 39},
    "one head, one layer, wide inside": {"n_head": 1, "n_embd": 24, "n_layer": 1, "n_inner": 200},
    "heads of width 2, narrow inside": {"n_head": 7, "n_embd": 14, "n_inner": 5, "vocab_size": 257, "n_layer": 1},
    "separate head, exact gelu": {
        "tie_word_embeddings": False,
        "activation_function": "gelu",
        "n_head": 5,
        "n_embd": 40,
        "n_layer": 1,
    },
    "long context, relu, large epsilon": {
        "n_positions": 1024,
        "activation_function": "relu",
        "layer_norm_epsilon": 0.1,
        "n_layer": 1,
    },
    "context that is no power of two": {"n_positions": 53, "activation_function": "gelu_pytorch_tanh", "n_head": 8},
    "scores by layer, silu": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu", "n_layer": 3},
    "scores unscaled, gelu_fast": {"scale_attn_weights": False, "activation_function": "gelu_fast", "n_layer": 1},
    "scores unscaled but by layer, quick_gelu": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "quick_gelu",
        "n_embd": 16,
    },
}
NEW_TOKENS = 50


class Pair(NamedTuple):
    theirs: transformers.GPT2LMHeadModel
    ours: GPT2


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("model")
    return Pair(random_checkpoint(directory, **request.param), GPT2.from_pretrained(directory))


def random_ids(gpt2: GPT2, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, gpt2.config.vocab_size, (batch, length))


def test_logits_equal_transformers(pair: Pair):
    ids = random_ids(pair.ours, 3, pair.ours.config.n_positions)
    wanted = torch_logits(pair.theirs, ids)
    assert wanted.std() > 0.5  # the comparison is about something
    np.testing.assert_allclose(np.asarray(pair.ours(ids)), wanted, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_transformers(pair: Pair):
    prompt = random_ids(pair.ours, 1, min(14, pair.ours.config.n_positions - NEW_TOKENS))
    ids = torch.tensor(prompt)
    theirs: Any = pair.theirs
    generated = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    wanted = generated[0, ids.shape[1] :].tolist()
    assert len(wanted) == NEW_TOKENS
    assert len(set(wanted)) > 3  # no model that repeats itself
    logits = pair.ours.cached_logits(prompt.shape[1] + NEW_TOKENS)
    assert list(generate_tokens(logits, prompt[0].tolist(), NEW_TOKENS)) == wanted


def test_cached_logits_equal_uncached(pair: Pair):
    """Whatever the pieces in which the tokens come: a prompt, one by one, several at once."""
    ids = random_ids(pair.ours, 3, pair.ours.config.n_positions)
    wanted = np.asarray(pair.ours(ids))[0]
    cached = pair.ours.cached_logits(min(64, pair.ours.config.n_positions))
    for end in (14, 15, 16, 31, 32, 48):
        np.testing.assert_allclose(cached(ids[0, :end].tolist()), wanted[end - 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("first", [1, 59])
def test_cache_up_to_the_end_of_the_context(gpt2: GPT2, first: int):
    """Padding is cut where the context ends, and moves nothing that was read before."""
    ids = random_ids(gpt2, 1, 64)
    cached = gpt2.cached_logits(64)
    cached(ids[0, :first].tolist())
    np.testing.assert_allclose(cached(ids[0].tolist()), gpt2(ids)[0, -1], rtol=0, atol=1e-4)


def test_two_caches_do_not_disturb_each_other(gpt2: GPT2):
    ids = random_ids(gpt2, 1, 64)
    first, second = ids, ids[:, ::-1]
    one, other = gpt2.cached_logits(64), gpt2.cached_logits(64)
    one(first[0, :5].tolist())
    other(second[0, :7].tolist())
    np.testing.assert_allclose(one(first[0, :6].tolist()), gpt2(first)[0, 5], rtol=0, atol=1e-4)
    np.testing.assert_allclose(other(second[0, :8].tolist()), gpt2(second)[0, 7], rtol=0, atol=1e-4)


def test_later_tokens_change_nothing_before_them(gpt2: GPT2):
    ids = random_ids(gpt2, 1, 64)
    changed = ids.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 300
    before, after = np.asarray(gpt2(ids)), np.asarray(gpt2(changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


def test_logits_of_lists_and_arrays_of_jax(gpt2: GPT2):
    ids = random_ids(gpt2, 1, 64)
    wanted = np.asarray(gpt2(ids))
    np.testing.assert_array_equal(wanted, np.asarray(gpt2(ids.tolist())))
    np.testing.assert_array_equal(wanted, np.asarray(gpt2(jnp.asarray(ids))))
    # A jitted function of the user's: another program, so other roundings.
    np.testing.assert_allclose(wanted, np.asarray(jax.jit(gpt2)(jnp.asarray(ids))), atol=1e-5)


def test_a_heads_weights_compute_the_head_however_its_scores_are_scaled(tmp_path: Path):
    random_checkpoint(tmp_path, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_embd=16)
    ours = GPT2.from_pretrained(tmp_path)
    h = ours.block(0, ours.embed(random_ids(ours, 1, 12)))[0]
    x, _, added, _ = ours.attend(1, h, np.array([2]))
    found = ours.contribution(1, jnp.asarray(float_head(head_weights(ours, 1, 2), np.asarray(x[0], np.float64))), 2)
    np.testing.assert_allclose(found, added[0, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (np.zeros((1, 65), int), "(1, 65)"),
        (np.zeros((1, 0), int), "(1, 0)"),
        (np.zeros(5, int), "(5,)"),
        (jnp.zeros((2, 65), int), "(2, 65)"),
        ([[1, 2], [3]], "length"),
        ([[0.5, 1.0]], "float64"),
        ([[3, 300]], "300"),
        ([[-1, 3]], "-1"),
    ],
)
def test_refuses_ids(gpt2: GPT2, ids: Any, part: str):
    with one_line(PromptError, part):
        gpt2(ids)


@pytest.mark.parametrize("batch, heads, time, size", [(1, 1, 1, 1), (2, 3, 5, 6)])
@pytest.mark.parametrize("first, spare", [(0, 0), (0, 3), (4, 3)])
def test_causal_attention_is_its_definition(batch: int, heads: int, time: int, size: int, first: int, spare: int):
    random = np.random.default_rng(0)
    q = random.normal(size=(batch, heads, time, size)).astype(np.float32)
    k, v = random.normal(size=(2, batch, heads, first + time + spare, size)).astype(np.float32)
    wanted = np.zeros(q.shape)
    for b, h, t in np.ndindex(batch, heads, time):
        seen = first + t + 1
        e = np.exp(k[b, h, :seen] @ q[b, h, t] / np.sqrt(size))
        wanted[b, h, t] = e / e.sum() @ v[b, h, :seen]
    np.testing.assert_allclose(np.asarray(jax.jit(causal_attention)(q, k, v, first)), wanted, atol=1e-5)
