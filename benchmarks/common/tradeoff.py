"""Quality against diversity, where a student that only samples colder moves along its own curve."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trl_bbkd.reports.axes import INK, LEGEND, PALE, STUDENT, STYLE, THIRD, set_title


# Of the students a reader should tell apart; the others are pale
COLORS = {
    "SeqKD at its plateau": THIRD,
    "GAD, anchored": STUDENT,
    "Proxy-KD, on policy": "#7c3aed",
    "PreferenceKD, judge: discriminator": "#0d9488",
    "GAD": "#be123c",
}


def plot(
    path: Path, title: str, quality: str, diversity: str, curves: dict[str, dict[str, tuple[float, float]]]
) -> None:
    """
    Args:
        path (`Path`):
            PNG file to write.
        title, quality, diversity (`str`):
            Of the picture and its axes.
        curves (`dict[str, dict[str, tuple[float, float]]]`):
            Of each student, by temperature, diversity and quality.
    """
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in sorted(curves.items(), key=lambda item: item[0] in COLORS):
        color = COLORS.get(name, PALE)
        is_named = name in COLORS
        axes.plot(
            *zip(*points.values(), strict=True),
            color=color,
            lw=1.8 if is_named else 0.9,
            marker="o",
            ms=4 if is_named else 2,
            label=name if is_named else None,
        )
        axes.plot(*points["1.0"], color=color, marker="o", ms=9 if is_named else 4)
    if any(name not in COLORS for name in curves):
        axes.plot([], [], color=PALE, lw=0.9, label="other arms of the table")
    for temperature, (x, y) in curves["SeqKD at its plateau"].items():
        axes.annotate(f"T={temperature}", (x, y), xytext=(-8, -9), textcoords="offset points", ha="right", **STYLE)
    qualities, diversities = zip(
        *[point[::-1] for name in COLORS if name in curves for point in curves[name].values()], strict=True
    )
    for limits, values in ((axes.set_xlim, diversities), (axes.set_ylim, qualities)):
        margin = 0.04 * (max(values) - min(values))
        limits(min(values) - margin, max(values) + margin)
    axes.set_xlabel(diversity, **STYLE)
    axes.set_ylabel(quality, **STYLE)
    axes.grid(color="#e5e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    axes.legend(loc="lower left", **LEGEND)
    set_title(axes, title)
    figure.savefig(path, dpi=150)
