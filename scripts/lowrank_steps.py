"""What each step towards a cheap head brings: recovered KL of all heads of the bundled model, lookups, estimated time.

    python scripts/lowrank_steps.py --configs weights/tiny/configs.json

Every row keeps the steps above it. Accuracy is that of the quantized integers on the evaluation text; lookups and time
are for reading six tokens, means over the heads, the time from the table of lookup times.
"""

from __future__ import annotations

from pathlib import Path

import click

import fhe
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module, read_configs
from jaxgpt2.progress import counting
from jaxgpt2.quantize import Bits
from jaxgpt2.sweeps.runner import Configuration, Experiment, SweepRunner
from jaxgpt2.sweeps.tune import recovered
from machine import environment, table
from weights.checkpoint import TINY

FULL = {"score_rank": 64, "value_rank": 64, "exponential_bits": 7, "training_steps": 0}
LOW = FULL | {"score_rank": 16, "value_rank": 24}


def steps(tuned: dict[Module, MethodConfig]) -> list[tuple[str, dict[Module, MethodConfig]]]:
    """What is printed, and every head's config."""

    def all_heads(method: str, bits: Bits, options: dict[str, int] | None = None) -> dict[Module, MethodConfig]:
        return dict.fromkeys(tuned, MethodConfig.of(method, bits, options))

    own = Bits(6, 8, 4, 5)
    return [
        ("the published method, 4 bits, 6-bit lookups", all_heads("softmax", Bits.of(4, 6))),
        ("squares, causality, predicted maxima; full rank", all_heads("lowrank", Bits.of(4, 6), FULL)),
        ("inputs of 6 bits, weights of 8", all_heads("lowrank", Bits(6, 8, 4, 6), FULL)),
        ("requantizations see 5 bits", all_heads("lowrank", own, FULL)),
        ("ranks 16 and 24", all_heads("lowrank", own, LOW)),
        ("the exponential sees 6 bits", all_heads("lowrank", own, LOW | {"exponential_bits": 6})),
        ("trained", all_heads("lowrank", own, {"score_rank": 16, "value_rank": 24})),
        ("ranks of each head by tune", tuned),
    ]


@click.command(help=__doc__)
@click.option("--configs", type=click.Path(path_type=Path), default=TINY / "configs.json", show_default=True)
@click.option("--seq-len", default=6, show_default=True, help="Tokens of the text whose cost is counted.")
def main(configs: Path, seq_len: int) -> None:
    gpt2 = GPT2.from_pretrained("tiny")
    passages, calibration = bundled_passages("eval"), bundled_passages("calibration")
    experiment = Experiment("tiny", tuple(passages), tuple(calibration), (1,), seq_len, "approximate")
    bench, found = SweepRunner(experiment, gpt2), steps(read_configs(configs, gpt2.config))
    configurations = {
        Configuration(module, config).key: Configuration(module, config)
        for _, chosen in found
        for module, config in chosen.items()
    }
    rows = {}
    with counting("configurations", len(configurations)) as progress:
        progress(0)
        for some in bench.run(configurations.values()):
            rows |= {row["key"]: row for row in some}
            progress(len(some))
    click.echo(f"{environment('jax', 'numpy')}; lookup times: {fhe.LOOKUP_TIMES['machine']}\n")
    lines = []
    for name, chosen in found:
        own = [rows[Configuration(module, config).key] for module, config in chosen.items()]
        kept = recovered(own)
        worst = min(row["recovered_kl"] for row in own)
        pbs, took = (sum(row[column] for row in own) / len(own) for column in ("pbs_count", "estimated_seconds"))
        lines.append((name, f"{kept:.3f}", f"{worst:.2f}", f"{pbs:,.0f}", f"{took:.0f} s"))
    click.echo(table(("step", "recovered KL", "worst head", f"PBS, {seq_len} tokens", "estimated"), lines))


if __name__ == "__main__":
    main()
