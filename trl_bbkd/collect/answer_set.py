"""The set of a collection, as Parquet: one row for each whole answer, and a list of what was left out."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Json, List, Value

from ..bayeskd.top_logprobs import TOP_LOGPROBS
from ..data.teacher_files import ROW_COLUMN
from ..data.teacher_tokens import RENDERED_COLUMNS, prompt_and_answer_ids
from ..errors import TeacherDataError
from .alignment import Aligner
from .confidence import confidences, split_confidence
from .filters import Filters
from .journal import Entry, Journal
from .labels import Labelled
from .probe import state_of_logprobs
from .prompts import Prompt, Prompts
from .replies import CUT, EMPTY, FILTERED, Choice, read_choice
from .requests import RequestMaker
from .settings import VERBALISED


FILE, LEFT_OUT = "train.parquet", "left_out.jsonl"
CALL = "tool call beside texts"
NO_LABEL, NO_CONFIDENCE = "no label", "no confidence"
ROWS_AT_ONCE = 512
# Of what is left out, by reason: how many, and characters of each
EXAMPLES, EXAMPLE = 3, 100
TEXT = Value("string")
NUMBERS = {"ids": List(List(Value("int32"))), "logprobs": List(List(Value("float32")))}
ALIGNED = {**NUMBERS, "exact": Value("bool"), "tokens": List(Value("int32"))}
EXACT, IN_PART, NOT_ALIGNED = "exact", "in part", "missing"
CALLS = List({"id": TEXT, "type": TEXT, "function": {"name": TEXT, "arguments": Json()}})
# What the set has of its own; columns of the prompts' file with these names are not taken over
OWN_COLUMNS = (
    "prompt",
    "completion",
    "teacher",
    "finish_reason",
    "sample",
    "reasoning_content",
    TOP_LOGPROBS,
    ROW_COLUMN,
)
CONFIDENCE = "teacher_confidence"
LABEL_COLUMNS = ("text", "label", CONFIDENCE, "teacher_probs", "teacher", "prompt", ROW_COLUMN)


@dataclass
class Answered:
    """
    One answer, asked for or not yet.

    Attributes:
        sample (`int`): its number among those to its prompt.
        entry ([`~collect.journal.Entry`] or `None`): what the journal has of it.
        choice ([`~collect.replies.Choice`] or `None`): the answer, if there is one.
        left_out (`str` or `None`): why it is not in the set.
        confidence (`float` or `None`): how sure the teacher is of it, where the recipe asks.
    """

    sample: int
    entry: Entry | None
    choice: Choice | None = None
    left_out: str | None = None
    confidence: float | None = None


class Group(NamedTuple):
    """A prompt, its answers, and of answers that are labels what they say together."""

    prompt: Prompt
    answers: list[Answered]
    labelled: Labelled | None


@dataclass
class Survey:
    """
    What a collection has.

    Attributes:
        rows (`int`): answers of the set.
        duplicates (`int`): answers that are not asked for, since an earlier row is the same.
        reasons (`Counter`): answers that are left out, by reason.
        examples (`dict[str, list[str]]`): the first answers that are left out, by reason.
        failures (`Counter`): requests that failed, by kind.
        not_asked (`int`): answers that are missing.
        models, fingerprints (`Counter`): answers by what the endpoint says of itself.
        finish_reasons (`Counter`): answers by the endpoint's word for their end.
        logprobs (`Counter`): answers by whether their log-probabilities are whole.
        aligned (`Counter`): answers of the set by whether their log-probabilities are those of the named tokenizer's tokens.
        prompt_tokens, completion_tokens (`int`): of the set's requests, as far as the endpoint said.
        without_usage (`int`): answers of which it did not say.
        first, last (`str`): dates.
        prompts_with_samples, prompts_with_equal_samples (`int`): prompts with several answers, and with equal ones.
        labels (`Counter`): rows of the set by label, of a set of labels.
        has_reasoning, has_calls (`bool`): of the set's answers.
    """

    rows: int = 0
    duplicates: int = 0
    reasons: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    failures: Counter = field(default_factory=Counter)
    not_asked: int = 0
    models: Counter = field(default_factory=Counter)
    fingerprints: Counter = field(default_factory=Counter)
    finish_reasons: Counter = field(default_factory=Counter)
    logprobs: Counter = field(default_factory=Counter)
    aligned: Counter = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    first: str = ""
    last: str = ""
    prompts_with_samples: int = 0
    prompts_with_equal_samples: int = 0
    labels: Counter = field(default_factory=Counter)
    has_reasoning: bool = False
    has_calls: bool = False


class AnswerSet:
    """
    Writes what a journal has of a recipe's answers.

    Args:
        prompts ([`~collect.prompts.Prompts`]):
            The recipe's prompts.
        maker ([`~collect.requests.RequestMaker`]):
            Its requests.
        journal ([`~collect.journal.Journal`]):
            The answers.
        aligner ([`~collect.alignment.Aligner`], *optional*):
            What brings log-probabilities to the named tokenizer's tokens.
        filters ([`~collect.filters.Filters`], *optional*):
            What the recipe leaves out beside.
    """

    def __init__(
        self,
        prompts: Prompts,
        maker: RequestMaker,
        journal: Journal,
        aligner: Aligner | None = None,
        filters: Filters | None = None,
    ):
        self.prompts, self.maker, self.journal, self.aligner, self.filters = prompts, maker, journal, aligner, filters
        # Of answers that the filters have seen, those that they leave out
        self._filtered: dict[tuple[int, int], str] = {}
        self.settings = maker.settings

    def write(self, folder: Path) -> Survey:
        """Write the set, if there is a row, and the list. Files take their names when they are whole."""
        survey = Survey()
        with _replacing(folder / LEFT_OUT) as path, path.open("w", encoding="utf-8") as left_out:
            for line in self._look(survey):
                left_out.write(json.dumps(line, ensure_ascii=False) + "\n")
        if survey.rows:
            features = self._features(survey)
            schema = _table([], features).schema
            with (
                _replacing(folder / FILE) as path,
                pq.ParquetWriter(path, schema, compression="zstd") as writer,
            ):
                rows = self._rows(survey)
                while batch := list(islice(rows, ROWS_AT_ONCE)):
                    if self.aligner is not None:
                        self._align(batch, self.aligner, survey)
                    writer.write_table(_table([row for row, _ in batch], features))
        return survey

    def _groups(self, survey: Survey | None = None) -> Iterator[Group]:
        """Each answer once, in the order of the prompts."""
        meetings = self.journal.first_meetings()
        for prompt in self.prompts:
            answers = []
            for sample, key in enumerate(self.maker.keys(prompt)):
                if meetings.is_first(key):
                    answers.append(self._answered(sample, self.journal.entry(key)))
                elif survey is not None:
                    survey.duplicates += 1
            if answers:
                self._rate(answers)
                for one in answers:
                    self._filter(prompt, one, is_new=survey is not None)
                yield Group(prompt, answers, self._label(answers))

    def _answered(self, sample: int, entry: Entry | None) -> Answered:
        if entry is None or entry.failure is not None:
            return Answered(sample, entry)
        choice = read_choice(json.loads(entry.choice or "{}"))
        return Answered(sample, entry, choice, self._why_left_out(choice))

    def _why_left_out(self, choice: Choice) -> str | None:
        kept = {CUT: self.settings.keep_cut_answers, FILTERED: self.settings.keep_filtered_answers}
        has_text = bool(choice.content.strip())
        if choice.reason is not None:
            return None if kept.get(choice.reason) and has_text else choice.reason
        return None if has_text or self.prompts.conversational else CALL

    def _rate(self, answers: list[Answered]) -> None:
        """How sure the teacher is of each answer. Where it says so itself, that is no part of the answer."""
        kind = self.settings.teacher_confidence
        if kind is None or self.prompts.labeller is not None:
            return
        speller = None if self.aligner is None else self.aligner.speller
        there = [(one, one.choice) for one in answers if one.choice is not None]
        found = confidences(kind, [choice for _, choice in there], speller)
        for (one, choice), confidence in zip(there, found, strict=True):
            one.confidence = confidence
            if kind == VERBALISED:
                choice.content = split_confidence(choice.content)[0]
            if one.left_out is None:
                is_empty = not (choice.content.strip() or choice.raw["message"].get("tool_calls"))
                one.left_out = EMPTY if is_empty else NO_CONFIDENCE if confidence is None else None

    def _filter(self, prompt: Prompt, one: Answered, is_new: bool) -> None:
        """Ask the filters, once: what they say of an answer may depend on those before it."""
        place = (prompt.place, one.sample)
        if is_new and self.filters is not None and one.choice is not None and one.left_out is None:
            if (reason := self.filters.reason(one.choice.content)) is not None:
                self._filtered[place] = reason
        one.left_out = self._filtered.get(place, one.left_out)

    def _label(self, answers: list[Answered]) -> Labelled | None:
        labeller = self.prompts.labeller
        if labeller is None:
            return None
        whole = [(one, one.choice) for one in answers if one.choice is not None and one.left_out is None]
        found = labeller.read([choice for _, choice in whole])
        for one, choice in whole:
            if labeller.label(choice) is None:
                one.left_out = NO_LABEL
            elif found is None:
                one.left_out = NO_CONFIDENCE
        return found

    def _look(self, survey: Survey) -> Iterator[dict[str, Any]]:
        """Count everything, and say what is left out."""
        for group in self._groups(survey):
            for one in group.answers:
                what = {"row": group.prompt.place, "sample": one.sample}
                entry, choice = one.entry, one.choice
                if entry is None:
                    survey.not_asked += 1
                elif choice is None:
                    survey.failures[entry.failure] += 1
                    yield {**what, "failed": entry.failure, "attempts": entry.attempts, "message": entry.message}
                else:
                    self._count(survey, entry, choice, one.left_out)
                    if one.left_out is not None:
                        survey.reasons[one.left_out] += 1
                        text = choice.content or choice.reasoning
                        examples = survey.examples.setdefault(one.left_out, [])
                        if len(examples) < EXAMPLES:
                            examples.append(f"row {group.prompt.place}: {_shown(text)}")
                        yield {**what, "left_out": one.left_out, "begins": text[:200]}
            _compare([one.choice.content for one in group.answers if one.choice and one.choice.reason is None], survey)
            if group.labelled is not None and self.settings.labels is not None:
                survey.rows += 1
                survey.labels[self.settings.labels[group.labelled.label]] += 1

    def _count(self, survey: Survey, entry: Entry, choice: Choice, left_out: str | None) -> None:
        if left_out is None and self.prompts.labeller is None:
            survey.rows += 1
            survey.has_reasoning |= bool(choice.reasoning)
            survey.has_calls |= bool(choice.raw["message"].get("tool_calls"))
            if self.aligner is not None:
                self.aligner.look(choice)
        survey.models[entry.model] += 1
        survey.fingerprints[entry.system_fingerprint] += 1
        survey.finish_reasons[entry.finish_reason] += 1
        if self.settings.logprobs:
            survey.logprobs[state_of_logprobs(choice)] += 1
        usage = entry.usage
        survey.without_usage += usage is None
        if usage is not None:
            survey.prompt_tokens += usage.prompt
            survey.completion_tokens += usage.completion
        survey.first = min(survey.first or entry.asked_at, entry.asked_at)
        survey.last = max(survey.last, entry.asked_at)

    def _features(self, survey: Survey) -> Features:
        source = self.prompts.rows.features
        if self.settings.labels is not None:
            return self._label_features(source, self.settings.labels)
        message: dict[str, Any] = {"role": TEXT, "content": TEXT}
        prompt = source[self.prompts.column]
        if self.prompts.are_texts:
            prompt = List(dict(message)) if self.prompts.conversational else TEXT
        if survey.has_reasoning:
            message["reasoning_content"] = TEXT
        if survey.has_calls:
            message["tool_calls"] = CALLS
        features = {"prompt": prompt, "completion": List(message) if self.prompts.conversational else TEXT}
        if survey.has_reasoning and not self.prompts.conversational:
            features["reasoning_content"] = TEXT
        features |= {"teacher": TEXT, "finish_reason": TEXT, "sample": Value("int64")}
        if self.aligner is not None:
            features[TOP_LOGPROBS] = ALIGNED
        if self.settings.teacher_confidence is not None:
            features[CONFIDENCE] = Value("float64")
        others = {
            name: feature
            for name, feature in source.items()
            if name not in (*OWN_COLUMNS, *features) and name != self.prompts.column
        }
        return Features(features | others)

    def _label_features(self, source: Features, labels: list[str]) -> Features:
        """As LLKD reads them. Labels that the file has are the true ones."""
        features = {"text": TEXT, "label": ClassLabel(names=labels), CONFIDENCE: Value("float64")}
        features |= {"teacher_probs": List(Value("float64")), "teacher": TEXT}
        others = {name: feature for name, feature in source.items() if name not in LABEL_COLUMNS}
        if "label" in source and "gold" not in source:
            others["gold"] = source["label"]
        others.pop(self.prompts.column, None)
        return Features(features | others)

    def _rows(self, survey: Survey) -> Iterator[tuple[dict[str, Any], Choice | None]]:
        for prompt, answers, labelled in self._groups():
            if labelled is not None:
                yield self._label_row(prompt, labelled), None
            elif self.prompts.labeller is None:
                for one in answers:
                    if one.choice is not None and one.left_out is None:
                        yield self._row(prompt, one, one.choice, survey), one.choice

    def _row(self, prompt: Prompt, one: Answered, choice: Choice, survey: Survey) -> dict[str, Any]:
        return {
            **prompt.row,
            "completion": self._completion(choice, survey),
            "reasoning_content": choice.reasoning,
            "teacher": self.settings.teacher,
            "finish_reason": choice.finish_reason,
            "sample": one.sample,
            CONFIDENCE: one.confidence,
        }

    def _label_row(self, prompt: Prompt, labelled: Labelled) -> dict[str, Any]:
        return {
            "gold": prompt.row.get("label"),
            **prompt.row,
            "text": prompt.row["prompt"],
            "label": labelled.label,
            CONFIDENCE: labelled.confidence,
            "teacher_probs": labelled.probs,
            "teacher": self.settings.teacher,
        }

    def _align(self, batch: list[tuple[dict[str, Any], Choice | None]], aligner: Aligner, survey: Survey) -> None:
        answers = _answer_tokens(aligner.speller.tokenizer, [row for row, _ in batch])
        for (row, choice), answer in zip(batch, answers, strict=True):
            value = row[TOP_LOGPROBS] = aligner.align(choice, answer) if choice and answer else None
            survey.aligned[NOT_ALIGNED if value is None else EXACT if value["exact"] else IN_PART] += 1

    def _completion(self, choice: Choice, survey: Survey) -> str | list[dict]:
        if not self.prompts.conversational:
            return choice.content
        message: dict[str, Any] = {"role": "assistant", "content": choice.content}
        if survey.has_reasoning:
            message["reasoning_content"] = choice.reasoning or None
        if survey.has_calls:
            message["tool_calls"] = [_call(call) for call in choice.raw["message"].get("tool_calls") or ()] or None
        return [message]


class _replacing:  # noqa: N801
    """A path beside `path`, that becomes `path` at the end of the block."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def _table(rows: list[dict[str, Any]], features: Features) -> pa.Table:
    """Rows as `datasets` stores them, so that it reads them with the same types."""
    columns = {name: [row[name] for row in rows] for name in features}
    return Dataset.from_dict(columns, features=features).with_format("arrow")[:]


def _shown(text: str) -> str:
    """The beginning of a text on one line, without what a terminal would act on."""
    return " ".join("".join(char if char.isprintable() else " " for char in text[:EXAMPLE]).split())


def _answer_tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[int] | None]:
    """Each answer in the student's tokens, as it is trained on; `None` where its template refuses the row."""
    columns = [name for name in ("prompt", "completion", *RENDERED_COLUMNS) if name in rows[0]]
    try:
        batch = {name: [row[name] for row in rows] for name in columns}
        return list(prompt_and_answer_ids(tokenizer, batch, {}, "keep", list(range(len(rows))))[1])
    except TeacherDataError:
        return [None] if len(rows) == 1 else [ids for row in rows for ids in _answer_tokens(tokenizer, [row])]


def _compare(texts: list[str], survey: Survey) -> None:
    if len(texts) > 1:
        survey.prompts_with_samples += 1
        survey.prompts_with_equal_samples += len(set(texts)) == 1


def _call(call: dict) -> dict:
    """A call of a tool: id, type, name and arguments, which a template takes as a mapping; the API has them as text."""
    function = call.get("function") or {}
    arguments: Any = function.get("arguments")
    with contextlib.suppress(ValueError, TypeError):
        arguments = json.loads(arguments)
    return {
        "id": call.get("id"),
        "type": call.get("type") or "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }
