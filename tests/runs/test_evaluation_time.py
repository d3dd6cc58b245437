"""What measuring students takes is told apart from the trainings, along the way too, and over a run that was interrupted."""

import json
import time

import pytest

from tests.recipes import RESUME, write_recipe
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.runs import text_job
from trl_bbkd.runs.progress import PROGRESS_NAME
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


@pytest.fixture
def stopwatch(monkeypatch):
    """Of each function its calls' seconds. A measurement takes a noticeable part of these tiny runs."""
    taken: dict[str, list[float]] = {}

    def watch(owner, name, pause=0.0):
        function, taken[name] = getattr(owner, name), []

        def watched(*args, **kwargs):
            start = time.perf_counter()
            time.sleep(pause)
            found = function(*args, **kwargs)
            taken[name].append(time.perf_counter() - start)
            return found

        monkeypatch.setattr(owner, name, watched)

    watch(text_job, "evaluate_student", pause=0.1)
    watch(text_job, "train_seqkd")
    watch(GADTrainer, "train")
    return taken


def seconds_of(folder) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["seconds"]


def test_metrics_tell_evaluation_apart(tmp_path, recipe_folder, tiny_model_dir, stopwatch, monkeypatch):
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", max_steps=4)
    load = text_job.TextJob._load

    def interrupted(job, folder):
        raise KeyboardInterrupt

    # Before SeqKD's student is measured
    monkeypatch.setattr(text_job.TextJob, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe))
    # All but the measurement that is missing; of those along the way, the method's last one is its final one
    assert len(stopwatch["evaluate_student"]) == 1 + 3 + 1 + 4
    first = seconds_of(tmp_path / "out")
    # The report that is written before the baseline
    assert set(first) == {"GAD", "evaluation"}
    assert first["evaluation"] == pytest.approx(sum(stopwatch["evaluate_student"][:5]), rel=0.05)

    monkeypatch.setattr(text_job.TextJob, "_load", load)
    run(load_recipe(recipe, RESUME))
    seconds, evaluations = seconds_of(tmp_path / "out"), stopwatch["evaluate_student"]
    assert len(evaluations) == 10 and set(seconds) == {"GAD", "SeqKD", "evaluation"}
    # What the interrupted run measured counts
    assert seconds["evaluation"] == pytest.approx(sum(evaluations), rel=0.05)
    parts = json.loads((tmp_path / "out" / PROGRESS_NAME).read_text())["parts"]
    assert parts["GAD"]["seconds"] + parts["undistilled"]["seconds"] < seconds["evaluation"]
    # The trainings are without it
    assert seconds["GAD"] == pytest.approx(stopwatch["train"][0] - sum(evaluations[1:4]), abs=0.1)
    assert seconds["SeqKD"] == pytest.approx(stopwatch["train_seqkd"][0] - sum(evaluations[5:9]), abs=0.1)
    share = f"{seconds['evaluation'] / sum(seconds.values()):.0%} of these"
    assert 0 < seconds["evaluation"] < sum(seconds.values())
    assert share in (tmp_path / "out/report.md").read_text()
    # A finished run that is resumed measures nothing, and says the same
    run(load_recipe(recipe, RESUME))
    assert seconds_of(tmp_path / "out") == seconds and len(evaluations) == 10
