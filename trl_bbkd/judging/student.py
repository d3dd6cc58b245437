"""A student's answers to the teacher's prompts, sampled once: another evaluation of it takes those that are there."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..data.teacher_files import BUILDERS, ROW_COLUMN
from ..data.teacher_tokens import RENDERED_COLUMNS
from ..errors import RecipeError
from ..host.files import write_atomically
from ..host.model_paths import checkpoint_fingerprint
from .pairs import Asked, read_answers
from .settings import EvaluateConfig


ANSWERS, SAMPLING = "answers.jsonl", "answers.json"
FILES_OF_TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SEED = 0


def is_file_of_answers(model: str) -> bool:
    path = Path(model).expanduser()
    return path.is_file() or any(suffix in BUILDERS for suffix in path.suffixes[-2:])


def student_answers(
    settings: EvaluateConfig, prompts: dict[str, Asked], folder: Path
) -> tuple[dict[str, list[str]], int]:
    """
    The student's answers by prompt, and how many of them were cut.

    Raises:
        [`~errors.TeacherDataError`]: a file of answers cannot be used, or a prompt cannot be rendered.
        [`~errors.RecipeError`]: there is no such model.
    """
    if is_file_of_answers(settings.model):
        return read_answers(settings.model, prompts), 0
    lines = _kept_lines(settings, prompts, folder)
    if lines is None:
        lines = _sample(settings, prompts)
        # Of another student's answers nothing is left that could be taken for this one's
        (folder / SAMPLING).unlink(missing_ok=True)
        write_atomically(folder / ANSWERS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        write_atomically(folder / SAMPLING, json.dumps(_how(settings, prompts)))
    answers: dict[str, list[str]] = {}
    keys = [key for key in prompts for _ in range(settings.student_samples)]
    for key, line in zip(keys, lines, strict=True):
        answers.setdefault(key, []).append(line["completion"])
    return answers, sum(line["is_cut"] for line in lines)


def is_to_be_sampled(settings: EvaluateConfig, prompts: dict[str, Asked], folder: Path) -> bool:
    """Whether [`student_answers`] has the student write."""
    return not is_file_of_answers(settings.model) and _kept_lines(settings, prompts, folder) is None


def _kept_lines(settings: EvaluateConfig, prompts: dict[str, Asked], folder: Path) -> list[dict[str, Any]] | None:
    """The answers that are there, where they are whole and this student's."""
    how = _how(settings, prompts)
    try:
        if json.loads((folder / SAMPLING).read_text(encoding="utf-8")) != how:
            return None
        # Not `splitlines`, which knows ends of lines that stand within answers
        lines = [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").split("\n")[:-1]]
    except (FileNotFoundError, ValueError):
        return None
    return lines if len(lines) == len(prompts) * settings.student_samples else None


def _how(settings: EvaluateConfig, prompts: dict[str, Asked]) -> dict[str, Any]:
    """What answers depend on."""
    given = [[asked.columns.get(name) for name in ("prompt", *RENDERED_COLUMNS)] for asked in prompts.values()]
    try:
        model = checkpoint_fingerprint(str(Path(settings.model).expanduser()))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    texts = [Path(settings.model).expanduser() / name for name in FILES_OF_TEXTS]
    return {
        "model": model,
        "texts": hashlib.sha256(b"\0".join(file.read_bytes() for file in texts if file.is_file())).hexdigest(),
        "prompts": hashlib.sha256(json.dumps(given, default=str).encode()).hexdigest(),
        "max_tokens": settings.student_max_tokens,
        "temperature": settings.student_temperature,
        "samples": settings.student_samples,
        "batch_size": settings.student_batch_size,
    }


def check_student(settings: EvaluateConfig, prompts: dict[str, Asked]) -> None:
    """
    All that can be checked of a student before its weights are loaded.

    Raises:
        [`~errors.DistillationError`]: there is no such model, its weights were cut, or a prompt cannot be rendered.
    """
    from ..evaluation.loading import refuse_broken_student

    _tokenized(settings, prompts)
    refuse_broken_student(settings.model)


def _tokenized(settings: EvaluateConfig, prompts: dict[str, Asked]):
    """The student's tokenizer, and the prompts as texts or messages, and as token ids."""
    from ..data.teacher_data import prompt_ids_of
    from ..evaluation.loading import load_tokenizer

    rows = [asked.columns for asked in prompts.values()]
    batch = {
        name: [row[name] for row in rows] for name in ("prompt", ROW_COLUMN, *RENDERED_COLUMNS) if name in rows[0]
    }
    tokenizer = load_tokenizer(settings.model)
    return tokenizer, batch["prompt"], prompt_ids_of(tokenizer, batch)


def _sample(settings: EvaluateConfig, prompts: dict[str, Asked]) -> list[dict[str, Any]]:
    from ..evaluation.loading import load_student
    from ..evaluation.student import end_token_ids, generate_completion_ids

    tokenizer, asked, prompt_ids = _tokenized(settings, prompts)
    model = load_student(settings.model)
    ids = generate_completion_ids(
        model,
        tokenizer,
        asked,
        max_new_tokens=settings.student_max_tokens,
        temperature=settings.student_temperature,
        num_samples=settings.student_samples,
        batch_size=settings.student_batch_size,
        seed=SEED,
        prompt_ids=prompt_ids,
        progress_bar="Student",
    )
    ends = end_token_ids(model, tokenizer, asked[0])
    return [
        {
            "prompt": prompt,
            "completion": tokenizer.decode(sample, skip_special_tokens=True),
            "is_cut": sample[-1] not in ends,
        }
        for prompt, samples in zip(asked, ids, strict=True)
        for sample in samples
    ]
