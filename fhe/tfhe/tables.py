"""Lookup tables of integers, and the operations that integer functions use."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LookupTable:
    """An integer function of one integer: `values[clip(((x + half) >> shift) - low, 0, n - 1)]`.

    `half` is 2**(shift - 1), or 0 if shift is 0: round half up, then saturate at the ends. Every `Ops` and every
    backend gives exactly this integer, except for approximate rounding (see `fhe.FHEConfig`).

    values: integers (n,), the results. low: the rounded input of the first entry. shift: number of low bits that are
    rounded away before the lookup.
    """

    values: Any
    low: int = 0
    shift: int = 0

    @classmethod
    def build(
        cls, function: Callable[[NDArray[Any]], NDArray[Any]], low: int, high: int, shift: int = 0
    ) -> "LookupTable":
        """Tabulate a float function at the rounded inputs low..high, both included.

        function: takes the inputs `arange(low, high + 1) << shift` as float64 (n,) and returns float64 (n,). Results
        are rounded half to even (`np.rint`) and stored as int32.

        Raises ValueError for an empty range, a negative shift, or a result that is not finite or not an int32.
        """
        if high < low or shift < 0:
            raise ValueError(f"a table needs low <= high and shift >= 0; got low {low}, high {high}, shift {shift}")
        inputs = np.arange(low, high + 1, dtype=np.int64) << shift
        results = np.asarray(function(inputs.astype(np.float64)), np.float64)
        if results.shape != inputs.shape:
            raise ValueError(f"a table function must keep the shape: gave {results.shape} for {inputs.shape}")
        rounded = np.rint(results)
        limit = np.iinfo(np.int32)
        bad = ~np.isfinite(rounded) | (rounded < limit.min) | (rounded > limit.max)
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(f"the table's entry for input {inputs[first]} is {results[first]}, which is not an int32")
        return cls(rounded.astype(np.int32), int(low), int(shift))

    def __call__(self, x: Any) -> NDArray[Any]:
        """Look up integers of any shape, in NumPy. Returns int64 of the same shape."""
        values = np.asarray(self.values, np.int64)
        half = (1 << self.shift) >> 1
        index = ((np.asarray(x, np.int64) + half) >> self.shift) - self.low
        return values[np.clip(index, 0, len(values) - 1)]


class Ops(Protocol):
    """The operations of integer functions.

    Arrays also support + - * (with arrays and numbers, clear or encrypted), slicing, `.shape`, `.sum(axis, keepdims)`,
    `.reshape(shape)` and `.transpose(axes)`.
    """

    def lookup(self, table: LookupTable, x: Any) -> Any:
        """The table's result for every element of x; same shape."""
        ...

    def matmul(self, a: Any, b: Any) -> Any:
        """(..., m, k) @ (..., k, n) -> (..., m, n); either or both may be encrypted."""
        ...

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        """The maximum along an axis."""
        ...

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        """Join arrays along an existing axis."""
        ...

    def tag(self, name: str) -> AbstractContextManager[Any]:
        """Name the stage of the operations inside, for the report."""
        ...


class NumpyOps:
    """`Ops` on NumPy arrays of int64."""

    def lookup(self, table: LookupTable, x: Any) -> Any:
        return table(x)

    def matmul(self, a: Any, b: Any) -> Any:
        return np.matmul(a, b)

    def max(self, x: Any, axis: int, keepdims: bool = False) -> Any:
        return np.max(x, axis=axis, keepdims=keepdims)

    def concatenate(self, arrays: Iterable[Any], axis: int) -> Any:
        return np.concatenate(tuple(arrays), axis=axis)

    @contextmanager
    def tag(self, name: str) -> Generator[None, None, None]:
        yield
