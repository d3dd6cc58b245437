"""The picture of a run whose student writes text."""

from pathlib import Path

from .axes import INK, PALE, SECOND, STUDENT, STYLE, THIRD, draw_line, finish_axes, mark_steps, run_figure, set_title
from .report import SEQKD, TEACHER, UNDISTILLED, Report


COLORS = {TEACHER: INK, UNDISTILLED: PALE, SEQKD: THIRD}


def plot_curves(report: Report, path: str | Path) -> None:
    """
    Draw the run: the deciding metric of the method and SeqKD, and what else the method watches: the discriminator and
    the lengths, or the proxy's stages and the student's losses.

    Args:
        report ([`~reports.text_report.TextReport`]):
            The run.
        path (`str` or `Path`):
            PNG file to write.
    """
    figure, main, panels = run_figure()

    _comparison(main, report, report.headline, references=True)
    judged = report.headline != "teacher_nll"
    set_title(main, f"{report.judged_metrics[0]} at temperature 1.0" if judged else "NLL of held-out teacher answers")

    over_steps = PANELS[report.method](panels, report)

    last_step = max((entry["step"] for entry in report.log_history), default=0)
    for axes in (main, *over_steps):
        mark_steps(axes, report.warmup_steps, last_step, label=axes is main)
    for axes in (main, *panels):
        finish_axes(axes)
    for axes in (main, *panels[2:]):
        axes.set_xlabel("optimizer step", **STYLE)
    figure.savefig(path, dpi=150)


def _gad_panels(panels: list, report: Report) -> list:
    """Fill the four small panels; return those whose horizontal axis is the optimizer step."""
    log = report.log_history
    draw_line(panels[0], log, "discriminator/accuracy", STUDENT, "accuracy")
    draw_line(panels[0], log, "discriminator/loss", SECOND, "loss")
    panels[0].axhline(0.5, color=INK, lw=0.8, ls=":")
    # A discriminator that starts badly has a loss that would flatten all that follows
    panels[0].set_ylim(0, min(2.0, max(1.05, panels[0].get_ylim()[1])))
    set_title(panels[0], "Discriminator on fresh pairs")

    draw_line(panels[1], log, "discriminator/teacher_score", COLORS[TEACHER], "teacher's answer")
    draw_line(panels[1], log, "discriminator/student_score", STUDENT, "student's samples")
    set_title(panels[1], "Discriminator's score")

    draw_line(panels[2], log, "completions/length_ratio", STUDENT, None)
    panels[2].axhline(1.0, color=INK, lw=0.8, ls=":")
    set_title(panels[2], "Length, student / teacher")

    _coverage(panels[3], report, otherwise="discriminator/group_std", title="Score's std within a group")
    return panels


def _proxykd_panels(panels: list, report: Report) -> list:
    """As [`_gad_panels`]."""
    for axes, name, title in (
        (panels[0], "top1_agreement", "Proxy's top-1 agreement"),
        (panels[1], "nll", "Proxy's NLL"),
    ):
        points = [point for stage in report.stages for point in _stage_points(stage, name)]
        if points and report.stages[0]["metrics"][0]["at"] == "before":
            points.insert(0, ("raw", report.stages[0]["metrics"][0][name]))
        axes.plot([value for _, value in points], color=SECOND, lw=1.6, marker="o", ms=4, clip_on=False)
        axes.set_xticks(range(len(points)), [label for label, _ in points], rotation=30, ha="right")
        set_title(axes, title)

    draw_line(panels[2], report.log_history, "kl", STUDENT, "KL to the proxy")
    draw_line(panels[2], report.log_history, "nll", SECOND, "NLL")
    set_title(panels[2], "The student's losses")

    _coverage(panels[3], report, otherwise="entropy", title="The student's entropy")
    return panels[2:]


def _bayeskd_panels(panels: list, report: Report) -> list:
    """As [`_gad_panels`]."""
    found = report.calibration
    for entries, color, style, label in _calibration_lines(found) if found else ():
        points = [(entry["draws"], entry["expected"]) for entry in entries]
        panels[0].plot(*zip(*points, strict=True), color=color, lw=1.6, ls=style, marker="o", ms=3, label=label)
    if found:
        panels[0].axhline(found["proxy"], color=INK, lw=1, ls="--", label="proxy")
        panels[0].axhline(found["prior"], color=COLORS[UNDISTILLED], lw=1, ls="--", label="n-gram prior")
        panels[0].set_xscale("symlog", linthresh=1)
        ticks = sorted({entry["draws"] for entry in found["table"]})
        panels[0].set_xticks(ticks, ticks)
        panels[0].set_xlim(-0.1, 1.15 * ticks[-1])
        panels[0].minorticks_off()
    set_title(panels[0], "Held-out NLL by draws K")

    draw_line(panels[1], report.log_history, "entropy", STUDENT, None)
    set_title(panels[1], "The student's entropy")

    draw_line(panels[2], report.log_history, "kl_prior", SECOND, "KL to the prior")
    draw_line(panels[2], report.log_history, "kl_posterior", STUDENT, "KL to the posterior")
    draw_line(panels[2], report.log_history, "nll", COLORS[SEQKD], "NLL")
    set_title(panels[2], "The student's losses")

    _coverage(panels[3], report, otherwise="mean_token_accuracy", title="Top-1 accuracy on teacher tokens")
    return panels[1:]


def _calibration_lines(calibration: dict):
    """Entries, color, line style and label of the posterior's curve for each concentration κ, the run's own in blue."""
    kappas = sorted({entry["concentration"] for entry in calibration["table"]})
    for number, kappa in enumerate(kappas):
        is_own = kappa == calibration["concentration"]
        entries = [entry for entry in calibration["table"] if entry["concentration"] == kappa]
        style = "-" if is_own else (0, (1 + number, 1))
        yield entries, STUDENT if is_own else SECOND, style, f"κ = {kappa:g}"


def _coverage(axes, report: Report, otherwise: str, title: str) -> None:
    """NLL of held-out teacher answers; without a judge that is the large picture already, and a logged series is here."""
    if report.judged_metrics:
        _comparison(axes, report, "teacher_nll")
        set_title(axes, "NLL of held-out teacher answers")
    else:
        draw_line(axes, report.log_history, otherwise, STUDENT, None)
        set_title(axes, title)


def _stage_points(stage: dict, name: str) -> list[tuple[str, float]]:
    """Label and value of what a stage changed: where it began, the stage before it ended."""
    return [
        (entry["at"].removeprefix("round ") if entry["at"] != "after" else stage["stage"].split()[-1], entry[name])
        for entry in stage["metrics"]
        if name in entry and entry["at"] != "before"
    ]


PANELS = {"GAD": _gad_panels, "Proxy-KD": _proxykd_panels, "Bayes-KD": _bayeskd_panels}


def _comparison(axes, report: Report, key: str, references: bool = False) -> None:
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
