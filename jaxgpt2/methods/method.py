"""What an attention method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from fhe import FHEConfig, Ops, get_backend
from jaxgpt2.decoding import Reading, Whole
from jaxgpt2.errors import InputError
from jaxgpt2.quantize import Bits


class MethodError(InputError):
    """An attention method that does not exist, exists already, or does not do what is asked of it."""


class HeadWeights(NamedTuple):
    """One head's slice of a GPT-2 block, float64. C is the model's width, D its head_dim."""

    query: np.ndarray  # (C, D)
    query_bias: np.ndarray  # (D,)
    key: np.ndarray  # (C, D)
    key_bias: np.ndarray  # (D,)
    value: np.ndarray  # (C, D)
    value_bias: np.ndarray  # (D,)
    output: np.ndarray  # (D, C): the head's rows of c_proj
    # (D, D): what an error of the head's output costs is error @ metric @ error, to second order and in nats.
    metric: np.ndarray


@dataclass(frozen=True)
class QuantizedModule:
    """A head, or a whole attention block, in integers.

    Args:
        params: the program's pytree of arrays and tables: the server's secret, and all that it needs. None at a client.
        input_scale: real value of one step of the input, () or (C,): the client's.
        decoding: what the program's `decode` needs to make reals of the decrypted integers: the client's.
        bits: the widths it was made with.
        max_tokens: longest text that the tables are made for.
    """

    params: Any
    input_scale: np.ndarray
    decoding: Any
    bits: Bits
    max_tokens: int

    @property
    def client(self) -> QuantizedModule:
        """The client's part of it: without params."""
        return replace(self, params=None)


jax.tree_util.register_dataclass(
    QuantizedModule, data_fields=["params", "input_scale", "decoding"], meta_fields=["bits", "max_tokens"]
)


@dataclass(frozen=True)
class QuantizedFunction:
    """An integer function with what surrounds it on the client.

    Args:
        run: `run(ops, params, x)`: integers (T, C) to a tuple of integer arrays, causal: row i of every result
            depends on rows 0 to i of x alone, so that a text may be padded at its end. Uses operators, methods and
            `ops` (see `fhe.Ops`) only, and never asks which namespace it got.
        calibrate: `calibrate(weights, inputs, bits, max_tokens, **options)`: a QuantizedModule from float weights and
            calibration inputs, a sequence of (T, C) float64 arrays of at most max_tokens rows, one for each passage.
            `weights` is a HeadWeights for a head, a tuple of them for a block; `options` are all of the method's.
        decode: `decode(decoding, outputs)`: the decrypted integers to reals, in JAX: the head's output (T, D), or
            for a block what it adds to the residual stream less the bias of its projection, (T, C).
        reading: the functions of its circuit, and how a text goes through them. All texts give the results of `run`,
            up to the engine's error.
    """

    run: Callable[[Ops, Any, Any], tuple[Any, ...]]
    calibrate: Callable[..., QuantizedModule]
    decode: Callable[[Any, tuple[jax.Array, ...]], jax.Array]
    reading: Reading = Whole()


@dataclass(frozen=True)
class Method:
    """An attention method.

    Args:
        name: how users call it.
        head: computes one head.
        block: computes all heads of a layer and their output projection; None if the method has no such program.
        needs: what a backend must offer to run it (see `fhe.Backend.offers`).
        backend: the one that it is made for, taken where none is named.
        options: what else may be chosen, such as ranks: names and default values.
        bits: the widths that go with activations of so many bits.
        search: values of options that are worth trying when the cheapest config is looked for.
        settings: error probability and rounding that it fhe_config, for engines of lookups.
    """

    name: str
    head: QuantizedFunction
    block: QuantizedFunction | None = None
    needs: frozenset[str] = frozenset({"integers", "lookup"})
    backend: str = "concrete"
    options: Mapping[str, int] = field(default_factory=dict)
    bits: Callable[[int], Bits] = lambda n: Bits.of(n, lookup=n + 2)
    search: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    settings: FHEConfig = FHEConfig(rounding="approximate")

    @property
    def by_lookups(self) -> bool:
        """Whether plain integers and lookups are all that it needs: then its lookups can be counted without an engine,
        and have an error probability and a rounding."""
        return self.needs <= get_backend("clear").offers


@dataclass(frozen=True)
class MethodConfig:
    """How a head is computed: everything that may be chosen before calibration.

    Args:
        method: name of the attention method.
        bits: widths of its integers.
        options: the method's options that differ from its defaults, in order of their names.
        encryption: error probability and rounding of encrypted lookups; None for what the method fhe_config.

    Raises:
        MethodError: no such method, or an option that it does not have.
    """

    method: str
    bits: Bits
    options: tuple[tuple[str, int], ...] = ()
    encryption: FHEConfig | None = None

    def __post_init__(self) -> None:
        known = get(self.method).options
        for name, _ in self.options:
            if name not in known:
                there = f"it has: {', '.join(known)}" if known else "it has none"
                raise MethodError(f"method {self.method!r} has no option {name!r}; {there}")

    @classmethod
    def of(cls, method: str, bits: Bits | int, options: Mapping[str, int] | None = None,
           encryption: FHEConfig | None = None) -> MethodConfig:  # fmt: skip
        """`bits` as a number: of activations, the other widths as the method has them with it."""
        widths = bits if isinstance(bits, Bits) else get(method).bits(bits)
        return cls(method, widths, tuple(sorted((options or {}).items())), encryption)

    @property
    def settings(self) -> dict[str, int]:
        """All options of the method, defaults included."""
        return {**get(self.method).options, **dict(self.options)}

    @property
    def fhe_config(self) -> FHEConfig:
        """Error probability and rounding, the method's where the config says nothing."""
        return self.encryption or get(self.method).settings

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes and `from_json` reads."""
        encryption = {} if self.encryption is None else {"encryption": asdict(self.encryption)}
        return {"attention": self.method, "bits": asdict(self.bits), "options": self.settings} | encryption

    @classmethod
    def from_json(cls, data: Any) -> MethodConfig:
        """The config that `to_json` wrote.

        Raises:
            MethodError: it is not of that form; InputError: a method, an option or a width that does not exist.
        """
        try:
            encryption = FHEConfig(**data["encryption"]) if "encryption" in data else None
            return cls.of(data["attention"], Bits(**data["bits"]), data.get("options", {}), encryption)
        except InputError:
            raise
        except (TypeError, KeyError, AttributeError) as error:
            raise MethodError(f"wanted a config with attention, bits and options, got {data!r:.80}") from error
        except ValueError as error:
            raise MethodError(f"a config's encryption cannot be: {error}") from error


_FORMULAS: dict[str, Method] = {}


def register(method: Method, *, replace: bool = False) -> None:
    """Makes a method available by its name, everywhere: command line, simulation, encryption.

    Raises:
        MethodError: the name is taken, and `replace` is not set.
    """
    if method.name in _FORMULAS and not replace:
        raise MethodError(f"attention method {method.name!r} exists already")
    _FORMULAS[method.name] = method


def methods() -> tuple[str, ...]:
    """Names of all registered methods."""
    return tuple(sorted(_FORMULAS))


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        MethodError: there is none.
    """
    if name not in _FORMULAS:
        raise MethodError(f"no attention method {name!r}, there are: {', '.join(methods())}")
    return _FORMULAS[name]


def float_head(weights: HeadWeights, x: np.ndarray) -> np.ndarray:
    """The head as GPT-2 defines it, in float64: (T, C) -> (T, D)."""
    q, k, v = x @ weights.query + weights.query_bias, x @ weights.key + weights.key_bias, x @ weights.value
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True) @ (v + weights.value_bias)
