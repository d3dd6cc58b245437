"""Runs whose processes are compared: what each process ends with."""

from tests.proxykd.helpers import weights
from trl_bbkd.preferencekd.rounds import kept_table

from .helpers import make_trainer


def trained(model, output, per_device, accumulation) -> dict:
    trainer = make_trainer(
        output,
        model,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        # Adam divides by the root of what is nearly 0: with its usual value it makes much of the order of a sum
        adam_epsilon=1e-3,
    )
    trainer.train()
    candidates = kept_table(output / "round-2/candidates.parquet")
    return {
        "student": weights(trainer._unwrapped()),
        "candidates": candidates["candidates"][:],
        "scores": candidates["scores"][:],
    }


def discriminated(model, output, per_device) -> dict:
    trainer = make_trainer(
        output,
        model,
        judge="discriminator",
        discriminator_epochs=2,
        discriminator_learning_rate=1e-4,
        per_device_train_batch_size=per_device,
        num_rounds=1,
        warmup_epochs=0,
    )
    trainer.train()
    return {"scores": kept_table(output / "round-1/candidates.parquet")["scores"][:]}
