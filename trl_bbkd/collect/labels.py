"""Labels of texts: how a teacher is asked for one, and what its answers say of each."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..bayeskd.top_logprobs import ROUNDING
from ..llkd.answers import label_matcher
from .confidence import ASKED, split_confidence
from .replies import Choice
from .settings import LETTERS, VERBALISED, CollectConfig
from .teacher_tokens import Placed, place


BY_LETTER = "{text}\n\nWhich of these labels does the text have?\n{labels}\n\nAnswer with the letter alone."
BY_NAME = "{text}\n\nWhich of these labels does the text have: {labels}?\n\nAnswer with the label alone."


class Labelled(NamedTuple):
    """
    What a teacher says of a text.

    Attributes:
        label (`int`): the label's place among the recipe's.
        probs (`list[float]`): the probability of each of them.
    """

    label: int
    probs: list[float]

    @property
    def confidence(self) -> float:
        return self.probs[self.label]


class Labeller:
    """
    Asks for labels, and reads them.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            A recipe with `labels`.
    """

    def __init__(self, settings: CollectConfig):
        assert settings.labels is not None
        self.names, self._uses_logprobs = settings.labels, settings.logprobs
        self._is_verbalised = settings.teacher_confidence == VERBALISED
        self._letters = LETTERS[: len(self.names)] if settings.label_answers == "letters" else ""
        forms = [self.names]
        if self._letters:
            lettered = [f"{letter}. {name}" for letter, name in zip(self._letters, self.names, strict=True)]
            forms, listed = [list(self._letters), lettered, self.names], "\n".join(lettered)
        else:
            listed = ", ".join(self.names)
        prompt = settings.label_prompt or (BY_LETTER if self._letters else BY_NAME)
        self._prompt = prompt.replace("{labels}", listed)
        self._matchers: list[Callable[[str | None], int | None]] = [label_matcher(form) for form in forms]

    def question(self, text: str) -> str:
        """What is asked of a text."""
        return self._prompt.replace("{text}", text) + ASKED * self._is_verbalised

    def label(self, choice: Choice) -> int | None:
        """Which label an answer is, if it is one."""
        text = split_confidence(choice.content)[0] if self._is_verbalised else choice.content
        return next((found for match in self._matchers if (found := match(text)) is not None), None)

    def read(self, choices: Sequence[Choice]) -> Labelled | None:
        """
        The label and the distribution that all whole answers to a text give, or nothing.

        By log-probabilities, the label is the likeliest one. Of several answers, one that is no label speaks for none of them:
        it is shared out. What a teacher says of its answer is that answer's probability; the others share the rest.
        """
        found = [self.label(choice) for choice in choices]
        first = next((label for label in found if label is not None), None)
        if first is None:
            return None
        # By log-probabilities and by what a teacher says, there is one answer
        if self._uses_logprobs:
            shares = self._shares(choices[0], first)
        elif self._is_verbalised:
            return self._stated(choices[0], first)
        else:
            classes = range(len(self.names))
            shares = [found.count(label) + found.count(None) / len(classes) for label in classes]
        if shares is None or sum(shares) <= 0:
            return None
        return Labelled(shares.index(max(shares)), [share / sum(shares) for share in shares])

    def _shares(self, choice: Choice, label: int) -> list[float] | None:
        """Probabilities of the letters where the answer has its own."""
        placed = place(choice)
        token = next((one for one in placed.tokens if _letter(one.shown.text)), None) if placed else None
        if token is None or _letter(token.shown.text) != self._letters[label]:
            return None
        return _by_letter(token, self._letters)

    def _stated(self, choice: Choice, label: int) -> Labelled | None:
        stated = split_confidence(choice.content)[1]
        if stated is None:
            return None
        rest = (1 - stated) / (len(self.names) - 1)
        return Labelled(label, [stated if index == label else rest for index in range(len(self.names))])


def _letter(text: str) -> str:
    """A token without what stands around its letters."""
    return "".join(char for char in text if char.isalnum())


def _by_letter(token: Placed, letters: str) -> list[float] | None:
    listed = token.alternatives
    if not any(one.text == token.shown.text for one in listed):
        listed = [token.shown, *listed]
    probs = [(_letter(one.text), math.exp(one.logprob)) for one in listed if one.logprob is not None]
    if math.fsum(prob for _, prob in probs) > 1 + ROUNDING:
        return None
    return [math.fsum(prob for text, prob in probs if text == letter) for letter in letters]
