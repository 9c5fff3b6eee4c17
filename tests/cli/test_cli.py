"""The command line as its users meet it: one JSON object, one clear line, exit status 2."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import helpers
from jaxgpt2.cli import main

CALIBRATION = ["the cat", "sat on", "a mat", "one dog", "ran after", "two", "it was", "not the", "zebras", "xylem"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    helpers.random_checkpoint(directory, n_embd=24, n_head=3)
    (directory / "calibration.txt").write_text("\n".join(CALIBRATION * 3) + "\n")
    (directory / "eval.txt").write_text("the dog\nit ran\na\n")
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def head(model: Path) -> list[object]:
    return ["--model", model, "--calibration", model / "calibration.txt"]


def test_generate_in_float_continues_the_prompt(model):
    result = run_json("generate", "the", "--model", model, "--max-new-tokens", 5)
    assert result["mode"] == "float"
    assert len(result["tokens"]) == 5
    assert result["seconds_per_token"] == pytest.approx(result["seconds"] / 5)
    streamed = run("generate", "the", "--model", model, "--max-new-tokens", 5)
    assert streamed.stdout == f"the{result['text']}\n"


def test_generate_gives_the_same_tokens_in_every_mode(model, tmp_path):
    common = ["generate", "dog", *head(model), "--encrypt", "0.1,1.0", "--bits", 6, "--max-new-tokens", 3,
              "--backend", "clear", "--cache", tmp_path]  # fmt: skip
    quantized, simulated, encrypted = (
        run_json(*common, "--mode", mode)["tokens"] for mode in ("quantized", "simulate", "encrypted")
    )
    assert quantized == simulated == encrypted


def test_sampling_is_repeated_by_its_seed(model):
    common = ["generate", "dog", "--model", model, "--temperature", 1.5, "--top-k", 50]
    first, again, other = (run_json(*common, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other


def test_options_win_over_the_checkpoints_generation_config(model, tmp_path):
    told = shutil.copytree(model, tmp_path / "told")
    helpers.edit_json(told / "generation_config.json", repetition_penalty=1.4, no_repeat_ngram_size=2)
    given = ["--repetition-penalty", 1.4, "--no-repeat-ngram-size", 2]
    plain = run_json("generate", "dog", "--model", model)["tokens"]
    penalized = run_json("generate", "dog", "--model", told)["tokens"]
    assert run_json("generate", "dog", "--model", model, *given)["tokens"] == penalized != plain
    back = ["--repetition-penalty", 1, "--no-repeat-ngram-size", 0]
    assert run_json("generate", "dog", "--model", told, *back)["tokens"] == plain


def test_eval_reports_what_the_design_lists(model):
    result = run_json("eval", *head(model), "--text", model / "eval.txt", "--bits", 6, "--top-k", "1,3")
    assert set(result["top_k"]) == {"1", "3"}
    assert {"kl", "kl_ablated", "recovered_kl", "head_error"} <= result.keys()
    assert result["recovered_kl"] == pytest.approx(1 - result["kl"] / result["kl_ablated"])
    assert "recovered KL" in run("eval", *head(model), "--text", model / "eval.txt").stdout


def test_compile_reports_the_cost_and_writes_it(model, tmp_path):
    out = tmp_path / "out"
    result = run_json("compile", *head(model), "--seq-len", 4, "--backend", "clear", "--out", out,
                      "--cache", tmp_path / "cache")  # fmt: skip
    for key in ("pbs_count", "max_bit_width", "complexity", "p_error", "evaluation_key_bytes", "seq_len"):
        assert key in result
    assert result["pbs_count"] == sum(sum(counts.values()) for counts in result["pbs_by_stage"].values())
    assert set(result["pbs_by_stage"]) == {"query", "key", "value", "scores", "softmax", "output"}
    assert {each["note"] for each in result["forecasts"]} == {"published, not measured here"}
    assert json.loads((out / "report.json").read_text()) == result
    assert {"server", "client"} <= {path.name for path in out.iterdir()}


MINE = """\
from jaxgpt2.methods import attention


@attention
def mine(ops, q, k, v):
    return {result}
"""


def test_a_method_of_a_file_is_checked_and_used(model, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(MINE.format(result="ops.requantize(k @ q) @ v"))
    texts = ["--calibration", model / "calibration.txt", "--text", model / "eval.txt"]
    checked = run_json("check-attention", f"{mine}:mine", "--model", model, *texts, "--tokens", 3)
    assert checked["causal"] and {"NumPy", "JAX", "JAX with a cache", "a circuit"} <= set(checked["agreeing"])
    stages = checked["pbs_by_stage"]
    assert stages == {"query": 24, "key": 24, "value": 24, "line_6": 2 * 6 * 8 + 6 + 2 * 6 * 8}
    assert checked["pbs_count_per_token"] == 24 + 2 * 3 * 8 + 3 + 2 * 3 * 8
    used = run_json("eval", "--model", model, *texts, "--encrypt", "0.1", "--attention", f"{mine}:mine")
    assert used["configs"]["0.1"]["attention"].startswith("mine.py:mine@")
    assert used["head_error"] == checked["head_error"]


def test_a_mistake_in_a_method_of_a_file_is_one_line(model, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(MINE.format(result="k[0] @ q * v"))
    for command in (["check-attention", f"{mine}:mine"], ["eval", "--attention", f"{mine}:mine"]):
        result = run(*command, *head(model), "--text", model / "eval.txt")
        assert result.exit_code == 2 and not result.stdout
        assert result.stderr.count("\n") == 1 and f"{mine}:6: looks into the axis of tokens" in result.stderr


def test_info_says_what_is_there():
    result = run_json("info")
    assert {"versions", "devices", "attention", "backends"} <= result.keys()
    assert "softmax" in result["attention"]
    assert {"clear", "concrete"} <= set(result["backends"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "./nowhere"], "no such directory"),
        (["generate", "x", "--encrypt", "0.99"], "there is no module 0.99"),
        (["generate", "x", "--encrypt", "first"], "cannot read module 'first'"),
        (["generate", ""], "prompt is empty"),
        (["generate", "x", "--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["generate", "x", "--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size must be 0"),
        (["generate", "x " * 300], "context is"),
        (["generate", "x", "--bits", "1"], "bits of activations must be a whole number from 2 to 12, got 1"),
        (["generate", "x", "--attention", "sofmax"], "no attention method 'sofmax'"),
        (["generate", "x", "--temperature", "-1"], "temperature must be 0"),
        (["generate", "x", "--top-p", "2"], "top_p must be"),
        (["generate", "x", "--p-error", "7"], "p_error must lie between 2**-128 and 1"),
        (["generate", "x", "--mode", "simulate", "--backend", "nope"], "unknown backend 'nope'"),
        (["generate", "x", "--mode", "encripted"], "'encripted' is not one of"),
        (["generate", "x", "--max-new-tokens", "0"], "0 is not in the range"),
        (["generate", "x", "--mode", "quantized", "--calibration", "missing.txt"], "missing.txt cannot be read"),
        (["eval", "--text", "missing.txt"], "missing.txt cannot be read"),
        (["eval", "--top-k", "one"], "--top-k 'one' cannot be read"),
        (["eval", "--text", "CALIBRATION"], "evaluate on other text"),
        (["compile", "--out", "MODEL"], "not an empty directory"),
        (["compile", "--seq-len", "999"], "max_tokens must be 1 to"),
        (["generate", "x", "--scheduler", "tcp://nowhere:1"], "--scheduler is for --mode encrypted"),
        (["generat"], "No such command"),
    ],
)
def test_bad_input_gets_one_line_and_exit_status_2(model, arguments, message):
    replaced = {"CALIBRATION": str(model / "calibration.txt"), "MODEL": str(model)}
    arguments = [replaced.get(argument, argument) for argument in arguments]
    if arguments[0] != "generat" and "--model" not in arguments:
        arguments += ["--model", str(model)]
    if arguments[0] in ("eval", "compile"):
        arguments += ["--calibration", str(model / "calibration.txt")]
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not result.stdout


def test_importing_the_package_is_light():
    """No JAX, no Concrete, until something asks for them."""
    code = "import sys, jaxgpt2, jaxgpt2.cli; print(sorted({'jax', 'flax', 'concrete', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_running_in_jax_does_not_import_concrete():
    code = "import sys, jaxgpt2.encrypted; print('concrete' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False False"


def test_on_a_terminal_waiting_leaves_the_text_there():
    """What is said while a token is made takes the line of the text, and must give it back."""
    script = textwrap.dedent(
        """
        import types
        from jaxgpt2.cli.generate import write_tokens

        gpt2 = types.SimpleNamespace(stream=lambda: lambda token: f" {token}", text=lambda tokens: "")
        write_tokens(gpt2, {"prompt": "counting"}, iter([1, 2]), False, lambda number: f"token {number}")
        """
    )
    near, far = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", script], stdin=far, stdout=far, stderr=far, env=environment, check=True)
    os.close(far)
    shown = b""
    with contextlib.suppress(OSError):  # that all has been read
        while True:
            shown += os.read(near, 1 << 16)
    os.close(near)
    assert b"counting  [token 1]" in shown and b"counting 1 2  [token 3]" in shown
    assert shown.rsplit(b"\x1b[2K")[-1] == b"counting 1 2\r\n"  # after the line was last erased
