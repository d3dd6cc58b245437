"""`eval_judge` of a recipe: what is refused before weights are loaded, a run that is judged, and the same run again."""

import json

import pytest
import transformers

from tests.collect.server import KEY, MODEL
from tests.judging.helpers import judging
from tests.recipes import RESUME, write_recipe
from trl_bbkd.errors import DistillationError, RecipeError
from trl_bbkd.judging.reading import read_eval_judge
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
BRIEF = {"eval_prompts": 2, "eval_samples": 1, "eval_temperatures": [1.0], "seqkd_baseline": False}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_win_rate"}
PREFERENCES = dict.fromkeys(["num_generations", "discriminator_learning_rate"]) | {"method": "preferencekd"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def prefers_long_answers(is_points, request, first, second):
    return f"Verdict: {'tie' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}"


def test_a_run_is_judged(tmp_path, recipe_folder, tiny_model_dir, capsys):
    """At its evaluations and in its report, and once: neither a repetition nor a resumed run asks anything."""
    with judging(prefers_long_answers) as server:
        judge = {"model": MODEL, "base_url": server.url, "max_requests": 500}
        settings = {**EVALUATED, **BRIEF, **BEST, "learning_rate": 1e-2, "eval_judge": judge}
        recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **settings)
        run(load_recipe(recipe))
        asked = server.requests
        printed = capsys.readouterr().out
        report = (tmp_path / "out/report.md").read_text()
        run(load_recipe(recipe, RESUME))
        assert server.requests == asked and (tmp_path / "out/report.md").read_text() == report
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    log = {line["step"]: line["eval_win_rate"] for line in metrics["log_history"] if "eval_win_rate" in line}
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert log.keys() == {1, 2} and state["best_metric"] == max(log.values())
    assert (
        f"requests to {MODEL} at each of 2 evaluations" in printed and "for the report, at most 8 requests" in printed
    )
    # By hand, from the answers that the run has kept
    lines = [json.loads(line) for line in (tmp_path / "out/held_out.jsonl").read_text().splitlines()]
    for student, found in metrics["verdicts_of_judge"]["students"].items():
        longer = [(line["students"][student]["samples"]["t1.0"][0], line["teacher"][0]) for line in lines]
        wins = [1.0 if len(own) > len(theirs) else 0.5 if len(own) == len(theirs) else 0.0 for own, theirs in longer]
        assert found["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins)), student
    assert set(metrics["verdicts_of_judge"]["students"]) == {"undistilled", "GAD"}
    assert "## Judged beside the teacher" in report and f"By `{MODEL}`, of 2 prompts" in report
    kept = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(kept) > 20 and not any(KEY.encode() in content for content in kept)


REFUSED = {
    "a typo": ({"metrik": "score"}, {}, "line {}: eval_judge.metrik: unknown key 'metrik'; did you mean 'metrics'?"),
    "a name elsewhere": ({"prompts": 3}, {}, "eval_judge.prompts: unknown key 'prompts'; did you mean 'max_prompts'?"),
    "a metric": (
        {"metrics": ["bleu"]},
        {},
        "line {}: eval_judge.metrics: 'bleu' is none of win_rate, lc_win_rate, score.",
    ),
    "a key": ({"api_key": KEY}, {}, "line {}: eval_judge.api_key: a key stands in no recipe"),
    "a number": ({"max_prompts": "many"}, {}, "line {}: eval_judge.max_prompts: expected a whole number, got 'many'."),
    "no prices": ({"max_cost": 1.0}, {}, "line {}: eval_judge.max_cost: a cap on money needs"),
    "no judge": ({"model": ""}, {}, "eval_judge.model: it is missing"),
    "another metric": (
        {"metrics": ["score"]},
        BEST,
        "metric_for_best_model='eval_win_rate' is not asked for: add win_rate",
    ),
    "no evaluation": (
        {},
        {"metric_for_best_model": "win_rate", "eval_strategy": "no"},
        "metric_for_best_model='win_rate' is judged at evaluations, and there are none. Set `eval_strategy: steps`",
    ),
    "nobody to say it": (
        None,
        BEST | {"sample_metrics": None},
        "metric_for_best_model='eval_win_rate' is what a judge says. Name one with `eval_judge`.",
    ),
    "not there": (
        {"base_url": "http://127.0.0.1:9/v1"},
        {},
        "eval_judge: http://127.0.0.1:9/v1 and model 'teacher-1': unreachable",
    ),
    "no key": ({"api_key_env": "NO_SUCH_VARIABLE"}, {}, "there is no key: the environment has no NO_SUCH_VARIABLE."),
    "never readable": ({}, {}, "the judge 'teacher-1' gave no preference that can be read in 2 answers"),
    "the worst": (
        {},
        BEST | {"greater_is_better": False},
        "greater_is_better=False with metric_for_best_model='eval_win_rate' would keep the student that the judge likes least.",
    ),
    "a best metric with a typo": (
        {},
        BEST | {"metric_for_best_model": "eval_winrate"},
        "metric_for_best_model='eval_winrate' is nothing that eval_judge says; did you mean 'win_rate'?",
    ),
    "two of one name": (
        {"metrics": ["score"]},
        {"sample_metrics": "SCORE", "metric_for_best_model": "eval_score"},
        "sample_metrics returns a metric 'score', and eval_judge.metrics names 'score' too: both would be eval_score.",
    ),
    "a method without evaluations": (None, PREFERENCES | EVALUATED, "eval_strategy"),
}


@pytest.mark.parametrize(("judge", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_weights_are_loaded(
    tmp_path, recipe_folder, tiny_model_dir, monkeypatch, judge, changes, message
):
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", pytest.fail)
    with judging(lambda *_: "I like both.") as server:
        if judge is not None:
            judge = {"model": MODEL, "base_url": server.url} | judge
            changes = {"eval_judge": judge} | changes
        if "SCORE" in changes.values():
            (tmp_path / "own.py").write_text("def score(prompts, texts):\n    return {'score': [1.0] * len(texts)}\n")
            changes = changes | {"sample_metrics": f"{tmp_path / 'own.py'}:score"}
        recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **{**EVALUATED, **BRIEF, **changes})
        with pytest.raises(DistillationError) as error:
            run(load_recipe(recipe))
        assert server.requests in (0, 2)
    name = next(iter(set(judge or ()) & set(message.replace(":", ".").split("."))), None)
    lines = recipe.read_text().splitlines()
    number = next((number for number, line in enumerate(lines, 1) if name and line.startswith(f"  {name}:")), None)
    assert message.format(number) in str(error.value) and KEY not in str(error.value) and "\n" not in str(error.value)


def test_a_judge_on_the_command_line(tmp_path, recipe_folder, tiny_model_dir):
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **EVALUATED)
    judge = {"model": MODEL, "base_url": "http://127.0.0.1:9/v1", "max_prompts": 3}
    assert load_recipe(recipe, ["--eval_judge", json.dumps(judge)]).script_args.eval_judge == judge
    with pytest.raises(DistillationError, match="eval_judge: not valid JSON"):
        load_recipe(recipe, ["--eval_judge", "gpt"])


@pytest.mark.parametrize("values", [[1], 5, "x"])
def test_what_is_no_mapping(values):
    with pytest.raises(RecipeError, match="eval_judge: expected keys and values"):
        read_eval_judge(values)


@pytest.mark.slow
def test_a_method_without_evaluations_is_judged_in_its_report(tmp_path, recipe_folder, tiny_model_dir):
    with judging(prefers_long_answers) as server:
        judge = {"model": MODEL, "base_url": server.url}
        settings = {
            **BRIEF,
            **PREFERENCES,
            "num_rounds": 1,
            "num_train_epochs": 1,
            "judge": "overlap",
            "eval_judge": judge,
        }
        run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **settings)))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["verdicts_of_judge"]["students"]
    assert found.keys() == {"undistilled", "PreferenceKD"}
