"""
Make every file of the counting world: the teacher's answers, a student, and a larger model: a discriminator, or a proxy.

    python recipes/tinycount/build.py [--out DIR]   write the files (default: beside this script)
    python recipes/tinycount/build.py --check       build them again elsewhere and compare byte for byte

Both models are trained from scratch on careless stories, as in `recipes/tinyworld`, and then by SFT on the teacher's answers:
the student until it gains little more, the larger one until its likelihood of answers it has not seen falls. All of it is in
float64, then rounded to 12 bits. Takes about twenty minutes on one core.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tinyworld"))
import build as tinyworld  # noqa: E402


STUDENT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LARGER = tinyworld.DISCRIMINATOR
BATCH = 64


def sft(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    steps: int,
    learning_rate: float,
) -> LlamaForCausalLM:
    """In float64, with a learning rate that falls to 0."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    exact = tinyworld.float64_model(config)
    exact.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(exact.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - step / steps)
    )
    pairs = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"] + tinyworld.world.END)["input_ids"])
        for row in rows
    ]
    rng, order = random.Random(0), []
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.sample(range(len(pairs)), len(pairs))
        batch = [pairs[order.pop()] for _ in range(BATCH)]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.tensor([prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in batch])
        labels = torch.tensor(
            [[-100] * len(prompt) + answer + [-100] * (width - len(prompt) - len(answer)) for prompt, answer in batch]
        )
        logits = exact(input_ids=ids).logits[:, :-1]  # causal: padding on the right changes nothing
        loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    trained = LlamaForCausalLM(config)
    trained.load_state_dict({name: tinyworld.rounded(weights) for name, weights in exact.state_dict().items()})
    return trained


def build(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tinyworld.world.MAX_COUNT, tinyworld.world.MAX_AMOUNT = 49, 9
    train, test = tinyworld.teacher_rows()
    for name, rows in (("teacher_train.jsonl", train), ("teacher_test.jsonl", test)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tinyworld.build_tokenizer()
    student = tinyworld.train_on_web_text(tokenizer, STUDENT, steps=1000, learning_rate=8e-3)
    student = sft(student, tokenizer, train, steps=8000, learning_rate=1.2e-2)
    tinyworld.save_model(student, tokenizer, out / "student")
    larger = tinyworld.train_on_web_text(tokenizer, LARGER, steps=1500, learning_rate=3e-3)
    larger = sft(larger, tokenizer, train, steps=800, learning_rate=3e-3)
    tinyworld.save_model(larger, tokenizer, out / "larger")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the counting world's files.")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write the files")
    parser.add_argument("--check", action="store_true", help="compare a fresh build with the committed files")
    arguments = parser.parse_args()
    tinyworld.check(HERE, build) if arguments.check else build(arguments.out)
