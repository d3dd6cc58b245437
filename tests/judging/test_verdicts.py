"""How a judge's words are read: in the form asked for, or not at all."""

import json

import pytest
from datasets import Dataset

from tests.judging.helpers import PARTS
from trl_bbkd.collect.budget import Spent
from trl_bbkd.collect.journal import Entry, Journal, now
from trl_bbkd.collect.requests import RequestMaker
from trl_bbkd.judging.asking import Calls, Verdict, read_verdicts
from trl_bbkd.judging.measures import measure
from trl_bbkd.judging.pairs import Asked, Pair, TeacherRows, prompt_key, prompts_of
from trl_bbkd.judging.report import Evaluation, is_same_model
from trl_bbkd.judging.settings import EvaluateConfig, JudgeConfig
from trl_bbkd.judging.verdicts import POINTS, PREFERENCE, read_points, read_preference, request_text, shown_answer


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("A is right, B is not.\nVerdict: A", (1, 0)),
        ("Both are fine.\n\n**Verdict: B**\n\n", (0, 1)),
        ("verdict: [[Tie]].", (0.5, 0.5)),
        ("Verdict: Answer B", (0, 1)),
        ("Verdict： A", (1, 0)),
        ("Verdict: A\nVerdict: B\nVerdict: tie\nThese are the forms.", None),
        ("Verdict: A is better", None),
        ("A is better.", None),
        ("Verdict: C", None),
        ("Verdict: A or B", None),
        ("Verdict:\nA", None),
        ("", None),
    ],
)
def test_preferences(text, values):
    assert read_preference(text) == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("Well.\nPoints: A 7, B 5", (7, 5)),
        ("**Points:** A: 7.5/10, B: 10/10", (7.5, 10)),
        ("points: a=1 b=2", (1, 2)),
        ("Points: A 11, B 5", None),
        ("Points: A 0, B 5", None),
        ("Points: B 5, A 7", None),
        ("Points: A 7", None),
        ("Points: 7, 5", None),
        ("7 5", None),
    ],
)
def test_points(text, values):
    assert read_points(text) == values


def test_what_a_judge_is_sent():
    """The request and both answers, in one message; what a student thought is not shown."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    request = request_text(prompt, "Row 0: `prompt`")
    assert request == "[system]\nBe brief.\n\n[user]\nWhy?" and request_text(prompt[1:], "") == "Why?"
    first = shown_answer("<think>\nHm.\n</think>\n\nSo.", "")
    second = shown_answer([{"role": "assistant", "content": "Thus.", "reasoning_content": "Hm."}], "")
    for question in (PREFERENCE, POINTS):
        (message,) = question.messages(request, first, second)
        assert message["role"] == "user" and PARTS.search(message["content"]).groups() == (request, "So.", "Thus.")
    assert question.messages(request, first, second) != question.messages(request, second, first)


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", True),
        ("openai/gpt-4.1", "GPT-4.1", True),
        ("gpt-4.1", "gpt-4.1-mini", False),
        ("qwen2.5-7b", "qwen2.5-14b", False),
    ],
)
def test_names_of_one_model(name, other, same):
    assert is_same_model(name, other) == same


JUDGE = JudgeConfig("http://h/v1", "judge-1", "out", "x")


def test_a_verdict_that_is_cut_is_none(tmp_path):
    """`Verdict: A` may have been the beginning of `Verdict: A or B`."""
    raws = [{"message": {"content": "Verdict: A"}, "finish_reason": reason} for reason in ("length", "stop")]
    calls = Calls([Pair(0, "Q", "s", "t")], [PREFERENCE])
    with Journal(tmp_path / "journal.sqlite") as journal:
        maker = RequestMaker(JUDGE)
        entries = {
            maker.key(prompt, 0): Entry(0, 1, now(), choice=json.dumps(raw))
            for (*_, prompt), raw in zip(calls.each(), raws, strict=True)
        }
        journal.settle(journal.sending(Spent(1)), "answered", Spent(1), entries)
        cut, whole = read_verdicts(JUDGE, calls, journal)
    assert (cut.state, cut.is_cut, cut.student) == ("unparsable", True, None)
    assert (whole.state, whole.student, whole.teacher) == ("read", 0, 1)


def test_what_makes_a_prompt_another():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    said = [*turns, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Oh?"}]
    asked = [*turns, {"role": "user", "content": "So."}, {"role": "user", "content": "Oh?"}]
    others = [turns[1:], turns, [turns[0] | {"content": "Be kind."}, turns[1]], said, asked]
    assert len({prompt_key(prompt, "") for prompt in others}) == len(others)
    assert prompt_key("Why?", "") == prompt_key(turns[1:], "")


def test_all_answers_to_a_prompt_are_kept():
    rows = [{"prompt": "Why?", "completion": text, "teacher": "t"} for text in ("x", "y")]
    prompts, teachers = prompts_of(Dataset.from_list(rows), None)
    (asked,) = prompts.values()
    assert (asked.row, asked.answers, teachers) == (0, ["x", "y"], ["t"])


def verdicts(pairs, question, values):
    """Of each pair `(student, teacher)` in both orders."""
    return [
        Verdict(
            number, question.name, order == 0, "read", *values[number][order], "", False, bytes([number, order]), None
        )
        for number in range(len(pairs))
        for order in (0, 1)
    ]


@pytest.mark.parametrize("metric", ["win_rate", "lc_win_rate", "score"])
def test_answers_to_one_prompt_are_drawn_together(metric):
    """Three that are judged alike say no more than one."""
    won = [1, 1, 0, 1, 0, 0, 1, 0, 1, 1]

    def interval(times):
        pairs = [Pair(row, "Q", "s" * (row % 3), "t") for row in range(len(won)) for _ in range(times)]
        both = [(win, 1 - win) if metric != "score" else (2 + 7 * win, 5) for win in won for _ in range(times)]
        question = POINTS if metric == "score" else PREFERENCE
        found = measure(metric, verdicts(pairs, question, [(one, one) for one in both]), pairs, JUDGE)
        assert (found.prompts, found.pairs) == (len(won), len(won) * times)
        return found.estimate.low, found.estimate.high

    once, thrice = interval(1), interval(3)
    if metric == "lc_win_rate":  # whose prior weighs less
        assert thrice[1] - thrice[0] > 0.9 * (once[1] - once[0])
    else:
        assert thrice == pytest.approx(once)


def test_a_liking_for_the_first_place_has_its_sign():
    """The student won where it stood first, and else lost; and the other way round."""
    pairs = [Pair(row, "Q", "s", "t") for row in range(8)]
    for first, sign in ((1, 1), (0, -1)):
        orders = [((first, 1 - first), (1 - first, first))] * 8
        found = measure("lc_win_rate", verdicts(pairs, PREFERENCE, orders), pairs, JUDGE)
        assert found.estimate.value == pytest.approx(0.5) and found.details["order_effect"] * sign > 1
        won = measure("win_rate", verdicts(pairs, PREFERENCE, orders), pairs, JUDGE)
        assert won.details["first_is_chosen"] == first


def warned(models=(), teachers=(), cut=0, **settings):
    """What an evaluation says whose judge's endpoint calls it so."""
    said = [
        Verdict(0, "preference", True, "read", 1, 0, "", False, b"", Entry(0, 1, now(), model=name)) for name in models
    ]
    rows = TeacherRows({"k": Asked(0, {})}, list(teachers), True)
    settings = EvaluateConfig("student", "x", JUDGE, **settings)
    evaluation = Evaluation(settings, rows, [Pair(0, "Q", "s", "t")], cut, said, {}, Spent(), None)
    return " ".join(evaluation.warnings)


def test_what_a_reader_is_warned_of():
    assert warned(["judge-1"], ["t"]) == ""
    assert "the judge is the teacher, t:" in warned(["org/T-2026-01-01"], ["t"])
    assert "the judge is the teacher, judge-1:" in warned([], ["judge-1"])
    # Its name is what the command says
    assert warned([], ["judge-1"], teacher_name="t") == "" and "is the teacher" in warned(
        [], ["t"], teacher_name="judge-1"
    )
    assert "the teacher's name is not known" in warned() and warned(teacher_name="t") == ""
    assert "several models: judge-1, other." in warned(["judge-1", "other"], ["t"])
    assert "1 of the student's 1 answers were cut" in warned([], ["t"], cut=1)
