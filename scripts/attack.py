"""Attacks what an attacker reaches from outside, for longer than the tests do, and says what happened.

    python scripts/attack.py commands --count 2000     command lines, drawn from a grammar
    python scripts/attack.py answers --count 2000      a server in the middle that changes answers
    python scripts/attack.py ciphertexts --count 2000  damaged results of both engines, in envelopes that are right
    python scripts/attack.py parsers --count 1000      readers of bytes, as many for each; guided by coverage with
                                                       `--guided`, which needs `pip install atheris`

Every input is drawn anew. The exit status is 1 if something happened that should not. `docs/security.md` has figures.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


# What became of an input, in a word, and what was wrong with that, if anything.
Outcome = tuple[str, str | None]


def attack(title: str, inputs: st.SearchStrategy[Any], outcome: Callable[[Any], Outcome], count: int) -> bool:
    """Tries so many inputs and prints what became of them; whether all was well."""
    outcomes: Counter[str] = Counter()
    wrong: dict[str, Any] = {}
    started = time.monotonic()

    @settings(
        max_examples=count, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list[Any](HealthCheck),
    )  # fmt: skip
    @given(inputs)
    def tried(drawn: Any) -> None:
        word, problem = outcome(drawn)
        outcomes[word if problem is None else "WRONG"] += 1
        if problem is not None and problem not in wrong:
            wrong[problem] = drawn
            click.echo(f"  WRONG: {problem}\n    {drawn!r:.300}")

    tried()
    told = ", ".join(f"{number:,} {word}" for word, number in outcomes.most_common())
    day = datetime.datetime.now(datetime.UTC).date()
    click.echo(f"{day} {title}: {sum(outcomes.values()):,} inputs in {time.monotonic() - started:.0f} s: {told}")
    return not wrong


@contextlib.contextmanager
def small_model() -> Iterator[tuple[Path, Path]]:
    """A directory, and in it a random model of two layers."""
    from helpers import random_checkpoint

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "small").mkdir()
        random_checkpoint(Path(name) / "small")
        yield Path(name), Path(name) / "small"


count_option = click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="Inputs to try.")


@click.group()
def main() -> None:
    """Attack what an attacker reaches from outside."""


@main.command()
@count_option
def commands(count: int) -> None:
    """Command lines."""
    import commands as grammar

    def outcome(line: list[str]) -> tuple[str, str | None]:
        found = grammar.run(line)
        return {0: "done", 2: "refused"}.get(found.status, "other"), grammar.problem(found)

    with small_model() as (directory, model), contextlib.chdir(directory):
        grammar.make_place(directory, model)
        with grammar.contained(directory, model):
            fine = attack("command lines", grammar.lines(), outcome, count)
    sys.exit(not fine)


@main.command()
@count_option
def answers(count: int) -> None:
    """A server in the middle."""
    import tampering
    from jaxgpt2.linear import LinearGPT2
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from linears import PASSAGES

    with small_model() as (_, model):
        linear = LinearGPT2.quantize(GPT2.from_pretrained(model), PASSAGES)
    fine = attack("answers of circuits", tampering.changes(), tampering.outcome_of_circuits, count)
    of_linear_layers = functools.partial(tampering.outcome_of_linear_layers, linear)
    fine &= attack("answers of linear layers", tampering.changes(), of_linear_layers, count)
    sys.exit(not fine)


@main.command()
@count_option
def ciphertexts(count: int) -> None:
    """Results of both engines."""
    import parsers
    import tampering

    fine = True
    for backend in ("concrete", "ckks"):
        results = tampering.Results.of(backend)
        fine &= attack(f"results of {backend}", parsers.edits(), results.outcome, count)
    sys.exit(not fine)


@main.command()
@count_option
@click.option("--guided", is_flag=True, help="By coverage, with atheris.")
def parsers(count: int, guided: bool) -> None:
    """Readers of bytes."""
    fine = True
    with small_model() as (directory, model), contextlib.chdir(directory):
        known = _known_parsers(directory, model, guided)
        for name, parser in known.items():
            import parsers as readers

            def outcome(edits: Any, parser: Any = parser) -> tuple[str, str | None]:
                return readers.outcome(parser, readers.damaged(parser.sample, edits))

            if guided:
                fine &= _guided(name, parser, directory, count)
            else:
                fine &= attack(name, readers.edits(), outcome, count)
    sys.exit(not fine)


def _known_parsers(directory: Path, model: Path, guided: bool) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if guided:
            import atheris  # pyright: ignore

            stack.enter_context(atheris.instrument_imports(include=["fhe", "jaxgpt2", "weights"]))  # pyright: ignore
        import parsers as readers
        from jaxgpt2.linear import LinearGPT2
        from jaxgpt2.models.gpt2.pretrained import GPT2
        from linears import PASSAGES

        linear = LinearGPT2.quantize(GPT2.from_pretrained(model), PASSAGES)
        (directory / "parsers").mkdir()
        return readers.parsers(directory / "parsers", linear, model)


def _guided(name: str, parser: Any, directory: Path, count: int) -> bool:
    """atheris ends its process, so it gets one of its own."""
    import atheris  # pyright: ignore

    import parsers as readers

    corpus = directory / "corpus" / name
    corpus.mkdir(parents=True)
    (corpus / "sample").write_bytes(parser.sample)
    started = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:

        def once(data: bytes) -> None:
            if (problem := readers.problem(parser, data)) is not None:
                raise AssertionError(f"{name}: {problem}: {data[:300]!r}")

        options = [f"-runs={count}", "-verbosity=0", f"-max_len={2 * len(parser.sample) + 1000}", str(corpus)]
        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()
    _, status = os.waitpid(child, 0)
    fine = os.waitstatus_to_exitcode(status) == 0
    day = datetime.datetime.now(datetime.UTC).date()
    said = "well" if fine else "WRONG"
    click.echo(f"{day} {name}, guided: {count:,} inputs in {time.monotonic() - started:.0f} s: {said}")
    return fine


if __name__ == "__main__":
    main()
