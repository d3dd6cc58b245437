"""A recipe's YAML: its keys with their lines, and its values as the types of dataclasses. Imports nothing heavy."""

import dataclasses
import glob
import os
import types
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import RecipeError
from .key_names import NAMES_HERE, SECTIONS, nearest
from .methods import METHODS, load_method


# A recipe's first line when Python has to be able to start it; see `trl_bbkd.launch`.
LAUNCH_KEY = 'if __import__("trl_bbkd").launch(__name__, __file__)'
INPUT_PATHS = ("model_name_or_path", "dataset_name", "path", "data_dir", "data_files")
CALLABLES = {"reward_funcs", "sample_metrics"}
EXAMPLE = f"method: {next(iter(METHODS))}"


def one_line(error: Exception) -> str:
    """What an exception says, without line breaks."""
    return " ".join(str(error).split())


class SettingsFile:
    """
    A YAML mapping of settings, with the line of every key.

    Raises:
        [`RecipeError`]: not a YAML mapping, a key given twice.
    """

    example = EXAMPLE
    keys_beside_fields: tuple[str, ...] = ()
    input_paths: Collection[str] = INPUT_PATHS
    names_elsewhere: Mapping[str, Sequence[str]] = NAMES_HERE

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.lines: dict[tuple[str | int, ...], int] = {}
        if not self.path.is_file():
            raise RecipeError(f"there is no recipe {self.path}.")
        try:
            loader = yaml.SafeLoader(self.path.read_text(encoding="utf-8"))
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise RecipeError(f"{self.path}: a recipe is a YAML mapping, such as `{self.example}`.")
            self._record_lines(node, ())
            self.values: dict[str, Any] = loader.construct_document(node)
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise RecipeError(
                f"{self.path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8."
            ) from error
        except yaml.reader.ReaderError as error:
            raise RecipeError(
                f"{self.path}: not valid YAML: character {error.character:#x} at position {error.position} is not allowed."
            ) from error
        except yaml.MarkedYAMLError as error:
            place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise RecipeError(f"{self.path}{place}: not valid YAML: {error.problem}.") from error

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

    def check_keys(self, known: Collection[str]) -> None:
        """
        Refuse unknown keys, without the dataclasses.

        Raises:
            [`RecipeError`]: a key is none of `known`.
        """
        for name in self.values:
            if name not in known:
                raise self._unknown_key((), name, self.values[name], [*self.keys_beside_fields, *sorted(known)])

    def _unknown_key(self, prefix: tuple, name: Any, value: Any, known: Collection[str]) -> RecipeError:
        # YAML reads an unquoted `on` or `2` as something else than text; no field has such a name.
        line = self.lines.get((*prefix, name))
        place = f"{self.path}, line {line}" if line else str(self.path)
        below = list(value) if isinstance(value, dict) else []
        if any(key in known for key in below) or (str(name).lower() in SECTIONS and (below or value is None)):
            first = next((key for key in below if key in known), below[0] if below else None)
            rest = f", and write what is below it, such as `{first}`, without indentation" if below else ""
            return RecipeError(f"{place}: unknown key {name!r}: a recipe is flat. Take that line out{rest}.")
        return RecipeError(f"{place}: unknown key {name!r}{nearest(str(name), known, self.names_elsewhere)}")

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
                known = list(fields) if prefix else [*self.keys_beside_fields, *fields]
                raise self._unknown_key(prefix, name, value, known)
            entry_type = (get_args(hints[name]) or (None,))[0]
            if isinstance(entry_type, type) and dataclasses.is_dataclass(entry_type):
                checked[name] = self._checked_entries(key, value, entry_type)
                continue
            try:
                converted = convert(value, hints[name], fields[name].metadata.get("choices"))
            except ValueError as error:
                raise self.error(key, f"{name}: {error}") from error
            checked[name] = self._next_to_recipe(name, converted)
        return checked

    def _checked_entries(self, key: tuple[str | int, ...], entries: Any, entry_type: type) -> list:
        """The items of `datasets`, the only key with a list of mappings."""
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise self.error(key, "`datasets` is a list of mappings, such as `- path: json`.")
        datasets = []
        for index, entry in enumerate(entries):
            checked = self._checked(entry, [entry_type], (*key, index))
            if "path" not in checked:
                raise self.error((*key, index), "an entry of `datasets` needs `path`: a folder, a Hub id or `json`.")
            datasets.append(entry_type(**checked))
        return datasets

    def _next_to_recipe(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._next_to_recipe(name, item) for item in value]
        is_input = name in self.input_paths
        if isinstance(value, dict) and is_input:
            return {key: self._next_to_recipe(name, item) for key, item in value.items()}
        folder = str(self.path.parent.absolute())
        file, _, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if name in CALLABLES or (is_input and file.endswith(".py")):
            return f"{os.path.normpath(os.path.join(folder, file))}:{function}" if _exists(file, folder) else value
        if isinstance(value, str) and is_input and _exists(value, folder):
            return os.path.normpath(os.path.join(folder, value))
        return value


class RecipeFile(SettingsFile):
    """
    A recipe of a training.

    Raises:
        [`RecipeError`]: as of [`SettingsFile`]; a missing or unknown method.
    """

    keys_beside_fields = ("method", "env")

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.values.pop(LAUNCH_KEY, None)
        if "method" not in self.values:
            raise RecipeError(f"{self.path}: `method` is missing. Add a line `{EXAMPLE}`.")
        self.method = self.values.pop("method")
        if self.method not in list(METHODS):  # it may be anything that YAML can say
            raise self.error(("method",), f"unknown method {self.method!r}; available: {', '.join(METHODS)}.")
        env = self.values.pop("env", None) or {}
        if not isinstance(env, dict) or any(isinstance(value, dict | list) for value in env.values()):
            raise self.error(("env",), "`env` is a mapping of environment variables to values.")
        self.env = {str(name): str(value) for name, value in env.items()}
        self.input_paths = (*INPUT_PATHS, *load_method(self.method).input_paths)


def _exists(path: str, folder: str) -> bool:
    return bool(path) and bool(glob.glob(path, root_dir=folder, recursive=True))


def convert(value: Any, hint: Any, choices: Collection[str] | None = None) -> Any:
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
        return [convert(item, item_type) for item in (value if isinstance(value, list) else [value])]
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
