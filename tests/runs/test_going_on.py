"""A run that was killed after its training goes on with what is missing, and takes no step more."""

import json
import os

import pytest

from tests.processes import killed_at
from tests.recipes import RESUME, never, run_recipe, saved, without_times, write_recipe
from trl_bbkd.errors import RecipeError
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.runs import text_job
from trl_bbkd.runs.progress import PROGRESS_NAME, TRAINED, Progress, can_go_on
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.runs.text_job import TextJob


@pytest.fixture
def gad_recipe(tmp_path, recipe_folder, tiny_model_dir):
    def write(name="out", **changes):
        changes = {"max_steps": 4, "save_strategy": "no", **changes}
        return write_recipe(recipe_folder, tiny_model_dir, tmp_path / name, **changes)

    return write


def test_a_run_killed_in_the_baseline(tmp_path, gad_recipe, monkeypatch):
    whole, killed = (gad_recipe(name, save_strategy="steps", save_steps=2) for name in ("whole", "out"))
    run(load_recipe(whole))
    killed_at("trl_bbkd.runs.text_job.train_seqkd", run_recipe, killed)
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(GADTrainer, "train", never)
    for _ in range(2):
        run(load_recipe(killed, RESUME))
        assert (tmp_path / "out/model.safetensors").read_bytes() == weights
        assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 4
        assert without_times(saved(tmp_path / "out")) == without_times(saved(tmp_path / "whole"))
        assert "How good it is" in (tmp_path / "out/README.md").read_text()
        # The second time nothing is left to do
        monkeypatch.setattr(text_job, "train_seqkd", never)
        monkeypatch.setattr(text_job, "evaluate_student", never)


@pytest.mark.parametrize("part", ["GAD", "SeqKD"])
def test_a_run_interrupted_while_it_measures_goes_on_without_checkpoints(tmp_path, gad_recipe, monkeypatch, part):
    recipe, measured = gad_recipe(), TextJob._measured

    def interrupted(job, name, model):
        if name == part:
            raise KeyboardInterrupt
        return measured(job, name, model)

    monkeypatch.setattr(TextJob, "_measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe))
    monkeypatch.setattr(TextJob, "_measured", measured)
    monkeypatch.setattr(GADTrainer, "train", never)
    if part == "SeqKD":
        monkeypatch.setattr(text_job, "train_seqkd", never)
    assert can_go_on(str(tmp_path / "out"))
    run(load_recipe(recipe, RESUME))
    results = saved(tmp_path / "out")["results"]
    assert set(results) == {"undistilled", "SeqKD", "GAD", "teacher"}
    assert results["GAD"]["teacher_nll"] < results["undistilled"]["teacher_nll"]


class TestNothingOfAnotherRunIsTakenOver:
    @pytest.fixture
    def finished(self, gad_recipe, recipe_folder):
        recipe = gad_recipe(seqkd_baseline=False)
        run(load_recipe(recipe))
        return recipe

    def test_other_settings(self, finished):
        with pytest.raises(RecipeError, match="There is no finished checkpoint in"):
            run(load_recipe(finished, [*RESUME, "--learning_rate", "1e-2"]))

    def test_another_student_on_disk(self, finished, tmp_path):
        weights = tmp_path / "out/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(RecipeError, match="There is no finished checkpoint in"):
            run(load_recipe(finished, RESUME))

    def test_a_new_run(self, finished, tmp_path):
        before = json.loads((tmp_path / "out" / PROGRESS_NAME).read_text())["parts"]
        run(load_recipe(finished))
        after = json.loads((tmp_path / "out" / PROGRESS_NAME).read_text())["parts"]
        assert after[TRAINED]["seconds"] != before[TRAINED]["seconds"]

    def test_where_it_is_pushed_and_logged_is_no_other_setting(self, finished, monkeypatch):
        monkeypatch.setattr(GADTrainer, "train", never)
        run(load_recipe(finished, [*RESUME, "--logging_steps", "3", "--disable_tqdm", "false"]))


class TestProgress:
    def test_parts_come_back(self, tmp_path):
        progress = Progress(str(tmp_path), {"a": 1})
        assert progress.once("x", lambda: {"y": (1, 2)}) == {"y": [1, 2]} and "x" in progress
        assert Progress(str(tmp_path), {"a": 1}).once("x", never) == {"y": [1, 2]}
        assert "x" not in Progress(str(tmp_path), {"a": 2})
        assert "x" not in Progress(str(tmp_path), {"a": 1}, is_new=True)
        assert "x" not in Progress(str(tmp_path), {"a": 1})

    def test_only_some_are_kept(self, tmp_path):
        progress = Progress(str(tmp_path), {})
        progress.finish("x", 1), progress.finish("y", 2)
        progress.keep_only("y")
        assert Progress(str(tmp_path), {}).parts == {"y": 2}

    def test_it_is_written_whole(self, tmp_path, monkeypatch):
        progress = Progress(str(tmp_path), {})
        progress.finish("x", 1)

        def killed(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            progress.finish("y", 2)
        assert Progress(str(tmp_path), {}).parts == {"x": 1}
