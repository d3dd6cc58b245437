"""
Log-probabilities that an API shows: the column `top_logprobs`.

A row's value is `{"ids": [[...], ...], "logprobs": [[...], ...]}`, one inner list per token of the answer (its end
included or not): ids of tokens in the student's vocabulary, and the teacher's log-probabilities of them. A position of
which nothing is known has empty lists, a row of which nothing is known is null. `trl-bbkd collect` adds `tokens`, the tokens of
the answer that the positions are of, and `exact`, whether the teacher's tokens are the student's at all positions of its text.
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from ..errors import TeacherDataError


TOP_LOGPROBS = "top_logprobs"
MISSING = -9999.0  # and below: what APIs write for "no value"
ROUNDING = 1e-3  # by which an API's probabilities may sum to more than 1
SHOWN_TOKENS = 8


class KnownProbs(NamedTuple):
    """
    Known probabilities of the tokens of some answers.

    Args:
        ids (`np.ndarray`):
            `(N, m)` int64; 0 where fewer than m are known.
        probs (`np.ndarray`):
            `(N, m)` float64.
        is_known (`np.ndarray`):
            `(N, m)` bool.
    """

    ids: np.ndarray
    probs: np.ndarray
    is_known: np.ndarray


def check_top_logprobs(
    values: list[dict | None], answers: list[list[int]], vocab_size: int, eos_id: int, names: list[int] | None = None
) -> None:
    """
    Check a column of log-probabilities.

    Args:
        values (`list[dict]`):
            The column.
        answers (`list[list[int]]`):
            The rows' answers in the student's tokens, ending in `eos_id` unless they were cut.
        vocab_size (`int`):
            Size of the vocabulary.
        eos_id (`int`):
            The token that ends an answer.
        names (`list[int]`, *optional*):
            The rows' names in errors; by default, their positions.

    Raises:
        [`~errors.TeacherDataError`]: at the first problem, naming row, position and value.
    """
    rows = range(len(values)) if names is None else names
    for row, value, answer in zip(rows, values, answers, strict=True):
        if value is None:
            continue
        place = f"Row {row}: `{TOP_LOGPROBS}`"
        ids, log_probs = (value.get(name) if isinstance(value, dict) else None for name in ("ids", "logprobs"))
        if not _is_list_of_lists(ids) or not _is_list_of_lists(log_probs):
            raise TeacherDataError(
                f'{place} must be {{"ids": [[...], ...], "logprobs": [[...], ...]}}, a list of both per token of the answer '
                "(empty where nothing is known), or null."
            )
        if len(ids) != len(log_probs):
            raise TeacherDataError(f"{place} has `ids` of {len(ids)} positions and `logprobs` of {len(log_probs)}.")
        tokens = value.get("tokens")
        if tokens is not None and list(tokens[: len(answer)]) != list(answer):
            raise TeacherDataError(
                f"{place} is of other tokens than the student's tokenizer makes of the answer: the first ones are "
                f"{list(tokens[:SHOWN_TOKENS])} there and {list(answer[:SHOWN_TOKENS])} here. Collect with the student's `tokenizer` and "
                "train with the defaults of `reasoning` and `chat_template_kwargs`, or take the column out."
            )
        was_cut = answer[-1:] != [eos_id]
        fits = len(ids) >= len(answer) if was_cut else len(ids) in (len(answer) - 1, len(answer))
        if not fits:
            wanted = f"at least {len(answer)}" if was_cut else f"{len(answer) - 1}, or {len(answer)} with its end"
            raise TeacherDataError(
                f"{place} has {len(ids)} positions, but the student's tokenizer makes {wanted} tokens of the answer. The column "
                "only helps where the teacher's tokens are the student's; take it out otherwise."
            )
        _check_positions(place, ids, log_probs, vocab_size)


def count_inexact(table) -> int:
    """Values of the column of a [`~pyarrow.Table`] that say that they are not exact."""
    exact = pc.struct_field(table[TOP_LOGPROBS], "exact")
    return pc.sum(pc.invert(exact)).as_py() or 0


def without_inexact(values: list[dict | None]) -> list[dict | None]:
    """Values of the column, null where they say that they are not exact."""
    return [None if value is not None and value.get("exact") is False else value for value in values]


def _check_positions(place: str, ids: list[list[int]], log_probs: list[list[float]], vocab_size: int) -> None:
    """Check a row's positions all at once; an error names the first one of its kind."""
    for position, (tokens, numbers) in enumerate(zip(ids, log_probs, strict=True)):
        if len(tokens) != len(numbers):
            raise TeacherDataError(
                f"{place}, position {position} has {len(tokens)} ids and {len(numbers)} log-probabilities."
            )
    tokens, numbers = list(chain.from_iterable(ids)), list(chain.from_iterable(log_probs))
    positions = np.repeat(np.arange(len(ids)), np.array([len(each) for each in ids], dtype=np.int64))

    def refuse(is_wrong: np.ndarray, problem: Callable[[int], str]) -> None:
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            raise TeacherDataError(f"{place}, position {positions[at]} {problem(at)}")

    # Their types are few and quickly collected; only an error looks at them one by one
    if not set(map(type, tokens)) <= {int} or not set(map(type, numbers)) <= {int, float}:
        types = [(type(token), type(number)) for token, number in zip(tokens, numbers, strict=True)]
        refuse(
            np.array([token is not int or number not in (int, float) for token, number in types]),
            lambda at: (
                f"has {ids[positions[at]]} and {log_probs[positions[at]]}: `ids` are whole numbers, the student's, and "
                "`logprobs` are numbers."
            ),
        )
    token, log_prob = np.asarray(tokens, dtype=np.int64), np.asarray(numbers, dtype=np.float64)
    refuse(
        (token < 0) | (token >= vocab_size),
        lambda at: (
            f"names token {token[at]}, which is outside of the student's vocabulary, or the proxy's, of {vocab_size:,} "
            "tokens."
        ),
    )
    is_first = np.zeros(len(token), dtype=bool)
    is_first[np.unique(positions * vocab_size + token, return_index=True)[1]] = True
    refuse(~is_first, lambda at: f"names a token twice: {ids[positions[at]]}.")
    refuse(
        log_prob <= MISSING,
        lambda at: (
            f"has a log-probability of {log_prob[at]:g}, by which an API says that it has none. Take the token out of both "
            "lists."
        ),
    )
    refuse(
        ~(log_prob <= ROUNDING),
        lambda at: f"has a log-probability of {log_prob[at]:g}; it must be a number of at most 0.",
    )
    total = np.bincount(positions, np.exp(log_prob))[positions]
    refuse(
        total > 1 + ROUNDING,
        lambda at: f"has probabilities that sum to {total[at]:.3f}; they must be natural logarithms.",
    )


def _is_list_of_lists(value) -> bool:
    return isinstance(value, list) and all(isinstance(inner, list) for inner in value)


def known_probs(values: list[dict | None], lengths: list[int]) -> KnownProbs:
    """
    What is known of each answer token of some rows.

    Args:
        values (`list[dict]`):
            Checked values of the column.
        lengths (`list[int]`):
            Answer tokens of each row, N in sum. Positions beyond are left out, missing ones are unknown.

    Returns:
        [`KnownProbs`]
    """
    most = max((len(tokens) for value in values if value for tokens in value["ids"]), default=0)
    shape = (sum(lengths), most)
    found = KnownProbs(np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape, dtype=bool))
    start = 0
    for value, length in zip(values, lengths, strict=True):
        pairs = zip(value["ids"], value["logprobs"], strict=True) if value else ()
        for position, (tokens, numbers) in enumerate(pairs):
            if position < length:
                found.ids[start + position, : len(tokens)] = tokens
                found.probs[start + position, : len(tokens)] = np.exp(np.minimum(numbers, 0.0))
                found.is_known[start + position, : len(tokens)] = True
        start += length
    return found
