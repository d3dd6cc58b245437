"""What the students of a run said to each held-out prompt, and how good it was: kept beside the report, for comparisons."""

import json
from pathlib import Path
from typing import Any

from ..data.splitting import rows_by_input
from ..data.teacher_data import answer_text
from ..data.teacher_files import ROW_COLUMN


HELD_OUT_NAME = "held_out.jsonl"


def prompt_lines(rows: list[dict], measured: dict[str, dict]) -> list[dict]:
    """
    Put together what was found of each prompt.

    Args:
        rows (`list[dict]`):
            Held-out rows with `prompt`, `prompt_ids`, `completion` and `teacher_ids`.
        measured (`dict[str, dict]`):
            Of each student `by_row` and `samples`, as [`~evaluation.student.evaluate_student`] fills them.

    Returns:
        `list[dict]`: of each prompt `rows` (their numbers in the file), `prompt`, `teacher` (its answers), `teacher_tokens`, and
        `students`: of each, by name, `values` by metric, and `samples`, a list of answers by temperature.
    """
    groups = rows_by_input(tuple(row["prompt_ids"]) for row in rows)
    tokens = [len(row["teacher_ids"]) for row in rows]

    def of_prompt(prompt: int, found: dict) -> dict:
        values = {name: by_row[prompt] for name, by_row in found["by_row"].items() if name != "teacher_nll"}
        totals = [tokens[number] * found["by_row"]["teacher_nll"][number] for number in groups[prompt]]
        values["teacher_nll"] = sum(totals) / sum(tokens[number] for number in groups[prompt])
        return {"values": values, "samples": {at: texts[prompt] for at, texts in found["samples"].items()}}

    return [
        {
            "rows": [rows[number].get(ROW_COLUMN, number) for number in numbers],
            "prompt": rows[numbers[0]]["prompt"],
            "teacher": [answer_text(rows[number]["completion"]) for number in numbers],
            "teacher_tokens": [tokens[number] for number in numbers],
            "students": {name: of_prompt(prompt, found) for name, found in measured.items()},
        }
        for prompt, numbers in enumerate(groups)
    ]


def write_held_out(lines: list[dict], folder: str | Path) -> None:
    """Write [`prompt_lines`] to a run's folder."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    (Path(folder) / HELD_OUT_NAME).write_text(text, encoding="utf-8")


def read_held_out(folder: str | Path) -> list[dict[str, Any]]:
    """The lines in a run's folder."""
    with (Path(folder) / HELD_OUT_NAME).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
