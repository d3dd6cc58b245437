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
from datasets import Dataset, Features, Json, List, Value

from ..bayeskd.top_logprobs import TOP_LOGPROBS
from ..data.teacher_files import ROW_COLUMN
from ..data.teacher_tokens import RENDERED_COLUMNS, prompt_and_answer_ids
from ..errors import TeacherDataError
from .alignment import Aligner
from .journal import Entry, Journal
from .probe import state_of_logprobs
from .prompts import Prompt, Prompts
from .replies import CUT, FILTERED, Choice, read_choice
from .requests import RequestMaker


FILE, LEFT_OUT = "train.parquet", "left_out.jsonl"
CALL = "tool call beside texts"
ROWS_AT_ONCE = 512
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


class Answered(NamedTuple):
    """A prompt, the number of an answer to it, and what the journal has of that."""

    prompt: Prompt
    sample: int
    entry: Entry | None


@dataclass
class Survey:
    """
    What a collection has.

    Attributes:
        rows (`int`): answers of the set.
        duplicates (`int`): answers that are not asked for, since an earlier row is the same.
        reasons (`Counter`): answers that are left out, by reason.
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
        has_reasoning, has_calls (`bool`): of the set's answers.
    """

    rows: int = 0
    duplicates: int = 0
    reasons: Counter = field(default_factory=Counter)
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
    """

    def __init__(self, prompts: Prompts, maker: RequestMaker, journal: Journal, aligner: Aligner | None = None):
        self.prompts, self.maker, self.journal, self.aligner = prompts, maker, journal, aligner
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

    def _answered(self, survey: Survey | None = None) -> Iterator[Answered]:
        """Each answer once, in the order of the prompts."""
        meetings = self.journal.first_meetings()
        for prompt in self.prompts:
            for sample, key in enumerate(self.maker.keys(prompt)):
                if meetings.is_first(key):
                    yield Answered(prompt, sample, self.journal.entry(key))
                elif survey is not None:
                    survey.duplicates += 1

    def _why_left_out(self, choice: Choice) -> str | None:
        kept = {CUT: self.settings.keep_cut_answers, FILTERED: self.settings.keep_filtered_answers}
        has_text = bool(choice.content.strip())
        if choice.reason is not None:
            return None if kept.get(choice.reason) and has_text else choice.reason
        return None if has_text or self.prompts.conversational else CALL

    def _look(self, survey: Survey) -> Iterator[dict[str, Any]]:
        """Count everything, and say what is left out."""
        place, texts = -1, list[str]()
        for prompt, sample, entry in self._answered(survey):
            if prompt.place != place:
                _compare(texts, survey)
                place, texts = prompt.place, []
            what = {"row": prompt.place, "sample": sample}
            if entry is None:
                survey.not_asked += 1
            elif entry.failure is not None:
                survey.failures[entry.failure] += 1
                yield {**what, "failed": entry.failure, "attempts": entry.attempts, "message": entry.message}
            else:
                choice = read_choice(json.loads(entry.choice or "{}"))
                texts += [choice.content] if choice.reason is None else []
                self._count(survey, entry, choice)
                if (reason := self._why_left_out(choice)) is not None:
                    survey.reasons[reason] += 1
                    text = choice.content or choice.reasoning
                    yield {**what, "left_out": reason, "begins": text[:200]}
        _compare(texts, survey)

    def _count(self, survey: Survey, entry: Entry, choice: Choice) -> None:
        if self._why_left_out(choice) is None:
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
        others = {
            name: feature
            for name, feature in source.items()
            if name not in OWN_COLUMNS and name != self.prompts.column
        }
        return Features(features | others)

    def _rows(self, survey: Survey) -> Iterator[tuple[dict[str, Any], Choice]]:
        for prompt, sample, entry in self._answered():
            if entry is None or entry.failure is not None:
                continue
            choice = read_choice(json.loads(entry.choice or "{}"))
            if self._why_left_out(choice) is None:
                row = {
                    **prompt.row,
                    "completion": self._completion(choice, survey),
                    "reasoning_content": choice.reasoning,
                    "teacher": self.settings.teacher,
                    "finish_reason": entry.finish_reason,
                    "sample": sample,
                }
                yield row, choice

    def _align(self, batch: list[tuple[dict[str, Any], Choice]], aligner: Aligner, survey: Survey) -> None:
        answers = _answer_tokens(aligner.speller.tokenizer, [row for row, _ in batch])
        for (row, choice), answer in zip(batch, answers, strict=True):
            value = row[TOP_LOGPROBS] = None if answer is None else aligner.align(choice, answer)
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
