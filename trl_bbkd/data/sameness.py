"""Teacher data from which little can be learned, or on which little can be measured: all of it the same."""

from collections.abc import Iterable

from datasets import Dataset

from .splitting import input_key
from .teacher_data import TeacherDataCounts


def sameness_warnings(train, held_out: list[dict], counts: dict[str, TeacherDataCounts]) -> list[dict]:
    """
    What a report of these rows has to say first. Of a streaming set only held-out rows are looked at.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tokenised training rows.
        held_out (`list[dict]`):
            Tokenised held-out rows.
        counts (`dict[str, TeacherDataCounts]`):
            Data counts, by split.

    Returns:
        `list[dict]`: warnings, each with `kind`, `step` 0 and `text`.
    """
    found = []
    for split, rows in (("training", train), ("held-out", held_out)):
        if not isinstance(rows, Dataset | list) or len(rows) < 2:
            continue
        if _are_equal(tuple(row["teacher_ids"]) for row in _rows(rows, "teacher_ids")):
            text = f"all teacher answers of the {split} rows are equal: there is one text to learn, and no figure tells more."
            found.append({"kind": "equal answers", "step": 0, "text": f"{text} Look at how they were collected."})
        if _are_equal(input_key(row["prompt"]) for row in _rows(rows, "prompt")):
            text = f"all {split} rows have the same prompt: what is measured says nothing of others."
            found.append({"kind": "equal prompts", "step": 0, "text": f"{text} Look at the prompt column."})
    for split, name in (("train", "training"), ("test", "held-out")):
        if split in counts and counts[split].kept and counts[split].truncated_answers == counts[split].kept:
            text = (
                f"all teacher answers of the {name} rows are cut at max_completion_length: the student learns no end, and runs on. "
                "Raise it."
            )
            found.append({"kind": "cut answers", "step": 0, "text": text})
    return found


def _rows(rows: Dataset | list[dict], column: str) -> Iterable[dict]:
    """One by one: most sets show in their first two rows that they are not all the same."""
    return rows.select_columns(column) if isinstance(rows, Dataset) else rows


def _are_equal(values: Iterable) -> bool:
    values = iter(values)
    first = next(values, None)
    return first is not None and all(value == first for value in values)
