"""The tasks that are meant: lm_eval's by name, and a user's own by file. They are loaded with their data before any weights."""

import contextlib
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import is_offline_mode
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from ..errors import RecipeError
from ..runs.key_names import nearest
from .settings import TasksConfig


SUFFIXES = (".yaml", ".yml")
DATA_KEYS = ("dataset_path", "custom_dataset", "class", "include")
TEXT = "tag:yaml.org,2002:str"
FILE_IS_NO_TASK = "it is no task of lm_eval. A task has the keys `task` (its name) and `dataset_path`, a group has `group` and a list `task`"


@dataclass
class Part:
    """
    What is asked, and kept, as a whole: a task, or a group of them.

    Attributes:
        name (`str`): of the task or the group.
        tasks (`dict[str, Any]`): lm_eval's tasks by name.
        groups (`dict[str, Any]`): the group and those within it.
    """

    name: str
    tasks: dict[str, Any]
    groups: dict[str, Any]


@contextlib.contextmanager
def lm_eval_at_work() -> Iterator[None]:
    """Standard output is for the table: what lm_eval prints goes where progress goes, and what it logs is left out below errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def set_seeds_of_lm_eval() -> None:
    """The seeds of lm_eval's own command: some tasks shuffle their choices."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def find_tasks(settings: TasksConfig) -> list[Part]:
    """
    Load the tasks with their data, ready to be asked.

    Raises:
        [`~errors.RecipeError`]: a task is not there, cannot be loaded, or is not run without being asked for.
    """
    files = {word: _files(word) for word in settings.tasks if _is_path(word)}
    names = [word for word in settings.tasks if word not in files]
    manager = _manager(settings, names, [file for found in files.values() for file in found])
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for word in settings.tasks:
        for spec in map(_spec, files[word]) if word in files else _matches(manager, word):
            _refuse_unsafe(manager, spec, settings)
            loaded = _load(manager, spec)
            for name in loaded["tasks"] if not loaded["groups"] else ():
                first = origins.setdefault(name, spec)
                if first != spec:
                    raise RecipeError(
                        f"--tasks: {first} and {spec} are both the task {name!r}. Leave one out, or rename it."
                    )
            tasks |= loaded["tasks"]
            groups |= loaded["groups"]
    for name, task in tasks.items():
        _make_ready(name, task, settings)
    return _parts(tasks, groups)


def _is_path(word: str) -> bool:
    return word.endswith(SUFFIXES) or "/" in word or any(Path(word).expanduser().glob("*.yaml"))


def _files(word: str) -> list[Path]:
    """A task's file, or the tasks and groups in a folder."""
    path = Path(word).expanduser().absolute()
    if path.is_dir():
        found = sorted(file for suffix in SUFFIXES for file in path.glob(f"*{suffix}"))
        found = [file for file in found if _is_task(_keys(file))]
        if not found:
            raise RecipeError(f"--tasks: the folder {word} has no YAML file of a task.")
        return found
    if not path.is_file():
        raise RecipeError(f"--tasks: there is no file or folder {path}.")
    if not _is_task(_keys(path)):
        raise RecipeError(f"--tasks: {word}: {FILE_IS_NO_TASK}.")
    return [path]


def _spec(file: Path) -> str:
    """What lm_eval loads a file by. A group goes by its name: by its path lm_eval takes the list of its tasks for the name."""
    keys = _keys(file)
    if "group" in keys:
        return keys["group"].value
    if keys["task"].tag != TEXT:
        raise RecipeError(f"--tasks: {file}: `task` is the task's name, a text: put it in quotes.")
    return str(file)


def _keys(file: Path) -> dict[str, yaml.Node]:
    """The keys at the top of a YAML file. Nothing that it names is run."""
    try:
        top = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--tasks: {file} is not YAML: {' '.join(str(error).split())}") from error
    return {key.value: value for key, value in top.value} if isinstance(top, yaml.MappingNode) else {}


def _is_task(keys: dict[str, yaml.Node]) -> bool:
    return "group" in keys or ("task" in keys and any(key in keys for key in DATA_KEYS))


def _manager(settings: TasksConfig, names: list[str], files: list[Path]) -> TaskManager:
    """lm_eval's list of tasks: of its own, which takes its time to read, only where they are needed."""
    groups = [file for file in files if "group" in _keys(file)]
    folders = list(dict.fromkeys(str(file.parent) for file in groups))
    if settings.include_path is not None:
        if not Path(settings.include_path).expanduser().is_dir():
            raise RecipeError(f"--include_path: there is no folder {settings.include_path}.")
        folders.append(str(Path(settings.include_path).expanduser()))
    try:
        with lm_eval_at_work():
            manager = TaskManager(include_path=folders, include_defaults=False)
            if groups or any(not manager.match_tasks([name]) for name in names):
                print("Reading the list of lm_eval's tasks.", flush=True)
                manager = TaskManager(include_path=folders)
    except Exception as error:  # whatever another file in those folders makes go wrong
        raise RecipeError(
            f"--tasks: the tasks in {', '.join(folders)} cannot be listed: {_reason(error)} Each YAML file there is read, and its "
            "`task` or `group` is a name."
        ) from error
    return manager


def _matches(manager: TaskManager, name: str) -> list[str]:
    found = manager.match_tasks([name])
    if not found:
        raise RecipeError(f"--tasks: lm_eval has no task {name!r}{nearest(name, manager.all_tasks, {})}")
    return found


def _load(manager: TaskManager, spec: str) -> dict[str, Any]:
    set_seeds_of_lm_eval()
    try:
        with lm_eval_at_work():
            loaded = manager.load([spec])
    except Exception as error:  # whatever a task's file or its functions make go wrong
        raise RecipeError(f"--tasks: {spec} cannot be loaded: {_reason(error)}") from error
    return {"tasks": loaded["tasks"], "groups": loaded.get("groups", {})}


def _reason(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return "its data has no rows."
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        return f"its data cannot be read: {_first_line(error.__cause__)}."
    line = _first_line(error)
    if isinstance(error, FileNotFoundError | DatasetsError) and not isinstance(error, ConnectionError):
        return f"{line}. Relative paths of data files start at {Path.cwd()}."
    if isinstance(error, ConnectionError):
        if is_offline_mode():
            return f"{line}. HF_HUB_OFFLINE is set: load its data once without it, or name a task with local data."
        return f"{line}."
    if isinstance(error, KeyError) and error.args[0] is not None:
        return f"there is no {line}. A split of a local file is named so: `dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}`."
    return f"{type(error).__name__}{f': {line}' if line else ''}."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".")


def _refuse_unsafe(manager: TaskManager, spec: str, settings: TasksConfig) -> None:
    """Before the task is loaded, which runs some of its code."""
    entry = manager.task_index.get(spec)
    if entry is not None and (entry.cfg or {}).get("unsafe_code") and not settings.confirm_run_unsafe_code:
        raise RecipeError(_unsafe(spec))


def _unsafe(name: str) -> str:
    return (
        f"--tasks: {name} runs on this machine what the student writes. Where that may happen, in a container, add "
        "--confirm_run_unsafe_code."
    )


def _make_ready(name: str, task: Any, settings: TasksConfig) -> None:
    """As lm_eval's own command sets up a task that it loaded."""
    if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
        raise RecipeError(_unsafe(name))
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"--tasks: {name} has images or sounds in its questions. Students read text alone here.")
    own = task.get_config("num_fewshot")
    # A task that says 0 means it
    shots = own or 0 if settings.num_fewshot is None or own == 0 else settings.num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if shots:
        with lm_eval_at_work():
            examples = len(list(task.fewshot_docs()))
        if shots > examples:
            raise RecipeError(
                f"--num_fewshot: {name} has {examples} rows to take examples from, and {shots} are asked for."
            )


def _parts(tasks: dict[str, Any], groups: dict[str, Any]) -> list[Part]:
    """A task that is in a group too is asked once, with its group."""
    inner = {below.name for group in groups.values() for below in group.get_all_groups()}
    parts = []
    for name, group in groups.items():
        if name not in inner:
            own = {task.task_name: task for task in group.get_all_tasks()}
            parts.append(Part(name, own, {each.name: each for each in (group, *group.get_all_groups())}))
    grouped = {name for part in parts for name in part.tasks}
    return parts + [Part(name, {name: task}, {}) for name, task in tasks.items() if name not in grouped]
