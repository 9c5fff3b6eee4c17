"""The parts of the low-rank head, each against the float mathematics that it stands for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import head_error

from fhe import NumpyOps
from heads import integers, random_head, random_inputs
from jaxgpt2 import methods
from jaxgpt2.methods import lowrank
from jaxgpt2.methods.jax_ops import JaxOps
from jaxgpt2.methods.method import float_head
from jaxgpt2.quantize import Bits, CalibrationError

STRATEGY = lowrank.LOWRANK.head.strategy


def activations(seed: int, count: int, size: int) -> np.ndarray:
    """Correlated, and of very different size along different axes, as in a trained model."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, size)) * np.geomspace(10, 0.1, size) @ random.normal(size=(size, size))


def test_a_rotation_is_orthogonal():
    turn = lowrank.rotation(7, 3)
    assert np.allclose(turn @ turn.T, np.eye(7))


def test_square_roots_of_singular_moments():
    x = activations(0, 3, 6)  # 3 samples in 6 dimensions: a moment of rank 3
    moment = x.T @ x
    root, inverse = lowrank.square_root(moment)
    assert np.allclose(root @ root, moment)
    assert np.allclose(root @ inverse @ root, root)


def test_full_rank_scores_are_exact():
    q, k = activations(0, 200, 6), activations(1, 200, 6)
    p_query, p_key = lowrank.factor_scores(q, k, 6)
    assert np.allclose((q @ p_query) @ (k @ p_key).T, q @ k.T / np.sqrt(6))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncated_scores_beat_a_truncation_that_ignores_the_activations(rank):
    q, k = activations(0, 300, 8), activations(1, 300, 8)
    wanted = q @ k.T / np.sqrt(8)
    p_query, p_key = lowrank.factor_scores(q, k, rank)
    error = np.linalg.norm((q @ p_query) @ (k @ p_key).T - wanted)
    blind = np.linalg.norm((q[:, :rank] @ k[:, :rank].T) / np.sqrt(8) - wanted)
    best = np.sqrt((np.linalg.svd(wanted, compute_uv=False)[rank:] ** 2).sum())
    assert error < blind
    assert error == pytest.approx(best, rel=1e-6)  # Eckart and Young: nothing of this rank is better


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncated_values_are_the_best_of_their_rank(rank):
    v, output = activations(0, 300, 6), activations(1, 6, 10)
    into, back = lowrank.factor_values(v, output, rank)
    error = np.linalg.norm(v @ into @ back @ output - v @ output)
    best = np.sqrt((np.linalg.svd(v @ output, compute_uv=False)[rank:] ** 2).sum())
    assert error == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_an_error_of_the_values_reaches_the_output_as_it_is():
    v, output = activations(0, 300, 6), activations(1, 6, 10)
    _, back = lowrank.factor_values(v, output, 4)
    noise = np.random.default_rng(0).normal(size=(50, 4))
    assert np.linalg.norm(noise @ back @ output) == pytest.approx(np.linalg.norm(noise), rel=1e-6)


def test_row_maxima_that_are_linear_in_the_input_are_predicted():
    x = activations(0, 400, 5)
    weight, bias = lowrank.predict_row_maxima(x, x @ np.arange(5.0) + 3.0)
    predicted = x @ weight + bias
    assert np.corrcoef(predicted, x @ np.arange(5.0) + 3.0)[0, 1] > 0.99


def test_the_best_scale_clips_what_is_rare():
    values = np.append(np.random.default_rng(0).normal(size=10_000), 12.0)
    scale = lowrank.best_scale(values, 7)
    assert 7 * scale < 6.0
    assert lowrank.best_scale(np.full(5, 2.0), 7) == pytest.approx(2 / 7)
    assert lowrank.best_scale(np.zeros(5), 7) > 0


def test_ranks_follow_the_heads_own_spectrum():
    """A head of scores of rank 2 and values of rank 8, which nothing above them makes better."""
    head, inputs = random_head(0, 32, 16), random_inputs(0, 20, 8, 32)
    narrow, flat = (np.diag((np.arange(16) < rank).astype(float)) for rank in (2, 8))
    head = head._replace(
        query=head.query @ narrow, query_bias=head.query_bias @ narrow, value=head.value @ flat, value_bias=np.zeros(16)
    )
    losses = lowrank.rank_losses(head, inputs)
    by_score, by_value, ablated = losses
    assert (*by_score,) == (*by_value,) == (2, 4, 6, 8, 10, 12, 14, 16)
    assert max(by_score.values()) < 1e-9 * ablated
    assert by_value[2] > by_value[4] > 1e-3 * ablated
    assert max(by_value[rank] for rank in by_value if rank >= 8) < 1e-9 * ablated
    fewest = 1e3 * ablated  # a price at which only what must be is paid for
    assert lowrank.choose_ranks(losses, fewest, 1e-6) == (2, 8)
    pairs = [tuple(proposal.values()) for proposal in lowrank.propose(head, inputs)]
    assert (2, 8) in pairs and {score for score, _ in pairs} == {2}
    wanted = lowrank.choose_ranks(losses, lowrank.PRICE, lowrank.MOST_LOST)
    assert wanted == (2, 8)
    value_rank = lowrank.choose_ranks(losses._replace(by_score={5: 0.0}), lowrank.PRICE, lowrank.MOST_LOST)[1]
    for asked, ranks in (((0, 0), wanted), ((5, 0), (5, value_rank))):
        options = {**lowrank.LOWRANK.options, "score_rank": asked[0], "value_rank": asked[1], "training_steps": 0}
        module = lowrank.calibrate(head, inputs, Bits(6, 8, 4, 5), 8, **options)
        assert tuple(lowrank.LOWRANK.head.chosen(module).values()) == ranks


def test_ranks_are_those_at_which_loss_and_lookups_are_least():
    """Against all pairs, tried one by one."""
    random = np.random.default_rng(0)
    for _ in range(20):
        by_score: dict[int, float] = dict(zip((1, 2, 4, 8), np.sort(random.uniform(0, 0.1, 4))[::-1], strict=True))
        by_value: dict[int, float] = dict(zip((1, 2, 4, 8), np.sort(random.uniform(0, 0.1, 4))[::-1], strict=True))
        losses, most = lowrank.RankLosses(by_score, by_value, 2.0), float(random.uniform(0.01, 0.1))
        lost = {(s, v): by_score[s] + by_value[v] for s in by_score for v in by_value}
        enough = [pair for pair in lost if lost[pair] <= 2 * most]
        fewest, best = (lowrank.choose_ranks(losses, price, most) for price in (1.0, 1e-4))
        if not enough:
            assert fewest == best == (8, 8)
            continue
        assert fewest in enough and best in enough
        assert all(lowrank.lookups(6, *fewest) <= lowrank.lookups(6, *pair) for pair in enough)
        worth = {pair: lost[pair] + 1e-4 * lowrank.lookups(6, *pair) for pair in enough}
        assert worth[best] == min(worth.values())
        # What does twice as much gets no smaller ranks.
        by_score, by_value = ({r: 2 * x for r, x in each.items()} for each in (by_score, by_value))
        doubled = lowrank.RankLosses(by_score, by_value, 4.0)
        assert lowrank.lookups(6, *lowrank.choose_ranks(doubled, 1e-4, most)) >= lowrank.lookups(6, *best)
    assert lowrank.lookups(6, 16, 24) == 1428


@pytest.mark.parametrize("rank", [4, 12])
def test_what_a_rank_loses_is_measured_where_nothing_is_rounded(rank):
    """Against the float head with its scores truncated by hand."""
    head, inputs = random_head(3, 32, 16, sharpness=2.0), random_inputs(3, 10, 8, 32)
    losses = lowrank.rank_losses(head, inputs)
    real = np.concatenate(inputs)
    q, k = real @ head.query + head.query_bias, real @ head.key
    to_query, to_key = lowrank.factor_scores(q - q.mean(axis=0), k - k.mean(axis=0), rank)
    error = norm = 0.0
    for x in inputs:
        left, right = (x @ head.query + head.query_bias - q.mean(axis=0)) @ to_query, (x @ head.key) @ to_key
        scores = left @ right.T + (x @ head.key) @ q.mean(axis=0) / 4
        e = np.where(np.tri(8, dtype=bool), np.exp(scores), 0)
        found, wanted = e / e.sum(axis=1, keepdims=True) @ (x @ head.value + head.value_bias), float_head(head, x)
        error += np.einsum("td,de,te->", found - wanted, head.metric, found - wanted)
        norm += np.einsum("td,de,te->", wanted, head.metric, wanted)
    assert losses.by_score[rank] == pytest.approx(error / 80, rel=1e-6)
    assert losses.ablated == pytest.approx(norm / 80, rel=1e-6)


def calibrated_head(steps: int = 0, texts: int = 40, bits: int = 4, **options: int):
    """A random head of 6 dimensions, its texts, and its integers; the texts lie near a plane, as activations do."""
    head = random_head(0, 20, 6, sharpness=1.5)
    plane = np.random.default_rng(5).normal(size=(5, 20)) * 0.4
    inputs = [x[:, :5] @ plane for x in random_inputs(0, texts, 8, 20)]
    chosen = {**lowrank.LOWRANK.options, "training_steps": steps, **options}
    return head, inputs, lowrank.calibrate(head, inputs, lowrank.LOWRANK.bits(bits), 8, **chosen)


def output_error(head, inputs, calibrated) -> float:
    """In the head's metric, relative to the outputs."""
    error = size = 0.0
    for x in inputs:
        wanted = float_head(head, x)
        outputs = STRATEGY.whole(NumpyOps(), calibrated.params, integers(calibrated, x))
        got = np.asarray(lowrank.decode(calibrated.dequantization, tuple(map(jnp.asarray, outputs))))
        error += np.einsum("td,de,te->", got - wanted, head.metric, got - wanted)
        size += np.einsum("td,de,te->", wanted, head.metric, wanted)
    return float(error / size)


def test_training_through_the_rounding_lowers_the_error_of_the_integers():
    untrained, trained = (output_error(*calibrated_head(steps)) for steps in (0, 100))
    assert trained < 0.7 * untrained


class FloatOps(JaxOps):
    """The integer functions on real numbers: a table is a function, and nothing else is rounded."""

    def lookup(self, table, x):
        return table(x)

    def matmul(self, a, b):
        return jnp.matmul(a, b)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_what_is_trained_is_what_is_encrypted(seed, tokens):
    """`rounding_head` gives what the integer functions give where only projections and weights are rounded."""
    random = np.random.default_rng(seed)

    def eighths(*shape: int) -> jax.Array:  # whose products float32 adds without rounding
        return jnp.asarray(random.integers(-12, 13, shape) / 8, jnp.float32)

    projections = (eighths(5, 3), eighths(3), eighths(5, 3), eighths(3), eighths(5, 2), eighths(2))
    score_parts = (jnp.float32(0.125), eighths(5), eighths(), eighths(5), eighths())
    reals = lowrank.Reals(*projections, *score_parts, jnp.eye(2), jnp.zeros(2), jnp.zeros(()))
    widths = lowrank.Widths(levels=3, value_levels=4, terms=15, largest_weight=7, term_step=2, shift_step=1, cell=2)
    x = eighths(tokens, 5)

    projection: Any = lowrank.Projection
    made: Any = lowrank.LowRankParams

    def level(limit, step=1):
        return lambda x: jnp.rint(jnp.clip(x, -limit, limit)) * step

    def added(weight, bias, step):
        return projection(weight[:, None] / 0.25 / step, bias / 0.25 / step, level(15, step))

    def quarter(x):
        return x * x / 4

    params = made(
        projection(reals.query, reals.query_bias, level(3)),
        projection(reals.key, reals.key_bias, level(3)),
        projection(reals.value, reals.value_bias, level(4)),
        added(reals.shift, reals.shift_bias, 1),
        added(reals.term, reals.term_bias, 2),
        quarter,
        quarter,
        lambda s: jnp.rint(7 * jnp.exp(jnp.minimum(jnp.rint(s / 2) * 2 * 0.25, 0.0))),
        quarter,
        quarter,
    )
    wanted = STRATEGY.whole(FloatOps(), params, x)
    for one, other in zip(lowrank.rounding_head(reals, widths, x), wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_clients_numbers_are_those_of_least_squares():
    """Where the text ends nothing is seen, and a head that is linear in its sums is found."""
    random = np.random.default_rng(0)
    reals = lowrank.Reals(*[np.zeros(())] * len(lowrank.Reals._fields))
    sums, mask = random.normal(size=(7, 5, 3)), np.ones((7, 5))
    basis, mean = random.normal(size=(3, 4)), random.normal(size=4)
    wanted = sums @ basis + mean
    mask[2:, 3:], wanted[2:, 3:] = 0, 1e3
    found = lowrank.fit_output(reals, sums, wanted, mask)
    np.testing.assert_allclose(found.basis, basis, atol=1e-4)
    np.testing.assert_allclose(found.mean, mean, atol=1e-4)


def test_the_first_token_reads_itself_and_weights_of_zero_read_the_mean():
    random = np.random.default_rng(0)
    basis, mean = random.normal(size=(3, 4)), random.normal(size=4)
    made = lowrank.LowRankDequantization(basis, mean, np.asarray(2.0))
    numerators, denominators = np.array([[4, 0, 2], [0, 0, 0], [10, 20, 30]]), np.array([[0], [0], [18]])
    found = lowrank.decode(made, (jnp.asarray(numerators), jnp.asarray(denominators)))
    wanted = [[4, 0, 2] @ basis + mean, mean, np.array([1, 2, 3]) @ basis + mean]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_ranks_that_are_filled_up_for_training_change_nothing(monkeypatch):
    found = []
    for filled in (1, 4):
        monkeypatch.setattr(lowrank, "COMPILED_RANKS", filled)
        _, _, module = calibrated_head(20, score_rank=3, value_rank=5)
        found.append(module)
    assert lowrank.LOWRANK.head.chosen(found[1]) == {"score_rank": 3, "value_rank": 5}
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1)  # a level apart where float32 rounds otherwise


def test_every_passage_is_seen_equally_often():
    order = lowrank.batches(30, 9)
    assert order.shape == (9, 20)
    assert (np.bincount(order.ravel()) == 6).all()
    assert np.ptp(np.bincount(lowrank.batches(100, 12).ravel(), minlength=100)) <= 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 8))
def test_aligned_levels_are_the_rounded_projection(seed, activations, weight_bits):
    """A level is a whole number of accumulator steps: looked up, it is the projection rounded once, and saturated."""
    random = np.random.default_rng(seed)
    bits = Bits(5, weight_bits, activations, activations + 1)
    weight, bias = random.normal(size=(6, 3)) * 0.1, random.normal(size=3)
    saturate = 2 ** (activations - 1) - 1
    ops, made = NumpyOps(), lowrank.aligned("query", weight, bias, bits, activations, saturate, activations + 1)
    x = random.integers(-15, 16, size=(20, 6))
    total = x @ made.weight + made.bias
    unit = 2**made.requantize.shift
    got = ops.lookup(made.requantize, total)
    exact = np.clip(total / unit, -saturate, saturate)
    assert np.abs(got - exact).max() <= 0.5 + 0.25  # half a level, and what the table's cells add
    assert np.abs(got).max() <= saturate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_rank", -1),
        ("value_rank", 5000),
        ("exponential_bits", 40),
        ("exponential_bits", 1),
        ("training_steps", -1),
    ],
)
def test_an_option_out_of_range_is_named(name, value):
    with pytest.raises(CalibrationError, match=f"{name} must be"):
        calibrated_head(**{name: value})


def test_more_rank_comes_closer_to_the_float_head():
    method = methods.get("lowrank")
    errors = []
    for rank in (1, 4, 8):
        ranked = dataclasses.replace(method, options={**method.options, "score_rank": rank, "value_rank": rank})
        errors.append(head_error(ranked, 8, 0))
    assert errors == sorted(errors, reverse=True)
