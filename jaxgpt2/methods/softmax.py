"""The attention of "Towards Encrypted Large Language Models with FHE" (Zama and Hugging Face, 2023), in integers.

Every step of softmax(q k^T / sqrt(D)) v is done under encryption: row maximum, subtraction, exponential, sum,
reciprocal, product. All tokens of a text are compared with all others, and all of it is read again for the next token.
It is the baseline that cheaper methods are measured against.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxgpt2.methods.formula import attention


@attention(full_sequence=True)
def softmax(ops: Any, q: Any, k: Any, v: Any) -> Any:
    with ops.tag("scores"):
        scores = ops.requantize(k @ q / np.sqrt(len(q)))
    with ops.tag("softmax"):
        e = ops.lookup(np.exp, scores - scores.max(keepdims=True))
        weights = ops.requantize(e * ops.lookup(np.reciprocal, e.sum(keepdims=True)))
    with ops.tag("output"):
        return ops.requantize(weights @ v)
