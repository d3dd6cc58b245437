"""How sure a teacher is of an answer: by its other answers, by its log-probabilities, or by what it says."""

import math
from collections import Counter
from collections.abc import Sequence

from ..errors import LLKDDataError
from ..llkd.answers import plain
from ..selection.verbalised import verbalised_confidence
from .replies import Choice
from .settings import AGREEMENT, MEAN_LOGPROB, VERBALISED
from .spelling import Speller
from .teacher_tokens import place


ASKED = "\n\nAfter your answer, say on a line of its own how sure you are that it is right: `Confidence: N`, with N from 0 to 100."


def confidences(kind: str, choices: Sequence[Choice], speller: Speller | None = None) -> list[float | None]:
    """
    Of each answer to one prompt, how sure the teacher is; `None` where nothing says it.

    Args:
        kind (`str`):
            `"agreement"`, `"mean_logprob"` or `"verbalised"`.
        choices (`Sequence[Choice]`):
            All answers to the prompt. One that is not whole agrees with none.
        speller ([`~collect.spelling.Speller`], *optional*):
            What numbers of tokens are read with.
    """
    if kind == AGREEMENT:
        texts = [plain(choice.content) if choice.reason is None else None for choice in choices]
        counts = Counter(texts)
        return [None if text is None else counts[text] / len(texts) for text in texts]
    if kind == MEAN_LOGPROB:
        return [_of_tokens(choice, speller) for choice in choices]
    assert kind == VERBALISED
    return [split_confidence(choice.content)[1] for choice in choices]


def _of_tokens(choice: Choice, speller: Speller | None) -> float | None:
    """exp(mean_t log p_t) over the tokens of the answer's text: those of a thought, and its end, are none of it."""
    placed = place(choice, speller)
    logprobs = [] if placed is None else [token.shown.logprob for token in placed.tokens]
    if not logprobs or None in logprobs:
        return None
    return min(1.0, math.exp(math.fsum(logprobs) / len(logprobs)))  # type: ignore[arg-type]


def split_confidence(text: str) -> tuple[str, float | None]:
    """An answer without its last line, where that says how sure the teacher is, and what it says."""
    before, _, line = text.rstrip().rpartition("\n")
    if "confidence" not in line.casefold():
        return text, None
    try:
        found = verbalised_confidence(line.replace("*", "").replace("`", ""), scale=None if "." in line else 100)
    except LLKDDataError:
        return text, None
    return before.rstrip(), found
