"""`trl-bbkd evaluate`: a student judged beside its teacher, and its benchmarks."""

import argparse

from ..errors import DistillationError
from .ends import be_silent_to_the_hub, exit_if_stopped, exit_with_error, exit_with_file, pass_over_known_noise


def add_parser(commands) -> argparse.ArgumentParser:
    evaluate = commands.add_parser(
        "evaluate",
        help="have a judge compare a student with its teacher, or run benchmarks",
        usage="trl-bbkd evaluate MODEL --data ROWS --judge NAME --base_url URL --output_dir FOLDER [options]\n"
        "       trl-bbkd evaluate MODEL --tasks TASK ... --output_dir FOLDER [options]",
        description="Have a judge, behind any endpoint that is compatible with OpenAI's, compare a student's answers with its teacher's; "
        "or ask the student the tasks of lm_eval, and your own. What was answered is kept and never asked again.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "model", metavar="MODEL", help="folder or Hub id of the student, also an adapter's, or a file of its answers"
    )
    evaluate.error = exit_with_error
    return evaluate


def add_keys(parser: argparse.ArgumentParser) -> None:
    """What loads more than `--help` of all commands should."""
    from ..judging import reading as judging
    from ..tasks import reading as tasks

    judging.add_options(parser)
    tasks.add_options(parser)


def run(options: argparse.Namespace, unknown: list[str]) -> None:
    """Ask a judge, or tasks, or both, and write the table."""
    from ..collect.reading import refuse_unknown
    from ..judging import reading as judging
    from ..judging.command import evaluate
    from ..tasks import reading as tasks
    from ..tasks.command import Benchmarks

    pass_over_known_noise()
    be_silent_to_the_hub()
    given = vars(options)
    try:
        if unknown:
            refuse_unknown(unknown, [*judging.option_names(), *tasks.OPTION_NAMES])
        asked = tasks.read_options(given)
        # Of a judge's options, each asks for one; the folder is both's
        is_judged = asked is None or bool(given.keys() - {"model", "output_dir", *tasks.OPTION_NAMES})
        settings = judging.read_options(given) if is_judged else None
        benchmarks = None if asked is None else Benchmarks(asked)
        finished = evaluate(settings) if settings else True
        if finished and benchmarks:
            benchmarks.run(is_judged)
    except DistillationError as error:
        exit_with_error(error)
    except OSError as error:
        exit_with_file(error)
    except KeyboardInterrupt:
        finished = False
    exit_if_stopped(finished)
