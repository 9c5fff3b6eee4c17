"""Fine-tuning runs the integers that encryption computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fine_tune
import helpers
from jaxgpt2 import methods
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.methods import MethodConfig
from jaxgpt2.methods.formula import attention, formula_of
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import assemble, disassemble


@pytest.fixture
def tiny_softmax():
    @attention
    def tiny_softmax(ops, q, k, v):
        scores = ops.requantize(k @ q / np.sqrt(len(q)))
        weights = ops.lookup(np.exp, scores - scores.max())
        return weights @ v / weights.sum()

    methods.register(tiny_softmax)
    yield tiny_softmax
    methods.method._METHODS.pop("tiny_softmax")  # pyright: ignore


@pytest.mark.slow
def test_training_starts_from_the_integers_of_the_mode_quantized(tmp_path, tiny_softmax, monkeypatch):
    helpers.random_checkpoint(tmp_path, n_layer=1, n_head=2, n_embd=16)
    gpt2 = GPT2.from_pretrained(tmp_path)
    encrypted = EncryptedGPT2.encrypt(gpt2, "0.0,0.1", MethodConfig.of("tiny_softmax", 4))
    encrypted = encrypted.calibrate(["the cat", "sat on", "a mat", "one dog"], 7)
    tokens = np.array([gpt2.encode("the dog")[:6]], np.int32)
    heads = fine_tune.stacked(encrypted)

    @jax.jit
    def forward(tensors):
        model = assemble(gpt2.config, tensors)
        return fine_tune.forward(formula_of(tiny_softmax), model, tensors, heads, jnp.asarray(tokens))

    def equal(encrypted):
        wanted = encrypted.forward(tokens, encrypted.runner("quantized")).logits
        np.testing.assert_allclose(forward(disassemble(encrypted.model.model)), wanted, rtol=1e-3, atol=1e-3)
        return wanted

    before = equal(encrypted)
    # One step moves the weights, and the model that is given back computes with them, in integers.
    monkeypatch.setattr(fine_tune, "TEXTS", 2)
    monkeypatch.setattr(fine_tune, "BATCH", 2)
    monkeypatch.setattr(fine_tune, "TOKENS", 6)
    monkeypatch.setattr(fine_tune, "RATE", 10.0)  # warming up takes a fiftieth
    config = encrypted.configs[encrypted.modules[0]]
    tuned, steps = fine_tune.fine_tune(gpt2, config, encrypted, 1e-9, lambda *_: None)
    assert steps == 1
    assert not np.array_equal(equal(tuned), before)
    for module, own in tuned.quantized.items():
        old = encrypted.quantized[module]
        assert jax.tree.all(jax.tree.map(np.array_equal, own.params.sites, old.params.sites))
        assert not np.array_equal(own.params.projections[2].weight, old.params.projections[2].weight)
