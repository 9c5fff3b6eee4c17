"""Widths of a model's linear layers, measured against the float model, with what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

import fhe
from fhe import rlwe
from jaxgpt2.evaluation import evaluate_linear
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.methods.linear import LinearBits
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.sweeps.store import Row


def key_of(bits: LinearBits) -> str:
    """Names a row."""
    return f"linear {bits.weights}/{bits.inputs}"


def grid(weights: Iterable[int], inputs: Iterable[int]) -> list[LinearBits]:
    """All combinations. Raises InputError: a width that there is not."""
    inputs = tuple(inputs)
    return [LinearBits(weight, width) for weight in weights for width in inputs]


def measured(
    gpt2: GPT2,
    widths: Sequence[LinearBits],
    passages: Sequence[str],
    calibration: Sequence[str],
    ks: Sequence[int],
    max_tokens: int | None = None,
) -> Iterator[Row]:
    """A row for each: fidelity of the whole model, and the server's seconds a token, which no width changes.

    max_tokens: longer passages are cut to so many tokens; None cuts none.

    Widths whose sums do not fit get a row that says so.
    """
    cost: Row | None = None
    for bits in widths:
        row: Row = {"key": key_of(bits), "weight_bits": bits.weights, "input_bits": bits.inputs}
        try:
            model = LinearGPT2.quantize(gpt2, calibration, bits)
        except fhe.CompilationError as error:
            yield row | {"error": str(error)}
            continue
        found = evaluate_linear(gpt2, model.client, model.products(), passages, ks, max_tokens)
        reports = model.reports().values()
        cost = cost or seconds_a_token(model)
        yield row | {
            **{f"top_{k}": value for k, value in found.top_k.items()},
            "kl": found.kl,
            "perplexity": found.perplexity,
            "perplexity_float": found.perplexity_float,
            "failure_log2": max(report.failure_log2 for report in reports),
            "largest_sum": max(report.largest_sum for report in reports),
            **cost,
            "positions": found.positions,
            "passages": found.passages,
        }


def seconds_a_token(model: LinearGPT2) -> Row:
    """What the server's products of the first block take here, for all blocks: ahead, of a batch, and online."""
    parameters, random = rlwe.Parameters(), np.random.default_rng(0)
    ahead = online = 0.0
    for name, weight in model.weights.items():
        if not name.startswith("h.0."):
            continue
        matrix, shape = rlwe.Matrix(weight, parameters), (len(weight), 2 * parameters.poly_modulus_degree)
        residues = random.integers(0, parameters.coeff_modulus, shape, np.uint64)
        masked = random.integers(0, 2**32, (1, len(weight)), np.uint32)
        started = time.perf_counter()
        for _ in matrix.ahead(residues):
            pass
        middle = time.perf_counter()
        matrix.online(masked)
        ahead += (middle - started) / parameters.poly_modulus_degree
        online += time.perf_counter() - middle
    layers = model.client.config.n_layer
    return {"server_ahead_seconds_per_token": layers * ahead, "server_online_seconds_per_token": layers * online}
