import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bbkd.evaluation import evaluate_student, teacher_nll
from trl_bbkd.job import checkpoint_to_resume, command, hold_out, refuse_another_run
from trl_bbkd.recipe import RecipeError, load_recipe
from trl_bbkd.run import run
from trl_bbkd.seqkd import CurveCallback, batch_shape, curve, curve_steps, sft_rows
from trl_bbkd.teacher_data import TeacherDataError, tokenize_teacher_data
from trl_bbkd.text_job import quality


JUDGE = """
def has_blue(prompts, completions):
    return {"blue": [float("b" in text) for text in completions]}
"""


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory, standard_rows, tiny_model_dir):
    folder = tmp_path_factory.mktemp("recipe")
    for split, rows in (("train", standard_rows[:12]), ("test", standard_rows[12:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "judge.py").write_text(JUDGE)
    return folder


def write_recipe(folder, student, output_dir, **changes):
    values = {
        "method": "gad",
        "model_name_or_path": student,
        "dataset_name": str(folder),
        "teacher_name": "a test",
        "sample_metrics": f"{folder / 'judge.py'}:has_blue",
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "num_generations": 4,
        "max_completion_length": 12,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
        "gradient_checkpointing": False,
        **changes,
    }
    path = Path(output_dir).parent / f"{Path(output_dir).name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe_folder, tiny_model_dir):
    output_dir = tmp_path_factory.mktemp("run") / "out"
    run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, output_dir), []))
    return output_dir


def test_a_killed_run_goes_on_from_the_recipe(tmp_path, recipe_folder, tiny_model_dir):
    config = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seqkd_baseline": False}
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **config)
    run(load_recipe(recipe))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    with pytest.raises(RecipeError, match="holds checkpoints of another run.*resume_from_checkpoint"):
        run(load_recipe(recipe))
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
    run(load_recipe(recipe, ["--resume_from_checkpoint", "true"]))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["results"] == results


def test_a_recipe_without_the_students_training_ends_before_it(
    tmp_path, recipe_folder, tiny_model_dir, other_model_dir, capsys
):
    gad_only = dict.fromkeys(["num_generations", "discriminator_learning_rate"])
    changes = {"method": "proxykd", "proxy_model": other_model_dir, "stages": ["cache"], **gad_only}
    run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))
    assert "leaves the student's training out" in capsys.readouterr().out
    assert (tmp_path / "out/proxy/targets/store.json").is_file()
    assert not (tmp_path / "out/report.md").exists() and not (tmp_path / "out/model.safetensors").exists()


class TestRefusals:
    """One error that names the key, before any model is loaded."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_name_or_path": "./gone"},
                r"^model_name_or_path='\./gone' is neither a folder with a student nor",
            ),
            ({"discriminator": "./gone"}, r"^discriminator='\./gone' is neither a folder with a model nor"),
            (
                {"report_to": "wanbd"},
                "^report_to names 'wanbd', which is not installed here, or no experiment tracker",
            ),
        ],
    )
    def test_of_a_recipe_of_gad(self, tmp_path, recipe_folder, tiny_model_dir, changes, message):
        with pytest.raises(RecipeError, match=message):
            run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"proxy_model": "./gone"}, r"^proxy_model='\./gone' is neither a folder with a model nor"),
            ({"dataset_streaming": True}, "^dataset_streaming must be false: Bayes-KD counts all of the teacher's"),
        ],
    )
    def test_of_a_recipe_with_a_proxy(self, tmp_path, recipe_folder, tiny_model_dir, changes, message):
        gad_only = dict.fromkeys(["num_generations", "discriminator_learning_rate"])
        changes = {"method": "bayeskd", **gad_only, **changes}
        with pytest.raises(RecipeError, match=message):
            run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))


class TestRun:
    def test_leaves_everything(self, finished):
        for name in ("report.md", "curves.png", "metrics.json", "README.md", "tokenizer.json", "model.safetensors"):
            assert (finished / name).is_file(), name
        assert any((finished / "discriminator").iterdir())
        assert (finished / "seqkd" / "model.safetensors").is_file()

    def test_table_matches_the_saved_models(self, finished, tiny_model_dir, recipe_folder):
        saved = json.loads((finished / "metrics.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(finished)
        data = Dataset.from_json(str(recipe_folder / "test.jsonl"))
        rows = tokenize_teacher_data(data, tokenizer, max_completion_length=12)[0].to_list()
        for name, folder in (("undistilled", tiny_model_dir), ("SeqKD", finished / "seqkd"), ("GAD", finished)):
            model = AutoModelForCausalLM.from_pretrained(folder)
            expected = teacher_nll(model, tokenizer, rows)
            assert saved["results"][name]["teacher_nll"] == pytest.approx(expected, rel=1e-4), name
        judge = lambda prompts, texts: {"blue": [float("b" in text) for text in texts]}  # noqa: E731
        samples = saved["evaluation"]["samples"]
        settings = {"max_new_tokens": 12, "num_samples": samples, "batch_size": 64, "seed": 0}
        expected = evaluate_student(model, tokenizer, rows, judge, **settings)
        assert saved["results"]["GAD"] == pytest.approx(expected, rel=1e-4)

    def test_students_learned_and_seqkd_took_as_many_steps(self, finished):
        saved = json.loads((finished / "metrics.json").read_text())
        nll = {name: metrics.get("teacher_nll") for name, metrics in saved["results"].items()}
        assert nll["GAD"] < nll["undistilled"] and nll["SeqKD"] < nll["undistilled"]
        assert (
            saved["seqkd"]["steps"] == saved["curves"]["SeqKD"][-1]["step"] == saved["curves"]["GAD"][-1]["step"] == 12
        )
        assert saved["seqkd"]["batch_size"] == 2 and saved["seqkd"]["learning_rate"] == 1e-3
        best = max(
            point["blue@t1.0"]
            for point in saved["curves"]["SeqKD"][1:]
            if point["step"] != saved["seqkd"]["best_step"]
        )
        assert saved["seqkd"]["best_step"] in {point["step"] for point in saved["curves"]["SeqKD"]} and best <= 1
        assert len(saved["curves"]["GAD"]) == 9
        assert saved["headline"] == "blue@t1.0" and saved["counts"]["train"]["kept"] == 12

    def test_another_run_does_not_mix_in(self, finished, recipe_folder, other_model_dir):
        recipe = load_recipe(write_recipe(recipe_folder, other_model_dir, finished), [])
        with pytest.raises(RecipeError, match="holds another run .model_name_or_path"):
            run(recipe)

    def test_report_reads_well(self, finished):
        text = (finished / "report.md").read_text()
        assert "from a test" in text and "| blue, T=1.0 |" in text and "step " in text
        assert "| rows | 12 | 4 |" in text

    def test_lora_without_judge_and_test_split(self, tmp_path, recipe_folder, tiny_model_dir):
        path = write_recipe(
            recipe_folder,
            tiny_model_dir,
            tmp_path / "out",
            dataset_name=str(recipe_folder / "train.jsonl"),
            sample_metrics=None,
            use_peft=True,
            lora_r=4,
            lora_target_modules=["q_proj", "v_proj"],
            max_steps=2,
        )
        run(load_recipe(path, []))
        saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert saved["headline"] == "teacher_nll"
        # Twelve rows of four prompts: one prompt is held out whole
        assert saved["evaluation"]["prompts"] == 3 and saved["counts"]["train"]["kept"] == 9
        points = {point["step"]: point["teacher_nll"] for point in saved["curves"]["SeqKD"]}
        assert points[saved["seqkd"]["best_step"]] == min(points[1], points[2])
        for folder in ("out", "out/seqkd"):
            assert (tmp_path / folder / "adapter_model.safetensors").is_file()
            AutoModelForCausalLM.from_pretrained(tmp_path / folder)

    def test_bad_data_ends_it_before_a_model_is_touched(self, tmp_path, recipe_folder):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
        path = write_recipe(recipe_folder, "no/such-model", tmp_path / "out", dataset_name=str(tmp_path / "bad.jsonl"))
        with pytest.raises(TeacherDataError, match="Row 0: `completion` is empty"):
            run(load_recipe(path, []))

    def test_two_processes(self, tmp_path, recipe_folder, tiny_model_dir):
        path = write_recipe(
            recipe_folder, tiny_model_dir, tmp_path / "out", max_steps=2, per_device_train_batch_size=4
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*launcher, "-m", "trl_bbkd", str(path)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report.md, curves.png and metrics.json") == 1
        saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert saved["seqkd"]["batch_size"] == 2
        assert set(saved["results"]) == {"undistilled", "SeqKD", "GAD", "teacher"}
        assert saved["command"] == f"trl-bbkd train {path.name}"


class TestSeqKD:
    def test_rows_train_on_the_teacher_ids_only(self, tokenizer, standard_rows):
        data, _ = tokenize_teacher_data(Dataset.from_list(standard_rows), tokenizer, max_completion_length=40)
        for source, row in zip(data, sft_rows(data, tokenizer), strict=True):
            prompt = tokenizer(source["prompt"])["input_ids"]
            assert row["input_ids"] == prompt + source["teacher_ids"]
            assert row["labels"] == [-100] * len(prompt) + source["teacher_ids"]
        stream, _ = tokenize_teacher_data(
            Dataset.from_list(standard_rows).to_iterable_dataset(), tokenizer, max_completion_length=40
        )
        assert list(sft_rows(stream, tokenizer)) == sft_rows(data, tokenizer).to_list()

    @pytest.mark.parametrize(
        "sequences, generations, largest, shape",
        [(64, 8, 64, (8, 1)), (64, 8, 4, (4, 2)), (8, 8, 8, (1, 1)), (4, 8, 4, (1, 1)), (56, 8, 4, (1, 7))],
    )
    def test_prompts_per_step_are_those_of_the_method(self, sequences, generations, largest, shape):
        assert batch_shape(sequences, generations, largest) == shape

    @pytest.mark.parametrize("max_steps", [1, 3, 8, 100, 601])
    def test_curve_ends_at_the_last_step(self, max_steps):
        steps = curve_steps(max_steps)
        assert max(steps) == max_steps and min(steps) >= 1 and len(steps) == min(8, max_steps)

    def test_curve_is_read_back_from_the_log(self):
        log = [{"step": 1, "loss": 2.0}, {"step": 2, "held_out/blue@t1.0": 0.5}, {"step": 3, "loss": 1.0}]
        assert curve(log) == [{"step": 2, "blue@t1.0": 0.5}]

    def test_measuring_does_not_change_training(self, tmp_path, tiny_model_dir, standard_rows):
        from trl_bbkd.gad.gad_config import GADConfig
        from trl_bbkd.gad.gad_trainer import GADTrainer

        def train(callbacks):
            args = GADConfig(
                str(tmp_path / str(len(callbacks))),
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                disable_tqdm=True,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=8,
                max_steps=4,
                learning_rate=1e-3,
                gradient_checkpointing=False,
            )
            data = Dataset.from_list(standard_rows)
            trainer = GADTrainer(tiny_model_dir, args=args, train_dataset=data, callbacks=callbacks)
            trainer.train()
            rows = trainer.train_dataset.to_list()[:2]
            return trainer.model.state_dict(), rows, trainer

        plain, rows, trainer = train([])
        measure = lambda model: evaluate_student(model, trainer.processing_class, rows, max_new_tokens=4)  # noqa: E731
        measured, _, trainer = train([CurveCallback(measure)])
        assert len(curve(trainer.state.log_history)) == 4
        assert all(torch.equal(value, measured[name]) for name, value in plain.items())


class TestParts:
    def test_hold_out(self, standard_rows):
        data = Dataset.from_list([{**row, "prompt": str(number)} for number, row in enumerate(standard_rows * 4)])
        train, test = hold_out(data, 256)
        assert len(test) == math.floor(len(data) * 0.05) and len(train) + len(test) == len(data)
        assert not set(train["prompt"]) & set(test["prompt"])
        assert hold_out(data, 256)[1]["prompt"] == test["prompt"]
        with pytest.raises(TeacherDataError, match="One row"):
            hold_out(data.take(1), 256)

    def test_hold_out_of_a_stream(self, standard_rows):
        data = Dataset.from_list([{"prompt": str(i), "completion": "a"} for i in range(300)]).to_iterable_dataset()
        train, test = hold_out(data, 256)
        assert len(list(test)) == 256 and len(list(train)) == 44

    def test_resume_flag(self):
        assert [checkpoint_to_resume(flag) for flag in ("true", "False", None, "out/checkpoint-3")] == [
            True,
            None,
            None,
            "out/checkpoint-3",
        ]

    def test_command(self):
        recipe = Path("recipes/gad.yaml")
        overrides = ["--learning_rate", "1e-6", "--hub_token", "hf_x"]
        expected = "trl-bbkd train recipes/gad.yaml --learning_rate 1e-6"
        assert command(recipe, ["recipes/gad.yaml", *overrides]) == expected
        assert command(recipe, ["trl_bbkd/__main__.py", "recipes/gad.yaml", *overrides]) == expected
        assert command(recipe.absolute(), ["recipes/gad.yaml", *overrides]) == expected
        assert command(recipe, ["pytest"]) is None and command(None, ["x"]) is None

    def test_quality_is_the_judge_then_the_nll(self):
        class Judged:
            judged_metrics, headline = ["blue"], "blue@t1.0"

        class Unjudged:
            judged_metrics, headline = [], "teacher_nll"

        good, tied, bad = ({"blue@t1.0": b, "teacher_nll": n} for b, n in ((0.5, 3.0), (0.0, 1.0), (0.0, 2.0)))
        assert sorted([good, bad, tied], key=lambda metrics: quality(metrics, Judged)) == [bad, tied, good]
        assert sorted([good, bad, tied], key=lambda metrics: quality(metrics, Unjudged)) == [good, bad, tied]

    def test_unfinished_folder_is_no_other_run(self, tmp_path):
        refuse_another_run(str(tmp_path), {"method": "gad"})
        (tmp_path / "metrics.json").write_text('{"inputs": {"method": "gad"}}')
        refuse_another_run(str(tmp_path), {"method": "gad"})
        with pytest.raises(RecipeError, match="method: gad"):
            refuse_another_run(str(tmp_path), {"method": "llkd"})
