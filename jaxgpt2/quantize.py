"""Symmetric uniform quantization with explicit scales: real = scale * integer.

Scales are plain arrays that a calibration returns; nothing here remembers what it has seen. The scales' arithmetic is
NumPy float64 on the side that calibrates; `quantize` alone also runs in JAX, on the client's activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgpt2.errors import InputError

INT32_MAX = 2**31 - 1


class CalibrationError(InputError):
    """Calibration that cannot give a correct integer head; the message says which stage, and the numbers."""


@dataclass(frozen=True)
class Bits:
    """Bit widths of a quantized head.

    Args:
        inputs: of the head's input, as encrypted by the client.
        weights: of the projection matrices.
        activations: of queries, keys, values, scores, attention weights and outputs.
        rounding_threshold: top bits of an accumulator that a lookup sees; the bits below are rounded away before it.
            None lets every lookup see all of its accumulator.

    Raises:
        InputError: a width outside 2 to 12 (rounding_threshold: 2 to 16).
    """

    inputs: int
    weights: int
    activations: int
    rounding_threshold: int | None = None

    def __post_init__(self) -> None:
        for name, largest in (("inputs", 12), ("weights", 12), ("activations", 12), ("rounding_threshold", 16)):
            value = getattr(self, name)
            if name == "rounding_threshold" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= largest:
                raise InputError(f"bits of {name} must be a whole number from 2 to {largest}, got {value!r:.100}")

    @classmethod
    def of(cls, n_bits: int, rounding_threshold: int | None = None) -> Bits:
        """The same width for inputs, weights and activations."""
        return cls(n_bits, n_bits, n_bits, rounding_threshold)


def largest_level(bits: Any) -> Any:
    """Largest integer of a symmetric signed quantization: levels are -largest ... largest.

    `bits` is a number, or (as a sweep has it) a traced integer.
    """
    return (1 << (bits - 1)) - 1


def scale_for(values: np.ndarray, bits: int) -> float:
    """The scale at which the largest magnitude among `values` becomes the largest level; 1.0 if all are zero."""
    return scale_to(values, largest_level(bits))


def scale_to(values: np.ndarray, limit: int) -> float:
    """The scale at which the largest magnitude among `values` becomes that level; 1.0 if all are zero."""
    largest = float(np.max(np.abs(values), initial=0.0))
    return largest / limit if largest > 0 else 1.0


def quantize(x: jax.Array, scale: ArrayLike, bits: ArrayLike) -> jax.Array:
    """round(x / scale), saturated at the largest level: int32 of x's shape. `scale` broadcasts against x."""
    limit = largest_level(bits)
    return jnp.clip(jnp.rint(x / scale), -limit, limit).astype(jnp.int32)


def quantize_weight(weight: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    """A weight's integers (int64) and their scale."""
    scale = scale_for(weight, bits)
    return np.rint(weight / scale).astype(np.int64), scale


def check_accumulator(stage: str, bound: int) -> int:
    """Returns `bound`, the largest magnitude that a stage's sum can reach, if int32 holds it.

    Raises:
        CalibrationError: it would wrap.
    """
    if bound > INT32_MAX:
        raise CalibrationError(
            f"the {stage} sums can reach {bound:,}, more than int32 holds ({INT32_MAX:,}): use fewer bits"
        )
    return bound


def projection_bound(weight: np.ndarray, bias: np.ndarray, largest_input: int) -> int:
    """Largest magnitude of x @ weight + bias over all integer x with |x| <= largest_input."""
    return int(np.max(np.abs(weight).sum(axis=0) * largest_input + np.abs(bias)))
