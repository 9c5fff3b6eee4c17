"""The command `info`."""

from __future__ import annotations

import importlib.metadata
import sys

import click

from jaxgpt2.cli.options import emit, json_option


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Versions, devices, models, attention methods and backends."""
    import jax

    import fhe
    from jaxgpt2 import methods

    packages = (
        "jaxgpt2",
        "jax",
        "flax",
        "numpy",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "concrete-python",
        "tenseal",
    )
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    backends: dict[str, str] = {}
    for name in fhe.backends():
        try:
            backends[name] = fhe.get_backend(name).version()
        except fhe.BackendUnavailable as error:
            backends[name] = f"unavailable: {error}"
    result = {
        "versions": versions,
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "models": ["tiny"],
        "attention": list(methods.names()),
        "backends": backends,
    }
    lines = [
        *(f"{name:18}{version or 'not installed'}" for name, version in versions.items()),
        f"{'devices':18}{', '.join(result['devices'])}",
        f"{'models':18}tiny (bundled), any GPT-2 directory, any GPT-2 on the Hugging Face Hub by its id",
        f"{'attention':18}{', '.join(result['attention'])}",
        f"{'backends':18}{'; '.join(f'{name} ({state})' for name, state in backends.items())}",
    ]
    emit(as_json, result, lines)
