"""`trl-bbkd evaluate`: a student judged beside its teacher."""

import argparse

from ..errors import DistillationError
from .ends import be_silent_to_the_hub, exit_if_stopped, exit_with_error, pass_over_known_noise


def add_parser(commands) -> argparse.ArgumentParser:
    evaluate = commands.add_parser(
        "evaluate",
        help="have a judge compare a student with its teacher",
        usage="trl-bbkd evaluate MODEL --data ROWS --judge NAME --base_url URL --output_dir FOLDER [options]",
        description="Have a judge, behind any endpoint that is compatible with OpenAI's, compare a student's answers with its teacher's. "
        "What was answered is kept and never asked again.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "model", metavar="MODEL", help="folder or Hub id of the student, also an adapter's, or a file of its answers"
    )
    evaluate.error = exit_with_error
    return evaluate


def add_keys(parser: argparse.ArgumentParser) -> None:
    """What loads more than `--help` of all commands should."""
    from ..judging.reading import add_options

    add_options(parser)


def run(options: argparse.Namespace, unknown: list[str]) -> None:
    """Ask a judge, and write the table."""
    from ..collect.reading import refuse_unknown
    from ..judging.command import evaluate
    from ..judging.reading import option_names, read_options

    pass_over_known_noise()
    be_silent_to_the_hub()
    try:
        if unknown:
            refuse_unknown(unknown, option_names())
        finished = evaluate(read_options(vars(options)))
    except DistillationError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        finished = False
    exit_if_stopped(finished)
