"""Continues a prompt privately, twice: with every linear layer on a server that sees masked numbers only, and with one
attention head computed on ciphertexts.

    python scripts/demo.py "If you want to keep a secret,"

This is what `make demo` runs. `jaxgpt2 generate` does both with every setting free.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import platformdirs

from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.executors.processes import cores
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import parse_modules, read_configs
from jaxgpt2.progress import counting, megabytes, note, seconds, step
from jaxgpt2.serving.linear_bundle import write_bundles
from jaxgpt2.serving.masked import Masked, in_processes, masked_text, prepare, store_for
from jaxgpt2.serving.remote import Connection, RemoteOwner
from weights.checkpoint import TINY

HEAD = "0.1"  # the one that the bundled model would miss most


@contextlib.contextmanager
def server(bundle: Path, state: Path) -> Iterator[str]:
    """A server process on a free port of this machine: its address."""
    command = [sys.executable, "-m", "jaxgpt2.cli", "serve", str(bundle), "--port", "0", "--state", str(state)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if '"listening"' in line:
                break
        else:
            raise click.ClickException(f"the server did not start: {''.join(lines)}")
        yield json.loads(lines[-1])["url"]
    finally:
        process.terminate()
        process.wait()


def owner_at(url: str, shapes: dict[str, tuple[int, int]]) -> RemoteOwner:
    return RemoteOwner(Connection(url), shapes)


def whole_model(gpt2: GPT2, prompt: str, new_tokens: int) -> None:
    """Every linear layer of every block computed by a server process."""
    click.echo("The whole model, private: a server computes every linear layer and sees random numbers only.\n")
    with step("quantizing the linear layers"):
        model = LinearGPT2.quantize(gpt2, bundled_passages("calibration"))
    client = model.client
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_bundles(model, path / "bundles", {})
        with server(path / "bundles" / "server", path / "state") as url:
            owner = owner_at(url, client.shapes)
            store = store_for(client, path / "masks", path / "ledgers")
            started, done = time.monotonic(), 0.0
            with counting("masks made ahead", 2048) as progress:

                def tell(more: float) -> None:
                    nonlocal done
                    progress(int(done + more) - int(done))
                    done += more

                with in_processes(functools.partial(owner_at, url, client.shapes), cores()) as make:
                    prepare(client, store, make, 1, tell)
            ahead = time.monotonic() - started
            in_float = list(gpt2.generate(prompt, new_tokens))
            for _ in range(2):  # the first text compiles
                needed = client.masks_needed(prompt, new_tokens)
                masked = Masked(client, owner, store.claim(needed))
                sent, received = owner.connection.traffic.sent, owner.connection.traffic.received
                started = time.monotonic()
                private = list(masked_text(client.generate(prompt, new_tokens, masked), masked))
                took = time.monotonic() - started
            traffic = owner.connection.traffic
            click.echo(f"float      {prompt}{gpt2.text(in_float)}")
            click.echo(f"private    {prompt}{client.text(private)}\n")
            click.echo(
                f"{'Equal' if private == in_float else 'Not equal'}; {len(private) / took:.0f} tokens a second, "
                f"{megabytes((traffic.sent - sent) / len(private))} up and "
                f"{megabytes((traffic.received - received) / len(private))} down a token. "
                f"Ahead: 2,048 masks in {seconds(ahead)}; the text took {needed}.\n"
            )
            owner.connection.close()
            store.close()


def encrypted_head(gpt2: GPT2, prompt: str, new_tokens: int) -> None:
    """One head on ciphertexts, in this process."""
    click.echo(f"Head {HEAD} on ciphertexts, its softmax included.\n")
    (module,) = parse_modules(HEAD, gpt2.config)
    encrypted = EncryptedGPT2(gpt2, {module: read_configs(TINY / "configs.json", gpt2.config)[module]})
    passages = bundled_passages("calibration")
    length = len(gpt2.encode(prompt, room=new_tokens)) + new_tokens - 1
    cache = Path(platformdirs.user_cache_dir("jaxgpt2"))
    with step(f"calibrating head {HEAD}"):
        encrypted = encrypted.calibrate(passages, length)
    with step(f"compiling it for {length} tokens"):
        encrypted = encrypted.compile(passages, length, cache=cache / "circuits")
    with step("making keys (kept for the next run)"):
        keys = encrypted.make_keys(cache / "keys")
    in_float = list(gpt2.generate(prompt, new_tokens))
    quantized = list(encrypted.generate(prompt, new_tokens, "quantized"))
    click.echo(f"float      {prompt}{gpt2.text(in_float)}")
    click.echo(f"encrypted  {prompt}", nl=False)
    started, stream = time.monotonic(), gpt2.stream()
    tokens = []
    for token in encrypted.generate(prompt, new_tokens, "encrypted", keys=keys):
        tokens.append(token)
        click.echo(stream(token), nl=False)
    took = time.monotonic() - started
    cost, report = encrypted.costs(length)[module], encrypted.circuits[module].report
    sent, received = cost.input_ciphertext_bytes, cost.output_ciphertext_bytes
    click.echo(
        f"\n\n{length} tokens in {seconds(took)}, {cost.describe()}; {megabytes(sent)} of ciphertexts in, "
        f"{megabytes(received)} out; evaluation keys once, {megabytes(report.evaluation_key_bytes)}."
    )
    if tokens != quantized:
        note("The encrypted text differs from the quantized one: rounding is approximate, and lookups may go wrong.")


@click.command(help=__doc__)
@click.argument("prompt")
@click.option("--new-tokens", default=28, show_default=True, help="Tokens of the private text.")
@click.option("--head-tokens", default=8, show_default=True, help="Tokens with the encrypted head.")
def demo(prompt: str, new_tokens: int, head_tokens: int) -> None:
    with step("loading the model"):
        gpt2 = GPT2.from_pretrained("tiny")
    whole_model(gpt2, prompt, new_tokens)
    encrypted_head(gpt2, prompt, head_tokens)


if __name__ == "__main__":
    demo()
