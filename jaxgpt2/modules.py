"""Which parts of a model are encrypted: named by layer and head, each with the configuration of its method."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jaxgpt2.errors import InputError
from jaxgpt2.methods import MethodConfig


class ModuleError(InputError):
    """A module that the model does not have, or a list of modules that cannot be read."""


class Sizes(Protocol):
    """What a model's configuration says of its attention."""

    @property
    def n_layer(self) -> int: ...

    @property
    def n_head(self) -> int: ...


@dataclass(frozen=True, order=True)
class Module:
    """What one circuit computes: a head, or (head None) a layer's whole attention with its projections."""

    layer: int
    head: int | None

    def __str__(self) -> str:
        return f"{self.layer}.{'attn' if self.head is None else self.head}"


def parse_modules(text: str, config: Sizes) -> tuple[Module, ...]:
    """`L.H[,L.H...]`, counted from 0, or `L.attn` for a layer's whole attention, in order.

    Raises:
        ModuleError: not of this form, a layer or head that the model does not have, or one named twice.
    """
    modules = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\.(\d{1,9}|attn)\s*", part, re.ASCII)
        if match is None:
            raise ModuleError(
                f"cannot read module {part[:100]!r}: wanted LAYER.HEAD, as 0.3, or LAYER.attn for a layer's whole "
                "attention"
            )
        layer, head = int(match[1]), None if match[2] == "attn" else int(match[2])
        if layer >= config.n_layer or (head or 0) >= config.n_head:
            raise ModuleError(
                f"there is no module {part.strip()}: the model has layers 0 to {config.n_layer - 1}, "
                f"heads 0 to {config.n_head - 1}"
            )
        modules.append(Module(layer, head))
    for module in modules:
        twice = modules.count(module) > 1 or (module.head is not None and Module(module.layer, None) in modules)
        if twice:
            raise ModuleError(f"module {module} is named twice")
    return tuple(sorted(modules, key=lambda module: (module.layer, module.head or 0)))


def read_configs(path: str | os.PathLike[str], config: Sizes) -> dict[Module, MethodConfig]:
    """The configurations of a JSON file `{"modules": {"L.H": {"attention": ..., "bits": ...}, ...}}`.

    Each may also have "options" and "encryption".

    Raises:
        ModuleError: not such a file, or a module that the model does not have; MethodError: a configuration that
            cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["modules"]
        configs = {parse_modules(name, config)[0]: MethodConfig.from_json(data) for name, data in found.items()}
    except OSError as error:
        raise ModuleError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise ModuleError(
            f'{path} is no file of configurations: wanted {{"modules": {{"L.H": {{...}}}}}} in JSON'
        ) from None
    return dict(sorted(configs.items(), key=lambda item: (item[0].layer, item[0].head or 0)))
