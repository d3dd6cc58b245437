"""What an endpoint says of the tokens of an answer, each beside its place in it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..bayeskd.top_logprobs import MISSING, ROUNDING
from .layout import Span, is_hidden, lay_out
from .probe import token_entries
from .replies import CUT, Choice
from .spelling import Speller


ID_PREFIX = "token_id:"


class Shown(NamedTuple):
    """
    One token, or an alternative to it, as an endpoint shows it.

    Attributes:
        text (`str`): its text, or its name.
        piece (`bytes`): its bytes, as far as they are shown.
        id (`int` or `None`): its number in the teacher's vocabulary.
        logprob (`float` or `None`): its log-probability, if it is one.
    """

    text: str
    piece: bytes
    id: int | None
    logprob: float | None


class Placed(NamedTuple):
    """
    A token of the answer.

    Attributes:
        span ([`~collect.layout.Span`] or `None`): its place in the answer's bytes, if it is certain; -1 is a space before it.
        shown ([`Shown`]): the token.
        alternatives (`list[Shown]`): those that the endpoint lists.
        is_whole (`bool`): whether texts here stand for themselves: no character is cut.
    """

    span: Span | None
    shown: Shown
    alternatives: list[Shown]
    is_whole: bool


class PlacedTokens(NamedTuple):
    """
    All tokens of an answer.

    Attributes:
        tokens (`list[Placed]`): those of its text.
        end ([`Placed`] or `None`): the one that ended it, if the endpoint shows it.
        by_id (`bool`): whether their numbers, read with the named tokenizer, spell the answer.
    """

    tokens: list[Placed]
    end: Placed | None
    by_id: bool


def shows_numbers(choice: Choice) -> bool:
    """Whether an endpoint writes numbers of tokens in the place of their texts."""
    return any(str(entry.get("token")).startswith(ID_PREFIX) for entry in token_entries(choice)[:1])


def place(choice: Choice, speller: Speller | None = None) -> PlacedTokens | None:
    """
    Lay the tokens of an answer's log-probabilities over its text. Tokens of a thought before it are passed over.

    Args:
        choice ([`~collect.replies.Choice`]):
            The answer.
        speller ([`~collect.spelling.Speller`], *optional*):
            What numbers of tokens are read with.

    Returns:
        [`PlacedTokens`] or `None`: `None` where the tokens do not spell the answer, or may do it in two ways.
    """
    entries = token_entries(choice)
    try:
        text = choice.content.encode()
    except UnicodeEncodeError:
        return None
    if not entries or not text:
        return None
    shown = [_shown(entry) for entry in entries]
    ids = _ids(choice, shown)
    found = speller and ids and _by_ids(ids, text, speller, bool(choice.reasoning))
    if found:
        first, spans, ended = found
        shown = [one._replace(id=id_) for one, id_ in zip(shown, ids or (), strict=True)]
    else:
        by_text = _by_text([one.piece for one in shown], text, choice)
        if by_text is None:
            return None
        first, spans, ended = by_text
    hidden = [is_hidden(one.piece) for one in shown]
    whole = [not now and not before for now, before in zip(hidden, [False, *hidden], strict=False)]
    tokens = [
        Placed(span, one, _alternatives(entry), is_whole)
        for span, one, entry, is_whole in zip(
            [*spans, *[None] * ended], shown[first:], entries[first:], whole[first:], strict=True
        )
    ]
    return PlacedTokens(tokens[:-1] if ended else tokens, tokens[-1] if ended else None, bool(found))


def _shown(entry: dict[str, Any]) -> Shown:
    token, parts, id_, logprob = (entry.get(name) for name in ("token", "bytes", "id", "logprob"))
    text = token if isinstance(token, str) else ""
    is_number = text.startswith(ID_PREFIX)
    if is_number and text.removeprefix(ID_PREFIX).isdecimal():
        id_ = int(text.removeprefix(ID_PREFIX))
    # Where numbers stand in for texts, `bytes` may be those of the number as it is written
    if isinstance(parts, list) and bytes_of(parts) not in (None, text.encode(errors="replace") if is_number else None):
        piece = bytes_of(parts) or b""
    else:
        piece = b"" if is_number else text.encode(errors="replace")
    number = float(logprob) if isinstance(logprob, int | float) else math.nan
    return Shown(text, piece, id_ if type(id_) is int else None, number if MISSING < number <= ROUNDING else None)


def bytes_of(parts: list) -> bytes | None:
    try:
        return bytes(parts)
    except (TypeError, ValueError):
        return None


def _alternatives(entry: dict[str, Any]) -> list[Shown]:
    listed = entry.get("top_logprobs")
    return [_shown(one) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _ids(choice: Choice, shown: Sequence[Shown]) -> list[int] | None:
    ids: list[Any] = [one.id for one in shown]
    if None in ids:
        listed = choice.raw.get("token_ids")
        ids = listed if isinstance(listed, list) else []
    return ids if len(ids) == len(shown) and all(type(id_) is int for id_ in ids) else None


def _by_ids(
    ids: list[int], text: bytes, speller: Speller, has_thought: bool
) -> tuple[int, list[Span | None], bool] | None:
    """The first token of the text, the places of all up to its end, and whether one more ends it."""
    ended = ids[-1] in speller.special
    pieces = []
    for id_ in ids[: len(ids) - ended]:
        piece = b"" if id_ in speller.special else speller.piece(id_)
        if piece is None:
            return None
        pieces.append(piece)
    spelled = b"".join(pieces)
    if not spelled.endswith(text):
        return None
    lead = len(spelled) - len(text)
    if not has_thought:
        # A tokenizer may open a text with a space
        return (0, _spans(pieces, -lead), ended) if spelled[:lead] in (b"", b" ") else None
    spans = _spans(pieces, -lead)
    first = next((i for i, span in enumerate(spans) if span.start == 0 and span.end > 0), None)
    return None if first is None else (first, spans[first:], ended)


def _spans(pieces: Sequence[bytes], at: int) -> list[Any]:
    spans = []
    for piece in pieces:
        spans.append(Span(at, at + len(piece)))
        at += len(piece)
    return spans


def _by_text(pieces: list[bytes], text: bytes, choice: Choice) -> tuple[int, list[Span | None], bool] | None:
    if "�" in choice.content:
        return None  # of several tokens' bytes: what each of them is cannot be told
    found = list(_layouts(pieces, text, bool(choice.reasoning), choice.finish_reason != CUT))
    if len({(first, ended) for first, _, ended in found}) != 1:
        return None
    # With and without a space before the text, tokens may lie alike
    (first, _, ended), *_ = found
    places = zip(*(spans for _, spans, _ in found), strict=True)
    return first, [one if all(other == one for other in others) else None for one, *others in places], ended


def _layouts(
    pieces: list[bytes], text: bytes, has_thought: bool, may_end: bool
) -> Iterator[tuple[int, list[Span | None], bool]]:
    for ended in (False, True) if may_end else (False,):
        part = pieces[: len(pieces) - ended]
        for first in _beginnings(part, len(text)) if has_thought else (0,):
            for lead in (b"", b" ") if first == 0 else (b"",):
                if (spans := lay_out(part[first:], lead + text)) is not None:
                    shift = len(lead)
                    yield first, [span and Span(span.start - shift, span.end - shift) for span in spans], ended


def _beginnings(pieces: list[bytes], length: int) -> Iterator[int]:
    """Where an answer of so many bytes may begin after a thought."""
    shown, has_hidden = 0, False
    for first in range(len(pieces) - 1, -1, -1):
        has_hidden |= is_hidden(pieces[first])
        shown += 0 if is_hidden(pieces[first]) else len(pieces[first])
        if shown > length:
            return
        if has_hidden or shown == length:
            yield first
