"""What scores a student's samples: a judge takes rows and gives each row's samples their scores."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from ..errors import JudgeError, kind_of
from .overlap import best_overlap, overlap_score


# (prompts, candidates, teacher_answers) -> scores, one number a candidate
JudgeFunction = Callable[[list, list[str], list[str]], Sequence[float]]


class Judged(NamedTuple):
    """
    A row as a judge sees it.

    Parameters:
        prompt (`str` or `list[dict]`):
            The prompt, a text or messages.
        candidates (`list[str]`):
            The student's samples.
        references (`list[str]`):
            The teacher's answers to this prompt, the row's own first.
        prompt_ids (`list[int]`), candidate_ids (`list[list[int]]`), teacher_ids (`list[int]`):
            The same in the student's tokens, of the teacher's answers the row's own.
        answers_ids (`list[list[int]]`):
            All of the teacher's answers to this prompt, as often as rows have them, the row's own first.
    """

    prompt: str | list[dict]
    candidates: list[str]
    references: list[str]
    prompt_ids: list[int]
    candidate_ids: list[list[int]]
    teacher_ids: list[int]
    answers_ids: Sequence[list[int]] = ()


class Judge(Protocol):
    def __call__(self, rows: list[Judged]) -> list[list[float]]:
        """Of each row the scores of its candidates: the higher, the better."""
        ...


class OverlapJudge:
    """How much of a teacher's answer a sample has; where several answer the prompt, of the one that it is nearest to."""

    def __init__(self, metric: str):
        self.score = overlap_score(metric)

    def __call__(self, rows: list[Judged]) -> list[list[float]]:
        return [best_overlap(self.score, row.candidates, row.references) for row in rows]


class FunctionJudge:
    """
    Calls a function with flat lists, a candidate each: its prompt, its text and the teacher's answer.

    Raises:
        JudgeError: it does not give one number a candidate.
    """

    def __init__(self, function: JudgeFunction):
        self.function = function

    def __call__(self, rows: list[Judged]) -> list[list[float]]:
        flat = [(row.prompt, text, row.references[0]) for row in rows for text in row.candidates]
        prompts, candidates, teacher_answers = map(list, zip(*flat, strict=True))
        found = self.function(prompts, candidates, teacher_answers)
        scores = iter(checked_scores(found, len(candidates)))
        return [[next(scores) for _ in row.candidates] for row in rows]


def checked_scores(found, candidates: int) -> list[float]:
    """
    Args:
        found (`Any`):
            What a function gave.
        candidates (`int`):
            How many it was given.

    Raises:
        JudgeError: these are not as many numbers.
    """
    if isinstance(found, torch.Tensor):
        found = found.tolist()
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise JudgeError(f"The judge returned {kind_of(found)}: it has to return a list with one number a candidate.")
    if len(found) != candidates:
        raise JudgeError(f"The judge returned {len(found)} scores for {candidates} candidates: return one each.")
    scores = []
    for number, value in enumerate(found):
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = float("nan")
        if score != score:
            raise JudgeError(f"The judge's score of candidate {number} is {value!r}: return a number for each.")
        scores.append(score)
    return scores
