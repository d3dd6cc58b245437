"""`trl-bbkd push`: a finished student to the Hub."""

import argparse

from ..errors import DistillationError
from .ends import exit_with_error


def add_parser(commands) -> argparse.ArgumentParser:
    push = commands.add_parser(
        "push",
        help="send a finished student to the Hub",
        description="Send the student of a run, its card and its report to the Hub. Log in first: `hf auth login`.",
    )
    push.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder of a run")
    push.add_argument("repo_id", metavar="REPO", help="repository, such as me/student")
    push.add_argument(
        "--with", dest="folders", metavar="FOLDER", action="append", default=[], help="send a subfolder: discriminator"
    )
    push.add_argument("--private", action="store_true", default=None, help="create the repository private")
    push.add_argument("--revision", help="branch to commit to")
    return push


def run(options: argparse.Namespace) -> None:
    """Send a finished student to the Hub."""
    from ..hub.push import push_student

    try:
        url = push_student(
            options.output_dir,
            options.repo_id,
            folders=options.folders,
            private=options.private,
            revision=options.revision,
        )
    except DistillationError as error:
        exit_with_error(error)
    print(f"On the Hub: {url}")
