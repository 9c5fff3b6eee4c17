"""The parts of the low-rank head, each against the float mathematics that it stands for."""

import numpy as np
import pytest

from jaxgpt2.attention import lowrank


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
    scale = lowrank.best_scale(values, 4)
    assert 7 * scale < 6.0
    assert lowrank.best_scale(np.full(5, 2.0), 4) == pytest.approx(2 / 7)
