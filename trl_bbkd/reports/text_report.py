"""The report of a student that writes text."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.student import TEMPERATURES, temperature_name
from .markdown import code, table
from .report import SEQKD, UNDISTILLED, Report, Section
from .uncertainty import has_interval, is_clear


OWN_METRICS = ("length", "length_ratio", "truncated", "distinct_valid", "distinct_share")
BETTER_WHEN_LOWER = ("teacher_nll", "truncated")
WITHOUT_BETTER = ("length", "length_ratio")
EQUAL_DIVERSITY = "quality at equal diversity"


@dataclass(kw_only=True)
class TextReport(Report):
    """
    A run whose student writes text. A method's own report is a subclass: it adds sections, and fills the small panels.

    Args:
        evaluation (`dict`):
            How results were measured: `prompts`, `samples`, `temperatures`, the deciding one first, `max_new_tokens`, `seed`.
        seqkd (`dict`):
            What the baseline was: `steps`, `best_step`, `batch_size`, `learning_rate`.
        stages (`list[dict]`):
            What the stages before and with the student's training did: `stage`, `rows`, `seconds` and `metrics`, a
            list of what was measured `at` which moment.
        calibration (`dict`):
            How well what the student learned from predicts held-out teacher text, where a method measures that.
        verdicts_of_judge (`dict`):
            What a judge said: its name `judge`, and `students`, by name and metric as
            [`~judging.in_training.TrainingJudge.report`] has them.
        results, curves, kwargs:
            As in [`~reports.report.Report`]; metrics are those of [`~evaluation.student.evaluate_student`], of `"teacher"`,
            `"undistilled"`, `"SeqKD"` and the method.
    """

    evaluation: dict = field(default_factory=dict)
    seqkd: dict = field(default_factory=dict)
    stages: list[dict] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)
    verdicts_of_judge: dict = field(default_factory=dict)

    @property
    def temperatures(self) -> list[float]:
        """Temperatures sampled at, the deciding one first."""
        return self.evaluation.get("temperatures") or list(TEMPERATURES)

    @property
    def at(self) -> str:
        """The deciding temperature as metrics name it."""
        return temperature_name(self.temperatures[0])

    @property
    def sampled_at(self) -> str:
        """The deciding temperature in words."""
        return f"temperature {self.temperatures[0]}" if self.temperatures[0] else "temperature 0 (greedy)"

    @property
    def judged_metrics(self) -> list[str]:
        """Names of the judge's metrics, the deciding one first; empty without a judge."""
        names = [key.partition("@")[0] for key in self.results[self.method] if key.endswith(f"@{self.at}")]
        return [name for name in names if name not in OWN_METRICS]

    @property
    def headline(self) -> str:
        """The metric the run is summed up by."""
        return f"{self.judged_metrics[0]}@{self.at}" if self.judged_metrics else "teacher_nll"

    @property
    def warmup_steps(self) -> float:
        """Optimizer steps before the method proper."""
        return 0.0

    @property
    def summary(self) -> str:
        key, results, method = self.headline, self.results, self.method
        judged = key != "teacher_nll"
        name = "The NLL of held-out teacher answers"
        if judged:
            name = f"`{self.judged_metrics[0]}` at {self.sampled_at}"
        value = {model: format_value(key, metrics.get(key)) for model, metrics in results.items()}
        text = f"{name} is {value[method]} after {method} and {value[UNDISTILLED]} before"
        before = self.differences.get(UNDISTILLED, {}).get(key)
        if has_interval(before) and not is_clear(before):
            text += f", {self.verdict(UNDISTILLED, key)}"
        if SEQKD in results:
            text += f"; SeqKD on the same text reaches {value[SEQKD]}: {self.verdict(SEQKD, key)}"
            if not judged:
                text += ". NLL is what SeqKD minimises; to compare the answers themselves, name a judge as `sample_metrics`"
        return f"{text}.{self._at_equal_diversity()}{self._losses()}"

    @property
    def equal_diversity(self) -> str:
        """Name of the difference in judged quality at equal diversity."""
        return f"{self.judged_metrics[0]}@equal_diversity" if self.judged_metrics else ""

    def _at_equal_diversity(self) -> str:
        """Whether a student that is judged better than SeqKD's is more than a sharper one."""
        if not has_interval(self.differences.get(SEQKD, {}).get(self.equal_diversity)):
            return ""
        return f" Over SeqKD at equal diversity of the answers: {self.verdict(SEQKD, self.equal_diversity)}."

    def _losses(self) -> str:
        """What else the student lost, that the first sentence does not say."""
        texts = []
        others = [(UNDISTILLED, "than before")] + [(SEQKD, "than SeqKD's")] * (SEQKD in self.results)
        for other, how in others:
            lost = [
                f"{label} ({format_value(key, self.results[other][key])} → {format_value(key, self.results[self.method][key])})"
                for key, label in table_metrics(self)
                if self._is_worse(other, key) and not (key == self.headline and other == SEQKD)
            ]
            if lost:
                texts.append(f"worse {how}: {', '.join(lost)}")
        return f" But {'; '.join(texts)}." if texts else ""

    def sense(self, metric: str) -> int:
        return sense(metric)

    def written(self, metric: str, value: float | None) -> str:
        return format_value(metric, value)

    @property
    def compared(self) -> list[tuple[str, str]]:
        metrics = table_metrics(self)
        if self.judged_metrics:
            metrics.insert(len(self.judged_metrics) * len(self.temperatures), (self.equal_diversity, EQUAL_DIVERSITY))
        return metrics

    @property
    def measured(self) -> list[tuple[str, str]]:
        return table_metrics(self)

    @property
    def explanation(self) -> str:
        evaluation, seqkd = self.evaluation, self.seqkd
        text = []
        if evaluation:
            text.append(
                f"Measured on {evaluation['prompts']} held-out prompts, {evaluation['samples']} samples each (one when "
                f"greedy) of at most {evaluation['max_new_tokens']} tokens, with seed {evaluation['seed']}."
            )
        if self.differences:
            text.append(
                "Verdicts and differences have 95 % intervals, over prompts drawn anew, on which both students answered (none with "
                "fewer than 6): another seed of the training may differ by more."
            )
        if any(has_interval(found.get(self.equal_diversity)) for found in self.differences.values()):
            text.append(
                f"Quality at equal diversity is the mean difference of `{self.judged_metrics[0]}` where both students' answers, "
                "sampled at several temperatures, have as many distinct 4-grams (among the samples of a prompt, where there are several): "
                "sampling colder gains nothing there."
            )
        if self.judged_metrics:
            mean = f"`{self.judged_metrics[0]}` is the judge's mean"
            is_counted = any(key.startswith("distinct_valid") for key, _ in self.measured)
            text.append(
                f"{mean}; distinct answers are different pairs of prompt and answer, counted."
                if is_counted
                else f"{mean}."
            )
        else:
            text.append("Distinct answers is the share of different pairs of prompt and answer among the samples.")
        text.append(
            "Length is in the student's tokens; truncated is the share of answers cut at the limit; teacher NLL is in nats "
            "per token of the teacher's held-out answers (coverage: lower is better)."
        )
        text += self.column_explanations()
        if seqkd:
            text.append(
                f"SeqKD is supervised fine-tuning of the same student on the same text for the same {seqkd['steps']} "
                f"optimizer steps of {seqkd['batch_size']} prompts at learning rate {seqkd['learning_rate']:g}. Its column is "
                f"its best checkpoint, step {seqkd['best_step']}, chosen on these very prompts, which favours it; "
                f"{self.method} is measured at its last step."
            )
        return " ".join(text)

    def column_explanations(self) -> list[str]:
        """Sentences on the method's own columns of the table."""
        return []

    @property
    def derived(self) -> dict:
        return super().derived | {"warmup_steps": self.warmup_steps}

    def verdicts(self) -> list[Section]:
        if not self.verdicts_of_judge:
            return []
        return [Section("Judged beside the teacher", verdict_lines(self.verdicts_of_judge, self.sampled_at))]

    def draw_panels(self, panels: list) -> list:
        """
        Fill the four small panels of the picture.

        Args:
            panels (`list[matplotlib.axes.Axes]`):
                Their axes, row by row; [`~reports.axes`] and [`~reports.curves`] draw on them.

        Returns:
            `list`: those whose horizontal axis is the optimizer step.
        """
        from .curves import draw_training

        draw_training(panels, self)
        return panels

    def draw(self, folder: Path) -> None:
        from .curves import plot_curves

        plot_curves(self, folder / "curves.png")


def sense(metric: str) -> int:
    """Which way is better: 1 up, -1 down, 0 neither."""
    name = metric.partition("@")[0]
    return 0 if name in WITHOUT_BETTER else -1 if name in BETTER_WHEN_LOWER else 1


def decline(report: TextReport) -> list[dict]:
    """A warning where the student is worse than before it learned, by what the run is summed up by."""
    key = report.headline
    if not report._is_worse(UNDISTILLED, key):
        return []
    before, after = (format_value(key, report.results[name][key]) for name in (UNDISTILLED, report.method))
    label = dict(table_metrics(report))[key]
    step = report.curves[report.method][-1]["step"]
    text = (
        f"the student got worse: {label} is {after}, and was {before} before it learned. Lower learning_rate, train for fewer "
        "steps, or take an earlier checkpoint; with SeqKD's column as good or better, the data are not at fault."
    )
    return [{"kind": "worse", "step": step, "text": text}]


def table_metrics(report: TextReport) -> list[tuple[str, str]]:
    """Metric and label of each line of the table."""
    metrics = []
    for name in report.judged_metrics:
        for temperature in report.temperatures:
            metrics.append((f"{name}@{temperature_name(temperature)}", f"{name}, {in_short(temperature)}"))
    at, short = report.at, in_short(report.temperatures[0])
    if report.judged_metrics:
        # A judge that is not of 0 and 1 finds no answer that is simply right
        if any(result.get(f"distinct_valid@{at}") for result in report.results.values()):
            metrics.append((f"distinct_valid@{at}", f"distinct answers with {report.judged_metrics[0]} 1, {short}"))
    else:
        metrics.append((f"distinct_share@{at}", f"distinct answers, {short}"))
    return metrics + [
        ("teacher_nll", "teacher NLL"),
        (f"length@{at}", f"length, {short}"),
        (f"length_ratio@{at}", f"length / teacher's, {short}"),
        (f"truncated@{at}", f"truncated, {short}"),
    ]


def verdict_lines(found: dict, sampled_at: str) -> list[str]:
    """Lines of Markdown: what a judge said of each student, with its interval."""
    students = found["students"]
    metrics = list(dict.fromkeys(name for metrics in students.values() for name in metrics))

    def cell(metric: dict | None) -> str:
        if metric is None:
            return "–"
        value = format_value("", metric["value"])
        has_ends = math.isfinite(metric["low"])
        return f"{value} ({metric['low']:.3f} to {metric['high']:.3f})" if has_ends else value

    rows = [[name, *(cell(judged.get(metric)) for metric in metrics)] for name, judged in students.items()]
    prompts = max((metric["prompts"] for judged in students.values() for metric in judged.values()), default=0)
    return [
        *table(["", *map(code, metrics)], rows),
        "",
        f"By {code(found['judge'])}, of {prompts:,} prompts and the first sample at {sampled_at} of each, in both orders. 0.5 is as good "
        f"as the teacher; intervals are over prompts. Verdicts that failed or could not be read: {found['missing']:,}.",
    ]


def in_short(temperature: float) -> str:
    return f"T={temperature}" if temperature else "greedy"


def format_value(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if metric.startswith("distinct_valid"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if metric.startswith("length@") else f"{value:.3f}"
