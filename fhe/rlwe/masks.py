"""Masks that nobody can tell from random: one seed of 32 bytes for each column, expanded by ChaCha20 (RFC 8439).

A seed gives one mask for every matrix: its number is the nonce, so no two masks share a part of the key stream. A mask
must never hide two different numbers; who hands out seeds sees to that.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendUnavailable

SEED_BYTES = 32

Mask = npt.NDArray[np.uint32]


def new_seed() -> bytes:
    """A seed from the operating system's randomness."""
    return secrets.token_bytes(SEED_BYTES)


def mask(seed: bytes, matrix_number: int, features: int) -> Mask:
    """The mask (d,) of one seed for one matrix: uniform numbers of 32 bits, always the same ones.

    Raises ValueError unless the seed has 32 bytes and the matrix's number fits 64 bits, BackendUnavailable if the
    package cryptography is missing.
    """
    return masks([seed], matrix_number, features)[:, 0]


def masks(seeds: Sequence[bytes], matrix_number: int, features: int) -> Mask:
    """The masks (d, N) of N seeds for one matrix, one in each column. Raises as `mask` does."""
    if not 0 <= matrix_number < 2**64:
        raise ValueError(f"a matrix's number is from 0 to 2**64 - 1, not {matrix_number}")
    for seed in seeds:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    cipher, chacha20 = _library()
    # The library's nonce of 16 bytes is a block counter of 4, which starts at 0, and RFC 8439's nonce of 12.
    nonce = bytes(4) + matrix_number.to_bytes(12, "little")
    zeros = bytes(4 * features)
    out = np.empty((len(seeds), 4 * features), np.uint8)
    for seed, row in zip(seeds, out, strict=True):
        cipher(chacha20(seed, nonce), None).encryptor().update_into(zeros, row)
    return np.ascontiguousarray(out.view("<u4").T)


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    except ImportError as error:
        raise BackendUnavailable("rlwe", "cryptography", error) from error
    return Cipher, ChaCha20
