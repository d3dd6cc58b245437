"""A request: its body, the key under which its answer is kept, and what it costs at most."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from .settings import CollectConfig


if TYPE_CHECKING:
    # Reads data sets: a second to import
    from .prompts import Prompt


# Beside its text: role, separators, and what opens the answer
TOKENS_OF_A_MESSAGE = 16


class WorstCase(NamedTuple):
    """Tokens of a request that cannot be exceeded."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class Asked(NamedTuple):
    """
    Answers to one prompt that one request is to bring.

    Attributes:
        prompt ([`~collect.prompts.Prompt`]):
            The prompt.
        samples (`tuple[int, ...]`):
            Numbers of the answers, which follow each other.
    """

    prompt: "Prompt"
    samples: tuple[int, ...]


class RequestMaker:
    """
    Requests of one recipe.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.
    """

    def __init__(self, settings: CollectConfig):
        self.settings = settings
        self.endpoint = endpoint_of(settings.base_url)
        self.parameters = _parameters(settings)
        # By what an endpoint is looked at anew
        self.kind = _digest({"endpoint": self.endpoint, "parameters": self.parameters})

    def body(self, asked: Asked) -> dict[str, Any]:
        """What is sent: one request brings all samples, of which the first decides on the seed."""
        body = self._body(asked.prompt)
        if len(asked.samples) > 1:
            body["n"] = len(asked.samples)
        if self.settings.seed is not None:
            body["seed"] = self.settings.seed + asked.samples[0]
        return body

    def key(self, prompt: "Prompt", sample: int) -> bytes:
        """Under which an answer is kept: the same for the same answer, however it was asked for."""
        return _digest(
            {"endpoint": self.endpoint, "body": self._body(prompt), "seed": self.settings.seed, "sample": sample}
        )

    def keys(self, prompt: "Prompt") -> list[bytes]:
        """Those of all of a prompt's answers."""
        return [self.key(prompt, sample) for sample in range(self.settings.num_samples)]

    def worst_case(self, body: dict[str, Any]) -> WorstCase:
        """
        No token is shorter than a byte, so a prompt has no more tokens than bytes.
        """
        messages = body["messages"]
        size = len(json.dumps([messages, body.get("tools")], ensure_ascii=False).encode(errors="replace"))
        answers = body.get("n", 1) * body[self.settings.max_tokens_name]
        return WorstCase(size + TOKENS_OF_A_MESSAGE * (len(messages) + 1), answers)

    def _body(self, prompt: "Prompt") -> dict[str, Any]:
        body = {"model": self.settings.model, "messages": prompt.messages, **self.parameters}
        return body | {"tools": prompt.tools} if prompt.tools else body


def groups(samples: Sequence[int], together: bool) -> list[tuple[int, ...]]:
    """Numbers of samples, those that one request can bring together: with one seed, they follow each other."""
    found: list[list[int]] = []
    for sample in samples:
        if together and found and found[-1][-1] == sample - 1:
            found[-1].append(sample)
        else:
            found.append([sample])
    return [tuple(group) for group in found]


def endpoint_of(base_url: str) -> str:
    """An address without credentials and without what may be written in two ways."""
    parts = urlsplit(base_url)
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit((parts.scheme.lower(), host + port, parts.path.rstrip("/"), "", ""))


def chat_url(base_url: str) -> str:
    """Where requests go: a query, such as `?api-version=1`, stays behind the path."""
    parts = urlsplit(base_url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + "/chat/completions", parts.query, ""))


def _parameters(settings: CollectConfig) -> dict[str, Any]:
    """Of the recipe, what is sent with each prompt; what is not said is not sent."""
    said = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        settings.max_tokens_name: settings.max_tokens,
        "stop": settings.stop,
        "logprobs": settings.logprobs or None,
        "top_logprobs": settings.top_logprobs,
    }
    if settings.return_token_ids:
        said |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
    return {name: value for name, value in said.items() if value is not None} | (settings.extra_body or {})


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()
