"""Scores by hand, and intervals that cover the truth as often as they say."""

import math

import numpy as np
import pytest

from trl_bbkd.evaluation.intervals import times_drawn
from trl_bbkd.judging.length_control import RIDGE, _fit, length_controlled
from trl_bbkd.judging.scores import mean_over_prompts, over_orders, share_of_sum


RUNS = 100


def covers(hits):
    """Whether 999 of 1,000 series of `RUNS` intervals of 95 % cover as often or seldom as this."""
    low, high = np.quantile(np.random.default_rng(0).binomial(RUNS, 0.95, size=100_000), [0.0005, 0.9995])
    return low <= hits <= high


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=float)))


def test_by_hand():
    assert share_of_sum([6, 1, 10], [6, 9, 2]) == pytest.approx([0.5, 0.1, 10 / 12])
    assert over_orders([1, 0, 0.5, 1], [1, 0, 1, 0]) == pytest.approx([1, 0, 0.75, 0.5])
    value, low, high = mean_over_prompts([1, 0, 0.75, 0.5, 0, 0], range(6))
    assert value == pytest.approx(0.375) and 0 <= low < value < high <= 1


def test_what_has_no_interval():
    for values, prompts in (([], []), ([0.5] * 20, range(20)), ([0.1, 0.9] * 10, [0, 1] * 10)):
        assert all(map(math.isnan, mean_over_prompts(values, prompts)[1:]))
    fit = length_controlled([1] * 24, range(24), [True, False] * 12, np.repeat(range(12), 2))
    assert 0.9 < fit.rate.value < 0.999 and math.isnan(fit.rate.low)


def verdicts(generator, theta, length_effect, order_effect, prompts, longer=400):
    """Of a judge that likes length and the first place, on a student that writes more."""
    longer_by = generator.normal(longer, 400, size=prompts)
    is_first = np.tile([True, False], prompts)
    logits = theta + length_effect * np.repeat(np.tanh(longer_by / longer_by.std()), 2)
    chances = sigmoid(logits + np.where(is_first, order_effect, -order_effect))
    wins = (generator.random(2 * prompts) < chances).astype(float)
    return wins, np.repeat(longer_by, 2), is_first, np.repeat(np.arange(prompts), 2)


def test_win_rates_over_both_orders_are_covered():
    """Of a judge without a liking for length, whose rate over both orders is known."""
    generator, hits = np.random.default_rng(0), 0
    truth = sigmoid([-0.5 + 0.8, -0.5 - 0.8]).mean()
    for _ in range(RUNS):
        wins, _, _, numbers = verdicts(generator, -0.5, 0.0, 0.8, 80)
        _, low, high = mean_over_prompts(over_orders(wins[::2], wins[1::2]), numbers[::2])
        hits += low <= truth <= high
    assert covers(hits)


def test_scores_are_covered_where_prompts_have_several_answers():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(RUNS):
        ease = np.repeat(generator.normal(0, 0.1, size=60), 3)
        values = 0.45 + ease + generator.normal(0, 0.05, size=180)
        _, low, high = mean_over_prompts(values, np.repeat(range(60), 3))
        hits += low <= 0.45 <= high
    assert covers(hits)


@pytest.mark.parametrize("theta", [-1.0, 0.0])
def test_length_control_recovers_the_truth(theta):
    """The plain rate is far off, both orders or not; the interval covers σ(θ)."""
    generator, hits, rates, plain = np.random.default_rng(2), 0, [], []
    for _ in range(RUNS):
        wins, *others = verdicts(generator, theta, 1.2, 0.8, 80)
        fit = length_controlled(wins, *others)
        hits += fit.rate.low <= sigmoid(theta) <= fit.rate.high
        rates.append(fit.rate.value)
        plain.append(wins.mean())
    assert covers(hits)
    assert np.mean(rates) == pytest.approx(sigmoid(theta), abs=0.02) and np.mean(plain) > sigmoid(theta) + 0.12
    assert fit.length_effect > 0 and fit.order_effect > 0


def test_without_the_order_a_rate_is_pulled_to_a_half():
    """What the covariate is for: all of θ = −1.5, φ = 0, at a strong liking for the first place."""
    wins, *others = verdicts(np.random.default_rng(3), -1.5, 0.0, 2.0, 4000)
    fit = length_controlled(wins, *others)
    assert fit.rate.value == pytest.approx(sigmoid(-1.5), abs=0.02) and wins.mean() > sigmoid(-1.5) + 0.08
    assert fit.order_effect == pytest.approx(2.0, abs=0.2) and fit.length_effect == pytest.approx(0.0, abs=0.2)


def test_every_draw_is_fitted():
    """Where length decides nearly all, and prompts have several answers: whole steps of Newton's would leave the road."""
    prompts, each = 12, 16
    longer_by = np.linspace(-300, 900, prompts)
    wins = np.repeat((longer_by > 200).astype(float), each)
    wins[0] = 1.0
    lengths, orders = np.repeat(np.tanh(longer_by / longer_by.std()), each), np.tile([1.0, -1.0], prompts * each // 2)
    features = np.stack([np.ones(prompts * each), lengths, orders], axis=1)
    weights = np.repeat(times_drawn(prompts, 0), each, axis=1)
    (whole,) = _fit(features, wins, np.ones((1, len(wins))), np.zeros(3))
    found = _fit(features, wins, weights, whole)
    slopes = (weights * (wins - sigmoid(found @ features.T))) @ features - RIDGE * found
    assert np.abs(slopes).max() < 1e-6


def test_equal_lengths_are_no_error():
    wins, _, is_first, prompts = verdicts(np.random.default_rng(4), 0.0, 0.0, 0.0, 40)
    fit = length_controlled(wins, np.full(80, 7.0), is_first, prompts)
    assert fit.rate.value == pytest.approx(wins.mean(), abs=0.01) and fit.length_effect == 0
