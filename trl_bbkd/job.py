"""What every run of a recipe does around the training: inputs, card, report, and what goes to the Hub."""

import contextlib
import copy
import json
import logging
import os
import shlex
import sys
import time
from pathlib import Path

from accelerate import PartialState
from datasets import IterableDataset
from transformers.integrations import get_available_reporting_integrations

from .hub import push_student
from .model_card import write_card
from .recipe import Recipe, RecipeError, RecipeFile
from .report import Report, arguments_without_secrets, without_secrets, write_report
from .teacher_data import TeacherDataError


logger = logging.getLogger(__name__)

SEED = 0  # of held-out rows and of evaluation samples: the same for every student


class Job:
    """
    One recipe's run. A subclass loads its data and measures before any model is loaded, distils, and adds what the
    student is compared with.

    Raises:
        [`~recipe.RecipeError`]: no student is named, or `output_dir` holds a run of another recipe.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.args = copy.copy(recipe.training_args)
        self.script_args = recipe.script_args
        self.model = recipe.model_args.model_name_or_path
        self.is_main_process = PartialState().is_main_process
        self.pushes = self.args.push_to_hub
        if self.model is None:
            raise RecipeError("set `model_name_or_path` to the student: a folder or a Hub id.")
        check_loggers(self.args.report_to)
        self.inputs = {
            "method": recipe.method,
            "model_name_or_path": self.model,
            "dataset_name": self.script_args.dataset_name,
        }
        refuse_another_run(self.args.output_dir, self.inputs)
        self.args.model_init_kwargs = {
            "revision": recipe.model_args.model_revision,
            "attn_implementation": recipe.model_args.attn_implementation,
            "dtype": recipe.model_args.dtype,
            **(self.args.model_init_kwargs or {}),
        }

    def distil(self) -> Report | None:
        """Train the student, save it, measure it. `None` where the recipe leaves the student's training out."""
        raise NotImplementedError

    def add_baselines(self, report: Report) -> None:
        """Train what the student is compared with, if the recipe says so, and add it to the report."""
        raise NotImplementedError

    def start_card(self, trainer) -> None:
        """Say in the student's card what the trainer does not know."""
        self.card = trainer.card
        self.card.teacher = self.script_args.teacher_name
        self.card.datasets = dataset_names(self.recipe)
        self.card.counts = self.counts
        self.card.settings = settings(self.recipe)
        self.card.command = command(self.recipe.path, sys.argv)

    def save(self, trainer) -> None:
        """Save the student, before anything else can fail."""
        # `push` sends it once, when its card has the table
        trainer.args.push_to_hub = False
        trainer.save_model(self.args.output_dir)
        trainer.save_state()
        trainer.create_model_card()

    def write(self, report: Report) -> None:
        if self.is_main_process:
            write_report(report, self.args.output_dir)
            self.card.report = report
            write_card(self.card, self.args.output_dir)

    def push(self) -> None:
        """Send the student to the Hub, if the recipe says so."""
        if self.pushes:
            url = push_student(
                self.args.output_dir,
                self.card.repo_id,
                folders=self.card.folders,
                token=self.args.hub_token,
                private=self.args.hub_private_repo,
                revision=self.args.hub_revision,
                commit_message="End of training",
            )
            print(f"On the Hub: {url}")


def check_loggers(names: list[str]) -> None:
    """
    Refuse experiment trackers that are not installed, before anything is loaded.

    Args:
        names (`list[str]`):
            `report_to` of the recipe's configuration.

    Raises:
        [`~recipe.RecipeError`]: naming the first such tracker.
    """
    # transformers does not list flyte, which is there wherever it is used
    installed = {*get_available_reporting_integrations(), "flyte"}
    for name in names:
        if name not in installed:
            raise RecipeError(
                f"report_to names {name!r}, which is not installed here, or no experiment tracker of transformers. Install it, "
                f"or take one of: {', '.join(sorted(installed - {'flyte'}) + ['none'])}."
            )


def hold_out(train, most: int):
    """
    Divide rows without a test split: at most 5 % of them, and `most`, are held out for evaluation, always the same ones.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            All rows. Of a streaming set the first `most` are held out.
        most (`int`):
            Most rows to hold out.

    Returns:
        `tuple`: training rows and held-out rows.

    Raises:
        [`~teacher_data.TeacherDataError`]: there is only one row.
    """
    if isinstance(train, IterableDataset):
        rows = most
        parts = train.skip(rows), train.take(rows)
    else:
        rows = min(most, max(1, len(train) // 20))
        if len(train) == 1:
            raise TeacherDataError("One row of teacher data is too little: evaluation needs a held-out row.")
        split = train.train_test_split(test_size=rows, seed=SEED)
        parts = split["train"], split["test"]
    logger.warning(f"The teacher data has no test split: {rows} of its rows are held out for evaluation.")
    return parts


def refuse_another_run(output_dir: str, inputs: dict) -> None:
    """Raise [`~recipe.RecipeError`] if `output_dir` reports a run of other inputs: its files would be mixed up."""
    path = Path(output_dir) / "metrics.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8")).get("inputs", {})
    differing = [key for key, value in inputs.items() if found.get(key) != value]
    if differing:
        there = ", ".join(f"{key}: {found.get(key)}" for key in differing)
        raise RecipeError(
            f"`output_dir: {output_dir}` holds another run ({there}). Choose another `output_dir` or delete that folder."
        )


def dataset_names(recipe: Recipe) -> list[str]:
    """Where the teacher's text comes from: paths, or ids of the Hub."""
    names = []
    for entry in recipe.dataset_args.datasets or []:
        files = entry.data_files.values() if isinstance(entry.data_files, dict) else [entry.data_files]
        # `path` is the name of a file format where the files are named beside it
        names += [entry.path] if entry.data_files is None else files
    names = names or [recipe.script_args.dataset_name]
    return [name for item in names for name in (item if isinstance(item, list) else [item])]


def checkpoint_to_resume(resume_from_checkpoint: str | None) -> str | bool | None:
    """`True`, the last checkpoint, where a recipe or a command line says `true`; else a path or `None`."""
    flags = {"true": True, "false": None}
    return flags.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str):
    """Put the wall-clock time of the block into `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def display_path(path: str | None) -> str | None:
    """A path below the current directory as it would be typed there; anything else as it is."""
    if path is None or not os.path.isabs(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def command(recipe_path: Path | None, argv: list[str]) -> str | None:
    """
    The command that repeats this run, without secrets; `None` for a recipe that no command line named.

    Args:
        recipe_path (`Path`, *optional*):
            The recipe.
        argv (`list[str]`):
            The process's `sys.argv`: the recipe is its program or its first argument.
    """
    named = [index for index, argument in enumerate(argv[:2]) if recipe_path and same_file(recipe_path, argument)]
    if not named:
        return None
    overrides = argv[named[0] + 1 :]
    path = display_path(str(recipe_path))
    return shlex.join(["trl-bbkd", "train", path, *arguments_without_secrets(overrides)])


def same_file(path: Path, other: str) -> bool:
    return path.resolve() == Path(other).resolve()


def settings(recipe: Recipe) -> dict:
    """What the recipe's file says, without secrets and the `env` block."""
    if recipe.path is None:
        return {}
    return without_secrets({"method": recipe.method, **RecipeFile(recipe.path).values})
