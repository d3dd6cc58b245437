"""From a judge's verdicts to numbers: means over prompts, with intervals. Mathematics alone."""

import math
from typing import NamedTuple

import numpy as np

from ..evaluation.intervals import UNKNOWN, interval_of_mean


EQUAL = 0.5  # a student as good as its teacher, by every metric here


class Estimate(NamedTuple):
    """A number, and the ends of its interval over prompts."""

    value: float
    low: float
    high: float


def share_of_sum(student, reference) -> np.ndarray:
    """
    GAD's score (arXiv 2511.10643), s / (s + r), of each pair of answers: 0.5 where the judge gives both as many points.

    Args:
        student (`Sequence[float]`):
            s: points of the student's answers, above 0.
        reference (`Sequence[float]`):
            r: points of the answers that stood beside them, in the same verdicts.
    """
    student, reference = np.asarray(student, dtype=float), np.asarray(reference, dtype=float)
    return student / (student + reference)


def over_orders(first, second) -> np.ndarray:
    """
    A pair's value over both orders, with the student's answer shown first and second. A judge that likes a place favours the
    student as much in the one as it does the teacher in the other.
    """
    return (np.asarray(first, dtype=float) + np.asarray(second, dtype=float)) / 2


def mean_over_prompts(values, prompts, seed: int = 0) -> Estimate:
    """
    Mean of pairs' values, with a bootstrap interval in which all pairs of a prompt are drawn together.

    Args:
        values (`Sequence[float]`):
            One of each pair of answers.
        prompts (`Sequence`):
            The prompt of each pair.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`Estimate`]: without an interval (`nan`) where there are few prompts, and where all values are the same, of which
        no draw can differ.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return Estimate(math.nan, *UNKNOWN)
    interval = UNKNOWN if np.ptp(values) == 0 else interval_of_mean(values, groups=prompts, seed=seed)
    return Estimate(float(values.mean()), *interval)
