"""LLKDTrainer in the place of transformers' Trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import TrainingArguments

from tests.conftest import build_tokenizer
from tests.llkd.helpers import LORA, build_encoder, make_rows, make_trainer, save_student
from trl_bbkd import LLKDTrainer


def test_the_configuration_of_transformers_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args of LLKDTrainer must be a LLKDConfig, got TrainingArguments"):
        LLKDTrainer("student", TrainingArguments(str(tmp_path), use_cpu=True))


def test_a_processor_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a tokenizer, got object"):
        make_trainer(tmp_path, trainer_kwargs={"processing_class": object()})


def test_a_student_that_cannot_learn_is_refused(tmp_path):
    get_peft_model(build_encoder(), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="The student .*adapter is an adapter. Hand in PeftModel.from_pretrained"):
        make_trainer(tmp_path, model=str(tmp_path / "adapter"))
    for student in (
        build_encoder().requires_grad_(False),
        PeftModel.from_pretrained(build_encoder(), tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match="The student has no trainable parameter"):
            make_trainer(tmp_path / "out", model=student)
    with pytest.raises(ValueError, match="inference_mode=True"):
        adapter = LoraConfig.from_pretrained(tmp_path / "adapter")
        make_trainer(tmp_path / "out", trainer_kwargs={"peft_config": adapter})


def test_virtual_tokens_are_learned(tmp_path):
    adapter = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    trainer = make_trainer(tmp_path, trainer_kwargs={"peft_config": adapter}, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any("prompt_encoder" in name for name in before)
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if n in before)


def test_what_is_wrong_with_a_selection_is_told_before_the_student_is_loaded(tmp_path, monkeypatch):
    student = save_student(tmp_path / "student", build_encoder())
    monkeypatch.setattr("trl_bbkd.llkd.trainer.load_student", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="A pool of 64 rows.*larger than the data set of 32"):
        make_trainer(tmp_path, student, pool_factor=16)
    rows = make_rows().remove_columns("teacher_confidence")
    with pytest.raises(ValueError, match="needs a column `teacher_confidence`"):
        make_trainer(tmp_path, student, rows)
    with pytest.raises(ValueError, match="^Row 0: `teacher_confidence` is 85.0"):
        make_trainer(tmp_path, student, rows.add_column("teacher_confidence", [85.0] * 32))


def test_rows_that_fill_no_batch(tmp_path):
    with pytest.raises(ValueError, match="32 training rows do not fill one batch of 40 rows"):
        make_trainer(tmp_path, selection="none", per_device_train_batch_size=40, dataloader_drop_last=True)


class TestUnusedColumns:
    def test_rows_without_others_are_learned_from(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            rows=make_rows(gold=True),
            remove_unused_columns=False,
            max_steps=1,
            trainer_kwargs={"eval_dataset": make_rows()},
        )
        trainer.train()
        assert trainer.state.global_step == 1 and trainer.evaluate()["eval_accuracy"] >= 0

    def test_a_rows_place_in_its_file_reaches_no_student(self, tmp_path):
        """Files bring it along: errors name rows by it."""
        rows = make_rows().add_column("row_in_file", list(range(32)))
        trainer = make_trainer(
            tmp_path, rows=rows, remove_unused_columns=False, max_steps=1, trainer_kwargs={"eval_dataset": rows}
        )
        trainer.train()
        assert trainer.state.global_step == 1 and trainer.evaluate(rows)["eval_accuracy"] >= 0

    @pytest.mark.parametrize("where", ["training", "evaluation"])
    def test_others_are_named(self, tmp_path, where):
        rows = make_rows().add_column("source", ["web"] * 32)
        given = {"rows": rows} if where == "training" else {"trainer_kwargs": {"eval_dataset": rows}}
        with pytest.raises(ValueError, match=f"the columns `source` of the {where} rows would reach the student"):
            make_trainer(tmp_path, remove_unused_columns=False, **given)

    def test_a_collator_of_ones_own_may_take_them(self, tmp_path):
        rows = make_rows().add_column("source", ["web"] * 32)
        tokenizer = build_tokenizer()

        def collate(batch):
            return tokenizer.pad(
                [{k: row[k] for k in ("input_ids", "attention_mask")} for row in batch], return_tensors="pt"
            ) | {"labels": torch.tensor([row["label"] for row in batch])}

        trainer = make_trainer(
            tmp_path,
            rows=rows,
            remove_unused_columns=False,
            max_steps=1,
            trainer_kwargs={"data_collator": collate},
            selection="none",
        )
        trainer.train()
        assert trainer.state.global_step == 1


class TestRows:
    def test_a_token_without_an_embedding(self, tmp_path):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<new>"])
        rows = make_rows().map(lambda row, i: {"text": row["text"] + (" <new>" if i == 5 else "")}, with_indices=True)
        with pytest.raises(
            ValueError, match="Row 5 of the training rows has token 330, but the student has 330 embeddings"
        ):
            make_trainer(tmp_path, rows=rows, trainer_kwargs={"processing_class": tokenizer})

    def test_token_rows_that_are_too_long(self, tmp_path):
        rows = make_rows().remove_columns("text").add_column("input_ids", [[5] * 3] * 31 + [[5] * 65])
        with pytest.raises(
            ValueError, match="Row 31 .* has 65 tokens.*Cut its `input_ids` to 64: max_length acts on text only"
        ):
            make_trainer(tmp_path, rows=rows)

    def test_one_accuracy_whichever_door_they_come_through(self, tmp_path):
        held_out = make_rows(12, seed=3)
        trainer = make_trainer(tmp_path, trainer_kwargs={"eval_dataset": held_out})
        at_init = trainer.evaluate()
        trainer.eval_dataset = held_out
        for found in (trainer.evaluate(), trainer.evaluate(held_out)):
            assert found["eval_loss"] == at_init["eval_loss"]
        assert trainer.evaluate({"a": held_out})["eval_a_loss"] == at_init["eval_loss"]
        trainer.eval_dataset = {"a": held_out}
        assert trainer.evaluate()["eval_a_loss"] == at_init["eval_loss"]
        assert trainer.predict(held_out).metrics["test_loss"] == at_init["eval_loss"]
        with pytest.raises(ValueError, match="`label` is 7, which is none of the student's 3 classes"):
            trainer.evaluate(Dataset.from_list([{"text": "sky", "label": 7}]))

    @pytest.mark.parametrize("selection", ["llkd", "none"])
    def test_replaced_training_rows_are_prepared_too(self, tmp_path, selection):
        rows = make_rows(48, gold=selection == "llkd", seed=1)
        one = make_trainer(tmp_path / "one", model=build_encoder(), selection=selection, max_steps=2)
        one.train_dataset = rows
        two = make_trainer(tmp_path / "two", model=build_encoder(), rows=rows, selection=selection, max_steps=2)
        losses = []
        for trainer in (one, two):
            trainer.train()
            losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert losses[0] == losses[1]
        if selection == "llkd":
            assert len(one.tally.used) == 48
        one.train_dataset = make_rows(4).cast_column("label", make_rows().features["label"])
        if selection == "llkd":
            with pytest.raises(ValueError, match="larger than the data set of 4"):
                one.train()


def test_batch_metrics_need_metrics_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="batch_eval_metrics=True needs compute_metrics of your own"):
        make_trainer(tmp_path, batch_eval_metrics=True)


def test_a_smaller_batch_is_no_multiple_of_a_pool(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size=True is not possible with selection='llkd'"):
        make_trainer(tmp_path, auto_find_batch_size=True)


def test_an_optimizer_class_acts(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_kwargs={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, max_steps=1
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD


def test_it_trains_on_and_resumes(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    weight = trainer.model.classifier.weight.detach().clone()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2
    assert torch.equal(trainer.model.classifier.weight, weight)
