"""Writes what the software computes today, so that a restructuring can be held to it.

    python scripts/freeze.py before.json
    python scripts/freeze.py after.json --against before.json

Integers and counts must be equal, floats to 1e-5. It takes about four minutes on two cores.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from click.testing import CliRunner

import fhe
from jaxgpt2.cli import main
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import parse_modules, read_configs
from weights.checkpoint import TINY

# Sections and keys of the file keep their names, so that files of all versions can be compared.
HEADS = ("0.1", "0.2", "1.3", "2.3")
METHODS = {"softmax": ("--bits", "6"), "lowrank": (), "polynomial": ()}
EVAL = ("kl", "kl_ablated", "head_error", "top_k", "top_k_ablated", "positions", "recovered_kl")
TOLERANCE = 1e-5


def command(*arguments: str) -> dict[str, Any]:
    """A command's JSON."""
    result = CliRunner().invoke(main, [*arguments, "--json"])
    if result.exit_code:
        raise click.ClickException(f"{' '.join(arguments)}: {result.stderr}")
    return json.loads(result.stdout)


def picked(result: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: result[name] for name in names if name in result}


def evaluations() -> dict[str, Any]:
    return {
        f"{method} {head}": picked(
            command("eval", "--encrypt", head, "--attention", method, *more, "--limit", "24"), *EVAL
        )
        for method, more in METHODS.items()
        for head in HEADS
    } | {
        "softmax block": picked(
            command("eval", "--encrypt", "1.attn", "--attention", "softmax", "--bits", "6", "--limit", "8"), *EVAL
        )
    }


def costs(cache: str) -> dict[str, Any]:
    cases: dict[str, tuple[str, ...]] = {
        f"lowrank {head}": ("--encrypt", head, "--attention", "lowrank") for head in HEADS[:2]
    }
    cases |= {f"recipe {head}": ("--encrypt", head) for head in HEADS}
    cases["softmax 0.1"] = ("--encrypt", "0.1", "--attention", "softmax", "--backend", "clear")
    cases["polynomial 0.1"] = ("--encrypt", "0.1", "--attention", "polynomial", "--seq-len", "12")
    return {
        name: picked(
            command("compile", *arguments, "--cache", cache),
            "pbs_count", "pbs_by_stage", "complexity", "max_bit_width", "max_integer_bits", "stages", "levels",
            "input_ciphertext_bytes", "output_ciphertext_bytes", "modulus_bits", "scale_bits", "rotation_keys",
        )
        for name, arguments in cases.items()
    }  # fmt: skip


def texts(cache: str) -> dict[str, Any]:
    prompts = ("Privacy is", "If you want to keep a secret,", "The")
    cases = {
        "float": (), "quantized": ("--mode", "quantized", "--encrypt", "0.1"),
        "two heads": ("--mode", "quantized", "--encrypt", "0.1,2.3"),
        "softmax": ("--mode", "quantized", "--encrypt", "0.1", "--attention", "softmax", "--bits", "6"),
        "block": ("--mode", "quantized", "--encrypt", "1.attn", "--attention", "softmax", "--bits", "6"),
        "polynomial": ("--mode", "quantized", "--encrypt", "0.1", "--attention", "polynomial"),
        "simulated polynomial": ("--mode", "simulate", "--encrypt", "0.1", "--attention", "polynomial"),
        "encrypted polynomial": ("--mode", "encrypted", "--encrypt", "0.1", "--attention", "polynomial"),
    }  # fmt: skip
    return {
        f"{name}: {prompt}": command(
            "generate", prompt, *arguments, "--max-new-tokens", "8", *(("--cache", cache) if arguments else ())
        )["tokens"]
        for name, arguments in cases.items()
        for prompt in prompts[: 1 if "encrypted" in name else None]
    }


def sweep_rows() -> list[Any]:
    import pandas as pd

    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "sweep")
        command("sweep", "--layers", "0,2", "--heads", "0-1", "--bits", "3-4", "--attention",
                "softmax,lowrank,polynomial", "--limit", "10", "--out", out)  # fmt: skip
        frame = pd.read_csv(Path(out) / "rows.csv")
    return json.loads(
        frame.drop(columns=["estimated_seconds", "estimated_seconds_per_token"]).to_json(orient="values") or ""
    )


def decrypted() -> dict[str, Any]:
    """Two tokens of a head, with exact rounding and rare errors: what every set of keys gives."""
    gpt2 = GPT2.from_pretrained("tiny")
    (module,) = parse_modules("0.1", gpt2.config)
    encrypted = EncryptedGPT2(gpt2, {module: read_configs(TINY / "configs.json", gpt2.config)[module]})
    passages = bundled_passages("calibration")
    encrypted = encrypted.calibrate(passages, 3).compile(passages, 3, fhe.FHEConfig(1e-7, "exact"))
    circuit = encrypted.circuits[module]
    keys = circuit.make_keys(seed=7)
    rng = np.random.default_rng(0)
    rows = rng.integers(-20, 21, (2, 1, gpt2.config.n_embd))
    own = [circuit.run("project", circuit.encrypt(keys, "project", row), keys.evaluation) for row in rows]
    results = circuit.run("attend_2", [*own[1][:2], *own[0][2:], *own[1][2:]], keys.evaluation)
    found = circuit.decrypt(keys, "attend_2", results)
    return {"attend_2": [part.tolist() for part in found]}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        lost = [f"{path}.{key}: only in one" for key in a.keys() ^ b.keys()]
        return lost + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        close = math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (math.isnan(a) and math.isnan(b))
        return [] if close else [f"{path}: {a!r} and {b!r}"]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="An earlier file to compare with.")
def freeze(out: Path, against: Path | None) -> None:
    with tempfile.TemporaryDirectory() as cache:
        found = {
            "eval": evaluations(),
            "costs": costs(cache),
            "texts": texts(cache),
            "sweep": sweep_rows(),
            "decrypted": decrypted(),
        }
    jax.clear_caches()
    out.write_text(json.dumps(found, indent=1) + "\n")
    if against is not None:
        lines = differences(json.loads(against.read_text()), json.loads(out.read_text()))
        for line in lines:
            click.echo(line)
        click.echo(f"{len(lines)} differences from {against}")
        raise SystemExit(bool(lines))


if __name__ == "__main__":
    freeze()
