"""Polynomial degrees and moduli for CKKS."""

from dataclasses import dataclass

from fhe.errors import InsecureParameters

SECURITY = 128
MAX_LOG_Q = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}


@dataclass(frozen=True)
class Parameters:
    """A polynomial degree and a chain of moduli. Raises InsecureParameters below 128-bit security.

    poly_modulus_degree: N, a power of two; a ciphertext has N / 2 slots.
    levels: number of products that can follow each other; each uses up one prime of scale_bits.
    scale_bits: binary digits of a number after the point.
    headroom_bits: bits of the last modulus beyond the scale.
    """

    poly_modulus_degree: int
    levels: int
    scale_bits: int
    headroom_bits: int

    def __post_init__(self) -> None:
        allowed = max_log_q(self.poly_modulus_degree)
        if self.total_bits > allowed:
            raise InsecureParameters(
                f"{self.levels} levels of {self.scale_bits} bits with {self.headroom_bits} bits of headroom need "
                f"{self.total_bits} bits of moduli; degree {self.poly_modulus_degree} allows {allowed} at "
                f"{SECURITY}-bit security: use a larger degree, fewer levels or a smaller scale"
            )

    @classmethod
    def choose(
        cls, poly_modulus_degree: int, levels: int, headroom_bits: int, scale_bits: int | None = None
    ) -> "Parameters":
        """Parameters with this scale; without one, with the largest that is secure, at most 40 bits.

        Raises InsecureParameters if no scale of at least 25 bits is secure. Below, noise reaches the third decimal.
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
        """The last modulus, one for each level, and the one for switching keys, which must be the largest."""
        last = self.scale_bits + self.headroom_bits
        return (last, *(self.scale_bits,) * self.levels, last)

    @property
    def total_bits(self) -> int:
        return sum(self.moduli_bits)


def max_log_q(poly_modulus_degree: int) -> int:
    """The largest total bits of all moduli for 128-bit security; 0 for an unknown degree.

    Source: table 1 of the Homomorphic Encryption Standard (2018), ternary secrets, classical attackers. SEAL has the
    same table and checks it again.
    """
    return MAX_LOG_Q.get(poly_modulus_degree, 0)
