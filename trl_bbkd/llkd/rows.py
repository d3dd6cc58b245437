"""Rows of a file become rows of [`~llkd.trainer.LLKDTrainer`]: names of labels become numbers."""

import difflib
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset

from ..data.teacher_files import named, row_names
from ..errors import LLKDDataError


@dataclass
class LabelCounts:
    """
    Counts of labelled rows.

    Args:
        rows (`int`):
            Rows.
        classes (`dict[str, int]`):
            Rows of each label, by name.
        checked (`int`, *optional*):
            Rows whose true label is known besides the teacher's; `None` where the label is the true one.
        mean_confidence (`float`, *optional*):
            Mean of the teacher's confidence.
    """

    rows: int
    classes: dict[str, int] = field(default_factory=dict)
    checked: int | None = None
    mean_confidence: float | None = None

    def table_rows(self) -> list[tuple[str, str]]:
        """Label and value of each count, for a table."""
        lines = [
            ("rows", f"{self.rows:,}"),
            *((f"label {name}", f"{count:,}") for name, count in self.classes.items()),
        ]
        if self.checked is not None:
            lines.append(("with a true label too", f"{self.checked:,}"))
        if self.mean_confidence is not None:
            lines.append(("mean confidence", f"{self.mean_confidence:.3f}"))
        return lines


def count_labels(rows: Dataset) -> LabelCounts:
    """Count rows of [`with_class_numbers`]."""
    names, found, columns = rows.features["label"].names, rows["label"][:], rows.column_names
    confidence = rows["teacher_confidence"][:] if "teacher_confidence" in columns else None
    return LabelCounts(
        rows=len(found),
        classes={name: found.count(number) for number, name in enumerate(names)},
        checked=sum(label is not None for label in rows["gold"]) if "gold" in columns else None,
        mean_confidence=sum(confidence) / len(confidence) if confidence else None,
    )


def find_class_names(rows: Dataset, labels: list[str] | None) -> list[str]:
    """
    Names of the classes: `labels`, or those of the column `label`; of labels and true labels in the alphabet's order where
    they are text.

    Raises:
        [`~errors.LLKDDataError`]: no column `label`, or one of numbers that nothing names.
    """
    if "label" not in rows.column_names:
        raise LLKDDataError(
            f"The training rows have no column `label`, the teacher's; columns found: {named(rows.column_names)}. Make "
            "it with `trl_bbkd.pseudo_label`."
        )
    if labels is not None:
        return labels
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    columns = [column for column in ("label", "gold") if column in rows.column_names]
    names = sorted({label for column in columns for label in rows[column] if isinstance(label, str)})
    if not names:
        raise LLKDDataError("`label` holds numbers, and nothing names the classes. Set `labels`, in their order.")
    return names


def with_class_numbers(rows: Dataset, column: str, names: list[str], where: str) -> Dataset:
    """
    `rows` with `column` as a [`~datasets.ClassLabel`]. Numbers, from 0, stay as they are, and so does `None`: the trainer
    checks. A -1 in `gold` is a label that is not known.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows whose labels are names or numbers.
        column (`str`):
            `"label"` or `"gold"`.
        names (`list[str]`):
            Names of the classes, in the order of their numbers.
        where (`str`):
            What the rows are, for errors: `"training"` or `"test"`.

    Raises:
        [`~errors.LLKDDataError`]: a name that is none of the classes, or a number that is none.
    """
    if column not in rows.column_names:
        raise LLKDDataError(f"The {where} rows have no column `{column}`; columns found: {named(rows.column_names)}.")
    feature = rows.features[column]
    values = rows[column][:]
    if column == "gold":
        values = [None if value == -1 else value for value in values]
    if isinstance(feature, ClassLabel):
        values = [feature.names[value] if value in range(len(feature.names)) else value for value in values]
    numbers = {name: number for number, name in enumerate(names)}
    for row, value in zip(row_names(rows), values, strict=True):
        is_number = not isinstance(value, str | bool) and value in range(len(names))
        if not (value is None or is_number or (isinstance(value, str) and value in numbers)):
            nearest = difflib.get_close_matches(str(value), names, n=1)
            advice = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise LLKDDataError(
                f"Row {row} of the {where} rows: `{column}` is {value!r}, which is none of the classes {', '.join(names)}{advice} "
                "Mend it, or name all classes in `labels`."
            )
    values = [numbers.get(value, value) for value in values]
    return rows.remove_columns(column).add_column(column, values, feature=ClassLabel(names=names))
