"""Measures a head on CKKS ciphertexts, on one core: time, sizes, memory, error; and what decrypted heads are worth.

    python scripts/bench_ckks.py [--json]

First a head of GPT-2's shape with random weights: texts read together, and one more token with all before it in the
cache. Then heads of the bundled model by themselves, decrypted, on short passages of the evaluation text.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import click
import jax.numpy as jnp
import numpy as np

import fhe
from jaxgpt2 import attention
from jaxgpt2.attention.formula import HeadWeights, Recipe, float_head
from jaxgpt2.evaluation import Evaluation, evaluate, longest_passage, read_passages
from jaxgpt2.gpt2 import GPT2
from jaxgpt2.hybrid import HybridGPT2, parse_heads
from jaxgpt2.reading import Encrypted, quantize_input
from machine import environment
from weights.checkpoint import TINY

# Texts of a head with random weights: those that it is calibrated on, and those that it reads.
CALIBRATION_TEXTS, TEXTS = 30, 3


@dataclass
class Timed:
    """A party that notes what its calls take."""

    party: Encrypted
    seconds: float = 0.0
    sent: int = 0
    received: int = 0
    names: list[str] = field(default_factory=list)

    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        start = time.perf_counter()
        result = self.party.encrypt(name, *arrays)
        self.seconds, self.sent = self.seconds + time.perf_counter() - start, self.sent + sum(map(len, result))
        return result

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        self.names.append(name)
        start = time.perf_counter()
        result = self.party.run(name, arrays)
        self.seconds += time.perf_counter() - start
        return result

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        start = time.perf_counter()
        decrypted = self.party.decrypt(name, results)
        self.seconds, self.received = self.seconds + time.perf_counter() - start, self.received + sum(map(len, results))
        return decrypted


def random_head(width: int, size: int, tokens: int) -> tuple[HeadWeights, list[np.ndarray]]:
    """Random weights, and texts whose rows lie near a subspace, as a trained model's activations do."""
    random = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(size=shape) * scale

    scale = 1.3 / width**0.5
    query, key, value = (draw(width, size, scale=scale) for _ in range(3))
    biases = [draw(size) for _ in range(3)]
    weights = HeadWeights(
        query, biases[0], key, biases[1], value, biases[2], output=draw(size, width), metric=np.eye(size)
    )
    basis = draw(max(4, width // 8), width)
    texts = [draw(tokens, len(basis)) @ basis for _ in range(CALIBRATION_TEXTS + TEXTS)]
    return weights, [x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) for x in texts]


def measure(width: int = 768, size: int = 64, lengths: Sequence[int] = (8, 32)) -> list[dict[str, Any]]:
    """Rows: texts of these lengths read at once, and the last token of the longest with all before it in the cache.

    Seconds are the median over TEXTS texts, after clear vectors are encoded; head_error is over all of their rows.
    """
    longest = max(lengths)
    weights, texts = random_head(width, size, longest)
    formula = attention.get("polynomial")
    bits, program = formula.bits(4), formula.head
    found = program.calibrate(weights, texts[TEXTS:], bits, longest, **formula.options)
    functions = program.reading.functions(program, found, texts[TEXTS:], longest)
    circuit: Any = fhe.get_backend("ckks").compile(functions, found.params, fhe.Settings())
    start = time.perf_counter()
    keys = circuit.make_keys()
    key_seconds = time.perf_counter() - start
    rows = []
    for known, length in [*((0, length) for length in lengths), (longest - 1, longest)]:
        for name in program.reading.calls(found.client, known, length):
            circuit.prepare(name)
        took, error, norm, timed = [], 0.0, 0.0, Timed(Encrypted(circuit, keys))
        for x in texts[:TEXTS]:
            timed = Timed(Encrypted(circuit, keys))
            reader = program.reading.reader(found.client, timed, longest)
            levels = np.asarray(quantize_input(found.client, jnp.asarray(x[:length], jnp.float32)), np.int64)
            if known:
                reader.read(levels[:known])
                timed.seconds = timed.sent = timed.received = 0
                timed.names.clear()
            outputs = tuple(jnp.asarray(part) for part in reader.read(levels))
            took.append(timed.seconds)
            wanted = float_head(weights, x[:length])[known:]
            given = np.asarray(program.decode(found.decoding, outputs))[known:]
            error, norm = error + np.sum((given - wanted) ** 2), norm + np.sum(wanted**2)
        cost = circuit.report.cost_of(program.reading.calls(found.client, known, length))
        rows.append(
            {
                "tokens": length - known,
                "cached": known,
                "functions": timed.names,
                "seconds": float(np.median(took)),
                "estimated_seconds": cost.estimated_run_seconds,
                "sent_bytes": timed.sent,
                "received_bytes": timed.received,
                "head_error": float(np.sqrt(error / norm)),
                "key_seconds": key_seconds,
                "evaluation_key_bytes": len(keys.evaluation),
                "compile_seconds": circuit.report.compile_seconds,
                "squarings": len(found.params.constants),
            }
        )
    return rows


def in_a_process(function: Any, *arguments: Any) -> tuple[Any, int]:
    """What a function returns in a process of its own, and that one's largest memory in bytes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_with_memory, function, *arguments).result()


def _with_memory(function: Any, *arguments: Any) -> tuple[Any, int]:
    result = function(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decrypted(head: str, passages: int, model: str = "tiny") -> Evaluation:
    """A head of a model, alone, on the shortest passages of the evaluation text, decrypted."""
    texts = sorted(read_passages(TINY / "eval.txt"), key=len)[:passages]
    calibration = read_passages(TINY / "calibration.txt")
    hybrid = HybridGPT2.protect(GPT2.from_pretrained(model), head, Recipe.of("polynomial", 4))
    longest = longest_passage(hybrid.gpt2, texts)
    hybrid = hybrid.calibrate(calibration, longest).compile(calibration, longest)
    return evaluate(hybrid, texts, hybrid.engine("encrypted", hybrid.make_keys()))


@click.command(help=__doc__)
@click.option("--width", default=768, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option(
    "--heads", default="all", show_default=True, metavar="L.H[,L.H...]|all|none", help="Of the bundled model."
)
@click.option("--passages", default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(width: int, head_dim: int, heads: str, passages: int, as_json: bool) -> None:
    rows, memory = in_a_process(measure, width, head_dim)
    result: dict[str, Any] = {
        "environment": environment("jax", "numpy", "tenseal"),
        "rows": rows,
        "memory_bytes": memory,
        "heads": {},
    }
    config = GPT2.from_pretrained("tiny").config
    if heads == "all":
        heads = ",".join(f"{layer}.{head}" for layer in range(config.n_layer) for head in range(config.n_head))
    names = [] if heads == "none" else [str(unit) for unit in parse_heads(heads, config)]
    found = {name: in_a_process(decrypted, name, passages)[0] for name in names}
    for name, each in found.items():
        result["heads"][name] = {"recovered_kl": each.recovered_kl, "head_error": each.head_error}
    if found:
        ablated = sum(each.kl_ablated for each in found.values())
        result["recovered_kl"] = 1 - sum(each.kl for each in found.values()) / ablated
        result["positions"] = next(iter(found.values())).positions
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(result["environment"])
    for row in rows:
        click.echo(
            f"{row['tokens']:3} tokens, {row['cached']:2} cached: {row['seconds']:6.2f} s "
            f"(estimated {row['estimated_seconds']:.2f}), {row['sent_bytes'] / 1e6:.2f} MB sent, "
            f"{row['received_bytes'] / 1e6:.2f} MB received, head error {row['head_error']:.4f}"
        )
    first = rows[0]
    click.echo(
        f"keys {first['key_seconds']:.1f} s, {first['evaluation_key_bytes'] / 1e6:.0f} MB; compiled in "
        f"{first['compile_seconds']:.1f} s; {first['squarings']} squarings; memory {memory / 1e9:.1f} GB"
    )
    for name, each in result["heads"].items():
        click.echo(f"head {name}: recovered KL {each['recovered_kl']:.5f}, head error {each['head_error']:.4f}")
    if found:
        click.echo(f"all {len(found)}: recovered KL {result['recovered_kl']:.5f} on {result['positions']} positions")


if __name__ == "__main__":
    main()
