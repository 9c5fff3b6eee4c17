"""One attention head on ciphertexts, step by step: what the client does, what the server does, what each of them has.

python examples/encrypted_head.py             # half a minute; needs the extra ckks
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click

from jaxgpt2 import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.executors import LocalExecutor


@click.command(help=__doc__)
@click.option("--prompt", default="Privacy is", show_default=True)
@click.option("--new-tokens", default=3, show_default=True)
def main(prompt: str, new_tokens: int) -> None:
    model = EncryptedGPT2.from_pretrained("tiny", modules="0.1", method="polynomial")
    (head,) = model.modules
    length = len(model.model.encode(prompt)) + new_tokens - 1

    # The owner of the weights: attention of operations that an engine has, and a circuit of it.
    passages = bundled_passages("calibration")
    model = model.calibrate(passages, length).compile(passages, length, backend="ckks")
    circuit = model.circuits[head]
    click.echo(f"head {head}: {model.costs(length)[head].describe()}, for {length} tokens")

    # The client: keys. Only the evaluation keys leave it.
    keys = circuit.make_keys()
    click.echo(f"evaluation keys, for the server: {len(keys.evaluation) / 1e6:.0f} MB")

    class Watched(LocalExecutor):
        """An executor that says what would cross the wire."""

        def run(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
            started = time.monotonic()
            results = super().run(name, arrays)
            click.echo(f"  server: {name} on {sum(map(len, arrays)) / 1e6:.2f} MB of ciphertexts, "
                       f"{time.monotonic() - started:.2f} s")  # fmt: skip
            return results

    # A token at a time: the client reads the text up to the head, the server computes the head, the client goes on.
    runner = model.run_by({head: Watched(circuit, keys)})
    tokens = []
    for token in model.continue_text(prompt, new_tokens, runner):
        tokens.append(token)
        click.echo(f"client: {prompt}{model.model.text(tokens)}")

    assert tokens == list(model.generate(prompt, new_tokens, "quantized")), "encryption changed the text"
    click.echo("The same tokens as without encryption.")


if __name__ == "__main__":
    main()
