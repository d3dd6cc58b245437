"""A recipe becomes a set, against a server of this machine."""

import json
import sqlite3
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from tests.collect.helpers import left_out, prompts_file, rows, run, settings_for, write_recipe
from tests.collect.server import MODEL, TeacherServer, answer, prompt_tokens
from trl_bbkd.cli import main
from trl_bbkd.collect import pacing
from trl_bbkd.collect.command import collect
from trl_bbkd.collect.journal import Journal
from trl_bbkd.data.teacher_data import check_teacher_data, load_teacher_data
from trl_bbkd.errors import EndpointError


QUESTIONS = [f"Question {number}?" for number in range(20)]


@pytest.fixture
def server():
    with TeacherServer() as server:
        yield server


def card(tmp_path):
    return (tmp_path / "out/README.md").read_text()


def test_a_set_that_training_reads(server, tmp_path):
    found = run(server, tmp_path, QUESTIONS)
    assert [row["prompt"] for row in found] == QUESTIONS
    bodies = {body["messages"][0]["content"]: body for body in server.asked}
    for row in found:
        assert row["completion"] == " ".join(answer(bodies[row["prompt"]], 0))
    assert {(row["teacher"], row["finish_reason"], row["sample"]) for row in found} == {(MODEL, "stop", 0)}
    train, test = load_teacher_data(
        ScriptArguments(dataset_name=str(tmp_path / "out")), DatasetMixtureConfig(test_split_size=0.2)
    )
    assert (len(train), len(test)) == (16, 4)
    assert check_teacher_data(train).rows == 16


def test_one_more_row_is_one_more_request(server, tmp_path):
    run(server, tmp_path, QUESTIONS)
    assert server.requests == 20
    again = run(server, tmp_path, [*QUESTIONS, "One more?"])
    assert server.requests == 21 and len(again) == 21
    with TeacherServer() as other:
        (tmp_path / "other").mkdir()
        assert run(other, tmp_path / "other", [*QUESTIONS, "One more?"]) == again


def test_duplicates_are_asked_once(server, tmp_path):
    found = run(server, tmp_path, ["A?", "B?", "A?", "A?"], concurrency=4)
    assert server.requests == 2 and [row["prompt"] for row in found] == ["A?", "B?"]
    assert "| rows like an earlier one, asked once | 2 |" in card(tmp_path)


def test_samples_come_together_where_the_endpoint_can(server, tmp_path):
    found = run(server, tmp_path, QUESTIONS[:5], num_samples=3, temperature=1.0)
    # One more for the look at the seed
    assert server.requests == 6 and Counter(body.get("n") for body in server.asked) == {3: 5, None: 1}
    assert [(row["prompt"], row["sample"]) for row in found] == [(q, n) for q in QUESTIONS[:5] for n in range(3)]
    assert len({row["completion"] for row in found}) == 15
    assert "| `n` | honoured |" in card(tmp_path) and "| `seed` | honoured |" in card(tmp_path)
    run(server, tmp_path, QUESTIONS[:5], num_samples=5, temperature=1.0)
    assert server.requests == 11 and server.asked[-1]["n"] == 2 and server.asked[-1]["seed"] == 3


def test_samples_come_one_by_one_where_it_cannot(tmp_path, capsys):
    with TeacherServer(ignores={"n"}) as server:
        found = run(server, tmp_path, QUESTIONS[:5], num_samples=3, temperature=1.0)
    # The first showed it: its other two, and the look at the seed
    assert server.requests == 16
    assert len(found) == 15 == len({row["completion"] for row in found})
    seeds = Counter(body["seed"] for body in server.asked if body["max_tokens"] == 64)
    assert seeds == {0: 5, 1: 5, 2: 5}
    assert "| `n` | ignored |" in card(tmp_path)
    assert "equal" not in capsys.readouterr().err


def test_samples_come_one_by_one_where_it_refuses_to(tmp_path):
    """As Anthropic's endpoint is said to; a prompt that is refused for itself is asked for once a sample, and listed."""

    class Refusing(TeacherServer):
        async def _answer(self, writer, path, raw, key):
            if "n" in json.loads(raw):
                self.requests += 1
                return await self._error(writer, 400, "n: must be exactly 1", "invalid_request_error")
            return await super()._answer(writer, path, raw, key)

    with Refusing() as server:
        found = run(server, tmp_path, ["[400] Too long?", *QUESTIONS[:3]], num_samples=2, temperature=1.0)
    # Two prompts are asked for together, and the seed is looked at
    assert server.requests == 2 + 8 + 1 and len(found) == 6
    assert "| `n` | refused |" in card(tmp_path)
    assert [(line["row"], line["failed"]) for line in left_out(tmp_path)] == [(0, "status 400")] * 2


def test_equal_samples_are_told(tmp_path, capsys):
    """As `transformers serve` answers whose generation config does not sample."""
    with TeacherServer(ignores={"n", "seed", "sampling"}) as server:
        run(server, tmp_path, QUESTIONS[:3], num_samples=2, temperature=1.0)
    assert "all samples of each of the 3 prompts are equal" in capsys.readouterr().err


def test_a_seed_that_is_ignored_is_told(tmp_path, capsys):
    class Rolling(TeacherServer):
        def _completion(self, body, fault):
            return super()._completion({**body, "seed": self.requests}, fault)

    with Rolling() as server:
        run(server, tmp_path, QUESTIONS[:3], temperature=1.0)
    assert "| `seed` | ignored |" in card(tmp_path)
    assert "the endpoint does not give the same answer for the same seed" in capsys.readouterr().err


def test_logprobs_stay_in_the_journal(server, tmp_path):
    run(server, tmp_path, ["A?", "[no logprobs] B?", "[short logprobs] C?"], logprobs=True, top_logprobs=2)
    choices = [
        json.loads(row[0])
        for row in sqlite3.connect(tmp_path / "out/journal.sqlite").execute("SELECT choice FROM answers")
    ]
    kept = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    assert len(kept) == 2 and all(len(entry["top_logprobs"]) == 2 for entries in kept for entry in entries)
    text = card(tmp_path)
    assert "| `top_logprobs` | honoured |" in text
    assert all(f"| log-probabilities: {state} | 1 |" in text for state in ("whole", "missing", "short"))


@pytest.mark.parametrize("name", ["logprobs", "top_logprobs"])
def test_what_was_asked_for_and_ignored_ends_the_run(tmp_path, name):
    with TeacherServer(ignores={name}) as server, pytest.raises(EndpointError) as error:
        run(server, tmp_path, QUESTIONS, logprobs=True, top_logprobs=2)
    assert server.requests == 2
    assert f"{server.url} and model 'teacher-1': `{name}` is ignored, by two answers." in str(error.value)
    assert "18 answers are not asked for yet" in str(error.value)
    assert len(rows(tmp_path)) == 2  # they are paid


def test_what_one_answer_lacks_by_accident_is_looked_at_again(server, tmp_path):
    run(server, tmp_path, ["[no logprobs] A?", *QUESTIONS[:4]], logprobs=True)
    assert len(rows(tmp_path)) == 5 and "| `logprobs` | honoured |" in card(tmp_path)


def test_a_server_that_starts_anew_costs_no_row(tmp_path):
    """All wait for it together; no row is given up meanwhile."""
    settings = settings_for(
        SimpleNamespace(url="x"), tmp_path, [f"Question {n}?" for n in range(60)], base_url="http://x"
    )
    with TeacherServer(latency=0.1) as first:
        # One further attempt is for what was on its way
        settings.base_url, settings.concurrency, settings.max_retries = first.url, 8, 1
        collecting = threading.Thread(target=collect, args=(settings,))
        collecting.start()
        while first.requests < 20:
            time.sleep(0.005)
    time.sleep(1.0)
    with TeacherServer(port=first.port) as second:
        collecting.join(60)
    assert second.requests >= 30 and len(rows(tmp_path)) == 60


def test_an_endpoint_that_stays_away_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pacing, "LONGEST_BACKOFF", 0.01)
    settings = settings_for(SimpleNamespace(url="x"), tmp_path, QUESTIONS, base_url="http://x", concurrency=1)
    with TeacherServer(latency=0.02) as server:
        settings.base_url = server.url
        problems = []
        collecting = threading.Thread(target=lambda: problems.append(pytest.raises(EndpointError, collect, settings)))
        collecting.start()
        while server.requests < 5:
            time.sleep(0.005)
    collecting.join(60)
    assert "unreachable: Connection refused" in str(problems[0].value) and 4 <= len(rows(tmp_path)) < 20


def test_failures_are_listed_and_asked_again_on_request(server, tmp_path, capsys):
    prompts = [*QUESTIONS[:3], "[500!] Never?", "[400] Too long?"]
    run(server, tmp_path, prompts, max_retries=1)
    assert server.requests == 6
    assert [line["failed"] for line in left_out(tmp_path)] == ["status 500", "status 400"]
    assert left_out(tmp_path)[0] == {
        "row": 3,
        "sample": 0,
        "failed": "status 500",
        "attempts": 2,
        "message": "overloaded",
    }
    assert "Failed: 1 status 400, 1 status 500. Ask again with --retry_failed." in capsys.readouterr().err
    run(server, tmp_path, max_retries=1)
    assert server.requests == 6
    server.met.clear()
    main(["collect", str(write_recipe(server, tmp_path, max_retries=1)), "--retry_failed"])
    assert server.requests == 9 and len(left_out(tmp_path)) == 2
    # Mended meanwhile
    type(server)._error, before = answered, type(server)._error
    server_answers, server.remembers = server.answers, True
    try:
        collect(settings_for(server, tmp_path, retry_failed=True))
    finally:
        type(server)._error = before
    assert server_answers and len(rows(tmp_path)) == 5 and left_out(tmp_path) == []


async def answered(server, writer, status, message, code, headers=None):
    body = server.asked[-1]
    completion = server._completion(body, "")
    await server._write(writer, 200, json.dumps(completion).encode())
    return True


def test_answers_that_are_not_whole_are_left_out_and_listed(server, tmp_path):
    kinds = {
        "length": "length",
        "filter": "content_filter",
        "null": "empty",
        "thought": "cut in its thought",
        "refusal": "refusal",
    }
    prompts = ["Whole?", *(f"[{kind}] Why?" for kind in kinds)]
    assert [row["prompt"] for row in run(server, tmp_path, prompts)] == ["Whole?"]
    assert server.requests == 6
    assert [line["left_out"] for line in left_out(tmp_path)] == list(kinds.values())
    kept = run(server, tmp_path, keep_cut_answers=True, keep_filtered_answers=True)
    assert server.requests == 6
    assert [row["prompt"] for row in kept] == ["Whole?", "[length] Why?", "[filter] Why?"]


def test_a_set_keeps_its_card_until_there_is_another(server, tmp_path):
    run(server, tmp_path, QUESTIONS)
    before = card(tmp_path)
    with pytest.raises(EndpointError):
        run(server, tmp_path, model="another")
    assert card(tmp_path) == before and len(rows(tmp_path)) == 20


def test_the_first_rows_that_fail_end_the_run(server, tmp_path):
    with pytest.raises(
        EndpointError, match="none of the first 3 requests was answered.* status 400: this prompt is too long"
    ):
        run(server, tmp_path, [f"[400] Question {n}?" for n in range(9)])
    assert server.requests == 3


@pytest.mark.parametrize("kind", ["401", "403", "404", "quota"])
def test_what_no_request_would_pass_ends_the_run(server, tmp_path, kind):
    """After one request, and in the middle with what was answered."""
    with pytest.raises(EndpointError):
        run(server, tmp_path, [f"[{kind}] Question {n}?" for n in range(9)])
    assert server.requests == 1
    with pytest.raises(EndpointError) as error:
        run(server, tmp_path, [*QUESTIONS, f"[{kind}] Why?", *(f"Later {n}?" for n in range(50))], concurrency=2)
    assert 20 <= len(rows(tmp_path)) < 30 and "\n" not in str(error.value)
    assert f"{71 - len(rows(tmp_path))} answers are not asked for yet: the same command goes on." in str(error.value)


class TestCaps:
    def test_requests(self, server, tmp_path, capsys):
        assert len(run(server, tmp_path, QUESTIONS, max_requests=7)) == 7
        assert server.requests == 7
        assert "Stopped at `max_requests: 7`. 13 answers are not asked for yet" in capsys.readouterr().err
        # Of all runs together; a higher one goes on
        run(server, tmp_path, max_requests=7)
        assert server.requests == 7
        assert len(run(server, tmp_path, max_requests=20)) == 20 == server.requests

    def test_tokens(self, server, tmp_path):
        run(server, tmp_path, QUESTIONS * 1, max_total_tokens=400)
        paid = sum(server.paid_tokens.values())
        assert 200 < paid <= 400 and 0 < server.requests < 20

    def test_money(self, server, tmp_path, capsys):
        prices = dict(prompt_price=100.0, completion_price=1000.0)
        run(server, tmp_path, QUESTIONS, max_cost=0.2, **prices)
        paid = (server.paid_tokens["prompt"] * 100 + server.paid_tokens["completion"] * 1000) / 1e6
        assert 0.1 < paid <= 0.2 and f"{paid:,.4f} of about" in capsys.readouterr().err
        assert f"| cost, USD |  | {paid:,.4f} |" in card(tmp_path)


class TestForms:
    def test_system_prompt(self, server, tmp_path):
        found = run(server, tmp_path, ["A?"], system_prompt="Be brief.")
        assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert found[0]["prompt"] == "A?"
        found = run(server, tmp_path, ["A?"], system_prompt="Be brief.", keep_system_prompt=True, conversational=True)
        assert server.requests == 1
        assert [message["role"] for message in found[0]["prompt"]] == ["system", "user"]

    def test_system_prompt_before_messages_with_other_fields(self, server, tmp_path):
        turns = [{"role": "user", "content": "A?", "name": "ann"}]
        parts = [{"role": "user", "content": [{"type": "text", "text": "A?"}]}]
        for number, rows_ in enumerate(([turns], [parts])):
            (folder := tmp_path / str(number)).mkdir()
            changes = dict(system_prompt="Be brief.", keep_system_prompt=True)
            (row,) = run(server, folder, [{"prompt": prompt} for prompt in rows_], **changes)
            assert [message["role"] for message in row["prompt"]] == ["system", "user"]
            read = Dataset.from_parquet(str(folder / "out/train.parquet"))
            assert check_teacher_data(read).rows == 1 and "Be brief." in str(read[0]["prompt"][0]["content"])

    def test_messages_with_reasoning_and_tools(self, server, tmp_path):
        turns = [
            {"role": "user", "content": "Add 1 and 2."},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": "3", "name": "add"},
            {"role": "assistant", "content": "3", "reasoning_content": "Easy."},
            {"role": "user", "content": "[reasoning] Thanks. Why?"},
        ]
        tools = [{"name": "add", "parameters": {"type": "object"}}]
        row = {"prompt": turns, "tools": json.dumps(tools), "topic": "sums"}
        found = run(server, tmp_path, [row, {**row, "prompt": turns[-1:], "topic": "none"}])
        asked = max(server.asked, key=lambda body: len(body["messages"]))
        assert asked["tools"] == [{"type": "function", "function": tools[0]}]
        assert asked["messages"][1]["tool_calls"][0] == {
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 1}'},
        }
        assert asked["messages"][3] == {"role": "assistant", "content": "3"}  # what it thought is not sent back
        assert [row["topic"] for row in found] == ["sums", "none"]
        read = Dataset.from_parquet(str(tmp_path / "out/train.parquet"))
        assert read[0]["completion"][0]["reasoning_content"] == "Let me think."
        assert read[0]["prompt"][3]["reasoning_content"] == "Easy."
        assert check_teacher_data(read).rows == 2

    def test_calls_of_tools_are_answers(self, server, tmp_path):
        run(
            server,
            tmp_path,
            [
                {"prompt": [{"role": "user", "content": f"{kind}A?"}], "tools": '[{"name": "add"}]'}
                for kind in ("[call] ", "")
            ],
        )
        read = Dataset.from_parquet(str(tmp_path / "out/train.parquet"))
        (call,) = read[0]["completion"][0]["tool_calls"]
        assert call == {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
        assert read[1]["completion"][0]["tool_calls"] is None
        assert check_teacher_data(read).rows == 2

    def test_whole_conversations(self, server, tmp_path):
        talk = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "An old answer."}]
        found = run(server, tmp_path, [{"messages": talk}, {"messages": [*talk, {"role": "user", "content": "B?"}]}])
        assert [len(row["prompt"]) for row in found] == [1, 3]
        assert sorted(len(body["messages"]) for body in server.asked) == [1, 3]
        assert found[0]["completion"][0]["content"] != "An old answer." and "messages" not in found[0]

    def test_texts_as_messages_and_a_column_of_another_name(self, server, tmp_path):
        prompts = [{"question": "A?", "completion": "old"}, {"question": "B?", "completion": "old"}]
        found = run(server, tmp_path, prompts, prompt_column="question", conversational=True)
        assert found[0]["prompt"] == [{"role": "user", "content": "A?"}]
        assert found[0]["completion"][0]["role"] == "assistant" and "question" not in found[0]

    def test_reasoning_beside_texts(self, server, tmp_path):
        found = run(server, tmp_path, ["[reasoning] A?"])
        assert found[0]["reasoning_content"] == "Let me think." and "think" not in found[0]["completion"]

    def test_the_first_prompts(self, server, tmp_path):
        assert len(run(server, tmp_path, QUESTIONS, max_prompts=3)) == 3


def test_limits_by_the_minute(server, tmp_path):
    run(server, tmp_path, QUESTIONS, requests_per_minute=1200, concurrency=20)
    times = sorted(server.times)
    assert times[-1] - times[0] >= 19 * 61 / 1200 - 0.1


def test_another_model_in_the_answer_is_told(server, tmp_path, capsys):
    run(server, tmp_path, ["A?", "[wrong model] B?"])
    assert "the answers come from several models: teacher-1-2026, teacher-2." in capsys.readouterr().err
    assert "`teacher-2` (1)" in card(tmp_path)


def test_answers_without_usage_count_at_their_worst(server, tmp_path):
    run(server, tmp_path, ["[no usage] A?", "[no usage] B?"])
    assert server.requests == 2
    assert "Answers whose tokens the endpoint did not say: 2." in card(tmp_path)
    assert "| tokens of answers | 0 | 128 |" in card(tmp_path)


def test_a_key_in_a_header_of_its_own(server, tmp_path):
    assert len(run(server, tmp_path, ["A?"], api_key_header="api-key")) == 1


def test_every_parameter_is_sent(server, tmp_path):
    run(
        server,
        tmp_path,
        ["A?"],
        temperature=0.5,
        top_p=0.9,
        stop=["x"],
        extra_body={"reasoning_effort": "low"},
        seed=3,
    )
    (first, *_) = server.asked
    assert first == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "A?"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 64,
        "stop": ["x"],
        "seed": 3,
        "reasoning_effort": "low",
    }
    assert prompt_tokens(first) == 4 and prompts_file(tmp_path, ["A?"]).is_file()


def test_a_redirection_is_not_followed(server, tmp_path):
    """The key is for the endpoint of the recipe alone."""

    class Moved(TeacherServer):
        async def _answer(self, writer, path, raw, key):
            await self._write(writer, 307, b"", {"Location": f"{server.url}/chat/completions"})
            return True

    with (
        Moved() as moved,
        pytest.raises(EndpointError, match="status 307: the endpoint redirects; name its new address"),
    ):
        run(moved, tmp_path, ["A?"])
    assert server.requests == 0


@pytest.mark.parametrize("caps", [{}, {"max_total_tokens": 230}], ids=["no cap", "waiting for room"])
def test_a_full_disk_ends_the_run_with_what_is_safe(server, tmp_path, monkeypatch, caps):
    """Nobody waits for room that a request which was never sent would make."""
    sending, calls = Journal.sending, []

    def full(journal, worst):
        calls.append(worst)
        if len(calls) > 2:
            raise sqlite3.OperationalError("database or disk is full")
        return sending(journal, worst)

    monkeypatch.setattr(Journal, "sending", full)
    server.latency = 0.05
    with pytest.raises(
        EndpointError, match="cannot be written: database or disk is full. What was answered before is safe"
    ):
        run(server, tmp_path, QUESTIONS, concurrency=4, **caps)
    assert len(rows(tmp_path)) == 2
