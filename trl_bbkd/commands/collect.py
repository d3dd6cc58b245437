"""`trl-bbkd collect`: a teacher's answers."""

import argparse

from ..errors import DistillationError
from .ends import be_silent_to_the_hub, exit_if_stopped, exit_with_error


def add_parser(commands) -> argparse.ArgumentParser:
    collect = commands.add_parser(
        "collect",
        help="ask a teacher for its answers",
        usage="trl-bbkd collect RECIPE [--retry_failed] [overrides]",
        description="Ask a teacher's endpoint for its answers, and leave a set that every method takes. What was answered is "
        "kept and never asked again: the same command goes on with what is missing.",
        allow_abbrev=False,
    )
    collect.add_argument("recipe", metavar="RECIPE", help="a recipe's file, or `collect` for the one of the package")
    collect.error = exit_with_error
    return collect


def add_keys(parser: argparse.ArgumentParser) -> None:
    """What loads more than `--help` of all commands should."""
    from ..collect import reading

    reading.add_keys(parser.add_argument_group("keys of the recipe"))


def run(options: argparse.Namespace, unknown: list[str]) -> None:
    """Ask a teacher, and write the set."""
    from ..collect.command import collect
    from ..collect.reading import read_settings, refuse_unknown
    from ..runs.shipped import find_collect_recipe

    be_silent_to_the_hub()
    overrides = {name: value for name, value in vars(options).items() if name != "recipe"}
    try:
        if unknown:
            refuse_unknown(unknown)
        settings = read_settings(find_collect_recipe(options.recipe), overrides)
        finished = collect(settings)
    except DistillationError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        finished = False
    exit_if_stopped(finished)
