"""Symmetric quantization: levels, saturation, and the refusal of sums that int32 cannot hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxgpt2.errors import InputError
from jaxgpt2.quantize import (
    INT32_MAX,
    Bits,
    CalibrationError,
    check_accumulator,
    largest_level,
    projection_bound,
    quantize,
    quantize_weight,
    scale_for,
)

# Nothing so small that its scale underflows: activations of a model are not.
numbers = st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)
reals = hnp.arrays(np.float32, st.integers(1, 40), elements=numbers)


@given(reals, st.integers(2, 12))
def test_error_is_at_most_half_a_step_inside_the_range(x, bits):
    scale = scale_for(x, bits)
    levels = np.asarray(quantize(jnp.asarray(x), scale, bits))
    assert np.abs(levels).max() <= largest_level(bits)
    assert np.all(np.abs(levels * scale - x) <= scale * 0.5001)


@given(reals, st.integers(2, 12))
def test_quantization_is_odd(x, bits):
    scale = scale_for(x, bits)
    assert np.array_equal(quantize(jnp.asarray(-x), scale, bits), -quantize(jnp.asarray(x), scale, bits))


def test_values_beyond_the_range_saturate():
    levels = quantize(jnp.array([-1e30, -9.0, 9.0, 1e30]), 1.0, 4)
    assert levels.tolist() == [-7, -7, 7, 7]


def test_scales_broadcast_per_feature():
    levels = quantize(jnp.array([[1.0, 10.0], [2.0, 20.0]]), jnp.array([1.0, 10.0]), 4)
    assert levels.tolist() == [[1, 1], [2, 2]]


def test_zeros_have_a_scale():
    assert scale_for(np.zeros(3), 4) == 1.0


@given(st.integers(2, 12))
def test_weights_use_the_largest_level(bits):
    integers, scale = quantize_weight(np.array([[0.5, -2.0]]), bits)
    assert integers.min() == -largest_level(bits)
    assert integers.min() * scale == pytest.approx(-2.0)


@given(
    hnp.arrays(np.int64, (5, 3), elements=st.integers(-7, 7)),
    hnp.arrays(np.int64, 3, elements=st.integers(-50, 50)),
    hnp.arrays(np.int64, (4, 5), elements=st.integers(-7, 7)),
)
def test_no_input_exceeds_the_projection_bound(weight, bias, x):
    assert np.abs(x @ weight + bias).max() <= projection_bound(weight, bias, 7)


def test_a_sum_that_would_wrap_is_refused_with_its_numbers():
    assert check_accumulator("scores", INT32_MAX) == INT32_MAX
    with pytest.raises(CalibrationError, match=r"scores sums can reach 2,147,483,648.*2,147,483,647.*fewer bits"):
        check_accumulator("scores", INT32_MAX + 1)


@pytest.mark.parametrize("widths", [(1, 4, 4), (4, 13, 4), (4, 4, 0), (4, 4, 4, 17), (4, 4, 4, 1), (True, 4, 4)])
def test_widths_out_of_range_are_refused(widths):
    with pytest.raises(InputError, match=r"bits of \w+ must be a whole number from 2 to"):
        Bits(*widths)


def test_one_width_for_all():
    assert Bits.of(5, rounding_threshold=7) == Bits(5, 5, 5, 7)
