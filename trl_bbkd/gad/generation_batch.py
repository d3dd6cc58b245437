"""The generation batch under way, which makes a checkpoint of GAD complete."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


STEP_KEY = "step"


def save_generation_batch(path: Path, step: int, batches: list[dict[str, torch.Tensor | None]] | None) -> None:
    """
    Write what is left of a generation batch to `path` (safetensors).

    Args:
        path (`Path`):
            One file for each process.
        step (`int`):
            Micro-batches trained on so far.
        batches (`list[dict[str, torch.Tensor]]`, *optional*):
            The micro-batches the generation batch was split into; `None` before the first one.
    """
    tensors = {STEP_KEY: torch.tensor(step)}
    for number, batch in enumerate(batches or []):
        # Cloned, because slices of one tensor share memory
        tensors |= {f"{number}.{key}": value.clone() for key, value in batch.items() if value is not None}
    save_file(tensors, path)


def load_generation_batch(path: Path, device: torch.device) -> tuple[int, list[dict[str, torch.Tensor]] | None]:
    """Read what [`save_generation_batch`] wrote."""
    # Not to `device` at once: of several processes on a CPU each has a number, which safetensors does not know
    tensors = load_file(path)
    step = int(tensors.pop(STEP_KEY))
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        batches.setdefault(int(number), {})[key] = value.to(device)
    return step, [batches[number] for number in sorted(batches)] or None
