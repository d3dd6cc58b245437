"""The teacher's rows, and beside each answer of theirs a student's to the same prompt."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.messages import plain_messages
from ..data.teacher_data import check_teacher_data, load_teacher_data
from ..data.teacher_files import ROW_COLUMN, load_splits, named
from ..errors import TeacherDataError
from .settings import EvaluateConfig
from .verdicts import request_text, shown_answer


# Pairs that are judged before all others, so that a judge without readable verdicts is not paid for all of them
FIRST_PAIRS = 4


@dataclass
class Asked:
    """
    A prompt of the teacher's rows.

    Attributes:
        row (`int`): place of the first row that has it.
        columns (`dict[str, Any]`): of that row, what a student is given.
        answers (`list[str]`): the teacher's, as a judge is shown them.
    """

    row: int
    columns: dict[str, Any]
    answers: list[str] = field(default_factory=list)


@dataclass
class TeacherRows:
    """
    What a student is compared with.

    Attributes:
        prompts (`dict[str, Asked]`): by what they are recognised by.
        teachers (`list[str]`): names in the column `teacher`.
        are_held_out (`bool`): whether they are a split of their own.
    """

    prompts: dict[str, Asked]
    teachers: list[str]
    are_held_out: bool


class Pair(NamedTuple):
    """
    A student's answer and the teacher's.

    Attributes:
        row (`int`): place in the teacher's file; pairs of one prompt share it.
        request, student, teacher (`str`): as a judge is shown them.
    """

    row: int
    request: str
    student: str
    teacher: str


def prompt_key(prompt: str | list[dict], place: str) -> str:
    """The same for a text and for a single message of a user with that text."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else plain_messages(prompt, place)
    return json.dumps([[turn["role"], turn["content"]] for turn in turns], ensure_ascii=False)


def read_teacher_rows(settings: EvaluateConfig) -> TeacherRows:
    """
    The rows to judge: a test split where there is one, else those that `test_split_size` holds out, else all.

    Raises:
        [`~errors.TeacherDataError`]: the rows cannot be used.
    """
    split = SimpleNamespace(datasets=None, test_split_size=settings.test_split_size)
    try:
        train, test = load_teacher_data(_file(settings.data), split)
    except TeacherDataError as error:
        raise TeacherDataError(str(error).replace("`dataset_name: ", "`--data ")) from error
    prompts, teachers = prompts_of(train if test is None else test, settings.max_prompts)
    return TeacherRows(prompts, teachers, test is not None)


def prompts_of(rows: Dataset, most: int | None) -> tuple[dict[str, Asked], list[str]]:
    """
    The first prompts of rows, at most so many, with all answers to them; and the names in the column `teacher`.

    Raises:
        [`~errors.TeacherDataError`]: the rows cannot be used.
    """
    check_teacher_data(rows)
    prompts: dict[str, Asked] = {}
    teachers: dict[str, None] = {}
    for number, row in enumerate(rows):
        name = row.get(ROW_COLUMN, number)
        place = f"Row {name}"
        key = prompt_key(row["prompt"], f"{place}: `prompt`")
        answer = row.pop("completion")
        teachers |= {row["teacher"]: None} if isinstance(row.get("teacher"), str) else {}
        prompts.setdefault(key, Asked(name, row)).answers.append(shown_answer(answer, f"{place}: `completion`"))
    return dict(islice(prompts.items(), most)), list(teachers)


def read_answers(path: str, prompts: dict[str, Asked]) -> dict[str, list[str]]:
    """
    Answers of a file with columns `prompt` and `completion`, by prompt.

    Raises:
        [`~errors.TeacherDataError`]: the file cannot be read, or answers none of the prompts.
    """
    try:
        rows = load_splits(_file(path))["train"]
    except TeacherDataError as error:
        raise TeacherDataError(str(error).replace("`dataset_name: ", "`")) from error
    missing = next((name for name in ("prompt", "completion") if name not in rows.column_names), None)
    if missing:
        raise TeacherDataError(
            f"{path} has no column `{missing}`; columns found: {named(rows.column_names)}. A row of answers has `prompt` and "
            "`completion`."
        )
    answers = defaultdict(list)
    for number, row in enumerate(rows):
        place = f"{path}, row {number}"
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str | list):
                raise TeacherDataError(f"{place}: `{name}` is neither a text nor messages; remove the row.")
        key = prompt_key(row["prompt"], f"{place}: `prompt`")
        if key in prompts:
            answers[key].append(row["completion"])
    if not answers:
        raise TeacherDataError(f"{path} answers no prompt of --data: the two have no prompt in common.")
    return answers


def make_pairs(prompts: dict[str, Asked], answers: dict[str, list]) -> list[Pair]:
    """Each of a student's answers beside one of the teacher's to the same prompt, which are taken in turn."""
    pairs = []
    for key, asked in prompts.items():
        request = request_text(asked.columns["prompt"], f"Row {asked.row}: `prompt`")
        for number, answer in enumerate(answers.get(key, ())):
            student = shown_answer(answer, f"The student's answer to row {asked.row}")
            pairs.append(Pair(asked.row, request, student, asked.answers[number % len(asked.answers)]))
    return pairs


def teachers_beside_themselves(prompts: dict[str, Asked]) -> list[Pair]:
    """A few of the teacher's answers, each beside itself: what a judge is tried with before there are a student's."""
    pairs = []
    for asked in islice(prompts.values(), FIRST_PAIRS):
        request = request_text(asked.columns["prompt"], f"Row {asked.row}: `prompt`")
        pairs.append(Pair(asked.row, request, asked.answers[0], asked.answers[0]))
    return pairs


def _file(name: str) -> Any:
    return SimpleNamespace(
        dataset_name=name,
        dataset_config=None,
        dataset_train_split="train",
        dataset_test_split="test",
        dataset_streaming=False,
    )
