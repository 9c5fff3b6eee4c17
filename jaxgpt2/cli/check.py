"""The command `check-attention`."""

from __future__ import annotations

import functools
import linecache
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jaxgpt2.cli.options import (
    calibration_passages,
    describe,
    emit,
    json_option,
    model_options,
    modules_of,
    options,
    total_cost,
)
from jaxgpt2.errors import InputError
from jaxgpt2.progress import note, seconds, step

if TYPE_CHECKING:
    import numpy as np

    from jaxgpt2.encrypted import EncryptedGPT2
    from jaxgpt2.methods import QuantizedFunction, QuantizedModule

# Texts whose integers are compared, and of how many tokens where a circuit is made for it.
TEXTS, SIMULATED_TOKENS = 3, 3

# Probability of a wrong lookup in a simulation of some ten thousand, all of which shall be right.
SIMULATED_ERROR = 1e-10


@click.command("check-attention")
@click.argument("attention", metavar="FILE.py:NAME")
@options(model_options)
@click.option("--encrypt", "head", default="0.1", show_default=True, metavar="L.H", help="The head that it computes.")
@click.option("--bits", default=4, show_default=True, help="Bits of activations.")
@click.option("--tokens", type=click.IntRange(2), default=6, show_default=True, help="Of the text whose cost counts.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to calibrate on, one passage a line.  [default: bundled]")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="Evaluation text, one passage a line.  [default: bundled]")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=24, show_default=True, help="Only the first N passages of it.")
@json_option
def check_attention(attention: str, model: str, head: str, bits: int, tokens: int, calibration: Path | None,
                    text: Path | None, limit: int, as_json: bool) -> None:  # fmt: skip
    """Try an attention method: whether it is causal, what it computes, what it costs, and what it does to a head."""
    import fhe
    from jaxgpt2 import evaluation, methods
    from jaxgpt2.encrypted import EncryptedGPT2
    from jaxgpt2.methods import MethodConfig
    from jaxgpt2.models.gpt2.pretrained import GPT2

    name = methods.named(attention)
    passages = (evaluation.bundled_passages("eval") if text is None else evaluation.read_passages(text))[:limit]
    calibrating = calibration_passages(calibration)
    evaluation.check_disjoint(calibrating, passages)
    with step("loading the model"):
        encrypted = EncryptedGPT2.encrypt(GPT2.from_pretrained(model), head, MethodConfig.of(name, bits))
    if len(encrypted.modules) != 1 or any(module.head is None for module in encrypted.modules):
        raise InputError(f"--encrypt {head}: wanted one head, as 0.1")
    with step("calibrating"):
        longest = max(tokens, evaluation.longest_passage(encrypted.model, passages))
        encrypted = encrypted.calibrate(calibrating, longest)
    with step("comparing integers"):
        agreeing = check_integers(encrypted, texts_of(encrypted, calibrating, tokens))
    with step("counting lookups"):
        compiled = encrypted.compile(calibrating, tokens, backend="clear")
    with step("simulating"):
        agreeing += simulate(encrypted, calibrating)
    with step(f"evaluating {len(passages)} passages"):
        measured = evaluation.evaluate(encrypted, passages, encrypted.runner("quantized"), (1,))
    (quantized,) = encrypted.quantized.values()
    constants = dict(getattr(quantized.params, "constants", ()))
    whole, last = total_cost(compiled.costs(tokens)), total_cost(compiled.costs(tokens, tokens - 1))
    assert isinstance(whole, fhe.Cost)
    stages = {stage: sum(counts.values()) for stage, counts in whole.pbs_by_stage.items()}
    result = {
        **modules_of(encrypted),
        "constants": constants,
        "causal": True,
        "agreeing": agreeing,
        "tokens": tokens,
        "pbs_by_stage": stages,
        "pbs_count": whole.pbs_count,
        "pbs_count_per_token": last.pbs_count,
        "estimated_seconds": whole.estimated_run_seconds,
        "estimated_seconds_per_token": last.estimated_run_seconds,
        "recovered_kl": measured.recovered_kl,
        "head_error": measured.head_error,
    }
    lines = [
        f"{result['modules']} of {model}, {describe(encrypted)}",
        "",
        *(f"{name:20}{value:g}, chosen on calibration text" for name, value in constants.items()),
        "causal              yes: a token's results do not change with what follows it",
        f"the same integers   {', '.join(agreeing)}",
        f"head                recovered KL {measured.recovered_kl:.4f}, head error {measured.head_error:.4f}",
        f"lookups             {whole.pbs_count:,} of up to {whole.max_bit_width} bits for {tokens} tokens, about "
        f"{seconds(whole.estimated_run_seconds)} ({whole.machine})",
        f"the last token      {last.pbs_count:,}, about {seconds(last.estimated_run_seconds)}",
        "",
        *(f"{count:>9,}  {source_of(stage, attention)}" for stage, count in stages.items()),
    ]
    emit(as_json, result, lines)


def source_of(stage: str, attention: str) -> str:
    """A stage's name, or the line of the file that it is named after."""
    line = re.fullmatch(r"line_(\d+)", stage)
    if line is None:
        return stage
    return f"line {line[1]}: {linecache.getline(attention.rpartition(':')[0], int(line[1])).strip()}"


def texts_of(encrypted: EncryptedGPT2, passages: Sequence[str], tokens: int) -> list[np.ndarray]:
    """Encoded inputs of the head, (T, C), of calibration text of so many tokens or fewer."""
    from jaxgpt2.calibration import HiddenStates

    (module,) = encrypted.modules
    states = HiddenStates.read(encrypted.model, passages, tokens).at(encrypted.model, module.layer)
    function, quantized = encrypted.function(module), encrypted.quantized[module]
    return function.samples(quantized, states.inputs(encrypted.model)[:TEXTS])


def check_integers(encrypted: EncryptedGPT2, texts: Sequence[np.ndarray]) -> list[str]:
    """Runs the head on texts in every namespace and in pieces: the names of what gave the same integers.

    Raises:
        MethodError: two differ, or what follows a token changes its results.
    """
    import numpy as np

    from fhe import NumpyOps
    from jaxgpt2.methods import MethodError

    (module,) = encrypted.modules
    name, function, quantized = (
        encrypted.configs[module].method,
        encrypted.function(module),
        encrypted.quantized[module],
    )
    for x in texts:
        wanted = function.strategy.whole(NumpyOps(), quantized.params, x)
        changed = np.concatenate([x[:-1], x[:1]])
        other = function.strategy.whole(NumpyOps(), quantized.params, changed)
        if not all(np.array_equal(a[:-1], b[:-1]) for a, b in zip(wanted, other, strict=True)):
            raise MethodError(f"{name} is not causal: the last token of a text changes results before it")
        for where, results in in_jax(function, quantized, x):
            if not all(np.array_equal(a, b) for a, b in zip(wanted, results, strict=True)):
                raise MethodError(f"{name} gives other integers in {where} than in NumPy")
    return ["NumPy", *(where for where, _ in in_jax(function, quantized, texts[0]))]


def in_jax(
    function: QuantizedFunction, quantized: QuantizedModule, x: np.ndarray
) -> Iterator[tuple[str, Sequence[np.ndarray]]]:
    """Results of a text at once, and token by token with a cache."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt2.methods.jax_ops import JaxOps

    rows = jnp.asarray(x, jnp.int32)
    yield "JAX", function.strategy.whole(JaxOps(), quantized.params, rows)
    extend = jax.jit(functools.partial(function.strategy.extend, JaxOps()))
    cache, parts = function.strategy.empty_cache(JaxOps(), quantized.params, rows, len(rows)), []
    for start in range(len(rows)):
        results, cache = extend(quantized.params, rows[start : start + 1], cache, start)
        parts.append(results)
    yield "JAX with a cache", [np.concatenate(each) for each in zip(*parts, strict=True)]


def simulate(encrypted: EncryptedGPT2, passages: Sequence[str]) -> list[str]:
    """The same on compiled circuits: on clear integers, and in Concrete's simulation where it is installed.

    Raises:
        MethodError: they differ; fhe.CompilationError: an operation that the engine lacks, with its line.
    """
    import numpy as np

    import fhe
    from jaxgpt2.errors import MissingExtra
    from jaxgpt2.executors import SimulatedExecutor
    from jaxgpt2.methods import MethodError

    (module,) = encrypted.modules
    function, quantized = encrypted.function(module), encrypted.quantized[module]
    texts, agreeing = texts_of(encrypted, passages, SIMULATED_TOKENS), []
    for backend in ("clear", "concrete"):
        try:
            config = fhe.FHEConfig(p_error=SIMULATED_ERROR, rounding="exact")
            compiled = encrypted.compile(passages[:60], SIMULATED_TOKENS, config, backend)
        except MissingExtra as error:
            note(f"not simulated: {error}")
            continue
        except fhe.CompilationError as error:
            place = encrypted.configs[module].method.partition(":")[0]
            raise fhe.CompilationError(re.sub(r"stage (?:\w+\.)*line_(\d+)", rf"{place}:\1", str(error))) from None
        executor = SimulatedExecutor(compiled.circuits[module])
        for x in texts:
            wanted = function.strategy.whole(fhe.NumpyOps(), quantized.params, x)
            results, _ = function.strategy.read(quantized.client, executor, x, None, SIMULATED_TOKENS)
            if not all(np.array_equal(a, b) for a, b in zip(wanted, results, strict=True)):
                raise MethodError(f"{encrypted.configs[module].method} gives other integers in {backend} than in NumPy")
        agreeing.append({"clear": "a circuit", "concrete": "Concrete's simulation"}[backend])
    return agreeing
