"""Messages of a conversation, brought into one form: text, and of every other field only what is there."""

from typing import Any, Literal, NamedTuple

from ..errors import TeacherDataError


ReasoningPolicy = Literal["keep", "drop"]
REASONING_POLICIES = ("keep", "drop")
REASONING_HELP = (
    "What becomes of the reasoning of the teacher's messages (`reasoning_content`, `reasoning` or `thinking`, or text "
    "between `<think>` and `</think>` in front of an answer): `keep` or `drop`."
)
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# A template renders the one or the other; both hold the same text
RENDERED_REASONING_FIELDS = ("reasoning_content", "thinking")
OPEN_THINK, CLOSE_THINK = "<think>", "</think>"


class Reasoned(NamedTuple):
    """A message's text in two parts."""

    reasoning: str
    content: str


def check_reasoning(policy: str) -> None:
    """Raise `ValueError` if `policy` is no policy for reasoning."""
    if policy not in REASONING_POLICIES:
        raise ValueError(f"reasoning must be one of {', '.join(REASONING_POLICIES)}, got {policy!r}.")


def without_none(value: Any) -> Any:
    """`value` without the keys that hold `None`: Arrow gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def plain_messages(messages: list, place: str) -> list[dict]:
    """
    Check messages and bring them into one form.

    Args:
        messages (`list`):
            Messages as a file has them.
        place (`str`):
            Where they are, for errors: ``"Row 3: `prompt`"``.

    Returns:
        `list[dict]`: each message's `role`, its `content` as one text (`""` beside tool calls that stand alone), its
        reasoning, if any, as `reasoning_content`, and its other fields that are not empty.

    Raises:
        [`~errors.TeacherDataError`]: something that is no message of text.
    """
    return [_plain_message(message, place) for message in messages]


def _plain_message(message: Any, place: str) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise TeacherDataError(f"{place} holds {short(message)}; a message is {{'role': ..., 'content': ...}}.")
    fields = {key: without_none(value) for key, value in message.items() if value is not None}
    plain = {"role": fields.pop("role")}
    content = fields.pop("content", None)
    reasoning = [_text(fields.pop(name), place, name) for name in REASONING_FIELDS if name in fields]
    # What is empty says nothing: APIs answer with `tool_calls: []` and the like
    fields = {key: value for key, value in fields.items() if value not in ("", [], {})}
    if content is None and "tool_calls" not in fields:
        raise TeacherDataError(
            f"{place} has a message of {plain['role']!r} without text (`content` is null); remove the row or fill it in."
        )
    plain["content"] = "" if content is None else _text(content, place)
    if len(set(reasoning)) > 1:
        raise TeacherDataError(
            f"{place} has a message with different texts under {', '.join(f'`{name}`' for name in REASONING_FIELDS)}; "
            "keep one."
        )
    if reasoning and reasoning[0].strip():
        plain["reasoning_content"] = reasoning[0]
    return plain | fields


def _text(content: Any, place: str, field: str = "content") -> str:
    """A text as it is, or the texts of content parts, joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TeacherDataError(f"{place} has a `{field}` that is {short(content)}, no text.")
    texts = []
    for part in content:
        part = without_none(part)
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise TeacherDataError(
                f"{place} has a `{field}` that holds {short(part)}; a part of text is {{'type': 'text', 'text': ...}}."
            )
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise TeacherDataError(
                f"{place} has a content part of type {part['type']!r}: only text is distilled. Remove the part or the row."
            )
        others = [name for name in part if name not in ("type", "text") and part[name] not in ("", [], {})]
        if others:
            raise TeacherDataError(
                f"{place} has a content part with `{others[0]}`, which no chat template renders. Remove the field."
            )
        texts.append(part["text"])
    return "".join(texts)


def split_reasoning(message: dict) -> Reasoned:
    """
    Reasoning and answer of a plain message: its `reasoning_content`, or what stands between `<think>` and `</think>` in
    front of its `content`.
    """
    content = message["content"]
    if "reasoning_content" in message:
        return Reasoned(message["reasoning_content"], content)
    before, closed, after = content.partition(CLOSE_THINK)
    if closed and before.lstrip().startswith(OPEN_THINK):
        return Reasoned(before.lstrip().removeprefix(OPEN_THINK).strip("\n"), after.lstrip("\n"))
    return Reasoned("", content)


def without_reasoning(message: dict) -> dict:
    """A plain message of the assistant without what it thought; any other message as it is."""
    if message["role"] != "assistant":
        return message
    plain = {key: value for key, value in message.items() if key != "reasoning_content"}
    return plain | {"content": split_reasoning(message).content}


def answer_text(completion: str | list[dict]) -> str:
    """The text of a checked completion: a string, or one assistant message. Reasoning in a field of its own is not in it."""
    return completion if isinstance(completion, str) else plain_messages(completion, "`completion`")[0]["content"]


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
