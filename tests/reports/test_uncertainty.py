"""Differences of two students, with their standard errors and intervals."""

import math

import numpy as np
import pytest

from trl_bbkd.reports.uncertainty import has_interval, is_clear, macro_f1, macro_f1_difference, paired_difference


def test_rows_alike_is_the_textbooks_paired_standard_error():
    first, second = np.random.default_rng(0).random((2, 50))
    found = paired_difference(first, second)
    assert found["difference"] == pytest.approx((first - second).mean())
    assert found["standard_error"] == pytest.approx((first - second).std(ddof=1) / math.sqrt(50))


def test_weights_are_those_of_a_mean_over_tokens():
    """Over many draws of rows of unlike length, the ratio scatters as its standard error says."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 30, size=(2000, 40))
    values = generator.normal(size=lengths.shape) + lengths / 10
    found = [paired_difference(v, np.zeros(40), weights=w) for v, w in zip(values, lengths, strict=True)]
    assert found[0]["difference"] == pytest.approx((values[0] * lengths[0]).sum() / lengths[0].sum())
    scatter = np.std([entry["difference"] for entry in found])
    assert np.mean([entry["standard_error"] for entry in found]) == pytest.approx(scatter, rel=0.05)


def test_rows_of_one_prompt_count_once():
    once = paired_difference([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0] * 6)
    four_times = paired_difference([1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 4, [0.0] * 24, groups=list("abcdef") * 4)
    assert four_times == pytest.approx(once) and once["low"] < once["difference"] < once["high"]
    assert math.isnan(paired_difference([1.0, 0.0], [0.0, 0.0], groups=[5, 5])["standard_error"])


def test_macro_f1():
    predictions, labels = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    # A class that is nowhere has no F1
    assert macro_f1(predictions, labels, 3) == pytest.approx((2 / 3 + 4 / 5) / 2)
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=300)
    good = np.where(generator.random(300) < 0.9, labels, (labels + 1) % 3)
    bad = np.where(generator.random(300) < 0.6, labels, (labels + 1) % 3)
    found = macro_f1_difference(good, bad, labels, 3)
    assert found["difference"] == pytest.approx(macro_f1(good, labels, 3) - macro_f1(bad, labels, 3))
    assert 0.02 < found["standard_error"] < 0.05 and is_clear(found)
    assert macro_f1_difference(good, good, labels, 3) == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize(
    ("difference", "error", "clear"),
    [(0.03, 0.01, True), (-0.03, 0.01, True), (0.02, 0.01, False), (0.5, None, False), (0.5, math.nan, False)],
)
def test_a_difference_whose_interval_excludes_zero_is_clear(difference, error, clear):
    ends = [None if error is None else difference + sign * 2 * error for sign in (-1, 1)]
    found = dict(zip(("low", "high"), ends, strict=True)) | {"difference": difference}
    assert is_clear(found) is clear and has_interval(found) is (error == 0.01)
    assert not is_clear(None) and not has_interval(None)
