"""Encrypted modules on two machines: bundles for both, a server that computes, a client that keeps text and keys.

The server of circuits imports neither JAX nor the model: it runs functions, whatever they compute.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt2.serving.client import RemoteGPT2

__all__ = ["RemoteGPT2"]


def __getattr__(name: str) -> Any:
    if name != "RemoteGPT2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxgpt2.serving.client"), name)
