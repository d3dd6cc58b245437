import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.processes import Moment, killed_at, on_processes, train
from tests.proxykd.helpers import LORA, assert_same_weights, label_log_probs, make_rows, weights
from tests.proxykd.test_alignment import proxy_weights as student_weights
from tests.proxykd.test_alignment import reference_weights
from tests.sharding.runs import slow_but
from trl_bbkd.preference.sampling import ModelSampler
from trl_bbkd.preferencekd.comparing import ComparingJudge
from trl_bbkd.preferencekd.rounds import kept_table
from trl_bbkd.preferencekd.trainer import PreferenceKDTrainer

from .helpers import by_text, make_trainer
from .on_processes import trained


@pytest.fixture(params=["full", "lora"])
def trainer_kwargs(request):
    return {} if request.param == "full" else {"peft_config": LoraConfig(**LORA)}


class RecordingTrainer(PreferenceKDTrainer):
    """Keeps the student and the reference as each round begins."""

    def _begin_round(self, number):
        begins = student_weights(self)
        super()._begin_round(number)
        self.__dict__.setdefault("records", {})[number] = (begins, reference_weights(self))


def test_the_reference_of_a_round_is_the_student_as_it_begins(tmp_path, tiny_model_dir, trainer_kwargs):
    trainer = make_trainer(tmp_path, tiny_model_dir, trainer_class=RecordingTrainer, trainer_kwargs=trainer_kwargs)
    start = student_weights(trainer)
    trainer.train()
    for number in (1, 2):
        begins, reference = trainer.records[number]
        assert_same_weights(reference, begins)
    for earlier, later in ((start, trainer.records[1][0]), (trainer.records[1][0], trainer.records[2][0])):
        assert any(not torch.equal(later[name], value) for name, value in earlier.items()), "nothing was learned"


def test_a_step_is_dpo_on_samples_with_the_nll_of_the_teachers_answers(tmp_path, tiny_model_dir):
    trainer = make_trainer(
        tmp_path, tiny_model_dir, num_rounds=1, warmup_epochs=0, per_device_train_batch_size=16, sft_weight=0.5
    )
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["teacher_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["teacher_ids"],
        }
        for row in trainer._teacher_rows
    ]
    nll = -torch.cat([label_log_probs(model, row) for row in rows]).mean().item()
    assert first["nll"] == pytest.approx(nll, rel=1e-5)
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * nll, rel=1e-5)


def test_the_warm_up_is_sft_on_the_teachers_answers(tmp_path, tiny_model_dir):
    trainer = make_trainer(tmp_path, tiny_model_dir, warmup_epochs=3.0, num_rounds=1, warmup_learning_rate=5e-3)
    trainer.train()
    warmup = [line for line in trainer.state.log_history if line["round"] == 0 and "loss" in line]
    rounds = [line for line in trainer.state.log_history if line["round"] == 1 and "loss" in line]
    assert [line["step"] for line in warmup + rounds] == list(range(1, 3 * 4 + 4 + 1))
    assert all(line["loss"] == pytest.approx(line["nll"], rel=1e-5) for line in warmup)
    assert warmup[-1]["nll"] < warmup[0]["nll"] and warmup[0]["learning_rate"] == 5e-3
    assert rounds[0]["learning_rate"] == 1e-3
    assert trainer.state.max_steps == trainer.state.global_step == 16
    nlls = [entry["nll"] for entry in trainer.rounds]
    assert len(nlls) == 2 and nlls[0] < 6.0


def test_what_is_left_on_disk(tmp_path, tiny_model_dir):
    rows = make_rows(20)
    trainer = make_trainer(tmp_path, tiny_model_dir, rows=rows, save_strategy="steps", save_steps=1)
    trainer.train()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("round-*/*")}
    tables = {f"round-{number}/{name}" for number in (1, 2) for name in ("candidates.parquet", "pairs.parquet")}
    assert left == tables | {f"round-{number}/round.json" for number in (0, 1, 2)} | {"round-2/student"}
    candidates = kept_table(tmp_path / "round-2/candidates.parquet")
    pairs = kept_table(tmp_path / "round-2/pairs.parquet")
    tokenizer = trainer.processing_class
    assert candidates["prompt"][:] == [row["prompt"] for row in rows[12:]]
    for row, pair in zip(candidates, pairs, strict=True):
        texts, scores = row["candidates"], row["scores"]
        assert texts == tokenizer.batch_decode(row["candidate_ids"], skip_special_tokens=True)
        assert scores == by_text([row["prompt"]] * 3, texts, None)
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        assert (pair["chosen"], pair["rejected"]) == (texts[best], texts[worst])
        assert (pair["chosen_score"], pair["rejected_score"]) == (scores[best], scores[worst])
        assert pair["chosen_ids"] == row["candidate_ids"][best] and pair["teacher"] == row["teacher"]
    (report,) = [report for report in trainer.round_reports if report["round"] == 2]
    assert (report["prompts"], report["samples"], report["pairs"]) == (8, 24, 8) and len(report["examples"]) == 3
    assert report["chosen_score"] > report["score"] > report["rejected_score"]


def test_the_teachers_answer_over_each_sample_of_the_student_before_its_warm_up(tmp_path, tiny_model_dir):
    rows = make_rows(14)
    rows[5] = rows[4] | {"completion": rows[5]["completion"]}  # two answers to a prompt
    config = {"judge": "teacher", "num_generations": 2, "num_rounds": 1, "rows": rows}
    batches = []

    class BatchRecorder(PreferenceKDTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            batches.append((set(inputs), self.loss_types))
            return super()._compute_loss(model, inputs, return_outputs)

    trainer = make_trainer(
        tmp_path / "base", tiny_model_dir, samples_from="base", trainer_class=BatchRecorder, **config
    )
    trainer.train()
    base = kept_table(tmp_path / "base/round-1/pairs.parquet")
    assert len(base) == 20 and base["chosen"][:4] == [rows[4]["completion"]] * 2 + [rows[5]["completion"]] * 2
    assert all(pair["chosen_ids"] == pair["teacher_ids"] for pair in base)
    assert "scores" not in kept_table(tmp_path / "base/round-1/candidates.parquet").column_names
    # TRL's own NLL, of the preferred answer: no forward pass more
    assert batches[-1] == ({"input_ids", "attention_mask", "completion_mask"}, ["sigmoid", "sft"])
    make_trainer(tmp_path / "cold", tiny_model_dir, warmup_epochs=0, **config).train()
    make_trainer(tmp_path / "warm", tiny_model_dir, warmup_learning_rate=0.05, **config).train()
    cold, warm = (kept_table(tmp_path / name / "round-1/pairs.parquet")["rejected"][:] for name in ("cold", "warm"))
    assert base["rejected"][:] == cold != warm


def test_overlap_is_that_with_any_answer_to_the_prompt(tmp_path, tiny_model_dir):
    rows = make_rows(12)
    rows[11] = rows[4] | {"completion": rows[11]["completion"]}  # in the other round
    trainer = make_trainer(tmp_path, tiny_model_dir, rows=rows, judge="overlap")
    (row,) = trainer._judged_rows(trainer._shard(1).select([0]), [[[1], [2]]])
    assert row.references == [rows[4]["completion"], rows[11]["completion"]]
    (other,) = trainer._judged_rows(trainer._shard(2).select([3]), [[[1], [2]]])
    assert other.references == [rows[11]["completion"], rows[4]["completion"]]


KILLED = {"num_rounds": 1, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2.0, "warmup_epochs": 1.0}


def is_in_round_1(trainer, *args, **kwargs):
    return len(trainer.rounds) == 1


MOMENTS = {
    "warm-up": Moment("trl_bbkd.preferencekd.trainer.PreferenceKDTrainer.training_step", call=3),
    "sampling": Moment("trl_bbkd.preference.sampling._write", call=2, after=True),
    "judging": Moment("trl_bbkd.preferencekd.rounds.write_atomically", call=2, after=True),
    "pairs": Moment("trl_bbkd.preferencekd.judged_rounds.keep_table", after=True),
    "DPO": Moment("trl_bbkd.preferencekd.trainer.PreferenceKDTrainer.training_step", call=3, counts=is_in_round_1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, tiny_model_dir, calls=folder / "calls", **KILLED).train()
    return folder


@pytest.mark.parametrize("when", slow_but(MOMENTS, "judging", "DPO"))
def test_killed_it_ends_as_if_it_had_not_been_and_repeats_nothing(when, whole, tmp_path, tiny_model_dir, monkeypatch):
    arguments = {"calls": tmp_path / "calls", **KILLED}
    killed_at(MOMENTS[when], train, make_trainer, tmp_path, tiny_model_dir, **arguments)
    resumed = make_trainer(tmp_path, tiny_model_dir, **arguments)
    sampled, original = [], ModelSampler.__call__

    def sample(sampler, rows, seed):
        sampled.append(seed)
        return original(sampler, rows, seed)

    monkeypatch.setattr(ModelSampler, "__call__", sample)
    resumed.train()
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # 16 rows of 3 samples, in files of 12
    assert len(sampled) == {"warm-up": 4, "sampling": 2}.get(when, 0)
    assert (tmp_path / "calls").read_text() == (whole / "calls").read_text(), "a sample was judged twice"
    if when in ("warm-up", "DPO"):
        steps = [line["step"] for line in resumed.state.log_history if "loss" in line]
        assert steps == list(range(1, 13))


def test_a_finished_run_is_not_run_again_and_another_is_refused(whole, tiny_model_dir, monkeypatch):
    saved, calls = (whole / "model.safetensors").read_bytes(), (whole / "calls").read_text()
    again = make_trainer(whole, tiny_model_dir, calls=whole / "calls", **KILLED)
    assert again.check_output_dir() == str(whole / "preference.json")
    assert again.train().global_step == 12
    assert (whole / "model.safetensors").read_bytes() == saved and (whole / "calls").read_text() == calls
    assert_same_weights(weights(again._unwrapped()), weights(AutoModelForCausalLM.from_pretrained(whole)))
    with pytest.raises(ValueError, match=r"holds another preference \(num_generations: 3 there, 4 here\)"):
        make_trainer(whole, tiny_model_dir, **KILLED | {"num_generations": 4}).train()


def test_two_processes_or_another_division_of_the_batch_train_alike(tmp_path, tiny_model_dir):
    (one,) = on_processes(1, trained, tiny_model_dir, tmp_path / "one", 4, 1)
    (parts,) = on_processes(1, trained, tiny_model_dir, tmp_path / "parts", 2, 2)
    two = on_processes(2, trained, tiny_model_dir, tmp_path / "two", 2, 1)
    assert_same_weights(two[0]["student"], two[1]["student"])
    for other in (parts, two[0]):
        assert other["candidates"] == one["candidates"] and other["scores"] == one["scores"]
        for name, value in one["student"].items():
            torch.testing.assert_close(other["student"][name], value, rtol=1e-4, atol=1e-6)


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"num_generations": 1}, "num_generations=1 leaves judge='overlap' no two samples"),
            ({"samples_from": "base"}, "samples_from='base' needs judge='teacher'"),
            ({"preference_weight": 0.0}, "preference_weight=0.0 leaves SFT alone"),
            ({"pair_margin": -0.1}, "pair_margin must be at least 0"),
            ({"pair_max_length_ratio": 0.5}, "pair_max_length_ratio must be at least 1"),
            ({"warmup_epochs": -1.0}, "warmup_epochs must be at least 0"),
            ({"load_best_model_at_end": True, "save_strategy": "steps"}, "the student of the last round is kept"),
            ({"hub_always_push": True}, "goes to the Hub when all rounds are done"),
            ({"loss_type": "ipo"}, "Set preference_weight and sft_weight"),
        ],
    )
    def test_settings(self, tmp_path, tiny_model_dir, config, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tiny_model_dir, **{"judge": "overlap"} | config)

    def test_a_judge_that_cannot_be_called(self, tmp_path, tiny_model_dir):
        with pytest.raises(TypeError, match="judge is 0.5, which cannot be called"):
            make_trainer(tmp_path, tiny_model_dir, judge="overlap", trainer_kwargs={"judge": 0.5})

    def test_a_round_without_pairs(self, tmp_path, tiny_model_dir):
        trainer = make_trainer(tmp_path, tiny_model_dir, warmup_epochs=0, pair_margin=1.0)
        with pytest.raises(ValueError, match=r"Round 1 has no pair: .* judge='by_text\(\)'"):
            trainer.train()


def test_pairs_are_printed(tmp_path, tiny_model_dir, capsys):
    trainer = make_trainer(
        tmp_path, tiny_model_dir, num_rounds=1, warmup_epochs=0, log_completions=True, num_completions_to_print=2
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("reject", "teach", "chosen"))


def test_conversational_rows(tmp_path, tiny_model_dir, conversational_rows):
    rows = [dict(row) for row in conversational_rows[:8]]
    trainer = make_trainer(tmp_path, tiny_model_dir, rows=rows, held_out=2, num_rounds=1)
    trainer.train()
    pair = kept_table(tmp_path / "round-1/pairs.parquet")[0]
    assert pair["prompt"][-1]["role"] == "user" and isinstance(pair["chosen"], str)


@pytest.mark.parametrize("judge", ["self", "path"])
def test_models_compare(tmp_path, tiny_model_dir, other_model_dir, judge, monkeypatch):
    """The student as the round begins, or another model: what they are asked is tested in `test_comparing.py`."""
    judged_by, original = [], ComparingJudge.__call__

    def judge_rows(self, rows):
        judged_by.append(weights(self.model))
        return original(self, rows)

    monkeypatch.setattr(ComparingJudge, "__call__", judge_rows)
    name = other_model_dir if judge == "path" else judge
    trainer = make_trainer(tmp_path, tiny_model_dir, judge=name, num_rounds=1, trainer_class=RecordingTrainer)
    trainer.train()
    expected = (
        trainer.records[1][0] if judge == "self" else weights(AutoModelForCausalLM.from_pretrained(other_model_dir))
    )
    assert_same_weights(judged_by[0], expected)
    for scores in kept_table(tmp_path / "round-1/candidates.parquet")["scores"]:
        assert sum(scores) == pytest.approx(1.5) and all(0 <= score <= 1 for score in scores)


def test_random_numbers_of_a_round_are_the_same_whether_its_pairs_were_there_or_not(tmp_path, tiny_model_dir):
    states = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, tiny_model_dir, warmup_epochs=0)
        trainer._begin_round(1)
        states.append(torch.get_rng_state())
    assert (tmp_path / "round-1/pairs.parquet").is_file() and torch.equal(*states)


def test_vllm_samples_each_prompt_so_many_times(tmp_path, tiny_model_dir, monkeypatch):
    """vLLM is not there: what stands in for its sampler is tested against it in `tests/proxykd/test_alignment.py`."""
    asked = []

    class Sampler:
        def __init__(self, path, tokenizer, **settings):
            self.tokenizer = tokenizer
            asked.append({**settings, "weights": weights(AutoModelForCausalLM.from_pretrained(path)), "prompts": []})

        def __call__(self, rows, seed):
            asked[-1]["prompts"] += [row["prompt"] for row in rows]
            ids = [[5 + (seed + number) % 7, 6] for number in range(len(rows))]
            return ids, self.tokenizer.batch_decode(ids)

    monkeypatch.setattr("trl_bbkd.preference.trainer.VLLMSampler", Sampler)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__spec__=ModuleSpec("vllm", None)))
    trainer = make_trainer(tmp_path, tiny_model_dir, num_rounds=1, use_vllm=True, trainer_class=RecordingTrainer)
    trainer.train()
    (call,) = asked
    assert_same_weights(call["weights"], trainer.records[1][0])
    assert call["prompts"] == [row["prompt"] for row in make_rows(20)[4:] for _ in range(3)]
    assert (call["temperature"], call["top_p"], call["max_new_tokens"]) == (1.0, 1.0, 16)
