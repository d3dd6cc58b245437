"""What a recipe leaves out of a set beside answers that are not whole. All of it is off unless a key says so."""

import re
from typing import Any

from ..errors import RecipeError
from ..evaluation.diversity import distinct_ngrams
from ..preferencekd.overlap import units
from .settings import CollectConfig


REFUSAL, SHORT, LONG, REPETITION, LANGUAGE = "refuses in its text", "short", "long", "repetition", "language"
NEAR_DUPLICATE = "near-duplicate"
OPENING = 300  # characters of an answer that are looked at for a refusal
# How an answer opens that refuses; more of it, and it would be an answer about refusals
CANNOT = r"(?:can(?:'t|not| not)|could(?:n't| not)|won't|will not|am (?:not able|unable) to|'m (?:not able|unable) to|must decline)"
REFUSALS = re.compile(
    "|".join(
        (
            rf"(?:(?:i'm|i am|we're|we are) (?:\w+ )?sorry|sorry|i apologi[sz]e|unfortunately|regrettably)\W+(?:but )?i ?{CANNOT}",
            rf"i ?{CANNOT} (?:to )?(?:help|assist|provide|fulfil|comply|answer|do that|create|write|generate|discuss|support|engage|share)",
            rf"as an? (?:ai|artificial intelligence|(?:large )?language model)\b.{{0,80}}?\bi ?(?:{CANNOT}|do(?:n't| not))",
            r"(?:es )?tut mir leid\W+(?:aber )?.{0,20}?\b(?:kann|darf|werde)\b.{0,60}?\bnicht\b",
            r"(?:leider )?(?:ich )?kann ich .{0,40}?\bnicht (?:helfen|beantworten|bereitstellen|unterstützen)",
            r"(?:je suis )?désolée?\W+(?:mais )?je ne (?:peux|suis|pourrai)",
            r"je ne peux pas (?:vous |t')?(?:aider|fournir|répondre|créer)",
            r"lo siento\W+(?:pero )?no (?:puedo|podré)",
            r"no puedo (?:ayudar|proporcionar|responder|crear)",
            r"mi dispiace\W+(?:ma )?non posso",
            r"(?:desculpe|sinto muito|lamento)\W+(?:mas )?(?:eu )?não posso",
            r"(?:извините|к сожалению|простите)\W+(?:но )?я не (?:могу|смогу)",
            r"(?:很?抱歉|对不起)[^。]{0,20}(?:无法|不能|不会)",
            r"(?:作为[^。]{0,20})?我(?:无法|不能)(?:提供|协助|帮助|回答|满足)",
            r"(?:申し訳(?:ありません|ございません)が|すみませんが)[^。]{0,60}(?:できません|かねます)",
        )
    )
)
# Letters, in bytes, below which a language cannot be told; and how sure it has to be that it is another
LETTERS_FOR_A_LANGUAGE, SURE_OF_A_LANGUAGE = 20, 0.5
# Units below which answers are alike by themselves, such as "Yes."; and of which a set is made
UNITS_TO_COMPARE, SHINGLE = 10, 3
PERMUTATIONS = 128


class Filters:
    """
    The filters of a recipe. Answers are shown to them in the order of the set.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.

    Raises:
        [`~errors.RecipeError`]: a package is missing, or a language is none.
    """

    def __init__(self, settings: CollectConfig):
        self.settings = settings
        self._identifier = None if settings.languages is None else _language_identifier(settings.languages)
        self._index = None if settings.max_similarity is None else _index(settings.max_similarity)
        self._seen = 0

    def reason(self, text: str) -> str | None:
        """Why an answer is left out, if it is."""
        settings = self.settings
        if not text.strip():
            return None  # a call of a tool
        if settings.leave_out_refusals and is_refusal(text):
            return REFUSAL
        if settings.min_characters is not None and len(text) < settings.min_characters:
            return SHORT
        if settings.max_characters is not None and len(text) > settings.max_characters:
            return LONG
        if settings.max_repetition is not None and repetition(text) > settings.max_repetition:
            return REPETITION
        if self._is_of_another_language(text):
            return LANGUAGE
        return NEAR_DUPLICATE if self._is_near_duplicate(text) else None

    def _is_of_another_language(self, text: str) -> bool:
        letters = "".join(char if char.isalpha() else " " for char in text)
        if self._identifier is None or len("".join(letters.split()).encode(errors="replace")) < LETTERS_FOR_A_LANGUAGE:
            return False
        language, sure = self._identifier.classify(text)
        return language not in (self.settings.languages or ()) and sure >= SURE_OF_A_LANGUAGE

    def _is_near_duplicate(self, text: str) -> bool:
        found = units(text) if self._index is not None else []
        if self._index is None or len(found) < UNITS_TO_COMPARE:
            return False
        shingles = sorted({" ".join(found[at : at + SHINGLE]) for at in range(len(found) - SHINGLE + 1)})
        self._seen += 1
        (is_new,) = self._index.add_pairs([(str(self._seen), shingles)])
        return not is_new


def is_refusal(text: str) -> bool:
    """Whether a text opens as a refusal does, in one of some languages."""
    opening = " ".join(text[:OPENING].casefold().replace("’", "'").split())
    return bool(REFUSALS.match(re.sub(r"^\W+", "", opening)))


def repetition(text: str) -> float:
    """Share of a text's 4-grams of words that were there before; 0 where it has none."""
    distinct = distinct_ngrams([text])
    return 1 - distinct if distinct == distinct else 0.0


def _language_identifier(languages: list[str]) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise _missing("languages", "py3langid") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = next((language for language in languages if language not in identifier.labels), None)
    if unknown is not None:
        raise RecipeError(f"languages: {unknown!r} is none of {', '.join(map(str, identifier.labels))}.")
    return identifier


def _index(max_similarity: float) -> Any:
    try:
        from rensa import RMinHashDeduplicator
    except ImportError:
        raise _missing("max_similarity", "rensa") from None
    return RMinHashDeduplicator(threshold=max_similarity, num_perm=PERMUTATIONS, use_lsh=True)


def _missing(key: str, package: str) -> RecipeError:
    return RecipeError(f'{key}: this needs {package}, which is not installed: pip install "trl-bbkd[filters]".')
