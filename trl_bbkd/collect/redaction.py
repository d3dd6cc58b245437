"""What of an endpoint's words may be written down: no secret, whoever's."""

import json
import os
import re
from urllib.parse import quote

from ..reports.redaction import HUB_TOKEN, SECRET, SHORTEST_SECRET


# Keys by their form, also those that an endpoint quotes and that are not ours
LOOKS_LIKE_A_KEY = re.compile(r"\b(?:sk|pk|rk|gsk|xai|key)[-_][\w-]{8,}|(?i:\bbearer\s+)[\w.~+/=-]{8,}")


class Redactor:
    """
    Replaces secrets by `***`.

    Args:
        key (`str`, *optional*):
            The endpoint's key.
    """

    def __init__(self, key: str | None):
        named = [value for name, value in os.environ.items() if SECRET.search(name)]
        self._ours = _any_of([key or ""])
        self._all = _any_of([key or "", *named])

    def in_answers(self, text: str) -> str:
        """An answer without the key, should the endpoint have put it there; else an answer stays as it is."""
        return self._ours.sub("***", text) if self._ours else text

    def in_messages(self, text: str) -> str:
        """A message of the endpoint's without any secret of this process, and without what looks like one."""
        text = self._all.sub("***", text) if self._all else text
        return LOOKS_LIKE_A_KEY.sub("***", HUB_TOKEN.sub("***", text))


def _any_of(secrets: list[str]) -> re.Pattern | None:
    """Each secret in each way it may be spelled. What is shorter than a secret is a word."""
    spelled = {
        form
        for secret in map(str.strip, secrets)
        if len(secret) >= SHORTEST_SECRET
        for form in (
            secret,
            quote(secret, safe=""),
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
        )
    }
    return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))) if spelled else None
