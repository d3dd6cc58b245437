"""What makes a checkpoint of GAD complete: the generation batch under way, whose run it is, and whether it was finished."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


TRAINER_STATE_NAME = "trainer_state.json"  # the last file of a checkpoint, but for TRL's adaptive entropy
STATE_NAME = "gad_state.json"
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
    tensors = load_file(path, device=str(device))
    step = tensors.pop(STEP_KEY).item()
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        batches.setdefault(int(number), {})[key] = value
    return step, [batches[number] for number in sorted(batches)] or None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, latest first."""
    found = [
        (int(match.group(1)), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def is_finished(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end. A run killed while saving leaves one that was not."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def last_finished_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest checkpoint in `output_dir` that was written to its end, if there is one."""
    return next((path for path in checkpoints(output_dir) if is_finished(path)), None)


def read_state(checkpoint: Path) -> dict:
    """
    Read a checkpoint's `gad_state.json`.

    Raises:
        FileNotFoundError: There is none.
    """
    path = checkpoint / STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no discriminator ({STATE_NAME} is missing): it was not written by GADTrainer, or with "
            "save_only_model=True. It can be a new run's model, but not be resumed."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def refuse_another_run(checkpoint: Path, run: dict) -> None:
    """
    Compare a run with the one that wrote a checkpoint.

    Args:
        checkpoint (`Path`):
            Checkpoint folder.
        run (`dict`):
            What decides which samples a step sees and what is trained, by name.

    Raises:
        ValueError: They differ. The message names the settings.
    """
    found = read_state(checkpoint).get("run", {})
    differing = [
        f"{key}: {found.get(key)!r} there, {value!r} here" for key, value in run.items() if found.get(key) != value
    ]
    if differing:
        raise ValueError(f"{checkpoint} belongs to another run ({'; '.join(differing)}). Resume with its settings.")
