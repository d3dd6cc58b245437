"""The example of a card: an input of the teacher's rows that strangers may read."""

import itertools
import re
from collections.abc import Iterable

from ..data.messages import plain_messages
from ..errors import TeacherDataError
from ..reports.redaction import public_text


ROWS_LOOKED_AT = 200
MOST_CHARACTERS = 400
# Rather too much than too little: there are other rows
SECRET_LOOKS = re.compile(
    r"""
    \b(?:pass(?:word|wd|phrase|code)|secret|credentials?|token|login|confidential|iban|ssn|social\ security|credit\ card)s?\b
    | \b(?:api|private|access|secret|license)[\ _-]?key\b
    | \b(?:sk|pk|rk|hf|ghp|gho|github_pat|glpat|xox[abp])[-_][-_A-Za-z0-9]{8,}
    | \b(?:AKIA|AIza)[-_A-Za-z0-9]{8,}
    | -----BEGIN
    | [\w.+-]+@[\w-]+\.\w+         # an e-mail address
    | (?:\d[\ ().-]{0,2}){9,}       # a number of a telephone, a card or an account
    | \b(?=\w*\d)(?=\w*[A-Za-z])\w{20,}
    """,
    re.IGNORECASE | re.VERBOSE,
)


def looks_secret(text: str) -> bool:
    """Whether `text` may hold a secret, a person's number or address, or a path of this machine."""
    return SECRET_LOOKS.search(text) is not None or public_text(text) != text


def example_input(rows: Iterable[dict] | None, column: str = "prompt") -> str | list[dict] | None:
    """
    The first input that suits a card: short, printable, without tools, and nothing in it that looks secret.

    Args:
        rows (`Iterable[dict]`, *optional*):
            Teacher rows, held-out ones at best.
        column (`str`, *optional*, defaults to `"prompt"`):
            Column of the input, a text or messages.

    Returns:
        `str` or `list[dict]`: a text, or messages with `role` and `content`; `None` if no row suits.
    """
    for row in itertools.islice(rows or (), ROWS_LOOKED_AT):
        found = row.get(column)
        messages = [{"role": "user", "content": found}] if isinstance(found, str) else _messages(row, found)
        text = "\n".join(message["content"] for message in messages or ())
        is_readable = all(letter.isprintable() or letter in "\n\t" for letter in text)
        if text.strip() and len(text) <= MOST_CHARACTERS and is_readable and not looks_secret(text):
            return found if isinstance(found, str) else messages
    return None


def _messages(row: dict, prompt) -> list[dict] | None:
    """The messages of a prompt that consists of nothing else."""
    try:
        messages = plain_messages(prompt or [], "An example")
    except TeacherDataError:
        return None
    is_plain = all(message.keys() == {"role", "content"} for message in messages)
    return messages if is_plain and not row.get("tools") and not row.get("chat_template_kwargs") else None
