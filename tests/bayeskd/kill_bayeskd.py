"""Runs Bayes-KD, and kills itself with SIGKILL at the moment it is told."""

import os
import signal
import sys
from pathlib import Path

from trl import SFTTrainer

from tests.bayeskd.helpers import make_trainer
from trl_bbkd.bayeskd.trainer import BayesKDTrainer
from trl_bbkd.soft_targets import store


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
    flush, flushed = store._flush, []

    def killed_flush(file):
        """Within the second batch's `append`: its targets are on disk, its index is not."""
        flush(file)
        flushed.append(Path(file.name).parts[-2:])
        if flushed.count((moment, "part-00000.targets")) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    store._flush = killed_flush
make_trainer(output, student, proxy, save_strategy="steps", save_steps=1).train()
