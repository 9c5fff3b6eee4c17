"""Checkpoints: every form met in the wild loads to the same model, and every damaged one says what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from helpers import edit_json, one_line, random_checkpoint, rewrite_tensors, torch_logits
from jaxgpt2.cli import main
from jaxgpt2.models.gpt2 import state_dict
from jaxgpt2.models.gpt2.config import ConfigError, GPT2Config
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import assemble, disassemble, parameter_shapes
from weights import CheckpointError, load_config, load_tensors, locate, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def load(directory: Path) -> dict[str, np.ndarray]:
    return load_tensors(directory, parameter_shapes(GPT2Config.from_dict(load_config(directory))))


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype == np.float32
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


# --- forms of a checkpoint --------------------------------------------------------------------------------------------


def test_holds_what_transformers_holds(tmp_path: Path):
    theirs = random_checkpoint(tmp_path).transformer.state_dict()
    assert_same(load(tmp_path), {name: tensor.numpy() for name, tensor in theirs.items()})


def test_names_without_prefix(small: Path):
    wanted = load(small)
    stored = load_file(small / "model.safetensors")
    assert all(name.startswith("transformer.") for name in stored)
    save_file({name.removeprefix("transformer."): t for name, t in stored.items()}, small / "model.safetensors")
    assert_same(load(small), wanted)


def test_a_tied_head_stored_or_not(small: Path):
    wanted = load(small)
    rewrite_tensors(small, lm_head__weight=wanted["wte.weight"])
    assert_same(load(small), wanted)


def test_a_tied_head_that_is_not_the_embedding(small: Path):
    rewrite_tensors(small, lm_head__weight=load(small)["wte.weight"] + 1)
    with one_line(CheckpointError, "lm_head.weight", "wte.weight", "tie_word_embeddings"):
        load(small)


def test_a_separate_head(tmp_path: Path):
    theirs = random_checkpoint(tmp_path, tie_word_embeddings=False)
    tensors = load(tmp_path)
    np.testing.assert_array_equal(tensors["lm_head.weight"], theirs.lm_head.weight.detach().numpy())
    assert not np.array_equal(tensors["lm_head.weight"], tensors["wte.weight"])
    rewrite_tensors(tmp_path, lm_head__weight=None)
    with one_line(CheckpointError, "lm_head.weight", "(300, 32)", "missing"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["", "transformer__"])
def test_mask_buffers_are_ignored(small: Path, prefix: str):
    wanted = load(small)
    masks = {f"{prefix}h__{layer}__attn__bias": np.ones((1, 1, 64, 64), np.uint8) for layer in range(2)}
    others = {f"{prefix}h__{layer}__attn__masked_bias": np.array(-1e4, np.float32) for layer in range(2)}
    rewrite_tensors(small, **masks, **others)
    assert_same(load(small), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, dtype: torch.dtype):
    theirs = random_checkpoint(tmp_path, dtype=dtype, n_layer=1)
    wanted = {name: tensor.float().numpy() for name, tensor in theirs.transformer.state_dict().items()}
    assert_same(load(tmp_path), wanted)


def test_numbers_beyond_float32(small: Path):
    rewrite_tensors(small, transformer__ln_f__bias=np.full(32, 1e300))
    with one_line(CheckpointError, "ln_f.bias", "float32"):
        load(small)


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"]])
def test_pickles_are_converted_by_the_command_of_the_message(small: Path, names: list[str]):
    wanted = load(small)
    state = list(transformers.GPT2LMHeadModel.from_pretrained(small).state_dict().items())
    for index, name in enumerate(names):
        torch.save(dict(state[index :: len(names)]), small / name)
    (small / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        load(small)
    program = shlex.split(str(caught.value).partition("python -c")[2])[0]
    exec(program)  # in this process, for torch is here
    assert_same(load(small), wanted)


def test_shards(small: Path, small_readonly: Path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(small_readonly)
    (small / "model.safetensors").unlink()
    theirs.save_pretrained(small, max_shard_size="20KB")
    assert len(list(small.glob("model-*.safetensors"))) > 3
    assert not (small / "model.safetensors").exists()
    assert_same(load(small), load(small_readonly))


def test_saved_checkpoints_load_here_and_in_transformers(small: Path, tmp_path: Path):
    saved = tmp_path / "new" / "saved"
    tensors = load(small)
    save_checkpoint(saved, load_config(small), tensors)
    assert_same(load(saved), tensors)
    loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(saved, output_loading_info=True)
    theirs, info = loaded
    assert not any(info.values())
    ids = np.arange(64)[None]
    wanted = torch_logits(transformers.GPT2LMHeadModel.from_pretrained(small), ids)
    np.testing.assert_array_equal(torch_logits(theirs, ids), wanted)


def test_a_directory_becomes_a_model(small: Path):
    ids = np.arange(64)[None]
    wanted = torch_logits(transformers.GPT2LMHeadModel.from_pretrained(small), ids)
    np.testing.assert_allclose(GPT2.from_pretrained(str(small))(ids), wanted, rtol=0, atol=1e-4)


def test_assemble_and_disassemble_are_inverse(small: Path):
    config, tensors = GPT2Config.from_dict(load_config(small)), load(small)
    back = disassemble(assemble(config, {name: jnp.asarray(tensor) for name, tensor in tensors.items()}))
    assert_same({name: np.asarray(tensor) for name, tensor in back.items()}, tensors)


# --- sizes ------------------------------------------------------------------------------------------------------------

SIZES = {
    "distilgpt2": (GPT2Config(n_layer=6), 81_912_576),
    "gpt2": (GPT2Config(), 124_439_808),
    "gpt2-xl": (GPT2Config(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
}


@pytest.mark.parametrize(("config", "count"), SIZES.values(), ids=list(SIZES))
def test_every_size_has_the_tensors_that_transformers_has(config: GPT2Config, count: int):
    with torch.device("meta"):
        theirs = transformers.GPT2Model(
            transformers.GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        )
    shapes = parameter_shapes(config)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


# --- damaged tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"transformer__h__1__mlp__c_fc__weight": None}, ["h.1.mlp.c_fc.weight", "(32, 128)", "missing"]),
        (
            {"transformer__h__1__ln_2__bias": None, "transformer__ln_f__weight": None},
            ["h.1.ln_2.bias", "(32,)", "missing", "1 more"],
        ),
        ({"transformer__h__2__ln_1__weight": np.ones(32, np.float32)}, ["h.2.ln_1.weight", "(32,)", "not part"]),
        ({"surprise": np.ones((2, 3), np.float32)}, ["surprise", "(2, 3)"]),
        ({"transformer__wpe__weight": np.ones((65, 32), np.float32)}, ["wpe.weight", "(65, 32)", "(64, 32)"]),
        (
            {"transformer__h__0__attn__c_attn__weight": np.ones((96, 32), np.float32)},
            ["h.0.attn.c_attn.weight", "(96, 32)", "(32, 96)"],
        ),
        ({"transformer__h__0__ln_1__bias": np.array(1, np.float32)}, ["h.0.ln_1.bias", "()", "(32,)"]),
        ({"transformer__ln_f__bias": np.ones(32, np.int8)}, ["ln_f.bias", "I8", "F32"]),
        ({"ln_f__bias": np.ones(32, np.float32)}, ["ln_f.bias", "twice"]),
        ({"lm_head__weight": np.ones((299, 32), np.float32)}, ["lm_head.weight", "wte.weight"]),
    ],
)
def test_damaged_tensors(small: Path, changes: dict[str, np.ndarray | None], parts: list[str]):
    rewrite_tensors(small, **changes)
    with one_line(CheckpointError, str(small), *parts):
        GPT2.from_pretrained(small)


def test_config_of_another_size(small: Path):
    edit_json(small / "config.json", n_embd=48)
    with one_line(CheckpointError, "h.0.attn.c_attn.bias", "(96,)", "(144,)"):
        GPT2.from_pretrained(small)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_layer": 10**9}, ["n_layer is 1000000000", "those of 2 blocks"]),
        ({"n_layer": 3}, ["n_layer is 3", "those of 2 blocks"]),
        ({"n_embd": 4 * 10**30}, ["n_embd is 4", "no tensor has a side above 300"]),
        ({"vocab_size": 10**12}, ["vocab_size is 1000000000000", "300"]),
        ({"n_positions": 10**12}, ["n_positions is 1000000000000", "300"]),
        ({"n_inner": 10**12}, ["inner_dim is 1000000000000", "300"]),
        ({"n_head": 10**9, "n_embd": 10**9}, ["n_embd is 1000000000", "300"]),
    ],
)
def test_sizes_beyond_the_tensors_are_refused_before_anything_is_built(
    small: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], parts: list[str]
):
    """What is built later grows with these numbers, and the size of the headers does not: nothing is built."""
    edit_json(small / "config.json", **changes)

    def build(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(state_dict, "_blueprint", build)
    for read in (GPT2.from_pretrained, lambda name: run("sweep", "--model", name, "--out", small / "out")):
        with one_line(ConfigError, str(small / "config.json"), *parts):
            read(small)


def run(*arguments: object) -> None:
    """A command, whose error is raised."""
    with main.make_context("jaxgpt2", [str(argument) for argument in arguments]) as context:
        click.Group.invoke(main, context)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gptj"}, ["model_type", "'gptj'", "'gpt2'"]),
        ({"activation_function": "mish"}, ["activation_function", "'mish'"]),
        ({"n_head": 5}, ["n_embd 32", "n_head 5"]),
        ({"scale_attn_weights": "yes"}, ["scale_attn_weights", "'yes'"]),
        ({"n_layer": "two"}, ["n_layer", "'two'"]),
    ],
)
def test_config_that_is_no_gpt2(small: Path, changes: dict[str, Any], parts: list[str]):
    edit_json(small / "config.json", **changes)
    with one_line(ConfigError, str(small / "config.json"), *parts):
        GPT2.from_pretrained(small)


# --- damaged files ----------------------------------------------------------------------------------------------------


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda d: truncate(d / "model.safetensors", 50_000), ["model.safetensors", "damaged"]),
    "truncated in its header": (lambda d: truncate(d / "model.safetensors", 100), ["model.safetensors", "damaged"]),
    "empty": (lambda d: truncate(d / "model.safetensors", 0), ["model.safetensors", "damaged"]),
    "not safetensors": (lambda d: (d / "model.safetensors").write_text("no\n" * 99), ["model.safetensors", "damaged"]),
    "a pickle": (lambda d: torch.save({}, d / "model.safetensors"), ["model.safetensors", "damaged"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors", "index.json"]),
    "a directory for weights": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
        ["model.safetensors"],
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "garbage config": (lambda d: (d / "config.json").write_text('{"n_layer": \n'), ["config.json"]),
    "config of bytes": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json"]),
    "endless config": (lambda d: (d / "config.json").write_text("[" * 100_000), ["config.json"]),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "list"]),
}


@pytest.mark.parametrize(("damage", "parts"), DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_files(small: Path, damage: Callable[[Path], object], parts: list[str]):
    damage(small)
    with one_line(CheckpointError, str(small), *parts):
        GPT2.from_pretrained(small)


@pytest.fixture
def sharded(small: Path) -> Path:
    """The small checkpoint in two files."""
    tensors = load_file(small / "model.safetensors")
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, small / file)
    (small / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (small / "model.safetensors").unlink()
    return small


def test_a_missing_shard(sharded: Path):
    load(sharded)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with one_line(CheckpointError, "model-00002-of-00002.safetensors", "index.json"):
        load(sharded)


def test_a_truncated_shard(sharded: Path):
    truncate(sharded / "model-00002-of-00002.safetensors", 4000)
    with one_line(CheckpointError, "model-00002-of-00002.safetensors", "damaged"):
        load(sharded)


def test_a_tensor_in_two_shards(sharded: Path):
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00002-of-00002.safetensors")
    with one_line(CheckpointError, "model-00002-of-00002.safetensors", "twice"):
        load(sharded)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], "x", {"wte.weight": 3}, {"wte.weight": "../model.safetensors"}, {"a": "no.safetensors"}],
)
def test_an_index_of_nothing(sharded: Path, weight_map: Any):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with one_line(CheckpointError, str(sharded), "index.json"):
        load(sharded)


# --- where a model is -------------------------------------------------------------------------------------------------


def test_locate_a_directory(small: Path):
    assert locate(small) == locate(str(small)) == small


def test_locate_a_file_or_nonsense(small: Path):
    with one_line(CheckpointError, "config.json", "is a file"):
        locate(small / "config.json")
    for name in (str(small / "not-here"), "two words", "a/b/c"):
        with one_line(CheckpointError, name):
            locate(name)


def locate_apart(name: str, hub: Path, **environment: str) -> str:
    """What `locate` answers in a process of its own, as huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys, weights\n"
        "try: print(weights.locate(sys.argv[1]))\n"
        "except weights.CheckpointError as error: print('error:', error)"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    result = subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=ROOT,
        env=inherited | {"HF_HUB_CACHE": str(hub)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.removesuffix("\n")


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(small: Path, tmp_path: Path) -> Path:
    """A cache of huggingface_hub that holds the small model as `someone/small`."""
    repository = tmp_path / "hub" / "models--someone--small"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in small.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(repository / "blobs" / path.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def test_a_model_of_the_hub_from_the_cache(hub: Path, small: Path):
    directory = Path(locate_apart("someone/small", hub, HF_HUB_OFFLINE="1"))
    assert directory == hub / "models--someone--small" / "snapshots" / REVISION
    assert_same(load(directory), load(small))


@pytest.mark.parametrize(
    ("name", "environment", "part"),
    [
        ("someone/else", {"HF_HUB_OFFLINE": "1"}, "not in the local cache"),
        ("someone/else", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "not in the local cache"),
        ("some--one/else", {"HF_HUB_OFFLINE": "1"}, "--"),
    ],
)
def test_a_model_of_the_hub_that_is_not_there(hub: Path, name: str, environment: dict[str, str], part: str):
    answer = locate_apart(name, hub, **environment)
    assert answer.startswith(f"error: {name}")
    assert part in answer
    assert "\n" not in answer
