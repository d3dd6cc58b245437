import random

import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_bbkd.gad.config import GADConfig
from trl_bbkd.gad.trainer import GADTrainer


def make_config(output_dir, **kwargs):
    """A run of 12 rows: 2 prompts x 4 samples a generation batch, hence 6 optimizer steps an epoch."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
        "discriminator_only_steps": 0,
        "gradient_checkpointing": False,
    }
    return GADConfig(str(output_dir), **{**defaults, **kwargs})


def make_trainer(output_dir, model, rows, trainer_class=GADTrainer, trainer_kwargs=None, **config):
    return trainer_class(
        model=model,
        args=make_config(output_dir, **config),
        train_dataset=Dataset.from_list(rows[:12]),
        **(trainer_kwargs or {}),
    )


def no_model_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def are_different(first, second):
    return any(not torch.equal(value, second[name]) for name, value in first.items())


def fill_adapters(trainer, seed=0):
    """Values at which an adapter acts: LoRA's B matrices start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in (trainer.model, trainer.discriminator):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1, generator=generator)


def discriminator_steps(trainer):
    optimizer = trainer.discriminator_trainer.engine.optimizer
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert len(steps) <= 1
    return steps.pop() if steps else 0


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


class GradientRecorder(TrainerCallback):
    """Keeps the student's gradient, before clipping, of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
