import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.gad.advantages import (
    clipped_value_loss,
    generalized_advantage_estimation,
    group_relative_returns,
    rewards_at_last_token,
    whitened,
)


def test_gae_on_an_example_worked_out_by_hand():
    """gamma 0.5, lambda 0.5: delta = (1 + 1 - 1, 0 + 2 - 2, 3 - 4) = (1, 0, -1); each later one weighs a quarter."""
    rewards, values = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    advantages, returns = generalized_advantage_estimation(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1 - 1 / 16, -1 / 4, -1.0]]
    assert returns.tolist() == [[2 - 1 / 16, 2 - 1 / 4, 3.0]]


def test_what_lambda_trades():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    mask = torch.ones(1, 3)
    # 1: the sampled returns, undistorted by the critic. 0: one step ahead, then the critic's word
    _, returns = generalized_advantage_estimation(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[6.0, 5.0, 3.0]]
    _, returns = generalized_advantage_estimation(rewards, values, mask, gamma=1.0, lam=0.0)
    assert returns.tolist() == [[21.0, 32.0, 3.0]]


def slow_gae(rewards, values, lengths, gamma, lam):
    """The definition, Eq. 16: for each token the sum over all later temporal differences of its response."""
    advantages = torch.zeros_like(values)
    for row, length in enumerate(lengths):
        for t in range(length):
            for s in range(t, length):
                next_value = values[row, s + 1] if s + 1 < length else 0.0
                delta = rewards[row, s] + gamma * next_value - values[row, s]
                advantages[row, t] += (gamma * lam) ** (s - t) * delta
    return advantages


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    gamma=st.floats(0, 1, allow_subnormal=False),
    lam=st.floats(0, 1, allow_subnormal=False),
    seed=st.integers(0, 1000),
)
def test_gae_equals_the_double_loop_and_ignores_padding(lengths, padding, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *lengths) + padding
    shape = (len(lengths), width)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    expected = slow_gae(rewards, values, lengths, gamma, lam)

    advantages, returns = generalized_advantage_estimation(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(returns, expected + values * mask, atol=1e-12, rtol=1e-12)

    garbage = torch.where(mask.bool(), 0.0, 1e6)
    again = generalized_advantage_estimation(rewards + garbage, values - garbage, mask, gamma, lam)
    torch.testing.assert_close(again, (advantages, returns), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss", "gradient"),
    [
        (1.2, 1.0, 3.0, 0.5 * 1.8**2, -1.8),  # near the old value: the plain squared error
        (2.0, 1.0, 3.0, 0.5 * 1.5**2, 0.0),  # already moved further than 0.5 towards the target: no more
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away from the target: pulled back with full force
        (0.2, 1.0, -3.0, 0.5 * 3.5**2, 0.0),  # the same downwards
    ],
)
def test_clipped_value_loss(value, old_value, target, loss, gradient):
    value = torch.tensor([[value]], requires_grad=True)
    found = clipped_value_loss(value, torch.tensor([[old_value]]), torch.tensor([[target]]), cliprange_value=0.5)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert value.grad.item() == pytest.approx(gradient)


def test_group_relative_returns_on_an_example_worked_out_by_hand():
    """Reward still to come: (6, 5, 3) and (2, 2, 0), the second response having ended after two tokens."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scale = torch.tensor([2.0, 2.0, 4.0, 4.0])
    advantages = group_relative_returns(rewards, num_generations=2, scale=scale, epsilon=0.0)
    assert advantages.tolist() == [[1.0, 0.75, 0.75], [-1.0, -0.75, -0.75], [0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]]


@settings(deadline=None, max_examples=30)
@given(prompts=st.integers(1, 3), group=st.integers(2, 5), width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_group_relative_returns_start_as_grpo_and_are_centred_at_each_position(prompts, group, width, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (prompts * group, 1), generator=generator)
    mask = torch.arange(width) < lengths
    token_rewards = torch.randn(prompts * group, width, generator=generator, dtype=torch.float64) * mask
    groups = token_rewards.sum(dim=1).view(prompts, group)
    std = groups.std(dim=1, keepdim=True)
    advantages = group_relative_returns(token_rewards, group, std.expand_as(groups).flatten())
    grpo = (groups - groups.mean(dim=1, keepdim=True)) / (std + 1e-4)
    torch.testing.assert_close(advantages[:, 0], grpo.flatten(), atol=1e-9, rtol=1e-9)
    centres = advantages.view(prompts, group, width).mean(dim=1)
    torch.testing.assert_close(centres, torch.zeros_like(centres), atol=1e-9, rtol=0)


def test_rewards_at_last_token():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    placed = rewards_at_last_token(torch.tensor([2.0, -3.0, 5.0, 7.0]), mask)
    assert placed.tolist() == [[0.0, 0.0, 2.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 7.0, 0.0]]


def test_whitened_tokens_have_mean_zero_and_variance_one():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    advantages = torch.tensor([[3.0, 5.0, 9.0, 1e6], [-4.0, 2.0, 1e6, 1e6]], dtype=torch.float64)
    tokens = advantages[mask.bool()]
    found = whitened(advantages, mask, tokens.mean(), tokens.var(unbiased=False))
    assert found[mask == 0].tolist() == [0.0] * 3
    assert found[mask == 1].mean().item() == pytest.approx(0, abs=1e-9)
    assert found[mask == 1].var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
