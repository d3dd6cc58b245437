"""The picture of a run."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import SEQKD, TEACHER, UNDISTILLED, RunReport


COLORS = {TEACHER: "#374151", UNDISTILLED: "#9ca3af", SEQKD: "#d97706"}
STUDENT, SECOND, INK, SHADE = "#2563eb", "#0d9488", "#374151", "#eef0f4"
STYLE = {"fontsize": 9, "color": INK}


def plot_curves(report: RunReport, path: str | Path) -> None:
    """
    Draw the run: the deciding metric of the method and SeqKD, and what else the method watches: the discriminator and
    the lengths, or the proxy's stages and the student's losses.

    Args:
        report ([`~report.RunReport`]):
            The run.
        path (`str` or `Path`):
            PNG file to write.
    """
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    grid = figure.add_gridspec(2, 3, width_ratios=[1.45, 1, 1])
    main = figure.add_subplot(grid[:, 0])
    panels = [figure.add_subplot(grid[row, column]) for row in (0, 1) for column in (1, 2)]

    _comparison(main, report, report.headline, references=True)
    judged = report.headline != "teacher_nll"
    _title(main, f"{report.judged_metrics[0]} at temperature 1.0" if judged else "NLL of held-out teacher answers")

    over_steps = PANELS[report.method](panels, report)

    last_step = max((entry["step"] for entry in report.log_history), default=0)
    for axes in (main, *over_steps):
        _mark_steps(axes, report.warmup_steps, last_step, label=axes is main)
    for axes in (main, *panels):
        _finish(axes)
    for axes in (main, *panels[2:]):
        axes.set_xlabel("optimizer step", **STYLE)
    figure.savefig(path, dpi=150)


def _gad_panels(panels: list, report: RunReport) -> list:
    """Fill the four small panels; return those whose horizontal axis is the optimizer step."""
    log = report.log_history
    _line(panels[0], log, "discriminator/accuracy", STUDENT, "accuracy")
    _line(panels[0], log, "discriminator/loss", SECOND, "loss")
    panels[0].axhline(0.5, color=INK, lw=0.8, ls=":")
    # A discriminator that starts badly has a loss that would flatten all that follows
    panels[0].set_ylim(0, min(2.0, max(1.05, panels[0].get_ylim()[1])))
    _title(panels[0], "Discriminator on fresh pairs")

    _line(panels[1], log, "discriminator/teacher_score", COLORS[TEACHER], "teacher's answer")
    _line(panels[1], log, "discriminator/student_score", STUDENT, "student's samples")
    _title(panels[1], "Discriminator's score")

    _line(panels[2], log, "completions/length_ratio", STUDENT, None)
    panels[2].axhline(1.0, color=INK, lw=0.8, ls=":")
    _title(panels[2], "Length, student / teacher")

    _coverage(panels[3], report, otherwise="discriminator/group_std", title="Score's std within a group")
    return panels


def _proxykd_panels(panels: list, report: RunReport) -> list:
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
        _title(axes, title)

    _line(panels[2], report.log_history, "kl", STUDENT, "KL to the proxy")
    _line(panels[2], report.log_history, "nll", SECOND, "NLL")
    _title(panels[2], "The student's losses")

    _coverage(panels[3], report, otherwise="entropy", title="The student's entropy")
    return panels[2:]


def _bayeskd_panels(panels: list, report: RunReport) -> list:
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
    _title(panels[0], "Held-out NLL by draws K")

    _line(panels[1], report.log_history, "entropy", STUDENT, None)
    _title(panels[1], "The student's entropy")

    _line(panels[2], report.log_history, "kl_prior", SECOND, "KL to the prior")
    _line(panels[2], report.log_history, "kl_posterior", STUDENT, "KL to the posterior")
    _line(panels[2], report.log_history, "nll", COLORS[SEQKD], "NLL")
    _title(panels[2], "The student's losses")

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


def _coverage(axes, report: RunReport, otherwise: str, title: str) -> None:
    """NLL of held-out teacher answers; without a judge that is the large picture already, and a logged series is here."""
    if report.judged_metrics:
        _comparison(axes, report, "teacher_nll")
        _title(axes, "NLL of held-out teacher answers")
    else:
        _line(axes, report.log_history, otherwise, STUDENT, None)
        _title(axes, title)


def _stage_points(stage: dict, name: str) -> list[tuple[str, float]]:
    """Label and value of what a stage changed: where it began, the stage before it ended."""
    return [
        (entry["at"].removeprefix("round ") if entry["at"] != "after" else stage["stage"].split()[-1], entry[name])
        for entry in stage["metrics"]
        if name in entry and entry["at"] != "before"
    ]


PANELS = {"GAD": _gad_panels, "Proxy-KD": _proxykd_panels, "Bayes-KD": _bayeskd_panels}


def _comparison(axes, report: RunReport, key: str, references: bool = False) -> None:
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


def _line(axes, log: list[dict], key: str, color: str, label: str | None) -> None:
    """A logged series: as it is, faintly, and its running mean."""
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    half = len(values) // 60
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    if half:
        axes.plot(steps, values, color=color, lw=0.7, alpha=0.3)
    axes.plot(steps, [sum(window) / len(window) for window in windows], color=color, lw=1.6, label=label)


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold")


def _mark_steps(axes, warmup_steps: float, last_step: int, label: bool) -> None:
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


def _finish(axes) -> None:
    axes.grid(axis="y", color="#e5e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
