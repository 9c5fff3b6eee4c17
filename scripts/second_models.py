"""Trains two more small GPT-2s, unlike the bundled one in width, depth, vocabulary and text, in minutes each.

    python scripts/second_models.py --out runs/second            # both, or --only code

What is tuned on the bundled model may fit nothing else, so what methods do by default is developed on these too. Each
directory `OUT/NAME` is a checkpoint with `calibration.txt` and `eval.txt`, for --model, --calibration and --text. Their
text is what every machine with this project has: Python's standard library, and the descriptions of installed packages.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import click

import cut_passages
import train
from train import END_OF_TEXT
from weights.checkpoint import write_text_atomically

# Every head is 64 wide, as GPT-2's are.
MODELS = {
    "code": {"width": 320, "layers": 4, "heads": 5, "vocab-size": 2048, "context": 128},
    "packages": {"width": 192, "layers": 6, "heads": 3, "vocab-size": 1536, "context": 128},
}
SHARES = {"train": 0.8, "calibration": 0.1, "evaluation": 0.1}


def code() -> Iterator[str]:
    """The modules of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not {"test", "tests", "idlelib", "pydoc_data", "site-packages"} & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def packages() -> Iterator[str]:
    """The descriptions of installed packages, and Python's reference as its help has it."""
    yield from topics.topics.values()
    for package in sorted(importlib.metadata.distributions(), key=lambda each: each.metadata["Name"]):
        metadata: Any = package.metadata  # an email.message.Message
        yield metadata.get_payload() or package.metadata["Description"] or ""


def write_corpus(documents: Iterator[str], directory: Path) -> None:
    """Splits documents by their hashes, as `train.py` and `cut_passages.py` read them."""
    parts: dict[str, list[str]] = {name: [] for name in SHARES}
    for document in dict.fromkeys(text.strip() for text in documents):
        place = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) / 2**32
        for name, share in SHARES.items():
            if place < share:
                parts[name].append(document)
                break
            place -= share
    directory.mkdir(parents=True, exist_ok=True)
    for name, some in parts.items():
        text = f"\n{END_OF_TEXT}\n".join(filter(None, some)) + "\n"
        write_text_atomically(directory / f"{name}.txt", text)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/second"), show_default=True)
@click.option("--only", type=click.Choice(list(MODELS)), help="One of them.")
@click.option("--steps", default=400, show_default=True, help="Optimizer steps of 2,048 tokens.")
def main(out: Path, only: str | None, steps: int) -> None:
    for name, documents in (("code", code), ("packages", packages)):
        if only not in (None, name):
            continue
        corpus, run = out / f"{name}-corpus", out / f"{name}-run"
        write_corpus(documents(), corpus)
        shape = [part for option, value in MODELS[name].items() for part in (f"--{option}", str(value))]
        schedule = ["--steps", str(steps), "--batch-size", "16", "--save-every", str(steps), "--warmup-steps", "40"]
        places = ["--corpus", str(corpus), "--out", str(run), "--export", str(out / name)]
        train.main.main([*places, *shape, *schedule], standalone_mode=False)
        cut = ["--corpus", str(corpus), "--checkpoint", str(out / name), "--evaluation", "100", "--calibration", "300"]
        cut += ["--per-document", "8"]
        cut_passages.main.main(cut, standalone_mode=False)


if __name__ == "__main__":
    main()
