"""What the students of a run said to each held-out prompt, and how good it was: kept beside the report, for comparisons."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..data.splitting import input_key
from ..data.teacher_data import answer_text
from ..data.teacher_files import ROW_COLUMN


HELD_OUT_NAME = "held_out.jsonl"


def prompt_lines(rows: list[dict], measured: dict[str, dict]) -> list[dict]:
    """
    Put together what was found of each prompt.

    Args:
        rows (`list[dict]`):
            Held-out rows with `prompt`, `completion` and `teacher_ids`.
        measured (`dict[str, dict]`):
            Of each student `by_row` and `samples`, as [`~evaluation.student.evaluate_student`] fills them.

    Returns:
        `list[dict]`: of each prompt `rows` (their numbers in the file), `prompt`, `teacher` (its answers), `teacher_tokens`, and
        `students`: of each, by name, `values` by metric, and `samples`, a list of answers by temperature.
    """
    numbers_of: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        numbers_of[input_key(row["prompt"])].append(number)
    tokens = [len(row["teacher_ids"]) for row in rows]

    def of_prompt(numbers: list[int], found: dict) -> dict:
        values = {name: [by_row[number] for number in numbers] for name, by_row in found["by_row"].items()}
        samples = {
            at: [text for number in numbers for text in texts[number]] for at, texts in found["samples"].items()
        }
        return {"values": {name: _together(name, values[name], numbers) for name in values}, "samples": samples}

    def _together(name: str, values: list[float], numbers: list[int]) -> float:
        if name.startswith("distinct_valid"):
            return sum(values)
        weights = [tokens[number] if name == "teacher_nll" else 1 for number in numbers]
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return [
        {
            "rows": [rows[number].get(ROW_COLUMN, number) for number in numbers],
            "prompt": rows[numbers[0]]["prompt"],
            "teacher": [answer_text(rows[number]["completion"]) for number in numbers],
            "teacher_tokens": [tokens[number] for number in numbers],
            "students": {name: of_prompt(numbers, found) for name, found in measured.items()},
        }
        for numbers in numbers_of.values()
    ]


def write_held_out(lines: list[dict], folder: str | Path) -> None:
    """Write [`prompt_lines`] to a run's folder."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    (Path(folder) / HELD_OUT_NAME).write_text(text, encoding="utf-8")


def read_held_out(folder: str | Path) -> list[dict[str, Any]]:
    """The lines in a run's folder."""
    with (Path(folder) / HELD_OUT_NAME).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
