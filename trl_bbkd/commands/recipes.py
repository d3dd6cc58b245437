"""`trl-bbkd recipes`: the recipes that come with the package."""

import argparse


def add_parser(commands) -> argparse.ArgumentParser:
    return commands.add_parser(
        "recipes",
        help="list the recipes that come with the package",
        description="List the recipes that come with the package, one line each.",
    )


def run(options: argparse.Namespace) -> None:
    from ..runs.shipped import recipe_list

    print(recipe_list())
