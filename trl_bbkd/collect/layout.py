"""Where the tokens of an answer lie in it, by what an endpoint shows of each of them: said only where there is one way."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


# What stands for bytes that are no character by themselves
REPLACEMENT = "�".encode()
# Bytes of a token that is not shown, at most
LONGEST_HIDDEN = 64


class Span(NamedTuple):
    """Bytes of an answer."""

    start: int
    end: int


class _Group(NamedTuple):
    """Tokens whose bytes are not shown, whether there is one among them of which nothing is shown, and the token after them."""

    hidden: int
    has_silent: bool
    shown: bytes | None

    @property
    def size(self) -> int:
        return self.hidden + (self.shown is not None)


class _Way(NamedTuple):
    """How a group may lie: where it ends, and where its last token begins, if that is known."""

    end: int
    shown_start: int | None


def is_hidden(piece: bytes) -> bool:
    """
    Whether a token's bytes are not what is shown of it: a character that is cut over several tokens comes as nothing, or as
    replacement characters.
    """
    return not piece or REPLACEMENT in piece


def lay_out(pieces: Sequence[bytes], text: bytes) -> list[Span | None] | None:
    """
    Lay tokens over the text that they spell.

    Args:
        pieces (`Sequence[bytes]`):
            What is shown of each token.
        text (`bytes`):
            The whole text.

    Returns:
        `list[Span | None]` or `None`: of each token its place, or `None` where it may have several; `None` where the tokens do
        not spell the text.
    """
    groups = _groups(pieces)
    # Forward, where each group may begin; backward, from where the text's end is reached
    starts: list[set[int]] = [{0}]
    for group in groups:
        starts.append({way.end for start in starts[-1] for way in _ways(group, start, text)})
        if not starts[-1]:
            return None
    reaching = [starts[-1] & {len(text)}]
    for group, before in zip(reversed(groups), reversed(starts[:-1]), strict=True):
        reaching.append(
            {start for start in before if any(way.end in reaching[-1] for way in _ways(group, start, text))}
        )
    reaching.reverse()
    if not reaching[0]:
        return None
    spans: list[Span | None] = []
    for group, begins, ends in zip(groups, reaching[:-1], reaching[1:], strict=True):
        ways = {(start, way) for start in begins for way in _ways(group, start, text) if way.end in ends}
        spans += _spans(group, ways)
    return spans


def _groups(pieces: Sequence[bytes]) -> list[_Group]:
    groups, hidden = [], list[bytes]()
    for piece in pieces:
        if is_hidden(piece):
            hidden.append(piece)
        else:
            groups.append(_Group(len(hidden), b"" in hidden, piece))
            hidden = []
    return [*groups, _Group(len(hidden), b"" in hidden, None)] if hidden else groups


def _ways(group: _Group, start: int, text: bytes) -> Iterator[_Way]:
    shown, hidden = group.shown, group.hidden
    farthest = min(start + hidden * LONGEST_HIDDEN, len(text))
    if shown is None:
        if start + hidden <= len(text) <= farthest:
            yield _Way(len(text), None)
        return
    if text.startswith(shown, start):
        # After hidden tokens, what is shown may be of all of them: a character, once it is whole
        yield _Way(start + len(shown), None if hidden else start)
    if hidden:
        at = text.find(shown, start + hidden)
        while -1 < at <= farthest:
            yield _Way(at + len(shown), at)
            at = text.find(shown, at + 1)


def _spans(group: _Group, ways: set[tuple[int, _Way]]) -> list[Span | None]:
    # Of what nothing is shown, a later token may show the bytes
    if group.has_silent:
        return [None] * group.size
    if len(ways) > 1:
        places = {(way.shown_start, way.end) for _, way in ways}
        (start, end), *others = places
        shown = None if others or start is None else Span(start, end)
        return [*[None] * group.hidden, *[shown] * (group.shown is not None)]
    ((start, way),) = ways
    if group.shown is None:
        return _hidden_spans(group.hidden, start, way.end)
    if way.shown_start is None:
        return [None] * group.size
    return [*_hidden_spans(group.hidden, start, way.shown_start), Span(way.shown_start, way.end)]


def _hidden_spans(count: int, start: int, end: int) -> list[Span | None]:
    if count == 1:
        return [Span(start, end)]
    if count == end - start:  # a byte each
        return [Span(at, at + 1) for at in range(start, end)]
    return [None] * count
