"""Builds the wheel, installs it in a fresh environment with one extra at a time, and uses what that extra is for.

    python scripts/check_wheel.py                # the core alone and every extra: half an hour
    python scripts/check_wheel.py core ckks      # some of them

Without any, every command that needs one must say which in one line, and end with status 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

REPOSITORY = Path(__file__).resolve().parents[1]

GENERATE = "generate 'Privacy is' --encrypt 0.1 --max-new-tokens 1"
CHEAP = "--attention lowrank --set training_steps=0 --set score_rank=4 --set value_rank=4"
HEAD = f"{GENERATE} {CHEAP} --mode"

# A command that needs nothing but this extra. {bundles}: a server and a client bundle that encrypt nothing.
USES = {
    "core": ["jaxgpt2 info", f"jaxgpt2 {HEAD} quantized", f"jaxgpt2 {HEAD} simulate --backend clear"],
    "fhe": [f"jaxgpt2 {HEAD} encrypted"],
    "ckks": [f"jaxgpt2 {GENERATE} --mode encrypted --backend ckks"],
    "linear": ["jaxgpt2 generate 'Privacy is' --encrypt linear --mode encrypted --max-new-tokens 1"],
    "sweep": ["jaxgpt2 sweep --layers 0 --heads 1 --bits 4 --attention softmax --limit 8 --out swept"],
    "server": ["jaxgpt2 token alice tokens"],
    "client": [
        "jaxgpt2 generate 'Privacy is' --max-new-tokens 1 --server {url} --client {bundles}/client "
        "--send-my-text-unencrypted"
    ],
    "page": ["jaxgpt2 page --help"],
    "cluster": [f"jaxgpt2 {HEAD} encrypted --backend clear --scheduler {{scheduler}}"],
    "train": ["python {repository}/scripts/train.py --help", "python {repository}/scripts/build_corpus.py --help"],
    "docs": ["mkdocs build --quiet --strict --config-file {repository}/mkdocs.yml --site-dir site"],
}  # fmt: skip

# What says that an extra is missing.
LACKS = {
    "fhe": f"jaxgpt2 {HEAD} encrypted",
    "ckks": f"jaxgpt2 {GENERATE} --mode encrypted --backend ckks",
    "linear": "jaxgpt2 generate 'Privacy is' --encrypt linear --mode encrypted --max-new-tokens 1",
    "sweep": "jaxgpt2 sweep --layers 0 --heads 1 --bits 4 --attention softmax --limit 8 --out lacking",
    "server": "jaxgpt2 serve {bundles}/server",
    "client": "jaxgpt2 generate 'Privacy is' --server http://127.0.0.1:1 --client {bundles}/client",
    "page": "jaxgpt2 page",
    "cluster": f"jaxgpt2 {HEAD} encrypted --backend clear --scheduler tcp://127.0.0.1:1",
}


def build_wheel(directory: Path) -> Path:
    """The wheel of this repository, built from a copy of what git tracks, so that no old build gets in."""
    source = directory / "source"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=REPOSITORY, check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, source], check=True
    )
    return next(directory.glob("*.whl"))


def install(wheel: Path, extra: str, directory: Path) -> Path:
    """A fresh environment with the wheel and one extra (`core`: none); returns where its programs are."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    wanted = str(wheel) if extra == "core" else f"{wheel}[{extra}]"
    constraints = REPOSITORY / "constraints.txt"
    pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", constraints, wanted]
    subprocess.run(pip, check=True, env=apart(directory))  # PYTHONPATH would make pip find what is not installed
    return directory / "bin"


def apart(own: Path) -> dict[str, str]:
    """Environment variables with nothing of the repository on the path, and the user's directories in `own`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {f"XDG_{kind}_HOME": str(own / kind.lower()) for kind in ("CACHE", "DATA", "STATE")}


def run(programs: Path, command: str, own: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of an environment, in the directory `own`."""
    name, *arguments = shlex.split(command)
    return subprocess.run([programs / name, *arguments], cwd=own, env=apart(own), text=True, capture_output=True)


@contextlib.contextmanager
def waiting_for(command: list[str | Path], word: str, own: Path, cwd: Path) -> Iterator[str]:
    """A process, stopped at the end: the first line with the word that it writes."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **pipes, text=True, cwd=cwd, env=apart(own))
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if word in line:
                break
        else:
            raise click.ClickException(f"{command[0]} did not start: {''.join(lines)}")
        yield lines[-1]
    finally:
        process.terminate()
        process.communicate()


CLUSTER = """
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=None)
    print("scheduler", cluster.scheduler_address, flush=True)
    input()
"""


@contextlib.contextmanager
def services(extra: str, programs: Path, bundles: Path, own: Path) -> Iterator[dict[str, str]]:
    """What an extra's commands talk to. The server for `client` is the repository's, as that extra has none."""
    served = ["serve", bundles / "server", "--port", "0", "--state", own / "served"]
    if extra == "client":
        with waiting_for([sys.executable, "-m", "jaxgpt2.cli", *served], '"listening"', own, REPOSITORY) as line:
            yield {"url": json.loads(line)["url"]}
    elif extra == "server":
        with waiting_for([programs / "jaxgpt2", *served], '"listening"', own, own):
            yield {}
    elif extra == "cluster":
        (own / "cluster.py").write_text(CLUSTER)
        with waiting_for([programs / "python", "cluster.py"], "scheduler tcp", own, own) as line:
            yield {"scheduler": line.split()[1]}
    else:
        yield {}


def check(extra: str, wheel: Path, bundles: Path, directory: Path) -> list[str]:
    """What does not work with this extra alone, in words."""
    own = directory / f"used-{extra}"
    own.mkdir()
    programs = install(wheel, extra, directory / extra)
    wrong: list[str] = []
    with services(extra, programs, bundles, own) as found:
        names = {"bundles": str(bundles), "repository": str(REPOSITORY), **found}
        for command in USES[extra]:
            done = run(programs, command.format(**names), own)
            if done.returncode:
                wrong.append(f"{extra}: {command} ends with {done.returncode}: {done.stderr[-1000:]}")
        for other, command in LACKS.items() if extra == "core" else ():
            done = run(programs, command.format(**names), own)
            last = done.stderr.strip().rpartition("\n")[2]
            if done.returncode != 2 or f"jaxgpt2[{other}]" not in last or "Traceback" in done.stderr:
                wrong.append(f"without {other}, {command} ends with {done.returncode}: {done.stderr[-1000:]}")
    return wrong


@click.command(help=__doc__)
@click.argument("extras", nargs=-1, type=click.Choice(list(USES)))
def main(extras: tuple[str, ...]) -> None:
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if unchecked := set(known) - set(USES) - {"dev"}:
        raise click.ClickException(f"no command is known that uses {', '.join(sorted(unchecked))}: add one to USES")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        wheel = build_wheel(directory)
        bundles = directory / "bundles"
        compile_clear = ["compile", *CHEAP.split(), "--encrypt", "0.1", "--backend", "clear", "--seq-len", "4"]
        compile_clear += ["--out", str(bundles)]
        subprocess.run([sys.executable, "-m", "jaxgpt2.cli", *compile_clear], check=True, capture_output=True)
        for extra in extras or USES:
            found = check(extra, wheel, bundles, directory)
            click.echo("\n\n".join([f"{extra:8} {'wrong' if found else 'works'}", *found]))
            wrong += found
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
