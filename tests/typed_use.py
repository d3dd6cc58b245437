"""What a user of the public names may write. It is read by mypy and not run: see `test_types.py`."""

from collections.abc import Callable
from typing import assert_type

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import TrainOutput
from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig, SFTTrainer

import trl_bbkd
from trl_bbkd import (
    BayesKDConfig,
    BayesKDTrainer,
    Discriminator,
    DistillationError,
    EvalJudgeConfig,
    GADConfig,
    GADTrainer,
    JudgeCallback,
    LLKDConfig,
    LLKDDataCollator,
    LLKDMixin,
    LLKDTrainer,
    PreferenceKDConfig,
    PreferenceKDTrainer,
    ProxyAlignmentConfig,
    ProxyAlignmentTrainer,
    ProxyKDConfig,
    ProxyKDTrainer,
    launch,
    load_teacher_data,
    pseudo_label,
)


def gad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> GADTrainer:
    args = GADConfig(output_dir="student", num_generations=4, warmup_epochs=0.5, discriminator="shared")
    assert_type(args.warmup_epochs, float)
    trainer = GADTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig())
    assert_type(trainer, GADTrainer)
    assert_type(trainer.train(), TrainOutput)
    assert_type(trainer.train(resume_from_checkpoint=True).training_loss, float)
    assert_type(trainer.args, GADConfig)
    assert_type(trainer.discriminator, Discriminator)
    trainer.save_model()
    trainer.push_to_hub()
    trainer.create_model_card(teacher_name="a teacher")
    return trainer


def proxy_kd(rows: Dataset) -> None:
    args = ProxyKDConfig(output_dir="student", kl_weight=0.5)
    trainer = ProxyKDTrainer("student", "proxy", args=args, train_dataset=rows)
    assert_type(trainer.train(), TrainOutput | None)
    assert_type(trainer.args, ProxyKDConfig)
    # As every trainer of transformers is called
    ProxyKDTrainer("student", args=args, train_dataset=rows)


def length(prompts: list[str], candidates: list[str], teacher_answers: list[str]) -> list[float]:
    return [float(len(text)) for text in candidates]


def preference_kd(model: PreTrainedModel, rows: Dataset) -> None:
    args = PreferenceKDConfig(output_dir="student", judge="overlap", num_generations=4)
    trainer = PreferenceKDTrainer(model, args, train_dataset=rows, judge=length)
    assert_type(trainer.train(), TrainOutput)
    assert_type(trainer.args, PreferenceKDConfig)


def alignment(model: PreTrainedModel, rows: Dataset) -> None:
    aligned = ProxyAlignmentTrainer(model, ProxyAlignmentConfig("proxy", num_rounds=2), train_dataset=rows)
    aligned.train()
    assert_type(aligned.evaluate(), dict[str, float])
    assert_type(aligned.best_round, int)


def bayes_kd(rows: Dataset) -> None:
    trainer = BayesKDTrainer("student", "proxy", BayesKDConfig(output_dir="student", posterior_weight=0.5), rows)
    assert_type(trainer.train(), TrainOutput | None)
    assert_type(trainer.args, BayesKDConfig)


def llkd(rows: Dataset) -> Trainer:
    labelled = pseudo_label(rows, ["good", "bad"], "teacher", prompt="{text}: {labels}?", as_chat=True)
    trainer = LLKDTrainer("student", LLKDConfig(output_dir="student"), train_dataset=labelled)
    assert_type(trainer.train(), TrainOutput)
    assert_type(trainer.args, LLKDConfig)
    assert_type(trainer.class_names, list[str] | None)
    return trainer


class SelectiveSFTTrainer(LLKDMixin, SFTTrainer):
    pass


def selection(
    model: PreTrainedModel, args: SFTConfig, collator: Callable[[list[dict[str, object]]], dict[str, object]]
) -> None:
    assert_type(SelectiveSFTTrainer(model=model, args=args).train(), TrainOutput)
    print(LLKDDataCollator(collator, group_column="label")([{"label": 0}])["teacher_confidence"])


def teacher_text(script: ScriptArguments, mixture: DatasetMixtureConfig) -> Dataset | IterableDataset:
    train, test = load_teacher_data(script, mixture, input_column="text")
    assert_type(test, Dataset | IterableDataset | None)
    return train


def scores(backbone: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    discriminator = Discriminator(backbone, head="scalar")
    return discriminator.forward(ids, torch.ones_like(ids), torch.ones_like(ids)).scores


def judged(trainer: SFTTrainer, rows: Dataset) -> None:
    judge = EvalJudgeConfig(base_url="http://127.0.0.1:8000/v1", model="judge", metrics=["win_rate"], max_cost=None)
    assert_type(judge.metrics, list[str])
    trainer.add_callback(JudgeCallback(trainer, rows, judge))


def recipe() -> str:
    assert_type(trl_bbkd.__version__, str)
    try:
        assert_type(launch(__name__, __file__), bool)
    except DistillationError as error:
        return str(error)
    return ""


def mistakes() -> None:
    """Each is one: mypy is to say so. An `ignore` without an error is an error of its own."""
    GADTrainer()  # type: ignore[call-arg]
    GADConfig(output_dir="student", warmup_epoch=1.0)  # type: ignore[call-arg]
    LLKDConfig(output_dir="student", pool_factor="4")  # type: ignore[arg-type]
    pseudo_label(Dataset.from_list([]), "good")  # type: ignore[arg-type]
    launch("__main__")  # type: ignore[call-arg]
    print(trl_bbkd.GADTraner)  # type: ignore[attr-defined]
    GADTrainer("student").train().trainig_loss()  # type: ignore[attr-defined]
