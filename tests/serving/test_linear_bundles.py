"""Bundles of linear layers that somebody damaged, or made to do harm: one clear line, at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import linears
from helpers import one_line
from jaxgpt2.generation import GREEDY, Sampling
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.bundle import Bundle, BundleError
from jaxgpt2.serving.linear_bundle import read_client, read_weights, write_bundles

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def model(linear_gpt2) -> LinearGPT2:
    return linear_gpt2


SAMPLING = Sampling(repetition_penalty=1.25, no_repeat_ngram_size=4)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "out"
    told = dataclasses.replace(model.client, sampling=SAMPLING)
    write_bundles(dataclasses.replace(model, client=told), directory, {})
    return directory


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest, and makes its hashes those of the files."""
    path = directory / "bundle.json"
    content = json.loads(path.read_text())
    path.unlink()
    content["files"] = bundles.hashes(directory)
    change(content)
    path.write_text(json.dumps(content))


def read(directory: Path) -> Any:
    bundle = Bundle.read(directory, directory.name)
    return (read_client if directory.name == "client" else read_weights)(bundle)


def refused(directory: Path, *parts: str) -> None:
    started = time.monotonic()
    with one_line(BundleError, str(directory), *parts):
        read(directory)
    assert time.monotonic() - started < 5


def tensors_of(directory: Path) -> Path:
    return directory / {"client": "client.safetensors", "server": "weights.safetensors"}[directory.name]


KINDS = pytest.mark.parametrize("kind", ["server", "client"])


def test_a_client_bundle_without_a_generation_config_is_greedy(out):
    (out / "client" / "generation_config.json").unlink()
    manifest(out / "client", lambda content: None)
    assert read(out / "client").sampling == GREEDY


def test_bundles_come_back(out, model):
    weights, client = read(out / "server"), read(out / "client")
    assert client.sampling == SAMPLING
    assert list(weights) == list(model.weights)
    assert all(np.array_equal(weights[name], each) for name, each in model.weights.items())
    assert client.identity == model.client.identity and client.bits == model.client.bits
    assert linears.quantized_tokens(LinearGPT2(client, weights), "dog", 3) == linears.quantized_tokens(model, "dog", 3)


@KINDS
@pytest.mark.parametrize("change", ["cut", "junk", "empty", "long header", "deep header", "lying header", "bfloat16"])
def test_damaged_tensors(out, kind, change):
    path = tensors_of(out / kind)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    deep = b'{"a":' * 100_000
    lying = header.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1)
    half = header.replace(b'"dtype":"F32"', b'"dtype":"BF16"', 1).replace(b'"dtype":"I16"', b'"dtype":"BF16"', 1)
    path.write_bytes(
        {
            "cut": data[:-1],
            "junk": b"\0" * 1000,
            "empty": b"",
            "long header": struct.pack("<Q", 2**63) + header + rest,
            "deep header": struct.pack("<Q", len(deep)) + deep,
            "lying header": struct.pack("<Q", len(lying)) + lying + rest,
            "bfloat16": struct.pack("<Q", len(half)) + half + rest,
        }[change]
    )
    refused(out / kind, "is damaged: it is not what was written")
    manifest(out / kind, lambda content: None)
    refused(out / kind, "is damaged")


@KINDS
@pytest.mark.parametrize("change", ["short", "flat", "type", "missing", "more"])
def test_tensors_of_another_shape(out, kind, change):
    path = tensors_of(out / kind)
    tensors = load_file(path)
    name = {"client": "h.1.mlp.c_fc.scale", "server": "h.1.mlp.c_fc"}[kind]
    if change == "missing":
        del tensors[name]
    elif change == "more":
        tensors["h.9.mlp.c_fc"] = tensors[name]
    else:
        tensors[name] = {
            "short": np.ascontiguousarray(tensors[name][:-1]),
            "flat": tensors[name].reshape(1, -1),
            "type": tensors[name].astype(np.float64),
        }[change]
    save_file(tensors, path)
    manifest(out / kind, lambda content: None)
    if (kind, change) == ("client", "more"):  # does no harm
        read(out / kind)
    else:
        refused(out / kind, "is damaged")


@pytest.mark.parametrize("name", ["wte", "wpe", "ln_f.weight", "ln_f.bias"])
def test_embeddings_of_another_shape(out, name):
    tensors = load_file(out / "client" / "client.safetensors")
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])
    save_file(tensors, out / "client" / "client.safetensors")
    manifest(out / "client", lambda content: None)
    refused(out / "client", f"{name} is float32", "wanted float32")


@KINDS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 10**9), ("n_layer", "2"), ("n_layer", 0), ("n_layer", 3), ("n_layer", 1.0), ("n_layer", True),
        ("n_embd", "32"), ("n_embd", 10**12), ("n_embd", -32), ("n_head", 5), ("n_head", None), ("n_inner", "x"),
        ("n_inner", 10**18), ("unknown", 1), ("activation_function", "os.system"),
        ("layer_norm_epsilon", "a\nb"),
    ],
)  # fmt: skip
def test_configurations_that_are_none(out, kind, field, value):
    manifest(out / kind, lambda content: content["linear"]["config"].update({field: value}))
    refused(out / kind, "is damaged")


@pytest.mark.parametrize("bits", [{"weights": "10"}, {"weights": 10**9}, {"inputs": 10.5}, {"inputs": None},
                                  {"weights": True}, [], "x", None, {"a": 1}])  # fmt: skip
def test_bits_that_are_none(out, bits):
    manifest(out / "client", lambda content: content["linear"].update(bits=bits))
    refused(out / "client", "is damaged")


@KINDS
@pytest.mark.parametrize("value", [None, [], "text", 5, {}, {"config": {}}, {"config": []}, {"config": "abc"}])
def test_facts_that_are_none(out, kind, value):
    manifest(out / kind, lambda content: content.update(linear=value))
    refused(out / kind, "is damaged")


@KINDS
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "", "junk", "[]", "null", "9" * 5000, "{}"])
def test_manifests_that_are_none(out, kind, text):
    (out / kind / "bundle.json").write_text(text)
    refused(out / kind, "is damaged")


@KINDS
@pytest.mark.parametrize(
    "identity", ["../../../x", "/tmp", "b" * 63, "B" * 64, "b" * 64 + "\n", "", None, 5, ["b" * 64]]
)
def test_an_identity_is_a_hash(out, kind, identity):
    """It names the directory of a client's masks."""
    manifest(out / kind, lambda content: content.update(id=identity))
    refused(out / kind, "is damaged")


@pytest.mark.parametrize("text", [DEEP, "", "junk", "{}", '{"model": ' * 50_000])
def test_tokenizers_that_are_none(out, text):
    (out / "client" / "tokenizer.json").write_text(text)
    manifest(out / "client", lambda content: None)
    refused(out / "client", "is damaged")


def test_a_bundle_that_is_there_is_not_written_over(out, model):
    with one_line(BundleError, "exists and is not an empty directory"):
        write_bundles(model, out, {})
