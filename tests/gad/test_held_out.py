"""A discriminator is watched on held-out rows: told of when it knows the training answers by heart, and stopped."""

import json

import pytest
from datasets import Dataset

from trl_bbkd.gad.monitor import TrainingMonitor

from .helpers import (
    FixedSamplesTrainer,
    assert_same_weights,
    make_config,
    make_trainer,
    no_model_is_loaded,
    weights,
)
from .test_warnings import HEALTHY, SETTINGS, settings_named, watch


def resumed(monitor):
    other = TrainingMonitor(monitor.tokenizer)
    other.load_state(json.loads(json.dumps(monitor.state())))
    return other


def test_what_is_known_by_heart_is_told_once(tokenizer):
    monitor = TrainingMonitor(tokenizer)
    assert monitor.observe_held_out(1, 0.1) == []  # nothing to compare with yet
    watch(monitor, HEALTHY, 10)  # 0.8
    assert monitor.observe_held_out(5, 0.65) == []
    (warning,) = monitor.observe_held_out(6, 0.5)
    assert warning.kind == "memorised" and "0.80 on training prompts, 0.50 on held-out ones" in warning.text
    assert settings_named(warning.text) and settings_named(warning.text) <= SETTINGS
    assert resumed(monitor).observe_held_out(7, 0.5) == []


def test_evaluations_since_the_best_one_are_counted(tokenizer):
    monitor, counted = TrainingMonitor(tokenizer), []
    for accuracy in (0.5, 0.7, 0.6, 0.7, 0.8, 0.1):
        monitor.observe_held_out(1, accuracy)
        monitor = resumed(monitor)
        counted.append(monitor.evaluations_since_best)
    assert counted == [0, 0, 1, 2, 0, 1]


@pytest.fixture
def evaluated(tiny_model_dir, standard_rows):
    """A run that evaluates after each step, whose discriminator has these accuracies on held-out rows."""

    def make(folder, accuracies, **config):
        trainer = make_trainer(
            folder,
            tiny_model_dir,
            standard_rows,
            FixedSamplesTrainer,
            {"eval_dataset": Dataset.from_list(standard_rows[12:14])},
            **{
                "warmup_epochs": 0.0,
                "max_steps": len(accuracies),
                "eval_strategy": "steps",
                "eval_steps": 1,
                "discriminator_patience": 2,
                "discriminator_weight_decay": 0.1,
            }
            | config,
        )
        measure, left, seen = trainer.discriminator_trainer.measure, list(accuracies), []

        def measured(*args):
            found = measure(*args)
            if not trainer.model.training:
                found["discriminator/accuracy"] = left[trainer.state.global_step - 1]
            return found

        trainer.discriminator_trainer.measure = measured
        update = trainer.discriminator_trainer.update

        def updated(*args):
            seen.append(trainer.state.global_step)
            return update(*args)

        trainer.discriminator_trainer.update = updated
        return trainer, seen

    return make


def test_a_discriminator_is_stopped_when_it_gets_no_better(evaluated, tmp_path):
    trainer, updates = evaluated(tmp_path, [0.6, 0.7, 0.7, 0.5, 0.9, 0.9])
    trainer.train()
    # After the fourth evaluation, two without a better one; what comes later brings it back to nothing
    assert updates == [0, 1, 2, 3]
    log = [
        entry["gate/discriminator_held"] for entry in trainer.state.log_history if "gate/discriminator_held" in entry
    ]
    assert log == [0.0] * 4 + [1.0] * 2


def test_a_stopped_discriminator_stays_so_in_a_resumed_run(evaluated, tmp_path):
    config = {"save_strategy": "steps", "save_steps": 3}
    accuracies = [0.7, 0.6, 0.5, 0.9, 0.9]
    trainer, _ = evaluated(tmp_path, accuracies, **config)
    trainer.train()
    expected = weights(trainer.discriminator)
    trainer, updates = evaluated(tmp_path, accuracies, **config)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert updates == []
    assert_same_weights(expected, weights(trainer.discriminator))


def test_what_is_evaluated_by_hand_does_not_count(evaluated, tmp_path):
    trainer, _ = evaluated(tmp_path, [0.6])
    trainer.train()
    before = trainer.monitor.state()
    trainer.evaluate()
    assert trainer.monitor.state() == before


def test_patience_needs_evaluations(tmp_path):
    with pytest.raises(
        ValueError, match="discriminator_patience=2 counts evaluations, of which there are none. Set eval_strategy"
    ):
        make_config(tmp_path, discriminator_patience=2)


def test_patience_needs_one_data_set(tiny_model_dir, tmp_path, standard_rows, monkeypatch):
    """Of several, none has the name whose evaluations are counted."""
    rows = Dataset.from_list(standard_rows[12:14])
    no_model_is_loaded(monkeypatch)
    with pytest.raises(
        ValueError, match=r"discriminator_patience=2 counts.* eval_dataset has 2 by name \(easy, hard\)"
    ):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"eval_dataset": {"easy": rows, "hard": rows}},
            eval_strategy="steps",
            discriminator_patience=2,
        )
