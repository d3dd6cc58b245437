"""ProxyAlignmentTrainer in DPOTrainer's place."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, LogCompletionsCallback

from tests.proxykd.helpers import LORA, ON_CPU, make_aligner, make_rows
from trl_bbkd import ProxyAlignmentConfig, ProxyAlignmentTrainer
from trl_bbkd.proxy.agreement import share_standard_error


HELD_OUT = Dataset.from_list(make_rows(20)[:4])


def test_trls_configuration_is_refused(tmp_path):
    args = DPOConfig(str(tmp_path), **{k: v for k, v in ON_CPU.items() if k != "max_completion_length"})
    with pytest.raises(TypeError, match="must be a ProxyAlignmentConfig, got DPOConfig"):
        ProxyAlignmentTrainer("proxy", args)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_rows_are_one_dataset(tmp_path, name):
    for given, kind in (
        ({"a": HELD_OUT}, "is dict"),
        (HELD_OUT.to_iterable_dataset(), "is a stream: turn streaming off"),
        *([(None, "is missing")] if name == "train_dataset" else []),
    ):
        rows = {"train_dataset": HELD_OUT, name: given}
        with pytest.raises(ValueError, match=f"{name} {kind}"):
            ProxyAlignmentTrainer("proxy", ProxyAlignmentConfig(str(tmp_path), **ON_CPU), **rows)


def test_models_that_could_not_learn_are_refused(tmp_path, tiny_model_dir):
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(**LORA)).save_pretrained(tmp_path)
    proxy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path)
    with pytest.raises(ValueError, match="The proxy has no trainable parameter"):
        make_aligner(tmp_path / "out", proxy)
    with pytest.raises(ValueError, match="The proxy .* is an adapter. Hand in PeftModel.from_pretrained"):
        make_aligner(tmp_path / "out", str(tmp_path))
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig is not supported for the proxy"):
        make_aligner(tmp_path / "out", tiny_model_dir, trainer_kwargs={"peft_config": adapter})
    with pytest.raises(TypeError, match="must be a tokenizer, got object"):
        make_aligner(tmp_path / "out", tiny_model_dir, trainer_kwargs={"processing_class": object()})


def test_a_round_that_fills_no_batch_is_refused(tmp_path, tiny_model_dir):
    with pytest.raises(ValueError, match="2 training rows of a round do not fill one batch of 4.*lower num_rounds"):
        make_aligner(tmp_path, tiny_model_dir, num_rounds=8, dataloader_drop_last=True)


def test_a_round_without_a_step_is_an_error(tmp_path, tiny_model_dir):
    with pytest.raises(ValueError, match="Round 1 took no optimizer step and learned nothing"):
        make_aligner(tmp_path, tiny_model_dir, num_train_epochs=0.0).train()


def test_rows_whose_prompt_fills_max_length_are_dropped(tmp_path, tiny_model_dir):
    trainer = make_aligner(tmp_path, tiny_model_dir)
    lengths = sorted(len(trainer.processing_class(row["prompt"])["input_ids"]) for row in make_rows(20)[4:])
    trainer = make_aligner(tmp_path, tiny_model_dir, max_length=lengths[8])
    assert len(trainer._teacher_rows) == sum(length < lengths[8] for length in lengths) < 16
    assert len(make_aligner(tmp_path, tiny_model_dir, max_length=3, truncation_mode="keep_end")._teacher_rows) == 16
    with pytest.raises(ValueError, match="max_length=2 cuts off every answer"):
        make_aligner(tmp_path, tiny_model_dir, max_length=2)


def test_evaluate_measures_agreement(tmp_path, tiny_model_dir):
    trainer = make_aligner(tmp_path, tiny_model_dir)
    found = trainer.evaluate()
    assert found == trainer.evaluate(HELD_OUT)
    assert {name: value for name, value in found.items() if name != "epoch"} == {
        f"eval_{name}": value for name, value in trainer._measure().items()
    }
    other = trainer.evaluate(Dataset.from_list(make_rows(20)[4:]), metric_key_prefix="test")
    assert other["test_nll"] != found["eval_nll"]
    trainer.eval_dataset = Dataset.from_list(make_rows(20)[4:])
    assert trainer.evaluate()["eval_nll"] == other["test_nll"]
    with pytest.raises(ValueError, match="eval_dataset is missing"):
        make_aligner(tmp_path, tiny_model_dir, held_out=0).evaluate()
    with pytest.raises(ValueError, match="predict is not possible here"):
        trainer.predict(HELD_OUT)


def test_completions_are_logged(tmp_path, tiny_model_dir):
    trainer = make_aligner(tmp_path, tiny_model_dir, num_rounds=1, max_steps=1)
    callback = LogCompletionsCallback(trainer, num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    assert [row[1] for row in callback.table] == [row["prompt"] for row in make_rows(20)[:2]]


@pytest.mark.parametrize("in_memory", [False, True])
def test_train_again_keeps_what_is_there(tmp_path, tiny_model_dir, in_memory):
    proxy = AutoModelForCausalLM.from_pretrained(tiny_model_dir) if in_memory else tiny_model_dir
    trainer = make_aligner(tmp_path, proxy)
    trainer.train()
    rounds, weight = trainer.rounds, trainer.model.get_input_embeddings().weight.detach().clone()
    for resume in (None, True):
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.rounds == rounds
        assert torch.equal(trainer.model.get_input_embeddings().weight, weight)


def test_the_standard_error_of_agreement(tmp_path, tiny_model_dir):
    """By the jackknife over rows, which it approximates, and the binomial one where every row is one token."""
    correct, tokens = [3, 0, 5, 2, 4, 1, 2, 6], [4, 3, 6, 5, 4, 2, 4, 8]
    share = sum(correct) / sum(tokens)
    sums = (
        sum(c * c for c in correct),
        sum(c * n for c, n in zip(correct, tokens, strict=True)),
        sum(n * n for n in tokens),
    )
    found = share_standard_error(share, sum(tokens), len(tokens), *sums)
    left_out = [(sum(correct) - c) / (sum(tokens) - n) for c, n in zip(correct, tokens, strict=True)]
    mean = sum(left_out) / len(left_out)
    jackknife = math.sqrt((len(tokens) - 1) / len(tokens) * sum((value - mean) ** 2 for value in left_out))
    assert found == pytest.approx(jackknife, rel=0.1)
    assert share_standard_error(0.25, 4, 4, 1, 1, 4) == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert share_standard_error(0.25, 4, 1, 1, 4, 16) == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    measured = make_aligner(tmp_path, tiny_model_dir)._measure()
    assert 0 <= measured["top1_agreement_se"] < 0.5
