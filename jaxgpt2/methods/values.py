"""Quantized values: the arithmetic in which an attention method is written like its float formula.

A `Value` stands for real numbers of one query: integers and a scale, real = scale * integer. Sums want equal scales, a
product multiplies them, a factor changes the scale alone, and `Ops.lookup` is any other function of one number, with
new levels: the only thing that encryption charges for, besides products of two values.

The same formula runs twice. Calibration (`Ops` with a `Recorder`) runs it once on many texts: at every lookup, in order
of execution, it sees the range of the numbers, chooses a scale, and makes a table. A run on integers takes these
tables, in the same order, and knows no scale: JAX, NumPy and an engine's tracer compute the same integers.

An array has hidden leading axes before those that the formula sees: N queries, and in calibration B texts before them.
Keys and values, which queries share, have 1 in place of N. S tokens are what a query sees at most. One axis may run
over tokens; sums and maxima over it leave out the tokens after the query, and nothing else may look into it. So every
formula is causal, whatever it says.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import EllipsisType, FrameType
from typing import Any, NoReturn

import numpy as np

import fhe
from fhe.tfhe.tracer import signed_bits
from jaxgpt2.errors import InputError
from jaxgpt2.methods.requantize import HEADROOM, Projection, build_table, calibrate_projection, project
from jaxgpt2.quantize import Bits, CalibrationError, check_accumulator, largest_level

# Elements of the largest array of a calibration: 32 MB. Where a formula needs larger ones, fewer texts must do.
MAX_ELEMENTS = 2**22


class MethodError(InputError):
    """An attention method that does not exist, exists already, or does not do what is asked of it."""


class TooManyElements(Exception):
    """Calibration of so many texts would take an array of more than MAX_ELEMENTS."""


class UnequalScales(Exception):
    """Two results of lookups are added: they must share a scale, and the formula is run again with the larger one."""


@dataclass(frozen=True)
class Grid:
    """What calibration knows of a value: the scale, bounds of its integers, and whose scale it is.

    site: the number of the lookup that the scale was chosen at; None where it is a product of several.
    """

    scale: float
    low: int
    high: int
    site: int | None = None


@dataclass
class Recorder:
    """A calibration.

    Args:
        weights: of the head, for its projections.
        bits: widths.
        tokens: of the longest text that is ever read.
        shared: scales of lookups, by number, that others shall have too.
        sites: what the lookups and constants become, in order of execution.
    """

    weights: Any
    bits: Bits
    tokens: int
    shared: dict[int, float]
    sites: list[Any] = field(default_factory=list)
    scales: int = 0

    def choose(self, largest: float, levels: int) -> tuple[float, int]:
        """The scale of the next lookup's results, and its number."""
        number = self.scales
        self.scales += 1
        return self.shared.get(number, largest / levels if largest > 0 else 1.0), number


class Tokens:
    """How many tokens a query sees: another number for every query, by which only the client can divide."""

    def __init__(self, ops: Ops, size: int):
        self._ops, self._size = ops, size

    def count(self) -> Value:
        """The number as a value of no axes."""
        ops = self._ops
        most = self._size if ops.recorder is None else ops.recorder.tokens
        number = np.full(1, self._size, np.int64) if ops.seen is None else ops.seen.sum(axis=-1)
        return Value(ops, number, 0, None, None if ops.recorder is None else Grid(1.0, 0, most))

    def _refuse(self, *_: Any) -> NoReturn:
        self._ops.refuse(
            "computes with the number of tokens, which is another one for every query: use .sum, .max, .mean"
        )

    __index__ = __int__ = __float__ = __bool__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "tokens"


@dataclass(eq=False)
class Ops:
    """What a formula is given as `ops`.

    Args:
        inner: the namespace that computes, a `fhe.Ops`.
        file: of the formula, to say where in it something is wrong.
        seen: (..., N, S), 1 where a query sees a token; None where it sees all.
        sites: what a calibration recorded.
        recorder: of a calibration; None in a run on integers.
        position: how many of the sites were taken.
    """

    inner: Any
    file: str
    seen: Any = None
    sites: Any = ()
    recorder: Recorder | None = None
    position: int = 0
    _tagged: int = 0

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what Python and notebooks ask of any object
            raise AttributeError(name)
        self.refuse(f"ops has no .{name}: it has .lookup, .requantize, .project and .tag")

    # For formulas --------------------------------------------------------------------------------

    def lookup(self, function: Callable[[np.ndarray], np.ndarray], x: Value, like: Value | None = None) -> Value:
        """function(x), with new levels: one lookup for every number.

        Args:
            function: of an array of float64, number by number: np.exp, or a lambda.
            like: a value whose scale the result shall have; what does not fit saturates. None: the scale at which the
                largest result that calibration sees is the largest level.
        """
        if not isinstance(x, Value):
            self.refuse(f"ops.lookup wants a function and a value, got {type(x).__name__} as the value")
        table, grid = self._site(lambda recorder: self._table(recorder, function, x, like))
        with self.stage():
            return Value(self, self.inner.lookup(table, x.array), x.ndim, x.token, grid)

    def requantize(self, x: Value, like: Value | None = None) -> Value:
        """x with new levels: one lookup for every number."""
        return self.lookup(lambda real: real, x, like)

    def project(self, x: Value, matrix: Callable[[Any], tuple[np.ndarray, np.ndarray]]) -> Value:
        """x @ weight + bias, with new levels.

        Args:
            x: (..., C), what the head reads.
            matrix: from the head's `HeadWeights` a weight (C, D) and a bias (D,), float64.
        """
        width = x.array.shape[-1]
        rows = x.array.reshape((_size(x.array.shape[:-1]), width))

        def calibrate(recorder: Recorder) -> tuple[Projection, Grid]:
            weight, bias = matrix(recorder.weights)
            levels = largest_level(recorder.bits.activations)
            number: list[int] = []

            def choose(values: np.ndarray, bits: int) -> float:
                scale, site = recorder.choose(float(np.abs(values).max(initial=0.0)), levels)
                number.append(site)
                return scale

            real = np.broadcast_to(self._real(x), (*x.array.shape[:-1], 1)).reshape(-1)
            place = f"{self.place()}: the projection's"
            found, _, scale = calibrate_projection(
                place, x.known_grid.scale * weight, bias, rows[real], recorder.bits, choose
            )
            return found, Grid(scale, -levels, levels, number[0])

        projection, grid = self._site(calibrate)
        with self.stage():
            result = project(self.inner, projection, rows)
        return Value(self, result.reshape((*x.array.shape[:-1], result.shape[-1])), x.ndim, x.token, grid)

    @contextlib.contextmanager
    def tag(self, name: str) -> Generator[None, None, None]:
        """Names the stage of what is inside, for the cost report, which goes by line where there is no name."""
        self._tagged += 1
        try:
            with self.inner.tag(name):
                yield
        finally:
            self._tagged -= 1

    # For values ----------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """How many hidden axes there are."""
        return 1 if self.recorder is None else 2

    def refuse(self, message: str) -> NoReturn:
        raise MethodError(f"{self.place()}: {message}")

    def line(self) -> int:
        """Where in the formula's file the run is; 0 outside of it."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return 0 if frame is None else frame.f_lineno

    def place(self) -> str:
        return f"{self.file}:{self.line()}"

    def constant(self, make: Callable[[Recorder], np.ndarray]) -> Any:
        """A clear number or array of integers, as calibration recorded it."""
        return self._site(lambda recorder: (np.asarray(make(recorder), np.int64), None))[0]

    def check(self, grid: Grid) -> Grid:
        """A sum's or product's grid, if int32 holds its integers."""
        try:
            check_accumulator("integer", max(abs(grid.low), abs(grid.high)))
        except CalibrationError as error:
            raise CalibrationError(f"{self.place()}: {error}") from None
        return grid

    def check_size(self, *shapes: tuple[int, ...]) -> None:
        if self.recorder is not None and _size(np.broadcast_shapes(*shapes)) > MAX_ELEMENTS:
            raise TooManyElements

    def mask(self, ndim: int, axis: int) -> Any:
        """`seen` for values of so many axes, whose axis (negative) runs over tokens."""
        shape = [1] * ndim
        shape[axis] = self.seen.shape[-1]
        return self.seen.reshape((*self.seen.shape[:-1], *shape))

    def stage(self) -> contextlib.AbstractContextManager[Any]:
        """Of an operation outside of any `tag`: its line."""
        return contextlib.nullcontext() if self._tagged else self.inner.tag(f"line_{self.line()}")

    def _site(self, make: Callable[[Recorder], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The next of what a calibration records, with its grid."""
        if self.recorder is not None:
            site, grid = make(self.recorder)
            self.recorder.sites.append(site)
            return site, grid
        if self.position == len(self.sites):
            self.refuse("does another number of operations than calibration saw: no step may depend on the text")
        self.position += 1
        return self.sites[self.position - 1], None

    def _real(self, x: Value) -> np.ndarray:
        """Which numbers of a value are of a text, and not after the query: bool, of its array's axes."""
        if x.token is None:
            real = self.seen.any(axis=-1).reshape((*self.seen.shape[:-1], *[1] * x.ndim))
        else:
            real = self.mask(x.ndim, x.token) > 0
        shared = x.array.shape[self.batch - 1] == 1
        return real.any(axis=self.batch - 1, keepdims=True) if shared else real

    def _table(
        self, recorder: Recorder, function: Callable[[np.ndarray], np.ndarray], x: Value, like: Value | None
    ) -> tuple[fhe.LookupTable, Grid]:
        grid = x.known_grid
        real = np.broadcast_to(self._real(x), x.array.shape)
        integers = x.array[real]
        low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
        reach = max(1, HEADROOM * max(-low, high))
        low, high = max(grid.low, -reach) if grid.low < 0 else 0, min(grid.high, reach)
        seen = recorder.bits.rounding_threshold
        shift = 0 if seen is None else max(0, signed_bits(low, high) - seen)

        def apply(integers: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                try:
                    results = np.asarray(function(np.asarray(integers, np.float64) * grid.scale), np.float64)
                except InputError:
                    raise
                except Exception as error:
                    self.refuse(f"the function of a lookup fails on an array of numbers: {one_line(error)}")
            if results.shape != np.shape(integers):
                self.refuse(f"the function of a lookup makes {results.shape} of {np.shape(integers)}: wanted the same")
            return results

        inputs = distinct(integers)
        results = apply(inputs)
        if np.isnan(results).any():
            self.refuse(f"the function of a lookup gives nan at {inputs[np.isnan(results)][0] * grid.scale:.3g}")
        results = results[np.isfinite(results)]
        signed = bool((results < 0).any())
        levels = largest_level(recorder.bits.activations) if signed else 2**recorder.bits.activations - 1
        if like is None:
            scale, site = recorder.choose(float(np.abs(results).max(initial=0.0)), levels)
        elif isinstance(like, Value) and like.grid is not None:
            scale, site = like.grid.scale, like.grid.site
        else:
            self.refuse("like= wants a value, whose scale the result shall have")
        bottom = -levels if signed else 0

        def entries(integers: np.ndarray) -> np.ndarray:
            values = apply(integers) / scale
            finite = np.isfinite(values)
            if not finite.any():
                self.refuse("the function of a lookup has no finite result")
            values = np.interp(np.arange(len(values)), np.flatnonzero(finite), values[finite])
            return np.clip(np.rint(values), bottom, levels)

        try:
            table = build_table(entries, low >> shift, -(-high >> shift), shift)
        except CalibrationError as error:
            raise CalibrationError(f"{self.place()}: {error}") from None
        return table, Grid(scale, bottom, levels, site)


class Value:
    """Numbers that depend on the text, as a formula sees them.

    `+`, `-`, `*`, `@`, `/` by a number, `.sum`, `.max`, `.mean`, `[...]` with `None` and slices, `.T`. A quotient of
    two values, and a mean over tokens, are divided by the client: they can be returned, and nothing else.
    """

    def __init__(self, ops: Ops, array: Any, ndim: int, token: int | None, grid: Grid | None):
        self.ops, self.array, self.ndim, self.token, self.grid = ops, array, ndim, token, grid

    def __repr__(self) -> str:
        return f"Value{self.shape}"

    @property
    def shape(self) -> tuple[Any, ...]:
        sizes = self.array.shape[len(self.array.shape) - self.ndim :]
        return tuple(
            Tokens(self.ops, int(size)) if self.token == axis - self.ndim else int(size)
            for axis, size in enumerate(sizes)
        )

    def __len__(self) -> int:
        if not self.ndim:
            self.ops.refuse("a value of no axes has no length")
        return self.shape[0].__index__()

    # What encrypted numbers cannot do.

    def _compare(self, *_: Any) -> NoReturn:
        self.ops.refuse("compares or tests a value, which is encrypted: use ops.lookup, or .max")

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compare  # pyright: ignore[reportAssignmentType]
    __int__ = __float__ = __index__ = _compare  # pyright: ignore[reportAssignmentType]
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what Python and notebooks ask of any object
            raise AttributeError(name)
        self.ops.refuse(f"a value has no .{name}: it has .sum, .mean, .max, .T and .shape; else use ops.lookup")

    def _divide_down(self, *_: Any) -> NoReturn:
        self.ops.refuse("// and % of a value are lookups: ops.lookup(lambda x: x // 2, x)")

    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _divide_down

    def __iter__(self) -> NoReturn:
        self.ops.refuse("loops over a value: write it for all numbers at once")

    def __abs__(self) -> NoReturn:
        self.ops.refuse("abs() of a value is a lookup: ops.lookup(np.abs, x)")

    def __pow__(self, _: Any) -> NoReturn:
        self.ops.refuse("a power of a value is a lookup: ops.lookup(np.square, x)")

    def __rtruediv__(self, _: Any) -> NoReturn:
        self.ops.refuse("a division by a value is a lookup: ops.lookup(np.reciprocal, x)")

    def __array_function__(self, function: Any, *_: Any) -> NoReturn:
        self.ops.refuse(f"np.{function.__name__} cannot take a value: use its operators and methods, or ops.lookup")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **_: Any) -> Any:
        reflected = {np.add: "__radd__", np.subtract: "__rsub__", np.multiply: "__rmul__", np.matmul: "__rmatmul__"}
        if method == "__call__" and len(inputs) == 2 and inputs[1] is self and ufunc in reflected:
            return getattr(self, reflected[ufunc])(inputs[0])
        self.ops.refuse(f"np.{ufunc.__name__} cannot take a value: write ops.lookup(np.{ufunc.__name__}, x)")

    # Sums.

    def __neg__(self) -> Value:
        grid = self.grid and Grid(self.grid.scale, -self.grid.high, -self.grid.low, self.grid.site)
        return Value(self.ops, -self.array, self.ndim, self.token, grid)

    def __add__(self, other: Any) -> Value:
        return self._plus(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._plus(other, -1)

    def __rsub__(self, other: Any) -> Value:
        return (-self)._plus(other, 1)

    def _plus(self, other: Any, sign: int) -> Value:
        ops = self.ops
        if not isinstance(other, Value):
            clear = self._clear(other)
            steps = ops.constant(lambda _: np.rint(sign * clear / self.known_grid.scale))
            grid = self.grid and ops.check(
                Grid(
                    self.grid.scale,
                    self.grid.low + int(steps.min(initial=0)),
                    self.grid.high + int(steps.max(initial=0)),
                    self.grid.site,
                )
            )
            return Value(ops, self.array + steps, self.ndim, self.token, grid)
        a, b, ndim, token = self._aligned(other)
        grid = None
        if ops.recorder is not None:
            grid = self._sum_grid(other, sign)
        return Value(ops, a + b if sign > 0 else a - b, ndim, token, grid)

    def _sum_grid(self, other: Value, sign: int) -> Grid:
        a, b, recorder = self.known_grid, other.known_grid, self.ops.recorder
        assert recorder is not None
        if not np.isclose(a.scale, b.scale, rtol=1e-9, atol=0.0):
            if a.site is None or b.site is None or a.site == b.site:
                self.ops.refuse(
                    f"adds values whose steps are {a.scale:.3g} and {b.scale:.3g}: requantize one like the other, "
                    "ops.requantize(x, like=y)"
                )
            recorder.shared |= dict.fromkeys((a.site, b.site), max(a.scale, b.scale))
            raise UnequalScales
        low, high = (b.low, b.high) if sign > 0 else (-b.high, -b.low)
        return self.ops.check(Grid(a.scale, a.low + low, a.high + high, a.site))

    # Products.

    def __mul__(self, other: Any) -> Value:
        ops = self.ops
        if isinstance(other, Value):
            a, b, ndim, token = self._aligned(other)
            with ops.stage():
                return Value(ops, a * b, ndim, token, self.grid and ops.check(self._product(other, 1)))
        clear = self._clear(other)
        if clear.ndim == 0:
            factor = float(clear)
            flipped = -self if factor < 0 else self
            grid = flipped.grid and Grid(abs(factor) * flipped.grid.scale, flipped.grid.low, flipped.grid.high)
            if factor == 0:
                ops.refuse("multiplies a value by 0")
            return Value(ops, flipped.array, self.ndim, self.token, grid)
        integers = self._integers(clear)
        grid = None
        if self.grid is not None:
            largest = int(np.abs(integers).max(initial=0)) * max(abs(self.grid.low), abs(self.grid.high))
            grid = ops.check(
                Grid(self.grid.scale, -largest if self.grid.low < 0 or (integers < 0).any() else 0, largest)
            )
        return Value(ops, self.array * integers, self.ndim, self.token, grid)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, Value | Tokens):
            return Quotient(self, other if isinstance(other, Value) else other.count())
        clear = self._clear(other)
        if clear.ndim or not float(clear):
            self.ops.refuse("divides a value by something else than a number that is not 0, or a value")
        return self * (1.0 / float(clear))

    def __matmul__(self, other: Any) -> Value:
        if not isinstance(other, Value):
            integers = self._integers(self._clear(other))
            if integers.ndim != 2 or self.token == -1:
                self.ops.refuse("a product with a clear matrix wants a value (..., D) and an array (D, E)")
            largest = int(np.abs(integers).sum(axis=0).max(initial=0))
            grid = None
            if self.grid is not None:
                bound = largest * max(abs(self.grid.low), abs(self.grid.high))
                grid = self.ops.check(Grid(self.grid.scale, -bound, bound))
            rows = self.array.reshape((_size(self.array.shape[:-1]), self.array.shape[-1]))
            result = self.ops.inner.matmul(rows, integers)
            shape = (*self.array.shape[:-1], integers.shape[1])
            return Value(self.ops, result.reshape(shape), self.ndim, self.token, grid)
        if self.ndim == other.ndim == 1:
            return (self * other).sum(axis=0)
        if (self.ndim, other.ndim) == (2, 1):
            return _matrix_vector(self, other, rows=True)
        if (self.ndim, other.ndim) == (1, 2):
            return _matrix_vector(other, self, rows=False)
        self.ops.refuse("a product of two matrices: multiply by vectors, as in (k @ q) @ v")

    def __rmatmul__(self, other: Any) -> Value:
        clear = self._clear(other)
        if self.ndim != 1 or clear.ndim != 2:
            self.ops.refuse("a clear matrix (E, D) from the left wants a value (D,)")
        return self @ clear.T

    # Reductions and shapes.

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Value:
        """Over an axis. Over tokens: those that the query sees."""
        axis, array, count = self._reduced(axis)
        if axis == self.token and self.ops.seen is not None:
            array = array * self.ops.mask(self.ndim, axis)
        grid = None
        if self.grid is not None:
            low, high = self.grid.low, self.grid.high
            low, high = (min(low, low * count), max(high, high * count))
            grid = self.ops.check(Grid(self.grid.scale, low, high, self.grid.site))
        array = array.sum(axis=len(array.shape) + axis, keepdims=keepdims)
        return Value(self.ops, array, self.ndim - (not keepdims), self._token_after(axis, keepdims), grid)

    def max(self, axis: int | None = None, keepdims: bool = False) -> Value:
        """Along an axis, one lookup for every comparison. Over tokens: of those that the query sees."""
        axis, array, _ = self._reduced(axis)
        if axis == self.token:
            lowest = self.ops.constant(lambda _: np.asarray(self.known_grid.low))
            if self.ops.seen is not None:
                mask = self.ops.mask(self.ndim, axis)
                array = array * mask + lowest * (1 - mask)
        with self.ops.stage():
            array = self.ops.inner.max(array, axis=len(array.shape) + axis, keepdims=keepdims)
        return Value(self.ops, array, self.ndim - (not keepdims), self._token_after(axis, keepdims), self.grid)

    def mean(self, axis: int | None = None) -> Any:
        """Over an axis; over tokens, the client divides."""
        axis, _, count = self._reduced(axis)
        return self.sum(axis) / (self.shape[axis] if axis == self.token else count)

    @property
    def T(self) -> Value:
        if self.ndim < 2:
            return self
        if self.ndim > 2:
            self.ops.refuse(".T wants a value of two axes")
        batch = len(self.array.shape) - 2
        array = self.array.transpose((*range(batch), batch + 1, batch))
        token = None if self.token is None else -3 - self.token
        return Value(self.ops, array, 2, token, self.grid)

    def __getitem__(self, items: Any) -> Value:
        items = items if isinstance(items, tuple) else (items,)
        taken = sum(item is not None and not isinstance(item, EllipsisType) for item in items)
        if taken > self.ndim:
            self.ops.refuse(f"takes {taken} axes of a value that has {self.ndim}")
        full: list[Any] = []
        for item in items:
            full += [slice(None)] * (self.ndim - taken) if isinstance(item, EllipsisType) else [item]
        full += [slice(None)] * (self.ndim - sum(item is not None for item in full))
        batch = len(self.array.shape) - self.ndim
        chosen, places, axis = [], [], 0
        for item in full:
            if item is None:
                places.append(None)
                continue
            own = axis - self.ndim == self.token
            if own and item != slice(None):
                self.ops.refuse("looks into the axis of tokens, which only .sum, .max, .mean and @ may reduce")
            if not isinstance(item, int | slice):
                self.ops.refuse("wants None, numbers and slices between brackets")
            chosen.append(item)
            if isinstance(item, slice):
                places.append("token" if own else "axis")
            axis += 1
        array = self.array
        if any(item != slice(None) for item in chosen):
            array = array[(*[slice(None)] * batch, *chosen)]
        token = places.index("token") - len(places) if "token" in places else None
        sizes = iter(array.shape[batch:])
        shape = (*array.shape[:batch], *(1 if place is None else next(sizes) for place in places))
        return Value(self.ops, array.reshape(shape), len(places), token, self.grid)

    # Inside.

    @property
    def known_grid(self) -> Grid:
        """The grid, which calibration knows."""
        assert self.grid is not None
        return self.grid

    def _clear(self, other: Any) -> np.ndarray:
        if isinstance(other, Quotient | Tokens):
            other._refuse()
        try:
            clear = np.asarray(other, np.float64)
        except (TypeError, ValueError):
            self.ops.refuse(f"cannot combine a value with {type(other).__name__}")
        if clear.ndim > self.ndim:
            self.ops.refuse(f"an array of {clear.ndim} axes beside a value of {self.ndim}")
        if self.token is not None and clear.ndim >= -self.token and clear.shape[self.token] != 1:
            self.ops.refuse("an array along the axis of tokens, of which each query sees another number")
        return clear

    def _integers(self, clear: np.ndarray) -> np.ndarray:
        if not np.array_equal(clear, np.rint(clear)):
            self.ops.refuse("multiplies a value by an array of fractions: by one number, or by an array of integers")
        return clear.astype(np.int64)

    def _aligned(self, other: Value) -> tuple[Any, Any, int, int | None]:
        """Both arrays with as many axes, and the axis of tokens of the result."""
        tokens = {value.token for value in (self, other) if value.token is not None}
        if len(tokens) > 1:
            self.ops.refuse("combines two values whose tokens lie along different axes: use [..., None] to align them")
        ndim, arrays = max(self.ndim, other.ndim), []
        for value in (self, other):
            batch = len(value.array.shape) - value.ndim
            shape = (*value.array.shape[:batch], *[1] * (ndim - value.ndim), *value.array.shape[batch:])
            arrays.append(value.array if value.ndim == ndim else value.array.reshape(shape))
        a, b = arrays
        sizes = {array.shape[token] for array, value in zip(arrays, (self, other), strict=True) for token in tokens
                 if value.token is None}  # fmt: skip
        if sizes - {1}:
            self.ops.refuse(
                f"combines the tokens of one value with the features of another: shapes {self.shape} and {other.shape}"
            )
        try:
            self.ops.check_size(a.shape, b.shape)
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            self.ops.refuse(f"combines values of shapes {self.shape} and {other.shape}")
        return a, b, ndim, next(iter(tokens), None)

    def _product(self, other: Value, terms: int) -> Grid:
        a, b = self.known_grid, other.known_grid
        ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
        return Grid(a.scale * b.scale, min(min(ends), min(ends) * terms), max(max(ends), max(ends) * terms))

    def _reduced(self, axis: int | None) -> tuple[int, Any, int]:
        """An axis as a negative number, the array, and how many numbers there are along it at most."""
        if axis is None:
            if self.ndim != 1:
                self.ops.refuse(f"wants an axis, of a value of {self.ndim} axes")
            axis = -1
        axis = axis if axis < 0 else axis - self.ndim
        if not -self.ndim <= axis < 0:
            self.ops.refuse(f"there is no such axis in a value of {self.ndim}")
        count = self.array.shape[len(self.array.shape) + axis]
        if axis == self.token and self.ops.recorder is not None:
            count = self.ops.recorder.tokens
        return axis, self.array, int(count)

    def _token_after(self, axis: int, keepdims: bool) -> int | None:
        """Where the tokens are after a reduction along an axis."""
        if self.token is None or self.token == axis:
            return None
        return self.token if keepdims or self.token > axis else self.token + 1


def _matrix_vector(matrix: Value, vector: Value, rows: bool) -> Value:
    """matrix @ vector, or with rows False vector @ matrix; the axis that is summed over may be the tokens'."""
    ops, contracted, other = matrix.ops, -1 if rows else -2, -2 if rows else -1
    if ops.recorder is not None or matrix.token is not None:
        over = matrix.token == contracted
        if over != (vector.token == -1):
            ops.refuse(f"sums over tokens in one factor alone: shapes {matrix.shape} and {vector.shape}")
    array = vector.array
    if vector.token == -1 and ops.seen is not None:
        array = array * ops.mask(1, -1)
    count = matrix.array.shape[contracted]
    if count != array.shape[-1]:
        ops.refuse(f"cannot multiply shapes {matrix.shape} and {vector.shape}")
    grid = None
    if ops.recorder is not None:
        terms = ops.recorder.tokens if vector.token == -1 else count
        grid = ops.check(matrix._product(vector, terms))
    batch = len(matrix.array.shape) - 2
    with ops.stage():
        if matrix.array.shape[batch - 1] == 1:  # shared by queries, which become the rows of a product of matrices
            shared = matrix.array.reshape((*matrix.array.shape[: batch - 1], *matrix.array.shape[batch:]))
            if rows:
                axes = tuple(range(batch - 1))
                shared = shared.transpose((*axes, batch, batch - 1))
            result = ops.inner.matmul(array, shared)
        else:
            shape = (*array.shape[:-1], 1, count) if rows else (*array.shape, 1)
            ops.check_size(matrix.array.shape, shape)
            result = (matrix.array * array.reshape(shape)).sum(axis=batch + 2 + contracted)
    return Value(ops, result, 1, -1 if matrix.token == other else None, grid)


@dataclass(frozen=True, eq=False)
class Quotient:
    """What the client divides: a formula can return it, and nothing else."""

    numerator: Value
    denominator: Value

    def _refuse(self, *_: Any) -> NoReturn:
        self.numerator.ops.refuse("goes on with a quotient or a mean, which only the client can compute: return it")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __getitem__ = _refuse
    __neg__ = sum = max = mean = _refuse


def distinct(integers: np.ndarray) -> np.ndarray:
    """`np.unique`, without sorting where few integers are possible."""
    least, most = int(integers.min()), int(integers.max())
    if most - least >= MAX_ELEMENTS:
        return np.unique(integers)
    present = np.zeros(most - least + 1, bool)
    present[integers - least] = True
    return least + np.flatnonzero(present)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def place_of(error: BaseException, file: str) -> str:
    """The last line of a file that an error came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else file


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
