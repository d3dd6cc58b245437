"""What a run counts as spent, and how it ends, whatever was on its way."""

import asyncio
import json
from types import SimpleNamespace

import pytest

import trl_bbkd.collect.run
from tests.collect.helpers import left_out, rows, run, settings_for
from tests.collect.server import KEY, TeacherServer
from trl_bbkd.collect.answer_set import AnswerSet
from trl_bbkd.collect.budget import Spent
from trl_bbkd.collect.command import collect
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


def test_what_is_in_flight_when_a_process_ends_counts_at_its_worst(tmp_path, capsys):
    """As of a second Ctrl-C. The next run says so, and asks for it."""
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
    with TeacherServer() as server:
        settings.base_url, settings.journal = server.url, str(tmp_path / "journal.sqlite")
        assert collect(settings) and len(rows(tmp_path)) == 1
    assert (
        "1 answers to ask for. Of 1 requests nothing was heard: they count at their worst." in capsys.readouterr().err
    )


@pytest.mark.parametrize(("kind", "is_paid"), [("malformed", True), ("500", False)])
def test_half_an_answer_counts_at_its_worst(tmp_path, kind, is_paid):
    with TeacherServer() as server:
        run(server, tmp_path, [f"[{kind}] A?"], **PRICES)
        paid = server.paid_tokens["completion"] // (1 + is_paid)
    found = spent(tmp_path)
    assert (found.requests, found.completion) == (2, paid + WORST * is_paid)
    assert found.cost == pytest.approx(found.tokens / 1e6)


def test_every_request_of_several_samples_is_settled(tmp_path):
    """The look at the seed too, and a request whose `n` is refused; what one request took counts once."""

    class Refusing(TeacherServer):
        async def _answer(self, writer, path, raw, key):
            if json.loads(raw).get("n", 1) > self.most:
                self.requests += 1
                return await self._error(writer, 400, "n: must be exactly 1", "invalid_request_error")
            return await super()._answer(writer, path, raw, key)

    for most in (1, 3):
        (folder := tmp_path / str(most)).mkdir()
        with Refusing() as server:
            server.most = most
            kept = run(server, folder, ["A?", "B?"], num_samples=3, temperature=1.0, **PRICES)
        found = spent(folder)
        assert len(kept) == 6 and found.requests == server.requests
        assert (found.prompt, found.completion) == (server.paid_tokens["prompt"], server.paid_tokens["completion"])
        # All but the look at the seed
        taken = sum(len(row["completion"].split()) for row in kept)
        assert f"| tokens of answers | {taken:,} | {found.completion:,} |" in (folder / "out/README.md").read_text()


def test_what_is_on_its_way_is_not_asked_beside_it(tmp_path):
    with TeacherServer(latency=0.1) as server:
        assert len(run(server, tmp_path, ["A?", "B?", "B?", "B?"], concurrency=4)) == 2 == server.requests


def test_half_a_character_costs_no_answer(tmp_path):
    """As of an emoji that an endpoint cuts, and writes as JSON may; what is paid is kept."""

    class Cutting(TeacherServer):
        def _choice(self, body, index, fault):
            choice = super()._choice(body, index, fault)
            choice["message"]["content"] += " \ud83c"
            return choice

    with Cutting() as server:
        found = run(server, tmp_path, ["A?", "B?"])
        assert run(server, tmp_path) == found and server.requests == 2
    assert all(row["completion"].endswith(" \ufffd") for row in found) and len(found) == 2


def test_all_samples_of_a_request_that_fails_are_listed(tmp_path):
    with TeacherServer() as server:
        run(server, tmp_path, ["A?", "[422] B?"], num_samples=2, temperature=1.0)
        assert [(line["row"], line["sample"]) for line in left_out(tmp_path)] == [(1, 0), (1, 1)]
        asked = server.requests
        run(server, tmp_path, num_samples=2, temperature=1.0)
        assert server.requests == asked


def test_the_wait_that_a_fault_asks_for_is_kept(tmp_path, monkeypatch):
    """Also where it is none that pauses all."""
    monkeypatch.setattr(trl_bbkd.collect.run, "backoff", lambda *_: 0.0)

    class Waiting(TeacherServer):
        async def _error(self, writer, status, message, code, headers=None):
            return await super()._error(writer, status, message, code, {"Retry-After": "0.3"})

    with Waiting() as server:
        run(server, tmp_path, ["[500] A?"])
    first, second = server.times
    assert second - first >= 0.3


def test_a_set_stays_where_another_cannot_be_written(tmp_path, monkeypatch):
    with TeacherServer() as server:
        before = run(server, tmp_path, ["A?"])

        def broken(*_):
            yield from ()
            raise OSError("the disk is full")

        monkeypatch.setattr(AnswerSet, "_rows", broken)
        with pytest.raises(OSError, match="the disk is full"):
            run(server, tmp_path, ["A?", "B?"])
    assert rows(tmp_path) == before and not list((tmp_path / "out").glob("*.tmp"))


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
