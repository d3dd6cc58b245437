"""By which name errors call a row, and what rows that can be used deserve to be told."""

import json
import logging

import pytest
from trl import DatasetMixtureConfig

from trl_bbkd.bayeskd.top_logprobs import check_top_logprobs
from trl_bbkd.data.teacher_data import check_teacher_data, row_names, tokenize_teacher_data
from trl_bbkd.errors import LLKDDataError, TeacherDataError
from trl_bbkd.llkd.trainer import tokenize as tokenize_texts
from trl_bbkd.proxy.checks import check_tokens
from trl_bbkd.proxykd.stage_rows import split_rows
from trl_bbkd.reports.report import counts_table
from trl_bbkd.soft_targets.rows import soft_target_rows

from .test_teacher_data import load, rows, write_jsonl


class TestRowNames:
    """Errors name a row by its place in the file."""

    @pytest.fixture
    def path(self, tmp_path):
        pairs = [(f"q{row}", "a") for row in range(40)]
        pairs[12] = ("Once upon a time there was a fox. " * 9, "a<|im_end|>b")
        return write_jsonl(tmp_path / "all.jsonl", *pairs)

    def load(self, path):
        """Divided and shuffled; row 12 is among the training rows."""
        train = load(path, DatasetMixtureConfig(test_split_size=0.25))[0].shuffle(seed=1)
        assert 12 in train["row_in_file"] and train["row_in_file"].index(12) != 12
        return train

    @pytest.mark.parametrize("streaming", [False, True])
    def test_after_splits_and_shuffles(self, path, tokenizer, streaming):
        train = self.load(path)
        train = train.to_iterable_dataset() if streaming else train
        with pytest.raises(TeacherDataError, match="No room for an answer: row 12 has a prompt of"):
            list(tokenize_teacher_data(train, tokenizer, max_completion_length=8, max_length=50)[0])

    def test_a_stream_from_a_file_has_them_too(self, path):
        train, _ = load(path, dataset_streaming=True)
        assert [row["row_in_file"] for row in train] == list(range(40))
        assert [row["row_in_file"] for row in train.skip(3).take(2)] == [3, 4]

    def test_after_drops(self, path, tokenizer, caplog):
        train = self.load(path)
        kept, counts = tokenize_teacher_data(train, tokenizer, max_completion_length=8, max_prompt_length=50)
        assert counts.dropped_prompts == 1 and row_names(kept) == [row for row in row_names(train) if row != 12]
        tokenize_teacher_data(train, tokenizer, max_completion_length=8)
        assert "the first in row 12" in caplog.text

    def test_in_the_check(self, path):
        train = self.load(path).map(lambda row: {"completion": "" if row["row_in_file"] == 12 else "a"})
        with pytest.raises(TeacherDataError, match="Row 12: `completion` is empty"):
            check_teacher_data(train)

    def test_of_a_data_set_that_no_file_gave(self, tokenizer):
        data, _ = tokenize_teacher_data(
            rows(("Once " * 9, "a"), ("Once", "a")), tokenizer, max_completion_length=4, max_prompt_length=9
        )
        assert row_names(data) == [1]
        assert row_names(rows(("a", "b"), ("a", "b"))) == [0, 1]

    def test_in_what_comes_after(self, path, tokenizer):
        kept, _ = tokenize_teacher_data(self.load(path), tokenizer, max_completion_length=8)
        row_of_12 = row_names(kept).index(12)
        with pytest.raises(TeacherDataError, match="Row 12 has .* tokens, prompt and answer"):
            check_tokens(soft_target_rows(kept, tokenizer), 50, 400, row_names(kept))
        assert soft_target_rows(kept, tokenizer)["row_in_file"][row_of_12] == 12
        staged = kept.add_column("stage", ["warmup" if row != 12 else "no" for row in row_names(kept)])
        with pytest.raises(TeacherDataError, match="Row 12: `stage` is 'no'"):
            split_rows(staged, 0.5, 0.5, 0)
        values = [None if row != 12 else {"ids": 1} for row in row_names(kept)]
        with pytest.raises(TeacherDataError, match="Row 12: `top_logprobs` must be"):
            check_top_logprobs(values, kept["teacher_ids"], 400, tokenizer.eos_token_id, row_names(kept))

    def test_of_labelled_rows(self, tmp_path):
        path = tmp_path / "labels.jsonl"
        path.write_text(
            "".join(json.dumps({"text": None if row == 3 else "a", "label": 0}) + "\n" for row in range(9))
        )
        train = load(path)[0].shuffle(seed=1)
        settings = {"tokenizer": None, "text_column": "text", "max_length": None, "where": "training"}
        with pytest.raises(LLKDDataError, match="Row 3 of the training rows: `text` is None"):
            tokenize_texts(train[:], list(range(9)), **settings)


class TestWarnings:
    """Rows that can be used, but hardly as they were meant."""

    GOOD = [(f"question {row}", f" {row} is the answer") for row in range(8)]

    def warnings(self, pairs, tokenizer, caplog, **settings):
        with caplog.at_level(logging.WARNING, logger="trl_bbkd.data.teacher_data"):
            tokenize_teacher_data(rows(*pairs), tokenizer, **{"max_completion_length": 40, **settings})
        return [record.getMessage() for record in caplog.records]

    def test_none_where_there_is_nothing_to_say(self, tokenizer, caplog):
        assert self.warnings(self.GOOD, tokenizer, caplog) == []

    @pytest.mark.parametrize(
        "pairs, settings, message",
        [
            ([(prompt, "a") for prompt, _ in GOOD], {}, "All 8 answers of the training rows are the same"),
            ([("a", answer) for _, answer in GOOD], {}, "All 8 prompts of the training rows are the same"),
            (
                GOOD,
                {"max_completion_length": 2},
                "8 of the 8 answers of the training rows are cut at `max_completion_le",
            ),
            (GOOD[:2], {}, "There are only 2 training rows"),
            (GOOD[:1], {}, "There is only 1 training row:"),
        ],
    )
    def test_one_line_each(self, tokenizer, caplog, pairs, settings, message):
        (found,) = self.warnings(pairs, tokenizer, caplog, **settings)
        assert found.startswith(message)

    def test_a_few_held_out_rows_are_enough(self, tokenizer, caplog):
        assert self.warnings(self.GOOD[:2], tokenizer, caplog, held_out=True) == []
        (found,) = self.warnings([("a", "b"), ("a", "c")], tokenizer, caplog, held_out=True)
        assert found.startswith("All 2 prompts of the held-out rows are the same")


def test_a_count_of_one_split_alone_is_in_the_table(tokenizer):
    splits = {"train": ("Once", "a"), "test": ("Once", "a<|im_end|>b")}
    counts = {
        name: tokenize_teacher_data(rows(pair), tokenizer, max_completion_length=9)[1] for name, pair in splits.items()
    }
    assert "| answers cut at the text of an end token | – | 1 |" in counts_table(counts)
