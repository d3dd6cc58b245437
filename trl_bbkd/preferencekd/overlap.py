"""How much of a reference another text has. No model: texts alone."""

import functools
import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence


# Scripts that leave no space between words: each of their characters counts by itself
UNSPACED_SCRIPTS = ("BOPOMOFO", "CJK", "HIRAGANA", "KATAKANA", "KHMER", "LAO", "MYANMAR", "THAI", "TIBETAN")


@functools.cache
def _stands_alone(character: str) -> bool:
    in_word = unicodedata.category(character)[0] in "LMN"
    return not in_word or unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS)


def units(text: str) -> list[str]:
    """
    What a text is made of, in any script: words and numbers, case aside; each character of a script without spaces; each
    sign, such as one of arithmetic, a bracket or an emoji.

    Args:
        text (`str`):
            The text.

    Returns:
        `list[str]`: its units, in their order.
    """
    found: list[str] = []
    for part in unicodedata.normalize("NFKC", text).casefold().split():
        for alone, group in itertools.groupby(part, _stands_alone):
            characters = list(group)
            found += characters if alone else ["".join(characters)]
    return found


def longest_common_subsequence(one: Sequence, other: Sequence) -> int:
    """
    Length of the longest sequence that both have, in its order, with anything between.

    Args:
        one, other (`Sequence`):
            Of what can be compared and hashed.
    """
    # A bit for each place of `one`, all of them handled at once (H. Hyyrö, 2004, "Bit-parallel LCS-length computation revisited")
    places: dict = defaultdict(int)
    for place, unit in enumerate(one):
        places[unit] |= 1 << place
    all_places = (1 << len(one)) - 1
    unmatched = all_places
    for unit in other:
        matches = unmatched & places.get(unit, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & all_places
    return len(one) - unmatched.bit_count()


def rouge_l(candidate: str, reference: str) -> float:
    """
    ROUGE-L (C.-Y. Lin, 2004), the F-measure of the longest common subsequence of [`units`]:

        P = LCS / |candidate|,   R = LCS / |reference|,   F = 2 P R / (P + R) = 2 LCS / (|candidate| + |reference|)

    Args:
        candidate, reference (`str`):
            The texts.

    Returns:
        `float`: from 0 to 1. 0 where one of them has no unit.
    """
    one, other = units(candidate), units(reference)
    return 2 * longest_common_subsequence(one, other) / max(len(one) + len(other), 1)


def overlap_score(metric: str) -> Callable[[str, str], float]:
    """
    The measure of a name.

    Args:
        metric (`str`):
            `"rouge_l"`, `"bleu"` or `"chrf"`, the last two of sacrebleu, of single sentences; of BLEU the effective order.

    Returns:
        `Callable[[str, str], float]`: of a candidate and a reference, from 0 to 1.

    Raises:
        ImportError: sacrebleu is needed and not installed.
    """
    if metric == "rouge_l":
        return rouge_l
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ImportError(
            f"overlap_metric={metric!r} needs sacrebleu: pip install 'trl-bbkd[overlap]'. Or set it to 'rouge_l'."
        ) from None
    measure = BLEU(effective_order=True) if metric == "bleu" else CHRF()
    return lambda candidate, reference: measure.sentence_score(candidate, [reference]).score / 100


def best_overlap(
    score: Callable[[str, str], float], candidates: Sequence[str], references: Sequence[str]
) -> list[float]:
    """
    Of each candidate, its overlap with the reference that it is nearest to.

    Args:
        score (`Callable[[str, str], float]`):
            As [`overlap_score`] gives it.
        candidates, references (`Sequence[str]`):
            The texts.
    """
    return [max(score(candidate, reference) for reference in references) for candidate in candidates]
