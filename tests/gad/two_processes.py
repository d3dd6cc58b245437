"""Run by torchrun on two processes: trains, and writes what each of them ends with."""

import random
import sys

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import SENTENCES
from tests.gad.helpers import GradientRecorder, discriminator_steps, make_config, weights
from trl_bbkd.gad.gad_trainer import GADTrainer


class FixedSamplesTrainer(GADTrainer):
    """Draws a sample from its prompt and its place in the global batch: the same on one process and on two."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for row, prompt in enumerate(prompt_ids):
            rng = random.Random(f"{prompt} {first + row}")
            answer = [rng.randrange(3, 300) for _ in range(rng.randint(3, 12))]
            completions.append(answer if len(answer) == 12 else [*answer, self.processing_class.eos_token_id])
        return completions, None


model, output, per_device, accumulation, warmup_epochs, *backbone = sys.argv[1:]
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
recorder = GradientRecorder()
rows = [{"prompt": SENTENCES[2 * i % 8], "completion": " " + SENTENCES[(2 * i + 1) % 8]} for i in range(12)]
trainer = FixedSamplesTrainer(
    model=model,
    args=make_config(
        output,
        per_device_train_batch_size=int(per_device),
        gradient_accumulation_steps=int(accumulation),
        warmup_epochs=float(warmup_epochs),
        max_steps=4,
        beta=0.1,
        discriminator="shared" if backbone else None,
    ),
    train_dataset=Dataset.from_list(rows),
    callbacks=[recorder],
    peft_config=lora if backbone else None,
    discriminator_peft_config=lora if backbone else None,
)
trainer.train()
torch.save(
    {
        "discriminator": weights(trainer.discriminator),
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "discriminator_steps": discriminator_steps(trainer),
        "gradients": recorder.gradients,
        "log": [entry for entry in trainer.state.log_history if "discriminator/loss" in entry],
    },
    f"{output}/rank{trainer.accelerator.process_index}.pt",
)
