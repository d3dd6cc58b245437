"""Run by torchrun on two processes: every scenario, and what each process ends with."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tests.selection.helpers import RUNS, run_scenario


if __name__ == "__main__":
    student, targets, output = sys.argv[1:]
    results = {}
    for number, (kind, scenario, count) in enumerate(RUNS):
        folder = Path(output) / f"two_{number}"
        results[kind, scenario, count] = run_scenario(scenario, kind, folder, student, targets, 2, count)
    torch.save(results, f"{output}/rank{PartialState().process_index}.pt")
    PartialState().destroy_process_group()
