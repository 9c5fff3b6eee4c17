"""Continues a prompt twice, in float and with one attention head computed on ciphertexts, and says what it cost.

    python scripts/demo.py "Cryptography is a"

This is what `make demo` runs. `jaxgpt2 generate --mode encrypted` does the same with every setting free.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import platformdirs

import fhe
from jaxgpt2.cli import announce_run, calibration_passages
from jaxgpt2.hybrid import HybridGPT2
from jaxgpt2.progress import note, seconds, step

CACHE = Path(platformdirs.user_cache_dir("jaxgpt2"))


@click.command(help=__doc__)
@click.argument("prompt", default="Cryptography is a")
@click.option("--head", default="0.1", show_default=True)
@click.option("--bits", default=3, show_default=True)
@click.option("--new-tokens", default=1, show_default=True, help="How many tokens to compute encrypted.")
@click.option("--p-error", default=1e-4, show_default=True)
def main(prompt: str, head: str, bits: int, new_tokens: int, p_error: float) -> None:
    with step("loading the model"):
        hybrid = HybridGPT2.from_pretrained("tiny", head, bits)
    gpt2 = hybrid.gpt2
    seq_len = len(gpt2.encode(prompt, room=new_tokens)) + new_tokens - 1
    passages = calibration_passages(None)
    with step("calibrating"):
        hybrid = hybrid.calibrate(passages, seq_len)
    with step(f"compiling head {head} for {seq_len} tokens"):
        hybrid = hybrid.compile(passages, seq_len, fhe.Settings(p_error, "none"), "concrete", CACHE / "circuits")
    with step("making keys (kept for the next run)"):
        keys = hybrid.make_keys(CACHE / "keys")
    announce_run(hybrid, new_tokens)

    click.echo(f"\nfloat      {prompt}{gpt2.text(list(hybrid.generate(prompt, new_tokens, 'float')))}")
    quantized = list(hybrid.generate(prompt, new_tokens, "quantized"))
    click.echo(f"quantized  {prompt}{gpt2.text(quantized)}")
    started = time.monotonic()
    with step(f"computing head {head} on ciphertexts"):
        encrypted = list(hybrid.generate(prompt, new_tokens, "encrypted", keys=keys))
    took = time.monotonic() - started
    click.echo(f"encrypted  {prompt}{gpt2.text(encrypted)}\n")
    (report,) = (circuit.report for circuit in hybrid.circuits.values())
    click.echo(f"head {head}, {bits} bits, {seq_len} tokens: {seconds(took / new_tokens)} a token on ciphertexts")
    click.echo(f"{report.pbs_count:,} lookups of up to {report.max_bit_width} bits, error {report.p_error:g} each")
    click.echo(
        f"{report.input_ciphertext_bytes / 1e6:.2f} MB of ciphertexts in, {report.output_ciphertext_bytes / 1e6:.2f} MB "
        f"out, {report.evaluation_key_bytes / 1e6:.0f} MB of evaluation keys once"
    )
    if encrypted != quantized:
        note("the encrypted text differs from the quantized one: a lookup went wrong, as p_error allows")


if __name__ == "__main__":
    main()
