"""Trainings, their measurements along the way and their reports in experiment trackers: in trackio and TensorBoard as they are."""

import json
import sys
from types import SimpleNamespace

import pytest
import trackio
from trackio.sqlite_storage import SQLiteStorage
from transformers import TrainerState, TrainingArguments

from tests.llkd.test_classifier_run import data as classifier_data  # noqa: F401
from tests.llkd.test_classifier_run import student as classifier  # noqa: F401
from tests.llkd.test_classifier_run import write_recipe as write_classifier_recipe
from tests.processes import Moment, killed_at
from tests.recipes import RESUME, never, write_recipe
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.runs import trackers
from trl_bbkd.runs.progress import PROGRESS_NAME, Progress
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


PROJECT = "tests"
TRACKED = {"report_to": ["trackio", "tensorboard"], "project": PROJECT, "max_steps": 4}


def keep_trackio_in(folder, patch=None):
    """It reads `TRACKIO_DIR` when it is imported, which a trainer of TRL has done."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            (patch or pytest.MonkeyPatch()).setattr(module, "TRACKIO_DIR", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows with eight different prompts to measure on, and a folder for trackio."""
    folder = tmp_path_factory.mktemp("tracked")
    for split, words in (("train", "abcdefghijkl"), ("test", "mnopqrst")):
        rows = [{"prompt": f"Say {word}|", "completion": f" The sky is {word}."} for word in words]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(
        "def has_e(prompts, completions):\n    return {'has_e': [float('e' in text) for text in completions]}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        keep_trackio_in(folder / "trackio", patch)
        yield folder


def tracked_recipe(folder, student, name, **changes):
    judge = f"{folder / 'judge.py'}:has_e"
    settings = {"sample_metrics": judge, "eval_samples": 2, **TRACKED, **changes}
    return write_recipe(folder, student, folder / name, **settings)


@pytest.fixture(scope="module")
def finished(folder, tiny_model_dir):
    recipe = tracked_recipe(folder, tiny_model_dir, "out")
    run(load_recipe(recipe))
    return recipe


def in_trackio(project=PROJECT):
    """The entries of the one run of a project."""
    (only,) = trackio.Api().runs(project)
    return SQLiteStorage.get_logs(project, only.name)


def scalars(entries):
    """The values of each name, in their order."""
    found = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return found


def tables(entries):
    found = {}
    for entry in entries:
        for name, value in entry.items():
            if isinstance(value, dict) and value["_type"] == "trackio.table":
                found.setdefault(name, []).append(value["_value"])
    return found


def report_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_one_run_of_trackio_has_the_training_and_the_report(folder, finished):
    entries, report = in_trackio(), report_of(folder / "out")
    found = scalars(entries)
    losses = [entry["discriminator/loss"] for entry in report["log_history"] if "discriminator/loss" in entry]
    assert found["train/discriminator/loss"] == losses and len(losses) == 4
    for column, metrics in report["results"].items():
        for name, value in metrics.items():
            if value is not None:
                key = f"report/{name}" if column == "GAD" else f"report/{column}/{name}"
                assert found[key] == [value], key
    for other in ("undistilled", "SeqKD"):
        for name, difference in report["differences"][other].items():
            if difference["difference"] is not None:
                assert found[f"report/less_{other}/{name}"] == [difference["difference"]]
    assert found["report/warnings"] == [len(report["warnings"])]
    assert found["train/global_step"][-1] == 4
    # SeqKD's own training is in no tracker, and the configuration of the student's is as it was
    assert "train/loss" not in {name for entry in entries[-1:] for name in entry}
    (only,) = trackio.Api().runs(PROJECT)
    assert only.config["vocab_size"] > 0 and only.config["model/num_parameters"] > 0
    assert only.config["learning_rate"] == 1e-3


def test_the_tables_in_trackio_are_the_reports(folder, finished):
    found, report = tables(in_trackio()), report_of(folder / "out")
    (table,) = found["report/table"]
    lines = [line for line in (folder / "out/report.md").read_text().splitlines() if line.startswith("| has_e, T=1.0")]
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert list(table[0]) == ["metric", "undistilled", "SeqKD", "GAD", "teacher"] and list(table[0].values()) == cells
    (differences,) = found["report/differences"]
    (difference,) = (row for row in differences if (row["metric"], row["less"]) == ("has_e, T=1.0", "SeqKD"))
    expected = report["differences"]["SeqKD"]["has_e@t1.0"]
    assert [difference[end] for end in ("difference", "low", "high")] == [
        expected[end] for end in ("difference", "low", "high")
    ]
    assert None not in expected.values()
    (answers,) = found["report/completions"]
    lines = [json.loads(line) for line in (folder / "out/held_out.jsonl").read_text().splitlines()]
    assert len(answers) == len(lines) == 8
    for row, line in zip(answers, lines, strict=True):
        assert (row["prompt"], row["teacher"]) == (line["prompt"], line["teacher"][0])
        for student, said in line["students"].items():
            assert row[student] == said["samples"]["t1.0"][0]
            assert row[f"{student}, has_e@t1.0"] == said["values"]["has_e@t1.0"]


def test_measurements_along_the_way_are_in_trackio(folder, finished):
    entries, report = in_trackio(), report_of(folder / "out")
    found = scalars(entries)
    points = report["curves"]["GAD"][1:-1]
    assert [point["step"] for point in points] == [1, 2, 3]
    for name in ("has_e@t1.0", "teacher_nll"):
        assert found[f"held_out/{name}"] == [point[name] for point in points]
    along = [entry for entry in entries if "held_out/teacher_nll" in entry]
    assert [entry["train/global_step"] for entry in along] == [1, 2, 3]
    shown = tables(entries)["held_out/completions"]
    assert [len(rows) for rows in shown] == [4, 4, 4]
    assert list(shown[0][0]) == ["prompt", "teacher", "GAD", "GAD, has_e@t1.0"]
    assert shown[0][0]["prompt"] == "Say m|"


def test_tensorboard_has_the_same(folder, finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (of_the_run,) = (folder / "out/runs").iterdir()
    assert list((folder / "out").rglob("events*")) == list(of_the_run.rglob("events*"))
    events = accumulator.EventAccumulator(str(of_the_run), size_guidance={"tensors": 0})
    events.Reload()
    report = report_of(folder / "out")
    (value,) = events.Scalars("report/has_e@t1.0")
    assert value.step == 4 and value.value == pytest.approx(report["results"]["GAD"]["has_e@t1.0"])
    assert [point.step for point in events.Scalars("held_out/teacher_nll")] == [1, 2, 3]
    (table,) = events.Tensors("report/table/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| metric | undistilled | SeqKD | GAD | teacher |" and lines[2].startswith("| has_e, T=1.0 |")
    (answers,) = events.Tensors("report/completions/text_summary")
    # A bar in a prompt ends no cell
    assert "| Say m\\| |  The sky is m. |".replace("  ", " ") in answers.tensor_proto.string_val[0].decode()
    assert len(events.Tensors("args/text_summary")) == 1


def test_a_finished_run_that_is_resumed_sends_nothing_twice(folder, finished, monkeypatch):
    before, files = in_trackio(), sorted((folder / "out").rglob("events*"))
    monkeypatch.setattr(GADTrainer, "train", never)
    run(load_recipe(finished, RESUME))
    assert in_trackio() == before and sorted((folder / "out").rglob("events*")) == files


def test_a_tracker_that_fails_costs_a_warning(folder, finished, monkeypatch, caplog):
    before, path = in_trackio(), folder / "out" / PROGRESS_NAME
    progress = json.loads(path.read_text())
    assert progress["parts"].pop(trackers.IN_TRACKERS) == ["trackio", "tensorboard"]
    path.write_text(json.dumps(progress))

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(trackio, "log", unreachable)
        run(load_recipe(finished, RESUME))
    warning = "trackio did not take the report (ConnectionError: no network). It is in output_dir too."
    assert warning in [record.message for record in caplog.records]
    assert json.loads(path.read_text())["parts"][trackers.IN_TRACKERS] == ["tensorboard"]
    assert in_trackio() == before
    # It is sent when there is a network, and in the run of the training
    run(load_recipe(finished, RESUME))
    assert json.loads(path.read_text())["parts"][trackers.IN_TRACKERS] == ["tensorboard", "trackio"]
    after = in_trackio()
    assert len(after) == len(before) + 1 and tables(after)["report/table"] == 2 * tables(before)["report/table"]


@pytest.mark.slow
def test_a_classifiers_report_is_in_trackio(tmp_path, classifier_data, classifier, monkeypatch):  # noqa: F811
    keep_trackio_in(tmp_path / "trackio", monkeypatch)
    recipe = write_classifier_recipe(
        classifier_data, classifier, tmp_path / "out", report_to="trackio", project="labels", max_steps=4
    )
    run(load_recipe(recipe))
    entries, report = in_trackio("labels"), report_of(tmp_path / "out")
    found, shown = scalars(entries), tables(entries)
    assert found["report/macro_f1"] == [report["results"]["LLKD"]["macro_f1"]]
    assert found["report/all_rows/accuracy"] == [report["results"]["all rows"]["accuracy"]]
    assert list(shown["report/table"][0][0]) == ["metric", "undistilled", *list(report["results"])[1:]]
    assert {row["less"] for row in shown["report/differences"][0]} == report["differences"].keys()
    assert "report/completions" not in shown and len(found["eval/macro_f1"]) > 1


def run_tracked(recipe, folder):
    keep_trackio_in(folder)
    run(load_recipe(recipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [Moment("trl_bbkd.gad.trainer.GADTrainer.training_step", call=3), "trl_bbkd.runs.text_job.train_seqkd"]
)
def test_a_killed_run_goes_on_in_the_same_runs(folder, tmp_path, tiny_model_dir, monkeypatch, moment):
    recipe = tracked_recipe(folder, tiny_model_dir, tmp_path / "out", save_strategy="steps", save_steps=1)
    killed_at(moment, run_tracked, recipe, tmp_path / "trackio")
    keep_trackio_in(tmp_path / "trackio", monkeypatch)
    # What trackio has not written yet, half a second of it, is lost with the process
    recorded = json.loads((tmp_path / "out" / PROGRESS_NAME).read_text())["parts"][trackers.TRACKER_RUNS]["trackio"]
    run(load_recipe(recipe, RESUME))
    (after,) = trackio.Api().runs(PROJECT)
    assert after.name == recorded
    assert len(tables(in_trackio())["report/table"]) == 1
    assert len(list((tmp_path / "out/runs").iterdir())) == 1


@pytest.mark.slow
def test_rounds_are_one_run_and_the_proxys_training_is_another(
    folder, tmp_path, tiny_model_dir, other_model_dir, monkeypatch
):
    keep_trackio_in(tmp_path / "trackio", monkeypatch)
    shared = {"num_generations": None, "discriminator_learning_rate": None, "seqkd_baseline": False, "eval_prompts": 2}
    rounds = {"method": "preferencekd", "num_rounds": 2, "num_train_epochs": 1, "max_steps": None, "project": "rounds"}
    run(load_recipe(tracked_recipe(folder, tiny_model_dir, "rounds", **shared, **rounds)))
    assert len(tables(in_trackio("rounds"))["report/table"]) == 1

    proxy = {"method": "bayeskd", "proxy_model": other_model_dir, "project": "proxy", "run_name": "mine"}
    run(load_recipe(tracked_recipe(folder, tiny_model_dir, "proxy", **shared, **proxy)))
    runs = {found.name: SQLiteStorage.get_logs("proxy", found.name) for found in trackio.Api().runs("proxy")}
    assert runs.keys() == {"mine", "mine-warmup"}
    assert ["report/table" in tables(runs[name]) for name in ("mine", "mine-warmup")] == [True, False]


class RecordedWandb:
    """What is called of wandb: its own package needs an account, or a folder of its own format."""

    Table = staticmethod(lambda columns, data: (columns, data))

    def __init__(self):
        self.run, self.logged, self.calls = None, [], []

    def init(self, **settings):
        self.calls.append(settings)
        self.run = SimpleNamespace(entity="me", project="mine", id=settings.get("id", "new"))

    def log(self, values):
        self.logged.append((self.run.id, values))

    def finish(self):
        self.run = None


def test_wandb_goes_on_in_the_run_of_the_training(tmp_path, monkeypatch):
    wandb = RecordedWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    class WandbCallback(trackers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            if wandb.run is None:
                wandb.init()

    monkeypatch.setitem(trackers.TRACKERS, WandbCallback, trackers.Wandb)
    model = SimpleNamespace(config=None, num_parameters=lambda: 1)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    report = SimpleNamespace(
        method="GAD",
        results={"GAD": {"teacher_nll": 2.0}, "undistilled": {"teacher_nll": float("nan")}},
        differences={},
        warnings=[{"step": 3, "text": "low"}],
        compared=[("teacher_nll", "teacher NLL")],
        columns=["GAD", "undistilled"],
        rows=[["teacher NLL", "2.000", "–"]],
        headline="teacher_nll",
    )

    def job():
        handler = SimpleNamespace(callbacks=[WandbCallback()])
        trainer = SimpleNamespace(model=model, args=args, callback_handler=handler, add_callback=lambda callback: None)
        return trackers.Trackers(trainer, Progress(str(tmp_path), {})), handler.callbacks[0]

    first, callback = job()
    callback.on_train_begin()
    first.on_train_begin(args, TrainerState(), None)
    wandb.finish()  # the process has ended
    second, _ = job()
    second.send(report, [], 3)
    assert wandb.calls == [{}, {"entity": "me", "project": "mine", "id": "new", "resume": "allow"}]
    ((run_id, values),) = wandb.logged
    assert run_id == "new" and wandb.run is None
    assert values == {
        "report/teacher_nll": 2.0,
        "report/warnings": 1,
        "report/table": (["metric", "GAD", "undistilled"], [["teacher NLL", "2.000", "–"]]),
        "report/warning_texts": (["step", "warning"], [[3, "low"]]),
        "train/global_step": 3,
    }
    job()[0].send(report, [], 3)
    assert len(wandb.logged) == 1


def test_a_measurement_is_sent_once():
    """A step without a log of its own has that of the step before."""
    sent = []
    tracker = SimpleNamespace(name="a tracker", log=lambda step, values, tables: sent.append((step, values)))
    own = SimpleNamespace(trackers=[tracker], answers=list)
    log = [{"held_out/teacher_nll": 2.0, "step": 1}]
    for step in (1, 2):
        state = SimpleNamespace(is_world_process_zero=True, log_history=log, global_step=step)
        trackers.Trackers.on_step_end(own, None, state, None)
    assert sent == [(1, {"held_out/teacher_nll": 2.0})]
