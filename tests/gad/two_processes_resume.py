"""Run by torchrun on two processes: trains, evaluates, and resumes amid a generation batch of each stage."""

import sys

import torch
from datasets import Dataset

from tests.conftest import SENTENCES
from tests.gad.helpers import FixedSamplesTrainer, make_config, weights


model, output = sys.argv[1:]
rows = [{"prompt": SENTENCES[2 * i % 8], "completion": " " + SENTENCES[(2 * i + 1) % 8]} for i in range(16)]
judged = []


def judge(prompts, completions):
    judged.extend(completions)
    return {"characters": [len(text) for text in completions]}


def make_trainer():
    return FixedSamplesTrainer(
        model=model,
        args=make_config(
            output,
            per_device_train_batch_size=4,
            steps_per_generation=2,
            max_steps=4,
            beta=0.1,
            save_strategy="steps",
            save_steps=1,
            discriminator_replay_size=16,
            per_device_eval_batch_size=3,
            num_generations_eval=2,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:6]),
        sample_metrics=judge,
    )


def state(trainer):
    return {
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "discriminator": weights(trainer.discriminator),
        "pairs": [[torch.tensor(part) for part in pair] for pair in trainer.discriminator_trainer.replay.pairs],
    }


trainer = make_trainer()
trainer.train()
results = {"straight": state(trainer), "metrics": trainer.evaluate(), "judged": list(judged)}
judged.clear()
# 10 samples for batches of 3 on each process: the last ones are filled up
results |= {"metrics of 5": trainer.evaluate(Dataset.from_list(rows[:5])), "judged of 5": list(judged)}
for step in (1, 3):
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=f"{output}/checkpoint-{step}")
    results[f"resumed at {step}"] = state(resumed)
torch.save(results, f"{output}/rank{trainer.accelerator.process_index}.pt")
trainer.accelerator.end_training()
