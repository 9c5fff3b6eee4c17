"""`--encrypt linear` on the command line: one JSON object, one clear line, exit status 2; Ctrl-C and going on later."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import linears
import served
from helpers import random_checkpoint
from jaxgpt2.cli import main
from jaxgpt2.generation import Sampling
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.linear_bundle import write_bundles
from jaxgpt2.serving.masked import store_for
from linears import PROMPT

LINEAR = ["--encrypt", "linear"]


@pytest.fixture(scope="module")
def model(linear_gpt2) -> LinearGPT2:
    return linear_gpt2


@pytest.fixture(scope="module")
def home(model, small_readonly: Path, tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("home")
    linears.calibration_file(directory)
    (directory / "eval.txt").write_text("the dog\nit ran\na\n")
    write_bundles(model, directory / "out", {})
    for kind in ("server", "client"):
        bundles.write(directory / "circuits" / kind, kind, "b" * 64, {"0.1": served.small_circuit()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory / "state"))
        patch.setenv("XDG_DATA_HOME", str(directory / "data"))
        yield directory


def jaxgpt2(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def json_of(*arguments: object) -> dict[str, Any]:
    found = jaxgpt2(*arguments, "--json")
    assert found.exit_code == 0, (found.stderr, found.exception)
    return json.loads(found.stdout)  # one object, and nothing else


def options(home: Path, small: Path) -> list[object]:
    return [*LINEAR, "--model", small, "--calibration", home / "passages.txt"]


def test_generate_in_every_mode(home, small_readonly, model, gpt2):
    sampling = Sampling(repetition_penalty=1.3, no_repeat_ngram_size=2)
    common = ["generate", PROMPT, *options(home, small_readonly), "--max-new-tokens", 4,
              "--repetition-penalty", 1.3, "--no-repeat-ngram-size", 2]  # fmt: skip
    found = {mode: json_of(*common, "--mode", mode) for mode in ("float", "quantized", "encrypted")}
    assert found["float"]["tokens"] == list(gpt2.generate(PROMPT, 4, sampling))
    assert found["quantized"]["tokens"] == linears.quantized_tokens(model, PROMPT, 4, sampling)
    assert found["encrypted"]["tokens"] == found["quantized"]["tokens"]
    for mode, each in found.items():
        assert each["mode"] == mode and each["modules"] == "linear" and each["prompt"] == PROMPT
        assert each["seconds_per_token"] == pytest.approx(each["seconds"] / 4)
    shown = jaxgpt2(*common, "--mode", "encrypted")
    assert shown.stdout == f"{PROMPT}{found['quantized']['text']}\n"


def test_eval(home, small_readonly):
    common = ["eval", *options(home, small_readonly), "--text", home / "eval.txt"]
    found = json_of(*common, "--top-k", "1,3")
    assert set(found["top_k"]) == {"1", "3"}
    assert found["passages"] == 3 and found["positions"] == len("the dogit rana")
    assert 0 <= found["kl"] < 1e-2
    assert found["perplexity"] == pytest.approx(found["perplexity_float"], rel=0.05)
    assert found["bits"] == {"weights": 10, "inputs": 12}
    worse = json_of(*common, "--weight-bits", 4, "--input-bits", 5)
    assert worse["bits"] == {"weights": 4, "inputs": 5} and worse["kl"] > 10 * found["kl"]
    assert "KL from float" in jaxgpt2(*common).stdout


def test_compile(home, small_readonly, model, tmp_path):
    found = json_of("compile", *options(home, small_readonly), "--out", tmp_path / "out")
    assert found["bundle"] == model.client.identity  # the same on every run
    assert found["matrices"] == 8 and found["weights"] == 2 * 32 * (96 + 32 + 128 + 128)
    assert found["failure_log2"] < -64 and found["largest_sum"] < 2**31 and found["security_bits"] == 128
    assert found["evaluation_key_bytes"] == 0
    assert found["online_bytes_up"] == 4 * 2 * (3 * 32 + 128)
    assert found["online_bytes_down"] == found["stored_bytes"] == 4 * 2 * (96 + 32 + 128 + 32)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == {**found, "bundle": model.client.identity}
    again = jaxgpt2("compile", *options(home, small_readonly), "--out", tmp_path / "out")
    assert again.exit_code == 2 and "is not an empty directory" in again.stderr
    assert "no evaluation keys" in jaxgpt2("compile", *options(home, small_readonly)).stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate", "a", *LINEAR, "--attention", "lowrank"], "--attention has no place beside --encrypt linear"),
        (["generate", "a", *LINEAR, "--bits", 4], "--bits has no place"),
        (["generate", "a", *LINEAR, "--set", "score_rank=8"], "--set has no place"),
        (["generate", "a", *LINEAR, "--backend", "ckks"], "--backend has no place"),
        (["generate", "a", *LINEAR, "--rounding", "exact"], "--rounding has no place"),
        (["generate", "a", *LINEAR, "--configs", "x.json"], "--configs has no place"),
        (["generate", "a", *LINEAR, "--scheduler", "tcp://x:1"], "--scheduler has no place"),
        (["generate", "a", *LINEAR, "--mode", "simulate"], "--mode quantized gives the same integers"),
        (["generate", "a", *LINEAR, "--weight-bits", 0], "bits of weights of linear layers must be 2 to 12, got 0"),
        (["generate", "a", *LINEAR, "--input-bits", 17], "bits of inputs of linear layers must be 2 to 16, got 17"),
        (["generate", "a", *LINEAR, "--masks", "x"], "--masks is for a server"),
        (["generate", "a", *LINEAR, "--verify", "tiny"], "--verify is for a server"),
        (["generate", "", *LINEAR, "--mode", "encrypted"], "the prompt is empty"),
        (["generate", "a", *LINEAR, "--mode", "encrypted", "--max-new-tokens", 64], "the model's context is 64"),
        (["eval", *LINEAR, "--mode", "encrypted"], "leave --mode encrypted out"),
        (["eval", *LINEAR, "--attention", "softmax"], "--attention has no place"),
        (["compile", *LINEAR, "--attention", "softmax"], "--attention has no place"),
        (["compile", *LINEAR, "--p-error", 0.1], "--p-error has no place"),
        (["prepare"], "prepare needs --server URL and --client DIR"),
        (["prepare", "--server", "http://127.0.0.1:1", "--client", "nowhere"], "nowhere is no client bundle"),
    ],
)
def test_bad_input(home, small_readonly, arguments, part):
    if arguments[0] != "prepare":
        arguments = [*arguments, "--model", small_readonly]
        if "eval" in arguments:
            arguments += ["--text", home / "eval.txt"]
    found = jaxgpt2(*arguments)
    assert found.exit_code == 2, found.exception
    assert part in found.stderr.splitlines()[-1]
    assert found.stdout == ""


def test_bundles_of_circuits_need_no_masks(home):
    remote = ["--server", "http://127.0.0.1:1", "--client", home / "circuits" / "client"]
    for command, part in [
        (["prepare"], "is a bundle of circuits, which need no masks"),
        (["generate", "a", "--masks", "x"], "--masks and --verify are for client bundles of linear layers"),
        (["generate", "a", "--verify", "tiny"], "--masks and --verify are for client bundles of linear layers"),
    ]:
        found = jaxgpt2(*command, *remote)
        assert found.exit_code == 2 and part in found.stderr, found.stderr
    linear = ["--server", "http://127.0.0.1:1", "--client", home / "out" / "client"]
    found = jaxgpt2("generate", "a", *linear, "--keys", home)
    assert found.exit_code == 2 and "--keys has no place" in found.stderr


def test_verifying_against_another_checkpoint(home, model, tmp_path):
    random_checkpoint(tmp_path / "shape", n_layer=1)
    random_checkpoint(tmp_path / "weights")
    from helpers import rewrite_tensors

    name = "transformer__h__1__mlp__c_fc__weight"
    tensors = rewrite_tensors(tmp_path / "weights")
    rewrite_tensors(tmp_path / "weights", **{name: tensors[name.replace("__", ".")] * 1.1})
    owner = linears.Owner(model)
    with linears.serving(owner) as url:
        remote = ["--server", url, "--client", home / "out" / "client"]
        for other, part in [("shape", "has another configuration"), ("weights", "has other weights"),
                            ("nowhere", "no such directory")]:  # fmt: skip
            found = jaxgpt2("generate", "a", *remote, "--verify", tmp_path / other)
            assert found.exit_code == 2 and part in found.stderr, (found.stderr, found.exception)
    assert not owner.requests  # nothing was sent


@pytest.mark.parametrize("command", ["generate", "prepare"])
def test_what_is_not_installed_is_named_before_anything_is_computed(command, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "zstandard" else found(name, *of)
    )
    arguments = {"generate": ["x", "--encrypt", "linear", "--mode", "encrypted"], "prepare": []}[command]
    result = CliRunner().invoke(main, [command, *arguments])
    assert result.exit_code == 2
    assert result.stderr == (
        "jaxgpt2: a private linear layer needs zstandard; install it with: pip install 'jaxgpt2[linear]'\n"
    )


def test_a_server_that_is_not_there(home, monkeypatch):
    monkeypatch.setattr("jaxgpt2.serving.remote.FIRST_PATIENCE", 0.5)
    found = jaxgpt2("prepare", "--server", "http://127.0.0.1:1", "--client", home / "out" / "client", "--masks", home)
    assert found.exit_code == 2 and "does not answer" in found.stderr


def test_interrupted_prepare_goes_on(home, model, tmp_path):
    """Ctrl-C in the middle of a batch ends with 130; what is done is not done again, and texts are right."""
    reached, go = threading.Event(), threading.Event()

    def change(phase: str, name: str, answer: bytes) -> bytes:
        if name == "h.1.attn.c_attn" and not go.is_set():
            reached.set()
            go.wait(60)
        return answer

    owner = linears.Owner(model, change)
    with linears.serving(owner) as url:
        remote = ["--server", url, "--client", home / "out" / "client", "--masks", tmp_path / "masks"]
        command = [sys.executable, "-m", "jaxgpt2.cli", "prepare", *remote, "--json"]
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
        assert reached.wait(60)
        ledgers = home / "state" / "jaxgpt2" / "masks"
        with contextlib.closing(store_for(model.client, tmp_path / "masks", ledgers)) as store:
            deadline = time.monotonic() + 60
            while store.pending().done < 4:  # what was answered is kept a little later
                assert time.monotonic() < deadline
                time.sleep(0.05)
        second = jaxgpt2("prepare", *remote)
        assert second.exit_code == 2 and "another process prepares masks in" in second.stderr
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        assert errors.splitlines()[-1] == "jaxgpt2: stopped" and "Traceback" not in errors
        go.set()
        before = [request.path for request in owner.requests]
        assert {f"/matrices/{number}/ahead" for number in range(5)} <= set(before)
        found = json_of("prepare", *remote)
        assert found["left"] == 2048
        again = [request.path for request in owner.requests[len(before) :]]
        # What was kept is not asked for again: of eight matrices the four before the one that was held up.
        assert sorted(again) == [f"/matrices/{number}/ahead" for number in (4, 5, 6, 7)]
        text = json_of("generate", PROMPT, *remote, "--max-new-tokens", 3)
        assert text["tokens"] == linears.quantized_tokens(model, PROMPT, 3)
        assert json_of("prepare", *remote, "--tokens", 100)["made"] == 0


def test_an_interrupted_text_sends_nothing_more(home, model, tmp_path):
    """Ctrl-C stops it at once; its masks are lost."""
    import dataclasses

    from jaxgpt2.serving.masked import Masked, store_for

    owner = linears.Owner(model)
    sent = []

    class Stopped:
        def ahead(self, name: str, request: Any, size: int) -> bytes:
            raise AssertionError

        def online(self, name: str, masked: Any) -> Any:
            sent.append(name)
            if len(sent) == 11:
                raise KeyboardInterrupt
            return owner._owner.online(name, masked)

    with contextlib.closing(linears.prepared_store(model, tmp_path)) as store:
        client = dataclasses.replace(model.client)
        with pytest.raises(KeyboardInterrupt):
            list(client.generate(PROMPT, 4, Masked(client, Stopped(), store.claim(8))))
        assert len(sent) == 11
        assert store.left() == 2040
    with contextlib.closing(store_for(model.client, tmp_path / "masks", tmp_path / "ledgers")) as store:
        assert store.left() == 2040


def test_serve_refuses_what_is_no_server_bundle(home):
    found = jaxgpt2("serve", home / "out" / "client")
    assert found.exit_code == 2 and "is a client bundle, wanted the server's" in found.stderr


@pytest.mark.parametrize("command", ["serve", "page"])
def test_a_port_that_is_taken_leaves_nothing(home, tmp_path, command):
    arguments = {
        "serve": [home / "out" / "server", "--state", tmp_path / "state"],
        "page": ["--server", "http://127.0.0.1:1", "--client", home / "out" / "client", "--masks", tmp_path / "masks"],
    }
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = jaxgpt2(command, *arguments[command], "--port", port)
    assert found.exit_code == 2
    assert f"cannot listen on 127.0.0.1, port {port}: address already in use" in found.stderr
    assert not list(tmp_path.iterdir())
