"""What a picture of a run looks like: legends, axes, and runs of a few steps."""

import copy

import pytest

from tests.llkd.test_classifier_report import make_report as make_llkd_report
from tests.reports import test_report
from tests.reports.test_report import STAGES, make_calibration, make_proxykd_report, make_report
from trl_bbkd.reports.axes import legend_columns
from trl_bbkd.reports.report import write_report


MADE = {
    "gad": lambda: make_report(),
    "without judge": lambda: make_report(judged=False),
    "proxykd": lambda: make_proxykd_report(),
    "bayeskd": lambda: test_report.TestCalibration().make(make_calibration()),
    "llkd": make_llkd_report,
}


def titled(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


@pytest.mark.parametrize("name", MADE)
def test_no_line_crosses_a_legend(tmp_path, figures, name):
    write_report(MADE[name](), tmp_path)
    figure = figures[0]
    found = 0
    for axes in figure.axes:
        legend, box = axes.get_legend(), axes.get_window_extent()
        if legend is None:
            continue
        found += 1
        text = legend.get_window_extent()
        title = axes._left_title.get_window_extent()
        assert box.y1 <= text.y0 + 1 and text.y1 <= title.y0 + 1, axes.get_title(loc="left")
        others = [other.get_window_extent() for other in figure.axes if other is not axes]
        # Nor does it reach into what is beside it
        assert not any(other.overlaps(text) for other in others)
        assert figure.bbox.x0 <= text.x0 and text.x1 <= figure.bbox.x1
    assert found >= 2
    for legend in figure.legends:
        assert legend.get_window_extent().y1 < min(axes.get_tightbbox().y0 for axes in figure.axes)


def test_columns_of_a_legend():
    assert legend_columns(["GAD", "SeqKD"], 200) == 2
    assert legend_columns(["x" * 30, "y" * 30], 200) == 1
    assert legend_columns(["a", "b" * 20, "c"], 180) == 2


def test_a_ripple_is_no_cliff(tmp_path, figures):
    report = make_proxykd_report(copy.deepcopy(STAGES))
    for stage in report.stages:
        for entry in (entry for entry in stage["metrics"] if "nll" in entry):
            entry["top1_agreement"], entry["nll"] = 0.55, 1.5
    for points in report.curves.values():
        for number, point in enumerate(points):
            point["teacher_nll"] = 0.51 + number / 100
    write_report(report, tmp_path)
    low, high = titled(figures[0], "Proxy's top-1 agreement").get_ylim()
    assert -0.1 < low <= 0 and 1 <= high < 1.1
    low, high = titled(figures[0], "NLL of held-out teacher answers").get_ylim()
    assert low < 0.45 and high > 0.66
    low, high = titled(figures[0], "valid at temperature 1.0").get_ylim()
    assert -0.1 < low <= 0 and 1 <= high < 1.1


def test_a_judge_may_go_beyond_1(tmp_path, figures):
    report = make_report()
    for points in report.curves.values():
        for point in points:
            point["valid@t1.0"] *= 10
    write_report(report, tmp_path)
    assert titled(figures[0], "valid at temperature 1.0").get_ylim()[1] > 7.5


def test_a_length_that_hardly_moves_is_nearly_a_level(tmp_path, figures):
    log = [{"step": step, "completions/length_ratio": 1 + step / 1000} for step in (1, 2)]
    write_report(make_report(log_history=log), tmp_path)
    low, high = titled(figures[0], "Length, student / teacher").get_ylim()
    assert low <= 0.5 and high >= 1.5


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_a_few_steps(tmp_path, figures, steps):
    """Each value is seen, and an optimizer step is a whole number."""
    report = make_report()
    report.log_history = [{**entry, "step": step} for step, entry in enumerate(report.log_history[:steps], start=1)]
    report.seqkd["best_step"] = steps
    for points in report.curves.values():
        del points[2:]
        points[1]["step"] = steps
    write_report(report, tmp_path)
    for axes in figures[0].axes:
        drawn = [line for line in axes.get_lines() if len(line.get_xdata()) <= steps]
        assert all(line.get_marker() == "o" for line in drawn if line.get_linestyle() not in ("--", ":"))
        assert all(tick == int(tick) for tick in axes.get_xticks())
