"""What an attention method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fhe import FHEConfig, get_backend, register_functions
from jaxgpt2.decoding import STRETCH, Body, DecodingStrategy
from jaxgpt2.errors import InputError
from jaxgpt2.methods.values import MethodError
from jaxgpt2.quantize import Bits, quantize


class HeadWeights(NamedTuple):
    """One head's slice of a GPT-2 block, float64. C is the model's width, D its head_dim."""

    query: np.ndarray  # (C, D)
    query_bias: np.ndarray  # (D,)
    key: np.ndarray  # (C, D)
    key_bias: np.ndarray  # (D,)
    value: np.ndarray  # (C, D)
    value_bias: np.ndarray  # (D,)
    output: np.ndarray  # (D, C): the head's rows of c_proj
    # (D, D): what an error of the head's output costs is error @ metric @ error: KL to second order, as a share of what
    # the model loses without one of its heads, on average.
    metric: np.ndarray


@dataclass(frozen=True)
class QuantizedModule:
    """A head, or a layer's whole attention, made ready for encryption.

    Args:
        params: the quantized function's pytree of arrays and tables: the server's secret, and all that it needs. None
            at a client.
        input_scale: real value of one step of the input, () or (C,): the client's.
        dequantization: what `decode` needs to make reals of the decrypted results, a pytree of arrays: the client's.
        bits: the widths it was made with.
        max_tokens: longest text that it is made for.
    """

    params: Any
    input_scale: np.ndarray
    dequantization: Any
    bits: Bits
    max_tokens: int

    @property
    def client(self) -> QuantizedModule:
        """The client's part of it: without params."""
        return replace(self, params=None)


jax.tree_util.register_dataclass(
    QuantizedModule, data_fields=["params", "input_scale", "dequantization"], meta_fields=["bits", "max_tokens"]
)


def quantize_input(module: QuantizedModule, x: jax.Array) -> jax.Array:
    """The input (..., C) as the integers that the client encrypts, int32."""
    # In a sweep that runs many widths at once, bits are arrays.
    return quantize(x, jnp.asarray(module.input_scale, jnp.float32), module.bits.inputs)


@dataclass(frozen=True)
class QuantizedFunction:
    """What a method does with a head, or with a layer's whole attention.

    Args:
        strategy: the pure functions that the server computes, and how a text goes through them.
        calibrate: `calibrate(weights, inputs, bits, max_tokens, **options)`: a QuantizedModule from float weights and
            calibration inputs, a sequence of (T, C) float64 arrays of at most max_tokens rows, one for each passage.
            `weights` is a HeadWeights for a head, a tuple of them for a layer; `options` are all of the method's.
        decode: `decode(dequantization, results)`: results (T, ...) to reals, in JAX: the head's output (T, D), or for a
            layer what it adds to the residual stream less the bias of its projection, (T, C).
        encode: `encode(module, x)`: the float input (..., C) to what the functions take, in JAX.
        refuses: `refuses(dequantization, results)`: which rows of results (T, ...) a client refuses when it decrypts
            them, bool (T,), in JAX; None: it refuses none.
        chosen: `chosen(module)`: the options that were left to calibration, as it chose them.
    """

    strategy: DecodingStrategy
    calibrate: Callable[..., QuantizedModule]
    decode: Callable[[Any, tuple[jax.Array, ...]], jax.Array]
    encode: Callable[[QuantizedModule, jax.Array], jax.Array] = quantize_input
    refuses: Callable[[Any, tuple[jax.Array, ...]], jax.Array] | None = None
    chosen: Callable[[QuantizedModule], Mapping[str, int]] = lambda module: {}

    def samples(self, module: QuantizedModule, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Calibration inputs (T, C), encoded: of integers, each as it is and `STRETCH` as large."""
        factors = (1.0, STRETCH) if self.encode is quantize_input else (1.0,)
        stretched = [np.asarray(x * factor, np.float32) for x in inputs for factor in factors]
        encoded = [np.asarray(self.encode(module.client, jnp.asarray(x))) for x in stretched]
        return [x.astype(np.int64) if x.dtype.kind == "i" else x.astype(np.float64) for x in encoded]

    def whole(self, ops: Any, module: QuantizedModule, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A text's float inputs (T, C) to the output (T, ...), and which rows are refused (T,), in JAX."""
        results = self.strategy.whole(ops, module.params, self.encode(module, x))
        refused = jnp.zeros(x.shape[0], bool) if self.refuses is None else self.refuses(module.dequantization, results)
        return self.decode(module.dequantization, results), refused


@dataclass(frozen=True)
class Method:
    """An attention method.

    Args:
        name: how users call it.
        head: computes one head.
        layer: computes all heads of a layer and their output projection; None if the method cannot.
        needs: what a backend must offer to run it (see `fhe.Backend.offers`).
        backend: the one that it is made for, taken where none is named.
        options: what else may be chosen, such as ranks: names and default values.
        bits: the widths that go with activations of so many bits.
        propose: `propose(weights, inputs)`: options that are worth trying for a head when its cheapest configuration is
            looked for, from what `calibrate` gets. None: only the defaults are.
        quick: options with which a head is calibrated fast, for a first look at a configuration.
        fhe_config: error probability and rounding that it tolerates, for engines of lookups.
    """

    name: str
    head: QuantizedFunction
    layer: QuantizedFunction | None = None
    needs: frozenset[str] = frozenset({"integers", "lookup"})
    backend: str = "concrete"
    options: Mapping[str, int] = field(default_factory=dict)
    bits: Callable[[int], Bits] = lambda n: Bits.of(n, rounding_threshold=n + 2)
    propose: Callable[[HeadWeights, Sequence[np.ndarray]], Sequence[Mapping[str, int]]] | None = None
    quick: Mapping[str, int] = field(default_factory=dict)
    fhe_config: FHEConfig = FHEConfig(rounding="approximate")

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The functions that its circuits are made of."""
        functions = [function for function in (self.head, self.layer) if function is not None]
        return tuple(body for function in functions for body in function.strategy.bodies)

    @property
    def by_lookups(self) -> bool:
        """Whether plain integers and lookups are all that it needs: then its lookups can be counted without an engine,
        and have an error probability and a rounding."""
        return self.needs <= get_backend("clear").offers


@dataclass(frozen=True)
class MethodConfig:
    """How a module is computed: everything that may be chosen before calibration.

    Args:
        method: name of the attention method.
        bits: widths of its integers.
        changes: the method's options that differ from its defaults, in order of their names.
        encryption: error probability and rounding of encrypted lookups; None for what the method tolerates.

    Raises:
        MethodError: no such method, or an option that it does not have.
    """

    method: str
    bits: Bits
    changes: tuple[tuple[str, int], ...] = ()
    encryption: FHEConfig | None = None

    def __post_init__(self) -> None:
        known = get(self.method).options
        for name, _ in self.changes:
            if name not in known:
                there = f"it has: {', '.join(known)}" if known else "it has none"
                raise MethodError(f"method {self.method!r} has no option {name!r:.100}; {there}")

    @classmethod
    def of(cls, method: str, bits: Bits | int, options: Mapping[str, int] | None = None,
           encryption: FHEConfig | None = None) -> MethodConfig:  # fmt: skip
        """`bits` as a number: of activations, the other widths as the method has them with it."""
        widths = bits if isinstance(bits, Bits) else get(method).bits(bits)
        return cls(method, widths, tuple(sorted((options or {}).items())), encryption)

    @property
    def options(self) -> dict[str, int]:
        """All options of the method, defaults included."""
        return {**get(self.method).options, **dict(self.changes)}

    def with_options(self, options: Mapping[str, int]) -> MethodConfig:
        """With these options instead of its own."""
        return replace(self, changes=tuple(sorted({**dict(self.changes), **options}.items())))

    @property
    def fhe_config(self) -> FHEConfig:
        """Error probability and rounding, the method's where nothing is said here."""
        return self.encryption or get(self.method).fhe_config

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes and `from_json` reads."""
        encryption = {} if self.encryption is None else {"encryption": asdict(self.encryption)}
        return {"attention": self.method, "bits": asdict(self.bits), "options": self.options} | encryption

    @classmethod
    def from_json(cls, data: Any) -> MethodConfig:
        """The configuration that `to_json` wrote.

        Raises:
            MethodError: it is not of that form; InputError: a method, an option or a width that does not exist.
        """
        try:
            encryption = FHEConfig(**data["encryption"]) if "encryption" in data else None
            return cls.of(data["attention"], Bits(**data["bits"]), data.get("options", {}), encryption)
        except InputError:
            raise
        except (TypeError, KeyError, AttributeError) as error:
            raise MethodError(f"wanted a configuration with attention, bits and options, got {data!r:.80}") from error
        except ValueError as error:
            raise MethodError(f"a configuration's encryption cannot be: {error}") from error


_METHODS: dict[str, Method] = {}


def register(method: Method, *, replace: bool = False) -> None:
    """Makes a method available by its name, everywhere: command line, simulation, encryption, circuits in files.

    Raises:
        MethodError: the name is taken, and `replace` is not set.
    """
    if method.name in _METHODS and not replace:
        raise MethodError(f"attention method {method.name!r} exists already")
    _METHODS[method.name] = method
    register_functions(*method.bodies)


def bodies() -> tuple[Body, ...]:
    """The functions that circuits of registered methods are made of; another process must know them."""
    return tuple(body for method in _METHODS.values() for body in method.bodies)


def names() -> tuple[str, ...]:
    """Names of all registered methods."""
    return tuple(sorted(_METHODS))


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        MethodError: there is none.
    """
    if name not in _METHODS:
        hint = "; give its file with --attention FILE.py:NAME" if ".py:" in name else ""
        raise MethodError(f"no attention method {name!r:.100}, there are: {', '.join(names())}{hint}")
    return _METHODS[name]


def float_head(weights: HeadWeights, x: np.ndarray) -> np.ndarray:
    """The head as GPT-2 defines it, in float64: (T, C) -> (T, D)."""
    q, k, v = x @ weights.query + weights.query_bias, x @ weights.key + weights.key_bias, x @ weights.value
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True) @ (v + weights.value_bias)
