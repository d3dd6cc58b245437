"""
How good samples are at equal diversity: what tells a better student from one that only samples colder.

A student is sampled at several temperatures. Each gives a point of its curve: the diversity of the samples, and their judged
quality. Two students are compared where their curves have the same diversity.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


Curve = Sequence[tuple[float, float]]


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
    ngrams = [tuple(words[start : start + n]) for words in map(_words, texts) for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


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


def jackknife(statistic: Callable[[np.ndarray], float], count: int, num_groups: int = 20) -> tuple[float, float]:
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
