"""A tiny encoder and a tiny decoder with classification heads, and rows with a teacher's labels."""

import random

import torch
from datasets import ClassLabel, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from tests.conftest import SENTENCES, build_tokenizer
from trl_bbkd.llkd.config import LLKDConfig
from trl_bbkd.llkd.trainer import LLKDTrainer


NAMES = ["sky", "fruit", "animal"]
ON_CPU = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "selection_rule": "class_mean",
    "selection_warmup_steps": 0,
    "max_length": 24,
    "per_device_train_batch_size": 4,
    "pool_factor": 2,
}


LORA = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def build_encoder(dropout=0.0, num_labels=3, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=330,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.2,
            num_labels=num_labels,
        )
    )


def build_decoder(num_labels=3, seed=0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=330,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            num_labels=num_labels,
        )
    )


def save_student(directory, model):
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def make_rows(count=32, gold=False, seed=0):
    """Texts of different lengths; a teacher that is right as often as it is sure."""
    rng = random.Random(seed)
    words = " ".join(SENTENCES).split()
    rows = []
    for number in range(count):
        label = number % 3
        # Of some classes it is surer than of others
        confidence = round(0.2 * label + rng.uniform(0.2, 0.6), 3)
        row = {
            "text": " ".join(rng.choice(words) for _ in range(rng.randint(1, 8))),
            "label": label,
            "teacher_confidence": confidence,
        }
        if gold:
            row["gold"] = label if rng.random() < confidence else (label + 1) % 3
        rows.append(row)
    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=NAMES))


def make_trainer(output_dir, model=None, rows=None, trainer_class=LLKDTrainer, trainer_kwargs=None, **config):
    return trainer_class(
        model=build_encoder() if model is None else model,
        args=LLKDConfig(str(output_dir), **{**ON_CPU, **config}),
        train_dataset=make_rows() if rows is None else rows,
        **{"processing_class": build_tokenizer(), **(trainer_kwargs or {})},
    )


class GradientRecorder(TrainerCallback):
    """The gradient of each optimizer step, before it is clipped or used."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def sequential_step(output_dir, per_device_train_batch_size):
    """The gradient of one step on rows in their order; of the second half the teacher is sure of none."""
    rows, recorder = make_rows(16), GradientRecorder()
    confidence = [value if number < 8 else 0.1 for number, value in enumerate(rows["teacher_confidence"])]
    rows = rows.remove_columns("teacher_confidence").add_column("teacher_confidence", confidence)
    trainer = make_trainer(
        output_dir,
        rows=rows,
        trainer_kwargs={"callbacks": [recorder]},
        per_device_train_batch_size=per_device_train_batch_size,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        max_steps=1,
    )
    trainer.train()
    return {
        # DDP gives names a prefix
        "gradient": {name.removeprefix("module."): value for name, value in recorder.gradients[0].items()},
        "state": trainer.selector.state_dict(),
        "loss": logged(trainer, "loss"),
        "kept_share": logged(trainer, "selection/kept_share"),
        "num_processes": trainer.accelerator.num_processes,
    }


def students_with_and_without_evaluation(output_dir):
    """Of training that came after an evaluation, and that did not."""
    students = {}
    for evaluates in (False, True):
        trainer = make_trainer(
            output_dir / str(evaluates),
            rows=make_rows(64),
            trainer_kwargs={"eval_dataset": make_rows(24, seed=1)},
            per_device_train_batch_size=2,
            max_steps=4,
        )
        if evaluates:
            trainer.evaluate()
        trainer.train()
        students[evaluates] = trainer.model.state_dict()
    return students
