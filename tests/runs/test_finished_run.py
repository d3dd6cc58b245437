"""A finished run that is resumed changes nothing; one that was killed while it measured or compared ends as if it had not been."""

import json

import pytest

from tests.llkd.test_classifier_run import data as classifier_data  # noqa: F401
from tests.llkd.test_classifier_run import student as classifier  # noqa: F401
from tests.llkd.test_classifier_run import write_recipe as write_classifier_recipe
from tests.processes import Moment, killed_at
from tests.recipes import RESUME, never, run_recipe, saved, without_times, write_recipe
from trl_bbkd.runs.methods import METHODS, load_class
from trl_bbkd.runs.progress import PROGRESS_NAME
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


JUDGE = "def score(prompts, candidates, teacher_answers):\n    return [float(len(text)) for text in candidates]\n"
OF_A_DISCRIMINATOR = dict.fromkeys(["num_generations", "discriminator_learning_rate"])
OF_METHODS = {
    "gad": {},
    "proxykd": OF_A_DISCRIMINATOR | {"alignment_rounds": 1},
    "bayeskd": OF_A_DISCRIMINATOR,
    "preferencekd": {
        "discriminator_learning_rate": None,
        "num_train_epochs": 1,
        "num_rounds": 1,
        "judge": "score.py:score",
    },
}
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_prompts": 2, "eval_samples": 1}
IN_DEFAULT_RUN = ("gad",)


@pytest.fixture
def write(tmp_path, recipe_folder, tiny_model_dir, other_model_dir, classifier_data, classifier):  # noqa: F811
    def write_one(method):
        if method == "llkd":
            settings = {key: value for key, value in SAVED.items() if not key.startswith("eval")}
            return write_classifier_recipe(classifier_data, classifier, tmp_path / "out", **settings)
        (tmp_path / "score.py").write_text(JUDGE)
        settings = {**SAVED, "method": method, **OF_METHODS[method], "seqkd_baseline": method == "gad"}
        if "kd" in method and method != "preferencekd":
            settings["proxy_model"] = other_model_dir
        if method == "preferencekd":
            del settings["max_steps"]
        return write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **settings)

    return write_one


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".in_use"
    }


@pytest.mark.parametrize(
    "method", [name if name in IN_DEFAULT_RUN else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path, write, method, monkeypatch):
    recipe = write(method)
    run(load_recipe(recipe))
    before = files(tmp_path / "out")
    steps = json.loads(before["trainer_state.json"])["global_step"]
    assert steps >= 2 and any(f"checkpoint-{steps}/" in name or "round-" in name for name in before)
    run(load_recipe(recipe, RESUME))
    after = files(tmp_path / "out")
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []

    # Nor does it by its checkpoints alone
    (tmp_path / "out" / PROGRESS_NAME).unlink()
    run(load_recipe(recipe, RESUME))
    after = files(tmp_path / "out")
    assert after["model.safetensors"] == before["model.safetensors"]
    assert json.loads(after["trainer_state.json"])["global_step"] == steps
    assert {name for name in after if name.startswith("checkpoint-")} == {
        name for name in before if name.startswith("checkpoint-")
    }
    assert json.loads(after["metrics.json"])["results"].keys() == json.loads(before["metrics.json"])["results"].keys()


# What a run calls after its training: three temperatures of GAD's student, SeqKD's two steps with a brief measurement after each
# and the same three. Before come those of the undistilled student, and one along the way
MOMENTS = {
    "evaluation": Moment("trl_bbkd.evaluation.student.generate_completion_ids", call=6),
    "the baseline's step": Moment("trl.trainer.sft_trainer.SFTTrainer.training_step", call=2),
    "the baseline's curve": Moment("trl_bbkd.evaluation.student.generate_completion_ids", call=9),
    "the baseline's evaluation": Moment("trl_bbkd.evaluation.student.teacher_nll_by_row", call=6),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe_folder, tiny_model_dir):
    folder = tmp_path_factory.mktemp("whole")
    run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, folder / "out", **SAVED)))
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("part", MOMENTS)
def test_a_run_killed_after_its_training_ends_with_the_same_student_and_table(
    tmp_path, recipe_folder, tiny_model_dir, whole, monkeypatch, part
):
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **SAVED)
    killed_at(MOMENTS[part], run_recipe, recipe)
    trained = (tmp_path / "out/model.safetensors").read_bytes()
    measured = json.loads((tmp_path / "out" / PROGRESS_NAME).read_text())["parts"]
    assert ("GAD" in measured, "SeqKD's training" in measured) == (
        part != "evaluation",
        part == "the baseline's evaluation",
    )
    monkeypatch.setattr(load_class("trl_bbkd.gad.trainer:GADTrainer"), "training_step", never)
    run(load_recipe(recipe, RESUME))
    for name in ("model.safetensors", "seqkd/model.safetensors", "held_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name
    assert (tmp_path / "out/model.safetensors").read_bytes() == trained
    assert without_times(saved(tmp_path / "out")) == without_times(saved(whole))
    tables = [
        [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")]
        for folder in (tmp_path / "out", whole)
    ]
    assert tables[0] == tables[1] and any("blue, T=1.0" in line for line in tables[0])
