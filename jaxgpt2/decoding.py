"""How a module reads a text: at once, or token by token with a cache of what earlier tokens left.

A strategy is made of a method's pure functions. It runs them in JAX (`whole`, `extend`), says what an engine shall
compile (`functions`), and calls what was compiled (`read`). The three give the same results, up to the engine's error.
Caches are values: every call takes one and returns the next.

Shapes: T new tokens, S room for tokens in a cache, C width.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import fhe
from fhe.tfhe.tracer import extreme_samples
from jaxgpt2.errors import InputError
from jaxgpt2.executors import Executor

# A circuit of lookups has room for the values that its input set reaches, and beyond them it is wrong without notice.
# So the calibration inputs go into it a second time, this much larger.
STRETCH = 1.1

Body = Callable[..., tuple[Any, ...]]


class NotReady(InputError):
    """A mode that needs `calibrate` or `compile` first, or modules made for longer texts."""


class OutOfRange(fhe.FHEError):
    """Decrypted numbers that no activation like those of calibration can give: the result would be wrong."""


class CircuitCache(NamedTuple):
    """What was read with a circuit so far.

    inputs: the client's inputs of all tokens, (T, C): what to read again where a server has lost its state.
    state: handles of the results that stay on the server; only the strategy looks into it.
    """

    inputs: np.ndarray
    state: Any


class DecodingStrategy(Protocol):
    """Hashable: programs are compiled in JAX for each."""

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The functions that circuits are made of: a saved circuit names them (`fhe.register_functions`)."""
        ...

    def whole(self, ops: Any, params: Any, x: Any) -> tuple[Any, ...]:
        """The results of all rows of a text (T, C), each (T, ...). Row i depends on rows 0 to i alone."""
        ...

    def empty_cache(self, ops: Any, params: Any, x: jax.Array, size: int) -> Any:
        """Room for `size` tokens of inputs like x (T, C), in JAX."""
        ...

    def extend(
        self, ops: Any, params: Any, x: jax.Array, cache: Any, start: jax.Array | int
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """Prefill and decode step, in JAX: the results of rows x (T, C), which follow `start` others, and the cache
        with them."""
        ...

    def functions(self, module: Any, inputs: Sequence[np.ndarray], length: int) -> dict[str, fhe.Function]:
        """What to compile, by name: the owner's side.

        module: a `QuantizedModule`. inputs: encoded calibration inputs (T, C), T <= length, the longest text that the
        circuit reads.
        """
        ...

    def calls(self, client: Any, known: int, length: int) -> Mapping[str, int]:
        """How often each function runs until a text of `length` tokens is read: all at once, or, if `known` of them
        were read before, the others one by one. client: a `QuantizedModule` without its params."""
        ...

    def read(
        self, client: Any, executor: Executor, x: np.ndarray, cache: CircuitCache | None, length: int
    ) -> tuple[list[np.ndarray], CircuitCache]:
        """The results of rows x (T, C) that follow those in the cache, by a circuit for texts of `length` tokens.

        Raises:
            NotReady: the text is longer than that; OutOfRange: decrypted numbers that cannot be right.
        """
        ...


def check_length(tokens: int, length: int) -> None:
    """NotReady unless a circuit for texts of `length` can read so many tokens."""
    if tokens > length:
        raise NotReady(f"compiled for {length} tokens, got {tokens}")


def appended(cache: CircuitCache | None, x: np.ndarray, length: int) -> np.ndarray:
    """All inputs so far and the new ones, checked for length."""
    inputs = x if cache is None else np.concatenate([cache.inputs, x])
    check_length(len(inputs), length)
    return inputs


def write(cache: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """A cache (S, ...) with new rows (T, ...) from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=0)


# --- the full sequence --------------------------------------------------------------------------


@dataclass(frozen=True)
class FullSequence:
    """One function, "head", which reads all of a text at once, and all of it again for a token more.

    run: run(ops, params, x (T, C)) -> arrays (T, ...), causal, so that a text may be padded at its end.
    """

    run: Body

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.run,)

    def whole(self, ops: Any, params: Any, x: Any) -> tuple[Any, ...]:
        return self.run(ops, params, x)

    def empty_cache(self, ops: Any, params: Any, x: jax.Array, size: int) -> jax.Array:
        return jnp.zeros((size, x.shape[1]), x.dtype)

    def extend(
        self, ops: Any, params: Any, x: jax.Array, cache: jax.Array, start: jax.Array | int
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        cache = write(cache, x, start)
        results = self.run(ops, params, cache)
        return tuple(jax.lax.dynamic_slice_in_dim(part, start, x.shape[0]) for part in results), cache

    def functions(self, module: Any, inputs: Sequence[np.ndarray], length: int) -> dict[str, fhe.Function]:
        texts = [(np.pad(x, ((0, length - len(x)), (0, 0))),) for x in inputs]
        return {"head": fhe.Function(self.run, texts)}

    def calls(self, client: Any, known: int, length: int) -> Mapping[str, int]:
        return {"head": length - known if known else 1}

    def read(
        self, client: Any, executor: Executor, x: np.ndarray, cache: CircuitCache | None, length: int
    ) -> tuple[list[np.ndarray], CircuitCache]:
        inputs = appended(cache, x, length)
        arrays = executor.encrypt("head", np.pad(inputs, ((0, length - len(inputs)), (0, 0))))
        results = executor.decrypt("head", executor.run("head", arrays))
        return [part[len(inputs) - len(x) : len(inputs)] for part in results], CircuitCache(inputs, None)


# --- token by token -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """A function for a new token, and one that sums over earlier tokens, whose part of it is kept encrypted.

    Every function works on rows that do not meet: leading axis N, 1 in a circuit, of all its arrays. Blocks come in a
    few sizes, so that any length is a sum of blocks and nothing is compiled again for another length.

    project: project(ops, params, x (N, C)) -> arrays (N, ...), of which the first `row` are of the new token alone, and
        the others, its state, are what later tokens read. Each must come straight out of a lookup, or be a sum of
        results of lookups (see `fhe.tfhe.concrete`).
    first: first(ops, params, *some) -> results of the first token, which has nobody before it.
    attend: attend(ops, params, *row, *state, *state, ...) -> a row's sum over a block of tokens. The sums over all
        blocks up to the token itself, added by who decrypts them, are its results.
    row: how many of project's results are the row's.
    alone: which arrays of its state `first` takes.
    blocks: sizes of blocks, the largest first, ending in 1.
    """

    project: Body
    first: Body
    attend: Body
    row: int
    alone: tuple[int, ...]
    blocks: tuple[int, ...] = (4, 2, 1)

    @property
    def bodies(self) -> tuple[Body, ...]:
        return self.project, self.first, self.attend

    # In JAX, and in NumPy.

    def whole(self, ops: Any, params: Any, x: Any) -> tuple[Any, ...]:
        results = self.project(ops, params, x)
        positions = np.arange(x.shape[0])
        return self._rows(ops, params, results[: self.row], results[self.row :], positions[:, None] >= positions)

    def empty_cache(self, ops: Any, params: Any, x: jax.Array, size: int) -> tuple[jax.Array, ...]:
        shapes = jax.eval_shape(lambda p, x: self.project(ops, p, x), params, x)[self.row :]
        return tuple(jnp.zeros((size, *part.shape[1:]), part.dtype) for part in shapes)

    def extend(
        self, ops: Any, params: Any, x: jax.Array, cache: tuple[jax.Array, ...], start: jax.Array | int
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        results = self.project(ops, params, x)
        cache = tuple(write(part, new, start) for part, new in zip(cache, results[self.row :], strict=True))
        positions = start + jnp.arange(x.shape[0])
        seen = positions[:, None] >= jnp.arange(cache[0].shape[0])
        return self._rows(ops, params, results[: self.row], cache, seen), cache

    def _rows(self, ops: Any, params: Any, row: Sequence[Any], state: Sequence[Any], seen: Any) -> tuple[Any, ...]:
        """The results of rows (T, ...) over a state (S, ...); seen (T, S): which token a row may read."""
        tokens, room = seen.shape
        every = np.zeros((tokens, room, 1), np.int32)

        def flat(pairs: Any) -> Any:
            return pairs.reshape(tokens * room, -1)

        pairs = self.attend(
            ops, params, *(flat(part[:, None] + every) for part in row), *(flat(part + every) for part in state)
        )
        alone = self.first(ops, params, *(state[part][:1] for part in self.alone))
        results = []
        for pair, first in zip(pairs, alone, strict=True):
            sums = (pair.reshape(tokens, room, -1) * seen[:, :, None]).sum(axis=1)  # (T, ...)
            # Only the first token of all reads one token alone.
            only = (seen.sum(axis=1) == 1)[:, None]
            results.append(sums * (1 - only) + first * only)
        return tuple(results)

    # In a circuit.

    def _blocks(self, count: int) -> list[int]:
        """Sizes of blocks that make up `count` tokens."""
        sizes = []
        for block in self.blocks:
            sizes += [block] * (count // block)
            count %= block
        return sizes

    def functions(self, module: Any, inputs: Sequence[np.ndarray], length: int) -> dict[str, fhe.Function]:
        ops, params = fhe.NumpyOps(), module.params
        every = np.concatenate(inputs)
        results = self.project(ops, params, every)
        starts = np.cumsum([0, *map(len, inputs)])
        sources = [[fhe.Output("project", position)] for position in range(len(results))]
        row_sources, state_sources = sources[: self.row], sources[self.row :]

        longest = max(map(len, inputs))
        functions = {
            "project": fhe.Function(self.project, extreme_samples(self.project, params, [every])),
            "first": fhe.Function(
                self.first,
                extreme_samples(self.first, params, [results[self.row + part] for part in self.alone]),
                [state_sources[part] for part in self.alone],
            ),
        }
        for size in self.blocks:
            if longest < max(size, 2):
                continue
            rows, tokens = [], []  # of `every`: who attends, and the first of the block that it attends to
            for start, end in itertools.pairwise(starts):
                for index in range(1, end - start):
                    # A text of another length has its blocks elsewhere: every aligned place counts.
                    at = np.arange(0, index + 2 - size, size)
                    rows.append(np.full(len(at), start + index))
                    tokens.append(start + at)
            i, j = np.concatenate(rows), np.concatenate(tokens)
            arrays = [array[i] for array in results[: self.row]]
            arrays += [array[j + offset] for offset in range(size) for array in results[self.row :]]
            functions[f"attend_{size}"] = fhe.Function(
                self.attend, extreme_samples(self.attend, params, arrays), [*row_sources, *state_sources * size]
            )
        return functions

    def calls(self, client: Any, known: int, length: int) -> Mapping[str, int]:
        counts = Counter(project=length - known)
        for count in range(known + 1, length + 1):
            counts.update(f"attend_{size}" for size in self._blocks(count)) if count > 1 else counts.update(["first"])
        return counts

    def read(
        self, client: Any, executor: Executor, x: np.ndarray, cache: CircuitCache | None, length: int
    ) -> tuple[list[np.ndarray], CircuitCache]:
        """All calls for new tokens are made before the first result is decrypted."""
        inputs = appended(cache, x, length)
        state = () if cache is None else cache.state
        issued = []
        for row in x:
            sums, state = self._decode_step(executor, executor.encrypt("project", row[None]), state)
            issued.append(sums)
        results = []
        for sums in issued:
            decrypted = [executor.decrypt(name, arrays) for name, arrays in sums]
            results.append([np.sum(parts, axis=0) for parts in zip(*decrypted, strict=True)])
        return [np.concatenate(parts) for parts in zip(*results, strict=True)], CircuitCache(inputs, state)

    def _decode_step(
        self, executor: Executor, inputs: Sequence[Any], state: tuple[Sequence[Any], ...]
    ) -> tuple[list[tuple[str, Sequence[Any]]], tuple[Sequence[Any], ...]]:
        """One more token: functions with their results, whose sums are the token's results, and the state with it."""
        results = executor.run("project", inputs)
        row, own = results[: self.row], results[self.row :]
        state = (*state, own)
        if len(state) == 1:
            return [("first", executor.run("first", [own[part] for part in self.alone]))], state
        sums, start = [], 0
        for size in self._blocks(len(state)):
            block = [array for one in state[start : start + size] for array in one]
            sums.append((f"attend_{size}", executor.run(f"attend_{size}", [*row, *block])))
            start += size
        return sums, state


@dataclass(frozen=True)
class GrowingCache:
    """A function for a new token, and one for a query and all tokens up to it, whose part is kept encrypted.

    The second one is compiled for every number of tokens: "attend_1", "attend_2", ...

    project: project(ops, params, x (N, C)) -> arrays (N, ...), of which the first is the query's, and the others, its
        state, are what later queries read. Each must come straight out of a lookup.
    attend: attend(ops, params, [query (N, ...)], state, seen) -> results (N, ...); state: arrays (1 or N, S, ...), the
        same for all queries or not; seen: (N, S), 1 where a query may look, or None for everywhere.
    """

    project: Body
    attend: Callable[..., tuple[Any, ...]]

    @property
    def bodies(self) -> tuple[Body, ...]:
        return self.project, self.attend, attend_block

    def whole(self, ops: Any, params: Any, x: Any) -> tuple[Any, ...]:
        query, *state = self.project(ops, params, x)
        seen = np.tri(x.shape[0], dtype=np.int64)
        return self.attend(ops, params, [query], [part.reshape((1, *part.shape)) for part in state], seen)

    def empty_cache(self, ops: Any, params: Any, x: jax.Array, size: int) -> tuple[jax.Array, ...]:
        shapes = jax.eval_shape(lambda p, x: self.project(ops, p, x), params, x)[1:]
        return tuple(jnp.zeros((size, *part.shape[1:]), part.dtype) for part in shapes)

    def extend(
        self, ops: Any, params: Any, x: jax.Array, cache: tuple[jax.Array, ...], start: jax.Array | int
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        query, *state = self.project(ops, params, x)
        cache = tuple(write(part, new, start) for part, new in zip(cache, state, strict=True))
        positions = start + jnp.arange(x.shape[0])
        seen = (positions[:, None] >= jnp.arange(cache[0].shape[0])).astype(jnp.int32)
        return self.attend(ops, params, [query], [part[None] for part in cache], seen), cache

    def functions(self, module: Any, inputs: Sequence[np.ndarray], length: int) -> dict[str, fhe.Function]:
        # A short text is repeated: every length has its inputs.
        texts = np.stack([np.resize(x, (length, x.shape[1])) for x in inputs])  # (B, T, C)
        query, *state = (
            part.reshape(*texts.shape[:2], -1)
            for part in self.project(fhe.NumpyOps(), module.params, texts.reshape(-1, texts.shape[2]))
        )
        every = np.concatenate(list(inputs))
        functions = {"project": fhe.Function(self.project, extreme_samples(self.project, module.params, [every]))}
        sources = [[fhe.Output("project", 1 + position)] for position in range(len(state))]
        for count in range(1, length + 1):
            run = functools.partial(attend_block, self.attend, len(state))
            arrays = [query[:, count - 1], *(part[:, index] for index in range(count) for part in state)]
            functions[f"attend_{count}"] = fhe.Function(
                run, extreme_samples(run, module.params, arrays), [[fhe.Output("project", 0)], *sources * count]
            )
        return functions

    def calls(self, client: Any, known: int, length: int) -> Mapping[str, int]:
        return {"project": length - known} | {f"attend_{count}": 1 for count in range(known + 1, length + 1)}

    def read(
        self, client: Any, executor: Executor, x: np.ndarray, cache: CircuitCache | None, length: int
    ) -> tuple[list[np.ndarray], CircuitCache]:
        """All calls for new tokens are made before the first result is decrypted."""
        inputs = appended(cache, x, length)
        state: tuple[Any, ...] = () if cache is None else cache.state
        issued = []
        for row in x:
            query, *own = executor.run("project", executor.encrypt("project", row[None]))
            state = (*state, *own)
            name = f"attend_{len(state) // len(own)}"
            issued.append((name, executor.run(name, [query, *state])))
        results = [executor.decrypt(name, arrays) for name, arrays in issued]
        return [np.concatenate(parts) for parts in zip(*results, strict=True)], CircuitCache(inputs, state)


def attend_block(
    attend: Callable[..., tuple[Any, ...]], parts: int, ops: Any, params: Any, query: Any, *state: Any
) -> tuple[Any, ...]:
    """`GrowingCache.attend` for queries (N, ...) of which each sees all tokens of its state: `parts` arrays (N, D) of
    every token."""
    count = len(state) // parts
    rows = []
    for part in range(parts):
        own = state[part::parts]
        side = own[0] if count == 1 else ops.concatenate(own, axis=1)  # (N, S D)
        rows.append(side.reshape((query.shape[0], count, own[0].shape[1])))
    return attend(ops, params, [query], rows, None)
