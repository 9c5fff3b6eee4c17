"""How many bits of security the parameters of `fhe.rlwe` have: the primal attack by unique shortest vectors.

    python scripts/estimate_security.py

Ring-LWE is attacked as plain LWE, as nothing better is known: secret s of n ternary numbers, error e of deviation
sigma, modulus q, as many samples as the attack likes. The attack (Alkim, Ducas, Poeppelmann and Schwabe,
"Post-quantum key exchange", USENIX Security 2016, ePrint 2015/1092; for small secrets Bai and Galbraith, ACISP 2014,
ePrint 2013/839; confirmed by Albrecht, Goepfert, Virdia and Wunderer, ASIACRYPT 2017, ePrint 2017/815): with m samples,
(e, f s, 1), f = sigma / deviation of s, is the shortest vector of a lattice of dimension d = n + m + 1 and volume
q**m f**n, and BKZ with blocks of b finds it if

    sigma sqrt(b) <= delta**(2 b - d - 1) volume**(1 / d)

delta = ((pi b)**(1 / b) b / (2 pi e))**(1 / (2 (b - 1))) (Chen's thesis, 2013, under the geometric series assumption).
The cost of BKZ, in operations, by four published models:

- core-SVP: one call of a sieve in dimension b, 2**(0.292 b) classical, 2**(0.265 b) quantum (ePrint 2015/1092);
- sieve: 8 d calls of 2**(0.292 b + 16.4) (Becker, Ducas, Gama and Laarhoven, SODA 2016), the model of the
  Homomorphic Encryption Standard's table (2018, ePrint 2019/939);
- gates: 5.46 (d - b) times 5.46 * 2**(0.29614 b' + 20.388) gates, b' = b - b ln(4/3) / ln(b / (2 pi e)) (MATZOV,
  "Report on the security of LWE", 2022; dimensions for free by Ducas, EUROCRYPT 2018, ePrint 2018/245): the default
  of the lattice-estimator (Albrecht, Player and Scott, ePrint 2015/046).
"""

import math
from dataclasses import dataclass

import numpy as np

from fhe.rlwe.parameters import NOISE_VARIANCE, Parameters

TERNARY = math.sqrt(2 / 3)


@dataclass(frozen=True)
class Estimate:
    """The cheapest attack: its block size, its lattice's dimension, and log2 of its cost by each model."""

    block: int
    dimension: int

    @property
    def core_svp(self) -> float:
        return 0.292 * self.block

    @property
    def core_svp_quantum(self) -> float:
        return 0.265 * self.block

    @property
    def sieve(self) -> float:
        return math.log2(8 * self.dimension) + 0.292 * self.block + 16.4

    @property
    def gates(self) -> float:
        free = self.block * math.log(4 / 3) / math.log(self.block / (2 * math.pi * math.e))
        calls = math.log2(5.46**2 * (self.dimension - self.block))
        return calls + 0.29613500308205365 * (self.block - free) + 20.387885985467914


def log_delta(block: int) -> float:
    return math.log((math.pi * block) ** (1 / block) * block / (2 * math.pi * math.e)) / (2 * (block - 1))


def primal_usvp(
    degree: int, log2_modulus: float, error: float, secret: float = TERNARY, samples: int | None = None
) -> Estimate:
    """The smallest block that succeeds, and the smallest dimension for it. error, secret: deviations."""
    m = np.arange(1, (samples or 4 * degree) + 1)
    d = degree + m + 1
    volume = (m * log2_modulus * math.log(2) + degree * math.log(error / secret)) / d
    low, high = 60, 4 * degree
    while low < high:
        block = (low + high) // 2
        found = math.log(error * math.sqrt(block)) <= (2 * block - d - 1) * log_delta(block) + volume
        if found.any():
            high = block
        else:
            low = block + 1
    found = math.log(error * math.sqrt(low)) <= (2 * low - d - 1) * log_delta(low) + volume
    return Estimate(low, int(d[found].min()))


def main() -> None:
    own, noise = Parameters(), math.sqrt(NOISE_VARIANCE)
    standard = ((1024, 27), (2048, 54), (4096, 109), (8192, 218))
    kyber = math.log2(3329)
    rows = [
        ("fhe.rlwe: n 2048, q 2**52 - 4095", primal_usvp(own.poly_modulus_degree, math.log2(own.coeff_modulus), noise)),
        *((f"the standard's 128 bits: n {n}, log2 q {bits}", primal_usvp(n, bits, 3.2)) for n, bits in standard),
        ("SEAL 2.2: n 8192, log2 q 226", primal_usvp(8192, 226, 3.19)),
        ("Kyber512", primal_usvp(512, kyber, math.sqrt(1.5), math.sqrt(1.5), samples=512)),
        ("Kyber768", primal_usvp(768, kyber, 1.0, 1.0, samples=768)),
    ]
    print("| parameters | block | dimension | core-SVP | core-SVP, quantum | sieve | gates |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in rows:
        costs = " | ".join(f"{c:.1f}" for c in (found.core_svp, found.core_svp_quantum, found.sieve, found.gates))
        print(f"| {name} | {found.block} | {found.dimension} | {costs} |")


if __name__ == "__main__":
    main()
