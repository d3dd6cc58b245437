"""
How long a step of LLKD takes, against a step that learns from the whole pool.

    OMP_NUM_THREADS=1 python benchmarks/llkd_step.py

The same random encoder on the same rows, built on the spot. The baseline is transformers' Trainer with the pool as its
batch: every row forward and backward. LLKD scores the pool and learns from a share k of it, set by confidences of 1 and
0, with the rows in their order: each pool keeps the same number of rows. If a backward pass costs two forward passes, a
step cannot cost less than (1 + 3k)/3 of the baseline; 1.15 times that is the bound. Choosing, gathering and loading
data are part of a step. Runs take turns, and the fastest median of each counts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trl_bbkd.llkd.config import LLKDConfig  # noqa: E402
from trl_bbkd.llkd.trainer import LLKDTrainer  # noqa: E402


WARMUP_STEPS = 2
CLASSES = 5
SHARES = (0.05, 0.25, 0.5)
# On a CPU, the process's own time: another program running beside does not change it
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class StepTimes(TrainerCallback):
    """Times from one step's end to the next's, so that loading and choosing its batch counts."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(clock())

    def median(self) -> float:
        return statistics.median(np.diff(self.ends)[WARMUP_STEPS - 1 :])


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
    times = StepTimes()
    tokenizer = build_tokenizer()
    common = {
        "output_dir": folder,
        "max_steps": WARMUP_STEPS + arguments.steps,
        "train_sampling_strategy": "sequential",
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a step of LLKD against one that learns from the whole pool.")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--pool", type=int, default=100, help="rows of a pool, a multiple of 20")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--ragged", action="store_true", help="rows of an eighth of the tokens to all of them")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the student; scoring has none")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the fastest median of each counts")
    arguments = parser.parse_args()
    if arguments.pool % 20:
        sys.exit("pool must be a multiple of 20, so that all shares are whole rows.")
    disable_progress_bars()

    best = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for share in (None, *SHARES):
                measured = step(arguments, str(Path(folder) / str(share)), share)
                best[share] = min(measured, best.get(share, measured))
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
