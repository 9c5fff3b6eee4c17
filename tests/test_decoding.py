"""Decoding strategies: a text read at once, in pieces and token by token gives the same, in JAX and in circuits; and a
method's functions are stated once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fhe
from fhe import NumpyOps
from fhe.backend import check_functions
from heads import Rehearsal, random_head, random_inputs
from jaxgpt2 import methods
from jaxgpt2.decoding import Cached, DecodingStrategy, NotReady
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import evaluate
from jaxgpt2.executors import Executor, LocalExecutor, SimulatedExecutor
from jaxgpt2.methods import MethodConfig, QuantizedModule, lowrank
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import _METHODS as registered
from jaxgpt2.methods.polynomial import PackedSequence
from jaxgpt2.modules import Module
from jaxgpt2.quantize import Bits
from jaxgpt2.sweeps.runner import Configuration, Experiment, SweepRunner

WIDTH, LENGTH = 7, 6
NAMES = ["softmax", "lowrank", "polynomial"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A head of a method, a text for it, and its circuit."""

    name: str
    strategy: DecodingStrategy
    module: QuantizedModule
    text: np.ndarray  # encoded, (LENGTH, WIDTH)
    executor: Callable[[], Executor]

    def equal(self, got: Any, wanted: Any) -> None:
        """Integers are equal; CKKS's numbers are floats, of JAX's precision here."""
        for a, b in zip(got, wanted, strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert a.shape == b.shape
            if self.name == "polynomial":
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
            else:
                np.testing.assert_array_equal(a, b)


@functools.cache
def case(name: str) -> Case:
    method = methods.get(name)
    options = {**method.options, **({"training_steps": 0} if name == "lowrank" else {})}
    inputs = random_inputs(0, 20, LENGTH, WIDTH)
    module = method.head.calibrate(random_head(0, WIDTH, 3), inputs, Bits.of(4), LENGTH, **options)
    texts = method.head.samples(module, inputs)
    if name == "polynomial":
        strategy = PackedSequence(256)
        functions = check_functions(strategy.functions(module, texts, LENGTH))
        return Case(name, strategy, module, texts[0], lambda: Rehearsal(functions, module.params, 256))
    strategy = method.head.strategy
    circuit = fhe.get_backend("clear").compile(
        strategy.functions(module, texts, LENGTH), module.params, fhe.FHEConfig(rounding="exact")
    )
    return Case(name, strategy, module, texts[0], lambda: LocalExecutor(circuit, circuit.make_keys()))


def wanted(one: Case) -> tuple[Any, ...]:
    return one.strategy.whole(JaxOps(), one.module.params, jnp.asarray(one.text, in_jax(one)))


def in_jax(one: Case) -> Any:
    return jnp.float32 if one.name == "polynomial" else jnp.int32


@functools.partial(jax.jit, static_argnums=0)
def extend(strategy: DecodingStrategy, params: Any, x: jax.Array, cache: Any, start: int) -> Any:
    return strategy.extend(JaxOps(), params, x, cache, start)


def joined(parts: list[Any]) -> list[np.ndarray]:
    return [np.concatenate([np.asarray(part) for part in some]) for some in zip(*parts, strict=True)]


# Where a text is cut: nowhere, everywhere, and anywhere.
cuts = st.sets(st.integers(1, LENGTH - 1)).map(sorted) | st.just([]) | st.just(list(range(1, LENGTH)))
by_name = pytest.mark.parametrize("name", NAMES)


@by_name
@settings(max_examples=12)
@given(cuts=cuts, spare=st.sampled_from([0, 2]), padding=st.integers(0, 1))
def test_pieces_of_a_text_give_the_results_of_the_whole_in_jax(name, cuts, spare, padding):
    """Whatever room the cache has, and with padding after every piece, which the next one overwrites."""
    one = case(name)
    size, parts = LENGTH + spare, []
    rows = jnp.asarray(one.text, in_jax(one))
    cache = one.strategy.empty_cache(JaxOps(), one.module.params, rows, size)
    for start, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        more = min(padding, size - end)
        piece = jnp.concatenate([rows[start:end], jnp.full((more, WIDTH), 3, rows.dtype)])
        results, cache = extend(one.strategy, one.module.params, piece, cache, start)
        parts.append([part[: end - start] for part in results])
    one.equal(joined(parts), wanted(one))


@by_name
@settings(max_examples=12, deadline=None)
@given(cuts=cuts)
def test_pieces_of_a_text_give_the_results_of_the_whole_in_a_circuit(name, cuts):
    one = case(name)
    executor, cache, parts = one.executor(), None, []
    for start, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        results, cache = one.strategy.read(one.module.client, executor, one.text[start:end], cache, LENGTH)
        assert np.array_equal(cache.inputs, one.text[:end])
        parts.append(results)
    one.equal(joined(parts), wanted(one))
    with pytest.raises(NotReady, match=f"compiled for {LENGTH} tokens, got {LENGTH + 1}"):
        one.strategy.read(one.module.client, executor, one.text[:1], cache, LENGTH)


@by_name
def test_a_cache_is_a_value_that_several_texts_go_on_from(name):
    one = case(name)
    other = one.text[::-1]
    executor = one.executor()
    _, cache = one.strategy.read(one.module.client, executor, one.text[:4], None, LENGTH)
    for rest in (one.text[4:], other[:2], one.text[4:]):
        results, after = one.strategy.read(one.module.client, executor, rest, cache, LENGTH)
        both = np.concatenate([one.text[:4], rest])
        whole = one.strategy.whole(JaxOps(), one.module.params, jnp.asarray(both, in_jax(one)))
        one.equal(results, [part[4:] for part in whole])
        assert len(after.inputs) == len(both) and len(cache.inputs) == 4
    rows = jnp.asarray(one.text, in_jax(one))
    start = one.strategy.empty_cache(JaxOps(), one.module.params, rows, LENGTH)
    _, before = extend(one.strategy, one.module.params, rows[:4], start, 0)
    for _ in range(2):
        results, _ = extend(one.strategy, one.module.params, rows[4:], before, 4)
        one.equal(results, [part[4:] for part in wanted(one)])


def test_a_cached_text_costs_what_its_new_tokens_cost():
    """The functions that are called for it, counted by the executor, are those that `calls` says."""
    one = case("lowrank")

    class Counting(SimulatedExecutor):
        def run(self, name: str, arrays: Any) -> Any:
            called.append(name)
            return super().run(name, arrays)

    executor = one.executor()
    assert isinstance(executor, LocalExecutor)
    cache = None
    for start, end in ((0, 3), (3, 4), (4, 6)):
        called: list[str] = []
        _, cache = one.strategy.read(one.module.client, Counting(executor.circuit), one.text[start:end], cache, LENGTH)
        counted = {name: called.count(name) for name in called}
        assert counted == one.strategy.calls(one.module.client, start, end)


# --- one statement ------------------------------------------------------------------------------

LINE = "        e = ops.lookup(params.exponential, scores)  # (N, B)\n"
CHANGED = "        e = ops.lookup(params.weight_square, ops.lookup(params.exponential, scores))\n"


@pytest.fixture
def changed():
    """lowrank, but for one line of its attention: weights are squared, by one more lookup for every pair."""
    source = inspect.getsource(lowrank.attend)
    assert source.count(LINE) == 1
    own = dict(vars(lowrank))
    exec(source.replace(LINE, CHANGED), own)
    strategy = lowrank.LOWRANK.head.strategy
    assert isinstance(strategy, Cached)
    head = dataclasses.replace(lowrank.LOWRANK.head, strategy=dataclasses.replace(strategy, attend=own["attend"]))
    method = dataclasses.replace(lowrank.LOWRANK, name="changed", head=head)
    methods.register(method)
    yield method
    registered.pop("changed")


def test_a_change_of_one_line_of_the_attention_changes_every_run_of_it(changed):
    """The whole text in NumPy and in JAX, with a cache, and in a circuit: equal to each other, and not as before."""
    before, strategy = case("lowrank"), changed.head.strategy
    texts = [before.text]
    circuit = fhe.get_backend("clear").compile(
        strategy.functions(before.module, texts, LENGTH), before.module.params, fhe.FHEConfig(rounding="exact")
    )
    params, rows = before.module.params, jnp.asarray(before.text, jnp.int32)
    cache = strategy.empty_cache(JaxOps(), params, rows, LENGTH)
    runs = {
        "numpy": strategy.whole(NumpyOps(), params, before.text),
        "jax": strategy.whole(JaxOps(), params, rows),
        "extend": strategy.extend(JaxOps(), params, rows, cache, 0)[0],
        "circuit": strategy.read(before.module.client, SimulatedExecutor(circuit), before.text, None, LENGTH)[0],
    }
    for results in runs.values():
        before.equal(results, runs["numpy"])
        old = wanted(before)
        assert all(not np.array_equal(part[1:], other[1:]) for part, other in zip(results, old, strict=True))
        assert all(np.array_equal(part[0], other[0]) for part, other in zip(results, old, strict=True))  # `first`


@pytest.mark.slow
def test_a_change_of_one_line_changes_simulation_sweep_cost_and_circuit_together(changed, gpt2):
    calibration, text, length = ["the cat", "sat on", "a mat", "one dog"] * 3, ["the dog", "it ran", "two cats"], 4
    tokens, module = np.array([gpt2.encode("a dog")[:length]], np.int32), Module(0, 1)
    bench = SweepRunner(Experiment("random", tuple(text), tuple(calibration), (1,), seq_len=length, batch=1), gpt2)
    found: dict[str, dict[str, Any]] = {}
    for name in ("lowrank", "changed"):
        config = MethodConfig.of(name, 4, {"training_steps": 0})
        encrypted = EncryptedGPT2(gpt2, {module: config}).calibrate(calibration, bench.max_tokens)
        compiled = encrypted.compile(calibration, length, fhe.FHEConfig(rounding="approximate"), "clear")
        keys = compiled.make_keys()
        outputs = {
            mode: np.asarray(compiled.forward(tokens, compiled.runner(mode, keys)).contributions)
            for mode in ("quantized", "simulate", "encrypted")
        }
        assert np.array_equal(outputs["quantized"], outputs["simulate"])
        assert np.array_equal(outputs["quantized"], outputs["encrypted"])
        ((row,),) = bench.run([Configuration(module, config)])
        measured = evaluate(encrypted, text, encrypted.runner("quantized"), (1,))
        assert row["head_error"] == pytest.approx(measured.head_error, rel=1e-5)
        assert row["pbs_count"] == compiled.costs(length)[module].counts["pbs_count"]
        found[name] = {"outputs": outputs["quantized"], "head_error": row["head_error"], "pbs": row["pbs_count"]}
    assert not np.array_equal(found["lowrank"]["outputs"], found["changed"]["outputs"])
    assert found["lowrank"]["head_error"] != pytest.approx(found["changed"]["head_error"], rel=1e-2)
    pairs = length * (length + 1) // 2 - 1  # the first token attends to itself without a lookup
    assert found["changed"]["pbs"] - found["lowrank"]["pbs"] == pairs
