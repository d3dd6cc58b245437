"""Caps on requests, tokens and money, which are claimed before a request is sent and settled after it."""

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

from .replies import Usage
from .requests import WorstCase
from .settings import CollectConfig


MILLION = 1_000_000


@dataclass
class Spent:
    """Sums over requests."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion

    def add(self, other: "Spent", sign: int = 1) -> None:
        self.requests += sign * other.requests
        self.prompt += sign * other.prompt
        self.completion += sign * other.completion
        self.cost += sign * other.cost


class CapReached(Exception):  # noqa: N818
    """No further request fits under a cap, whose key this is."""


class Prices(NamedTuple):
    """Of a million tokens each."""

    prompt: float
    completion: float
    cached: float

    @classmethod
    def of(cls, settings: CollectConfig) -> "Prices":
        prompt = settings.prompt_price or 0.0
        cached = settings.cached_prompt_price
        return cls(prompt, settings.completion_price or 0.0, prompt if cached is None else cached)

    def cost(self, usage: Usage) -> float:
        cached = min(usage.cached, usage.prompt)
        paid = (usage.prompt - cached) * self.prompt + cached * self.cached + usage.completion * self.completion
        return paid / MILLION

    def worst(self, tokens: WorstCase) -> float:
        # A provider may take more for what it writes to a cache; it never takes more than for all of it uncached here
        return (tokens.prompt * max(self.prompt, self.cached) + tokens.completion * self.completion) / MILLION


class Budget:
    """
    What may still be spent.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            Caps and prices.
        spent ([`Spent`]):
            What earlier runs have spent, or may have.
    """

    def __init__(self, settings: CollectConfig, spent: Spent):
        self.prices = Prices.of(settings)
        self.caps = {
            "max_requests": (settings.max_requests, lambda of: of.requests),
            "max_total_tokens": (settings.max_total_tokens, lambda of: of.tokens),
            "max_cost": (settings.max_cost, lambda of: of.cost),
        }
        self.spent = spent
        self._held = Spent()
        self._claims = 0
        self._is_closed = False
        self._changed = asyncio.Event()

    def worst(self, tokens: WorstCase) -> Spent:
        """What a request takes at most."""
        return Spent(1, tokens.prompt, tokens.completion, self.prices.worst(tokens))

    async def claim(self, worst: Spent) -> None:
        """
        Hold a request's worst case, once what is in flight leaves room for it.

        Raises:
            [`CapReached`]: there is none, and nothing is in flight, or nothing is waited for any more.
        """
        while (cap := self._missing(worst)) is not None:
            if self._is_closed or not self._claims:
                raise CapReached(cap)
            changed = self._changed
            await changed.wait()
        self._claims += 1
        self._held.add(worst)

    def settle(self, worst: Spent, actual: Spent) -> None:
        """Give a worst case back, and count what it became."""
        self._claims -= 1
        self._held.add(worst, -1)
        if not self._claims:
            self._held = Spent()  # without what sums of floats leave
        self.spent.add(actual)
        self._tell()

    def close(self) -> None:
        """Have nobody wait for room any more."""
        self._is_closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _missing(self, worst: Spent) -> str | None:
        for name, (cap, amount) in self.caps.items():
            if cap is not None and amount(self.spent) + amount(self._held) + amount(worst) > cap:
                return name
        return None
