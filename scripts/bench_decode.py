"""Times the mode `quantized` beside the float model: tokens chosen one by one, each read once through the cache.

    python scripts/bench_decode.py            # 64 tokens after 64, GPT-2's 124M shape
    python scripts/bench_decode.py --json     # one JSON object

Random weights, one encrypted head. The two take turns, so that whatever else the machine does disturbs both. Reported
are medians; the prompt and compilation are no part of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from bench_sweep import random_gpt2, word
from jaxgpt2.encrypted import EncryptedGPT2, Mode
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.config import GPT2Config
from machine import environment

# Texts that the head is calibrated on. What it computes plays no part here, only how fast.
CALIBRATION_TEXTS = 4


def timed(text: Iterator[int]) -> float:
    """Seconds from the first token to the last."""
    next(text)
    started = time.perf_counter()
    for _ in text:
        pass
    return time.perf_counter() - started


def measure(module: str, method: str, context: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    config = GPT2Config(eos_token_id=None)
    model, random = random_gpt2(config), np.random.default_rng(0)

    def text(tokens: int) -> str:
        return " ".join(map(word, random.integers(0, config.vocab_size, tokens)))

    length = context + new_tokens + 1
    options = {"training_steps": 0} if method == "lowrank" else {}
    encrypted = EncryptedGPT2.encrypt(model, module, MethodConfig.of(method, 4, options))
    encrypted = encrypted.calibrate([text(length) for _ in range(CALIBRATION_TEXTS)], length)
    prompt = text(context)
    times: dict[Mode, list[float]] = {"float": [], "quantized": []}
    for number in range(repeats + 1):  # the first of each compiles
        for mode, found in times.items():
            took = timed(encrypted.generate(prompt, new_tokens + 1, mode))  # the first is the prompt's
            if number:
                found.append(took / new_tokens)
    medians = {mode: statistics.median(found) for mode, found in times.items()}
    return {
        "environment": environment("jax", "flax", "numpy"),
        "module": module,
        "method": method,
        "context": context,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "seconds_per_token": medians,
        "ratio": medians["quantized"] / medians["float"],
        "seconds": times,
    }


@click.command(help=__doc__)
@click.option("--encrypt", "module", default="5.3", show_default=True, metavar="L.H", help="The encrypted head.")
@click.option("--attention", "method", default="lowrank", show_default=True)
@click.option("--context", default=64, show_default=True, help="Tokens read before decoding is timed.")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens decoded.")
@click.option("--repeats", default=5, show_default=True, help="Timings of each mode.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def main(module: str, method: str, context: int, new_tokens: int, repeats: int, as_json: bool) -> None:
    report = measure(module, method, context, new_tokens, repeats)
    if as_json:
        click.echo(json.dumps(report))
        return
    each = report["seconds_per_token"]
    click.echo(f"GPT-2, 124M shape, float32, random weights; {report['environment']}")
    click.echo(f"{new_tokens} tokens after {context}, head {module} by {method}; medians of {repeats}")
    click.echo(f"float      {each['float'] * 1000:8.1f} ms a token")
    click.echo(f"quantized  {each['quantized'] * 1000:8.1f} ms a token")
    click.echo(f"ratio      {report['ratio']:8.2f}")


if __name__ == "__main__":
    main()
