"""
How long a step of LLKD takes, against a step that learns from the whole pool.

    OMP_NUM_THREADS=1 python benchmarks/llkd_step.py

The same random encoder on the same rows, built on the spot. The baseline is transformers' Trainer with the pool as its
batch: every row forward and backward. LLKD scores the pool and learns from a share k of it, set by confidences of 1 and
0, with the rows in their order: each pool keeps the same number of rows. If a backward pass costs two forward passes, a
step cannot cost less than (1 + 3k)/3 of the baseline; 1.15 times that is the bound. Choosing, gathering and loading
data are part of a step. Runs take turns, and the fastest median of each counts.
"""

import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common.arguments import QUIET, parser
from common.device import HAS_GPU
from common.steps import StepTimes, fastest
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from trl_bbkd.llkd.config import LLKDConfig
from trl_bbkd.llkd.trainer import LLKDTrainer


WARMUP_STEPS = 2
CLASSES = 5
SHARES = (0.05, 0.25, 0.5)


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--hidden_size", type=int, default=256)
    found.add_argument("--layers", type=int, default=4)
    found.add_argument("--vocab_size", type=int, default=8000)
    found.add_argument("--pool", type=int, default=100, help="rows of a pool, a multiple of 20")
    found.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    found.add_argument("--ragged", action="store_true", help="rows of an eighth of the tokens to all of them")
    found.add_argument("--dropout", type=float, default=0.1, help="of the student; scoring has none")
    found.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    found.add_argument("--rounds", type=int, default=3, help="rounds; the fastest median of each counts")
    arguments = found.parse_args(argv)
    if arguments.pool % 20:
        sys.exit("pool must be a multiple of 20, so that all shares are whole rows.")
    return arguments


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def build_rows(arguments, share: float) -> Dataset:
    """Rows of which every pool has the same number that the teacher is sure of."""
    rng = np.random.default_rng(0)
    kept = round(share * arguments.pool)
    rows = []
    for _ in range(WARMUP_STEPS + arguments.steps):
        sure = rng.permutation(np.arange(arguments.pool) < kept)
        for confidence in sure.astype(float):
            length = (
                int(rng.integers(arguments.tokens // 8, arguments.tokens + 1))
                if arguments.ragged
                else arguments.tokens
            )
            rows.append(
                {
                    "input_ids": rng.integers(2, arguments.vocab_size, length).tolist(),
                    "attention_mask": [1] * length,
                    "label": int(rng.integers(CLASSES)),
                    "teacher_confidence": confidence,
                }
            )
    return Dataset.from_list(rows)


def build_model(arguments) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            intermediate_size=4 * arguments.hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden_size // 64,
            max_position_embeddings=arguments.tokens,
            pad_token_id=0,
            hidden_dropout_prob=arguments.dropout,
            attention_probs_dropout_prob=arguments.dropout,
            num_labels=CLASSES,
        )
    )


def step(arguments, folder: str, share: float | None) -> float:
    """Median seconds of a step: of the baseline, or of LLKD at a kept share."""
    times = StepTimes(WARMUP_STEPS)
    tokenizer = build_tokenizer()
    common = {
        "output_dir": folder,
        "max_steps": WARMUP_STEPS + arguments.steps,
        "train_sampling_strategy": "sequential",
        "bf16": HAS_GPU,
        "use_cpu": not HAS_GPU,
        **QUIET,
        "logging_steps": 1000,
        "learning_rate": 2e-5,
    }
    if share is None:
        trainer = Trainer(
            model=build_model(arguments),
            args=TrainingArguments(per_device_train_batch_size=arguments.pool, **common),
            train_dataset=build_rows(arguments, 0.0),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[times],
        )
    else:
        trainer = LLKDTrainer(
            model=build_model(arguments),
            args=LLKDConfig(
                per_device_train_batch_size=arguments.pool // 4,
                pool_factor=4,
                selection_rule="global",
                selection_use_student=False,
                selection_warmup_steps=0,
                warmup_steps=0,
                **common,
            ),
            train_dataset=build_rows(arguments, share),
            processing_class=tokenizer,
            callbacks=[times],
        )
    trainer.train()
    if share is not None:
        logs = trainer._selection_logs["selection/kept_share"]
        assert np.allclose(logs, share), logs
    return times.median()


def main(argv=None) -> None:
    arguments = parse_args(argv)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        best = fastest(
            arguments.rounds,
            {
                share: functools.partial(step, arguments, str(Path(folder) / str(share)), share)
                for share in (None, *SHARES)
            },
        )
    lengths = f"{arguments.tokens // 8} to {arguments.tokens}" if arguments.ragged else arguments.tokens
    print(
        f"A pool of {arguments.pool} rows of {lengths} tokens; {arguments.layers} layers, width {arguments.hidden_size}:"
    )
    print(f"transformers' Trainer, forward and backward of the whole pool: {best[None]:.3f} s a step (baseline)")
    for share in SHARES:
        bound = 1.15 * (1 + 3 * share) / 3
        ratio = best[share] / best[None]
        verdict = "within" if ratio <= bound else "above"
        print(
            f"LLKD, {share:.0%} kept: {best[share]:.3f} s a step, {ratio:.3f} of the baseline, {verdict} the bound {bound:.3f}"
        )


if __name__ == "__main__":
    main()
