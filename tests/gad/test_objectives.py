import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.discriminator.objectives import (
    bradley_terry_loss,
    cross_entropy_loss,
    group_std,
    loss_and_score_gradients,
    pair_accuracy,
)


# Building a trainer makes the CPU flush subnormal numbers, for the whole process
score = st.floats(-20, 20, width=32, allow_subnormal=False)
scores = st.lists(score, min_size=1, max_size=5)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@settings(deadline=None)
@given(groups=st.lists(st.tuples(score, scores), min_size=1, max_size=4))
def test_losses_equal_a_loop_over_pairs(groups):
    teacher = torch.tensor([t for t, _ in groups], dtype=torch.float64)
    student = torch.tensor([s for _, samples in groups for s in samples], dtype=torch.float64)
    index = torch.tensor([i for i, (_, samples) in enumerate(groups) for _ in samples])
    pairs = [(t, s) for t, samples in groups for s in samples]

    expected = sum(-math.log(sigmoid(t - s)) for t, s in pairs) / len(pairs)
    # PyTorch's softplus is linear above 20: off by up to log1p(exp(-20)) = 2.1e-9 a term
    assert bradley_terry_loss(teacher, student, index).item() == pytest.approx(expected, abs=5e-9)
    expected = sum(-math.log(sigmoid(t)) - math.log(sigmoid(-s)) for t, s in pairs) / len(pairs)
    assert cross_entropy_loss(teacher, student, index).item() == pytest.approx(expected, abs=5e-9)
    expected = sum((t > s) + 0.5 * (t == s) for t, s in pairs) / len(pairs)
    assert pair_accuracy(teacher, student, index).item() == pytest.approx(expected, abs=1e-6)


def test_equal_scores_give_log_two_and_half():
    teacher, student, index = torch.tensor([1.5, -3.0]), torch.tensor([1.5, 1.5, -3.0]), torch.tensor([0, 0, 1])
    assert bradley_terry_loss(teacher, student, index).item() == pytest.approx(math.log(2))
    assert pair_accuracy(teacher, student, index).item() == 0.5
    zeros = torch.zeros(1), torch.zeros(3), torch.zeros(3, dtype=torch.long)
    assert cross_entropy_loss(*zeros).item() == pytest.approx(2 * math.log(2))


def test_a_constant_per_prompt_changes_nothing():
    teacher, student, index = torch.tensor([0.3, 2.0]), torch.tensor([0.1, -1.0, 2.5, 3.0]), torch.tensor([0, 0, 1, 1])
    shift = torch.tensor([5.0, -7.0])
    torch.testing.assert_close(
        bradley_terry_loss(teacher + shift, student + shift[index], index), bradley_terry_loss(teacher, student, index)
    )
    torch.testing.assert_close(group_std(student + shift[index], index, 2), group_std(student, index, 2))


@pytest.mark.parametrize("loss_fn", [bradley_terry_loss, cross_entropy_loss])
def test_score_gradients_are_those_of_autograd(loss_fn):
    teacher = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    student = torch.tensor([0.1, -1.0, 2.5], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 0, 1])
    loss, teacher_gradient, student_gradient = loss_and_score_gradients(loss_fn, teacher, student, index)
    expected = loss_fn(teacher, student, index)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(teacher_gradient, teacher.grad)
    torch.testing.assert_close(student_gradient, student.grad)


def test_group_std_is_the_mean_of_each_groups():
    student, index = torch.tensor([1.0, 3.0, 10.0, 10.0, 16.0]), torch.tensor([0, 0, 1, 1, 1])
    expected = (student[:2].std(correction=0) + student[2:].std(correction=0)) / 2
    torch.testing.assert_close(group_std(student, index, 2), expected)
