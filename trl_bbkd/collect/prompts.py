"""The prompts of a data set, as an endpoint is asked and as the set has them."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow

from ..data.messages import plain_messages, without_none, without_reasoning
from ..data.teacher_files import load_splits
from ..errors import RecipeError, TeacherDataError
from .confidence import ASKED
from .labels import Labeller
from .settings import VERBALISED, CollectConfig


BATCH_ROWS = 256
NO_MESSAGES = "`{column}` has no message that could be answered; remove the row."


class Prompt(NamedTuple):
    """
    One row.

    Attributes:
        place (`int`):
            The row's place in the file.
        messages (`list[dict]`):
            What the endpoint is asked, by the fields of its API.
        tools (`list[dict]` or `None`):
            The functions that the answer may call.
        row (`dict`):
            The row's columns. `prompt` is the prompt as the set has it.
    """

    place: int
    messages: list[dict]
    tools: list[dict] | None
    row: dict[str, Any]


class Prompts:
    """
    The prompts that a recipe names, read from the disk as they are needed.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.

    Raises:
        [`~errors.TeacherDataError`]: there are none.
        [`~errors.RecipeError`]: a key does not fit them.
    """

    def __init__(self, settings: CollectConfig):
        self.settings = settings
        self.labeller = None if settings.labels is None else Labeller(settings)
        splits = load_splits(
            _SplitArguments(settings.dataset_name, settings.dataset_config, settings.dataset_train_split)
        )
        # What a file was read with, which Arrow would keep
        pyarrow.default_memory_pool().release_unused()
        split = settings.dataset_train_split
        if split not in splits:
            raise TeacherDataError(
                f"`dataset_train_split: {split}` does not exist in {settings.dataset_name}; available splits: "
                f"{', '.join(splits)}."
            )
        self.rows = splits[split]
        if settings.max_prompts is not None:
            self.rows = self.rows.select(range(min(settings.max_prompts, len(self.rows))))
        self.column = self._column()
        if len(self.rows) == 0:
            raise TeacherDataError(f"{settings.dataset_name} has no rows: there is nothing to ask.")
        first = self.rows[0][self.column]
        self.are_texts = isinstance(first, str)
        if self.labeller is not None and not self.are_texts:
            raise RecipeError(
                f"labels: they are of texts, but `{self.column}` is no text. Name another `prompt_column`."
            )
        self.conversational = not self.are_texts if settings.conversational is None else settings.conversational
        if not self.conversational and not self.are_texts:
            raise RecipeError("conversational: the prompts are messages, which are no text. Take the key out.")
        if not self.conversational and (settings.keep_system_prompt or "tools" in self.rows.column_names):
            what = "keep_system_prompt" if settings.keep_system_prompt else "the column `tools`"
            raise RecipeError(f"{what} needs a set of messages. Add `conversational: true`.")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Prompt]:
        place = 0
        for batch in self.rows.iter(BATCH_ROWS):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield self._prompt(place, dict(zip(columns, values, strict=True)))
                place += 1

    def _column(self) -> str:
        names = self.rows.column_names
        column = self.settings.prompt_column
        if column is not None and column not in names:
            raise RecipeError(
                f"prompt_column: the data set has no column {column!r}; columns found: {', '.join(names)}."
            )
        usual = ("prompt", "messages") if self.labeller is None else ("text", "prompt")
        found = column or next((name for name in usual if name in names), None)
        if found is None:
            raise RecipeError(
                f"{self.settings.dataset_name} has neither a column `{usual[0]}` nor `{usual[1]}`; columns found: "
                f"{', '.join(names)}. Name the column of the prompts with `prompt_column`."
            )
        return found

    def _prompt(self, place: int, row: dict) -> Prompt:
        value, name = row.pop(self.column), f"Row {place}: `{self.column}`"
        if isinstance(value, str) != self.are_texts or not isinstance(value, str | list):
            kinds = ("messages", "text")
            raise TeacherDataError(
                f"{name} is no {kinds[self.are_texts]}, as in the first row; use one form throughout."
            )
        if isinstance(value, str):
            if not value.strip():
                raise TeacherDataError(f"{name} is empty; remove the row.")
            question = value if self.labeller is None else self.labeller.question(value)
            turns = [{"role": "user", "content": question}]
        else:
            turns = plain_messages(value, name)
            if self.column == "messages" and turns and turns[-1]["role"] == "assistant":
                turns, value = turns[:-1], value[:-1]
            if not turns or turns[-1]["role"] == "assistant" or not any(turn["content"].strip() for turn in turns):
                raise TeacherDataError(f"Row {place}: {NO_MESSAGES.format(column=self.column)}")
        tools = _tools(row.get("tools"), f"Row {place}: `tools`")
        asked = [_as_asked(turn) for turn in turns]
        if self.settings.teacher_confidence == VERBALISED and self.labeller is None:
            asked = _asked_how_sure(asked)
        # As the file has them: what a message is, is told by the file's types
        kept = turns if self.are_texts and self.conversational else value
        if self.settings.system_prompt is not None and turns[0]["role"] != "system":
            text = self.settings.system_prompt
            asked = [{"role": "system", "content": text}, *asked]
            if self.settings.keep_system_prompt and isinstance(kept, list):
                content = text if isinstance(kept[0]["content"], str) else [{"type": "text", "text": text}]
                kept = [{"role": "system", "content": content}, *kept]
        return Prompt(place, asked, tools, {**row, "prompt": kept})


class _SplitArguments(NamedTuple):
    dataset_name: str
    dataset_config: str | None
    dataset_train_split: str
    dataset_test_split: str = "test"
    dataset_streaming: bool = False


def _asked_how_sure(turns: list[dict]) -> list[dict]:
    """Messages whose last one of the user asks how sure the answer is as well."""
    at = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
    return [turn | {"content": turn["content"] + ASKED} if i == at else turn for i, turn in enumerate(turns)]


def _as_asked(turn: dict) -> dict:
    """A plain message by the fields of the API: no reasoning of earlier turns, arguments of calls as text."""
    asked = without_reasoning(turn)
    calls = asked.get("tool_calls")
    return asked | {"tool_calls": [_call(call) for call in calls]} if calls else asked


def _call(call: dict) -> dict:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": text}}


def _tools(value: Any, name: str) -> list[dict] | None:
    """Functions by the API's form, of a list or a list as JSON."""
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else without_none(value)
    except json.JSONDecodeError as error:
        raise TeacherDataError(f"{name} is no JSON: {error}.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise TeacherDataError(f"{name} is no list of functions.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None
