import math

import numpy as np
import pytest

from trl_bbkd.proxykd.weights import row_weights


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_hand_example_of_equation_9():
    """log-likelihoods -2, -4, -6, -8: mean -5, variance (9 + 1 + 1 + 9) / 4 = 5."""
    found = row_weights(np.array([-2.0, -4.0, -6.0, -8.0]), np.array([1, 1, 1, 1]), "sum")
    assert found.mean == -5.0 and found.std == pytest.approx(math.sqrt(5))
    expected = [sigmoid(3 / 5**0.5), sigmoid(1 / 5**0.5), sigmoid(-1 / 5**0.5), sigmoid(-3 / 5**0.5)]
    np.testing.assert_allclose(found.weights, expected, rtol=1e-12)


def test_at_the_mean_and_one_deviation_from_it():
    # Mean 0, deviation 1, and a row exactly there
    found = row_weights(np.array([-1.0, 1.0, -1.0, 1.0]), np.ones(4), "sum")
    np.testing.assert_allclose(found.weights, [sigmoid(-1), sigmoid(1)] * 2)
    assert sigmoid(1) == pytest.approx(0.731, abs=1e-3)
    middle = row_weights(np.array([-1.0, 0.0, 1.0]), np.ones(3), "sum")
    assert middle.weights[1] == 0.5


def test_per_token_mean_takes_the_length_out():
    log_likelihoods, tokens = np.array([-2.0, -20.0, -3.0]), np.array([1, 10, 1])
    found = row_weights(log_likelihoods, tokens, "mean")
    assert found.weights[0] == pytest.approx(found.weights[1])  # both -2 a token
    assert found.weights[2] < found.weights[0]
    by_sum = row_weights(log_likelihoods, tokens, "sum")
    assert by_sum.weights[1] < by_sum.weights[2] and by_sum.length_correlation < -0.99


def test_order_of_rows_changes_nothing_and_likelier_rows_weigh_more():
    rng = np.random.default_rng(0)
    scores, tokens = -rng.exponential(5.0, 100), rng.integers(1, 30, 100)
    found = row_weights(scores, tokens, "sum")
    order = rng.permutation(100)
    shuffled = row_weights(scores[order], tokens[order], "sum")
    np.testing.assert_allclose(shuffled.weights, found.weights[order], rtol=1e-12)
    assert (np.diff(found.weights[np.argsort(scores)]) >= 0).all()
    assert 0 < found.weights.min() and found.weights.max() < 1


def test_none_and_rows_that_do_not_differ():
    scores, tokens = np.array([-1.0, -5.0]), np.array([2, 2])
    assert row_weights(scores, tokens, "none").weights.tolist() == [1.0, 1.0]
    same = row_weights(np.array([-3.0, -3.0]), tokens, "sum")
    assert same.weights.tolist() == [0.5, 0.5] and same.length_correlation == 0.0
