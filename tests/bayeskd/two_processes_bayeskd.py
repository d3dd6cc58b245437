"""Run by torchrun on two processes: an estimate and one step, and what each process ends with."""

import sys

import torch
from accelerate import PartialState

from tests.bayeskd.helpers import make_trainer, weights
from tests.proxykd.two_processes_kd import GradientRecorder


def one_step(student, proxy, output, per_device, accumulation) -> dict:
    """Estimate with the proxy as it is, and train for one step; the student's weights, its gradient, what was logged."""
    recorder = GradientRecorder()
    trainer = make_trainer(
        output,
        student,
        proxy,
        stages=["estimate", "distil"],
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
        "calibration": trainer.calibration,
        "log": {name: log[name] for name in ("loss", "nll", "kl_prior", "kl_posterior", "num_tokens")},
    }


if __name__ == "__main__":
    result = one_step(*sys.argv[1:])
    torch.save(result, f"{sys.argv[3]}/rank{result['rank']}.pt")
    PartialState().destroy_process_group()
