"""Counts of a run, and the line that shows them."""

import time
from collections import Counter
from dataclasses import dataclass, field

from .budget import Spent


@dataclass
class Tally:
    """
    What a run has done.

    Attributes:
        expected (`int`): answers that were missing when it began.
        there, failed_before (`int`): answers that were there, requests of earlier runs that failed and are not asked again.
        answered, failed (`int`): answers that came, requests that were given up.
        left_out, failures, faults (`Counter`): answers that are not whole, failures, and attempts that failed, by reason.
        spent ([`~collect.budget.Spent`]): by this run alone.
        without_usage (`int`): requests whose tokens the endpoint did not say; they count with their worst case.
        started (`float`): when.
    """

    expected: int = 0
    there: int = 0
    failed_before: int = 0
    answered: int = 0
    failed: int = 0
    left_out: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    spent: Spent = field(default_factory=Spent)
    without_usage: int = 0
    started: float = field(default_factory=time.monotonic)

    def line(self, currency: str | None, now: float | None = None) -> str:
        """Everything in one line: answers, answers a second, tokens, cost so far and expected, faults."""
        done = self.answered + self.failed
        seconds = max((time.monotonic() if now is None else now) - self.started, 1e-3)
        parts = [f"{done:,} of {self.expected:,} answers", f"{done / seconds:,.1f}/s", f"{self.spent.tokens:,} tokens"]
        if currency:
            whole = self.spent.cost * self.expected / done if done else 0.0
            parts.append(f"{self.spent.cost:,.4f} of about {whole:,.4f} {currency}")
        parts += [f"{listed(counts)} {what}" for what, counts in self._counts() if counts]
        return " · ".join(parts)

    def _counts(self) -> list[tuple[str, Counter]]:
        return [("left out", self.left_out), ("retried", self.faults), ("failed", self.failures)]


def listed(counts: Counter) -> str:
    """`3 status 500, 1 time-out`, the most frequent first."""
    return ", ".join(
        f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    )
