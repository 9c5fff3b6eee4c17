"""CKKS by SEAL, through `tenseal.sealapi`, the thin binding in tenseal. No other file of CKKS imports it."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tenseal.sealapi as _sealapi  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from fhe.ckks.parameters import Parameters
from fhe.ckks.slots import SlotOps
from fhe.errors import CircuitFormatError, CompilationError, InsecureParameters

# The binding has no types; these names say which of SEAL's classes is meant.
seal: Any = _sealapi
Ciphertext: TypeAlias = Any
Plaintext: TypeAlias = Any
SecretKey: TypeAlias = Any
RelinKeys: TypeAlias = Any
GaloisKeys: TypeAlias = Any
SEALContext: TypeAlias = Any


@contextmanager
def _file() -> Generator[Path, None, None]:
    """A private file for SEAL, which saves to paths only: in memory where the system supports it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ckks", os.MFD_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as directory:  # of mode 0700
            yield Path(directory) / "data"


def _to_bytes(item: Any) -> bytes:
    with _file() as path:
        item.save(str(path))
        return path.read_bytes()


def _from_bytes(item: Any, context: SEALContext, data: bytes, kind: str) -> Any:
    with _file() as path:
        path.write_bytes(data)
        try:
            item.load(context, str(path))
        except (RuntimeError, ValueError) as error:
            raise CircuitFormatError(f"SEAL cannot read these {kind}: {error}") from error
    return item


def _new(operation: Callable[..., None], *operands: Any) -> Ciphertext:
    """The result of one of SEAL's operations, which write to their last argument."""
    result = seal.Ciphertext()
    operation(*operands, result)
    return result


class EvaluationKeys(NamedTuple):
    """What the server computes with."""

    relinearization: RelinKeys
    rotations: GaloisKeys


def _context(parameters: Parameters, seed: int | None = None) -> SEALContext:
    """SEAL's context. A seed fixes all randomness of what is made with it."""
    chosen = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    degree = parameters.poly_modulus_degree
    chosen.set_poly_modulus_degree(degree)
    try:
        chosen.set_coeff_modulus(seal.CoeffModulus.Create(degree, list(parameters.moduli_bits)))
    except (RuntimeError, ValueError) as error:
        raise CompilationError(f"no such moduli at degree {degree}: {error}") from error
    if seed is not None:
        words = np.frombuffer(hashlib.sha512(str(seed).encode()).digest(), np.uint64)
        chosen.set_random_generator(seal.Blake2xbPRNGFactory([int(word) for word in words]))
    context = seal.SEALContext(chosen, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():  # SEAL checks security again
        raise InsecureParameters(f"SEAL refuses these parameters: {context.parameters_error_message()}")
    return context


class CKKSContext:
    """What all runs with the same parameters share: SEAL's objects, and encoded clear vectors.

    Encoding a vector takes four times as long as multiplying by it, and every run of a function needs the same vectors.
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.context = _context(parameters)
        self.encoder = seal.CKKSEncoder(self.context)
        self.evaluator = seal.Evaluator(self.context)
        self.scale = 2.0**parameters.scale_bits
        self.ids: dict[int, Any] = {}
        self.primes: dict[int, float] = {}
        data = self.context.first_context_data()
        for size in range(parameters.levels + 1, 0, -1):
            self.ids[size] = data.parms_id()
            self.primes[size] = float(data.parms().coeff_modulus()[-1].value())
            data = data.next_context_data()
        self.scales = {parameters.levels + 1: self.scale}
        for size in range(parameters.levels + 1, 1, -1):
            self.scales[size - 1] = self.scales[size] ** 2 / self.primes[size]
        self._encoded: dict[tuple[bytes, int, bool], Plaintext] = {}

    # The client's part.

    def make_keys(self, rotations: Sequence[int], conjugates: bool, seed: int | None) -> tuple[SecretKey, list[bytes]]:
        """A new secret key, and the serialized evaluation keys for these rotations."""
        generator = seal.KeyGenerator(self.context if seed is None else _context(self.parameters, seed))
        degree = 2 * self.parameters.poly_modulus_degree
        elements = [pow(3, steps, degree) for steps in rotations] + ([degree - 1] if conjugates else [])
        # Saved this way, half of every key is replaced by the seed that it was drawn from.
        parts = [generator.create_relin_keys(), generator.create_galois_keys(elements)]
        return generator.secret_key(), [_to_bytes(part) for part in parts]

    def save_secret_key(self, secret: SecretKey) -> bytes:
        return _to_bytes(secret)

    def load_secret_key(self, data: bytes) -> SecretKey:
        return _from_bytes(seal.SecretKey(), self.context, data, "keys")

    def encrypt(self, secret: SecretKey, values: NDArray[Any]) -> bytes:
        """Slots (S,) -> a serialized ciphertext, half of which is a seed. The encoded vector is not kept."""
        plain = self.encode_once(values, self.parameters.levels + 1, self.scale)
        return _to_bytes(seal.Encryptor(self.context, secret).encrypt_symmetric(plain))

    def decrypt(self, secret: SecretKey, data: bytes) -> NDArray[Any]:
        """The slots (S,) of a ciphertext, complex128. Raises CircuitFormatError: it is none of these parameters."""
        plain, ciphertext = seal.Plaintext(), self.load(data)
        try:
            seal.Decryptor(self.context, secret).decrypt(ciphertext, plain)
            return np.asarray(self.encoder.decode_complex(plain), np.complex128)
        except (RuntimeError, ValueError) as error:
            raise CircuitFormatError(f"SEAL cannot decrypt this: {error}") from error

    # The server's part.

    def load_evaluation_keys(self, parts: Sequence[bytes]) -> EvaluationKeys:
        relinearization, rotations = parts
        return EvaluationKeys(
            _from_bytes(seal.RelinKeys(), self.context, relinearization, "evaluation keys"),
            _from_bytes(seal.GaloisKeys(), self.context, rotations, "evaluation keys"),
        )

    def load(self, data: bytes) -> Ciphertext:
        return _from_bytes(seal.Ciphertext(), self.context, data, "ciphertexts")

    def save(self, x: Ciphertext) -> bytes:
        return _to_bytes(x)

    def switched(self, x: Ciphertext, size: int) -> Ciphertext:
        """x with fewer primes and the same scale."""
        return _new(self.evaluator.mod_switch_to, x, self.ids[size])

    def rescaled(self, x: Ciphertext) -> Ciphertext:
        """x, a product, divided by its last prime; changes x."""
        self.evaluator.rescale_to_next_inplace(x)
        x.scale = self.scales[x.coeff_modulus_size()]  # SEAL's own may differ by a rounding of float64
        return x

    def addend(self, vector: NDArray[Any], size: int) -> Plaintext:
        """A clear vector, encoded for addition to ciphertexts of `size` primes; cached."""
        return self._encode(vector, size, False)

    def factor(self, vector: NDArray[Any], size: int) -> Plaintext:
        """A clear vector, encoded for products with ciphertexts of `size` primes; cached.

        Its scale is such that the rescaled product has the scale of its depth.
        """
        return self._encode(vector, size, True)

    def correction(self, before: int, size: int) -> Plaintext:
        """A one, encoded for the product that corrects the scale after a switch from `before` primes to `size`."""
        return self.factor(np.full(1, self.scales[size] / self.scales[before], np.complex128), size)

    def _encode(self, vector: NDArray[Any], size: int, product: bool) -> Plaintext:
        key = vector.tobytes(), size, product
        if key not in self._encoded:
            scale = self.scales[size]
            scale = self.scales[size - 1] * self.primes[size] / scale if product else scale
            self._encoded[key] = self.encode_once(vector, size, scale)
        return self._encoded[key]

    def encode_once(self, vector: NDArray[Any], size: int, scale: float) -> Plaintext:
        """A clear vector, encoded for ciphertexts of `size` primes; not cached."""
        plain = seal.Plaintext()
        if len(vector) == 1:
            self.encoder.encode(complex(vector[0]), self.ids[size], scale, plain)
        else:
            values = np.repeat(vector, self.parameters.slots // len(vector)).tolist()
            self.encoder.encode(values, self.ids[size], scale, plain)
        return plain


class CKKSOps(SlotOps[Ciphertext]):
    """`SlotOps` on ciphertexts.

    SEAL refuses to add ciphertexts of different scales, and the scale of a product, s * s / prime, is not exactly s, as
    no prime is a power of two. So each depth has one scale, that of products of the depth before
    (`CKKSContext.scales`), and clear vectors are encoded with the scale that gives their products the same.
    """

    def __init__(self, context: CKKSContext, keys: EvaluationKeys):
        super().__init__(context.parameters.slots)
        self.context, self.keys = context, keys

    def depth(self, x: Ciphertext) -> int:
        return self.context.parameters.levels + 1 - x.coeff_modulus_size()

    def _level_drop(self, x: Ciphertext, depth: int) -> Ciphertext:
        size = self.context.parameters.levels + 2 - depth
        result = self.context.switched(x, size)
        result.scale = self.context.scales[size]
        self.context.evaluator.multiply_plain_inplace(result, self.context.correction(x.coeff_modulus_size(), size))
        return self.context.rescaled(result)

    def _rotate(self, x: Ciphertext, steps: int) -> Ciphertext:
        return _new(self.context.evaluator.rotate_vector, x, steps, self.keys.rotations)

    def _conjugate(self, x: Ciphertext) -> Ciphertext:
        return _new(self.context.evaluator.complex_conjugate, x, self.keys.rotations)

    def _add(self, x: Ciphertext, y: Ciphertext) -> Ciphertext:
        return _new(self.context.evaluator.add, x, y)

    def _subtract(self, x: Ciphertext, y: Ciphertext) -> Ciphertext:
        return _new(self.context.evaluator.sub, x, y)

    def _add_plain(self, x: Ciphertext, vector: NDArray[Any]) -> Ciphertext:
        return _new(self.context.evaluator.add_plain, x, self.context.addend(vector, x.coeff_modulus_size()))

    def _sum_of_plaintext_products(self, xs: Sequence[Ciphertext], vectors: Sequence[NDArray[Any]]) -> Ciphertext:
        size = xs[0].coeff_modulus_size()
        evaluator = self.context.evaluator
        total, term = seal.Ciphertext(), seal.Ciphertext()
        for number, (x, vector) in enumerate(zip(xs, vectors, strict=True)):
            evaluator.multiply_plain(x, self.context.factor(vector, size), term if number else total)
            if number:
                evaluator.add_inplace(total, term)
        return self.context.rescaled(total)

    def _sum_of_products(self, xs: Sequence[Ciphertext], ys: Sequence[Ciphertext]) -> Ciphertext:
        evaluator = self.context.evaluator
        total, term = seal.Ciphertext(), seal.Ciphertext()
        for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
            target = term if number else total
            if x is y:
                evaluator.square(x, target)
            else:
                evaluator.multiply(x, y, target)
            if number:
                evaluator.add_inplace(total, term)
        evaluator.relinearize_inplace(total, self.keys.relinearization)
        return self.context.rescaled(total)


class PreEncoding(SlotOps[int]):
    """A run on depths only. It encodes the clear vectors of a function before its first run on ciphertexts."""

    def __init__(self, context: CKKSContext):
        super().__init__(context.parameters.slots)
        self.context = context

    def _size(self, depth: int) -> int:
        return self.context.parameters.levels + 1 - depth

    def depth(self, x: int) -> int:
        return x

    def _level_drop(self, x: int, depth: int) -> int:
        self.context.correction(self._size(x), self._size(depth) + 1)
        return depth

    def _rotate(self, x: int, steps: int) -> int:
        return x

    def _conjugate(self, x: int) -> int:
        return x

    def _add(self, x: int, y: int) -> int:
        return x

    def _subtract(self, x: int, y: int) -> int:
        return x

    def _add_plain(self, x: int, vector: NDArray[Any]) -> int:
        self.context.addend(vector, self._size(x))
        return x

    def _sum_of_plaintext_products(self, xs: Sequence[int], vectors: Sequence[NDArray[Any]]) -> int:
        for vector in vectors:
            self.context.factor(vector, self._size(xs[0]))
        return xs[0] + 1

    def _sum_of_products(self, xs: Sequence[int], ys: Sequence[int]) -> int:
        return xs[0] + 1
