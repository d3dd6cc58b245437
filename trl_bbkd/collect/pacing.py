"""How fast an endpoint is asked: limits by the minute, one pause for all, and how many at once."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable


MINUTE = 60.0
SHORTEST_BACKOFF, LONGEST_BACKOFF = 0.5, 60.0
# An endpoint that asks for more has a limit by the day or the month
LONGEST_PAUSE = 900.0


class Spacing:
    """
    A limit by the minute, kept by the distance of what is let through: in no minute more than `per_minute`, and one more
    cost where costs differ. Up to a second that was not used is made up for.

    Args:
        per_minute (`float`):
            The limit, in requests or in tokens.
    """

    CATCH_UP = 1.0

    def __init__(self, per_minute: float):
        self.seconds_each = (MINUTE + self.CATCH_UP) / per_minute
        self._next: float | None = None

    def book(self, now: float, cost: float = 1.0) -> float:
        """The earliest time at which `cost` may pass, which is then taken."""
        start = now if self._next is None else max(now - self.CATCH_UP, self._next)
        self._next = start + cost * self.seconds_each
        return max(now, start)

    def give_back(self, cost: float) -> None:
        """Of what was booked, what turned out not to be used."""
        if self._next is not None:
            self._next -= cost * self.seconds_each


def backoff(attempt: int, dice: random.Random) -> float:
    """Seconds before another attempt, after `attempt` failed ones: anything up to a bound that doubles."""
    return dice.uniform(0.0, min(LONGEST_BACKOFF, SHORTEST_BACKOFF * 2**attempt))


class Pace:
    """
    Lets requests through.

    Args:
        concurrency (`int`):
            Requests in flight at most.
        requests_per_minute, tokens_per_minute (`int`, *optional*):
            Limits of the endpoint.
        clock (`Callable[[], float]`, *optional*, defaults to `time.monotonic`):
            Seconds.
        sleep (`Callable[[float], Awaitable]`, *optional*, defaults to `asyncio.sleep`):
            Waits; it may raise to end the waiting.
        dice (`random.Random`, *optional*):
            Of pauses whose length the endpoint does not say.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        dice: random.Random | None = None,
    ):
        self.concurrency = concurrency
        self.at_once = float(concurrency)
        self.in_flight = 0
        self.pauses = 0
        self._requests = Spacing(requests_per_minute) if requests_per_minute else None
        self._tokens = Spacing(tokens_per_minute) if tokens_per_minute else None
        self._clock, self._sleep, self._dice = clock, sleep, dice or random.Random()
        self._paused_until = 0.0
        self._last_pause = float("-inf")
        self._pauses_in_a_row = 0
        self._changed = asyncio.Event()

    @property
    def is_paused(self) -> bool:
        return self._clock() < self._paused_until

    async def enter(self, tokens: int) -> float:
        """Wait for a turn, then take it. Returns the time at which it was taken, for [`overloaded`]."""
        while self.in_flight >= max(1, int(self.at_once)):
            changed = self._changed
            await changed.wait()
        self.in_flight += 1
        try:
            while True:
                while (pause := self._paused_until - self._clock()) > 0:
                    await self._sleep(pause)
                now = self._clock()
                at = max(
                    self._requests.book(now) if self._requests else now,
                    self._tokens.book(now, tokens) if self._tokens else now,
                )
                if at > now:
                    await self._sleep(at - now)
                if not self.is_paused:  # a pause that began meanwhile makes the booked time void
                    return self._clock()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """After a turn."""
        self.in_flight -= 1
        self._tell()

    def used(self, booked: int, tokens: int) -> None:
        """Of the tokens that were booked, so many were used."""
        if self._tokens and tokens < booked:
            self._tokens.give_back(booked - tokens)

    def succeeded(self) -> None:
        """An answer came: a little more at once."""
        self._pauses_in_a_row = 0
        self.at_once = min(float(self.concurrency), self.at_once + 1 / self.at_once)

    def overloaded(self, entered: float, wait: float | None) -> None:
        """
        Pause all. Requests that were on their way when a pause began say nothing new, but for a longer wait.

        Args:
            entered (`float`):
                When the request that was refused took its turn.
            wait (`float`, *optional*):
                Seconds that the endpoint asks for.
        """
        now = self._clock()
        if entered > self._last_pause:
            self.pauses += 1
            self._pauses_in_a_row += 1
            self._last_pause = now
            self.at_once = max(1.0, self.at_once / 2)
            wait = wait or backoff(self._pauses_in_a_row, self._dice)
        self._paused_until = max(self._paused_until, now + (wait or 0.0))

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
