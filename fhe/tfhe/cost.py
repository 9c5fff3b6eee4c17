"""The cost of a circuit of lookups."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

# Milliseconds per lookup by input bits, and the machine of the measurement; written by scripts/bench_lookup.py.
# Beyond the table, every bit multiplies the time by the same factor as the last one in it.
LOOKUP_TIMES: dict[str, Any] = json.loads(Path(__file__).with_name("lookup_times.json").read_text(encoding="utf-8"))
MILLISECONDS_PER_LOOKUP = {int(bits): float(ms) for bits, ms in LOOKUP_TIMES["milliseconds"].items()}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of running functions: a `fhe.RunCost` of lookups (PBS). Sizes are 0 where a backend cannot know them.

    pbs_by_stage: {stage: {input bits: lookups}}. A product of two ciphertexts counts as its two lookups. The stage
        "compiler" holds, at 0 bits, the lookups that the engine's compiler added or, negative, merged.
    max_integer_bits: bits of the widest integer.
    """

    pbs_by_stage: dict[str, dict[int, int]] = field(default_factory=dict[str, dict[int, int]])
    max_integer_bits: int = 0
    input_ciphertext_bytes: int = 0
    output_ciphertext_bytes: int = 0

    @property
    def pbs_by_bit_width(self) -> dict[int, int]:
        """{input bits: lookups} over all stages."""
        totals: dict[int, int] = {}
        for widths in self.pbs_by_stage.values():
            for bits, count in widths.items():
                totals[bits] = totals.get(bits, 0) + count
        return dict(sorted(totals.items()))

    @property
    def pbs_count(self) -> int:
        """All lookups."""
        return sum(self.pbs_by_bit_width.values())

    @property
    def max_bit_width(self) -> int:
        """Bits of the widest input of a lookup; 0 without lookups."""
        return max(self.pbs_by_bit_width, default=0)

    @property
    def estimated_run_seconds(self) -> float:
        """Seconds on the machine of LOOKUP_TIMES; an order of magnitude for others."""
        widest = max(MILLISECONDS_PER_LOOKUP)
        growth = MILLISECONDS_PER_LOOKUP[widest] / MILLISECONDS_PER_LOOKUP[widest - 1]
        return sum(
            count * MILLISECONDS_PER_LOOKUP[min(max(bits, 1), widest)] * growth ** max(0, bits - widest) / 1000
            for bits, count in self.pbs_by_bit_width.items()
        )

    @property
    def machine(self) -> str:
        return LOOKUP_TIMES["machine"]

    @property
    def counts(self) -> dict[str, int]:
        by_width = {f"pbs_{bits}": count for bits, count in self.pbs_by_bit_width.items()}
        return {"pbs_count": self.pbs_count, "max_bit_width": self.max_bit_width} | by_width

    def describe(self) -> str:
        return f"{self.pbs_count:,} lookups of up to {self.max_bit_width} bits"

    def __add__(self, other: "Cost") -> "Cost":
        return total_cost({"": self, "other": other}, {"": 1, "other": 1})

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes, derived numbers included. Bit widths become strings."""
        data = {name: getattr(self, name) for name in Cost.__dataclass_fields__}
        data["pbs_by_stage"] = {
            stage: {str(bits): count for bits, count in sorted(widths.items())}
            for stage, widths in self.pbs_by_stage.items()
        }
        data["pbs_by_bit_width"] = {str(bits): count for bits, count in self.pbs_by_bit_width.items()}
        return data | {name: getattr(self, name) for name in ("pbs_count", "max_bit_width", "estimated_run_seconds")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The cost that `to_json` wrote."""
        data = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        stages = data["pbs_by_stage"].items()
        data["pbs_by_stage"] = {stage: {int(bits): count for bits, count in by.items()} for stage, by in stages}
        return cls(**data)


def total_cost(functions: Mapping[str, Cost], calls: Mapping[str, int]) -> Cost:
    """The cost of calling functions, {name: number of calls}."""
    costs = [(functions[name], times) for name, times in calls.items()]
    stages: dict[str, dict[int, int]] = {}
    for cost, times in costs:
        for stage, widths in cost.pbs_by_stage.items():
            total = stages.setdefault(stage, {})
            for bits, count in widths.items():
                total[bits] = total.get(bits, 0) + times * count
    return Cost(
        pbs_by_stage=stages,
        max_integer_bits=max((cost.max_integer_bits for cost, _ in costs), default=0),
        input_ciphertext_bytes=sum(times * cost.input_ciphertext_bytes for cost, times in costs),
        output_ciphertext_bytes=sum(times * cost.output_ciphertext_bytes for cost, times in costs),
    )


@dataclass(frozen=True, kw_only=True)
class Report(Cost):
    """The cost of a circuit: a `fhe.CircuitReport`. The fields of `Cost` are for one call of each function.

    Sizes are in bytes; 0 or None where a backend cannot know them.
    functions: the cost of each, by name. They share one set of keys.
    evaluation_key_source: of evaluation_key_bytes: "compiler" (uncompressed, before keys exist) or "serialized" (what a
        client sends).
    noise: in words, how decrypted results may differ from the function's; empty if only with p_error.
    """

    functions: dict[str, Cost]
    backend: str
    versions: dict[str, str]
    p_error: float
    rounding: str
    noise: str = ""
    complexity: float = 0.0
    global_p_error: float | None = None
    evaluation_key_bytes: int = 0
    evaluation_key_source: str = "compiler"
    secret_key_bytes: int = 0
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, functions: dict[str, Cost], **facts: Any) -> "Report":
        """A report on these functions. facts: the fields of `Report` itself."""
        once = total_cost(functions, dict.fromkeys(functions, 1))
        return cls(functions=functions, **{name: getattr(once, name) for name in Cost.__dataclass_fields__}, **facts)

    def cost_of(self, calls: Mapping[str, int]) -> Cost:
        """The cost of calling functions, {name: number of calls}."""
        return total_cost(self.functions, calls)

    def to_json(self) -> dict[str, Any]:
        functions = {name: cost.to_json() for name, cost in self.functions.items()}
        return asdict(self) | super().to_json() | {"functions": functions}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        functions = {name: Cost.from_json(cost) for name, cost in data["functions"].items()}
        return replace(super().from_json(data), functions=functions)
