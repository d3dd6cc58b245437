"""`trl-bbkd evaluate --tasks`: a student's benchmarks, asked by lm_eval."""

import functools
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..judging.command import JSON, TABLE, make_folder
from ..judging.student import is_file_of_answers
from .settings import TasksConfig


FOLDER = "benchmarks"


class Benchmarks:
    """
    What is asked of a student. Making one checks all that can be checked before weights are loaded.

    Args:
        settings ([`~tasks.settings.TasksConfig`]):
            Student and tasks.

    Raises:
        [`~errors.RecipeError`]: there is no such student, or a task cannot be asked.
    """

    def __init__(self, settings: TasksConfig):
        if importlib.util.find_spec("lm_eval") is None:
            raise RecipeError('--tasks needs lm_eval, which is not installed: pip install "trl-bbkd[eval]".')
        if is_file_of_answers(settings.model):
            raise RecipeError(
                f"--tasks: {settings.model} is a file of answers. Tasks are asked of a model: name its folder."
            )
        # Only now: what reads data sets and models takes seconds to import
        from ..evaluation.loading import load_tokenizer, refuse_broken_student
        from ..host.model_paths import checkpoint_fingerprint
        from .finding import find_tasks

        self.settings = settings
        self.folder = Path(settings.output_dir).expanduser() / FOLDER
        make_folder(self.folder)
        self.tokenizer = load_tokenizer(settings.model)
        refuse_broken_student(settings.model)
        if settings.apply_chat_template and self.tokenizer.chat_template is None:
            raise RecipeError(f"--apply_chat_template: the tokenizer of {settings.model} has no chat template.")
        template = json.dumps(self.tokenizer.chat_template) if settings.apply_chat_template else ""
        self.student = {
            "model": checkpoint_fingerprint(str(Path(settings.model).expanduser())),
            "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        }
        self.parts = find_tasks(settings)

    def run(self, is_judged: bool) -> None:
        """
        Ask what was not asked before, and write the table.

        Args:
            is_judged (`bool`):
                Whether the same command has just written a judge's table, which this one is put below.
        """
        import lm_eval

        from ..host.files import write_atomically
        from .report import as_json, markdown, warnings_of
        from .running import run_part

        output = self.folder.parent
        results = [
            result
            for part in self.parts
            for result in run_part(part, self.settings, self.student, self.folder, lambda: self._language_model)
        ]
        warnings = warnings_of(self.settings, results)
        section = markdown(self.settings, lm_eval.__version__, results, warnings)
        page = (output / TABLE).read_text(encoding="utf-8") if is_judged else f"# {self.settings.model}\n"
        found = (
            json.loads((output / JSON).read_text(encoding="utf-8")) if is_judged else {"student": self.settings.model}
        )
        found["benchmarks"] = as_json(self.settings, lm_eval.__version__, results, warnings)
        write_atomically(output / JSON, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        write_atomically(output / TABLE, f"{page}\n{section}")
        for line in warnings:
            _say(f"Warning: {line}")
        print(section, end="")
        _say(f"Written to {output / TABLE}.")

    @functools.cached_property
    def _language_model(self) -> Any:
        """The student as lm_eval takes it, loaded where something is to be asked."""
        from lm_eval.models.huggingface import HFLM

        from ..evaluation.loading import load_student
        from .finding import lm_eval_at_work

        model = load_student(self.settings.model)
        with lm_eval_at_work():
            return HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.settings.batch_size)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
