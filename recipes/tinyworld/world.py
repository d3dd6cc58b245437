"""
A small world in which a program plays the black-box teacher.

A prompt states who has how many of what and where they go; an answer tells two events, keeps the running count (0 to
9) and closes by repeating the name and the count:

    prompt      tom takes 4 pears to the market .
    completion  he buys 2 . now he has 6 pears . after selling 3 , he has 3 . tom goes home with 3 pears .

The teacher is defined once, by [`clauses`]: from a state of the story, the clauses that may come next with their
probabilities. The sampler, the judge and the exact next-token distribution are all derived from it, so they cannot
disagree. Words are separated by single spaces.
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple


END = "</s>"  # ends an answer; never part of its text
MAX_COUNT = 9
MAX_AMOUNT = 3  # gained or lost in one event
EVENTS = 2

HE = ("tom", "sam", "ben", "max", "leo", "dan", "bob", "jim")
SHE = ("ann", "eve", "mia", "sue", "kim", "zoe", "amy", "liz")
NAMES = HE + SHE
THINGS = {
    "pear": "pears",
    "fig": "figs",
    "nut": "nuts",
    "egg": "eggs",
    "cake": "cakes",
    "rose": "roses",
    "shell": "shells",
    "coin": "coins",
    "book": "books",
    "key": "keys",
}


class Verb(NamedTuple):
    present: str
    gerund: str
    sign: int


PLACES = {
    "market": (Verb("buys", "buying", 1), Verb("wins", "winning", 1), Verb("sells", "selling", -1), Verb("trades", "trading", -1)),
    "forest": (Verb("finds", "finding", 1), Verb("spots", "spotting", 1), Verb("loses", "losing", -1), Verb("drops", "dropping", -1)),
    "party": (Verb("gets", "getting", 1), Verb("borrows", "borrowing", 1), Verb("gives", "giving", -1), Verb("lends", "lending", -1)),
    "river": (Verb("collects", "collecting", 1), Verb("gathers", "gathering", 1), Verb("throws", "throwing", -1), Verb("wastes", "wasting", -1)),
}  # fmt: skip


class Story(NamedTuple):
    """Where an answer stands after some whole clauses."""

    name: str
    thing: str
    place: str
    count: int
    untold: tuple[Verb, ...]  # a verb is told once
    events: int = 0
    stated: bool = True  # the current count has been said
    closed: bool = False


def amount(count: int, thing: str) -> tuple[str, str]:
    return str(count), thing if count == 1 else THINGS[thing]


def make_prompt(rng: random.Random) -> str:
    name, place = rng.choice(NAMES), rng.choice(list(PLACES))
    count, noun = amount(rng.randint(1, MAX_COUNT - 1), rng.choice(list(THINGS)))
    return f"{name} takes {count} {noun} to the {place} ."


def parse_prompt(prompt: str) -> Story:
    """The story a prompt opens. Raises `ValueError` if the prompt is not one of this world."""
    words = prompt.split()
    if len(words) == 8 and words[0] in NAMES and words[6] in PLACES and words[2].isdigit():
        count = int(words[2])
        for thing in THINGS:
            if words == f"{words[0]} takes {' '.join(amount(count, thing))} to the {words[6]} .".split():
                return Story(words[0], thing, words[6], count, PLACES[words[6]])
    raise ValueError(f"not a prompt of this world: {prompt!r}; expected e.g. 'tom takes 4 pears to the market .'")


def clauses(story: Story, verbs: Sequence[Verb] | None = None) -> Iterator[tuple[float, tuple[str, ...], Story]]:
    """
    Weight, words and resulting story of each clause the teacher may tell next; a weight is relative to the others. Where
    `verbs` are named, an event is one of theirs.
    """
    pronoun = "he" if story.name in HE else "she"
    count, noun = amount(story.count, story.thing)
    if not story.stated:
        for words in (
            ("now", pronoun, "has", count, noun, "."),
            ("that", "makes", count, noun, "."),
            ("so", pronoun, "has", count, "."),
        ):
            yield 1.0, words, story._replace(stated=True)
    elif story.events == EVENTS:
        for words in (
            (story.name, "goes", "home", "with", count, noun, "."),
            ("in", "the", "end", story.name, "has", count, "."),
            (story.name, "keeps", count, noun, "."),
        ):
            yield 1.0, words, story._replace(closed=True)
    else:
        for verb in story.untold if verbs is None else verbs:
            untold = tuple(other for other in story.untold if other != verb)
            for k in range(1, min(MAX_AMOUNT, MAX_COUNT - story.count if verb.sign > 0 else story.count) + 1):
                after = (story.name, story.thing, story.place, story.count + verb.sign * k, untold, story.events + 1)
                # `_replace` would take most of a judge's time
                told = Story(*after)
                n, left = str(k), str(told.count)
                yield 2.0, (pronoun, verb.present, n, "."), Story(*after, stated=False)
                yield 1.0, ("after", verb.gerund, n, ",", pronoun, "has", left, "."), told
                yield 1.0, ("then", pronoun, verb.present, n, "and", "has", left, "."), told


@lru_cache(maxsize=4096)
def _advance(story: Story) -> list[tuple[float, tuple[str, ...], Story]]:
    """Probability, words and resulting story of each continuation, the end included."""
    if story.closed:
        return [(1.0, (END,), story)]
    options = list(clauses(story))
    total = sum(weight for weight, _, _ in options)
    return [(weight / total, words, after) for weight, words, after in options]


def next_token_distribution(prompt: str, prefix_tokens: Sequence[str]) -> dict[str, float]:
    """
    The teacher's exact distribution over the next word (or [`END`]) after `prefix_tokens` of an answer.

    Empty if the teacher never writes this prefix, or has ended.
    """
    clauses_under_way = _advance(
        parse_prompt(prompt)
    )  # (probability of the prefix so far, words to come, story after)
    for token in prefix_tokens:
        begun = [(p, words[1:], story) for p, words, story in clauses_under_way if words[0] == token]
        clauses_under_way = []
        for p, words, story in begun:
            if words:
                clauses_under_way.append((p, words, story))
            elif token != END:
                clauses_under_way.extend((p * q, following, after) for q, following, after in _advance(story))
    total = sum(p for p, _, _ in clauses_under_way)
    distribution: dict[str, float] = {}
    for p, words, _ in clauses_under_way:
        distribution[words[0]] = distribution.get(words[0], 0.0) + p / total
    return distribution


def sample_answer(prompt: str, rng: random.Random) -> str:
    """One answer of the teacher: words separated by spaces, without [`END`]."""
    tokens: list[str] = []
    while True:
        distribution = next_token_distribution(prompt, tokens)
        token = rng.choices(list(distribution), weights=list(distribution.values()))[0]
        if token == END:
            return " ".join(tokens)
        tokens.append(token)


def is_valid(prompt: str, completion: str) -> bool:
    """Whether the teacher could have written exactly this answer, to its end."""
    return _may_end(parse_prompt(prompt), tuple(completion.split()))


def _may_end(story: Story, words: tuple[str, ...]) -> bool:
    """Whether the teacher may tell the rest of a story in these words."""
    if story.closed:
        return not words
    # A clause names its verb soon. Making those of all other verbs would take most of a judge's time
    begun = words[:3]
    verbs = [verb for verb in story.untold if verb.present in begun or verb.gerund in begun]
    return any(
        _may_end(after, words[len(told) :]) for _, told, after in clauses(story, verbs) if words[: len(told)] == told
    )


def judge(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    """Judge sampled answers: `{"valid": [...]}`, 1.0 for each answer the teacher could have given, else 0.0."""
    return {"valid": [float(is_valid(p, c)) for p, c in zip(prompts, completions, strict=True)]}
