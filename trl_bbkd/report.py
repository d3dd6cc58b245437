"""The report of a run: `report.md`, `curves.png`, `metrics.json` and the table on the terminal."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .evaluation import TEMPERATURES, temperature_name
from .markdown import code, escape, fenced, table
from .redaction import SECRET
from .teacher_data import TeacherDataCounts


TEACHER, UNDISTILLED, SEQKD, PROXY = "teacher", "undistilled", "SeqKD", "proxy"
OWN_METRICS = ("length", "length_ratio", "truncated", "distinct_valid", "distinct_share")


@dataclass
class RunReport:
    """
    Everything a run has to say. Curves and log entries are dictionaries with `step`.

    Args:
        method (`str`):
            Name of the method, such as `"GAD"`.
        student (`str`):
            Checkpoint the student started from.
        teacher (`str`, *optional*):
            Name of the black-box teacher.
        results (`dict[str, dict[str, float]]`):
            Final metrics of `"teacher"`, `"undistilled"`, `"SeqKD"` and the method, as of
            [`~evaluation.evaluate_student`].
        curves (`dict[str, list[dict]]`):
            Metrics along the way, of the method and of `"SeqKD"`.
        log_history (`list[dict]`):
            The trainer's log.
        counts (`dict[str, TeacherDataCounts]`):
            Data counts per split.
        inputs (`dict`):
            What tells one run from another: method, student and data.
        command (`str`, *optional*):
            How to repeat the run.
        settings (`dict`):
            What the recipe says, without secrets.
        evaluation (`dict`):
            How results were measured: `prompts`, `samples`, `max_new_tokens`, `seed`.
        seqkd (`dict`):
            What the baseline was: `steps`, `best_step`, `batch_size`, `learning_rate`.
        versions (`dict[str, str]`):
            Versions of libraries.
        seconds (`dict[str, float]`):
            Wall-clock time per part of the run.
        stages (`list[dict]`):
            What the stages before and with the student's training did: `stage`, `rows`, `seconds` and `metrics`, a
            list of what was measured `at` which moment.
        calibration (`dict`):
            How well Bayes-KD's estimate predicts held-out teacher text, as of [`~bayeskd.calibration.calibration`].
        warnings (`list[dict]`):
            What went wrong during training: `step` and `text`.
    """

    method: str
    student: str
    teacher: str | None
    results: dict[str, dict[str, float]]
    curves: dict[str, list[dict]]
    log_history: list[dict]
    counts: dict[str, TeacherDataCounts]
    inputs: dict = field(default_factory=dict)
    command: str | None = None
    settings: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    seqkd: dict = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stages: list[dict] = field(default_factory=list)
    calibration: dict = field(default_factory=dict)
    warnings: list[dict] = field(default_factory=list)

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


def table_metrics(report: RunReport) -> list[tuple[str, str]]:
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


def table_models(report: RunReport) -> list[str]:
    """Columns of the table: the teacher closes."""
    return sorted(report.results, key=lambda name: name == TEACHER)


def table_rows(report: RunReport) -> list[list[str]]:
    """Cells of the table: a label, then one value per column of [`table_models`]."""
    models = table_models(report)
    return [
        [label, *(format_value(key, report.results[model].get(key)) for model in models)]
        for key, label in table_metrics(report)
    ]


def summary(report: RunReport) -> str:
    """One sentence with the deciding numbers, whichever way they point."""
    key, results, method = report.headline, report.results, report.method
    judged = key != "teacher_nll"
    name = f"`{report.judged_metrics[0]}` at temperature 1.0" if judged else "The NLL of held-out teacher answers"
    value = {model: format_value(key, metrics.get(key)) for model, metrics in results.items()}
    text = f"{name} is {value[method]} after {method} and {value[UNDISTILLED]} before"
    if SEQKD not in results:
        return text + "."
    gain = round((results[method][key] - results[SEQKD][key]) * (1 if judged else -1), 3)
    verdict = "better than" if gain > 0 else "worse than" if gain < 0 else "equal to"
    text += f"; SeqKD on the same text reaches {value[SEQKD]}, so {method} is {verdict} it"
    text += f" by {abs(gain):.3f}" if gain else ""
    if not judged:
        text += ". NLL is what SeqKD minimises; to compare the answers themselves, name a judge as `sample_metrics`"
    return text + "."


def render_markdown(report: RunReport) -> str:
    """The text of `report.md`."""
    teacher = escape(report.teacher or "a black-box teacher")
    lines = [f"# {report.method}: {code(report.student)} from {teacher}", "", summary(report), ""]
    lines += table(["", *table_models(report)], table_rows(report))
    lines += ["", explanation(report), "", "![Curves of the run](curves.png)", ""]
    if report.warnings:
        lines += [
            "## Warnings",
            "",
            *(f"* Step {warning['step']}: {warning['text']}" for warning in report.warnings),
            "",
        ]
    if report.stages:
        lines += ["## Stages", "", *stages_table(report.stages), "", stages_explanation(report.stages), ""]
    if report.calibration:
        lines += ["## Calibration of the estimate", "", *calibration_table(report.calibration), ""]
        lines += [calibration_explanation(report.calibration), ""]
    lines += ["## Teacher data", "", *counts_table(report.counts), "", "## Reproduce", ""]
    if report.command:
        lines += [fenced(report.command, "bash"), ""]
    if report.settings:
        settings = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True)
        lines += ["The recipe:", "", fenced(settings, "yaml"), ""]
    lines += [", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".", ""]
    times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in report.seconds.items())
    return "\n".join(lines + [f"Wall-clock time: {times}.", ""] if times else lines)


def counts_table(counts: dict[str, TeacherDataCounts]) -> list[str]:
    """Lines of a Markdown table of data counts, one column a split."""
    cells = {split: dict(split_counts.table_rows()) for split, split_counts in counts.items()}
    labels = next(iter(cells.values()))
    return table(["", *cells], [[label, *(cells[split][label] for split in cells)] for label in labels])


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
        f"{share:.1%} of the answer tokens have an n-gram context that was seen once: there the prior is the token itself."
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
            _duration(stage["seconds"]),
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


def explanation(report: RunReport) -> str:
    """What the table's numbers are, and how they were measured."""
    evaluation, seqkd = report.evaluation, report.seqkd
    text = []
    if evaluation:
        text.append(
            f"Measured on {evaluation['prompts']} held-out prompts, {evaluation['samples']} samples each (one when "
            f"greedy) of at most {evaluation['max_new_tokens']} tokens, with seed {evaluation['seed']}."
        )
    if report.judged_metrics:
        text.append(
            f"`{report.judged_metrics[0]}` is the judge's mean; distinct answers are different pairs of prompt and answer, "
            "counted."
        )
    else:
        text.append("Distinct answers is the share of different pairs of prompt and answer among the samples.")
    text.append(
        "Length is in the student's tokens; truncated is the share of answers cut at the limit; teacher NLL is in nats "
        "per token of the teacher's held-out answers (coverage: lower is better)."
    )
    if PROXY in report.results:
        text.append(
            f"The proxy is the open model that {report.method} learned from beside the teacher's text, as it was then; it was "
            "sampled at temperature 1.0 only."
        )
    if seqkd:
        text.append(
            f"SeqKD is supervised fine-tuning of the same student on the same text for the same {seqkd['steps']} "
            f"optimizer steps of {seqkd['batch_size']} prompts at learning rate {seqkd['learning_rate']:g}. Its column is "
            f"its best checkpoint, step {seqkd['best_step']}, chosen on these very prompts, which favours it; "
            f"{report.method} is measured at its last step."
        )
    return " ".join(text)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def metrics_dict(report: RunReport) -> dict:
    """Everything in `report`, fit for strict JSON: what is not a finite number is `None`."""
    return _finite(
        dataclasses.asdict(report)
        | {"headline": report.headline, "warmup_steps": report.warmup_steps, "summary": summary(report)}
    )


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
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


def print_table(report: RunReport, console=None) -> None:
    """Print the table and the sentence under it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.method}: {report.student} from {report.teacher or 'a black-box teacher'}")
    table.add_column("")
    for model in table_models(report):
        style = "bold" if model == report.method else "dim" if model == TEACHER else None
        table.add_column(model, justify="right", style=style)
    for row in table_rows(report):
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    console.print(summary(report).replace("`", ""), markup=False)


def write_report(report: RunReport, output_dir: str | Path) -> None:
    """Write `report.md`, `curves.png` and `metrics.json` to `output_dir`."""
    from .curves import plot_curves

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    text = json.dumps(metrics_dict(report), indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    plot_curves(report, folder / "curves.png")
