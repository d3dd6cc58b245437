import pytest
from datasets import Dataset

from trl_bbkd.data.sameness import sameness_warnings
from trl_bbkd.data.teacher_data import TeacherDataCounts


def rows(prompts, answers):
    return [{"prompt": prompt, "teacher_ids": answer} for prompt, answer in zip(prompts, answers, strict=True)]


VARIED = rows("ab", [[1, 2], [3]])
COUNTS = {"train": TeacherDataCounts(2, 0, 0, 0, 2), "test": TeacherDataCounts(2, 0, 0, 1, 2)}


def kinds(train, held_out, counts=COUNTS):
    found = sameness_warnings(train, held_out, counts)
    assert all(warning["step"] == 0 and warning["text"].endswith(".") for warning in found)
    return [(warning["kind"], "held-out" in warning["text"]) for warning in found]


def test_each_sameness_is_told_of_the_rows_that_have_it():
    train = Dataset.from_list(VARIED)
    assert kinds(train, VARIED) == []
    assert kinds(Dataset.from_list(rows("ab", [[1], [1]])), VARIED) == [("equal answers", False)]
    assert kinds(train, rows("ab", [[1], [1]])) == [("equal answers", True)]
    assert kinds(train, rows("aa", [[1], [2]])) == [("equal prompts", True)]
    messages = [[{"role": "user", "content": "a"}]] * 2
    assert kinds(Dataset.from_list(rows(messages, [[1], [1]])), VARIED) == [
        ("equal answers", False),
        ("equal prompts", False),
    ]
    cut = COUNTS | {"train": TeacherDataCounts(2, 0, 0, 2, 2)}
    assert kinds(train, VARIED, cut) == [("cut answers", False)]


def test_one_row_is_not_the_same_as_others():
    assert kinds(Dataset.from_list(VARIED), VARIED[:1]) == []


@pytest.mark.parametrize("kept", [None, 0])
def test_what_streams_is_not_looked_at(kept):
    stream = Dataset.from_list(rows("aa", [[1], [1]])).to_iterable_dataset()
    assert kinds(stream, VARIED, COUNTS | {"train": TeacherDataCounts(None, None, None, kept, kept)}) == []
