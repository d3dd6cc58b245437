"""`trl-bbkd train RECIPE --seeds 0 1 2`: a run for each seed, one after the other, and what they come to together."""

import os
import shlex
import subprocess
import sys

from ..errors import DistillationError
from .ends import INTERRUPTED, ONE_OF_SEVERAL, exit_if_stopped, exit_with_error, exit_with_file, pass_over_known_noise


PROGRAM = [sys.executable, "-c", "from trl_bbkd.cli import main; main()"]


def train_seeds(recipe: str, seeds: list[str], arguments: list[str]) -> None:
    """Train what is missing of the seeds, each in processes of its own, then write and print `seeds.md`."""
    pass_over_known_noise()
    try:
        from ..runs.seeds import SeveralSeeds

        several = SeveralSeeds(recipe, seeds, arguments)
        for seed in several.seeds:
            if several.is_finished(seed):
                print(f"Seed {seed} is finished: {several.folder(seed)}", flush=True)
                continue
            words = several.run_of(seed)
            print(f"Seed {seed}: {shlex.join(['trl-bbkd', *words])}", flush=True)
            _exit_if_failed(seed, _status_of(words))
            several.finish(seed)
        print("\n" + several.summed_up().markdown(), end="")
        print(f"Also in {several.output_dir}: seeds.md, seeds.json")
    except DistillationError as error:
        exit_with_error(error)
    except OSError as error:
        exit_with_file(error)
    except KeyboardInterrupt:
        exit_if_stopped(False)


def _status_of(words: list[str]) -> int:
    process = subprocess.Popen([*PROGRAM, *words], env={**os.environ, ONE_OF_SEVERAL: "1"})
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Ctrl-C has reached it as well
        process.wait()
        raise


def _exit_if_failed(seed: int, status: int) -> None:
    """The run has said what went wrong."""
    if status == INTERRUPTED:
        exit_if_stopped(False)
    if status:
        print(f"Seed {seed} ended with status {status}. The same command goes on.", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)
