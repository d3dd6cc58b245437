"""
How a chat template spells a row: the prompt that a student is asked with, the answer it is to give, and the token that
ends it.
"""

import difflib
import inspect
import json
import re
from typing import NamedTuple

from ..errors import TeacherDataError
from .messages import (
    CLOSE_THINK,
    OPEN_THINK,
    REASONING_FIELDS,
    RENDERED_REASONING_FIELDS,
    ReasoningPolicy,
    plain_messages,
    short,
    split_reasoning,
    without_none,
    without_reasoning,
)


QUESTION, ANSWER, THOUGHT = "A question", "An answer of the teacher", "A thought of the teacher"
# What links a tool's answer to its call, which stands above it: no text of its own
LINKS = ("name", "tool_call_id")


class TurnEnd(NamedTuple):
    """How a template ends the assistant's turn."""

    tail: str  # all text after the answer
    closing: str  # of it, what stands before the token that ends the turn
    token_id: int


class RenderedRow(NamedTuple):
    """A row as text."""

    prompt: str
    answer: str  # up to the token that ends it, which is not in it
    end: TurnEnd
    has_reasoning: bool  # whether the teacher's message has any, rendered or dropped
    left_out_reasoning: bool  # whether the template leaves out that of earlier turns


class ChatRenderer:
    """
    Renders conversational rows through a tokenizer's chat template; what the template would leave out is an error.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`. A row's own come before them.
        reasoning (`str`, *optional*, defaults to `"keep"`):
            `"keep"` or `"drop"` what the teacher's messages have of reasoning.

    Raises:
        [`~errors.TeacherDataError`]: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer, chat_template_kwargs: dict | None = None, reasoning: ReasoningPolicy = "keep"):
        if tokenizer.chat_template is None:
            name = f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
            raise TeacherDataError(
                f"The rows are conversations, but the tokenizer{name} has no chat template. Take a model that has one (often "
                "named Instruct), set `tokenizer.chat_template` (`chat_template_path`, where the configuration has it), or "
                "write `prompt` and `completion` as strings."
            )
        refuse_unread_kwargs(tokenizer, chat_template_kwargs or {})
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.reasoning = reasoning
        self._turn_ends: dict[str, TurnEnd] = {}
        self._knows_reasoning: dict[str, bool] = {}

    def prompt(self, row: dict, place: str) -> str:
        """
        The prompt, with what asks for an answer at its end.

        Args:
            row (`dict`):
                `prompt`, a list of messages, and if the row has them `tools` and `chat_template_kwargs`.
            place (`str`):
                The row's name in errors.
        """
        return self._prompt(row, place)[0]

    def row(self, row: dict, place: str) -> RenderedRow:
        """
        Prompt and answer of a row. The answer is what the template writes after the prompt, as a student would.

        Args:
            row (`dict`):
                As in [`~ChatRenderer.prompt`], with `completion`, a list of one assistant message.
            place (`str`):
                The row's name in errors.
        """
        prompt, messages, tools, kwargs, left_out = self._prompt(row, place)
        (message,) = plain_messages(row["completion"], f"{place}: `completion`")
        end = self._turn_end(kwargs)
        reasoning, content = split_reasoning(message)
        if not content.strip() and "tool_calls" not in message:
            raise TeacherDataError(f"{place}: `completion` has reasoning and no answer after it; remove the row.")
        if self.reasoning == "drop":
            message, kept = without_reasoning(message), ""
        else:
            kept = reasoning
            if reasoning and self._renders_reasoning(kwargs):
                message = message | {"content": content, "reasoning_content": reasoning}
        whole = self._apply([*messages, message], tools, kwargs, place)
        if whole.startswith(prompt):
            answer = whole[len(prompt) :].removesuffix(end.tail)
        elif prompt.rstrip().endswith(OPEN_THINK):
            # The prompt opens the reasoning and the template's finished answers have none: written as its model would
            answer = f"{kept}\n{CLOSE_THINK}\n\n{content}"
        else:
            answer = message["content"]
        self._refuse_left_out(message, content, kept, answer, prompt, place)
        if message.keys() - {"role", "content", "reasoning_content"}:
            self._refuse_unrendered_fields([*messages, message], len(messages), whole, tools, kwargs, place)
        return RenderedRow(prompt, answer + end.closing, end, bool(reasoning), left_out)

    def end_token_id(self) -> int:
        """The token that ends the assistant's turn: the template's own, else the tokenizer's."""
        return self._turn_end({}).token_id

    def _prompt(self, row: dict, place: str) -> tuple[str, list[dict], list | None, dict, bool]:
        messages = plain_messages(row["prompt"], f"{place}: `prompt`")
        kwargs = _row_kwargs(row, place)
        tools = _row_tools(row, place)
        if self.reasoning == "drop":
            messages = [without_reasoning(message) for message in messages]
        text = self._apply(messages, tools, kwargs, place, add_generation_prompt=True)
        if tools and text == self._attempt(messages, None, kwargs, add_generation_prompt=True):
            raise TeacherDataError(
                f"{place}: the chat template does not render `tools`: the student would not see them. Remove the column, or "
                "take a template that does."
            )
        left_out = False
        for index, message in enumerate(messages):
            thought = message.get("reasoning_content", "")
            if thought and _squeeze(thought) not in _squeeze(text):
                # A template that knows reasoning leaves that of earlier turns out, as when the student is used
                if not self._renders_reasoning(kwargs) or message["role"] != "assistant":
                    raise self._no_reasoning(place)
                left_out = True
            self._refuse_unrendered_fields(
                messages, index, text, tools, kwargs, place, add_generation_prompt=True, content_too=True
            )
        return text, messages, tools, kwargs, left_out

    # The template

    def _apply(self, messages: list[dict], tools: list | None, kwargs: dict, place: str, **flags) -> str:
        try:
            return self._rendered(messages, tools, kwargs, **flags)
        except Exception as error:  # a template may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            advice = "Mend the row, or take another chat template."
            if "system" in reason.lower():
                advice = "Put the text of the system message in front of the first user message, or take another chat template."
            raise TeacherDataError(f"{place}: the chat template does not take it: {reason}. {advice}") from error

    def _attempt(self, messages: list[dict], tools: list | None, kwargs: dict, **flags) -> str | None:
        """The rendering of messages of which something was taken out, or `None` where the template needs that."""
        try:
            return self._rendered(messages, tools, kwargs, **flags)
        except Exception:
            return None

    def _rendered(self, messages: list[dict], tools: list | None, kwargs: dict, **flags) -> str:
        messages = [
            message | dict.fromkeys(RENDERED_REASONING_FIELDS, message["reasoning_content"])
            if "reasoning_content" in message
            else message
            for message in messages
        ]
        kwargs = self.chat_template_kwargs | kwargs
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **flags, **kwargs)

    def _turn_end(self, kwargs: dict) -> TurnEnd:
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._turn_ends:
            text = self._probe({"role": "assistant", "content": ANSWER}, kwargs)
            before, found, tail = text.rpartition(ANSWER)
            if not found:
                raise TeacherDataError(
                    "The chat template leaves out the text of an answer: it is none for text. Take another template."
                )
            self._turn_ends[key] = _turn_end(self.tokenizer, tail)
        return self._turn_ends[key]

    def _renders_reasoning(self, kwargs: dict) -> bool:
        """Whether the template renders reasoning of the last answer, or opens it in the prompt for the student to write."""
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._knows_reasoning:
            answer = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
            prompt = self._apply(_question(), None, kwargs, "A question", add_generation_prompt=True)
            opens = prompt.rstrip().endswith(OPEN_THINK)
            self._knows_reasoning[key] = opens or THOUGHT in self._probe(answer, kwargs)
        return self._knows_reasoning[key]

    def _probe(self, answer: dict, kwargs: dict) -> str:
        return self._apply([*_question(), answer], None, kwargs, "A question and its answer")

    # What a template must not leave out

    def _no_reasoning(self, place: str) -> TeacherDataError:
        return TeacherDataError(
            f"{place} has reasoning ({', '.join(f'`{name}`' for name in REASONING_FIELDS[:-1])} or `{REASONING_FIELDS[-1]}`), "
            "which the chat template does not render here. Set `reasoning: drop` to learn the answers alone, or take a "
            "template that renders it (and no `enable_thinking: false`)."
        )

    def _refuse_left_out(self, message: dict, content: str, kept: str, answer: str, prompt: str, place: str) -> None:
        spelled = _squeeze(answer)
        if _squeeze(kept) not in spelled:
            raise self._no_reasoning(place)
        if _squeeze(content) not in spelled:
            raise TeacherDataError(
                f"{place}: the chat template leaves out a part of the answer: of {short(message['content'])} it writes "
                f"{short(answer)}. Mend the row, or take another template."
            )

    def _refuse_unrendered_fields(
        self,
        messages: list[dict],
        index: int,
        text: str,
        tools: list | None,
        kwargs: dict,
        place: str,
        content_too: bool = False,
        **flags,
    ) -> None:
        """Raise if `text` would be the same without a field of a message."""
        message = messages[index]
        role = message["role"]
        names = [name for name in message if name not in ("role", "content", "reasoning_content")]
        for name in names:
            if role == "tool" and name in LINKS:
                continue
            without = {key: value for key, value in message.items() if key != name}
            if text == self._attempt([*messages[:index], without, *messages[index + 1 :]], tools, kwargs, **flags):
                raise TeacherDataError(
                    f"{place}: the chat template does not render `{name}` of a message of {role!r}. Remove that field, or "
                    "take a template that does."
                )
        content = split_reasoning(message).content
        if content_too and content.strip() and _squeeze(content) not in _squeeze(text):
            other = message | {"content": QUESTION + content}
            if text == self._attempt([*messages[:index], other, *messages[index + 1 :]], tools, kwargs, **flags):
                raise TeacherDataError(
                    f"{place}: the chat template leaves out the message of {role!r}, {short(message['content'])}. Remove it, "
                    "or take a template that renders it."
                )


def refuse_unread_kwargs(tokenizer, chat_template_kwargs: dict) -> None:
    """
    Refuse what is passed to a chat template that does not read it: it would be taken and do nothing.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        chat_template_kwargs (`dict`):
            Passed to `apply_chat_template`.

    Raises:
        [`~errors.TeacherDataError`]: naming the first such key, and what the template reads.
    """
    if not chat_template_kwargs:
        return
    templates = tokenizer.chat_template
    text = templates if isinstance(templates, str) else " ".join(templates.values())
    words, taken = set(re.findall(r"\w+", text)), inspect.signature(tokenizer.apply_chat_template).parameters
    for name in chat_template_kwargs:
        if name not in words and name not in taken:
            match = difflib.get_close_matches(name, words, n=1, cutoff=0.8)
            advice = f"did you mean {match[0]!r}?" if match else "take it out, or take a template that reads it."
            raise TeacherDataError(
                f"chat_template_kwargs has {name!r}, which the chat template does not read; {advice}"
            )


def end_token_id(tokenizer, prompt: str | list) -> int:
    """
    The token that ends an answer to `prompt`: for a string the tokenizer's end-of-sequence token, for messages the
    chat template's own end of turn.
    """
    return tokenizer.eos_token_id if isinstance(prompt, str) else ChatRenderer(tokenizer).end_token_id()


def _question() -> list[dict]:
    return [{"role": "user", "content": QUESTION}]


def _row_kwargs(row: dict, place: str) -> dict:
    kwargs = without_none(row.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise TeacherDataError(f"{place}: `chat_template_kwargs` is {short(kwargs)}; it must be a dictionary or null.")
    return kwargs


def _row_tools(row: dict, place: str) -> list[dict] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise TeacherDataError(f"{place}: `tools` is a string that is no JSON: {error}.") from error
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise TeacherDataError(
            f"{place}: `tools` is {short(tools)}; it must be a list of JSON schemas, or such a list as JSON."
        )
    # Some templates write boilerplate around an empty list
    return without_none(tools) or None


def _turn_end(tokenizer, tail: str) -> TurnEnd:
    """The first special token after an answer, or the last of several that follow each other, ends the turn."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token}
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name.strip())
    found = re.search(pattern, tail)
    if found is None:
        return TurnEnd(tail, tail.rstrip(), tokenizer.eos_token_id)
    while found.group() != tokenizer.eos_token and (following := re.compile(pattern).match(tail, found.end())):
        found = following
    return TurnEnd(tail, tail[: found.start()], tokenizer.convert_tokens_to_ids(found.group()))


def _squeeze(text: str) -> str:
    return "".join(text.split())
