"""Run by torchrun on two processes: one step, and what each process ends with."""

import sys

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from tests.proxykd.helpers import make_kd_trainer, weights


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        self.gradient = {name.removeprefix("module."): value for name, value in gradient.items()}


def one_step(student, proxy, output, per_device, accumulation, source) -> dict:
    """Train for one step; the student's weights, its gradient and what was logged."""
    recorder = GradientRecorder()
    trainer = make_kd_trainer(
        output,
        student,
        proxy,
        stages=["cache", "distil"],
        target_source=source,
        per_device_train_batch_size=int(per_device),
        gradient_accumulation_steps=int(accumulation),
        max_steps=1,
        trainer_kwargs={"callbacks": [recorder]},
    )
    trainer.train()
    log = next(line for line in trainer.state.log_history if "loss" in line)
    return {
        "rank": trainer.accelerator.process_index,
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "gradient": recorder.gradient,
        "log": {name: log[name] for name in ("loss", "num_tokens")},
    }


if __name__ == "__main__":
    result = one_step(*sys.argv[1:])
    torch.save(result, f"{sys.argv[3]}/rank{result['rank']}.pt")
    PartialState().destroy_process_group()
