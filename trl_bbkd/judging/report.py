"""What the verdicts come to, as a table and as JSON."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..collect.card import endpoint_family
from ..evaluation.intervals import excludes_zero
from ..reports.markdown import code, escape, table
from .asking import FAILED, NOT_ASKED, READ, UNPARSABLE, Verdict, cost_of
from .length_control import LengthControlled, length_controlled
from .pairs import Pair
from .scores import EQUAL, Estimate, mean_over_prompts, over_orders, share_of_sum
from .settings import JudgeConfig
from .verdicts import METRICS


DATE = re.compile(r"-(\d[\d-]{3,}|latest)$")
HEAD = ["metric", "value", "95 % interval", "prompts", "unparsable", "judge", "cost"]


@dataclass
class Measured:
    """
    A metric.

    Attributes:
        estimate ([`~judging.scores.Estimate`]): its value, `nan` where no pair has two verdicts.
        prompts, pairs (`int`): that it is of.
        unparsable, failed, not_asked (`int`): verdicts that are missing, by reason. Their pairs are left out.
        tokens (`int`), cost (`float` or `None`): of the judge's answers.
        details (`dict[str, float]`): what else the verdicts say.
    """

    estimate: Estimate
    prompts: int
    pairs: int
    unparsable: int
    failed: int
    not_asked: int
    tokens: int
    cost: float | None
    details: dict[str, float]


def measure(metric: str, verdicts: list[Verdict], pairs: list[Pair], judge: JudgeConfig) -> Measured:
    """A metric of the pairs that have a verdict in both orders."""
    own = [verdict for verdict in verdicts if verdict.question == METRICS[metric].name]
    # Both orders of a pair follow each other
    both = list(zip(own[::2], own[1::2], strict=True))
    usable = [(first, second) for first, second in both if first.state == second.state == READ]
    prompts = [pairs[first.pair].row for first, _ in usable]
    estimate, details = Estimate(math.nan, math.nan, math.nan), {}
    if usable:
        orders = np.array([[[verdict.student, verdict.teacher] for verdict in pair] for pair in usable], dtype=float)
        if metric == "lc_win_rate":
            fit = _length_controlled(orders, usable, pairs, prompts)
            estimate = fit.rate
            details = {"length_effect": fit.length_effect, "order_effect": fit.order_effect}
        elif metric == "win_rate":
            wins = orders[:, :, 0]
            estimate = mean_over_prompts(over_orders(wins[:, 0], wins[:, 1]), prompts)
            placed = np.concatenate([wins[:, 0], 1 - wins[:, 1]])
            chosen = placed[placed != 0.5]
            details = {
                "first_is_chosen": float(chosen.mean()) if len(chosen) else math.nan,
                "orders_agree": float((wins[:, 0] == wins[:, 1]).mean()),
            }
        else:
            shares = share_of_sum(orders[:, :, 0], orders[:, :, 1])
            estimate = mean_over_prompts(over_orders(shares[:, 0], shares[:, 1]), prompts)
            student, teacher = orders.mean(axis=(0, 1))
            details = {"points_of_student": float(student), "points_of_teacher": float(teacher)}
    counts = {state: sum(verdict.state == state for verdict in own) for state in (UNPARSABLE, FAILED, NOT_ASKED)}
    return Measured(estimate, len(set(prompts)), len(usable), *counts.values(), *cost_of(own, judge), details)


def _length_controlled(orders, usable, pairs: list[Pair], prompts: list[int]) -> LengthControlled:
    longer = [len(pairs[first.pair].student) - len(pairs[first.pair].teacher) for first, _ in usable]
    is_first = [[verdict.student_is_first for verdict in pair] for pair in usable]
    return length_controlled(orders[:, :, 0].ravel(), np.repeat(longer, 2), np.ravel(is_first), np.repeat(prompts, 2))


def is_same_model(name: str, other: str) -> bool:
    """Whether two names are of one model: whoever serves it, and with or without a date."""
    return _bare(name) == _bare(other)


def _bare(name: str) -> str:
    return DATE.sub("", name.lower().rstrip("/").rpartition("/")[2])


def verdict_on(estimate: Estimate) -> str:
    """What a metric says of the student, in words."""
    if math.isnan(estimate.low):
        return "no interval"
    if not excludes_zero(estimate.low - EQUAL, estimate.high - EQUAL):
        return "no difference seen"
    return "better than the teacher" if estimate.value > EQUAL else "worse than the teacher"


def as_json(measured: dict[str, Measured]) -> dict[str, Any]:
    """The metrics, where what is unknown is `null`."""
    found = {}
    for name, metric in measured.items():
        values = vars(metric) | metric.estimate._asdict() | metric.details | {"verdict": verdict_on(metric.estimate)}
        found[name] = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in values.items()
            if key not in ("estimate", "details")
        }
    return found


def markdown(
    measured: dict[str, Measured],
    judge: JudgeConfig,
    student: str,
    teacher: str,
    facts: list[str],
    warnings: list[str],
) -> str:
    """
    The page.

    Args:
        measured (`dict[str, Measured]`):
            The metrics.
        judge ([`~judging.settings.JudgeConfig`]):
            Who judged.
        student, teacher (`str`):
            Their names.
        facts, warnings (`list[str]`):
            Further lines.
    """
    lines = [f"# {escape(student)} beside {escape(teacher)}", ""]
    lines += [f"Judge: {code(judge.model)} at {endpoint_family(judge.base_url)}.", ""]
    for line in warnings:
        lines += [f"> Warning: {line}", ""]
    lines += [*table(HEAD, [_row(name, metric, judge) for name, metric in measured.items()]), ""]
    lines += [
        "1 is best, and 0.5 is as good as the teacher. Intervals are over prompts. A pair without a readable verdict in both orders "
        "is left out, and never a tie.",
        "",
    ]
    for name, metric in measured.items():
        lines.append(f"* `{name}`: {verdict_on(metric.estimate)}.{_details(metric)}")
    return "\n".join([*lines, *(f"* {fact}" for fact in facts), ""])


def _row(name: str, metric: Measured, judge: JudgeConfig) -> list[str]:
    value, low, high = metric.estimate
    interval = "–" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
    cost = f"{metric.tokens:,} tokens" if metric.cost is None else f"{metric.cost:,.4f} {escape(judge.currency)}"
    shown = "–" if math.isnan(value) else f"{value:.3f}"
    return [f"`{name}`", shown, interval, f"{metric.prompts:,}", f"{metric.unparsable:,}", code(judge.model), cost]


def _details(metric: Measured) -> str:
    said = {
        "first_is_chosen": "the answer that stood first won {:.0%} of the verdicts without a tie",
        "orders_agree": "both orders agree in {:.0%} of the pairs",
        "length_effect": "effect of length {:+.2f} logits",
        "order_effect": "of standing first {:+.2f}",
        "points_of_student": "{:.2f} points for the student",
        "points_of_teacher": "{:.2f} for the teacher",
    }
    texts = [said[name].format(value) for name, value in metric.details.items() if not math.isnan(value)]
    texts += [
        f"{count:,} verdicts {what}"
        for what, count in ((FAILED, metric.failed), (NOT_ASKED, metric.not_asked))
        if count
    ]
    text = ", ".join(texts)
    return f" {text[0].upper()}{text[1:]}." if text else ""
