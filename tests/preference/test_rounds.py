"""Rounds of DPO on a model's own answers, apart from any method."""

import json

import pytest
from datasets import Dataset

from tests.gad.helpers import assert_same_weights, weights
from tests.proxykd.helpers import ON_CPU, make_rows
from trl_bbkd.errors import StageError
from trl_bbkd.host.model_files import load_model
from trl_bbkd.preference.config import PreferenceRoundsConfig
from trl_bbkd.preference.pairs import teacher_over_sample
from trl_bbkd.preference.rounds import RoundsOnDisk
from trl_bbkd.preference.sampling import read_samples
from trl_bbkd.preference.trainer import PreferenceRoundsTrainer


class StudentRounds(PreferenceRoundsTrainer):
    """A method of its own: it measures what it is told to, and prefers the longer of two answers."""

    _role = "student"
    _training_name = "preference"
    _best_by = "quality"

    quality = [0.1, 0.5, 0.2, 0.3]

    @property
    def _patience(self):
        return 2

    def _measured(self, rows):
        assert rows[0].keys() >= {"input_ids", "labels"}
        return {"quality": self.quality[len(self.rounds)]}

    def _pairs(self, shard, folder, number):
        samples = self._sample(shard, folder, number)
        pairs = zip(shard["teacher_ids"], samples, strict=True)
        longer_first = [sorted(pair, key=len, reverse=True) for pair in pairs]
        return Dataset.from_dict(
            {
                "prompt_ids": list(shard["prompt_ids"]),
                "chosen_ids": [first for first, _ in longer_first],
                "rejected_ids": [second for _, second in longer_first],
            }
        )


def make_trainer(output_dir, model, **config):
    settings = {"num_rounds": 4, "learning_rate": 1e-3, "max_steps": 1, **ON_CPU, **config}
    rows = make_rows(20)
    return StudentRounds(
        model,
        PreferenceRoundsConfig(str(output_dir), **settings),
        train_dataset=Dataset.from_list(rows[4:]),
        eval_dataset=Dataset.from_list(rows[:4]),
    )


def test_a_method_says_role_pairs_and_what_is_better(tmp_path, tiny_model_dir):
    trainer = make_trainer(tmp_path, tiny_model_dir)
    trainer.train()
    assert [entry["quality"] for entry in trainer.rounds] == [0.1, 0.5, 0.2, 0.3] and trainer.best_round == 1
    saved = json.loads((tmp_path / "preference.json").read_text())
    assert saved["rounds"] == trainer.rounds and "student" in saved["run"]
    assert {line["round"] for line in trainer.log_history} == {1, 2, 3}, "patience is over: there is no fourth round"
    assert any("preference/quality" in line for line in trainer.state.log_history)
    lines = read_samples(tmp_path / "round-1/samples/00000.jsonl")
    assert all(line.keys() == {"prompt", "teacher", "student", "student_ids"} for line in lines)
    assert all(len(pair["chosen_ids"]) >= len(pair["rejected_ids"]) for pair in trainer.train_dataset)
    # Of the best round and the last one
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("round-*/student")) == [
        "round-1/student",
        "round-3/student",
    ]
    best = load_model(str(tmp_path / "round-1/student"))
    assert_same_weights(weights(load_model(str(tmp_path))), weights(best))

    again = make_trainer(tmp_path, tiny_model_dir)
    again._sample = None  # would be called
    again.train()
    assert again.rounds == trainer.rounds
    with pytest.raises(StageError, match=r"holds another preference \(beta: 0.1 there, 0.4 here\)"):
        make_trainer(tmp_path, tiny_model_dir, beta=0.4).train()


def test_pairs_prefer_the_teacher():
    rows = Dataset.from_dict({"prompt_ids": [[1], [2, 3]], "teacher_ids": [[4, 5], [6]], "other": [0, 1]})
    assert teacher_over_sample(rows, [[7], [8, 9]]).to_list() == [
        {"prompt_ids": [1], "chosen_ids": [4, 5], "rejected_ids": [7]},
        {"prompt_ids": [2, 3], "chosen_ids": [6], "rejected_ids": [8, 9]},
    ]


def test_rounds_on_disk(tmp_path):
    disk = RoundsOnDisk(tmp_path, "preference", "student")
    assert disk.run() is None and disk.finished() == []
    rounds = []
    for number, steps in enumerate(([], [1, 2], [1], [1])):
        rounds.append({"round": number, "nll": 1.0 / (number + 1)})
        for folder in (disk.model(number), disk.folder(number) / "checkpoint-1"):
            folder.mkdir(parents=True)
        disk.finish({"seed": 1}, rounds, [{"step": step} for step in steps])
        disk.clear(number, best=min(number, 1))
    found = RoundsOnDisk(tmp_path, "preference", "student")
    assert found.run() == {"seed": 1} and found.finished() == rounds
    assert [(line["step"], line["round"]) for line in found.log_history(rounds)] == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert [disk.model(number).is_dir() for number in range(4)] == [False, True, False, True]
    assert not list(tmp_path.glob("round-*/checkpoint-*"))
    (disk.folder(2) / "round.json").unlink()
    assert found.finished() == rounds[:2], "what comes after a round that was not finished does not count"
