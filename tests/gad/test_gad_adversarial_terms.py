"""What may be added to the adversarial stage: the cross-entropy on the teacher's answers, the student's own likelihood."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.processes import on_processes
from trl_bbkd.discriminator.objectives import scaled_log_likelihoods

from .helpers import (
    FixedSamplesTrainer,
    GradientRecorder,
    are_different,
    assert_same_weights,
    make_config,
    make_trainer,
    weights,
)
from .on_processes import trained


LIKELIHOOD = {"discriminator_head": "likelihood"}


def make_fixed(tmp_path, model, rows, trainer_kwargs=None, **config):
    return make_trainer(
        tmp_path, model, rows, FixedSamplesTrainer, trainer_kwargs, **{"warmup_epochs": 0.0, "max_steps": 1} | config
    )


def gradients(tmp_path, model, rows, **config):
    recorder = GradientRecorder()
    trainer = make_fixed(tmp_path, model, rows, {"callbacks": [recorder]}, **config)
    trainer.train()
    return recorder.gradients[0], trainer


def teacher_gradients(path, rows):
    """Of the mean over all tokens of the answers, with everything plain."""
    model = AutoModelForCausalLM.from_pretrained(path)
    losses = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["teacher_ids"]])
        log_probs = F.log_softmax(model(ids).logits[0, :-1], dim=-1)
        answer = range(len(row["prompt_ids"]) - 1, ids.size(1) - 1)
        losses += [-log_probs[place, ids[0, place + 1]] for place in answer]
    loss = torch.stack(losses).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, loss


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_anchor_adds_the_gradient_of_the_teachers_likelihood(tiny_model_dir, tmp_path, standard_rows, beta):
    seen = []
    recorded = {}
    for weight in (0.0, 0.3):
        recorder = GradientRecorder()
        config = {"sft_weight": weight, "beta": beta, "max_grad_norm": 1e9}
        trainer = make_fixed(
            tmp_path / str(weight), tiny_model_dir, standard_rows, {"callbacks": [recorder]}, **config
        )
        trainer._generate_single_turn = record_rows(trainer, seen)
        trainer.train()
        recorded[weight] = recorder.gradients[0], trainer.state.log_history[0]["loss"]
    assert seen[0] == seen[1]
    expected, nll = teacher_gradients(tiny_model_dir, seen[0])
    for name, gradient in expected.items():
        difference = recorded[0.3][0][name] - recorded[0.0][0][name]
        torch.testing.assert_close(difference, 0.3 * gradient, atol=1e-6, rtol=1e-4)
    assert recorded[0.3][1] - recorded[0.0][1] == pytest.approx(0.3 * nll.item(), abs=2e-4)
    assert trainer.state.log_history[0]["teacher_nll"] == pytest.approx(nll.item(), abs=1e-4)


def record_rows(trainer, seen):
    """Keep each prompt's row once, in the order of a generation batch."""
    generate = trainer._generate_single_turn

    def recording(*args, **kwargs):
        seen.append([dict(row) for row in trainer._rows[:: trainer.num_generations]])
        return generate(*args, **kwargs)

    return recording


@pytest.mark.parametrize(
    "batch", [{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]
)
def test_the_anchor_does_not_depend_on_how_a_batch_is_split(tiny_model_dir, tmp_path, standard_rows, batch):
    config = {"sft_weight": 0.5, "beta": 0.1}
    whole, _ = gradients(tmp_path / "whole", tiny_model_dir, standard_rows, **config)
    split, _ = gradients(tmp_path / "split", tiny_model_dir, standard_rows, **config | batch)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_anchor_as_one(tiny_model_dir, tmp_path, checkpointing):
    """The second of three prompts straddles the processes."""
    config = {"sft_weight": 0.5, "discriminator_entropy": 0.5, "gradient_checkpointing": checkpointing} | LIKELIHOOD
    (one,) = on_processes(1, trained, tiny_model_dir, tmp_path / "one", 12, 1, 0.0, **config)
    two, other = on_processes(2, trained, tiny_model_dir, tmp_path / "two", 3, 2, 0.0, **config)
    assert_same_weights(two["student"], other["student"])
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(two["gradients"][0][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_student_that_is_held_is_not_anchored(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, sft_weight=1.0, policy_min_accuracy=0.5)
    measure = trainer.discriminator_trainer.measure
    trainer.discriminator_trainer.measure = lambda *args: measure(*args) | {"discriminator/accuracy": 0.1}
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["gate/policy_held"] == 1.0
    assert_same_weights(before, weights(trainer.model))


def test_the_anchor_leaves_warmup_alone(tiny_model_dir, tmp_path, standard_rows):
    ends = []
    for weight in (0.0, 5.0):
        trainer = make_fixed(
            tmp_path / str(weight), tiny_model_dir, standard_rows, warmup_epochs=2.0, max_steps=2, sft_weight=weight
        )
        trainer.train()
        ends.append(weights(trainer.model))
    assert_same_weights(*ends)


def test_an_anchored_run_goes_on_from_a_checkpoint_with_the_same_bits(tiny_model_dir, tmp_path, standard_rows):
    config = {
        "sft_weight": 0.5,
        "discriminator_entropy": 1.0,
        "warmup_epochs": 1.0,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    } | LIKELIHOOD
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config)
    trainer.train()
    expected = weights(trainer.model)
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(expected, weights(trainer.model))


# The student's own likelihood, off the reward


def first_rewards(trainer):
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 4, 1
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    trainer._generate_and_score_completions(rows)
    return trainer._rewards


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("credit", ["sequence", "token"])
def test_a_discriminator_that_is_the_student_rewards_nothing(
    tiny_model_dir, tmp_path, standard_rows, credit, reduction
):
    settings = LIKELIHOOD | {"discriminator_credit": credit, "discriminator_likelihood_reduction": reduction}
    plain = make_fixed(tmp_path / "plain", tiny_model_dir, standard_rows, **settings)
    assert first_rewards(plain).abs().min() > 1
    for share, left in ((1.0, 0.0), (0.25, 0.75)):
        trainer = make_fixed(
            tmp_path / str(share), tiny_model_dir, standard_rows, discriminator_entropy=share, **settings
        )
        torch.testing.assert_close(first_rewards(trainer), left * plain._rewards, atol=1e-4, rtol=1e-4)
        if credit == "token":
            expected = left * plain._evidence.student_tokens
            torch.testing.assert_close(trainer._evidence.student_tokens, expected, atol=1e-4, rtol=1e-4)
        # The discriminator learns from its own scores
        torch.testing.assert_close(trainer._scores.student, plain._scores.student)


def test_the_students_likelihood_is_that_of_temperature_1(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_fixed(
        tmp_path, tiny_model_dir, standard_rows, discriminator_entropy=1.0, temperature=0.5, **LIKELIHOOD
    )
    assert first_rewards(trainer).abs().max() < 1e-3


def test_the_heads_scale_is_that_of_both(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, discriminator_entropy=1.0, **LIKELIHOOD)
    with torch.no_grad():
        trainer.discriminator.likelihood_scale.fill_(3.0)
    assert first_rewards(trainer).abs().max() < 1e-3


def test_what_the_student_would_add_to_a_score():
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    lengths = torch.tensor([2, 1])
    assert scaled_log_likelihoods(log_probs, lengths, 2.0, "sum").tolist() == [[-2.0, -4.0], [-6.0, 0.0]]
    assert scaled_log_likelihoods(log_probs, lengths, 2.0, "mean").tolist() == [[-1.0, -2.0], [-6.0, 0.0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sft_weight": -0.1}, "sft_weight must be at least 0"),
        ({"discriminator_entropy": -1.0}, "discriminator_entropy must be at least 0"),
        (
            {"discriminator_entropy": 1.0},
            "discriminator_entropy=1.0 has no effect without discriminator_head='likelihood'",
        ),
    ],
)
def test_what_cannot_act_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **config)


def test_the_two_change_what_the_student_learns(tiny_model_dir, tmp_path, standard_rows):
    ends = []
    for number, config in enumerate(({}, {"sft_weight": 0.3}, {"discriminator_entropy": 1.0})):
        trainer = make_fixed(tmp_path / str(number), tiny_model_dir, standard_rows, **LIKELIHOOD | config)
        trainer.train()
        ends.append(weights(trainer.model))
    assert are_different(ends[0], ends[1]) and are_different(ends[0], ends[2])
