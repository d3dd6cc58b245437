"""How a judge's words are read: in the form asked for, or not at all."""

import pytest

from tests.judging.helpers import PARTS
from trl_bbkd.judging.report import is_same_model
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
