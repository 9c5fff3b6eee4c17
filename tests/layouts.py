"""Layouts of slots, and numbers to fill them with."""

import numpy as np

from fhe.ckks.linalg import Layout
from fhe.ckks.slots import CleartextSimulator

SHAPES = [  # slots, width, outputs, tokens
    (8192, 768, 64, 8),
    (8192, 256, 64, 8),
    (16384, 768, 128, 8),
    (16384, 1600, 64, 8),
    (4096, 100, 16, 32),
    (1024, 20, 3, 4),
    (512, 30, 7, 1),
    (256, 3, 1, 2),
]


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def simulator_and_layout(slots: int, width: int, outputs: int, tokens: int) -> tuple[CleartextSimulator, Layout]:
    return CleartextSimulator(slots), Layout.fit(slots, width, outputs, tokens)
