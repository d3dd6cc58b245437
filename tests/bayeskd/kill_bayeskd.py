"""Runs Bayes-KD, and kills itself with SIGKILL at the moment it is told."""

import os
import signal
import sys

from trl import SFTTrainer

from tests.bayeskd.helpers import make_trainer
from trl_bbkd.bayeskd.bayeskd_trainer import BayesKDTrainer
from trl_bbkd.soft_targets.store import TargetStoreWriter


output, student, proxy, moment = sys.argv[1:]


def killing(method, is_time):
    def killed(self, *args, **kwargs):
        if is_time(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    return killed


if moment == "warmup":
    SFTTrainer.training_step = killing(SFTTrainer.training_step, lambda trainer: trainer.state.global_step == 2)
elif moment == "distil":
    BayesKDTrainer.training_step = killing(
        BayesKDTrainer.training_step, lambda trainer: trainer.state.global_step == 2
    )
else:
    TargetStoreWriter.append = killing(
        TargetStoreWriter.append, lambda writer: writer.folder.name == moment and writer._offset > 0
    )
make_trainer(output, student, proxy, save_strategy="steps", save_steps=1).train()
