"""What the verdicts come to: each metric, of the pairs that have a verdict in both orders."""

import math
from dataclasses import dataclass

import numpy as np

from ..evaluation.intervals import excludes_zero
from .asking import FAILED, NOT_ASKED, READ, UNPARSABLE, Verdict, cost_of
from .length_control import length_controlled
from .pairs import Pair
from .scores import EQUAL, Estimate, mean_over_prompts, over_orders, share_of_sum
from .settings import JudgeConfig
from .verdicts import METRICS


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

    @property
    def verdict(self) -> str:
        """What it says of the student, in words."""
        value, low, high = self.estimate
        if math.isnan(low):
            return "no interval"
        if not excludes_zero(low - EQUAL, high - EQUAL):
            return "no difference seen"
        return "better than the teacher" if value > EQUAL else "worse than the teacher"


def measure(metric: str, verdicts: list[Verdict], pairs: list[Pair], judge: JudgeConfig) -> Measured:
    """One of `METRICS`, by the verdicts on the pairs."""
    own = [verdict for verdict in verdicts if verdict.question == METRICS[metric].name]
    # Both orders of a pair follow each other, the student's answer first in the first of them
    both = [
        (first, second)
        for first, second in zip(own[::2], own[1::2], strict=True)
        if first.state == second.state == READ
    ]
    compared = [pairs[first.pair] for first, _ in both]
    estimate, details = Estimate(math.nan, math.nan, math.nan), dict[str, float]()
    if both:
        students, teachers = (
            np.array([[getattr(verdict, side) for verdict in orders] for orders in both], dtype=float)
            for side in ("student", "teacher")
        )
        estimate, details = VALUES[metric](students, teachers, compared)
    unparsable, failed, not_asked = (
        sum(verdict.state == state for verdict in own) for state in (UNPARSABLE, FAILED, NOT_ASKED)
    )
    prompts = len({pair.row for pair in compared})
    return Measured(estimate, prompts, len(both), unparsable, failed, not_asked, *cost_of(own, judge), details)


def _win_rate(wins: np.ndarray, _: np.ndarray, pairs: list[Pair]) -> tuple[Estimate, dict[str, float]]:
    won_by_first = np.concatenate([wins[:, 0], 1 - wins[:, 1]])
    won_by_first = won_by_first[won_by_first != EQUAL]
    return mean_over_prompts(over_orders(*wins.T), [pair.row for pair in pairs]), {
        "first_is_chosen": float(won_by_first.mean()) if len(won_by_first) else math.nan,
        "orders_agree": float((wins[:, 0] == wins[:, 1]).mean()),
    }


def _length_controlled(wins: np.ndarray, _: np.ndarray, pairs: list[Pair]) -> tuple[Estimate, dict[str, float]]:
    longer_by = np.repeat([len(pair.student) - len(pair.teacher) for pair in pairs], 2)
    fit = length_controlled(
        wins.ravel(), longer_by, np.tile([True, False], len(pairs)), np.repeat([pair.row for pair in pairs], 2)
    )
    return fit.rate, {"length_effect": fit.length_effect, "order_effect": fit.order_effect}


def _score(students: np.ndarray, teachers: np.ndarray, pairs: list[Pair]) -> tuple[Estimate, dict[str, float]]:
    shares = share_of_sum(students, teachers)
    return mean_over_prompts(over_orders(*shares.T), [pair.row for pair in pairs]), {
        "points_of_student": float(students.mean()),
        "points_of_teacher": float(teachers.mean()),
    }


VALUES = {"win_rate": _win_rate, "lc_win_rate": _length_controlled, "score": _score}
