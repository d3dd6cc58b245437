"""The look that all pictures of a run share."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


STUDENT, SECOND, THIRD, INK, PALE, SHADE = "#2563eb", "#0d9488", "#d97706", "#374151", "#9ca3af", "#eef0f4"
STYLE = {"fontsize": 9, "color": INK}


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
    return figure, figure.add_subplot(grid[:, 0]), panels


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
    axes.plot(
        steps, [sum(window) / len(window) for window in windows], color=color, label=label, **{"lw": 1.6, **style}
    )


def set_title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold")


def mark_steps(axes, warmup_steps: float, last_step: int, label: bool) -> None:
    axes.set_xlim(0, last_step or 1)
    if warmup_steps > 0:
        axes.axvspan(0, warmup_steps, color=SHADE, lw=0, zorder=0)
        if label:
            axes.annotate(
                "warm-up",
                (warmup_steps / 2, 0.1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8.5,
                color="#6b7280",
            )


def finish_axes(axes) -> None:
    axes.grid(axis="y", color="#e5e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
