"""`discriminator_rows="unseen"`: what the warm-up has learned from, the adversarial stage does not score."""

from collections import Counter

import pytest
from datasets import Dataset

from trl_bbkd.errors import TeacherDataError
from trl_bbkd.gad.samplers import StageSampler, stage_rows

from .helpers import FixedSamplesTrainer, assert_same_weights, make_config, make_trainer, no_model_is_loaded, weights
from .test_several_answers import ROWS


UNSEEN = {"discriminator_rows": "unseen", "num_train_epochs": 2, "warmup_epochs": 1.0}


class ScoredTrainer(FixedSamplesTrainer):
    """Keeps which prompts the discriminator reads in each stage, replayed ones included, and which the student learns from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read, self.learned = {True: [], False: []}, {True: [], False: []}
        score, update = self.discriminator_trainer.score, self.discriminator_trainer.update

        def scored(pairs):
            if self.model.training:
                self.read[self._in_warmup] += map(self._text, pairs.prompt_ids)
            return score(pairs)

        def updated(pairs, *arguments):
            self.learned[self._in_warmup] += map(self._text, pairs.prompt_ids)
            return update(pairs, *arguments)

        self.discriminator_trainer.score, self.discriminator_trainer.update = scored, updated

    def _text(self, ids):
        return self.processing_class.decode(ids)


def test_rows_are_divided_by_prompt():
    rows = Dataset.from_list(ROWS)
    warmup, adversarial = stage_rows(rows, 1 / 3, seed=0)
    assert sorted(warmup + adversarial) == list(range(len(rows))) and 0 < len(warmup) <= len(rows) / 3
    assert not {ROWS[number]["prompt"] for number in warmup} & {ROWS[number]["prompt"] for number in adversarial}
    assert stage_rows(rows, 1 / 3, seed=0) == (warmup, adversarial) != stage_rows(rows, 1 / 3, seed=1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_of_their_stage_and_rows_come_equally_often(shuffle):
    """Ten warm-up rows in batches of 3, over 4 batches; then seven."""

    def sampler():
        return StageSampler(
            lambda: (list(range(10)), list(range(10, 17)), 4),
            batches_per_epoch=5,
            batch_size=3,
            num_generations=2,
            repeats=2,
            shuffle=shuffle,
            seed=1,
        )

    straight = sampler()
    epochs = [list(straight) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(straight)] * 3 == [60] * 3
    drawn = [row for epoch in epochs for row in epoch]
    batches = [drawn[start : start + 12] for start in range(0, len(drawn), 12)]
    for number, batch in enumerate(batches):
        assert batch[:6] == batch[6:] and batch[:6:2] == batch[1:6:2] and len(set(batch)) == 3
        assert all((row < 10) == (number < 4) for row in batch)
    assert len({row for batch in batches[:3] for row in batch}) == 9
    times = Counter(row for batch in batches[4:] for row in batch[:6:2])
    assert sum(times.values()) == 33 and (max(times.values()) <= 6 if shuffle else set(times) == set(range(10, 16)))
    # A run that goes on begins each epoch that it has been through
    resumed = sampler()
    for _ in range(2):
        next(iter(resumed))
    assert list(resumed) == epochs[2]


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 8},
        pytest.param({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        # A generation batch of two steps, and a step of two generation batches
        pytest.param(
            {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
            marks=pytest.mark.slow,
        ),
        {"per_device_train_batch_size": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 2},
    ],
)
def test_no_row_of_the_warmup_is_scored_in_the_adversarial_stage(tiny_model_dir, tmp_path, shape):
    trainer = make_trainer(
        tmp_path, tiny_model_dir, ROWS * 2, ScoredTrainer, **UNSEEN, **shape, discriminator_replay_size=64
    )
    trainer.train()
    warmup, adversarial = set(trainer.read[True]), set(trainer.read[False])
    assert warmup and adversarial and not warmup & adversarial
    assert set(trainer.learned[True]) <= warmup and set(trainer.learned[False]) <= adversarial
    assert len(set(trainer.learned[False])) > 1
    # As many steps as over all rows
    sequences = shape["per_device_train_batch_size"] * shape.get("gradient_accumulation_steps", 1)
    assert trainer.state.global_step == 2 * 12 * 4 // sequences


def test_by_default_the_stages_share_their_rows(tiny_model_dir, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model_dir, ROWS, ScoredTrainer, num_train_epochs=2)
    trainer.train()
    assert set(trainer.read[True]) & set(trainer.read[False])


@pytest.mark.parametrize("resume_at", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_keeps_the_division(tiny_model_dir, tmp_path, resume_at):
    config = {**UNSEEN, "save_strategy": "steps", "save_steps": 2, "discriminator_replay_size": 16}

    def trainer(**more):
        return make_trainer(tmp_path, tiny_model_dir, ROWS, ScoredTrainer, **config | more)

    straight = trainer(max_steps=6)
    straight.train()
    # Were it divided by the longer run's share, it would be divided otherwise
    resumed = trainer(num_train_epochs=4, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume_at}"))
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert_same_weights(weights(straight.discriminator), weights(resumed.discriminator))
    assert resumed.read[False] == straight.read[False][-len(resumed.read[False]) :]
    assert resumed.read[True] == straight.read[True][len(straight.read[True]) - len(resumed.read[True]) :]
    with pytest.raises(ValueError, match="discriminator_rows: 'unseen' there, 'all' here"):
        trainer(discriminator_rows="all", max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("warmup_epochs", [0.0, 2.0])
def test_two_stages_are_needed(tmp_path, warmup_epochs):
    with pytest.raises(
        ValueError, match=rf"unseen.* warmup_epochs={warmup_epochs} of num_train_epochs=2 there is only one"
    ):
        make_config(tmp_path, discriminator_rows="unseen", num_train_epochs=2, warmup_epochs=warmup_epochs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ROWS[:6],
            "leaves 1 of 6 rows for the .*, and a batch has 2 prompts. Get more teacher rows, .* or lower per_device",
        ),
        ([ROWS[0]] * 12, "leaves 0 of 12 rows for the adversarial stage"),
    ],
)
def test_too_few_rows_are_told_before_a_model_is_loaded(tiny_model_dir, tmp_path, monkeypatch, rows, message):
    no_model_is_loaded(monkeypatch)
    with pytest.raises(TeacherDataError, match=message):
        make_trainer(tmp_path, tiny_model_dir, rows, **{**UNSEEN, "num_train_epochs": 6, "warmup_epochs": 2.0})


def test_a_stream_cannot_be_divided(tiny_model_dir, tmp_path, monkeypatch):
    no_model_is_loaded(monkeypatch)
    with pytest.raises(TeacherDataError, match="discriminator_rows='unseen' divides .* Turn streaming off"):
        FixedSamplesTrainer(
            tiny_model_dir,
            args=make_config(tmp_path, **UNSEEN, max_steps=4),
            train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
        )
