"""How sure a difference between two students is that were measured on the same held-out rows."""

import math

import numpy as np

from ..evaluation.intervals import excludes_zero, interval_of_draws, interval_of_mean


RESAMPLES = 1000


def paired_difference(first, second, weights=None, groups=None) -> dict[str, float]:
    r"""
    Difference of two weighted means over the same rows, its standard error and its bootstrap interval:

        D = Σ_i w_i (a_i − b_i) / Σ_i w_i,   e_i = w_i (a_i − b_i − D),
        SE² = G/(G−1) · Σ_g (Σ_{i∈g} e_i)² / (Σ_i w_i)²

    with G groups of rows that belong together, such as answers to one prompt.

    Args:
        first, second (`Sequence[float]`):
            The students' values a and b, shape `(N,)`.
        weights (`Sequence[float]`, *optional*):
            w, shape `(N,)`: of a mean over tokens, the rows' tokens. `None` weights all rows alike.
        groups (`Sequence[int]`, *optional*):
            The group of each row, shape `(N,)`. `None`: each is its own.

    Returns:
        `dict[str, float]`: `difference`, a's mean less b's; `standard_error`, `nan` with a single group; `low` and `high`, of
        [`~evaluation.intervals.interval_of_mean`], `nan` with few groups.
    """
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    weights = np.ones(len(difference)) if weights is None else np.asarray(weights, dtype=float)
    groups = np.arange(len(difference)) if groups is None else np.unique(groups, return_inverse=True)[1]
    mean = (weights * difference).sum() / weights.sum()
    residuals = np.bincount(groups, weights=weights * (difference - mean))
    count = len(residuals)
    error = math.sqrt(count / (count - 1) * (residuals**2).sum()) / weights.sum() if count > 1 else math.nan
    low, high = interval_of_mean(difference, weights, groups)
    return {"difference": float(mean), "standard_error": float(error), "low": low, "high": high}


def macro_f1_difference(first, second, labels, num_classes: int, seed: int = 0) -> dict[str, float]:
    """
    Difference of two classifiers' macro F1 on the same rows, and its standard error and interval over rows drawn anew.

    Args:
        first, second (`Sequence[int]`):
            Their predictions, shape `(N,)`.
        labels (`Sequence[int]`):
            The true classes, shape `(N,)`.
        num_classes (`int`):
            Number of classes.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `dict[str, float]`: as of [`paired_difference`].
    """
    first, second, labels = (np.asarray(values) for values in (first, second, labels))
    generator = np.random.default_rng(seed)
    everything = np.arange(len(labels))

    def difference(rows):
        return macro_f1(first[rows], labels[rows], num_classes) - macro_f1(second[rows], labels[rows], num_classes)

    draws = [difference(generator.integers(len(labels), size=len(labels))) for _ in range(RESAMPLES)]
    low, high = interval_of_draws(np.array(draws), len(labels))
    return {
        "difference": float(difference(everything)),
        "standard_error": float(np.std(draws, ddof=1)),
        "low": low,
        "high": high,
    }


def macro_f1(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Mean over the classes among `labels` and `predictions` of 2 TP / (2 TP + FP + FN)."""
    right = np.bincount(labels[predictions == labels], minlength=num_classes)
    total = np.bincount(labels, minlength=num_classes) + np.bincount(predictions, minlength=num_classes)
    return float((2 * right[total > 0] / total[total > 0]).mean())


def is_clear(found: dict[str, float] | None) -> bool:
    """Whether a difference is one: its interval excludes zero. Not so where no interval is known."""
    return found is not None and excludes_zero(found.get("low"), found.get("high"))


def has_interval(found: dict[str, float] | None) -> bool:
    """Whether a difference has an interval. In a report that was read back, what was not a number is `None`."""
    return found is not None and not any(
        value is None or math.isnan(value) for value in (found.get("low"), found.get("high"))
    )
