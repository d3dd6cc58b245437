"""
How long a step of GAD takes, against what it cannot do without.

    python benchmarks/gad_step.py

Three times of the same run, on random models built on the spot: a step of GRPOTrainer with a frozen reward model as
large as the discriminator (the baseline); the floor, which is that step plus one forward and one backward pass of the
discriminator over the teacher's answers and the samples, plus its optimizer step; and an adversarial step of GADTrainer.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "tinyworld"))

import build  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from trl_bbkd import GADConfig, GADTrainer  # noqa: E402
from trl_bbkd.gad.discriminator import build_discriminator, collate_responses  # noqa: E402


WARMUP_STEPS = 2
# On a CPU, the process's own time: another program running beside does not change it
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(clock() - self.started)

    def median(self) -> float:
        return statistics.median(self.seconds[WARMUP_STEPS:])


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
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-6,
    }


def grpo_step(student: str, rows: Dataset, tokenizer, arguments, folder: str) -> float:
    reward = AutoModelForSequenceClassification.from_pretrained(student, num_labels=1)
    times = StepTimes()
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
    times = StepTimes()
    trainer = GADTrainer(
        model=student,
        args=GADConfig(
            warmup_epochs=0, discriminator_head=arguments.head, max_prompt_length=None, **settings(arguments, folder)
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    discriminator.to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    seconds = []
    for _ in range(WARMUP_STEPS + arguments.steps):
        started = clock()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            discriminator(**batch).scores.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[WARMUP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a step of GAD against GRPO and the floor.")
    parser.add_argument("--head", choices=["scalar", "likelihood"], default="scalar")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the fastest median of each counts")
    arguments = parser.parse_args()

    tokenizer = build.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=2 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    answer = " ".join(["now he has 3 pears ."] * arguments.tokens).split()[: arguments.tokens - 1]
    prompts = [row["prompt"] for row in build.teacher_rows()[0]]
    needed = arguments.prompts * (WARMUP_STEPS + arguments.steps)
    rows = Dataset.from_list([{"prompt": prompt, "completion": " " + " ".join(answer)} for prompt in prompts[:needed]])
    with tempfile.TemporaryDirectory() as folder:
        student = str(Path(folder) / "student")
        build.save_model(LlamaForCausalLM(config), tokenizer, Path(student))
        best = {}
        for _ in range(arguments.rounds):
            measured = {
                "grpo": grpo_step(student, rows, tokenizer, arguments, folder),
                "pass": discriminator_pass(student, rows, tokenizer, arguments),
                "gad": gad_step(student, rows, tokenizer, arguments, folder),
            }
            best = {name: min(value, best.get(name, value)) for name, value in measured.items()}
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
