"""Requests and answers as bytes: residues modulo q, little-endian, cut to whole bytes.

A request has, for each of d features, c0 and then c1: 2 N residues of 7 bytes. An answer has, for each of m outputs,
c0 in N words of 5 bytes and c1 in N words of 6: residues rounded to a multiple of 2**12 and 2**4, without the zeros.
"""

import numpy as np
import numpy.typing as npt

from ..errors import CircuitFormatError
from .parameters import Parameters

Residues = npt.NDArray[np.uint64]


def pack_request(residues: Residues, parameters: Parameters) -> bytes:
    """Residues (d, 2 N), below q, as d times `Parameters.feature_bytes`."""
    return _low_bytes(np.ascontiguousarray(residues, "<u8"), parameters.request_residue_bytes).tobytes()


def unpack_request(data: bytes | memoryview, features: int, parameters: Parameters) -> Residues:
    """Residues (d, 2 N), from bytes of anyone. Raises CircuitFormatError if they are no request for d features."""
    _check_size("request", len(data), features * parameters.feature_bytes, f"{features} inputs")
    size = parameters.request_residue_bytes
    out = np.zeros((features, 2 * parameters.poly_modulus_degree), "<u8")
    _low_bytes(out, size)[...] = _rows(data, features).view(f"V{size}")
    _check_residues("request", out, parameters.coeff_modulus)
    return out


def pack_answer(residues: Residues, parameters: Parameters) -> bytes:
    """Residues (m, 2 N), below q, as m times `Parameters.output_bytes`; low bits are rounded away."""
    out = np.empty((len(residues), parameters.output_bytes), np.uint8)
    start = 0
    halves = np.split(residues, 2, axis=1)
    for half, size, bits in zip(halves, parameters.answer_residue_bytes, parameters.dropped_bits, strict=True):
        rounded = (half + np.uint64(1 << bits >> 1)) >> np.uint64(bits)
        stop = start + size * parameters.poly_modulus_degree
        out[:, start:stop].view(f"V{size}")[...] = _low_bytes(rounded.astype("<u8", copy=False), size)
        start = stop
    return out.tobytes()


def unpack_answer(data: bytes | memoryview, outputs: int, parameters: Parameters) -> Residues:
    """Residues (m, 2 N), from bytes of anyone. Raises CircuitFormatError if they are no answer of m outputs."""
    _check_size("answer", len(data), outputs * parameters.output_bytes, f"{outputs} outputs")
    rows = _rows(data, outputs)
    out = np.empty((outputs, 2 * parameters.poly_modulus_degree), "<u8")
    start = 0
    halves = np.split(out, 2, axis=1)
    for half, size, bits in zip(halves, parameters.answer_residue_bytes, parameters.dropped_bits, strict=True):
        rounded = np.zeros(half.shape, "<u8")
        stop = start + size * parameters.poly_modulus_degree
        _low_bytes(rounded, size)[...] = rows[:, start:stop].view(f"V{size}")
        np.left_shift(rounded, np.uint64(bits), out=half)
        start = stop
    _check_residues("answer", out, parameters.coeff_modulus)
    return out


def _low_bytes(words: Residues, size: int) -> npt.NDArray[np.void]:
    """The low bytes of little-endian words, as a view. Copying it moves `size` bytes a word, which is fast."""
    return words.view(np.dtype({"names": ["low"], "formats": [f"V{size}"], "itemsize": 8}))["low"]


def _rows(data: bytes | memoryview, rows: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(rows, len(data) // rows)


def _check_size(what: str, size: int, wanted: int, of: str) -> None:
    if wanted <= 0 or size != wanted:
        raise CircuitFormatError(f"the {what} has {size:,} bytes; {of} take {wanted:,}")


def _check_residues(what: str, residues: Residues, modulus: int) -> None:
    if residues.max() >= modulus:
        raise CircuitFormatError(f"the {what} has a residue that is not below the modulus")
