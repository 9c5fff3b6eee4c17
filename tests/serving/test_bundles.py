"""Bundles without encryption: what they hold, what a client makes of one, and whole attentions from text to text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner

import fhe
import helpers
from fhe import envelope, storage
from jaxgpt2 import methods
from jaxgpt2.cli import main
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.executors import SimulatedExecutor
from jaxgpt2.methods import MethodConfig, QuantizedModule
from jaxgpt2.methods.method import _METHODS as registered
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.bundle import Bundle, BundleError
from jaxgpt2.serving.client import RemoteGPT2
from jaxgpt2.serving.models import read_client, write_bundles
from served import running

CALIBRATION = ["the cat", "sat on", "a mat", "one dog", "ran after", "two", "it was", "not the", "zebras", "xylem"] * 2
PROMPT, LENGTH = "dog", 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("three-heads")
    helpers.random_checkpoint(directory, n_embd=24, n_head=3)
    (directory / "calibration.txt").write_text("\n".join(CALIBRATION) + "\n")
    (directory / "eval.txt").write_text("the dog\nit ran\na\n")
    return directory


@pytest.fixture(scope="module")
def gpt2(model: Path) -> GPT2:
    return GPT2.from_pretrained(model)


def compiled(gpt2: GPT2, modules: str, method: str, bits: int = 5) -> EncryptedGPT2:
    options = {"training_steps": 0} if method == "lowrank" else {}
    encrypted = EncryptedGPT2.encrypt(gpt2, modules, MethodConfig.of(method, bits, options))
    return encrypted.calibrate(CALIBRATION, LENGTH).compile(CALIBRATION, LENGTH, backend="clear")


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--json"]])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- what a client makes of a bundle ------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "modules"), [pytest.param("lowrank", "0.1,1.2", marks=pytest.mark.slow), ("softmax", "1.attn,0.0")]
)
def test_a_client_bundle_and_the_servers_circuits_give_the_text(gpt2, tmp_path, method, modules):
    encrypted = compiled(gpt2, modules, method)
    write_bundles(encrypted, tmp_path / "out", {})
    client = read_client(Bundle.read(tmp_path / "out" / "client", "client"))
    assert client.modules == encrypted.modules and client.model.sampling == gpt2.sampling
    wanted = list(encrypted.generate(PROMPT, 5, "quantized"))
    executors = {module: SimulatedExecutor(circuit) for module, circuit in encrypted.circuits.items()}
    assert list(client.continue_text(PROMPT, 5, client.run_by(executors))) == wanted
    with pytest.raises(fhe.NoWeights, match="without its weights"):
        list(client.generate(PROMPT, 1, "simulate"))


@pytest.mark.parametrize("full_sequence", [False, True])
def test_a_method_of_a_file_is_named_by_its_hash_and_the_client_runs_no_code(gpt2, tmp_path, full_sequence):
    """A client does without the file. Whoever computes with plain integers must have loaded it, and the same one."""
    path = tmp_path / "mine.py"
    code = (
        "from jaxgpt2.methods import attention\n\n\n"
        f"@attention(full_sequence={full_sequence})\ndef mine(ops, q, k, v):\n    return v.mean(axis=0)\n"
    )
    path.write_text(code)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = methods.named(f"{path}:mine")
    encrypted = compiled(gpt2, "0.1", name)
    write_bundles(encrypted, tmp_path / "out", {})
    assert not any(b"mean(axis=0)" in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    wanted = list(encrypted.generate(PROMPT, 3, "quantized"))
    path.unlink()
    registered.pop(name)
    module = sys.modules.pop(f"jaxgpt2_attention_{digest}").__name__
    known = storage._functions.pop(f"{module}:mine")
    client = read_client(Bundle.read(tmp_path / "out" / "client", "client"))
    (config,) = client.configs.values()
    assert config.method == name == f"mine.py:mine@{digest[:16]}"
    assert module not in sys.modules
    registered.pop(name)  # the client's half of it
    server = tmp_path / "out" / "server" / "circuits" / "0.1"
    with pytest.raises(fhe.UnknownName, match=f"{module}:mine"):
        fhe.get_backend("clear").load(server)
    path.write_text(code)
    assert methods.named(f"{path}:mine") == name
    assert storage._functions[f"{module}:mine"] is not known
    executors = dict.fromkeys(client.modules, SimulatedExecutor(fhe.get_backend("clear").load(server)))
    assert list(client.continue_text(PROMPT, 3, client.run_by(executors))) == wanted


def test_a_server_is_given_the_file_of_a_method(model, gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, out = tmp_path / "mine.py", tmp_path / "out"
    code = "from jaxgpt2.methods import attention\n\n\n@attention\ndef mine(ops, q, k, v):\n    return v.mean(axis=0)\n"
    path.write_text(code)
    run("compile", "--model", model, "--calibration", model / "calibration.txt", "--backend", "clear",
        "--encrypt", "0.1", "--seq-len", LENGTH, "--attention", "mine.py:mine", "--cache", tmp_path / "cache",
        "--out", out)  # fmt: skip
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"mine.py:mine@{digest[:16]}"
    assert Bundle.read(out / "server", "server").content["methods"] == {name: digest}

    def refused(*given: object) -> str:
        found = CliRunner().invoke(main, ["serve", *map(str, [out / "server", "--state", tmp_path / "state", *given])])
        assert found.exit_code == 2 and not (tmp_path / "state").exists()
        (line,) = found.stderr.splitlines()
        return line

    wanted = f"computes with the method mine of mine.py with SHA-256 {digest}, got"
    assert f"{wanted} no file: give the file that was compiled, as --attention mine.py:mine" in refused()
    other = tmp_path / "other.py"
    other.write_text(code.replace("mean", "max"))
    changed = hashlib.sha256(other.read_bytes()).hexdigest()
    assert f"{wanted} other.py with {changed}: give the file" in refused("--attention", "other.py:mine")
    both = ["--attention", "mine.py:mine", "--attention", "other.py:mine"]
    assert f"other.py:mine: {out / 'server'} needs no such method" in refused(*both)
    assert "none.py cannot be read: No such file" in refused("--attention", "none.py:mine")
    assert "--attention 'mine': wanted FILE.py:NAME" in refused("--attention", "mine")

    with running(out / "server", tmp_path / "state", "--attention", path.rename(tmp_path / "renamed.py").name + ":mine",
                 "--workers", 1) as server:  # fmt: skip
        found = run("generate", PROMPT, "--server", server.url, "--client", out / "client", "--keys", tmp_path / "keys",
                    "--send-my-text-unencrypted", "--max-new-tokens", 3)  # fmt: skip
    assert found["tokens"] == list(compiled(gpt2, "0.1", name, 4).generate(PROMPT, 3, "quantized"))


@pytest.fixture
def bare():
    """softmax with nothing but an array as what its results are decoded with."""
    softmax = methods.get("softmax")

    def calibrate(*arguments: Any) -> QuantizedModule:
        module = softmax.head.calibrate(*arguments)
        return dataclasses.replace(module, dequantization=np.asarray(module.dequantization.scale))

    def decode(dequantization: Any, results: Any) -> Any:
        return results[0].astype(np.float32) * np.float32(1) * dequantization

    head = dataclasses.replace(softmax.head, calibrate=calibrate, decode=decode)
    methods.register(dataclasses.replace(softmax, name="bare", head=head, layer=None))
    yield "bare"
    registered.pop("bare")


def test_results_may_be_decoded_with_a_bare_array(gpt2, tmp_path, bare):
    encrypted = compiled(gpt2, "0.1", bare)
    assert isinstance(next(iter(encrypted.quantized.values())).dequantization, np.ndarray)
    write_bundles(encrypted, tmp_path / "out", {})
    bundle = Bundle.read(tmp_path / "out" / "client", "client")
    assert bundle.content["modules"]["0.1"]["dequantization"] == ["dequantization"]
    client = read_client(bundle)
    executors = {module: SimulatedExecutor(circuit) for module, circuit in encrypted.circuits.items()}
    tokens = np.array([gpt2.encode("on a mat")], np.int32)
    got = client.forward(tokens, client.run_by(executors)).logits
    for mode in ("quantized", "simulate"):
        assert np.array_equal(got, encrypted.forward(tokens, encrypted.runner(mode)).logits)
    softmax = compiled(gpt2, "0.1", "softmax")
    assert np.allclose(got, softmax.forward(tokens, softmax.runner("quantized")).logits, atol=1e-5)


# --- a client bundle that somebody else made ----------------------------------------------------


class Evil:
    """What runs a stranger's code when it is unpickled: it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def poisoned(gpt2, tmp_path) -> tuple[Path, Path, Path]:
    """A client bundle with the server's half of a circuit, which is code; the circuit; what the code would make."""
    write_bundles(compiled(gpt2, "0.1", "lowrank", 3), tmp_path / "out", {})
    client, marker = tmp_path / "out" / "client", tmp_path / "the code ran"
    circuit = client / "circuits" / "0.1"
    identity = Bundle.read(client, "client").circuits[0].id
    (circuit / "server.bin").write_bytes(
        envelope.pack("clear circuit", identity, "", [pickle.dumps((Evil(marker), None))])
    )
    return client, circuit, marker


def test_a_file_that_is_not_part_of_a_bundle_is_refused(poisoned):
    client, circuit, marker = poisoned
    with pytest.raises(BundleError, match=r"circuits/0\.1/server\.bin is not part of the bundle"):
        Bundle.read(client, "client")
    assert not marker.exists()
    (circuit / "server.bin").unlink()
    Bundle.read(client, "client")
    (circuit / "more").symlink_to(marker)
    with pytest.raises(BundleError, match=r"circuits/0\.1/more is not part of the bundle"):
        Bundle.read(client, "client")


def test_a_client_runs_no_code_of_a_bundle(poisoned):
    """Though its maker has listed the file, with the right hash."""
    client, circuit, marker = poisoned
    manifest = json.loads((client / bundles.MANIFEST).read_text())
    manifest["files"]["circuits/0.1/server.bin"] = bundles.hashes(client)["circuits/0.1/server.bin"]
    (client / bundles.MANIFEST).write_text(json.dumps(manifest))
    encrypted = read_client(Bundle.read(client, "client"))
    assert not marker.exists()
    (own,) = encrypted.circuits.values()
    with pytest.raises(fhe.NoWeights):
        own.simulate("project", np.zeros((1, 24), int))
    assert not marker.exists()
    # Nor does whoever opens it.
    with pytest.raises(fhe.CircuitFormatError, match="damaged"):
        fhe.get_backend("clear").load(circuit)
    assert not marker.exists()


@pytest.fixture(scope="module")
def original(gpt2, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "out"
    write_bundles(compiled(gpt2, "0.1", "lowrank", 3), directory, {})
    return directory / "client"


@pytest.fixture
def client(original, tmp_path) -> Path:
    """A client bundle that the test may change."""
    return Path(shutil.copytree(original, tmp_path / "client"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a file of JSON."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rehash(client: Path) -> None:
    """Makes the hashes of a manifest those of the files."""
    files = {name: digest for name, digest in bundles.hashes(client).items() if name != bundles.MANIFEST}
    rewrite(client / bundles.MANIFEST, lambda content: content.update(files=files))


def refused(client: Path, *parts: str) -> None:
    """A bundle is refused whose manifest has the right hashes."""
    rehash(client)
    with helpers.one_line(BundleError, "is damaged", *parts):
        read_client(Bundle.read(client, "client"))


@pytest.mark.parametrize("methods", [3, ["mine.py:mine"], None])
def test_methods_that_are_none(client, methods):
    rewrite(client / bundles.MANIFEST, lambda content: content.update(methods=methods))
    refused(client)


@pytest.mark.parametrize("length", [10**12, 0, -1, "8", 8.0, True, None, []])
@pytest.mark.parametrize("name", ["seq_len", "max_tokens"])
def test_lengths_that_are_none(client, name, length):
    def change(content: dict[str, Any]) -> None:
        (content if name == "seq_len" else content["modules"]["0.1"])[name] = length

    rewrite(client / bundles.MANIFEST, change)
    refused(client, "tokens, and its model reads 1 to 64")


@pytest.mark.parametrize(
    "scale", [np.ones(23), np.ones((24, 1)), np.ones(24, int), np.zeros(24), np.full(24, np.nan), None]
)
def test_scales_that_are_none(client, scale):
    path = client / "modules" / "0.1.safetensors"
    tensors = helpers.load_file(path)
    del tensors["input_scale"]
    helpers.save_file(tensors | ({} if scale is None else {"input_scale": scale}), path)
    refused(client, "input_scale")


@pytest.mark.parametrize(
    "names",
    [["dequantization.not a name", "dequantization.mean"], ["dequantization.class"], "dequantization", None, [5], [[]]],
)
def test_names_that_are_none(client, names):
    path = client / "modules" / "0.1.safetensors"
    tensors = helpers.load_file(path)
    helpers.save_file(tensors | {"dequantization.not a name": np.ones(1), "dequantization.class": np.ones(1)}, path)
    rewrite(client / bundles.MANIFEST, lambda content: content["modules"]["0.1"].update(dequantization=names))
    refused(client)


def test_numbers_that_are_none(client):
    path = client / "modules" / "0.1.safetensors"
    tensors = helpers.load_file(path)
    helpers.save_file(tensors | {"dequantization.mean": np.full(8, np.inf)}, path)
    refused(client, "its dequantization is not of finite numbers")


@pytest.mark.parametrize(
    "change",
    [
        lambda functions: functions["project"].update(outputs=10**12),
        lambda functions: functions["project"].update(outputs="3"),
        lambda functions: functions["project"].update(outputs=True),
        lambda functions: functions.update({"no name": functions["project"]}),
        lambda functions: functions["first"].update(sources=[[{"function": "project", "position": 10**9}]]),
        lambda functions: functions["first"].update(sources=[[{"function": "project", "position": "0"}]]),
        lambda functions: functions["first"].update(sources=[[{"function": "nobody", "position": 0}]]),
        lambda functions: functions["first"].update(sources=5),
    ],
)
@pytest.mark.parametrize("both", [True, False])
def test_signatures_that_are_none(client, change, both):
    rewrite(client / "circuits" / "0.1" / "circuit.json", lambda content: change(content["signatures"]))
    if both:
        rewrite(client / bundles.MANIFEST, lambda content: change(content["circuits"]["0.1"]["signatures"]))
    rehash(client)
    with pytest.raises((BundleError, fhe.CircuitFormatError), match="damaged"):
        read_client(Bundle.read(client, "client"))


@pytest.mark.parametrize("identity", ["../../x", "c" * 64, "", 5, None])
def test_an_identity_of_a_circuit_is_the_bundles(client, identity):
    """It names the file of the secret keys."""
    rewrite(client / "circuits" / "0.1" / "circuit.json", lambda content: content.update(id=identity))
    refused(client)
    rewrite(client / bundles.MANIFEST, lambda content: content["circuits"]["0.1"].update(id=identity))
    if identity != "c" * 64:
        refused(client)


@pytest.mark.parametrize("name", ["basis", "mean"])
def test_results_that_a_method_cannot_decode(client, original, gpt2, name):
    path = client / "modules" / "0.1.safetensors"
    tensors = helpers.load_file(path)
    changed = tensors[f"dequantization.{name}"]
    helpers.save_file(tensors | {f"dequantization.{name}": np.ones((*changed.shape[:-1], 5))}, path)
    rehash(client)
    encrypted = read_client(Bundle.read(client, "client"))
    executors = {m: SimulatedExecutor(c) for m, c in compiled(gpt2, "0.1", "lowrank", 3).circuits.items()}
    with helpers.one_line(methods.MethodError, "module 0.1"):
        list(encrypted.continue_text(PROMPT, 2, encrypted.run_by(executors)))


def test_a_file_elsewhere_is_not_part_of_a_bundle(client):
    """Not even looked at: it may have no end."""
    rewrite(client / bundles.MANIFEST, lambda content: content["files"].update({"/proc/kmsg": "0" * 64}))
    with pytest.raises(BundleError, match="lacks /proc/kmsg"):
        Bundle.read(client, "client")


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_attention_from_eval_to_a_server(model, tmp_path):
    """Command by command; sweeps of it are in `test_sweep`."""
    common = ["--model", model, "--calibration", model / "calibration.txt", "--encrypt", "1.attn", "--bits", 5]
    compiling = ["--backend", "clear", "--cache", tmp_path / "cache"]
    measured = {
        mode: run("eval", *common, *(compiling if mode == "simulate" else ()), "--text", model / "eval.txt",
                  "--mode", mode)
        for mode in ("quantized", "simulate")
    }  # fmt: skip
    assert measured["quantized"]["modules"] == "1.attn"
    assert measured["quantized"]["configs"]["1.attn"]["attention"] == "softmax"  # the one that computes whole layers
    assert 0 < measured["quantized"]["kl"] < measured["quantized"]["kl_ablated"]
    assert measured["simulate"]["kl"] == pytest.approx(measured["quantized"]["kl"], rel=1e-3)
    continuing = ["generate", PROMPT, *common, "--max-new-tokens", 4, "--mode"]
    wanted = run(*continuing, "quantized")["tokens"]
    for mode in ("simulate", "encrypted"):
        assert run(*continuing, mode, *compiling)["tokens"] == wanted
    report = run("compile", *common, *compiling, "--seq-len", LENGTH, "--out", tmp_path / "out")
    assert report["modules"] == "1.attn"
    assert {"query", "key", "value", "scores", "softmax", "output"} == set(report["pbs_by_stage"])
    # The client has none of the layer's weights, the output projection's neither, but for its bias.
    stored = helpers.load_file(tmp_path / "out" / "client" / "model" / "model.safetensors")
    own = {name.rpartition("attn.")[2]: tensor for name, tensor in stored.items() if ".h.1.attn" in name}
    assert {name for name, tensor in own.items() if tensor.any()} == {"c_proj.bias"}
    with running(tmp_path / "out" / "server", tmp_path / "state", "--workers", 1) as server:
        remote = run("generate", PROMPT, "--server", server.url, "--client", tmp_path / "out" / "client",
                     "--send-my-text-unencrypted",
                     "--keys", tmp_path / "keys", "--max-new-tokens", 4)  # fmt: skip
    assert remote["tokens"] == wanted and remote["modules"] == "1.attn"


@pytest.mark.slow
def test_sessions_lost_in_mid_text_do_not_change_it(gpt2, tmp_path):
    """Again and again, with two heads whose sessions are both lost; later tokens go on from the new ones."""
    encrypted = compiled(gpt2, "0.1,0.2", "lowrank", 4)
    write_bundles(encrypted, tmp_path / "out", {})
    wanted = list(encrypted.generate(PROMPT, 6, "quantized"))
    with (
        running(tmp_path / "out" / "server", tmp_path / "state", "--workers", 1) as server,
        RemoteGPT2.connect(server.url, tmp_path / "out" / "client", tmp_path / "keys", True) as remote,
        httpx2.Client(base_url=server.url) as client,
    ):
        text, got = remote.generate(PROMPT, 6), []
        for number in range(6):
            if number in (1, 3, 4):
                sessions = [path.name for path in (tmp_path / "state" / "sessions").iterdir()]
                assert len(sessions) == 2
                for name in sessions:
                    assert client.delete(f"/sessions/{name}").status_code == 204
            got.append(next(text))
        assert got == wanted and next(text, None) is None
