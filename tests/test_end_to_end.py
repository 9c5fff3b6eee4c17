"""Text in, an attention head on real ciphertexts, text out."""

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

import helpers
from jaxgpt2.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    helpers.random_checkpoint(directory, n_embd=8, n_head=4)
    texts = ["ab", "cd", "th", "ea", "to", "of", "in", "we", "he", "it", "ox", "zz"]
    (directory / "calibration.txt").write_text("\n".join(texts) + "\n")
    return directory


@pytest.mark.slow
def test_ckks_generates_the_quantized_text_and_keeps_circuits_and_keys(tmp_path_factory, tmp_path):
    pytest.importorskip("tenseal", reason="the ckks extra is not installed")
    model = tmp_path_factory.mktemp("three-heads")
    helpers.random_checkpoint(model, n_embd=24, n_head=3)
    texts = ["the cat", "sat on", "a mat", "one dog", "ran after", "two", "it was", "not the", "zebras", "xylem"]
    (model / "calibration.txt").write_text("\n".join(texts) + "\n")
    common = ["--model", model, "--calibration", model / "calibration.txt", "--encrypt", "0.0,0.1", "--cache", tmp_path,
              "--backend", "ckks", "--json"]  # fmt: skip

    def run(*arguments: object) -> dict:
        result = CliRunner().invoke(main, [str(argument) for argument in [*arguments, *common]])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    continued = ["generate", "a", "--max-new-tokens", 3, "--mode"]
    quantized, encrypted = run(*continued, "quantized"), run(*continued, "encrypted")
    assert quantized["tokens"] == encrypted["tokens"]
    assert quantized["configs"]["0.1"]["attention"] == "polynomial"  # what fits the backend
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(list((tmp_path / "keys").glob("*.keys"))) == 2
    assert run(*continued, "encrypted")["tokens"] == encrypted["tokens"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == made

    result = run("compile", "--seq-len", 3, "--out", tmp_path / "out")
    assert result["backend"] == "ckks" and result["security_bits"] == 128
    assert result["estimated_run_seconds"] > 0 and "pbs_count" not in result
    assert {"projection", "scores", "exponential"} <= result["stages"].keys()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result


SMALL = ["--bits", 2, "--set", "score_rank=1", "--set", "value_rank=1", "--set", "training_steps=2"]


@pytest.mark.parametrize(
    ("method", "heads", "options"),
    [
        pytest.param("lowrank", "0.1,1.2", SMALL, marks=pytest.mark.slow),
        ("lowrank", "0.1", SMALL),
        pytest.param("softmax", "1.0", ["--bits", 2], marks=pytest.mark.slow),
    ],
)
def test_encrypted_text_is_the_quantized_text(model, tmp_path, method, heads, options):
    pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
    common = ["generate", "a", "--model", model, "--calibration", model / "calibration.txt", "--attention", method,
              "--encrypt", heads, *options, "--max-new-tokens", 2, "--p-error", 1e-6, "--rounding", "exact",
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
