"""Times a row of a sweep beside Hugging Face transformers: random weights of the 124M shape, the same cores, one run.

    python scripts/bench_sweep.py                           # the first layer and the last, in five minutes
    python scripts/bench_sweep.py --layers 0,1,2,3,4,5,6,7,8,9,10,11
    python scripts/bench_sweep.py --attention lowrank       # whose heads are trained
    python scripts/bench_sweep.py --no-theirs    # where transformers is not there, as on a GPU machine

A row is one head at one number of bits with every metric: agreement at three k, KL, recovered KL, head error. It shares
the float model, and with the other rows of its head the model without that head; both are counted in. Its calibration
is the method's work, done on other threads meanwhile, and stands apart; so does a row as a sweep runs it, calibration
included. Beside it stand as many single-sentence passes of transformers as there are passages. Reported are medians;
compilation is no part of them.

The limit of a row is the arithmetic of the layers after the head and of the output projection over the vocabulary, at
the speed of the device's largest matrix products, which is measured in the same run.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import Transformer
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module
from jaxgpt2.sweeps.runner import Configuration, Experiment, Layer, Prepared, SweepRunner
from machine import environment


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def word(token: int) -> str:
    return f"w{token}"


def random_gpt2(config: GPT2Config) -> GPT2:
    """Random weights, and a tokenizer with a word for every token."""
    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(config.vocab_size)}, word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return GPT2(config, Transformer(config, nnx.Rngs(0)), tokenizer)


def random_texts(config: GPT2Config, count: int, seed: int) -> list[list[int]]:
    """Token ids of texts of 12 to 31 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(0, config.vocab_size, random.integers(12, 32)).tolist() for _ in range(count)]


def row_flops(config: GPT2Config, layer: int, tokens: int) -> float:
    """Of the linear layers after a head and of the output projection; attention itself is next to nothing."""
    width, inner = config.n_embd, config.inner_dim
    block = 2 * (4 * width * width + 2 * width * inner)
    first = 2 * (config.head_dim * width + 2 * width * inner)
    return tokens * (first + (config.n_layer - layer - 1) * block + 2 * width * config.vocab_size)


def matmul_speed(config: GPT2Config, rows: int) -> float:
    """FLOP/s of the model's widest layers on this device, float32: the best of a few."""
    x = jnp.ones((rows, config.n_embd))
    w = jnp.ones((config.n_embd, config.inner_dim))
    multiply = jax.jit(jnp.matmul)
    multiply(x, w).block_until_ready()
    best = min(seconds(lambda: multiply(x, w).block_until_ready()) for _ in range(10))
    return 2 * rows * config.n_embd * config.inner_dim / best


def transformers_pass(texts: list[list[int]]) -> Callable[[], object]:
    """All texts one by one through transformers' GPT-2 of the same shape."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()

    def run() -> None:
        with torch.inference_mode():
            for text in texts:
                _ = model(torch.tensor([text])).logits

    return run


def calibrated(bench: SweepRunner, layer: Layer, configuration: Configuration) -> tuple[Prepared, float]:
    start = time.perf_counter()
    return bench.calibrate(layer, configuration), time.perf_counter() - start


def measure(layers: list[int], passages: int, rows: int, repeats: int, method: str, theirs: bool) -> dict[str, Any]:
    config = GPT2Config()
    texts = random_texts(config, passages, 0)
    gpt2 = random_gpt2(config)
    words = [" ".join(map(word, text)) for text in texts]
    calibration = [" ".join(map(word, text)) for text in random_texts(config, 20, 1)]
    experiment = Experiment("random weights", tuple(words), tuple(calibration), batch=rows)
    setup = time.perf_counter()
    bench = SweepRunner(experiment, gpt2)
    setup = time.perf_counter() - setup
    print(f"the float model read once, compilation included: {setup:.1f} s", file=sys.stderr)
    run_theirs = transformers_pass(texts) if theirs else None
    ours: dict[int, list[float]] = {}
    compiling: list[float] = []
    calibrating, others, peaks, swept = [], [], [], []
    for index in layers:
        layer = bench.layer(index)
        bits = [2 + i % 10 for i in range(rows)]
        configurations = [Configuration(Module(index, 0), MethodConfig.of(method, each)) for each in bits]
        if not compiling:
            bench.calibrate(layer, configurations[0])
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # as in a sweep
            timed = list(pool.map(functools.partial(calibrated, bench, layer), configurations))
        calibrating += [each for _, each in timed]
        prepared = [(each, made) for each, (made, _) in zip(configurations, timed, strict=True)]

        def run(layer: Any = layer, prepared: Any = prepared) -> None:
            bench.forget()
            bench.rows(layer, prepared)

        if not compiling:
            compiling.append(seconds(run))
        for _ in range(repeats):
            ours.setdefault(index, []).append(seconds(run) / rows)
            if run_theirs is not None:
                others.append(seconds(run_theirs))
            peaks.append(matmul_speed(config, rows * bench.positions))
        print(f"layer {index}: {statistics.median(ours[index]):.2f} s a row", file=sys.stderr)
        # All is compiled by now.
        bench.forget()
        swept.append(seconds(lambda some=configurations: list(bench.run(some))) / rows)
    each = {index: statistics.median(times) for index, times in ours.items()}
    flops = statistics.fmean(row_flops(config, index, bench.positions) for index in layers) * (1 + 1 / rows)
    row, peak = statistics.fmean(each.values()), statistics.median(peaks)
    other = statistics.median(others) if others else None
    return {
        "environment": environment("jax", "numpy", *(("torch", "transformers") if theirs else ())),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "method": method,
        "passages": passages,
        "tokens": bench.positions,
        "rows_of_a_stack": rows,
        "row_seconds": row,
        "row_seconds_by_layer": each,
        "first_stack_seconds": compiling[0],
        "setup_seconds": setup,
        "calibration_seconds": statistics.fmean(calibrating),
        "swept_row_seconds": statistics.fmean(swept),
        "transformers_seconds": other,
        "ratio": row / other if other else None,
        "row_flops": flops,
        "matmul_flops_per_second": peak,
        "share_of_peak": flops / row / peak,
        "least_row_seconds": flops / peak,
        "least_ratio": flops / peak / other if other else None,
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"GPT-2, 124M shape, float32, random weights, {report['passages']} passages, {report['tokens']} tokens; "
        f"{report['method']}, {report['rows_of_a_stack']} rows a stack",
        f"{report['environment']}; {report['device']}",
        "",
        f"a row, mean over {len(report['row_seconds_by_layer'])} layers      {report['row_seconds']:8.2f} s",
    ]
    if report["ratio"]:
        lines.append(f"as many passes of transformers    {report['transformers_seconds']:8.2f} s")
        lines.append(f"ratio                             {report['ratio']:8.3f}")
    lines += [
        f"arithmetic of a row               {report['row_flops'] / 1e9:8.0f} GFLOP",
        f"matrix products, measured         {report['matmul_flops_per_second'] / 1e9:8.0f} GFLOP/s",
        f"share of that                     {report['share_of_peak']:8.0%}",
        f"a row at that speed               {report['least_row_seconds']:8.2f} s"
        + (f", ratio {report['least_ratio']:.3f}" if report["least_ratio"] else ""),
        f"calibration and cost, a thread    {report['calibration_seconds']:8.2f} s",
        f"a row of a sweep, calibrated too  {report['swept_row_seconds']:8.2f} s",
        f"first stack, with compilation     {report['first_stack_seconds']:8.1f} s",
    ]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--layers", default="0,11", show_default=True)
@click.option("--passages", default=80, show_default=True)
@click.option("--rows", default=10, show_default=True, help="Configurations of a stack: bits 2 to 11 of one head.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--attention", "method", default="softmax", show_default=True)
@click.option("--theirs/--no-theirs", default=True, help="Time transformers too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def main(layers: str, passages: int, rows: int, repeats: int, method: str, theirs: bool, as_json: bool) -> None:
    report = measure([int(layer) for layer in layers.split(",")], passages, rows, repeats, method, theirs)
    print(json.dumps(report) if as_json else table(report))


if __name__ == "__main__":
    main()
