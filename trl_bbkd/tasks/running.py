"""Parts of benchmarks, each asked once: what was found lies in the folder, with what it depends on."""

import dataclasses
import hashlib
import inspect
import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.utils import handle_non_serializable

from ..errors import RecipeError
from ..host.files import write_atomically
from .finding import Part, lm_eval_at_work, set_seeds_of_lm_eval
from .report import Result, results_of
from .settings import TasksConfig


def run_part(
    part: Part, settings: TasksConfig, student: dict[str, Any], folder: Path, language_model: Callable[[], Any]
) -> list[Result]:
    """
    What a task or a group of them comes to: as it lies in the folder, or asked now.

    Args:
        part ([`~tasks.finding.Part`]):
            The task or group.
        settings ([`~tasks.settings.TasksConfig`]):
            How it is asked.
        student (`dict[str, Any]`):
            What tells the student from another.
        folder (`Path`):
            Where results are kept.
        language_model (`Callable`):
            Loads the student, as lm_eval takes it.

    Raises:
        [`~errors.RecipeError`]: a function of the task fails.
    """
    record = folder / f"{_file_name(part.name)}.json"
    how = _how(part, settings, student)
    kept_results = _kept_results(record, how)
    if kept_results is not None:
        return kept_results
    model = language_model()
    set_seeds_of_lm_eval()
    try:
        with lm_eval_at_work():
            found = lm_eval.evaluate(
                lm=model,
                task_dict={
                    "tasks": part.tasks,
                    "groups": part.groups,
                    "group_map": {name: group.child_names for name, group in part.groups.items()},
                },
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            )
    except Exception as error:  # whatever a task's functions, or a device, make go wrong
        raise RecipeError(_ended(part.name, error, settings)) from error
    results = results_of(found)
    # Of another student's answers nothing is left that could be taken for this one's
    record.unlink(missing_ok=True)
    for name, samples in found["samples"].items():
        lines = (json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) for sample in samples)
        write_atomically(folder / f"{_file_name(name)}.jsonl", "".join(f"{line}\n" for line in lines))
    kept = {"how": how, "results": [dataclasses.asdict(result) for result in results]}
    write_atomically(record, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return results


def _kept_results(record: Path, how: dict[str, Any]) -> list[Result] | None:
    """What lies there, where it is whole and of the same."""
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        return [Result(**result) for result in kept["results"]] if kept["how"] == how else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _ended(name: str, error: Exception, settings: TasksConfig) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    advice = "Mend that"
    if isinstance(error, torch.OutOfMemoryError):
        advice = f"Lower --batch_size, now {settings.batch_size}"
    return (
        f"--tasks: {name} ended with {type(error).__name__}: {' '.join(str(error).split()).rstrip('.')} ({last.filename}, line "
        f"{last.lineno}). {advice}; the same command goes on with what is missing."
    )


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _how(part: Part, settings: TasksConfig, student: dict[str, Any]) -> dict[str, Any]:
    """What results depend on."""
    return {
        "student": student,
        "lm_eval": lm_eval.__version__,
        "tasks": {name: _content(task) for name, task in part.tasks.items()},
        "groups": {name: _digest([group.to_dict()]) for name, group in part.groups.items()},
        "limit": settings.limit,
        "batch_size": settings.batch_size,
        "apply_chat_template": settings.apply_chat_template,
    }


def _content(task: Any) -> str:
    """A task's keys, the files of its functions, and its rows."""
    config = dataclasses.asdict(task.config)
    # Where its file lies
    (config.get("metadata") or {}).pop("config_source", None)
    set_seeds_of_lm_eval()
    with lm_eval_at_work():
        examples = list(task.fewshot_docs()) if task.config.num_fewshot else []
        return _digest([config, _text(type(task)), *task.eval_docs, *examples])


def _digest(values: list[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, default=_text).encode())
    return digest.hexdigest()


def _text(value: Any) -> str:
    """The whole file of a function or class, in which what it calls is too."""
    try:
        return Path(inspect.getfile(value)).read_text(encoding="utf-8")
    except (TypeError, OSError):
        return str(value)
