"""The device that a benchmark runs on, and the rows that `gpu.py` collects."""

import json

import torch


HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def emit(table: str, **row) -> None:
    """A row of one of `gpu.py`'s tables, as a line of JSON."""
    print(json.dumps({"table": table, **row}), flush=True)
