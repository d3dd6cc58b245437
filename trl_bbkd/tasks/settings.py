"""What `trl-bbkd evaluate --tasks` is told. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Any


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class TasksConfig:
    """
    Parameters of benchmarks. They are called as lm_eval calls them.

    Parameters:
        model (`str`):
            The student: a folder or a Hub id of a model or an adapter.
        output_dir (`str`):
            Folder of the table and of what was answered.
        tasks (`tuple[str, ...]`):
            Names of lm_eval's tasks, groups and tags, YAML files of tasks, and folders of such files.
        include_path (`str`, *optional*):
            Folder of more YAML files, whose tasks may be named.
        num_fewshot (`int`, *optional*):
            Examples before each question; by default each task's own number.
        limit (`float`, *optional*):
            Ask the first so many rows of each task, or this share of them.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions that the student reads at once.
        apply_chat_template (`bool`, *optional*, defaults to `False`):
            Render the questions with the student's chat template.
        confirm_run_unsafe_code (`bool`, *optional*, defaults to `False`):
            Run tasks that run what the student writes.
    """

    model: str
    output_dir: str
    tasks: tuple[str, ...]
    include_path: str | None = field(
        default=None, metadata=_help("Folder of more YAML files, whose tasks may be named in --tasks.")
    )
    num_fewshot: int | None = field(
        default=None, metadata=_help("Examples before each question. By default each task's own number.")
    )
    limit: float | None = field(
        default=None, metadata=_help("Ask the first so many rows of each task, or this share of them: for a try.")
    )
    batch_size: int = field(default=8, metadata=_help("Questions of a task that the student reads at once."))
    apply_chat_template: bool = field(
        default=False, metadata=_help("Render the questions of tasks with the student's chat template.")
    )
    confirm_run_unsafe_code: bool = field(
        default=False, metadata=_help("Run tasks that run on this machine what the student writes, such as humaneval.")
    )

    def __post_init__(self):
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot: expected 0 or more, got {self.num_fewshot}.")
        if self.limit is not None and not (0 < self.limit < 1 or self.limit >= 1 and self.limit % 1 == 0):
            raise ValueError(f"limit: expected a number of rows, or a share between 0 and 1, got {self.limit:g}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {self.batch_size}.")


TASK_KEYS = tuple(entry.name for entry in fields(TasksConfig) if entry.metadata)
