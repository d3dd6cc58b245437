"""What every run of a recipe does around the training: inputs, card, report, and what goes to the Hub."""

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerState
from transformers.integrations import get_available_reporting_integrations

from ..data.splitting import input_key, split_by_input
from ..errors import NoStepsError, RecipeError, TeacherDataError
from ..host.model_paths import checkpoint_fingerprint
from ..host.resume import TRAINER_STATE_NAME
from ..hub.example import example_input
from ..hub.model_card import write_card
from ..hub.push import push_student
from ..hub.settings import changed_settings
from ..reports.report import UNDISTILLED, Report, arguments_without_secrets, without_secrets, write_report
from .console import PrinterCallback, ProgressCallback, ShortPrinter, ShortProgress
from .methods import load_method
from .progress import TRAINED, Progress, can_go_on
from .recipe import Recipe
from .recipe_checks import check_packages
from .recipe_file import RecipeFile, one_line
from .shipped import recipe_path as path_of_recipe
from .trackers import TRACKER_RUNS, Trackers


logger = logging.getLogger(__name__)

STUDENT = "student"
# Of a method's configuration, what changes no number of a report
UNTOLD_ARGUMENTS = ("teacher_name", "eval_judge")
UNDECISIVE_ARGUMENTS = (
    "disable_tqdm",
    "hub_",
    "log",
    "output_dir",
    "project",
    "push_",
    "report_to",
    "resume_",
    "run_name",
    "save_",
    "trackio_",
)
SEED = 0  # of held-out rows and of evaluation samples: the same for every student


class Job:
    """
    One recipe's run. A subclass loads its data and measures before any model is loaded, distils, and adds what the
    student is compared with.

    Raises:
        [`~errors.RecipeError`]: no student is named, a package is missing, there is nothing to resume from, or
        `output_dir` holds a run of another recipe.
    """

    trackers: Trackers  # of the student's training
    counts: dict  # of training and held-out rows, for the report and the card
    held_out_rows: list  # what results are measured on
    max_steps: int  # of the student's training, once it is over

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.method = load_method(recipe.method)
        self.args = copy.copy(recipe.training_args)
        self.script_args = recipe.script_args
        self.model = recipe.model_args.model_name_or_path
        self.is_main_process = PartialState().is_main_process
        self.pushes = self.args.push_to_hub
        if self.model is None:
            raise RecipeError("set `model_name_or_path` to the student: a folder or a Hub id.")
        check_packages(vars(self.script_args) | vars(recipe.model_args) | vars(self.args))
        check_loggers(self.args.report_to)
        self.resume = checkpoint_to_resume(self.args.resume_from_checkpoint)
        self.args.resume_from_checkpoint = None
        check_resumption(self.resume, self.args.output_dir, self.method.goes_on_by_itself)
        if self.pushes:
            check_repo_id(self.args.hub_model_id or Path(self.args.output_dir).absolute().name)
        if self.script_args.teacher_name is None and self.is_main_process:
            logger.warning("No teacher_name is set: the report and the card will speak of an unnamed teacher.")
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
        self.method.check(recipe)

    def describe(self) -> dict:
        """What decides the run's results."""
        args = {
            name: value for name, value in self.args.to_dict().items() if not name.startswith(UNDECISIVE_ARGUMENTS)
        }
        # What a judge says is kept by its own journal
        script_args = {name: value for name, value in vars(self.script_args).items() if name not in UNTOLD_ARGUMENTS}
        held_out = hashlib.blake2b(json.dumps(self.held_out_rows, default=str).encode(), digest_size=16).hexdigest()
        return {
            **self.inputs,
            "processes": self.args.world_size,
            "arguments": args,
            "script": script_args,
            "model": vars(self.recipe.model_args),
            "held-out rows": held_out,
        }

    @contextlib.contextmanager
    def one_line_errors(
        self, kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, ImportError, OSError)
    ):
        """What a trainer refuses, or cannot load, before it trains; or with `kinds` what it says afterwards."""
        try:
            yield
        except kinds as error:
            raise RecipeError(one_line(error)) from error

    def open_progress(self, trainer) -> None:
        """Find what an earlier run has left: its finished parts, its student, or its last checkpoint."""
        output_dir, settings = self.args.output_dir, self.describe()
        self.progress = Progress(output_dir, settings)
        # What goes on by itself looks at its stages as well, and takes no step again either
        asked = self.resume is True and not self.method.goes_on_by_itself
        self.is_trained = asked and self._has_trained(self._student_fingerprint())
        if self.is_trained:
            if self.is_main_process:
                logger.warning(f"The student in {output_dir} was trained before: going on with what is missing.")
            return
        with self.one_line_errors():
            checkpoint = trainer.check_output_dir(self.resume)
        if checkpoint is None:
            self.progress = Progress(output_dir, settings, is_new=True)
        elif isinstance(self.resume, str):
            # Whoever names a checkpoint wants the steps after it again
            self.progress.keep_only(UNDISTILLED)

    def run_training(self, trainer, seconds: dict[str, float]):
        """Train the student and save it; `None` if the recipe leaves that out."""
        self.shorten_log(trainer)
        self.trackers.go_on()
        with timed(seconds, trainer._name), self.one_line_errors(NoStepsError):
            output = trainer.train(resume_from_checkpoint=self.resume)
        if output is None:
            return None
        # A run that was finished before has no metrics of its own: what it left is there, with the end of its log
        if not output.metrics and self._has_trained(self._student_fingerprint()):
            self.recall(trainer)
        else:
            self.save(trainer)
        return output

    def finished_training(self, make: Callable[[], dict]) -> dict:
        """What is kept of a training that ended: of the one that made this very student, also what was measured of it."""
        fingerprint = self._student_fingerprint()
        if self._has_trained(fingerprint):
            return self.progress[TRAINED]
        self.progress.keep_only(UNDISTILLED, TRACKER_RUNS)
        return self.progress.finish(TRAINED, {**make(), STUDENT: fingerprint})

    def _has_trained(self, fingerprint: str) -> bool:
        return TRAINED in self.progress and self.progress[TRAINED][STUDENT] == fingerprint

    def _student_fingerprint(self) -> str:
        """Of the student on disk, as the main process sees it."""
        PartialState().wait_for_everyone()
        found = [checkpoint_fingerprint(self.args.output_dir) if self.is_main_process else None]
        broadcast_object_list(found)
        return found[0]

    def recall(self, trainer) -> None:
        """Give a trainer that was not run the state of the one that was."""
        trainer.args.push_to_hub = False
        trainer.state = TrainerState.load_from_json(str(Path(self.args.output_dir) / TRAINER_STATE_NAME))
        trainer.create_model_card()

    def shorten_log(self, trainer) -> None:
        """Show on the terminal what matters; trackers and `log_history` keep all of it."""
        for callback, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
            if trainer.pop_callback(callback) is not None:
                trainer.add_callback(short(self.method.console_keys))

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
        column = getattr(self.args, "text_column", "prompt")
        self.card.example = example_input(self.held_out_rows, column) or self.card.example
        self.card.recipe_settings = changed_settings(
            self.script_args, self.recipe.model_args, self.recipe.dataset_args
        )
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

    def answers(self, report: Report) -> list[dict]:
        """What students said to held-out prompts, a dictionary for each; none of students that do not write."""
        return []

    def track(self, report: Report) -> None:
        """Send the report to the experiment trackers that the recipe names."""
        self.trackers.send(report, self.answers(report), self.max_steps)

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


def check_resumption(resume: str | bool | None, output_dir: str, goes_on_by_itself: bool) -> None:
    """
    Refuse to resume where nothing was left, before anything is loaded.

    Raises:
        [`~errors.RecipeError`]: there is no such checkpoint, or none at all.
    """
    if isinstance(resume, str) and not (Path(resume) / TRAINER_STATE_NAME).is_file():
        raise RecipeError(
            f"resume_from_checkpoint={resume!r} is no finished checkpoint: a folder with {TRAINER_STATE_NAME}. `true` takes "
            "the last one in output_dir."
        )
    if resume is True and not goes_on_by_itself and not can_go_on(output_dir):
        raise RecipeError(
            f"There is no finished checkpoint in {output_dir} to resume from. Leave resume_from_checkpoint out to begin."
        )


def check_repo_id(name: str) -> None:
    """
    Raises:
        [`~errors.RecipeError`]: no repository of the Hub can have this name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(
            f"hub_model_id={name!r} cannot be a repository of the Hub: {one_line(error)} Write it like me/student."
        ) from error


def check_loggers(names: list[str]) -> None:
    """
    Refuse experiment trackers that are not installed, before anything is loaded.

    Args:
        names (`list[str]`):
            `report_to` of the recipe's configuration.

    Raises:
        [`~errors.RecipeError`]: naming the first such tracker.
    """
    # transformers does not list flyte, which is there wherever it is used
    installed = {*get_available_reporting_integrations(), "flyte"}
    for name in names:
        if name not in installed:
            raise RecipeError(
                f"report_to names {name!r}, which is not installed here, or no experiment tracker of transformers. Install it, "
                f"or take one of: {', '.join(sorted(installed - {'flyte'}) + ['none'])}."
            )


def hold_out(train, most: int, column: str = "prompt"):
    """
    Divide rows without a test split: at most 5 % of them, and `most`, are held out for evaluation, always the same ones,
    and none whose input is in training too.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            All rows. Of a streaming set the first `most` are held out, and later ones with the same input left out.
        most (`int`):
            Most rows to hold out.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column of the input.

    Returns:
        `tuple`: training rows and held-out rows.

    Raises:
        [`~errors.TeacherDataError`]: there is only one row.
    """
    if isinstance(train, IterableDataset):
        head = list(itertools.islice(train, most + 1))
        # A short stream must not be held out whole
        rows = most if len(head) > most else max(1, len(head) // 20)
        held_out = {input_key(row.get(column)) for row in head[:rows]}
        rest = train.skip(rows).filter(lambda row: input_key(row.get(column)) not in held_out)
        parts = rest, train.take(rows)
    else:
        if len(train) == 1:
            raise TeacherDataError("One row of teacher data is too little: evaluation needs a held-out row.")
        parts = split_by_input(train, column, min(most, max(1, len(train) // 20)), SEED)
        rows = len(parts[1])
    shared = (
        column in (train.column_names or ())
        and isinstance(train, Dataset)
        and len(set(map(input_key, train[column]))) == 1
    )
    sides = f"all rows have the same {column}, which training sees too" if shared else f"no {column} is on both sides"
    logger.warning(
        f"The teacher data has no test split: {rows} of its rows {'is' if rows == 1 else 'are'} held out for "
        f"evaluation; {sides}."
    )
    return parts


def refuse_another_run(output_dir: str, inputs: dict) -> None:
    """Raise [`~errors.RecipeError`] if `output_dir` reports a run of other inputs: its files would be mixed up."""
    path = Path(output_dir) / "metrics.json"
    if not path.is_file():
        return
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # a run was stopped while it wrote its report
    found = metrics.get("inputs", {}) if isinstance(metrics, dict) else inputs
    differing = [key for key, value in inputs.items() if found.get(key) != value]
    if differing:
        there = ", ".join(f"{key}: {found.get(key)}" for key in differing)
        raise RecipeError(
            f"`output_dir: {output_dir}` holds another run ({there}). Choose another `output_dir` or delete that folder."
        )


def dataset_names(recipe: Recipe) -> list[str]:
    """Where the teacher's text comes from: paths, or ids of the Hub."""
    names: list = []
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
    named = [index for index, argument in enumerate(argv[:2]) if recipe_path and same_recipe(recipe_path, argument)]
    if not named:
        return None
    overrides = from_the_start(argv[named[0] + 1 :])
    word = argv[named[0]]
    path = display_path(str(recipe_path)) if Path(word).is_file() else word  # the name of a recipe of ours
    return shlex.join(["trl-bbkd", "train", path, *arguments_without_secrets(overrides)])


def from_the_start(overrides: list[str]) -> list[str]:
    """Overrides without where a run went on: a run that repeats it begins anew."""
    option = "--resume_from_checkpoint"
    return [
        word
        for before, word in zip([None, *overrides], overrides, strict=False)
        if option not in (before, word.partition("=")[0])
    ]


def same_recipe(path: Path, other: str) -> bool:
    return path.resolve() == path_of_recipe(other).resolve()


def settings(recipe: Recipe) -> dict:
    """What the recipe's file says, without secrets and the `env` block."""
    if recipe.path is None:
        return {}
    return without_secrets({"method": recipe.method, **RecipeFile(recipe.path).values})
