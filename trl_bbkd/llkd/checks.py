"""What can be said of rows before a classifier learns from them."""

from collections.abc import Collection

from datasets import ClassLabel, Dataset

from ..data.teacher_data import row_names
from ..data.teacher_files import ROW_COLUMN, named
from ..errors import LLKDDataError
from ..selection.collator import CARRIED_COLUMNS


# What the default collator and the trainer know beside the tokenizer's own columns
KNOWN_COLUMNS = (*CARRIED_COLUMNS, ROW_COLUMN, "label", "labels", "label_ids", "gold")


def check_labels(
    rows: Dataset,
    column: str,
    num_labels: int,
    names: list[str] | None,
    where: str,
    may_be_unknown: bool = False,
) -> None:
    """
    Refuse labels that are none of the classes.

    Raises:
        [`~errors.LLKDDataError`]: the column is missing, numbers its classes otherwise, or has a value that
        is no class.
    """
    if column not in rows.column_names:
        advice = "Make it with `trl_bbkd.pseudo_label`" if where == "training" else "It is the true one there"
        raise LLKDDataError(
            f"The {where} rows have no column `{column}`; columns found: {named(rows.column_names)}. {advice}."
        )
    feature = rows.features[column]
    if isinstance(feature, ClassLabel) and names is not None and feature.names != names:
        raise LLKDDataError(
            f"In `{column}` of the {where} rows the classes are {', '.join(feature.names)}, but those to learn are "
            f"{', '.join(names)}. Bring them into the same order: `dataset.align_labels_with_mapping`."
        )
    for row, value in zip(row_names(rows), rows[column], strict=True):
        if may_be_unknown and value is None:
            continue
        if not isinstance(value, int) or not 0 <= value < num_labels:
            advice = (
                "turn names into numbers with `dataset.class_encode_column`"
                if isinstance(value, str)
                else "drop the row, or mend it"
            )
            raise LLKDDataError(
                f"Row {row} of the {where} rows: `{column}` is {value!r}, which is none of the student's {num_labels} "
                f"classes, 0 to {num_labels - 1}; {advice}."
            )


def check_all_classes(rows: Dataset, num_labels: int, names: list[str] | None) -> None:
    """
    Raises:
        [`~errors.LLKDDataError`]: a class has no row.
    """
    missing = sorted(set(range(num_labels)) - set(rows["label"]))
    if missing:
        name = f" ({names[missing[0]]!r})" if names is not None else ""
        raise LLKDDataError(
            f"No row has label {missing[0]}{name}: the student would never learn that class. Label more rows, take it out "
            "of the labels, or go on without it: allow_missing_classes=True."
        )


def check_token_rows(rows: Dataset, where: str, limit: int | None, vocab_size: int, max_length_acts: bool) -> None:
    """
    Refuse rows that the student cannot read.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids`.
        where (`str`):
            What the rows are, for the message.
        limit (`int`, *optional*):
            Most tokens that the student takes.
        vocab_size (`int`):
            Embeddings that it has.
        max_length_acts (`bool`):
            Whether the rows were text, which `max_length` cuts.

    Raises:
        [`~errors.LLKDDataError`]: a row without tokens, with too many, or with one that has no embedding.
    """
    for row, input_ids in zip(row_names(rows), rows["input_ids"], strict=True):
        if not input_ids:
            raise LLKDDataError(f"Row {row} of the {where} rows has 0 tokens: its text is empty. Drop it.")
        if limit is not None and len(input_ids) > limit:
            advice = (
                f"Set max_length to {limit} or less, at which longer texts are cut"
                if max_length_acts
                else f"Cut its `input_ids` to {limit}: max_length acts on text only"
            )
            raise LLKDDataError(
                f"Row {row} of the {where} rows has {len(input_ids)} tokens, but the student takes {limit} at most. {advice}."
            )
        if max(input_ids) >= vocab_size:
            raise LLKDDataError(
                f"Row {row} of the {where} rows has token {max(input_ids)}, but the student has {vocab_size} embeddings only: "
                "tokenizer and student do not belong together. After adding tokens, call "
                "`model.resize_token_embeddings(len(tokenizer))`."
            )


def refuse_other_columns(rows: Dataset, where: str, input_names: Collection[str]) -> None:
    """
    Refuse columns that would reach the default collator, and then the student, as `remove_unused_columns=False` has it.

    Raises:
        [`~errors.LLKDDataError`]: there are columns that are no input of the student.
    """
    others = [name for name in rows.column_names if name not in (*KNOWN_COLUMNS, *input_names)]
    if others:
        raise LLKDDataError(
            f"With remove_unused_columns=False the columns {', '.join(f'`{name}`' for name in others)} of the {where} rows would "
            "reach the student, which has no such input. Take them out, hand in a data_collator that does, or leave it at True."
        )
