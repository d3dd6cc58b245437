"""A line chart as SVG inside a page, which colours it."""

import math
from collections.abc import Mapping, Sequence
from html import escape


# In light and dark
COLORS = (
    ("#2563eb", "#b45309", "#0d9488", "#9333ea", "#dc2626", "#4b5563"),
    ("#60a5fa", "#fbbf24", "#2dd4bf", "#c084fc", "#f87171", "#d1d5db"),
)
# Of lines, so that who sees no colours tells them apart, and the same as borders
DASHES = (("none", "solid"), ("7 4", "dashed"), ("2 3", "dotted"))
WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 360, 236, 46, 40, 8
TICKS = 4


def line_chart(title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """
    A `<figure>` with a line for each series, in the colours `--c0`, `--c1`, ... of the page.

    Args:
        title (`str`):
            What the vertical axis is.
        x_label (`str`):
            What the horizontal one is.
        series (`Mapping[str, Sequence[tuple[float, float]]]`):
            Points of each line, in the order in which they are joined.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    (x_low, x_high), (y_low, y_high) = (_span([point[axis] for point in points]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - EDGE)
        return right, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - EDGE)

    parts = []
    for value in _ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for number, line in enumerate(series.values()):
        color = _color(number)
        placed = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{DASHES[number % len(DASHES)][0]}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in placed]
    legend = "".join(f"<span>{line_mark(number)}{escape(name)}</span>" for number, name in enumerate(series))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )


def line_mark(number: int) -> str:
    """What tells the line of that number beside its name."""
    return f'<i style="border-color: {_color(number)}; border-style: {DASHES[number % len(DASHES)][1]} none none"></i>'


def _color(number: int) -> str:
    return f"var(--c{number % len(COLORS[0])})"


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS + 1)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]
