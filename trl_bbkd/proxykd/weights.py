"""Equation 9 of Proxy-KD (arXiv 2401.07013v2): how much a row's soft targets count."""

from typing import NamedTuple

import numpy as np


class RowWeights(NamedTuple):
    """
    Args:
        weights (`np.ndarray`):
            `(R,)`, between 0 and 1.
        mean, std (`float`):
            μ and γ, in nats (per row or per token).
        length_correlation (`float`):
            Pearson's correlation of the weights with the rows' lengths; 0 where either does not vary. Near -1 the
            weights are a length penalty.
    """

    weights: np.ndarray
    mean: float
    std: float
    length_correlation: float


def row_weights(log_likelihoods: np.ndarray, tokens: np.ndarray, reduction: str) -> RowWeights:
    """
    `w(x, y) = σ((log π_p(y|x) - μ) / γ)`, with μ and γ the mean and the (population) standard deviation of the
    log-likelihoods over the whole distillation set.

    The paper mentions no length normalisation, so `"sum"` is the literal reading; there a long answer is an unlikely
    one.

    Args:
        log_likelihoods (`np.ndarray`):
            `(R,)`, `log π_p(y|x)` of each row, summed over its tokens, in nats.
        tokens (`np.ndarray`):
            `(R,)`, number of tokens of each answer.
        reduction (`str`):
            `"sum"`: the log-likelihood of the whole answer. `"mean"`: per token. `"none"`: every weight is 1.

    Returns:
        [`RowWeights`]: all 0.5 where the log-likelihoods do not vary.
    """
    scores = np.asarray(log_likelihoods, dtype=np.float64)
    if reduction == "mean":
        scores = scores / tokens
    mean, std = float(scores.mean()), float(scores.std())
    if reduction == "none":
        weights = np.ones_like(scores)
    else:
        weights = 1.0 / (1.0 + np.exp(-(scores - mean) / std)) if std > 0 else np.full_like(scores, 0.5)
    vary = weights.std() > 0 and np.std(tokens) > 0
    return RowWeights(weights, mean, std, float(np.corrcoef(weights, tokens)[0, 1]) if vary else 0.0)
