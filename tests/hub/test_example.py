"""Which input of the teacher's rows a card shows."""

import pytest

from trl_bbkd.hub.example import example_input, looks_secret


SECRETS = [
    "My password is hunter2, is that safe?",
    "Why does sk-abcdefgh12345678 not work?",
    "Use hf_abcdefgh123 to log in",
    "Mail it to someone@example.org",
    "Call me: +49 (170) 123-4567",
    "Is a1b2c3d4e5f6a7b8c9d0e1f2 a hash?",
    "What is in /home/me/notes.txt/x?",
    "-----BEGIN PRIVATE KEY-----",
    "What is my API key?",
]


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_secret_is_passed_over(text):
    assert looks_secret(text)
    assert example_input([{"prompt": text}, {"prompt": "Why is the sky blue?"}]) == "Why is the sky blue?"
    assert example_input([{"prompt": [{"role": "user", "content": text}]}]) is None


@pytest.mark.parametrize(
    "text",
    [
        "Are skyscrapers for skateboarders?",
        "kim takes 1 cake to the river .",
        "What is 12 * 7?",
        "Who was king in 1712?\n\nOne name.",
    ],
)
def test_what_does_not(text):
    assert not looks_secret(text) and example_input([{"prompt": text}]) == text


def test_a_secret_of_this_process(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "somethingmine")
    assert looks_secret("Is somethingmine good?")


def test_messages():
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    # As Arrow fills them in
    talk[1] |= {"name": None, "tool_calls": None}
    assert example_input([{"prompt": talk}]) == plain
    with_tools = {"prompt": plain, "tools": [{"name": "look_up"}]}
    with_settings = {"prompt": plain, "chat_template_kwargs": {"enable_thinking": False}}
    reasoned = {"prompt": [*plain, {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}, *plain[1:]]}
    for row in (with_tools, with_settings, reasoned, {"prompt": [{"role": "user"}]}, {"prompt": []}, {"other": 1}):
        assert example_input([row]) is None


def test_a_short_and_printable_one():
    rows = [{"text": "word " * 200}, {"text": "a\x00b"}, {"text": " "}, {"text": "the train is late"}]
    assert example_input(rows, "text") == "the train is late"
    assert example_input(None) is None
