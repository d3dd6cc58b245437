"""What an endpoint does with what it is asked for, by its answer: a status of 200 promises nothing."""

from typing import Any

from .replies import Answers, Choice
from .settings import CollectConfig


HONOURED, IGNORED, REFUSED, FEWER = "honoured", "ignored", "refused", "answered with fewer"
NOT_CHECKED = "sent, not checked"
PREFIX_TOKENS = 16
WHOLE, SHORT, MISSING = "whole", "short", "missing"


def compare(settings: CollectConfig, body: dict[str, Any], answers: Answers) -> dict[str, str]:
    """
    What of a request shows in its answers.

    Returns:
        `dict[str, str]`: for each parameter that was sent, of `n`, `logprobs`, `top_logprobs`, `token_ids` and `seed`,
        and for `usage`, what became of it.
    """
    found = {}
    if body.get("n", 1) > 1:
        found["n"] = HONOURED if len(answers.choices) == body["n"] else IGNORED
    first = answers.choices[0]
    if settings.logprobs:
        found["logprobs"] = IGNORED if state_of_logprobs(first) == MISSING else HONOURED
    if settings.top_logprobs is not None:
        most = max((len(entry.get("top_logprobs") or ()) for entry in token_entries(first)), default=0)
        found["top_logprobs"] = HONOURED if most >= settings.top_logprobs else FEWER if most else IGNORED
    if settings.return_token_ids:
        found["token_ids"] = HONOURED if _has_ids(first) else IGNORED
    if settings.seed is not None:
        found["seed"] = NOT_CHECKED
    found["usage"] = HONOURED if answers.usage else IGNORED
    return found


def lacks(found: dict[str, str]) -> str | None:
    """The first parameter without which an answer is not what the recipe asks for, if one was ignored."""
    needed = ("logprobs", "top_logprobs", "token_ids")
    return next((name for name in needed if found.get(name) in (IGNORED, FEWER)), None)


def seed_request(body: dict[str, Any], settings: CollectConfig) -> dict[str, Any]:
    """A request again, for the beginning of its answer alone."""
    short = {name: value for name, value in body.items() if name not in ("n", "logprobs", "top_logprobs")}
    return short | {settings.max_tokens_name: min(PREFIX_TOKENS, settings.max_tokens)}


def is_same_beginning(answer: Choice, again: Choice) -> bool | None:
    """Whether one seed gave one answer; `None` where there is nothing to compare."""
    text, beginning = answer.reasoning + answer.content, (again.reasoning + again.content).rstrip("�")
    return text.startswith(beginning.rstrip()) if beginning.strip() else None


def token_entries(choice: Choice) -> list[dict]:
    """Log-probabilities by token, as the endpoint gave them."""
    logprobs = choice.raw.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def state_of_logprobs(choice: Choice) -> str:
    """Whether there are log-probabilities, and whether they reach the answer's end."""
    entries = [entry for entry in token_entries(choice) if isinstance(entry.get("logprob"), int | float)]
    if not entries:
        return MISSING
    sizes = [_size(entry) for entry in entries]
    if any(size is None for size in sizes):
        return WHOLE  # ids in the place of texts: how far they reach is the tokenizer's to say
    return WHOLE if sum(size or 0 for size in sizes) >= len(choice.content.encode(errors="replace")) else SHORT


def _size(entry: dict) -> int | None:
    token, parts = entry.get("token"), entry.get("bytes")
    if isinstance(parts, list):
        return len(parts)
    if not isinstance(token, str) or token.startswith("token_id:"):
        return None
    return len(token.encode(errors="replace"))


def _has_ids(choice: Choice) -> bool:
    entries = token_entries(choice)
    named = bool(entries) and all(str(entry.get("token", "")).startswith("token_id:") for entry in entries)
    return named or bool(choice.raw.get("token_ids"))
