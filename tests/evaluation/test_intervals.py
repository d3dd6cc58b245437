"""Intervals cover the truth as often as they say."""

import math

import numpy as np
import pytest

from trl_bbkd.evaluation.intervals import (
    FEWEST_PROMPTS,
    excludes_zero,
    interval_of_draws,
    interval_of_error,
    interval_of_mean,
    students_t,
)


RUNS = 400


def runs_within(level: float) -> range:
    """Counts that 999 of 1,000 series of `RUNS` runs reach, if each covers with this probability."""
    counts = np.random.default_rng(0).binomial(RUNS, level, size=100_000)
    return range(*map(int, np.quantile(counts, [0.0005, 0.9995]) + [0, 1]))


@pytest.mark.parametrize("prompts", [FEWEST_PROMPTS, 20, 100])
def test_a_paired_difference_of_shares_is_covered(prompts):
    """Eight samples a prompt, prompts of very unlike difficulty, the first student better by 0.05 on each."""
    generator, hits, clear = np.random.default_rng(prompts), 0, 0
    for _ in range(RUNS):
        ease = generator.uniform(0.05, 0.9, size=prompts)
        first, second = (generator.binomial(8, chance) / 8 for chance in (ease + 0.05, ease))
        low, high = interval_of_mean(first - second)
        hits += low <= 0.05 <= high
        clear += excludes_zero(low, high)
    # With six prompts, whose range covers at most 1 − 2⁻⁵
    assert hits in runs_within(0.95) if prompts > 10 else 0.9 * RUNS < hits
    assert clear > (0.6 * RUNS if prompts == 100 else 0)


def test_a_mean_over_tokens_is_covered():
    """A ratio of two sums, in which long rows are worse."""
    generator, hits = np.random.default_rng(1), 0
    for _ in range(RUNS):
        tokens = generator.integers(1, 40, size=50)
        nll = generator.normal(tokens / 20, 1.0)
        low, high = interval_of_mean(nll, tokens)
        hits += low <= (np.arange(1, 40) ** 2).sum() / np.arange(1, 40).sum() / 20 <= high
    assert hits in runs_within(0.95)


def test_rows_of_one_prompt_are_one_draw():
    """Four rows that say the same are no more than one: without groups the interval is half as wide, and covers less."""
    values = [np.repeat(sample, 4) for sample in np.random.default_rng(2).normal(size=(RUNS, 30))]
    together = [interval_of_mean(found, groups=np.repeat(np.arange(30), 4)) for found in values]
    alone = [interval_of_mean(found) for found in values]
    hits, hits_alone = (sum(low <= 0 <= high for low, high in found) for found in (together, alone))
    assert hits in runs_within(0.95) and hits_alone < min(runs_within(0.95))


def test_the_same_seed_draws_the_same():
    values = np.random.default_rng(0).normal(size=40)
    assert interval_of_mean(values) == interval_of_mean(values) != interval_of_mean(values, seed=1)
    assert interval_of_mean(values, seed=1) == pytest.approx(interval_of_mean(values), abs=0.1)


def test_few_prompts_have_none():
    assert all(map(math.isnan, interval_of_mean([0.1, 0.2, 0.3, 0.4, 0.5])))
    assert all(map(math.isnan, interval_of_mean([0.1] * 12, groups=[1, 2, 3] * 4)))
    assert all(map(math.isnan, interval_of_draws(np.arange(10.0), 5))) and all(map(math.isnan, interval_of_mean([])))
    low, high = interval_of_mean([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert 0.1 <= low < 0.35 < high <= 0.6
    assert not excludes_zero(math.nan, math.nan) and not excludes_zero(None, None)
    assert excludes_zero(0.1, 0.2) and excludes_zero(-0.2, -0.1) and not excludes_zero(-0.1, 0.2)


@pytest.mark.parametrize(("degrees", "t"), [(4, 2.776), (9, 2.262), (19, 2.093), (1000, 1.962)])
def test_students_t(degrees, t):
    """Of the tables."""
    assert students_t(degrees) == pytest.approx(t, rel=0.005)
    assert interval_of_error(1.0, 0.1, degrees) == pytest.approx((1 - 0.1 * t, 1 + 0.1 * t), rel=0.005)
