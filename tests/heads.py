"""Random heads with inputs for them, and an executor of slot functions that encrypts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from fhe import Function
from fhe.ckks.slots import CleartextSimulator
from jaxgpt2.methods.method import HeadWeights, quantize_input


def random_head(seed: int, width: int, head_dim: int, sharpness: float = 1.0) -> HeadWeights:
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(size=shape) / np.sqrt(shape[0])

    output = matrix(head_dim, width)
    return HeadWeights(
        query=matrix(width, head_dim) * sharpness,
        query_bias=random.normal(size=head_dim) * 0.1,
        key=matrix(width, head_dim) * sharpness,
        key_bias=random.normal(size=head_dim) * 0.1,
        value=matrix(width, head_dim),
        value_bias=random.normal(size=head_dim) * 0.1,
        output=output,
        metric=output @ output.T,
    )


def random_inputs(seed: int, count: int, tokens: int, width: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed + 1000)
    return [random.normal(size=(tokens, width)) for _ in range(count)]


def integers(calibrated, x: np.ndarray) -> np.ndarray:
    return np.asarray(quantize_input(calibrated, jnp.asarray(x, jnp.float32)), np.int64)


@dataclass
class Rehearsal:
    """An executor without encryption: functions on a `CleartextSimulator`, with every call noted."""

    functions: dict[str, Function]
    params: Any
    slots: int = 512
    calls: list[str] = field(default_factory=list)

    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        return arrays

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        self.calls.append(name)
        function, simulator = self.functions[name], CleartextSimulator(self.slots)
        assert len(arrays) == len(function.sources)
        loaded = [simulator.load(v, 2 if group else 0) for v, group in zip(arrays, function.sources, strict=True)]
        return [result.values for result in function.run(simulator, self.params, *loaded)]

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        self.calls.append(f"decrypt {name}")
        return results
