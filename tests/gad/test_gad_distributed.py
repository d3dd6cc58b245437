import pytest
import torch

from tests.processes import on_processes

from .helpers import assert_same_weights
from .on_processes import trained


@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 1), (2, 2)])
def test_both_processes_train_one_discriminator(tiny_model_dir, tmp_path, per_device, accumulation):
    first, second = on_processes(2, trained, tiny_model_dir, tmp_path / "two", per_device, accumulation, 1.0)
    assert first["discriminator_steps"] == second["discriminator_steps"] == 4
    assert_same_weights(first["discriminator"], second["discriminator"])
    assert_same_weights(first["student"], second["student"])
    assert first["log"][-1]["adversarial_phase"] == 1.0


@pytest.mark.parametrize("warmup_epochs", [0.0, 2.0])
def test_two_processes_take_the_steps_of_one(tiny_model_dir, tmp_path, warmup_epochs):
    """The second of three prompts straddles the processes (6 samples each, groups of 4): scores and loss must not notice."""
    (one,) = on_processes(1, trained, tiny_model_dir, tmp_path / "one", 12, 1, warmup_epochs)
    two, _ = on_processes(2, trained, tiny_model_dir, tmp_path / "two", 3, 2, warmup_epochs)
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(two["gradients"][0][name], gradient, atol=1e-6, rtol=1e-4)
    for key in ("discriminator/loss", "discriminator/accuracy", "discriminator/margin", "completions/length_ratio"):
        assert two["log"][0][key] == pytest.approx(one["log"][0][key], abs=1e-5)
    # The loss does not depend on the level of all scores: Adam makes steps of the rounding in its gradient
    assert one["discriminator"].pop("score_head.bias").abs().max() < 1e-3
    for name, value in one["discriminator"].items():
        torch.testing.assert_close(two["discriminator"][name], value, atol=2e-4, rtol=1e-3)


def test_two_processes_share_critic_credit_and_length_control(tiny_model_dir, tmp_path):
    """Whitening and the slope of length go over the samples of all processes; replayed pairs are each process's own."""
    config = {
        "advantage_estimator": "gae",
        "critic": "copy",
        "critic_learning_rate": 1e-3,
        "discriminator_head": "likelihood",
        "discriminator_credit": "token",
        "discriminator_replay_size": 16,
        "length_control": True,
    }
    first, second = on_processes(2, trained, tiny_model_dir, tmp_path / "two", 3, 2, 0.0, **config)
    for name in ("student", "discriminator", "critic"):
        assert_same_weights(first[name], second[name])
    (one,) = on_processes(1, trained, tiny_model_dir, tmp_path / "one", 12, 1, 0.0, **config)
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(first["gradients"][0][name], gradient, atol=1e-6, rtol=1e-4)
    # The critic's gradient is of scores, which are in the tens
    for found, gradient in zip(first["critic_gradients"][0], one["critic_gradients"][0], strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in one["critic_gradients"][0]) > 1
    for key in ("discriminator/loss", "critic/explained_variance", "reward", "reward_std"):
        assert first["log"][0][key] == pytest.approx(one["log"][0][key], rel=1e-4)
