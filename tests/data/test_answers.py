"""Rows that share a prompt, wherever rows are read."""

import pytest
from datasets import Dataset

from trl_bbkd.data.answers import AnswersByPrompt, count_prompts, first_prompts
from trl_bbkd.data.config import TeacherTextConfig
from trl_bbkd.data.teacher_data import tokenize_as_configured, tokenize_teacher_data
from trl_bbkd.errors import TeacherDataError
from trl_bbkd.gad.config import GADConfig
from trl_bbkd.proxykd.stage_rows import split_rows


ROWS = [("p", "one"), ("q", "two"), ("p", "three"), ("r", "four"), ("p", "one"), ("q", "five")]


@pytest.fixture
def rows():
    return Dataset.from_list([{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in ROWS])


@pytest.fixture
def tokenized(rows, tokenizer):
    return tokenize_teacher_data(rows, tokenizer, max_completion_length=8)[0]


def test_answers_to_a_prompt(tokenized, tokenizer):
    answers = AnswersByPrompt(tokenized)
    assert answers.first_rows == [0, 1, 3] and answers.most == 3
    texts = [tokenizer.batch_decode(answers(row["prompt_ids"], row["teacher_ids"]), True) for row in tokenized]
    assert texts[2] == [" three", " one", " one"] and texts[4] == [" one", " three", " one"] == texts[0]
    assert texts[3] == [" four"] and texts[5] == [" five", " two"]
    stream = AnswersByPrompt(tokenized.to_iterable_dataset())
    assert stream(tokenized[0]["prompt_ids"], tokenized[0]["teacher_ids"]) == [tokenized[0]["teacher_ids"]]


@pytest.mark.parametrize("kind", ["table", "list", "stream"])
def test_first_prompts_have_all_their_rows(tokenized, kind):
    """A stream may go on for ever: it is read up to a third prompt."""
    given = {"table": tokenized, "list": tokenized.to_list(), "stream": tokenized.to_iterable_dataset()}[kind]
    kept = first_prompts(given, 2)
    assert [row["completion"] for row in kept] == [
        f" {answer}"
        for answer in (["one", "two", "three"] if kind == "stream" else ["one", "two", "three", "one", "five"])
    ]
    assert count_prompts(kept) == 2
    assert len(first_prompts(given, 9)) == 6


def test_at_most_so_many_answers_to_a_prompt_are_trained_on(rows, tokenizer):
    args = TeacherTextConfig(max_completion_length=8, answers_per_prompt=1)
    kept, counts = tokenize_as_configured(rows, tokenizer, args)
    assert kept["completion"][:] == [" one", " two", " four"]
    assert (counts.rows, counts.kept, counts.answers_left_out, counts.dropped_prompts) == (6, 3, 3, 0)
    assert ("answers left out, answers_per_prompt", "3") in counts.table_rows()
    assert kept["row_in_file"][:] == [0, 1, 3]
    assert len(tokenize_as_configured(rows, tokenizer, TeacherTextConfig(answers_per_prompt=2))[0]) == 5
    # Of held-out rows all are measured on
    assert len(tokenize_as_configured(rows, tokenizer, args, held_out=True)[0]) == 6
    assert len(tokenize_as_configured(rows, tokenizer, TeacherTextConfig())[0]) == 6
    with pytest.raises(
        TeacherDataError, match="answers_per_prompt=1 counts the rows of a prompt, .* Turn streaming off"
    ):
        tokenize_as_configured(rows.to_iterable_dataset(), tokenizer, args)


def test_a_count_under_one(tmp_path):
    with pytest.raises(ValueError, match="answers_per_prompt must be at least 1, got 0"):
        TeacherTextConfig(answers_per_prompt=0).check_teacher_text()
    with pytest.raises(ValueError, match="answers_per_prompt must be at least 1, got 0"):
        GADConfig(str(tmp_path), answers_per_prompt=0)


def test_the_stages_of_a_proxy_divide_prompts():
    rows = Dataset.from_list([{"prompt": str(number // 3), "completion": str(number)} for number in range(60)])
    parts = split_rows(rows, 0.3, 0.3, seed=0)
    prompts = [set(part["prompt"]) for part in parts]
    assert all(prompts) and sum(map(len, prompts)) == 20 == len(set.union(*prompts))
