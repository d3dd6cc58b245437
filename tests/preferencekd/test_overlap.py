from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_bbkd.preferencekd.overlap import best_overlap, longest_common_subsequence, overlap_score, rouge_l, units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's 3 mats.", ["the", "cat", "'", "s", "3", "mats", "."]),
        ("x+1=2", ["x", "+", "1", "=", "2"]),
        ("猫が好き", ["猫", "が", "好", "き"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # its vowel signs are marks, of one word with the letters
        ("한국어 문장", ["한국어", "문장"]),
        ("iPhone和Android", ["iphone", "和", "android"]),
        ("Straße \U0001f600", ["strasse", "\U0001f600"]),
        ("  ", []),
    ],
)
def test_units_of_any_script(text, expected):
    assert units(text) == expected


def test_rouge_l_on_a_hand_example():
    # the longest common subsequence is "police the gunman" of 4 and 5 words
    assert rouge_l("police kill the gunman", "police ended the mad gunman") == pytest.approx(2 * 3 / (4 + 5))
    assert rouge_l("same words", "Same  words") == 1 and rouge_l("", "") == 0 and rouge_l("a", "b") == 0


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_longest_common_subsequence(one, other):
    @cache
    def slowly(i, j):
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + slowly(i + 1, j + 1)
        return max(slowly(i + 1, j), slowly(i, j + 1))

    assert longest_common_subsequence(one, other) == slowly(0, 0)


def test_the_nearest_of_several_references():
    assert best_overlap(rouge_l, ["a b", "c d"], ["a b c", "c d"]) == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_measures_of_sacrebleu(metric):
    pytest.importorskip("sacrebleu")
    score = overlap_score(metric)
    near, far = "the cat sat on the mat today", "dogs run far"
    assert score(near, near) == pytest.approx(1.0)
    assert score(far, near) < score("the cat sat on a mat", near) < 1


def test_sacrebleu_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"overlap_metric='bleu' needs sacrebleu: pip install 'trl-bbkd\[overlap\]'"):
        overlap_score("bleu")
