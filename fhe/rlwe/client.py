"""The client's half: keys, encryption of masks, decryption of products. The only file that imports SEAL.

Source: Fan and Vercauteren, "Somewhat Practical Fully Homomorphic Encryption", ePrint 2012/144, as Microsoft SEAL
implements it (BFV). `tenseal.sealapi` binds SEAL without access to coefficients, so they travel through SEAL's own
serialization, and that through a file that exists in memory only.
"""

import functools
import hashlib
import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import BackendUnavailable, InsecureParameters, KeyMismatch
from .masks import Mask
from .parameters import Parameters
from .residues import Residues, pack_request, unpack_answer

# SEAL's classes, of which the binding gives no types.
SealModule: TypeAlias = Any
SealContext: TypeAlias = Any
SealObject: TypeAlias = Any

# What SEAL writes, little-endian. A header: magic, its own size, version (two), compression, reserved, size of all.
_HEADER = struct.Struct("<HBBBBHQ")
_MAGIC = 0xA15E
_NO_COMPRESSION, _ZSTD = 0, 2
# A ciphertext: parms id, is_ntt_form, polynomials, degree, primes, scale, correction factor; then an array.
_CIPHERTEXT = struct.Struct("<32s?QQQdQ")
# A plaintext: parms id, coefficients, scale; then an array.
_PLAINTEXT = struct.Struct("<32sQd")
# An array: a header, how many words, the words.
_COUNT = struct.Struct("<Q")

# Features that are encrypted before they are packed together: their residues, 1 MiB, stay in a cache.
_BLOCK = 32


class ClientBatch:
    """One secret key, for one matrix and N columns of masks. The key never leaves memory and is used once.

    `encrypt` (or `encrypt_blocks`), then `decrypt`, which erases the key. As a context manager it erases the key at the
    end whatever happened. Not for use by two threads at once.

    Randomness is SEAL's own, from the operating system. Raises BackendUnavailable if tenseal or zstandard is missing,
    if SEAL is of a version that writes its objects otherwise, or if the system has no files in memory (memfd, Linux).
    """

    def __init__(self, parameters: Parameters | None = None) -> None:
        self.parameters = parameters or Parameters()
        self._keys: _Keys | None = None
        self._reader = _Reader(self.parameters)
        self._file = _File(3 * 8 * self.parameters.poly_modulus_degree)
        try:
            self._context = context(self.parameters)
            self._keys = _Keys.generate(self._context)
            zero = _seal().Ciphertext()
            self._keys.encryptor.encrypt_zero_symmetric(zero)
            self._head = self._reader.head(self._file.save(zero))
        except BaseException:
            self.erase()
            raise
        self._encrypted = False

    def encrypt(self, masks: Mask) -> bytes:
        """Masks (d, N) as a request, d times `Parameters.feature_bytes`. See `encrypt_blocks`."""
        return b"".join(self.encrypt_blocks(masks))

    def encrypt_blocks(self, masks: Mask) -> Iterator[bytes]:
        """The request in pieces of some features each, made as they are asked for.

        Masks must be uniform, as those of `fhe.rlwe.masks` are: the bound on failures relies on it. Raises ValueError
        if they are no uint32 (d, N), KeyMismatch if this batch has encrypted before or is erased.
        """
        degree = self.parameters.poly_modulus_degree
        if masks.ndim != 2 or masks.shape[1] != degree or masks.dtype != np.uint32:
            raise ValueError(f"masks are uint32 (features, {degree}), not {masks.dtype} {masks.shape}")
        if self._encrypted:
            raise KeyMismatch("this batch has encrypted its masks already: make a new one")
        self._live()
        self._encrypted = True
        return self._encrypt(masks)

    def decrypt(self, answer: bytes | memoryview, outputs: int) -> npt.NDArray[np.uint32]:
        """The matrix's products with the masks modulo 2**32, (m, N), from an answer of m outputs. Erases the key.

        Raises CircuitFormatError, and keeps the key for the right answer, if these bytes are none: what is checked
        depends on no secret. Raises KeyMismatch if the key is erased.
        """
        self._live()
        residues = unpack_answer(answer, outputs, self.parameters)
        try:
            return self._decrypt(residues)
        finally:
            self.erase()

    def erase(self) -> None:
        """Drop the key, which SEAL overwrites, and overwrite the file; once more does nothing."""
        self._keys = None
        self._file.close()

    def __enter__(self) -> "ClientBatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.erase()

    def _live(self) -> "_Keys":
        if self._keys is None:
            raise KeyMismatch("this batch's key is erased: make a new batch")
        return self._keys

    def _encrypt(self, masks: Mask) -> Iterator[bytes]:
        # BFV adds the encoded message to an encryption of zero. SEAL makes the latter; the addition is ours, as
        # building SEAL's plaintexts takes longer.
        degree, modulus = self.parameters.poly_modulus_degree, np.uint64(self.parameters.coeff_modulus)
        zero = _seal().Ciphertext()
        for start in range(0, len(masks), _BLOCK):
            block = masks[start : start + _BLOCK]
            residues = np.empty((len(block), 2 * degree), np.uint64)
            for row in residues:
                self._live().encryptor.encrypt_zero_symmetric(zero)
                row[:] = self._reader.ciphertext(self._file.save(zero))
            sums = residues[:, :degree] + encode(block, self.parameters)
            # Below 2 q. Where q is too much, the difference wraps around and is the larger one.
            np.minimum(sums, sums - modulus, out=residues[:, :degree])
            yield pack_request(residues, self.parameters)

    def _decrypt(self, residues: Residues) -> npt.NDArray[np.uint32]:
        decryptor = self._live().decryptor
        ciphertext, plaintext = _seal().Ciphertext(), _seal().Plaintext()
        out = np.zeros((len(residues), self.parameters.poly_modulus_degree), np.uint32)
        for row, numbers in zip(residues, out, strict=True):
            self._file.load(ciphertext, self._context, self._head, row)
            decryptor.decrypt(ciphertext, plaintext)
            found = self._reader.plaintext(self._file.save(plaintext))
            numbers[: len(found)] = found
        return out


def encode(masks: Mask, parameters: Parameters) -> Residues:
    """round(q r / t) of every number r below t, exactly, ties up, as SEAL does; of the same shape."""
    whole, rest = divmod(parameters.coeff_modulus, 1 << parameters.plain_bits)
    wide = masks.astype(np.uint64)
    half = np.uint64(1 << (parameters.plain_bits - 1))
    # The sum stays below 2**64, as rest is 2**32 - 4095.
    return wide * np.uint64(whole) + ((wide * np.uint64(rest) + half) >> np.uint64(parameters.plain_bits))


# --- SEAL ---------------------------------------------------------------------------------------


def _seal() -> SealModule:
    try:
        import tenseal.sealapi as seal  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise BackendUnavailable("rlwe", "tenseal", error) from error
    return seal


@functools.lru_cache(maxsize=2)
def context(parameters: Parameters, seed: int | None = None) -> SealContext:
    """SEAL's context, which holds no secret. For tests only: a seed makes all keys and all encryptions the same."""
    seal = _seal()
    settings = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    settings.set_poly_modulus_degree(parameters.poly_modulus_degree)
    settings.set_coeff_modulus([seal.Modulus(parameters.coeff_modulus)])
    settings.set_plain_modulus(seal.Modulus(1 << parameters.plain_bits))
    if seed is not None:
        words = np.frombuffer(hashlib.sha512(str(seed).encode()).digest(), np.uint64)
        settings.set_random_generator(seal.Blake2xbPRNGFactory([int(word) for word in words]))
    made = seal.SEALContext(settings, True, seal.SEC_LEVEL_TYPE.TC128)
    if not made.parameters_set():  # SEAL checks security once more
        raise InsecureParameters(f"SEAL refuses these parameters: {made.parameters_error_message()}")
    return made


class _Keys(NamedTuple):
    """SEAL's objects that hold the secret key; each overwrites its copy when it is dropped."""

    encryptor: SealObject
    decryptor: SealObject

    @classmethod
    def generate(cls, context: SealContext) -> "_Keys":
        seal = _seal()
        secret = seal.KeyGenerator(context).secret_key()
        return cls(seal.Encryptor(context, secret), seal.Decryptor(context, secret))


class _File:
    """A file in memory, for SEAL, which reads and writes paths only.

    capacity: no object that is saved is larger, in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._descriptor = -1
        if not hasattr(os, "memfd_create"):
            raise BackendUnavailable("rlwe", "Linux", "SEAL's objects pass through a file in memory (memfd_create)")
        self._descriptor = os.memfd_create("rlwe", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._descriptor}"
        self._buffer = bytearray(capacity)

    def save(self, item: SealObject) -> memoryview:
        """An object's bytes, valid until the next call."""
        item.save(self._path)  # which empties the file first
        return memoryview(self._buffer)[: os.preadv(self._descriptor, [self._buffer], 0)]

    def load(self, item: SealObject, context: SealContext, head: bytes, words: Residues) -> None:
        """Fill an object of SEAL's from its first bytes and its array."""
        # Bytes that an earlier object left behind these do no harm: the header says where to stop.
        os.pwritev(self._descriptor, [head, words], 0)  # pyright: ignore[reportArgumentType]
        item.load(context, self._path)

    def close(self) -> None:
        """Overwrite and free it; once more does nothing."""
        if self._descriptor >= 0:
            os.pwrite(self._descriptor, bytes(os.fstat(self._descriptor).st_size), 0)
            os.close(self._descriptor)
            self._descriptor = -1
            self._buffer[:] = bytes(len(self._buffer))


class _Reader:
    """Takes SEAL's serialized objects apart. BackendUnavailable where a version of SEAL writes something else.

    What it reads was written by SEAL in this process: nothing of it comes from outside.
    """

    def __init__(self, parameters: Parameters) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise BackendUnavailable("rlwe", "zstandard", error) from error
        self._decompressor = zstandard.ZstdDecompressor()
        self._degree = parameters.poly_modulus_degree
        self._most_bytes = _CIPHERTEXT.size + _HEADER.size + _COUNT.size + 16 * self._degree

    def ciphertext(self, data: memoryview) -> Residues:
        """The residues (2 N,) of a ciphertext, c0 before c1."""
        content = self._content(data)
        _, ntt_form, polynomials, degree, primes, _, _ = _CIPHERTEXT.unpack_from(content)
        if (ntt_form, polynomials, degree, primes) != (False, 2, self._degree, 1):
            raise _other_format()
        return self._array(content, _CIPHERTEXT.size, 2 * self._degree)

    def head(self, data: memoryview) -> bytes:
        """What comes before the residues of any such ciphertext if nothing is compressed."""
        content = self._content(data)
        self.ciphertext(data)
        magic, size, major, minor, _, reserved, _ = _HEADER.unpack_from(data)
        header = _HEADER.pack(magic, size, major, minor, _NO_COMPRESSION, reserved, _HEADER.size + len(content))
        return header + content[: -16 * self._degree]

    def plaintext(self, data: memoryview) -> Residues:
        """The coefficients of a plaintext; SEAL may leave out zeros at the end."""
        content = self._content(data)
        _, count, _ = _PLAINTEXT.unpack_from(content)
        if count > self._degree:
            raise _other_format()
        return self._array(content, _PLAINTEXT.size, count)

    def _content(self, data: memoryview) -> bytes:
        """What follows the header, decompressed."""
        magic, size, _, _, compression, _, total = _HEADER.unpack_from(data)
        if (magic, size, total) != (_MAGIC, _HEADER.size, len(data)) or compression not in (_NO_COMPRESSION, _ZSTD):
            raise _other_format()
        body = data[_HEADER.size :]
        if compression == _NO_COMPRESSION:
            return bytes(body)
        return self._decompressor.decompress(body, max_output_size=self._most_bytes)

    def _array(self, content: bytes, start: int, count: int) -> Residues:
        magic, size, _, _, compression, _, total = _HEADER.unpack_from(content, start)
        (words,) = _COUNT.unpack_from(content, start + _HEADER.size)
        start += _HEADER.size + _COUNT.size
        if (magic, size, compression) != (_MAGIC, _HEADER.size, _NO_COMPRESSION):
            raise _other_format()
        if words != count or total != _HEADER.size + _COUNT.size + 8 * count or len(content) != start + 8 * count:
            raise _other_format()
        return np.frombuffer(content, "<u8", count, start)


def _other_format() -> BackendUnavailable:
    return BackendUnavailable("rlwe", "tenseal 0.3.18", "this version writes SEAL's objects in another format")
