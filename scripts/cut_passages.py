"""Cuts the bundled passages out of the corpus: `eval.txt` and `calibration.txt` beside the checkpoint.

    python scripts/cut_passages.py --corpus corpus --checkpoint weights/tiny

Whole sentences from the beginning of a paragraph, 8 to 40 tokens of the checkpoint's own tokenizer, of documents that
were held out of training. For evaluation a document gives one passage, or up to `--per-document`; for calibration every
document gives one before any gives a second. The two files come from different documents.
"""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import click
from tokenizers import Tokenizer

from train import TrainingError, read_documents
from weights.checkpoint import write_text_atomically

SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")


def passages_of(document: str, tokenizer: Tokenizer, shortest: int, longest: int) -> list[str]:
    """For each paragraph the longest run of whole sentences from its beginning that fits, if one does."""
    found = []
    for paragraph in document.split("\n\n"):
        text, best = "", None
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            text = f"{text} {sentence}".strip()
            tokens = len(tokenizer.encode(text).ids)
            if tokens > longest:
                break
            if tokens >= shortest:
                best = text
        if best is not None:
            found.append(best)
    return found


@click.command(help=__doc__)
@click.option("--corpus", type=click.Path(path_type=Path), default=Path("corpus"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("weights/tiny"), show_default=True)
@click.option("--evaluation", default=120, show_default=True, help="Passages of the evaluation text.")
@click.option("--calibration", default=480, show_default=True, help="Passages of the calibration text.")
@click.option("--per-document", default=1, show_default=True, help="Evaluation passages of a document, at most.")
@click.option("--shortest", default=8, show_default=True, help="Tokens.")
@click.option("--longest", default=40, show_default=True, help="Tokens.")
def main(corpus: Path, checkpoint: Path, evaluation: int, calibration: int, per_document: int, shortest: int,
         longest: int) -> None:  # fmt: skip
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        raise TrainingError(f"{path} is missing: train and export a checkpoint first")
    tokenizer = Tokenizer.from_file(str(path))
    known: set[str] = set()
    for split, name, count in (("evaluation", "eval.txt", evaluation), ("calibration", "calibration.txt", calibration)):
        documents = read_documents(corpus / f"{split}.txt")
        random.Random(0).shuffle(documents)
        candidates = [passages_of(document, tokenizer, shortest, longest) for document in documents]
        for number, some in enumerate(candidates):
            if split == "calibration":
                random.Random(number).shuffle(some)
            elif some:
                draw = random.Random(number)
                some[:] = [draw.choice(some) for _ in range(per_document)]
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*candidates))
        chosen = [passage for passage in dict.fromkeys(rounds) if passage is not None and passage not in known][:count]
        if len(chosen) < count:
            raise TrainingError(f"{corpus / split}.txt gives {len(chosen)} passages only, wanted {count}")
        known.update(chosen)
        text = "\n".join(chosen) + "\n"
        write_text_atomically(checkpoint / name, text)
        click.echo(f"{checkpoint / name}: {count} passages")


if __name__ == "__main__":
    main()
