"""How sure a teacher says that it is. Imports nothing heavy."""

import math
import re

from ..errors import LLKDDataError


NUMBER = r"(?P<sign>-?)(?P<value>\d+(?:[.,]\d+)?|[.,]\d+)\s*(?:(?P<percent>%|percent)|(?:/|out of)\s*(?P<whole>\d+))?"
# The scale of a question that is repeated in its answer, as in "Confidence (0-100): 85"
SCALE = re.compile(r"\b0(?:\.0)?\s*%?\s*(?:-|–|to)\s*(?:100|1(?:\.0)?)\b\s*%?")


def verbalised_confidence(text: str, scale: float | None = None) -> float:
    """
    Read the confidence that a teacher states: "85", "85 %", "0.85" and "Confidence: 85/100" are all 0.85.

    Args:
        text (`str`):
            Its answer to the question how sure it is. Numbers after the word "confidence" come before others.
        scale (`float`, *optional*):
            What stands for certainty where a number has no unit, 1 or 100. By default a number above 1 is a
            percentage, and "1" is refused.

    Returns:
        `float`, from 0 to 1.

    Raises:
        [`LLKDDataError`]: no number, different ones, one outside of the scale, or "1" without a scale.
    """
    plain = SCALE.sub(" ", text)
    found = list(re.finditer(r"confidence[^\d\n.,-]{0,30}" + NUMBER, plain, re.IGNORECASE))
    found = found or list(re.finditer(NUMBER, plain, re.IGNORECASE))
    numbers = sorted({_fraction(match, scale, text) for match in found})
    if len(numbers) != 1:
        raise LLKDDataError(
            f"No single confidence in {text!r}: {f'found {numbers}' if numbers else 'no number'}. Ask the teacher for "
            "one number from 0 to 100 and nothing else, or drop the row."
        )
    if not 0.0 <= numbers[0] <= 1.0:
        raise LLKDDataError(
            f"The confidence in {text!r} is {numbers[0]}, outside of 0 to 1. Pass `scale`, or drop it."
        )
    return numbers[0]


def _fraction(match: re.Match, scale: float | None, text: str) -> float:
    digits = match["value"].replace(",", ".")
    value = float(match["sign"] + digits)
    if match["percent"]:
        return value / 100
    if match["whole"]:
        return value / float(match["whole"]) if float(match["whole"]) else math.inf
    if scale is None and digits == "1":
        raise LLKDDataError(f"{text!r} may be certainty or one percent: pass `scale=1` or `scale=100`.")
    return value / (scale or (1 if value <= 1 else 100))
