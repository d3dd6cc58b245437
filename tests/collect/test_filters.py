"""What a recipe leaves out of a set beside answers that are not whole."""

import pytest

from tests.collect.helpers import left_out, run
from tests.collect.test_confidence import Saying
from trl_bbkd.collect.filters import Filters, is_refusal, repetition
from trl_bbkd.collect.settings import CollectConfig


STORY = "The fox ran over the hill, met a hare by the river, and asked it for the way to the old mill."
SAYS = {
    "Whole?": [STORY],
    "Refused?": ["I'm sorry, but I can't help with that."],
    "Short?": ["Yes."],
    "Long?": [
        "The hare knew every path of the valley and told the fox about all of them in turn. " * 2 + "Then it slept."
    ],
    "Again?": ["the same words again and " * 4],
    "German?": ["Der Fuchs lief über den Hügel und fragte am Fluss einen Hasen nach dem Weg zur Mühle."],
    "Alike?": [STORY.replace("hare", "hen")],
    "Equal?": [STORY],
    "A number?": ["42"],
    "Code?": ["x = [n for n in range(9)]"],
}


def collected(tmp_path, **changes):
    with Saying() as server:
        server.says = SAYS
        kept = run(server, tmp_path, list(SAYS), **changes)
        assert run(server, tmp_path, **changes) == kept and server.requests == len(SAYS)  # the same from the journal
        whole = run(server, tmp_path)
        assert server.requests == len(SAYS) == len(whole)  # nothing is asked anew, and nothing is lost
    return {row["prompt"] for row in kept}


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [
        ({}, set()),
        ({"leave_out_refusals": True}, {"Refused?"}),
        ({"min_characters": 4}, {"A number?"}),
        ({"max_characters": 150}, {"Long?"}),
        ({"max_repetition": 0.5}, {"Again?"}),
    ],
    ids=["none", "refusals", "short", "long", "repetition"],
)
def test_filters(tmp_path, changes, dropped):
    assert SAYS.keys() - collected(tmp_path, **changes) == dropped


def test_languages(tmp_path):
    """Of a number, a word or a line of code no language is told."""
    pytest.importorskip("py3langid")
    assert SAYS.keys() - collected(tmp_path, languages=["en"]) == {"German?"}


def reason(text, **changes):
    return Filters(CollectConfig("http://x", "m", "out", "x", **changes)).reason(text)


def test_what_is_no_other_language():
    """Too short a text, one with as few letters, and one that is perhaps German."""
    pytest.importorskip("py3langid")
    filters = Filters(CollectConfig("http://x", "m", "out", "x", languages=["en"]))
    assert filters.reason("Das ist gut, und das ist auch gut.") == "language"
    for text in ("Das ist gut.", "Das ist gut (1/12/2024).", "Albert Einstein, Marie Curie"):
        assert filters.reason(text) is None


def test_bounds():
    """Themselves they are within. A call of a tool has no text that could be too short."""
    bounds = {"min_characters": 7, "max_characters": 15}
    assert [reason("a" * length, **bounds) for length in (6, 7, 15, 16)] == ["short", None, None, "long"]
    again = "a a a a a a a"
    assert [reason(again, max_repetition=share) for share in (0.74, 0.75)] == ["repetition", None]
    assert reason(" ", **bounds) is None


def test_near_duplicates(tmp_path):
    """The first of them stays. Short answers are alike by themselves."""
    pytest.importorskip("rensa")
    assert SAYS.keys() - collected(tmp_path, max_similarity=0.5) == {"Alike?", "Equal?"}


def test_counts_and_examples(tmp_path, capsys):
    says = SAYS | {f"Refused {n}?": [f"Sorry, I cannot do {n}\x1b[31m things."] for n in range(4)}
    with Saying() as server:
        server.says = says
        run(server, tmp_path, list(says), leave_out_refusals=True, max_characters=150)
    told = capsys.readouterr().err
    assert "Left out: 5 refuses in its text, 1 long." in told and "\x1b" not in told
    assert told.count("  refuses in its text, row ") == 3
    assert "  refuses in its text, row 1: I'm sorry, but I can't help with that.\n" in told
    card = (tmp_path / "out/README.md").read_text()
    assert "| left out: refuses in its text | 5 |" in card and "| `leave_out_refusals` | `true` |" in card
    assert (
        "| refuses in its text | `row 1: I'm sorry, but I can't help with that.` |" in card and "languages" not in card
    )
    assert [line["left_out"] for line in left_out(tmp_path)] == [
        "refuses in its text",
        "long",
        *["refuses in its text"] * 4,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "I’m sorry, but I can’t help with that request.",
        "**I am unable to provide** this.",
        "Unfortunately, I cannot answer.",
        "I apologize, but I cannot write this.",
        "As an AI language model, I don't have opinions.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Leider kann ich diese Frage nicht beantworten.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Lo siento, pero no puedo ayudar con eso.",
        "Mi dispiace, ma non posso farlo.",
        "Desculpe, mas não posso ajudar.",
        "К сожалению, я не могу ответить.",
        "很抱歉，我无法提供这方面的帮助。",
        "作为一个人工智能，我不能回答这个问题。",
        "申し訳ありませんが、そのご質問にはお答えできません。",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that. Here is what helps.",
        "Sorry for the delay: the answer is 4.",
        "I can't believe it is that easy: 4.",
        "Unfortunately, the bridge was closed.",
        "As an AI researcher, I can recommend this.",
        "The phrase 'I'm sorry, but I can't help' is a refusal.",
        "Ich kann kaum glauben, wie einfach das ist.",
        "很抱歉听到这个消息，这里有一些建议。",
        "",
    ],
)
def test_no_refusals(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c d", 0.0), ("a b c", 0.0), ("a b c d a b c d", 0.2), ("a a a a a a a", 0.75), ("空は青い空は青い", 0.2)],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)
