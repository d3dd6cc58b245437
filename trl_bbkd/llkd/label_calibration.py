"""
Whether a teacher's confidences mean what they say, and the one number that mends them.

A classifier is calibrated if of the rows that it labels with confidence c a share c is right. Guo et al. 2017 (arXiv
1706.04599) measure the gap (the expected calibration error) and close it by a temperature fitted on checked rows. That
LLKD's teacher is measured or mended this way is our choice: the paper is not known to do so.
"""

import logging
import math
from typing import NamedTuple

import torch

from ..errors import PseudoLabelError


logger = logging.getLogger(__name__)

MIN_CHECKED_ROWS = 10
# A class without a vote has probability 0: no temperature changes it, and the NLL of a row of that class is infinite
MIN_PROBABILITY = 1e-12
TEMPERATURE_BOUNDS = (0.05, 20.0)


class Reliability(NamedTuple):
    """
    Bins of rows of like confidence, each tensor of shape `(M,)`.

    Args:
        lower, upper (`torch.Tensor`):
            Bounds: `lower < c <= upper`; the first bin holds c = 0 as well.
        count (`torch.Tensor`):
            Rows.
        confidence, accuracy (`torch.Tensor`):
            Mean confidence and share of right rows; NaN in an empty bin.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]
    confidence: torch.Tensor
    accuracy: torch.Tensor


def reliability(confidence, is_correct, bins: int = 15) -> Reliability:
    """
    Sort rows by confidence into M bins of equal width.

    Args:
        confidence (`torch.Tensor` or sequence of `float`):
            `(N,)`, in [0, 1].
        is_correct (`torch.Tensor` or sequence of `bool`):
            `(N,)`, whether the row's label is right.
        bins (`int`, *optional*, defaults to `15`):
            M.

    Returns:
        [`Reliability`]

    Raises:
        [`PseudoLabelError`]: no rows, two lengths, or a confidence that is NaN or outside of [0, 1].
    """
    confidence = torch.as_tensor(confidence, dtype=torch.float64)
    is_correct = torch.as_tensor(is_correct).double()
    if bins < 1:
        raise PseudoLabelError(f"`bins` is {bins}; it must be at least 1.")
    if confidence.dim() != 1 or confidence.shape != is_correct.shape or len(confidence) == 0:
        raise PseudoLabelError(
            f"`confidence` has the shape {tuple(confidence.shape)} and `is_correct` {tuple(is_correct.shape)}; both "
            "must be (N,), one entry a row, and N at least 1."
        )
    outside = ~((confidence >= 0) & (confidence <= 1))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise PseudoLabelError(f"Row {row}: the confidence is {float(confidence[row])}; it must be in [0, 1].")
    bounds = torch.arange(bins + 1, dtype=torch.float64) / bins
    index = torch.bucketize(confidence, bounds[1:-1])
    count = torch.bincount(index, minlength=bins)
    means = [torch.zeros(bins, dtype=torch.float64).index_add_(0, index, x) / count for x in (confidence, is_correct)]
    return Reliability(bounds[:-1], bounds[1:], count, *means)


def expected_calibration_error(confidence, is_correct, bins: int = 15) -> float:
    """
    Mean gap of confidence and accuracy, Σ_m n_m / N · |acc_m - conf_m| over bins m (arXiv 1706.04599, equation 3).

    It is in [0, 1] and biased upwards where bins hold few rows: N perfectly calibrated rows have about √(M / N) / 3 if
    their confidences fill all bins.

    Args:
        confidence, is_correct, bins:
            As in [`reliability`].
    """
    found = reliability(confidence, is_correct, bins)
    return float((found.count * (found.accuracy - found.confidence).abs()).nansum() / found.count.sum())


def label_distribution(scores: torch.Tensor, content_free: torch.Tensor | None = None) -> torch.Tensor:
    """
    Softmax over labels; with content-free scores p(y | x) / p(y | nothing), renormalised.

    Args:
        scores (`torch.Tensor`):
            `(N, C)`, log-probabilities of the labels up to a constant of the row, in nats.
        content_free (`torch.Tensor`, *optional*):
            `(K, C)`, the same on K texts that say nothing; the mean of their distributions is the prior.

    Returns:
        `torch.Tensor`: `(N, C)`, float64.
    """
    log_probs = torch.log_softmax(scores.double(), dim=1)
    if content_free is not None:
        log_probs = log_probs - torch.softmax(content_free.double(), dim=1).mean(dim=0).log()
    return torch.softmax(log_probs, dim=1)


def apply_temperature(probs, temperature: float) -> torch.Tensor:
    """
    Distributions at another temperature, p^(1/T) / Σ p^(1/T): flatter for T > 1, sharper for T < 1.

    Args:
        probs (`torch.Tensor` or nested sequence of `float`):
            `(N, C)`, distributions; below 1e-12 a probability counts as 1e-12.
        temperature (`float`):
            T > 0. At exactly 1 the distributions are returned as they are.

    Returns:
        `torch.Tensor`: `(N, C)`, float64.
    """
    probs = torch.as_tensor(probs, dtype=torch.float64)
    check_temperature(temperature)
    return probs if temperature == 1 else torch.softmax(_log(probs) / temperature, dim=1)


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise PseudoLabelError(f"`temperature` is {temperature}; it must be above 0. `fit_temperature` finds one.")


def fit_temperature(probs, gold) -> float:
    """
    The temperature T at which distributions best predict the gold labels of a few checked rows.

    With β = 1 / T the mean NLL, log Σ_y p_y^β - β log p_gold, is convex in β; its derivative E_β[log p] - log p_gold
    is bisected, in float64. T is at most 20 (a teacher no better than chance) and at least 0.05 (one that is never
    wrong), with a warning.

    Args:
        probs (`torch.Tensor` or nested sequence of `float`):
            `(N, C)`, the teacher's distributions before any temperature.
        gold (`torch.Tensor` or sequence of `int`):
            `(N,)`, right classes. About 200 rows give a T that means something; fewer than 10 are an error.

    Raises:
        [`PseudoLabelError`]: too few rows, a gold label that is no class, or rows that are no distributions.
    """
    probs, gold = _checked(probs, gold)
    if len(gold) < MIN_CHECKED_ROWS:
        raise PseudoLabelError(
            f"A temperature needs at least {MIN_CHECKED_ROWS} checked rows, better 200; there are {len(gold)}. Check "
            "more rows by hand, or leave the temperature at 1."
        )
    log_probs = _log(probs)
    log_gold = log_probs.gather(1, gold[:, None]).mean()

    def slope(temperature: float) -> float:
        tempered = torch.softmax(log_probs / temperature, dim=1)
        return float((tempered * log_probs).sum(dim=1).mean() - log_gold)

    low, high = TEMPERATURE_BOUNDS
    bound, reason = None, ""
    if slope(high) >= 0:
        bound, reason = high, "are no better than chance"
    elif slope(low) <= 0:
        bound, reason = low, "are never wrong"
    if bound is not None:
        logger.warning(f"The teacher's distributions {reason} on these {len(gold)} rows: the temperature is {bound}.")
        return bound
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def calibration_report(probs, gold, labels: list[str], predicted=None, bins: int = 15) -> dict:
    """
    How good a teacher's labels are, and whether its confidences say so, on rows whose gold label is known.

    Args:
        probs (`torch.Tensor` or nested sequence of `float`):
            `(N, C)`, such as the column `teacher_probs`.
        gold (`torch.Tensor` or sequence of `int`):
            `(N,)`, right classes.
        labels (`list[str]`):
            Names of the C classes.
        predicted (`torch.Tensor` or sequence of `int`, *optional*):
            `(N,)`, the teacher's labels if they are not the likeliest classes: answers with a stated confidence below
            chance. A row's confidence is the probability of its label.
        bins (`int`, *optional*, defaults to `15`):
            Bins of the reliability.

    Returns:
        `dict`, ready for JSON: `rows`, `accuracy`, `mean_confidence`, `ece`, `nll` (nats per row), `bins` (of each
        that is not empty `lower`, `upper`, `count`, `confidence`, `accuracy`) and `classes`: by name `gold` and
        `predicted` (rows), `recall` (share of the gold rows that are found), `precision` and `mean_confidence` (of the
        rows that are given this label); `None` where there is no such row.
    """
    probs, gold = _checked(probs, gold)
    if len(labels) != probs.size(1):
        raise PseudoLabelError(f"There are {len(labels)} labels, but a distribution has {probs.size(1)} classes.")
    predicted = probs.argmax(dim=1) if predicted is None else _classes(predicted, "predicted", *probs.shape)
    confidence = probs.gather(1, predicted[:, None]).squeeze(1).clamp(max=1.0)
    is_correct = predicted == gold
    classes = {}
    for index, name in enumerate(labels):
        is_gold, is_given = gold == index, predicted == index
        classes[name] = {
            "gold": int(is_gold.sum()),
            "predicted": int(is_given.sum()),
            "recall": _mean(is_correct[is_gold]),
            "precision": _mean(is_correct[is_given]),
            "mean_confidence": _mean(confidence[is_given]),
        }
    nll = -_mean(_log(probs).gather(1, gold[:, None]))
    return reliability_report(confidence, is_correct, bins) | {"nll": nll, "classes": classes}


def reliability_report(confidence, is_correct, bins: int = 15) -> dict:
    """
    The part of [`calibration_report`] that needs the confidences alone: `rows`, `accuracy`, `mean_confidence`, `ece`
    and `bins`.

    Args:
        confidence, is_correct, bins:
            As in [`reliability`].
    """
    found = reliability(confidence, is_correct, bins)
    columns = [values[found.count > 0].tolist() for values in found]
    return {
        "rows": int(found.count.sum()),
        "accuracy": _mean(torch.as_tensor(is_correct)),
        "mean_confidence": _mean(torch.as_tensor(confidence)),
        "ece": expected_calibration_error(confidence, is_correct, bins),
        "bins": [dict(zip(Reliability._fields, values, strict=True)) for values in zip(*columns, strict=True)],
    }


def _log(probs: torch.Tensor) -> torch.Tensor:
    return probs.clamp(min=MIN_PROBABILITY).log()


def _mean(values: torch.Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


def _checked(probs, gold) -> tuple[torch.Tensor, torch.Tensor]:
    probs = torch.as_tensor(probs, dtype=torch.float64)
    if probs.dim() != 2 or 0 in probs.shape:
        raise PseudoLabelError(f"`probs` has the shape {tuple(probs.shape)}; it must be (N, C), a distribution a row.")
    is_bad = ~((probs >= 0).all(dim=1) & ((probs.sum(dim=1) - 1).abs() < 1e-3))
    if is_bad.any():
        row = int(is_bad.nonzero()[0])
        raise PseudoLabelError(f"Row {row}: {probs[row].tolist()} is no distribution: from 0 to 1, with the sum 1.")
    return probs, _classes(gold, "gold", *probs.shape)


def _classes(values, name: str, rows: int, number: int) -> torch.Tensor:
    values = torch.as_tensor(values)
    if values.shape != (rows,) or values.is_floating_point():
        raise PseudoLabelError(
            f"`{name}` has the shape {tuple(values.shape)} and the type {values.dtype}; it must hold {rows} class "
            "numbers, one a row."
        )
    values = values.long()
    outside = (values < 0) | (values >= number)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise PseudoLabelError(f"Row {row}: `{name}` is {int(values[row])}; the classes are 0 to {number - 1}.")
    return values
