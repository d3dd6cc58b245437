"""A card's section on the student beside others: where it stands, and how long it holds. Imports little, as each push needs it."""

import logging
import re
from pathlib import Path

from ..host.model_paths import weights_fingerprint


logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
CARD_STUDENT = re.compile(r'^student = (".*")$', re.MULTILINE)
BEGIN, END = "<!-- trl-bbkd compare, of weights {weights} -->", "<!-- end of trl-bbkd compare -->"
SECTION = re.compile(BEGIN.format(weights=r"(\w+)") + f".*?{END}", re.DOTALL)
FIRST_LINE = re.compile(BEGIN.format(weights=r"\w+"))
STANDS_BEFORE = "## How to use it"


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
    return section[1] == weights_of(folder)


def weights_of(folder: str | Path) -> str:
    # Of an adapter without its base, which need not be here
    return weights_fingerprint(Path(folder))
