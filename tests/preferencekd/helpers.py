import functools
import zlib

import torch
from datasets import Dataset

from tests.proxykd.helpers import ON_CPU, make_rows
from trl_bbkd.preferencekd.config import PreferenceKDConfig
from trl_bbkd.preferencekd.trainer import PreferenceKDTrainer


def by_text(prompts, candidates, teacher_answers, calls=None):
    """A judge to whom no two texts are alike. What it is asked goes to the file `calls`."""
    torch.rand(len(prompts))  # as one that samples does
    if calls is not None:
        with open(calls, "a") as file:
            file.writelines(f"{prompt!r} {text!r}\n" for prompt, text in zip(prompts, candidates, strict=True))
    return [zlib.crc32(f"{prompt} {text}".encode()) / 2**32 for prompt, text in zip(prompts, candidates, strict=True)]


def make_trainer(
    output_dir,
    student,
    rows=None,
    held_out=4,
    calls=None,
    trainer_class=PreferenceKDTrainer,
    trainer_kwargs=None,
    **config,
):
    """Two rounds of 8 rows each, judged by their texts unless the configuration names a judge."""
    settings = {
        "num_rounds": 2,
        "learning_rate": 1e-3,
        "warmup_learning_rate": 1e-3,
        "warmup_steps": 0,
        "num_generations": 3,
        "sample_batch_size": 3,
        "sample_temperature": 1.0,
        "sample_top_p": 1.0,
        "judge_batch_size": 3,
    }
    rows = make_rows(20) if rows is None else rows
    judge = {} if "judge" in config else {"judge": functools.partial(by_text, calls=calls)}
    return trainer_class(
        student,
        PreferenceKDConfig(str(output_dir), **{**ON_CPU, **settings, **config}),
        train_dataset=Dataset.from_list(rows[held_out:]),
        eval_dataset=Dataset.from_list(rows[:held_out]) if held_out else None,
        **judge,
        **(trainer_kwargs or {}),
    )
