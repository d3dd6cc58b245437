"""Markdown tables of what was measured."""

import statistics


def markdown(header: list, rows: list[list]) -> str:
    """The first column is words, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_of(results: list[dict], name: str, form: str = "{:.3f}") -> str:
    """Over the results that have it."""
    values = [result[name] for result in results if name in result]
    return form.format(statistics.fmean(values)) if values else "–"


def each_of(results: list[dict], name: str, form: str = "{:.3f}") -> str:
    return ", ".join(form.format(result[name]) for result in results)


def mean_and_each(values: list[float]) -> str:
    text = f"{statistics.fmean(values):.3f}"
    return text if len(values) == 1 else text + f" ({' '.join(f'{value:.3f}' for value in values)})"
