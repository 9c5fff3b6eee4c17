"""The inhibitor (Brännvall and Stoian, "The Inhibitor: ReLU and addition-based attention for efficient Transformers",
arXiv 2308.05629): Manhattan distances for scores, and a value loses its score instead of being multiplied by a weight.
No product of encrypted numbers, no exponential, no division.

    z_j = sum_d |q_d - k_jd| / gamma        h_d = mean_j max(v_jd - z_j, 0) - max(-v_jd - z_j, 0)
"""

import numpy as np

from jaxgpt2.methods import attention


def positive(x):
    return np.maximum(x, 0)


@attention(gamma=(8, 16, 32, 64, 256, 512, 1024, 2048))
def inhibitor(ops, q, k, v, gamma=128):  # (D,), (S, D), (S, D)
    distance = ops.lookup(np.abs, q - k, like=q).sum(axis=1)  # (S,)
    lost = ops.requantize(distance / gamma, like=v)[:, None]  # (S, 1)
    return (ops.lookup(positive, v - lost, like=v) - ops.lookup(positive, -v - lost, like=v)).mean(axis=0)
