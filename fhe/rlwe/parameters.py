"""The one set of parameters, and what a matrix must satisfy for results to be exact under it.

Sources: Fan and Vercauteren, "Somewhat Practical Fully Homomorphic Encryption", ePrint 2012/144 (BFV); Hoeffding,
"Probability inequalities for sums of bounded random variables", 1963. `security.md`, beside this file, has the
estimate of security.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CompilationError, InsecureParameters

# (poly_modulus_degree, coeff_modulus) -> bits of security that security.md, beside this file, has the reasons for.
SECURITY_BITS = {(2048, 2**52 - 4095): 128}

# A batch may fail with this probability at most, as a power of two.
MOST_FAILURE_LOG2 = -64.0

# SEAL's noise is the sum of 21 differences of two coins. Such a difference has E exp(z x) = cosh(z / 2)**2, which is
# at most exp(z**2 / 4): the sum is sub-Gaussian with a variance proxy of 10.5, its variance.
NOISE_TERMS = 21
NOISE_VARIANCE = NOISE_TERMS / 2


@dataclass(frozen=True)
class Parameters:
    """A ring, its modulus and the modulus of the numbers in it; sizes on the wire follow from them.

    poly_modulus_degree: N, how many numbers one ciphertext holds. coeff_modulus: q, a prime, 1 modulo 2 N.
    plain_bits: numbers are integers modulo t = 2**plain_bits.

    Raises InsecureParameters where security.md has no estimate, CompilationError for other plain_bits than 32, which
    arithmetic in 64 bits relies on.
    """

    poly_modulus_degree: int = 2048
    coeff_modulus: int = 2**52 - 4095
    plain_bits: int = 32

    def __post_init__(self) -> None:
        if (self.poly_modulus_degree, self.coeff_modulus) not in SECURITY_BITS:
            raise InsecureParameters(
                f"no estimate of security for poly_modulus_degree {self.poly_modulus_degree} and coeff_modulus "
                f"{self.coeff_modulus}; known are {', '.join(map(str, SECURITY_BITS))}"
            )
        if self.plain_bits != 32:
            raise CompilationError(f"numbers are of 32 bits, not of {self.plain_bits}")

    @property
    def security_bits(self) -> int:
        return SECURITY_BITS[self.poly_modulus_degree, self.coeff_modulus]

    @property
    def modulus_bits(self) -> int:
        return self.coeff_modulus.bit_length()

    @property
    def modulus_gap(self) -> int:
        """c of q = 2**modulus_bits - c."""
        return (1 << self.modulus_bits) - self.coeff_modulus

    @property
    def request_residue_bytes(self) -> int:
        return -(-self.modulus_bits // 8)

    @property
    def answer_residue_bytes(self) -> tuple[int, int]:
        """Of c0 and of c1. An error of c1 is multiplied by the secret, so c1 keeps more."""
        return 5, 6

    @property
    def dropped_bits(self) -> tuple[int, int]:
        """How many low bits of c0 and of c1 are rounded away before an answer is sent.

        q is 1 modulo 2**dropped: so the multiples of it up to q - 1 end in q - 1 itself, and rounding never wraps.
        """
        first, second = self.answer_residue_bytes
        return self.modulus_bits - 8 * first, self.modulus_bits - 8 * second

    @property
    def feature_bytes(self) -> int:
        """Of a request, for each of the d inputs of a matrix."""
        return 2 * self.poly_modulus_degree * self.request_residue_bytes

    @property
    def output_bytes(self) -> int:
        """Of an answer, for each of the m outputs of a matrix."""
        return self.poly_modulus_degree * sum(self.answer_residue_bytes)

    @property
    def most_noise(self) -> float:
        """Noise that decryption surely rounds away; half a unit is left for SEAL's own arithmetic."""
        return self.coeff_modulus / 2 ** (self.plain_bits + 1) - 0.5


@dataclass(frozen=True)
class MatrixReport:
    """What was found about a matrix of integers (d, m).

    failure_log2: no batch of N tokens has a wrong result with a probability above 2**failure_log2.
    largest_sum: no true result is larger in magnitude.
    """

    inputs: int
    outputs: int
    failure_log2: float
    largest_sum: int


def column_norms(weights: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of every column of integers (d, m): its sum of magnitudes and its sum of squares, (m,) each, exact."""
    magnitudes = np.abs(weights.astype(np.int64))
    return magnitudes.sum(axis=0), np.square(magnitudes).sum(axis=0)


def failure_log2(
    l1: npt.NDArray[np.integer[Any]], l2_squared: npt.NDArray[np.integer[Any]], parameters: Parameters | None = None
) -> float:
    """log2 of an upper bound on the probability that a batch of N columns has one wrong number.

    l1, l2_squared: of every column of the matrix, as `column_norms` returns them.

    A result decrypts rightly if its noise stays below q / 2t. For a column w, the noise of one number is

        sum_i w_i e_i + sum_i w_i f_i + g + (h * s)

    e: SEAL's noise, sub-Gaussian. f: what round(q r / t) is off, within 1/2; r is uniform and q is odd, so q r mod t is
    uniform, f too, with mean 2**-33: Hoeffding gives a variance proxy of 1/4. g: what rounding takes from c0, at most
    half a step. h: what it takes from c1, at most half a step each; c1, and so h, does not depend on the ternary secret
    s, and Hoeffding gives N half steps squared. e, r and s are independent, so proxies add up, P(|X| > x) is at most
    2 exp(-x**2 / (2 proxy)), and the rest is a union over N numbers of m columns.
    """
    parameters = parameters or Parameters()
    degree = parameters.poly_modulus_degree
    half_steps = [2.0 ** (bits - 1) for bits in parameters.dropped_bits]
    proxy = (NOISE_VARIANCE + 0.25) * l2_squared.astype(np.float64) + degree * half_steps[1] ** 2
    certain = l1.astype(np.float64) * 2.0 ** -(parameters.plain_bits + 1) + half_steps[0]
    room = np.maximum(parameters.most_noise - certain, 0.0)
    exponents = 1 - room**2 / (2 * proxy) * math.log2(math.e)
    return min(0.0, math.log2(degree) + float(np.logaddexp2.reduce(exponents)))


def check_matrix(
    weights: npt.NDArray[np.integer[Any]], largest_input: int, parameters: Parameters | None = None
) -> MatrixReport:
    """Whether a matrix of integers (d, m), times integers of at most this magnitude, gives exact results.

    Raises CompilationError, with the numbers, if a batch could fail with a probability above 2**-64, or if a true
    result might not fit 32 bits.
    """
    parameters = parameters or Parameters()
    inputs, outputs = weights.shape
    l1, l2_squared = column_norms(weights)
    failure = failure_log2(l1, l2_squared, parameters)
    if failure > MOST_FAILURE_LOG2:
        worst = int(l2_squared.argmax())
        raise CompilationError(
            f"a batch through this matrix ({inputs}, {outputs}) could be wrong with probability 2**{failure:.1f}, more "
            f"than 2**{MOST_FAILURE_LOG2:.0f}: column {worst} has norm {math.sqrt(l2_squared[worst]):.0f}; use weights "
            f"of fewer bits"
        )
    largest = int(l1.max()) * largest_input
    limit = 2 ** (parameters.plain_bits - 1)
    if largest >= limit:
        raise CompilationError(
            f"results of this matrix ({inputs}, {outputs}) may reach {largest:,} and must stay below {limit:,}: the "
            f"magnitudes in column {int(l1.argmax())} sum to {int(l1.max()):,} and inputs reach {largest_input:,}; "
            f"use fewer bits"
        )
    return MatrixReport(inputs, outputs, failure, largest)
