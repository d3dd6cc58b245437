"""Runs of one recipe with several seeds: means, spread, and intervals of what seeds and prompts leave open."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..evaluation.diversity import mean_difference_at_equal_diversity
from ..evaluation.intervals import (
    UNKNOWN,
    Interval,
    excludes_zero,
    interval_of_mean,
    interval_over_both,
    interval_over_seeds,
)
from .comparison import ComparedRun
from .markdown import code, escape, fenced, table
from .report import Report, finite
from .text_report import EQUAL_DIVERSITY


SEEDS_REPORT = "seeds.md"
AT_EQUAL_DIVERSITY = "@equal_diversity"


@dataclass
class SeedRun:
    """
    A finished run of one seed.

    Args:
        seed (`int`):
            The seed.
        report (`Report`):
            What it reported.
        lines (`list[dict]`):
            Of each prompt, as [`~reports.held_out.prompt_lines`] gives them, in one order for all seeds; empty of a classifier.
    """

    seed: int
    report: Report
    lines: list[dict]


@dataclass
class SeedsDifference:
    """
    How far the method's student is from another one, by one metric.

    Args:
        seeds (`list[float]`):
            The difference of each seed.
        over_prompts, over_seeds, over_both (`tuple[float, float]`):
            Intervals of their mean, of [`~evaluation.intervals`]; `nan` where there are too few, or no rows are kept.
    """

    seeds: list[float]
    over_prompts: Interval
    over_seeds: Interval
    over_both: Interval

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def widest(self) -> Interval:
        """The interval that a verdict is by: over both where that is known."""
        known = [each for each in (self.over_both, self.over_prompts, self.over_seeds) if is_known(each)]
        return known[0] if known else UNKNOWN


class SeedsReport:
    """
    What runs with several seeds come to together.

    Args:
        runs (`list[SeedRun]`):
            At least two, of the same recipe and on the same held-out rows.
        command (`str`):
            How to repeat them.
    """

    def __init__(self, runs: list[SeedRun], command: str):
        self.runs = runs
        self.command = command
        self.report = runs[0].report
        self.seeds = ", ".join(str(run.seed) for run in runs)
        self.results = {
            name: {key: self._values(name, key) for key, _ in self.report.measured} for name in self.report.columns
        }
        self.differences = {
            other: {key: self._difference(other, key) for key, _ in self.report.compared if self._is_told(other, key)}
            for other in self.report.columns
            if other in self.report.differences
        }

    def _values(self, student: str, metric: str) -> list[float]:
        return [_number(run.report.results[student].get(metric)) for run in self.runs]

    def _is_told(self, other: str, metric: str) -> bool:
        return all(metric in run.report.differences[other] for run in self.runs)

    def _difference(self, other: str, metric: str) -> SeedsDifference:
        seeds = [_number(run.report.differences[other][metric]["difference"]) for run in self.runs]
        over_prompts, over_seeds = self._over_prompts(other, metric), interval_over_seeds(seeds)
        return SeedsDifference(
            seeds, over_prompts, over_seeds, interval_over_both(float(np.mean(seeds)), over_prompts, over_seeds)
        )

    def _over_prompts(self, other: str, metric: str) -> Interval:
        """Of the mean over seeds, whose students all answered the same prompts."""
        if not all(run.lines for run in self.runs):
            return UNKNOWN
        own, others = ([_measured(run, name) for run in self.runs] for name in (self.report.method, other))
        if metric.endswith(AT_EQUAL_DIVERSITY):
            judged = metric.removesuffix(AT_EQUAL_DIVERSITY)
            pairs = [(one.curve(judged), two.curve(judged)) for one, two in zip(own, others, strict=True)]
            found = mean_difference_at_equal_diversity(pairs, len(own[0].lines))
            return found["low"], found["high"]
        means = [np.mean([student.values(metric) for student in students], axis=0) for students in (own, others)]
        low, high = interval_of_mean(means[0] - means[1], own[0].weights(metric))
        # A number of answers is a sum over prompts, all else a mean
        scale = len(own[0].lines) if metric.startswith("distinct_valid") else 1
        return scale * low, scale * high

    def table(self) -> list[list[str]]:
        """A line for each metric: its label, then each student's mean and standard deviation over seeds."""
        return [
            [label, *(self._with_spread(name, key) for name in self.report.columns)]
            for key, label in self.report.measured
        ]

    def _with_spread(self, student: str, metric: str) -> str:
        values = self.results[student][metric]
        text = self.report.written(metric, float(np.mean(values)))
        # What no seed changes has no spread
        return (
            text
            if len({*values}) == 1 or text == "–"
            else f"{text} ± {self.report.written(metric, float(np.std(values, ddof=1)))}"
        )

    def of_each_seed(self) -> list[list[str]]:
        """A line for each seed: what each student reaches by the metric that the run is summed up by."""
        key = self.report.headline
        return [
            [
                str(run.seed),
                *(self.report.written(key, self.results[name][key][number]) for name in self.report.columns),
            ]
            for number, run in enumerate(self.runs)
        ]

    def comparison(self, other: str) -> list[str]:
        """Lines of a Markdown table: how far the method's student is from another one. What nothing is known of is left out."""
        head = [
            f"{self.report.method} less {other}",
            "mean",
            "over prompts",
            "over seeds",
            "over both",
            "of each seed",
        ]
        lines = []
        for key, label in self.report.compared:
            found = self.differences[other].get(key)
            if found is None or math.isnan(found.mean):
                continue
            intervals = (found.over_prompts, found.over_seeds, found.over_both)
            signed = [self.report.signed(key, each) for each in (found.mean, *found.seeds)]
            lines.append([label, signed[0], *(self._interval(key, each) for each in intervals), "; ".join(signed[1:])])
        kept = [column for column in range(len(head)) if any(line[column] != "–" for line in lines)]
        return table([head[column] for column in kept], [[line[column] for column in kept] for line in lines])

    def _interval(self, metric: str, interval: Interval) -> str:
        if not is_known(interval):
            return "–"
        low, high = (self.report.signed(metric, end) for end in interval)
        return f"{low} to {high}"

    def verdict(self, other: str, metric: str) -> str:
        """Whether the method is better than `other`, as far as prompts and seeds tell."""
        return verdict(
            self.report.method,
            self.differences[other][metric],
            self.report.sense(metric),
            lambda value: self.report.written(metric, value),
        )

    @property
    def summary(self) -> str:
        key, method = self.report.headline, self.report.method
        label = dict(self.report.measured)[key]
        text = f"{label}, mean of seeds {self.seeds}: {self._with_spread(method, key)} after {method}."
        for other, found in self.differences.items():
            verdicts = [
                f" {other} has {self._with_spread(other, key)}: {self.verdict(other, key)}" if key in found else ""
            ]
            for metric, name in self.report.compared:
                if name == EQUAL_DIVERSITY and metric in found and not math.isnan(found[metric].mean):
                    verdicts.append(f"at equal diversity of the answers: {self.verdict(other, metric)}")
            text += "; ".join(verdicts) + "."
        return text + self._losses()

    def _losses(self) -> str:
        """What else the student lost, that the first sentences do not say."""
        texts = []
        for other, found in self.differences.items():
            lost = [
                f"{label} ({self.report.signed(key, found[key].mean)})"
                for key, label in self.report.compared
                if key in found
                and key != self.report.headline
                and label != EQUAL_DIVERSITY
                and excludes_zero(*found[key].widest)
                and found[key].mean * self.report.sense(key) < 0
            ]
            if lost:
                texts.append(f"worse than {other}: {', '.join(lost)}")
        return f" But {'; '.join(texts)}." if texts else ""

    @property
    def explanation(self) -> str:
        known = {
            name
            for differences in self.differences.values()
            for found in differences.values()
            for name in ("over_prompts", "over_seeds", "over_both")
            if is_known(getattr(found, name))
        }
        text = [
            f"Means of {len(self.runs)} seeds; ± is their standard deviation, and what has none is the same for all. Data, held-out "
            "rows and the draws for the report are the same for every seed."
        ]
        if "over_prompts" in known:
            text.append(
                f"Over prompts: the 95 % bootstrap interval of the mean difference, with the {len(self.runs[0].lines)} held-out prompts "
                "drawn anew and these trainings."
            )
        if "over_seeds" in known:
            text.append(
                f"Over seeds: the 95 % interval by Student's t of the {len(self.runs)} seeds' differences, on these "
                f"{'prompts' if 'over_prompts' in known else 'rows'}; it takes them to be spread normally."
            )
        else:
            text.append(
                "What another seed would change, two seeds do not tell: there are intervals over seeds from three on."
            )
        if "over_both" in known:
            text.append(
                "Over both: other prompts and other seeds, by the squares of both reaches. The verdicts are by this one."
            )
        return " ".join(text)

    def markdown(self) -> str:
        """The text of `seeds.md`."""
        report, teacher = self.report, escape(self.report.teacher or "a black-box teacher")
        lines = [f"# {report.method}: {code(report.student)} from {teacher}, seeds {self.seeds}", "", self.summary, ""]
        lines += [*table(["", *report.columns], self.table()), ""]
        for other in self.differences:
            lines += [*self.comparison(other), ""]
        label = dict(report.measured)[report.headline]
        lines += [*table([f"{label}, of seed", *report.columns], self.of_each_seed()), "", self.explanation, ""]
        folders = ", ".join(f"[seed {run.seed}](seed-{run.seed}/report.md)" for run in self.runs)
        return "\n".join(lines + [f"The reports: {folders}. Again:", "", fenced(self.command, "bash"), ""])

    def as_dict(self) -> dict:
        """Every number, fit for strict JSON."""
        results = {
            student: {key: _summed_up(values) for key, values in found.items()}
            for student, found in self.results.items()
        }
        differences = {
            other: {
                key: _summed_up(each.seeds)
                | {"over_prompts": each.over_prompts, "over_seeds": each.over_seeds, "over_both": each.over_both}
                for key, each in found.items()
            }
            for other, found in self.differences.items()
        }
        return finite(
            {
                "method": self.report.method,
                "seeds": [run.seed for run in self.runs],
                "headline": self.report.headline,
                "summary": self.summary,
                "results": results,
                "differences": differences,
            }
        )


def verdict(method: str, found: SeedsDifference, sense: int, written: Callable[[float], str]) -> str:
    """
    A sentence on a difference: clear where prompts and seeds together exclude zero; else which of the two leaves it open.

    Args:
        method (`str`):
            Name of the method.
        found ([`SeedsDifference`]):
            The difference.
        sense (`int`):
            1 where more is better, -1 where less is.
        written (`Callable[[float], str]`):
            Writes a value of the metric.
    """

    def ends(interval: Interval) -> str:
        low, high = (("−" if end < 0 else "+") + written(abs(end)) for end in interval)
        return f"{low} to {high}"

    kinds = {"over prompts": found.over_prompts, "over seeds": found.over_seeds}
    known = {name: interval for name, interval in kinds.items() if is_known(interval)}
    clear = [name for name, interval in known.items() if excludes_zero(*interval)]
    in_words = ", ".join(f"{ends(interval)} {name}" for name, interval in known.items())
    better = f"{'better' if found.mean * sense > 0 else 'worse'} by {written(abs(found.mean))}"
    if not known:
        return f"no verdict on {method} without an interval"
    if not clear:
        return f"no difference seen ({in_words})"
    if excludes_zero(*found.over_both):
        return f"{method} is {better} ({ends(found.over_both)} over prompts and seeds)"
    if list(known) == ["over prompts"]:
        return f"these {len(found.seeds)} students are {better} ({in_words}); of another seed's that says nothing"
    if list(known) == ["over seeds"]:
        return f"{method} is {better} on these rows ({in_words})"
    if clear == ["over prompts"]:
        return f"these {len(found.seeds)} students are {better}, another seed's need not be ({in_words})"
    if clear == ["over seeds"]:
        return f"{better} on these prompts, on others it need not be ({in_words})"
    return f"no difference seen over prompts and seeds together ({ends(found.over_both)}), though over each alone ({in_words})"


def is_known(interval: Interval) -> bool:
    return not any(map(math.isnan, interval))


def write_seeds_report(report: SeedsReport, folder: Path) -> None:
    """Write `seeds.md` to the folder that has the runs."""
    (folder / SEEDS_REPORT).write_text(report.markdown(), encoding="utf-8")


def _measured(run: SeedRun, student: str) -> ComparedRun:
    return ComparedRun(f"seed {run.seed}", {"method": student}, run.lines, {})


def _summed_up(values: list[float]) -> dict:
    return {
        "mean": float(np.mean(values)),
        "standard_deviation": float(np.std(values, ddof=1)),
        "of_each_seed": values,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
