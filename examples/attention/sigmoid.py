"""Sigmoid attention (Ramapuram et al., "Theory, analysis, and best practices for sigmoid self-attention", arXiv
2409.04431): a weight is the sigmoid of its score alone, so no maximum, no sum, no division. The paper's bias is minus
the logarithm of the text's length; here it is chosen on calibration text."""

import numpy as np

from jaxgpt2.methods import attention


@attention(bias=(1, 0, -1, -2, -3, -4, -6))
def sigmoid(ops, q, k, v, bias=-2):  # (D,), (S, D), (S, D)
    scores = k @ q / np.sqrt(len(q))  # (S,)
    return ops.lookup(lambda s: 1 / (1 + np.exp(-s - bias)), scores) @ v
