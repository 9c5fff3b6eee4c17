"""Text in, an attention head on real ciphertexts, text out."""

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

import helpers
from jaxgpt2.cli import main

pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    helpers.random_checkpoint(directory, n_embd=8, n_head=4)
    texts = ["ab", "cd", "th", "ea", "to", "of", "in", "we", "he", "it", "ox", "zz"]
    (directory / "calibration.txt").write_text("\n".join(texts) + "\n")
    return directory


@pytest.mark.parametrize(("formula", "heads"), [("lowrank", "0.1,1.2"), ("softmax", "1.0")])
def test_encrypted_text_is_the_quantized_text(model, tmp_path, formula, heads):
    common = ["generate", "a", "--model", model, "--calibration", model / "calibration.txt", "--attention", formula,
              "--head", heads, "--bits", 3, "--max-new-tokens", 2, "--p-error", 1e-7, "--rounding", "exact",
              "--cache", tmp_path, "--json"]  # fmt: skip

    def run(*arguments: object) -> dict:
        result = CliRunner().invoke(main, [str(argument) for argument in [*common, *arguments]])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    quantized = run("--mode", "quantized")
    simulated = run("--mode", "simulate")
    encrypted = run("--mode", "encrypted")
    assert quantized["tokens"] == simulated["tokens"] == encrypted["tokens"]
    assert all(report["pbs_count"] > 0 for report in encrypted["reports"].values())

    keys = sorted((tmp_path / "keys").glob("*.keys"))
    assert len(keys) == len(heads.split(","))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in keys)
    made = [path.stat().st_mtime_ns for path in keys]
    assert run("--mode", "encrypted")["tokens"] == encrypted["tokens"]  # nothing is compiled or made again
    assert [path.stat().st_mtime_ns for path in keys] == made
