"""What an encrypted head costs, beside the yardstick, and what encryption does to its accuracy.

    python scripts/bench_fhe.py cost                  # lowrank on ciphertexts; the softmax yardstick is compiled only
    python scripts/bench_fhe.py cost --full           # the yardstick is executed too: half an hour and 20 GB
    python scripts/bench_fhe.py fidelity              # all heads of the bundled model, quantized and decrypted

`cost` takes a trained head of the bundled model to GPT-2's shape: its inputs, of width 256, are turned into a subspace
of 768 dimensions by an orthonormal map, and its weights with them, which changes no score and no value. Every case runs
in two processes: one compiles, and one makes keys and runs, with nothing but the circuit, as clients and servers do;
its peak memory is reported. Times are medians over texts.
"""

from __future__ import annotations

import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np

import fhe
from jaxgpt2 import attention
from jaxgpt2.attention import Recipe
from jaxgpt2.attention.formula import HeadWeights, float_head
from jaxgpt2.cli import calibration_passages
from jaxgpt2.evaluation import Evaluation, evaluate, read_passages
from jaxgpt2.gpt2 import GPT2
from jaxgpt2.hybrid import HybridGPT2, advance, head_weights, parse_heads, read, read_recipes, sample
from jaxgpt2.progress import counting, note
from jaxgpt2.quantize import Bits
from jaxgpt2.reading import Encrypted, quantize_input
from machine import environment
from weights.checkpoint import TINY

PACKAGES = ("jax", "numpy", "concrete-python")

# The post's single-head model with lookups of up to 9 bits, and what a prototype of it took on the same kind of machine
# (2 cores of an AMD EPYC, Zen 4, concrete-python 2.11.0).
YARDSTICK = Recipe.of("softmax", Bits.of(4, 8)), fhe.Settings(1e-5, "exact")
PROTOTYPE = {"keys": 226.0, "run": 1042.0, "memory": 18e9}


@click.group(help=__doc__)
def main() -> None:
    pass


# --- one case, in two processes -----------------------------------------------------------------


def child(function: str, *arguments: Any) -> dict[str, Any]:
    """Runs a function of this file in a process of its own: its result, with its peak memory."""
    code = (
        f"import json, resource, bench_fhe; found = bench_fhe.{function}(*{arguments!r}); "
        "found['memory'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; print(json.dumps(found))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(ran.stdout.splitlines()[-1])


def widened(weights: HeadWeights, inputs: list[np.ndarray], width: int) -> tuple[HeadWeights, list[np.ndarray]]:
    """The same head of a wider model: its inputs (T, C) are mapped to (T, width) by orthonormal columns."""
    columns, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, len(weights.query))))
    query, key, value = (columns @ part for part in (weights.query, weights.key, weights.value))
    wider = weights._replace(query=query, key=key, value=value, output=weights.output @ columns.T)
    return wider, [x @ columns.T for x in inputs]


def make(
    directory: str, head: str, recipe: Mapping[str, Any], settings: Mapping[str, Any], width: int, tokens: int
) -> dict:
    """Calibrates and compiles a head of the bundled model into a directory, with texts for it."""
    path = Path(directory)
    gpt2 = GPT2.from_pretrained("tiny")
    (unit,) = parse_heads(head, gpt2.config)
    chosen = Recipe.from_json(recipe)
    program = attention.get(chosen.formula).head
    evaluation = read_passages(TINY / "eval.txt")
    found = [
        sample(gpt2, advance(gpt2, read(gpt2, texts, tokens), unit.layer))
        for texts in (calibration_passages(None), evaluation)
    ]
    weights = head_weights(gpt2.model, unit.layer, unit.head or 0, found[0].sensitivity)
    wider, inputs = widened(weights, found[0].inputs, width)
    calibrated = program.calibrate(wider, inputs, chosen.bits, tokens, **chosen.settings)
    functions = program.reading.functions(program, calibrated, inputs, tokens)
    circuit = fhe.get_backend("concrete").compile(functions, calibrated.params, fhe.Settings(**settings))
    circuit.save(path / "circuit")
    _, texts = widened(weights, [x for x in found[1].inputs if len(x) == tokens], width)
    levels = [np.asarray(quantize_input(calibrated.client, jnp.asarray(x, jnp.float32)), np.int64) for x in texts]
    (path / "case.pickle").write_bytes(pickle.dumps((calibrated, levels, [float_head(wider, x) for x in texts])))
    report = circuit.report
    return {"complexity": report.complexity, "compile": report.compile_seconds, "bits": report.pbs_by_bit_width}


def execute(directory: str, formula: str, tokens: int, texts: int) -> dict:
    """Makes keys and reads texts, from what `make` left."""
    path = Path(directory)
    circuit = fhe.get_backend("concrete").load(path / "circuit")
    calibrated, inputs, in_float = pickle.loads((path / "case.pickle").read_bytes())
    program = attention.get(formula).head
    started = time.perf_counter()
    keys = circuit.make_keys()
    key_seconds = time.perf_counter() - started
    reader = program.reading.reader(calibrated.client, Encrypted(circuit, keys), tokens)
    whole = "head" in circuit.report.functions
    took, errors = [], []
    # Unpacking the keys is no part of a run: a text read before the first one that counts.
    for number in range(texts + (not whole)):
        x = inputs[number]
        seconds = []
        for count in (tokens,) if whole else range(1, tokens + 1):
            started = time.perf_counter()
            outputs = reader.read(x[:count])
            seconds.append(time.perf_counter() - started)
        exact = program.run(fhe.NumpyOps(), calibrated.params, x)
        got, wanted = (np.asarray(program.decode(calibrated.decoding, tuple(o))) for o in (outputs, exact))
        errors.append(
            [
                float(np.linalg.norm(part - in_float[number]) / np.linalg.norm(in_float[number]))
                for part in (got, wanted)
            ]
        )
        took.append(seconds)
    took = took[1:] or took
    return {
        "keys": key_seconds,
        "key_bytes": len(keys.evaluation),
        "seconds": [statistics.median(column) for column in zip(*took, strict=True)],
        "errors": [statistics.mean(column) for column in zip(*errors, strict=True)],
        "pbs": {count: circuit.report.cost_of(program.reading.calls(calibrated.client, 0, count)).pbs_count
                for count in range(1, tokens + 1)} if not whole else {tokens: circuit.report.pbs_count},
    }  # fmt: skip


@main.command()
@click.option("--head", default="0.2", show_default=True, help="Of the bundled model, whose head_dim is 64.")
@click.option("--width", default=768, show_default=True, help="That it is taken to.")
@click.option("--tokens", default=12, show_default=True, help="Longest text.")
@click.option("--texts", default=3, show_default=True, help="Texts that times are medians over.")
@click.option("--full", is_flag=True, help="Execute the yardstick too.")
def cost(head: str, width: int, tokens: int, texts: int, full: bool) -> None:
    """One head at GPT-2's shape: lookups, keys, seconds a token, memory."""
    tuned = json.loads((TINY / "recipes.json").read_text())["heads"][head]
    recipe, settings = Recipe.from_json(tuned), asdict(attention.get("lowrank").settings)
    short = 6
    with tempfile.TemporaryDirectory() as directory:
        note("lowrank: calibrating and compiling")
        made = child("make", directory, head, recipe.to_json(), settings, width, tokens)
        note("lowrank: making keys and reading texts")
        ran = child("execute", directory, "lowrank", tokens, texts)
    with tempfile.TemporaryDirectory() as directory:
        note("yardstick: compiling")
        yardstick = child("make", directory, head, YARDSTICK[0].to_json(), asdict(YARDSTICK[1]), width, short)
        executed = child("execute", directory, "softmax", short, 1) if full else None
    seconds, pbs = ran["seconds"], {int(count): number for count, number in ran["pbs"].items()}
    keys, run, memory = PROTOTYPE["keys"], PROTOTYPE["run"], PROTOTYPE["memory"]
    if executed:
        keys, run, memory = executed["keys"], executed["seconds"][0], executed["memory"]
    first, step = sum(seconds[:short]), seconds[short]
    click.echo(f"{environment(*PACKAGES)}")
    click.echo(
        f"head {head} of tiny at width {width}, head_dim 64; lowrank {recipe.settings}, recovered KL "
        f"{tuned['measured']['recovered_kl']:.4f}, p_error {settings['p_error']:g}; medians of {texts} texts"
    )
    click.echo(f"yardstick: softmax, 4 bits, {'executed' if executed else 'as its prototype was measured'}\n")
    rows = [
        (f"lookups (PBS), {short} tokens", "", f"{pbs[short]:,}", ""),
        (f"run, {short} tokens", f"{run:,.0f} s", f"{first:.1f} s", f"{run / first:.0f}x"),
        (f"one more token, {short} in the cache", f"{run:,.0f} s", f"{step:.1f} s", f"{run / step:.0f}x"),
        ("making keys", f"{keys:.0f} s", f"{ran['keys']:.1f} s", f"{keys / ran['keys']:.0f}x"),
        ("evaluation keys, as sent", "", f"{ran['key_bytes'] / 1e6:.0f} MB", ""),
        ("peak memory, keys and run", f"{memory / 1e9:.1f} GB", f"{ran['memory'] / 1e9:.1f} GB", ""),
        ("peak memory, compiling", f"{yardstick['memory'] / 1e9:.1f} GB", f"{made['memory'] / 1e9:.1f} GB", ""),
        ("compiling", f"{yardstick['compile']:.0f} s", f"{made['compile']:.0f} s", ""),
        ("complexity, all functions once", f"{yardstick['complexity']:.2g}", f"{made['complexity']:.2g}", ""),
    ]  # fmt: skip
    click.echo(table(("", "yardstick", "lowrank", "ratio"), rows))
    click.echo(f"\nseconds of each token: {', '.join(f'{t:.2f}' for t in seconds)}")
    decrypted, exact = ran["errors"]
    click.echo(f"error of the head's output: {exact:.3f} quantized, {decrypted:.3f} decrypted")
    click.echo(f"lookups by bits, each function once: {made['bits']}")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# --- accuracy -----------------------------------------------------------------------------------


def short_passages(gpt2: GPT2, passages: list[str], tokens: int) -> list[str]:
    """The beginnings of passages, of so many tokens."""
    return [gpt2.text(gpt2.tokenizer.encode(passage).ids[:tokens]) for passage in passages]


@main.command()
@click.option("--recipes", type=click.Path(path_type=Path), default=TINY / "recipes.json", help="Of every head.")
@click.option("--heads", help="Some of them, as 0.1,2.3.  [default: all]")
@click.option("--inputs", default=3, show_default=True, help="Texts that every head reads encrypted.")
@click.option("--tokens", default=6, show_default=True, help="Of each of them.")
@click.option("--p-error", default=attention.get("lowrank").settings.p_error, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="A file that rows are added to as they are there.")
def fidelity(recipes: Path, heads: str | None, inputs: int, tokens: int, p_error: float, out: Path | None) -> None:
    """Heads one by one: recovered KL on the evaluation text, and on some texts quantized, simulated and decrypted."""
    gpt2, passages, calibration = (
        GPT2.from_pretrained("tiny"),
        read_passages(TINY / "eval.txt"),
        calibration_passages(None),
    )
    known = read_recipes(recipes, gpt2.config)
    units = [unit for unit in known if heads is None or str(unit) in heads.split(",")]
    modes = ("quantized", "simulate", "encrypted")
    rows: list[dict[str, Any]] = []
    with counting("heads", len(units)) as progress:
        progress(0)
        for index, unit in enumerate(units):
            started = time.perf_counter()
            hybrid = HybridGPT2(gpt2, {unit: known[unit]}).calibrate(calibration, 40)
            whole = evaluate(hybrid, passages, hybrid.engine("quantized"), (1,))
            # A text cut out of a longer one may have a token more when it is read again.
            hybrid = hybrid.compile(calibration, tokens + 2, fhe.Settings(p_error, "approximate"))
            keys = hybrid.make_keys()
            # Other passages for every head, so that all heads together read many.
            some = short_passages(gpt2, [passages[(index * inputs + i) % len(passages)] for i in range(inputs)], tokens)
            row: dict[str, Any] = {
                "head": str(unit),
                "options": known[unit].settings,
                "pbs": hybrid.costs(tokens)[unit].counts["pbs_count"],
                "evaluation": losses(whole),
            }
            for mode in modes:
                row[mode] = losses(evaluate(hybrid, some, hybrid.engine(mode, keys), (1,)))
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress(1)
    click.echo(environment(*PACKAGES))
    click.echo(
        f"{len(rows)} heads of tiny, {len(passages)} passages quantized; {inputs} texts of {tokens} tokens a head "
        f"quantized, simulated, decrypted at p_error {p_error:g}\n"
    )
    lines: list[tuple[str, ...]] = [
        (
            row["head"],
            str(row["options"]["score_rank"]),
            str(row["options"]["value_rank"]),
            f"{row['pbs']:,}",
            f"{row['evaluation']['kl_ablated']:.4f}",
            *(recovered([row[mode]]) for mode in ("evaluation", *modes)),
        )
        for row in rows
    ]
    total = [recovered([row[mode] for row in rows]) for mode in ("evaluation", *modes)]
    lines.append(("all", "", "", f"{statistics.mean(row['pbs'] for row in rows):,.0f}", "", *total))
    header = ("head", "score rank", "value rank", f"PBS, {tokens} tokens", "KL without it", "recovered, quantized",
              "these texts: quantized", "simulated", "decrypted")  # fmt: skip
    click.echo(table(header, lines))


def losses(measured: Evaluation) -> dict[str, float]:
    return {"kl": measured.kl, "kl_ablated": measured.kl_ablated, "head_error": measured.head_error}


def recovered(parts: list[dict[str, float]]) -> str:
    return f"{1 - sum(part['kl'] for part in parts) / sum(part['kl_ablated'] for part in parts):.3f}"


if __name__ == "__main__":
    main()
