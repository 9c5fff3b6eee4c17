"""The whole model private: a server computes every linear layer on numbers that are random to it.

    python examples/private_model.py              # a minute or two; needs the extras linear, server and client

The commands are those that two people would type on two machines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

JAXGPT2 = [sys.executable, "-m", "jaxgpt2.cli"]


def run(*arguments: object) -> None:
    """Runs a command as it would be typed, and shows it."""
    click.echo(f"$ jaxgpt2 {' '.join(map(str, arguments))}")
    subprocess.run([*JAXGPT2, *map(str, arguments)], check=True)
    click.echo()


@click.command(help=__doc__)
@click.option("--prompt", default="If you want to keep a secret,", show_default=True)
@click.option("--new-tokens", default=24, show_default=True)
def main(prompt: str, new_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        bundles, masks = Path(directory, "bundles"), Path(directory, "masks")
        # The owner of the matrices: a bundle for the server, and one without a single matrix for clients.
        run("compile", "--encrypt", "linear", "--out", bundles)
        command = [*JAXGPT2, "serve", bundles / "server", "--port", "0", "--state", Path(directory, "state")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                listening = next(line for line in server.stderr if '"listening"' in line)
                client = ("--server", json.loads(listening)["url"], "--client", bundles / "client", "--masks", masks)
                # The user, ahead of time: random masks, multiplied under encryption.
                run("prepare", *client, "--tokens", 2048)
                # The user, now: a mask on every number that leaves the machine. Each mask is used once.
                run("generate", prompt, *client, "--max-new-tokens", new_tokens)
            finally:
                server.terminate()
        run("generate", prompt, "--encrypt", "linear", "--mode", "quantized", "--max-new-tokens", new_tokens)
        click.echo("The last text was computed without encryption, in the same integers: it is the same.")


if __name__ == "__main__":
    main()
