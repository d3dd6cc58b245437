"""The report of a run of LLKD."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..reports.markdown import escape, table
from ..reports.report import UNDISTILLED, Report, Section


ALL_ROWS, RANDOM_ROWS = "all rows", "random rows"
RELIABILITY = "reliability.png"
TABLE = (
    ("accuracy", "accuracy"),
    ("macro_f1", "macro F1"),
    ("learned_share", "rows learned from, share of each pool"),
    ("distinct_rows", "different rows learned from"),
    ("compute", "computation, of all rows'"),
    ("seconds", "training time, s"),
)


@dataclass(kw_only=True)
class LLKDReport(Report):
    """
    A run whose student classifies.

    Args:
        truth (`str`):
            What accuracy and macro F1 are measured against, such as `"the true labels"`.
        class_names (`list[str]`):
            Names of the classes.
        warmup_steps (`int`):
            First optimizer steps, in which every row is learned from.
        selection (`dict[str, dict]`):
            Of each class, by name, `kept_share` after the warm-up and the last thresholds, `threshold_teacher` and
            `threshold_student`.
        teacher_labels (`dict`):
            How good the teacher's labels are on training rows with a true label, as of
            [`~llkd.label_calibration.reliability_report`], with `accuracy_kept` and `accuracy_dropped`; empty where no
            such row is.
        results, curves, kwargs:
            As in [`~reports.report.Report`]; metrics are `accuracy`, `macro_f1`, `learned_share`, `distinct_rows`, `compute` and
            `seconds`, of `"undistilled"`, `"all rows"`, `"random rows"` and the method.
    """

    truth: str
    class_names: list[str]
    warmup_steps: int = 0
    selection: dict[str, dict] = field(default_factory=dict)
    teacher_labels: dict = field(default_factory=dict)

    @property
    def headline(self) -> str:
        return "macro_f1"

    @property
    def summary(self) -> str:
        own = self.results[self.method]
        text = (
            f"Macro F1 against {self.truth} is {own['macro_f1']:.3f} after {self.method}, which learned from "
            f"{own['learned_share']:.1%} of the rows that it looked at, and {self.results[UNDISTILLED]['macro_f1']:.3f} before"
        )
        for name, what in ((ALL_ROWS, "learning from all rows"), (RANDOM_ROWS, "as many random ones")):
            if name in self.results:
                text += f"; {what} reaches {self.results[name]['macro_f1']:.3f}: {self.verdict(name, 'macro_f1')}"
        lost = [
            f"accuracy than {what} ({self.results[name]['accuracy']:.3f} → {own['accuracy']:.3f})"
            for name, what in (
                (UNDISTILLED, "before"),
                (ALL_ROWS, "that of all rows"),
                (RANDOM_ROWS, "that of random rows"),
            )
            if name in self.results and self._is_worse(name, "accuracy")
        ]
        return text + "." + (f" But worse {', '.join(lost)}." if lost else "")

    @property
    def measured(self) -> list[tuple[str, str]]:
        return list(TABLE)

    @property
    def compared(self) -> list[tuple[str, str]]:
        return list(TABLE[:2])

    def written(self, metric: str, value: float | None) -> str:
        return format_value(metric, value)

    @property
    def explanation(self) -> str:
        text = [
            f"Accuracy and macro F1 (the mean of the classes' F1) are measured on {self.counts['test'].rows:,} held-out rows "
            f"against {self.truth}."
        ]
        if self.differences:
            text.append(
                "Verdicts and differences have 95 % intervals, over held-out rows drawn anew (none with fewer than 6): another seed "
                "of the training may differ by more."
            )
        if ALL_ROWS in self.results:
            text.append(
                f"The students differ in the rows they learn from, and in how {self.method} weights them: the same start, the same "
                "order of rows, as many optimizer steps. `all rows` learns from every row of each pool; `random rows` from as "
                f"large a share as {self.method} did on the whole, chosen without a look."
            )
        text.append(
            "Computation is an estimate, with 1 for a row's forward pass and 2 for its backward pass: scoring a pool costs "
            "its forward passes. Training time is measured, evaluations included; of a training that was resumed it is not known."
        )
        return " ".join(text)

    def sections(self) -> list[Section]:
        found = []
        if self.selection:
            found.append(Section("Selection", [*selection_table(self), "", selection_explanation(self)]))
        if self.teacher_labels:
            lines = [teacher_explanation(self), "", f"![Reliability of the teacher's confidence]({RELIABILITY})"]
            found.append(Section("The teacher's labels", lines))
        return found

    def draw(self, folder: Path) -> None:
        from .curves import plot_curves
        from .reliability import plot_reliability

        plot_curves(self, folder / "curves.png")
        if self.teacher_labels:
            plot_reliability(self.teacher_labels, folder / RELIABILITY)


def format_value(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if metric == "distinct_rows":
        return f"{value:,.0f}"
    return f"{value:.1f}" if metric == "seconds" else f"{value:.3f}"


def selection_table(report: LLKDReport) -> list[str]:
    """Lines of a Markdown table: of each class what was kept, and its thresholds at the end."""
    rows = [
        [
            escape(name),
            f"{report.counts['train'].classes[name]:,}",
            *(format_value(key, found.get(key)) for key in ("kept_share", "threshold_teacher", "threshold_student")),
        ]
        for name, found in report.selection.items()
    ]
    return table(["the teacher's label", "rows", "kept", "least confidence", "least uncertainty"], rows)


def selection_explanation(report: LLKDReport) -> str:
    """What the table of the selection says."""
    warmup = f" The first {report.warmup_steps} steps kept every row." if report.warmup_steps else ""
    return (
        f"`kept` is the share of a class's rows that was learned from, after the warm-up.{warmup} "
        "Thresholds are those of the last step; uncertainty is the entropy of the student's distribution over log C, from 0 to 1."
    )


def teacher_explanation(report: LLKDReport) -> str:
    """How often the teacher is right, whether its confidence says so, and on which rows."""
    found = report.teacher_labels
    text = (
        f"Of {found['rows']:,} training rows with a true label the teacher has {found['accuracy']:.1%} right, with a mean "
        f"confidence of {found['mean_confidence']:.3f}; the expected calibration error is {found['ece']:.3f}."
    )
    kept, dropped = found["accuracy_kept"], found["accuracy_dropped"]
    if math.isfinite(kept) and math.isfinite(dropped):
        text += f" After the warm-up {kept:.1%} of the kept rows are right, and {dropped:.1%} of the dropped ones."
    return text


def decline(report: LLKDReport) -> list[dict]:
    """A warning where the student is worse than before it learned."""
    if not report._is_worse(UNDISTILLED, "macro_f1"):
        return []
    before, after = (report.results[name]["macro_f1"] for name in (UNDISTILLED, report.method))
    text = (
        f"the student got worse: macro F1 is {after:.3f}, and was {before:.3f} before it learned. Lower learning_rate, look at "
        "the teacher's labels, or keep more rows (selection_rule: quantile)."
    )
    return [{"kind": "worse", "step": report.curves[report.method][-1]["step"], "text": text}]


def starved_classes(report: LLKDReport, least: float = 0.01) -> list[dict]:
    """Warnings of classes of whose rows less than `least` was kept after the warm-up."""
    return [
        {
            "kind": "starved",
            "step": report.warmup_steps,
            "text": f"after this step {found['kept_share']:.1%} of the rows labelled {escape(name)} were kept: the student forgets the "
            "class. `selection_rule: class_mean` gives every class its own thresholds; a lower `selection_momentum` makes "
            "them follow the student faster; `selection_rule: quantile` with a `selection_budget` keeps as many rows as you say.",
        }
        for name, found in report.selection.items()
        if found["kept_share"] < least
    ]
