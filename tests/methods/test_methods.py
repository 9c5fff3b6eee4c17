"""The integer head: the same integers in JAX, in NumPy, simulated and decrypted; and close to the float head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fhe
from fhe import NumpyOps
from heads import integers, random_head, random_inputs
from jaxgpt2 import methods
from jaxgpt2.executors import LocalExecutor, SimulatedExecutor
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import float_head
from jaxgpt2.quantize import Bits, CalibrationError

SOFTMAX = methods.get("softmax")
assert SOFTMAX.layer is not None
LAYER = SOFTMAX.layer
BY_LOOKUPS = [SOFTMAX, methods.get("lowrank")]
# Training is tested where it matters; here it would learn random numbers by heart.
QUICK = {"lowrank": {"training_steps": 0}}
by_name = pytest.mark.parametrize("method", BY_LOOKUPS, ids=lambda method: method.name)


def options(method: methods.Method) -> dict[str, int]:
    return {**method.options, **QUICK.get(method.name, {})}


@by_name
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    lookup=st.sampled_from([None, 3, 6]),
    tokens=st.integers(1, 6),
    head_dim=st.sampled_from([1, 2, 5]),
)
def test_jax_equals_numpy(method, seed, bits, lookup, tokens, head_dim):
    head = random_head(seed, 7, head_dim)
    calibrated = method.head.calibrate(head, random_inputs(seed, 3, 6, 7), Bits.of(bits, lookup), 6, **options(method))
    x = integers(calibrated, random_inputs(seed + 1, 1, tokens, 7)[0] * 2)  # beyond the calibrated range too
    in_numpy = method.head.strategy.whole(NumpyOps(), calibrated.params, x)
    in_jax = jax.jit(lambda p, x: method.head.strategy.whole(JaxOps(), p, x))(
        calibrated.params, jnp.asarray(x, jnp.int32)
    )
    assert all(np.array_equal(a, b) for a, b in zip(in_numpy, in_jax, strict=True))


def test_heads_and_bit_widths_can_be_stacked_under_vmap():
    """What a sweep does: parameters of one shape, stacked, in one compiled function."""
    inputs = random_inputs(0, 4, 5, 7)
    calibrated = [SOFTMAX.head.calibrate(random_head(i, 7, 3), inputs, Bits.of(4), 5) for i in range(3)]
    size = max(np.size(leaf) for c in calibrated for leaf in jax.tree.leaves(c.params))

    def padded(params):  # tables saturate at their ends, so repeating the last entry changes nothing
        return jax.tree.map(
            lambda t: (
                fhe.LookupTable(np.pad(t.values, (0, size - len(t.values)), mode="edge"), t.low, t.shift)
                if isinstance(t, fhe.LookupTable)
                else t
            ),
            params,
            is_leaf=lambda t: isinstance(t, fhe.LookupTable),
        )

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(padded(c.params) for c in calibrated))
    x = integers(calibrated[0], inputs[0])
    (together,) = jax.vmap(lambda p: SOFTMAX.head.strategy.whole(JaxOps(), p, jnp.asarray(x, jnp.int32)))(stacked)
    for params, row in zip([c.params for c in calibrated], together, strict=True):
        assert np.array_equal(SOFTMAX.head.strategy.whole(NumpyOps(), params, x)[0], row)


@by_name
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 6))
def test_a_row_sees_only_rows_before_it(method, seed, tokens):
    calibrated = method.head.calibrate(
        random_head(seed, 7, 3), random_inputs(seed, 3, 6, 7), Bits.of(4), 6, **options(method)
    )
    x = integers(calibrated, random_inputs(seed + 1, 1, tokens, 7)[0])
    whole = method.head.strategy.whole(NumpyOps(), calibrated.params, x)
    shorter = method.head.strategy.whole(NumpyOps(), calibrated.params, x[:-1])
    assert all(np.array_equal(a[:-1], b) for a, b in zip(whole, shorter, strict=True))


def head_error(method: methods.Method, bits: int, seed: int, sharpness: float = 1.0) -> float:
    head = random_head(seed, 24, 8, sharpness=sharpness)
    calibrated = method.head.calibrate(head, random_inputs(seed, 30, 6, 24), Bits.of(bits), 6, **options(method))
    difference = norm = 0.0
    for x in random_inputs(seed + 7, 10, 6, 24):
        wanted = float_head(head, x)
        outputs = method.head.strategy.whole(NumpyOps(), calibrated.params, integers(calibrated, x))
        got = np.asarray(method.head.decode(calibrated.dequantization, tuple(map(jnp.asarray, outputs))))
        difference, norm = difference + np.sum((got - wanted) ** 2), norm + np.sum(wanted**2)
    return float(np.sqrt(difference / norm))


@by_name
@pytest.mark.parametrize("seed", [0, 1])
def test_more_bits_come_closer_to_the_float_head(method, seed):
    errors = [head_error(method, bits, seed) for bits in (3, 4, 6, 8, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.1
    assert errors[4] < 0.05


def test_a_layer_is_its_heads_through_their_projection():
    heads = tuple(random_head(i, 12, 4) for i in range(3))
    inputs = random_inputs(0, 20, 6, 12)
    calibrated = LAYER.calibrate(heads, inputs, Bits.of(8), 6)
    (outputs,) = LAYER.strategy.whole(NumpyOps(), calibrated.params, integers(calibrated, inputs[0]))
    got = np.asarray(LAYER.decode(calibrated.dequantization, (jnp.asarray(outputs),)))
    wanted = sum(float_head(head, inputs[0]) @ head.output for head in heads)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.06


def test_sums_that_int32_cannot_hold_are_refused():
    head, inputs = random_head(0, 5000, 2), [np.ones((3, 5000))]
    with pytest.raises(CalibrationError, match=r"query sums can reach [\d,]+.*2,147,483,647"):
        SOFTMAX.head.calibrate(head, inputs, Bits(12, 12, 4), 3)


def test_tables_that_no_memory_should_hold_are_refused():
    with pytest.raises(CalibrationError, match=r"a lookup table of [\d,]+ entries .* set the rounding threshold bits"):
        SOFTMAX.head.calibrate(random_head(0, 5, 2), random_inputs(0, 2, 3, 5), Bits.of(12), 3)


# --- the same function under encryption ---------------------------------------------------------


@pytest.fixture(scope="module")
def concrete():
    pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
    return fhe.get_backend("concrete")


@by_name
@pytest.mark.parametrize(
    ("seed", "width", "head_dim", "tokens", "bits"),
    [(0, 3, 1, 1, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3, 2, 3, 2), (3, 5, 1, 2, 3)))],
)
def test_numpy_equals_jax_equals_simulated_equals_decrypted(concrete, method, seed, width, head_dim, tokens, bits):
    head = random_head(seed, width, head_dim)
    inputs = random_inputs(seed, 40, tokens, width)
    calibrated = method.head.calibrate(head, inputs, Bits.of(bits), tokens, **options(method))
    strategy, texts = method.head.strategy, method.head.samples(calibrated, inputs)
    circuit = concrete.compile(
        strategy.functions(calibrated, texts, tokens), calibrated.params, fhe.FHEConfig(p_error=1e-6, rounding="exact")
    )
    executors = [SimulatedExecutor(circuit), LocalExecutor(circuit, circuit.make_keys())]
    for x in [integers(calibrated, x) for x in inputs[:3]]:
        wanted = strategy.whole(NumpyOps(), calibrated.params, x)
        in_jax = strategy.whole(JaxOps(), calibrated.params, jnp.asarray(x, jnp.int32))
        read = [strategy.read(calibrated.client, executor, x, None, tokens)[0] for executor in executors]
        for exact, *others in zip(wanted, in_jax, *read, strict=True):
            assert all(np.array_equal(exact, other) for other in others)


@pytest.mark.slow
def test_a_layer_decrypts_to_its_integers(concrete):
    heads = tuple(random_head(i, 4, 1) for i in range(2))
    inputs = random_inputs(5, 40, 2, 4)
    calibrated = LAYER.calibrate(heads, inputs, Bits.of(2), 2)
    texts = [integers(calibrated, x) for x in inputs]
    circuit = concrete.compile(
        LAYER.strategy.functions(calibrated, texts, 2),
        calibrated.params,
        fhe.FHEConfig(p_error=1e-6, rounding="none"),
    )
    executor, x = LocalExecutor(circuit, circuit.make_keys()), texts[0]
    (decrypted,), _ = LAYER.strategy.read(calibrated.client, executor, x, None, 2)
    assert np.array_equal(LAYER.strategy.whole(NumpyOps(), calibrated.params, x)[0], decrypted)
    assert "projection" not in circuit.report.pbs_by_stage  # clear weights cost no lookup


# --- the registry -------------------------------------------------------------------------------


def test_unknown_and_taken_names_are_refused():
    with pytest.raises(methods.MethodError, match=r"no attention method 'sofmax', there are: .*softmax"):
        methods.get("sofmax")
    with pytest.raises(methods.MethodError, match="'softmax' exists already"):
        methods.register(SOFTMAX)
