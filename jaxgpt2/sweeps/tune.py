"""What `tune` chooses: the configurations of heads, then how their lookups are encrypted.

Ranks and bits are chosen by what quantized heads keep of the model; error probability and rounding, which the integers
know nothing of, by what the engine's simulation of the encrypted heads loses of that. Everything measured is a row, and
rows that are there already are not measured again.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fhe
from jaxgpt2 import methods
from jaxgpt2.calibration import HiddenStates, fisher_information
from jaxgpt2.encrypted import EncryptedGPT2, Module, head_weights
from jaxgpt2.errors import InputError
from jaxgpt2.evaluation import measure
from jaxgpt2.methods.method import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.progress import seconds
from jaxgpt2.sweeps.runner import Configuration, grid
from jaxgpt2.sweeps.store import Row, SweepDirectory

# So many configurations of a head are all measured; of more, most are only screened.
FEW = 8

# How many times as much as is wanted screened heads may lose where the search begins: training mends about half.
LOOSE = 2.0

# Prices of KL that are tried, in seconds a nat.
PRICES = tuple(4.0**exponent for exponent in range(-10, 25))

# Texts of a first look at an encrypted head, of which so many are simulated at a time; then twice as many, until it is
# clear what it loses.
FIRST_TEXTS = 16
TEXTS_AT_A_TIME = 4

# Bounds hold with this probability, each, over the choice of texts.
CONFIDENCE = 0.95


@dataclass
class Table:
    """Rows by key, on the disk as they come, where there is a directory; there their keys begin with the prefix."""

    rows: dict[str, Row]
    directory: SweepDirectory | None = None
    prefix: str = ""
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rows: Sequence[Row]) -> None:
        with self._adding:
            if self.directory is not None:
                self.directory.append([row | {"key": self.prefix + row["key"]} for row in rows])
            self.rows |= {row["key"]: row for row in rows}

    def under(self, prefix: str) -> Table:
        """The rows of another kind in the same directory."""
        own = {key.removeprefix(prefix): row for key, row in self.rows.items() if key.startswith(prefix)}
        return Table({key: row | {"key": key} for key, row in own.items()}, self.directory, prefix)


def candidates(
    gpt2: GPT2,
    modules: Sequence[Module],
    names: Sequence[str],
    widths: Sequence[Any],
    options: Mapping[str, Sequence[int]],
    apart: Sequence[Mapping[str, int | None]],
    calibration: Sequence[str],
    max_tokens: int,
) -> list[Configuration]:
    """Configurations of heads that are worth measuring: what is named, and the method's own proposals for each head.

    Args:
        options: of methods, with values that are named instead of the proposed ones.
        widths, apart: see `jaxgpt2.sweeps.runner.grid`.
        calibration, max_tokens: text that the proposals are made from.
    """
    proposing = [name for name in names if methods.get(name).propose is not None]
    found = grid(modules, names, widths, options, apart)
    if not proposing:
        return found
    states, by_key = HiddenStates.read(gpt2, calibration, max_tokens), dict[str, Configuration]()
    fisher = fisher_information(gpt2, states)
    for layer, own in itertools.groupby(sorted(modules), key=lambda module: module.layer):
        states = states.at(gpt2, layer)
        inputs = states.inputs(gpt2)
        for module in own:
            assert module.head is not None
            weights = head_weights(gpt2, layer, module.head, fisher[layer])
            proposals: dict[str, Sequence[Mapping[str, int]]] = {}
            for name in dict.fromkeys(names):
                propose = methods.get(name).propose
                proposals[name] = ({},) if propose is None else propose(weights, inputs)
            for each in (each for each in found if each.module == module):
                for proposal in proposals[each.config.method]:
                    # What is named stands.
                    changes = {**proposal, **dict(each.config.changes)}
                    config = dataclasses.replace(each.config, changes=tuple(sorted(changes.items())))
                    one = Configuration(module, config)
                    by_key[one.key] = one
    return list(by_key.values())


def screened(configuration: Configuration) -> Configuration:
    """A configuration that is calibrated fast, for a first look."""
    config, quick = configuration.config, methods.get(configuration.config.method).quick
    changes = tuple(sorted({**dict(config.changes), **quick}.items()))
    return Configuration(configuration.module, dataclasses.replace(config, changes=changes))


Measure = Callable[[Sequence[Configuration]], Sequence[Row]]


def recovered(rows: Collection[Row]) -> float:
    """What heads keep together: 1 - sum of kl / sum of kl_ablated, over a row for each."""
    return 1 - sum(row["kl"] for row in rows) / sum(row["kl_ablated"] for row in rows)


def search(configurations: Sequence[Configuration], wanted: float, screen: Measure, final: Measure) -> list[Row]:
    """Rows among which `cheapest` finds a good choice, of few of the configurations.

    All are screened. For a price of KL in seconds every head takes its best configuration; those of rising or falling
    prices are measured, until together they keep what is wanted and no more.

    Args:
        screen, final: measure configurations, roughly and fast, and as they are; rows in the same order.
    """
    by_head: dict[Module, list[Configuration]] = {}
    for each in configurations:
        by_head.setdefault(each.module, []).append(each)
    if all(len(own) <= FEW for own in by_head.values()):
        return list(final(configurations))
    rough = dict(zip((each.key for each in configurations), screen(configurations), strict=True))
    usable = {
        head: some
        for head, own in by_head.items()
        if (some := [each for each in own if rough[each.key].get("recovered_kl") is not None])
    }

    def chosen(price: float) -> list[Configuration]:
        def cost(each: Configuration) -> float:
            return rough[each.key]["estimated_seconds"] + price * rough[each.key]["kl"]

        return [min(own, key=cost) for own in usable.values()]

    def enough(rows: Sequence[Row], share: float) -> bool:
        if any(row.get("recovered_kl") is None for row in rows):
            return False
        return recovered(rows) >= share

    loose = 1 - LOOSE * (1 - wanted)
    start = next(
        (i for i, price in enumerate(PRICES) if enough([rough[each.key] for each in chosen(price)], loose)),
        len(PRICES) - 1,
    )
    found = {}

    def measured(index: int) -> bool:
        rows = final(chosen(PRICES[index]))
        found.update({row["key"]: row for row in rows})
        return enough(rows, wanted)

    if measured(start):
        while start > 0 and measured(start - 1):
            start -= 1
    else:
        while start + 1 < len(PRICES) and not measured(start + 1):
            start += 1
    # A head of which nothing could be measured is said by `cheapest`.
    lost = [rough[each.key] for head, own in by_head.items() if head not in usable for each in own]
    return [*found.values(), *lost]


def cheapest(rows: Mapping[str, Sequence[dict[str, Any]]], wanted: float) -> dict[str, dict[str, Any]]:
    """For every head the row to take, so that all of them together keep enough at the least estimated time.

    What a set of rows keeps is 1 - sum of kl / sum of kl_ablated. For a price of KL in seconds every head takes its
    best row; the least price that keeps enough is found by bisection, and what is left over is then spent head by head.

    Raises:
        InputError: no choice keeps enough; the message says what the best one keeps.
    """
    known = {head: [row for row in some if row.get("recovered_kl") is not None] for head, some in rows.items()}
    for head, some in known.items():
        if not some:
            raise InputError(f"head {head}: nothing could be measured in any of {len(rows[head])} configurations")
    ablated = sum(some[0]["kl_ablated"] for some in known.values())

    def kept(choice: Mapping[str, dict[str, Any]]) -> float:
        return 1 - sum(row["kl"] for row in choice.values()) / ablated

    def at(price: float) -> dict[str, dict[str, Any]]:
        return {head: min(some, key=lambda r: r["estimated_seconds"] + price * r["kl"]) for head, some in known.items()}

    low, high = -12.0, 18.0  # exponents of ten
    choice = at(10**high)
    if kept(choice) < wanted:
        count, took = sum(map(len, rows.values())), sum(row["estimated_seconds"] for row in choice.values())
        raise InputError(
            f"head {', '.join(rows)}: none of {count} configurations recovers {wanted:g} of the KL, the best recovers "
            f"{kept(choice):.4f} (in about {seconds(took)}): allow more --bits, other --set or --attention, or ask for "
            "less"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(at(10**middle)) >= wanted else (middle, high)
    choice = at(10**high)
    for head, some in sorted(known.items(), key=lambda item: -choice[item[0]]["estimated_seconds"]):
        enough = [row for row in some if kept({**choice, head: row}) >= wanted]
        choice[head] = min(enough, key=lambda row: (row["estimated_seconds"], row["kl"]))
    return choice


@dataclass(frozen=True)
class Trial:
    """One way to encrypt a head's lookups, simulated on texts.

    Args:
        fhe_config: error probability and rounding.
        complexity: of a text of the length that was asked for, in the engine's own unit.
        lost: the share of the head's KL that encryption costs: sum of (simulated - quantized) / sum of ablated.
        low, high: what `lost` surely is not below and not above, see `bounds`.
        texts: how many were read.
        error: why the head cannot be compiled with it; then the numbers say nothing.
    """

    fhe_config: fhe.FHEConfig
    complexity: float = 0.0
    lost: float = 0.0
    low: float = 0.0
    high: float = 0.0
    texts: int = 0
    error: str | None = None

    def holds(self, allowed: float) -> bool:
        """Whether it surely loses no more than is allowed."""
        return self.error is None and self.high <= allowed


def bounds(simulated: np.ndarray, quantized: np.ndarray, ablated: np.ndarray) -> tuple[float, float, float]:
    """The share of a head's KL that encryption costs, and one-sided bounds below and above it.

    Paired: each text (N,) gives its three sums of KL. The bounds are quantiles of a bootstrap over texts (Efron,
    "Bootstrap methods", 1979), each with a probability of CONFIDENCE.
    """
    lost = simulated - quantized
    if not ablated.sum() > 0:
        return 0.0, -np.inf, np.inf
    drawn = np.random.default_rng(0).integers(0, len(lost), (2000, len(lost)))
    shares = lost[drawn].sum(axis=1) / np.maximum(ablated[drawn].sum(axis=1), 1e-12)
    low, high = np.quantile(shares, (1 - CONFIDENCE, CONFIDENCE))
    return float(lost.sum() / ablated.sum()), float(low), float(high)


@dataclass(frozen=True)
class Simulation:
    """What encrypted heads are simulated on.

    passages: cut to `seq_len` tokens, for which circuits are made. inputs: of each layer, of calibration texts cut to
    as many. allowed: the share of its KL that encryption may cost a head. stopping: set where nothing more is wanted.
    """

    passages: Sequence[str]
    inputs: Mapping[int, Sequence[np.ndarray]]
    seq_len: int
    allowed: float
    stopping: threading.Event = field(default_factory=threading.Event)


def trial(alone: EncryptedGPT2, fhe_config: fhe.FHEConfig, simulation: Simulation, table: Table) -> Trial:
    """Simulates one calibrated head, on more and more texts until it surely loses no more than is allowed, or they show
    that it loses more.

    Raises:
        CancelledError: nothing more is wanted.
    """
    ((module, config),) = alone.configs.items()
    one = Configuration(module, dataclasses.replace(config, encryption=fhe_config))
    key = f"circuit of {simulation.seq_len} tokens {one.key}"
    row = table.rows.get(key, {"key": key, "complexity": 0.0, "simulated": [], "quantized": [], "ablated": []})
    compiled, count = None, FIRST_TEXTS
    while row.get("problem") is None:
        count = min(count, len(simulation.passages))
        if (known := len(row["simulated"])) < count:
            if simulation.stopping.is_set():
                raise CancelledError
            try:
                compiled = compiled or alone.compile_on(simulation.inputs, simulation.seq_len, fhe_config)
            except fhe.CompilationError as error:
                row = row | {"problem": f"head {module}: {error}"}
                table.add([row])
                break
            report = compiled.circuits[module].report
            share = compiled.costs(simulation.seq_len)[module].counts["pbs_count"] / report.pbs_count
            runners: dict[str, Any] = {
                "simulated": compiled.runner("simulate"),
                "quantized": compiled.runner("quantized"),
            }
            texts = simulation.passages[known : min(count, known + TEXTS_AT_A_TIME)]
            found = measure(compiled, texts, runners, (1,), simulation.seq_len)
            more = {**found.runs, "ablated": found.ablated}
            row = row | {"complexity": report.complexity * share}
            row |= {name: row[name] + sums.kl.tolist() for name, sums in more.items()}
            table.add([row])
            continue
        lost, low, high = bounds(*(np.array(row[name]) for name in ("simulated", "quantized", "ablated")))
        if high <= simulation.allowed or lost > simulation.allowed or count == len(simulation.passages):
            return Trial(fhe_config, row["complexity"], lost, low, high, len(row["simulated"]))
        count *= 2
    return Trial(fhe_config, error=row["problem"])


def cheapest_encryption(
    alone: EncryptedGPT2, candidates: Sequence[fhe.FHEConfig], simulation: Simulation, table: Table
) -> tuple[fhe.FHEConfig, list[Trial]]:
    """The cheapest way to encrypt a head that surely loses no more than is allowed, and all that were tried.

    Of each rounding, in the order given, the largest error probability that holds is found by bisection, which begins
    with what the method tolerates; the first rounding that has one is taken.

    Raises:
        InputError: there is none; the message says what the best one loses.
    """
    tried: list[Trial] = []
    (config,) = alone.configs.values()
    tolerated = methods.get(config.method).fhe_config
    for _, group in itertools.groupby(candidates, key=lambda each: each.rounding):
        some = sorted(group, key=lambda each: each.p_error)
        low, high = -1, len(some)  # what is known to hold, and not to
        middle = some.index(tolerated) if tolerated in some else high // 2
        while high - low > 1:
            tried.append(trial(alone, some[middle], simulation, table))
            low, high = (middle, high) if tried[-1].holds(simulation.allowed) else (low, middle)
            middle = (low + high + 1) // 2
        if low >= 0:
            return some[low], tried
    working = [each for each in tried if each.error is None]
    if not working:
        raise InputError(f"no error probability and rounding that was tried can be compiled: {tried[0].error}")
    best = min(working, key=lambda each: each.high)
    raise InputError(
        f"head {alone.modules[0]}: every error probability and rounding that was tried may cost more than "
        f"{simulation.allowed:g} of its KL, the best ({best.fhe_config.p_error:g}, {best.fhe_config.rounding}) "
        f"{best.low:.4f} to {best.high:.4f} by {best.texts} texts: allow more --noise, simulate more texts, or give a "
        "smaller --p-error"
    )


def tune_encryption(
    gpt2: GPT2,
    configs: Mapping[Module, MethodConfig],
    candidates: Sequence[fhe.FHEConfig],
    passages: Sequence[str],
    calibration: Sequence[str],
    seq_len: int,
    allowed: float,
    table: Table,
    cache: Any = None,
    progress: Callable[[float], object] = lambda count: None,
) -> dict[Module, tuple[fhe.FHEConfig, list[Trial]]]:
    """`cheapest_encryption` of heads, each alone. Everything measured is in the table before an error is raised.

    cache: see `EncryptedGPT2.calibrate`. progress: is told of every head.
    """
    calibrated = EncryptedGPT2(gpt2, configs).calibrate(calibration, seq_len, cache)
    states, inputs = HiddenStates.read(gpt2, calibration, seq_len), {}
    for layer in sorted({module.layer for module in configs}):
        states = states.at(gpt2, layer)
        inputs[layer] = states.inputs(gpt2)
    simulation = Simulation(passages, inputs, seq_len, allowed)
    found: dict[Module, tuple[fhe.FHEConfig, list[Trial]]] = {}
    failed: InputError | None = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # an engine simulates on one core
        heads = {}
        for module, config in configs.items():
            alone = EncryptedGPT2(gpt2, {module: config}, {module: calibrated.quantized[module]})
            heads[pool.submit(cheapest_encryption, alone, candidates, simulation, table)] = module
        try:
            for future in as_completed(heads):
                try:
                    found[heads[future]] = future.result()
                except InputError as error:
                    failed = failed or error
                progress(1)
        finally:
            simulation.stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if failed is not None:
        raise failed
    return {module: found[module] for module in configs}
