"""What is said of benchmarks: a table, and the same as JSON."""

import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ..evaluation.intervals import FEWEST_PROMPTS, LEVEL
from ..reports.markdown import code, escape, table
from .settings import TasksConfig


HEAD = ["task", "version", "filter", "n-shot", "metric", "value", "95 % interval", "rows"]
READING = (
    "↑: more is better, ↓: less is. Intervals are over rows: the value ± 1.96 of lm_eval's standard errors. Fewer than "
    f"{FEWEST_PROMPTS} rows have none, nor have values that are all the same."
)


@dataclass
class Result:
    """
    One metric of one task or group.

    Attributes:
        task (`str`): its name.
        version (`str`): its version, as its file has it.
        filter (`str`): what lm_eval made of the answers first.
        n_shot (`int` or `None`): examples before each question.
        metric (`str`): the metric's name.
        value (`float` or `None`): its value, where that is a number.
        standard_error (`float` or `None`): of the value.
        low, high (`float` or `None`): the interval's ends.
        rows, of (`int` or `None`): rows that were asked, and all rows there are.
        higher_is_better (`bool` or `None`): of the metric.
    """

    task: str
    version: str
    filter: str
    n_shot: int | None
    metric: str
    value: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    rows: int | None
    of: int | None
    higher_is_better: bool | None


def results_of(found: dict[str, Any]) -> list[Result]:
    """What lm_eval found, a result a metric and filter."""
    results = []
    for task, values in found["results"].items():
        counts = found["n-samples"].get(task, {})
        rows = values.get("sample_len")
        for name, value in values.items():
            metric, comma, kind = name.rpartition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            value, error = _number(value), _number(values.get(f"{metric}_stderr,{kind}"))
            low, high = _interval(value, error, rows)
            better = found["higher_is_better"].get(task, {}).get(metric)
            version, shots = str(found["versions"].get(task)), found["n-shot"].get(task)
            counted = (rows, counts.get("original"))
            results.append(Result(task, version, kind, shots, metric, value, error, low, high, *counted, better))
    return results


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _interval(value: float | None, error: float | None, rows: int | None) -> tuple[float | None, float | None]:
    if value is None or not error or (rows or 0) < FEWEST_PROMPTS:
        return None, None
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    return value - half, value + half


def warnings_of(settings: TasksConfig, results: list[Result]) -> list[str]:
    """What whoever reads the table should know."""
    cut = list(dict.fromkeys(result.task for result in results if result.of and (result.rows or 0) < result.of))
    if settings.limit is None or not cut:
        return []
    more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
    return [
        f"--limit {settings.limit:g}: of {', '.join(cut[:3])}{more} the first rows alone were asked. Do not set these values "
        "beside others'."
    ]


def as_json(settings: TasksConfig, version: str, results: list[Result], warnings: list[str]) -> dict[str, Any]:
    """Everything as JSON has it: what is unknown is `None`."""
    said = dataclasses.asdict(settings)
    del said["output_dir"]
    return {
        **said,
        "lm_eval": version,
        "results": [dataclasses.asdict(result) for result in results],
        "warnings": warnings,
    }


def markdown(settings: TasksConfig, version: str, results: list[Result], warnings: list[str]) -> str:
    """The section of the page."""
    lines = ["## Benchmarks", ""]
    for warning in warnings:
        lines += [f"> Warning: {escape(warning)}", ""]
    lines += [*table(HEAD, [_row(result) for result in results]), "", READING, ""]
    template = (
        "rendered with the student's chat template" if settings.apply_chat_template else "without a chat template"
    )
    lines += [f"* {code(settings.model)}, asked by lm_eval {version}, {template}."]
    return "\n".join([*lines, ""])


def _row(result: Result) -> list[str]:
    arrow = {True: " ↑", False: " ↓", None: ""}[result.higher_is_better]
    rows = "–" if result.rows is None else f"{result.rows:,}"
    if result.of and result.rows is not None and result.rows < result.of:
        rows += f" of {result.of:,}"
    interval = "–" if result.low is None else f"{result.low:.3f} to {result.high:.3f}"
    return [
        code(result.task),
        escape(result.version),
        escape(result.filter),
        "–" if result.n_shot is None else str(result.n_shot),
        f"{code(result.metric)}{arrow}",
        "–" if result.value is None else f"{result.value:.3f}",
        interval,
        rows,
    ]
