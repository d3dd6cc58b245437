"""What differs between runs at one glance: in what one is better than the first, in what worse, and where nothing is seen."""

from collections.abc import Sequence
from typing import NamedTuple

from .text_report import BETTER_WHEN_LOWER, WITHOUT_BETTER, format_value
from .uncertainty import has_interval, is_clear


BETTER, WORSE, UNCLEAR = "better", "worse", "no difference seen"
KINDS = (BETTER, WORSE, UNCLEAR)


class Difference(NamedTuple):
    """
    How far a run is from the first by one metric.

    Args:
        label (`str`):
            What the metric is called.
        metric (`str`):
            Its name.
        found (`dict[str, float]`):
            As of [`~reports.uncertainty.paired_difference`]; empty where nothing can be said.
    """

    label: str
    metric: str
    found: dict[str, float]

    def __str__(self) -> str:
        if not has_interval(self.found):
            return "–"
        value, low, high = (self.signed(name) for name in ("difference", "low", "high"))
        return f"{value} ({low} to {high})"

    @property
    def told(self) -> str:
        """With the interval; where no difference is seen, that alone says how large one might be."""
        ends = f"({self.signed('low')} to {self.signed('high')})"
        return f"{self.label} {ends}" if self.kind == UNCLEAR else f"{self.label} {self.signed('difference')} {ends}"

    def signed(self, name: str) -> str:
        value = self.found[name]
        return ("−" if value < 0 else "+") + format_value(self.metric, abs(value))

    @property
    def kind(self) -> str | None:
        """Which of `KINDS` it is; `None` where neither more nor less is better, or no interval is known."""
        name = self.metric.partition("@")[0]
        if name in WITHOUT_BETTER or not has_interval(self.found):
            return None
        if (self.found["low"], self.found["high"]) == (0, 0):
            # All values are the same, as where no answer is cut
            return None
        if not is_clear(self.found):
            return UNCLEAR
        return BETTER if (self.found["difference"] < 0) == (name in BETTER_WHEN_LOWER) else WORSE


def verdicts(found: Sequence[Sequence[Difference]], names: Sequence[str]) -> list[str]:
    """
    A sentence of Markdown for each run but the first.

    Args:
        found (`Sequence[Sequence[Difference]]`):
            Of each run but the first.
        names (`Sequence[str]`):
            What runs are called, the first one's first.
    """
    return [f"**{name}** beside {names[0]}. {_verdict(own)}." for name, own in zip(names[1:], found, strict=True)]


def _verdict(found: Sequence[Difference]) -> str:
    parts = []
    for kind in KINDS:
        if told := [each.told for each in found if each.kind == kind]:
            parts.append(f"{kind.capitalize()}: {'; '.join(told)}")
    return ". ".join(parts) or "No verdict without an interval"
