"""The options of `trl-bbkd evaluate` for benchmarks. Imports nothing heavy."""

import argparse
from typing import Any

from ..collect.reading import add_keys, values_of_options
from ..errors import RecipeError
from .settings import TASK_KEYS, TasksConfig


OPTION_NAMES = ("tasks", *TASK_KEYS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options for benchmarks, as a group of their own."""
    group = parser.add_argument_group("benchmarks, which need no judge")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        default=argparse.SUPPRESS,
        help="Names of lm_eval's tasks, YAML files of your own, or folders of them.",
    )
    add_keys(group, TasksConfig, TASK_KEYS)


def read_options(options: dict[str, Any]) -> TasksConfig | None:
    """
    Check what the command line says; `None` where it names no task.

    Args:
        options (`dict[str, Any]`):
            The options that were given, as text, and `model`.

    Raises:
        [`~errors.RecipeError`]: for the first thing that is wrong.
    """
    given = {name: options[name] for name in TASK_KEYS if name in options}
    tasks = tuple(name for word in options.get("tasks", ()) for name in word.split(",") if name.strip())
    if not tasks:
        if "tasks" in options or given:
            first = "tasks" if "tasks" in options else next(iter(given))
            raise RecipeError(
                f"--{first}: no task is named. Say which, such as --tasks hellaswag my_tasks/arith.yaml."
            )
        return None
    if not options.get("output_dir", "").strip():
        raise RecipeError("--output_dir is missing: the folder of the table and of what was answered.")
    values = values_of_options(TasksConfig, given)
    try:
        return TasksConfig(model=options["model"], output_dir=options["output_dir"], tasks=tasks, **values)
    except ValueError as error:
        raise RecipeError(f"--{error}") from error
