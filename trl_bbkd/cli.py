"""The command line: `trl-bbkd train recipe.yaml`. What is heavy is imported by the command that needs it."""

import argparse
import sys

from .commands import collect, compare, evaluate, init, plan, push, recipes, train
from .host.version import __version__


COMMANDS = {
    "train": train,
    "plan": plan,
    "recipes": recipes,
    "init": init,
    "push": push,
    "compare": compare,
    "collect": collect,
    "evaluate": evaluate,
}
TAKE_OVERRIDES = (plan, collect, evaluate)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `trl-bbkd`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="trl-bbkd", description="Distil a black-box teacher: one whose text is all you have."
    )
    add_version(parser)
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    parsers = {name: command.add_parser(commands) for name, command in COMMANDS.items()}
    for name in {"collect", "evaluate"}.intersection(arguments[:1]):
        COMMANDS[name].add_keys(parsers[name])
    options, overrides = parser.parse_known_args(arguments)
    command = COMMANDS[options.command]
    del options.command
    if command in TAKE_OVERRIDES:
        command.run(options, overrides)
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    else:
        command.run(options)


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=__version__)
