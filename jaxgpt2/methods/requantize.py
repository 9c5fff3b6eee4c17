"""What methods share: projections with requantization, and the tables that do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fhe import LookupTable, NumpyOps, Ops
from jaxgpt2.quantize import (
    Bits,
    CalibrationError,
    check_accumulator,
    largest_level,
    projection_bound,
    quantize_weight,
)

# Accumulators of texts unlike the calibration's may be this many times as large before they saturate.
HEADROOM = 2

MAX_ENTRIES = 2**22  # of a lookup table: 16 MB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projection:
    """x @ weight + bias, requantized. weight (C, D), bias (D,)."""

    weight: np.ndarray
    bias: np.ndarray
    requantize: LookupTable


def project(ops: Ops, projection: Projection, x: Any) -> Any:
    """(T, C) -> (T, D)."""
    return ops.lookup(projection.requantize, ops.matmul(x, projection.weight) + projection.bias)


def requantization(
    stage: str, scale_in: float, scale_out: float, bits: int, seen: int, bound: int, rounding_threshold: int | None
) -> LookupTable:
    """The lookup that takes accumulators of one scale to levels of another.

    Args:
        seen: largest magnitude that calibration saw; the table covers HEADROOM times it.
        bound: largest magnitude that is possible at all.
        rounding_threshold: top bits that the lookup sees, None for all.
    """
    check_accumulator(stage, bound)
    limit, reach = largest_level(bits), max(1, min(bound, HEADROOM * seen))
    width = int(reach).bit_length() + 1  # with the sign
    shift = 0 if rounding_threshold is None else max(0, width - rounding_threshold)
    steps = -(-reach >> shift)
    return build_table(lambda x: np.clip(np.rint(x * (scale_in / scale_out)), -limit, limit), -steps, steps, shift)


def build_table(function: Callable[[np.ndarray], np.ndarray], low: int, high: int, shift: int) -> LookupTable:
    """`LookupTable.build`, within reason.

    Raises:
        CalibrationError: more than MAX_ENTRIES entries.
    """
    if high - low >= MAX_ENTRIES:
        raise CalibrationError(
            f"a lookup table of {high - low + 1:,} entries is too large (limit {MAX_ENTRIES:,}): "
            "use fewer bits, or set the rounding threshold bits"
        )
    return LookupTable.build(function, low, high, shift)


def calibrate_projection(
    stage: str,
    weight: np.ndarray,
    bias: np.ndarray,
    x: np.ndarray,
    bits: Bits,
    choose_scale: Callable[[np.ndarray, int], float],
) -> tuple[Projection, np.ndarray, float]:
    """A real projection in integers.

    Args:
        stage: for error messages.
        weight: (C, D), takes integer inputs: the real weight times the inputs' scales.
        bias: (D,).
        x: (N, C) integer inputs, the calibration's.
        choose_scale: from the real outputs and their bits, the real value of one level.

    Returns:
        the projection, its output levels (N, D), and the real value of one of them.
    """
    integers, scale = quantize_weight(weight, bits.weights)
    integer_bias = np.rint(bias / scale).astype(np.int64)
    sums = (x.astype(np.float64) @ integers).astype(np.int64) + integer_bias  # exact, and faster than in integers
    step = choose_scale(sums * scale, bits.activations)
    bound = projection_bound(integers, integer_bias, largest_level(bits.inputs))
    table = requantization(
        stage, scale, step, bits.activations, int(np.abs(sums).max()), bound, bits.rounding_threshold
    )
    return Projection(integers, integer_bias, table), NumpyOps().lookup(table, sums), step
