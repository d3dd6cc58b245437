import io
import json
import math

import pytest
import torch
import yaml
from rich.console import Console

from tests.pictures import is_drawn, lines
from trl_bbkd.bayeskd.calibration import DRAWS, HeldOutTokens, calibration
from trl_bbkd.bayeskd.report import BayesKDReport
from trl_bbkd.data.teacher_data import TeacherDataCounts
from trl_bbkd.gad.report import GADReport
from trl_bbkd.proxykd.report import ProxyKDReport
from trl_bbkd.reports.report import (
    arguments_without_secrets,
    metrics_dict,
    print_table,
    render_markdown,
    without_secrets,
    write_report,
)
from trl_bbkd.reports.text_report import decline, table_metrics


def metrics(valid, nll):
    temperatures = {"valid@t1.0": valid, "valid@t0.7": valid + 0.05, "valid@greedy": valid + 0.1}
    shared = {"length@t1.0": 21.5, "length_ratio@t1.0": 1.02, "truncated@t1.0": 0.0, "teacher_nll": nll}
    return {**temperatures, "distinct_valid@t1.0": 1234, **shared}


def without_judge(values):
    return {key: value for key, value in values.items() if "valid" not in key} | {"distinct_share@t1.0": 0.91}


def make_report(judged=True, report_type=GADReport, **changes):
    results = {
        "teacher": {"valid@t1.0": 1.0, "length@t1.0": 21.1, "length_ratio@t1.0": 1.0},
        "undistilled": metrics(0.211, 1.9),
        "SeqKD": metrics(0.731, 0.81),
        "GAD": metrics(0.792, 0.84),
    }
    if not judged:
        results = {name: without_judge(values) for name, values in results.items()}
    steps = range(0, 601, 75)
    curves = {
        name: [
            {
                "step": step,
                "valid@t1.0": 0.211 + (top - 0.211) * (1 - math.exp(-step / 120)),
                "teacher_nll": 1.9 - step / 550,
            }
            for step in steps
        ]
        for name, top in (("GAD", 0.792), ("SeqKD", 0.731))
    }
    log = [
        {
            "step": step,
            "adversarial_phase": min(1.0, max(0.0, (step - 195) / 10)),
            "discriminator/accuracy": 0.6 + 0.2 * math.sin(step / 9) ** 2,
            "discriminator/loss": 0.6 - 0.2 * math.sin(step / 9) ** 2,
            "discriminator/teacher_score": step / 400,
            "discriminator/student_score": step / 500 - 0.2 + 0.1 * math.sin(step / 25),
            "discriminator/group_std": 0.5,
            "completions/length_ratio": 1 + 0.1 * math.sin(step / 50),
        }
        for step in range(5, 601, 5)
    ]
    counts = {
        "train": TeacherDataCounts(4000, 12, 3, 7, 3997),
        "test": TeacherDataCounts(256, 0, 0, 0, 256),
    }
    report = report_type(
        method="GAD",
        student="recipes/tinyworld/student",
        teacher="the world's program",
        results=results,
        curves=curves,
        log_history=log,
        counts=counts,
        command="trl-bbkd train recipes/gad.yaml --seed 3",
        settings={"learning_rate": 3e-5, "model_name_or_path": "recipes/tinyworld/student"},
        evaluation={"prompts": 256, "samples": 8, "max_new_tokens": 32, "seed": 0},
        seqkd={"steps": 600, "best_step": 450, "batch_size": 16, "learning_rate": 3e-5},
        versions={"trl": "1.16.0", "torch": "2.13.0"},
        seconds={"GAD": 133.0, "SeqKD": 41.2},
    )
    for name, value in changes.items():
        setattr(report, name, value)
    compare(report)
    return report


def with_interval(difference, standard_error):
    ends = [None if standard_error is None else difference + sign * 2 * standard_error for sign in (-1, 1)]
    return {"difference": difference, "standard_error": standard_error, "low": ends[0], "high": ends[1]}


def compare(report, standard_error=0.01):
    """Give a report the differences of its own numbers."""
    own = report.results.get(report.method, {})
    report.differences = {
        name: {
            key: with_interval(own[key] - found[key], standard_error)
            for key in own
            if key.startswith("valid") or key == "teacher_nll"
        }
        for name, found in report.results.items()
        if name in ("undistilled", "SeqKD")
    }


def test_warnings_are_told():
    warned = make_report(warnings=[{"kind": "inverted", "step": 7, "text": "the discriminator is inverted."}])
    assert "## Warnings\n\n* Step 7: the discriminator is inverted.\n" in render_markdown(warned)
    assert metrics_dict(warned)["warnings"][0]["kind"] == "inverted"
    assert "Warnings" not in render_markdown(make_report())


STAGES = [
    {
        "stage": "proxy warm-up",
        "rows": 1400,
        "seconds": 3.2,
        "metrics": [
            {"at": "before", "top1_agreement": 0.5, "nll": 2.0},
            {"at": "after", "top1_agreement": 0.6, "nll": 1.5},
        ],
    },
    {
        "stage": "proxy alignment",
        "rows": 1800,
        "seconds": 130.0,
        "metrics": [
            {"at": "before", "top1_agreement": 0.6, "nll": 1.5},
            {"at": "round 1", "top1_agreement": 0.65, "nll": 1.25},
        ],
    },
    {"stage": "soft targets", "rows": 800, "seconds": 1.0, "metrics": [{"tokens": 10, "bytes_per_token": 55.0}]},
    {"stage": "distillation", "rows": 800, "seconds": 9.0, "metrics": []},
]


def make_proxykd_report(stages=STAGES, judged=True):
    report = make_report(judged, ProxyKDReport, method="Proxy-KD", stages=stages)
    for values in (report.results, report.curves):
        values["Proxy-KD"] = values.pop("GAD")
    report.log_history = [{"step": step, "nll": 1.0, "kl": 0.3, "entropy": 0.9} for step in range(10, 601, 10)]
    return report


class TestStages:
    def test_every_stage_is_in_the_report(self):
        text = render_markdown(make_proxykd_report())
        assert "| proxy warm-up | 1,400 | 3 s | 0.500 → 0.600 | 2.000 → 1.500 |" in text
        assert "| proxy alignment | 1,800 | 2.2 min | 0.600 → 0.650 | 1.500 → 1.250 |" in text
        assert "| soft targets | 800 | 1 s | – | – |" in text and "| distillation | 800 | 9 s | – | – |" in text
        assert "## Stages" not in render_markdown(make_report())

    def test_the_source_of_the_soft_targets_is_named(self):
        report = make_proxykd_report()
        assert "(`target_source: cache`): the proxy's likeliest tokens" in render_markdown(report)
        report.settings = {"target_source": "on_policy", "kl_direction": "reverse"}
        text = render_markdown(report)
        assert (
            "(`target_source: on_policy`): the proxy's whole distribution at each position of the student's own"
            in text
        )
        assert "drawn anew at every step; KL(student ‖ proxy)." in text
        report.settings = {"kl_weight": 0.0}
        assert "## Soft targets" not in render_markdown(report)

    def test_the_proxys_column_is_explained(self):
        report = make_proxykd_report()
        assert "The proxy is the open model" not in render_markdown(report)
        report.results["proxy"] = {"valid@t1.0": 0.9}
        assert "The proxy is the open model that Proxy-KD learned from" in render_markdown(report)

    @pytest.mark.parametrize("judged", [True, False])
    @pytest.mark.parametrize("stages", [STAGES, STAGES[2:], []], ids=["all", "no proxy's", "none"])
    def test_files(self, tmp_path, figures, stages, judged):
        write_report(make_proxykd_report(stages, judged), tmp_path)
        assert is_drawn(tmp_path / "curves.png")
        steps = list(range(10, 601, 10))
        agreement, nll = (
            next(axes for axes in figures[0].axes if axes.get_title(loc="left") == title)
            for title in ("Proxy's top-1 agreement", "Proxy's NLL")
        )
        values = ([0.5, 0.6, 0.65], [2.0, 1.5, 1.25]) if stages == STAGES else ([], [])
        assert [list(axes.get_lines()[0].get_ydata()) for axes in (agreement, nll)] == list(values)
        labels = [label.get_text() for label in agreement.get_xticklabels()]
        assert labels == (["raw", "warm-up", "1"] if stages == STAGES else [])
        losses = lines(figures[0])["The student's losses"]
        assert losses == {"KL to the proxy": (steps, [0.3] * 60), "NLL": (steps, [1.0] * 60)}
        assert json.loads((tmp_path / "metrics.json").read_text())["stages"] == stages


def make_calibration():
    generator = torch.Generator().manual_seed(0)
    proxy = torch.rand(200, generator=generator, dtype=torch.float64)
    draws = (torch.rand(200, 50, generator=generator) < proxy[:, None]).cumsum(dim=1)
    times_drawn = {count: draws[:, count - 1] if count else torch.zeros(200) for count in DRAWS}
    tokens = HeldOutTokens(ngram=0.5 * proxy, proxy=proxy, times_drawn=times_drawn)
    return calibration(tokens, draws=10, concentration=10.0, vocab_size=100)


class TestCalibration:
    def make(self, found, judged=True):
        report = make_report(judged, BayesKDReport, method="Bayes-KD", calibration=found)
        for values in (report.results, report.curves):
            values["Bayes-KD"] = values.pop("GAD")
        losses = {"nll": 1.0, "kl_prior": 0.5, "kl_posterior": 0.3, "entropy": 0.9}
        report.log_history = [{"step": step, **losses} for step in range(10, 601, 10)]
        return report

    def test_its_table_is_in_the_report(self):
        found = make_calibration()
        text = render_markdown(self.make(found))
        assert f"| posterior | {' | '.join(f'K = {count}' for count in DRAWS)} |" in text
        of_ten = [entry for entry in found["table"] if entry["concentration"] == 10]
        assert f"| κ = 10 | {' | '.join(format(entry['expected'], '.3f') for entry in of_ten)} |" in text
        assert f"has {found['prior']:.3f}, the proxy {found['proxy']:.3f}" in text
        assert "Calibration" not in render_markdown(make_report())

    def test_its_ends_are_prior_and_proxy(self):
        found = make_calibration()
        of_one = {entry["draws"]: entry["expected"] for entry in found["table"] if entry["concentration"] == 1}
        assert of_one[0] == found["prior"] > of_one[1] > of_one[50] > found["proxy"]
        assert of_one[50] == pytest.approx(found["proxy"], abs=0.02)
        assert found["posterior"] == next(
            entry["expected"] for entry in found["table"] if (entry["draws"], entry["concentration"]) == (10, 10.0)
        )

    @pytest.mark.parametrize("judged", [True, False])
    @pytest.mark.parametrize("found", [make_calibration(), {}], ids=["measured", "no held-out rows"])
    def test_files(self, tmp_path, figures, found, judged):
        write_report(self.make(found, judged), tmp_path)
        assert is_drawn(tmp_path / "curves.png")
        drawn = lines(figures[0])["Held-out NLL by draws K"]
        kappas = {entry["concentration"] for entry in found.get("table", [])}
        assert set(drawn) == ({"proxy", "n-gram prior"} if found else set()) | {f"κ = {kappa:g}" for kappa in kappas}
        for kappa in kappas:
            of_kappa = [entry for entry in found["table"] if entry["concentration"] == kappa]
            points = [[entry[name] for entry in of_kappa] for name in ("draws", "expected")]
            assert drawn[f"κ = {kappa:g}"] == tuple(points)
        assert json.loads((tmp_path / "metrics.json").read_text())["calibration"] == found


class TestTable:
    def test_cells(self):
        report = make_report()
        assert report.columns == ["undistilled", "SeqKD", "GAD", "teacher"]
        rows = {row[0]: row[1:] for row in report.rows}
        assert rows["valid, T=1.0"] == ["0.211", "0.731", "0.792", "1.000"]
        assert rows["valid, greedy"] == ["0.311", "0.831", "0.892", "–"]
        assert rows["distinct answers with valid 1, T=1.0"] == ["1,234", "1,234", "1,234", "–"]
        assert rows["length, T=1.0"][-2:] == ["21.5", "21.1"] and rows["teacher NLL"][2] == "0.840"

    def test_without_judge(self):
        report = make_report(judged=False)
        assert table_metrics(report)[0] == ("distinct_share@t1.0", "distinct answers, T=1.0")
        assert report.headline == "teacher_nll"

    def test_rich_table_has_every_cell(self):
        console = Console(file=io.StringIO(), width=80)
        report = make_report()
        print_table(report, console)
        text = console.file.getvalue()
        for row in report.rows:
            assert all(cell in text for cell in row)
        assert "GAD is better by 0.061 (0.041 to 0.081)" in " ".join(text.split())


class TestSummary:
    def test_says_which_is_better_whichever_way(self):
        report = make_report()
        assert "0.792 after GAD and 0.211 before" in report.summary
        assert "SeqKD on the same text reaches 0.731: GAD is better by 0.061 (0.041 to 0.081)." in report.summary
        report.results["GAD"]["valid@t1.0"] = 0.7
        compare(report)
        assert "GAD is worse by 0.031 (0.011 to 0.051)." in report.summary
        report.results["GAD"]["valid@t1.0"] = 0.74
        compare(report)
        assert "reaches 0.731: no difference seen (−0.011 to +0.029)." in report.summary

    @pytest.mark.parametrize("standard_error", [None, math.nan])
    def test_there_is_no_verdict_without_an_interval(self, standard_error):
        report = make_report()
        compare(report, standard_error)
        assert "reaches 0.731: no verdict on GAD without an interval." in report.summary
        report.differences = {}
        assert "reaches 0.731: no verdict on GAD without an interval." in report.summary

    def test_what_fell_is_named(self):
        report = make_report()
        assert "But" not in report.summary.replace("But worse than SeqKD's: teacher NLL (0.810 → 0.840).", "")
        report.results["GAD"] |= {"valid@greedy": 0.293, "teacher_nll": 2.0}
        report.results["undistilled"]["valid@greedy"] = 0.547
        compare(report)
        assert report.summary.endswith(
            "But worse than before: valid, greedy (0.547 → 0.293), teacher NLL (1.900 → 2.000); worse than SeqKD's: "
            "valid, greedy (0.831 → 0.293), teacher NLL (0.810 → 2.000)."
        )
        compare(report, standard_error=1.0)
        assert "But" not in report.summary

    def test_every_metric_that_fell_is_named_the_deciding_one_too(self):
        report = make_report()
        report.results["GAD"] |= {
            "valid@t1.0": 0.1,
            "truncated@t1.0": 0.4,
            "distinct_valid@t1.0": 100,
            "length@t1.0": 3.0,
        }
        compare(report)
        for found in report.differences.values():
            found["truncated@t1.0"] = with_interval(0.4, 0.1)
            found["distinct_valid@t1.0"] = with_interval(-1134.0, 10.0)
            # Longer or shorter is neither better nor worse
            found["length@t1.0"] = with_interval(-18.5, 1.0)
        lost = "valid, T=1.0 (0.211 → 0.100), distinct answers with valid 1, T=1.0 (1,234 → 100), truncated, T=1.0 (0.000 → 0.400)"
        assert f"worse than before: {lost};" in report.summary
        # The sentence before says it of the deciding one
        assert "reaches 0.731: GAD is worse by 0.631" in report.summary
        assert report.summary.count("valid, T=1.0 (0.731") == 0 and "length" not in report.summary

    def test_a_gain_that_is_none_is_no_gain(self):
        """0.048 after and 0.039 before."""
        report = make_report()
        report.results["GAD"]["valid@t1.0"], report.results["undistilled"]["valid@t1.0"] = 0.048, 0.039
        compare(report)
        assert "is 0.048 after GAD and 0.039 before, no difference seen (−0.011 to +0.029);" in report.summary
        compare(report, standard_error=0.001)
        assert "is 0.048 after GAD and 0.039 before;" in report.summary

    def test_a_sharper_student_is_not_called_a_better_one(self):
        report = make_report()
        assert "equal diversity" not in report.summary
        report.differences["SeqKD"]["valid@equal_diversity"] = with_interval(0.002, 0.01)
        assert "GAD is better by 0.061 (0.041 to 0.081)." in report.summary
        assert "Over SeqKD at equal diversity of the answers: no difference seen (−0.018 to +0.022)." in report.summary
        report.differences["SeqKD"]["valid@equal_diversity"] = with_interval(-0.1, 0.01)
        assert "at equal diversity of the answers: GAD is worse by 0.100 (0.080 to 0.120)." in report.summary
        text = render_markdown(report)
        assert "| quality at equal diversity | – | −0.100 (−0.120 to −0.080) |" in text
        assert "distinct 4-grams" in text
        assert "quality at equal diversity" not in render_markdown(make_report())

    @pytest.mark.parametrize(("judged", "key", "value"), [(True, "valid@t1.0", 0.1), (False, "teacher_nll", 2.5)])
    def test_a_student_that_got_worse_is_warned_of(self, judged, key, value):
        report = make_report(judged)
        assert decline(report) == []
        report.results["GAD"][key] = value
        compare(report)
        (warning,) = decline(report)
        before, after = (f"{report.results[name][key]:.3f}" for name in ("undistilled", "GAD"))
        assert f"is {after}, and was {before} before" in warning["text"] and warning["step"] == 600
        compare(report, standard_error=1.0)
        assert decline(report) == []

    def test_lower_nll_is_better(self):
        report = make_report(judged=False)
        assert "GAD is worse by 0.030" in report.summary and "`sample_metrics`" in report.summary

    def test_without_baseline(self):
        report = make_report()
        del report.results["SeqKD"]
        assert report.summary.endswith("0.211 before.")


class TestComparison:
    def test_differences_have_intervals(self):
        text = render_markdown(make_report())
        assert "| GAD less | undistilled | SeqKD |" in text
        assert "| valid, T=1.0 | +0.581 (+0.561 to +0.601) | +0.061 (+0.041 to +0.081) |" in text
        assert "| teacher NLL | −1.060 (−1.080 to −1.040) | +0.030 (+0.010 to +0.050) |" in text
        # The figures of the table stay as they are, and what has no interval has no line
        assert "| valid, T=1.0 | 0.211 | 0.731 | 0.792 | 1.000 |" in text and text.count("| length, T=1.0 |") == 1

    def test_without_intervals_there_is_none(self):
        report = make_report()
        compare(report, math.nan)
        assert "less" not in render_markdown(report) and report.comparison() == []

    def test_other_temperatures(self, tmp_path, figures):
        report = make_report(
            evaluation={"temperatures": [0.0], "prompts": 9, "samples": 2, "max_new_tokens": 3, "seed": 0}
        )
        greedy = {"valid@greedy": 0.5, "distinct_valid@greedy": 9, "length@greedy": 3.0, "teacher_nll": 1.0}
        report.results = dict.fromkeys(report.results, greedy)
        report.curves = {name: [{"step": 1, **greedy}] for name in report.curves}
        compare(report)
        assert report.headline == "valid@greedy" and report.judged_metrics == ["valid"]
        assert report.summary.startswith("`valid` at temperature 0 (greedy) is 0.500 after GAD")
        labels = [row[0] for row in report.rows]
        assert labels[:3] == ["valid, greedy", "distinct answers with valid 1, greedy", "teacher NLL"]
        write_report(report, tmp_path)
        assert "valid at temperature 0 (greedy)" in lines(figures[0])


class TestFiles:
    def test_markdown(self):
        text = render_markdown(make_report())
        assert "| valid, T=1.0 | 0.211 | 0.731 | 0.792 | 1.000 |" in text
        assert "| duplicate prompts (kept) | 12 | 0 |" in text
        assert "![Curves of the run](curves.png)" in text
        assert "trl-bbkd train recipes/gad.yaml --seed 3" in text
        settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert settings["learning_rate"] == 3e-5
        assert "step 450" in text and "trl 1.16.0, torch 2.13.0" in text and "GAD 2.2 min, SeqKD 41 s" in text

    @pytest.mark.parametrize("judged", [True, False])
    def test_all_three_are_written(self, tmp_path, figures, judged):
        report = make_report(judged)
        report.log_history.append({"step": 600, "train_loss": float("nan"), "note": {"x": float("inf")}})
        write_report(report, tmp_path)

        def refuse(constant):
            raise AssertionError(constant)

        saved = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
        assert saved["results"]["GAD"] == report.results["GAD"]
        assert saved["log_history"][-1] == {"step": 600, "train_loss": None, "note": {"x": None}}
        assert saved["counts"]["train"]["truncated_answers"] == 7
        assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert is_drawn(tmp_path / "curves.png")
        drawn, key = lines(figures[0]), report.headline
        main = drawn["valid at temperature 1.0" if judged else "NLL of held-out teacher answers"]
        for name in ("GAD", "SeqKD"):
            assert main[name] == tuple([point[of] for point in report.curves[name]] for of in ("step", key))
        best = next(point for point in report.curves["SeqKD"] if point["step"] == 450)
        assert main["its best checkpoint"] == ([450], [best[key]])
        assert main["undistilled"][1][0] == report.results["undistilled"][key] and ("teacher" in main) == judged
        assert set(drawn["Discriminator on fresh pairs"]) == {"accuracy", "loss"}
        assert set(drawn["Discriminator's score"]) == {"teacher's answer", "student's samples"}
        last = "NLL of held-out teacher answers" if judged else "Score's std within a group"
        assert set(drawn) >= {last, "Length, student / teacher"} and len(drawn) == 5
        assert (tmp_path / "report.md").read_text() == render_markdown(report)

    def test_a_run_without_baseline_and_with_unknown_counts(self, tmp_path):
        report = make_report(counts={"train": TeacherDataCounts(None, None)}, seqkd={}, command=None, seconds={})
        del report.results["SeqKD"], report.curves["SeqKD"]
        write_report(report, tmp_path)
        text = (tmp_path / "report.md").read_text()
        assert "unknown (streaming)" in text and "SeqKD" not in text and "```bash" not in text

    def test_warmup_steps_come_from_the_phase(self):
        log = [{"step": 10, "adversarial_phase": 0.0}, {"step": 20, "adversarial_phase": 0.4}]
        assert make_report(log_history=log).warmup_steps == pytest.approx(16)
        assert metrics_dict(make_report())["warmup_steps"] == pytest.approx(197.5, abs=3)


class TestSecrets:
    def test_settings(self):
        settings = {"hub_token": "hf_x", "model_init_kwargs": {"token": "hf_y", "dtype": "float32"}, "max_tokens": 3}
        assert without_secrets(settings) == {"model_init_kwargs": {"dtype": "float32"}, "max_tokens": 3}

    def test_arguments(self):
        arguments = ["--hub_token", "hf_x", "--learning_rate", "1e-4", "--hub_token=hf_y", "--api_key", "k"]
        assert arguments_without_secrets(arguments) == ["--learning_rate", "1e-4"]
