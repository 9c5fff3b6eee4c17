"""An attention method from its formula: `@attention` above a function of one query and the tokens that it sees.

    @attention
    def softmax(ops, q, k, v):  # (D,), (S, D), (S, D) -> (D,)
        scores = ops.requantize(k @ q / np.sqrt(len(q)))
        weights = ops.lookup(np.exp, scores - scores.max())
        return (weights @ v) / weights.sum()

The function makes everything that a `Method` is: calibration, the whole text at once, the decode step with an encrypted
key/value cache, and all heads of a layer. `jaxgpt2.methods.values` has what it may do.

Shapes: T tokens of a text, S tokens that a query sees, C width, D head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

import fhe
from jaxgpt2.decoding import FullSequence, GrowingCache
from jaxgpt2.errors import InputError
from jaxgpt2.methods import values
from jaxgpt2.methods.files import SOURCES, from_source
from jaxgpt2.methods.method import HeadWeights, Method, QuantizedFunction, QuantizedModule, float_head
from jaxgpt2.methods.requantize import Projection, calibrate_projection, project
from jaxgpt2.methods.values import Grid, MethodError, Ops, Quotient, Recorder, Value
from jaxgpt2.quantize import Bits, check_accumulator, largest_level, scale_for

PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Formula:
    """A function of one query, and what it was declared with.

    Args:
        function: f(ops, q, k, v, **constants), or f(ops, x, context, **constants).
        candidates: values of its constants to try at calibration, besides their defaults.
    """

    function: Callable[..., Any]
    candidates: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def file(self) -> str:
        return self.function.__code__.co_filename

    @property
    def projects(self) -> bool:
        """Whether it makes its own projections, of x and its context."""
        return len(_positional(self.function)) == 3

    def __call__(self, ops: Ops, arguments: Sequence[Value], constants: Mapping[str, float]) -> tuple[Value, ...]:
        """The result's numerator and, where the client divides, its denominator, with one axis each.

        Raises:
            MethodError: what is wrong, and in which line of the formula.
        """
        try:
            result = self.function(ops, *arguments, **constants)
        except (InputError, values.TooManyElements, values.UnequalScales, fhe.FHEError):
            raise
        except Exception as error:
            raise MethodError(f"{values.place_of(error, self.file)}: {values.one_line(error)}") from error
        parts = (result.numerator, result.denominator) if isinstance(result, Quotient) else (result,)
        place = f"{self.file}:{self.function.__code__.co_firstlineno}: {self.name}"
        if ops.recorder is None and ops.position != len(ops.sites):
            raise MethodError(f"{place} does another number of operations than calibration saw")
        for part, allowed in zip(parts, ((1,), (0, 1)), strict=False):
            if not isinstance(part, Value):
                raise MethodError(
                    f"{place} returns {type(part).__name__}, wanted a value (D,), or a quotient of values"
                )
            if part.ndim not in allowed or part.token is not None:
                raise MethodError(f"{place} returns the shape {part.shape}, wanted (D,): one number a feature of v")
        return parts

    def __reduce__(self) -> Any:
        # For processes of this machine. What is saved names the function, and holds no code (`fhe.storage`).
        return _read_again, (self.function.__module__, self.name, SOURCES.get(self.function.__module__))


def _read_again(module: str, name: str, source: tuple[str, bytes] | None) -> Formula:
    """A formula from where it was written."""
    if source is None:
        return formula_of(getattr(importlib.import_module(module), name))
    return formula_of(from_source(source[0], name, source[1]))


def formula_of(method: Method) -> Formula:
    """The formula that a method was made of."""
    run = method.head.strategy
    return run.run.args[0] if isinstance(run, FullSequence) else run.attend.args[0]  # pyright: ignore


def _positional(function: Callable[..., Any]) -> list[str]:
    """Parameters without a default."""
    return [name for name, each in inspect.signature(function).parameters.items() if each.default is each.empty]


def _defaults(function: Callable[..., Any]) -> dict[str, float]:
    parameters = inspect.signature(function).parameters
    return {name: each.default for name, each in parameters.items() if each.default is not each.empty}


# --- a run on integers --------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionParams:
    """What calibration makes of a formula.

    projections: of q, k and v; empty where the formula makes its own. sites: its lookup tables and clear integers, in
    order of execution. constants: the values that were chosen for its constants.
    """

    projections: tuple[Projection, ...]
    sites: tuple[Any, ...]
    constants: tuple[tuple[str, float], ...] = field(metadata={"static": True})


class Scale(NamedTuple):
    scale: np.ndarray  # (): real value of one step of a result, or of a quotient of two


def project_tokens(ops: fhe.Ops, params: AttentionParams, x: Any) -> tuple[Any, ...]:
    """(T, C) input integers -> q, k, v (T, D)."""
    results = []
    for name, projection in zip(PROJECTIONS, params.projections, strict=True):
        with ops.tag(name):
            results.append(project(ops, projection, x))
    return tuple(results)


def attend(
    formula: Formula, ops: fhe.Ops, params: AttentionParams, row: Sequence[Any], state: Sequence[Any], seen: Any
) -> tuple[Any, ...]:
    """The formula on integers.

    Args:
        row: what N queries have of their own, (N, D) each: q, or x.
        state: what they have of the tokens, (1, S, D) if all see the same, else (N, S, D): k and v, or the context.
        seen: (N, S), 1 where a query sees a token; None if each sees all.

    Returns:
        numerators (N, D) and, where the client divides, denominators (N, 1 or D).
    """
    run = Ops(ops, formula.file, seen, params.sites)
    arguments = [Value(run, part, 1, None, None) for part in row] + [Value(run, part, 2, -2, None) for part in state]
    numerator, *denominator = formula(run, arguments, dict(params.constants))
    if not denominator:
        return (numerator.array,)
    below = denominator[0].array
    below = below if denominator[0].ndim else below.reshape((below.shape[0], 1))
    if type(below) is np.ndarray:  # a count is a clear number, and results are encrypted
        below = numerator.array[:, :1] * 0 + below  # of an encrypted one it would tie the widths of both
    return numerator.array, below


def attend_to_text(formula: Formula, ops: fhe.Ops, params: AttentionParams, x: Any) -> tuple[Any, ...]:
    """(T, C) input integers -> results (T, ...), all queries beside all tokens."""
    row, *state = (x, x) if formula.projects else project_tokens(ops, params, x)
    state = [part.reshape((1, *part.shape)) for part in state]
    return attend(formula, ops, params, [row], state, np.tri(x.shape[0], dtype=np.int64))


def decode(dequantization: Scale, results: tuple[jax.Array, ...]) -> jax.Array:
    """Results (T, ...) to reals (T, D or C); the client's division, where there is one."""
    numerators, *denominators = (part.astype(jnp.float32) for part in results)
    for below in denominators:
        numerators = numerators / jnp.where(below == 0, 1.0, below)
    return numerators * jnp.asarray(dequantization.scale, jnp.float32)


# --- calibration --------------------------------------------------------------------------------


class Float64Ops(fhe.NumpyOps):
    """NumPy's products of integers are slow; those of floats are exact below 2^53, and int32 bounds these."""

    def matmul(self, a: Any, b: Any) -> Any:
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)


class Calibrated(NamedTuple):
    """A formula's tables, the scale of its results, and what they are worth.

    input_scale: of the head's input. largest: bound of the results' magnitude. divides: whether the client does.
    error: mean square error of the head's output, in its metric.
    """

    params: AttentionParams
    input_scale: float
    scale: float
    largest: int
    divides: bool
    error: float


def calibrated(
    formula: Formula, weights: HeadWeights, inputs: Sequence[np.ndarray], bits: Bits, max_tokens: int
) -> Calibrated:
    """Runs the formula on the calibration inputs, for its scales and tables; and for the constants' values that come
    closest to the float head."""
    constants = _defaults(formula.function)

    def tried(constants: Mapping[str, float]) -> Calibrated:
        return _calibrate(formula, constants, weights, inputs, bits, max_tokens)

    best = tried(constants)
    for name, candidates in formula.candidates:
        for value in candidates:
            if value != constants[name] and (other := tried(constants | {name: value})).error < best.error:
                best, constants = other, constants | {name: value}
    return best


def calibrate_head(
    formula: Formula, weights: HeadWeights, inputs: Sequence[np.ndarray], bits: Bits, max_tokens: int
) -> QuantizedModule:
    found = calibrated(formula, weights, inputs, bits, max_tokens)
    scale = Scale(np.asarray(found.scale))
    return QuantizedModule(found.params, np.asarray(found.input_scale), scale, bits, max_tokens)


def _calibrate(
    formula: Formula,
    constants: Mapping[str, float],
    weights: HeadWeights,
    inputs: Sequence[np.ndarray],
    bits: Bits,
    max_tokens: int,
) -> Calibrated:
    """`_run`, again where two values must share a scale, or the texts are too many."""
    shared: dict[int, float] = {}
    input_scale = scale_for(np.concatenate(inputs), bits.inputs)
    while True:
        try:
            return _run(formula, constants, weights, inputs, input_scale, bits, max_tokens, shared)
        except values.UnequalScales:
            pass
        except values.TooManyElements:
            if len(inputs) == 1:
                raise values.CalibrationError(
                    f"{formula.file}: {formula.name} on one text of {len(inputs[0])} tokens takes arrays of more than "
                    f"{values.MAX_ELEMENTS:,} numbers: calibrate it for shorter texts"
                ) from None
            inputs = inputs[: len(inputs) // 2]


def _run(
    formula: Formula,
    constants: Mapping[str, float],
    weights: HeadWeights,
    inputs: Sequence[np.ndarray],
    input_scale: float,
    bits: Bits,
    max_tokens: int,
    shared: dict[int, float],
) -> Calibrated:
    """One run of the formula on all inputs, padded."""
    longest, limit = max(map(len, inputs)), largest_level(bits.inputs)
    recorder = Recorder(weights, bits, max(max_tokens, longest), shared)
    real = np.stack([np.arange(longest) < len(x) for x in inputs])  # (B, T)
    x = np.stack([np.pad(x, ((0, longest - len(x)), (0, 0))) for x in inputs])
    x = np.clip(np.rint(x / input_scale), -limit, limit).astype(np.int64)  # (B, T, C)
    seen = np.tri(longest, dtype=np.int64) * real[:, None, :] * real[:, :, None]  # (B, T, T)
    run = Ops(Float64Ops(), formula.file, seen, recorder=recorder)
    projections = []
    if formula.projects:
        grid = Grid(input_scale, -limit, limit)
        arguments = [Value(run, x, 1, None, grid), Value(run, x[:, None], 2, -2, grid)]
    else:
        arguments, levels = [], largest_level(bits.activations)
        for name in PROJECTIONS:
            numbers: list[int] = []

            def choose(outputs: np.ndarray, _: int, numbers: list[int] = numbers) -> float:
                scale, number = recorder.choose(float(np.abs(outputs).max(initial=0.0)), levels)
                numbers.append(number)
                return scale

            weight, bias = input_scale * getattr(weights, name), getattr(weights, f"{name}_bias")
            projection, outputs, scale = calibrate_projection(name, weight, bias, x[real], bits, choose)
            projections.append(projection)
            array = np.zeros((*real.shape, outputs.shape[-1]), np.int64)
            array[real] = outputs
            grid = Grid(scale, -levels, levels, numbers[0])
            arguments.append(
                Value(run, array, 1, None, grid) if name == "query" else Value(run, array[:, None], 2, -2, grid)
            )
    parts = formula(run, arguments, constants)
    if parts[0].array.shape[-1] != weights.value.shape[1]:
        place = f"{formula.file}:{formula.function.__code__.co_firstlineno}: {formula.name}"
        raise MethodError(f"{place} returns {parts[0].shape}, wanted ({weights.value.shape[1]},): one number a feature")
    numerator, *denominators = (part.array.astype(np.float64) for part in parts)
    scale = parts[0].known_grid.scale
    for part, below in zip(parts[1:], denominators, strict=True):
        below = below if part.ndim else below[..., None]
        numerator = numerator / np.where(below == 0, 1.0, below)
        scale /= part.known_grid.scale
    got = np.broadcast_to(numerator, (*real.shape, numerator.shape[-1]))[real] * scale
    wanted = np.concatenate([float_head(weights, x) for x in inputs])
    # The factor of least error, which the client applies: a method may be off by one, and rounding makes it so.
    norm = float(((got @ weights.metric) * got).sum())
    gain = float(((got @ weights.metric) * wanted).sum()) / norm if norm > 0 else 1.0
    error = gain * got - wanted
    loss = float(((error @ weights.metric) * error).sum()) / len(error)
    params = AttentionParams(tuple(projections), tuple(recorder.sites), tuple(constants.items()))
    largest = max(abs(parts[0].known_grid.low), abs(parts[0].known_grid.high))
    return Calibrated(params, input_scale, scale * gain, largest, bool(denominators), loss)


# --- all heads of a layer -----------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParams:
    heads: tuple[AttentionParams, ...]
    projections: tuple[np.ndarray, ...]  # (D, C) a head


def attend_in_layer(formula: Formula, ops: fhe.Ops, params: LayerParams, x: Any) -> tuple[Any]:
    """(T, C) input integers -> what the block adds to the residual stream, (T, C): Zama's multi-head model."""
    outputs = [attend_to_text(formula, ops, head, x)[0] for head in params.heads]
    with ops.tag("projection"):
        total = ops.matmul(outputs[0], params.projections[0])
        for output, projection in zip(outputs[1:], params.projections[1:], strict=True):
            total = total + ops.matmul(output, projection)
    return (total,)


def calibrate_layer(
    formula: Formula, weights: Sequence[HeadWeights], inputs: Sequence[np.ndarray], bits: Bits, max_tokens: int
) -> QuantizedModule:
    """Each head as alone; the scales of their outputs go into the projection, so that its sum has one scale.

    Raises:
        MethodError: the formula leaves a division to the client, which the projection cannot wait for.
    """
    heads = [calibrated(formula, head, inputs, bits, max_tokens) for head in weights]
    if any(head.divides for head in heads):
        raise MethodError(f"{formula.name} leaves a division to the client: name its heads, as 0.0, not a whole layer")
    projections = [own.output * head.scale for own, head in zip(weights, heads, strict=True)]
    scale = scale_for(np.concatenate(projections), bits.weights)
    integers = tuple(np.rint(projection / scale).astype(np.int64) for projection in projections)
    bounds = (int(np.abs(own).sum(axis=0).max()) * head.largest for own, head in zip(integers, heads, strict=True))
    check_accumulator("projection", sum(bounds))
    params = LayerParams(tuple(head.params for head in heads), integers)
    return QuantizedModule(params, np.asarray(heads[0].input_scale), Scale(np.asarray(scale)), bits, max_tokens)


# --- the decorator ------------------------------------------------------------------------------


@overload
def attention(function: Callable[..., Any], /) -> Method: ...


@overload
def attention(
    *, full_sequence: bool = False, **candidates: Sequence[float]
) -> Callable[[Callable[..., Any]], Method]: ...


def attention(
    function: Callable[..., Any] | None = None, /, *, full_sequence: bool = False, **candidates: Sequence[float]
) -> Any:
    """A `Method` from a function of one query and the tokens that it sees.

    The function is f(ops, q, k, v): q (D,), k and v (S, D) are `Value`s; it returns a `Value` (D,), or a quotient of
    two, which the client divides. One that wants its own projections is f(ops, x, context), x (C,), context (S, C), and
    calls `ops.project`. Parameters with a default are constants.

    Args:
        full_sequence: reads all of a text at once, and all of it again for every token, as the published baseline does;
            otherwise keys and values stay encrypted on the server. A function of x always does.
        candidates: by constant, values to try at calibration besides its default.

    Raises:
        MethodError: a function of other parameters, or candidates for no constant.
    """
    if function is None:
        return functools.partial(_method, full_sequence=full_sequence, candidates=candidates)
    return _method(function, full_sequence=False, candidates={})


def _method(function: Callable[..., Any], full_sequence: bool, candidates: Mapping[str, Sequence[float]]) -> Method:
    place = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}: {function.__name__}"
    if len(_positional(function)) not in (3, 4):
        raise MethodError(f"{place}({', '.join(_positional(function))}): wanted (ops, q, k, v) or (ops, x, context)")
    defaults = _defaults(function)
    for name in candidates:
        if name not in defaults:
            raise MethodError(f"{place} has candidates for {name!r}, which is none of its parameters with a default")
    for name, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MethodError(f"{place}: the default of {name} must be a number, got {value!r}")
    tried = tuple((name, tuple(map(float, some))) for name, some in candidates.items())
    return method_of(Formula(function, tried), full_sequence)


def method_of(formula: Formula, full_sequence: bool) -> Method:
    fhe.register_functions(formula.function)
    whole = FullSequence(functools.partial(attend_to_text, formula))
    cached = GrowingCache(project_tokens, functools.partial(attend, formula))
    strategy = whole if full_sequence or formula.projects else cached
    in_layer = FullSequence(functools.partial(attend_in_layer, formula))
    return Method(
        formula.name,
        head=QuantizedFunction(strategy, functools.partial(calibrate_head, formula), decode),
        layer=QuantizedFunction(in_layer, functools.partial(calibrate_layer, formula), decode),
    )


def client_method(name: str, full_sequence: bool) -> Method:
    """The client's half of a method from a file that is elsewhere: it encodes, decodes and calls circuits."""

    def elsewhere(ops: Any, q: Any, k: Any, v: Any) -> Any:
        raise MethodError(f"the formula of {name} is with the owner of the weights: this is a client")

    return dataclasses.replace(method_of(Formula(elsewhere), full_sequence), name=name)
