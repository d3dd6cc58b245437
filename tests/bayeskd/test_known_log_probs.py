"""What an API shows of the teacher's distribution, in what the student learns."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.errors import StageError

from .helpers import make_rows, make_trainer, stored_targets


def test_they_are_in_the_posterior_that_the_student_learns(tmp_path, tiny_model_dir, other_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = make_rows(12)
    answers = tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=16)[0]["teacher_ids"]
    half, tenth = np.log(0.5), np.log(0.1)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        known = {"ids": [[t, (t + 9) % 330] for t in answer], "logprobs": [[half, tenth] for _ in answer]}
        row["top_logprobs"] = None if number == 1 else known | {name: [*known[name][:-1], []] for name in known}
    trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, rows, held_out=0)
    trainer.train()
    posterior = stored_targets(trainer.data_collator.stores[1])
    for number, (row, answer) in enumerate(zip(trainer.train_dataset, answers, strict=True)):
        targets = posterior[row["row_key"]][:-1]
        for stored, token in zip(targets if number != 1 else [], answer, strict=False):
            assert stored[token] == pytest.approx(0.5, abs=1e-4)
            assert stored[(token + 9) % 330] == pytest.approx(0.1, abs=1e-4)
    changed = [row | {"top_logprobs": None} for row in rows]
    with pytest.raises(StageError, match=r"targets/posterior was made from something else \(top_logprobs: "):
        make_trainer(tmp_path, tiny_model_dir, other_model_dir, changed, held_out=0).train()


def test_of_rows_of_the_same_tokens_one_that_has_them_counts(tmp_path, tiny_model_dir, other_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    row = make_rows(1)[0]
    answers = tokenize_teacher_data(Dataset.from_list([row]), tokenizer, max_completion_length=16)[0]["teacher_ids"]
    known = {"ids": [[11]] * len(answers[0]), "logprobs": [[-0.5]] * len(answers[0])}
    rows = [row | {"top_logprobs": value} for value in (None, known, None)]
    config = {"stages": ["estimate"], "held_out": 0}
    trainer = make_trainer(tmp_path / "a", tiny_model_dir, other_model_dir, rows, **config)
    trainer.train()
    (targets,) = stored_targets(trainer.data_collator.stores[1]).values()
    assert all(stored[11] == pytest.approx(np.exp(-0.5), abs=1e-4) for stored in targets)
    # In another order the targets are the same, and are not made again
    again = make_trainer(tmp_path / "a", tiny_model_dir, other_model_dir, rows[1:] + rows[:1], **config)
    again.proxy_stages._estimated = None
    again.train()
