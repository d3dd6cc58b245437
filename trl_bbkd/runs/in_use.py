"""One run at a time in one `output_dir`."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..errors import RecipeError


try:
    import fcntl
except ImportError:
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_NAME = ".in_use"


def alone_in_its_folder(run: Callable) -> Callable:
    """Have `run(recipe)` refuse to begin while another process runs in the recipe's `output_dir`."""

    @functools.wraps(run)
    def alone(recipe):
        with claimed(recipe.training_args.output_dir):
            return run(recipe)

    return alone


@contextlib.contextmanager
def claimed(output_dir: str) -> Iterator[None]:
    """
    Hold `output_dir` for this run, whose processes all come here. The system frees it when the process ends, however.

    Raises:
        [`~errors.RecipeError`]: another process holds it.
    """
    folder = Path(output_dir).expanduser()
    with contextlib.ExitStack() as stack:
        holders = [_claim(folder, stack) if PartialState().is_main_process else None]
        broadcast_object_list(holders)
        if holders[0] is not None:
            raise RecipeError(
                f"output_dir: {output_dir} is in use by another run, process {holders[0]}: the two would be mixed up. Wait for "
                "its end, or name another output_dir."
            )
        yield


def _claim(folder: Path, stack: contextlib.ExitStack) -> str | None:
    """Take the lock until `stack` closes; or say which process has it. Not every system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context(open(folder / LOCK_NAME, "a+", encoding="utf-8"))
    if fcntl is None:
        return None
    try:
        # Of this process alone: a child that outlives it does not hold the folder
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        return lock.read().strip()
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): see to it that no other run uses it.")
        return None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    stack.callback(_leave, folder)
    return None


def _leave(folder: Path) -> None:
    """Leave nothing behind of a run that left nothing else."""
    (folder / LOCK_NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
