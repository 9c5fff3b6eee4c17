"""Sweeps: rows equal `evaluate`, directories resume, whatever dies; tune finds the cheapest configuration."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import fhe
import helpers
from fhe import registry
from jaxgpt2.cli import main
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.errors import InputError
from jaxgpt2.evaluation import evaluate
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module
from jaxgpt2.quantize import Bits, CalibrationError
from jaxgpt2.sweeps import plots, runner, store, sweep, tune
from jaxgpt2.sweeps.runner import Configuration, Experiment, StackedBits, SweepRunner
from jaxgpt2.sweeps.store import DirectoryError, SweepDirectory, read_rows
from jaxgpt2.sweeps.tune import cheapest

pd = pytest.importorskip("pandas", reason="the sweep extra is not installed")
pytest.importorskip("pyarrow", reason="the sweep extra is not installed")

# The tokenizer of the random models has a token a byte.
CALIBRATION = ["the cat", "sat on", "a mat", "one dog", "ran after", "two", "it was", "not the", "zebras", "xylem"] * 2
TEXT = ["the dog", "a", "it ran", "two cats", "mat"] * 4
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("three-heads")
    helpers.random_checkpoint(directory, n_embd=24, n_head=3)
    (directory / "calibration.txt").write_text("\n".join(CALIBRATION) + "\n")
    (directory / "eval.txt").write_text("\n".join(TEXT) + "\n")
    return directory


@pytest.fixture(scope="module")
def gpt2(model) -> GPT2:
    return GPT2.from_pretrained(model)


@pytest.fixture(scope="module")
def bench(model, gpt2) -> SweepRunner:
    return SweepRunner(Experiment(str(model), tuple(TEXT), tuple(CALIBRATION), (1, 3), seq_len=4, batch=4), gpt2)


def configuration(head: str, method: str, bits: Bits | int, **options: int) -> Configuration:
    layer, number = map(int, head.split("."))
    return Configuration(Module(layer, number), MethodConfig.of(method, bits, options))


def rows_of(bench: SweepRunner, configurations: list[Configuration]) -> list[dict]:
    found = {row["key"]: row for rows in bench.run(configurations) for row in rows}
    return [found[each.key] for each in configurations]


# --- rows ---------------------------------------------------------------------------------------

MIXED = [
    configuration("0.1", "lowrank", 3),
    configuration("0.2", "lowrank", 6),
    configuration("0.1", "lowrank", Bits(8, 5, 4, None), score_rank=4),
    configuration("1.0", "softmax", 4),
    configuration("1.2", "softmax", Bits(3, 7, 5, 6)),
    configuration("1.2", "lowrank", 5),
]


@pytest.fixture(scope="module")
def mixed(bench) -> list[dict]:
    return rows_of(bench, MIXED)


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_a_row_equals_eval(bench, gpt2, mixed, index):
    row, each = mixed[index], MIXED[index]
    encrypted = EncryptedGPT2(gpt2, {each.module: each.config}).calibrate(CALIBRATION, bench.max_tokens)
    wanted = evaluate(encrypted, TEXT, encrypted.runner("quantized"), (1, 3))
    assert (row["layer"], row["head"], row["attention"]) == (each.module.layer, each.module.head, each.config.method)
    assert row["positions"] == wanted.positions
    assert row["passages"] == wanted.passages
    for k in (1, 3):
        assert row[f"top_{k}"] == pytest.approx(wanted.top_k[k], abs=1e-12)
        assert row[f"top_{k}_ablated"] == pytest.approx(wanted.top_k_ablated[k], abs=1e-12)
    assert row["kl"] == pytest.approx(wanted.kl, rel=1e-3, abs=1e-6)
    assert row["kl_ablated"] == pytest.approx(wanted.kl_ablated, rel=1e-3, abs=1e-6)
    assert row["recovered_kl"] == pytest.approx(wanted.recovered_kl, abs=2e-3)
    # Equal integers: one level off anywhere would show here.
    assert row["head_error"] == pytest.approx(wanted.head_error, rel=1e-5)


@pytest.mark.parametrize("index", [0, 3])
def test_a_rows_cost_is_what_compiling_reports(bench, gpt2, mixed, index):
    row, each = mixed[index], MIXED[index]
    encrypted = EncryptedGPT2(gpt2, {each.module: each.config}).calibrate(CALIBRATION, bench.max_tokens)
    compiled = encrypted.compile(CALIBRATION, 4, backend="clear")
    cost = compiled.costs(4)[each.module]
    assert isinstance(cost, fhe.Cost)
    assert row["pbs_count"] == cost.pbs_count
    assert row["max_bit_width"] == cost.max_bit_width
    assert {bits: row[f"pbs_{bits}"] for bits in cost.pbs_by_bit_width} == cost.pbs_by_bit_width
    assert row["estimated_seconds"] == cost.estimated_run_seconds
    assert row["estimated_seconds_per_token"] == compiled.costs(4, 3)[each.module].estimated_run_seconds
    assert row["machine"] == fhe.LOOKUP_TIMES["machine"]


def test_a_rows_cost_is_that_of_the_compiled_circuit(bench, gpt2, mixed):
    pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
    encrypted = EncryptedGPT2(gpt2, {MIXED[0].module: MIXED[0].config}).calibrate(CALIBRATION, bench.max_tokens)
    cost = encrypted.compile(CALIBRATION, 4, backend="concrete").costs(4)[MIXED[0].module]
    assert isinstance(cost, fhe.Cost)
    assert mixed[0]["pbs_count"] == cost.pbs_count
    assert mixed[0]["max_bit_width"] == cost.max_bit_width


def test_polynomials_stand_beside_lookups(bench, gpt2, mixed):
    """Of any number of squarings, with what the engine itself would do as their cost; widths do not concern them."""
    pytest.importorskip("tenseal", reason="the ckks extra is not installed")
    method = "polynomial"
    assert len(runner.grid([Module(0, 1)], [method], [3, 4, 5], {})) == 1
    chosen = [configuration("0.1", method, 4, squarings=3), configuration("0.2", method, 4, squarings=4)]
    rows = rows_of(bench, [*chosen, MIXED[0]])
    for row, each in zip(rows, chosen, strict=False):
        encrypted = EncryptedGPT2(gpt2, {each.module: each.config}).calibrate(CALIBRATION, bench.max_tokens)
        wanted = evaluate(encrypted, TEXT, encrypted.runner("quantized"), (1,))
        assert row["kl"] == pytest.approx(wanted.kl, rel=1e-3, abs=1e-6)
        assert row["head_error"] == pytest.approx(wanted.head_error, rel=1e-3)
        assert row["refused"] == wanted.refused
        assert row["levels"] == each.config.options["squarings"] + 4
        assert row["rounding"] is None and "pbs_count" not in row
        assert row["estimated_seconds"] > 0 and row["estimated_seconds_per_token"] > 0
    frame = store.table(rows)
    assert frame["estimated_seconds_per_token"].notna().all()
    assert frame["rotations"].notna().tolist() == [True, True, False]
    assert frame["pbs_count"].notna().tolist() == [False, False, True]
    plots.over_cost(frame)
    plots.over_bits(frame)


def test_a_whole_attention_is_a_row_like_any_other(model, gpt2, tmp_path):
    """Its numbers are those of `evaluate`, its cost is that of its circuit, and its figures can be drawn."""
    experiment = Experiment(str(model), tuple(TEXT), tuple(CALIBRATION), (1, 3), seq_len=4, batch=2)
    whole = Configuration(Module(1, None), MethodConfig.of("softmax", 5))
    configurations = [whole, configuration("1.0", "softmax", 5), configuration("0.1", "lowrank", 4)]
    frame = sweep.sweep(experiment, configurations, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "over_bits.png", "over_cost.png", "over_heads.png"
    ]  # fmt: skip
    row = read_rows(tmp_path / "out")[whole.key]
    assert (row["layer"], row["head"]) == (1, None)
    encrypted = EncryptedGPT2(gpt2, {whole.module: whole.config}).calibrate(CALIBRATION, 8)
    wanted = evaluate(encrypted, TEXT, encrypted.runner("quantized"), (1, 3))
    for k in (1, 3):
        assert row[f"top_{k}"] == pytest.approx(wanted.top_k[k], abs=1e-12)
        assert row[f"top_{k}_ablated"] == pytest.approx(wanted.top_k_ablated[k], abs=1e-12)
    assert row["kl"] == pytest.approx(wanted.kl, rel=1e-3, abs=1e-6)
    assert row["kl_ablated"] == pytest.approx(wanted.kl_ablated, rel=1e-3, abs=1e-6)
    assert row["head_error"] == pytest.approx(wanted.head_error, rel=1e-5)
    compiled = encrypted.compile(CALIBRATION, 4, fhe.FHEConfig(rounding="approximate"), "clear")
    assert row["pbs_count"] == compiled.costs(4)[whole.module].counts["pbs_count"]
    alone = read_rows(tmp_path / "out")[configurations[1].key]
    assert row["kl_ablated"] != pytest.approx(alone["kl_ablated"], rel=0.01)  # all heads, and not the first of them
    assert row["pbs_count"] > 2 * alone["pbs_count"]
    assert len(frame) == 3
    # A table of nothing else has no map of heads.
    sweep.sweep(experiment, [whole], tmp_path / "alone")
    assert not (tmp_path / "alone" / "over_heads.png").exists()


def test_several_packs_give_what_one_gives(model, gpt2, mixed, monkeypatch):
    monkeypatch.setattr(runner, "PACK_TOKENS", 30)
    monkeypatch.setattr(runner, "LOGITS", 300 * 3 * 7)
    small = SweepRunner(Experiment(str(model), tuple(TEXT), tuple(CALIBRATION), (1, 3), seq_len=4, batch=2), gpt2)
    assert len(small._packs) > 1
    (row,) = rows_of(small, [MIXED[0]])
    for name in ("top_1", "kl", "kl_ablated", "head_error"):
        assert row[name] == pytest.approx(mixed[0][name], rel=1e-3)


def test_layers_may_come_in_any_order(bench, mixed):
    again = rows_of(bench, [MIXED[0]])  # layer 0, after layer 1
    assert again[0]["kl"] == pytest.approx(mixed[0]["kl"], rel=1e-5, abs=5e-7)  # a sum in float32, in another order
    assert again[0]["head_error"] == pytest.approx(mixed[0]["head_error"], rel=1e-6)


def test_what_cannot_be_calibrated_gets_a_row_that_says_why(bench, monkeypatch):
    def refuse(*_: object) -> None:
        raise CalibrationError("the query sums can reach 3,000,000,000")

    monkeypatch.setattr(EncryptedGPT2, "calibrate_on", refuse)
    (row,) = rows_of(bench, [configuration("0.0", "lowrank", 4)])
    assert "can reach" in row["error"]
    assert "kl" not in row


def test_stacks_hold_equal_shapes_and_run_full():
    def member(size: int) -> tuple:
        return None, runner.Stackable(np.zeros(size), np.zeros(()), StackedBits(np.zeros(())), ())

    found = runner.stacks([member(3)] * 5 + [member(4)] * 3, 4, 1)
    assert sorted(map(len, found)) == [1, 1, 2, 4]
    assert sorted(index for stack in found for index in stack) == list(range(8))
    assert [sorted(set(stack)) for stack in runner.stacks([member(3)] * 3, 8, 2)] == [[0, 1], [2]]  # two devices


def test_logits_of_a_large_model_are_never_all_there():
    """GPT-2 XL's vocabulary: a chunk of positions at a time, whatever the stack."""
    chunk = max(16, runner.LOGITS // (50257 * 17))
    assert chunk * 50257 * 17 * 4 < 2**28


@pytest.mark.slow
def test_all_devices_are_used_and_change_nothing(model, mixed, tmp_path):
    code = f"""
import json, jax
from jaxgpt2.models.gpt2.pretrained import GPT2
from test_sweep import *
assert len(jax.devices()) == 2
bench = SweepRunner(Experiment({str(model)!r}, tuple(TEXT), tuple(CALIBRATION), (1, 3), seq_len=4, batch=4))
print(json.dumps(rows_of(bench, MIXED[:2] + MIXED[4:])))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for row, wanted in zip(json.loads(ran.stdout), mixed[:2] + mixed[4:], strict=True):
        for name in ("top_1", "kl", "kl_ablated", "head_error", "pbs_count"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3)


# --- the grid -----------------------------------------------------------------------------------


def test_a_grid_is_a_product_in_which_options_concern_their_method():
    modules = [Module(0, 0), Module(0, 1)]
    found = runner.grid(modules, ["softmax", "lowrank"], [Bits.of(3), Bits.of(4)], {"score_rank": (8, 16)})
    assert len(found) == 2 * (2 + 2 * 2)
    assert len({each.key for each in found}) == len(found)
    with pytest.raises(InputError, match="none of the methods softmax has an option 'score_rank'"):
        runner.grid(modules, ["softmax"], [Bits.of(3)], {"score_rank": (8,)})
    with pytest.raises(InputError, match="the grid is empty"):
        runner.grid([], ["softmax"], [Bits.of(3)], {})


# --- directories --------------------------------------------------------------------------------


def test_a_line_cut_off_by_a_kill_is_measured_again(tmp_path):
    directory = SweepDirectory.open(tmp_path / "out", {"model": "m"}, resume=False)
    directory.append([{"key": "a", "kl": 1.0}, {"key": "b", "kl": 2.0}])
    with (directory.path / "rows.jsonl").open("a") as file:
        file.write('{"key": "c", "k')
    assert SweepDirectory.open(tmp_path / "out", {"model": "m"}, resume=True).rows.keys() == {"a", "b"}
    directory.append([{"key": "c", "kl": 3.0}])
    assert [row["kl"] for row in read_rows(directory.path).values()] == [1.0, 2.0, 3.0]


def test_directories_of_something_else_are_refused(tmp_path):
    SweepDirectory.open(tmp_path / "out", {"model": "m"}, resume=False)
    with pytest.raises(DirectoryError, match="another sweep \\(of other model\\)"):
        SweepDirectory.open(tmp_path / "out", {"model": "n"}, resume=True)
    with pytest.raises(DirectoryError, match="go on with --resume"):
        SweepDirectory.open(tmp_path / "out", {"model": "m"}, resume=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DirectoryError, match="holds no sweep"):
        SweepDirectory.open(tmp_path / "mine", {"model": "m"}, resume=True)


def test_a_pareto_front_holds_what_nothing_beats():
    assert plots.pareto([3.0, 1.0, 2.0, 2.0, 5.0], [0.9, 0.1, 0.5, 0.4, 0.8]) == [1, 2, 0]


# --- the command line ---------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def common(model: Path) -> list[object]:
    return ["--model", model, "--calibration", model / "calibration.txt", "--text", model / "eval.txt"]


def small_sweep(model: Path, out: Path) -> list[object]:
    return ["sweep", *common(model), "--layers", "0", "--heads", "0-1", "--bits", "3,5", "--set", "score_rank=4,8",
            "--seq-len", 3, "--top-k", "1,3", "--batch", 2, "--out", out]  # fmt: skip


def test_sweep_writes_a_table_and_figures_and_resumes(model, tmp_path):
    polars = pytest.importorskip("polars")
    out = tmp_path / "out"
    result = run(*small_sweep(model, out), "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["rows"] == 8
    assert len(answer["figures"]) == 3
    assert all(Path(figure).read_bytes().startswith(b"\x89PNG") for figure in answer["figures"])
    frame = pd.read_parquet(answer["table"])
    assert len(frame) == len(pd.read_csv(answer["csv"])) == polars.read_parquet(answer["table"]).height == 8
    assert {"layer", "head", "attention", "input_bits", "score_rank", "top_1", "top_3_ablated", "kl", "recovered_kl",
            "head_error", "pbs_count", "estimated_seconds", "machine"} <= set(frame.columns)  # fmt: skip
    counts = frame[[name for name in frame.columns if name.startswith("pbs_") and name != "pbs_count"]]
    assert (counts.sum(axis=1) == frame["pbs_count"]).all()

    journal = out / "rows.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-3]) + lines[-1][:20])
    again = run(*small_sweep(model, out), "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert journal.read_text().splitlines(keepends=True)[:5] == lines[:5]  # those were not measured again
    resumed = pd.read_parquet(answer["table"])
    assert (resumed["attention"] == frame["attention"]).all()
    # Another stack rounds otherwise: by float32's last bit of log probabilities of about 6, at every position.
    assert np.allclose(resumed["kl"].to_numpy(float), frame["kl"].to_numpy(float), rtol=0, atol=5e-7)


@pytest.mark.slow
def test_ctrl_c_and_kill_lose_no_row(model, tmp_path):
    out = tmp_path / "out"
    # Every row takes two seconds at least, so that there are some left when the first one is seen.
    program = """
import time
from jaxgpt2.cli.__main__ import main
from jaxgpt2.sweeps.runner import SweepRunner
rows = SweepRunner.rows
SweepRunner.rows = lambda *arguments: (time.sleep(2), rows(*arguments))[1]
main()
"""
    arguments = [sys.executable, "-c", program, *map(str, small_sweep(model, out)), "--batch", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    journal = out / "rows.jsonl"
    while not journal.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume goes on" in errors
    assert "Traceback" not in errors
    before = read_rows(out)
    assert 1 <= len(before) < 8
    finished = run(*small_sweep(model, out), "--resume", "--json")
    assert json.loads(finished.stdout)["rows"] == 8
    assert read_rows(out).items() >= before.items()


@pytest.mark.slow
def test_tune_writes_the_cheapest_configuration_that_keeps_enough(model, tmp_path):
    out = tmp_path / "configs.json"
    tuning = ["tune", *common(model), "--encrypt", "0.1,1.2", "--bits", "3,7", "--set", "score_rank=8",
              "--set", "value_rank=4,8", "--seq-len", 3, "--simulated", 0]  # fmt: skip
    result = run(*tuning, "--recovered-kl", 0.5, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found == json.loads(result.stdout)
    assert set(found["modules"]) == {"0.1", "1.2"}
    assert found["recovered_kl"] >= 0.5
    for name, config in found["modules"].items():
        evaluated = run("eval", *common(model), "--configs", out, "--encrypt", name, "--json")
        measured = json.loads(evaluated.stdout)
        assert measured["recovered_kl"] == pytest.approx(config["measured"]["recovered_kl"], abs=2e-3)
    generated = run("generate", "dog", "--model", model, "--configs", out, "--mode", "quantized", "--calibration",
                    model / "calibration.txt", "--max-new-tokens", 2, "--json")  # fmt: skip
    assert generated.exit_code == 0, generated.output
    directories = []
    for number, head in enumerate(("0.1", "1.2")):  # the same grid as sweeps
        layer, index = head.split(".")
        directories += ["--sweep", tmp_path / str(number)]
        grid = [
            "--layers",
            layer,
            "--heads",
            index,
            "--bits",
            "3,7",
            "--set",
            "score_rank=8",
            "--set",
            "value_rank=4,8",
        ]
        swept = run("sweep", *common(model), *grid, "--top-k", 1, "--seq-len", 3, "--out", directories[-1])
        assert swept.exit_code == 0, swept.output
    chosen = run("tune", "--model", model, "--encrypt", "0.1,1.2", *directories, "--recovered-kl", 0.5,
                 "--simulated", 0, "--json")  # fmt: skip
    assert {name: config["options"] for name, config in json.loads(chosen.stdout)["modules"].items()} == {
        name: config["options"] for name, config in found["modules"].items()
    }
    # The file's heads, one by one and together, as eval measures them.
    swept = run("sweep", *common(model), "--configs", out, "--seq-len", 3, "--out", tmp_path / "both", "--json")
    assert swept.exit_code == 0, swept.output
    answer, both = json.loads(swept.stdout), json.loads((tmp_path / "both" / "together.json").read_text())
    assert answer["rows"] == 2 and answer["together"] == both["together"] and answer["alone"] == both["alone"]
    assert answer["alone"]["recovered_kl"] == pytest.approx(found["recovered_kl"], abs=2e-3)
    evaluated = json.loads(run("eval", *common(model), "--configs", out, "--json").stdout)
    assert answer["together"]["kl"] == pytest.approx(evaluated["kl"], rel=1e-3)
    refused = run("sweep", *common(model), "--configs", out, "--bits", 3, "--out", tmp_path / "no")
    assert refused.exit_code == 2
    assert "--bits has no place beside --configs: the file says what is measured" in refused.stderr.replace("\n", " ")
    unreachable = run(*tuning, "--recovered-kl", 0.9999999)
    assert unreachable.exit_code == 2
    assert "none of 8 configurations recovers 1 of the KL, the best recovers" in unreachable.stderr.replace("\n", " ")


def test_tune_screens_what_is_proposed_and_trains_little_of_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FEW", 1)
    out = tmp_path / "configs.json"
    tuning = ["tune", *common(model), "--encrypt", "1.2", "--bits", "3,5,6,7", "--seq-len", 3, "--recovered-kl", 0.5,
              "--simulated", 0, "--out", out]  # fmt: skip
    result = run(*tuning, "--json")
    assert result.exit_code == 0, result.output
    rows = read_rows(Path(f"{out}.rows"))
    rough = [row for key, row in rows.items() if key.startswith("first 20 passages, calibrated on 20: 1.2 ")]
    trained = [row for key, row in rows.items() if key.startswith("1.2 ")]
    assert len(rough) + len(trained) == len(rows) and len(rough) >= 4
    assert {row["training_steps"] for row in rough} == {0} and {row["training_steps"] for row in trained} == {300}
    assert len(trained) < len(rough)
    found = json.loads(result.stdout)
    assert found["recovered_kl"] >= 0.5
    assert found["modules"]["1.2"]["measured"]["kl"] in {row["kl"] for row in trained}


@pytest.mark.slow
def test_tune_chooses_error_probability_and_rounding_by_simulation_and_resumes(model, tmp_path):
    out = tmp_path / "configs.json"
    tuning = ["tune", *common(model), "--encrypt", "0.1", "--bits", 3, "--set", "score_rank=4", "--set",
              "value_rank=4", "--seq-len", 3, "--recovered-kl", -9, "--simulated", 20, "--p-error",
              "1e-5,0.2"]  # fmt: skip
    result = run(*tuning, "--noise", 0.3, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    for head, config in found["modules"].items():
        tried = {tuple(each["fhe_config"].values()): each for each in found["encryptions"][head]}
        assert all(0 < each["texts"] <= 20 and each["low"] <= each["lost"] <= each["high"] for each in tried.values())
        chosen = tried[tuple(config["encryption"].values())]
        assert chosen["high"] <= 0.3
        assert (0.2, "approximate") in tried or chosen["fhe_config"]["p_error"] == 1e-5

    # What was measured is not measured again: neither rows nor circuits.
    rows = Path(f"{out}.rows") / "rows.jsonl"
    before = rows.read_text()
    out.unlink()
    refused = run(*tuning, "--noise", 0.3, "--out", out)
    assert refused.exit_code == 2 and "go on with --resume" in refused.stderr.replace("\n", " ")
    again = run(*tuning, "--noise", 0.3, "--out", out, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert rows.read_text() == before
    assert json.loads(out.read_text()) == found

    compiling = ["compile", "--model", model, "--calibration", model / "calibration.txt", "--configs", out,
                 "--seq-len", 3, "--encrypt", "0.1", "--cache", tmp_path / "cache", "--json"]  # fmt: skip
    chosen, report = found["modules"]["0.1"]["encryption"], json.loads(run(*compiling).stdout)
    assert (report["p_error"], report["rounding"]) == (chosen["p_error"], chosen["rounding"])
    other = json.loads(run(*compiling, "--p-error", 1e-3).stdout)
    assert (other["p_error"], other["rounding"]) == (1e-3, chosen["rounding"])

    hopeless = run(*tuning, "--encrypt", "0.1", "--p-error", 0.2, "--rounding", "exact", "--noise", -9)
    assert hopeless.exit_code == 2
    assert "may cost more than -9 of its KL, the best" in hopeless.stderr.replace("\n", " ")


def test_tune_without_the_engine_says_so_first(model, monkeypatch):
    def missing() -> fhe.Backend:
        raise fhe.BackendUnavailable("concrete", "concrete-python", "there is none")

    monkeypatch.setitem(registry._registry.factories, "concrete", missing)
    refused = run("tune", *common(model), "--encrypt", "0.1")
    assert refused.exit_code == 2
    wanted = "pip install 'jaxgpt2[fhe]', or leave error probability and rounding to the method: --simulated 0"
    assert wanted in refused.stderr.replace("\n", " ")
    assert "configurations" not in refused.stderr
    tuned = run("tune", *common(model), "--encrypt", "0.1", "--bits", 4, "--set", "score_rank=4",
                "--set", "value_rank=4", "--seq-len", 3, "--recovered-kl", -9, "--simulated", 0, "--json")  # fmt: skip
    assert tuned.exit_code == 0, tuned.output
    assert "encryption" not in json.loads(tuned.stdout)["modules"]["0.1"]


def test_bounds_of_what_encryption_loses():
    """Paired: noise that texts share says nothing; bounds close in with more texts."""
    random = np.random.default_rng(1)
    quantized, ablated = random.uniform(0, 5, 400), random.uniform(1, 2, 400)
    simulated = quantized + 0.02 * ablated + random.normal(0, 0.05, 400)
    lost, low, high = tune.bounds(simulated, quantized, ablated)
    assert low < lost < high and 0.01 < low < 0.02 < high < 0.03
    fewer = tune.bounds(simulated[:16], quantized[:16], ablated[:16])
    assert fewer[2] - fewer[1] > 2 * (high - low)
    assert tune.bounds(quantized, quantized, ablated) == (0, 0, 0)
    assert tune.bounds(quantized, quantized, 0 * ablated)[2] == np.inf  # a head that does nothing says nothing


@pytest.mark.parametrize(("holding", "rounding"), [(0.1, "approximate"), (1e-2, "approximate"), (0.0, "exact")])
def test_the_cheapest_encryption_that_holds_is_found_without_trying_all(gpt2, monkeypatch, holding, rounding):
    seen = []

    def trial(alone, fhe_config, simulation, table):
        seen.append(fhe_config)
        holds = fhe_config.rounding == "exact" or fhe_config.p_error <= holding
        return tune.Trial(fhe_config, high=0.0 if holds else 1.0)

    monkeypatch.setattr(tune, "trial", trial)
    alone = EncryptedGPT2(gpt2, {Module(0, 1): MethodConfig.of("lowrank", 4)})
    numbers = (1e-5, 1e-3, 1e-2, 3e-2, 0.1)
    some = [fhe.FHEConfig(number, name) for name in ("approximate", "exact") for number in numbers]
    simulation = tune.Simulation([], {}, 6, 0.01)
    best, tried = tune.cheapest_encryption(alone, some, simulation, tune.Table({}))
    assert best == fhe.FHEConfig(holding or 0.1, rounding)
    assert [each.fhe_config for each in tried] == seen and len(seen) <= 3 * (1 if holding else 2)
    if holding < 0.1:
        with pytest.raises(
            InputError, match=r"head 0.1: every .* may cost more than 0.01 of its KL, the best \(0.1, a"
        ):
            tune.cheapest_encryption(alone, some[4:5], simulation, tune.Table({}))


def test_a_search_measures_few_and_finds_a_cheap_choice():
    """Heads whose KL falls with what they cost; training halves it."""
    numbers = range(2, 34)
    configurations = [
        configuration(f"0.{head}", "lowrank", 4, score_rank=rank) for head in range(2) for rank in numbers
    ]

    def row(each: Configuration, factor: float) -> dict:
        rank, scale = each.config.options["score_rank"], (1.0, 0.1)[each.module.head or 0]
        return {"key": each.key, "layer": 0, "head": each.module.head, "estimated_seconds": float(rank),
                "kl": factor * scale / rank, "kl_ablated": scale, "recovered_kl": 1 - factor / rank}  # fmt: skip

    def cost(rows) -> float:
        heads = {name: [row for row in rows if row["head"] == head] for head, name in enumerate(("0.0", "0.1"))}
        return sum(row["estimated_seconds"] for row in cheapest(heads, 0.9).values())

    measured: list[Configuration] = []

    def final(some):
        measured.extend(some)
        return [row(each, 0.5) for each in some]

    found = tune.search(configurations, 0.9, lambda some: [row(each, 1.0) for each in some], final)
    every = [row(each, 0.5) for each in configurations]
    assert cost(found) <= 1.5 * cost(every)
    assert len({each.key for each in measured}) <= len(configurations) / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--p-error", "1e-3,low"], "--p-error '1e-3,low' cannot be read: wanted probabilities"),
        (["--p-error", "2"], "p_error must lie between 2**-128 and 1"),
        (["--rounding", "exact,half"], "rounding must be one of exact, approximate, none, not 'half'"),
    ],
)
def test_what_cannot_be_tried_is_said_before_anything_is_measured(model, arguments, message):
    result = run("tune", *common(model), "--encrypt", "0.1", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "configurations" not in result.stderr


def test_tuned_heads_share_what_may_be_lost():
    def row(cost: float, kl: float) -> dict:
        return {"estimated_seconds": cost, "kl": kl, "kl_ablated": 1.0, "recovered_kl": 1 - kl}

    dear, cheap = [row(1, 0.9), row(2, 0.0)], [row(1, 0.1), row(50, 0.0)]
    found = cheapest({"0.0": dear, "0.1": cheap}, 0.95)
    assert [found[head]["kl"] for head in ("0.0", "0.1")] == [0.0, 0.1]  # 0.1 of 2.0 is all that may be lost
    alone = [row(seconds, kl) for seconds, kl in ((1, 0.5), (4, 0.06), (5, 0.04), (90, 0.0))]
    assert cheapest({"0.0": alone}, 0.94)["0.0"]["kl"] == 0.06  # the cheapest that is enough, on no line of the best
    with pytest.raises(InputError, match=r"none of 4 configurations recovers 0.99.* the best recovers 0.95"):
        cheapest({"0.0": [*alone[:2], row(6, 0.05), row(7, 0.07)]}, 0.99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "7"], "--layers 7: there is no 7, the model has 0 to 1"),
        (["--heads", "0-3"], "--heads 0-3: there is no 3, the model has 0 to 2"),
        (["--bits", "5-3"], "--bits '5-3' names nothing"),
        (["--bits", ""], "--bits '' cannot be read"),
        (["--bits", "1"], "bits of activations must be a whole number from 2 to 12"),
        (["--attention", "sofmax"], "no attention method 'sofmax'"),
        (["--set", "rank=3"], "none of the methods lowrank has an option 'rank'"),
        (["--top-k", "0"], "every k must be 1 to"),
        (["--seq-len", "999"], "--seq-len must be 1 to 64"),
        (["--text", "EMPTY"], "line 2: empty passage"),
        (["--text", "LONG"], "context is"),
        (["--text", "CALIBRATION"], "evaluate on other text"),
        (["--out", "MODEL"], "holds no sweep"),
    ],
)
def test_bad_input_gets_one_line_and_exit_status_2(model, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("one\n\ntwo\n")
    (tmp_path / "long.txt").write_text("x" * 65 + "\n")
    places = {"EMPTY": tmp_path / "empty.txt", "LONG": tmp_path / "long.txt",
              "CALIBRATION": model / "calibration.txt", "MODEL": model}  # fmt: skip
    given = [str(places.get(argument, argument)) for argument in arguments]
    result = run("sweep", *common(model), "--out", tmp_path / "out", *given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not result.stdout


def test_a_missing_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run(*small_sweep(model, tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install 'jaxgpt2[sweep]'" in result.stderr.replace("\n", " ")


# --- more than one machine ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_in_mid_run_costs_no_row(model, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the cluster extra is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).process.pid
        experiment = Experiment(str(model), tuple(TEXT), tuple(CALIBRATION), (1,), seq_len=3, batch=1)
        configurations = runner.grid([Module(0, head) for head in range(3)], ["lowrank"], [Bits.of(3), Bits.of(4)], {})

        def kill_after_the_first(count: float, kind: str = "", left: object = None) -> None:
            nonlocal victim
            if count == 1 and victim:
                os.kill(victim, signal.SIGKILL)
                victim = 0

        frame = sweep.sweep(
            experiment, configurations, tmp_path / "out", scheduler=cluster.scheduler_address,
            progress=kill_after_the_first,
        )  # fmt: skip
    assert not victim
    assert len(frame) == 6
    assert frame["error"].isna().all()


def test_a_scheduler_that_is_not_there_gets_one_line(model, tmp_path):
    pytest.importorskip("distributed", reason="the cluster extra is not installed")
    result = run(*small_sweep(model, tmp_path / "out"), "--scheduler", "nonsense://")
    assert result.exit_code == 2
    assert "no Dask scheduler answers" in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_widths_mean_in_sweeps_what_they_mean_elsewhere(model, tmp_path):
    """--bits N is what the method has with N-bit activations; what is named apart changes just that."""
    arguments = ["--layers", 0, "--heads", 0, "--bits", 3, "--seq-len", 3, "--set", "training_steps=0",
                 "--max-tokens", 3]  # fmt: skip
    changed = "--input-bits", 6, "--rounding-threshold-bits", "none"
    for number, (given, wanted) in enumerate([((), (5, 7, 3, 4)), (changed, (6, 7, 3, None))]):
        out = tmp_path / str(number)
        assert run("sweep", *common(model), *arguments, *given, "--out", out).exit_code == 0
        (row,) = read_rows(out).values()
        assert row["positions"] == sum(min(len(text), 3) for text in TEXT)  # a token a byte
        assert tuple(row[f"{name}_bits"] for name in ("input", "weight", "activation", "rounding_threshold")) == wanted
