"""A recipe of `trl-bbkd collect`, with what the command line says over it. Imports nothing heavy."""

import argparse
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml

from ..errors import RecipeError
from ..runs.key_names import nearest
from ..runs.recipe_file import SettingsFile, convert
from .settings import CollectConfig


KEY_NAMES = ("api_key", "openai_api_key", "apikey", "key", "token", "api_token")
KEY_ADVICE = (
    "a key stands in no recipe and in no command. Put it into the environment (export OPENAI_API_KEY=...), and name "
    "another variable with `api_key_env`."
)


# What these keys are called elsewhere
NAMES_ELSEWHERE = {
    **dict.fromkeys(("api_base", "endpoint", "url", "openai_api_base", "base"), ("base_url",)),
    **dict.fromkeys(("model_name", "model_name_or_path", "teacher", "teacher_model", "engine"), ("model",)),
    **dict.fromkeys(("data", "dataset", "data_files", "prompts", "prompt_file", "input"), ("dataset_name",)),
    **dict.fromkeys(("output", "out", "out_dir", "output_path", "save_dir"), ("output_dir",)),
    **dict.fromkeys(("split", "dataset_split", "train_split"), ("dataset_train_split",)),
    **dict.fromkeys(("n", "samples", "n_samples", "num_generations", "num_return_sequences"), ("num_samples",)),
    **dict.fromkeys(
        ("max_new_tokens", "max_completion_tokens", "max_completion_length", "max_length"), ("max_tokens",)
    ),
    **dict.fromkeys(("rpm", "max_requests_per_minute"), ("requests_per_minute",)),
    **dict.fromkeys(("tpm", "max_tokens_per_minute"), ("tokens_per_minute",)),
    **dict.fromkeys(("workers", "max_concurrency", "max_concurrent_requests", "parallelism"), ("concurrency",)),
    **dict.fromkeys(("budget", "max_spend", "cost_limit", "max_price"), ("max_cost",)),
    **dict.fromkeys(("input_price", "price"), ("prompt_price",)),
    **dict.fromkeys(("output_price",), ("completion_price",)),
    **dict.fromkeys(("timeout",), ("request_timeout",)),
    **dict.fromkeys(("retries",), ("max_retries",)),
    **dict.fromkeys(("system", "system_message"), ("system_prompt",)),
    **dict.fromkeys(("column", "prompt_key", "text_column"), ("prompt_column",)),
    **dict.fromkeys(("limit", "max_samples", "max_rows"), ("max_prompts",)),
    **dict.fromkeys(("temp",), ("temperature",)),
    **dict.fromkeys(("language", "langs"), ("languages",)),
    **dict.fromkeys(("dedup", "near_duplicates", "similarity"), ("max_similarity",)),
    **dict.fromkeys(("filter_refusals", "refusals"), ("leave_out_refusals",)),
    **dict.fromkeys(("classes", "label_names", "class_names"), ("labels",)),
    **dict.fromkeys(("confidence",), ("teacher_confidence",)),
    **dict.fromkeys(("tokenizer_name", "tokenizer_name_or_path", "student", "student_tokenizer"), ("tokenizer",)),
    **dict.fromkeys(("extra", "generation_kwargs", "model_kwargs"), ("extra_body",)),
    **dict.fromkeys(("hub_model_id", "repo_id", "hub_repo_id", "hub_id"), ("hub_dataset_id",)),
    **dict.fromkeys(("private", "hub_private"), ("hub_private_repo",)),
}


class CollectFile(SettingsFile):
    """A recipe's YAML."""

    names_elsewhere = NAMES_ELSEWHERE

    example = "base_url: http://127.0.0.1:8000/v1"
    input_paths = ("dataset_name",)


def add_keys(
    parser: argparse._ActionsContainer, config: type = CollectConfig, names: Collection[str] | None = None
) -> None:
    """Options of all keys of a recipe, or of those of a configuration that are named."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if names is not None and field.name not in names:
            continue
        is_flag = hints[field.name] is bool
        given: dict[str, Any] = {"nargs": "?", "const": "true"} if is_flag else {}
        parser.add_argument(
            f"--{field.name}",
            help=f"{field.metadata['help']}{_default(field)}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            **given,
        )


def _default(field: dataclasses.Field) -> str:
    if field.default in (dataclasses.MISSING, None, False):
        return ""
    return f" Default: {field.default}."


def refuse_unknown(arguments: list[str], known: Collection[str] | None = None) -> NoReturn:
    """
    Refuse the first of `arguments` that is no option: a key of a recipe, or one of `known`.

    Raises:
        [`~errors.RecipeError`]: the message names the nearest one.
    """
    option = next((argument for argument in arguments if argument.startswith("-")), arguments[0]).partition("=")[0]
    if is_a_key(option):
        raise RecipeError(f"option {option}: {KEY_ADVICE}")
    known = known or [field.name for field in dataclasses.fields(CollectConfig)]
    raise RecipeError(f"unknown option {option}{nearest(option, [f'--{name}' for name in known], NAMES_ELSEWHERE)}")


def is_a_key(name: object) -> bool:
    """Whether a setting of this name would hold an endpoint's key."""
    return str(name).lstrip("-").replace("-", "_").lower() in KEY_NAMES


def read_settings(path: str | os.PathLike, overrides: dict[str, str]) -> CollectConfig:
    """
    Read and check a recipe.

    Args:
        path (`str` or `os.PathLike`):
            YAML file with fields of [`CollectConfig`].
        overrides (`dict[str, str]`):
            Values of the command line, which win.

    Raises:
        [`~errors.RecipeError`]: for the first thing that is wrong, with its line.
    """
    file = CollectFile(path)
    for name in file.values:
        if is_a_key(name):
            raise file.error((name,), f"`{name}`: {KEY_ADVICE}")
    if "method" in file.values:
        raise file.error(("method",), f"this recipe trains: `trl-bbkd train {Path(path)}`.")
    values = file.checked_values([CollectConfig]) | values_of_options(CollectConfig, overrides)
    needed = [field.name for field in dataclasses.fields(CollectConfig) if field.default is dataclasses.MISSING]
    missing = next((name for name in needed if values.get(name) is None), None)
    if missing:
        raise RecipeError(f"{path}: `{missing}` is missing.")
    try:
        return CollectConfig(**values)
    except ValueError as error:
        name = str(error).partition(":")[0]
        if name in overrides:
            raise RecipeError(f"--{error}") from error
        if (name,) in file.lines:
            raise file.error((name,), str(error)) from error
        raise RecipeError(f"{path}: {error}") from error


def values_of_options(config: type, options: dict[str, str]) -> dict[str, Any]:
    """
    What words of the command line say of a configuration's fields.

    Raises:
        [`~errors.RecipeError`]: one does not fit its field.
    """
    hints = get_type_hints(config)
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(config)}
    values = {}
    for name, text in options.items():
        try:
            values[name] = convert(_value(text, hints[name]), hints[name], choices[name])
        except ValueError as error:
            raise RecipeError(f"--{name}: {error}") from error
    return values


def _value(text: str, hint: object):
    """What a word of the command line says: text where a key takes text alone, else YAML."""
    if hint is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {text!r}.") from error
