"""How rewards become advantages, and what a critic is trained on: pure functions on tensors of shape `(B, T)`."""

import torch


def generalized_advantage_estimation(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalized advantage estimation (Schulman et al., 2016, arXiv 1506.02438, Eq. 16) over right-padded responses.

    `A_t = sum_l (gamma lam)^l delta_{t+l}` with `delta_t = r_t + gamma V_{t+1} - V_t`. Nothing follows the last token of
    a response: its `V_{t+1}` is 0, whether the response ended or was cut.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        values (`torch.Tensor` of shape `(B, T)`):
            The critic's value of the state before each token.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on tokens, 0 on the padding after them.
        gamma (`float`):
            Discount.
        lam (`float`):
            Trade-off between the critic's bias (`0`) and the variance of sampled returns (`1`).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages and returns (advantages + values), `(B, T)`, 0 on padding.
    """
    mask = mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.size(1) - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange_value: float
) -> torch.Tensor:
    """
    PPO's value loss per token: `1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)`.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            The critic's values now.
        old_values (`torch.Tensor` of shape `(B, T)`):
            Its values when the responses were sampled.
        returns (`torch.Tensor` of shape `(B, T)`):
            What they should have been.
        cliprange_value (`float`):
            How far a value can be usefully moved away from the old one.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in squared units of the reward.
    """
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def group_relative_returns(
    token_rewards: torch.Tensor, num_generations: int, scale: torch.Tensor, epsilon: float = 1e-4
) -> torch.Tensor:
    """
    Advantage of each token without a critic: the reward still to come, against what the group has still to come.

    `A_t^i = (G_t^i - mean_j G_t^j) / scale`, with `G_t = sum_{s >= t} r_s`, which is 0 once a response has ended. At the
    first token it is GRPO's group advantage of the summed rewards.

    Args:
        token_rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token, 0 on padding. The samples of a prompt are neighbours, and all are here.
        num_generations (`int`):
            Samples per prompt.
        scale (`torch.Tensor` of shape `(B,)`):
            What advantages are divided by, such as the standard deviation of the group's summed rewards.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Added to `scale`.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    to_come = token_rewards.flip(1).cumsum(1).flip(1)
    groups = to_come.view(-1, num_generations, to_come.size(1))
    centred = (groups - groups.mean(dim=1, keepdim=True)).view_as(to_come)
    return centred / (scale + epsilon)[:, None]


def rewards_at_last_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Place one reward a response on its last token.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Reward of each response.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on its tokens. A response without tokens gets no reward.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    is_last = torch.diff(mask.to(rewards.dtype), dim=1, append=mask.new_zeros(mask.size(0), 1).to(rewards.dtype)) < 0
    return is_last * rewards[:, None]


def whitened(
    advantages: torch.Tensor, mask: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, epsilon: float = 1e-8
) -> torch.Tensor:
    """
    Advantages with mean 0 and variance 1 over the tokens whose `mean` and `variance` are given; 0 on padding.

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`), mask (`torch.Tensor` of shape `(B, T)`):
            Advantages, and 1 on tokens.
        mean (`torch.Tensor`), variance (`torch.Tensor`):
            Scalars, of the tokens of all processes.
        epsilon (`float`, *optional*, defaults to `1e-8`):
            Added to the variance.
    """
    return (advantages - mean) * torch.rsqrt(variance + epsilon) * mask
