"""How sure a teacher is of an answer, as a column that LLKD's selection reads."""

import math

import pytest
from datasets import Dataset

from tests.collect.helpers import left_out, run
from tests.collect.server import TeacherServer, answer
from tests.collect.teachers import Teacher, byte_level
from trl_bbkd.collect.confidence import confidences, split_confidence
from trl_bbkd.collect.replies import read_choice
from trl_bbkd.collect.spelling import Speller
from trl_bbkd.selection.signals import check_confidence


class Saying(TeacherServer):
    """A server with answers of its own, by prompt and sample."""

    says: dict = {}

    def _choice(self, body, index, fault):
        choice = super()._choice(body, index, fault)
        texts = self.says.get(body["messages"][-1]["content"].partition("\n")[0])
        if texts and choice["message"]["content"]:
            choice["message"]["content"] = texts[((body.get("seed") or 0) + index) % len(texts)]
        return choice


def collected(tmp_path, says, **changes):
    with Saying() as server:
        server.says = says
        return run(server, tmp_path, list(says), **changes), server


def test_agreement(tmp_path):
    """Of the answers to a prompt, by case and spaces alike; each has the share of its own."""
    says = {"A?": ["Red.", "red. ", "Blue.", "RED."], "B?": ["One."], "C?": ["One.", "Two.", "Three.", ""]}
    found, _ = collected(tmp_path, says, num_samples=4, teacher_confidence="agreement", temperature=1.0)
    shares = [row["teacher_confidence"] for row in found]
    assert shares == [0.75, 0.75, 0.25, 0.75, 1.0, 1.0, 1.0, 1.0, 0.25, 0.25, 0.25]
    check_confidence(shares)


def test_an_answer_that_is_not_whole_agrees_with_none():
    raws = [
        {"message": {"content": "Red."}, "finish_reason": reason} for reason in ("stop", "length", "length", "stop")
    ]
    assert confidences("agreement", list(map(read_choice, raws))) == [0.5, None, None, 0.5]


def test_a_rounded_mean_is_no_more_than_certain():
    entries = [{"token": "Red.", "logprob": 0.0005, "bytes": None}]
    raw = {"message": {"content": "Red."}, "logprobs": {"content": entries}, "finish_reason": "stop"}
    assert confidences("mean_logprob", [read_choice(raw)]) == [1.0]


def test_mean_log_probability(tmp_path):
    """Over the answer's own tokens; what has not all of them is left out."""
    with TeacherServer() as server:
        prompts = ["A?", "[no logprobs] B?", "[short logprobs] C?"]
        found = run(server, tmp_path, prompts, logprobs=True, teacher_confidence="mean_logprob")
    assert [(row["prompt"], row["teacher_confidence"]) for row in found] == [("A?", pytest.approx(math.exp(-0.5)))]
    assert [line["left_out"] for line in left_out(tmp_path)] == ["no confidence"] * 2


def test_a_thought_and_an_end_are_no_part_of_the_mean():
    speller = Speller(byte_level(), "mine")
    thought, text = "An apple is red.</think>", "The sky is blue."
    encoded = [speller.tokenizer(text=part, add_special_tokens=False)["input_ids"] for part in (thought, text)]
    raw = Teacher(speller, "vllm").answer([*encoded[0], *encoded[1]], thought + text)
    raw["message"] = {"content": text, "reasoning_content": "An apple is red."}
    entries = raw["logprobs"]["content"]
    for entry in entries:
        entry["logprob"] = -5.0
    for entry in entries[len(encoded[0]) : -1]:
        entry["logprob"] = -0.25
    assert confidences("mean_logprob", [read_choice(raw)]) == [pytest.approx(math.exp(-0.25))]
    # Numbers for texts are read with the named tokenizer
    numbers = Teacher(speller, "ids").answer(encoded[1], text)
    for entry in numbers["logprobs"]["content"]:
        entry["bytes"] = None
    assert confidences("mean_logprob", [read_choice(numbers)]) == [None]
    assert confidences("mean_logprob", [read_choice(numbers)], speller)[0] > 0
    numbers["logprobs"]["content"][1]["logprob"] = -9999.0
    assert confidences("mean_logprob", [read_choice(numbers)], speller) == [None]


def test_what_the_teacher_says(tmp_path):
    """The question for it is not in the set, and the answer to that neither."""
    says = {"A?": ["Red.\nOr so.\n\nConfidence: 85"], "B?": ["Blue."], "C?": ["Confidence: 3"]}
    found, server = collected(tmp_path, says, teacher_confidence="verbalised")
    assert all("`Confidence: N`" in body["messages"][-1]["content"] for body in server.asked)
    assert [(row["prompt"], row["completion"], row["teacher_confidence"]) for row in found] == [
        ("A?", "Red.\nOr so.", 0.85)
    ]
    assert [line["left_out"] for line in left_out(tmp_path)] == ["no confidence", "empty"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Red.\nConfidence: 85", ("Red.", 0.85)),
        ("Red.\n\n**Confidence:** 85%\n", ("Red.", 0.85)),
        ("Red.\n`Confidence: 0.85`", ("Red.", 0.85)),
        ("Red.\n**Confidence**: **8**/10", ("Red.", 0.8)),
        ("Red.\nconfidence 1", ("Red.", 0.01)),
        ("Red.\nConfidence: 1.0", ("Red.", 1.0)),
        ("Red.\nConfidence: 100", ("Red.", 1.0)),
        ("Red.\nConfidence: 120", ("Red.\nConfidence: 120", None)),
        ("Red.\nConfidence: high", ("Red.\nConfidence: high", None)),
        ("I have 85 apples.", ("I have 85 apples.", None)),
        ("Confidence: 85\nRed.", ("Confidence: 85\nRed.", None)),
    ],
)
def test_the_last_line(text, parts):
    assert split_confidence(text) == parts


def test_messages_and_their_tools(tmp_path):
    """The user's last message asks; what comes after it stays as it is."""
    turns = [
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3", "name": "add"},
    ]
    with Saying() as server:
        server.says = {"3": ["Three.\nConfidence: 90"]}
        run(server, tmp_path, [{"prompt": turns}], teacher_confidence="verbalised")
    (row,) = Dataset.from_parquet(str(tmp_path / "out/train.parquet"))
    asked = server.asked[0]["messages"]
    assert "how sure" in asked[0]["content"] and asked[2]["content"] == "3"
    assert row["prompt"][0]["content"] == "Add 1 and 2." and row["completion"][0]["content"] == "Three."
    assert row["teacher_confidence"] == 0.9 and answer(server.asked[0], 0)
