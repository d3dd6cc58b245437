"""What a person sees of runs side by side: names, verdicts, what is folded, and that nothing is fetched."""

import os
import re
from html.parser import HTMLParser

import pytest

from tests.reports.test_comparison import write_run
from tests.reports.test_report import make_report
from trl_bbkd.errors import ComparisonError
from trl_bbkd.reports.comparison import Comparison, read_runs
from trl_bbkd.reports.comparison_page import page
from trl_bbkd.reports.line_chart import line_chart
from trl_bbkd.reports.report import render_markdown
from trl_bbkd.reports.run_names import short_names


class Cells(HTMLParser):
    """The text of each cell, heading and list item, and whether it is folded."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.attributes, self.open, self.folds = [], [], None, 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.folds += tag == "details"
        if tag in ("td", "th", "li", "h3", "h4", "summary"):
            self.open = [tag, "", bool(self.folds)]
            self.found.append(self.open)

    def handle_endtag(self, tag):
        self.folds -= tag == "details"
        if self.open and self.open[0] == tag:
            self.open = None

    def handle_data(self, text):
        if self.open:
            self.open[1] += text

    def texts(self, *tags, folded):
        return [
            text.replace("\N{NO-BREAK SPACE}", " ")
            for tag, text, is_folded in self.found
            if tag in tags and is_folded == folded
        ]


def compare(folders, **changes) -> Comparison:
    return Comparison(read_runs(folders), **changes)


@pytest.fixture
def better_and_worse(tmp_path):
    """The first run, one that is better, and one that is worse."""
    skills = {"first": 0.5, "better": 0.85, "worse": 0.15}
    return [write_run(tmp_path / name, skill, seed=seed) for seed, (name, skill) in enumerate(skills.items())]


class TestNames:
    @pytest.mark.parametrize(
        ("folders", "names"),
        [
            (("/a/out/gad", "/a/out/proxy"), ["gad", "proxy"]),
            (("out/gad", "out/proxy", "out/gad-2"), ["gad", "proxy", "gad-2"]),
            (("out/gad/student", "out/proxy/student/"), ["gad", "proxy"]),
            (("out/gad/seed-0", "out/gad/seed-1", "out/proxy/seed-0"), ["gad/seed-0", "gad/seed-1", "proxy/seed-0"]),
            (("one/run", "two/b/run"), ["one", "two/b"]),
            (("out", "out/round-1"), ["out", "out/round-1"]),
            (("run", "again/run"), ["run", "again/run"]),
            (("/x/gad", "/gad"), ["x/gad", "gad"]),
        ],
    )
    def test_what_distinguishes(self, folders, names):
        assert short_names(folders) == [name.replace("/", os.sep) for name in names]

    def test_equal_base_names_stay_apart_and_folders_are_told(self, tmp_path):
        for name in ("a_b", "c"):
            (tmp_path / name).mkdir()
        folders = [write_run(tmp_path / name / "student", 0.5, seed=seed) for seed, name in enumerate(("a_b", "c"))]
        comparison = compare(folders)
        cells = Cells(page(comparison))
        assert cells.texts("h3", folded=False) == ["a_b", "c"]
        assert cells.texts("th", folded=False) == ["", "a_b", "c"]
        assert [value for key, value in cells.attributes if key == "title"][:2] == folders
        text = comparison.markdown()
        assert "|  | a_b | c |" in text and f"* c is the run of GAD in `{folders[1]}`." in text

    def test_one_folder_by_two_names_is_one_run(self, better_and_worse, tmp_path):
        (tmp_path / "link").symlink_to(better_and_worse[0])
        for other in (tmp_path / "link", tmp_path / "first" / ".." / "first"):
            with pytest.raises(ComparisonError, match="at least two runs, each once"):
                read_runs([better_and_worse[0], str(other)])


class TestVerdicts:
    def test_each_is_told_at_the_top(self, better_and_worse):
        comparison = compare(better_and_worse)
        html = page(comparison)
        top, _, _ = html.partition("<table>")
        cells = Cells(top)
        differences = {label: rest for label, *rest in comparison.differences()}
        assert cells.texts("h4", folded=False)[0] == "▲ better than first"
        assert cells.texts("h3", folded=False) == ["first", "better", "worse"]
        _, _, worse = top.partition("▼ worse than first")
        told = Cells(worse).texts("li", folded=False)
        # With what is worse at other temperatures, and each with its interval
        assert [re.split(r"[−+]", text)[0] for text in told[:5]] == [
            "valid, T=1.0",
            "distinct valid answers, T=1.0",
            "valid, T=0.7",
            "valid, greedy",
            "teacher NLL",
        ]
        assert "≈ no difference seen</h4><ul><li>teacher NLL" in worse
        value, low, high = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", differences["valid, T=1.0"][1]).groups()
        assert told[0] == f"valid, T=1.0{value} {low} to {high}" and value.startswith("−")

    def test_the_markdown_says_the_same_before_its_tables(self, better_and_worse):
        comparison = compare(better_and_worse)
        text = comparison.markdown()
        top, _, rest = text.partition("## Values")
        better, worse = re.findall(r"^\* \*\*.*", top, re.MULTILINE)
        assert better.startswith("* **better** beside first: better: quality at equal diversity (+0.")
        assert worse.startswith("* **worse** beside first: worse: valid, T=1.0 (−0.")
        row = {label: rest for label, *rest in comparison.differences()}["valid, T=1.0"][1]
        assert f" valid, T=1.0 ({row.replace(' (', ', ')}; " in worse and "; valid, T=0.7 (−0." in worse
        assert rest.index("| valid, T=1.0 |") < rest.index("| teacher NLL |") < rest.index("| valid, T=0.7 |")

    def test_no_difference_is_told_of_what_decides_alone(self, tmp_path):
        runs = [write_run(tmp_path / name, 0.5, seed=seed) for seed, name in enumerate(("one", "two"))]
        comparison = compare(runs)
        _, _, unclear = page(comparison).partition("≈ no difference seen</h4>")
        told = " ".join(Cells(unclear.partition("</section>")[0]).texts("li", folded=False))
        assert "valid, T=1.0" in told and "T=0.7" not in told and "greedy" not in told
        (sentence,) = re.findall(r"^\* \*\*.*", comparison.markdown(), re.MULTILINE)
        assert "no difference seen: " in sentence and "T=0.7" not in sentence

    def test_few_prompts_have_none(self, tmp_path):
        runs = [write_run(tmp_path / name, 0.5, seed=seed, prompts=4) for seed, name in enumerate(("one", "two"))]
        assert "<p>no verdict without an interval</p>" in page(compare(runs))


class TestFolds:
    def test_other_temperatures_and_settings(self, tmp_path):
        runs = [
            write_run(tmp_path / name, 0.5, seed=seed, learning_rate=10**-seed, output_dir=f"some/where_{name}")
            for seed, name in enumerate(("one", "two"))
        ]
        html = page(compare(runs))
        cells = Cells(html)
        seen, folded = (cells.texts("td", folded=folded) for folded in (False, True))
        assert {"valid, T=1.0", "distinct valid answers, T=1.0", "teacher NLL"} < {*seen}
        assert not any("T=0.7" in text or "greedy" in text or text == "learning_rate" for text in seen)
        assert {"valid, T=0.7", "valid, greedy", "learning_rate", "quality at equal diversity"} < {*folded}
        assert cells.texts("summary", folded=True) == [
            "More rows, other temperatures",
            "All differences",
            "Settings that differ",
            "3 more",
        ]
        # Broken where a word ends, not within it
        assert "learning_<wbr>rate" in html and "some/<wbr>where_<wbr>one" in html
        assert html.count("<article>") == 5 and html.index("3 more") > html.index("<article>")

    def test_a_temperature_asked_for_is_not_folded(self, better_and_worse):
        cells = Cells(page(compare(better_and_worse, metrics=["valid@t0.7"])))
        assert "valid, T=0.7" in cells.texts("td", folded=False)

    def test_what_is_never_cut_decides_nothing(self, better_and_worse):
        for cut, is_deciding in ((0.0, False), (0.25, True)):
            runs = read_runs(better_and_worse)
            for run in runs:
                for answers in run.answers:
                    answers["values"]["truncated@t1.0"] = 0.0
            runs[1].answers[3]["values"]["truncated@t1.0"] = cut
            assert ("truncated@t1.0" in Comparison(runs).deciding) == is_deciding


class TestDistinctValidAnswers:
    """Their number says something only where a judge calls an answer valid or not."""

    def test_compared(self, better_and_worse):
        runs = read_runs(better_and_worse)
        assert "distinct_valid@t1.0" in Comparison(runs).metrics
        for answers in runs[1].answers:
            answers["values"]["valid@t1.0"] -= 0.9
        comparison = Comparison(runs)
        assert "distinct_valid@t1.0" not in comparison.metrics and "valid@t1.0" in comparison.metrics
        assert "distinct valid" not in page(comparison) + comparison.markdown()

    @pytest.mark.parametrize("score", [0.3, 7.0, -1.0])
    def test_one_score_of_another_kind_is_enough(self, better_and_worse, score):
        runs = read_runs(better_and_worse)
        runs[2].answers[7]["values"]["valid@t1.0"] = score
        assert "distinct_valid@t1.0" not in Comparison(runs).metrics

    def test_one_runs_report(self):
        report = make_report()
        label = "distinct answers with valid 1, T=1.0"
        assert label in [row[0] for row in report.rows] and "counted." in render_markdown(report)
        for metrics in report.results.values():
            if "distinct_valid@t1.0" in metrics:
                metrics["distinct_valid@t1.0"] = 0
        assert label not in [row[0] for row in report.rows]
        text = render_markdown(report)
        assert "`valid` is the judge's mean. " in text and "distinct answers" not in text


class TestFile:
    def test_nothing_is_fetched_whatever_the_rows_are(self, better_and_worse):
        evil = '"><script src="https://evil.example/x.js"></script><img src=//evil.example/i.png><b>&amp;'
        runs = read_runs(better_and_worse)
        for run in runs:
            run.settings["note"] = f"{evil}{run.name}"
            run.metrics["settings"]["note"] = ""
            run.lines[0]["prompt"], run.lines[0]["teacher"] = evil, [evil]
            run.answers[0]["samples"]["greedy"] = [f"{evil} {evil}"]
        runs[0].name = runs[0].name + evil
        html = page(Comparison(runs))
        assert not re.search(r"<(?!/|!)(script|img|link|iframe|object|base|b)\b", html)
        cells = Cells(html)
        assert not [pair for pair in cells.attributes if pair[0] in ("src", "href", "srcset", "action", "data")]
        assert not any("evil" in value for key, value in cells.attributes if key != "title")
        # Of the page itself: no address, and a browser is told to fetch none
        style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
        assert not re.search(r"//|url\(|@import|@font-face", style)
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in cells.attributes
        assert "&lt;script src=&quot;https://" in html and "&lt;b&gt;&amp;amp;" in html

    def test_both_looks_have_all_colours(self, better_and_worse):
        style = re.search(r"<style>(.*?)</style>", page(compare(better_and_worse)), re.DOTALL)[1]
        light, _, dark = style.partition("prefers-color-scheme: dark")
        used = {*re.findall(r"var\((--\w+)\)", page(compare(better_and_worse)))}
        for look in (light, dark.partition("\n}")[0]):
            assert used <= {*re.findall(r"(--\w+): #\w{6};", look)}

    def test_lines_differ_by_more_than_their_colour(self):
        chart = line_chart("quality", "step", {name: [(0, 1), (1, 2)] for name in ("one", "two", "three")})
        assert len({*re.findall(r'stroke-dasharray="([^"]+)"', chart)}) == 3
        assert len({*re.findall(r"border-style: (\w+)", chart)}) == 3
