"""Aligns a proxy, and kills itself with SIGKILL where it is told to."""

import os
import signal
import sys

from peft import LoraConfig

from tests.proxykd.helpers import LORA, make_aligner
from trl_bbkd.preference import sampling
from trl_bbkd.proxykd.alignment_trainer import ProxyAlignmentTrainer


output, model, lora, save_steps, moment = sys.argv[1:]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class KilledTrainer(ProxyAlignmentTrainer):
    def training_step(self, *args, **kwargs):
        if moment == f"round {len(self.rounds)} step {self.state.global_step}":
            kill()
        return super().training_step(*args, **kwargs)


if moment == "sampling":
    write, written = sampling._write, []

    def write_once(*args):
        kill() if written else written.append(write(*args))

    sampling._write = write_once

make_aligner(
    output,
    model,
    trainer_class=KilledTrainer,
    trainer_kwargs={"peft_config": LoraConfig(**LORA) if int(lora) else None},
    rows=None,
    sample_batch_size=1,
    num_train_epochs=2.0,
    save_strategy="steps",
    save_steps=int(save_steps),
).train()
