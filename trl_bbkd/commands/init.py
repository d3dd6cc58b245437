"""`trl-bbkd init`: a recipe to start from."""

import argparse
import shlex
from collections.abc import Iterable

from ..errors import DistillationError
from ..runs.methods import METHODS
from ..runs.new_recipe import methods_that_need
from .ends import exit_with_error


def add_parser(commands) -> argparse.ArgumentParser:
    init = commands.add_parser(
        "init",
        help="write a recipe to start from",
        description="Write a commented recipe to start from, with your student and your teacher's rows.",
    )
    init.add_argument("method", metavar="METHOD", help=listed(METHODS, "or"))
    init.add_argument("--student", required=True, metavar="MODEL", help="folder or Hub id of the student")
    init.add_argument("--data", required=True, metavar="ROWS", help="file, folder or Hub id of the teacher's rows")
    proxy, labels = (listed(methods_that_need(option), "and") for option in ("proxy", "labels"))
    init.add_argument("--proxy", metavar="MODEL", help=f"folder or Hub id of the proxy, for {proxy}")
    init.add_argument("--labels", metavar="NAME", nargs="+", help=f"names of the classes, for {labels}")
    init.add_argument("--teacher", metavar="NAME", help="name of the teacher, for the report and the card")
    init.add_argument("--output", metavar="FILE", help="the file to write, METHOD.yaml by default")
    init.error = exit_with_error  # one line, without the usage
    return init


def listed(names: Iterable[str], word: str) -> str:
    """`a, b and c`, with `word` for the last one."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def run(options: argparse.Namespace) -> None:
    """Write a recipe to start from."""
    from ..runs.new_recipe import write_recipe

    try:
        path = write_recipe(**vars(options))
    except DistillationError as error:
        exit_with_error(error)
    print(f"Wrote {path}. Train it with: {shlex.join(['trl-bbkd', 'train', str(path)])}")
