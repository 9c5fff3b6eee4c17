"""Times GPT-2 beside Hugging Face transformers: the same random weights of the 124M shape, the same cores, one run.

    python scripts/bench_gpt2.py            # a table
    python scripts/bench_gpt2.py --json     # one JSON object

First the two are compared (logits, and greedy tokens), then timed in turns, so that whatever else the machine does
disturbs both. Reported are medians. Compilation is no part of them, it is reported apart.

    prefill     a prompt read into an empty key/value cache, logits of its last token, as generation starts
    forward     logits of every token of a text, without a cache
    decoding    tokens chosen one by one, each read through the cache; without the prompt
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from jaxgpt2.generation import generate_tokens
from jaxgpt2.models.gpt2.pretrained import GPT2
from machine import environment

PARITY_TOKENS = 50
TOLERANCE = 1e-4


def save_random_model(directory: Path) -> transformers.GPT2LMHeadModel:
    """A GPT-2 of the 124M shape with every parameter random, so that its greedy text does not repeat one token."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(eos_token_id=None, bos_token_id=None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.05)
    model.save_pretrained(directory)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(directory / "tokenizer.json"))  # unused: the prompts are token ids
    return transformers.GPT2LMHeadModel.from_pretrained(directory).eval()


class Theirs:
    """transformers as a user runs it: its default attention and cache, no gradients, all cores."""

    def __init__(self, model: transformers.GPT2LMHeadModel):
        self.model = model

    @torch.inference_mode()
    def forward(self, ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> Any:
        output = self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        return output, int(output.logits[0, -1].argmax())

    @torch.inference_mode()
    def decode(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """The tokens after the first, and the seconds that they took."""
        output, token = self.prefill(ids)
        tokens = []
        start = time.perf_counter()
        for _ in range(count):
            output = self.model(
                torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1
            )
            token = int(output.logits[0, -1].argmax())
            tokens.append(token)
        return tokens, time.perf_counter() - start

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids])
        model: Any = self.model
        text = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return text[0, len(ids) :].tolist()


class Ours:
    def __init__(self, gpt2: GPT2):
        self.gpt2 = gpt2

    def forward(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.gpt2([ids]))[0]

    def prefill(self, ids: list[int]) -> int:
        return int(self.gpt2.cached_logits(len(ids))(ids).argmax())

    def decode(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """The tokens after the first, and the seconds that they took."""
        stream = generate_tokens(self.gpt2.cached_logits(len(ids) + count + 1), ids, count + 1)
        next(stream)
        start = time.perf_counter()
        tokens = list(stream)
        return tokens, time.perf_counter() - start

    def generate(self, ids: list[int], count: int) -> list[int]:
        return list(generate_tokens(self.gpt2.cached_logits(len(ids) + count), ids, count))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(theirs: Theirs, ours: Ours, prompt: int, context: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Every number of the report."""
    text = np.random.default_rng(0).integers(0, 50257, prompt).tolist()
    start = text[:context]
    jobs = {
        "prefill": (prompt, lambda side: seconds(lambda: side.prefill(text))),
        "forward": (prompt, lambda side: seconds(lambda: side.forward(text))),
        "decoding": (new_tokens, lambda side: side.decode(start, new_tokens)[1]),
    }
    sides = {"transformers": theirs, "jaxgpt2": ours}
    print("comparing", file=sys.stderr)
    first: dict[str, dict[str, float]] = {}
    for job, (_, run) in jobs.items():
        first[job] = {name: seconds(lambda run=run, side=side: run(side)) for name, side in sides.items()}
    difference = float(np.abs(ours.forward(text) - theirs.forward(text)).max())
    wanted, got = theirs.generate(start, PARITY_TOKENS), ours.generate(start, PARITY_TOKENS)
    print("timing", file=sys.stderr)
    times: dict[str, dict[str, list[float]]] = {job: {name: [] for name in sides} for job in jobs}
    for _ in range(repeats):
        for job, (_, run) in jobs.items():
            for name, side in sides.items():
                times[job][name].append(run(side))
    speed = {
        job: {name: count / statistics.median(times[job][name]) for name in sides} for job, (count, _) in jobs.items()
    }
    return {
        "max_logit_difference": difference,
        "greedy_tokens_equal": wanted == got,
        "greedy_tokens": PARITY_TOKENS,
        "distinct_greedy_tokens": len(set(wanted)),
        "prefill_tokens": prompt,
        "decoding_prompt": context,
        "decoding_tokens": new_tokens,
        "repeats": repeats,
        "tokens_per_second": speed,
        "ratio": {job: speed[job]["jaxgpt2"] / speed[job]["transformers"] for job in jobs},
        "first_call_seconds": first,
        "seconds": times,
    }


def table(report: dict[str, Any]) -> str:
    what = {
        "prefill": f"prefill, {report['prefill_tokens']} tokens",
        "forward": f"forward, {report['prefill_tokens']} tokens",
        "decoding": f"decoding, {report['decoding_tokens']} tokens after {report['decoding_prompt']}",
    }
    lines = [
        "GPT-2, 124M shape, float32, batch 1, random weights",
        report["environment"],
        f"largest difference of logits {report['max_logit_difference']:.1e}; {report['greedy_tokens']} greedy tokens "
        f"{'identical' if report['greedy_tokens_equal'] else 'DIFFERENT'} "
        f"({report['distinct_greedy_tokens']} distinct)",
        "",
        f"{'tokens/s, median of ' + str(report['repeats']):34}{'jaxgpt2':>10}{'transformers':>14}{'ratio':>8}"
        f"{'first call of jaxgpt2':>24}",
    ]
    for job, name in what.items():
        speed = report["tokens_per_second"][job]
        lines.append(
            f"{name:34}{speed['jaxgpt2']:10.1f}{speed['transformers']:14.1f}{report['ratio'][job]:8.2f}"
            f"{report['first_call_seconds'][job]['jaxgpt2']:22.1f} s"
        )
    return "\n".join(lines)


@click.command()
@click.option("--prompt", default=512, show_default=True, help="Tokens of prefill and forward.")
@click.option("--context", default=64, show_default=True, help="Tokens read before decoding is timed.")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens decoded.")
@click.option("--repeats", default=5, show_default=True, help="Timings of each kind.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def main(prompt: int, context: int, new_tokens: int, repeats: int, as_json: bool) -> None:
    """Compares speed and results with transformers; exit status 1 where the results differ."""
    transformers.utils.logging.disable_progress_bar()
    report: dict[str, Any] = {"environment": environment("jax", "flax", "numpy", "torch", "transformers")}
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(save_random_model(Path(folder)))
        ours = Ours(GPT2.from_pretrained(folder))
    report |= measure(theirs, ours, prompt, context, new_tokens, repeats)
    print(json.dumps(report) if as_json else table(report))
    if report["max_logit_difference"] > TOLERANCE or not report["greedy_tokens_equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
