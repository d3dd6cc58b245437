"""What a run counts as spent, and how it ends, whatever was on its way."""

import asyncio
from types import SimpleNamespace

import pytest

from tests.collect.helpers import run, settings_for
from tests.collect.server import KEY, TeacherServer
from trl_bbkd.collect.budget import Spent
from trl_bbkd.collect.journal import Journal
from trl_bbkd.collect.prompts import Prompts
from trl_bbkd.collect.run import Collection, End
from trl_bbkd.errors import EndpointError


PRICES = {"prompt_price": 1.0, "completion_price": 1.0}
WORST = 64  # tokens of an answer, by the recipe


def spent(folder):
    with Journal(folder / "out/journal.sqlite") as journal:
        assert journal.unheard() == 0
        return journal.spent()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_what_is_in_flight_when_a_process_ends_counts_at_its_worst(tmp_path):
    """As of a second Ctrl-C."""
    with TeacherServer(latency=60) as server, Journal(tmp_path / "journal.sqlite") as journal:
        settings = settings_for(server, tmp_path, ["A?"], **PRICES)
        collection = Collection(settings, Prompts(settings), journal, KEY)

        async def go():
            running = asyncio.create_task(collection.run())
            await until(lambda: server.asked)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        asyncio.run(go())
        worst = collection.budget.worst(collection.maker.worst_case(server.asked[0]))
        assert journal.unheard() == 1 and journal.spent() == worst
        assert worst.completion == WORST and worst.cost == worst.tokens / 1e6 > 0
        assert Collection(settings, Prompts(settings), journal, KEY).budget.spent == worst


@pytest.mark.parametrize(("kind", "is_paid"), [("malformed", True), ("500", False)])
def test_half_an_answer_counts_at_its_worst(tmp_path, kind, is_paid):
    with TeacherServer() as server:
        run(server, tmp_path, [f"[{kind}] A?"], **PRICES)
        paid = server.paid_tokens["completion"] // (1 + is_paid)
    found = spent(tmp_path)
    assert (found.requests, found.completion) == (2, paid + WORST * is_paid)
    assert found.cost == pytest.approx(found.tokens / 1e6)


def test_what_was_never_sent_counts_as_nothing(tmp_path):
    with pytest.raises(EndpointError, match="unreachable"):
        run(SimpleNamespace(url="http://127.0.0.1:9/v1"), tmp_path, ["A?"], **PRICES)
    assert spent(tmp_path) == Spent()


def test_a_run_that_is_stopped_waits_for_no_turn(tmp_path):
    """One is let through at a time, and the others wait for it to come back."""
    with TeacherServer(latency=0.1) as server, Journal(tmp_path / "journal.sqlite") as journal:
        settings = settings_for(server, tmp_path, [f"Question {n}?" for n in range(6)], concurrency=3)
        collection = Collection(settings, Prompts(settings), journal, KEY)

        async def go():
            running = asyncio.create_task(collection.run())
            await until(lambda: server.asked)
            collection.pace.concurrency = 1
            await until(lambda: len(server.asked) == 2)
            collection.stop(End("interrupt", ""))
            await asyncio.wait_for(running, 10)

        asyncio.run(go())
        assert len(server.asked) == 2 == journal.spent().requests and journal.unheard() == 0
