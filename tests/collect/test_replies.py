"""What a reply is, by what is in it."""

import json
from email.utils import formatdate

import pytest

from trl_bbkd.collect.replies import Answers, Fault, NoReply, Reply, read, read_message, wait_asked_for


NOW = 1_700_000_000.0


def completion(message, finish_reason="stop", **others):
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "model": "m", **others}


def reply(body, status=200, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read(Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, data), NOW)


def error(message="no", code=None, kind=None):
    return {"error": {"message": message, "code": code, "type": kind}}


ENDS_THE_RUN = {
    "quota": (429, error("You exceeded your current quota", "insufficient_quota", "insufficient_quota")),
    "quota that comes with 200": (200, error("You exceeded your current quota", "insufficient_quota")),
    "no balance": (402, error("Insufficient Balance")),
    "no payment": (402, error("Payment required")),
    "key that comes with another status": (400, error("Incorrect API key provided", "invalid_api_key")),
    "key that comes with 200": (200, error("Incorrect API key provided", "invalid_api_key")),
    "key": (401, error("Incorrect API key provided", "invalid_api_key")),
    "permission": (403, error("Not allowed")),
    "page": (404, {"detail": "Not Found"}),
    "model": (404, error("The model `x` does not exist", "model_not_found")),
    "model, as transformers serve says it": (400, {"detail": "Model x not found locally"}),
    "model, as a transformers serve of one model says it": (
        400,
        {"detail": "Server is pinned to 'y'; requested 'x'."},
    ),
    "model, in a text": (400, {"message": "unknown model x"}),
    "moved": (301, b""),
}
PASSES = {
    "rate": (429, error("slow down", "rate_limit_exceeded")),
    "rate that comes with 200": (200, error("slow down", "rate_limit_exceeded")),
    "rate, with words of a quota": (429, error("You exceeded your current quota, please check your plan", 429)),
    "500": (500, b"oops"),
    "a model that is being loaded": (503, error("The model `x` is not available yet")),
    "502": (502, b"<html>bad gateway</html>"),
    "529": (529, error("Overloaded")),
    "408": (408, b""),
    "an error with 200": (200, error("upstream")),
    "an error as text": (200, {"error": "upstream"}),
    "a page": (200, b" <!doctype html>"),
    "half an answer": (200, b'{"choices": ['),
    "no object": (200, [1]),
    "no choices": (200, {"choices": []}),
    "null": (200, {"choices": None}),
    "no message": (200, {"choices": [{"index": 0}]}),
}
STAYS = {
    "context": (400, error("This model's maximum context length is 8192 tokens", "context_length_exceeded")),
    "a field": (422, {"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}),
    "size": (413, b"too large"),
}


@pytest.mark.parametrize(("status", "body"), ENDS_THE_RUN.values(), ids=ENDS_THE_RUN)
def test_ends_the_run(status, body):
    fault = reply(body, status)
    assert fault.ends_run and not fault.may_pass and not fault.may_be_paid


@pytest.mark.parametrize(("status", "body"), PASSES.values(), ids=PASSES)
def test_passes(status, body):
    fault = reply(body, status)
    assert fault.may_pass and not fault.ends_run


@pytest.mark.parametrize(("status", "body"), STAYS.values(), ids=STAYS)
def test_stays(status, body):
    fault = reply(body, status)
    assert isinstance(fault, Fault) and not fault.may_pass and not fault.ends_run and fault.text


def test_what_may_be_paid():
    paid = {name for name, (status, body) in PASSES.items() if reply(body, status).may_be_paid}
    assert paid == {"half an answer", "no object", "no choices", "null", "no message"}
    assert read(NoReply("time-out"), NOW).may_be_paid
    assert not read(NoReply("unreachable", was_sent=False), NOW).may_be_paid


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"Retry-After": formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"Retry-After": formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"Retry-After-Ms": "1500", "Retry-After": "2"}, 1.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert wait_asked_for(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("message", "content", "reasoning"),
    [
        ({"content": "Hi"}, "Hi", ""),
        ({"content": "Hi", "reasoning_content": "Hm."}, "Hi", "Hm."),
        ({"content": "Hi", "reasoning": "Hm.", "reasoning_content": None}, "Hi", "Hm."),
        ({"content": "<think>\nHm.\n</think>\n\nHi"}, "Hi", "Hm."),
        ({"content": "Hm.\n</think>\n\nHi"}, "Hi", "Hm."),  # the prompt opened it
        ({"content": "Write <think> and </think>."}, "Write <think> and </think>.", ""),
        ({"content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, "Hi", ""),
        ({"content": None}, "", ""),
    ],
)
def test_reasoning(message, content, reasoning):
    assert read_message(message)[:2] == (content, reasoning)


@pytest.mark.parametrize(
    ("written", "content"),
    [
        (b"a \\ud83c", "a \ufffd"),
        (b"\\uDF4F b", "\ufffd b"),
        (b"a \xed\xa0\xbc", "a \ufffd"),
        (b"\\ud83c\\udf4f \\u00fc", "🍏 ü"),
        ("한국 🍏".encode(), "한국 🍏"),
    ],
)
def test_half_a_character_is_none(written, content):
    body = b'{"choices": [{"message": {"content": "%s"}}], "model": "%s"}' % (written, written)
    answers = reply(body)
    assert answers.choices[0].content == answers.choices[0].raw["message"]["content"] == answers.model == content
    assert reply(b'{"error": {"message": "%s"}}' % written, 500).text == content


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "finish_reason", "reason"),
    [
        ({"content": "Hi"}, "stop", None),
        ({"content": "Hi"}, None, None),
        ({"content": None, "tool_calls": [CALL]}, "tool_calls", None),
        ({"content": "Hi"}, "length", "length"),
        ({"content": "Hi"}, "content_filter", "content_filter"),
        ({"content": " \n"}, "stop", "empty"),
        ({"content": None}, "stop", "empty"),
        ({"content": None, "refusal": "No."}, "stop", "refusal"),
        ({"content": "<think>Hm"}, "length", "cut in its thought"),
        ({"content": "<think>Hm"}, "stop", "cut in its thought"),
        ({"content": "", "reasoning": "Hm"}, "length", "cut in its thought"),
        ({"content": "", "reasoning": "Hm"}, "stop", "empty"),
        ({"content": "<think>Hm</think>Hi"}, "length", "length"),
    ],
)
def test_why_an_answer_is_not_whole(message, finish_reason, reason):
    answers = reply(completion(message, finish_reason))
    assert isinstance(answers, Answers) and answers.choices[0].reason == reason


def test_usage_and_order():
    body = completion({"content": "b"}, usage={"prompt_tokens": 3, "completion_tokens": 4})
    body["choices"] = [{**body["choices"][0], "index": 1}, {"index": 0, "message": {"content": "a"}}]
    body["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
    answers = reply(body)
    assert [choice.content for choice in answers.choices] == ["a", "b"]
    assert (answers.usage.prompt, answers.usage.completion, answers.usage.cached) == (3, 4, 2)
    for usage in (None, {}, {"prompt_tokens": 1}, "many"):
        assert reply(completion({"content": "a"}, usage=usage)).usage is None
