"""Encrypted modules on two machines: bundles for both, a server that computes, a client that keeps text and keys.

The server's part imports neither JAX nor the model: it runs the functions of circuits, whatever they compute.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt2.serving.client import RemoteGPT2

__all__ = ["FORMAT", "RemoteGPT2"]

# Of bundles, requests and answers. A client and a server of different formats do not try to understand each other.
FORMAT = 1


def __getattr__(name: str) -> Any:
    if name != "RemoteGPT2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxgpt2.serving.client"), name)
