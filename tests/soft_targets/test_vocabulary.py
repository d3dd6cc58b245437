import json
import re

import pytest
from tokenizers import Tokenizer
from transformers import Gemma3Config, PreTrainedTokenizerFast, Qwen2Config

from trl_bbkd.errors import VocabularyError
from trl_bbkd.soft_targets.vocabulary import check_vocabularies

from ..conftest import SENTENCES, build_tokenizer


SIZE = 330


def config(vocab_size=SIZE):
    return Qwen2Config(vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1)


def edited(edit):
    """The tokenizer of the tests, after `edit` of its JSON."""
    description = json.loads(build_tokenizer().backend_tokenizer.to_str())
    edit(description)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))


def swap(*pairs):
    """Exchange the ids of tokens."""

    def edit(description):
        vocab = description["model"]["vocab"]
        tokens = {i: token for token, i in vocab.items()}
        for first, second in pairs:
            vocab[tokens[first]], vocab[tokens[second]] = second, first

    return edit


def check(student, proxy, student_size=SIZE, proxy_size=SIZE, texts=SENTENCES):
    return check_vocabularies(student, proxy, config(student_size), config(proxy_size), texts)


def test_the_tokenizer_has_the_size_assumed_here(tokenizer):
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1 == SIZE


def test_one_family_with_output_layers_of_different_sizes(tokenizer, tmp_path):
    """As in Qwen2.5, where 151,665 tokens meet 151,936 rows in one model and 152,064 in another."""
    tokenizer.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert check(tokenizer, other, 336, 352) == 336
    assert check(tokenizer, other, 352, 336) == 336
    assert check(tokenizer, other) == SIZE


def test_a_model_of_text_and_images(tokenizer):
    """Its vocabulary is that of the language model inside of it."""
    proxy_config = Gemma3Config(text_config={"vocab_size": 345, "hidden_size": 8, "num_hidden_layers": 1})
    assert check_vocabularies(tokenizer, tokenizer, config(340), proxy_config, []) == 340
    assert check_vocabularies(tokenizer, tokenizer, config(350), proxy_config, []) == 345


def test_the_first_tokens_that_differ_are_named(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(list(range(SIZE)))
    with pytest.raises(VocabularyError) as error:
        check(tokenizer, edited(swap((40, 200), (50, 210))))
    message = str(error.value)
    assert "4 ids differ" in message
    for i, other in ((40, 200), (50, 210), (200, 40), (210, 50)):
        assert f"id {i} is {tokens[i]!r} to the student and {tokens[other]!r} to the proxy" in message
    assert "GAD" in message and "SeqKD" in message


def test_only_the_first_five_are_shown(tokenizer):
    with pytest.raises(VocabularyError) as error:
        check(tokenizer, edited(swap(*((i, i + 100) for i in range(10, 50)))))
    assert re.findall(r"id (\d+) is", str(error.value)) == ["10", "11", "12", "13", "14"]
    assert "80 ids differ" in str(error.value)


@pytest.mark.parametrize("larger", ["student", "proxy"])
def test_a_token_that_one_of_them_lacks(tokenizer, larger):
    extended = build_tokenizer()
    extended.add_tokens(["<think>"])
    pair = (extended, tokenizer) if larger == "student" else (tokenizer, extended)
    expected = ("'<think>'", "nothing") if larger == "student" else ("nothing", "'<think>'")
    with pytest.raises(VocabularyError) as error:
        check(*pair, 352, 352)
    assert "1 ids differ: id 330 is {} to the student and {} to the proxy".format(*expected) in str(error.value)


def drop_merges(description):
    del description["model"]["merges"][10:]


def reverse_merges(description):
    description["model"]["merges"].reverse()


def add_prefix_space(description):
    description["pre_tokenizer"]["add_prefix_space"] = True


def lowercase(description):
    description["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("edit", [drop_merges, reverse_merges, add_prefix_space, lowercase])
def test_the_same_tokens_under_other_rules(tokenizer, edit):
    proxy = edited(edit)
    assert proxy.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(VocabularyError, match="same tokens but cut text differently") as error:
        check(tokenizer, proxy)
    text = next(text for text in SENTENCES if tokenizer.tokenize(text) != proxy.tokenize(text))
    mine, other = tokenizer.tokenize(text), proxy.tokenize(text)
    at = next(i for i in range(len(mine)) if mine[i] != other[i])
    message = str(error.value)
    assert repr(text[:60]) in message and str(mine[at : at + 3]) in message and str(other[at : at + 3]) in message
    assert "GAD" in message and "SeqKD" in message


def test_rules_are_compared_on_the_texts(tokenizer):
    """Every text is looked at, not only the first."""
    proxy = edited(lowercase)
    assert check(tokenizer, proxy, texts=["the sky is blue", "an apple"]) == SIZE
    with pytest.raises(VocabularyError, match="An apple"):
        check(tokenizer, proxy, texts=["the sky is blue", "An apple"])


def test_a_cut_that_is_a_beginning_of_the_other(tokenizer):
    """One tokenizer stops where the other goes on: there is no first pair that differs."""

    def strip(description):
        description["normalizer"] = {"type": "Strip", "strip_left": False, "strip_right": True}

    with pytest.raises(VocabularyError, match=r"student makes \['Ġ'\] where the proxy makes \[\]"):
        check(tokenizer, edited(strip), texts=["the sky "])


@pytest.mark.parametrize("name", ["student", "proxy"])
def test_a_tokenizer_larger_than_the_output_layer(tokenizer, name):
    sizes = {"student_size": SIZE, "proxy_size": SIZE, f"{name}_size": SIZE - 1}
    with pytest.raises(
        VocabularyError, match=f"The {name}'s output layer has 329 rows, but its tokenizer goes up to id 329"
    ):
        check(tokenizer, tokenizer, **sizes)
