"""TRL's SDFT as the score-board trains it: on rows of the small world, from its student."""

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .test_benchmarks import benchmarks_can_be_imported, rows, tinyworld  # noqa: F401


@pytest.fixture(scope="module")
def sdft():
    return importlib.import_module("common.sdft")


def test_what_is_shown_is_the_teachers_answer(sdft, rows):  # noqa: F811
    rows, tokenizer = rows
    for found, row in zip(sdft.privileged_rows(rows, tokenizer), rows, strict=True):
        assert found == {"prompt": row["prompt"], "privileged_context": row["completion"]}
        # After a prompt that was answered, the prompt
        shown = tokenizer(sdft.SOLVED.format(**found))["input_ids"]
        prompt, answer = list(row["prompt_ids"]), list(row["teacher_ids"])
        assert answer[-1] == tokenizer.eos_token_id and shown == prompt + answer[:-1] + prompt
    cut = rows.map(lambda row: {"teacher_ids": row["teacher_ids"][:4]})
    for found, row in zip(sdft.privileged_rows(cut, tokenizer), rows, strict=True):
        assert found["privileged_context"] == " " + " ".join(row["completion"].split()[:4])


def test_other_tokens_of_a_prompt_are_refused(sdft, rows):  # noqa: F811
    rows, tokenizer = rows
    with pytest.raises(ValueError, match="other tokens of this prompt"):
        sdft.privileged_rows(rows.map(lambda row: {"prompt_ids": row["prompt_ids"][1:]}), tokenizer)


def test_a_student_is_trained_and_saved(sdft, tinyworld, tmp_path, rows):  # noqa: F811
    (rows, tokenizer), start = rows, tinyworld.WORLD / "student"
    log = sdft.train_sdft(
        start,
        tmp_path,
        rows,
        tokenizer,
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=tinyworld.ANSWER_TOKENS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    # To a model that sees more, the student is another one from the first step on
    assert [line["self_distillation/distillation_loss"] > 0 for line in log if "loss" in line] == [True, True]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (start, tmp_path))
    assert any(
        not torch.equal(value, other)
        for value, other in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
