import math

import numpy as np
import pytest

from trl_bbkd.evaluation.diversity import (
    SampledCurve,
    difference_at_equal_diversity,
    distinct_ngrams,
    jackknife,
    paired_difference_at_equal_diversity,
    quality_at,
)


def test_distinct_ngrams_by_hand():
    # "a b c", "b c d" and again "a b c": 2 of 3 are different
    assert distinct_ngrams(["a b c d", "a b c"], n=3) == pytest.approx(2 / 3)
    assert distinct_ngrams(["one two three"], n=4) != distinct_ngrams(["one two three"], n=3) == 1.0
    assert math.isnan(distinct_ngrams(["one"], n=4))


def test_text_without_spaces_is_taken_by_characters():
    assert distinct_ngrams(["我爱学习", "我爱学习"], n=2) == pytest.approx(0.5)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("text", ["", "one", "one two three", "a b c d e a b c d e", "我爱学习我爱"])
def test_distinct_ngrams_one_by_one(text, n):
    words = text.split() if " " in text else list(text)
    ngrams = [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]
    found = distinct_ngrams([text], n)
    assert found == pytest.approx(len(set(ngrams)) / len(ngrams)) if ngrams else math.isnan(found)


def test_quality_lies_between_neighbours_and_is_unknown_outside():
    curve = [(0.9, 0.5), (0.5, 0.9), (0.7, 0.8)]
    assert quality_at(curve, 0.7) == 0.8
    assert quality_at(curve, 0.6) == pytest.approx(0.85)
    assert math.isnan(quality_at(curve, 0.95)) and math.isnan(quality_at(curve, 0.4))


def test_a_student_that_only_samples_colder_is_no_better():
    """Its points lie on the same line, at other temperatures."""
    line = [(d, 1.4 - d) for d in (0.5, 0.6, 0.7, 0.8, 0.9)]
    colder = [(d, 1.4 - d) for d in (0.45, 0.55, 0.65, 0.75)]
    assert colder[-1][1] > line[-1][1]  # at equal temperature it looks better
    assert difference_at_equal_diversity(colder, line) == pytest.approx(0.0)
    better = [(d, q + 0.1) for d, q in colder]
    assert difference_at_equal_diversity(better, line) == pytest.approx(0.1)
    assert difference_at_equal_diversity(line, better) == pytest.approx(-0.1)


def test_the_difference_is_the_area_between_the_curves_over_its_width():
    own, other = [(0.0, 0.0), (1.0, 1.0)], [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0)]
    assert difference_at_equal_diversity(own, other) == pytest.approx(0.5)
    # What only one of them reaches does not count
    assert difference_at_equal_diversity([(0.0, 1.0), (2.0, 1.0)], other) == pytest.approx(1.0)
    assert math.isnan(difference_at_equal_diversity([(2.0, 1.0), (3.0, 1.0)], other))


def test_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    mean, error = jackknife(lambda rows: float(values[rows].mean()), 400, num_groups=400)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 20, rel=1e-6)
    _, grouped = jackknife(lambda rows: float(values[rows].mean()), 400)
    assert grouped == pytest.approx(error, rel=0.5)


def test_intervals_of_a_paired_difference_cover_the_truth():
    """Of 300 draws about 95 % have the true difference of 0.1 within 2 standard errors (t of 19 degrees: 2.09)."""
    generator, hits = np.random.default_rng(1), 0
    for _ in range(300):
        level = generator.normal(size=100)
        first, second = (level + generator.normal(scale=0.5, size=100) + shift for shift in (0.1, 0.0))
        value, error = jackknife(lambda rows, a=first, b=second: float((a[rows] - b[rows]).mean()), 100)
        hits += abs(value - 0.1) < 2.09 * error
    assert 270 <= hits <= 297


class Writer:
    """Of each prompt a student that writes eight words out of some that it knows; `skill` is what its answers are worth."""

    def __init__(self, skill, generator, prompts=40):
        self.skill, self.generator, self.prompts = skill, generator, prompts

    def curve(self, vocabularies):
        samples, qualities = [], []
        for words in vocabularies:
            drawn = self.generator.integers(words, size=(self.prompts, 3, 8))
            samples.append([[" ".join(map(str, text)) for text in answers] for answers in drawn])
            # The fewer words, the better: as colder samples are
            qualities.append(self.generator.normal(self.skill - 0.1 * math.log(words), 0.1, size=self.prompts))
        return SampledCurve(samples, qualities, n=2)


def test_a_sampled_curve_is_that_of_its_texts():
    first, second = ["a b c d e", "a b c d x"], ["a b c d e", "v w x y z"]
    curve = SampledCurve([[first, second], [["a b c d"] * 2] * 2, [["a b c d"]] * 2], [[1.0, 0.0], [0.5, 1.0], [1, 1]])
    # What is sampled once is no point where others are sampled several times
    points = [((distinct_ngrams(first) + distinct_ngrams(second)) / 2, 0.5), (0.5, 0.75)]
    assert np.array(curve(np.array([0, 1]))) == pytest.approx(np.array(points))
    assert curve(np.array([1])) == [(1.0, 0.0), (0.5, 1.0)]
    # Nothing is as long as an n-gram
    assert SampledCurve([[["a b"] * 2], [["a b c d"] * 2]], [[1.0], [0.0]])(np.array([0])) == [(0.5, 0.0)]


def test_with_one_sample_a_prompt_answers_are_taken_together():
    curve = SampledCurve([[["a b c d e"], ["a b c d x"]], [["a b c d"], ["a b c d"]]], [[1.0, 0.0], [0.5, 1.0]])
    points = [(distinct_ngrams(["a b c d e", "a b c d x"]), 0.5), (0.5, 0.75)]
    assert np.array(curve(np.array([0, 1]))) == pytest.approx(np.array(points))
    assert curve(np.array([0])) == [(1.0, 1.0), (1.0, 0.5)]
    assert SampledCurve([[["a b"]], [["a b c d"]]], [[1.0], [0.0]])(np.array([0])) == [(1.0, 0.0)]


def test_intervals_at_equal_diversity_cover_the_truth():
    """A student that is no better, sampled colder; and one that is better by 0.1."""
    generator = np.random.default_rng(3)
    hits = {0.0: 0, 0.1: 0}
    for truth in hits:
        for _ in range(20):
            own, other = Writer(truth, generator).curve([4, 6, 9]), Writer(0.0, generator).curve([5, 7, 12])
            found = paired_difference_at_equal_diversity(own, other, 40)
            hits[truth] += found["low"] <= truth <= found["high"]
            assert found["high"] - found["low"] < 0.2
    # 999 of 1,000 series of 40 reach this with 95 %
    assert sum(hits.values()) >= 33 and min(hits.values()) >= 15, hits


def test_without_a_diversity_in_common_there_is_no_difference():
    generator = np.random.default_rng(0)
    far = paired_difference_at_equal_diversity(
        Writer(0, generator).curve([3, 4]), Writer(0, generator).curve([50, 90]), 40
    )
    assert all(map(math.isnan, far.values()))
    one = Writer(0, generator, 1)
    assert all(map(math.isnan, paired_difference_at_equal_diversity(one.curve([3, 5]), one.curve([3, 5]), 1).values()))
