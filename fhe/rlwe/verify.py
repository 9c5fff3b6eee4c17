"""A client's check of a server's products: with a secret random u, <u, W^T x> = <W u, x> modulo a prime.

Source: Freivalds, "Probabilistic machines can use less running time", 1977. It needs the matrix once, and then two
vectors only. A wrong product passes with a probability of 1 / p, below 2**-60.
"""

import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

PRIME = 2**61 - 1

# Numbers modulo p in limbs of 21 bits, numbers of 32 bits in limbs of 16: the sums of 2**16 products are exact in
# float64.
_BITS, _LIMBS = 21, 3
_LOW = 16
_MOST_TERMS = 2**16

Integers = npt.NDArray[np.signedinteger[Any]]


class Verifier:
    """Checks products with one matrix (d, m) of integers.

    blocks: the matrix's rows, in order, in blocks (rows, m) of integers of at most 32 bits: it is never needed whole.
    The secret u is drawn anew. Raises ValueError if there are more than 2**16 inputs or outputs.
    """

    def __init__(self, blocks: Iterable[Integers], outputs: int) -> None:
        if outputs > _MOST_TERMS:
            raise ValueError(f"a product is checked up to {_MOST_TERMS} outputs, not {outputs}")
        drawn = [secrets.randbelow(PRIME) for _ in range(outputs)]
        self._right = _limbs(np.array(drawn, np.uint64))
        self._left = _limbs(np.concatenate([_dot(block, self._right) for block in blocks]))
        if len(self._left) > _MOST_TERMS:
            raise ValueError(f"a product is checked up to {_MOST_TERMS} inputs, not {len(self._left)}")

    def check(self, inputs: Integers, outputs: Integers) -> bool:
        """Whether outputs (T, m) are the integer products of inputs (T, d) with the matrix, all of at most 32 bits."""
        return bool(np.array_equal(_dot(inputs, self._left), _dot(outputs, self._right)))


def _limbs(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers (k,) modulo p as limbs (k, 3), the lowest first."""
    shifts = np.arange(0, _BITS * _LIMBS, _BITS, dtype=np.uint64)
    return ((numbers[:, None] >> shifts) & np.uint64((1 << _BITS) - 1)).astype(np.float64)


def _dot(rows: Integers, limbs: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Integers (n, k) of 32 bits times numbers modulo p, given as limbs (k, 3): (n,), modulo p."""
    if rows.dtype.kind != "i" or rows.dtype.itemsize > 4:
        raise ValueError(f"products are checked of integers of at most 32 bits, not of {rows.dtype}")
    total = np.zeros(len(rows), np.int64)
    for shift, part in ((0, rows & ((1 << _LOW) - 1)), (_LOW, rows >> _LOW)):
        sums = (part.astype(np.float64) @ limbs).astype(np.int64)
        for number in range(_LIMBS):
            total = (total + _times_power(sums[:, number] % PRIME, _BITS * number + shift)) % PRIME
    return total.astype(np.uint64)


def _times_power(numbers: npt.NDArray[np.int64], power: int) -> npt.NDArray[np.int64]:
    """Numbers times 2**power modulo p. As 2**61 is 1, it turns their 61 bits around."""
    if power == 0:
        return numbers
    stays = 61 - power
    return ((numbers & ((1 << stays) - 1)) << power) | (numbers >> stays)
