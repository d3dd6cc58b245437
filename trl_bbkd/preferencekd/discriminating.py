"""
A discriminator as judge: it learns to tell the teacher's answers from the samples of one round, and scores these samples.
That is GAD (arXiv 2511.10643) offline: its discriminator, with DPO in place of reinforcement learning.
"""

import json
import random
import shutil
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..discriminator.model import Discriminator, build_discriminator
from ..discriminator.trainer import DiscriminatorTrainer, PairBatch
from .config import PreferenceKDConfig
from .judges import Judged


DISCRIMINATOR_FOLDER, METRICS_FILE = "discriminator", "discriminator.json"


class DiscriminatorJudge:
    """
    Scores samples with a discriminator, `D(x, y)`.

    Args:
        trainer ([`~discriminator.trainer.DiscriminatorTrainer`]):
            Of the discriminator.
    """

    def __init__(self, trainer: DiscriminatorTrainer):
        self.trainer = trainer

    def __call__(self, rows: list[Judged]) -> list[list[float]]:
        scores = iter(self.trainer.score(pairs_of(rows)).student.tolist())
        return [[next(scores) for _ in row.candidates] for row in rows]


def pairs_of(rows: list[Judged]) -> PairBatch:
    """The teacher's answers to each row's prompt beside the row's samples, as a discriminator is trained on them."""
    return PairBatch.with_all_answers(
        prompt_ids=[row.prompt_ids for row in rows],
        answers=[list(row.answers_ids) for row in rows],
        student_ids=[ids for row in rows for ids in row.candidate_ids],
        prompt_index=[number for number, row in enumerate(rows) for _ in row.candidate_ids],
    )


def trained_judge(
    rows: list[Judged],
    folder: Path,
    folder_before: Path,
    args: PreferenceKDConfig,
    student: PreTrainedModel,
    student_path: str,
    pad_token_id: int,
    accelerator: Accelerator,
) -> DiscriminatorJudge:
    """
    Train a round's discriminator on the round's samples, unless that is done and on disk.

    Args:
        rows (`list[Judged]`):
            The round's rows.
        folder, folder_before (`Path`):
            Of this round, where its discriminator is kept, and of the round before, with whose it begins.
        args ([`~config.PreferenceKDConfig`]):
            Its `discriminator*` fields.
        student ([`~transformers.PreTrainedModel`]), student_path (`str`):
            The student without an adapter, and its checkpoint, where the first round's begins if `args` names no other.
        pad_token_id (`int`):
            Padding id of the tokenizer.
        accelerator ([`~accelerate.Accelerator`]):
            One that knows of no other model.
    """
    own, before = folder / DISCRIMINATOR_FOLDER, folder_before / DISCRIMINATOR_FOLDER
    start = next((path for path in (own, before) if path.is_dir()), None)
    trainer = DiscriminatorTrainer(
        begun_discriminator(start, args, student, student_path), settings(args), accelerator, pad_token_id
    )
    if start != own:
        metrics = train_on(trainer, rows, args)
        unfinished = own.with_name(own.name + ".tmp")
        trainer.save_discriminator(unfinished)
        if accelerator.is_main_process:
            (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            unfinished.rename(own)
            shutil.rmtree(before, ignore_errors=True)
        accelerator.wait_for_everyone()
    return DiscriminatorJudge(trainer)


def begun_discriminator(
    saved: Path | None, args: PreferenceKDConfig, student: PreTrainedModel, student_path: str
) -> Discriminator:
    """The discriminator in a folder, or the one that the configuration begins with."""
    path = str(saved or args.discriminator or student_path)
    is_new_adapter = saved is None and args.discriminator_lora_kwargs is not None
    return build_discriminator(
        path,
        args.discriminator_head,
        args.discriminator_likelihood_reduction,
        LoraConfig(**args.discriminator_lora_kwargs) if is_new_adapter else None,
        args.seed,
        # The student may have got more tokens than its checkpoint
        student if path == student_path else None,
        trust_remote_code=args.trust_remote_code,
    )


def settings(args: PreferenceKDConfig) -> Any:
    """A configuration as [`~discriminator.trainer.DiscriminatorSettings`]: one update a batch, without what GAD's game needs."""
    shared = (
        "seed",
        "gradient_checkpointing",
        "per_device_train_batch_size",
        "discriminator_learning_rate",
        "discriminator_weight_decay",
        "discriminator_max_grad_norm",
        "discriminator_batch_size",
        "discriminator_sft_weight",
        "discriminator_likelihood_reduction",
    )
    return SimpleNamespace(
        **{name: getattr(args, name) for name in shared},
        discriminator_loss="bradley_terry",
        discriminator_warmup_learning_rate=None,
        discriminator_updates_per_batch=1,
        discriminator_credit="sequence",
        discriminator_replay_size=0,
        discriminator_replay_ratio=0.0,
    )


def train_on(trainer: DiscriminatorTrainer, rows: list[Judged], args: PreferenceKDConfig) -> dict[str, float]:
    """
    Train for `discriminator_epochs`, each process on its share of every batch.

    Returns:
        `dict[str, float]`: the metrics of the last epoch's pairs before each was trained on, a mean over its batches.
    """
    accelerator = trainer.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    size = max(1, min(args.per_device_train_batch_size, len(rows) // processes))
    rng = random.Random(args.seed)
    measured: list[dict[str, float]] = []
    for _ in range(args.discriminator_epochs):
        order = rng.sample(range(len(rows)), len(rows))
        measured = []
        # Processes in step: what is left over comes in another epoch
        starts = range(0, len(rows) - size * processes + 1, size * processes)
        for start in tqdm(starts, desc="Training the discriminator", disable=not accelerator.is_main_process):
            own = order[start + rank * size : start + (rank + 1) * size]
            pairs = pairs_of([rows[number] for number in own])
            scores = trainer.score(pairs)
            measured.append(trainer.measure(pairs, scores))
            trainer.update(pairs, scores, in_warmup=True)
    return {name: mean(each[name] for each in measured) for name in measured[0]}
