"""Rings and moduli for CKKS."""

from dataclasses import dataclass

from fhe.errors import InsecureParameters

SECURITY = 128
MAX_LOG_Q = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}


@dataclass(frozen=True)
class Parameters:
    """A ring and a chain of moduli, checked for 128-bit security when made.

    Raises InsecureParameters where all moduli together have more bits than `max_log_q`.

    poly_modulus_degree: degree N of the polynomials, a power of two; a ciphertext has N / 2 slots.
    levels: how many products can follow each other; each uses up one prime of scale_bits.
    """

    poly_modulus_degree: int
    levels: int
    scale_bits: int
    headroom_bits: int

    def __post_init__(self):
        if self.total_bits > max_log_q(self.poly_modulus_degree):
            raise InsecureParameters(
                f"{self.levels} levels of {self.scale_bits} bits with {self.headroom_bits} bits of headroom need "
                f"{self.total_bits} bits of moduli; degree {self.poly_modulus_degree} allows "
                f"{max_log_q(self.poly_modulus_degree)} at {SECURITY}-bit security: use a larger degree, fewer levels or a smaller scale"
            )

    @classmethod
    def choose(
        cls, poly_modulus_degree: int, levels: int, headroom_bits: int, scale_bits: int | None = None
    ) -> "Parameters":
        """These bits of scale, or as many as are secure.

        Raises InsecureParameters if that leaves fewer than 25 bits, where SEAL's noise reaches the third decimal.
        """
        scale = scale_bits
        if scale is None:
            scale = min(40, (max_log_q(poly_modulus_degree) - 2 * headroom_bits) // (levels + 2))
            if scale < 25:
                raise InsecureParameters(
                    f"{levels} levels at degree {poly_modulus_degree} leave {max(scale, 0)} bits a level at "
                    f"{SECURITY}-bit security, too few to compute with: use a larger degree or fewer levels"
                )
        return cls(poly_modulus_degree, levels, scale, headroom_bits)

    @property
    def slots(self) -> int:
        return self.poly_modulus_degree // 2

    @property
    def moduli_bits(self) -> tuple[int, ...]:
        """The last modulus first, one for each level, and the one for switching keys, which must be the largest."""
        last = self.scale_bits + self.headroom_bits
        return (last, *(self.scale_bits,) * self.levels, last)

    @property
    def total_bits(self) -> int:
        return sum(self.moduli_bits)


def max_log_q(poly_modulus_degree: int) -> int:
    """The most bits that all moduli may have together for 128-bit security; 0 for an unknown degree.

    Source: table 1 of the Homomorphic Encryption Standard (2018), ternary secrets, classical attackers. SEAL has the
    same table and checks it once more.
    """
    return MAX_LOG_Q.get(poly_modulus_degree, 0)
