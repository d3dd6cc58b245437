"""Keys of answers, and what a request takes at most."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import build_tokenizer
from trl_bbkd.collect.prompts import Prompt
from trl_bbkd.collect.requests import Asked, RequestMaker, chat_url, endpoint_of, groups
from trl_bbkd.collect.settings import CollectConfig


BASE = dict(base_url="https://host.example/v1", model="m", output_dir="out", dataset_name="rows.jsonl")
SAME = {
    "output_dir": "elsewhere",
    "dataset_name": "more.jsonl",
    "concurrency": 3,
    "max_cost": 1.0,
    "num_samples": 7,
    "api_key_env": "OTHER",
    "base_url": "https://HOST.example:/v1/",
    "teacher_name": "T",
    "request_timeout": 5.0,
}
OTHER = {
    "base_url": "https://host.example/v2",
    "model": "m2",
    "temperature": 0.5,
    "top_p": 0.5,
    "max_tokens": 7,
    "max_tokens_name": "max_completion_tokens",
    "stop": ["x"],
    "seed": 1,
    "logprobs": True,
    "extra_body": {"reasoning_effort": "low"},
}


def prompt(text="Why?", tools=None):
    return Prompt(0, [{"role": "user", "content": text}], tools, {})


def maker(**changes):
    return RequestMaker(CollectConfig(**BASE | {"prompt_price": 1.0, "completion_price": 1.0} | changes))


@pytest.mark.parametrize(("name", "value"), SAME.items(), ids=SAME)
def test_what_changes_no_answer_changes_no_key(name, value):
    assert maker(**{name: value}).key(prompt(), 0) == maker().key(prompt(), 0)


@pytest.mark.parametrize(("name", "value"), OTHER.items(), ids=OTHER)
def test_every_parameter_changes_the_key(name, value):
    assert maker(**{name: value}).key(prompt(), 0) != maker().key(prompt(), 0)


def test_sample_prompt_and_tools_change_the_key():
    tools = [{"type": "function", "function": {"name": "add"}}]
    keys = {maker().key(prompt(text, tool), n) for text in ("a", "b") for tool in (None, tools) for n in (0, 1)}
    assert len(keys) == 8
    # By which a journal of an earlier version is read
    assert maker().key(prompt(), 0).hex().startswith("a7cd70bb089c7056")


def test_a_key_does_not_depend_on_how_answers_are_asked_for():
    """All at once, or one request each with the next seed."""
    one = maker(num_samples=3, seed=5)
    assert one.body(Asked(prompt(), (0, 1, 2))) == {**one.body(Asked(prompt(), (0,))), "n": 3}
    assert one.body(Asked(prompt(), (2,)))["seed"] == 7 and "n" not in one.body(Asked(prompt(), (2,)))
    assert "seed" not in maker(seed=None).body(Asked(prompt(), (2,)))


def test_what_is_not_said_is_not_sent():
    assert set(maker(seed=None).body(Asked(prompt(), (0,)))) == {"model", "messages", "max_tokens"}
    body = maker(logprobs=True, top_logprobs=2, return_token_ids=True).body(Asked(prompt(), (0,)))
    assert body["logprobs"] is True and body["top_logprobs"] == 2
    assert body["return_token_ids"] and body["return_tokens_as_token_ids"]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_no_prompt_has_more_tokens_than_its_worst_case(texts):
    made = maker()
    messages = [{"role": "user", "content": text} for text in texts]
    worst = made.worst_case(made.body(Asked(Prompt(0, messages, None, {}), (0,))))
    size = sum(len(text.encode(errors="replace")) for text in texts)
    assert worst.prompt >= size + 4 * len(texts) and worst.completion == 1024


def test_a_worst_case_has_the_tools_and_what_surrounds_messages():
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds two numbers." * 20}}]
    made = maker()
    alone, beside = (made.worst_case(made.body(Asked(prompt("a", tool), (0,)))).prompt for tool in (None, tools))
    assert beside > alone + 20 * len("Adds two numbers.")
    # A template writes its own tokens around each message, and opens the answer
    talk = Prompt(0, [{"role": "user", "content": ""}] * 9, None, {})
    size = len(json.dumps(talk.messages))
    assert made.worst_case(made.body(Asked(talk, (0,)))).prompt >= size + 10 * 16


def test_a_worst_case_by_a_tokenizer():
    text = "Name a red fruit, s'il vous plaît. 🍏" * 5
    made = maker(max_tokens=9, num_samples=2)
    body = made.body(Asked(prompt(text), (0, 1)))
    assert made.worst_case(body).prompt > len(build_tokenizer()(text)["input_ids"])
    assert made.worst_case(body).completion == 18


@given(st.sets(st.integers(0, 12)))
def test_groups_are_runs(samples):
    found = groups(sorted(samples), together=True)
    assert [sample for group in found for sample in group] == sorted(samples)
    assert all(group == tuple(range(group[0], group[0] + len(group))) for group in found)
    assert all(after[0] > before[-1] + 1 for before, after in zip(found, found[1:], strict=False))
    assert groups(sorted(samples), together=False) == [(sample,) for sample in sorted(samples)]


def test_addresses():
    assert endpoint_of("HTTPS://me:secret@Host.Example:8/v1/?api-version=1#x") == "https://host.example:8/v1"
    assert endpoint_of("http://[::1]:8/v1") == "http://[::1]:8/v1"
    assert chat_url("https://h/v1/?api-version=1") == "https://h/v1/chat/completions?api-version=1"
    assert json.dumps(maker().parameters) == '{"max_tokens": 1024}'
