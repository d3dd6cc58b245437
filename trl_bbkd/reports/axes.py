"""The look that all pictures of a run share."""

import math
from collections.abc import Collection

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .report import Report


STUDENT, SECOND, THIRD, INK, PALE, SHADE = "#2563eb", "#0d9488", "#d97706", "#374151", "#9ca3af", "#eef0f4"
STYLE = {"fontsize": 9, "color": INK}
LEGEND = {
    "frameon": False,
    "fontsize": 8.5,
    "labelcolor": INK,
    "handlelength": 1.4,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
    "labelspacing": 0.3,
}
# In points: a line of a legend, what stands beside a label, a character
LEGEND_LINE, HANDLE_WIDTH, CHARACTER_WIDTH = 13.5, 27, 4.7
LEAST_SPAN = 0.5  # of an axis, as a share of its largest value
FEW_POINTS = 12  # so few that each of them is marked


def run_figure():
    """
    Returns:
        `tuple`: a figure, its large axes on the left, and a list of four small ones on the right, row by row.
    """
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    grid = figure.add_gridspec(2, 3, width_ratios=[1.45, 1, 1])
    panels = [figure.add_subplot(grid[row, column]) for row in (0, 1) for column in (1, 2)]
    main = figure.add_subplot(grid[:, 0])
    # Their sizes are known from here on
    figure.draw_without_rendering()
    return figure, main, panels


def draw_line(axes, log: list[dict], key: str, color: str, label: str | None = None, **style) -> None:
    """A logged series: as it is, faintly, and its running mean."""
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    half = len(values) // 60
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    if half:
        axes.plot(steps, values, color=color, lw=0.7, alpha=0.3)
    style = {"lw": 1.6, **({"marker": "o", "ms": 3} if len(points) <= FEW_POINTS else {}), **style}
    axes.plot(steps, [sum(window) / len(window) for window in windows], color=color, label=label, **style)


def set_title(axes, text: str, pad: float = 6.0) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold", pad=pad)


def share_axis(axes) -> None:
    """The whole way from 0 to 1, for shares, probabilities and accuracies."""
    axes.set_ylim(-0.03, 1.03)


def reach(axes, low: float, high: float) -> None:
    """An axis that has `low` and `high` on it, whatever else."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, low), max(top, high))


def steps_drawn(report: Report) -> int:
    """The last optimizer step that something is drawn at."""
    entries = [*report.log_history, *(point for points in report.curves.values() for point in points)]
    return max((entry["step"] for entry in entries), default=0)


def mark_steps(axes, warmup_steps: float, last_step: int, label: bool) -> None:
    """A horizontal axis of optimizer steps, those of the warm-up shaded."""
    axes.set_xlim(0, last_step or 1)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if warmup_steps > 0:
        axes.axvspan(0, warmup_steps, color=SHADE, lw=0, zorder=0)
        if label:
            axes.annotate(
                "warm-up",
                (warmup_steps / 2, 0.88),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=8.5,
                color="#6b7280",
            )


def finish_axes(*row, without_legend: Collection = ()) -> None:
    """Axes that stand side by side: what they share, their legends, and the titles over those at one height."""
    lines = max(0 if axes in without_legend else _add_legend(axes) for axes in row)
    for axes in row:
        set_title(axes, axes.get_title(loc="left"), pad=6 + lines * LEGEND_LINE)
        if axes.get_autoscaley_on():
            _widen(axes)
        axes.grid(axis="y", color="#e5e7eb", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9ca3af")
        axes.tick_params(colors=INK, labelsize=8.5, length=3)


def _widen(axes) -> None:
    """Around its values alone, an axis would make a cliff of a ripple."""
    low, high = axes.get_ylim()
    missing = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)


def _add_legend(axes) -> int:
    """A legend above the axes, where no line crosses it; returns how many lines of text it has."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return 0
    width = 72 * axes.figure.get_figwidth() * axes.get_position().width
    columns = legend_columns(labels, width)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.1, **LEGEND)
    return math.ceil(len(labels) / columns)


def legend_columns(labels: list[str], width: float) -> int:
    """How many columns of a legend fit into `width` points, estimated from the lengths of its labels."""
    for columns in range(len(labels), 1, -1):
        parts = np.array_split(labels, columns)  # as a legend divides them
        if sum(HANDLE_WIDTH + CHARACTER_WIDTH * max(map(len, part)) for part in parts) <= width:
            return columns
    return 1
