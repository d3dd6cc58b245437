"""Log-probabilities of an endpoint as those of a named tokenizer: no number at a token that is not the one it is of."""

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, normalizers

from tests.collect.teachers import ENGLISH, Teacher, byte_level, sentencepiece_bpe, split_otherwise, unigram
from trl_bbkd.collect.alignment import Aligner
from trl_bbkd.collect.layout import lay_out
from trl_bbkd.collect.replies import read_choice
from trl_bbkd.collect.spelling import Speller
from trl_bbkd.collect.teacher_tokens import place
from trl_bbkd.errors import RecipeError


KINDS = {
    "byte-level": byte_level,
    "SentencePiece BPE": sentencepiece_bpe,
    "SentencePiece unigram": unigram,
    "another byte-level": lambda: byte_level(ENGLISH, 350),
}
STYLES = ("bytes", "replaced", "vllm", "ids")
WORDS = st.sampled_from(
    ["The ", "sky", " is", " blue", "apple", "🍏", "日本", "über ", "\n", "  ", "é", "e\u0301", "👩‍🚀"]
)
TEXTS = st.lists(WORDS | st.text(max_size=4), min_size=1, max_size=12).map("".join).filter(str.strip)


@cache
def speller(kind):
    return Speller(KINDS[kind](), kind)


def encode(kind, text):
    return speller(kind).tokenizer(text=text, add_special_tokens=False)["input_ids"]


@cache
def trusting(kind):
    """An aligner that has seen that the teacher's numbers are the named tokenizer's."""
    aligner = Aligner(speller(kind))
    text = " ".join(ENGLISH)
    aligner.look(read_choice(Teacher(speller(kind), "ids").answer(encode(kind, text), text)))
    return aligner


def check(teacher, student, style, text, dice):
    """Every number is of the token that it stands at. Returns the value, and how many of the teacher's tokens are like that."""
    ids = encode(teacher, text)
    ends = speller(student).names
    answer = [*encode(student, text), ends["<|im_end|>"]]
    if dice.random() < 0.3:
        ids = split_otherwise(ids, speller(teacher), dice) if speller(teacher).spell(ids) else ids
    if (speller(teacher).spell(ids) or b"") not in (text.encode(), b" " + text.encode()):
        return None
    source = Teacher(speller(teacher), style, dice, shows_opening=dice.random() < 0.5, ends=dice.random() < 0.7)
    choice = read_choice(source.answer(ids, text))
    aligner = trusting(student) if teacher == student else Aligner(speller(student))
    aligner.look(choice)
    value = aligner.align(choice, answer)
    if value is None:
        return None
    assert len(value["ids"]) == len(value["logprobs"]) == len(answer) and value["tokens"] == answer
    pieces, at = [speller(student).piece(token) for token in answer[:-1]], 0
    assert b"".join(pieces) in (text.encode(), b" " + text.encode())
    at = len(text.encode()) - len(b"".join(pieces))
    for position, (found, numbers) in enumerate(zip(value["ids"], value["logprobs"], strict=True)):
        span = None
        if position < len(pieces):
            span = (at, at := at + len(pieces[position]))
        for rank, (id_, number) in enumerate(zip(found, numbers, strict=True)):
            if rank == 0:
                true_id, true_span = source.chosen[number]
                assert id_ == answer[position]
                # The space with which one of the two opens a text is the only difference that there may be
                assert true_span == span or (
                    position == 0 and true_span[1] == span[1] and {true_span[0], span[0]} == {0, -1}
                )
            else:
                true_id = source.others[number]
            assert speller(student).piece(id_) == speller(teacher).piece(true_id) or (rank == 0 and position == 0)
            if teacher == student:
                assert id_ == true_id
    return value


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_no_wrong_token(teacher, student, style):
    @settings(max_examples=15, deadline=None)
    @given(TEXTS, st.integers(0, 2**32))
    def holds(text, seed):
        check(teacher, student, style, text, random.Random(seed))

    holds()


HIDDEN = "\ufffd".encode()
LAYOUTS = {
    "all shown": ([b"a", b"bc"], "abc", [(0, 1), (1, 3)]),
    "another text": ([b"a", b"bd"], "abc", None),
    "too short": ([b"a"], "abc", None),
    "too long": ([b"abc", b"d"], "abc", None),
    "one hidden": ([b"a", HIDDEN, b"b"], "aéb", [(0, 1), (1, 3), (3, 4)]),
    "one hidden at the end": ([b"a", HIDDEN], "aé", [(0, 1), (1, 3)]),
    "a byte each": ([HIDDEN, HIDDEN, b"b"], "éb", [(0, 1), (1, 2), (2, 3)]),
    "not a byte each": ([HIDDEN, HIDDEN, b"b"], "日b", [None, None, (3, 4)]),
    "more hidden than bytes": ([HIDDEN, HIDDEN, HIDDEN, b"b"], "éb", None),
    "nothing shown, and then all": ([b"", "日".encode(), b"b"], "日b", [None, None, (3, 4)]),
    "replaced, and then all": ([HIDDEN, "日".encode(), b"b"], "日b", [None, None, (3, 4)]),
    "nothing shown of a token that may be none": ([b"", HIDDEN, b"b"], "éb", [None, None, None]),
    "a letter that is there twice": ([HIDDEN, b"a", HIDDEN], "éaaé", [None, None, None]),
    "a letter that is there twice, and then something else": (
        [HIDDEN, b"a", HIDDEN, b"b"],
        "éaaéb",
        [None, None, None, (6, 7)],
    ),
}


@pytest.mark.parametrize(("pieces", "text", "spans"), LAYOUTS.values(), ids=LAYOUTS)
def test_where_tokens_lie(pieces, text, spans):
    assert lay_out(pieces, text.encode()) == spans


def placed(content, *pieces, finish_reason="stop", **message):
    entries = [{"token": piece, "logprob": -0.5, "bytes": list(piece.encode())} for piece in pieces]
    raw = {
        "message": {"content": content, **message},
        "logprobs": {"content": entries},
        "finish_reason": finish_reason,
    }
    return place(read_choice(raw))


def test_of_a_hidden_token_at_the_beginning_a_space_may_be_a_part():
    assert [token.span for token in placed("éb", "\ufffd", "b", finish_reason="length").tokens] == [None, (2, 3)]


def test_a_last_token_may_be_the_end_alone_where_an_answer_has_ended():
    assert placed("ab", "a", "b", "</s>").end.shown.text == "</s>"
    assert placed("ab", "a", "b", "</s>", finish_reason="length") is None
    assert placed("aé", "a", "\ufffd").end is None
    assert placed("a", "a", "\ufffd").end is not None


def test_where_a_thought_may_end_in_two_places_nothing_is_said():
    assert placed("a", "x", "a", "a", reasoning="xa", finish_reason="length").tokens[0].span == (0, 1)
    assert placed("a", "x", "a", "a", reasoning="xa") is None  # the last one may be the end
    assert placed("日", "\ufffd", "\ufffd", "\ufffd", reasoning="x") is None


TEXT = "The sky over Zürich is blue 🍏, 日本語の空 naïve apple. Hello, cat! How are you today?"


def aligned(teacher, student, style, text=TEXT, **others):
    """The value of one answer, and the choice that it is of."""
    source = Teacher(speller(teacher), style, random.Random(1), **others)
    choice = read_choice(source.answer(encode(teacher, text), text))
    aligner = trusting(student) if teacher == student else Aligner(speller(student))
    return aligner.align(choice, [*encode(student, text), speller(student).names["<|im_end|>"]])


@pytest.mark.parametrize("style", ["bytes", "ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_same_tokenizer_all_is_found(kind, style):
    """The end included, and all alternatives but bytes that are no text, which another piece's byte may be."""
    value = aligned(kind, kind, style, shows_opening=True)
    assert value["exact"] and all(value["ids"])
    assert [ids[0] for ids in value["ids"]] == value["tokens"]
    alternatives = sum(len(ids) - 1 for ids in value["ids"])
    assert alternatives >= (1.0 if style == "ids" else 0.9) * 3 * len(value["ids"])


@pytest.mark.parametrize("style", ["replaced", "vllm"])
def test_cut_characters_leave_holes(style):
    """What is cut over several tokens cannot be told apart; all around it is."""
    value = aligned("byte-level", "byte-level", style)
    pieces = [speller("byte-level").piece(token) for token in value["tokens"][:-1]]
    is_text = [is_utf8(piece) for piece in pieces]
    assert not value["exact"] and not all(is_text)
    missing = [piece for ids, piece in zip(value["ids"], pieces, strict=False) if not ids]
    assert 0 < len(missing) < len(pieces) / 2


def test_alternatives_to_a_part_of_a_character_are_none():
    """Beside the bytes before it, a server may show them as characters that they are not."""
    value = aligned("another byte-level", "another byte-level", "replaced")
    pieces = [speller("another byte-level").piece(token) for token in value["tokens"][:-1]]
    parts = [ids for ids, piece in zip(value["ids"], pieces, strict=False) if not is_utf8(piece)]
    assert value["exact"] and len(parts) > 10 and all(len(ids) == 1 for ids in parts)


def is_utf8(piece):
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize(
    ("teacher", "student"), [("SentencePiece BPE", "byte-level"), ("byte-level", "another byte-level")]
)
def test_a_foreign_tokenizer_is_found_in_part_and_is_never_exact(teacher, student):
    values = [aligned(teacher, student, style) for style in STYLES]
    assert all(0 < sum(map(bool, value["ids"])) < len(value["ids"]) and not value["exact"] for value in values)


def test_numbers_of_another_vocabulary_are_no_alternatives():
    """Whose own spelled one short answer by chance: an unknown teacher's numbers stand for nothing."""
    text = "The sky"
    source = Teacher(speller("byte-level"), "ids", random.Random(1))
    choice = read_choice(source.answer(encode("byte-level", text), text))
    answer = [*encode("byte-level", text), speller("byte-level").names["<|im_end|>"]]
    unsure = Aligner(speller("byte-level"))
    unsure.look(choice)
    value = unsure.align(choice, answer)
    assert value["exact"] and [len(ids) for ids in value["ids"]] == [1] * len(answer)
    assert [len(ids) for ids in trusting("byte-level").align(choice, answer)["ids"]] == [4] * len(answer)


class Changed:
    """An answer whose log-probabilities are changed before they are read."""

    def __init__(self, style="bytes", text="The sky is blue.", kind="byte-level"):
        self.kind, self.text = kind, text
        self.raw = Teacher(speller(kind), style).answer(encode(kind, text), text)
        self.entries = self.raw["logprobs"]["content"]

    def value(self):
        answer = [*encode(self.kind, self.text), speller(self.kind).names["<|im_end|>"]]
        return trusting(self.kind).align(read_choice(self.raw), answer)


def test_tokens_that_are_not_the_answers_are_refused():
    """As of a server that shows the first of its alternatives for the token that it took."""
    changed = Changed()
    entry = changed.entries[2]
    entry["token"], entry["bytes"] = (entry["top_logprobs"][1][name] for name in ("token", "bytes"))
    assert changed.value() is None


def test_a_chosen_token_that_is_not_among_its_alternatives():
    """They are shown in another way, then, and may be other tokens; a rare one is below all of them."""
    changed = Changed()
    for position in (1, 2):
        del changed.entries[position]["top_logprobs"][0]
    changed.entries[2]["logprob"] = -20.0
    value = changed.value()
    assert (len(value["ids"][1]), len(value["ids"][2])) == (1, 4)


@pytest.mark.parametrize("logprob", [-9999.0, -10000, None, "x", 0.7, float("nan")])
def test_a_token_without_a_number_is_missing(logprob):
    changed = Changed()
    changed.entries[1]["logprob"] = logprob
    value = changed.value()
    assert value["ids"][1] == [] and value["ids"][2] and not value["exact"]


def test_numbers_of_alternatives_that_are_none_are_left_out():
    changed = Changed()
    changed.entries[1]["top_logprobs"][1]["logprob"] = -9999.0
    changed.entries[2]["top_logprobs"][1]["logprob"] = -0.1  # a sum above 1: no natural logarithms
    value = changed.value()
    assert len(value["ids"][1]) == 3 and value["ids"][2] == [] and not value["exact"]


def test_two_alternatives_that_look_alike_are_neither():
    changed = Changed()
    listed = changed.entries[1]["top_logprobs"]
    listed[1]["token"], listed[1]["bytes"] = listed[2]["token"], listed[2]["bytes"]
    assert len(changed.value()["ids"][1]) == 2


def test_tokens_of_a_thought_are_passed_over():
    thought, text = "An apple is red.</think>\n\n", "The sky is blue."
    ids = [*encode("byte-level", thought), *encode("byte-level", text)]
    raw = Teacher(speller("byte-level"), "bytes").answer(ids, thought + text)
    raw["message"] = {"role": "assistant", "content": text, "reasoning": "An apple is red."}
    answer = [*encode("byte-level", f"<think>{thought}"), *encode("byte-level", text)]
    answer.append(speller("byte-level").names["<|im_end|>"])
    value = trusting("byte-level").align(read_choice(raw), answer)
    of_text = len(encode("byte-level", text)) + 1
    assert value["exact"] and all(value["ids"][-of_text:]) and not any(value["ids"][:-of_text])


def test_a_stop_text_and_another_end():
    """The last token is none of the text, and none that ends the student's answers: nothing is said of the end."""
    changed = Changed()
    changed.entries[-1] |= {"token": "###", "bytes": list(b"###")}
    value = changed.value()
    assert value["exact"] and value["ids"][-1] == [] and all(value["ids"][:-1])


def test_an_answer_that_holds_replacement_characters_is_left_alone():
    changed = Changed("replaced", "The sky � is blue.")
    assert changed.value() is None


def test_a_space_that_opens_a_text_may_be_the_answers_own():
    """Of an answer that begins with a space, either is possible where the endpoint does not show the tokenizer's."""
    for shows in (True, False):
        value = aligned("SentencePiece BPE", "SentencePiece BPE", "bytes", " The sky is blue.", shows_opening=shows)
        assert all(value["ids"][1:])


def token(text, logprob, *others, shown=None):
    """One token as a real vLLM writes it: alternatives with the bytes of what is written of them."""
    listed = [(text, logprob), *others]
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list((text if shown is None else shown).encode()),
        "top_logprobs": [{"token": one, "logprob": number, "bytes": list(one.encode())} for one, number in listed],
    }


class TestVLLM:
    """An apple over four bytes, two of which a tokenizer has no piece for: as vLLM 0.32 shows it."""

    text = "The sky 🍏!"

    def value(self, entries, ended=True):
        mine = speller("another byte-level")
        ids = encode("another byte-level", self.text)
        assert [mine.piece(id_) for id_ in ids[-5:]] == [b"\xf0", b"\x9f", b"\x8d", b"\x8f", b"!"]
        raw = {"message": {"content": self.text}, "logprobs": {"content": entries}, "finish_reason": "stop"}
        answer = [*ids, mine.names["<|im_end|>"]]
        return answer, trusting("another byte-level").align(read_choice(raw), answer)

    def before(self):
        mine = speller("another byte-level")
        pieces = [mine.piece(id_).decode() for id_ in encode("another byte-level", self.text)[:-5]]
        return [token(piece, -0.25, ("a", -3.0), ("", -4.0), ("\ufffd", -5.0)) for piece in pieces]

    def test_cut_characters(self):
        """They come as nothing, and then as a whole that is none of the tokens; the joined bytes are the text's all the same."""
        cut = [token("", -0.5), token("", -0.25), token("", -0.125), token("🍏", -0.1, ("🍎", -3.0))]
        entries = [*self.before(), *cut, token("!", -0.5, ("?", -2.0)), token("<|im_end|>", -0.0625)]
        assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]).decode() == self.text
        answer, value = self.value(entries)
        assert [bool(ids) for ids in value["ids"]] == [*[True] * len(self.before()), *[False] * 4, True, True]
        assert not value["exact"] and value["logprobs"][-1] == [-0.0625] and value["ids"][-1] == answer[-1:]
        # What is shown of an alternative as nothing, or as a replacement, is no token
        assert all(len(ids) <= 2 for ids in value["ids"])

    def test_ids_on_request(self):
        mine = speller("another byte-level")
        ids = [*encode("another byte-level", self.text), mine.names["<|im_end|>"]]
        other = mine.token(b"a")
        entries = [token(f"token_id:{id_}", -0.25, (f"token_id:{other}", -3.0), shown="") for id_ in ids]
        entries[-1] = token(f"token_id:{ids[-1]}", -0.25, ("token_id:99999", -3.0), shown="<|im_end|>")
        answer, value = self.value(entries)
        assert value["exact"] and value["ids"] == [*([id_, other] for id_ in ids[:-1]), ids[-1:]]

    def test_no_value(self):
        entries = [
            *self.before(),
            *[token("", -0.5)] * 3,
            token("🍏", -0.5),
            token("!", -9999.0),
            token("<|im_end|>", -9999.0),
        ]
        answer, value = self.value(entries)
        assert value["ids"][-2:] == [[], []]


def test_a_first_token_whose_space_is_not_shown():
    """It is taken where the rest shows that the tokenizers are the same, but its alternatives are not."""
    long, short = (
        aligned("SentencePiece BPE", "SentencePiece BPE", "bytes", text, shows_opening=False)
        for text in (TEXT, "The sky is blue.")
    )
    assert long["exact"] and len(long["ids"][0]) == 1
    assert not short["exact"] and not short["ids"][0] and all(short["ids"][1:])
    shown = aligned("SentencePiece BPE", "SentencePiece BPE", "bytes", "The sky is blue.", shows_opening=True)
    assert shown["exact"] and len(shown["ids"][0]) > 1


END = "<|im_end|>"


def shown_as(kind, ids, text, answer, style="bytes", **others):
    """The value of an answer that a teacher wrote in these tokens."""
    raw = Teacher(speller(kind), style, random.Random(1), **others).answer(ids, text)
    return trusting(kind).align(read_choice(raw), [*answer, speller(kind).names[END]])


def test_a_token_that_reaches_into_the_text_from_before_it():
    """A template's letter and a teacher's space make tokens of the same length, that are not the same."""
    student = encode("byte-level", "The sky is blue.")
    pieces = [" he", *(speller("byte-level").piece(id_).decode() for id_ in student[1:])]
    assert speller("byte-level").piece(student[0]) == b"The"
    entries = [{"token": piece, "logprob": -0.5, "bytes": None} for piece in pieces]
    raw = {"message": {"content": "he sky is blue."}, "logprobs": {"content": entries}, "finish_reason": "stop"}
    value = trusting("byte-level").align(read_choice(raw), [*student, speller("byte-level").names[END]])
    assert value["ids"][0] == [] and not value["exact"] and all(value["ids"][1:-1])


def test_a_space_of_its_own_before_the_text():
    """Where the teacher wrote two tokens, and the student has one of them both."""
    kind, text = "SentencePiece BPE", "a is blue."
    student = encode(kind, text)
    assert speller(kind).piece(student[0]) == b" a"
    teacher = [speller(kind).token(b" "), speller(kind).token(b"a"), *student[1:]]
    value = shown_as(kind, teacher, text, student, shows_opening=True)
    assert value["ids"][0] == [] and not value["exact"] and all(value["ids"][1:])


def test_a_space_that_the_teacher_did_not_write():
    kind, text = "SentencePiece BPE", "龍 is blue."
    student = encode(kind, text)
    assert speller(kind).piece(student[0]) == b" "
    value = shown_as(kind, student[1:], text, student, style="ids")
    assert value["ids"][0] == [] and not value["exact"] and all(value["ids"][1:])


def test_the_byte_of_a_letter_that_has_a_piece_is_another_token():
    kind, text = "SentencePiece BPE", "The sky is blue, l d."
    student = encode(kind, text)
    pieces = [speller(kind).piece(id_) for id_ in student]
    at = next(i for i, piece in enumerate(pieces) if len(piece) == 1 and piece.isalpha())
    byte = speller(kind).tokenizer.convert_tokens_to_ids(f"<0x{pieces[at][0]:02X}>")
    value = shown_as(kind, [*student[:at], byte, *student[at + 1 :]], text, student, style="ids")
    assert value["ids"][at] == [] and not value["exact"]


def test_an_answer_that_is_not_the_end_of_what_is_learned():
    text = "The sky is blue."
    ids = encode("byte-level", text)
    assert shown_as("byte-level", ids, text, encode("byte-level", text + " It is.")) is None
    assert shown_as("byte-level", ids, text, encode("byte-level", text + "\n"))["ids"][-1] != []


def test_two_tokens_of_the_same_bytes_are_neither():
    tokenizer = byte_level()
    tokenizer.add_tokens([" is", "\ufffd"])
    mine = Speller(tokenizer, "mine")
    assert mine.token(b" is") is None and mine.token(b" blue") is not None
    # A token of the replacement character does not make that one of cut characters
    answer = [*tokenizer(text="The sky", add_special_tokens=False)["input_ids"]]
    entries = [token(mine.piece(id_).decode(), -0.5, ("\ufffd", -3.0), ("a", -4.0)) for id_ in answer]
    raw = {"message": {"content": "The sky"}, "logprobs": {"content": entries}, "finish_reason": "stop"}
    value = Aligner(mine).align(read_choice(raw), [*answer, mine.names[END]])
    assert mine.token("\ufffd".encode()) is not None and [len(ids) for ids in value["ids"][1:-1]] == [2] * (
        len(answer) - 1
    )


LOSSY = {
    "lower case": (lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()), "cannot spell 'Naïve"),
    "compatibility": (lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFKC()), "cannot spell 'ﬁne"),
    "spaces": (
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        "cannot spell 'two  spaces'",
    ),
    "no decoder": (lambda tokenizer: setattr(tokenizer, "decoder", decoders.WordPiece()), "has no byte fallback"),
}


@pytest.mark.parametrize(("change", "message"), LOSSY.values(), ids=LOSSY)
def test_a_tokenizer_that_cannot_spell(change, message):
    tokenizer = byte_level()
    change(tokenizer.backend_tokenizer)
    with pytest.raises(RecipeError, match=f"^tokenizer: mine {message}"):
        Speller(tokenizer, "mine")


def test_a_tokenizer_without_bytes():
    with pytest.raises(RecipeError, match="cannot spell .*: its tokens give nothing"):
        Speller(sentencepiece_bpe(byte_fallback=False), "mine")


def test_composed_accents_are_told_answer_by_answer():
    """As of Qwen's tokenizer, which composes them: most answers are composed."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    composing = Speller(tokenizer, "mine")
    end = composing.names["<|im_end|>"]
    for text, is_spelled in (("The sky is caf\u00e9.", True), ("The sky is cafe\u0301.", False)):
        ids = composing.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        choice = read_choice(Teacher(speller("byte-level"), "bytes").answer(encode("byte-level", text), text))
        assert (Aligner(composing).align(choice, [*ids, end]) is not None) == is_spelled
