"""Runs Proxy-KD, and kills itself with SIGKILL in the stage it is told."""

import os
import signal
import sys

from trl import DPOTrainer, SFTTrainer

from tests.proxykd.helpers import make_kd_trainer
from trl_bbkd.proxykd.trainer import ProxyKDTrainer
from trl_bbkd.soft_targets.store import TargetStoreWriter


output, student, proxy, stage = sys.argv[1:]


def killing(method, is_time):
    def killed(self, *args, **kwargs):
        if is_time(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    return killed


if stage == "cache":
    TargetStoreWriter.append = killing(TargetStoreWriter.append, lambda writer: writer._offset > 0)
elif stage == "distil":
    ProxyKDTrainer.training_step = killing(
        ProxyKDTrainer.training_step, lambda trainer: trainer.state.global_step == 2
    )
else:
    owner = SFTTrainer if stage == "warmup" else DPOTrainer
    owner.training_step = killing(owner.training_step, lambda trainer: not isinstance(trainer, ProxyKDTrainer))
make_kd_trainer(output, student, proxy, save_strategy="steps", save_steps=1).train()
