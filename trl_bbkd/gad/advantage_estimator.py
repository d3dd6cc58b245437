import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..discriminator.stabilizers import std_floor_factor
from .advantages import (
    generalized_advantage_estimation,
    group_relative_returns,
    rewards_at_last_token,
    whitened,
)
from .config import GADConfig
from .critic import CriticTrainer


SCALE_EPSILON = 1e-4


class AdvantageEstimator:
    """
    Turns the rewards of a generation batch into what `advantage_estimator`, `discriminator_credit` and
    `group_std_floor` ask for, in place of TRL's group advantages.

    Args:
        args ([`GADConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            The student trainer's accelerator.
        critic_trainer ([`CriticTrainer`], *optional*):
            For `advantage_estimator="gae"`.
    """

    def __init__(self, args: GADConfig, accelerator: Accelerator, critic_trainer: CriticTrainer | None):
        self.args = args
        self.accelerator = accelerator
        self.critic_trainer = critic_trainer

    def __call__(
        self,
        batch: dict[str, torch.Tensor],
        rewards: torch.Tensor,
        token_scores: torch.Tensor | None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """
        Args:
            batch (`dict[str, torch.Tensor]`):
                This process's generation batch, with TRL's `advantages`.
            rewards (`torch.Tensor` of shape `(N,)`):
                Weighted rewards of the samples of all processes, `N = num_processes * B`.
            token_scores (`torch.Tensor` of shape `(B, T)`):
                What each token of this process's samples adds to the discriminator's score, for
                `discriminator_credit="token"`.

        Returns:
            `tuple[dict, dict]`: entries to put into `batch`, and metrics.
        """
        mask = batch["completion_mask"]
        first = self.accelerator.process_index * len(mask)
        local_rewards = rewards[first : first + len(mask)]
        token_rewards = torch.zeros_like(mask, dtype=rewards.dtype)
        if self.args.discriminator_credit == "token":
            # TRL may pad completions further (pad_to_multiple_of)
            token_rewards = F.pad(token_scores, (0, mask.size(1) - token_scores.size(1))) * mask
        token_rewards = token_rewards + rewards_at_last_token(local_rewards - token_rewards.sum(dim=1), mask)
        if self.args.advantage_estimator == "gae":
            # Level and scale of the scores drift with the discriminator. The critic should not have to follow
            level = rewards_at_last_token(rewards.mean().expand_as(local_rewards), mask)
            return self._gae(batch, (token_rewards - level) / (rewards.std() + SCALE_EPSILON))

        std = self._std(rewards)
        if self.args.discriminator_credit == "token":
            return {"advantages": self._group_relative(token_rewards, std, first)}, {}
        if self.args.group_std_floor > 0:
            factor = std_floor_factor(std, self.args.group_std_floor)
            metrics = {"group_std_floored": (factor < 1).float().mean().item()}
            return {"advantages": batch["advantages"] * factor[first : first + len(mask)]}, metrics
        return {}, {}

    def _std(self, rewards: torch.Tensor) -> torch.Tensor:
        """What GRPO divides each sample's advantage by, `(N,)`."""
        if self.args.scale_rewards == "batch":
            return rewards.std().expand_as(rewards)
        groups = rewards.view(-1, self.args.num_generations)
        return groups.std(dim=1).repeat_interleave(self.args.num_generations)

    def _group_relative(self, token_rewards: torch.Tensor, std: torch.Tensor, first: int) -> torch.Tensor:
        scale = torch.ones_like(std) if self.args.scale_rewards == "none" else std.clamp(min=self.args.group_std_floor)
        width = token_rewards.size(1)
        # A group may be spread over processes
        everyone = self.accelerator.gather(self.accelerator.pad_across_processes(token_rewards, dim=1))
        advantages = group_relative_returns(everyone, self.args.num_generations, scale)
        return advantages[first : first + len(token_rewards), :width]

    def _gae(
        self, batch: dict[str, torch.Tensor], token_rewards: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        mask = batch["completion_mask"]
        values = self.critic_trainer.values(batch)
        advantages, returns = generalized_advantage_estimation(
            token_rewards, values, mask, self.args.gamma, self.args.lam
        )
        mean, variance = self._token_moments(advantages, mask)
        _, variance_left = self._token_moments(returns - values, mask)
        _, variance_of_returns = self._token_moments(returns, mask)
        updates = {"advantages": whitened(advantages, mask, mean, variance), "old_values": values, "returns": returns}
        explained = 1 - variance_left / variance_of_returns.clamp(min=1e-8)
        return updates, {"critic/explained_variance": explained.item()}

    def _token_moments(self, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over the tokens of all processes."""
        sums = torch.stack([mask.sum(), (values * mask).sum()]).double()
        count, total = self.accelerator.reduce(sums).unbind()
        count = count.clamp(min=1)  # with mask_truncated_completions there may be no token at all
        mean = total / count
        variance = self.accelerator.reduce((((values - mean) ** 2) * mask).sum()) / count
        return mean.to(values.dtype), variance.to(values.dtype)
