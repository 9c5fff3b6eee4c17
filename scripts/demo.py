"""Continues a prompt twice, in float and with one attention head computed on ciphertexts, and says what it cost.

    python scripts/demo.py "Privacy is"

This is what `make demo` runs. `jaxgpt2 generate --mode encrypted` does the same with every setting free.
"""

from __future__ import annotations

import time

import click

import fhe
from jaxgpt2.cli import announce_run, cache_directory, calibration_passages, compiled, make_keys, one_line_errors
from jaxgpt2.evaluation import evaluate, longest_passage, read_passages
from jaxgpt2.hybrid import HybridGPT2
from jaxgpt2.progress import note, seconds, step
from jaxgpt2.quantize import Bits
from weights.checkpoint import TINY

HEAD = "0.1"
BITS = Bits.of(4, lookup=6)


@click.command(help=__doc__)
@click.argument("prompt")
@click.option("--new-tokens", default=2, show_default=True, help="How many tokens to compute encrypted.")
def demo(prompt: str, new_tokens: int) -> None:
    with step("loading the model"):
        hybrid = HybridGPT2.from_pretrained("tiny", HEAD, BITS, "lowrank")
    gpt2, passages, evaluation = hybrid.gpt2, calibration_passages(None), read_passages(TINY / "eval.txt")
    seq_len = len(gpt2.encode(prompt, room=new_tokens)) + new_tokens - 1
    with step("measuring what quantization does to the head"):
        calibrated = hybrid.calibrate(passages, longest_passage(hybrid.gpt2, evaluation))
        measured = evaluate(calibrated, evaluation, calibrated.engine("quantized"))
    hybrid = hybrid.calibrate(passages, seq_len)
    hybrid = compiled(hybrid, passages, seq_len, fhe.Settings(1e-4, "exact"), "concrete", None)
    keys = make_keys(hybrid, None)
    announce_run(hybrid, new_tokens)

    in_float = list(hybrid.generate(prompt, new_tokens, "float"))
    quantized = list(hybrid.generate(prompt, new_tokens, "quantized"))
    click.echo(f"\nfloat      {prompt}{gpt2.text(in_float)}")
    click.echo(f"encrypted  {prompt}", nl=False)
    started, stream = time.monotonic(), gpt2.stream()
    encrypted = []
    for token in hybrid.generate(prompt, new_tokens, "encrypted", keys=keys):
        encrypted.append(token)
        click.echo(stream(token), nl=False)
    took = time.monotonic() - started
    click.echo("\n")
    (report,) = (circuit.report for circuit in hybrid.circuits.values())
    click.echo(f"Head {HEAD} read {seq_len} tokens as ciphertexts: {seconds(took / max(1, len(encrypted)))} a token.")
    click.echo(
        f"{report.pbs_count:,} lookups of up to {report.max_bit_width} bits, each wrong with p={report.p_error:g}."
    )
    click.echo(
        f"{report.input_ciphertext_bytes / 1e6:.2f} MB of ciphertexts in, "
        f"{report.output_ciphertext_bytes / 1e6:.2f} MB out; evaluation keys once, "
        f"{report.evaluation_key_bytes / 1e6:,.0f} MB, kept in {cache_directory(None)}."
    )
    click.echo(
        f"On {measured.passages} passages the quantized head agrees with the float model on {measured.top_k[1]:.1%} of "
        f"tokens ({measured.top_k_ablated[1]:.1%} without the head) and recovers {measured.recovered_kl:.1%} of its KL."
    )
    if encrypted != quantized:
        note("The encrypted text differs from the quantized one: a lookup went wrong, as p_error allows.")


if __name__ == "__main__":
    with one_line_errors():
        demo()
