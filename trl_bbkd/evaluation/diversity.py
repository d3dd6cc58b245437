"""
How good samples are at equal diversity: what tells a better student from one that only samples colder.

A student is sampled at several temperatures. Each gives a point of its curve: the diversity of the samples, and their judged
quality. Two students are compared where their curves have the same diversity.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from .intervals import UNKNOWN, interval_of_error


Curve = Sequence[tuple[float, float]]
GROUPS = 20


def distinct_ngrams(texts: Sequence[str], n: int = 4) -> float:
    """
    Different n-grams of words (characters, in text without spaces) out of all, over all texts together (distinct-n, Li et
    al., 2016, arXiv 1510.03055).

    Args:
        texts (`Sequence[str]`):
            Samples. Compare as many with as many: distinct-n falls with their number.
        n (`int`, *optional*, defaults to `4`):
            Words of an n-gram.

    Returns:
        `float`: in `(0, 1]`; `nan` where no text has `n` words.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _words(text: str) -> list[str]:
    words = text.split()
    return words if len(words) > 1 else list(text.strip())


def quality_at(curve: Curve, diversity: float) -> float:
    """
    A student's quality at a diversity, between its two neighbouring points in proportion.

    Args:
        curve (`Sequence[tuple[float, float]]`):
            Diversity and quality at each temperature, in any order.
        diversity (`float`):
            Where.

    Returns:
        `float`: the quality; `nan` outside of what was sampled.
    """
    diversities, qualities = _sorted(curve)
    return float(np.interp(diversity, diversities, qualities, left=math.nan, right=math.nan))


def difference_at_equal_diversity(own: Curve, other: Curve) -> float:
    """
    How much better one student is than another at equal diversity: the mean difference of their curves over all diversities
    that both reach (the area between them, over its width).

    Args:
        own (`Sequence[tuple[float, float]]`), other (`Sequence[tuple[float, float]]`):
            Curves, as of [`quality_at`].

    Returns:
        `float`: in units of the quality; `nan` if they have no diversity in common.
    """
    (first, own_quality), (second, other_quality) = _sorted(own), _sorted(other)
    low, high = max(first[0], second[0]), min(first[-1], second[-1])
    if low >= high:
        return math.nan
    knots = np.unique(np.concatenate([[low, high], first, second]))
    knots = knots[(knots >= low) & (knots <= high)]
    gaps = np.interp(knots, first, own_quality) - np.interp(knots, second, other_quality)
    return float(((gaps[1:] + gaps[:-1]) / 2 * np.diff(knots)).sum() / (high - low))


def _sorted(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    points = np.array(sorted(curve), dtype=float)
    return points[:, 0], points[:, 1]


def jackknife(statistic: Callable[[np.ndarray], float], count: int, num_groups: int = GROUPS) -> tuple[float, float]:
    """
    A statistic of prompts, and its standard error by leaving out one group of them after the other. (Drawing prompts with
    repetition, as a bootstrap does, would repeat their n-grams and lower distinct-n.)

        SE² = (G−1)/G · Σ_g (θ_(g) − mean θ)²

    Args:
        statistic (`Callable[[np.ndarray], float]`):
            Of the numbers of some prompts; that of two students on the same prompts makes a paired difference.
        count (`int`):
            Prompts.
        num_groups (`int`, *optional*, defaults to `20`):
            G, with every G-th prompt in one group; no more than there are prompts.

    Returns:
        `tuple[float, float]`: the statistic of all prompts, and its standard error.
    """
    numbers = np.arange(count)
    groups = min(num_groups, count)
    without = np.array([statistic(numbers[numbers % groups != group]) for group in range(groups)])
    error = math.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    return statistic(numbers), error


class SampledCurve:
    """
    A student's diversity and quality at each temperature, of any of the prompts that it answered. Diversity is distinct-n of
    a prompt's samples, the mean over prompts (per-input diversity, Kirk et al., 2023, arXiv 2310.06452); where no prompt
    has several, that of the answers to all prompts together.

    Args:
        samples (`Sequence[Sequence[Sequence[str]]]`):
            At each temperature, for each prompt its samples, as many for each. A temperature with one sample a prompt, where
            others have several, is left out.
        qualities (`Sequence[Sequence[float]]`):
            At each temperature, for each prompt the mean quality of its samples.
        n (`int`, *optional*, defaults to `4`):
            Words of an n-gram.
    """

    def __init__(self, samples: Sequence[Sequence[Sequence[str]]], qualities: Sequence[Sequence[float]], n: int = 4):
        most = max(len(answers[0]) for answers in samples)
        kept = [number for number, answers in enumerate(samples) if len(answers[0]) > 1 or most == 1]
        self._qualities = np.array(qualities, dtype=float)[kept]
        self._diversity: Callable[[np.ndarray], Sequence[float]]
        if most > 1:
            # Of each prompt once, whatever prompts are asked for
            of_prompts = np.array([[distinct_ngrams(texts, n) for texts in samples[number]] for number in kept])
            self._diversity = lambda prompts: _mean_of_known(of_prompts[:, prompts]).tolist()
        else:
            self._diversity = _of_all_together([[texts[0] for texts in answers] for answers in samples], n)

    def __call__(self, prompts: np.ndarray) -> Curve:
        """The curve of the prompts of these numbers. A temperature at which no answer has an n-gram is no point of it."""
        qualities = self._qualities[:, prompts].mean(axis=1)
        points = zip(self._diversity(prompts), map(float, qualities), strict=True)
        return [(float(diversity), quality) for diversity, quality in points if not math.isnan(diversity)]


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Of each line, without what is not a number."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    return np.where(counts > 0, np.where(known, values, 0).sum(axis=1) / np.maximum(counts, 1), math.nan)


def _of_all_together(samples: list[list[str]], n: int) -> Callable[[np.ndarray], list[float]]:
    numbers: dict[tuple[str, ...], int] = {}
    ngrams = [
        [np.array([numbers.setdefault(ngram, len(numbers)) for ngram in _ngrams(text, n)], int) for text in texts]
        for texts in samples
    ]
    return lambda prompts: [_distinct([texts[prompt] for prompt in prompts]) for texts in ngrams]


def _distinct(ngrams: list[np.ndarray]) -> float:
    together = np.concatenate(ngrams)
    return len(np.unique(together)) / len(together) if len(together) else math.nan


def paired_difference_at_equal_diversity(own: SampledCurve, other: SampledCurve, count: int) -> dict[str, float]:
    """
    [`difference_at_equal_diversity`] of two students on the same prompts, with its interval by [`jackknife`].

    Args:
        own ([`SampledCurve`]), other ([`SampledCurve`]):
            The students' curves.
        count (`int`):
            Prompts.

    Returns:
        `dict[str, float]`: `difference`, `standard_error`, `low` and `high`; `nan` where they have no diversity in common, and
        but for the difference where a group of prompts decides on that, or there are too few to leave any out.
    """
    return mean_difference_at_equal_diversity([(own, other)], count)


def mean_difference_at_equal_diversity(
    pairs: Sequence[tuple[SampledCurve, SampledCurve]], count: int
) -> dict[str, float]:
    """
    The mean of [`paired_difference_at_equal_diversity`] over pairs of students, such as those of several seeds, who all answered
    the same prompts.

    Args:
        pairs (`Sequence[tuple[SampledCurve, SampledCurve]]`):
            The two students' curves, of each pair.
        count (`int`):
            Prompts.

    Returns:
        `dict[str, float]`: as there; `nan` where one pair has no diversity in common.
    """

    def of_pair(own: Curve, other: Curve) -> float:
        return difference_at_equal_diversity(own, other) if own and other else math.nan

    def statistic(prompts: np.ndarray) -> float:
        return float(np.mean([of_pair(own(prompts), other(prompts)) for own, other in pairs]))

    value, error = jackknife(statistic, count) if count > 1 else (math.nan, math.nan)
    degrees = min(GROUPS, count) - 1
    low, high = interval_of_error(value, error, degrees) if degrees >= 4 else UNKNOWN
    return {"difference": value, "standard_error": error, "low": low, "high": high}
