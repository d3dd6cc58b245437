"""Recipes: one flat YAML file becomes checked dataclasses for one trainer."""

import argparse
import dataclasses
import difflib
import glob
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.utils import DatasetConfig


if TYPE_CHECKING:
    from .bayeskd.bayeskd_config import BayesKDConfig
    from .gad.gad_config import GADConfig
    from .llkd.llkd_config import LLKDConfig
    from .proxykd.proxykd_config import ProxyKDConfig


# A recipe's first line when Python has to be able to start it; see `trl_bbkd.launch`.
LAUNCH_KEY = 'if __import__("trl_bbkd").launch(__name__, __file__)'
METHODS = ("gad", "proxykd", "bayeskd", "llkd")
INPUT_PATHS = {
    "model_name_or_path",
    "discriminator",
    "proxy_model",
    "target_store",
    "dataset_name",
    "path",
    "data_dir",
    "data_files",
}
CALLABLES = {"reward_funcs", "sample_metrics"}


class RecipeError(ValueError):
    """A recipe, or an override of it, cannot be used as it is; the message says where and what to do."""


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
            Rewards added to GAD's discriminator's score, as `package.module.function` or `path/to/file.py:function`.
        sample_metrics (`str`, *optional*):
            Function that judges the student's samples, written in the same way.
        seqkd_baseline (`bool`, *optional*, defaults to `True`):
            Whether to train plain SFT on the same text for the same number of optimizer steps, and report it.
        seqkd_learning_rate (`float`, *optional*):
            Learning rate of that baseline. `None` takes the student's.
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


@dataclass
class Recipe:
    """A checked recipe. `path` is `None` for one that was built in Python."""

    path: Path | None
    method: str
    script_args: RecipeArguments | ClassifierArguments
    training_args: "GADConfig | ProxyKDConfig | BayesKDConfig | LLKDConfig"
    model_args: ModelConfig
    dataset_args: DatasetMixtureConfig


def load_recipe(path: str | os.PathLike, overrides: Collection[str] = ()) -> Recipe:
    """
    Read a recipe and check every key and value, before any model or data set is loaded.

    Input paths that exist next to the recipe are taken from there; all others, and those among the overrides, are
    relative to the current directory. The variables of an `env` block are exported first.

    Args:
        path (`str` or `os.PathLike`):
            YAML file with `method` and fields of [`RecipeArguments`] (for `llkd` of [`ClassifierArguments`]),
            [`~trl.ModelConfig`], [`~trl.DatasetMixtureConfig`] and the method's configuration.
        overrides (`list[str]`, *optional*):
            Command-line arguments that win over the recipe, such as `["--learning_rate", "1e-6"]`.

    Returns:
        [`Recipe`]

    Raises:
        [`RecipeError`]: for the first thing that is wrong, with its line.
    """
    recipe_file = RecipeFile(path)
    os.environ.update(recipe_file.env)
    parser = _RecipeParser(recipe_file)
    parser.parse_overrides(list(overrides))
    try:
        script_args, training_args, model_args, dataset_args = parser.parse_args_into_dataclasses(
            list(overrides), look_for_args_file=False
        )
    except ValueError as error:
        raise RecipeError(f"{recipe_file.path}: {error}") from error
    if recipe_file.method != "gad" and getattr(script_args, "reward_funcs", None):
        raise RecipeError(
            f"{recipe_file.path}: reward_funcs are added to GAD's discriminator; method {recipe_file.method!r} has no "
            "rewards. Take them out."
        )
    return Recipe(recipe_file.path, recipe_file.method, script_args, training_args, model_args, dataset_args)


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
    parser = _RecipeParser(RecipeFile(path))
    launch_arguments, overrides = [], []
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
        module_spec.loader.exec_module(module)
    else:
        module_name, dot, name = spec.rpartition(".")
        if not dot:
            raise RecipeError(f"{spec!r}: write `package.module.function` or `path/to/file.py:function`.")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise RecipeError(f"{spec!r}: cannot import {module_name} ({error}).") from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"{spec!r}: {module.__name__} has no function {name!r}{_nearest(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise RecipeError(f"{spec!r} is not a function but {type(function).__name__}.")
    return function


class RecipeFile:
    """
    A recipe's YAML, with the line of every key.

    Raises:
        [`RecipeError`]: not a YAML mapping, a key given twice, a missing or unknown method.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.lines: dict[tuple[str | int, ...], int] = {}
        if not self.path.is_file():
            raise RecipeError(f"there is no recipe {self.path}.")
        loader = yaml.SafeLoader(self.path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise RecipeError(f"{self.path}: a recipe is a YAML mapping, such as `method: gad`.")
            self._record_lines(node, ())
            self.values: dict[str, Any] = loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise RecipeError(f"{self.path}{line}: not valid YAML: {error.problem}.") from error

        self.values.pop(LAUNCH_KEY, None)
        if "method" not in self.values:
            raise RecipeError(f"{self.path}: `method` is missing. Add a line `method: {METHODS[0]}`.")
        self.method = self.values.pop("method")
        if self.method not in METHODS:
            raise self.error(("method",), f"unknown method {self.method!r}; available: {', '.join(METHODS)}.")
        env = self.values.pop("env", None) or {}
        if not isinstance(env, dict) or any(isinstance(value, dict | list) for value in env.values()):
            raise self.error(("env",), "`env` is a mapping of environment variables to values.")
        self.env = {str(name): str(value) for name, value in env.items()}

    def _record_lines(self, node: yaml.Node, prefix: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key = (*prefix, key_node.value)
                line = key_node.start_mark.line + 1
                if key in self.lines:
                    raise RecipeError(
                        f"{self.path}, line {line}: {key_node.value!r} was already given in line {self.lines[key]}. "
                        "Keep one of the two."
                    )
                self.lines[key] = line
                self._record_lines(value_node, key)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[*prefix, index] = item.start_mark.line + 1
                self._record_lines(item, (*prefix, index))

    def error(self, key: tuple[str | int, ...], message: str) -> RecipeError:
        return RecipeError(f"{self.path}, line {self.lines[key]}: {message}")

    def checked_values(self, dataclass_types: Collection[type]) -> dict[str, Any]:
        """
        The recipe's values, converted to the types of the dataclasses' fields, with input paths made absolute.

        Raises:
            [`RecipeError`]: unknown key or unusable value.
        """
        return self._checked(self.values, dataclass_types, ())

    def _checked(self, values: dict, dataclass_types: Collection[type], prefix: tuple[str | int, ...]) -> dict:
        fields = {f.name: f for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}
        hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
        checked = {}
        for name, value in values.items():
            key = (*prefix, name)
            if name not in fields:
                known = list(fields) if prefix else ["method", "env", *fields]
                # YAML reads an unquoted `on` or `2` as something else than text; no field has such a name.
                line = self.lines.get(key)
                place = f"{self.path}, line {line}" if line else str(self.path)
                raise RecipeError(f"{place}: unknown key {name!r}{_nearest(str(name), known)}")
            if hints[name] == list[DatasetConfig]:
                checked[name] = self._checked_datasets(key, value)
                continue
            try:
                converted = _convert(value, hints[name], fields[name].metadata.get("choices"))
            except ValueError as error:
                raise self.error(key, f"{name}: {error}") from error
            checked[name] = self._next_to_recipe(name, converted)
        return checked

    def _checked_datasets(self, key: tuple[str | int, ...], entries: Any) -> list[DatasetConfig]:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self.error(key, "`datasets` is a list of mappings, such as `- path: json`.")
        datasets = []
        for index, entry in enumerate(entries):
            checked = self._checked(entry, [DatasetConfig], (*key, index))
            if "path" not in checked:
                raise self.error((*key, index), "an entry of `datasets` needs `path`: a folder, a Hub id or `json`.")
            datasets.append(DatasetConfig(**checked))
        return datasets

    def _next_to_recipe(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._next_to_recipe(name, item) for item in value]
        if isinstance(value, dict) and name in INPUT_PATHS:
            return {key: self._next_to_recipe(name, item) for key, item in value.items()}
        folder = str(self.path.parent.absolute())
        if isinstance(value, str) and name in CALLABLES:
            file, colon, function = value.rpartition(":")
            return f"{os.path.normpath(os.path.join(folder, file))}:{function}" if _exists(file, folder) else value
        if isinstance(value, str) and name in INPUT_PATHS and _exists(value, folder):
            return os.path.normpath(os.path.join(folder, value))
        return value


class _RecipeParser(TrlParser):
    """Parser of the overrides, with a recipe's values as defaults."""

    def __init__(self, recipe_file: RecipeFile):
        arguments_type = ClassifierArguments if recipe_file.method == "llkd" else RecipeArguments
        dataclass_types = [arguments_type, _config_type(recipe_file.method), ModelConfig, DatasetMixtureConfig]
        super().__init__(
            dataclass_types,
            prog=str(recipe_file.path),
            # An abbreviation would let a typo through.
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.set_defaults_with_config(**recipe_file.checked_values(dataclass_types))

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
                raise RecipeError(f"unknown option {option}{_nearest(option, [*self.options, *also_valid])}")
        _, left_over = self.parse_known_args(overrides)
        if left_over:
            raise RecipeError(f"unexpected argument {left_over[0]!r}; overrides are written `--key value`.")

    def error(self, message: str):
        raise RecipeError(message)


def _config_type(method: str) -> type:
    if method == "gad":
        from .gad.gad_config import GADConfig

        return GADConfig
    if method == "proxykd":
        from .proxykd.proxykd_config import ProxyKDConfig

        return ProxyKDConfig
    if method == "bayeskd":
        from .bayeskd.bayeskd_config import BayesKDConfig

        return BayesKDConfig
    if method == "llkd":
        from .llkd.llkd_config import LLKDConfig

        return LLKDConfig
    raise AssertionError(method)


def _nearest(name: str, known: Collection[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else "."


def _exists(path: str, folder: str) -> bool:
    return bool(path) and bool(glob.glob(path, root_dir=folder, recursive=True))


def _convert(value: Any, hint: Any, choices: Collection[str] | None = None) -> Any:
    """
    Convert a YAML value to a field's type. PyYAML reads `1e-6` as text, for instance.

    Raises:
        `ValueError`: the value does not fit; the message says what would.
    """
    options = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if choices is not None:
        options = [Literal[*choices] if option is str else option for option in options]
    if any(_is_enum(option) for option in options):
        options = [option for option in options if option is not str]
    # Anything quoted is text, so text comes after the scalars; one item stands for a list of one only after that.
    options.sort(key=lambda option: 2 if _container(option) in (list, dict) else int(option is str))
    for option in options:
        try:
            return _convert_to(option, value)
        except ValueError:
            continue
    expected = " or ".join(_describe(option) for option in options if option is not types.NoneType)
    wants_text = any(option is str or _is_enum(option) or get_origin(option) is Literal for option in options)
    advice = " (put it in quotes)" if wants_text and isinstance(value, bool | int | float) else ""
    raise ValueError(f"expected {expected}, got {value!r}{advice}.")


def _convert_to(option: Any, value: Any) -> Any:
    container = _container(option)
    if container is list and not isinstance(value, dict | None):
        item_type = get_args(option)[0]
        return [_convert(item, item_type) for item in (value if isinstance(value, list) else [value])]
    if _is_enum(option):
        return option(value).value
    if option is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if option is int and isinstance(value, str):
        return int(value)
    if option is float and isinstance(value, str | int) and not isinstance(value, bool):
        return float(value)
    if get_origin(option) is Literal:
        fits = value in get_args(option)
    elif option is Any:
        fits = True
    else:
        fits = type(value) is container or type(value) is option
    if not fits:
        raise ValueError
    return value


def _container(option: Any) -> type | None:
    """`list` for `list[str]`, `dict` for `dict[str, Any]`."""
    origin = get_origin(option) or option
    return origin if origin in (list, dict) else None


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Enum)


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    if _is_enum(option):
        return f"one of {', '.join(member.value for member in option)}"
    if _container(option) is list:
        return f"a list (of {_describe(get_args(option)[0])})"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return "a mapping" if _container(option) is dict else names.get(option, str(option))
