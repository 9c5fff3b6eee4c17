"""The cost of a circuit on slot vectors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fhe.ckks.parameters import Parameters
from fhe.ckks.slots import OperationCounts

MACHINE = "one core of an AMD EPYC (Zen 4)"

# Milliseconds on that machine at poly_modulus_degree 16384, by the number of primes of the ciphertext, with tenseal
# 0.3.18. A product includes its relinearization. For other degrees, cost is taken as proportional to the degree.
MILLISECONDS = {
    "rotation": {1: 1.5, 3: 5.0, 5: 10.6, 7: 17.8, 9: 25.0},
    "product": {1: 1.7, 3: 5.7, 5: 11.8, 7: 19.4, 9: 27.6},
    "clear product": {1: 0.12, 9: 1.06},
    "rescaling": {1: 0.4, 9: 3.9},
}


@dataclass(frozen=True)
class SlotCost:
    """The cost of running functions: a `fhe.RunCost` of operations on slot vectors.

    stages: {stage: {kind: count}}, kinds as in `fhe.ckks.slots.KINDS`. levels: used by the deepest function.
    output_ciphertext_bytes: without results that stay on the server.
    """

    stages: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    levels: int = 0
    estimated_run_seconds: float = 0.0
    input_ciphertext_bytes: int = 0
    output_ciphertext_bytes: int = 0

    @property
    def machine(self) -> str:
        return MACHINE

    def total(self, kind: str) -> int:
        return sum(kinds.get(kind, 0) for kinds in self.stages.values())

    @property
    def counts(self) -> dict[str, int]:
        return {"rotations": self.total("rotation"), "products": self.total("product"), "levels": self.levels}

    def describe(self) -> str:
        return f"{self.total('rotation'):,} rotations and {self.total('product'):,} products on {self.levels} levels"

    def __add__(self, other: "SlotCost") -> "SlotCost":
        stages = {stage: dict(kinds) for stage, kinds in self.stages.items()}
        for stage, kinds in other.stages.items():
            for kind, count in kinds.items():
                own = stages.setdefault(stage, {})
                own[kind] = own.get(kind, 0) + count
        return SlotCost(
            stages,
            max(self.levels, other.levels),
            self.estimated_run_seconds + other.estimated_run_seconds,
            self.input_ciphertext_bytes + other.input_ciphertext_bytes,
            self.output_ciphertext_bytes + other.output_ciphertext_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SlotReport:
    """The cost of a circuit: a `fhe.CircuitReport`. Sizes are in bytes.

    evaluation_key_source: of evaluation_key_bytes: "estimated", or "serialized" (what a client sends) once keys exist.
    largest: the largest absolute value of the input set's runs at each depth. Beyond `room`, at the same depth, results
        are wrong.
    """

    backend: str
    versions: dict[str, str]
    security_bits: int
    poly_modulus_degree: int
    modulus_bits: int
    scale_bits: int
    levels: int
    functions: dict[str, SlotCost]
    rotation_keys: int
    largest: dict[int, float]
    room: dict[int, float]
    evaluation_key_bytes: int
    evaluation_key_source: str
    noise: str = "approximate: every number carries an error of about 2**(15 - scale_bits)"
    compile_seconds: float = 0.0

    def cost_of(self, calls: Mapping[str, int]) -> SlotCost:
        """The cost of calling functions, {name: number of calls}."""
        return sum((self.functions[name] for name, times in calls.items() for _ in range(times)), SlotCost())

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes. Depths become strings."""
        data = asdict(self)
        for name in ("largest", "room"):
            data[name] = {str(depth): value for depth, value in data[name].items()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SlotReport":
        """The report that `to_json` wrote."""
        data = dict(data)
        for name in ("largest", "room"):
            data[name] = {int(depth): value for depth, value in data[name].items()}
        data["functions"] = {name: SlotCost(**cost) for name, cost in data["functions"].items()}
        return cls(**data)


def estimated_seconds(counts: OperationCounts, parameters: Parameters) -> float:
    """Seconds on MACHINE; an order of magnitude for others."""
    total = 0.0
    for cost, count in counts.costs.items():
        table = MILLISECONDS[cost.kind]
        primes = parameters.levels + 1 - cost.depth
        slope = primes / max(table) if primes > max(table) else 1.0
        total += count * slope * float(np.interp(primes, list(table), list(table.values())))
    return total * parameters.poly_modulus_degree / 16384 / 1000
