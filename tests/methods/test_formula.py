"""Attention methods that are one function: the same integers everywhere, and one line for every mistake."""

from __future__ import annotations

import functools
import pickle
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fhe
from fhe import NumpyOps
from heads import integers, random_head, random_inputs
from helpers import one_line
from jaxgpt2 import methods
from jaxgpt2.decoding import GrowingCache
from jaxgpt2.executors import LocalExecutor, SimulatedExecutor
from jaxgpt2.methods import MethodError
from jaxgpt2.methods.formula import attention, formula_of
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import float_head
from jaxgpt2.quantize import Bits, CalibrationError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "attention"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def own_projections(ops, x, context):
    """A function of x: keys of rank 1."""
    q = ops.project(x, lambda head: (head.query[:, :1], head.query_bias[:1]))
    k = ops.project(context, lambda head: (head.key[:, :1], head.key_bias[:1]))
    v = ops.project(context, lambda head: (head.value, head.value_bias))
    weights = ops.lookup(np.exp, k @ q)
    return weights @ v / weights.sum()


@functools.partial(jax.jit, static_argnums=0)
def whole(strategy, params, x):
    return strategy.whole(JaxOps(), params, x)


@functools.partial(jax.jit, static_argnums=0)
def extend(strategy, params, x, cache, start):
    return strategy.extend(JaxOps(), params, x, cache, start)


@functools.cache
def example(name: str) -> methods.Method:
    return attention(own_projections) if name == "x" else methods.load(f"{EXAMPLES / name}.py:{name}")


@pytest.mark.parametrize("name", [*NAMES, "x"])
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 10**6), widths=st.sampled_from([(2, 4), (4, 6), (5, None)]), tokens=st.sampled_from([1, 4]))
def test_the_same_integers_in_every_namespace(name, seed, widths, tokens):
    """At once in NumPy and JAX, token by token in JAX and in a circuit; beyond the calibrated range too."""
    method = example(name)
    strategy = method.head.strategy
    inputs = random_inputs(seed, 3, 5, 7)
    calibrated = method.head.calibrate(random_head(seed, 7, 2), inputs, Bits.of(*widths), 5)
    x = integers(calibrated, random_inputs(seed + 1, 1, tokens, 7)[0] * 2)
    wanted = strategy.whole(NumpyOps(), calibrated.params, x)
    assert all(part.shape[0] == tokens for part in wanted)
    rows = jnp.asarray(x, jnp.int32)
    runs = [whole(strategy, calibrated.params, rows)]
    cache = strategy.empty_cache(JaxOps(), calibrated.params, rows, tokens + 1)
    parts = []
    for start in range(tokens):
        results, cache = extend(strategy, calibrated.params, rows[start : start + 1], cache, start)
        parts.append(results)
    runs.append([np.concatenate(each) for each in zip(*parts, strict=True)])
    functions = strategy.functions(calibrated, method.head.samples(calibrated, inputs), 5)
    circuit = fhe.get_backend("clear").compile(functions, calibrated.params, fhe.FHEConfig())
    runs.append(strategy.read(calibrated.client, SimulatedExecutor(circuit), x, None, 5)[0])
    for results in runs:
        assert all(np.array_equal(a, b) for a, b in zip(wanted, results, strict=True))


@pytest.mark.parametrize("name", ["inhibitor", pytest.param("relu", marks=pytest.mark.slow)])
def test_they_decrypt_to_their_integers(name):
    pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
    method, inputs = example(name), random_inputs(2, 40, 2, 3)
    calibrated = method.head.calibrate(random_head(2, 3, 1), inputs, Bits.of(2, 4), 2)
    functions = method.head.strategy.functions(calibrated, method.head.samples(calibrated, inputs), 2)
    circuit = fhe.get_backend("concrete").compile(
        functions, calibrated.params, fhe.FHEConfig(p_error=1e-6, rounding="exact")
    )
    x = integers(calibrated, inputs[0])
    wanted = method.head.strategy.whole(NumpyOps(), calibrated.params, x)
    for executor in (SimulatedExecutor(circuit), LocalExecutor(circuit, circuit.make_keys())):
        results, _ = method.head.strategy.read(calibrated.client, executor, x, None, 2)
        assert all(np.array_equal(a, b) for a, b in zip(wanted, results, strict=True))


def kept(ops, q, k, v):
    return ops.lookup(lambda s: np.maximum(s, 0), k @ q / 2) @ v


def divided(ops, q, k, v):
    weights = ops.lookup(lambda s: np.maximum(s, 0), k @ q / 2)
    return weights @ v / weights.sum()


def test_what_the_client_divides_by_makes_no_lookup_wider():
    """Concrete gives what is added together one width; the sum of weights must not get that of the numerators."""
    pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
    inputs, counts = random_inputs(2, 40, 3, 6), []
    for function in (kept, divided):
        method = attention(function)
        calibrated = method.head.calibrate(random_head(2, 6, 4), inputs, Bits.of(4, 6), 3)
        functions = method.head.strategy.functions(calibrated, method.head.samples(calibrated, inputs), 3)
        circuit = fhe.get_backend("concrete").compile(functions, calibrated.params, fhe.FHEConfig(1e-2, "approximate"))
        counts.append(circuit.report.pbs_by_bit_width)
        assert circuit.report.max_integer_bits > max(counts[-1])
    assert counts[0] == counts[1]


def error_of(method: methods.Method, bits: int, **changes) -> float:
    head, inputs = random_head(0, 12, 4), random_inputs(0, 40, 6, 12)
    calibrated = method.head.calibrate(head, inputs, Bits.of(bits), 6)
    difference = norm = 0.0
    for x in random_inputs(7, 10, 6, 12):
        results = method.head.strategy.whole(NumpyOps(), calibrated.params, integers(calibrated, x))
        got = np.asarray(method.head.decode(calibrated.dequantization, tuple(map(jnp.asarray, results))))
        wanted = float_head(head, x)
        difference, norm = difference + np.sum((got - wanted) ** 2), norm + np.sum(wanted**2)
    return float(np.sqrt(difference / norm))


def cheap_softmax(ops, q, k, v, temperature=5.0):
    scores = ops.requantize(k @ q / (2.0 * temperature))
    weights = ops.lookup(np.exp, scores - scores.max())
    return weights @ v / weights.sum()


def test_softmax_in_three_lines_comes_close_to_the_float_head():
    method = attention(temperature=(0.5, 1.0, 2.0))(cheap_softmax)
    errors = [error_of(method, bits) for bits in (4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05


def test_constants_are_chosen_by_their_error():
    """With candidates the head is as good as with the best of them alone, and better than by default."""
    default = error_of(attention(cheap_softmax), 8)
    method = attention(temperature=(0.5, 1.0, 2.0))(cheap_softmax)
    assert error_of(method, 8) < 0.3 * default
    calibrated = method.head.calibrate(random_head(0, 12, 4), random_inputs(0, 40, 6, 12), Bits.of(8), 6)
    assert calibrated.params.constants == (("temperature", 1.0),)


def test_values_that_are_added_share_a_scale():
    """Queries ten times as large as keys: their difference is right all the same."""

    def difference(ops, q, k, v):
        return (ops.requantize(q - k, like=q)).mean(axis=0)

    head = random_head(0, 6, 3)
    head = head._replace(query=10 * head.query, query_bias=10 * head.query_bias)
    inputs = random_inputs(0, 30, 4, 6)
    calibrated = attention(difference).head.calibrate(head, inputs, Bits.of(8), 4)
    x = integers(calibrated, inputs[0])
    total, count = attention(difference).head.strategy.whole(NumpyOps(), calibrated.params, x)
    q, k = inputs[0] @ head.query + head.query_bias, inputs[0] @ head.key + head.key_bias
    wanted = q - np.cumsum(k, axis=0) / np.arange(1, 5)[:, None]
    got = total / count
    assert np.array_equal(count[:, 0], [1, 2, 3, 4])
    scale = (got * wanted).sum() / (got * got).sum()
    assert np.linalg.norm(scale * got - wanted) < 0.03 * np.linalg.norm(wanted)


def test_what_a_query_sees_ends_with_itself():
    """Whatever comes later, also where a maximum is taken and where weights are signed."""

    def signed(ops, q, k, v):
        scores = ops.requantize(k @ q)
        return ops.requantize((scores - scores.max(keepdims=True)) @ v)

    inputs = random_inputs(0, 10, 5, 7)
    for method in (attention(signed), attention(full_sequence=True)(signed)):
        calibrated = method.head.calibrate(random_head(0, 7, 3), inputs, Bits.of(4), 5)
        x = integers(calibrated, inputs[0])
        whole = method.head.strategy.whole(NumpyOps(), calibrated.params, x)[0]
        for length in range(1, 5):
            shorter = method.head.strategy.whole(NumpyOps(), calibrated.params, x[:length])[0]
            assert np.array_equal(whole[:length], shorter)


# --- mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "scores = np.exp(k @ q)": "np.exp cannot take a value: write ops.lookup(np.exp, x)",
    "scores = np.concatenate([k, k])": "np.concatenate cannot take a value",
    "scores = k @ q if (k @ q).sum() > 0 else q": "compares or tests a value",
    "for row in k: pass": "loops over a value",
    "for j in range(k.shape[0]): pass": "computes with the number of tokens",
    "for j in range(len(k)): pass": "computes with the number of tokens",
    "scores = k[0] @ q": "looks into the axis of tokens",
    "scores = abs(q - k)": "ops.lookup(np.abs, x)",
    "scores = (k @ q) ** 2": "ops.lookup(np.square, x)",
    "scores = 1 / (k @ q)": "ops.lookup(np.reciprocal, x)",
    "scores = q * k.T": "combines the tokens of one value with the features of another",
    "scores = q[:2] * k": "combines values of shapes (2,) and (tokens, 3)",
    "scores = k @ k": "a product of two matrices",
    "scores = (k @ q) + (v @ q)": "requantize one like the other",
    "scores = (k @ q).mean() + 1": "only the client can compute",
    "scores = (k @ q) * [2, 1, 3]": "an array along the axis of tokens",
    "scores = q * np.full(3, 0.5)": "an array of fractions",
    "scores = k @ q / 0": "not 0",
    "scores = ops.lookup(lambda x: x[:2], k @ q)": "wanted the same",
    "scores = ops.lookup(lambda x: 1 if x > 0 else 0, k @ q)": "the function of a lookup fails",
    "scores = ops.lookup(np.log, k @ q)": "the function of a lookup gives nan at",
    "scores = ops.loookup(np.exp, k @ q)": "ops has no .loookup: it has .lookup",
    "scores = (k @ q).cumsum()": "a value has no .cumsum: it has .sum",
    "scores = (k @ q) // 2": "ops.lookup(lambda x: x // 2, x)",
    "scores = undefined": "name 'undefined' is not defined",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(line, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent(f"""\
        import numpy as np
        from jaxgpt2.methods import attention

        @attention
        def mine(ops, q, k, v):
            {line}
            return ops.requantize(k @ q) @ v
        """)
    )
    method = methods.load(f"{path}:mine")
    with one_line(MethodError, f"{path}:6: ", MISTAKES[line]):
        method.head.calibrate(random_head(0, 5, 3), random_inputs(0, 4, 3, 5), Bits.of(4), 3)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("v", "returns the shape (tokens, 3), wanted (D,)"),
        ("k @ q", "returns the shape (tokens,), wanted (D,)"),
        ("q[:2]", "returns (2,), wanted (3,)"),
        ("1.0", "returns float, wanted a value (D,)"),
        ("None", "returns NoneType"),
    ],
)
def test_a_wrong_result_is_one_line(result, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from jaxgpt2.methods import attention\n@attention\ndef mine(ops, q, k, v):\n    return {result}\n"
    )
    method = methods.load(f"{path}:mine")
    with one_line(MethodError, f"{path}:2: mine ", message):
        method.head.calibrate(random_head(0, 5, 3), random_inputs(0, 4, 3, 5), Bits.of(4), 3)


def test_sums_that_int32_cannot_hold_name_their_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxgpt2.methods import attention\n@attention\ndef mine(ops, q, k, v):\n"
        "    x = q * q * q\n    return x * x * x * x\n"
    )
    with one_line(CalibrationError, f"{path}:5: ", "more than int32 holds"):
        methods.load(f"{path}:mine").head.calibrate(random_head(0, 5, 3), random_inputs(0, 4, 3, 5), Bits.of(6), 3)


def test_operations_that_depend_on_something_else_are_refused():
    calls = iter(range(100))

    def fickle(ops, q, k, v):
        return ops.requantize(q) if next(calls) else ops.requantize(ops.requantize(q))

    method = attention(fickle)
    calibrated = method.head.calibrate(random_head(0, 5, 3), random_inputs(0, 4, 3, 5), Bits.of(4), 3)
    with one_line(MethodError, "another number of operations than calibration saw"):
        method.head.strategy.whole(NumpyOps(), calibrated.params, np.zeros((2, 5), np.int64))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:", "mine.py:1: invalid syntax"),
        ("import numpy\nimport nosuchmodule", "mine.py:2: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("def mine(ops, q, k, v): ...", "put @attention above a function"),
        ("from jaxgpt2.methods import attention\n@attention\ndef other(ops, q, k, v): ...", "it has: other"),
        ("from jaxgpt2.methods import attention\n@attention\ndef mine(ops, q): ...", "wanted (ops, q, k, v)"),
        ("from jaxgpt2.methods import attention\n@attention(g=(1,))\ndef mine(ops, q, k, v): ...", "for 'g'"),
        ("from jaxgpt2.methods import attention\n@attention\ndef mine(ops, q, k, v, g='a'): ...", "must be a number"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(source, message, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with one_line(MethodError, message):
        methods.load(f"{tmp_path / 'mine.py'}:mine")
    with one_line(MethodError, "cannot be read: No such file"):
        methods.named(str(tmp_path / "none.py:mine"))


def test_a_name_says_what_the_file_held(tmp_path):
    """A changed file is another method; the first one is there still, and pickles of both need no file."""
    path = tmp_path / "mine.py"
    made = []
    for factor in (2, 3):
        path.write_text(
            f"from jaxgpt2.methods import attention\n@attention\ndef mine(ops, q, k, v):\n    return {factor} * q\n"
        )
        made.append(methods.load(f"{path}:mine"))
        assert methods.load(f"{path}:mine") is made[-1] and methods.named(f"{path}:mine") == made[-1].name
    path.unlink()
    assert made[0].name != made[1].name and all(each.name.startswith("mine.py:mine@") for each in made)
    for each in made:
        strategy = each.head.strategy
        assert isinstance(strategy, GrowingCache)
        again = pickle.loads(pickle.dumps(strategy.attend))
        assert again.args[0] == formula_of(each)


def test_a_whole_layer_needs_a_result_that_nobody_divides():
    heads, inputs = tuple(random_head(i, 6, 3) for i in range(2)), random_inputs(0, 20, 4, 6)
    layer = example("sigmoid").layer
    assert layer is not None
    calibrated = layer.calibrate(heads, inputs, Bits.of(6), 4)
    (results,) = layer.strategy.whole(NumpyOps(), calibrated.params, integers(calibrated, inputs[0]))
    assert results.shape == (4, 6)
    relu = example("relu").layer
    assert relu is not None
    with one_line(MethodError, "leaves a division to the client"):
        relu.calibrate(heads, inputs, Bits.of(6), 4)


def test_long_texts_are_calibrated_on_fewer(monkeypatch):
    """Arrays of pairs and features would not fit: half of the texts, and half of them again, must do."""
    from jaxgpt2.methods import values

    method, inputs = example("inhibitor"), random_inputs(0, 4, 6, 7)
    wanted = method.head.calibrate(random_head(0, 7, 3), inputs, Bits.of(4), 6)
    monkeypatch.setattr(values, "MAX_ELEMENTS", 6 * 6 * 3 * 5)
    few = method.head.calibrate(random_head(0, 7, 3), inputs * 4, Bits.of(4), 6)
    assert jax.tree.all(jax.tree.map(np.array_equal, few, wanted))
    monkeypatch.setattr(values, "MAX_ELEMENTS", 10)
    with one_line(CalibrationError, "calibrate it for shorter texts"):
        method.head.calibrate(random_head(0, 7, 3), inputs, Bits.of(4), 6)
