"""What an endpoint's reply is: answers, a fault that may pass, one that stays, or one that ends the run."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ..data.messages import CLOSE_THINK, OPEN_THINK


CUT, FILTERED, EMPTY, REFUSED, IN_THOUGHT = "length", "content_filter", "empty", "refusal", "cut in its thought"
RATE_LIMITED, UNREACHABLE = "rate limit", "unreachable"
OVERLOADED = (RATE_LIMITED, UNREACHABLE, "status 503", "status 529")
QUOTA_WORDS = ("insufficient_quota", "billing_hard_limit_reached", "insufficient balance")
UNKNOWN_MODEL = re.compile(
    r"\bmodel\b.{0,80}(not found|not exist|unknown|not available)|(unknown|invalid|no such) model|model_not_found"
    r"|server is pinned to"
)
ENDS_THE_RUN = (401, 402, 403, 404)
MAY_PASS = (408, 409, 425, 429)
SHOWN = 300
# Surrogates, as JSON may escape them and as bytes that a careless server writes; alone they are no text
MAY_CUT_CHARACTERS, HALF_A_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]"), re.compile("[\ud800-\udfff]")


@dataclass
class Reply:
    """A status and all of a body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class NoReply:
    """
    A request without a whole reply.

    Attributes:
        kind (`str`): what happened.
        text (`str`): details, without anything that was sent.
        was_sent (`bool`): whether the endpoint may have read it, and may have it paid.
    """

    kind: str
    text: str = ""
    was_sent: bool = True


@dataclass
class Choice:
    """
    One answer, read.

    Attributes:
        raw (`dict`): as the endpoint gave it, with its log-probabilities.
        content, reasoning (`str`): the answer, and what was thought before it.
        finish_reason (`str` or `None`): the endpoint's own.
        reason (`str` or `None`): why it is no whole answer, if so.
    """

    raw: dict[str, Any]
    content: str
    reasoning: str
    finish_reason: str | None
    reason: str | None


@dataclass
class Usage:
    """Tokens that are paid."""

    prompt: int
    completion: int
    cached: int = 0


@dataclass
class Answers:
    """A reply that has answers."""

    choices: list[Choice]
    usage: Usage | None
    model: str | None
    system_fingerprint: str | None


@dataclass
class Fault:
    """
    A reply, or none, that has no answer.

    Attributes:
        kind (`str`): by which faults are counted.
        text (`str`): what the endpoint said; not yet redacted.
        may_pass (`bool`): whether to ask again.
        ends_run (`bool`): whether no other request would fare better.
        may_be_paid (`bool`): whether the endpoint may count it.
        wait (`float` or `None`): seconds that the endpoint asks for.
        is_overload (`bool`): whether fewer requests would help.
    """

    kind: str
    text: str = ""
    may_pass: bool = False
    ends_run: bool = False
    may_be_paid: bool = False
    wait: float | None = None
    is_overload: bool = field(init=False)

    def __post_init__(self):
        self.is_overload = self.kind in OVERLOADED

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


def read(reply: Reply | NoReply, now: float) -> Answers | Fault:
    """
    Judge a reply by what is in it: a status of 200 says little.

    Args:
        reply ([`Reply`] or [`NoReply`]):
            What came.
        now (`float`):
            Seconds since the epoch, for dates in headers.
    """
    if isinstance(reply, NoReply):
        return Fault(reply.kind, reply.text, may_pass=True, may_be_paid=reply.was_sent)
    try:
        body = _parsed(reply.body)
    except ValueError:
        body = None
    if reply.status != 200:
        return _refusal(reply, body, now)
    if not isinstance(body, dict):
        is_page = _is_page(reply.body)
        # No gateway's page is paid; half an answer is
        return Fault(
            "a page for an answer" if is_page else "malformed JSON", _shown(reply.body), True, False, not is_page
        )
    if body.get("error"):
        return _refusal(reply, body, now)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return Fault("no choices", "", may_pass=True, may_be_paid=True)
    if not all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices):
        return Fault("no message", _shown(reply.body), may_pass=True, may_be_paid=True)
    return Answers(
        [read_choice(choice) for choice in sorted(choices, key=_index)],
        read_usage(body.get("usage")),
        _text_or_none(body.get("model")),
        _text_or_none(body.get("system_fingerprint")),
    )


def _parsed(body: bytes) -> Any:
    """JSON, in which half a character, as of an emoji that was cut, becomes U+FFFD: no file can hold it, and no journal."""
    parsed = json.loads(body)
    if MAY_CUT_CHARACTERS.search(body) is None:
        return parsed
    return json.loads(HALF_A_CHARACTER.sub("\ufffd", json.dumps(parsed, ensure_ascii=False)))


def _index(choice: dict) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


class Message(NamedTuple):
    """The text of an answer, in two parts."""

    content: str
    reasoning: str
    is_closed: bool


def read_message(message: dict) -> Message:
    """
    Answer and reasoning: from `reasoning_content` or `reasoning`, or of `content` what stands before `</think>`, whose
    opening the prompt may have had. A thought without an end is all reasoning.
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(text for text in parts if isinstance(text, str))
    content = content if isinstance(content, str) else ""
    named = (message.get(name) for name in ("reasoning_content", "reasoning"))
    if thought := next((text for text in named if isinstance(text, str) and text.strip()), ""):
        return Message(content, thought, True)
    before, closed, after = content.partition(CLOSE_THINK)
    opens = before.lstrip().startswith(OPEN_THINK)
    if closed and (opens or OPEN_THINK not in before):
        return Message(after.lstrip("\n"), before.lstrip().removeprefix(OPEN_THINK).strip("\n"), True)
    if opens:
        return Message("", before.lstrip().removeprefix(OPEN_THINK).strip("\n"), False)
    return Message(content, "", True)


def read_choice(raw: dict[str, Any]) -> Choice:
    """One of a reply's choices, and why it is no whole answer, if so."""
    message = raw["message"]
    content, reasoning, is_closed = read_message(message)
    finish_reason = _text_or_none(raw.get("finish_reason"))
    has_answer = bool(content.strip() or message.get("tool_calls"))
    reason: str | None
    if finish_reason == FILTERED:
        reason = FILTERED
    elif not is_closed or (finish_reason == CUT and reasoning and not has_answer):
        reason = IN_THOUGHT
    elif finish_reason == CUT:
        reason = CUT
    elif message.get("refusal") and not has_answer:
        reason = REFUSED
    else:
        reason = None if has_answer else EMPTY
    return Choice(raw, content, reasoning, finish_reason, reason)


def read_usage(usage: Any) -> Usage | None:
    """Tokens as the endpoint counted them, if it did."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else usage.get("prompt_cache_hit_tokens")
    return Usage(prompt, completion, cached if isinstance(cached, int) else 0)


def _refusal(reply: Reply, body: Any, now: float) -> Fault:
    """An error by its status, its code and its words; one that comes with status 200 has none of the first."""
    said, code = _said(body)
    text = said or ("" if _is_page(reply.body) else _shown(reply.body))
    words = f"{code} {text}".lower()
    status = reply.status
    if any(word in words for word in QUOTA_WORDS):
        return Fault("quota", text, ends_run=True)
    if status == 200:
        status = int(code) if code.isdigit() and len(code) == 3 else 0
        if "rate_limit" in words:
            status = 429
    if status == 429:
        return Fault(RATE_LIMITED, text, may_pass=True, wait=wait_asked_for(reply.headers, now))
    if status < 500 and UNKNOWN_MODEL.search(words):
        return Fault("unknown model", text, ends_run=True)
    if status in ENDS_THE_RUN or "invalid_api_key" in words:
        return Fault(f"status {status}" if status else "refused", text, ends_run=True)
    if 300 <= status < 400:
        return Fault(f"status {status}", "the endpoint redirects; name its new address in base_url", ends_run=True)
    if not status:
        return Fault("an error for an answer", text, may_pass=True)
    if status in MAY_PASS or status >= 500:
        return Fault(f"status {status}", text, may_pass=True, wait=wait_asked_for(reply.headers, now))
    return Fault(f"status {status}", text)


def _is_page(body: bytes) -> bool:
    return body.lstrip()[:1] == b"<"


def _shown(body: bytes) -> str:
    return " ".join(body[: 4 * SHOWN].decode(errors="replace").split())[:SHOWN]


def _said(body: Any) -> tuple[str, str]:
    """Message and code of an error: OpenAI's form, FastAPI's, or plain text in one of the usual places."""
    if not isinstance(body, dict):
        return "", ""
    error = body.get("error", body)
    if not isinstance(error, dict):
        return str(error)[:SHOWN], str(body.get("code", ""))
    message = error.get("message") or error.get("detail") or error.get("msg") or ""
    if not isinstance(message, str):
        message = json.dumps(message, ensure_ascii=False)
    codes = (error.get("code"), error.get("type"))
    return " ".join(message.split())[:SHOWN], " ".join(str(code) for code in codes if code is not None)


def wait_asked_for(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds until the endpoint will be asked again: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    lower = {name.lower(): value for name, value in headers.items()}
    if (milliseconds := _number(lower.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = lower.get("retry-after")
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
