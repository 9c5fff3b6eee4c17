"""The server's half: a clear matrix times residues modulo q, ahead, and times masked numbers modulo 2**32, online.

Sources: Bae, Cheon, Hanrot, Park and Stehle, "Plaintext-ciphertext matrix multiplication and FHE bootstrapping: fast
and fused", CRYPTO 2024, ePrint 2024/1284; Mishra and others, "Delphi", USENIX Security 2020, for the two phases.

Both are float64 matmuls of integers whose sums stay below 2**53, whatever the order of summation: exact everywhere.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import BackendUnavailable, CompilationError
from .parameters import Parameters, column_norms
from .residues import Residues, pack_answer, unpack_request

# An array of NumPy's or JAX's, and the module that made it.
Array: TypeAlias = Any
Namespace: TypeAlias = Any

# A float64 holds every integer below it.
EXACT = 2**53
# Weights are smaller in magnitude.
MOST_WEIGHT = 2**15

# Outputs whose sums are put together at a time, so that they stay in a cache: three times as fast as 128.
_CACHED_ROWS = 16


class Matrix:
    """A clear matrix of integers (d, m), prepared for both products. It holds one copy, in float64.

    array: NumPy's or JAX's arrays for the product ahead; the one online is NumPy's, where a request of one row is one
    GEMV. JAX computes on its default device.

    Raises CompilationError, with the numbers, if a sum might exceed 2**53, BackendUnavailable if JAX is asked for and
    missing, or its device has no true float64.
    """

    def __init__(
        self,
        weights: npt.NDArray[np.integer[Any]],
        parameters: Parameters | None = None,
        array: Literal["numpy", "jax"] = "numpy",
    ) -> None:
        self.parameters = parameters or Parameters()
        self.inputs, self.outputs = weights.shape
        _check(weights, self.parameters)
        self.weights = np.ascontiguousarray(weights, np.float64)
        self._array = array
        self._namespace = np if array == "numpy" else _jax_namespace()
        self._multiply = _multiply if array == "numpy" else _jax_multiply()
        with _float64(array):
            self._left = self._namespace.asarray(self.weights)

    def online(self, masked: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Masked numbers (T, d) times the matrix modulo 2**32, (T, m), exact.

        Raises ValueError if they are no uint32 (T, d).
        """
        if masked.ndim != 2 or masked.shape[1] != self.inputs or masked.dtype != np.uint32:
            raise ValueError(f"masked numbers are uint32 (rows, {self.inputs}), not {masked.dtype} {masked.shape}")
        # Numbers from -2**31 to 2**31 - 1 are the same ones modulo 2**32, and half as large.
        centred = masked.view(np.int32).astype(np.float64)
        return (centred @ self.weights).astype(np.int64).astype(np.uint32)

    def answer(self, request: bytes | memoryview, rows: int = 128) -> Iterator[bytes]:
        """The answer to a request, in pieces of so many outputs. Raises CircuitFormatError at once if it is none."""
        residues = unpack_request(request, self.inputs, self.parameters)
        return (pack_answer(block, self.parameters) for block in self.ahead(residues, rows))

    def ahead(self, residues: Residues, rows: int = 128) -> Iterator[Residues]:
        """The transposed matrix times residues (d, 2 N) modulo q: (m, 2 N), in blocks of so many rows.

        Beside its input it needs twice its memory, for limbs, and a block.
        """
        self._check_residues(residues)
        return self._ahead(residues, rows)

    def ahead_by_columns(self, residues: Residues, columns: int = 512) -> Residues:
        """What `ahead` gives, whole. Beside input and output it needs memory for so many columns only."""
        self._check_residues(residues)
        out = np.empty((self.outputs, residues.shape[1]), np.uint64)
        for start in range(0, residues.shape[1], columns):
            block = slice(start, start + columns)
            out[:, block] = np.concatenate(list(self._ahead(residues[:, block], 256)))
        return out

    def _check_residues(self, residues: Residues) -> None:
        if residues.ndim != 2 or len(residues) != self.inputs or residues.dtype != np.uint64:
            raise ValueError(f"residues are uint64 ({self.inputs}, columns), not {residues.dtype} {residues.shape}")

    def _ahead(self, residues: Residues, rows: int) -> Iterator[Residues]:
        with _float64(self._array):
            limbs = split(self._namespace, self._namespace.asarray(residues), self.parameters)
        for start in range(0, self.outputs, rows):
            with _float64(self._array):
                left = self._left[:, start : start + rows]
                block = np.asarray(self._multiply(left, *limbs, self.parameters))
            yield block  # outside, as JAX's float64 is not for who asks for blocks


def split(xp: Namespace, residues: Array, parameters: Parameters) -> tuple[Array, Array]:
    """Residues as float64 low and high limbs, of half the modulus's bits each."""
    bits = parameters.modulus_bits // 2
    low = (residues & xp.uint64((1 << bits) - 1)).astype(xp.float64)
    return low, (residues >> xp.uint64(bits)).astype(xp.float64)


def recombine(xp: Namespace, low: Array, high: Array, parameters: Parameters) -> Array:
    """low + high * 2**26 modulo q, uint64, of float64 integers below 2**53 in magnitude.

    q is 2**52 - c with a small c: what is above 52 bits comes back at the bottom, times c. All fits int64.
    """
    bits, gap, modulus = parameters.modulus_bits, parameters.modulus_gap, parameters.coeff_modulus
    half, mask = bits // 2, (1 << bits) - 1
    low, high = low.astype(xp.int64), high.astype(xp.int64)
    # high = upper * 2**26 + rest, |upper| < 2**27 and 0 <= rest < 2**26: |total| < 2**54.
    total = low + (high >> half) * gap + ((high & ((1 << half) - 1)) << half)
    # Now from -4 c to 2**52 + 3 c. In uint64, what is below zero wraps around and is more than anything else.
    total = ((total >> bits) * gap + (total & mask)).astype(xp.uint64)
    total = xp.minimum(total, total + xp.uint64(modulus))
    return xp.minimum(total, total - xp.uint64(modulus))


def _multiply(left: Array, low: Array, high: Array, parameters: Parameters) -> Residues:
    """The transpose of weights (d, rows) times limbs (d, columns): residues (rows, columns), by NumPy."""
    low, high = left.T @ low, left.T @ high
    out = np.empty(low.shape, np.uint64)
    for start in range(0, len(out), _CACHED_ROWS):
        block = slice(start, start + _CACHED_ROWS)
        out[block] = recombine(np, low[block], high[block], parameters)
    return out


def _check(weights: npt.NDArray[np.integer[Any]], parameters: Parameters) -> None:
    if weights.dtype.kind not in "iu" or weights.size == 0 or np.abs(weights.astype(np.int64)).max() >= MOST_WEIGHT:
        raise CompilationError(f"weights are integers below {MOST_WEIGHT} in magnitude, and there must be some")
    l1, _ = column_norms(weights)
    largest = int(l1.max()) << max(parameters.plain_bits - 1, parameters.modulus_bits // 2)
    if largest >= EXACT:
        raise CompilationError(
            f"the magnitudes in column {int(l1.argmax())} of a matrix {weights.shape} sum to {int(l1.max()):,}, so "
            f"products may reach {largest:.3g}, and float64 is exact below {EXACT:.3g}; use weights of fewer bits"
        )


# --- JAX ----------------------------------------------------------------------------------------


def _float64(array: str) -> AbstractContextManager[Any]:
    """JAX has no float64 unless asked."""
    if array == "numpy":
        return nullcontext()
    import jax

    if hasattr(jax, "enable_x64"):  # JAX 0.8 and later
        return jax.enable_x64(True)  # pyright: ignore
    from jax.experimental import enable_x64

    return enable_x64()


def _jax_namespace() -> Namespace:
    try:
        import jax.numpy as jnp
    except ImportError as error:
        raise BackendUnavailable("rlwe", "jax", error) from error
    with _float64("jax"):
        # TPUs emulate float64 with fewer bits.
        factor: Any = jnp.asarray([[2.0**26 + 1]])  # pyright: ignore[reportUnknownMemberType]
        if int((factor @ factor)[0, 0]) != (2**26 + 1) ** 2:
            raise BackendUnavailable(
                "rlwe", "JAX device with 53 bits in a float64", "this one has fewer: use NumPy's arrays"
            )
    return jnp


@functools.cache
def _jax_multiply() -> Any:
    """As `_multiply`; one function for all matrices, as JAX compiles it for every shape once."""
    import jax
    import jax.numpy as jnp

    def multiply(left: Array, low: Array, high: Array, parameters: Parameters) -> Array:
        return recombine(jnp, left.T @ low, left.T @ high, parameters)

    compiled: Any = jax.jit(multiply, static_argnums=3)  # pyright: ignore[reportUnknownMemberType]
    return compiled
