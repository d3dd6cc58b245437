"""The independent metrics of an evaluation, and the checkpoint they choose."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_bbkd.evaluation.student import teacher_nll
from trl_bbkd.gad.trainer import GADTrainer

from .helpers import FixedSamplesTrainer, assert_same_weights, make_trainer, weights


def judge_length(prompts, completions):
    return {"characters": [len(text) for text in completions], "none": [0.0] * len(completions)}


def with_eval(trainer_class=GADTrainer):
    def make(tmp_path, model, rows, trainer_kwargs=None, **config):
        kwargs = {"eval_dataset": Dataset.from_list(rows[10:16]), **(trainer_kwargs or {})}
        return make_trainer(tmp_path, model, rows, trainer_class, kwargs, **config)

    return make


@pytest.mark.parametrize("rows", ["standard_rows", "conversational_rows"])
@pytest.mark.parametrize(("batch_size", "generations"), [(4, 4), (12, 2), (8, 1)])
def test_held_out_metrics(tiny_model_dir, tmp_path, request, rows, batch_size, generations):
    judged = []

    def judge(prompts, completions):
        judged.extend(completions)
        return judge_length(prompts, completions)

    trainer = with_eval()(
        tmp_path,
        tiny_model_dir,
        request.getfixturevalue(rows),
        {"sample_metrics": judge},
        per_device_eval_batch_size=batch_size,
        num_generations_eval=generations,
        temperature=0.5,
    )
    discriminator, student = weights(trainer.discriminator), weights(trainer.model)
    metrics = trainer.evaluate()
    assert_same_weights(discriminator, weights(trainer.discriminator))
    assert_same_weights(student, weights(trainer.model))
    expected = teacher_nll(trainer.model, trainer.processing_class, list(trainer.eval_dataset))
    assert metrics["eval_teacher_nll"] == pytest.approx(expected, rel=1e-5)
    # Each prompt once: two of them have two of the six rows
    assert len(judged) == 4 * generations
    assert metrics["eval_characters"] == pytest.approx(sum(map(len, judged)) / len(judged))
    assert metrics["eval_none"] == 0.0
    # The next evaluation starts afresh
    others = trainer.train_dataset.select(range(4))
    expected = teacher_nll(trainer.model, trainer.processing_class, list(others))
    assert trainer.evaluate(others)["eval_teacher_nll"] == pytest.approx(expected, rel=1e-5)


def test_the_checkpoint_with_the_lowest_teacher_nll_is_loaded_at_the_end(tiny_model_dir, tmp_path, standard_rows):
    trainer = with_eval(FixedSamplesTrainer)(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        max_steps=4,
        warmup_learning_rate=1e-3,
        learning_rate=5e-2,
        max_grad_norm=10.0,
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="teacher_nll",
    )
    trainer.train()
    nll = {e["step"]: e["eval_teacher_nll"] for e in trainer.state.log_history if "eval_teacher_nll" in e}
    best = min(nll, key=nll.get)
    assert list(nll) == [1, 2, 3, 4] and best not in (4, max(nll, key=nll.get))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same_weights(weights(saved), weights(trainer.model))
    assert trainer.evaluate()["eval_teacher_nll"] == pytest.approx(nll[best], rel=1e-5)
