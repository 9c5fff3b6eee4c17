"""Cuts the bundled passages out of the corpus: `eval.txt` and `calibration.txt` beside the checkpoint.

    python scripts/cut_passages.py --corpus corpus --checkpoint weights/tiny

One passage a document, from the documents that were held out of training: whole sentences from the beginning of a
paragraph, 8 to 40 tokens of the checkpoint's own tokenizer. The two files come from different documents.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import click
from tokenizers import Tokenizer

from train import TrainingError, read_documents
from weights.checkpoint import write_atomically

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
@click.option("--count", default=120, show_default=True, help="Passages a file.")
@click.option("--shortest", default=8, show_default=True, help="Tokens.")
@click.option("--longest", default=40, show_default=True, help="Tokens.")
def main(corpus: Path, checkpoint: Path, count: int, shortest: int, longest: int) -> None:
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        raise TrainingError(f"{path} is missing: train and export a checkpoint first")
    tokenizer = Tokenizer.from_file(str(path))
    for split, name in (("evaluation", "eval.txt"), ("calibration", "calibration.txt")):
        documents = read_documents(corpus / f"{split}.txt")
        random.Random(0).shuffle(documents)
        chosen = []
        for number, document in enumerate(documents):
            candidates = passages_of(document, tokenizer, shortest, longest)
            if candidates:
                chosen.append(random.Random(number).choice(candidates))
        if len(chosen) < count:
            raise TrainingError(f"{corpus / split}.txt gives {len(chosen)} passages only, wanted {count}")
        text = "\n".join(chosen[:count]) + "\n"
        write_atomically(checkpoint / name, lambda temporary, text=text: Path(temporary).write_text(text))
        click.echo(f"{checkpoint / name}: {count} passages")


if __name__ == "__main__":
    main()
