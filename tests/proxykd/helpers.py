import random

import torch
from datasets import Dataset

from tests.conftest import SENTENCES
from tests.gad.helpers import assert_same_weights, weights  # noqa: F401
from trl_bbkd.proxykd.alignment_config import ProxyAlignmentConfig
from trl_bbkd.proxykd.alignment_trainer import ProxyAlignmentTrainer
from trl_bbkd.proxykd.config import ProxyKDConfig
from trl_bbkd.proxykd.trainer import ProxyKDTrainer


ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "max_completion_length": 16,
    "per_device_train_batch_size": 4,
}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make_rows(count=40):
    """Rows of different prompts and answers of different lengths."""
    words = " ".join(SENTENCES).split()
    rng = random.Random(0)
    return [
        {
            "prompt": f"{number} {SENTENCES[2 * number % 8]}",
            "completion": " " + " ".join(rng.choice(words) for _ in range(rng.randint(1, 6))),
        }
        for number in range(count)
    ]


def make_kd_trainer(output_dir, student, proxy, rows=None, held_out=8, trainer_kwargs=None, **config):
    settings = {
        "alignment_rounds": 2,
        "learning_rate": 1e-3,
        "proxy_learning_rate": 1e-3,
        "per_device_eval_batch_size": 4,
    }
    rows = make_rows() if rows is None else rows
    return ProxyKDTrainer(
        student,
        proxy,
        ProxyKDConfig(str(output_dir), **{**ON_CPU, **settings, **config}),
        train_dataset=Dataset.from_list(rows[held_out:]),
        eval_dataset=Dataset.from_list(rows[:held_out]) if held_out else None,
        **(trainer_kwargs or {}),
    )


def make_aligner(
    output_dir, proxy, rows=None, held_out=4, trainer_class=ProxyAlignmentTrainer, trainer_kwargs=None, **config
):
    settings = {"num_rounds": 2, "learning_rate": 1e-3, "sample_batch_size": 3}
    rows = make_rows(20) if rows is None else rows
    return trainer_class(
        proxy,
        ProxyAlignmentConfig(str(output_dir), **{**ON_CPU, **settings, **config}),
        train_dataset=Dataset.from_list(rows[held_out:]),
        eval_dataset=Dataset.from_list(rows[:held_out]) if held_out else None,
        **(trainer_kwargs or {}),
    )


@torch.no_grad()
def label_log_probs(proxy, row):
    """Slowly: of a row's answer tokens."""
    logits = proxy(torch.tensor([row["input_ids"]])).logits[0, :-1]
    log_probs = logits.log_softmax(-1).gather(1, torch.tensor(row["input_ids"])[1:, None])[:, 0]
    return log_probs[torch.tensor(row["labels"])[1:] != -100]
