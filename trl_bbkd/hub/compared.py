"""A card's section on the student beside others: where it stands, and how long it holds."""

import logging
import re
from pathlib import Path

from ..host.model_paths import checkpoint_fingerprint
from ..reports.comparison import Comparison, equal_diversity_explained
from ..reports.markdown import code, escape, table
from ..reports.redaction import public_text
from ..reports.verdicts import verdicts


logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
CARD_STUDENT = re.compile(r'^student = (".*")$', re.MULTILINE)
BEGIN, END = "<!-- trl-bbkd compare, of weights {weights} -->", "<!-- end of trl-bbkd compare -->"
SECTION = re.compile(BEGIN.format(weights=r"(\w+)") + f".*?{END}", re.DOTALL)
FIRST_LINE = re.compile(BEGIN.format(weights=r"\w+"))
STANDS_BEFORE = "## How to use it"


def compared_section(comparison: Comparison, repositories: list[str], folder: str | Path) -> str:
    """
    The section in Markdown, fit for strangers: tables and settings. Answers are left out, since the teacher's rows may be nobody's
    to read.

    Args:
        comparison ([`~reports.comparison.Comparison`]):
            The runs.
        repositories (`list[str]`):
            What each is called.
        folder (`str` or `Path`):
            Folder of the run whose card it is for: the section holds as long as the weights there stay.
    """
    names = [escape(name) for name in repositories]
    links = " · ".join(f"[{name}](https://huggingface.co/{name})" for name in repositories)
    lines = ["## Compared", "", f"Students of the same teacher, side by side: {links}.", ""]
    lines += [f"* {sentence}" for sentence in verdicts(comparison.found, names)]
    lines += ["", *table(["", *names], comparison.table()), "", comparison.explanation, ""]
    lines += [*table([f"less {names[0]}", *names[1:]], comparison.differences()), ""]
    if comparison.judged:
        lines += [equal_diversity_explained(comparison.judged), ""]
    if settings := comparison.settings():
        rows = [[escape(name), *map(code, values)] for name, *values in settings]
        lines += ["Settings that differ:", "", *table(["", *names], rows), ""]
    return "\n".join([BEGIN.format(weights=_weights(folder)), public_text("\n".join(lines)), END])


def with_section(card: str, section: str) -> str:
    """A card with the section in the place of the one that it has, or before its example, or at its end."""
    if SECTION.search(card):
        return SECTION.sub(lambda _: section, card, count=1)
    before, heading, after = card.partition(f"\n{STANDS_BEFORE}\n")
    return f"{before.rstrip()}\n\n{section}\n{heading}{after}"


def is_torn(card: str) -> bool:
    """Whether of a section in the card not both ends are left: what to replace is not known."""
    return not len(FIRST_LINE.findall(card)) == card.count(END) == len(SECTION.findall(card))


def with_comparison_of(folder: Path, card: str) -> str:
    """A new card with the section of the one in `folder`, if the weights there are still those that were compared."""
    path = folder / CARD_NAME
    found = SECTION.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is None:
        return card
    if _holds(found, folder):
        return with_section(card, found[0])
    logger.warning(
        f"The card in {folder} loses its comparison with other runs, which was of other weights. `trl-bbkd compare RUN RUN --push` "
        "writes it anew."
    )
    return card


def without_stale_comparison(card: str, folder: Path) -> str:
    """A card without a section on other weights than those in `folder`."""
    found = SECTION.search(card)
    return card if found is None or _holds(found, folder) else SECTION.sub("", card, count=1)


def _holds(section: re.Match, folder: Path) -> bool:
    return section[1] == _weights(folder)


def _weights(folder: str | Path) -> str:
    # Of an adapter without its base, which may be named by a path
    return checkpoint_fingerprint(str(folder)).partition("+")[0]
