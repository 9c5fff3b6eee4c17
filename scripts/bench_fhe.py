"""What an encrypted head costs on both engines, beside the baseline, and what encryption does to its accuracy.

    python scripts/bench_fhe.py cost                     # both engines; the softmax baseline is compiled only
    python scripts/bench_fhe.py cost --full              # the baseline is executed too: 20 minutes and 18 GB
    python scripts/bench_fhe.py cost --head random       # random weights, which only polynomial has configs for
    python scripts/bench_fhe.py fidelity                 # all heads of the bundled model, quantized and decrypted
    python scripts/bench_fhe.py fidelity --backend ckks
    python scripts/bench_fhe.py cores                    # two heads on CKKS, in one process and in two

`cost` takes a trained head of the bundled model to GPT-2's shape: its inputs, of width 256, are turned into a subspace
of 768 dimensions by an orthonormal map, and its weights with them, which changes no score and no value. Every case runs
in two processes: one compiles, and one makes keys and runs, with nothing but the circuit, as clients and servers do;
its peak memory is reported. Times are medians over texts, from integers in clear to decrypted ones, after keys and
clear vectors are loaded.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax.numpy as jnp
import numpy as np

import fhe
from jaxgpt2 import methods
from jaxgpt2.calibration import HiddenStates, fisher_information
from jaxgpt2.encrypted import EncryptedGPT2, head_weights
from jaxgpt2.evaluation import Evaluation, bundled_passages, evaluate
from jaxgpt2.executors import LocalExecutor
from jaxgpt2.methods import MethodConfig
from jaxgpt2.methods.method import HeadWeights, float_head
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import parse_modules, read_configs
from jaxgpt2.progress import counting, note
from jaxgpt2.quantize import Bits
from jaxgpt2.sweeps.tune import recovered
from machine import environment, table
from weights.checkpoint import TINY

PACKAGES = ("jax", "numpy", "concrete-python", "tenseal")

# What a prototype of the published single-head model took on the same kind of machine: 2 cores of an AMD EPYC, Zen 4,
# concrete-python 2.11.0; 4 bits, lookups of up to 9.
PROTOTYPE = {"keys": 226.0, "run": 1042.0, "memory": 18e9}

# Texts of a head with random weights, beside those that are read: to calibrate it on.
CALIBRATION_TEXTS = 30

# Tokens of short texts; the baseline reads the fewer.
FEW, SHORT = 6, 8


def chains(method: str, longest: int) -> dict[str, list[list[int]]]:
    """How texts are read, each list with a cache of its own: up to so many tokens, then to so many, and so on.

    Where tokens are read one by one, one list holds all others, and a long text takes minutes: the first alone is read
    to its end.
    """
    if method == "softmax":
        return {"warm": [], "first": [[FEW]], "others": []}
    if method == "lowrank":
        short = [FEW, FEW + 1, SHORT]
        return {"warm": [[1]], "first": [[*short, longest - 1, longest]], "others": [short]}
    every = [[FEW, FEW + 1], [SHORT], [longest - 1, longest], [longest]]
    return {"warm": every, "first": every, "others": every}


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


def random_head(width: int, size: int, tokens: int) -> tuple[HeadWeights, list[np.ndarray], list[np.ndarray]]:
    """Random weights, texts to calibrate on, and texts to read. Rows lie near a subspace, as a trained model's do."""
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
    texts = [draw(tokens, len(basis)) @ basis for _ in range(CALIBRATION_TEXTS + 8)]
    texts = [x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) for x in texts]
    return weights, texts[:CALIBRATION_TEXTS], texts[CALIBRATION_TEXTS:]


def trained_head(head: str, width: int, tokens: int) -> tuple[HeadWeights, list[np.ndarray], list[np.ndarray]]:
    """The same of a head of the bundled model, widened; the texts to read all have so many tokens."""
    gpt2 = GPT2.from_pretrained("tiny")
    (module,) = parse_modules(head, gpt2.config)
    start = HiddenStates.read(gpt2, bundled_passages("calibration"), tokens)
    calibration = start.at(gpt2, module.layer).inputs(gpt2)
    evaluation = HiddenStates.read(gpt2, bundled_passages("eval"), tokens).at(gpt2, module.layer)
    weights = head_weights(gpt2, module.layer, module.head or 0, fisher_information(gpt2, start)[module.layer])
    wider, inputs = widened(weights, calibration, width)
    _, texts = widened(weights, [x for x in evaluation.inputs(gpt2) if len(x) == tokens], width)
    return wider, inputs, texts


def make(directory: str, head: str, config: Mapping[str, Any], width: int, tokens: int) -> dict:
    """Calibrates and compiles a head into a directory, with texts for it."""
    path = Path(directory)
    chosen = MethodConfig.from_json(config)
    method = methods.get(chosen.method)
    function = method.head
    given = random_head(width, 64, tokens) if head == "random" else trained_head(head, width, tokens)
    weights, inputs, texts = given
    module = function.calibrate(weights, inputs, chosen.bits, tokens, **chosen.options)
    functions = function.strategy.functions(module, function.samples(module, inputs), tokens)
    circuit = fhe.get_backend(method.backend).compile(functions, module.params, chosen.fhe_config)
    circuit.save(path / "circuit")
    encoded = [np.asarray(function.encode(module.client, jnp.asarray(x, jnp.float32))) for x in texts]
    encoded = [x.astype(np.int64 if x.dtype.kind == "i" else np.float64) for x in encoded]
    in_float = [float_head(weights, x) for x in texts]
    (path / "case.pickle").write_bytes(pickle.dumps((module.client, encoded, in_float)))
    cost = circuit.report.cost_of(function.strategy.calls(module.client, 0, FEW))
    complexity = circuit.report.complexity if isinstance(circuit.report, fhe.Report) else None
    return {"compile": circuit.report.compile_seconds, "counts": cost.describe(), "complexity": complexity}


@dataclass
class Counting:
    """An executor that counts the bytes of ciphertexts."""

    executor: LocalExecutor
    sent: int = 0
    received: int = 0

    def encrypt(self, name: str, *arrays: np.ndarray) -> Sequence[Any]:
        result = self.executor.encrypt(name, *arrays)
        self.sent += sum(map(len, result))
        return result

    def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        return self.executor.run(name, arrays)

    def decrypt(self, name: str, results: Sequence[Any]) -> Sequence[np.ndarray]:
        self.received += sum(map(len, results))
        return self.executor.decrypt(name, results)


def execute(directory: str, method: str, tokens: int, texts: int) -> dict:
    """Makes keys and reads texts as `chains` say, from what `make` left.

    "parts": for each stretch of a text that was read, from one token to another: seconds, bytes sent and received, and
    the squared error of the head's output with the squared norm of what it stands for.
    """
    path = Path(directory)
    circuit = fhe.get_backend(methods.get(method).backend).load(path / "circuit")
    client, inputs, in_float = pickle.loads((path / "case.pickle").read_bytes())
    function = methods.get(method).head
    started = time.perf_counter()
    keys = circuit.make_keys()
    key_seconds = time.perf_counter() - started
    parts: dict[tuple[int, int], list[list[float]]] = {}
    for number in range(-1, texts):
        for chain in chains(method, tokens)["warm" if number < 0 else "first" if number == 0 else "others"]:
            executor, cache, known = Counting(LocalExecutor(circuit, keys)), None, 0
            for length in chain:
                executor.sent = executor.received = 0
                started = time.perf_counter()
                results, cache = function.strategy.read(client, executor, inputs[number][known:length], cache, tokens)
                seconds = time.perf_counter() - started
                given = np.asarray(function.decode(client.dequantization, tuple(map(jnp.asarray, results))))
                wanted = in_float[number][known:length]
                error = float(np.sum((given - wanted) ** 2)), float(np.sum(wanted**2))
                if number >= 0:
                    parts.setdefault((known, length), []).append([seconds, executor.sent, executor.received, *error])
                known = length
    return {
        "keys": key_seconds,
        "key_bytes": len(keys.evaluation),
        "parts": [
            [*part, *map(statistics.median, columns[:3]), *map(statistics.mean, columns[3:])]
            for part, columns in ((part, list(zip(*found, strict=True))) for part, found in parts.items())
        ],
    }


class Measured(NamedTuple):
    seconds: float
    sent: float
    received: float
    head_error: float


def stretch(ran: dict[str, Any], known: int, length: int) -> Measured | None:
    """Reading a text from one token to another, as measured, or as the sum of its parts; None if it was not read."""
    parts = {(part[0], part[1]): np.array(part[2:]) for part in ran["parts"]}
    total, at = np.zeros(5), known
    while at < length:
        stops = [stop for start, stop in parts if start == at and stop <= length]
        if not stops:
            return None
        total, at = total + parts[at, max(stops)], max(stops)
    return Measured(*total[:3], head_error=float(np.sqrt(total[3] / total[4])))


@main.command()
@click.option("--head", default="0.2", show_default=True, metavar="L.H|random",
              help="Of the bundled model, whose head_dim is 64.")  # fmt: skip
@click.option("--width", default=768, show_default=True, help="That it is taken to.")
@click.option("--tokens", type=click.IntRange(SHORT + 2), default=32, show_default=True, help="Of the longest text.")
@click.option("--texts", default=3, show_default=True, help="Texts that times are medians over.")
@click.option("--baseline-rounding-threshold-bits", "lookup_bits", default=9, show_default=True,
              help="Top bits of a sum that a lookup of the published head sees.")  # fmt: skip
@click.option("--baseline-p-error", "p_error", default=1e-6, show_default=True,
              help="Of its lookups: at 1e-6 one run in a hundred goes wrong; less takes more than 24 GB.")  # fmt: skip
@click.option("--full", is_flag=True, help="Execute the baseline too.")
def cost(head: str, width: int, tokens: int, texts: int, lookup_bits: int, p_error: float,
         full: bool) -> None:  # fmt: skip
    """One head at GPT-2's shape on both engines: seconds, bytes, keys, memory, error."""
    cases: dict[str, tuple[MethodConfig, int]] = {"polynomial": (MethodConfig.of("polynomial", 4), tokens)}
    described = "random weights"
    if head != "random":
        tuned = json.loads((TINY / "configs.json").read_text())["modules"][head]
        config = MethodConfig.from_json(tuned)
        baseline = MethodConfig.of("softmax", Bits.of(4, lookup_bits), encryption=fhe.FHEConfig(p_error, "exact"))
        cases = {"softmax": (baseline, FEW), "lowrank": (config, tokens)} | cases
        described = (
            f"head {head} of tiny; lowrank {config.options}, recovered KL {tuned['measured']['recovered_kl']:.4f}"
        )
    made, ran = {}, {}
    for name, (config, longest) in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            note(f"{name}: calibrating and compiling")
            made[name] = child("make", directory, head, config.to_json(), width, longest)
            if name != "softmax" or full:
                note(f"{name}: making keys and reading texts")
                ran[name] = child("execute", directory, name, longest, 1 if name == "softmax" else texts)
    click.echo(environment(*PACKAGES))
    click.echo(f"{described}, at width {width}, head_dim 64; medians of {texts} texts")
    if "softmax" in cases:
        how = "executed" if full else "run, keys and memory as its prototype was measured"
        errors = {name: f"p_error {config.fhe_config.p_error:g}" for name, (config, _) in cases.items()}
        click.echo(
            f"baseline: softmax, 4 bits, lookups see {lookup_bits}, {errors['softmax']}, {how}; lowrank: "
            f"{errors['lowrank']}, beyond {SHORT} tokens one text"
        )
    click.echo("")

    def seconds(known: int, length: int) -> list[str]:
        """For each case, and how many times faster than the baseline, which has no cache and reads all of a text
        again."""
        whole = stretch(ran["softmax"], 0, FEW) if full else Measured(PROTOTYPE["run"], 0, 0, 0)
        compared = whole if "softmax" in cases and length <= FEW + 1 else None
        cells = []
        for name in cases:
            if name == "softmax":
                cells.append(f"{compared.seconds:,.0f} s" if compared else "")
            elif found := stretch(ran[name], known, length):
                times = f", {compared.seconds / found.seconds:,.0f}x" if compared else ""
                cells.append(f"{found.seconds:.2f} s{times}")
            else:
                cells.append("")
        return cells

    def of(show: Callable[[Measured], str], known: int, length: int) -> list[str]:
        found = {name: stretch(ran[name], known, length) for name in ran}
        return [show(each) if (each := found.get(name)) else "" for name in cases]

    def fact(name: str, module: str, scale: float, digits: int = 1) -> list[str]:
        """Of `execute`, and how many times less than the baseline's."""
        values: dict[str, float] = {case: ran[case][name] for case in ran}
        if "softmax" in cases and not full and name in PROTOTYPE:
            values["softmax"] = PROTOTYPE[name]
        baseline = values.get("softmax")
        cells = []
        for case in cases:
            times = f", {baseline / values[case]:,.0f}x" if baseline and case != "softmax" else ""
            cells.append(f"{values[case] / scale:,.{digits}f} {module}{times}" if case in values else "")
        return cells

    rows = [
        (f"{FEW} tokens", *seconds(0, FEW)),
        (f"{SHORT} tokens", *seconds(0, SHORT)),
        (f"{tokens} tokens", *seconds(0, tokens)),
        (f"one more, {FEW} in the cache", *seconds(FEW, FEW + 1)),
        (f"one more, {tokens - 1} in the cache", *seconds(tokens - 1, tokens)),
        *(
            (f"head error, {text}", *of(lambda found: f"{found.head_error:.3f}", known, length))
            for text, known, length in (
                (f"{FEW} tokens", 0, FEW),
                (f"{SHORT} tokens", 0, SHORT),
                (f"{tokens} tokens", 0, tokens),
                (f"one more, {tokens - 1} in the cache", tokens - 1, tokens),
            )
        ),
        *(
            (
                f"{text} in, out",
                *of(lambda found: f"{found.sent / 1e6:.2f}, {found.received / 1e6:.2f} MB", known, length),
            )
            for text, known, length in (
                (f"{SHORT} tokens", 0, SHORT),
                (f"one more, {tokens - 1} in the cache", tokens - 1, tokens),
            )
        ),
        ("making keys", *fact("keys", "s", 1)),
        ("evaluation keys, as sent", *fact("key_bytes", "MB", 1e6, 0)),
        ("peak memory, keys and run", *fact("memory", "GB", 1e9)),
        ("peak memory, compiling", *(f"{made[name]['memory'] / 1e9:.1f} GB" for name in cases)),
        ("compiling", *(f"{made[name]['compile']:.0f} s" for name in cases)),
        (f"operations, {FEW} tokens", *(made[name]["counts"] for name in cases)),
        (
            "complexity by Concrete, every function once",
            *(f"{each:.2g}" if (each := made[name]["complexity"]) else "" for name in cases),
        ),
    ]
    headings = {"softmax": "baseline, Concrete", "lowrank": "lowrank, Concrete", "polynomial": "polynomial, CKKS"}
    click.echo(table(("", *(headings[name] for name in cases)), rows))


# --- accuracy -----------------------------------------------------------------------------------


@main.command()
@click.option("--backend", type=click.Choice(["concrete", "ckks"]), default="concrete", show_default=True,
              help="The engine, with the method that is made for it.")  # fmt: skip
@click.option("--configs", type=click.Path(path_type=Path), help="Of every head.  [default: what the engine's are]")
@click.option("--heads", help="Some of them, as 0.1,2.3.  [default: all]")
@click.option("--inputs", default=3, show_default=True, help="Texts that every head reads encrypted.")
@click.option("--tokens", default=6, show_default=True, help="Of each of them.")
@click.option("--p-error", type=float, help="Of a lookup.  [default: the configs']")
@click.option("--out", type=click.Path(path_type=Path), help="A file that rows are added to as they are there.")
def fidelity(backend: str, configs: Path | None, heads: str | None, inputs: int, tokens: int, p_error: float | None,
             out: Path | None) -> None:  # fmt: skip
    """Heads one by one: recovered KL on the evaluation text, and on some texts quantized, simulated and decrypted."""
    gpt2, passages, calibration = (
        GPT2.from_pretrained("tiny"),
        bundled_passages("eval"),
        bundled_passages("calibration"),
    )
    known = read_configs(configs or TINY / "configs.json", gpt2.config)
    if backend == "ckks" and configs is None:
        known = dict.fromkeys(known, MethodConfig.of("polynomial", 4))
    modules = [module for module in known if heads is None or str(module) in heads.split(",")]
    modes = ("quantized", "simulate", "encrypted")
    rows: list[dict[str, Any]] = []
    with counting("heads", len(modules)) as progress:
        progress(0)
        for module in modules:
            index = list(known).index(module)
            started = time.perf_counter()
            encrypted = EncryptedGPT2(gpt2, {module: known[module]}).calibrate(calibration, 40)
            whole = evaluate(encrypted, passages, encrypted.runner("quantized"), (1,))
            encrypted = encrypted.compile(calibration, tokens, encrypted.fhe_configs(p_error), backend)
            keys = encrypted.make_keys()
            # Other passages for every head, so that all heads together read many.
            some = [passages[(index * inputs + i) % len(passages)] for i in range(inputs)]
            row: dict[str, Any] = {
                "head": str(module),
                "options": known[module].options,
                "cost": encrypted.costs(tokens)[module].describe(),
                "evaluation": losses(whole),
            }
            # What the client refuses to read counts for no mode.
            on_ciphertexts, readable = encrypted.runner("encrypted", keys), []
            for text in some:
                with contextlib.suppress(fhe.FHEError):
                    evaluate(encrypted, [text], on_ciphertexts, (1,), tokens)
                    readable.append(text)
            row["refused"] = len(some) - len(readable)
            for mode in modes:
                row[mode] = losses(evaluate(encrypted, readable, encrypted.runner(mode, keys), (1,), tokens))
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress(1)
    click.echo(environment(*PACKAGES))
    refused = sum(row["refused"] for row in rows)
    click.echo(
        f"{len(rows)} heads of tiny, backend {backend}, {len(passages)} passages quantized; up to {inputs} texts of "
        f"{tokens} tokens a head quantized, simulated, decrypted; {refused} refused as out of range\n"
    )
    measures = ("evaluation", *modes)
    lines: list[tuple[str, ...]] = [
        (
            row["head"],
            ", ".join(f"{name} {value}" for name, value in row["options"].items()),
            row["cost"],
            f"{row['evaluation']['kl_ablated']:.4f}",
            *(f"{recovered([row[measure]]):.4f}" for measure in measures),
            f"{row['encrypted']['head_error']:.4f}",
        )
        for row in rows
    ]
    lines.append(("all", "", "", "", *(f"{recovered([row[measure] for row in rows]):.4f}" for measure in measures), ""))
    header = ("head", "options", f"{tokens} tokens", "KL without it", "recovered, quantized",
              "these texts: quantized", "simulated", "decrypted", "head error, decrypted")  # fmt: skip
    click.echo(table(header, lines))


@main.command()
@click.option("--heads", default="1.2,1.3", show_default=True, help="Of one layer of the bundled model.")
@click.option("--tokens", default=SHORT, show_default=True, help="Of the text that they read.")
@click.option("--texts", default=3, show_default=True, help="Texts that times are medians over.")
def cores(heads: str, tokens: int, texts: int) -> None:
    """Heads of a layer on CKKS, in one process and in several: seconds to read a text."""
    gpt2, calibration = GPT2.from_pretrained("tiny"), bundled_passages("calibration")
    encrypted = EncryptedGPT2.encrypt(gpt2, heads, MethodConfig.of("polynomial", 4))
    encrypted = encrypted.calibrate(calibration, tokens).compile(calibration, tokens)
    passages = [gpt2.tokenizer.encode(passage).ids[:tokens] for passage in bundled_passages("eval")]
    some = [np.array([ids]) for ids in passages if len(ids) == tokens][: texts + 1]
    keys = encrypted.make_keys()

    def median(runner: Any) -> float:
        """Of all texts but the first, which finds keys and clear vectors not loaded."""
        took = []
        for ids in some:
            started = time.perf_counter()
            encrypted.forward(ids, runner).logits.block_until_ready()
            took.append(time.perf_counter() - started)
        return statistics.median(took[1:])

    together = median(encrypted.runner("encrypted", keys))
    with encrypted.over_cores(keys) as runner:
        apart = median(runner)
    click.echo(environment(*PACKAGES))
    click.echo(f"heads {heads} of tiny, {tokens} tokens: {together:.2f} s in one process, {apart:.2f} s in several")


def losses(measured: Evaluation) -> dict[str, float]:
    return {"kl": measured.kl, "kl_ablated": measured.kl_ablated, "head_error": measured.head_error}


if __name__ == "__main__":
    main()
