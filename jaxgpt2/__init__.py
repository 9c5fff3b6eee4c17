"""GPT-2 in Flax of which chosen parts run on encrypted data.

    from jaxgpt2 import EncryptedGPT2

    model = EncryptedGPT2.from_pretrained("tiny", modules="0.3", bits=4)

Importing this package loads nothing heavy: what it names is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt2.encrypted import EncryptedGPT2
    from jaxgpt2.evaluation import Evaluation, evaluate
    from jaxgpt2.generation import Sampling
    from jaxgpt2.models.gpt2.config import GPT2Config
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.quantize import Bits

__version__ = "0.1.0"

_HOMES = {
    "GPT2Config": "models.gpt2.config",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Sampling": "generation",
    "GPT2": "models.gpt2.pretrained",
    "EncryptedGPT2": "encrypted",
    "Bits": "quantize",
}

__all__ = ["GPT2", "Bits", "EncryptedGPT2", "Evaluation", "GPT2Config", "Sampling", "evaluate", "methods"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("jaxgpt2.methods")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxgpt2.{_HOMES[name]}"), name)
