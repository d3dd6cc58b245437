"""A teacher's answers that were collected before: which label each is, and what they say of its probability."""

import logging
import math
import unicodedata
from collections.abc import Callable

from ..errors import PseudoLabelError


logger = logging.getLogger(__name__)


def check_column(column: str, columns: list[str], hint: str) -> None:
    if column not in columns:
        raise PseudoLabelError(f"The data set has no column `{column}`; columns found: {', '.join(columns)}. {hint}")


def read_answers(dataset, labels, answer_column, confidence_column, label_probs_column, drop) -> list:
    """Label and distribution of each row; `None` where no answer is a label and such rows are dropped."""
    if confidence_column is not None and label_probs_column is not None:
        raise PseudoLabelError("Give `confidence_column` or `label_probs_column`, not both.")
    source = answer_column if label_probs_column is None else label_probs_column
    hint = "Name the column of the teacher's answers in `answer_column`, or of probabilities in `label_probs_column`."
    columns = [source] if confidence_column is None else [source, confidence_column]
    for column in columns:
        check_column(column, dataset.column_names, hint)
    match, unmatched = label_matcher(labels), []
    read: list[tuple[int | None, list[float]] | None] = []
    for row, values in enumerate(dataset.select_columns(columns)):
        value = values[source]
        if label_probs_column is not None:
            shares = _listed(row, source, value, match, len(labels))
        else:
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value = value[0].get("content")
            answers = value if isinstance(value, list) else [value]
            found = [match(answer) for answer in answers]
            bad = next((answer for answer, index in zip(answers, found, strict=True) if index is None), None)
            if None in found and not drop:
                value, found = bad, []
            # An answer that is no label speaks for none of them: it is shared out
            shares = [found.count(index) + found.count(None) / len(labels) for index in range(len(labels))]
            shares = shares if any(index is not None for index in found) else None
            if shares is not None and confidence_column is not None:
                shares = _stated(row, confidence_column, values[confidence_column], found, len(labels))
            elif len(answers) == 1 and shares is not None:
                raise PseudoLabelError(
                    f"Row {row}: `{source}` holds one answer, {value!r}, and nothing says how sure the teacher is. "
                    "Give `confidence_column` (numbers from 0 to 1), `label_probs_column` (a dict from label to "
                    "probability or log-probability), or several answers to each prompt as a list."
                )
        if shares is None and not drop:
            raise PseudoLabelError(
                f"Row {row}: `{source}` is {value!r}, which is none of the labels {', '.join(map(repr, labels))}. "
                "Mend it, or drop such rows with `unmatched='drop'`."
            )
        if shares is None:
            unmatched.append(row)
            read.append(None)
            continue
        label = found[0] if confidence_column is not None else shares.index(max(shares))
        read.append((label, [share / sum(shares) for share in shares]))
    if len(unmatched) == len(read):
        raise PseudoLabelError(f"No row of `{source}` holds one of the labels {', '.join(map(repr, labels))}.")
    if unmatched:
        logger.warning(
            f"Dropped {len(unmatched)} of {len(read)} rows without a label, the first is row {unmatched[0]}."
        )
    return read


def _stated(row: int, column: str, value, found: list, classes: int) -> list[float]:
    if len(found) > 1:
        raise PseudoLabelError(f"Row {row} holds {len(found)} answers; their agreement needs no `confidence_column`.")
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        percent = " Divide per cents by 100." if isinstance(value, int | float) and 1 < value <= 100 else ""
        raise PseudoLabelError(f"Row {row}: `{column}` is {value!r}; a confidence is a number in [0, 1].{percent}")
    return [float(value) if index == found[0] else (1 - value) / (classes - 1) for index in range(classes)]


def _listed(row: int, column: str, value, match: Callable, classes: int) -> list[float] | None:
    """Probabilities of the labels, not normalised, or `None` if none is listed."""
    if isinstance(value, dict):
        value = [{"token": token, "logprob": number} for token, number in value.items()]
    # Arrow gives every row the keys of all rows
    listed = [(match(entry["token"]), entry["logprob"]) for entry in value or [] if entry["logprob"] is not None]
    numbers = [number for _, number in listed]
    is_log = all(number <= 0 for number in numbers)
    probs = [math.exp(number) for number in numbers] if is_log else numbers
    if not all(prob >= 0 for prob in probs) or sum(probs) > 1.02:
        raise PseudoLabelError(
            f"Row {row}: `{column}` lists {numbers}; they must be probabilities, from 0 to 1 and with a sum of at "
            "most 1, or the logarithms of such."
        )
    shares = [sum(p for (index, _), p in zip(listed, probs, strict=True) if index == i) for i in range(classes)]
    return shares if sum(shares) > 0 else None


def label_matcher(labels: list[str]) -> Callable[[str | None], int | None]:
    """Which label a text is: literally, else but for case and spaces, else but for punctuation too, if just one."""
    tables = []
    for form in (str.strip, plain, _bare):
        forms = [form(label) for label in labels]
        tables.append((form, {text: i for i, text in enumerate(forms) if text and forms.count(text) == 1}))

    def match(text):
        found = (table.get(form(text)) for form, table in tables) if isinstance(text, str) else ()
        return next((index for index in found if index is not None), None)

    return match


def plain(text: str) -> str:
    """Without case and with single spaces."""
    return " ".join(text.casefold().split())


def _bare(text: str) -> str:
    """Without punctuation and symbols as well."""
    return plain("".join(" " if unicodedata.category(char)[0] in "PSC" else char for char in text))
