"""The picture of a teacher's confidences beside how often it is right."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


BARS, GAP, INK, PALE = "#2563eb", "#d97706", "#374151", "#9ca3af"
SUMMARY = {"ECE": "ece", "accuracy": "accuracy", "mean confidence": "mean_confidence"}
BIN = ("lower", "upper", "count", "confidence", "accuracy")


def plot_reliability(report: dict, path: str | Path) -> None:
    """
    Draw accuracy over confidence, with 95 % intervals (Wilson's), and how many rows each bin holds.

    Args:
        report (`dict`):
            Of [`~llkd.label_calibration.calibration_report`].
        path (`str` or `Path`):
            PNG file to write.
    """
    figure = Figure(figsize=(5.2, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    main, counts = axes
    lower, upper, rows, confidence, accuracy = (np.array([entry[key] for entry in report["bins"]]) for key in BIN)
    bars = {"x": lower, "width": upper - lower, "align": "edge", "edgecolor": "white", "linewidth": 1}
    # The gap is above the accuracy of a teacher that is too sure, below that of one that is not sure enough
    shared = np.minimum(accuracy, confidence)
    gap = np.abs(accuracy - confidence)
    main.bar(height=shared, color=BARS, alpha=0.28, **bars)
    main.bar(height=gap, bottom=shared, color=GAP, alpha=0.4, label="gap to the confidence", **bars)
    main.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", label="perfectly calibrated")
    bounds = wilson_interval(torch.from_numpy(accuracy), torch.from_numpy(rows))
    main.vlines(confidence, *(bound.numpy() for bound in bounds), color=BARS, lw=1.4, label="95 % interval")
    dots = {"color": BARS, "marker": "o", "ms": 5, "ls": "none", "clip_on": False, "zorder": 3}
    main.plot(confidence, accuracy, label="accuracy", **dots)
    main.set(xlim=(0, 1), ylim=(0, 1))
    main.set_ylabel("share of right labels", fontsize=9, color=INK)
    title = {"loc": "left", "fontsize": 10, "color": INK, "fontweight": "bold"}
    main.set_title("Reliability of the teacher's confidence", pad=20, **title)
    values = [f"{name} {report[key]:.3f}" for name, key in SUMMARY.items()]
    line = " · ".join([*values, f"{report['rows']:,} rows"])
    main.annotate(line, (0, 1), (0, 7), "axes fraction", textcoords="offset points", fontsize=8.5, color=INK)
    main.legend(fontsize=8.5, labelcolor=INK, loc="upper left", edgecolor="none", framealpha=0.8)

    counts.bar(height=rows, color=PALE, **bars)
    for middle, number in zip((lower + upper) / 2, rows.tolist(), strict=True):
        text = f"{number}" if number < 1000 else f"{number / 1000:.{int(number < 10_000)}f}k"
        where = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
        counts.annotate(text, (middle, number), fontsize=7, color=INK, **where)
    counts.set_ylim(0, 1.25 * rows.max())
    counts.set_ylabel("rows", fontsize=9, color=INK)
    counts.set_xlabel("teacher's confidence", fontsize=9, color=INK)
    for axes in (main, counts):
        axes.grid(axis="y", color="#e5e7eb", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(PALE)
        axes.tick_params(colors=INK, labelsize=8.5, length=3)
    figure.savefig(path, dpi=150)


def wilson_interval(share: torch.Tensor, count: torch.Tensor, z: float = 1.96) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Bounds of a share that was observed in a few rows: centre (p + z²/2n) / (1 + z²/n), half width
    z √(p(1-p)/n + z²/4n²) / (1 + z²/n). Unlike the normal interval it stays in [0, 1] and has a width at p = 0 and 1.

    Args:
        share (`torch.Tensor`):
            `(M,)`, p.
        count (`torch.Tensor`):
            `(M,)`, n > 0.
        z (`float`, *optional*, defaults to `1.96`):
            Standard deviations; 1.96 is 95 %.
    """
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)).sqrt() / scale
    return (centre - half).clamp(min=0.0), (centre + half).clamp(max=1.0)
