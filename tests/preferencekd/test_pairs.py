import pytest

from trl_bbkd.preferencekd.pairs import preferred_pairs, win_rates


SCORES, LENGTHS = [0.5, 0.9, 0.1, 0.4], [10, 30, 12, 10]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(1, 2)]),
        ({"max_length_ratio": 1.2}, [(0, 2)]),  # 30 tokens are too many beside 12
        ({"max_length_ratio": 1.0}, [(0, 3)]),
        ({"margin": 0.8}, []),
        ({"every": True, "margin": 0.35}, [(0, 2), (1, 0), (1, 2), (1, 3)]),
        ({"every": True, "margin": 0.25, "max_length_ratio": 1.2}, [(0, 2), (3, 2)]),
    ],
)
def test_on_a_hand_example(settings, expected):
    # 0.9 - 0.5 is 0.4, 0.4 - 0.1 is over 0.25 and under 0.35
    assert preferred_pairs(SCORES, LENGTHS, **settings) == expected


def test_no_pair_of_equal_scores():
    assert preferred_pairs([0.3, 0.3, 0.3], [1, 2, 3]) == []
    assert preferred_pairs([0.3, 0.3, 0.3], [1, 2, 3], every=True) == []


def test_of_pairs_that_are_as_far_apart_the_first():
    assert preferred_pairs([1, 0, 1, 0], [5, 5, 5, 5]) == [(0, 1)]


def test_empty_answers_are_matched_with_empty_ones():
    assert preferred_pairs([1, 0.5, 0], [0, 4, 0], max_length_ratio=3.0) == [(0, 2)]


def test_win_rates_on_a_hand_example():
    first_wins = [[0.0, 0.8, 0.6], [0.4, 0.0, 0.5], [0.2, 0.1, 0.0]]
    # P(0 > 1) = (0.8 + 0.6) / 2, P(0 > 2) = (0.6 + 0.8) / 2, P(1 > 2) = (0.5 + 0.9) / 2
    assert win_rates(first_wins) == pytest.approx([0.7, (0.3 + 0.7) / 2, (0.3 + 0.3) / 2])


@pytest.mark.parametrize("bias", [1.0, 0.0, 0.9])
def test_both_orders_cancel_a_judge_that_looks_at_the_order_alone(bias):
    rates = win_rates([[bias] * 4 for _ in range(4)])
    assert rates == pytest.approx([0.5] * 4)
    assert preferred_pairs(rates, [1] * 4) == []
