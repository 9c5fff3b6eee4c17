"""Measures what an operation on CKKS ciphertexts costs on one core, by the number of primes that they have left.

    python scripts/bench_ckks.py

`fhe/ckks/cost.py` has such a table, and every estimate for CKKS is made of it. Degree 16,384; medians. A product
includes its relinearization. Nothing else should run meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import numpy as np

from fhe.ckks.parameters import Parameters
from fhe.ckks.seal import CKKSContext, seal
from machine import environment, table

DEGREE, PRIMES = 16384, (9, 7, 5, 3, 2)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    def once() -> float:
        started = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - started)

    once()
    return statistics.median(once() for _ in range(repeats))


@click.command(help=__doc__)
@click.option("--repeats", default=30, show_default=True)
def main(repeats: int) -> None:
    context = CKKSContext(Parameters.choose(DEGREE, max(PRIMES) - 1, headroom_bits=8))
    secret, parts = context.make_keys([1], False, None)
    keys, evaluator = context.load_evaluation_keys(parts), context.evaluator
    vector = np.random.default_rng(0).uniform(-1, 1, context.parameters.slots).astype(np.complex128)
    fresh = context.load(context.encrypt(secret, vector))
    found: dict[str, list[float]] = {}
    for primes in PRIMES:
        x = context.switched(fresh, primes) if primes < max(PRIMES) else fresh
        x.scale = context.scales[primes]
        clear, target = context.factor(vector, primes), seal.Ciphertext()

        def product(x: object = x, target: object = target) -> None:
            evaluator.square(x, target)
            evaluator.relinearize_inplace(target, keys.relinearization)

        calls: dict[str, Callable[[], object]] = {
            "rotation": lambda x=x, target=target: evaluator.rotate_vector(x, 1, keys.rotations, target),
            "product of ciphertexts, relinearized": product,
            "product with a clear vector": lambda x=x, clear=clear, target=target: evaluator.multiply_plain(
                x, clear, target
            ),
        }
        for name, call in calls.items():
            found.setdefault(name, []).append(milliseconds(call, repeats))
        evaluator.multiply_plain(x, clear, target)
        rescaled = seal.Ciphertext()
        rescaling = milliseconds(lambda: evaluator.rescale_to_next(target, rescaled), repeats)  # noqa: B023
        found.setdefault("rescaling", []).append(rescaling)
    click.echo(f"degree {DEGREE:,}, milliseconds on one core; {environment('tenseal')}\n")
    rows = [(name, *(f"{value:.2f}" for value in values)) for name, values in found.items()]
    click.echo(table(("primes left", *map(str, PRIMES)), rows))


if __name__ == "__main__":
    main()
