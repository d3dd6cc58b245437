"""Which of a prompt's answers is preferred over which, by their scores."""

import itertools
from collections.abc import Sequence


def preferred_pairs(
    scores: Sequence[float],
    lengths: Sequence[int],
    *,
    every: bool = False,
    margin: float = 0.0,
    max_length_ratio: float | None = None,
) -> list[tuple[int, int]]:
    """
    Pairs of a prompt's answers: `(better, worse)`, `s_better - s_worse > margin`.

    Args:
        scores (`Sequence[float]`):
            Score of each answer.
        lengths (`Sequence[int]`):
            Length of each answer, in tokens.
        every (`bool`, *optional*, defaults to `False`):
            All such pairs, instead of the one whose scores are furthest apart: the best answer over the worst.
        margin (`float`, *optional*, defaults to `0.0`):
            Difference of the scores that a pair exceeds.
        max_length_ratio (`float`, *optional*):
            Of a pair, the longer answer is at most so many times as long as the shorter one. An empty answer is paired with
            empty ones only.

    Returns:
        `list[tuple[int, int]]`: numbers of answers. Of pairs that are as far apart, the first.
    """

    def match(one: int, other: int) -> bool:
        shorter, longer = sorted((lengths[one], lengths[other]))
        return max_length_ratio is None or longer <= max_length_ratio * shorter

    pairs = [
        (better, worse)
        for better, worse in itertools.permutations(range(len(scores)), 2)
        if scores[better] - scores[worse] > margin and match(better, worse)
    ]
    if every or not pairs:
        return pairs
    return [max(pairs, key=lambda pair: scores[pair[0]] - scores[pair[1]])]


def win_rates(first_wins: Sequence[Sequence[float]]) -> list[float]:
    """
    Score of each of N answers that were compared two at a time, in both orders (arXiv 2602.16802):

        P(i > j) = ½ [ p(first | i, j) + 1 - p(first | j, i) ]
        s_i = 1 / (N - 1) · Σ_{j ≠ i} P(i > j)

    A judge that prefers whatever it is shown first gives every answer ½.

    Args:
        first_wins (`Sequence[Sequence[float]]` of shape `(N, N)`):
            `p(first | i, j)`: probability with which the judge prefers answer `i`, shown first, over `j`, shown second.

    Returns:
        `list[float]`: the scores, of mean ½.
    """
    answers = range(len(first_wins))
    return [
        sum((first_wins[i][j] + 1 - first_wins[j][i]) / 2 for j in answers if j != i) / (len(answers) - 1)
        for i in answers
    ]
