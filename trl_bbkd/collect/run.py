"""A run: what is missing is asked, what comes is kept, and what goes wrong is asked again, listed, or ends it."""

import asyncio
import contextlib
import random
import signal
import sqlite3
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from .budget import Budget, CapReached, Spent
from .client import Client
from .journal import ANSWER, FAILURE, Entry, Journal, now
from .pacing import LONGEST_PAUSE, Pace, backoff
from .probe import FEWER, HONOURED, IGNORED, NOT_CHECKED, REFUSED, compare, is_same_beginning, lacks, seed_request
from .prompts import Prompt
from .redaction import Redactor
from .replies import RATE_LIMITED, UNREACHABLE, Answers, Fault, Usage, read
from .requests import Asked, RequestMaker, groups
from .settings import CollectConfig
from .tally import Tally


# Requests that are sent one by one until one is answered
LOOKS = 3
# Of a row, beside the faults that `max_retries` counts
MOST_REFUSALS = 20
# What an endpoint may say to a parameter that it does not take
NOT_TAKEN = ("status 400", "status 422")


class End(NamedTuple):
    """Why a run ended before all was asked: its error, its cap, or its user."""

    kind: Literal["error", "cap", "interrupt"]
    text: str


class _Stopping(Exception):  # noqa: N818
    """The run is about to end: nothing more is sent."""


class _Look(NamedTuple):
    """A request that was answered while the endpoint was looked at."""

    body: dict[str, Any]
    answers: Answers


class Collection:
    """
    The state of a run.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.
        prompts (`Iterable[Prompt]`):
            What is asked, the same whenever it is gone through.
        journal ([`~collect.journal.Journal`]):
            What was answered, and what is.
        key (`str`, *optional*):
            The endpoint's.
        dice (`random.Random`, *optional*):
            Of waiting times.
    """

    def __init__(
        self,
        settings: CollectConfig,
        prompts: Iterable[Prompt],
        journal: Journal,
        key: str | None,
        dice: random.Random | None = None,
    ):
        self.settings, self.prompts, self.journal, self._key = settings, prompts, journal, key
        self.maker = RequestMaker(settings)
        self.redactor = Redactor(key)
        self.tally = Tally()
        self.budget = Budget(settings, journal.spent())
        self.found = journal.findings(self.maker.kind)
        self.end: End | None = None
        self._last_failure = ""
        self._dice = dice or random.Random()

    @property
    def together(self) -> bool:
        """Whether one request brings several answers."""
        return (self.found or {}).get("n") == HONOURED

    def count(self) -> None:
        """Check all rows, and count what is missing."""
        meetings = self.journal.first_meetings()
        for prompt in self.prompts:
            for key in self.maker.keys(prompt):
                if meetings.is_first(key):
                    state = self.journal.state(key)
                    is_missing = self._is_missing(state)
                    self.tally.expected += is_missing
                    self.tally.there += state == ANSWER
                    self.tally.failed_before += state == FAILURE and not is_missing

    def _is_missing(self, state: str | None) -> bool:
        return state is None or (state == FAILURE and self.settings.retry_failed)

    def _pending(self) -> Iterator[Asked]:
        """What is to be asked, each answer once."""
        meetings = self.journal.first_meetings()
        for prompt in self.prompts:
            keys = enumerate(self.maker.keys(prompt))
            missing = [
                sample for sample, key in keys if meetings.is_first(key) and self._is_missing(self.journal.state(key))
            ]
            # The first of a new endpoint shows whether it brings several answers at once
            yield from (Asked(prompt, group) for group in groups(missing, self.together or self.found is None))

    async def run(self) -> None:
        """Ask for all that is missing, or until [`end`] says why not."""
        self._stop = asyncio.Event()
        limits = (self.settings.requests_per_minute, self.settings.tokens_per_minute)
        self.pace = Pace(self.settings.concurrency, *limits, sleep=self._rest, dice=self._dice)
        pending = self._pending()
        with _interrupting(self.stop):
            async with Client(self.settings, self._key) as self.client:
                if self.found is None:
                    await self._look(pending)
                workers = [asyncio.create_task(self._work(pending)) for _ in range(self.settings.concurrency)]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)

    def stop(self, end: End) -> None:
        """End the run once what is in flight is there."""
        self.end = self.end or end
        self._stop.set()
        self.budget.close()

    async def _rest(self, seconds: float) -> None:
        """Wait, but not beyond the end of the run."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        self._go_on()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _Stopping

    async def _work(self, pending: Iterator[Asked]) -> None:
        while not self._stop.is_set() and (asked := next(pending, None)) is not None:
            await self._ask(asked)

    async def _ask(self, asked: Asked) -> _Look | None:
        """Ask until there are answers, or a fault that stays. What a run's end leaves open is asked in the next one."""
        try:
            return await self._ask_in_turn(asked)
        except CapReached as cap:
            self.stop(End("cap", str(cap)))
        except sqlite3.OperationalError as error:
            self.stop(
                End("error", f"{self.journal.path} cannot be written: {error}. What was answered before is safe.")
            )
        except _Stopping:
            pass
        return None

    async def _ask_in_turn(self, asked: Asked) -> _Look | None:
        body = self.maker.body(asked)
        attempts = faults = refusals = 0
        while True:
            self._go_on()
            attempts += 1
            request = await self._send(body)
            outcome = request.outcome
            if isinstance(outcome, Answers):
                self._keep(asked, request, attempts)
                for sample in asked.samples[len(outcome.choices) :]:
                    await self._ask_in_turn(Asked(asked.prompt, (sample,)))
                return _Look(body, outcome)
            if self.found is None and len(asked.samples) > 1 and outcome.kind in NOT_TAKEN:
                # It may be `n`, where little is known of the endpoint yet
                request.settle(self, {})
                looks = [await self._ask_in_turn(Asked(asked.prompt, (sample,))) for sample in asked.samples]
                return next(filter(None, looks), None)
            is_refusal = outcome.kind in (RATE_LIMITED, UNREACHABLE)
            refusals, faults = refusals + is_refusal, faults + (not is_refusal)
            if (outcome.wait or 0) > LONGEST_PAUSE:
                outcome.ends_run, outcome.text = True, f"asks to wait {outcome.wait:,.0f} s. {outcome.text}"
            if outcome.kind == UNREACHABLE and (self.found is None or refusals > MOST_REFUSALS):
                outcome.ends_run = True
            if outcome.ends_run:
                request.settle(self, {})
                self.stop(End("error", self._said(outcome)))
                raise _Stopping
            if not outcome.may_pass or faults > self.settings.max_retries or refusals > MOST_REFUSALS:
                self._give_up(asked, request, attempts)
                return None
            self.tally.faults[outcome.kind] += 1
            request.settle(self, {})
            if outcome.is_overload:
                self.pace.overloaded(request.entered, outcome.wait)
            else:
                await self._rest(max(outcome.wait or 0.0, backoff(faults, self._dice)))

    async def _send(self, body: dict[str, Any]) -> "_Request":
        """One attempt: claimed, then noted, then sent."""
        tokens = self.maker.worst_case(body)
        worst = self.budget.worst(tokens)
        await self.budget.claim(worst)
        entered = await self.pace.enter(tokens.total)
        if self._stop.is_set():
            # What is held is not given back: nobody waits for room any more, but others may for a turn
            self.pace.leave()
            raise _Stopping
        try:
            number = self.journal.sending(worst)
            reply = await self.client.send(body)
        finally:
            self.pace.leave()
        outcome = read(reply, time.time())
        request = _Request(number, worst, entered, outcome)
        if isinstance(outcome, Answers):
            self.pace.succeeded()
        self.pace.used(tokens.total, request.actual(self).tokens)
        return request

    def _keep(self, asked: Asked, request: "_Request", attempts: int) -> None:
        answers = request.outcome
        assert isinstance(answers, Answers)
        entries = {}
        # What a request took is written to its first answer
        usages = [answers.usage, *[Usage(0, 0)] * (len(asked.samples) - 1)]
        kept = list(zip(asked.samples, answers.choices, usages, strict=False))
        for sample, choice, usage in kept:
            entry = Entry.answered(sample, choice, answers, usage, attempts, self.redactor.in_answers)
            entries[self.maker.key(asked.prompt, sample)] = entry
        request.settle(self, entries)
        self.tally.answered += len(kept)
        self.tally.left_out.update(choice.reason for _, choice, _ in kept if choice.reason is not None)
        self.tally.without_usage += answers.usage is None

    def _give_up(self, asked: Asked, request: "_Request", attempts: int) -> None:
        fault = request.outcome
        assert isinstance(fault, Fault)
        text = self.redactor.in_messages(fault.text)
        entries = {
            self.maker.key(asked.prompt, sample): Entry(sample, attempts, now(), failure=fault.kind, message=text)
            for sample in asked.samples
        }
        request.settle(self, entries)
        self.tally.failed += len(entries)
        self.tally.failures[fault.kind] += len(entries)
        self._last_failure = self._said(fault)

    def _said(self, fault: Fault) -> str:
        return f"{self.maker.endpoint} and model {self.settings.model!r}: {self.redactor.in_messages(str(fault))}"

    # The endpoint, before many requests are sent

    async def _look(self, pending: Iterator[Asked]) -> None:
        """Send requests one by one until one is answered, and see what became of what it asked for."""
        looks = 0
        lacked: list[dict[str, str]] = []
        while not self._stop.is_set() and (asked := next(pending, None)) is not None:
            look = await self._ask(asked)
            looks += 1
            if look is None:
                if looks >= LOOKS and not lacked and not self._stop.is_set():
                    self.stop(End("error", f"none of the first {LOOKS} requests was answered. {self._last_failure}"))
                continue
            found = compare(self.settings, look.body, look.answers)
            if len(asked.samples) > 1 and "n" not in look.body:
                found = {"n": REFUSED} | found
            lacked.append(found)
            # One answer may lack it by accident
            if (name := lacks(found)) is None or len(lacked) > 1:
                if name is not None:
                    self._refuse(name, found[name])
                    return
                if "seed" in found and self.settings.temperature != 0 and not self._stop.is_set():
                    found["seed"] = await self._look_at_seed(look)
                self.found = found
                self.journal.note_findings(self.maker.kind, found)
                return
        self.found = lacked[-1] if lacked else None

    def _refuse(self, name: str, what: str) -> None:
        key = {"token_ids": "return_token_ids"}.get(name, name)
        how = "lower it in" if what == FEWER else "take it out of"
        self.stop(
            End(
                "error",
                f"{self.maker.endpoint} and model {self.settings.model!r}: `{key}` is {what}, by two answers. Either {how} the "
                "recipe, or take another endpoint.",
            )
        )

    async def _look_at_seed(self, look: _Look) -> str:
        """Whether the beginning of an answer comes again with its seed. What this costs counts; it brings no row."""
        try:
            request = await self._send(seed_request(look.body, self.settings))
        except (CapReached, _Stopping):
            return NOT_CHECKED
        request.settle(self, {})
        if not isinstance(request.outcome, Answers):
            return NOT_CHECKED
        same = is_same_beginning(look.answers.choices[0], request.outcome.choices[0])
        return NOT_CHECKED if same is None else HONOURED if same else IGNORED


class _Request(NamedTuple):
    """A request that was sent, and what came of it."""

    number: int
    worst: Spent
    entered: float
    outcome: Answers | Fault

    def actual(self, run: Collection) -> Spent:
        """What it took: its worst case where the endpoint does not say."""
        if isinstance(self.outcome, Fault):
            was_sent = self.outcome.kind != UNREACHABLE
            return self.worst if self.outcome.may_be_paid else Spent(int(was_sent))
        usage = self.outcome.usage
        return Spent(1, usage.prompt, usage.completion, run.budget.prices.cost(usage)) if usage else self.worst

    def settle(self, run: Collection, entries: dict[bytes, Entry]) -> None:
        actual = self.actual(run)
        outcome = "answered" if isinstance(self.outcome, Answers) else self.outcome.kind
        run.journal.settle(self.number, outcome, actual, entries)
        run.budget.settle(self.worst, actual)
        run.tally.spent.add(actual)


@contextlib.contextmanager
def _interrupting(stop) -> Iterator[None]:
    """Ctrl-C ends the run; a second one leaves what is in flight."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    before = signal.getsignal(signal.SIGINT)
    presses = 0

    def interrupted(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            loop.call_soon_threadsafe(stop, End("interrupt", ""))
        elif task is not None:
            loop.call_soon_threadsafe(task.cancel)

    try:
        signal.signal(signal.SIGINT, interrupted)
    except ValueError:  # not the main thread, where no Ctrl-C arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
