"""A head of `polynomial` on ciphertexts."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import fhe
from jaxgpt2 import methods
from jaxgpt2.executors import LocalExecutor
from jaxgpt2.methods import polynomial
from jaxgpt2.methods.method import HeadWeights, float_head
from jaxgpt2.quantize import Bits

pytest.importorskip("tenseal", reason="the CKKS engine is optional")


def test_it_is_the_only_method_for_slots():
    backend = fhe.get_backend("ckks")
    assert [name for name in methods.names() if methods.get(name).needs <= backend.offers] == ["polynomial"]


def test_a_head_on_ciphertexts():
    """Seven tokens, then one more, decrypted and compared with the float head; then an input far out of range."""
    random = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(size=shape) * scale

    width, size, tokens = 40, 16, 7
    weights = HeadWeights(
        draw(width, size, scale=0.12),
        draw(size, scale=0.3),
        draw(width, size, scale=0.12),
        draw(size),
        draw(width, size, scale=0.2),
        draw(size),
        draw(size, width),
        np.eye(size),
    )
    texts = [draw(tokens + 1, width) for _ in range(60)]
    module = polynomial.calibrate(weights, texts, Bits.of(4), 8, score_rank=0, value_rank=0, squarings=4)
    strategy = methods.get("polynomial").head.strategy
    functions = strategy.functions(module, texts[:3], tokens + 1)
    circuit = fhe.get_backend("ckks").compile(functions, module.params, fhe.FHEConfig())
    executor = LocalExecutor(circuit, circuit.make_keys(seed=1))
    x = texts[5]
    first, cache = strategy.read(module.client, executor, x[:tokens], None, tokens + 1)
    second, _ = strategy.read(module.client, executor, x[tokens:], cache, tokens + 1)

    def decode(results: Sequence[Any]) -> np.ndarray:
        return np.asarray(polynomial.decode(module.dequantization, tuple(map(jnp.asarray, results))))

    output = decode([np.concatenate(parts) for parts in zip(first, second, strict=True)])
    # One of 16 dimensions carries the shift, and random weights have none to spare.
    wanted = float_head(weights, x)
    assert np.linalg.norm(output - wanted) / np.linalg.norm(wanted) < 0.04
    # Noise and rounding: 1.3e-4 at most in the measurements of docs/ckks.md. The keys, on which most of it depends, are
    # of a fixed seed.
    exact = decode(strategy.whole(polynomial.DenseOps(), module.params, jnp.asarray(x)))
    assert np.linalg.norm(output - exact) / np.linalg.norm(exact) < 2e-3
    with pytest.raises(polynomial.OutOfRange):
        strategy.read(module.client, executor, x[:tokens] * 30, None, tokens + 1)
