"""Limits by the minute, pauses and concurrency, by a clock that the test turns."""

import asyncio
import heapq
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.collect.pacing import LONGEST_BACKOFF, MINUTE, Pace, Spacing, backoff


gaps = st.lists(st.floats(0, 20, allow_subnormal=False), min_size=2, max_size=120)


def most_in_a_minute(times, costs):
    """The largest sum of costs in a half-open minute."""
    return max(
        sum(cost for time, cost in zip(times, costs, strict=True) if start <= time < start + MINUTE - 1e-6)
        for start in times
    )


@given(gaps, st.integers(1, 40))
def test_no_minute_has_more_requests_than_the_limit(gaps, limit):
    spacing, times = Spacing(limit), []
    for arrival in itertools.accumulate(gaps):
        times.append(spacing.book(arrival))
    assert times == sorted(times)
    assert most_in_a_minute(times, [1] * len(times)) <= limit


@given(
    st.lists(st.tuples(st.floats(0, 5, allow_subnormal=False), st.integers(1, 500)), min_size=2, max_size=80),
    st.integers(500, 3000),
)
def test_no_minute_has_more_tokens_than_the_limit_and_one_request(arrivals, limit):
    spacing, times, now = Spacing(limit), [], 0.0
    for gap, cost in arrivals:
        now += gap
        times.append(spacing.book(now, cost))
    costs = [cost for _, cost in arrivals]
    assert most_in_a_minute(times, costs) <= limit + max(costs)


def test_a_limit_is_reached():
    """Requests that always wait are as many as the limit allows, but for the second that is made up for."""
    spacing = Spacing(600)
    times = [spacing.book(0.0) for _ in range(1200)]
    assert 115 < times[-1] < 125


def test_what_was_not_used_is_given_back():
    spacing = Spacing(60)
    spacing.book(0.0, 60)
    spacing.give_back(50)
    assert spacing.book(0.0, 1) == pytest.approx(10 * 61 / 60)


@given(st.integers(0, 50), st.integers())
def test_backoff_has_bounds(attempt, seed):
    wait = backoff(attempt, random.Random(seed))
    assert 0 <= wait <= min(LONGEST_BACKOFF, 0.5 * 2**attempt)


class Clock:
    """Seconds that pass when everybody waits."""

    def __init__(self):
        self.now = 0.0
        self._sleepers = []
        self._numbers = itertools.count()

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._numbers), future))
        await future

    async def until_done(self, *tasks):
        gathered = asyncio.gather(*tasks)
        while not gathered.done():
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers and not gathered.done():
                self.now, _, future = heapq.heappop(self._sleepers)
                future.set_result(None)
        return gathered.result()


def paced(requests, answer, **limits):
    """
    Times at which requests pass. `answer(number, time)` is `None` (an answer after a second), or the wait that a refusal asks
    for (0 for one that does not say).
    """

    async def go():
        clock, passed = Clock(), []
        pace = Pace(clock=clock, sleep=clock.sleep, dice=random.Random(0), **limits)

        async def ask(number):
            while True:
                entered = await pace.enter(10)
                passed.append((clock.now, number, pace.in_flight))
                await clock.sleep(1.0)
                pace.leave()
                wait = answer(number, entered)
                if wait is None:
                    pace.succeeded()
                    return
                pace.overloaded(entered, wait or None)

        await clock.until_done(*(ask(number) for number in range(requests)))
        return passed, pace

    return asyncio.run(go())


def test_no_more_at_once_than_concurrency():
    passed, _ = paced(20, lambda number, time: None, concurrency=4)
    assert max(count for _, _, count in passed) == 4
    assert passed[-1][0] == pytest.approx(4.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.integers(1, 8), st.floats(1, 100), st.integers(0, 30))
def test_a_pause_is_everybodys(limit, concurrency, wait, when):
    refused = []

    def answer(number, time):
        if time >= when and not refused:
            refused.append(time + 1)  # a second later it is told
            return wait
        return None

    passed, _ = paced(40, answer, concurrency=concurrency, requests_per_minute=limit)
    times = [time for time, _, _ in passed]
    for begin in refused:
        assert not [time for time in times if begin < time < begin + wait - 1e-9]
    assert most_in_a_minute(times, [1] * len(times)) <= limit


def test_refusals_that_were_on_their_way_count_once():
    passed, pace = paced(16, lambda number, time: None if time > 0 else 0, concurrency=16)
    assert pace.pauses == 1
    assert 8 <= pace.at_once < 11  # halved once, then a little more with each answer


def test_without_a_word_pauses_grow_and_concurrency_falls():
    times = set()

    def answer(number, time):
        times.add(time)
        return None if len(times) > 6 else 0

    passed, pace = paced(16, answer, concurrency=16)
    assert pace.pauses >= 5 and min(count for _, _, count in passed) == 1


def test_concurrency_comes_back():
    _, pace = paced(300, lambda number, time: 5 if time == 0 else None, concurrency=16)
    assert pace.at_once == 16
