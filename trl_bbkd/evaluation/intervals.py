"""How sure a mean over held-out prompts is: bootstrap intervals, with prompts drawn anew."""

import functools
import math
from statistics import NormalDist

import numpy as np


LEVEL = 0.95
DRAWS = 2000
# With fewer, even the whole range of what prompts gave covers the truth less often than `LEVEL`: 1 − 2^(1−n)
FEWEST_PROMPTS = 6
# Of two, Student's t is 12.7 standard errors
FEWEST_SEEDS = 3

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


def interval_of_mean(values, weights=None, groups=None, seed: int = 0) -> Interval:
    r"""
    Bootstrap interval of a weighted mean,

        m = Σ_i w_i v_i / Σ_i w_i,

    over prompts drawn with repetition: all rows of a prompt are drawn together. With the differences of two students on the
    same rows as values it is the paired interval of their difference.

    Args:
        values (`Sequence[float]`):
            v, shape `(N,)`.
        weights (`Sequence[float]`, *optional*):
            w, shape `(N,)`: of a mean over tokens, the rows' tokens. `None` weights all rows alike.
        groups (`Sequence`, *optional*):
            The prompt of each row, shape `(N,)`. `None`: each row has its own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `tuple[float, float]`: its ends; `nan` with fewer than `FEWEST_PROMPTS` prompts.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    number = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(number.max()) + 1 if len(number) else 0
    if count < FEWEST_PROMPTS:
        return UNKNOWN
    totals, sizes = np.bincount(number, weights * values), np.bincount(number, weights)
    drawn = times_drawn(count, seed)
    return interval_of_draws((drawn @ totals) / (drawn @ sizes), count)


@functools.lru_cache(maxsize=1)
def times_drawn(count: int, seed: int) -> np.ndarray:
    """How often each of `count` prompts is in each of the draws, shape `(DRAWS, count)`."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)


def interval_of_draws(statistics: np.ndarray, count: int) -> Interval:
    """
    Percentiles of a statistic of bootstrap draws. They lie farther out than the level says (Hesterberg, 2015, arXiv 1411.5279,
    "expanded percentiles"), since draws of few prompts scatter by (n−1)/n too little, and less than Student's t.

    Args:
        statistics (`np.ndarray`):
            One of each draw.
        count (`int`):
            n, what was drawn from.
    """
    if count < FEWEST_PROMPTS:
        return UNKNOWN
    outside = NormalDist().cdf(-math.sqrt(count / (count - 1)) * students_t(count - 1))
    low, high = np.quantile(statistics, [outside, 1 - outside])
    return float(low), float(high)


def interval_of_error(value: float, standard_error: float, degrees: int) -> Interval:
    """The interval of a value whose standard error is known, with `degrees` degrees of freedom."""
    reach = students_t(degrees) * standard_error
    return value - reach, value + reach


def interval_over_seeds(values) -> Interval:
    r"""
    Student's t interval of what trainings with other seeds come to on the mean,

        m ± t · √(Σ_s (v_s − m)² / (S (S−1))),   m = Σ_s v_s / S.

    It holds the prompts as they are.

    Args:
        values (`Sequence[float]`):
            v, of each seed one, shape `(S,)`.

    Returns:
        `tuple[float, float]`: its ends; `nan` with fewer than `FEWEST_SEEDS` seeds.
    """
    values = np.asarray(values, dtype=float)
    count = len(values)
    if count < FEWEST_SEEDS:
        return UNKNOWN
    return interval_of_error(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count), count - 1)


def interval_over_both(value: float, over_prompts: Interval, over_seeds: Interval) -> Interval:
    r"""
    The interval of a value that both other prompts and other seeds would change: independent errors add as their squares do, on
    each side (Zou and Donner, 2008, "MOVER"),

        m − √((m − l_p)² + (m − l_s)²)   to   m + √((u_p − m)² + (u_s − m)²).

    Chance in single answers is in both, so that it is rather too wide. It contains both, and so excludes zero only where both do.

    Args:
        value (`float`):
            m.
        over_prompts (`tuple[float, float]`):
            l_p and u_p, with the seeds as they are.
        over_seeds (`tuple[float, float]`):
            l_s and u_s, with the prompts as they are.

    Returns:
        `tuple[float, float]`: its ends; `nan` where one of the two is not known.
    """
    low, high = (math.hypot(one - value, other - value) for one, other in zip(over_prompts, over_seeds, strict=True))
    return value - low, value + high


def students_t(degrees: int) -> float:
    """Student's t that `LEVEL` lies within: of 2 degrees exact, else by its expansion around the normal distribution, within 1 %."""
    if degrees == 2:
        return LEVEL / math.sqrt((1 - LEVEL**2) / 2)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval says that there is a difference; not so where none is known."""
    return low is not None and high is not None and (low > 0 or high < 0)
