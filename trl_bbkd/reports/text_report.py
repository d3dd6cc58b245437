"""The report of a student that writes text."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.student import TEMPERATURES, temperature_name
from .markdown import table
from .report import SEQKD, UNDISTILLED, Report, Section, duration
from .uncertainty import is_clear


PROXY = "proxy"
OWN_METRICS = ("length", "length_ratio", "truncated", "distinct_valid", "distinct_share")


@dataclass(kw_only=True)
class TextReport(Report):
    """
    A run whose student writes text.

    Args:
        evaluation (`dict`):
            How results were measured: `prompts`, `samples`, `max_new_tokens`, `seed`.
        seqkd (`dict`):
            What the baseline was: `steps`, `best_step`, `batch_size`, `learning_rate`.
        stages (`list[dict]`):
            What the stages before and with the student's training did: `stage`, `rows`, `seconds` and `metrics`, a
            list of what was measured `at` which moment.
        calibration (`dict`):
            How well Bayes-KD's estimate predicts held-out teacher text, as of [`~bayeskd.calibration.calibration`].
        results, curves, kwargs:
            As in [`~reports.report.Report`]; metrics are those of [`~evaluation.student.evaluate_student`], of `"teacher"`,
            `"undistilled"`, `"SeqKD"` and the method.
    """

    evaluation: dict = field(default_factory=dict)
    seqkd: dict = field(default_factory=dict)
    stages: list[dict] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)

    @property
    def judged_metrics(self) -> list[str]:
        """Names of the judge's metrics, the deciding one first; empty without a judge."""
        names = [key.partition("@")[0] for key in self.results[self.method] if key.endswith("@t1.0")]
        return [name for name in names if name not in OWN_METRICS]

    @property
    def headline(self) -> str:
        """The metric the run is summed up by."""
        return f"{self.judged_metrics[0]}@t1.0" if self.judged_metrics else "teacher_nll"

    @property
    def warmup_steps(self) -> float:
        """Optimizer steps of warm-up, from the phase in the log."""
        steps, previous = 0.0, 0
        for entry in self.log_history:
            if "adversarial_phase" in entry:
                steps += (1 - entry["adversarial_phase"]) * (entry["step"] - previous)
                previous = entry["step"]
        return steps

    @property
    def summary(self) -> str:
        key, results, method = self.headline, self.results, self.method
        judged = key != "teacher_nll"
        name = f"`{self.judged_metrics[0]}` at temperature 1.0" if judged else "The NLL of held-out teacher answers"
        value = {model: format_value(key, metrics.get(key)) for model, metrics in results.items()}
        text = f"{name} is {value[method]} after {method} and {value[UNDISTILLED]} before"
        if SEQKD in results:
            text += f"; SeqKD on the same text reaches {value[SEQKD]}: {self.verdict(SEQKD, key, not judged)}"
            if not judged:
                text += ". NLL is what SeqKD minimises; to compare the answers themselves, name a judge as `sample_metrics`"
        return f"{text}.{self._losses()}"

    def _losses(self) -> str:
        """What else the student lost, that the first sentence does not say."""
        texts = []
        others = [(UNDISTILLED, "than before")] + [(SEQKD, "than SeqKD's")] * (SEQKD in self.results)
        for other, how in others:
            lost = [
                f"{label} ({format_value(key, self.results[other][key])} → {format_value(key, self.results[self.method][key])})"
                for key, label in table_metrics(self)
                if key != self.headline and self._is_worse(other, key)
            ]
            if lost:
                texts.append(f"worse {how}: {', '.join(lost)}")
        return f" But {'; '.join(texts)}." if texts else ""

    def _is_worse(self, other: str, key: str) -> bool:
        """Whether the method's student is clearly worse than another one by this metric of the judge, or by NLL."""
        found = self.differences.get(other, {}).get(key)
        return is_clear(found) and (found["difference"] > 0) == (key == "teacher_nll")

    @property
    def rows(self) -> list[list[str]]:
        return [
            [label, *(format_value(key, self.results[model].get(key)) for model in self.columns)]
            for key, label in table_metrics(self)
        ]

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
                "A verdict takes two standard errors, over prompts and samples: another seed of the training may differ by more."
            )
        if self.judged_metrics:
            text.append(
                f"`{self.judged_metrics[0]}` is the judge's mean; distinct answers are different pairs of prompt and answer, "
                "counted."
            )
        else:
            text.append("Distinct answers is the share of different pairs of prompt and answer among the samples.")
        text.append(
            "Length is in the student's tokens; truncated is the share of answers cut at the limit; teacher NLL is in nats "
            "per token of the teacher's held-out answers (coverage: lower is better)."
        )
        if PROXY in self.results:
            text.append(
                f"The proxy is the open model that {self.method} learned from beside the teacher's text, as it was then; it was "
                "sampled at temperature 1.0 only."
            )
        if seqkd:
            text.append(
                f"SeqKD is supervised fine-tuning of the same student on the same text for the same {seqkd['steps']} "
                f"optimizer steps of {seqkd['batch_size']} prompts at learning rate {seqkd['learning_rate']:g}. Its column is "
                f"its best checkpoint, step {seqkd['best_step']}, chosen on these very prompts, which favours it; "
                f"{self.method} is measured at its last step."
            )
        return " ".join(text)

    @property
    def derived(self) -> dict:
        return super().derived | {"warmup_steps": self.warmup_steps}

    def sections(self) -> list[Section]:
        found = []
        if self.stages:
            found.append(Section("Stages", [*stages_table(self.stages), "", stages_explanation(self.stages)]))
        if self.calibration:
            lines = [*calibration_table(self.calibration), "", calibration_explanation(self.calibration)]
            found.append(Section("Calibration of the estimate", lines))
        return found

    def draw(self, folder: Path) -> None:
        from .curves import plot_curves

        plot_curves(self, folder / "curves.png")


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
        for temperature in TEMPERATURES:
            label = f"{name}, T={temperature}" if temperature else f"{name}, greedy"
            metrics.append((f"{name}@{temperature_name(temperature)}", label))
    if report.judged_metrics:
        metrics.append(("distinct_valid@t1.0", f"distinct answers with {report.judged_metrics[0]} 1, T=1.0"))
    else:
        metrics.append(("distinct_share@t1.0", "distinct answers, T=1.0"))
    return metrics + [
        ("teacher_nll", "teacher NLL"),
        ("length@t1.0", "length, T=1.0"),
        ("length_ratio@t1.0", "length / teacher's, T=1.0"),
        ("truncated@t1.0", "truncated, T=1.0"),
    ]


def format_value(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if metric.startswith("distinct_valid"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if metric.startswith("length@") else f"{value:.3f}"


STAGES_EXPLANATION = (
    "Top-1 agreement is the share of held-out answer tokens that are the proxy's likeliest ones, and NLL its negative "
    "log-likelihood of them, in nats per token: before the stage, after each round, after the stage."
)


def stages_explanation(stages: list[dict]) -> str:
    """What the table of stages says, and what of a stage it has no room for."""
    seen_once = [
        entry["contexts_seen_once"] for stage in stages for entry in stage["metrics"] if "contexts_seen_once" in entry
    ]
    text = [STAGES_EXPLANATION]
    text += [
        f"{share:.1%} of the answer tokens have an n-gram context that was seen once: there, without back-off, the "
        "prior is the token itself."
        for share in seen_once
    ]
    return " ".join(text)


def stages_table(stages: list[dict]) -> list[str]:
    """Lines of a Markdown table of the stages, one line a stage."""

    def course(stage: dict, name: str, digits: int) -> str:
        return " → ".join(f"{entry[name]:.{digits}f}" for entry in stage["metrics"] if name in entry) or "–"

    rows = [
        [
            stage["stage"],
            f"{stage['rows']:,}",
            duration(stage["seconds"]),
            course(stage, "top1_agreement", 3),
            course(stage, "nll", 3),
        ]
        for stage in stages
    ]
    return table(["stage", "rows", "time", "proxy's top-1 agreement", "proxy's NLL"], rows)


def calibration_table(calibration: dict) -> list[str]:
    """Lines of a Markdown table: NLL of held-out teacher text by concentration κ (lines) and draws K (columns)."""
    draws = sorted({entry["draws"] for entry in calibration["table"]})
    values = {(entry["concentration"], entry["draws"]): entry["expected"] for entry in calibration["table"]}
    rows = [
        [f"κ = {kappa:g}", *(f"{values[kappa, count]:.3f}" for count in draws)]
        for kappa in sorted({k for k, _ in values})
    ]
    return table(["posterior", *(f"K = {count}" for count in draws)], rows)


def calibration_explanation(calibration: dict) -> str:
    """What the calibration's numbers are, and those of prior and proxy."""
    return (
        f"NLL of {calibration['tokens']:,} held-out teacher tokens, in nats per token, that the estimate was not made from. "
        f"The n-gram prior (γ = 1: an estimate must not know the token it is judged on) has {calibration['prior']:.3f}, the proxy "
        f"{calibration['proxy']:.3f}, the posterior with K = {calibration['draws']} and κ = {calibration['concentration']:g} "
        f"{calibration['posterior']:.3f} in expectation, as in the table, and {calibration['posterior_drawn']:.3f} as drawn."
    )
