"""The picture of a run whose student writes text."""

from pathlib import Path

from .axes import (
    INK,
    PALE,
    STUDENT,
    STYLE,
    THIRD,
    draw_line,
    finish_axes,
    mark_steps,
    run_figure,
    set_title,
    share_axis,
    steps_drawn,
)
from .report import SEQKD, TEACHER, UNDISTILLED, Report


COLORS = {TEACHER: INK, UNDISTILLED: PALE, SEQKD: THIRD}


def plot_curves(report: Report, path: str | Path) -> None:
    """
    Draw the run: the deciding metric of the method and SeqKD, and in four small panels what else the method watches.

    Args:
        report ([`~reports.text_report.TextReport`]):
            The run.
        path (`str` or `Path`):
            PNG file to write.
    """
    figure, main, panels = run_figure()

    draw_comparison(main, report, report.headline, references=True)
    judged = report.headline != "teacher_nll"
    set_title(
        main, f"{report.judged_metrics[0]} at {report.sampled_at}" if judged else "NLL of held-out teacher answers"
    )

    if judged and all(0 <= value <= 1 for line in main.get_lines() for value in line.get_ydata()):
        share_axis(main)

    over_steps = report.draw_panels(panels)

    last_step = steps_drawn(report)
    for axes in (main, *over_steps):
        mark_steps(axes, report.warmup_steps, last_step, label=axes is main)
    for row in ([main], panels[:2], panels[2:]):
        finish_axes(*row)
    for axes in (main, *panels[2:]):
        axes.set_xlabel("optimizer step", **STYLE)
    figure.savefig(path, dpi=150)


def draw_training(panels: list, report: Report) -> None:
    """What every trainer logs, for a method that has no panels of its own."""
    for axes, key, title in (
        (panels[0], "loss", "The student's loss"),
        (panels[1], "grad_norm", "Norm of its gradient"),
        (panels[2], "learning_rate", "Learning rate"),
    ):
        draw_line(axes, report.log_history, key, STUDENT)
        set_title(axes, title)
    draw_coverage(panels[3], report, otherwise="entropy", title="The student's entropy")


def draw_coverage(axes, report: Report, otherwise: str, title: str) -> None:
    """NLL of held-out teacher answers; without a judge that is the large picture already, and a logged series is here."""
    if report.judged_metrics:
        draw_comparison(axes, report, "teacher_nll")
        set_title(axes, "NLL of held-out teacher answers")
    else:
        draw_line(axes, report.log_history, otherwise, STUDENT, None)
        set_title(axes, title)


def draw_comparison(axes, report: Report, key: str, references: bool = False) -> None:
    """The method's curve and SeqKD's, with the undistilled student and the teacher as levels."""
    for name in (report.method, SEQKD):
        points = [(entry["step"], entry[key]) for entry in report.curves.get(name, []) if entry.get(key) is not None]
        if points:
            color = STUDENT if name == report.method else COLORS[SEQKD]
            axes.plot(*zip(*points, strict=True), color=color, lw=1.8, marker="o", ms=4, clip_on=False, label=name)
            if name == SEQKD and references and "best_step" in report.seqkd:
                best = report.seqkd["best_step"]
                axes.plot(
                    *zip(*[point for point in points if point[0] == best], strict=True),
                    marker="o",
                    ms=10,
                    mfc="none",
                    mec=color,
                    ls="none",
                    clip_on=False,
                    label="its best checkpoint",
                )
    for name in (TEACHER, UNDISTILLED) if references else ():
        level = report.results.get(name, {}).get(key)
        if level is not None:
            axes.axhline(level, color=COLORS[name], lw=1, ls="--", label=name)
