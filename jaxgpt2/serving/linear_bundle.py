"""A model with remote linear layers as two bundles.

    OUT/server/    bundle.json, weights.safetensors: the matrices as int16, by their full names
    OUT/client/    bundle.json, client.safetensors: embeddings and vectors, no matrix of a block; tokenizer.json;
                   generation_config.json

Neither holds code. The client's bundle does not hide the matrices from a client that asks enough (`docs/security.md`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from fhe import rlwe
from jaxgpt2.linear import LinearClient, LinearGPT2
from jaxgpt2.methods.linear import MATRICES, ClientParams, LayerParams, LinearBits
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.pretrained import read_sampling
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.bundle import Bundle, BundleError
from weights import save_generation_config

VECTORS = LayerParams._fields


def write_bundles(model: LinearGPT2, directory: Path, report: Mapping[str, Any]) -> str:
    """`server/`, `client/` and `report.json` in a directory that appears whole or not at all; their identity.

    Raises:
        BundleError: the directory exists and is not empty.
    """
    client, identity = model.client, model.client.identity
    facts = {"linear": {"bits": dataclasses.asdict(client.bits), "config": dataclasses.asdict(client.config)}}
    with bundles.appearing(directory) as temporary:
        (temporary / "server").mkdir()
        save_file(dict(model.weights), temporary / "server" / "weights.safetensors")
        bundles.write(temporary / "server", "server", identity, {}, facts)
        (temporary / "client").mkdir()
        save_file(_tensors(client.params), temporary / "client" / "client.safetensors")
        client.tokenizer.save(str(temporary / "client" / "tokenizer.json"))
        save_generation_config(temporary / "client", client.sampling.to_dict())
        bundles.write(temporary / "client", "client", identity, {}, facts)
        bundles.write_report(temporary, report, identity)
    return identity


def _tensors(params: ClientParams) -> dict[str, np.ndarray]:
    gain, shift = params.ln_f
    tensors = {"wte": params.wte, "wpe": params.wpe, "ln_f.weight": gain, "ln_f.bias": shift}
    if params.output is not params.wte:
        tensors["output"] = params.output
    for index, layer in enumerate(params.layers):
        for name, vectors in layer.items():
            tensors |= {f"h.{index}.{name}.{kind}": getattr(vectors, kind) for kind in VECTORS}
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def read_weights(bundle: Bundle) -> dict[str, np.ndarray]:
    """The matrices of a server bundle. Raises BundleError."""
    try:
        weights = load_file(bundle.directory / "weights.safetensors")
        config = GPT2Config(**bundle.content["linear"]["config"])
        shapes = _shapes_among(config, weights)
        if {name: (weight.shape, weight.dtype) for name, weight in weights.items()} != {
            name: (shape, np.int16) for name, shape in shapes.items()
        }:
            raise BundleError("its matrices are not those of its model")
    except Exception as error:  # safetensors raises several kinds, for what is not NumPy's, too
        raise _damaged(bundle, error) from None
    return {name: weights[name] for name in shapes}


def _shapes_among(config: GPT2Config, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """`shapes_of`, for a configuration that may name more layers than memory holds. Raises BundleError."""
    if config.n_layer > len(tensors):
        raise BundleError(f"its model has {config.n_layer} layers, and there are {len(tensors)} tensors")
    return shapes_of(config)


def shapes_of(config: GPT2Config) -> dict[str, tuple[int, int]]:
    """(d, m) of every matrix, by its full name, in the order in which a token meets them."""
    width, inner = config.n_embd, config.inner_dim
    own = dict(zip(MATRICES, [(width, 3 * width), (width, width), (width, inner), (inner, width)], strict=True))
    return {f"h.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in own.items()}


def read_client(bundle: Bundle) -> LinearClient:
    """The client's half of a model. Raises BundleError."""
    try:
        facts = bundle.content["linear"]
        config, bits = GPT2Config(**facts["config"]), LinearBits(**facts["bits"])
        tensors = load_file(bundle.directory / "client.safetensors")
        shapes = _shapes_among(config, tensors)

        def vectors(name: str, *shape: int) -> np.ndarray:
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != np.float32:
                raise BundleError(f"{name} is {tensor.dtype} {tensor.shape}, wanted float32 {shape}")
            return tensor

        layers = []
        for layer in range(config.n_layer):
            own = {}
            for name in MATRICES:
                full = f"h.{layer}.{name}"
                sizes = zip(VECTORS, (shapes[full][0], shapes[full][1], shapes[full][1]), strict=True)
                own[name] = LayerParams(*(vectors(f"{full}.{kind}", size) for kind, size in sizes))
            layers.append(own)
        vocabulary, width = config.vocab_size, config.n_embd
        wte, wpe = vectors("wte", vocabulary, width), vectors("wpe", config.n_positions, width)
        output = wte if config.tie_word_embeddings else vectors("output", vocabulary, width)
        norm = (vectors("ln_f.weight", width), vectors("ln_f.bias", width))
        tokenizer = Tokenizer.from_file(str(bundle.directory / "tokenizer.json"))
        params, sampling = ClientParams(wte, wpe, output, norm, tuple(layers)), read_sampling(bundle.directory)
        return LinearClient(config, tokenizer, params, bits, bundle.id, sampling)
    except Exception as error:  # the tokenizer's library raises bare ones
        raise _damaged(bundle, error) from None


def _damaged(bundle: Bundle, error: Exception) -> BundleError:
    return BundleError(f"{bundle.directory} is damaged: {' '.join((str(error) or repr(error)).split()):.200}")


def traffic(client: LinearClient) -> dict[str, float]:
    """Bytes of a token that cross the wire, ahead (of a whole batch's tokens) and online, up and down."""
    parameters, shapes = rlwe.Parameters(), client.shapes.values()
    size = parameters.poly_modulus_degree
    return {
        "ahead_bytes_up": sum(inputs for inputs, _ in shapes) * parameters.feature_bytes / size,
        "ahead_bytes_down": sum(outputs for _, outputs in shapes) * parameters.output_bytes / size,
        "online_bytes_up": 4 * sum(inputs for inputs, _ in shapes),
        "online_bytes_down": 4 * sum(outputs for _, outputs in shapes),
        "stored_bytes": 4 * sum(outputs for _, outputs in shapes),
    }
