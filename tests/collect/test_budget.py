"""Caps hold whatever comes, since the worst is claimed before it is sent."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.collect.budget import Budget, CapReached, Prices, Spent
from trl_bbkd.collect.replies import Usage
from trl_bbkd.collect.requests import WorstCase
from trl_bbkd.collect.settings import CollectConfig


def config(**changes):
    said = dict(base_url="http://127.0.0.1:1/v1", model="m", output_dir="out", dataset_name="rows.jsonl")
    return CollectConfig(**said, prompt_price=1.0, completion_price=10.0, **changes)


async def spend(budget, worsts, dice, at_once):
    """Send requests that take anything up to their worst; return the largest sums on the way, and the cap that ended it."""
    worsts, ended, sent = list(worsts), [], []

    async def work():
        while worsts and not ended:
            worst = budget.worst(worsts.pop())
            try:
                await budget.claim(worst)
            except CapReached as cap:
                ended.append(str(cap))
                return
            await asyncio.sleep(0)
            share = dice.choice([0.0, dice.random(), 1.0])
            usage = Usage(int(worst.prompt * share), int(worst.completion * share))
            actual = Spent(1, usage.prompt, usage.completion, budget.prices.cost(usage))
            budget.settle(worst, actual)
            sent.append(actual)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return sent, ended


worst_cases = st.lists(st.builds(WorstCase, st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=60)


@settings(deadline=None)
@given(worst_cases, st.integers(1, 16), st.integers(1, 40), st.integers(1, 9000), st.integers(1, 60), st.integers())
def test_no_cap_is_ever_exceeded(worsts, at_once, requests, tokens, mills, seed):
    caps = dict(max_requests=requests, max_total_tokens=tokens, max_cost=mills / 1000)
    budget = Budget(config(**caps), Spent())
    sent, ended = asyncio.run(spend(budget, worsts, random.Random(seed), at_once))
    total = Spent()
    for actual in sent:
        total.add(actual)
    assert total.requests <= requests and total.tokens <= tokens and total.cost <= mills / 1000 + 1e-12
    assert total == budget.spent
    if not ended:
        assert len(sent) == len(worsts)


def test_a_cap_is_reached_only_when_nothing_in_flight_could_make_room():
    """Two requests whose worst cases exceed the cap together, but not what they take."""
    budget = Budget(config(max_total_tokens=150), Spent())

    async def go():
        worst = budget.worst(WorstCase(50, 50))
        await budget.claim(worst)
        second = asyncio.create_task(budget.claim(worst))
        await asyncio.sleep(0)
        assert not second.done()
        budget.settle(worst, Spent(1, 10, 10))
        await second
        budget.settle(worst, Spent(1, 50, 50))
        with pytest.raises(CapReached, match="max_total_tokens"):
            await budget.claim(worst)

    asyncio.run(go())


def test_what_earlier_runs_spent_counts():
    budget = Budget(config(max_requests=5), Spent(requests=5))
    with pytest.raises(CapReached, match="max_requests"):
        asyncio.run(budget.claim(budget.worst(WorstCase(1, 1))))


def test_cached_tokens_have_a_price_of_their_own():
    prices = Prices(prompt=2.0, completion=8.0, cached=0.5)
    assert prices.cost(Usage(1_000_000, 500_000, cached=400_000)) == pytest.approx(1.2 + 0.2 + 4.0)
    assert Prices.of(config()).cached == 1.0
    # An endpoint that counts more of them than the prompt has is not believed
    assert prices.cost(Usage(1_000_000, 0, cached=3_000_000)) == pytest.approx(0.5)


def test_a_worst_case_is_at_the_dearer_price_of_a_prompt():
    assert Prices(prompt=2.0, completion=8.0, cached=3.0).worst(WorstCase(1_000_000, 500_000)) == 3.0 + 4.0
    assert Prices(prompt=2.0, completion=8.0, cached=0.5).worst(WorstCase(1_000_000, 500_000)) == 2.0 + 4.0


def test_what_sums_of_floats_leave_takes_no_room():
    """0.79 + 0.64 + 0.43 − 0.43 − 0.64 − 0.79 is above 0."""
    costs = [0.79, 0.64, 0.43]
    budget = Budget(config(max_cost=sum(costs)), Spent())

    async def go():
        for cost in costs:
            await budget.claim(Spent(cost=cost))
        for cost in reversed(costs):
            budget.settle(Spent(cost=cost), Spent())
        await budget.claim(Spent(cost=sum(costs)))

    asyncio.run(go())
