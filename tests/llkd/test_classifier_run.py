"""Runs of recipes whose student classifies."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from tests.conftest import build_tokenizer
from tests.hub_server import TOKEN, HubServer
from tests.processes import ROOT, killed_at, on_processes
from tests.recipes import RESUME, command_line, never, run_recipe, saved, without_times
from tests.sharding.runs import start
from trl_bbkd.__main__ import main
from trl_bbkd.errors import RecipeError
from trl_bbkd.llkd.trainer import LLKDTrainer
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run

from .helpers import LORA, NAMES, ON_CPU, build_encoder, make_rows, save_student


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def named(rows, gold=True):
    """Rows as a file has them: with names for labels."""
    for row in rows:
        row = {**row, "label": NAMES[row["label"]]}
        if "gold" in row:
            row["gold"] = NAMES[row["gold"]]
        yield row if gold else {name: value for name, value in row.items() if name != "gold"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An encoder without a head."""
    folder = tmp_path_factory.mktemp("student")
    encoder = BertModel(build_encoder().config)
    encoder.load_state_dict(build_encoder().bert.state_dict(), strict=False)
    encoder.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "teacher_train.jsonl", named(make_rows(64, gold=True)))
    test = [{"text": row["text"], "label": row["gold"]} for row in named(make_rows(24, gold=True, seed=1))]
    write_rows(folder / "teacher_test.jsonl", test)
    return folder


def write_recipe(data, student, output_dir, **changes):
    values = {
        "method": "llkd",
        "model_name_or_path": student,
        "dataset_name": str(data),
        "teacher_name": "a test",
        "labels": NAMES,
        "output_dir": str(output_dir),
        **{**ON_CPU, "save_strategy": "no"},
        "bf16": False,
        "num_train_epochs": 2,
        "selection_warmup_steps": 2,
        **changes,
    }
    path = output_dir.parent / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def saved_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, student):
    output_dir = tmp_path_factory.mktemp("run") / "out"
    run(load_recipe(write_recipe(data, student, output_dir)))
    return output_dir


def accuracy(folder, data):
    """Of a saved student, text by text."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = [json.loads(line) for line in (data / "teacher_test.jsonl").open()]
    found = [model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item() for row in rows]
    return sum(model.config.id2label[number] == row["label"] for number, row in zip(found, rows, strict=True)) / len(
        rows
    )


class TestRun:
    def test_leaves_everything(self, finished):
        for name in ("report.md", "curves.png", "reliability.png", "README.md", "tokenizer.json", "recipe.yaml"):
            assert (finished / name).is_file(), name
        for folder in ("", "all_rows", "random_rows"):
            assert (finished / folder / "model.safetensors").is_file()

    def test_table_is_that_of_the_saved_students(self, finished, data):
        results = saved_metrics(finished)["results"]
        assert list(results) == ["undistilled", "all rows", "random rows", "LLKD"]
        for name, folder in (("LLKD", ""), ("all rows", "all_rows"), ("random rows", "random_rows")):
            assert results[name]["accuracy"] == pytest.approx(accuracy(finished / folder, data)), name

    def test_rows_and_computation(self, finished):
        """64 rows in pools of 8, twice; the first two steps keep all of theirs."""
        saved = saved_metrics(finished)
        results, log = saved["results"], [entry for entry in saved["log_history"] if "loss" in entry]
        shares = [entry["selection/kept_share"] for entry in log]
        assert len(shares) == 16 and shares[:2] == [1.0, 1.0] and max(shares[2:]) < 1
        share = sum(shares) / 16
        assert results["LLKD"]["learned_share"] == pytest.approx(share)
        assert results["LLKD"]["compute"] == pytest.approx((1 + 3 * share) / 3)
        assert results["LLKD"]["distinct_rows"] == log[-1]["selection/distinct_rows"]
        assert results["random rows"]["learned_share"] == pytest.approx(share, abs=1 / 16)
        assert results["random rows"]["compute"] == results["random rows"]["learned_share"]
        assert results["all rows"]["learned_share"] == results["all rows"]["compute"] == 1
        assert results["all rows"]["distinct_rows"] == 64

    def test_selection_by_class(self, finished):
        saved = saved_metrics(finished)
        log = [entry for entry in saved["log_history"] if "loss" in entry]
        for number, name in enumerate(NAMES):
            for threshold in ("threshold_teacher", "threshold_student"):
                assert saved["selection"][name][threshold] == log[-1][f"selection/{threshold}_{number}"]
        assert saved["warmup_steps"] == 2 and saved["truth"] == "the true labels"

    def test_teachers_labels(self, finished, data):
        rows = [json.loads(line) for line in (data / "teacher_train.jsonl").open()]
        found = saved_metrics(finished)["teacher_labels"]
        assert found["rows"] == 64
        assert found["accuracy"] == pytest.approx(sum(row["label"] == row["gold"] for row in rows) / 64)
        assert found["mean_confidence"] == pytest.approx(sum(row["teacher_confidence"] for row in rows) / 64, abs=1e-6)
        # Of every row the true label is known, and every pool has eight
        log = [entry for entry in saved_metrics(finished)["log_history"] if "loss" in entry][2:]
        kept = [(8 * entry["selection/kept_share"], entry.get("selection/teacher_accuracy_kept", 0)) for entry in log]
        dropped = [
            (8 - n, entry["selection/teacher_accuracy_dropped"]) for (n, _), entry in zip(kept, log, strict=True)
        ]
        for name, rows in (("kept", kept), ("dropped", dropped)):
            expected = sum(n * share for n, share in rows) / sum(n for n, _ in rows)
            assert found[f"accuracy_{name}"] == pytest.approx(expected), name

    def test_curves_begin_and_end_with_the_table(self, finished):
        saved = saved_metrics(finished)
        for name, points in saved["curves"].items():
            assert [point["step"] for point in points] == list(range(0, 17, 2)), name
            for point, column in ((points[0], "undistilled"), (points[-1], name)):
                assert point["accuracy"] == saved["results"][column]["accuracy"]

    def test_all_rows_is_plain_training(self, finished, data, student, tmp_path):
        """The same student as of a trainer without selection, whose step has as many rows."""
        recipe = load_recipe(
            write_recipe(data, student, tmp_path / "x", selection="none", per_device_train_batch_size=8)
        )
        rows = make_rows(64, gold=True)
        LLKDTrainer.train(trainer := LLKDTrainer(model=student, args=recipe.training_args, train_dataset=rows))
        expected = AutoModelForSequenceClassification.from_pretrained(finished / "all_rows").state_dict()
        for name, value in trainer.model.state_dict().items():
            # The same for every query, keys' biases have no gradient but rounding's, of which Adam makes steps
            if not name.endswith("key.bias"):
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)

    def test_random_rows_have_no_weights(self, finished, data, student, tmp_path):
        """The same student as of a trainer that draws as large a share and weights no row."""
        share = saved_metrics(finished)["results"]["LLKD"]["learned_share"]
        control = {"selection_rule": "random", "selection_budget": share, "selection_weighting": "none"}
        recipe = load_recipe(write_recipe(data, student, tmp_path / "x", selection_warmup_steps=0, **control))
        trainer = LLKDTrainer(model=student, args=recipe.training_args, train_dataset=make_rows(64, gold=True))
        trainer.train()
        expected = AutoModelForSequenceClassification.from_pretrained(finished / "random_rows").state_dict()
        for name, value in trainer.model.state_dict().items():
            if not name.endswith("key.bias"):
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)

    def test_card(self, finished):
        text = (finished / "README.md").read_text()
        assert "pipeline_tag: text-classification" in text and "AutoModelForSequenceClassification" in text
        assert "### Selection" in text and "### The teacher's labels" in text and '["sky", "fruit", "animal"]' in text

    def test_another_run_does_not_mix_in(self, finished, data):
        with pytest.raises(RecipeError, match="holds another run .model_name_or_path"):
            run(load_recipe(write_recipe(data, "other/student", finished)))


def run_sharded(recipe):
    start("fsdp2")
    run(load_recipe(recipe))


def test_a_sharded_recipe_measures_the_student_before_it_learns_too(tmp_path, finished, data, student):
    """Its head is drawn."""
    output_dir = tmp_path / "out"
    size = ON_CPU["per_device_train_batch_size"] // 2
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    recipe = write_recipe(data, student, output_dir, per_device_train_batch_size=size, **steps)
    on_processes(2, run_sharded, recipe)
    found, alone = (saved_metrics(folder)["results"] for folder in (output_dir, finished))
    assert list(found) == list(alone)
    assert found["undistilled"] == alone["undistilled"]
    for name, folder in (("LLKD", ""), ("all rows", "all_rows"), ("random rows", "random_rows")):
        assert found[name]["accuracy"] == pytest.approx(accuracy(output_dir / folder, data)), name
    assert (output_dir / "report.md").is_file() and (output_dir / "README.md").is_file()


def test_a_killed_run_goes_on_from_the_recipe(tmp_path, data, student):
    config = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "baselines": False}
    recipe = write_recipe(data, student, tmp_path / "out", **config)
    run(load_recipe(recipe))
    weights, before = (tmp_path / "out/model.safetensors").read_bytes(), saved_metrics(tmp_path / "out")
    assert set(before["results"]) == {"undistilled", "LLKD"} and not (tmp_path / "out/all_rows").exists()
    with pytest.raises(RecipeError, match="holds checkpoints of another run.*resume_from_checkpoint"):
        run(load_recipe(recipe))
    (tmp_path / "out/checkpoint-8/trainer_state.json").unlink()
    run(load_recipe(recipe, ["--resume_from_checkpoint", "true"]))
    after = saved_metrics(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights
    for results in (before["results"], after["results"]):
        del results["LLKD"]["seconds"]
    assert after["results"] == before["results"] and after["curves"] == before["curves"]
    assert after["selection"] == before["selection"]
    counts = load_file(tmp_path / "out/checkpoint-4/selection.safetensors")
    assert counts["tally.seen"].sum() == 32
    counts = load_file(tmp_path / "out/checkpoint-8/selection.safetensors")
    for number, name in enumerate(NAMES):
        kept, seen = counts["tally.kept"][1, number].item(), counts["tally.seen"][1, number].item()
        assert after["selection"][name]["kept_share"] == pytest.approx(kept / seen)


def test_a_classifiers_run_killed_in_a_baseline(tmp_path, data, student, monkeypatch):
    whole, killed = (write_recipe(data, student, tmp_path / name, max_steps=4) for name in ("whole", "out"))
    run(load_recipe(whole))
    killed_at("trl_bbkd.llkd.job.LLKDJob._baseline", run_recipe, killed)
    weights, train = (tmp_path / "out/model.safetensors").read_bytes(), LLKDTrainer.train
    monkeypatch.setattr(
        LLKDTrainer, "train", lambda trainer, **kwargs: never() if kwargs else train(trainer, **kwargs)
    )
    for _ in range(2):
        run(load_recipe(killed, RESUME))
        assert (tmp_path / "out/model.safetensors").read_bytes() == weights
        assert without_times(saved(tmp_path / "out")) == without_times(saved(tmp_path / "whole"))
        # The second time the baselines are there as well
        monkeypatch.setattr(LLKDTrainer, "train", never)


@pytest.mark.parametrize(
    "logging", [{"logging_steps": 7}, {"logging_steps": 500}, {"logging_strategy": "no"}], ids=str
)
def test_what_is_reported_does_not_depend_on_what_is_logged(tmp_path, data, student, finished, logging):
    run(load_recipe(write_recipe(data, student, tmp_path / "out", baselines=False, **logging)))
    found, expected = saved_metrics(tmp_path / "out"), saved_metrics(finished)
    for results in (found["results"], expected["results"]):
        del results["LLKD"]["seconds"]
    assert found["results"]["LLKD"] == expected["results"]["LLKD"]
    assert found["selection"] == expected["selection"] and found["teacher_labels"] == expected["teacher_labels"]


def test_the_last_pool_of_an_epoch_counts_for_the_rows_it_has(tmp_path, data, student):
    """36 rows in pools of 32: the second pool of each epoch has 4."""
    write_rows(tmp_path / "train.jsonl", list(named(make_rows(64, gold=True)))[:36])
    (tmp_path / "test.jsonl").write_text((data / "teacher_test.jsonl").read_text())
    changes = {"per_device_train_batch_size": 8, "pool_factor": 4, "num_train_epochs": 4, "selection_warmup_steps": 0}
    run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out", **changes)))
    saved = saved_metrics(tmp_path / "out")
    log = [entry for entry in saved["log_history"] if "loss" in entry]
    kept = sum(entry["selection/kept_share"] * size for entry, size in zip(log, [32, 4] * 4, strict=True))
    assert saved["results"]["LLKD"]["learned_share"] == pytest.approx(kept / 144)
    assert saved["results"]["random rows"]["learned_share"] * 144 == pytest.approx(kept, abs=8)


def test_it_is_pushed(tmp_path, data, student):
    path = write_recipe(data, student, tmp_path / "out", max_steps=2, push_to_hub=True, hub_model_id="me/classifier")
    with HubServer() as server:
        environment = {**os.environ, **server.environment(TOKEN), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "trl_bbkd", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [commit.message for commit in server.commits] == ["End of training"]
    report = {"README.md", "report.md", "metrics.json", "curves.png", "reliability.png", "recipe.yaml"}
    assert report | {"model.safetensors", "config.json", "tokenizer.json"} <= set(server.commits[0].files)
    assert not [
        name for name in server.commits[0].files if name.startswith(("all_rows", "random_rows", "training_args"))
    ]


@pytest.mark.parametrize("gold", [True, False])
def test_without_test_rows_some_are_held_out(tmp_path, data, student, gold):
    """With true labels they are measured against those, else against the teacher's."""
    write_rows(tmp_path / "rows.jsonl", named(make_rows(64, gold=True), gold))
    changes = {"dataset_name": str(tmp_path / "rows.jsonl"), "max_steps": 3, "labels": None, "baselines": False}
    run(load_recipe(write_recipe(data, student, tmp_path / "out", **changes)))
    saved = saved_metrics(tmp_path / "out")
    assert saved["truth"] == ("the true labels" if gold else "the teacher's labels")
    assert saved["counts"]["test"]["rows"] == 3 and saved["counts"]["train"]["rows"] == 61
    assert saved["class_names"] == sorted(NAMES)
    assert bool(saved["teacher_labels"]) is gold and (tmp_path / "out/reliability.png").exists() is gold


def test_true_labels_of_test_rows_come_before_the_teachers(tmp_path, data, student):
    (tmp_path / "train.jsonl").write_text((data / "teacher_train.jsonl").read_text())
    rows = list(named(make_rows(24, gold=True, seed=1)))
    assert any(row["label"] != row["gold"] for row in rows)
    write_rows(tmp_path / "test.jsonl", rows)
    run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out", max_steps=2, baselines=False)))
    saved = saved_metrics(tmp_path / "out")
    assert saved["truth"] == "the true labels"
    # The rows of `data` are these, with the true label alone
    assert saved["results"]["LLKD"]["accuracy"] == pytest.approx(accuracy(tmp_path / "out", data))


def test_adapter(tmp_path, data, student):
    lora = {"use_peft": True, "lora_r": LORA["r"], "lora_target_modules": LORA["target_modules"]}
    run(load_recipe(write_recipe(data, student, tmp_path / "out", max_steps=4, **lora)))
    for folder in ("", "all_rows", "random_rows"):
        config = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS" and (tmp_path / "out" / folder / "adapter_model.safetensors").is_file()


def test_plain_training_is_reported_too(tmp_path, data, student):
    run(load_recipe(write_recipe(data, student, tmp_path / "out", selection="none", max_steps=2)))
    saved = saved_metrics(tmp_path / "out")
    assert set(saved["results"]) == {"undistilled", "LLKD"} and saved["results"]["LLKD"]["compute"] == 1
    assert "## Selection" not in (tmp_path / "out/report.md").read_text()


def test_two_processes(tmp_path, data, student):
    path = write_recipe(data, student, tmp_path / "out", max_steps=4, per_device_train_batch_size=2)
    printed = on_processes(2, command_line, tmp_path, path)
    assert "".join(printed).count("report.md, curves.png and metrics.json") == 1
    saved = saved_metrics(tmp_path / "out")
    assert set(saved["results"]) == {"undistilled", "all rows", "random rows", "LLKD"}
    assert saved["results"]["LLKD"]["accuracy"] == pytest.approx(accuracy(tmp_path / "out", data))
    assert saved["results"]["all rows"]["distinct_rows"] == 32


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": ["sky", "fruit", "animals"]}, "`label` is 'animal'.*did you mean 'animals'"),
            ({"labels": [*NAMES, "stone"]}, "No row has label 3 .'stone'"),
            ({"dataset_streaming": True}, "it cannot stream. Take dataset_streaming out"),
            ({"pool_factor": 40}, "larger than the data set of 64"),
            ({"selection_rule": "quantile"}, "selection_budget is None; rule: quantile needs a share"),
            ({"selection_rule": "maxnrm"}, "selection_rule: expected one of class_mean, maxnorm"),
            ({"seqkd_baseline": True}, "unknown key 'seqkd_baseline'"),
            ({"packing": True}, "unknown key 'packing'"),
            ({"model_name_or_path": None}, "set `model_name_or_path` to the student"),
            ({"model_name_or_path": "./no/student"}, "no/student"),
            (
                {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
                "chosen by the rows",
            ),
            ({"dataloader_drop_last": True}, "dataloader_drop_last must be False.*test rows would be left out"),
            ({"prediction_loss_only": True}, "prediction_loss_only must be False"),
            ({"train_sampling_strategy": "group_by_length"}, "gives the baselines other pools"),
            ({"num_train_epochs": 0}, "nothing would be learned"),
        ],
    )
    def test_one_error_before_training(self, tmp_path, data, student, changes, message):
        with pytest.raises(RecipeError, match=message):
            run(load_recipe(write_recipe(data, student, tmp_path / "out", **changes)))
        assert not (tmp_path / "out/report.md").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"teacher_confidence": 1.5}, "1.5"),
            ({"teacher_confidence": None}, "teacher_confidence"),
            ({"label": None}, "`label` is None"),
            ({"text": None}, "`text` is None; it must be a string"),
            ({"label": "fruits"}, "did you mean 'fruit'.*name all classes in `labels`"),
        ],
    )
    def test_bad_row(self, tmp_path, data, student, change, message):
        rows = list(named(make_rows(64)))
        rows[5] |= change
        write_rows(tmp_path / "train.jsonl", rows)
        (tmp_path / "test.jsonl").write_text((data / "teacher_test.jsonl").read_text())
        with pytest.raises(RecipeError, match=message) as error:
            run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out")))
        assert "ow 5" in str(error.value) or "row 5" in str(error.value)

    def test_one_class(self, tmp_path, data, student):
        rows = [row for row in named(make_rows(64)) if row["label"] == "sky"]
        write_rows(tmp_path / "train.jsonl", rows)
        with pytest.raises(RecipeError, match="There is one class only, 'sky'.*Set `labels`"):
            run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out", labels=None)))

    def test_a_head_for_other_classes(self, tmp_path, data):
        other = build_encoder()
        other.config.id2label = dict(enumerate(["animal", "sky", "fruit"]))
        path = save_student(tmp_path / "student", other)
        with pytest.raises(
            RecipeError, match="The student's classes are animal, sky, fruit, but those of the rows are sky"
        ):
            run(load_recipe(write_recipe(data, path, tmp_path / "out")))
        path = save_student(tmp_path / "larger", build_encoder(num_labels=5))
        with pytest.raises(RecipeError, match="num_labels=5, but there are 3 classes.*ignore_mismatched_sizes"):
            run(load_recipe(write_recipe(data, path, tmp_path / "out")))

    def test_test_rows_whose_true_label_is_missing(self, tmp_path, data, student):
        (tmp_path / "train.jsonl").write_text((data / "teacher_train.jsonl").read_text())
        rows = list(named(make_rows(8, gold=True)))
        rows[3]["gold"] = None
        write_rows(tmp_path / "test.jsonl", rows)
        with pytest.raises(RecipeError, match="Row 3 of the test rows has no `gold`"):
            run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out")))

    def test_it_is_named_by_its_place_in_the_file(self, tmp_path, student):
        """Held-out rows have others: the row that is named is the one to mend."""
        rows = list(named(make_rows(40, gold=True)))

        def refused(missing):
            write_rows(
                tmp_path / "train.jsonl",
                [{**row, "gold": None} if n in missing else row for n, row in enumerate(rows)],
            )
            with pytest.raises(RecipeError, match="of the test rows has no `gold`") as error:
                run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out", test_split_size=8)))
            return int(str(error.value).split()[1])

        first = refused(range(40))
        assert refused([first]) == first

    def test_no_confidence_says_how_to_make_it(self, tmp_path, data, student):
        rows = [{"text": row["text"], "label": row["label"]} for row in named(make_rows(64))]
        write_rows(tmp_path / "train.jsonl", rows)
        with pytest.raises(RecipeError, match="needs a column `teacher_confidence`.*`trl_bbkd.pseudo_label`"):
            run(load_recipe(write_recipe(tmp_path, student, tmp_path / "out")))

    def test_the_command_line_ends_with_one_line(self, tmp_path, data, student, capfd):
        path = write_recipe(data, student, tmp_path / "out", labels=["a", "b"])
        with pytest.raises(SystemExit) as stopped:
            main([str(path)])
        assert stopped.value.code == 2
        stderr = capfd.readouterr().err
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "none of the classes a, b" in errors[0] and "Traceback" not in stderr
