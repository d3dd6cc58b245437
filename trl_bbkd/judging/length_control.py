"""A win rate without what the judge owes to length (Dubois et al., 2024, arXiv 2404.04475). Mathematics alone."""

from typing import NamedTuple

import numpy as np

from ..evaluation.intervals import UNKNOWN, interval_of_draws, times_drawn
from .scores import Estimate


# Of each coefficient, as a normal prior with a standard deviation of 3: without it, a student that wins always has none
RIDGE = 0.1
STEPS, CLOSE, LONGEST_STEP = 30, 1e-6, 2.0
DRAWS_AT_ONCE = 200


class LengthControlled(NamedTuple):
    """
    A fit.

    Attributes:
        rate ([`Estimate`]): probability that the student wins, at equal length and without an order.
        length_effect (`float`): φ, in logits; above 0 where the judge chooses the longer answer.
        order_effect (`float`): ω, in logits; above 0 where it chooses the one that stands first.
    """

    rate: Estimate
    length_effect: float
    order_effect: float


def length_controlled(wins, longer_by, is_first, prompts, seed: int = 0) -> LengthControlled:
    r"""
    Fit to single verdicts

        logit P(the student wins) = θ + φ·tanh(Δ / sd(Δ)) ± ω,

    with + where its answer stood first; the rate is σ(θ). A mean over both orders would lie nearer to 0.5 than σ(θ), since
    it is one of probabilities and not of logits: hence ω. The form is that of AlpacaEval 2 without its prompts' difficulties.

    Args:
        wins (`Sequence[float]`):
            Of each verdict: 1 where the student won, 0 where it lost, 0.5 for a tie.
        longer_by (`Sequence[float]`):
            Δ: characters of the student's answer beyond those of the other.
        is_first (`Sequence[bool]`):
            Whether the student's answer stood first.
        prompts (`Sequence`):
            The prompt of each verdict. All verdicts of a prompt are drawn together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
    """
    wins, longer_by = np.asarray(wins, dtype=float), np.asarray(longer_by, dtype=float)
    spread = longer_by.std()
    lengths = np.tanh(longer_by / spread) if spread else np.zeros(len(wins))
    features = np.stack([np.ones(len(wins)), lengths, np.where(is_first, 1.0, -1.0)], axis=1)
    (whole,) = _fit(features, wins, np.ones((1, len(wins))), np.zeros(3))
    number = np.unique(prompts, return_inverse=True)[1]
    count = int(number.max()) + 1
    interval = UNKNOWN
    if np.ptp(wins):
        drawn = times_drawn(count, seed)
        parts = [drawn[start : start + DRAWS_AT_ONCE, number] for start in range(0, len(drawn), DRAWS_AT_ONCE)]
        thetas = np.concatenate([_fit(features, wins, part, whole)[:, 0] for part in parts])
        interval = interval_of_draws(_sigmoid(thetas), count)
    return LengthControlled(Estimate(float(_sigmoid(whole[0])), *interval), float(whole[1]), float(whole[2]))


def _fit(features: np.ndarray, wins: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Newton's method for each row of weights `(D, N)` at once, from one start; coefficients `(D, F)`."""
    size = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    found = np.repeat(start[None], len(weights), axis=0)
    for _ in range(STEPS):
        chances = _sigmoid(found @ features.T)
        slope = (weights * (wins - chances)) @ features - RIDGE * found
        curve = ((weights * chances * (1 - chances)) @ products).reshape(-1, size, size) + RIDGE * np.eye(size)
        step = np.linalg.solve(curve, slope[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, LONGEST_STEP / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-12))
        found += step
        if np.abs(step).max() < CLOSE:
            break
    return found


def _sigmoid(logits):
    return 0.5 * (1 + np.tanh(np.asarray(logits) / 2))
