"""
How long a training step of Bayes-KD takes, against plain SFT.

    OMP_NUM_THREADS=1 python benchmarks/bayeskd_step.py

The same random student on the same rows, built on the spot: a step of TRL's SFTTrainer (the baseline); one of
BayesKDTrainer with both weights 0, which is plain SFT with this package's loss; and one with prior and posterior from
its stores, whose targets were estimated before. The data loader's time is part of a step. Runs take turns, and the
fastest median of each counts.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from common.arguments import parser, timing_arguments
from common.models import llama_config
from common.steps import StepTimes, fastest
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_bbkd import BayesKDConfig, BayesKDTrainer


WARMUP_STEPS = 3


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--hidden_size", type=int, default=256)
    found.add_argument("--layers", type=int, default=4)
    found.add_argument("--vocab_size", type=int, default=32000)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--tokens", type=int, default=120, help="answer tokens of a row")
    found.add_argument("--top_k", type=int, default=16, help="tokens kept of each target")
    found.add_argument("--steps", type=int, default=10, help="timed steps of each run")
    found.add_argument("--rounds", type=int, default=3, help="rounds; the fastest median of each counts")
    return found.parse_args(argv)


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


def build_model(arguments, tokenizer, hidden_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        llama_config(tokenizer, hidden_size, arguments.layers, width=3, max_position_embeddings=1024)
    )


def settings(arguments, folder: str) -> dict:
    return {
        "output_dir": folder,
        "max_steps": WARMUP_STEPS + arguments.steps,
        "per_device_train_batch_size": arguments.batch,
        **timing_arguments(),
        "learning_rate": 1e-6,
        "max_length": None,
    }


def sft_step(rows: Dataset, tokenizer, arguments, folder: Path) -> float:
    times = StepTimes(WARMUP_STEPS)
    trainer = SFTTrainer(
        model=build_model(arguments, tokenizer, arguments.hidden_size),
        args=SFTConfig(**settings(arguments, str(folder / "sft"))),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return times.median()


def bayeskd_step(rows: Dataset, tokenizer, arguments, folder: Path, weight: float) -> float:
    """The targets are estimated in the first round and found again in the others."""
    times = StepTimes(WARMUP_STEPS)
    trainer = BayesKDTrainer(
        model=build_model(arguments, tokenizer, arguments.hidden_size),
        proxy_model=build_model(arguments, tokenizer, 64),
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


def main(argv=None) -> None:
    arguments = parse_args(argv)
    disable_progress_bars()
    tokenizer = build_tokenizer(arguments.vocab_size)
    rows = build_rows(arguments.batch * (WARMUP_STEPS + arguments.steps), arguments.tokens, arguments.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        variants = {
            "sft": lambda: sft_step(rows, tokenizer, arguments, folder),
            "no targets": lambda: bayeskd_step(rows, tokenizer, arguments, folder, 0.0),
            "bayeskd": lambda: bayeskd_step(rows, tokenizer, arguments, folder, 1.0),
        }
        best = fastest(arguments.rounds, variants)
    print(f"{arguments.batch} rows of {arguments.tokens} answer tokens, vocabulary {arguments.vocab_size:,}:")
    print(f"SFTTrainer: {best['sft']:.3f} s a step (baseline)")
    for name, label in (("no targets", "BayesKDTrainer, hard loss alone"), ("bayeskd", "BayesKDTrainer")):
        ratios = (
            f"{best[name] / best['sft']:.2f} of the baseline, {best[name] / best['no targets']:.2f} of the hard loss"
        )
        print(f"{label}: {best[name]:.3f} s a step, {ratios}")


if __name__ == "__main__":
    main()
