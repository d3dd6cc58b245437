"""
How long a training step of Bayes-KD takes, against plain SFT.

    OMP_NUM_THREADS=1 python benchmarks/bayeskd_step.py

The same random student on the same rows, built on the spot: a step of TRL's SFTTrainer (the baseline); one of
BayesKDTrainer with both weights 0, which is plain SFT with this package's loss; and one with prior and posterior from
its stores, whose targets were estimated before. The data loader's time is part of a step. Runs take turns, and the
fastest median of each counts.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from trl_bbkd import BayesKDConfig, BayesKDTrainer  # noqa: E402


WARMUP_STEPS = 3
# On a CPU, the process's own time: another program running beside does not change it
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class StepTimes(TrainerCallback):
    """Times from one step's end to the next's, so that loading its batch counts."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(clock())

    def median(self) -> float:
        return statistics.median(np.diff(self.ends)[WARMUP_STEPS - 1 :])


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def build_rows(count: int, tokens: int, vocab_size: int) -> Dataset:
    """Answers whose words repeat as words do: drawn with frequencies 1/rank."""
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, vocab_size - 1)
    words = rng.choice(np.arange(2, vocab_size), size=(count, tokens + 8), p=weights / weights.sum())
    texts = [[f"w{word}" for word in row] for row in words]
    return Dataset.from_list(
        [{"prompt": " ".join(text[:8]), "completion": " " + " ".join(text[8:-1])} for text in texts]
    )


def build_model(arguments, hidden_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            pad_token_id=0,
            eos_token_id=0,
        )
    )


def settings(arguments, folder: str) -> dict:
    return {
        "output_dir": folder,
        "max_steps": WARMUP_STEPS + arguments.steps,
        "per_device_train_batch_size": arguments.batch,
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-6,
        "max_length": None,
    }


def sft_step(rows: Dataset, tokenizer, arguments, folder: Path) -> float:
    times = StepTimes()
    trainer = SFTTrainer(
        model=build_model(arguments, arguments.hidden_size),
        args=SFTConfig(**settings(arguments, str(folder / "sft"))),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return times.median()


def bayeskd_step(rows: Dataset, tokenizer, arguments, folder: Path, weight: float) -> float:
    """The targets are estimated in the first round and found again in the others."""
    times = StepTimes()
    trainer = BayesKDTrainer(
        model=build_model(arguments, arguments.hidden_size),
        proxy_model=build_model(arguments, 64),
        args=BayesKDConfig(
            stages=["estimate", "distil"],
            max_completion_length=arguments.tokens,
            target_top_k=arguments.top_k,
            prior_weight=weight,
            posterior_weight=weight,
            **settings(arguments, str(folder / f"bayeskd-{weight}")),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return times.median()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step of Bayes-KD against plain SFT.")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=120, help="answer tokens of a row")
    parser.add_argument("--top_k", type=int, default=16, help="tokens kept of each target")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the fastest median of each counts")
    arguments = parser.parse_args()
    disable_progress_bars()

    tokenizer = build_tokenizer(arguments.vocab_size)
    rows = build_rows(arguments.batch * (WARMUP_STEPS + arguments.steps), arguments.tokens, arguments.vocab_size)
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            measured = {
                "sft": sft_step(rows, tokenizer, arguments, Path(folder)),
                "no targets": bayeskd_step(rows, tokenizer, arguments, Path(folder), 0.0),
                "bayeskd": bayeskd_step(rows, tokenizer, arguments, Path(folder), 1.0),
            }
            best = {name: min(value, best.get(name, value)) for name, value in measured.items()}
    print(f"{arguments.batch} rows of {arguments.tokens} answer tokens, vocabulary {arguments.vocab_size:,}:")
    print(f"SFTTrainer: {best['sft']:.3f} s a step (baseline)")
    for name, label in (("no targets", "BayesKDTrainer, hard loss alone"), ("bayeskd", "BayesKDTrainer")):
        ratios = (
            f"{best[name] / best['sft']:.2f} of the baseline, {best[name] / best['no targets']:.2f} of the hard loss"
        )
        print(f"{label}: {best[name]:.3f} s a step, {ratios}")


if __name__ == "__main__":
    main()
