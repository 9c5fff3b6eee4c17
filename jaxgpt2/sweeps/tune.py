"""What `tune` chooses: the configs of heads among rows of a sweep, then how their lookups are encrypted.

Ranks and bits are chosen by what quantized heads keep of the model; error probability and rounding, which the integers
know nothing of, by what the engine's simulation of the encrypted heads loses of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fhe
from jaxgpt2.encrypted import EncryptedGPT2, Module
from jaxgpt2.errors import InputError
from jaxgpt2.evaluation import evaluate
from jaxgpt2.methods.method import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.progress import seconds


def cheapest(rows: Mapping[str, Sequence[dict[str, Any]]], wanted: float) -> dict[str, dict[str, Any]]:
    """For every head the row to take, so that all of them together keep enough at the least estimated time.

    What a set of rows keeps is 1 - sum of kl / sum of kl_ablated. For a price of KL in seconds every head takes its
    best row; the least price that keeps enough is found by bisection, and what is left over is then spent head by head.

    Raises:
        InputError: no choice keeps enough; the message says what the best one keeps.
    """
    known = {head: [row for row in some if row.get("recovered_kl") is not None] for head, some in rows.items()}
    for head, some in known.items():
        if not some:
            raise InputError(f"head {head}: nothing could be measured in any of {len(rows[head])} configurations")
    ablated = sum(some[0]["kl_ablated"] for some in known.values())

    def kept(choice: Mapping[str, dict[str, Any]]) -> float:
        return 1 - sum(row["kl"] for row in choice.values()) / ablated

    def at(price: float) -> dict[str, dict[str, Any]]:
        return {head: min(some, key=lambda r: r["estimated_seconds"] + price * r["kl"]) for head, some in known.items()}

    low, high = -12.0, 18.0  # exponents of ten
    choice = at(10**high)
    if kept(choice) < wanted:
        count, took = sum(map(len, rows.values())), sum(row["estimated_seconds"] for row in choice.values())
        raise InputError(
            f"head {', '.join(rows)}: none of {count} configurations recovers {wanted:g} of the KL, the best recovers "
            f"{kept(choice):.4f} (in about {seconds(took)}): allow more --bits, other --set or --attention, or ask for "
            "less"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(at(10**middle)) >= wanted else (middle, high)
    choice = at(10**high)
    for head, some in sorted(known.items(), key=lambda item: -choice[item[0]]["estimated_seconds"]):
        enough = [row for row in some if kept({**choice, head: row}) >= wanted]
        choice[head] = min(enough, key=lambda row: (row["estimated_seconds"], row["kl"]))
    return choice


@dataclass(frozen=True)
class Encryption:
    """What a way to encrypt lookups costs some heads, and what it loses of them.

    Args:
        fhe_config: error probability and rounding.
        complexity: of a text of the length that was asked for, all heads, in the engine's own unit.
        kl: KL(float || simulated) in nats, summed over heads, each alone; quantized_kl: the same without encryption;
            kl_ablated: the same without the head.
        error: why one of the heads cannot be compiled with it; then the numbers are those of the heads before.
    """

    fhe_config: fhe.FHEConfig
    complexity: float = 0.0
    kl: float = 0.0
    quantized_kl: float = 0.0
    kl_ablated: float = 0.0
    error: str | None = None

    def __add__(self, other: Encryption) -> Encryption:
        """Of both one's heads; with errors, the first."""
        return Encryption(
            self.fhe_config,
            self.complexity + other.complexity,
            self.kl + other.kl,
            self.quantized_kl + other.quantized_kl,
            self.kl_ablated + other.kl_ablated,
            self.error or other.error,
        )

    @property
    def lost(self) -> float:
        """The recovered KL that encryption costs."""
        return (self.kl - self.quantized_kl) / self.kl_ablated

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes, with the derived number."""
        return dataclasses.asdict(self) | {"lost": None if self.error else self.lost}


def measure_encryption(
    gpt2: GPT2,
    configs: Mapping[Module, MethodConfig],
    candidates: Sequence[fhe.FHEConfig],
    passages: Sequence[str],
    calibration: Sequence[str],
    seq_len: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Encryption]:
    """Simulates heads, each alone, on passages cut to `seq_len` tokens, in circuits for so many.

    Args:
        configs: of methods that are made for the same engine of lookups.
        progress: is told after every head and candidate that one more is done.
    """
    calibrated = EncryptedGPT2(gpt2, configs).calibrate(calibration, seq_len)

    def simulated(alone: EncryptedGPT2, fhe_config: fhe.FHEConfig, quantized_kl: float) -> Encryption:
        (module,) = alone.modules
        try:
            compiled = alone.compile(calibration, seq_len, fhe_config)
        except fhe.CompilationError as error:
            return Encryption(fhe_config, error=f"head {module}: {error}")
        report = compiled.circuits[module].report
        share = compiled.costs(seq_len)[module].counts["pbs_count"] / report.pbs_count
        measured = evaluate(compiled, passages, compiled.runner("simulate"), (1,), seq_len)
        return Encryption(fhe_config, report.complexity * share, measured.kl, quantized_kl, measured.kl_ablated)

    found = {fhe_config: Encryption(fhe_config) for fhe_config in candidates}
    for module, config in configs.items():
        alone = EncryptedGPT2(gpt2, {module: config}, {module: calibrated.quantized[module]})
        quantized = evaluate(alone, passages, alone.runner("quantized"), (1,), seq_len)
        for fhe_config, sums in found.items():
            if sums.error is None:
                found[fhe_config] = sums + simulated(alone, fhe_config, quantized.kl)
            progress(1)
    return list(found.values())


def cheapest_encryption(measured: Sequence[Encryption], allowed: float) -> Encryption:
    """The one of least complexity that loses no more of the recovered KL than is allowed.

    Raises:
        InputError: there is none; the message says what the best one loses.
    """
    working = [each for each in measured if each.error is None]
    if not working:
        raise InputError(f"no error probability and rounding that was tried can be compiled: {measured[0].error}")
    enough = [each for each in working if each.lost <= allowed]
    if not enough:
        best = min(working, key=lambda each: each.lost)
        raise InputError(
            f"every error probability and rounding that was tried costs more than {allowed:g} of the KL, the best "
            f"({best.fhe_config.p_error:g}, {best.fhe_config.rounding}) {best.lost:.4f}: allow more --noise, or give a "
            "smaller --p-error"
        )
    return min(enough, key=lambda each: each.complexity)
