"""Offline GAD: a discriminator for each round."""

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.processes import Moment, killed_at, on_processes, train
from tests.proxykd.helpers import LORA
from trl_bbkd.discriminator.model import Discriminator
from trl_bbkd.discriminator.trainer import DiscriminatorTrainer
from trl_bbkd.preferencekd import discriminating
from trl_bbkd.preferencekd.discriminating import DiscriminatorJudge, pairs_of, settings, train_on
from trl_bbkd.preferencekd.rounds import kept_table

from .helpers import make_trainer
from .on_processes import discriminated


CONFIG = {"judge": "discriminator", "discriminator_learning_rate": 1e-3, "per_device_train_batch_size": 2}


@pytest.fixture
def seen(monkeypatch):
    """The samples that each discriminator was trained on and, after them, those that it scored as a judge."""
    found: list[dict[str, list]] = []
    init, update, judge = DiscriminatorTrainer.__init__, DiscriminatorTrainer.update, DiscriminatorJudge.__call__

    def made(self, *args):
        found.append({"trained on": [], "judged": []})
        init(self, *args)

    def updated(self, pairs, *args, **kwargs):
        assert not found[-1]["judged"], "it is to be frozen"
        found[-1]["trained on"] += pairs.student_ids
        return update(self, pairs, *args, **kwargs)

    def judged(self, rows):
        found[-1]["judged"] += [ids for row in rows for ids in row.candidate_ids]
        return judge(self, rows)

    monkeypatch.setattr(DiscriminatorTrainer, "__init__", made)
    monkeypatch.setattr(DiscriminatorTrainer, "update", updated)
    monkeypatch.setattr(DiscriminatorJudge, "__call__", judged)
    return found


def test_it_learns_from_its_rounds_samples_alone_and_is_frozen_for_them(tmp_path, tiny_model_dir, seen):
    trainer = make_trainer(tmp_path, tiny_model_dir, discriminator_epochs=2, **CONFIG)
    trainer.train()
    assert len(seen) == 2
    for number, each in enumerate(seen, 1):
        samples = [
            ids for row in kept_table(tmp_path / f"round-{number}/candidates.parquet")["candidate_ids"] for ids in row
        ]
        assert sorted(each["judged"]) == sorted(samples) and sorted(each["trained on"]) == sorted(samples * 2)
    reports = trainer.round_reports
    assert all(0 <= report["discriminator"]["discriminator/accuracy"] <= 1 for report in reports)


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "lora"])
def test_its_scores_are_those_of_what_is_left_on_disk(tmp_path, tiny_model_dir, lora):
    config = {"discriminator_lora_kwargs": {"r": 4, "target_modules": "all-linear"}} if lora else {}
    kwargs = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = make_trainer(tmp_path, tiny_model_dir, trainer_kwargs=kwargs, num_rounds=1, **CONFIG, **config)
    trainer.train()
    saved = Discriminator.from_pretrained(tmp_path / "round-1/discriminator")
    judge = DiscriminatorJudge(DiscriminatorTrainer(saved, settings(trainer.args), trainer.accelerator, 0))
    table = kept_table(tmp_path / "round-1/candidates.parquet")
    rows = trainer._judged_rows(trainer._shard(1), table["candidate_ids"][:])
    for scores, kept in zip(judge(rows), table["scores"], strict=True):
        assert scores == pytest.approx(kept, abs=1e-5)
    assert not list(tmp_path.glob("round-*/discriminator.tmp"))


def test_it_learns_to_tell_the_teachers_answers(tmp_path, tiny_model_dir):
    config = CONFIG | {
        "discriminator_epochs": 8,
        "discriminator_learning_rate": 5e-3,
        "discriminator_head": "likelihood",
        "discriminator_sft_weight": 1.0,
    }
    trainer = make_trainer(tmp_path, tiny_model_dir, num_rounds=1, warmup_epochs=0, **config)
    trainer.train()
    (report,) = trainer.round_reports
    assert report["discriminator"]["discriminator/accuracy"] > 0.8


KILLED = {**CONFIG, "num_rounds": 1}


@pytest.mark.parametrize(
    ("moment", "trains_again"),
    [
        pytest.param(
            Moment("trl_bbkd.discriminator.trainer.DiscriminatorTrainer.update", call=3), True, marks=pytest.mark.slow
        ),
        (Moment("trl_bbkd.preferencekd.rounds.write_atomically", call=2, after=True), False),
    ],
    ids=["training", "scoring"],
)
def test_killed_it_ends_as_if_it_had_not_been(tmp_path, tiny_model_dir, moment, trains_again, monkeypatch):
    make_trainer(tmp_path / "whole", tiny_model_dir, **KILLED).train()
    killed_at(moment, train, make_trainer, tmp_path / "killed", tiny_model_dir, **KILLED)
    trained = []
    monkeypatch.setattr(discriminating, "train_on", lambda *args: trained.append(1) or train_on(*args))
    make_trainer(tmp_path / "killed", tiny_model_dir, **KILLED).train()
    assert bool(trained) == trains_again
    for name in ("model.safetensors", "round-1/discriminator/heads.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_it_alike(tmp_path, tiny_model_dir):
    (one,) = on_processes(1, discriminated, tiny_model_dir, tmp_path / "one", 4)
    two = on_processes(2, discriminated, tiny_model_dir, tmp_path / "two", 2)
    assert two[0]["scores"] == two[1]["scores"]
    for scores, expected in zip(two[0]["scores"], one["scores"], strict=True):
        assert scores == pytest.approx(expected, abs=2e-2)


def test_every_answer_to_a_prompt_is_among_its_pairs(tmp_path, tiny_model_dir):
    """Also where the rows that share it are in other rounds."""
    answers = [["one", "two"], ["three"], ["four", "five", "four"]]
    rows = [
        {"prompt": f"{prompt}?", "completion": f" {answer}"}
        for number in range(3)
        for prompt, own in enumerate(answers)
        for answer in own[number : number + 1]
    ]
    trainer = make_trainer(tmp_path, tiny_model_dir, rows, held_out=0, **CONFIG)
    shard = trainer._shard(2)
    pairs = pairs_of(trainer._judged_rows(shard, [[[5], [6]]] * len(shard)))
    decode = trainer.processing_class.decode
    for number, row in enumerate(shard):
        own = [answer for answer, of in enumerate(pairs.answer_index) if of == number]
        texts = [decode(pairs.teacher_ids[answer], skip_special_tokens=True).strip() for answer in own]
        expected = answers[int(row["prompt"][0])]
        assert texts[0] == row["completion"].strip() and sorted(texts) == sorted(set(expected))
        assert [pairs.answer_share[answer] for answer in own] == pytest.approx(
            [expected.count(text) / len(expected) for text in texts]
        )


def test_of_held_out_rows_all_answers_are_measured(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"{number // 2}?", "completion": f" {number}"} for number in range(20)]
    trainer = make_trainer(tmp_path, tiny_model_dir, rows, held_out=4, answers_per_prompt=1, judge="overlap")
    assert len(trainer._teacher_rows) == 8 and len(trainer._held_out) == 4


class TestRefused:
    def test_another_tokenizer(self, tmp_path, tiny_model_dir):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.resize_token_embeddings(50)
        model.save_pretrained(tmp_path / "small")
        with pytest.raises(ValueError, match="has embeddings for 50 tokens"):
            make_trainer(tmp_path / "out", tiny_model_dir, discriminator=str(tmp_path / "small"), **CONFIG)

    def test_an_nll_without_a_language_model(self, tmp_path, tiny_model_dir):
        with pytest.raises(ValueError, match="set discriminator_head='likelihood'"):
            make_trainer(tmp_path, tiny_model_dir, discriminator_sft_weight=1.0, **CONFIG)

    def test_a_judge_that_is_not_there(self, tmp_path, tiny_model_dir):
        with pytest.raises(ValueError, match="judge='no/such/folder' is neither a folder with a model nor a model"):
            make_trainer(tmp_path, tiny_model_dir, judge="no/such/folder")
        with pytest.raises(ValueError, match="is a function for recipes. In Python, hand it in: judge="):
            make_trainer(tmp_path, tiny_model_dir, judge="judge.py:score")
