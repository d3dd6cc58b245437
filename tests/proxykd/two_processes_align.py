"""Run by torchrun on two processes, or alone: aligns, and writes what each process ends with."""

import sys

import torch

from tests.proxykd.helpers import make_aligner, weights


model, output, per_device = sys.argv[1:]
trainer = make_aligner(output, model, per_device_train_batch_size=int(per_device), per_device_eval_batch_size=2)
trainer.train()
torch.save(
    {
        "proxy": weights(trainer._unwrapped()),
        "samples": trainer.train_dataset["rejected_ids"][:],
        "rounds": [{key: entry[key] for key in ("round", "top1_agreement", "nll")} for entry in trainer.rounds],
    },
    f"{output}/rank{trainer.accelerator.process_index}.pt",
)
trainer.accelerator.end_training()
