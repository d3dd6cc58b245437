"""Trainers that select, what they learned from, and a slow reference of both."""

import math
import random
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.bayeskd.helpers import make_trainer
from tests.gad.helpers import weights
from tests.proxykd.helpers import LORA, ON_CPU, make_kd_trainer, make_rows
from trl_bbkd.selection.config import SelectionConfig
from trl_bbkd.selection.mixin import SELECTION_WEIGHT, LLKDMixin


# Pools of 8, two of them a step
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    # Adam's first steps have a size of their own, whatever the gradient
    "optim": "sgd",
    "pool_factor": 2,
    "selection": "llkd",
    "selection_rule": "class_mean",
    "selection_warmup_steps": 0,
}


@dataclass
class SelectiveSFTConfig(SelectionConfig, SFTConfig):
    """As a user makes it."""


class SelectiveSFTTrainer(LLKDMixin, SFTTrainer):
    """As a user makes it."""


def selection_rows(count=16, groups=3, confidence=None):
    """Rows of `make_rows` with the columns that are selected by."""
    rng = random.Random(1)
    return [
        row
        | {
            "teacher_confidence": rng.random() if confidence is None else confidence(number),
            "group": rng.randrange(groups),
        }
        for number, row in enumerate(make_rows(count))
    ]


class Recorder(TrainerCallback):
    """The gradient of every optimizer step, and the rows, with their weights, of every micro-batch learned from."""

    def __init__(self):
        self.gradients, self.batches, self.denominators = [], [], []

    def watch(self, trainer):
        step = trainer.training_step

        def recorded(model, inputs, num_items_in_batch=None):
            self.batches.append(learned_rows(inputs))
            self.denominators.append(num_items_in_batch)
            return step(model, inputs, num_items_in_batch)

        trainer.training_step = recorded
        trainer.add_callback(self)
        return self

    @property
    def rows(self):
        return {row: weight for batch in self.batches for row, weight in batch.items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def learned_rows(inputs):
    """Weight of each row of a batch that has an answer, by its tokens."""
    row_weights = inputs.get(SELECTION_WEIGHT, torch.ones(len(inputs["input_ids"]))).tolist()
    return {
        tuple(ids[mask.bool()].tolist()): weight
        for ids, mask, labels, weight in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs["labels"], row_weights, strict=True
        )
        if (labels != -100).any()
    }


def make_sft_trainer(output_dir, student, rows=None, eval_rows=None, recorder=None, trainer_kwargs=None, **config):
    on_cpu = {name: value for name, value in ON_CPU.items() if name != "max_completion_length"}
    args = SelectiveSFTConfig(str(output_dir), **{**on_cpu, "max_length": None, **SETTINGS, **config})
    rows = selection_rows() if rows is None else rows
    trainer = SelectiveSFTTrainer(
        student,
        args,
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        **(trainer_kwargs or {}),
    )
    if recorder is not None:
        recorder.watch(trainer)
    return trainer


def make_bayes_trainer(output_dir, student, targets, rows=None, eval_rows=None, recorder=None, **config):
    """Bayes-KD on targets that are there already."""
    settings = {"stages": ["distil"], "target_store": str(targets)}
    rows = [*(eval_rows or []), *(selection_rows() if rows is None else rows)]
    held_out = len(eval_rows or [])
    trainer = make_trainer(output_dir, student, None, rows, held_out, **{**SETTINGS, **settings, **config})
    if recorder is not None:
        recorder.watch(trainer)
    return trainer


def make_proxykd_trainer(output_dir, student, proxy, recorder, rows=None, **config):
    """Proxy-KD with a proxy as it is, for all rows."""
    rows, shares = (selection_rows() if rows is None else rows), {"warmup_share": 0.0, "alignment_share": 0.0}
    trainer = make_kd_trainer(output_dir, student, proxy, rows, 0, **SETTINGS | shares | config)
    recorder.watch(trainer)
    return trainer


def state(trainer):
    """What a checkpoint has to restore."""
    return trainer.selector.state_dict() | trainer.tally.state_dict() | weights(trainer.model)


def log(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Reference:
    """
    Of every row of a data set alone, in float64 and from the logits: u, loss (a sum over its tokens, with gradient) and
    tokens; and what the first step should keep of all rows.
    """

    def __init__(self, student, dataset, stores=(), target_weights=(), hard_weight=1.0):
        self.model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
        self.tokens, self.losses, uncertainty, self.names = [], [], [], []
        for row in dataset:
            log_probs = self.model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            labels = torch.tensor(row["labels"])[1:]
            log_probs, labels = log_probs[labels != -100], labels[labels != -100]
            loss = -hard_weight * log_probs.gather(1, labels[:, None]).sum()
            for store, weight in zip(stores, target_weights, strict=True):
                targets = store[row["row_key"]]
                probs = torch.tensor(targets.log_probs).double().softmax(-1)
                chosen = log_probs.gather(1, torch.tensor(targets.ids))
                weight = weight * row.get("sample_weight", 1.0)
                loss = loss + weight * (torch.xlogy(probs, probs) - probs * chosen).sum()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean() / math.log(log_probs.size(-1))
            self.names.append(tuple(row["input_ids"]))
            self.tokens.append(len(labels))
            self.losses.append(loss)
            uncertainty.append(entropy.item())
        self.c = dataset["teacher_confidence"][:]
        self.u, self.y = uncertainty, dataset["group"][:]

    def thresholds(self, rule):
        """τ^T and τ^S of each group after the first batch, which is all rows."""
        found = []
        for signal in (self.c, self.u):
            overall = mean(signal)
            groups = [mean([s for s, y in zip(signal, self.y, strict=True) if y == g]) for g in range(max(self.y) + 1)]
            found.append(
                {
                    "class_mean": groups,
                    "maxnorm": [value / max(groups) * overall for value in groups],
                    "global": [overall] * len(groups),
                }[rule]
            )
        return found

    def kept(self, rule, budget=None):
        if rule == "quantile":
            scores = torch.tensor(self.c).double() * torch.tensor(self.u).double()
            return (scores >= scores.quantile(1 - budget)).tolist()
        teacher, student = self.thresholds(rule)
        return [c >= teacher[y] and u >= student[y] for c, u, y in zip(self.c, self.u, self.y, strict=True)]

    def weights(self, kept, weighting):
        form = {
            "product": lambda c, u: c * u,
            "sum": lambda c, u: c + u,
            "teacher": lambda c, u: c,
            "student": lambda c, u: u,
            "none": lambda c, u: 1.0,
        }[weighting]
        raw = [form(c, u) if keep else 0.0 for c, u, keep in zip(self.c, self.u, kept, strict=True)]
        return [value * sum(kept) / sum(raw) for value in raw]

    def gradient(self, row_weights, denominator):
        self.model.zero_grad()
        total = sum(weight * loss for weight, loss in zip(row_weights, self.losses, strict=True) if weight)
        (total / denominator).backward(retain_graph=True)
        return {name: parameter.grad.float().clone() for name, parameter in self.model.named_parameters()}


def mean(values):
    return sum(values) / len(values)


def assert_same_state(found, expected, atol=0.0, rtol=0.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = {"atol": atol, "rtol": rtol, "equal_nan": True}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_gradient(found, expected):
    assert_same_state(found, expected, atol=1e-6, rtol=1e-4)


# Confidences that decide alone, whatever other rows there are
BY_TEACHER = {"selection_rule": "global", "selection_use_student": False}
BY_BUDGET = {"selection_rule": "quantile", "selection_budget": 0.5, "selection_use_student": False}
RESUMED = {
    "max_steps": 6,
    "optim": "adamw_torch",
    "pool_factor": 3,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "selection_budget": 0.4,
    "selection_momentum": 0.7,
    "selection_rule": "quantile",
    "selection_warmup_steps": 1,
}
IN_ORDER = {"train_sampling_strategy": "sequential"}
# Of 48 rows in three steps, in pools of 4 on each of two processes: confidence of a row (`None`: any), settings
SCENARIOS = {
    "mixed": (None, {}),
    "nothing on one process": (lambda number: 0.9 if number // 4 % 2 == 0 else 0.1, BY_TEACHER | IN_ORDER),
    "nothing in step 2": (lambda number: (0.9, 0.001, 0.95)[number // 16], BY_BUDGET | IN_ORDER),
}


def run_scenario(name, kind, output_dir, student, targets, size, count=48):
    """What a process ends with: `size` is its batch."""
    confidence, config = SCENARIOS[name]
    recorder, rows = Recorder(), selection_rows(count, confidence=confidence)
    config = config | {"per_device_train_batch_size": size, "num_train_epochs": 1, "logging_nan_inf_filter": False}
    if kind == "bayeskd":
        trainer = make_bayes_trainer(output_dir, student, targets, rows, recorder=recorder, **config)
    else:
        kwargs = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
        trainer = make_sft_trainer(output_dir, student, rows, recorder=recorder, trainer_kwargs=kwargs, **config)
    trainer.train()
    return {
        "state": state(trainer),
        "gradients": recorder.gradients,
        "batches": recorder.batches,
        "log": log(trainer),
    }


# Kind of trainer, scenario, rows: of 42 the last pool is not full
RUNS = [
    ("sft", "mixed", 48),
    ("bayeskd", "mixed", 48),
    ("sft", "nothing on one process", 48),
    ("bayeskd", "nothing on one process", 48),
    ("lora", "nothing on one process", 48),
    ("sft", "nothing in step 2", 48),
    ("bayeskd", "nothing in step 2", 48),
    ("sft", "mixed", 42),
]


def run_scenarios(folder, student, targets):
    """On each of two processes."""
    return {
        (kind, scenario, count): run_scenario(scenario, kind, folder / str(number), student, targets, 2, count)
        for number, (kind, scenario, count) in enumerate(RUNS)
    }
