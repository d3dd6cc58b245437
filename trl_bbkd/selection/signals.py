"""
What LLKD (arXiv 2411.08028) selects by: how sure the teacher is, c, and how unsure the student is, u.

For classification, c is the largest class probability and u the entropy of the student's classes, as third parties
report of the paper. Everything for text is our extension of it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from ..errors import LLKDDataError
from .verbalised import verbalised_confidence


__all__ = [
    "Agreement",
    "agreement",
    "check_confidence",
    "class_entropy",
    "max_class_probability",
    "mean_token_entropy",
    "sequence_confidence",
    "verbalised_confidence",
]


# What some servers send where they have no log-probability: vLLM's schema has it for a default
MISSING_LOG_PROB = -9999.0
# Rounding of a probability in float32
TOLERANCE = 1e-6


class Agreement(NamedTuple):
    """
    Args:
        share (`torch.Tensor` of shape `(N,)`):
            Share of the samples that give the majority's answer, between 0 and 1, in float64.
        majority (`torch.Tensor` of shape `(N,)`):
            Index of the first sample with that answer: the one to train on.
    """

    share: torch.Tensor
    majority: torch.Tensor


def check_confidence(values: Iterable, rows: Sequence | None = None) -> None:
    """
    Refuse confidences that are none.

    Args:
        values (`Iterable`):
            Confidences; each has to be a number between 0 and 1.
        rows (`Sequence`, *optional*):
            What to call their rows; by default their positions.

    Raises:
        [`LLKDDataError`]: names the first bad row, its value and what to do.
    """
    for position, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 <= number <= 1.0 + TOLERANCE:
            raise LLKDDataError(
                f"Row {position if rows is None else rows[position]}: `teacher_confidence` is {value!r}; it must be a "
                "number from 0 to 1. Divide percentages by 100, turn log-probabilities into a confidence with "
                "`sequence_confidence`, and drop rows for which there is none."
            )


def max_class_probability(probs: torch.Tensor) -> torch.Tensor:
    """
    The teacher's confidence in its label: `c = max_y p_T(y|x)`.

    Args:
        probs (`torch.Tensor` of shape `(N, C)`):
            Its class distributions.

    Returns:
        `torch.Tensor` of shape `(N,)`, from 1/C to 1.

    Raises:
        [`LLKDDataError`]: a row that is no distribution.
    """
    good = (probs >= 0).all(dim=1) & ((probs.sum(dim=1) - 1.0).abs() < 1e-2)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise LLKDDataError(
            f"Row {row}: the class probabilities {probs[row].tolist()} are no distribution. Each row has to sum to 1: "
            "take the softmax of logits first."
        )
    return probs.amax(dim=1)


def sequence_confidence(
    log_probs: torch.Tensor | Sequence, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """
    The teacher's confidence in its text: `c = exp(mean_t log p_T(y_t | x, y_<t))`, over answer tokens only.

    Args:
        log_probs (`torch.Tensor` of shape `(N, T)` or sequence of N sequences):
            Log-probabilities of the answers' tokens at temperature 1, in nats.
        mask (`torch.Tensor` of shape `(N, T)`, *optional*):
            True (or 1) at answer tokens; needed where rows are padded.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`; `"min"`, the least likely token; or `"quantile"`, the 10 % quantile of the log-probabilities.

    Returns:
        `torch.Tensor` of shape `(N,)`, from 0 to 1, in float64.

    Raises:
        [`LLKDDataError`]: a row without answer tokens, or with a missing log-probability or one above 0.
    """
    reductions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean": torch.mean,
        "min": torch.min,
        "quantile": lambda values: torch.quantile(values, 0.1),
    }
    if reduction not in reductions:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(reductions)}.")
    confidences = []
    for row, values in enumerate(log_probs):
        if not isinstance(values, torch.Tensor):
            values = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
        values = values.double() if mask is None else values[mask[row].bool()].double()
        if not len(values):
            raise LLKDDataError(f"Row {row} has no answer tokens, so no confidence. Drop it.")
        # Written so that NaN is bad
        bad = ~((values > MISSING_LOG_PROB) & (values <= 1e-4))
        if bad.any():
            raise LLKDDataError(
                f"Row {row}: a token's log-probability is {values[bad][0].item()}; it must be at most 0, and "
                f"{MISSING_LOG_PROB:.0f} or less stands for a missing one. Drop the row, or take another signal: "
                "`agreement` or `verbalised_confidence`."
            )
        confidences.append(reductions[reduction](values).exp().clamp(max=1.0))
    return torch.stack(confidences) if confidences else torch.zeros(0, dtype=torch.float64)


def agreement(answers: Sequence[Sequence[str | None]]) -> Agreement:
    """
    The teacher's confidence where it can be sampled: the share of its answers that are the same (self-consistency).

    Args:
        answers (`Sequence[Sequence[str | None]]`):
            For each of N prompts, the final answer of each sample, in one spelling. `None`, for a sample without one,
            agrees with none.

    Returns:
        [`Agreement`]: of equally frequent answers the one that came first.

    Raises:
        [`LLKDDataError`]: a prompt without samples.
    """
    shares, majorities = [], []
    for row, samples in enumerate(answers):
        if not samples:
            raise LLKDDataError(f"Row {row} has no samples to agree. Sample the teacher more than once, or drop it.")
        # `most_common` keeps the order of arrival among equals
        found = Counter(answer for answer in samples if answer is not None).most_common(1)
        answer, count = found[0] if found else (samples[0], 0)
        shares.append(count / len(samples))
        majorities.append(list(samples).index(answer))
    return Agreement(torch.tensor(shares, dtype=torch.float64), torch.tensor(majorities, dtype=torch.int64))


def class_entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    The student's uncertainty of a class: `u = -Σ_y p_S(y|x) log p_S(y|x) / log C`.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`):
            The student's.

    Returns:
        `torch.Tensor` of shape `(N,)`, from 0 to 1 (nats divided by log C), without gradient, in float32 (float64 for
        float64 input).
    """
    classes = logits.size(1)
    if classes < 2:
        raise LLKDDataError("The student has one output, so no uncertainty of a class. Set `num_labels` to 2 or more.")
    logits = logits.detach()
    probs = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    return (torch.special.entr(probs).sum(dim=1) / math.log(classes)).clamp(0.0, 1.0)


def mean_token_entropy(
    entropy: torch.Tensor, row: torch.Tensor, num_rows: int, vocab_size: int | None = None
) -> torch.Tensor:
    """
    The student's uncertainty of a text: `u = mean_t H(p_S(·|x, y_<t))` over the answer tokens of each row.

    Args:
        entropy (`torch.Tensor` of shape `(N_tokens,)`):
            Entropy at each answer token, in nats.
        row (`torch.Tensor` of shape `(N_tokens,)`):
            Row of each token.
        num_rows (`int`):
            Number of rows, N.
        vocab_size (`int`, *optional*):
            V, to divide by log V, so that u is from 0 to 1 as the teacher's confidence is.

    Returns:
        `torch.Tensor` of shape `(N,)`, without gradient, in float32; 0 for a row without tokens.
    """
    # Sums on a GPU have no fixed order: in float64 that does not show in float32
    sums = torch.zeros(num_rows, dtype=torch.float64, device=entropy.device)
    sums.index_add_(0, row, entropy.detach().double())
    means = sums / torch.bincount(row, minlength=num_rows).clamp(min=1)
    return (means if vocab_size is None else means / math.log(vocab_size)).float()
