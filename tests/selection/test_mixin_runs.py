import json
import math
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file

from tests.gad.helpers import weights
from tests.processes import Moment, killed_at, on_processes, train
from tests.proxykd.helpers import LORA, make_rows
from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.selection.mixin import SELECTION_FILE, LLKDMixin
from trl_bbkd.selection.thresholds import BUDGETED, RULES

from .helpers import (
    RESUMED,
    RUNS,
    Recorder,
    assert_same_gradient,
    assert_same_state,
    log,
    make_bayes_trainer,
    make_sft_trainer,
    mean,
    run_scenario,
    run_scenarios,
    selection_rows,
    state,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_model_dir, targets):
    """Each scenario on two processes: results of both."""
    return on_processes(2, run_scenarios, tmp_path_factory.mktemp("two"), tiny_model_dir, targets)


class TestTwoProcesses:
    @pytest.mark.parametrize("run", RUNS, ids=str)
    def test_they_agree(self, ranks, run):
        """Thresholds, rows used and students, to the last bit."""
        first, second = (rank[run] for rank in ranks)
        assert_same_state(first["state"], second["state"])
        assert len(first["gradients"]) == len(second["gradients"]) == 3
        for gradients in zip(first["gradients"], second["gradients"], strict=True):
            assert_same_state(*gradients)

    @pytest.mark.parametrize("run", [run for run in RUNS if run[2] == 48], ids=str)
    def test_they_do_what_one_process_does(self, ranks, run, tmp_path, tiny_model_dir, targets):
        """With the same global batch: rows and weights, thresholds, gradients, loss."""
        kind, scenario, count = run
        one = run_scenario(scenario, kind, tmp_path, tiny_model_dir, targets, 4, count)
        for number, batch in enumerate(one["batches"]):
            parts = [rank[run]["batches"][number] for rank in ranks]
            assert parts[0].keys().isdisjoint(parts[1])
            assert parts[0] | parts[1] == pytest.approx(batch, rel=1e-4)
        found = ranks[0][run]
        assert torch.equal(found["state"]["tally.used"], one["state"]["tally.used"])
        assert_same_state(found["state"], one["state"], atol=1e-6, rtol=1e-4)
        for gradient, expected in zip(found["gradients"], one["gradients"], strict=True):
            assert_same_gradient(gradient, expected)
        for entry, expected in zip(found["log"], one["log"], strict=True):
            selected = [name for name in expected if name.startswith("selection/")] + ["loss"]
            assert {name: entry[name] for name in selected} == pytest.approx(
                {name: expected[name] for name in selected}, rel=1e-4, abs=1e-6
            )

    @pytest.mark.parametrize("kind", ["sft", "bayeskd", "lora"])
    def test_of_one_nothing_was_kept(self, ranks, kind):
        """What the scenario above is named after."""
        first, second = (rank[kind, "nothing on one process", 48] for rank in ranks)
        assert all(len(batch) == 4 for batch in first["batches"]) and not any(second["batches"])

    @pytest.mark.parametrize("kind", ["sft", "bayeskd"])
    def test_where_nothing_is_kept_at_all_the_loss_is_zero(self, ranks, kind):
        for rank in ranks:
            found = rank[kind, "nothing in step 2", 48]
            assert [bool(batch) for batch in found["batches"]] == [True, True, False, False, True, True]
            first, second, third = found["log"]
            assert second["loss"] == 0.0 and second["grad_norm"] == 0.0
            assert second["selection/kept_share"] == 0.0
            assert first["loss"] > 0 and third["loss"] > 0
            assert not any(gradient.any() for gradient in found["gradients"][1].values())
            assert all(value.isfinite().all() for name, value in found["state"].items() if "." in name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_dir, targets):
    """Runs of 6 steps of two micro-batches, three a pass, with a checkpoint at each: the trainer, by kind."""
    folder = tmp_path_factory.mktemp("resume")
    found = {
        "sft": make_sft_trainer(folder / "sft", tiny_model_dir, **RESUMED),
        "bayeskd": make_bayes_trainer(folder / "bayeskd", tiny_model_dir, targets, **RESUMED),
    }
    for trainer in found.values():
        trainer.train()
    return found


def is_at_step_3(trainer, *args, **kwargs):
    return trainer.state.global_step == 3


class TestResume:
    @pytest.mark.parametrize("step", [1, 2, 3, 5])
    def test_from_any_checkpoint_it_ends_as_if_it_had_not_stopped(self, make, tmp_path, uninterrupted, step):
        whole = uninterrupted[make.kind]
        shutil.copytree(f"{whole.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        resumed = make(tmp_path, **RESUMED)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed._initial_global_step == step
        assert_same_state(state(resumed), state(whole))
        assert {entry["step"]: entry["loss"] for entry in log(resumed)} == pytest.approx(
            {entry["step"]: entry["loss"] for entry in log(whole)}, abs=0
        )

    def test_the_state_has_moved_since_each_checkpoint(self, make, uninterrupted):
        """Otherwise the test above would say nothing."""
        whole = uninterrupted[make.kind]
        states = [load_file(f"{whole.args.output_dir}/checkpoint-{step}/{SELECTION_FILE}") for step in range(1, 7)]
        assert [len(each["history"]) for each in states] == [12, 16, 28, 32, 44, 48]
        assert 0 < states[0]["tally.used"].sum() <= states[-1]["tally.used"].sum()
        assert len({each["score_threshold"].item() for each in states}) > 3
        assert [each["step"].item() for each in states] == [1, 2, 3, 4, 5, 6]

    def test_killed_in_a_step_it_goes_on_from_the_last_checkpoint(
        self, tmp_path, uninterrupted, tiny_model_dir, targets
    ):
        """In the fourth step, when its rows are selected and before its weights move."""
        fourth_step = Moment("trl_bbkd.bayeskd.trainer.BayesKDTrainer.training_step", counts=is_at_step_3, after=True)
        killed_at(fourth_step, train, make_bayes_trainer, tmp_path, tiny_model_dir, targets, **RESUMED)
        resumed = make_bayes_trainer(tmp_path, tiny_model_dir, targets, **RESUMED)
        resumed.train()
        assert resumed._initial_global_step == 3
        assert_same_state(state(resumed), state(uninterrupted["bayeskd"]))

    @pytest.mark.parametrize("config", [{"selection_rule": "global", "selection_budget": None}, {"pool_factor": 2}])
    def test_with_other_settings_bayeskd_refuses(self, tmp_path, uninterrupted, tiny_model_dir, targets, config):
        checkpoint = f"{uninterrupted['bayeskd'].args.output_dir}/checkpoint-2"
        other = make_bayes_trainer(tmp_path, tiny_model_dir, targets, **RESUMED | config)
        with pytest.raises(ValueError, match=f"belongs to another run .*{next(iter(config))}"):
            other.train(resume_from_checkpoint=checkpoint)


class TestRun:
    def test_evaluation_changes_nothing_and_needs_no_confidence(self, make, tmp_path, tiny_model_dir):
        """Held-out rows have none of the columns."""
        plain = make(tmp_path / "plain", max_steps=4)
        plain.train()
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "per_device_eval_batch_size": 4}
        trainer = make(tmp_path / "run", eval_rows=make_rows(24)[16:], **evaluation)
        trainer.train()
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(evaluated) == 4 and all(math.isfinite(entry["eval_loss"]) for entry in evaluated)
        assert not any("selection/" in name for entry in evaluated for name in entry)
        before = state(trainer)
        assert_same_state(before, state(plain))
        trainer.evaluate()
        assert_same_state(state(trainer), before)
        for entry, expected in zip(log(trainer), log(plain), strict=True):
            selected = {name for name in expected if name.startswith("selection/")}
            assert selected and {name: entry[name] for name in selected} == {name: expected[name] for name in selected}

    @pytest.mark.parametrize("rule", RULES)
    def test_lora_student_under_every_rule(self, make, tmp_path, rule):
        lora = {"trainer_kwargs": {"peft_config": LoraConfig(**LORA, lora_dropout=0.2)}}
        budget = 0.5 if rule in BUDGETED else None
        settings = {"selection_rule": rule, "selection_budget": budget, "num_train_epochs": 3}
        trainer = make(tmp_path, **settings, **lora)
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.model)
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name for name in changed)
        assert all(0 < entry["selection/kept_share"] < 1 for entry in log(trainer))
        assert all(math.isfinite(value) for entry in log(trainer) for value in entry.values())

    def test_what_is_logged_is_what_was_learned_from(self, make, tmp_path):
        """Each step on its own, of all rows and by group."""
        recorder, rows = Recorder(), selection_rows(32)
        trainer = make(tmp_path, rows, recorder=recorder, num_train_epochs=3)
        trainer.train()
        names = [tuple(ids) for ids in trainer.train_dataset["input_ids"]]
        used = set()
        entries = log(trainer)
        assert len(entries) == 6
        for number, entry in enumerate(entries):
            kept = {names.index(row) for batch in recorder.batches[2 * number : 2 * number + 2] for row in batch}
            used |= kept
            assert entry["selection/kept_share"] == len(kept) / 16
            assert entry["selection/distinct_rows"] == len(used)
            confidences = [rows[row]["teacher_confidence"] for row in kept]
            assert entry["selection/confidence_kept"] == pytest.approx(mean(confidences), rel=1e-6)
            assert entry["selection/confidence_dropped"] < entry["selection/confidence_kept"]
            assert entry["selection/uncertainty_dropped"] < entry["selection/uncertainty_kept"]
            for group in range(3):
                assert 0 < entry[f"selection/threshold_teacher_{group}"] < 1
                assert 0 < entry[f"selection/threshold_student_{group}"] < 1
        assert used == set(trainer.tally.used.nonzero().flatten().tolist())
        for first, second in zip(entries[::2], entries[1::2], strict=True):
            # A pass over the rows: all of a group were in one of the two pools
            for group in range(3):
                assert f"selection/kept_share_{group}" in first | second
        last = trainer.selector.thresholds()
        assert entries[-1]["selection/threshold_teacher_1"] == last.teacher[1].item()

    def test_of_several_steps_the_log_has_the_mean_share_and_all_distinct_rows(self, make, tmp_path):
        settings = {"num_train_epochs": 4}
        each, together = make(tmp_path / "a", **settings), make(tmp_path / "b", logging_steps=4, **settings)
        for trainer in (each, together):
            trainer.train()
        (entry,) = log(together)
        assert entry["selection/kept_share"] == pytest.approx(
            mean([step["selection/kept_share"] for step in log(each)])
        )
        assert entry["selection/distinct_rows"] == int(together.tally.used.sum())


def write_recipe(folder, method, student, proxy, **changes):
    values = {
        "method": method,
        "model_name_or_path": student,
        "proxy_model": proxy,
        "dataset_name": str(folder / "data"),
        "teacher_name": "a test",
        "output_dir": str(folder / "out"),
        "seqkd_baseline": False,
        "selection": "llkd",
        "selection_warmup_steps": 0,
        "pool_factor": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("method", ["bayeskd", "proxykd"])
class TestRecipe:
    def test_it_names_the_selection_and_its_settings(self, tmp_path, method):
        settings = {"selection_rule": "quantile", "selection_budget": 0.25, "selection_weighting": "sum"}
        path = write_recipe(tmp_path, method, "student", "proxy", **settings)
        found = load_recipe(path, ["--selection_momentum", "0.9", "--selection_use_student", "false"]).training_args
        assert (found.selection, found.pool_factor, found.selection_momentum) == ("llkd", 2, 0.9)
        assert {name: getattr(found, name) for name in settings} == settings
        assert found.selection_use_teacher is True and found.selection_use_student is False

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"selection": "lkd"}, "selection.*none, llkd"),
            ({"selection_rule": "median"}, "selection_rule.*class_mean"),
            ({"selection_budget": 0.5}, "selection_budget"),
            ({"selection_momentum": 1.0}, "selection_momentum"),
            ({"pool_factor": 0}, "pool_factor"),
        ],
        ids=str,
    )
    def test_a_bad_value_is_an_error_of_the_recipe(self, tmp_path, method, config, message):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write_recipe(tmp_path, method, "student", "proxy", **config))

    def test_confidence_and_group_reach_the_trainer_with_their_rows(
        self, tmp_path, tiny_model_dir, other_model_dir, tokenizer, method, monkeypatch
    ):
        """Proxy-KD divides the rows between its stages, and a row whose prompt is too long is dropped."""
        rows, trained = selection_rows(28), []
        rows[3]["prompt"] = " ".join([rows[3]["prompt"]] * 20)
        (tmp_path / "data").mkdir()
        for split, part in (("train", rows[:24]), ("test", make_rows(28)[24:])):
            (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        draw = LLKDMixin.get_batch_samples
        monkeypatch.setattr(
            LLKDMixin, "get_batch_samples", lambda self, *args: (trained.append(self), draw(self, *args))[1]
        )
        own = {
            "bayeskd": {"stages": ["estimate", "distil"]},
            "proxykd": {"stages": ["cache", "distil"], "warmup_share": 0.2, "alignment_share": 0.0},
        }
        changes = {"max_prompt_length": 120} | own[method]
        run(load_recipe(write_recipe(tmp_path, method, tiny_model_dir, other_model_dir, **changes)))
        dataset = trained[-1].train_dataset
        numbers = [int(tokenizer.decode(row["input_ids"]).split()[0]) for row in dataset]
        assert 3 not in numbers and len(set(numbers)) == len(numbers) == (23 if method == "bayeskd" else 18)
        for name in ("teacher_confidence", "group"):
            assert dataset[name][:] == [rows[number][name] for number in numbers]
        history = json.loads((tmp_path / "out/metrics.json").read_text())["log_history"]
        entries = [entry for entry in history if "selection/kept_share" in entry]
        assert len(entries) == 2 and all(0 < entry["selection/kept_share"] < 1 for entry in entries)
