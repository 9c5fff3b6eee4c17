"""Names of GPT-2's tensors: Flax's paths, Hugging Face's names, and the variants met in the wild."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Flax NNX calls a layer's main parameter by what it does, Hugging Face calls every one `weight`. Both keep a linear
# layer's weight as (inputs, outputs) in GPT-2, so no tensor is ever transposed.
_WEIGHT = {"kernel", "scale", "embedding"}

# Causal masks that old versions of transformers saved as if they were weights.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def huggingface_name(path: Sequence[object]) -> str:
    """('h', 0, 'attn', 'c_attn', 'kernel') -> 'h.0.attn.c_attn.weight'."""
    *module, parameter = map(str, path)
    return ".".join([*module, "weight" if parameter in _WEIGHT else parameter])


def canonical_name(name: str) -> str | None:
    """A tensor's name without the prefix that some checkpoints have; None for a buffer that is not a weight."""
    name = name.removeprefix("transformer.")
    return None if _MASK_BUFFER.fullmatch(name) else name
