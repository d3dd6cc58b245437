"""The judge's verdicts: each pair in both orders, asked by the machinery of collections and kept in its journal."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..collect.budget import Prices
from ..collect.command import ask
from ..collect.journal import Entry, Journal
from ..collect.prompts import Prompt
from ..collect.replies import read_choice
from ..collect.requests import RequestMaker
from ..collect.run import Collection, End
from ..errors import EndpointError
from .pairs import FIRST_PAIRS, Pair
from .settings import JudgeConfig
from .verdicts import Question


READ, UNPARSABLE, FAILED, NOT_ASKED = "read", "unparsable", "failed", "not asked"
SHOWN = 120
GOES_ON = " The same command goes on with what is missing."


@dataclass
class Verdict:
    """
    What the judge said of a pair, in one order.

    Attributes:
        pair (`int`): number of the pair.
        question (`str`): name of the question.
        student_is_first (`bool`): whether the student's answer stood first.
        state (`str`): `read`, `unparsable`, `failed` or `not asked`.
        student, teacher (`float` or `None`): what the verdict gives each of them, if it was read.
        text (`str`): the judge's words, or the endpoint's.
        is_cut (`bool`): whether the judge's answer is not whole.
        key (`bytes`): in the journal.
        entry ([`~collect.journal.Entry`] or `None`): there.
    """

    pair: int
    question: str
    student_is_first: bool
    state: str
    student: float | None
    teacher: float | None
    text: str
    is_cut: bool
    key: bytes
    entry: Entry | None


class Calls:
    """
    What is asked of a judge. Calls of one pair follow each other, so that a run that is stopped leaves whole pairs.

    Args:
        pairs (`list[Pair]`):
            The answers.
        questions (`list[Question]`):
            What is asked of each pair, in both orders.
    """

    def __init__(self, pairs: list[Pair], questions: list[Question]):
        self.pairs, self.questions = pairs, questions

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for *_, prompt in self.each())

    def each(self) -> Iterator[tuple[int, Question, bool, Prompt]]:
        for number, pair in enumerate(self.pairs):
            for question in self.questions:
                for student_is_first in (True, False):
                    answers = (pair.student, pair.teacher) if student_is_first else (pair.teacher, pair.student)
                    messages = question.messages(pair.request, *answers)
                    yield number, question, student_is_first, Prompt(pair.row, messages, None, {})


def ask_judge(judge: JudgeConfig, calls: Calls, journal: Journal, key: str | None) -> End | None:
    """
    Ask for what the journal does not have.

    Returns:
        [`~collect.run.End`]: why not all was asked, if so.

    Raises:
        [`~errors.EndpointError`]: the endpoint refuses, or none of the judge's first verdicts can be read.
    """
    first = Calls(list(islice(calls.pairs, FIRST_PAIRS)), calls.questions)
    for part in (first, calls):
        collection = Collection(judge, part, journal, key)
        collection.count()
        if collection.tally.expected and ask(collection, judge):
            return End("interrupt", "")
        if collection.end is not None and collection.end.kind == "error":
            raise EndpointError(f"{collection.end.text.rstrip('.')}.{GOES_ON}")
        refuse_unreadable(read_verdicts(judge, part, journal), judge)
        if collection.end is not None:
            return collection.end
    return None


def read_verdicts(judge: JudgeConfig, calls: Calls, journal: Journal) -> list[Verdict]:
    """All verdicts, those that are missing too."""
    maker = RequestMaker(judge)
    verdicts = []
    for number, question, student_is_first, prompt in calls.each():
        key = maker.key(prompt, 0)
        entry = journal.entry(key)
        state, values, text, is_cut = NOT_ASKED, None, "", False
        if entry is not None and entry.failure is not None:
            state, text = FAILED, f"{entry.failure}: {entry.message}"
        elif entry is not None:
            choice = read_choice(json.loads(entry.choice or "{}"))
            text, is_cut = choice.content, choice.reason is not None
            values = None if is_cut else question.read(text)
            state = UNPARSABLE if values is None else READ
        student, teacher = (values if student_is_first else values[::-1]) if values else (None, None)
        verdicts.append(
            Verdict(number, question.name, student_is_first, state, student, teacher, text, is_cut, key, entry)
        )
    return verdicts


def refuse_unreadable(verdicts: list[Verdict], judge: JudgeConfig) -> None:
    """
    Refuse a judge that never gives a verdict of a kind.

    Raises:
        [`~errors.EndpointError`]: it says how the judge's words end.
    """
    for question in dict.fromkeys(verdict.question for verdict in verdicts):
        # Of two answers that are the same, both orders are one request
        own = list({verdict.key: verdict for verdict in verdicts if verdict.question == question}.values())
        unread = [verdict for verdict in own if verdict.state == UNPARSABLE]
        if unread and not any(verdict.state == READ for verdict in own):
            cut = sum(verdict.is_cut for verdict in unread)
            advice = (
                f"{cut:,} were not whole: raise --max_tokens, now {judge.max_tokens:,}"
                if cut
                else "Name another judge"
            )
            end = " ".join(unread[0].text.split())[-SHOWN:]
            raise EndpointError(
                f"the judge {judge.model!r} gave no {question} that can be read in {len(unread):,} answers; the first ends with "
                f"{end!r}. {advice}."
            )


def cost_of(verdicts: list[Verdict], judge: JudgeConfig) -> tuple[int, float | None]:
    """Tokens of the answers behind verdicts, each counted once, and their price, if prices are known."""
    entries = {verdict.key: verdict.entry for verdict in verdicts}.values()
    usages = [entry.usage for entry in entries if entry is not None and entry.usage is not None]
    tokens = sum(usage.prompt + usage.completion for usage in usages)
    if judge.prompt_price is None or judge.completion_price is None:
        return tokens, None
    return tokens, sum(map(Prices.of(judge).cost, usages))
