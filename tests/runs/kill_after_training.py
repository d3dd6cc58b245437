"""Runs a recipe and kills the process when a named function is called: `python kill_after_training.py RECIPE MODULE NAME`."""

import importlib
import os
import signal
import sys

from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


def main(recipe: str, module: str, name: str) -> None:
    *path, name = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    run(load_recipe(recipe))


if __name__ == "__main__":
    main(*sys.argv[1:])
