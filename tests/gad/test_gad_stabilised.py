"""GAE, token credit and the stabilisers in whole runs of tiny models."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_bbkd.discriminator.trainer import PairBatch
from trl_bbkd.gad import advantage_estimator, critic
from trl_bbkd.gad import trainer as gad_trainer

from .helpers import (
    FixedSamplesTrainer,
    GradientRecorder,
    are_different,
    assert_same_weights,
    discriminator_steps,
    make_trainer,
    weights,
)


GAE = {"advantage_estimator": "gae", "critic": "copy", "critic_learning_rate": 1e-3}
TOKEN = {"discriminator_credit": "token", "discriminator_head": "likelihood"}
LORA = {"r": 4, "target_modules": "all-linear"}


def short_answer_reward(completion_ids, **kwargs):
    return [-0.1 * len(ids) for ids in completion_ids]


def first_batch(trainer):
    """The generation batch of the first adversarial step: 2 prompts with 4 samples each."""
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 4, 1
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def make_fixed(tmp_path, model, rows, trainer_kwargs=None, **config):
    defaults = {"warmup_epochs": 0.0}
    return make_trainer(tmp_path, model, rows, FixedSamplesTrainer, trainer_kwargs, **{**defaults, **config})


def keep_inputs_of_the_loss(trainer):
    seen, original = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (seen.append(inputs), original(model, inputs))[1]
    return seen


def keep_critic_gradients(trainer):
    gradients, original = [], trainer.critic_trainer.step

    def step():
        gradients.append([parameter.grad.clone() for parameter in trainer.critic_trainer.engine.parameters])
        return original()

    trainer.critic_trainer.step = step
    return gradients


class Snapshots(GradientRecorder):
    """Weights of the student after each step, and of the discriminator."""

    def __init__(self):
        super().__init__()
        self.student, self.discriminator, self.trainer = [], [], None

    def watch(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        self.on_step_end(None, None, None, model=trainer.model)
        return self

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.student.append(weights(model))
        self.discriminator.append(weights(self.trainer.discriminator))


# Critic and GAE


@pytest.mark.parametrize(
    "kind", [{"critic": "copy"}, {"critic": "trunk"}, {"critic": "copy", "critic_lora_kwargs": LORA}]
)
def test_each_kind_of_critic_trains(tiny_model_dir, tmp_path, standard_rows, kind):
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **{**GAE, **kind}, max_steps=4, sft_weight=0.0)
    model = trainer.critic_trainer.critic
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    student = weights(trainer.model)
    seen = keep_inputs_of_the_loss(trainer)
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    head = {"value_head.weight", "value_head.bias"}
    if kind["critic"] == "trunk":
        assert changed == set(before) == head
    elif "critic_lora_kwargs" in kind:
        assert changed > head and all("lora_" in name for name in changed - head)
    else:
        assert changed == set(before) and len(changed) > 2
    assert are_different(student, weights(trainer.model))
    for entry in trainer.state.log_history[:4]:
        assert entry["critic/loss"] > 0 and entry["critic/grad_norm"] > 0 and entry["critic/explained_variance"] <= 1
    # Two steps of warm-up, two of the adversarial stage, whose loss reads one advantage a token
    assert ["teacher_ids" in inputs for inputs in seen] == [True, True, False, False]
    for inputs in seen:
        assert inputs["advantages"].shape == inputs["completion_ids"].shape
        assert (inputs["advantages"].diff(dim=1)[inputs["completion_mask"][:, 1:] == 1] != 0).any()


def test_a_critic_on_the_trunk_adds_nothing_to_the_students_gradient(tiny_model_dir, tmp_path, standard_rows):
    recorded = []
    for trains_critic in (True, False):
        recorder = GradientRecorder()
        config = {**GAE, "critic": "trunk", "max_steps": 1}
        trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, {"callbacks": [recorder]}, **config)
        with torch.no_grad():
            trainer.critic_trainer.critic.value_head.weight.fill_(0.1)
        if not trains_critic:
            trainer._train_critic = lambda inputs: None
        trainer.train()
        recorded.append(recorder.gradients[0])
    assert_same_weights(*recorded)
    assert max(gradient.abs().max() for gradient in recorded[0].values()) > 1e-3


def test_a_critic_learns_what_rewards_to_expect(tiny_model_dir, tmp_path, standard_rows):
    """Samples and discriminator stand still: the critic's error falls."""
    trainer = make_fixed(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        **{**GAE, "critic_learning_rate": 1e-2},
        discriminator_learning_rate=0.0,
        learning_rate=0.0,
        num_train_epochs=4,
        lam=1.0,
        cliprange_value=10.0,
    )
    trainer.train()
    losses = [entry["critic/loss"] for entry in trainer.state.log_history if "critic/loss" in entry]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.85 * sum(losses[:6])


@pytest.mark.parametrize("credit", ["sequence", "token"])
def test_steps_with_a_critic_do_not_depend_on_micro_batches(tiny_model_dir, tmp_path, standard_rows, credit):
    """Whitened over the whole generation batch, not over a micro-batch."""
    recorded = []
    for per_device in (8, 4):
        recorder = GradientRecorder()
        trainer = make_fixed(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            {"callbacks": [recorder]},
            **GAE,
            **{**TOKEN, "discriminator_credit": credit},
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=8 // per_device,
            max_steps=1,
        )
        with torch.no_grad():
            trainer.critic_trainer.critic.value_head.weight.fill_(0.1)
        seen, critic_gradients = keep_inputs_of_the_loss(trainer), keep_critic_gradients(trainer)
        trainer.train()
        tokens = torch.cat([inputs["advantages"][inputs["completion_mask"] == 1] for inputs in seen])
        assert tokens.mean().item() == pytest.approx(0, abs=1e-5)
        assert tokens.std(correction=0).item() == pytest.approx(1, abs=1e-4)
        recorded.append((len(seen), list(recorder.gradients[0].values()), critic_gradients[0]))
    (one, student, value_model), (two, student_of_two, value_model_of_two) = recorded
    assert (one, two) == (1, 2)
    torch.testing.assert_close(student_of_two, student, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(value_model_of_two, value_model, atol=1e-4, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in value_model) > 1e-2


def test_several_iterations_on_one_batch(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **GAE, num_iterations=2, max_steps=4)
    seen = keep_inputs_of_the_loss(trainer)
    trainer.train()
    assert discriminator_steps(trainer) == 2
    critic_optimizer = trainer.critic_trainer.engine.optimizer
    assert {int(state["step"]) for state in critic_optimizer.state.values()} == {4}
    for name in ("advantages", "old_values", "returns", "old_per_token_logps"):
        assert torch.equal(seen[0][name], seen[1][name]) and not torch.equal(seen[1][name], seen[2][name])


def test_a_batch_whose_every_answer_was_cut_harms_nothing(tiny_model_dir, tmp_path, standard_rows):
    """`mask_truncated_completions` leaves no token to average over."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        **GAE,
        warmup_epochs=0.0,
        max_completion_length=2,
        mask_truncated_completions=True,
        max_steps=2,
    )
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: ([[7, 8] for _ in prompt_ids], None)
    seen = keep_inputs_of_the_loss(trainer)
    trainer.train()
    assert len(seen) == 2 and not any(inputs["completion_mask"].any() for inputs in seen)
    assert all(inputs[name].isfinite().all() for inputs in seen for name in ("advantages", "returns"))
    for module in (trainer.model, trainer.critic_trainer.critic, trainer.discriminator):
        assert all(value.isfinite().all() for value in weights(module).values())


def test_the_critic_is_a_copy_of_the_students_revision(
    tiny_model_dir, other_model_dir, tmp_path, standard_rows, monkeypatch
):
    """Whatever the discriminator is."""
    seen = []

    def build_critic(*args, **kwargs):
        seen.append(kwargs)
        return critic.build_critic(*args, **kwargs)

    monkeypatch.setattr(gad_trainer, "build_critic", build_critic)
    config = {**GAE, "discriminator": other_model_dir, "model_init_kwargs": {"revision": "v2"}}
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, **config)
    assert [kwargs["revision"] for kwargs in seen] == ["v2"]
    assert trainer.discriminator.score_head.in_features == 48
    assert trainer.critic_trainer.critic.value_head.in_features == 32


# Token credit


@pytest.mark.parametrize("estimator", ["group", "gae"])
@pytest.mark.parametrize("extras", [False, True])
def test_token_rewards_add_up_to_the_reward(tiny_model_dir, tmp_path, standard_rows, monkeypatch, estimator, extras):
    seen = []
    name = {"group": "group_relative_returns", "gae": "generalized_advantage_estimation"}[estimator]
    original = getattr(advantage_estimator, name)
    monkeypatch.setattr(advantage_estimator, name, lambda *args: (seen.append(args[0]), original(*args))[1])
    trainer = make_fixed(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        {"reward_funcs": short_answer_reward} if extras else {},
        **TOKEN,
        **(GAE if estimator == "gae" else {}),
        reward_weights=[2.0] if extras else None,
        length_control=extras,
        discriminator_learning_rate=1e-2,
    )
    output = first_batch(trainer)
    ids, mask = output["completion_ids"], output["completion_mask"]

    # The discriminator starts as the student: what a token adds is its log-probability
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    log_likelihoods, scores = torch.zeros(ids.shape), torch.zeros(len(ids))
    for row, (prompt, prompt_mask) in enumerate(zip(output["prompt_ids"], output["prompt_mask"], strict=True)):
        prompt, answer = prompt[prompt_mask.bool()], ids[row][mask[row].bool()]
        with torch.no_grad():
            log_probs = student(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_likelihoods[row, : len(answer)] = log_probs.gather(1, answer[:, None])[:, 0]
        scores[row] = log_likelihoods[row].sum()
    logged = trainer._logs["rewards"]
    if not extras:
        torch.testing.assert_close(torch.tensor(list(logged["discriminator_score"])), scores, atol=1e-4, rtol=1e-4)
    sequence_rewards = torch.tensor(list(logged["discriminator_score"]))
    if extras:
        sequence_rewards = sequence_rewards + 2.0 * torch.tensor(list(logged["short_answer_reward"]))

    (token_rewards,) = seen
    is_last = torch.arange(ids.size(1)) == mask.sum(dim=1, keepdim=True) - 1
    if estimator == "gae":
        # The critic is spared level and scale of the scores
        log_likelihoods = log_likelihoods / (sequence_rewards.std() + 1e-4)
        sequence_rewards = (sequence_rewards - sequence_rewards.mean()) / (sequence_rewards.std() + 1e-4)
    torch.testing.assert_close(
        token_rewards.masked_fill(is_last, 0), log_likelihoods.masked_fill(is_last, 0), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(token_rewards.sum(dim=1), sequence_rewards, atol=1e-3, rtol=1e-4)
    assert output["advantages"].shape == ids.shape
    if estimator == "group":
        grpo = torch.tensor(list(trainer._logs["advantages"]))
        torch.testing.assert_close(output["advantages"][:, 0], grpo, atol=1e-4, rtol=1e-3)


def test_token_credit_takes_padded_completions(tiny_model_dir, tmp_path, standard_rows):
    advantages = []
    for multiple in (None, 8):
        trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **TOKEN, pad_to_multiple_of=multiple)
        advantages.append(first_batch(trainer)["advantages"])
    width = advantages[0].size(1)
    assert advantages[1].size(1) > width
    torch.testing.assert_close(advantages[1][:, :width], advantages[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
def test_token_credit_scales_like_grpo(tiny_model_dir, tmp_path, standard_rows, scale_rewards):
    trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **TOKEN, scale_rewards=scale_rewards)
    output = first_batch(trainer)
    grpo = torch.tensor(list(trainer._logs["advantages"]))
    torch.testing.assert_close(output["advantages"][:, 0], grpo, atol=1e-4, rtol=1e-3)
    assert grpo.abs().max() > 0.1


# Stabilisers


@pytest.mark.parametrize("credit", ["sequence", "token"])
def test_group_std_floor_is_what_small_deviations_are_divided_by(tiny_model_dir, tmp_path, standard_rows, credit):
    found = {}
    for floor in (0.0, 1e-3, 1e3):
        config = {**TOKEN, "discriminator_credit": credit, "group_std_floor": floor}
        trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **config)
        advantages = first_batch(trainer)["advantages"]
        found[floor] = advantages if credit == "sequence" else advantages[:, 0]
        rewards = torch.tensor(list(trainer._logs["rewards"]["discriminator_score"])).view(2, 4)
    torch.testing.assert_close(found[1e-3], found[0.0], atol=1e-6, rtol=1e-5)
    expected = (rewards - rewards.mean(dim=1, keepdim=True)).flatten() / 1e3
    torch.testing.assert_close(found[1e3], expected, atol=1e-5, rtol=1e-4)
    assert found[0.0].abs().max() > 0.5


def test_length_control_takes_length_out_of_the_reward(tiny_model_dir, tmp_path, standard_rows):
    def within(values):
        groups = values.double().view(2, 4)
        return groups - groups.mean(dim=1, keepdim=True)

    covariance = {}
    for length_control in (False, True):
        trainer = make_fixed(
            tmp_path, tiny_model_dir, standard_rows, discriminator_head="likelihood", length_control=length_control
        )
        output = first_batch(trainer)
        lengths = output["completion_mask"].sum(dim=1)
        covariance[length_control] = (within(output["advantages"]) * within(lengths)).sum().item()
        rewards = torch.tensor(list(trainer._logs["rewards"]["discriminator_score"]))
        if length_control:
            assert (within(rewards) * within(lengths)).sum().item() == pytest.approx(0, abs=1e-2)
    # Advantages are divided by each group's deviation, hence only nearly free of length
    assert abs(covariance[False]) > 5 * abs(covariance[True])


MEASURED = [f"discriminator/{name}" for name in ("loss", "accuracy", "margin", "group_std", "student_score")]


def test_replayed_pairs_train_the_discriminator_but_are_not_measured(tiny_model_dir, tmp_path, standard_rows):
    runs = {}
    for size in (0, 12):
        trainer = make_fixed(
            tmp_path, tiny_model_dir, standard_rows, discriminator_replay_size=size, max_steps=4, num_train_epochs=1
        )
        runs[size] = Snapshots().watch(trainer)
        trainer.train()
    without, with_replay = ([e for e in r.trainer.state.log_history if MEASURED[0] in e] for r in runs.values())
    # The first batch finds no past; the second is measured before past pairs have taught anything
    for step in (0, 1):
        assert [with_replay[step][name] for name in MEASURED] == [without[step][name] for name in MEASURED]
    assert with_replay[0]["discriminator/grad_norm"] == without[0]["discriminator/grad_norm"]
    assert with_replay[1]["discriminator/grad_norm"] != without[1]["discriminator/grad_norm"]
    assert_same_weights(runs[0].discriminator[1], runs[12].discriminator[1])
    assert are_different(runs[0].discriminator[2], runs[12].discriminator[2])
    replay = runs[12].trainer.discriminator_trainer.replay
    assert len(replay) == 12  # of the 32 pairs that were seen
    texts = {tuple(row["teacher_ids"]) for row in trainer.train_dataset}
    assert {tuple(teacher) for _, teacher, _ in replay.pairs} <= texts


def test_the_discriminators_gradient_is_that_of_fresh_and_past_pairs(tiny_model_dir, tmp_path, standard_rows):
    fresh = PairBatch([[5, 6], [7, 8, 9]], [[20, 21, 2], [30, 2]], [[40, 2], [41, 42], [43, 44, 45, 2]], [0, 0, 1])
    past = PairBatch([[10], [11]], [[50, 2], [51, 52, 2]], [[60, 2], [61, 62, 2], [63, 2]], [0, 1, 1])
    both = PairBatch(
        fresh.prompt_ids + past.prompt_ids,
        fresh.teacher_ids + past.teacher_ids,
        fresh.student_ids + past.student_ids,
        [0, 0, 1, 2, 3, 3],
    )
    gradients = []
    for size, pairs in ((8, fresh), (0, both), (0, fresh)):
        trainer = make_trainer(
            tmp_path, tiny_model_dir, standard_rows, discriminator_replay_size=size, discriminator_max_grad_norm=1e9
        ).discriminator_trainer
        if size > 0:
            trainer.replay.add(past.triples())
        trainer.engine.optimizer.zero_grad = lambda: None
        trainer.update(pairs, trainer.score(pairs))
        gradients.append([parameter.grad for parameter in trainer.engine.parameters])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    assert not all(torch.allclose(*pair, atol=1e-6) for pair in zip(gradients[0], gradients[2], strict=True))


def with_accuracies(trainer, accuracies):
    """Make the trainer believe these accuracies, one a generation batch."""
    accuracies, measure = iter(accuracies), trainer.discriminator_trainer.measure
    trainer.discriminator_trainer.measure = lambda pairs, scores: (
        measure(pairs, scores) | {"discriminator/accuracy": next(accuracies)}
    )
    return trainer


def unmoved(snapshots):
    return [not are_different(*pair) for pair in zip(snapshots, snapshots[1:], strict=False)]


GATE = {"weight_decay": 0.1, "discriminator_weight_decay": 0.1, "max_steps": 5, "beta": 0.1}


@pytest.mark.parametrize("side", ["policy", "discriminator"])
def test_the_gate_holds_one_side_bit_for_bit(tiny_model_dir, tmp_path, standard_rows, side):
    """Momentum is there and weight decay is on when the gate closes: neither may move what is held."""
    bound = {"policy": {"policy_min_accuracy": 0.5}, "discriminator": {"discriminator_max_accuracy": 0.5}}[side]
    outside, inside = {"policy": (0.4, 0.5), "discriminator": (0.6, 0.5)}[side]
    trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **GATE, **bound)
    snapshots = Snapshots().watch(with_accuracies(trainer, [inside, outside, inside, outside, outside]))
    trainer.train()
    expected = [False, True, False, True, True]
    held, free = snapshots.student, snapshots.discriminator
    if side == "discriminator":
        held, free = free, held
    assert unmoved(held) == expected
    assert unmoved(free) == [False] * 5
    entries = [entry for entry in trainer.state.log_history if f"gate/{side}_held" in entry]
    assert [bool(entry[f"gate/{side}_held"]) for entry in entries] == expected


def test_the_gate_holds_for_the_whole_generation_batch(tiny_model_dir, tmp_path, standard_rows):
    config = {**GATE, "max_steps": 4, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **config, policy_min_accuracy=0.5)
    snapshots = Snapshots().watch(with_accuracies(trainer, [0.1, 0.9]))
    trainer.train()
    assert unmoved(snapshots.student) == [True, True, False, False]


def test_the_gate_is_open_during_warmup(tiny_model_dir, tmp_path, standard_rows):
    config = {**GATE, "max_steps": 4, "warmup_epochs": 1.0, "num_train_epochs": 2}
    for bound, accuracy in (({"policy_min_accuracy": 0.5}, 0.0), ({"discriminator_max_accuracy": 0.5}, 1.0)):
        trainer = make_fixed(tmp_path, tiny_model_dir, standard_rows, **config, **bound)
        snapshots = Snapshots().watch(with_accuracies(trainer, [accuracy] * 4))
        trainer.train()
        held = snapshots.student if accuracy == 0.0 else snapshots.discriminator
        assert unmoved(held) == [False, False, True, True]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_trouble_is_logged_and_kept(tiny_model_dir, tmp_path, standard_rows, caplog, logging_steps):
    trainer = make_fixed(
        tmp_path, tiny_model_dir, standard_rows, max_steps=8, num_train_epochs=2, logging_steps=logging_steps
    )
    with_accuracies(trainer, [0.1] * 8)
    with caplog.at_level("WARNING", logger="trl_bbkd"):
        trainer.train()
    assert [warning.kind for warning in trainer.monitor.warnings].count("inverted") == 1
    assert sum("the discriminator is inverted" in message for message in caplog.messages) == 1
    # The entropy of the batch before is there whenever logs are written, which is when TRL forgets it
    assert all("entropy" in metrics for metrics in trainer.monitor.adversarial)
