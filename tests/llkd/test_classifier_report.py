import json
import math

import pytest

from tests.pictures import is_drawn, lines
from tests.reports.test_report import with_interval
from trl_bbkd.llkd.label_calibration import reliability_report
from trl_bbkd.llkd.report import LLKDReport, decline, starved_classes
from trl_bbkd.llkd.rows import LabelCounts
from trl_bbkd.reports.report import metrics_dict, print_table, render_markdown, write_report


NAMES = ["sky|blue", "fruit", "animal"]


def log_entry(step, share, **more):
    selection = {
        "selection/kept_share": share,
        "selection/teacher_accuracy_kept": 0.9,
        "selection/distinct_rows": step,
    }
    for number in range(3):
        selection[f"selection/kept_share_{number}"] = share
        selection[f"selection/threshold_teacher_{number}"] = 0.5 + number / 10
        selection[f"selection/threshold_student_{number}"] = 0.9 - step / 1000
    return {"step": step, "loss": 1.0, **selection, **more}


def make_report(**changes):
    own = {
        "accuracy": 0.8,
        "macro_f1": 0.75,
        "learned_share": 0.25,
        "distinct_rows": 1234,
        "compute": 0.583,
        "seconds": 6,
    }
    checked = reliability_report([0.9, 0.8, 0.3, 0.2], [True, True, False, True])
    report = LLKDReport(
        method="LLKD",
        student="tiny",
        teacher="a program",
        results={
            "undistilled": {"accuracy": 0.3, "macro_f1": 0.1},
            "all rows": {**own, "macro_f1": 0.77, "learned_share": 1.0, "compute": 1.0},
            "random rows": {**own, "macro_f1": 0.7, "compute": 0.25},
            "LLKD": own,
        },
        curves={
            name: [{"step": step, "accuracy": 0.3, "macro_f1": 0.1 + step / 200} for step in (0, 50, 100)]
            for name in ("LLKD", "all rows", "random rows")
        },
        log_history=[log_entry(step, 1.0 if step <= 50 else 0.1) for step in range(10, 101, 10)],
        counts={
            "train": LabelCounts(4, dict.fromkeys(NAMES, 1), 4, 0.55),
            "test": LabelCounts(1000, dict.fromkeys(NAMES, 300)),
        },
        versions={"torch": "2.13.0"},
        seconds={"LLKD": 6.0},
        truth="the true labels",
        class_names=NAMES,
        warmup_steps=50,
        selection={
            name: {"kept_share": 0.1 + number, "threshold_teacher": 0.5, "threshold_student": math.nan}
            for number, name in enumerate(NAMES)
        },
        teacher_labels=checked | {"accuracy_kept": 0.9, "accuracy_dropped": 0.4},
    )
    for name, value in changes.items():
        setattr(report, name, value)
    compare(report)
    return report


def compare(report, standard_error=0.002):
    """Give a report the differences of its own numbers."""
    own = report.results["LLKD"]
    report.differences = {
        name: {
            metric: with_interval(own[metric] - found[metric], standard_error) for metric in ("accuracy", "macro_f1")
        }
        for name, found in report.results.items()
        if name != "LLKD"
    }


class TestText:
    def test_summary_says_whichever_way_it_went(self):
        text = make_report().summary
        assert text.startswith(
            "Macro F1 against the true labels is 0.750 after LLKD, which learned from 25.0% of the rows"
        )
        assert "all rows reaches 0.770: LLKD is worse by 0.020 (0.016 to 0.024);" in text
        assert text.endswith("random ones reaches 0.700: LLKD is better by 0.050 (0.046 to 0.054).")

    def test_summary_without_baselines(self):
        report = make_report()
        report.results = {name: report.results[name] for name in ("undistilled", "LLKD")}
        assert report.summary.endswith("and 0.100 before.")
        assert "all rows" not in report.explanation

    def test_where_the_interval_has_zero_there_is_no_winner(self):
        report = make_report()
        compare(report, standard_error=0.011)
        assert "reaches 0.770: no difference seen (−0.042 to +0.002);" in report.summary
        report.differences = {}
        assert "reaches 0.770: no verdict on LLKD without an interval;" in report.summary

    def test_what_fell_is_named(self):
        report = make_report()
        report.results["random rows"]["accuracy"] = 0.85
        compare(report)
        assert report.summary.endswith("But worse accuracy than that of random rows (0.850 → 0.800).")

    def test_a_student_that_got_worse_is_warned_of(self):
        report = make_report()
        assert decline(report) == []
        report.results["undistilled"]["macro_f1"] = 0.76
        compare(report)
        (warning,) = decline(report)
        assert "macro F1 is 0.750, and was 0.760 before" in warning["text"] and warning["step"] == 100
        compare(report, standard_error=0.006)
        assert decline(report) == []

    def test_report_has_the_parts(self):
        text = render_markdown(make_report())
        for part in (
            "# LLKD: `tiny` from a program",
            "|  | undistilled | all rows | random rows | LLKD |",
            "| macro F1 | 0.100 | 0.770 | 0.700 | 0.750 |",
            "| different rows learned from | – | 1,234 | 1,234 | 1,234 |",
            "## Selection",
            r"| sky\|blue | 1 | 0.100 | 0.500 | – |",
            "The first 50 steps kept every row.",
            "the teacher has 75.0% right",
            "After the warm-up 90.0% of the kept rows are right, and 40.0% of the dropped ones",
            "![Reliability of the teacher's confidence](reliability.png)",
            "| with a true label too | 4 | – |",
            "Wall-clock time: LLKD 6 s.",
        ):
            assert part in text, part

    def test_without_selection_and_true_labels(self):
        text = render_markdown(make_report(selection={}, teacher_labels={}))
        assert "## Selection" not in text and "reliability.png" not in text

    def test_table_on_the_terminal(self, capsys):
        print_table(make_report())
        text = capsys.readouterr().out
        assert "macro F1" in text and "0.770" in text


def test_difference_is_that_of_the_numbers_beside_it():
    report = make_report()
    report.results["LLKD"]["macro_f1"], report.results["all rows"]["macro_f1"] = 0.1876, 0.1944
    compare(report)
    assert "is 0.188 after" in report.summary and "reaches 0.194: LLKD is worse by 0.006" in report.summary


def test_many_classes_are_drawn_too(tmp_path, figures):
    """The largest eight."""
    names = [f"class {number} " + "x" * 40 for number in range(40)]
    log = [{"step": 10, "loss": 1.0} | {f"selection/kept_share_{number}": 0.1 for number in range(40)}]
    counts = {"train": LabelCounts(40, dict.fromkeys(names, 1)), "test": LabelCounts(1)}
    report = make_report(class_names=names, log_history=log, counts=counts, selection={}, teacher_labels={})
    write_report(report, tmp_path)
    assert is_drawn(tmp_path / "curves.png")
    kept = lines(figures[0])["Share of rows kept"]
    assert len(kept) == 8 and all(values == ([10], [0.1]) for values in kept.values())
    assert all(label.startswith("class ") and len(label) <= 24 for label in kept)


def test_the_picture_shows_the_run(tmp_path, figures):
    report = make_report()
    write_report(report, tmp_path)
    found = lines(figures[0])
    steps = list(range(10, 101, 10))
    main = found["Macro F1 against the true labels"]
    assert set(main) == {"LLKD", "all rows", "random rows", "undistilled"}
    assert main["LLKD"] == ([0, 50, 100], pytest.approx([0.1, 0.35, 0.6])) and main["undistilled"][1][0] == 0.1
    shares = [1.0 if step <= 50 else 0.1 for step in steps]
    assert found["Share of rows kept"] == dict.fromkeys((*NAMES, "all"), (steps, shares))
    for title, values in (
        ("Least confidence of the teacher", lambda number: [0.5 + number / 10] * 10),
        ("Least uncertainty of the student", lambda number: [0.9 - step / 1000 for step in steps]),
    ):
        assert found[title] == {name: (steps, pytest.approx(values(number))) for number, name in enumerate(NAMES)}
    assert found["Teacher's labels that are right"] == {"kept rows": (steps, pytest.approx([0.9] * 10))}


@pytest.mark.parametrize("checked", [True, False])
def test_files(tmp_path, checked):
    report = make_report() if checked else make_report(teacher_labels={})
    write_report(report, tmp_path)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == ({"curves.png", "reliability.png"} if checked else {"curves.png"})
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in tmp_path.glob("*.png"))
    saved = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert saved["headline"] == "macro_f1" and saved["selection"]["fruit"]["threshold_student"] is None
    assert saved == json.loads(json.dumps(metrics_dict(report)))


def test_a_starved_class_is_told():
    report = make_report()
    assert starved_classes(report) == []
    report.selection["fruit"]["kept_share"] = 0.004
    report.selection["animal"]["kept_share"] = math.nan
    (warning,) = starved_classes(report)
    assert warning["step"] == 50 and "0.4% of the rows labelled fruit" in warning["text"]
    assert "selection_momentum" in warning["text"]
