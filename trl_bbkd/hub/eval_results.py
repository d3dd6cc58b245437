"""A report's results as the Hub reads them in a card's metadata: `model-index`."""

import math
from pathlib import Path

from huggingface_hub import EvalResult

from ..evaluation.intervals import LEVEL
from ..reports.report import Report
from .names import hub_id


HELD_OUT = "held-out"
UNKNOWN = "unknown"  # a name of a folder here may be that of somebody's data set there


def eval_results(report: Report, datasets: list[str], task: str, repo_id: str) -> list[EvalResult]:
    """
    What the method's student reached on held-out rows, by each metric of the report's table of which more, or less, is better.

    Args:
        report ([`~reports.report.Report`]):
            The finished run.
        datasets (`list[str]`):
            Where the teacher's text came from: paths or Hub ids.
        task (`str`):
            The Hub's name of the task, such as `"text-generation"`.
        repo_id (`str`):
            The student's repository on the Hub, or where it lies.
    """
    values = report.results[report.method]
    name = ", ".join(dataset if hub_id(dataset) else Path(dataset).name for dataset in datasets)
    repository = hub_id(repo_id)
    return [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0] if len(datasets) == 1 and hub_id(datasets[0]) else UNKNOWN,
            dataset_name=name or UNKNOWN,
            dataset_split=HELD_OUT,
            metric_type=key.partition("@")[0],
            metric_name=label,
            metric_value=_rounded(values[key]),
            metric_args=_interval(report, key),
            verified=False,
            source_name="metrics.json" if repository else None,
            source_url=source_url(repository) if repository else None,
        )
        for key, label in report.compared
        if _is_number(values.get(key)) and report.sense(key)
    ]


def source_url(repo_id: str) -> str:
    """Where all numbers of a student are that was pushed."""
    return f"https://huggingface.co/{repo_id}/blob/main/metrics.json"


def _interval(report: Report, metric: str) -> dict | None:
    """The Hub's format has no place for an interval but a metric's arguments."""
    ends = report.intervals.get(metric, ())
    if not ends or not all(map(_is_number, ends)):
        return None
    low, high = map(_rounded, ends)
    return {"interval": LEVEL, "low": low, "high": high}


def _is_number(value) -> bool:
    return value is not None and math.isfinite(value)


def _rounded(value: float) -> float:
    return round(value, 4)
