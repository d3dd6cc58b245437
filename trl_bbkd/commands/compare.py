"""`trl-bbkd compare`: finished runs side by side."""

import argparse
import sys
from pathlib import Path

from ..errors import DistillationError
from .ends import exit_with_error, pass_over_known_noise


def add_parser(commands) -> argparse.ArgumentParser:
    compare = commands.add_parser(
        "compare",
        help="put finished runs side by side",
        description="Put finished runs side by side that were measured on the same held-out prompts: a table in Markdown with intervals "
        "and differences to the first run, settings that differ, answers.",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs; differences are to the first")
    compare.add_argument(
        "--metric",
        dest="metrics",
        metavar="NAME",
        action="append",
        default=[],
        help="tell of this one alone; may be repeated",
    )
    compare.add_argument(
        "--html", metavar="FILE", help="also write a page with curves and marked answers, which needs no network"
    )
    compare.add_argument(
        "--push",
        action="store_true",
        help="put the tables into the cards of the students, which were sent to the Hub before. Log in first: `hf auth login`",
    )
    compare.error = exit_with_error
    return compare


def run(options: argparse.Namespace) -> None:
    """Print runs side by side, and write the page."""
    pass_over_known_noise()
    try:
        from ..reports.comparison import Comparison, read_runs

        comparison = Comparison(read_runs(options.runs), options.metrics)
    except DistillationError as error:
        exit_with_error(error)
    print(comparison.markdown(), end="")
    if options.html:
        from ..reports.comparison_page import page

        try:
            Path(options.html).write_text(page(comparison), encoding="utf-8")
        except OSError as error:
            exit_with_error(f"--html {options.html}: {error.strerror}. Name a file in a folder that is there.")
    if options.push:
        from ..hub.push_comparison import push_comparison

        try:
            for url in push_comparison(comparison):
                print(f"On the Hub: {url}", file=sys.stderr)
        except DistillationError as error:
            exit_with_error(error)
