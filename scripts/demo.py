"""Continues a prompt twice, in float and with one attention head computed on ciphertexts, and says what it cost.

    python scripts/demo.py "Privacy is"

This is what `make demo` runs. `jaxgpt2 generate --mode encrypted` does the same with every setting free.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import platformdirs

import fhe
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.errors import InputError
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import parse_modules, read_configs
from jaxgpt2.progress import note, seconds, step
from weights.checkpoint import TINY

# Compiled circuits and keys are kept here, as the command line does.
CACHE = Path(platformdirs.user_cache_dir("jaxgpt2"))

HEAD = "0.1"  # the one that the bundled model would miss most


@click.command(help=__doc__)
@click.argument("prompt")
@click.option("--new-tokens", default=8, show_default=True, help="How many tokens to compute encrypted.")
def demo(prompt: str, new_tokens: int) -> None:
    with step("loading the model"):
        gpt2 = GPT2.from_pretrained("tiny")
        (module,) = parse_modules(HEAD, gpt2.config)
        model = EncryptedGPT2(gpt2, {module: read_configs(TINY / "configs.json", gpt2.config)[module]})
    passages = bundled_passages("calibration")
    length = len(gpt2.encode(prompt, room=new_tokens)) + new_tokens - 1
    with step("calibrating head 0.1"):
        model = model.calibrate(passages, length)
    with step(f"compiling {HEAD} for {length} tokens"):
        model = model.compile(passages, length, cache=CACHE / "circuits")
    with step("making keys (kept for the next run)"):
        keys = model.make_keys(CACHE / "keys")
    cost = model.costs(length)[module]
    note(f"{cost.describe()}: about {seconds(cost.estimated_run_seconds)} ({cost.machine}; yours will differ)")

    in_float = list(model.generate(prompt, new_tokens, "float"))
    quantized = list(model.generate(prompt, new_tokens, "quantized"))
    click.echo(f"\nfloat      {prompt}{gpt2.text(in_float)}")
    click.echo(f"encrypted  {prompt}", nl=False)
    started, stream = time.monotonic(), gpt2.stream()
    encrypted, times = [], []
    for token in model.generate(prompt, new_tokens, "encrypted", keys=keys):
        encrypted.append(token)
        times.append(time.monotonic() - started)
        click.echo(stream(token), nl=False)
    click.echo("\n")
    report = model.circuits[module].report
    click.echo(f"Head {HEAD} read {length} tokens as ciphertexts, one after the other, in {seconds(times[-1])}.")
    click.echo(cost.describe() + ".")
    sent, received = cost.input_ciphertext_bytes / 1e6, cost.output_ciphertext_bytes / 1e6
    click.echo(
        f"{sent:.2f} MB of ciphertexts in, {received:.2f} MB out; evaluation keys once, "
        f"{report.evaluation_key_bytes / 1e6:,.0f} MB, kept in {CACHE}."
    )
    measured = json.loads((TINY / "configs.json").read_text())["heads"][HEAD]["measured"]
    click.echo(
        f"On the evaluation text the quantized head recovers {measured['recovered_kl']:.1%} of what the model would "
        f"lose without it, and agrees with the float model on {measured['top_1']:.1%} of tokens."
    )
    if encrypted != quantized:
        note("The encrypted text differs from the quantized one: rounding is approximate, and lookups may go wrong.")


if __name__ == "__main__":
    try:
        demo()
    except (InputError, fhe.FHEError) as error:
        click.echo(f"demo: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
