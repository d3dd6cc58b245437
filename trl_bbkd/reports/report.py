"""What every run reports: `report.md`, pictures, `metrics.json` and the table on the terminal."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from .markdown import code, escape, fenced, table
from .redaction import SECRET
from .uncertainty import has_interval, is_clear


TEACHER, UNDISTILLED, SEQKD = "teacher", "undistilled", "SeqKD"
EVALUATION = "evaluation"


class Section(NamedTuple):
    """A part of a report: `title`, and `lines` of Markdown."""

    title: str
    lines: list[str]


@dataclass(kw_only=True)
class Report:
    """
    What a run has to say, whatever its student is. Log entries are dictionaries with `step`.

    Args:
        method (`str`):
            Name of the method, such as `"GAD"`.
        student (`str`):
            Checkpoint the student started from.
        teacher (`str`, *optional*):
            Name of the black-box teacher.
        results (`dict[str, dict[str, float]]`):
            Final metrics of each student in the table.
        curves (`dict[str, list[dict]]`):
            Metrics along the way, of the method and of what it is compared with.
        log_history (`list[dict]`):
            The trainer's log.
        counts (`dict`):
            Data counts per split, each with `table_rows`.
        inputs (`dict`):
            What tells one run from another: method, student and data.
        command (`str`, *optional*):
            How to repeat the run.
        settings (`dict`):
            What the recipe says, without secrets.
        versions (`dict[str, str]`):
            Versions of libraries.
        seconds (`dict[str, float]`):
            Wall-clock time per part of the run. `"evaluation"` is that of measuring students, which the trainings' are without.
        warnings (`list[dict]`):
            What went wrong during training: `step` and `text`.
        differences (`dict[str, dict[str, dict]]`):
            How far the method's student is from each other one, by the other's name and metric: as of
            [`~reports.uncertainty.paired_difference`].
        intervals (`dict[str, tuple[float, float]]`):
            Of the method's student, by metric: the 95 % interval of its value over prompts drawn anew.
    """

    method: str
    student: str
    teacher: str | None
    results: dict[str, dict[str, float]]
    curves: dict[str, list[dict]]
    log_history: list[dict]
    counts: dict
    inputs: dict = field(default_factory=dict)
    command: str | None = None
    settings: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[dict] = field(default_factory=list)
    differences: dict[str, dict[str, dict]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def judged_metrics(self) -> list[str]:
        """Names of the judge's metrics, the deciding one first; empty without a judge."""
        return []

    @property
    def headline(self) -> str:
        """The metric the run is summed up by."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """One sentence with the deciding numbers, whichever way they point."""
        raise NotImplementedError

    def verdict(self, other: str, metric: str) -> str:
        """Whether the method is better than `other`, as far as the interval of their difference tells."""
        found = self.differences.get(other, {}).get(metric)
        if not has_interval(found):
            return f"no verdict on {self.method} without an interval"
        if not is_clear(found):
            return f"no difference seen ({self.signed(metric, found['low'])} to {self.signed(metric, found['high'])})"
        is_better = found["difference"] * self.sense(metric) > 0
        low, high = sorted(abs(found[end]) for end in ("low", "high"))
        size = f"{self._apart(other, metric)} ({self.written(metric, low)} to {self.written(metric, high)})"
        return f"{self.method} is {'better' if is_better else 'worse'} by {size}"

    def _apart(self, other: str, metric: str) -> str:
        """How far, as the numbers beside it say; or where no student has the metric alone, by itself."""
        own, others = (self.results[name].get(metric) for name in (self.method, other))
        if own is None or others is None:
            return self.written(metric, abs(self.differences[other][metric]["difference"]))
        return f"{abs(round(own, 3) - round(others, 3)):.3f}"

    def written(self, metric: str, value: float | None) -> str:
        """A value as the table writes it."""
        raise NotImplementedError

    def sense(self, metric: str) -> int:
        """Which way is better: 1 up, -1 down, 0 neither."""
        return 1

    def _is_worse(self, other: str, metric: str) -> bool:
        """Whether the method's student is clearly worse than another one by this metric."""
        found = self.differences.get(other, {}).get(metric)
        return is_clear(found) and found["difference"] * self.sense(metric) < 0

    def signed(self, metric: str, value: float) -> str:
        return ("−" if value < 0 else "+") + self.written(metric, abs(value))

    @property
    def compared(self) -> list[tuple[str, str]]:
        """Metric and label of what differences are told of."""
        raise NotImplementedError

    def comparison(self) -> list[str]:
        """Lines of a Markdown table: how far the method's student is from each other one, with intervals."""
        others = [name for name in self.columns if name in self.differences]
        lines = [
            [label, *(self._difference(self.differences[name].get(key), key) for name in others)]
            for key, label in self.compared
        ]
        lines = [line for line in lines if any(cell != "–" for cell in line[1:])]
        return table([f"{self.method} less", *others], lines) if lines else []

    def _difference(self, found: dict | None, metric: str) -> str:
        if not has_interval(found):
            return "–"
        value, low, high = (self.signed(metric, found[name]) for name in ("difference", "low", "high"))
        return f"{value} ({low} to {high})"

    @property
    def columns(self) -> list[str]:
        """Columns of the table: the teacher closes."""
        return sorted(self.results, key=lambda name: name == TEACHER)

    @property
    def measured(self) -> list[tuple[str, str]]:
        """Metric and label of each line of the table."""
        raise NotImplementedError

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table: a label, then one value per column."""
        return [
            [label, *(self.written(key, self.results[name].get(key)) for name in self.columns)]
            for key, label in self.measured
        ]

    @property
    def explanation(self) -> str:
        """What the table's numbers are, and how they were measured."""
        raise NotImplementedError

    @property
    def derived(self) -> dict:
        """What `metrics.json` says beside the report's own entries."""
        return {"headline": self.headline, "summary": self.summary}

    def sections(self) -> list[Section]:
        """What follows the table and the picture."""
        return []

    def verdicts(self) -> list[Section]:
        """What a judge said of the students, if one was asked."""
        return []

    def draw(self, folder: Path) -> None:
        """Write `curves.png`, and what other pictures `sections` name, to `folder`."""
        raise NotImplementedError


def render_markdown(report: Report) -> str:
    """The text of `report.md`."""
    teacher = escape(report.teacher or "a black-box teacher")
    lines = [f"# {report.method}: {code(report.student)} from {teacher}", "", report.summary, ""]
    lines += [*results(report), "", "![Curves of the run](curves.png)", ""]
    if report.warnings:
        warnings = [f"* Step {warning['step']}: {warning['text']}" for warning in report.warnings]
        lines += ["## Warnings", "", *warnings, ""]
    for section in [*report.verdicts(), *report.sections()]:
        lines += [f"## {section.title}", "", *section.lines, ""]
    lines += ["## Teacher data", "", *counts_table(report.counts), "", "## Reproduce", ""]
    if report.command:
        lines += [fenced(report.command, "bash"), ""]
    if report.settings:
        settings = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True)
        lines += ["The recipe:", "", fenced(settings, "yaml"), ""]
    lines += [", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".", ""]
    times = wall_clock_time(report.seconds)
    return "\n".join(lines + [times, ""] if times else lines)


def wall_clock_time(seconds: dict[str, float]) -> str:
    """A sentence on how long the parts of a run took; empty where none is known."""
    times = ", ".join(f"{name} {duration(part)}" for name, part in seconds.items())
    if seconds.get(EVALUATION):
        times += f" ({seconds[EVALUATION] / sum(seconds.values()):.0%} of these)"
    return f"Wall-clock time: {times}." if times else ""


def results(report: Report) -> list[str]:
    """Lines of Markdown: the table, the differences in it, and what they are."""
    compared = report.comparison()
    return [
        *table(["", *report.columns], report.rows),
        "",
        *([*compared, ""] if compared else []),
        report.explanation,
    ]


def counts_table(counts: dict) -> list[str]:
    """Lines of a Markdown table of data counts, one column a split."""
    cells = {split: dict(split_counts.table_rows()) for split, split_counts in counts.items()}
    # Some are told only of a split that has any
    labels = dict.fromkeys(label for split in cells.values() for label in split)
    return table(["", *cells], [[label, *(cells[split].get(label, "–") for split in cells)] for label in labels])


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def metrics_dict(report: Report) -> dict:
    """Everything in `report`, fit for strict JSON: what is not a finite number is `None`."""
    found = dataclasses.asdict(report) | report.derived
    # As a trainer's state keeps it: a run that recalls its log writes the same
    found["log_history"] = [dict(sorted(entry.items())) for entry in found["log_history"]]
    found["curves"] = {
        name: [dict(sorted(entry.items())) for entry in entries] for name, entries in found["curves"].items()
    }
    return finite(found)


def finite(value):
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def without_secrets(settings: dict) -> dict:
    """`settings` without entries whose name says that they hold a secret, at any depth."""
    return {key: _without_secrets(value) for key, value in settings.items() if not SECRET.search(str(key))}


def _without_secrets(value):
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return without_secrets(value) if isinstance(value, dict) else value


def arguments_without_secrets(arguments: list[str]) -> list[str]:
    """Command-line arguments without options whose name says that they hold a secret."""
    kept, skipping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            skipping = bool(SECRET.search(argument.partition("=")[0]))
        if not skipping:
            kept.append(argument)
    return kept


def print_table(report: Report, console=None) -> None:
    """Print the table and the sentence under it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.method}: {report.student} from {report.teacher or 'a black-box teacher'}")
    table.add_column("")
    for model in report.columns:
        style = "bold" if model == report.method else "dim" if model == TEACHER else None
        table.add_column(model, justify="right", style=style)
    for row in report.rows:
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    console.print(report.summary.replace("`", ""), markup=False)


def write_report(report: Report, output_dir: str | Path) -> None:
    """Write `report.md`, `metrics.json` and the pictures to `output_dir`."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    text = json.dumps(metrics_dict(report), indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    report.draw(folder)
