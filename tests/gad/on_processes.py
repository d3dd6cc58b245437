"""Runs whose processes are compared: what each process ends with."""

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import SENTENCES

from .helpers import FixedSamplesTrainer, GradientRecorder, discriminator_steps, make_config, weights


ROWS = [{"prompt": f"{i} {SENTENCES[2 * i % 8]}", "completion": " " + SENTENCES[(2 * i + 1) % 8]} for i in range(16)]


def trained(model, output, per_device, accumulation, warmup_epochs, **config):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    is_shared = config.get("discriminator") == "shared"
    recorder = GradientRecorder()
    trainer = FixedSamplesTrainer(
        model=model,
        args=make_config(
            output,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            warmup_epochs=warmup_epochs,
            max_steps=4,
            beta=0.1,
            **config,
        ),
        train_dataset=Dataset.from_list(ROWS[:12]),
        callbacks=[recorder],
        peft_config=lora if is_shared else None,
        discriminator_peft_config=lora if is_shared else None,
    )
    critic_gradients = []
    if trainer.critic_trainer is not None:
        step_critic = trainer.critic_trainer.step
        trainer.critic_trainer.step = lambda: (
            critic_gradients.append(
                [parameter.grad.clone() for parameter in trainer.critic_trainer.engine.parameters]
            ),
            step_critic(),
        )[1]
    trainer.train()
    return {
        "discriminator": weights(trainer.discriminator),
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "discriminator_steps": discriminator_steps(trainer),
        "gradients": recorder.gradients,
        "critic": weights(trainer.critic_trainer.critic) if trainer.critic_trainer is not None else {},
        "critic_gradients": critic_gradients,
        "log": [entry for entry in trainer.state.log_history if "discriminator/loss" in entry],
    }


def trained_evaluated_and_resumed(model, output):
    """Resumed amid a generation batch of each stage."""
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
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:6]),
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
    results |= {"metrics of 5": trainer.evaluate(Dataset.from_list(ROWS[:5])), "judged of 5": list(judged)}
    for step in (1, 3):
        resumed = make_trainer()
        resumed.train(resume_from_checkpoint=f"{output}/checkpoint-{step}")
        results[f"resumed at {step}"] = state(resumed)
    return results
