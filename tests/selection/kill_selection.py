"""Trains with selection, and kills itself with SIGKILL in step 4, when its rows are selected."""

import os
import signal
import sys

from tests.selection.helpers import RESUMED, make_bayes_trainer


output, student, targets = sys.argv[1:]
trainer = make_bayes_trainer(output, student, targets, **RESUMED)
step = trainer.training_step


def killed(*args, **kwargs):
    loss = step(*args, **kwargs)
    if trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


trainer.training_step = killed
trainer.train()
