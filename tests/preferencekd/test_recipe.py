"""A recipe of PreferenceKD, to its report and card."""

import json

from tests.recipes import run_recipe, write_recipe
from trl_bbkd.preferencekd.trainer import PreferenceKDTrainer
from trl_bbkd.runs.recipe import load_recipe


JUDGE = """
def score(prompts, candidates, teacher_answers):
    assert len(prompts) == len(candidates) == len(teacher_answers)
    return [float(len(text)) + number / 1000 for number, text in enumerate(candidates)]
"""
SETTINGS = {
    "method": "preferencekd",
    "num_train_epochs": 1,
    "num_rounds": 2,
    "num_generations": 3,
    "discriminator_learning_rate": None,
    "warmup_learning_rate": 1e-3,
    "eval_prompts": 4,
    "eval_samples": 1,
    "judge": "judge_of_samples.py:score",
}


def test_report_card_samples_and_going_on(recipe_folder, tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "judge_of_samples.py").write_text(JUDGE)
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **SETTINGS)
    # Beside the recipe, from wherever it is started
    assert load_recipe(recipe).training_args.judge == f"{tmp_path / 'judge_of_samples.py'}:score"
    run_recipe(recipe)
    report = (tmp_path / "out/report.md").read_text()
    assert "## Rounds" in report and "## Pairs to read" in report and "* prompt: `" in report
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2] and {"SeqKD", "PreferenceKD"} <= {
        *metrics["results"]
    }
    steps = [line["step"] for line in metrics["log_history"] if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and metrics["warmup_steps"] == steps[-1] / 2
    assert metrics["seqkd"]["steps"] == steps[-1]
    assert (tmp_path / "out/curves.png").is_file() and "judge_of_samples.py" in (
        tmp_path / "out/README.md"
    ).read_text()
    # The same again takes no step, and asks no judge
    monkeypatch.setattr(PreferenceKDTrainer, "training_step", None)
    (tmp_path / "judge_of_samples.py").write_text("def score(*asked):\n    raise RuntimeError\n")
    run_recipe(recipe)
