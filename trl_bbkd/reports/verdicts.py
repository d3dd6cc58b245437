"""What differs between runs at one glance: in what one is better than the first, in what worse, and where nothing is seen."""

from collections.abc import Sequence
from typing import NamedTuple

from .text_report import format_value, sense
from .uncertainty import has_interval, is_clear


BETTER, WORSE, UNCLEAR = "better", "worse", "no difference seen"
KINDS = (BETTER, WORSE, UNCLEAR)
NO_VERDICT = "no verdict without an interval"


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
        is_deciding (`bool`, *optional*, defaults to `True`):
            Whether it is told of where no difference is seen, too.
    """

    label: str
    metric: str
    found: dict[str, float]
    is_deciding: bool = True

    def __str__(self) -> str:
        if not has_interval(self.found):
            return "–"
        value, low, high = (self.signed(name) for name in ("difference", "low", "high"))
        return f"{value} ({low} to {high})"

    def signed(self, name: str) -> str:
        value = self.found[name]
        return ("−" if value < 0 else "+") + format_value(self.metric, abs(value))

    @property
    def kind(self) -> str | None:
        """Which of `KINDS` it is; `None` where neither more nor less is better, or no interval is known."""
        if not sense(self.metric) or not has_interval(self.found):
            return None
        if (self.found["low"], self.found["high"]) == (0, 0):
            # All values are the same, as where no answer is cut
            return None
        if not is_clear(self.found):
            return UNCLEAR
        return BETTER if self.found["difference"] * sense(self.metric) > 0 else WORSE


def verdicts(found: Sequence[Sequence[Difference]], names: Sequence[str]) -> list[str]:
    """
    A sentence of Markdown for each run but the first.

    Args:
        found (`Sequence[Sequence[Difference]]`):
            Of each run but the first.
        names (`Sequence[str]`):
            What runs are called, the first one's first.
    """
    return [f"**{name}** beside {names[0]}: {_verdict(own)}." for name, own in zip(names[1:], found, strict=True)]


def by_kind(found: Sequence[Difference]) -> dict[str, list[Difference]]:
    """What is told of a run, by its kind: all that is better or worse, and what decides where no difference is seen."""
    told = {kind: [each for each in found if each.kind == kind] for kind in KINDS}
    told[UNCLEAR] = [each for each in told[UNCLEAR] if each.is_deciding]
    return {kind: differences for kind, differences in told.items() if differences}


def _verdict(found: Sequence[Difference]) -> str:
    parts = [f"{kind}: {'; '.join(map(_told, differences))}" for kind, differences in by_kind(found).items()]
    return ". ".join(parts) or NO_VERDICT


def _told(difference: Difference) -> str:
    value, low, high = (difference.signed(name) for name in ("difference", "low", "high"))
    return (
        f"{difference.label} ({value}, {low} to {high})" if difference.is_deciding else f"{difference.label} ({value})"
    )
