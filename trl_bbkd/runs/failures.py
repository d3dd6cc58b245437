"""What ends a run in its middle and is no fault of ours, in one line: what happened, what is safe, how to go on."""

import errno
import functools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import DiskFullError, DistillationError, DivergedError, RecipeError
from ..host.resume import last_finished_checkpoint
from .progress import can_go_on, is_trained
from .recipe_file import one_line


FULL = (errno.ENOSPC, errno.EDQUOT)
IN_THE_WAY = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS, errno.ENAMETOOLONG)
LITTLE = 1 << 20  # bytes: so much is left at most where a writer does not say why it failed
# How writers without an error number of the system put it
SAYS_FULL = ("no space left", "not enough disk space", "disk quota exceeded")
WRITER_FAILED = ("pytorchstreamwriter", "inline_container", "unexpected pos")
SAYS_NO_NUMBERS = ("probability tensor contains either", "scores are not finite")


def tells_failures(run: Callable) -> Callable:
    """Have `run(recipe)` end in a [`~errors.DistillationError`] where a disk, a GPU's memory or a function of the user fails."""

    @functools.wraps(run)
    def told(recipe):
        try:
            return run(recipe)
        except DistillationError:
            raise
        except Exception as error:
            found = _known(error, recipe)
            if found is None:
                raise
            raise found from error

    return told


def _known(error: Exception, recipe) -> DistillationError | None:
    output_dir = recipe.training_args.output_dir
    if isinstance(error, OSError | RuntimeError | SafetensorError) and is_full(error, output_dir):
        return DiskFullError(
            f"The disk is full ({one_line(error).rstrip('.')}). {_state_of(output_dir)} Make room, or lower save_total_limit, "
            f"and {_again(output_dir)}."
        )
    if isinstance(error, OSError) and error.errno in IN_THE_WAY and error.filename:
        return RecipeError(
            f"{error.filename} cannot be written or read: {error.strerror}. {_state_of(output_dir)} Move it away, or allow it, and "
            f"{_again(output_dir)}."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RecipeError(
            f"The GPU's memory is too small ({one_line(error).partition('. ')[0]}). {_state_of(output_dir)} Halve "
            "per_device_train_batch_size (or per_device_eval_batch_size, where it measured) and double "
            f"gradient_accumulation_steps, or set gradient_checkpointing or use_peft, and {_again(output_dir)}."
        )
    if any(words in str(error) for words in SAYS_NO_NUMBERS):
        return DivergedError(
            f"The training diverged: {one_line(error).rstrip('.')}. {_state_of(output_dir)} Lower learning_rate (and that of what is "
            f"trained beside the student), and {_again(output_dir)}."
        )
    if isinstance(error, KeyError) and "metric_for_best_model" in str(error):
        return RecipeError(f"{one_line(error.args[0])} {_state_of(output_dir)} Mend it, and {_again(output_dir)}.")
    frame = _last_frame_of(_files_of_functions(recipe.script_args), error)
    if frame is not None:
        return RecipeError(
            f"{frame.filename}, line {frame.lineno}, in {frame.name}: {type(error).__name__}: {one_line(error)}. "
            f"{_state_of(output_dir)} Mend that function, and {_again(output_dir)}."
        )
    return None


def is_full(error: BaseException | None, output_dir: str) -> bool:
    """Whether `error`, or what it came from, says that a disk is full."""
    if error is None:
        return False
    text = str(error).lower()
    if getattr(error, "errno", None) in FULL or any(words in text for words in SAYS_FULL):
        return True
    if any(words in text for words in WRITER_FAILED) and _free(output_dir) <= LITTLE:
        return True
    return is_full(error.__cause__ or error.__context__, output_dir)


def _free(output_dir: str) -> int:
    """Bytes that are free where a folder is, or was to be."""
    folder = Path(output_dir).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _state_of(output_dir: str) -> str:
    checkpoint = last_finished_checkpoint(output_dir)
    safe = (["the trained student"] if is_trained(output_dir) else []) + ([checkpoint.name] if checkpoint else [])
    return f"Safe in {output_dir}: {', '.join(safe)}." if safe else f"No checkpoint in {output_dir} was finished."


def _again(output_dir: str) -> str:
    return "go on with `resume_from_checkpoint: true`" if can_go_on(output_dir) else "start again"


def _files_of_functions(script_args) -> Iterator[str]:
    """Files of the functions that a recipe names."""
    names = [getattr(script_args, "sample_metrics", None), *(getattr(script_args, "reward_funcs", None) or [])]
    for name in filter(None, names):
        file, colon, _ = name.rpartition(":")
        module = None if colon else sys.modules.get(name.rpartition(".")[0])
        if colon or module is not None:
            yield os.path.abspath(file) if colon else module.__file__


def _last_frame_of(files: Iterator[str], error: Exception) -> traceback.FrameSummary | None:
    """Of the frames that an error came through, the innermost in one of these files."""
    wanted = set(files)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in wanted]
    return frames[-1] if frames else None
