"""What an experiment tracker is told of a report: numbers by name, and tables."""

import math

from .comparison import prompt_text
from .report import Report, finite


PREFIX = "report/"
COMPLETIONS = 32  # most prompts in a table of a tracker, which shows all of it at once


def report_scalars(report: Report) -> dict[str, float]:
    """
    The numbers of a report by their names in a tracker.

    The method's student has no name of its own in them, so that the runs of a project share a name for it: `report/<metric>`.
    Other columns of the table are `report/<column>/<metric>`, differences `report/less_<column>/<metric>`; the table of
    differences has their intervals.
    """
    found = {
        f"{_prefix(name, report)}{metric}": value
        for name, metrics in report.results.items()
        for metric, value in metrics.items()
    }
    found |= {
        f"{PREFIX}less_{_in_a_name(name)}/{metric}": difference["difference"]
        for name, differences in report.differences.items()
        for metric, difference in differences.items()
    }
    found[f"{PREFIX}warnings"] = len(report.warnings)
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def report_tables(report: Report, lines: list[dict]) -> dict[str, list[dict]]:
    """
    The tables of a report by their names in a tracker, each a list of rows.

    Args:
        report ([`Report`]):
            The report.
        lines (`list[dict]`):
            What its students said to held-out prompts, as of [`~reports.held_out.prompt_lines`]; `[]` if they do not write.
    """
    labels = dict(report.compared)
    tables = {
        "table": [dict(zip(("metric", *report.columns), row, strict=True)) for row in report.rows],
        "differences": [
            {"metric": labels[metric], "less": name, **{key: found[key] for key in ("difference", "low", "high")}}
            for name, differences in report.differences.items()
            for metric, found in differences.items()
            if metric in labels
        ],
        "warning_texts": [{"step": warning["step"], "warning": warning["text"]} for warning in report.warnings],
        "completions": completions_table(lines[:COMPLETIONS], report.headline),
    }
    return {PREFIX + name: finite(rows) for name, rows in tables.items() if rows}


def completions_table(lines: list[dict], metric: str) -> list[dict]:
    """A row for each of `lines`: the prompt, the teacher's first answer, and of each student the first and its value by `metric`."""
    rows = []
    for line in lines:
        row = {"prompt": prompt_text(line["prompt"]), "teacher": line["teacher"][0]}
        for name, found in line["students"].items():
            row[name] = next(iter(found["samples"].values()))[0]
            row[f"{name}, {metric}"] = found["values"].get(metric)
        rows.append(row)
    return rows


def _prefix(column: str, report: Report) -> str:
    return PREFIX if column == report.method else f"{PREFIX}{_in_a_name(column)}/"


def _in_a_name(column: str) -> str:
    return column.replace(" ", "_")
