"""How a command ends: with one line for what a user can mend, and a status."""

import logging
import os
import sys
import warnings
from typing import NoReturn


INTERRUPTED = 130  # as a shell reports it
# An environment variable: the command that started this run says itself how to go on
ONE_OF_SEVERAL = "TRL_BBKD_ONE_OF_SEVERAL"


def exit_with_error(error: Exception | str) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def exit_with_file(error: OSError) -> NoReturn:
    """End with one line where a file or a disk is in the way; any other error of the system goes on as it is."""
    if error.filename is None:
        raise error
    file = error.filename2 or error.filename
    exit_with_error(f"{file} cannot be read or written: {error.strerror}. Mend that; the same command goes on.")


def exit_if_stopped(finished: bool) -> None:
    """End with a status of its own where Ctrl-C left something to go on with."""
    if not finished:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def pass_over_known_noise() -> None:
    """What libraries say at their start that is no news to whoever trains."""
    # TRL's configurations set a field under the name that transformers is about to drop
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
    # bitsandbytes misses a kernel for CPUs, without which it is slower there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def be_silent_to_the_hub() -> None:
    """`datasets` would tell a server that a file of this format was read."""
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
