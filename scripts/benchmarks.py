"""Runs the benchmarks that docs/benchmarks.md names, and writes what they print into it.

    python scripts/benchmarks.py                      # all of them: hours, and nothing else should run meanwhile
    python scripts/benchmarks.py --only bench_sweep   # those whose command contains this
    python scripts/benchmarks.py --list

The page is the list: a command and what it printed stand between `<!-- COMMAND -->` and `<!-- end -->`. The shell runs
commands in the repository, one after the other. One that fails leaves what the page has, and the next ones run.
`$ZAMA` in one of them is an interpreter of an environment that has concrete-ml-extensions 0.2.0.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click

from jaxgpt2.progress import note
from weights.checkpoint import write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- (?P<command>(?!end)[^\n]+) -->\n(?P<output>.*?)<!-- end -->", re.DOTALL)


def formatted(command: str, output: str) -> str:
    """Tables are Markdown; anything else keeps its lines."""
    output = output.strip("\n")
    shown = output if "\n| --- " in output else f"```\n{output}\n```"
    return f"\n    {command}\n\n{shown}\n\n"


def replaced(page: str, command: str, output: str) -> str:
    def one(block: re.Match[str]) -> str:
        same = block["command"] == command
        return f"<!-- {command} -->\n{formatted(command, output)}<!-- end -->" if same else block[0]

    return BLOCK.sub(one, page)


@click.command(help=__doc__)
@click.option("--only", default="", metavar="TEXT", help="Commands that contain it.")
@click.option("--list", "listed", is_flag=True, help="Print the commands, and run none.")
@click.option("--page", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              default=ROOT / "docs" / "benchmarks.md")  # fmt: skip
def main(only: str, listed: bool, page: Path) -> None:
    commands = [block["command"] for block in BLOCK.finditer(page.read_text()) if only in block["command"]]
    if not commands:
        raise click.UsageError(f"{page} has no command with {only!r}; --list prints those it has")
    if listed:
        click.echo("\n".join(commands))
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    failed = []
    for command in commands:
        note(command)
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            failed.append(f"{command}: exit status {done.returncode}")
            continue
        write_text_atomically(page, replaced(page.read_text(), command, done.stdout))
    if failed:
        raise click.ClickException("; ".join(failed))


if __name__ == "__main__":
    main()
