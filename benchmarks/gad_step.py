"""
How long a step of GAD takes, against what it cannot do without.

    python benchmarks/gad_step.py

Three times of the same run, on random models built on the spot: a step of GRPOTrainer with a frozen reward model as
large as the discriminator (the baseline); the floor, which is that step plus one forward and one backward pass of the
discriminator over the teacher's answers and the samples, plus its optimizer step; and an adversarial step of GADTrainer.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from common.arguments import parser, timing_arguments
from common.device import DEVICE, HAS_GPU, synchronize
from common.models import llama_config
from common.steps import StepTimes, clock, fastest
from common.tinyworld import build
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_bbkd import GADConfig, GADTrainer
from trl_bbkd.discriminator.model import build_discriminator, collate_responses


WARMUP_STEPS = 2


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--head", choices=["scalar", "likelihood"], default="scalar")
    found.add_argument("--hidden_size", type=int, default=256)
    found.add_argument("--layers", type=int, default=4)
    found.add_argument("--prompts", type=int, default=8)
    found.add_argument("--samples", type=int, default=8)
    found.add_argument("--tokens", type=int, default=48)
    found.add_argument("--steps", type=int, default=6, help="timed steps of each run")
    found.add_argument("--rounds", type=int, default=2, help="rounds; the fastest median of each counts")
    return found.parse_args(argv)


def settings(arguments, folder: str) -> dict:
    return {
        "output_dir": folder,
        "max_steps": WARMUP_STEPS + arguments.steps,
        "per_device_train_batch_size": arguments.prompts * arguments.samples,
        "num_generations": arguments.samples,
        "max_completion_length": arguments.tokens,
        # Random models end answers at random places: without this every step would be of another size
        "generation_kwargs": {"min_new_tokens": arguments.tokens},
        "temperature": 1.0,
        "beta": 0.001,
        **timing_arguments(),
        "learning_rate": 1e-6,
    }


def grpo_step(student: str, rows: Dataset, tokenizer, arguments, folder: str) -> float:
    reward = AutoModelForSequenceClassification.from_pretrained(student, num_labels=1)
    times = StepTimes(WARMUP_STEPS, with_loading=False)
    trainer = GRPOTrainer(
        model=student,
        reward_funcs=reward,
        args=GRPOConfig(**settings(arguments, folder)),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return times.median()


def gad_step(student: str, rows: Dataset, tokenizer, arguments, folder: str) -> float:
    times = StepTimes(WARMUP_STEPS, with_loading=False)
    trainer = GADTrainer(
        model=student,
        args=GADConfig(
            sft_weight=0.0,
            warmup_epochs=0,
            discriminator_head=arguments.head,
            max_prompt_length=None,
            **settings(arguments, folder),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return times.median()


def discriminator_pass(student: str, rows: Dataset, tokenizer, arguments) -> float:
    """Forward, backward and optimizer step over as many sequences as a generation batch shows the discriminator."""
    discriminator = build_discriminator(student, arguments.head)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-6)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows.select(range(arguments.prompts))]
    sequences = arguments.prompts * (arguments.samples + 1)
    responses = [[5] * arguments.tokens] * sequences
    batch = collate_responses((prompts * (arguments.samples + 1))[:sequences], responses, tokenizer.pad_token_id)
    discriminator.to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    seconds = []
    for _ in range(WARMUP_STEPS + arguments.steps):
        started = clock()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=HAS_GPU):
            discriminator(**batch).scores.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[WARMUP_STEPS:])


def main(argv=None) -> None:
    arguments = parse_args(argv)
    tokenizer = build.build_tokenizer()
    config = llama_config(
        tokenizer, arguments.hidden_size, arguments.layers, width=2, num_key_value_heads=4, max_position_embeddings=256
    )
    answer = " ".join(["now he has 3 pears ."] * arguments.tokens).split()[: arguments.tokens - 1]
    prompts = [row["prompt"] for row in build.teacher_rows()[0]]
    needed = arguments.prompts * (WARMUP_STEPS + arguments.steps)
    rows = Dataset.from_list([{"prompt": prompt, "completion": " " + " ".join(answer)} for prompt in prompts[:needed]])
    with tempfile.TemporaryDirectory() as folder:
        student = str(Path(folder) / "student")
        build.save_model(LlamaForCausalLM(config), tokenizer, Path(student))
        variants = {
            "grpo": lambda: grpo_step(student, rows, tokenizer, arguments, folder),
            "pass": lambda: discriminator_pass(student, rows, tokenizer, arguments),
            "gad": lambda: gad_step(student, rows, tokenizer, arguments, folder),
        }
        best = fastest(arguments.rounds, variants)
    floor = best["grpo"] + best["pass"]
    print(f"GRPO with a frozen reward model: {best['grpo']:.3f} s a step (baseline)")
    print(
        f"floor, with a pass and step of the discriminator: {floor:.3f} s, {floor / best['grpo']:.2f} of the baseline"
    )
    print(
        f"GAD: {best['gad']:.3f} s, {best['gad'] / best['grpo']:.2f} of the baseline, {best['gad'] / floor:.2f} of the floor"
    )


if __name__ == "__main__":
    main()
