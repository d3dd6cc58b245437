"""Runs whose processes are compared: what each process ends with."""

from transformers import TrainerCallback

from .helpers import make_aligner, weights


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        self.gradient = {name.removeprefix("module."): value for name, value in gradient.items()}


def one_step(make_trainer, student, proxy, output, per_device, accumulation, logged, **config) -> dict:
    """Train for one step; the student's weights, its gradient and what was logged."""
    recorder = GradientRecorder()
    trainer = make_trainer(
        output,
        student,
        proxy,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        trainer_kwargs={"callbacks": [recorder]},
        **config,
    )
    trainer.train()
    log = next(line for line in trainer.state.log_history if "loss" in line)
    return {
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "gradient": recorder.gradient,
        "calibration": getattr(trainer, "calibration", None),
        "log": {name: log[name] for name in logged},
    }


def aligned(model, output, per_device, **config) -> dict:
    batches = {"per_device_train_batch_size": per_device, "per_device_eval_batch_size": 2}
    trainer = make_aligner(output, model, **batches | config)
    trainer.train()
    return {
        "proxy": weights(trainer._unwrapped()),
        "samples": trainer.train_dataset["rejected_ids"][:],
        "rounds": [{key: entry[key] for key in ("round", "top1_agreement", "nll")} for entry in trainer.rounds],
    }
