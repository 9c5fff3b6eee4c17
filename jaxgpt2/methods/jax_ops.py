"""The operations that run a quantized function in JAX; NumPy's are in `fhe.tfhe.tables`, Concrete's in its own file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fhe import LookupTable

# A lookup is data like any other: `vmap` over stacked tables sweeps over bit widths, heads and layers.
jax.tree_util.register_dataclass(LookupTable, data_fields=["values", "low", "shift"], meta_fields=[])


class JaxOps:
    """int32 arithmetic under `jit` and `vmap`, equal to the last bit to the other namespaces.

    Calibration has checked every accumulator against int32, so nothing here wraps.
    """

    def lookup(self, table: LookupTable, x: jax.Array) -> jax.Array:
        half = (1 << table.shift) >> 1
        index = ((x + half) >> table.shift) - table.low
        values = jnp.asarray(table.values, jnp.int32)
        return values[jnp.clip(index, 0, values.shape[0] - 1)]

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))

    def max(self, x: jax.Array, axis: int, keepdims: bool = False) -> jax.Array:
        return jnp.max(x, axis=axis, keepdims=keepdims)

    def concatenate(self, arrays: Iterable[jax.Array], axis: int) -> jax.Array:
        return jnp.concatenate(tuple(arrays), axis=axis)

    def tag(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return jax.named_scope(name)


def straight_through(smooth: jax.Array, exact: jax.Array) -> jax.Array:
    """The value of `exact` with the gradient of `smooth` (Bengio et al., 2013)."""
    return smooth + jax.lax.stop_gradient(exact - smooth)
