"""Run by torchrun on two processes: trains, and writes what each of them ends with."""

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import SENTENCES
from tests.gad.helpers import FixedSamplesTrainer, GradientRecorder, discriminator_steps, make_config, weights


model, output, per_device, accumulation, warmup_epochs, *config = sys.argv[1:]
config = json.loads(config[0]) if config else {}
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
is_shared = config.get("discriminator") == "shared"
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
        **config,
    ),
    train_dataset=Dataset.from_list(rows),
    callbacks=[recorder],
    peft_config=lora if is_shared else None,
    discriminator_peft_config=lora if is_shared else None,
)
critic_gradients = []
if trainer.critic_trainer is not None:
    step_critic = trainer.critic_trainer.step
    trainer.critic_trainer.step = lambda: (
        critic_gradients.append([parameter.grad.clone() for parameter in trainer.critic_trainer.engine.parameters]),
        step_critic(),
    )[1]
trainer.train()
torch.save(
    {
        "discriminator": weights(trainer.discriminator),
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "discriminator_steps": discriminator_steps(trainer),
        "gradients": recorder.gradients,
        "critic": weights(trainer.critic_trainer.critic) if trainer.critic_trainer is not None else {},
        "critic_gradients": critic_gradients,
        "log": [entry for entry in trainer.state.log_history if "discriminator/loss" in entry],
    },
    f"{output}/rank{trainer.accelerator.process_index}.pt",
)
trainer.accelerator.end_training()
