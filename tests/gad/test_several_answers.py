"""Rows that share a prompt: the student's samples meet all of the teacher's answers to it."""

import dataclasses
import math

import pytest
import torch
from datasets import Dataset

from tests.processes import on_processes
from trl_bbkd.discriminator.objectives import (
    AnswerShares,
    bradley_terry_loss,
    cross_entropy_loss,
    loss_and_score_gradients,
    pair_accuracy,
)
from trl_bbkd.discriminator.trainer import PairBatch
from trl_bbkd.evaluation.student import teacher_nll

from .helpers import FixedSamplesTrainer, GradientRecorder, assert_same_weights, make_config, make_trainer, weights


ANSWERS = {
    "Name a fruit.": [" An apple.", " A cherry.", " An apple."],
    "Say hello.": [" Hello!", " Hi."],
    "Why?": [" So."],
}


def rows_of(*prompts, copies=1):
    """Rows whose prompts are told apart by a number."""
    return [
        {"prompt": f"{number} {prompt}", "completion": answer}
        for number in range(copies)
        for prompt in prompts
        for answer in ANSWERS[prompt]
    ]


ROWS = rows_of(*ANSWERS, copies=4)


def softplus(value):
    return math.log1p(math.exp(value))


def test_one_two_and_three_answers_by_hand():
    """The second prompt has two answers, the third three, of which two are equal."""
    teacher = torch.tensor([1.0, 0.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    student = torch.tensor([0.5, 1.5, 1.0, 0.0], dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 2])
    shares = torch.tensor([1, 0.5, 0.5, 2 / 3, 1 / 3], dtype=torch.float64)
    answers = AnswerShares(torch.tensor([0, 1, 1, 2, 2]), shares)
    by_sample = [
        softplus(0.5 - 1.0),
        softplus(1.5 - 1.0),
        (softplus(1.0 - 0.0) + softplus(1.0 - 2.0)) / 2,
        (softplus(0.0 - 1.0) + softplus(0.0 - 1.0) + softplus(0.0 + 1.0)) / 3,
    ]
    loss, of_teacher, of_student = loss_and_score_gradients(bradley_terry_loss, teacher, student, index, answers)
    assert loss.item() == pytest.approx(sum(by_sample) / 4)
    # Each prompt's gradient is divided among its answers, and the samples push the other way
    sigma = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731
    expected = [-sigma(-0.5) - sigma(0.5), -sigma(1.0) / 2, -sigma(-1.0) / 2, -2 * sigma(-1.0) / 3, -sigma(1.0) / 3]
    assert of_teacher.tolist() == pytest.approx([value / 4 for value in expected])
    assert of_student.sum().item() == pytest.approx(-of_teacher.sum().item())
    by_sample = [
        softplus(-1.0) + softplus(0.5),
        softplus(-1.0) + softplus(1.5),
        (softplus(0.0) + softplus(-2.0)) / 2 + softplus(1.0),
        (2 * softplus(-1.0) + softplus(1.0)) / 3 + softplus(0.0),
    ]
    assert cross_entropy_loss(teacher, student, index, answers).item() == pytest.approx(sum(by_sample) / 4)
    assert pair_accuracy(teacher, student, index, answers).item() == pytest.approx((1 + 0 + 1 / 2 + 2 / 3) / 4)


@pytest.mark.parametrize("measure", [bradley_terry_loss, cross_entropy_loss, pair_accuracy])
def test_one_answer_a_prompt_is_as_before_to_the_bit(measure):
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(7, generator=generator), torch.randn(40, generator=generator)
    index = torch.randint(7, (40,), generator=generator)
    plain = PairBatch([[5]] * 7, [[6, 2]] * 7, [[7, 2]] * 40, index.tolist())
    gathered = PairBatch.with_all_answers([[5]] * 7, [[[6, 2]]] * 7, [[7, 2]] * 40, index.tolist())
    assert gathered == plain
    sides = (teacher, student, index)
    assert torch.equal(measure(*sides, plain.shares(teacher.device)), measure(*sides))
    if measure is not pair_accuracy:
        with_shares = loss_and_score_gradients(measure, *sides, plain.shares(teacher.device))
        assert all(map(torch.equal, with_shares, loss_and_score_gradients(measure, *sides)))


def test_pairs_of_one_two_and_three_answers():
    prompts, student = [[5], [6], [7]], [[30], [31], [32], [33]]
    pairs = PairBatch.with_all_answers(prompts, [[[10]], [[11], [12]], [[13], [14], [13]]], student, [0, 1, 2, 2])
    assert pairs.teacher_ids == [[10], [11], [12], [13], [14]]
    assert pairs.answer_index == [0, 1, 1, 2, 2]
    assert pairs.answer_share == pytest.approx([1, 1 / 2, 1 / 2, 2 / 3, 1 / 3])
    assert pairs.prompts == [[5], [6], [6], [7], [7], [5], [6], [7], [7]]
    # What is replayed later has the answer of its own row, which comes first
    assert pairs.triples() == [([5], [10], [30]), ([6], [11], [31]), ([7], [13], [32]), ([7], [13], [33])]
    both = pairs.joined(PairBatch.from_triples(pairs.triples()))
    assert both.answer_index == [0, 1, 1, 2, 2, 3, 4, 5] and both.prompt_index == [0, 1, 2, 2, 3, 4, 5, 5]
    values = pairs.by_prompt(torch.tensor([1.0, 2.0, 4.0, 3.0, 6.0]))
    assert values.tolist() == pytest.approx([1, 3, 4])


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_the_step_is_that_of_all_pairs_whatever_the_batch_size(tiny_model_dir, tmp_path, head):
    """Two answers and two samples: the mean over the four pairs, each as a prompt of its own."""
    prompt, answers, student = [5, 6], [[20, 21, 2], [30, 2]], [[40, 2], [41, 42]]
    several = PairBatch.with_all_answers([prompt], [answers], student, [0, 0])
    apart = PairBatch.from_triples([(prompt, answer, sample) for answer in answers for sample in student])
    found = []
    for pairs, batch_size in ((apart, 64), (several, 64), (several, 1)):
        trainer = make_trainer(
            tmp_path, tiny_model_dir, ROWS, discriminator_batch_size=batch_size, discriminator_head=head
        ).discriminator_trainer
        trainer.engine.optimizer.zero_grad = lambda: None
        trainer.args.discriminator_sft_weight = 0.5 if head == "likelihood" else 0.0
        scores = trainer.score(pairs)
        metrics = trainer.measure(pairs, scores) | trainer.update(pairs, scores, in_warmup=True)
        # Of one group, and of two with a sample of each
        metrics.pop("discriminator/group_std")
        found.append((metrics, [parameter.grad for parameter in trainer.engine.parameters]))
    for metrics, gradients in found[1:]:
        assert metrics == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-6, rtol=1e-4)


class RecordingTrainer(FixedSamplesTrainer):
    """Keeps the pairs of each batch, with the rows that it is of."""

    def _collect_pairs(self, inputs, completion_ids):
        pairs = super()._collect_pairs(inputs, completion_ids)
        decode = self.processing_class.decode
        found = [
            (
                decode(prompt),
                [decode(ids) for ids, of in zip(pairs.teacher_ids, pairs.answer_index, strict=True) if of == number],
            )
            for number, prompt in enumerate(pairs.prompt_ids)
        ]
        self.recorded = [
            *getattr(self, "recorded", []),
            (self.model.training, found, [row["completion"] for row in inputs]),
        ]
        return pairs


def test_a_run_pairs_samples_with_every_answer_to_their_prompt(tiny_model_dir, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model_dir, ROWS, RecordingTrainer, max_steps=6)
    trainer.train()
    seen = set()
    for is_training, pairs, completions in trainer.recorded:
        assert is_training
        for (prompt, answers), own in zip(pairs, completions[::4], strict=True):
            answers = [answer.removesuffix("<|im_end|>") for answer in answers]
            assert answers[0] == own and sorted(answers) == sorted(set(ANSWERS[prompt.split(maxsplit=1)[1]]))
            seen.add((prompt, own))
    # Every row still stands for itself: what its own answer teaches is learned
    assert len(seen) == 10  # of the first 12 rows, two of which are like another one


def test_an_evaluation_samples_a_prompt_once_and_measures_all_its_answers(tiny_model_dir, tmp_path):
    rows, judged = rows_of(*ANSWERS, copies=3), []

    def judge(prompts, completions):
        judged.extend(prompts)
        return {"characters": [len(text) for text in completions]}

    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        ROWS,
        RecordingTrainer,
        {"eval_dataset": Dataset.from_list(rows), "sample_metrics": judge},
        per_device_eval_batch_size=4,
        num_generations_eval=2,
    )
    metrics = trainer.evaluate()
    assert sorted(judged) == sorted([*dict.fromkeys(row["prompt"] for row in rows)] * 2)
    expected = teacher_nll(trainer.model, trainer.processing_class, trainer.eval_dataset.to_list())
    assert metrics["eval_teacher_nll"] == pytest.approx(expected, rel=1e-5)
    assert {len(answers) for _, pairs, _ in trainer.recorded for _, answers in pairs} == {1, 2}
    # Held-out rows do not become training's
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.recorded[-1][0] and trainer._training_answers.rows is trainer.train_dataset


def test_reward_functions_get_the_answer_of_the_row(tiny_model_dir, tmp_path):
    seen = []

    def reward(prompts, completions, teacher_completion, **kwargs):
        seen.extend(zip(prompts, teacher_completion, strict=True))
        return [0.0] * len(prompts)

    make_trainer(tmp_path, tiny_model_dir, ROWS, trainer_kwargs={"reward_funcs": reward}, max_steps=2).train()
    assert len(seen) == 16 and set(seen) <= {(row["prompt"], row["completion"]) for row in ROWS}


def trained_on_several(model, output, per_device, accumulation):
    recorder = GradientRecorder()
    trainer = FixedSamplesTrainer(
        model=model,
        args=make_config(
            output,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            warmup_epochs=1.0,
            max_steps=4,
            beta=0.1,
            per_device_eval_batch_size=2,
            num_generations_eval=2,
            discriminator_head="likelihood",
            discriminator_sft_weight=0.5,
        ),
        train_dataset=Dataset.from_list(ROWS[:12]),
        eval_dataset=Dataset.from_list(ROWS),
        callbacks=[recorder],
    )
    before = trainer.evaluate()
    trainer.train()
    return {
        "before": before,
        "student": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "discriminator": weights(trainer.discriminator),
        "gradients": recorder.gradients,
        "log": [entry for entry in trainer.state.log_history if "discriminator/loss" in entry],
    }


@pytest.mark.slow
def test_two_processes_pair_as_one(tiny_model_dir, tmp_path):
    """Of three prompts a batch the second is on both processes."""
    (one,) = on_processes(1, trained_on_several, tiny_model_dir, tmp_path / "one", 12, 1)
    first, second = on_processes(2, trained_on_several, tiny_model_dir, tmp_path / "two", 3, 2)
    assert_same_weights(first["student"], second["student"])
    assert_same_weights(first["discriminator"], second["discriminator"])
    for name in ("eval_teacher_nll", "eval_discriminator/loss", "eval_discriminator/accuracy"):
        assert first["before"]["eval_teacher_nll"] == pytest.approx(one["before"]["eval_teacher_nll"], rel=1e-5), name
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(first["gradients"][0][name], gradient, atol=1e-6, rtol=1e-4)
    names = [f"discriminator/{name}" for name in ("loss", "accuracy", "margin", "teacher_score")]
    for name in [*names, "completions/length_ratio"]:
        assert first["log"][0][name] == pytest.approx(one["log"][0][name], abs=1e-4), name


def test_answers_of_a_batch_are_plain_lists():
    pairs = PairBatch.with_all_answers([[5]], [[[10], [11]]], [[12]], [0])
    assert all(isinstance(ids, list) for ids in dataclasses.asdict(pairs)["teacher_ids"])
