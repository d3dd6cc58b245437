"""A disk that is full in the middle of a run: what is safe on it, and how to go on."""

import errno
import functools
import shutil
from collections.abc import Callable

from safetensors import SafetensorError

from ..errors import DiskFullError
from ..host.resume import last_finished_checkpoint
from .progress import can_go_on, is_trained
from .recipe_file import one_line


FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE = 1 << 20  # bytes: so much is left at most where a writer does not say why it failed
# How writers without an error number of the system put it
SAYS_FULL = ("no space left", "not enough disk space", "disk quota exceeded")
WRITER_FAILED = ("pytorchstreamwriter", "inline_container", "unexpected pos")


def tells_of_a_full_disk(run: Callable) -> Callable:
    """Have `run(recipe)` end in one line where it runs out of space, which says what is safe in the recipe's `output_dir`."""

    @functools.wraps(run)
    def told(recipe):
        try:
            return run(recipe)
        except (OSError, RuntimeError, SafetensorError) as error:
            output_dir = recipe.training_args.output_dir
            if not is_full(error, output_dir):
                raise
            raise DiskFullError(_message(error, output_dir)) from error

    return told


def is_full(error: BaseException | None, output_dir: str) -> bool:
    """Whether `error`, or what it came from, says that a disk is full."""
    if error is None:
        return False
    text = str(error).lower()
    if getattr(error, "errno", None) in FULL or any(words in text for words in SAYS_FULL):
        return True
    if any(words in text for words in WRITER_FAILED) and shutil.disk_usage(output_dir).free <= LITTLE:
        return True
    return is_full(error.__cause__ or error.__context__, output_dir)


def _message(error: BaseException, output_dir: str) -> str:
    checkpoint = last_finished_checkpoint(output_dir)
    safe = (["the trained student"] if is_trained(output_dir) else []) + ([checkpoint.name] if checkpoint else [])
    found = f"Safe in {output_dir}: {', '.join(safe)}." if safe else f"No checkpoint in {output_dir} was finished."
    again = "go on with `resume_from_checkpoint: true`" if can_go_on(output_dir) else "start again"
    return f"The disk is full ({one_line(error).rstrip('.')}). {found} Make room, or lower save_total_limit, and {again}."
