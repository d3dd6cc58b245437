"""Recipes: one flat YAML file becomes checked dataclasses for one trainer."""

import argparse
import copy
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..data.config import KeywordArguments
from ..errors import RecipeError
from .key_names import nearest
from .methods import METHODS, load_class, load_method
from .recipe_checks import check_values
from .recipe_file import RecipeFile, one_line
from .recipe_keys import own_keys, recipe_keys, unknown_option


if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class RunArguments(ScriptArguments):
    """
    What every run needs beside the model, the data set and the method's configuration.

    This class includes only the parameters of `trl_bbkd`. For the rest, see [`~trl.ScriptArguments`].

    Parameters:
        teacher_name (`str`, *optional*):
            Name of the black-box teacher, for the report and the model card.
    """

    teacher_name: str | None = field(
        default=None, metadata={"help": "Name of the black-box teacher, for the report and the model card."}
    )


@dataclass
class ClassifierArguments(RunArguments):
    """
    What a run needs whose student is a classifier.

    Parameters:
        baselines (`bool`, *optional*, defaults to `True`):
            Whether to train the same student on all rows, and on as many random ones as were selected, for the same
            number of optimizer steps, and report them.
    """

    baselines: bool = field(
        default=True,
        metadata={
            "help": "Whether to train the same student on all rows, and on as many random ones as were selected, for "
            "the same number of optimizer steps, and report them."
        },
    )


@dataclass
class RecipeArguments(RunArguments):
    """
    What a run needs whose student writes text.

    Parameters:
        reward_funcs (`list[str]`, *optional*):
            Rewards added to the discriminator's score, as `package.module.function` or `path/to/file.py:function`.
        sample_metrics (`str`, *optional*):
            Function that judges the student's samples, written in the same way.
        seqkd_baseline (`bool`, *optional*, defaults to `True`):
            Whether to train plain SFT on the same text for the same number of optimizer steps, and report it.
        seqkd_learning_rate (`float`, *optional*):
            Learning rate of that baseline. `None` takes the student's.
        eval_prompts (`int`, *optional*):
            Most held-out prompts that the report's students are sampled on. `None` takes as many as there are optimizer
            steps, at least 16 and at most 256, and fewer where the report would take more than a tenth of the training.
        eval_samples (`int`, *optional*):
            The report's samples for each of them at every temperature but 0; half as many along the way. `None` takes 1 for
            every 30 optimizer steps, at least 1 and at most 8, and fewer where the report would take more than a tenth of
            the training.
        eval_temperatures (`list[float]`, *optional*):
            Temperatures that the report samples at, the one that decides first; 0 is greedy. `None` takes 1.0, 0.7 and 0.
        eval_judge (`dict[str, Any]`, *optional*):
            A judge that compares the student's answers with the teacher's at each evaluation, and in the report: fields of
            [`~judging.settings.EvalJudgeConfig`].
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards added to the discriminator's score: `package.module.function` or "
            "`path/to/file.py:function`."
        },
    )
    sample_metrics: str | None = field(
        default=None,
        metadata={
            "help": "Function that judges the student's samples: `package.module.function` or "
            "`path/to/file.py:function`."
        },
    )
    seqkd_baseline: bool = field(
        default=True,
        metadata={
            "help": "Whether to train plain SFT on the same text for the same number of optimizer steps, and report "
            "it."
        },
    )
    seqkd_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of that baseline. If `None`, the student's."}
    )
    eval_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Most held-out prompts that the report's students are sampled on. If `None`, as many as there are "
            "optimizer steps, at least 16 and at most 256, and fewer where the report would take more than a tenth of the "
            "training."
        },
    )
    eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "The report's samples for each of them at every temperature but 0; half as many along the way. If `None`, "
            "1 for every 30 optimizer steps, at least 1 and at most 8, and fewer where the report would take more than a tenth "
            "of the training."
        },
    )
    eval_temperatures: list[float] | None = field(
        default=None,
        metadata={
            "help": "Temperatures that the report samples at, the one that decides first; 0 is greedy. If `None`, 1.0, 0.7 and "
            "0."
        },
    )
    eval_judge: KeywordArguments | None = field(
        default=None,
        metadata={
            "help": "A judge that compares the student's answers with the teacher's at each evaluation, and in the report: "
            "`model`, `base_url`, and what else the page on judges lists."
        },
    )

    def __post_init__(self):
        if isinstance(self.eval_judge, str):
            try:
                self.eval_judge = json.loads(self.eval_judge)
            except ValueError as error:
                raise ValueError(f"eval_judge: not valid JSON: {error}.") from error


@dataclass
class Recipe:
    """A checked recipe. `path` is `None` for one that was built in Python."""

    path: Path | None
    method: str
    script_args: RecipeArguments | ClassifierArguments
    training_args: "TrainingArguments"  # the method's configuration
    model_args: ModelConfig
    dataset_args: DatasetMixtureConfig


def load_recipe(path: str | os.PathLike, overrides: Collection[str] = ()) -> Recipe:
    """
    Read a recipe and check every key and value, before any model or data set is loaded.

    Input paths that exist next to the recipe are taken from there; all others, and those among the overrides, are
    relative to the current directory. The variables of an `env` block are exported first.

    Args:
        path (`str` or `os.PathLike`):
            YAML file with `method` and fields of [`RecipeArguments`] (of [`ClassifierArguments`] where the student
            classifies), [`~trl.ModelConfig`], [`~trl.DatasetMixtureConfig`] and the method's configuration.
        overrides (`list[str]`, *optional*):
            Command-line arguments that win over the recipe, such as `["--learning_rate", "1e-6"]`.

    Returns:
        [`Recipe`]

    Raises:
        [`RecipeError`]: for the first thing that is wrong, with its line.
    """
    recipe_file = RecipeFile(path)
    os.environ.update(recipe_file.env)
    check_keys(recipe_file, overrides)
    parser = _RecipeParser(recipe_file)
    parser.parse_overrides(list(overrides))
    try:
        script_args, training_args, model_args, dataset_args = parser.parse_args_into_dataclasses(
            list(overrides), look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        raise RecipeError(f"{recipe_file.path}: {one_line(error)}") from error
    if getattr(script_args, "reward_funcs", None) and not load_method(recipe_file.method).takes_reward_funcs:
        takers = " or ".join(method.name for method in map(load_method, METHODS) if method.takes_reward_funcs)
        raise RecipeError(
            f"{recipe_file.path}: reward_funcs are added to {takers}'s discriminator; method {recipe_file.method!r} has no "
            "rewards. Take them out."
        )
    if isinstance(script_args, RecipeArguments):
        try:
            check_judge(script_args, training_args)
        except RecipeError as error:
            raise _at_its_line(error, recipe_file) from error
    return Recipe(recipe_file.path, recipe_file.method, script_args, training_args, model_args, dataset_args)


def check_judge(script_args: RecipeArguments, training_args: "TrainingArguments") -> None:
    """
    Refuse a judge that cannot be asked, and a best checkpoint by what no judge says.

    Raises:
        [`RecipeError`]: for the first thing that is wrong.
    """
    judge = judge_of(script_args)
    # A function may have a metric of the same name
    if judge is not None or script_args.sample_metrics is None:
        load_class("trl_bbkd.judging.reading:refuse_unjudged")(training_args, judge)


def judge_of(script_args: RecipeArguments):
    """The [`~judging.settings.EvalJudgeConfig`] of a recipe, if it has one."""
    if script_args.eval_judge is None:
        return None
    judge = load_class("trl_bbkd.judging.reading:read_eval_judge")(script_args.eval_judge)
    judge.teacher_name = script_args.teacher_name
    return judge


def _at_its_line(error: RecipeError, recipe_file: RecipeFile) -> RecipeError:
    key = tuple(str(error).partition(":")[0].split("."))
    return recipe_file.error(key, str(error)) if key in recipe_file.lines else error


def check_keys(recipe_file: RecipeFile, overrides: Collection[str], also_valid: Collection[str] = ()) -> None:
    """
    Refuse keys and options that there are not, in less than a second: nothing is imported for it.

    Args:
        recipe_file ([`~runs.recipe_file.RecipeFile`]):
            The recipe.
        overrides (`Collection[str]`):
            Command-line arguments.
        also_valid (`Collection[str]`, *optional*):
            Options that are not the recipe's.

    Raises:
        [`RecipeError`]: for the first unknown one.
    """
    keys = recipe_keys(recipe_file.method)
    if keys is None:
        return
    recipe_file.check_keys(keys)
    unknown = unknown_option(overrides, keys, also_valid)
    if unknown:
        raise RecipeError(f"unknown option {unknown}{nearest(unknown, [*(f'--{key}' for key in keys), *also_valid])}")


def check_recipe(
    path: str | os.PathLike, arguments: list[str], launch_options: Collection[str]
) -> tuple[list[str], list[str]]:
    """
    Check a recipe's keys and values without building anything, and sort the arguments that came with it.

    Args:
        path (`str` or `os.PathLike`):
            The recipe.
        arguments (`list[str]`):
            Options for the launcher and overrides of the recipe, mixed.
        launch_options (`Collection[str]`):
            The launcher's options, such as `--num_processes`. One that is also a recipe's key is an override.

    Returns:
        `tuple[list[str], list[str]]`: the launcher's arguments, and the overrides.

    Raises:
        [`RecipeError`]: for the first thing that is wrong.
    """
    recipe_file = RecipeFile(path)
    parser = _RecipeParser(recipe_file)
    launch_arguments: list[str] = []
    overrides: list[str] = []
    destination = overrides
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") or option in launch_options:
            launches = option in launch_options and option not in parser.options
            destination = launch_arguments if launches else overrides
        destination.append(argument)
    parser.parse_overrides(overrides, also_valid=launch_options)
    return launch_arguments, overrides


def import_callable(spec: str) -> Callable:
    """
    Import a function written `package.module.function` or `path/to/file.py:function`.

    Raises:
        [`RecipeError`]: there is no such file, module or function, or it cannot be called.
    """
    file, colon, name = spec.rpartition(":")
    if colon:
        if not Path(file).is_file():
            raise RecipeError(f"{spec!r}: there is no file {Path(file).absolute()}.")
        module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        if module_spec is None:
            raise RecipeError(f"{spec!r}: {file} is not a Python file.")
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:  # a file of the user's may raise anything
            raise RecipeError(f"{spec!r}: {file} cannot be imported: {_what(error)}.") from error
    else:
        module_name, dot, name = spec.rpartition(".")
        if not dot:
            raise RecipeError(f"{spec!r}: write `package.module.function` or `path/to/file.py:function`.")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise RecipeError(f"{spec!r}: cannot import {module_name} ({error}).") from error
        except Exception as error:
            raise RecipeError(f"{spec!r}: {module_name} cannot be imported: {_what(error)}.") from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"{spec!r}: {module.__name__} has no function {name!r}{nearest(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise RecipeError(f"{spec!r} is not a function but {type(function).__name__}.")
    return function


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error).rstrip('.')}"


# What nearly every recipe sets, beside the method's own keys
COMMON_KEYS = (
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "save_steps",
    "resume_from_checkpoint",
    "use_peft",
    "lora_r",
    "dtype",
    "bf16",
    "use_cpu",
    "seed",
    "report_to",
    "push_to_hub",
)


class _HelpAll(argparse.Action):
    """`--help-all`: every key, TRL's as well."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.show_all = True
        parser.print_help()
        parser.exit()


class _RecipeParser(TrlParser):
    """Parser of the overrides, with a recipe's values as defaults."""

    def __init__(self, recipe_file: RecipeFile):
        method = load_method(recipe_file.method)
        own_types = [load_class(method.arguments), load_class(method.config)]
        dataclass_types = [*own_types, ModelConfig, DatasetMixtureConfig]
        super().__init__(
            dataclass_types,
            prog=str(recipe_file.path),
            usage="RECIPE [--KEY VALUE ...]",
            # An abbreviation would let a typo through.
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.recipe_file = recipe_file
        self.show_all = False
        self.add_argument("--help-all", dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, action=_HelpAll)
        self.set_defaults_with_config(**recipe_file.checked_values(dataclass_types))

    def format_help(self) -> str:
        """The method's own keys first, and TRL's after them with `--help-all` only."""
        # `--no_key` says nothing that `--key false` does not
        actions = {
            action.dest: action
            for action in self._actions
            if action.dest not in ("help", argparse.SUPPRESS) and not action.option_strings[0].startswith("--no_")
        }
        own = own_keys(self.recipe_file.method)
        sections = {
            f"keys of {self.recipe_file.method}": [
                name for name in actions if name in own and name not in COMMON_KEYS
            ],
            "keys that most recipes set": [name for name in COMMON_KEYS if name in actions],
        }
        rest = [name for name in actions if name not in own and name not in COMMON_KEYS]
        if self.show_all:
            sections["other keys of TRL and transformers"] = rest
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, [], [])
        for title, names in sections.items():
            formatter.start_section(title)
            for name in names:
                action = copy.copy(actions[name])
                action.option_strings = action.option_strings[:1]
                formatter.add_argument(action)
            formatter.end_section()
        hint = (
            "" if self.show_all else f"\n{len(rest)} more keys are TRL's and transformers': --help-all shows them.\n"
        )
        return formatter.format_help() + hint

    @property
    def options(self) -> Collection[str]:
        return self._option_string_actions.keys()

    def parse_overrides(self, overrides: list[str], also_valid: Collection[str] = ()) -> None:
        """
        Check overrides without building the dataclasses.

        Raises:
            [`RecipeError`]: unknown option, or a value of the wrong type.
        """
        for argument in overrides:
            option = argument.partition("=")[0]
            if option.startswith("--") and option not in self.options:
                raise RecipeError(f"unknown option {option}{nearest(option, [*self.options, *also_valid])}")
        values, left_over = self.parse_known_args(overrides)
        if left_over:
            raise RecipeError(f"unexpected argument {left_over[0]!r}; overrides are written `--key value`.")
        # Before the dataclasses, which divide by some of them
        check_values(vars(values), self.recipe_file)

    def error(self, message: str):
        raise RecipeError(message)
