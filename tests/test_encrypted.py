"""The encrypted model: its modes agree, none stands in for another, and heads are cut out of GPT-2 as they should."""

import dataclasses
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fhe
import helpers
from fhe import registry
from fhe.clear import ClearBackend
from jaxgpt2 import methods
from jaxgpt2.decoding import NotReady
from jaxgpt2.encrypted import EncryptedGPT2, head_weights
from jaxgpt2.errors import InputError
from jaxgpt2.executors import LocalExecutor, SimulatedExecutor, StateLost, cluster, processes
from jaxgpt2.methods import MethodConfig
from jaxgpt2.methods.method import float_head
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module, ModuleError, parse_modules, read_configs
from jaxgpt2.quantize import Bits

# The tokenizer of the random models has a token a byte.
CALIBRATION = ["the cat", "sat on", "a mat", "one dog", "ran after", "two", "it was", "not the", "zebras", "xylem"] * 4
PROMPT = "dog"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> GPT2:
    directory = tmp_path_factory.mktemp("three-heads")
    helpers.random_checkpoint(directory, n_embd=24, n_head=3)
    return GPT2.from_pretrained(directory)


def encrypted_of(gpt2: GPT2, heads: str, bits: int = 8, max_tokens: int = 8, method: str | None = None,
                 options: dict[str, int] | None = None) -> EncryptedGPT2:  # fmt: skip
    method = method or ("softmax" if "attn" in heads else "lowrank")  # softmax has a whole-layer form
    encrypted = EncryptedGPT2.encrypt(gpt2, heads, MethodConfig.of(method, Bits.of(bits), options))
    return encrypted.calibrate(CALIBRATION, max_tokens)


def token_ids(gpt2: GPT2, text: str) -> np.ndarray:
    return np.array([gpt2.encode(text)], np.int32)


@pytest.mark.parametrize("heads", ["0.0", "1.2", "0.1,1.0", "0.attn", "1.attn,0.2", "0.0,0.1,0.2"])
def test_the_float_runner_gives_the_float_model(gpt2, heads):
    encrypted = EncryptedGPT2.encrypt(gpt2, heads, MethodConfig.of("softmax", Bits.of(4)))
    tokens = token_ids(gpt2, "on a mat")
    assert np.allclose(encrypted.forward(tokens, "float").logits, gpt2(tokens), atol=1e-5)


def test_contributions_are_the_heads_through_the_projection(gpt2):
    encrypted = EncryptedGPT2.encrypt(gpt2, "0.2", MethodConfig.of("lowrank", Bits.of(4)))
    tokens = token_ids(gpt2, "on a mat")
    weights = head_weights(gpt2, 0, 2)
    block = gpt2.model.h[0]
    x = np.asarray(block.ln_1(gpt2.model.embed(jnp.asarray(tokens))), np.float64)[0]
    wanted = float_head(weights, x) @ weights.output
    assert np.allclose(encrypted.forward(tokens, "float").contributions[0, 0], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "heads", "bound"),
    # lowrank predicts its row maxima from a calibration text that is tiny here.
    [
        ("softmax", "0.0", 0.05),
        ("softmax", "0.1,1.0", 0.05),
        ("softmax", "0.attn", 0.05),
        pytest.param("lowrank", "0.1,1.0", 0.1, marks=pytest.mark.slow),
    ],
)
def test_enough_bits_come_close_to_float(gpt2, method, heads, bound):
    encrypted = encrypted_of(gpt2, heads, bits=9, method=method)
    tokens = token_ids(gpt2, "on a mat")
    reference = encrypted.forward(tokens, "float")
    quantized = encrypted.forward(tokens, encrypted.runner("quantized"))
    difference = np.linalg.norm(quantized.contributions - reference.contributions)
    assert difference < bound * np.linalg.norm(reference.contributions)


@pytest.mark.parametrize("heads", ["1.1", "0.0,1.2", "0.attn"])
def test_every_mode_gives_the_integers_of_the_quantized_one(gpt2, heads, tmp_path):
    encrypted = encrypted_of(gpt2, heads, bits=4)
    compiled = encrypted.compile(CALIBRATION, 8, backend="clear", cache=tmp_path)
    keys = compiled.make_keys(tmp_path)
    tokens = np.zeros((1, 8), np.int32)
    tokens[0, :3] = gpt2.encode(PROMPT)
    wanted = compiled.forward(tokens, compiled.runner("quantized"))
    for mode in ("simulate", "encrypted"):
        got = compiled.forward(tokens, compiled.runner(mode, keys))
        assert np.array_equal(wanted.contributions, got.contributions)
        assert np.array_equal(wanted.logits, got.logits)


def test_generate_works_in_every_mode_and_gives_the_same_text(gpt2):
    encrypted = encrypted_of(gpt2, "0.1", bits=6).compile(CALIBRATION, 8, backend="clear")
    keys = encrypted.make_keys()
    assert list(encrypted.generate(PROMPT, 4, "float")) == list(gpt2.generate(PROMPT, 4))
    texts = [list(encrypted.generate(PROMPT, 4, mode, keys=keys)) for mode in ("quantized", "simulate", "encrypted")]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 4


# Training takes seconds a head, and concerns nothing here.
UNTRAINED = {"lowrank": {"training_steps": 0}}
MIXED = {"softmax": "0.2,1.attn", "lowrank": "0.1,1.2"}


@pytest.mark.parametrize(("method", "modules"), MIXED.items())
@pytest.mark.parametrize("mode", ["quantized", "simulate", "encrypted"])
def test_a_text_read_in_pieces_is_the_text_read_at_once(gpt2, method, modules, mode):
    encrypted = encrypted_of(gpt2, modules, bits=4, method=method, options=UNTRAINED.get(method)).compile(
        CALIBRATION, 8, backend="clear"
    )
    runner, tokens = encrypted.runner(mode, encrypted.make_keys()), token_ids(gpt2, "on a mat")
    wanted = encrypted.forward(tokens, runner)
    for cuts in ([], [3], list(range(1, 8)), [2, 3, 6]):
        cache, pieces = encrypted.empty_cache(1, 8), []
        for start, end in zip([0, *cuts], [*cuts, 8], strict=True):
            pieces.append(encrypted.forward(tokens[:, start:end], runner, cache))
            cache = pieces[-1].cache
            assert cache is not None and cache.length == end
        # For other lengths the float model between the modules is another compiled program, whose last bits may differ.
        got = np.concatenate([piece.contributions for piece in pieces], axis=2)
        assert np.allclose(got, wanted.contributions, atol=1e-5)
        assert np.allclose(np.concatenate([piece.logits for piece in pieces], axis=1), wanted.logits, atol=1e-4)


@pytest.mark.parametrize("method", ["softmax", "lowrank", "polynomial"])
def test_quantized_modules_are_kept_and_come_back(gpt2, tmp_path, monkeypatch, method):
    encrypted = EncryptedGPT2.encrypt(gpt2, "0.1", MethodConfig.of(method, 4, UNTRAINED.get(method)))
    made = encrypted.calibrate(CALIBRATION, 8, tmp_path)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(EncryptedGPT2, "calibrate_on", None)
        found = encrypted.calibrate(CALIBRATION, 8, tmp_path)
    assert jax.tree.structure(found.quantized) == jax.tree.structure(made.quantized)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.quantized, made.quantized))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    encrypted.calibrate(CALIBRATION, 8, tmp_path)
    assert path.read_bytes() == whole


@dataclass
class Counted:
    """A model that notes of every piece of it how many tokens it was given."""

    model: GPT2
    calls: list[tuple[str, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        if name not in ("embed", "block", "attend", "leave", "unembed"):
            return found

        def counted(*arguments: Any) -> Any:
            tokens = arguments[0] if name in ("embed", "unembed") else arguments[1]
            self.calls.append((name, tokens.shape[1]))
            return found(*arguments)

        return counted


@pytest.mark.parametrize("mode", ["quantized", "simulate", "encrypted"])
@pytest.mark.parametrize("method", ["softmax", "lowrank"])
def test_a_new_token_takes_one_pass_over_one_token(gpt2, mode, method):
    """Nothing runs the float model over the text, or over padding, again."""
    encrypted = encrypted_of(gpt2, "1.1", bits=4, method=method, options=UNTRAINED.get(method)).compile(
        CALIBRATION, 8, backend="clear"
    )
    keys, counted = encrypted.make_keys(), Counted(gpt2)
    text = dataclasses.replace(encrypted, model=counted).generate(PROMPT, 4, mode, keys=keys)
    first = next(text)
    # Three tokens, padded to four: few lengths are compiled.
    assert counted.calls == [("embed", 4), ("block", 4), ("attend", 4), ("leave", 4), ("unembed", 1)]
    tokens = [first]
    for _ in range(3):
        counted.calls.clear()
        tokens.append(next(text))
        assert counted.calls == [(name, 1) for name in ("embed", "block", "attend", "leave", "unembed")]
    assert tokens == list(encrypted.generate(PROMPT, 4, "quantized"))


@dataclass
class Forgetful:
    """An executor whose server keeps results under numbers, and loses them all when it is told to."""

    circuit: fhe.Circuit
    kept: dict[int, Any] = field(default_factory=dict)
    made: int = 0
    runs: int = 0

    def encrypt(self, name: str, *arrays: np.ndarray) -> Any:
        return [self._keep(array) for array in arrays]

    def _keep(self, array: Any) -> int:
        self.made += 1
        self.kept[self.made] = array
        return self.made

    def run(self, name: str, arrays: Any) -> Any:
        self.runs += 1
        if any(handle not in self.kept for handle in arrays):
            return [-1] * self.circuit.signatures[name].outputs
        return [self._keep(result) for result in self.circuit.simulate(name, *(self.kept[each] for each in arrays))]

    def decrypt(self, name: str, results: Any) -> Any:
        if any(handle not in self.kept for handle in results):
            raise StateLost
        return [self.kept[handle] for handle in results]


@pytest.mark.parametrize("lost_after", [0, 1, 2, 3])
def test_a_text_whose_server_lost_its_state_is_read_again_and_is_the_same(gpt2, lost_after):
    encrypted = encrypted_of(gpt2, "0.1,0.2,1.0", bits=4, options=UNTRAINED["lowrank"]).compile(
        CALIBRATION, 8, backend="clear"
    )
    executors = {module: Forgetful(circuit) for module, circuit in encrypted.circuits.items()}
    wanted = list(encrypted.generate(PROMPT, 5, "simulate"))
    text = encrypted.continue_text(PROMPT, 5, encrypted.run_by(executors))
    got = []
    for number in range(5):
        if number == lost_after + 1:  # of two modules out of three
            for module in (Module(0, 2), Module(1, 0)):
                executors[module].kept.clear()
        before = {module: executor.runs for module, executor in executors.items()}
        got.append(next(text))
        took = {module: executor.runs - before[module] for module, executor in executors.items()}
        if number == lost_after + 1:
            assert took[Module(0, 1)] < took[Module(0, 2)] == took[Module(1, 0)]
    assert got == wanted


def test_state_that_is_lost_at_once_is_an_error_after_one_more_try(gpt2):
    class Broken(Forgetful):
        def decrypt(self, name: str, results: Any) -> Any:
            raise StateLost("the server is gone")

    encrypted = encrypted_of(gpt2, "0.1", bits=4).compile(CALIBRATION, 8, backend="clear")
    executors = {module: Broken(circuit) for module, circuit in encrypted.circuits.items()}
    with pytest.raises(StateLost, match="the server is gone"):
        list(encrypted.continue_text(PROMPT, 2, encrypted.run_by(executors)))


def test_no_mode_stands_in_for_another(gpt2):
    bare = EncryptedGPT2.encrypt(gpt2, "0.1", MethodConfig.of("lowrank", Bits.of(4)))
    with pytest.raises(NotReady, match=r"0\.1 is not calibrated"):
        list(bare.generate(PROMPT, 2, "quantized"))
    with pytest.raises(NotReady, match=r"0\.1 is not calibrated"):
        bare.compile(CALIBRATION, 8, backend="clear")
    calibrated = encrypted_of(gpt2, "0.1")
    for mode in ("simulate", "encrypted"):
        with pytest.raises(NotReady, match="needs compiled modules"):
            list(calibrated.generate(PROMPT, 2, mode))
    compiled = calibrated.compile(CALIBRATION, 5, backend="clear")
    with pytest.raises(NotReady, match="needs keys"):
        list(compiled.generate(PROMPT, 2, "encrypted"))
    with pytest.raises(NotReady, match="made for 5"):
        list(compiled.generate(PROMPT, 4, "simulate"))
    with pytest.raises(NotReady, match="calibrated for 8 tokens"):
        calibrated.compile(CALIBRATION, 9, backend="clear")


def test_an_unknown_mode_is_no_mode(gpt2):
    compiled = encrypted_of(gpt2, "0.1").compile(CALIBRATION, 5, backend="clear")
    with pytest.raises(InputError, match="no mode 'encripted', there are: float, quantized, simulate, encrypted"):
        compiled.generate(PROMPT, 2, "encripted", keys=compiled.make_keys())  # pyright: ignore[reportArgumentType]


def test_calibrating_again_forgets_the_circuits(gpt2):
    compiled = encrypted_of(gpt2, "0.1").compile(CALIBRATION, 5, backend="clear")
    assert not compiled.calibrate(CALIBRATION, 6).circuits


def test_a_backend_without_lookups_is_refused_with_what_fits(gpt2, monkeypatch):
    class NoLookups:
        name = "approximate-only"
        offers = frozenset({"approximate"})

    monkeypatch.setitem(registry._registry.factories, "approximate-only", NoLookups)
    message = "'lowrank' needs integers, lookup, which backend 'approximate-only' lacks; methods that fit it: none"
    with pytest.raises(methods.MethodError, match=message):
        encrypted_of(gpt2, "0.1").compile(CALIBRATION, 5, backend="approximate-only")


def test_a_configuration_may_say_how_it_is_encrypted(gpt2, tmp_path):
    path, own = tmp_path / "configs.json", fhe.FHEConfig(0.05, "exact")
    configs = {
        Module(0, 0): MethodConfig("lowrank", Bits.of(4), encryption=own),
        Module(0, 1): MethodConfig.of("lowrank", 4),
    }
    path.write_text(json.dumps({"modules": {str(module): config.to_json() for module, config in configs.items()}}))
    read = read_configs(path, gpt2.config)
    assert read[Module(0, 0)].fhe_config == own
    assert read[Module(0, 1)].fhe_config == methods.get("lowrank").fhe_config
    encrypted = EncryptedGPT2(gpt2, read)
    assert encrypted.fhe_configs()[Module(0, 0)] == own
    assert encrypted.fhe_configs(p_error=0.5)[Module(0, 0)] == fhe.FHEConfig(0.5, "exact")
    assert encrypted.fhe_configs(rounding="none")[Module(0, 1)].rounding == "none"


@pytest.mark.parametrize(
    ("encryption", "message"),
    [
        ({"p_error": 3}, "a configuration's encryption cannot be: p_error must lie between 2\\*\\*-128 and 1, not 3"),
        ({"rounding": "up"}, "a configuration's encryption cannot be: rounding must be one of exact"),
        ({"error": 1}, "wanted a configuration with attention, bits and options, got"),
    ],
)
def test_configurations_that_cannot_be_encrypted_are_refused(gpt2, tmp_path, encryption, message):
    config = MethodConfig.of("lowrank", 4).to_json() | {"encryption": encryption}
    (tmp_path / "configs.json").write_text(json.dumps({"modules": {"0.0": config}}))
    with pytest.raises(methods.MethodError, match=message):
        read_configs(tmp_path / "configs.json", gpt2.config)


def test_lookups_and_slots_do_not_run_on_each_other(gpt2):
    pytest.importorskip("tenseal", reason="the ckks extra is not installed")
    message = "'lowrank' needs integers, lookup, which backend 'ckks' lacks; methods that fit it: polynomial"
    with pytest.raises(methods.MethodError, match=message):
        encrypted_of(gpt2, "0.1").compile(CALIBRATION, 5, backend="ckks")
    message = "'polynomial' needs slots, which backend 'clear' lacks; methods that fit it: lowrank,.* softmax"
    with pytest.raises(methods.MethodError, match=message):
        encrypted_of(gpt2, "0.1", method="polynomial").compile(CALIBRATION, 5, backend="clear")
    configs = {Module(0, 0): MethodConfig.of("lowrank", 4), Module(0, 1): MethodConfig.of("polynomial", 4)}
    with pytest.raises(methods.MethodError, match=r"several backends \(ckks, concrete\)"):
        EncryptedGPT2(gpt2, configs).calibrate(CALIBRATION, 5).compile(CALIBRATION, 5)


def test_slots_read_a_prompt_and_then_token_by_token(gpt2):
    pytest.importorskip("tenseal", reason="the ckks extra is not installed")
    encrypted = encrypted_of(gpt2, "0.1", method="polynomial").compile(CALIBRATION, 6)
    assert encrypted.backend == "ckks"
    texts = [list(encrypted.generate(PROMPT, 4, mode)) for mode in ("quantized", "simulate")]
    assert texts[0] == texts[1]
    tokens = token_ids(gpt2, "on a m")
    wanted, got = (
        encrypted.forward(tokens, encrypted.runner(mode)).contributions for mode in ("quantized", "simulate")
    )
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted)
    (module,) = encrypted.modules
    together, one_by_one = encrypted.costs(6)[module], encrypted.costs(6, 3)[module]
    assert together.counts["levels"] == one_by_one.counts["levels"]
    assert 2 < one_by_one.counts["rotations"] / together.counts["rotations"] < 4
    assert json.loads(json.dumps(together.to_json()))["estimated_run_seconds"] == together.estimated_run_seconds


def test_a_runner_of_circuits_needs_no_weights(gpt2):
    """What a client has: the float model, the client's part of calibration, and executors that run the heads."""
    encrypted = encrypted_of(gpt2, "0.1", bits=4).compile(CALIBRATION, 6, backend="clear")
    executors = {module: SimulatedExecutor(circuit) for module, circuit in encrypted.circuits.items()}
    calibrated = {module: each.client for module, each in encrypted.quantized.items()}
    assert all(each.params is None for each in calibrated.values())
    client = EncryptedGPT2(encrypted.model, encrypted.configs, calibrated, seq_len=6)
    tokens = token_ids(gpt2, "on a m")
    wanted, got = (
        encrypted.forward(tokens, encrypted.runner("quantized")),
        client.forward(tokens, client.run_by(executors)),
    )
    assert np.array_equal(wanted.logits, got.logits)


def test_a_method_of_single_heads_is_refused_for_a_layer(gpt2):
    with pytest.raises(methods.MethodError, match="'lowrank' computes single heads only"):
        EncryptedGPT2.encrypt(gpt2, "0.attn", MethodConfig.of("lowrank", Bits.of(4)))


def test_modules_are_read_in_order(gpt2):
    assert parse_modules("1.2, 0.attn,1.0", gpt2.config) == (Module(0, None), Module(1, 0), Module(1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read module ''"),
        ("0", "wanted LAYER.HEAD"),
        ("0.x", "cannot read module '0.x'"),
        ("-1.0", "cannot read module '-1.0'"),
        ("0" * 3000, "cannot read module '0{100}': wanted LAYER.HEAD"),
        ("2.0", "layers 0 to 1, heads 0 to 2"),
        ("0.3", "there is no module 0.3"),
        ("9.attn", "there is no module 9.attn"),
        ("0.1,0.1", "named twice"),
        ("0.1,0.attn", "0.1 is named twice"),
    ],
)
def test_modules_that_cannot_be(gpt2, text, message):
    with pytest.raises(ModuleError, match=message):
        parse_modules(text, gpt2.config)


def test_heads_run_on_the_workers_of_a_cluster_one_of_which_dies(gpt2, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the cluster extra is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    encrypted = encrypted_of(gpt2, "0.0,0.2,1.1", bits=4).compile(CALIBRATION, 8, backend="clear")
    keys = encrypted.make_keys()
    wanted = list(encrypted.generate("dog", 3, "encrypted", keys=keys))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as workers:
        client = cluster.connect(workers.scheduler_address)
        executors = {
            module: cluster.send(client, circuit, keys[module]) for module, circuit in encrypted.circuits.items()
        }
        text = encrypted.continue_text("dog", 3, encrypted.run_by(executors))
        first = next(text)
        os.kill(next(iter(workers.workers.values())).process.pid, signal.SIGKILL)
        assert [first, *text] == wanted
        client.close()


def test_heads_of_a_layer_run_in_processes_of_their_own_without_the_secret_keys(gpt2, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    encrypted = encrypted_of(gpt2, "0.0,0.2,1.1", bits=4).compile(CALIBRATION, 8, backend="clear")
    keys = encrypted.make_keys()
    wanted = list(encrypted.generate("dog", 3, "encrypted", keys=keys))
    with processes.over_cores(encrypted.circuits, keys, 2) as executors:
        pools = [
            executor.pool for executor in executors.values() if isinstance(executor, processes.ProcessPoolExecutor)
        ]
        assert pools[0] is pools[2] and pools[0] is not pools[1]
        assert list(encrypted.continue_text("dog", 3, encrypted.run_by(executors))) == wanted
        os.kill(pools[1].submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(processes.ProcessDied, match="a process died"):
            list(encrypted.continue_text("dog", 3, encrypted.run_by(executors)))


def test_one_head_a_layer_and_backends_of_all_cores_need_no_processes(gpt2, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 2)
    encrypted = encrypted_of(gpt2, "0.0,1.1", bits=4).compile(CALIBRATION, 8, backend="clear")
    keys = encrypted.make_keys()
    with encrypted.over_cores(keys) as runner:
        assert list(encrypted.continue_text("dog", 2, runner)) == list(
            encrypted.generate("dog", 2, "encrypted", keys=keys)
        )
    for at_once, offers in ((1, frozenset()), (2, frozenset({"cores"}))):
        monkeypatch.setattr(ClearBackend, "offers", offers)
        with processes.over_cores(encrypted.circuits, keys, at_once) as executors:
            assert {type(executor) for executor in executors.values()} == {LocalExecutor}
