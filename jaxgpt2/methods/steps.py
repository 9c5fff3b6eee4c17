"""A function of a growing sequence, evaluated one element at a time, with what earlier elements left kept encrypted.

`project` reads a new element and gives what belongs to its own row and what later rows will need of it; `attend`
sums over a block of elements on behalf of a row. Blocks come in a few sizes, so that any length is a sum of blocks and
nothing is compiled again for another length. The cost of an element grows linearly with those before it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fhe.backend import Function, FunctionBody, Output
from fhe.clear import NumpyOps, extreme_samples

# How a function of a circuit is called: by name, on arrays (or the bytes of encrypted ones), for as many results.
Call = Callable[[str, Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Steps:
    """The three functions of a sequence.

    Every function works on rows: leading axis N, 1 in a circuit, of all its arrays, and rows do not meet.

    project: project(ops, params, x (N, C)) -> arrays (N, ...), of which the first `row` are of the new element alone,
        and the others, its state, are what later elements read. Each must come straight out of a lookup, or be a sum
        of results of lookups (see `fhe.tfhe.concrete`).
    first: first(ops, params, *some) -> results of the first element, which has nobody before it.
    attend: attend(ops, params, *row, *state, *state, ...) -> a row's sum over a block of elements. The sums of all
        blocks up to the element itself, added by who decrypts them, are its results.
    row: how many of project's results are the row's.
    alone: which arrays of its state `first` takes.
    blocks: sizes of blocks, the largest first, ending in 1.
    """

    project: FunctionBody
    first: FunctionBody
    attend: FunctionBody
    row: int
    alone: tuple[int, ...]
    blocks: tuple[int, ...] = (4, 2, 1)

    def cut(self, count: int) -> list[int]:
        """Sizes of blocks that make up `count` elements."""
        sizes = []
        for block in self.blocks:
            sizes += [block] * (count // block)
            count %= block
        return sizes

    def calls(self, length: int) -> Counter[str]:
        """How often each function runs for a sequence of `length` elements."""
        counts = Counter(project=length, first=1)
        for count in range(2, length + 1):
            counts.update(f"attend_{size}" for size in self.cut(count))
        return counts

    def advance(self, call: Call, state: list[Sequence[Any]], inputs: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
        """Reads one more element.

        Args:
            call: runs a function.
            state: of all earlier elements, in order; the new one's is appended.
            inputs: of `project`.

        Returns:
            names of functions with their results, whose sums over all entries are the element's results.
        """
        results = call("project", inputs)
        row, own = results[: self.row], results[self.row :]
        state.append(own)
        if len(state) == 1:
            return [("first", call("first", [own[part] for part in self.alone]))]
        sums, start = [], 0
        for size in self.cut(len(state)):
            block = [array for one in state[start : start + size] for array in one]
            sums.append((f"attend_{size}", call(f"attend_{size}", [*row, *block])))
            start += size
        return sums

    def functions(self, params: Any, sequences: Sequence[np.ndarray]) -> dict[str, Function]:
        """What to compile, by name; input sets hold the extremes that these sequences of inputs (T, C) reach."""
        ops = NumpyOps()
        every = np.concatenate(sequences)
        results = self.project(ops, params, every)
        starts = np.cumsum([0, *map(len, sequences)])
        wires = [[Output("project", position)] for position in range(len(results))]
        row_wires, state_wires = wires[: self.row], wires[self.row :]

        longest = max(map(len, sequences))
        functions = {
            "project": Function(self.project, extreme_samples(self.project, params, [every])),
            "first": Function(
                self.first,
                extreme_samples(self.first, params, [results[self.row + part] for part in self.alone]),
                [state_wires[part] for part in self.alone],
            ),
        }
        for size in self.blocks:
            if longest < max(size, 2):
                continue
            rows, elements = [], []  # of `every`: who attends, and the first of the block that it attends to
            for start, end in itertools.pairwise(starts):
                for index in range(1, end - start):
                    # A text of another length has its blocks elsewhere: every aligned place counts.
                    at = np.arange(0, index + 2 - size, size)
                    rows.append(np.full(len(at), start + index))
                    elements.append(start + at)
            i, j = np.concatenate(rows), np.concatenate(elements)
            inputs = [array[i] for array in results[: self.row]]
            inputs += [array[j + offset] for offset in range(size) for array in results[self.row :]]
            functions[f"attend_{size}"] = Function(
                self.attend, extreme_samples(self.attend, params, inputs), [*row_wires, *state_wires * size]
            )
        return functions
