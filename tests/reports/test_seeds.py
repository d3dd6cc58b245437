"""Means over seeds, their intervals against slow references, how often they cover, and the words on them."""

import itertools
import json
import math

import numpy as np
import pytest

from tests.evaluation.test_intervals import RUNS, runs_within
from tests.reports.test_comparison import write_run
from trl_bbkd.evaluation.diversity import (
    SampledCurve,
    difference_at_equal_diversity,
    mean_difference_at_equal_diversity,
    paired_difference_at_equal_diversity,
)
from trl_bbkd.evaluation.intervals import (
    LEVEL,
    excludes_zero,
    interval_of_mean,
    interval_over_both,
    interval_over_seeds,
    times_drawn,
)
from trl_bbkd.reports.held_out import read_held_out
from trl_bbkd.reports.seeds import SeedRun, SeedsDifference, SeedsReport, verdict
from trl_bbkd.reports.text_report import TextReport


UNKNOWN = (math.nan, math.nan)


class TestOverSeeds:
    @pytest.mark.parametrize(("count", "t"), [(3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622)])
    def test_it_is_the_textbooks(self, count, t):
        values = np.random.default_rng(count).normal(size=count)
        mean = sum(values) / count
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        assert interval_over_seeds(values) == pytest.approx((mean - t * error, mean + t * error), rel=0.02)

    def test_two_have_none(self):
        assert all(map(math.isnan, interval_over_seeds([0.1, 0.2])))

    def test_both_contains_each(self):
        assert interval_over_both(1.0, (0.7, 1.3), (0.6, 1.8)) == pytest.approx((0.5, 1 + math.hypot(0.3, 0.8)))
        assert all(map(math.isnan, interval_over_both(1.0, UNKNOWN, (0.6, 1.8))))


def draw(generator, seeds, prompts, of_seeds, of_prompts, of_answers):
    """Differences (S, N) of a seed's and a prompt's own part and chance, and the truths that each interval is of: all means are 0."""
    seed, prompt = (generator.normal(0, size, count) for size, count in ((of_seeds, seeds), (of_prompts, prompts)))
    return (
        seed[:, None] + prompt + generator.normal(0, of_answers, (seeds, prompts)),
        {"over prompts": seed.mean(), "over seeds": prompt.mean(), "over both": 0.0},
    )


@pytest.mark.parametrize("seeds", [3, 6])
@pytest.mark.parametrize(
    ("of_seeds", "of_prompts"), [(0.05, 0.5), (0.08, 0.1), (0.2, 0.1)], ids=["prompts", "alike", "seeds"]
)
def test_each_covers_its_truth(seeds, of_seeds, of_prompts):
    generator = np.random.default_rng(seeds)
    hits = dict.fromkeys(("over prompts", "over seeds", "over both"), 0)
    for _ in range(RUNS):
        values, truths = draw(generator, seeds, 40, of_seeds, of_prompts, 0.3)
        over_prompts = interval_of_mean(values.mean(axis=0))
        over_seeds = interval_over_seeds(values.mean(axis=1))
        found = (over_prompts, over_seeds, interval_over_both(values.mean(), over_prompts, over_seeds))
        for (name, truth), (low, high) in zip(truths.items(), found, strict=True):
            hits[name] += low <= truth <= high
    assert hits["over prompts"] in runs_within(LEVEL) and hits["over seeds"] in runs_within(LEVEL)
    # Chance in single answers is in both: it may cover more often
    assert min(runs_within(LEVEL)) <= hits["over both"]


def test_that_each_excludes_zero_is_said_of_no_difference_too_often():
    """Which is why a verdict is by both together."""
    generator, wrong, wrong_together = np.random.default_rng(0), 0, 0
    for _ in range(RUNS):
        values, _ = draw(generator, 12, 40, 0.055, 0.1, 0.03)
        found = interval_of_mean(values.mean(axis=0)), interval_over_seeds(values.mean(axis=1))
        wrong += all(excludes_zero(*interval) for interval in found)
        wrong_together += excludes_zero(*interval_over_both(values.mean(), *found))
    most = RUNS - min(runs_within(LEVEL))
    assert wrong_together <= most < wrong


def test_the_mean_at_equal_diversity_is_the_mean_of_each():
    generator = np.random.default_rng(0)

    def curve(skill):
        samples = [
            [[" ".join(map(str, generator.integers(size, size=6))) for _ in range(3)] for _ in range(30)]
            for size in (6, 4, 3)
        ]
        return SampledCurve(samples, generator.binomial(3, skill, size=(3, 30)) / 3)

    pairs = [(curve(0.7), curve(0.5)) for _ in range(3)]
    found = mean_difference_at_equal_diversity(pairs, 30)
    each = [difference_at_equal_diversity(own(np.arange(30)), other(np.arange(30))) for own, other in pairs]
    assert found["difference"] == pytest.approx(np.mean(each)) and found["low"] < np.mean(each) < found["high"]
    # By hand: leave out every twentieth prompt, in each seed the same
    without = [
        np.mean([difference_at_equal_diversity(own(kept), other(kept)) for own, other in pairs])
        for kept in (np.array([n for n in range(30) if n % 20 != group]) for group in range(20))
    ]
    assert found["standard_error"] == pytest.approx(math.sqrt(19 / 20 * ((without - np.mean(without)) ** 2).sum()))
    assert found["standard_error"] < paired_difference_at_equal_diversity(*pairs[0], 30)["standard_error"]


@pytest.fixture
def runs(tmp_path):
    """Three seeds of a method that is right more often than SeqKD, by what `write_run` leaves."""
    found = []
    for seed in range(3):
        own, other = (
            read_held_out(
                write_run(tmp_path / f"{seed}{name}", skill, seed=10 * number + seed, method=name, words=(6, 3, 2))
            )
            for number, (name, skill) in enumerate((("GAD", 0.75 + 0.03 * seed), ("SeqKD", 0.5)))
        )
        others = {json.dumps(line["prompt"]): line["students"] for line in other}
        own.sort(key=lambda line: json.dumps(line["prompt"]))
        for line in own:
            line["students"] |= others[json.dumps(line["prompt"])]
        students = {
            name: {key: np.mean([line["students"][name]["values"][key] for line in own]) for key in VALUES}
            for name in ("GAD", "SeqKD")
        }
        apart = {key: {"difference": students["GAD"][key] - students["SeqKD"][key]} for key in VALUES}
        pair = [
            SampledCurve(
                [[line["students"][name]["samples"][at] for line in own] for at in TEMPERATURES],
                [[line["students"][name]["values"][f"valid@{at}"] for line in own] for at in TEMPERATURES],
            )
            for name in students
        ]
        apart["valid@equal_diversity"] = paired_difference_at_equal_diversity(*pair, len(own))
        report = TextReport(
            method="GAD",
            student="a|b",
            teacher=None,
            results={"SeqKD": students["SeqKD"], "GAD": students["GAD"], "teacher": {"valid@t1.0": 1.0}},
            curves={},
            log_history=[],
            counts={},
            differences={"SeqKD": apart},
        )
        found.append(SeedRun(seed, report, own))
    return found


TEMPERATURES = ("t1.0", "t0.7", "greedy")
VALUES = [*(f"valid@{at}" for at in TEMPERATURES), "teacher_nll"]


def test_intervals_over_prompts_are_of_the_means_of_seeds(runs):
    report = SeedsReport(runs, "trl-bbkd train gad --seeds 0 1 2")
    found = report.differences["SeqKD"]["valid@t1.0"]
    drawn = times_drawn(40, 0)
    apart = [
        [
            line["students"]["GAD"]["values"]["valid@t1.0"] - line["students"]["SeqKD"]["values"]["valid@t1.0"]
            for line in run.lines
        ]
        for run in runs
    ]
    # The slow way: of each draw the mean of all seeds' answers to the prompts in it
    means = [
        np.mean([apart[seed][prompt] for seed in range(3) for prompt in range(40) for _ in range(int(times[prompt]))])
        for times in drawn[:200]
    ]
    fast = (drawn[:200] @ np.mean(apart, axis=0)) / 40
    assert means == pytest.approx(fast)
    assert found.over_prompts == pytest.approx(interval_of_mean(np.mean(apart, axis=0)))
    assert found.mean == pytest.approx(np.mean(apart)) and found.over_prompts[0] < found.mean < found.over_prompts[1]
    assert found.seeds == pytest.approx(np.mean(apart, axis=1))
    low, high = report.differences["SeqKD"]["valid@equal_diversity"].over_prompts
    assert 0 < low < report.differences["SeqKD"]["valid@equal_diversity"].mean < high


def test_the_page(runs):
    report = SeedsReport(runs, "trl-bbkd train gad --seeds 0 1 2")
    text = report.markdown()
    lines = text.splitlines()
    assert lines[0] == "# GAD: `a|b` from a black-box teacher, seeds 0, 1, 2"
    assert (
        lines[2].startswith("valid, T=1.0, mean of seeds 0, 1, 2: 0.")
        and " at equal diversity of the answers: GAD is better" in text
    )
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines if line.startswith("| ")}
    assert rows["GAD less SeqKD"][:3] == ["mean", "over prompts", "over seeds"]
    of_seed = [rows[str(seed)] for seed in range(3)]
    assert of_seed[0][-1] == "1.000 |" and rows["2"][1] == f"{runs[2].report.results['GAD']['valid@t1.0']:.3f}"
    # One length for all lines of a table, and the teacher, whom no seed changes, without a spread
    for _, block in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        assert len({line.replace("\\|", "").count("|") for line in block if line.startswith("|")}) <= 1
    table = [line for line in lines if line.startswith("| valid, T=1.0 |")][0]
    assert table.count(" ± ") == 2 and table.endswith("| 1.000 |")
    values = [run.report.results["GAD"]["valid@t1.0"] for run in runs]
    spread = math.sqrt(sum((value - np.mean(values)) ** 2 for value in values) / 2)
    assert f"{np.mean(values):.3f} ± {spread:.3f}" in table
    kept = report.as_dict()["results"]["GAD"]["valid@t1.0"]
    assert kept["standard_deviation"] == pytest.approx(spread) and kept["mean"] == pytest.approx(np.mean(values))
    assert "```bash\ntrl-bbkd train gad --seeds 0 1 2\n```" in text
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["results"]["GAD"]["valid@t1.0"]["of_each_seed"]


def test_what_two_seeds_do_not_tell_is_said(runs):
    report = SeedsReport(runs[:2], "again")
    assert "over seeds" not in report.comparison("SeqKD")[0] and "over both" not in report.comparison("SeqKD")[0]
    assert (
        "these 2 students are better by 0." in report.summary
        and "of another seed's that says nothing" in report.summary
    )
    assert "two seeds do not tell" in report.explanation
    for run in runs:
        run.lines = []
    classifier = SeedsReport(runs, "again")
    assert "over prompts" not in classifier.comparison("SeqKD")[0] and "on these rows" in classifier.summary


def test_what_fell_is_named(runs):
    for number, run in enumerate(runs):
        for line in run.lines:
            line["students"]["GAD"]["values"]["teacher_nll"] = line["students"]["SeqKD"]["values"]["teacher_nll"] + 0.1
        run.report.differences["SeqKD"]["teacher_nll"] = {"difference": 0.1 + 0.001 * number}
    assert SeedsReport(runs, "").summary.endswith(" But worse than SeqKD: teacher NLL (+0.101).")
    # These prompts say so, other seeds need not
    for run, difference in zip(runs, (0.6, 0.1, -0.4), strict=True):
        run.report.differences["SeqKD"]["teacher_nll"] = {"difference": difference}
    found = SeedsReport(runs, "")
    assert found.differences["SeqKD"]["teacher_nll"].over_prompts[0] > 0 and " But " not in found.summary


def test_intervals_of_tokens_and_of_numbers_of_answers(runs):
    """A mean over tokens weighs prompts by them; a number of answers is a sum over prompts."""
    tokens = [3 + number % 7 for number in range(40)]
    for run in runs:
        for number, line in enumerate(run.lines):
            line["teacher_tokens"] = [tokens[number] - 2, 2]
            for name, found in line["students"].items():
                found["values"]["distinct_valid@t1.0"] = float(number % (3 if name == "GAD" else 5))
    apart = {
        key: np.mean(
            [
                [
                    line["students"]["GAD"]["values"][key] - line["students"]["SeqKD"]["values"][key]
                    for line in run.lines
                ]
                for run in runs
            ],
            axis=0,
        )
        for key in ("teacher_nll", "distinct_valid@t1.0")
    }
    report = SeedsReport(runs, "")
    assert report._over_prompts("SeqKD", "teacher_nll") == pytest.approx(
        interval_of_mean(apart["teacher_nll"], weights=tokens)
    )
    low, high = interval_of_mean(apart["distinct_valid@t1.0"])
    assert report._over_prompts("SeqKD", "distinct_valid@t1.0") == pytest.approx((40 * low, 40 * high))


@pytest.mark.parametrize(
    ("over_prompts", "over_seeds", "words"),
    [
        ((0.02, 0.08), (0.03, 0.07), "GAD is better by 0.050 (+0.014 to +0.086 over prompts and seeds)"),
        (
            (-0.02, 0.12),
            (-0.03, 0.13),
            "no difference seen (−0.020 to +0.120 over prompts, −0.030 to +0.130 over seeds)",
        ),
        (
            (0.02, 0.08),
            (-0.03, 0.13),
            "these 3 students are better by 0.050, another seed's need not be (+0.020 to +0.080 over ",
        ),
        (
            (-0.02, 0.12),
            (0.02, 0.08),
            "better by 0.050 on these prompts, on others it need not be (−0.020 to +0.120 over prompts",
        ),
        (
            (0.01, 0.09),
            (0.01, 0.09),
            "no difference seen over prompts and seeds together (−0.007 to +0.107), though over each alone",
        ),
        (
            (0.02, 0.08),
            UNKNOWN,
            "these 3 students are better by 0.050 (+0.020 to +0.080 over prompts); of another seed's that says nothing",
        ),
        (UNKNOWN, (0.02, 0.08), "GAD is better by 0.050 on these rows (+0.020 to +0.080 over seeds)"),
        (UNKNOWN, UNKNOWN, "no verdict on GAD without an interval"),
    ],
)
def test_verdicts_say_what_leaves_them_open(over_prompts, over_seeds, words):
    both = interval_over_both(0.05, over_prompts, over_seeds)
    found = SeedsDifference([0.04, 0.05, 0.06], over_prompts, over_seeds, both)
    assert verdict("GAD", found, 1, "{:.3f}".format).startswith(words)
    assert verdict("GAD", found, -1, "{:.3f}".format) == verdict("GAD", found, 1, "{:.3f}".format).replace(
        "better", "worse"
    )
