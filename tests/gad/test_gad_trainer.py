import copy
import inspect
import math

import pandas
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOTrainer

from trl_bbkd.discriminator.trainer import PairBatch
from trl_bbkd.gad.trainer import GADTrainer

from .helpers import (
    GradientRecorder,
    are_different,
    assert_same_weights,
    discriminator_steps,
    make_config,
    make_trainer,
    weights,
)


LORA = {"r": 4, "target_modules": "all-linear"}


def short_answer_reward(completions, completion_ids, teacher_completion, **kwargs):
    assert len(teacher_completion) == len(completions)
    return [-float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("rows", ["standard_rows", "conversational_rows"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_grpo_script_runs_with_the_class_changed(tiny_model_dir, tmp_path, request, rows, lora):
    rows = request.getfixturevalue(rows)
    trainer = GADTrainer(
        model=tiny_model_dir,
        reward_funcs=short_answer_reward,
        args=make_config(
            tmp_path,
            reward_weights=[0.1],
            eval_strategy="steps",
            eval_steps=6,
            per_device_eval_batch_size=8,
            log_completions=True,
            max_steps=6,
        ),
        train_dataset=Dataset.from_list(rows[:12]),
        eval_dataset=Dataset.from_list(rows[12:]),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None,
        discriminator_peft_config=LoraConfig(**LORA) if lora else None,
    )
    student, discriminator = weights(trainer.model), weights(trainer.discriminator)
    trainer.train()

    assert are_different(student, weights(trainer.model))
    assert are_different(discriminator, weights(trainer.discriminator))
    log = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_discriminator/accuracy", "eval_discriminator/loss", "teacher_nll", "kl"} <= log
    assert {"rewards/discriminator_score/mean", "rewards/short_answer_reward/mean"} <= log
    assert {f"discriminator/{name}" for name in ("loss", "accuracy", "margin", "group_std", "grad_norm")} <= log
    last = trainer.state.log_history[-3]
    assert last["reward"] == pytest.approx(
        last["rewards/discriminator_score/mean"] + 0.1 * last["rewards/short_answer_reward/mean"], rel=1e-4
    )
    table = pandas.read_parquet(sorted((tmp_path / "completions").iterdir())[-1])
    assert {"completion", "teacher_completion", "discriminator_score"} <= set(table.columns)


@pytest.mark.parametrize(
    ("accumulation", "steps_per_generation", "num_iterations"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (1, 4, 1), (2, 2, 2)]
)
def test_one_discriminator_step_per_generation_batch(
    tiny_model_dir, tmp_path, standard_rows, accumulation, steps_per_generation, num_iterations
):
    generation_batches = []

    class CountingTrainer(GADTrainer):
        def _generate(self, prompts):
            generation_batches.append(len(prompts))
            return super()._generate(prompts)

    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        CountingTrainer,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        max_steps=8,
    )
    trainer.train()
    assert len(generation_batches) == 8 * accumulation // (steps_per_generation * num_iterations)
    assert discriminator_steps(trainer) == len(generation_batches)


def test_several_updates_and_none(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=2, discriminator_updates_per_batch=3)
    trainer.train()
    assert discriminator_steps(trainer) == 6
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=2, discriminator_updates_per_batch=0)
    before = weights(trainer.discriminator)
    trainer.train()
    assert_same_weights(before, weights(trainer.discriminator))


def test_learning_rate_zero_and_evaluation_leave_the_discriminator_unchanged(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=2, discriminator_learning_rate=0.0)
    before = weights(trainer.discriminator)
    trainer.train()
    assert discriminator_steps(trainer) == 2
    assert_same_weights(before, weights(trainer.discriminator))

    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=2, per_device_eval_batch_size=8)
    trainer.train()
    before = weights(trainer.discriminator)
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert "eval_discriminator/accuracy" in metrics
    assert_same_weights(before, weights(trainer.discriminator))


def test_rewards_come_from_the_discriminator_before_its_update(tiny_model_dir, tmp_path, standard_rows):
    batches = []

    class RecordingTrainer(GADTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            before = copy.deepcopy(self.discriminator)
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            pairs = self._collect_pairs(inputs, completion_ids_list)
            after_scores = self.discriminator_trainer.score(pairs)[1]
            after, self.discriminator_trainer.discriminator = self.discriminator, before
            before_scores = self.discriminator_trainer.score(pairs)[1]
            self.discriminator_trainer.discriminator = after
            batches.append((rewards[:, 0], before_scores, after_scores))
            return rewards

    make_trainer(
        tmp_path, tiny_model_dir, standard_rows, RecordingTrainer, max_steps=3, discriminator_learning_rate=1e-2
    ).train()
    assert len(batches) == 3
    for rewards, before_scores, after_scores in batches:
        torch.testing.assert_close(rewards, before_scores, atol=1e-5, rtol=1e-5)
        assert (rewards - after_scores).abs().max() > 1e-2


def test_a_constant_added_to_the_discriminator_changes_nothing(tiny_model_dir, tmp_path, standard_rows):
    outputs = []
    for constant in (0.0, 3.0):
        trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, warmup_epochs=0.0)
        trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 4, 1
        with torch.no_grad():
            trainer.discriminator.score_head.bias.add_(constant)
        trainer.model.train()
        torch.manual_seed(0)
        rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
        output = trainer._generate_and_score_completions(rows)
        metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
        loss = trainer._compute_loss(trainer.model, output).item()
        outputs.append((output, metrics, loss))
    (first, first_metrics, first_loss), (second, second_metrics, second_loss) = outputs
    assert torch.equal(first["completion_ids"], second["completion_ids"])
    assert second_metrics["discriminator/student_score"] == pytest.approx(
        first_metrics["discriminator/student_score"] + 3.0, abs=1e-5
    )
    torch.testing.assert_close(first["advantages"], second["advantages"], atol=1e-4, rtol=1e-4)
    assert first["advantages"].abs().max() > 0.1
    assert second_metrics["discriminator/loss"] == pytest.approx(first_metrics["discriminator/loss"], abs=1e-5)
    assert second_loss == pytest.approx(first_loss, abs=1e-5)


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
@pytest.mark.parametrize("truncated", [False, True])
def test_identical_text_scores_identically(tiny_model_dir, tmp_path, standard_rows, head, truncated):
    trainer = make_trainer(
        tmp_path, tiny_model_dir, standard_rows, discriminator_head=head, discriminator_batch_size=2
    ).discriminator_trainer
    end = [] if truncated else [2]
    answers = [[20, 21, 22, *end], [30, *end], [40, 41, 42, 43, 44, 45, 46, *end]]
    pairs = PairBatch([[5, 6], [7, 8, 9], [10]], answers, answers * 2, [0, 1, 2] * 2)
    scores = trainer.score(pairs)
    torch.testing.assert_close(scores.student, scores.teacher.repeat(2), atol=1e-5, rtol=1e-5)
    metrics = trainer.measure(pairs, scores)
    assert metrics["discriminator/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["discriminator/margin"] == pytest.approx(0, abs=1e-5)


def test_any_end_of_sequence_id_is_shown_to_the_discriminator_as_one(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows)
    eos, pad = trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id
    trainer.eos_token_ids = [eos, pad]
    trainer._prompt_ids = [[5, 6]] * 3
    trainer.num_generations = 3
    rows = [{"teacher_ids": [20, 21, eos]}] * 3
    pairs = trainer._collect_pairs(rows, [[20, 21, pad], [20, 21, eos], [20, 21, 22]])
    assert pairs.student_ids == [[20, 21, eos], [20, 21, eos], [20, 21, 22]]
    assert (pairs.prompt_ids, pairs.teacher_ids, pairs.prompt_index) == ([[5, 6]], [[20, 21, eos]], [0, 0, 0])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0])
def test_the_reference_is_the_warmed_up_student(tiny_model_dir, tmp_path, standard_rows, lora, warmup_epochs):
    kwargs = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")} if lora else {}
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        trainer_kwargs=kwargs,
        warmup_epochs=warmup_epochs,
        learning_rate=1e-2,
        beta=0.1,
    )
    before = weights(trainer.model)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "adversarial_phase" in entry]
    assert [entry["adversarial_phase"] for entry in steps] == [0.0] * int(6 * warmup_epochs) + [1.0] * (
        12 - int(6 * warmup_epochs)
    )
    adversarial = [entry for entry in steps if entry["adversarial_phase"] == 1.0]
    assert adversarial[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert adversarial[-1]["kl"] > 1e-4
    assert all("kl" not in entry for entry in steps if entry["adversarial_phase"] == 0.0)
    if warmup_epochs and not lora:
        warmed_up = AutoModelForCausalLM.from_pretrained(tmp_path / "warmed_up_student")
        assert_same_weights(weights(warmed_up), weights(trainer.ref_model))
        assert are_different(before, weights(trainer.ref_model))


def test_a_student_changed_in_memory_is_its_own_reference(tiny_model_dir, tmp_path, standard_rows):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    trainer = make_trainer(tmp_path, model, standard_rows, warmup_epochs=0.0, beta=0.1, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7)


def test_warmup_is_plain_sft_at_temperature_one(tiny_model_dir, tmp_path, standard_rows):
    """One batch of all rows, whose answers differ in length: padding does not count."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        per_device_train_batch_size=48,
        max_steps=1,
        num_train_epochs=1,
        temperature=0.5,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    trainer.train()
    assert len({len(row["teacher_ids"]) for row in trainer.train_dataset}) > 1
    total, tokens = 0.0, 0
    for row in trainer.train_dataset:
        prompt = trainer.processing_class(row["prompt"])["input_ids"]
        log_probs = model(torch.tensor([prompt + row["teacher_ids"]])).logits[0].log_softmax(-1)
        total -= sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(row["teacher_ids"]))
        tokens += len(row["teacher_ids"])
    assert trainer.state.log_history[0]["teacher_nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / tokens, rel=1e-3)


def test_only_the_discriminator_learns_at_first(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(
        tmp_path, tiny_model_dir, standard_rows, num_train_epochs=1, discriminator_only_steps=3, weight_decay=0.1
    )
    before, snapshots = weights(trainer.model), []

    class Snapshots(GradientRecorder):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            snapshots.append(weights(model))

    trainer.add_callback(Snapshots())
    trainer.train()
    assert_same_weights(before, snapshots[2])
    assert are_different(before, snapshots[3])
    assert discriminator_steps(trainer) == 6


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0])
def test_the_gradient_does_not_depend_on_micro_batches(tiny_model_dir, tmp_path, standard_rows, warmup_epochs):
    recorded = {}
    for per_device in (8, 4, 1):
        recorder = GradientRecorder()
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"callbacks": [recorder]},
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=8 // per_device,
            discriminator_batch_size=3,
            warmup_epochs=warmup_epochs,
            num_train_epochs=1,
            max_steps=1,
            beta=0.1,
        ).train()
        recorded[per_device] = recorder.gradients[0]
    for per_device in (4, 1):
        for name, gradient in recorded[8].items():
            torch.testing.assert_close(recorded[per_device][name], gradient, atol=1e-6, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in recorded[8].values()) > 1e-3


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_the_discriminator_step_does_not_depend_on_its_batch_size(tiny_model_dir, tmp_path, standard_rows, head):
    pairs = PairBatch([[5, 6], [7, 8, 9]], [[20, 21, 2], [30, 2]], [[40, 2], [41, 42], [43, 44, 45, 2]], [0, 0, 1])
    gradients = []
    for batch_size in (1, 2, 64):
        trainer = make_trainer(
            tmp_path, tiny_model_dir, standard_rows, discriminator_batch_size=batch_size, discriminator_head=head
        ).discriminator_trainer
        trainer.engine.optimizer.zero_grad = lambda: None
        trainer.args.discriminator_sft_weight = 0.5 if head == "likelihood" else 0.0
        trainer.update(pairs, trainer.score(pairs), in_warmup=True)
        gradients.append([parameter.grad for parameter in trainer.engine.parameters])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)

    scores = trainer.discriminator(**next(iter(trainer._chunks(pairs)))[1])[0]
    assert scores.requires_grad


def test_answer_broadcast_gives_the_gradient_of_one_answer_per_pair(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, discriminator_batch_size=64).discriminator_trainer
    trainer.engine.optimizer.zero_grad = lambda: None
    trainer.args.discriminator_max_grad_norm = 1e9
    start = weights(trainer.discriminator)
    prompts, teacher, student = [[5, 6], [7, 8, 9]], [[20, 21, 2], [30, 2]], [[40, 2], [41, 42], [43, 44, 45, 2]]
    pairs = PairBatch(prompts, teacher, student, [0, 0, 1])
    trainer.update(pairs, trainer.score(pairs))
    broadcast = [parameter.grad.clone() for parameter in trainer.engine.parameters]

    trainer.discriminator.load_state_dict(start)
    for parameter in trainer.engine.parameters:
        parameter.grad = None
    repeated = PairBatch([prompts[0], *prompts], [teacher[0], *teacher], student, [0, 1, 2])
    trainer.update(repeated, trainer.score(repeated))
    torch.testing.assert_close([p.grad for p in trainer.engine.parameters], broadcast, atol=1e-6, rtol=1e-4)


def test_grpo_is_the_only_base_and_untouched(tiny_model_dir, tmp_path, standard_rows):
    """No other trainer among the bases, nothing of ours above GRPO, and no method of GRPO replaced."""
    bases = list(GADTrainer.__mro__)
    assert bases[bases.index(GRPOTrainer) :] == list(GRPOTrainer.__mro__)
    assert not any(issubclass(base, Trainer) for base in bases[1 : bases.index(GRPOTrainer)])
    make_trainer(tmp_path, tiny_model_dir, standard_rows)
    for base in GRPOTrainer.__mro__[: GRPOTrainer.__mro__.index(Trainer) + 1]:
        for name, value in vars(base).items():
            if inspect.isfunction(value):
                assert inspect.unwrap(value).__module__.startswith(("trl.", "transformers.", "accelerate.")), name


def test_warmup_learning_rate(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        max_steps=4,
        warmup_learning_rate=2e-3,
        learning_rate=1e-4,
        discriminator_warmup_learning_rate=1e-3,
        discriminator_learning_rate=0.0,
    )
    snapshots = []
    update = trainer.discriminator_trainer.update
    trainer.discriminator_trainer.update = lambda *args: (
        update(*args),
        snapshots.append(weights(trainer.discriminator)),
    )[0]
    trainer.train()
    assert are_different(snapshots[0], snapshots[1])
    assert_same_weights(snapshots[1], snapshots[3])
    # The scheduler has moved on to the next step when a log is written
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([2e-3, 2e-3, 1e-4, 1e-4])


def test_warmup_runs_in_mixed_precision(tiny_model_dir, tmp_path, standard_rows):
    """accelerate's autocast is a wrapper around the model's forward, which warm-up replaces."""
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, bf16=True, max_steps=2)
    seen = []
    projection = trainer.model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    sft_loss = trainer._sft_loss

    def recorded(model, inputs):
        seen.clear()
        loss = sft_loss(model, inputs)
        trainer.dtypes_in_warmup = list(seen)
        return loss

    trainer._sft_loss = recorded
    trainer.train()
    assert set(trainer.dtypes_in_warmup) == {torch.bfloat16}


def test_scores_that_are_not_finite_stop_the_run(tiny_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, max_steps=2)
    with torch.no_grad():
        trainer.discriminator.score_head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 0.*discriminator_learning_rate"):
        trainer.train()
