import json
import logging
import math

import matplotlib.image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.errors import PseudoLabelError
from trl_bbkd.llkd.label_calibration import (
    apply_temperature,
    calibration_report,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from trl_bbkd.llkd.reliability import plot_reliability, wilson_interval


confidences = st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.booleans()), min_size=1, max_size=60)


def synthetic(rows, classes=4, scale=1.0, seed=0):
    """Distributions of logits `scale` times too large, and gold labels drawn from the true ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    gold = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).squeeze(1)
    return torch.softmax(scale * logits, 1), gold


def test_reliability_and_ece_by_hand():
    confidence = [0.0, 0.1, 0.25, 0.3, 0.9, 1.0]
    is_correct = [False, True, False, False, True, False]
    found = reliability(confidence, is_correct, bins=4)
    # A bound belongs to the bin below it, 0 to the first
    assert found.lower.tolist() == [0, 0.25, 0.5, 0.75] and found.upper.tolist() == [0.25, 0.5, 0.75, 1]
    assert found.count.tolist() == [3, 1, 0, 2]
    assert found.confidence.tolist() == pytest.approx([0.35 / 3, 0.3, math.nan, 0.95], nan_ok=True)
    assert found.accuracy.tolist() == pytest.approx([1 / 3, 0, math.nan, 0.5], nan_ok=True)
    expected = 3 / 6 * (1 / 3 - 0.35 / 3) + 1 / 6 * 0.3 + 2 / 6 * 0.45
    assert expected_calibration_error(confidence, is_correct, bins=4) == pytest.approx(expected)


@settings(deadline=None, max_examples=100)
@given(confidences, st.integers(1, 20))
def test_bins_partition_the_rows(rows, bins):
    confidence, is_correct = zip(*rows, strict=True)
    found = reliability(confidence, is_correct, bins)
    held = [
        [i for i, c in enumerate(confidence) if low < c <= high or (c == 0 and low == 0)]
        for low, high in zip(found.lower.tolist(), found.upper.tolist(), strict=True)
    ]
    assert found.count.tolist() == [len(members) for members in held]
    assert sorted(i for members in held for i in members) == list(range(len(rows)))
    slow = sum(abs(sum(is_correct[i] - confidence[i] for i in members)) for members in held) / len(rows)
    ece = expected_calibration_error(confidence, is_correct, bins)
    assert ece == pytest.approx(slow, abs=1e-12) and 0 <= ece <= 1
    # One bin is the least that any number of bins can find
    assert ece >= expected_calibration_error(confidence, is_correct, 1) - 1e-12


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_a_calibrated_teacher_has_a_small_ece(seed):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(20_000, generator=generator)
    is_correct = torch.rand(20_000, generator=generator) < confidence
    ece = expected_calibration_error(confidence, is_correct)
    # The docstring's √(M / N) / 3, within its noise
    assert 0.4 < ece / (math.sqrt(15 / 20_000) / 3) < 1.8
    assert expected_calibration_error(confidence, ~is_correct) > 0.4


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.5, 6.0])
def test_a_known_temperature_is_found(temperature):
    probs, gold = synthetic(20_000, scale=temperature)
    found = fit_temperature(probs, gold)
    assert found == pytest.approx(temperature, rel=0.05)
    before, after = (calibration_report(p, gold, list("abcd")) for p in (probs, apply_temperature(probs, found)))
    assert after["ece"] < 0.015 and after["nll"] <= before["nll"] and after["accuracy"] == before["accuracy"]


def test_the_temperature_is_the_minimum_of_the_nll():
    probs, gold = synthetic(40, scale=3.0, seed=1)
    found = fit_temperature(probs.tolist(), gold.tolist())

    def nll(temperature):
        tempered = probs ** (1 / temperature)
        return -(tempered / tempered.sum(1, keepdim=True)).gather(1, gold[:, None]).log().mean()

    assert all(nll(found) <= nll(found * factor) for factor in (0.8, 0.99, 0.9999, 1.0001, 1.01, 1.25))


def test_a_temperature_at_its_bounds_warns(caplog):
    probs, gold = synthetic(50)
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(probs, probs.argmax(1)) == 0.05
        assert fit_temperature(probs, probs.argmin(1)) == 20.0
    assert "are never wrong on these 50 rows" in caplog.text and "are no better than chance" in caplog.text


def test_votes_without_the_gold_label_have_a_finite_temperature():
    probs = torch.tensor([[1.0, 0.0, 0.0]] * 9 + [[0.0, 1.0, 0.0]])
    temperature = fit_temperature(probs, torch.tensor([0] * 9 + [0]))
    # 9 of 10 are right, which is what the confidence becomes
    assert apply_temperature(probs, temperature).amax(1).tolist() == pytest.approx(
        [0.9 / (0.9 + 2 * 0.05)] * 10, abs=1e-3
    )


def test_temperatures_by_hand():
    assert apply_temperature([[0.8, 0.2]], 2.0)[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert apply_temperature([[0.8, 0.2]], 0.5)[0].tolist() == pytest.approx([16 / 17, 1 / 17])
    assert apply_temperature([[1.0, 0.0]], 1.0).tolist() == [[1.0, 0.0]]


def test_report_by_hand(tmp_path):
    probs = [[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.5, 0.4, 0.1]]
    report = calibration_report(probs, [0, 1, 1, 2], ["a", "b", "c"], bins=2)
    assert json.loads(json.dumps(report)) == report
    assert report["rows"] == 4 and report["accuracy"] == 0.5
    assert report["mean_confidence"] == pytest.approx(2.7 / 4)
    assert report["ece"] == pytest.approx((0.5 + abs(2 - 2.2)) / 4)
    assert report["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.9) + math.log(0.1)) / 4)
    assert [entry["count"] for entry in report["bins"]] == [1, 3]
    assert report["bins"][1] == pytest.approx(dict(lower=0.5, upper=1.0, count=3, confidence=2.2 / 3, accuracy=2 / 3))
    assert report["classes"]["a"] == pytest.approx(
        {"gold": 1, "predicted": 3, "recall": 1.0, "precision": 1 / 3, "mean_confidence": 0.6}
    )
    assert report["classes"]["c"] == {
        "gold": 1,
        "predicted": 0,
        "recall": 0.0,
        "precision": None,
        "mean_confidence": None,
    }
    stated = calibration_report(probs, [0, 1, 1, 2], ["a", "b", "c"], predicted=[0, 1, 1, 2])
    assert stated["accuracy"] == 1.0 and stated["mean_confidence"] == pytest.approx((0.7 + 0.4 + 0.9 + 0.1) / 4)


def test_wilson_by_hand():
    low, high = wilson_interval(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([10.0, 100.0, 10.0]))
    assert low.tolist() == pytest.approx([0.0, 0.4038, 0.7225], abs=1e-4)
    assert high.tolist() == pytest.approx([0.2775, 0.5962, 1.0], abs=1e-4)


def test_the_picture_shows_the_report(tmp_path):
    probs, gold = synthetic(600, scale=3.0)
    worse, better = tmp_path / "worse.png", tmp_path / "better.png"
    plot_reliability(calibration_report(probs, gold, list("abcd")), worse)
    plot_reliability(calibration_report(apply_temperature(probs, 3.0), gold, list("abcd")), better)
    pictures = [matplotlib.image.imread(path)[..., :3] for path in (worse, better)]
    assert min(pictures[0].shape[:2]) > 600
    # Pixels of the gap's colour on white or on a bar: there are far fewer after the temperature
    orange = [((p[..., 0] - p[..., 2] > 0.2) & (p[..., 0] > 0.6)).sum() for p in pictures]
    assert orange[0] > 2 * orange[1] > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reliability([], []), "N at least 1"),
        (lambda: reliability([0.5], [True, False]), r"\(1,\) and `is_correct` \(2,\)"),
        (lambda: reliability([0.5, 1.5], [True, False]), r"Row 1: the confidence is 1.5; it must be in \[0, 1\]"),
        (lambda: reliability([math.nan], [True]), "Row 0: the confidence is nan"),
        (lambda: reliability([0.5], [True], bins=0), "`bins` is 0"),
        (lambda: fit_temperature([[0.5, 0.5]] * 9, [0] * 9), "at least 10 checked rows, better 200; there are 9"),
        (lambda: fit_temperature([[0.5, 0.5]] * 10, [0] * 9 + [2]), "Row 9: `gold` is 2; the classes are 0 to 1"),
        (lambda: fit_temperature([[0.5, 0.5]] * 10, [-1] * 10), "Row 0: `gold` is -1"),
        (lambda: fit_temperature([[0.5, 0.5]] * 10, [0] * 11), "`gold` has the shape .* must hold 10 class numbers"),
        (lambda: fit_temperature([[0.5, 0.5]] * 10, [0.0] * 10), "`gold` has .* torch.float32"),
        (lambda: fit_temperature([[0.5, 0.6]] * 10, [0] * 10), "Row 0: .* is no distribution"),
        (lambda: fit_temperature([[math.nan, 1.0]] * 10, [0] * 10), "Row 0: .* is no distribution"),
        (lambda: fit_temperature([0.5] * 10, [0] * 10), r"`probs` has the shape \(10,\)"),
        (lambda: apply_temperature([[0.5, 0.5]], -1.0), "`temperature` is -1.0"),
        (lambda: apply_temperature([[0.5, 0.5]], math.nan), "`temperature` is nan"),
        (lambda: calibration_report([[0.5, 0.5]], [0], ["a"]), "1 labels, but a distribution has 2 classes"),
        (lambda: calibration_report([[0.5, 0.5]], [0], ["a", "b"], predicted=[3]), "`predicted` is 3"),
    ],
)
def test_bad_input_is_one_error(call, message):
    with pytest.raises(PseudoLabelError, match=message):
        call()
