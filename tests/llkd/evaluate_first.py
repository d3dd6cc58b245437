"""Run by torchrun on two processes: students that were evaluated before training, and that were not."""

import sys

import torch
from accelerate import PartialState

from tests.llkd.helpers import make_rows, make_trainer


students = {}
for evaluates in (False, True):
    trainer = make_trainer(
        f"{sys.argv[1]}/{evaluates}",
        rows=make_rows(64),
        trainer_kwargs={"eval_dataset": make_rows(24, seed=1)},
        per_device_train_batch_size=2,
        max_steps=4,
    )
    if evaluates:
        trainer.evaluate()
    trainer.train()
    students[evaluates] = trainer.model.state_dict()
torch.save(students, f"{sys.argv[1]}/rank{PartialState().process_index}.pt")
PartialState().destroy_process_group()
