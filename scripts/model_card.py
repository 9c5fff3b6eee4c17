"""Measures the bundled checkpoint and writes its model card.

    python scripts/model_card.py --corpus corpus --run runs/tiny --checkpoint weights/tiny

Everything in the card that is a number, a table or a text of the model comes from here; `CARD` holds the rest.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import lzma
from pathlib import Path

import click
import numpy as np

from jaxgpt2.generation import Sampling
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import disassemble, parameter_shapes
from jaxgpt2.sweeps import plots
from machine import environment
from train import Data, TrainingConfig, TrainingError, bits_per_byte, read_documents
from weights.checkpoint import write_atomically, write_text_atomically

PROMPTS = [
    "Cryptography is a",
    "A private key must",
    "The server reads the",
    "Encryption protects",
    "To install the package",
    "The king said that",
    "In the year 1900,",
    "A river is",
    "If the user does not",
    "The difference between freedom and",
]

CARD = """# tiny: the bundled GPT-2

A GPT-2 of {parameters:,} parameters that this project trained itself, so that encrypted heads can be tried, tested and
measured without a network: {n_layer} layers of {n_head} heads of {head_dim}, width {n_embd}, vocabulary {vocab_size}, \
context {n_positions}. The files are
in Hugging Face's format; `transformers` loads them too, with the same logits.

## Results

| | bits per byte |
| --- | --- |
| this model | {bits_per_byte:.3f} |
| `xz -9` on the same text | {xz:.3f} |

Measured on the held-out {evaluation_documents:,} documents ({evaluation_bytes:,} bytes) that no training text \
repeats, by `scripts/model_card.py`;
each token is predicted from at least {half} tokens before it where there are so many. {environment}.

![Loss over tokens](../../docs/figures/training.svg)

## Recipe

`scripts/build_corpus.py`, then `scripts/train.py --steps {steps}`, then `scripts/cut_passages.py` and
`scripts/model_card.py`. Muon for the matrices inside the blocks, AdamW for the rest; learning rate {learning_rate} \
after {warmup_steps} steps of
warm-up, falling linearly to nothing over the last {decay_percent:.0f}%; {batch_size} windows of {n_positions} \
tokens a step. {tokens:,} tokens seen of
{train_tokens:,}, in {hours:.1f} hours on two cores of an AMD EPYC beside other work (the rate in `log.csv` is what it \
got), seed {seed}.

## Data

English prose from {package_count} packages of the Debian archive: manuals, handbooks, dictionaries, stories of free \
games. {corpus_bytes:,} bytes
in {corpus_documents:,} documents after cleaning and deduplication, split by document. Version, licence, size and hash \
of each are in
`scripts/corpus_manifest.json`; licence names were read from the packages' copyright files by a program. `eval.txt` and
`calibration.txt` are passages from documents held out of the training, no document in both.

| package | version | licence | bytes |
| --- | --- | --- | --- |
{packages}

## Limits

It is small and was trained briefly on technical English: it writes plausible sentences, knows next to nothing, repeats
itself when decoded greedily, and says false things with confidence. It is here to be encrypted, not to be believed.
`generation_config.json` asks for a repetition penalty and for no three tokens twice, which the greedy texts below do
without.

## Continuations, unedited

{max_new_tokens} tokens each; greedy, then drawn with temperature 0.8, top-p 0.95, seed 0.

{continuations}
"""


def draw_loss(log: list[dict[str, str]], figure: Path) -> None:
    from matplotlib.figure import Figure

    tokens = [int(row["tokens"]) / 1e6 for row in log]
    held_out = [(int(row["tokens"]) / 1e6, float(row["evaluation_bits_per_byte"])) for row in log
                if row["evaluation_bits_per_byte"]]  # fmt: skip
    with plots.style():
        drawn = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = drawn.subplots()
        axes.plot(tokens, [float(row["loss"]) for row in log], color="#0b3c6f", label="training loss, nats a token")
        axes.plot(*zip(*held_out, strict=True), color="#f2a33a", marker=".", label="held-out text, bits a byte")
        axes.set(xlabel="Million tokens", ylim=(1, 7))
        drawn.legend(loc="outside lower center", ncols=2)
        figure.parent.mkdir(parents=True, exist_ok=True)
        plots.save(drawn, figure)


def continuations(gpt2: GPT2, max_new_tokens: int) -> str:
    lines = []
    for prompt in PROMPTS:
        lines.append(f"**{prompt}**\n")
        for name, sampling in (("greedy", Sampling()), ("sampled", Sampling(0.8, top_p=0.95, seed=0))):
            text = gpt2.text(list(gpt2.generate(prompt, max_new_tokens, sampling)))
            lines.append(f"- {name}: {json.dumps(prompt + text, ensure_ascii=False)}")
        lines.append("")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--corpus", type=click.Path(path_type=Path), default=Path("corpus"), show_default=True)
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/tiny"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("weights/tiny"), show_default=True)
@click.option("--manifest", type=click.Path(path_type=Path), default=Path("scripts/corpus_manifest.json"))
@click.option("--figure", type=click.Path(path_type=Path), default=Path("docs/figures/training.svg"))
@click.option("--max-new-tokens", default=30, show_default=True)
def main(corpus: Path, run: Path, checkpoint: Path, manifest: Path, figure: Path, max_new_tokens: int) -> None:
    for path in (run / "recipe.json", run / "encoded.npz", run / "log.csv", manifest):
        if not path.exists():
            raise TrainingError(f"{path} is missing: the card is written where the training ran")
    recipe = TrainingConfig(**json.loads((run / "recipe.json").read_text()))
    log = list(csv.DictReader((run / "log.csv").open()))
    with np.load(run / "encoded.npz") as arrays:
        data = Data(arrays["train"], arrays["evaluation"], int(arrays["evaluation_bytes"]))
    listed = json.loads(manifest.read_text())
    text = "\n\n".join(read_documents(corpus / "evaluation.txt")).encode()
    gpt2 = GPT2.from_pretrained(checkpoint)
    draw_loss(log, figure)
    packages = [package for package in listed["packages"] if package["bytes"]]
    held_out = bits_per_byte(disassemble(gpt2.model), data, gpt2.config)
    card = CARD.format(
        **dataclasses.asdict(recipe),
        parameters=sum(int(np.prod(shape)) for shape in parameter_shapes(gpt2.config).values()),
        head_dim=gpt2.config.head_dim,
        bits_per_byte=held_out,
        xz=8 * len(lzma.compress(text, preset=9)) / len(text),
        evaluation_documents=listed["splits"]["evaluation"]["documents"],
        evaluation_bytes=data.evaluation_bytes,
        half=gpt2.config.n_positions // 2,
        environment=environment("jax", "numpy"),
        steps=log[-1]["step"],
        decay_percent=100 * recipe.decay_fraction,
        tokens=int(log[-1]["tokens"]),
        train_tokens=len(data.train),
        hours=float(log[-1]["seconds"]) / 3600,
        package_count=len(packages),
        corpus_bytes=listed["totals"]["bytes_of_prose"],
        corpus_documents=listed["totals"]["documents"],
        packages="\n".join(f"| {p['name']} | {p['version']} | {p['licence']} | {p['bytes']:,} |" for p in packages),
        max_new_tokens=max_new_tokens,
        continuations=continuations(gpt2, max_new_tokens),
    )
    write_text_atomically(checkpoint / "README.md", card)
    write_atomically(checkpoint / "log.csv", lambda path: Path(path).write_bytes((run / "log.csv").read_bytes()))
    click.echo(f"held-out bits per byte: {held_out:.4f}")


if __name__ == "__main__":
    main()
