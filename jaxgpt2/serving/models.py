"""A compiled model as two bundles, and the model that a client bundle holds."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import fhe
from jaxgpt2 import methods
from jaxgpt2.decoding import FullSequence, NotReady
from jaxgpt2.encrypted import EncryptedGPT2, get_backend
from jaxgpt2.errors import InputError
from jaxgpt2.methods import MethodConfig
from jaxgpt2.methods.files import digest_of
from jaxgpt2.methods.formula import client_method
from jaxgpt2.methods.method import QuantizedModule
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import disassemble
from jaxgpt2.modules import Module, parse_modules
from jaxgpt2.quantize import Bits
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.bundle import Bundle, BundleError
from weights import save_checkpoint, save_generation_config


def _gpt2(encrypted: EncryptedGPT2) -> GPT2:
    """Bundles hold a model in the format of its checkpoint, and there is one."""
    assert isinstance(encrypted.model, GPT2)
    return encrypted.model


def without_heads(encrypted: EncryptedGPT2) -> dict[str, np.ndarray]:
    """The float model's tensors, with zeros for the encrypted modules' query, key and value weights and biases.

    Of a whole block all of them, and the output projection, which its circuit computes as well. A single head's rows of
    the output projection stay: with them the client adds what the head gives to the residual stream.
    """
    config = encrypted.model.config
    tensors = {name: np.array(tensor, np.float32) for name, tensor in disassemble(_gpt2(encrypted).model).items()}
    for module in encrypted.modules:
        own = f"h.{module.layer}.attn"
        if module.head is None:
            columns = slice(None)
            tensors[f"{own}.c_proj.weight"][:] = 0
        else:
            starts = module.head * config.head_dim + np.arange(3) * config.n_embd
            columns = np.concatenate([np.arange(start, start + config.head_dim) for start in starts])
        tensors[f"{own}.c_attn.weight"][:, columns] = 0
        tensors[f"{own}.c_attn.bias"][columns] = 0
    return tensors


def write_bundles(encrypted: EncryptedGPT2, directory: Path, report: Mapping[str, Any]) -> str:
    """`server/`, `client/` and `report.json` in a directory that appears whole or not at all.

    Returns:
        the identity of both bundles.

    Raises:
        NotReady: the model is not compiled; BundleError: the directory exists and is not empty.
    """
    if encrypted.seq_len is None:
        raise NotReady("a bundle is made of compiled modules: call compile first")
    with bundles.appearing(directory) as temporary:
        identity = _write(encrypted, encrypted.seq_len, temporary)
        bundles.write_report(temporary, report, identity)
    return identity


def _write(encrypted: EncryptedGPT2, seq_len: int, directory: Path) -> str:
    circuits = {str(module): circuit for module, circuit in encrypted.circuits.items()}
    client = directory / "client"
    save_checkpoint(client / "model", dataclasses.asdict(encrypted.model.config), without_heads(encrypted))
    save_generation_config(client / "model", encrypted.model.sampling.to_dict())
    encrypted.model.tokenizer.save(str(client / "model" / "tokenizer.json"))
    (client / "modules").mkdir()
    facts = {}
    for module, quantized in encrypted.quantized.items():
        names, values = _named(quantized.dequantization)
        arrays = {"input_scale": quantized.input_scale, **dict(zip(names, values, strict=True))}
        save_file(
            {name: np.array(value) for name, value in arrays.items()}, client / "modules" / f"{module}.safetensors"
        )
        facts[str(module)] = {
            "config": encrypted.configs[module].to_json(),
            "bits": dataclasses.asdict(quantized.bits),
            "max_tokens": quantized.max_tokens,
            "dequantization": names,
            "full_sequence": isinstance(encrypted.function(module).strategy, FullSequence),
        }
    contents = bundles.hashes(client), seq_len, facts, {module: circuit.id for module, circuit in circuits.items()}
    identity = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    bundles.write(client, "client", identity, circuits, {"seq_len": seq_len, "modules": facts})
    bundles.write(directory / "server", "server", identity, circuits, {"methods": _methods_of_files(encrypted)})
    return identity


def _methods_of_files(encrypted: EncryptedGPT2) -> dict[str, str]:
    """Methods whose functions the server computes with, by name: the SHA-256 of the files that they are in."""
    names = {
        encrypted.configs[module].method
        for module, circuit in encrypted.circuits.items()
        if "compiled" not in get_backend(circuit.report.backend).offers
    }
    return {name: digest for name in sorted(names) if (digest := digest_of(name)) is not None}


def read_client(bundle: Bundle) -> EncryptedGPT2:
    """The model of a client bundle: it encrypts and decrypts for its encrypted modules, and cannot compute them.

    Raises:
        BundleError: it is damaged; what `GPT2.from_pretrained` raises.
    """
    gpt2 = GPT2.from_pretrained(bundle.directory / "model")
    configs: dict[Module, MethodConfig] = {}
    quantized: dict[Module, QuantizedModule] = {}
    circuits: dict[Module, fhe.Circuit] = {}
    try:
        for entry in bundle.circuits:
            (module,) = parse_modules(entry.module, gpt2.config)
            facts: Mapping[str, Any] = bundle.content["modules"][entry.module]
            arrays = load_file(bundle.directory / "modules" / f"{entry.module}.safetensors")
            values = [arrays[name] for name in facts["dequantization"]]
            _check(gpt2, facts["max_tokens"], arrays["input_scale"], values)
            name = facts["config"]["attention"]
            if ".py:" in name and name not in methods.names():
                # It was compiled from a file. A client needs no formula, and runs no code that a bundle names.
                methods.register(client_method(name, facts["full_sequence"]))
            configs[module] = MethodConfig.from_json(facts["config"])
            quantized[module] = QuantizedModule(
                None,
                arrays["input_scale"],
                _unnamed(facts["dequantization"], values),
                Bits(**facts["bits"]),
                facts["max_tokens"],
            )
            # Never a server's file: it would be code of whoever made the bundle.
            directory = bundle.circuit_directory(entry.module)
            circuits[module] = circuit = get_backend(entry.backend).load(directory, server=False)
            # It names the file of the keys, among others.
            if circuit.id != entry.id or not re.fullmatch("[0-9a-f]{64}", circuit.id):
                raise BundleError(f"{bundle.directory} is damaged: the circuit of {module} is another")
        _check_length(gpt2, bundle.content["seq_len"])
        return EncryptedGPT2(gpt2, configs, quantized, circuits, bundle.content["seq_len"])
    except (KeyError, TypeError, AttributeError, OSError, SafetensorError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise BundleError(f"{bundle.directory} is damaged: {' '.join(repr(error).split()):.200}") from None


def _check(gpt2: GPT2, max_tokens: Any, scale: np.ndarray, values: Sequence[np.ndarray]) -> None:
    """What a module is encoded and decoded with, as far as its method's names do not matter. Raises ValueError."""
    _check_length(gpt2, max_tokens)
    if scale.shape not in ((), (gpt2.config.n_embd,)) or scale.dtype.kind != "f" or not (scale > 0).all():
        raise ValueError(
            f"its input_scale is {scale.dtype} {scale.shape}, wanted positive numbers, one or one a feature"
        )
    if not all(value.dtype.kind in "fiu" and np.isfinite(value).all() for value in values):
        raise ValueError("its dequantization is not of finite numbers")


def _check_length(gpt2: GPT2, tokens: Any) -> None:
    if type(tokens) is not int or not 1 <= tokens <= gpt2.config.n_positions:
        raise ValueError(f"it is made for {tokens!r:.40} tokens, and its model reads 1 to {gpt2.config.n_positions}")


def _named(dequantization: Any) -> tuple[list[str], list[np.ndarray]]:
    """A pytree of arrays, an array or a NamedTuple of them, by names."""
    if hasattr(dequantization, "_fields"):
        return [f"dequantization.{name}" for name in dequantization._fields], list(dequantization)
    return ["dequantization"], [dequantization]


def _unnamed(names: Sequence[str], values: Sequence[np.ndarray]) -> Any:
    """As JAX and `decode` take it, which go by its fields."""
    if list(names) == ["dequantization"]:
        return values[0]
    return collections.namedtuple("Dequantization", [name.removeprefix("dequantization.") for name in names])(*values)
