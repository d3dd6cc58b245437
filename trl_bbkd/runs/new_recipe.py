"""`trl-bbkd init`: a commented recipe to start from. Imports nothing heavy."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

import yaml

from ..errors import RecipeError
from .key_names import nearest
from .methods import METHODS, load_method


# What some methods need, and what it is
OPTIONS = {
    "proxy": "a larger model with the student's tokenizer",
    "labels": "the names of the classes, two at least",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_FILE = re.compile(r"\.(jsonl?|csv)(\.gz)?$|\.parquet$")


def methods() -> list[str]:
    """Methods that there is a recipe to start from for."""
    return sorted(name for name in METHODS if load_method(name).template.is_file())


def methods_that_need(option: str) -> list[str]:
    """Methods that need an option of [`OPTIONS`], in the order of [`~runs.methods.METHODS`]."""
    return [name for name in METHODS if option in load_method(name).init_options]


def write_recipe(
    method: str,
    student: str,
    data: str,
    *,
    proxy: str | None = None,
    labels: list[str] | None = None,
    teacher: str | None = None,
    output: str | None = None,
) -> Path:
    """
    Write a recipe to start from.

    Args:
        method (`str`):
            Name of the method.
        student (`str`):
            Folder or Hub id of the student.
        data (`str`):
            File, folder or Hub id of the teacher's rows.
        proxy (`str`, *optional*):
            Folder or Hub id of the proxy. Only for methods with one, and required there.
        labels (`list[str]`, *optional*):
            Names of the classes. Only for classifiers, and required there.
        teacher (`str`, *optional*):
            Name of the teacher, for the report and the card.
        output (`str`, *optional*):
            The file to write. `None` is `<method>.yaml` in the current directory.

    Returns:
        `Path`: the file.

    Raises:
        [`RecipeError`]: unknown method, something is missing, or the file exists.
    """
    if method not in methods():
        hint = nearest(method, methods())
        raise RecipeError(f"there is no method {method!r}{hint} Methods: {', '.join(methods())}.")
    for option, value in {"proxy": proxy, "labels": labels}.items():
        _check_belongs(option, value, method)
    if labels is not None and len(set(labels)) < 2:
        raise RecipeError(f"--labels names the classes, two at least; got {' '.join(labels)}.")
    path = Path(output or f"{method}.yaml")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"--output {path}: there is no folder {path.absolute().parent}.")
    folder = path.absolute().parent
    entries = {
        "model_name_or_path": _input("--student", student, folder),
        "dataset_name": _input("--data", data, folder),
        "proxy_model": _input("--proxy", proxy, folder) if proxy else None,
        "labels": labels,
        "output_dir": f"output/{path.stem}",
    }
    lines = {name: _line(name, value) for name, value in entries.items()}
    lines["teacher_name"] = (
        _line("teacher_name", teacher) if teacher else "# teacher_name: the model that wrote the data"
    )
    template = Template(load_method(method).template.read_text(encoding="utf-8"))
    text = template.substitute(lines, recipe=path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RecipeError(f"{path} exists. Name another file with --output, or take that one away.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _check_belongs(option: str, value, method: str) -> None:
    belongs = option in load_method(method).init_options
    if belongs and not value:
        raise RecipeError(f"method {method!r} needs --{option}: {OPTIONS[option]}.")
    if value and not belongs:
        raise RecipeError(f"method {method!r} has no use for --{option}. Take it out.")


def _input(option: str, value: str, folder: Path) -> str:
    """An input as the recipe names it: a relative path is then relative to the recipe, which is found from everywhere."""
    path = Path(value).expanduser()
    if path.exists():
        return str(path) if path.is_absolute() else os.path.relpath(path, folder)
    if not HUB_ID.fullmatch(value) or value.startswith(".") or DATA_FILE.search(value):
        raise RecipeError(f"{option} {value}: there is no such file or folder, and it is no Hub id.")
    return value


def _line(name: str, value: str | Sequence[str] | None) -> str:
    # A list in its braces keeps to the line
    entry = {name: value}
    if isinstance(value, list):
        return yaml.safe_dump(entry, default_flow_style=True, allow_unicode=True, width=10**6).strip("{}\n")
    return yaml.safe_dump(entry, default_flow_style=False, allow_unicode=True, width=10**6).rstrip("\n")
