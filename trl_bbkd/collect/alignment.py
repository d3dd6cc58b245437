"""
An endpoint's log-probabilities as those of a named tokenizer's tokens: the column `top_logprobs`.

A position has numbers only where the teacher's token and the student's are the same bytes of the answer, and an alternative
only where it is one token of the named tokenizer. Nothing else is written: what is not proven is missing.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from ..bayeskd.top_logprobs import ROUNDING
from .layout import Span, is_hidden
from .replies import Choice
from .spelling import Speller
from .teacher_tokens import ID_PREFIX, Placed, PlacedTokens, Shown, place, shows_numbers


# Two tokenizers have letters and syllables in common. Of so many different tokens, each of so many bytes, they have not
TELLING_TOKENS, TELLING_BYTES = 8, 3
# Of tokens that reach into a text from before it, and of a space alone that a tokenizer opens a text with
OUTSIDE, OPENING = Span(-2, -2), Span(-1, 0)


class Aligner:
    """
    Aligns answers of one teacher.

    Args:
        speller ([`~collect.spelling.Speller`]):
            The named tokenizer.
    """

    def __init__(self, speller: Speller):
        self.speller = speller
        self._proven: set[int | None] = set()
        self._reads_numbers = False

    def look(self, choice: Choice) -> None:
        """See whether the teacher's numbers of tokens are the named tokenizer's. All answers are looked at before one is aligned."""
        if self._reads_numbers or not shows_numbers(choice):
            return
        if (found := place(choice, self.speller)) is not None and found.by_id:
            self._proven.update(token.shown.id for token in found.tokens)
            self._reads_numbers = self._tell(self._proven)

    def _tell(self, tokens: Collection[int | None]) -> bool:
        """Whether a tokenizer that has these tokens is the named one."""
        long = {id_ for id_ in tokens if id_ is not None and len(self.speller.piece(id_) or b"") >= TELLING_BYTES}
        return len(long) >= TELLING_TOKENS

    def align(self, choice: Choice, answer: Sequence[int]) -> dict[str, Any] | None:
        """
        Log-probabilities at the tokens of an answer.

        Args:
            choice ([`~collect.replies.Choice`]):
                The answer, as the endpoint gave it.
            answer (`Sequence[int]`):
                The same answer in the student's tokens, as it is trained on, with the token that ends it.

        Returns:
            `dict` or `None`: `ids` and `logprobs`, a list of both for each of `answer`, empty where nothing is proven; `exact`,
            whether all tokens of the text have some; and `tokens`, which is `answer`. `None` where no position has any.
        """
        teacher = place(choice, self.speller)
        spans = self._spans(answer, choice.content)
        if teacher is None or spans is None:
            return None
        length = len(choice.content.encode())
        of_text = [i for i, span in enumerate(spans) if span.start < length and (span.end > 0 or span == OUTSIDE)]
        if spans[:1] == [OPENING]:
            of_text.insert(0, 0)
        matched = self._matched(teacher, spans, answer)
        is_same = all(i in matched for i in of_text) and self._tell([answer[i] for i in of_text])
        if self.speller.opens and not teacher.by_id and not is_same:
            # Whether the teacher's first token has the space that opens a text, which is not shown, nothing says
            matched = {i: token for i, token in matched.items() if token is not teacher.tokens[0] or _opens(token)}
        found: list[dict[int, float]] = [{} for _ in answer]
        for i, token in matched.items():
            found[i] = _known(answer[i], token, self._alternatives(teacher, token, is_same))
        exact = all(i in matched and found[i] for i in of_text)
        if teacher.end is not None and self._ends(teacher, answer[-1]):
            found[-1] = _known(answer[-1], teacher.end, self._alternatives(teacher, teacher.end, is_same))
        if not any(found):
            return None
        ids, logprobs = [list(one) for one in found], [list(one.values()) for one in found]
        return {"ids": ids, "logprobs": logprobs, "exact": exact, "tokens": list(answer)}

    def _spans(self, answer: Sequence[int], content: str) -> list[Span] | None:
        """Places of the student's tokens in an answer's text, which they are proven to spell. What a template adds lies outside."""
        is_ended = bool(answer) and answer[-1] in self.speller.special
        spelled, text = self.speller.spell(answer[: len(answer) - is_ended]), content.encode(errors="replace")
        at = -1 if spelled is None else spelled.rfind(text)
        if spelled is None or at < 0 or spelled[at + len(text) :].strip():
            return None
        spans, start = [], -at
        for token in answer[: len(answer) - is_ended]:
            spans.append(Span(start, start := start + len(self.speller.piece(token) or b"")))
        # A token that reaches into the text from before it is none of the teacher's, but for a space
        return [
            OUTSIDE if span.start < 0 < span.end and spelled[at + span.start : at] != b" " else span for span in spans
        ]

    def _matched(self, teacher: PlacedTokens, spans: list[Span], answer: Sequence[int]) -> dict[int, Placed]:
        """Of the student's tokens, those that the teacher's are too."""
        by_span = {
            token.span: token
            for token in teacher.tokens
            if token.span is not None and token.span.end > token.span.start
        }
        # The space with which a tokenizer opens a text, which an endpoint need not show
        first = teacher.tokens[0].span
        opening = {0: first} if spans and first and spans[0] == Span(-1, first.end) else {}
        matched = {}
        for i, span in enumerate(spans):
            token = by_span.get(span) or by_span.get(opening.get(i, span))
            if token is None:
                continue
            id_ = token.shown.id if teacher.by_id else self.speller.token(self.speller.piece(answer[i]) or b"")
            if id_ == answer[i]:
                matched[i] = token
        return matched

    def _ends(self, teacher: PlacedTokens, end_id: int) -> bool:
        assert teacher.end is not None
        shown = teacher.end.shown
        return end_id in self.speller.special and end_id == (
            shown.id if teacher.by_id else self.speller.names.get(shown.text)
        )

    def _alternatives(self, teacher: PlacedTokens, token: Placed, is_same: bool) -> list[tuple[int, float]]:
        """Those of which it is known which token they are."""
        is_bare = token is teacher.tokens[0] and not _opens(token)
        if is_bare and not teacher.by_id and (self.speller.opens or not is_same):
            return []  # with or without the space that opens a text: two tokens, shown alike
        numbers = [one.logprob for one in token.alternatives if one.logprob is not None]
        # Whoever lists something else for the chosen token shows others as something else too
        is_listed = any(one.text == token.shown.text for one in token.alternatives if one.logprob is not None)
        if not is_listed and (token.shown.logprob or 0.0) > min(numbers, default=0.0):
            return []
        found = [(self._token(teacher, token, one, is_same), one.logprob) for one in token.alternatives]
        return [(id_, logprob) for id_, logprob in found if id_ is not None and logprob is not None]

    def _token(self, teacher: PlacedTokens, token: Placed, other: Shown, is_same: bool) -> int | None:
        speller = self.speller
        if other.text.startswith(ID_PREFIX):
            is_known = other.id in speller.special or (other.id is not None and speller.piece(other.id) is not None)
            return other.id if is_known and teacher.by_id and self._reads_numbers else None
        if not token.is_whole or is_hidden(other.piece):
            return None
        if (id_ := speller.token(other.piece)) is not None:
            return id_
        # Its name says which special token it is, if the teacher's tokenizer is this one
        return speller.names.get(other.text) if is_same else None


def _opens(token: Placed) -> bool:
    """Whether a text's first token is shown with a space before the text."""
    return token.span is not None and token.span.start < 0


def _known(chosen: int, token: Placed, alternatives: list[tuple[int, float]]) -> dict[int, float]:
    """Log-probabilities by token at one position, the chosen one first; nothing where they are none."""
    if token.shown.logprob is None:
        return {}
    known = {chosen: token.shown.logprob}
    counts = Counter(id_ for id_, _ in alternatives)
    # What two of them are, one is not
    known |= {id_: logprob for id_, logprob in alternatives if id_ != chosen and counts[id_] == 1}
    total = math.fsum(math.exp(min(logprob, 0.0)) for logprob in known.values())
    return known if total <= 1 + ROUNDING else {}
