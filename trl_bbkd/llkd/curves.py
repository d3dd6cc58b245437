"""The picture of a run of LLKD."""

import textwrap
from pathlib import Path

from ..reports.axes import (
    INK,
    LEGEND,
    PALE,
    SECOND,
    STUDENT,
    STYLE,
    THIRD,
    draw_line,
    finish_axes,
    legend_columns,
    mark_steps,
    run_figure,
    set_title,
    share_axis,
    steps_drawn,
)
from ..reports.report import UNDISTILLED, Report


OTHERS_COLORS = (THIRD, SECOND)  # of what the method is compared with
CLASS_COLORS = ("#2563eb", "#d97706", "#0d9488", "#9333ea", "#dc2626", "#65a30d", "#0891b2", "#be185d")


def plot_curves(report: Report, path: str | Path) -> None:
    """
    Draw the run: macro F1 of the method and of what it is compared with, which rows were kept, the thresholds of the
    classes (the largest eight), and how often the teacher was right about kept and dropped rows.

    Args:
        report ([`~llkd.report.LLKDReport`]):
            The run.
        path (`str` or `Path`):
            PNG file to write.
    """
    figure, main, panels = run_figure()
    others = [name for name in report.curves if name != report.method]
    colors = {report.method: STUDENT, **dict(zip(others, OTHERS_COLORS, strict=False))}
    for name, points in report.curves.items():
        color = colors[name]
        values = [(point["step"], point[report.headline]) for point in points]
        above = 3 if name == report.method else 2
        main.plot(
            *zip(*values, strict=True), color=color, lw=1.8, marker="o", ms=4, clip_on=False, label=name, zorder=above
        )
    main.axhline(report.results[UNDISTILLED][report.headline], color=PALE, lw=1, ls="--", label=UNDISTILLED)
    set_title(main, f"Macro F1 against {report.truth}")

    log = [entry for entry in report.log_history if "loss" in entry]
    classes = report.counts["train"].classes
    largest = sorted(range(len(classes)), key=lambda number: -classes[report.class_names[number]])[: len(CLASS_COLORS)]
    for color, number in zip(CLASS_COLORS, sorted(largest), strict=False):
        style: dict = {
            "color": color,
            "label": textwrap.shorten(report.class_names[number], 24, placeholder="…"),
            "lw": 1.1,
        }
        for axes, key in zip(panels, ("kept_share", "threshold_teacher", "threshold_student"), strict=False):
            draw_line(axes, log, f"selection/{key}_{number}", **style)
    draw_line(panels[0], log, "selection/kept_share", INK, "all", lw=2.2)
    set_title(panels[0], "Share of rows kept")
    set_title(panels[1], "Least confidence of the teacher")
    set_title(panels[2], "Least uncertainty of the student")

    signal = "teacher_accuracy" if report.teacher_labels else "confidence"
    draw_line(panels[3], log, f"selection/{signal}_kept", STUDENT, "kept rows")
    draw_line(panels[3], log, f"selection/{signal}_dropped", THIRD, "dropped rows")
    set_title(panels[3], "Teacher's labels that are right" if report.teacher_labels else "Teacher's confidence")

    last_step = steps_drawn(report)
    for axes in (main, *panels):
        share_axis(axes)
        mark_steps(axes, report.warmup_steps, last_step, label=axes is main)
    for row in ([main], panels[:2], panels[2:]):
        finish_axes(*row, without_legend=panels[:3])
    for axes in (main, *panels[2:]):
        axes.set_xlabel("optimizer step", **STYLE)
    # One key to the classes of three panels, below them, where many have room
    handles, labels = panels[0].get_legend_handles_labels()
    columns = legend_columns(labels, 72 * figure.get_figwidth())
    if labels:
        figure.legend(handles, labels, loc="outside lower right", ncols=columns, **LEGEND)
    figure.savefig(path, dpi=150)
