import math

import numpy as np
import pytest
import torch

from trl_bbkd.errors import LLKDDataError
from trl_bbkd.selection.signals import (
    agreement,
    check_confidence,
    class_entropy,
    max_class_probability,
    mean_token_entropy,
    sequence_confidence,
    verbalised_confidence,
)


def test_max_class_probability():
    probs = torch.tensor([[0.2, 0.7, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(max_class_probability(probs), torch.tensor([0.7, 1 / 3]))


@pytest.mark.parametrize("row", [[2.0, -1.0], [0.9, 0.4], [math.nan, 0.5]])
def test_logits_are_no_probabilities(row):
    with pytest.raises(LLKDDataError, match="Row 1: .* softmax"):
        max_class_probability(torch.tensor([[0.5, 0.5], row]))


def test_sequence_confidence_of_hand_values():
    """Tokens of probability 0.5 and 0.125: their geometric mean is 0.25."""
    rows = [[math.log(0.5), math.log(0.125)], [math.log(0.9)]]
    assert sequence_confidence(rows).tolist() == pytest.approx([0.25, 0.9])
    assert sequence_confidence(rows, reduction="min").tolist() == pytest.approx([0.125, 0.9])
    # Between the lowest two of 11, the 10 % quantile is the second
    many = [[math.log(p / 20) for p in range(1, 12)]]
    assert sequence_confidence(many, reduction="quantile").tolist() == pytest.approx([2 / 20])


@pytest.mark.parametrize("reduction", ["mean", "min", "quantile"])
def test_padding_and_prompt_have_no_part_in_sequence_confidence(reduction):
    generator = torch.Generator().manual_seed(0)
    answers = [-torch.rand(length, generator=generator) for length in (3, 1, 7)]
    padded = torch.full((3, 9), -9999.0)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for row, answer in enumerate(answers):
        padded[row, 1 : 1 + len(answer)] = answer
        mask[row, 1 : 1 + len(answer)] = 1
    found = sequence_confidence(padded, mask, reduction)
    assert found.dtype == torch.float64
    assert torch.equal(found, sequence_confidence([answer.tolist() for answer in answers], reduction=reduction))


@pytest.mark.parametrize("value", [-9999.0, -math.inf, math.nan, None, 0.5])
def test_a_missing_log_prob_is_never_averaged(value):
    with pytest.raises(LLKDDataError, match="Row 1: a token's log-probability is .* Drop the row"):
        sequence_confidence([[-0.1, -0.2], [-0.1, value]])


def test_sequence_confidence_of_bad_input():
    with pytest.raises(LLKDDataError, match="Row 1 has no answer tokens"):
        sequence_confidence(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="reduction is 'max'"):
        sequence_confidence([[-1.0]], reduction="max")
    # Rounding of a certain token
    assert sequence_confidence([[1e-6]]).tolist() == [1.0]


def test_agreement():
    found = agreement([["4", "5", "5", "5"], ["a"], ["x", "y"], [None, None, "7"], [None, None]])
    assert found.share.tolist() == pytest.approx([0.75, 1.0, 0.5, 1 / 3, 0.0])
    assert found.majority.tolist() == [1, 0, 0, 2, 0]
    with pytest.raises(LLKDDataError, match="Row 1 has no samples"):
        agreement([["4"], []])


@pytest.mark.parametrize(
    ("text", "confidence"),
    [
        ("85", 0.85),
        ("85 %", 0.85),
        ("0.85", 0.85),
        ("0,85", 0.85),
        (".85", 0.85),
        ("Confidence: 85/100", 0.85),
        ("I am 85 percent sure.", 0.85),
        ("17 out of 20", 0.85),
        ("Answer: 42\nConfidence: **85%**", 0.85),
        ("Confidence (0-100): 85", 0.85),
        ("On a scale of 0 to 1: 0.85.", 0.85),
        ("85 % (0.85)", 0.85),
        ("0", 0.0),
        ("100", 1.0),
        ("1.0", 1.0),
        ("0.5 %", 0.005),
        ("1/100", 0.01),
    ],
)
def test_verbalised_confidence(text, confidence):
    assert verbalised_confidence(text) == confidence


@pytest.mark.parametrize("text", ["", "very sure", "80 or 90", "85-90", "120", "-5", "101 %", "5/0", "7/5", "1"])
def test_what_is_no_verbalised_confidence(text):
    with pytest.raises(LLKDDataError) as error:
        verbalised_confidence(text)
    assert repr(text) in str(error.value)


def test_scale_of_a_verbalised_confidence():
    assert verbalised_confidence("1", scale=1) == 1.0
    assert verbalised_confidence("1", scale=100) == 0.01
    assert verbalised_confidence("7", scale=10) == 0.7
    assert verbalised_confidence("7 %", scale=10) == 0.07


def test_class_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [0.0, 0.0, -math.inf], [math.log(2), 0.0, 0.0]])
    expected = [1.0, 0.0, math.log(2) / math.log(3), (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(3)]
    assert class_entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)
    shifted = class_entropy((logits.double() + 1000).requires_grad_())
    assert shifted.tolist() == pytest.approx(expected, abs=1e-9) and not shifted.requires_grad
    assert class_entropy(logits[:1].bfloat16()).dtype == torch.float32
    assert class_entropy(torch.zeros(1, 150_000)).item() <= 1.0
    with pytest.raises(LLKDDataError, match="num_labels"):
        class_entropy(torch.zeros(3, 1))


def test_mean_token_entropy():
    entropy = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    found = mean_token_entropy(entropy, torch.tensor([0, 0, 2, 0]), 4)
    assert found.tolist() == pytest.approx([11 / 3, 0.0, 4.0, 0.0])
    assert not found.requires_grad and found.dtype == torch.float32
    scaled = mean_token_entropy(torch.full((5,), math.log(64)), torch.tensor([0, 0, 0, 1, 1]), 2, vocab_size=64)
    assert scaled.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("bad", [math.nan, None, -0.1, 1.1, 85, "0.9", math.inf, [0.5]])
def test_check_confidence_names_row_and_value(bad):
    with pytest.raises(LLKDDataError) as error:
        check_confidence([0.5, 1.0, bad])
    assert str(error.value).startswith(f"Row 2: `teacher_confidence` is {bad!r}") and "percentages" in str(error.value)
    with pytest.raises(LLKDDataError, match="Row 17:"):
        check_confidence([0.5, bad], rows=[4, 17])


def test_check_confidence_of_good_ones():
    check_confidence([0, 1, 0.5, np.float32(0.3), torch.tensor(0.9), 1.0 + 1e-7])
    check_confidence([])
    check_confidence(torch.tensor([0.1, 0.2]))
