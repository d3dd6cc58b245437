"""Runs side by side, from what they leave."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from trl_bbkd.cli import main
from trl_bbkd.errors import ComparisonError
from trl_bbkd.evaluation.intervals import interval_of_mean
from trl_bbkd.reports.comparison import Comparison, read_runs
from trl_bbkd.reports.comparison_page import page
from trl_bbkd.reports.held_out import write_held_out
from trl_bbkd.reports.verdicts import Difference


PROMPTS = 40


def write_run(folder, skill, *, seed=0, method="GAD", words=(6, 5, 4), prompts=PROMPTS, tokens=5, draws=4, **settings):
    """A run whose student is right with probability `skill`, and writes four words out of some at each temperature."""
    generator = np.random.default_rng(seed)
    temperatures = dict(zip(("t1.0", "t0.7", "greedy"), words, strict=True))
    lines = []
    for number in range(prompts):
        samples = {
            at: [" ".join(map(str, generator.integers(size, size=6))) for _ in range(1 if at == "greedy" else draws)]
            for at, size in temperatures.items()
        }
        values = {f"valid@{at}": float(generator.binomial(draws, skill) / draws) for at in temperatures}
        values |= {"distinct_valid@t1.0": draws * values["valid@t1.0"], "teacher_nll": 1.0 + generator.random()}
        lines.append(
            {
                "rows": [number],
                "prompt": [{"role": "user", "content": f"<b>prompt</b> {number}"}],
                "teacher": ["0 1 2 | <i>"],
                "teacher_tokens": [tokens],
                "students": {method: {"values": values, "samples": samples}},
            }
        )
    # Each run in an order of its own
    generator.shuffle(lines)
    found = [line["students"][method]["values"] for line in lines]
    results = {name: float(np.mean([values[name] for values in found])) for name in found[0]}
    results["distinct_valid@t1.0"] *= prompts
    curve = [{"step": step, "valid@t1.0": skill * step / 10} for step in (0, 5, 10)]
    settings = {"learning_rate": 1e-3, **settings}
    metrics = {"method": method, "results": {method: results}, "headline": "valid@t1.0", "curves": {method: curve}}
    inputs = {"method": method.lower(), "processes": 1, "model_name_or_path": "student", "dataset_name": "rows"}
    folder.mkdir()
    write_held_out(lines, folder)
    (folder / "metrics.json").write_text(json.dumps(metrics | {"settings": settings}))
    progress = {**inputs, "arguments": settings, "script": {}, "model": {}}
    (folder / "progress.json").write_text(json.dumps({"settings": progress, "parts": {}}))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "one", 0.5),
        write_run(tmp_path / "two", 0.8, seed=1, learning_rate=1e-4),
        write_run(tmp_path / "three", 0.5, seed=2, method="SeqKD"),
    ]


def test_the_table_has_what_runs_left(runs):
    comparison = Comparison(read_runs(runs))
    rows = {label: cells for label, *cells in comparison.table()}
    deciding = ["valid, T=1.0", "distinct valid answers, T=1.0", "teacher NLL"]
    assert list(rows) == [*deciding, "valid, T=0.7", "valid, greedy"]
    for number, run in enumerate(comparison.runs):
        found = json.loads((open(f"{run.name}/metrics.json")).read())["results"][run.method]
        low, high = interval_of_mean([answers["values"]["valid@t1.0"] for answers in run.answers])
        assert rows["valid, T=1.0"][number] == f"{found['valid@t1.0']:.3f} ({low:.3f} to {high:.3f})"
        value, low, high = re.findall(r"[\d.]+", rows["distinct valid answers, T=1.0"][number].replace(",", ""))
        assert float(low) < float(value) == round(found["distinct_valid@t1.0"]) < float(high)


def test_differences_are_of_the_same_prompts(runs):
    comparison = Comparison(read_runs(runs))
    first, second, third = comparison.runs
    assert [line["prompt"] for line in first.lines] == [line["prompt"] for line in second.lines]
    found = comparison.difference(second, "valid@t1.0")
    own, other = (run.metrics["results"]["GAD"]["valid@t1.0"] for run in (second, first))
    assert found["difference"] == pytest.approx(own - other) and found["low"] > 0
    assert comparison.difference(third, "valid@t1.0")["low"] < 0 < comparison.difference(third, "valid@t1.0")["high"]
    rows = {label: cells for label, *cells in comparison.differences()}
    assert re.fullmatch(r"\+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\)", rows["valid, T=1.0"][0])
    assert re.fullmatch(r"\+0\.[23]\d\d \(\+0\.\d{3} to \+0\.\d{3}\)", rows["quality at equal diversity"][0])
    alone = Comparison(comparison.runs, ["valid@greedy", "teacher_nll"])
    assert [row[0] for row in alone.table()] == ["valid, greedy", "teacher NLL"]
    assert list(rows)[:2] == ["quality at equal diversity", "valid, T=1.0"]
    assert [row[0] for row in Comparison(comparison.runs, ["valid"]).table()] == [
        row for row in rows if row.startswith("valid")
    ]


def test_which_way_is_better_is_the_metrics_own():
    rise = {"difference": 0.2, "low": 0.1, "high": 0.3}
    fall = {name: -value for name, value in rise.items()}
    for metric, kinds in {
        "valid@t1.0": ("better", "worse"),
        "teacher_nll": ("worse", "better"),
        "truncated@t1.0": ("worse", "better"),
        "length@t1.0": (None, None),
    }.items():
        assert tuple(Difference(metric, metric, found).kind for found in (rise, fall)) == kinds, metric


def test_what_is_neither_better_nor_worse_stands_last(runs):
    compared = read_runs(runs)
    for answers in (answers for run in compared for answers in run.answers):
        answers["values"] = {"length@t1.0": 5.0, **answers["values"]}
    comparison = Comparison(compared)
    deciding = [name for name in comparison.metrics if name in comparison.deciding]
    assert deciding[0] == "valid@t1.0" and deciding[-1] == "length@t1.0" and len(deciding) > 2


def test_settings_that_differ_are_told(runs):
    rows = {label: cells for label, *cells in Comparison(read_runs(runs)).settings()}
    assert rows == {"learning_rate": ["0.001", "0.0001", "0.001"], "method": ['"gad"', '"gad"', '"seqkd"']}


def test_other_tokenizers_count_other_tokens(tmp_path, runs):
    other = write_run(tmp_path / "other", 0.5, tokens=9)
    comparison = Comparison(read_runs([runs[0], other]))
    assert "teacher_nll" not in comparison.metrics and "different tokenizers" in comparison.markdown()


def test_more_samples_are_no_less_diverse_student(tmp_path):
    """Distinct n-grams are a smaller share of more samples, of which as many are taken as the other run has."""
    few, many = (
        write_run(tmp_path / name, 0.5, draws=draws, words=(4, 3, 3)) for name, draws in (("few", 4), ("many", 16))
    )
    comparison = Comparison(read_runs([few, many]))
    found = comparison.at_equal_diversity(comparison.runs[1])
    assert found["low"] < 0 < found["high"] and comparison.samples == 4
    assert not any(name.startswith("distinct_valid") for name in comparison.metrics)
    assert "diversity is that of 4 answers a prompt" in comparison.explanation
    everyone = np.arange(PROMPTS)
    of_all, of_four = (comparison.runs[1].curve("valid", samples)(everyone)[0][0] for samples in (None, 4))
    assert of_all < of_four - 0.02


def test_another_metric_alone_says_nothing_of_the_judge(runs):
    comparison = Comparison(read_runs(runs), ["teacher_nll"])
    assert [row[0] for row in comparison.differences()] == ["teacher NLL"]


def test_the_command_prints_a_table_and_writes_a_page(runs, tmp_path, capsys):
    main(["compare", *runs, "--metric", "valid", "--html", str(tmp_path / "page.html")])
    text = capsys.readouterr().out
    assert "| valid, T=1.0 | " in text and "## Settings that differ" in text and "    * teacher: `0 1 2 | <i>`" in text
    assert "teacher NLL" not in text
    html = (tmp_path / "page.html").read_text()
    # Nothing is fetched, nothing of the rows is markup, and all that is opened is closed
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    assert "&lt;b&gt;prompt&lt;/b&gt;" in html and "<b>" not in html and "0 1 2 | &lt;i&gt;" in html
    assert Balanced().check(html) == [] and html.count("<svg") == 2 and "<mark>" in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


class Balanced(HTMLParser):
    VOID = ("meta", "line", "circle", "polyline", "wbr")

    def check(self, html):
        self.open, self.wrong = [], []
        self.feed(html)
        return self.wrong + self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


class TestBadInput:
    def refused(self, *arguments):
        with pytest.raises(SystemExit):
            main(["compare", *arguments])

    def test_other_test_rows(self, runs, tmp_path, capsys):
        fewer = write_run(tmp_path / "fewer", 0.5, prompts=30)
        self.refused(runs[0], fewer)
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1
            and "measured on different test rows: 30 and 40 prompts, of which 30 are in both" in error
        )

    def test_no_run(self, runs, tmp_path):
        with pytest.raises(ComparisonError, match="has no metrics.json: no run has finished there"):
            read_runs([runs[0], str(tmp_path)])
        (tmp_path / "one/held_out.jsonl").unlink()
        with pytest.raises(ComparisonError, match="has no held_out.jsonl: it is of an older version, or"):
            read_runs(runs)
        (tmp_path / "two/metrics.json").write_text("{")
        with pytest.raises(ComparisonError, match="two cannot be read"):
            read_runs([runs[1], runs[2]])

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("metrics.json", "[]"),
            ("metrics.json", '{"method": "GAD"}'),
            ("progress.json", "{}"),
            ("progress.json", '{"settings": null}'),
            ("held_out.jsonl", "[]\n"),
            ("held_out.jsonl", '{"prompt": "a", "students": {}}\n'),
        ],
    )
    def test_files_of_another_kind(self, runs, tmp_path, file, text):
        (tmp_path / "two" / file).write_text(text)
        with pytest.raises(ComparisonError, match=r"two cannot be read \(.+\). Name the output_dir of a finished run"):
            read_runs(runs)

    def test_only_the_page_is_blamed_for_what_cannot_be_written(self, runs, tmp_path, monkeypatch):
        def closed(*arguments, **settings):
            raise BrokenPipeError

        monkeypatch.setattr("builtins.print", closed)
        with pytest.raises(BrokenPipeError):
            main(["compare", *runs])

    def test_one_run_and_an_unknown_metric(self, runs, tmp_path, capsys):
        for folders in (runs[:1], [runs[0], runs[0]]):
            with pytest.raises(ComparisonError, match="at least two runs, each once"):
                read_runs(folders)
        self.refused(*runs, "--metric", "velid")
        assert "--metric velid: not every run has it. All have: valid@t1.0, valid@t0.7" in capsys.readouterr().err
        self.refused(*runs, "--html", str(tmp_path / "no/page.html"))
        assert "No such file or directory. Name a file in a folder that is there" in capsys.readouterr().err

    def test_a_judge_that_only_one_has(self, runs):
        compared = read_runs(runs)
        compared[1].metrics["headline"] = "teacher_nll"
        comparison = Comparison(compared)
        assert comparison.judged is None and "equal diversity" not in comparison.markdown()
        assert page(comparison).count("<svg") <= 1
