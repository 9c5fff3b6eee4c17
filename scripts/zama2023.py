"""Checks the claims of "Towards Encrypted Large Language Models with FHE"; docs/zama-2023.md has what came out.

    python scripts/zama2023.py accuracy                                   # agreement over bits, with a figure
    python scripts/zama2023.py demonstration                              # a prompt at several bit widths
    python scripts/zama2023.py lookups                                    # PBS of the head at GPT-2's shape
    python scripts/zama2023.py run --tokens 2                             # the same head on ciphertexts

`accuracy` and `demonstration` take `--model openai-community/gpt2` where that can be had. `lookups` and `run` use a
random model of one layer in GPT-2's shape: what a circuit costs depends on its shape and widths, not on the text.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import fhe
from jaxgpt2 import methods
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages, check_disjoint, evaluate, longest_passage, read_passages
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import parameter_shapes
from jaxgpt2.progress import seconds, step
from jaxgpt2.quantize import Bits
from jaxgpt2.sweeps import plots
from machine import environment
from weights import save_checkpoint
from weights.checkpoint import TINY

# The published figure for layer 0, head 0 of OpenAI's GPT-2: top-1 agreement with the float model.
PUBLISHED_AGREEMENT = {2: 0.7217, 3: 0.7217, 4: 0.9586, 6: 0.9783, 7: 0.9854, 8: 0.9949, 9: 0.9981}
PUBLISHED_LOOKUPS = 11_622

PACKAGES = ("jax", "numpy", "concrete-python")


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR|HUB_ID")
@click.option("--head", default="0.0", show_default=True)
@click.option("--text", type=click.Path(path_type=Path), default=TINY / "eval.txt", help="One passage a line.")
@click.option("--figure", type=click.Path(path_type=Path), help="Where to draw it (.svg or .png).")
def accuracy(model: str, head: str, text: Path, figure: Path | None) -> None:
    """Agreement with the float model over bits, and beside it what the publication does not show."""
    gpt2 = GPT2.from_pretrained(model)
    passages, calibration = read_passages(text), bundled_passages("calibration")
    check_disjoint(calibration, passages)
    rows = []
    click.echo(f"head {head} of {model}, {len(passages)} passages; {environment(*PACKAGES)}")
    click.echo(
        f"{'bits':>4}{'top-1':>9}{'top-5':>9}{'top-10':>9}{'KL':>11}{'recovered':>11}{'head error':>12}"
        f"{'published':>11}"
    )
    for bits in range(2, 10):
        encrypted = EncryptedGPT2.encrypt(gpt2, head, MethodConfig.of("softmax", Bits.of(bits)))
        encrypted = encrypted.calibrate(calibration, longest_passage(encrypted.model, passages))
        measured = evaluate(encrypted, passages, encrypted.runner("quantized"))
        rows.append((bits, measured))
        click.echo(
            f"{bits:>4}{measured.top_k[1]:>9.4f}{measured.top_k[5]:>9.4f}{measured.top_k[10]:>9.4f}{measured.kl:>11.2e}"
            f"{measured.recovered_kl:>11.4f}{measured.head_error:>12.4f}{PUBLISHED_AGREEMENT.get(bits, ''):>11}"
        )
    ablated = rows[0][1]
    click.echo(
        f"none{ablated.top_k_ablated[1]:>9.4f}{ablated.top_k_ablated[5]:>9.4f}{ablated.top_k_ablated[10]:>9.4f}"
        f"{ablated.kl_ablated:>11.2e}{0:>11}{1:>12}"
    )
    if figure is not None:
        draw(rows, head, model, figure)


def draw(rows, head: str, model: str, figure: Path) -> None:
    """The published figure, with the line that it leaves out: the model without the head."""
    from matplotlib.figure import Figure

    colour, marker = plots.LOOKS["softmax"]
    bits = [row[0] for row in rows]
    with plots.style():
        drawn = Figure(figsize=(10, 4.8), layout="constrained")
        left, right = drawn.subplots(1, 2)
        left.plot(bits, [row[1].top_k[1] for row in rows], color=colour, marker=marker, label=f"head {head} of {model}")
        left.plot(list(PUBLISHED_AGREEMENT), list(PUBLISHED_AGREEMENT.values()), color="#7b3294", marker="^",
                  linestyle="--", label="published, OpenAI's GPT-2")  # fmt: skip
        right.plot(bits, [row[1].recovered_kl for row in rows], color=colour, marker=marker)
        for axes, value in ((left, rows[0][1].top_k_ablated[1]), (right, 0.0)):
            plots.without_the_head(axes, value)
            axes.set(xlabel="Bits", xticks=bits)
        left.set(ylabel="How often the best token\nis the float model's")
        right.set(ylabel=plots.RECOVERED, ylim=(-0.5, 1.05))
        drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.parent.mkdir(parents=True, exist_ok=True)
        plots.save(drawn, figure)


@main.command()
@click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR|HUB_ID")
@click.option("--head", default="0.0", show_default=True)
@click.option("--prompt", default="Cryptography is a", show_default=True)
@click.option("--max-new-tokens", default=10, show_default=True)
def demonstration(model: str, head: str, prompt: str, max_new_tokens: int) -> None:
    """Greedy text from a prompt, at several bit widths."""
    gpt2 = GPT2.from_pretrained(model)
    length = len(gpt2.encode(prompt, room=max_new_tokens)) + max_new_tokens
    click.echo(f"{'float':>9}  {prompt}{gpt2.text(list(gpt2.generate(prompt, max_new_tokens)))}")
    for bits in (2, 3, 4, 6, 8):
        encrypted = EncryptedGPT2.encrypt(gpt2, head, MethodConfig.of("softmax", Bits.of(bits)))
        encrypted = encrypted.calibrate(bundled_passages("calibration"), length)
        text = gpt2.text(list(encrypted.generate(prompt, max_new_tokens, "quantized")))
        click.echo(f"{bits:>2} bits    {prompt}{text}")


def random_model(directory: Path, width: int, heads: int) -> Path:
    """A random model of one layer in GPT-2's shape, with the bundled tokenizer."""
    config = GPT2Config(vocab_size=4096, n_positions=64, n_embd=width, n_layer=1, n_head=heads, eos_token_id=0)
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        centre, spread = (1.0, 0.0) if name.endswith("weight") and ".ln_" in f".{name}" else (0.0, 0.02)
        if name.endswith("c_attn.weight"):
            spread = 0.1  # a trained model's scores are not all alike
        tensors[name] = random.normal(centre, spread, shape).astype(np.float32)
    fields = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "eos_token_id")
    save_checkpoint(directory, {field: getattr(config, field) for field in fields}, tensors)
    (directory / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    return directory


shape_options = [
    click.option("--width", default=768, show_default=True),
    click.option("--heads", default=12, show_default=True),
    click.option("--tokens", default=6, show_default=True),
    click.option("--bits", default=4, show_default=True),
    click.option(
        "--rounding-threshold-bits",
        "lookup_bits",
        default=8,
        show_default=True,
        help="Top bits of an accumulator that a lookup sees.",
    ),
    click.option("--rounding", default="approximate", show_default=True),
    click.option("--p-error", default=1e-5, show_default=True),
    click.option("--json", "as_json", is_flag=True),
]


def with_shape(function):
    for option in reversed(shape_options):
        function = option(function)
    return function


def compile_baseline(
    width: int, heads: int, tokens: int, bits: int, lookup_bits: int, rounding: fhe.Rounding, p_error: float
):
    with tempfile.TemporaryDirectory() as directory:
        gpt2 = GPT2.from_pretrained(random_model(Path(directory), width, heads))
    encrypted = EncryptedGPT2.encrypt(gpt2, "0.0", MethodConfig.of("softmax", Bits.of(bits, lookup_bits)))
    passages = bundled_passages("calibration")
    encrypted = encrypted.calibrate(passages, tokens)
    with step(f"compiling for {tokens} tokens"):
        return encrypted.compile(passages, tokens, fhe.FHEConfig(p_error, rounding))


def report_of(encrypted: EncryptedGPT2) -> dict[str, Any]:
    """What a run of the head takes."""
    (circuit,), (cost,) = encrypted.circuits.values(), encrypted.costs(encrypted.seq_len or 0).values()
    return {
        "seq_len": encrypted.seq_len,
        **circuit.report.to_json(),
        **cost.to_json(),
        "cost": cost.describe(),
        "machine": cost.machine,
    }


def lines_of(encrypted: EncryptedGPT2, result: dict[str, Any]) -> list[str]:
    """The same for people: lookups by stage and bits, then all of them."""
    (config,) = encrypted.configs.values()
    stages = (
        f"{stage:12}" + ", ".join(f"{count:,} of {bits} bits" for bits, count in sorted(counts.items()))
        for stage, counts in result["pbs_by_stage"].items()
    )
    return [
        f"softmax, bits {config.bits}, {encrypted.seq_len} tokens",
        *stages,
        result["cost"],
        f"complexity {result['complexity']:.3g}, error per lookup {result['p_error']:g}, {result['rounding']} "
        f"rounding, compiled in {seconds(result['compile_seconds'])}",
        f"a run takes about {seconds(result['estimated_run_seconds'])} ({result['machine']})",
    ]


@main.command()
@with_shape
def lookups(as_json: bool, **shape) -> None:
    """How many lookups (PBS) the published head takes; 11,622 are published."""
    encrypted = compile_baseline(**shape)
    result = report_of(encrypted)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(environment(*PACKAGES))
    click.echo("\n".join(lines_of(encrypted, result)))
    click.echo(f"\npublished: {PUBLISHED_LOOKUPS:,}; here {result['pbs_count'] / PUBLISHED_LOOKUPS - 1:+.1%}")


@main.command()
@with_shape
def run(as_json: bool, **shape) -> None:
    """The head on ciphertexts: key making, one run, memory, and whether the result is right."""
    encrypted = compile_baseline(**shape)
    result = report_of(encrypted)
    (circuit,) = encrypted.circuits.values()
    started = time.monotonic()
    with step("making keys"):
        keys = circuit.make_keys()
    result["key_seconds"] = time.monotonic() - started
    (quantized,) = encrypted.quantized.values()
    x = np.random.default_rng(1).integers(-3, 4, (shape["tokens"], shape["width"]))
    ciphertexts = circuit.encrypt(keys, "head", x)
    started = time.monotonic()
    with step("running on ciphertexts", circuit.report.estimated_run_seconds):
        outputs = circuit.run("head", ciphertexts, keys.evaluation)
    result["run_seconds"] = time.monotonic() - started
    (decrypted,) = circuit.decrypt(keys, "head", outputs)
    (wanted,) = methods.get("softmax").head.strategy.whole(fhe.NumpyOps(), quantized.params, x)
    result["equal_share"] = float(np.mean(decrypted == wanted))
    result["relative_error"] = float(np.linalg.norm(decrypted - wanted) / np.linalg.norm(wanted))
    result["evaluation_key_bytes"] = len(keys.evaluation)
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(environment(*PACKAGES))
    click.echo("\n".join(lines_of(encrypted, result)))
    click.echo(
        f"\nkeys made in {seconds(result['key_seconds'])}, one run {seconds(result['run_seconds'])}, "
        f"peak memory {result['peak_memory_bytes'] / 1e9:.1f} GB\n"
        f"decrypted integers equal to the exact ones: {result['equal_share']:.1%}, "
        f"relative error {result['relative_error']:.3f}"
    )


if __name__ == "__main__":
    main()
