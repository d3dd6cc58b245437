import ast
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig

from tests.processes import on_processes
from tests.recipes import command_line, write_recipe
from trl_bbkd.data.teacher_data import load_teacher_data, tokenize_teacher_data
from trl_bbkd.errors import RecipeError, TeacherDataError
from trl_bbkd.evaluation.student import evaluate_student, teacher_nll
from trl_bbkd.reports.held_out import read_held_out
from trl_bbkd.runs.job import checkpoint_to_resume, command, hold_out, refuse_another_run
from trl_bbkd.runs.recipe import RecipeArguments, RunArguments, load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.runs.text_job import TextJob, quality, sampling_plan
from trl_bbkd.seqkd.trainer import CurveCallback, batch_shape, curve, curve_steps, sft_rows


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
    tmp_path, recipe_folder, tiny_model_dir, other_model_dir, capsys, monkeypatch
):
    # Without a report there is nothing to sample for
    monkeypatch.setattr("trl_bbkd.runs.text_job.evaluate_student", pytest.fail)
    gad_only = dict.fromkeys(["num_generations", "discriminator_learning_rate"])
    changes = {"method": "proxykd", "proxy_model": other_model_dir, "stages": ["cache"], **gad_only}
    run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))
    assert "leaves the student's training out" in capsys.readouterr().out
    assert (tmp_path / "out/proxy/targets/store.json").is_file()
    assert not (tmp_path / "out/report.md").exists() and not (tmp_path / "out/model.safetensors").exists()


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

    def test_students_learned_and_seqkd_took_as_many_steps(self, finished, recipe_folder):
        saved = json.loads((finished / "metrics.json").read_text())
        nll = {name: metrics.get("teacher_nll") for name, metrics in saved["results"].items()}
        assert nll["GAD"] < nll["undistilled"] and nll["SeqKD"] < nll["undistilled"]
        assert (
            saved["seqkd"]["steps"] == saved["curves"]["SeqKD"][-1]["step"] == saved["curves"]["GAD"][-1]["step"] == 12
        )
        assert saved["seqkd"]["batch_size"] == 2 and saved["seqkd"]["learning_rate"] == 1e-3
        # The curve's other points are brief measurements: what is on disk is better than all of them under the same
        tokenizer = AutoTokenizer.from_pretrained(finished)
        data = Dataset.from_json(str(recipe_folder / "test.jsonl"))
        rows = tokenize_teacher_data(data, tokenizer, max_completion_length=12)[0].to_list()
        kept = evaluate_student(
            AutoModelForCausalLM.from_pretrained(finished / "seqkd"),
            tokenizer,
            rows,
            lambda prompts, texts: {"blue": [float("b" in text) for text in texts]},
            max_new_tokens=12,
            temperatures=(1.0,),
            num_samples=math.ceil(saved["evaluation"]["samples"] / 2),
            batch_size=64,
        )
        points = {point["step"]: (point["blue@t1.0"], -point["teacher_nll"]) for point in saved["curves"]["SeqKD"][1:]}
        points.pop(saved["seqkd"]["best_step"])
        assert len(points) == 7 and (kept["blue@t1.0"], -kept["teacher_nll"]) > max(points.values())
        assert len(saved["curves"]["GAD"]) == 9
        assert saved["headline"] == "blue@t1.0" and saved["counts"]["train"]["kept"] == 12

    def test_what_students_said_is_kept_prompt_by_prompt(self, finished, recipe_folder):
        metrics, lines = json.loads((finished / "metrics.json").read_text()), read_held_out(finished)
        rows = [json.loads(line) for line in (recipe_folder / "test.jsonl").read_text().splitlines()]
        assert sorted(number for line in lines for number in line["rows"]) == list(range(len(rows)))
        for line in lines:
            assert {rows[number]["prompt"] for number in line["rows"]} == {line["prompt"]}
            assert [rows[number]["completion"] for number in line["rows"]] == line["teacher"]
        for name in ("undistilled", "SeqKD", "GAD"):
            found = [line["students"][name] for line in lines]
            tokens = [sum(line["teacher_tokens"]) for line in lines]
            texts = [text for answers in found for text in answers["samples"]["t1.0"]]
            results = metrics["results"][name]
            assert sum("b" in text for text in texts) / len(texts) == pytest.approx(results["blue@t1.0"])
            nll = sum(
                count * answers["values"]["teacher_nll"] for count, answers in zip(tokens, found, strict=True)
            ) / sum(tokens)
            assert nll == pytest.approx(results["teacher_nll"])
            assert sum(answers["values"]["distinct_valid@t1.0"] for answers in found) == results["distinct_valid@t1.0"]
        difference = metrics["differences"]["SeqKD"]["distinct_valid@t1.0"]["difference"]
        own, other = (metrics["results"][name]["distinct_valid@t1.0"] for name in ("GAD", "SeqKD"))
        assert difference == pytest.approx(own - other)
        assert "blue@equal_diversity" in metrics["differences"]["SeqKD"]

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
        assert saved["evaluation"]["prompts"] == 1 and saved["counts"]["train"]["kept"] == 9
        assert saved["counts"]["test"]["kept"] == 3
        points = {point["step"]: point["teacher_nll"] for point in saved["curves"]["SeqKD"]}
        assert points[saved["seqkd"]["best_step"]] == min(points[1], points[2])
        for folder in ("out", "out/seqkd"):
            assert (tmp_path / folder / "adapter_model.safetensors").is_file()
            AutoModelForCausalLM.from_pretrained(tmp_path / folder)

    def test_an_adapter_is_trained_on(self, tmp_path, recipe_folder, tiny_model_dir, standard_rows):
        adapter = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        adapter.save_pretrained(tmp_path / "adapter")
        before = load_file(tmp_path / "adapter/adapter_model.safetensors")
        changes = {"max_steps": 2, "sample_metrics": None}
        run(load_recipe(write_recipe(recipe_folder, str(tmp_path / "adapter"), tmp_path / "out", **changes)))
        rows = Dataset.from_json(str(recipe_folder / "test.jsonl"))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        rows = tokenize_teacher_data(rows, tokenizer, max_completion_length=12)[0].to_list()
        undistilled = json.loads((tmp_path / "out/metrics.json").read_text())["results"]["undistilled"]
        assert undistilled["teacher_nll"] == pytest.approx(teacher_nll(adapter, tokenizer, rows), rel=1e-4)
        for folder in ("out", "out/seqkd"):
            after = load_file(tmp_path / folder / "adapter_model.safetensors")
            assert set(after) == set(before) and any(not torch.equal(after[name], before[name]) for name in before)
            config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == tiny_model_dir

    def test_the_terminal_shows_a_handful_of_the_log(self, tmp_path, recipe_folder, tiny_model_dir, capsys):
        changes = {"max_steps": 2, "seqkd_baseline": False, "eval_prompts": 2, "eval_samples": 3}
        run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))
        lines = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss")]
        assert len(lines) == 2 and "discriminator/accuracy" in lines[0] and all(len(line) < 9 for line in lines)
        saved = json.loads((tmp_path / "out/metrics.json").read_text())
        assert max(len(entry) for entry in saved["log_history"]) > 25
        assert saved["evaluation"]["prompts"] == 2 and saved["evaluation"]["samples"] == 3
        assert 0 < saved["differences"]["undistilled"]["teacher_nll"]["standard_error"]

    @pytest.mark.parametrize("method", ["proxykd", "gad"])
    def test_one_tokenizer(
        self, tmp_path, recipe_folder, tiny_model_dir, other_model_dir, conversational_rows, method
    ):
        """Rows are rendered with the template that the recipe names, and it is saved."""
        (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in conversational_rows))
        changes = {
            "dataset_name": str(tmp_path),
            "chat_template_path": str(tmp_path / "t.jinja"),
            "sample_metrics": None,
        }
        if method == "gad":
            del changes["chat_template_path"]
        else:
            changes |= {"method": method, "proxy_model": other_model_dir} | dict.fromkeys(
                ["num_generations", "discriminator_learning_rate"]
            )
        job = TextJob(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))
        rendered = job.tokenizer.apply_chat_template(conversational_rows[0]["prompt"], tokenize=False)
        assert rendered.startswith("[" if method == "proxykd" else "<|im_start|>")
        assert job.measure.keywords["tokenizer"] is job.tokenizer

    def test_bad_data_ends_it_before_a_model_is_touched(self, tmp_path, recipe_folder):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
        path = write_recipe(recipe_folder, "no/such-model", tmp_path / "out", dataset_name=str(tmp_path / "bad.jsonl"))
        with pytest.raises(TeacherDataError, match="Row 0: `completion` is empty"):
            run(load_recipe(path, []))

    def test_two_processes(self, tmp_path, recipe_folder, tiny_model_dir):
        path = write_recipe(
            recipe_folder, tiny_model_dir, tmp_path / "out", max_steps=2, per_device_train_batch_size=4
        )
        printed = on_processes(2, command_line, tmp_path, path)
        assert "".join(printed).count("report.md, curves.png and metrics.json") == 1
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
        from trl_bbkd.gad.config import GADConfig
        from trl_bbkd.gad.trainer import GADTrainer

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

    def test_no_prompt_is_on_both_sides(self):
        rows = [{"prompt": f"{i // 4}", "completion": str(i)} for i in range(400)]
        messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        texts = [{"note": row["prompt"], "label": 0} for row in rows]
        for data, column in ((rows, "prompt"), (messages, "prompt"), (texts, "note")):
            train, test = hold_out(Dataset.from_list(data), 256, column)
            assert len(test) == 20 and len(train) == 380
            inputs = [{str(value) for value in part[column]} for part in (train, test)]
            assert not inputs[0] & inputs[1] and len(inputs[1]) == 5

    def test_one_prompt_for_all_rows_is_divided_with_a_warning(self, caplog):
        train, test = hold_out(Dataset.from_list([{"prompt": "a", "completion": str(i)} for i in range(40)]), 256)
        assert (len(train), len(test)) == (38, 2) and "all rows have the same prompt" in caplog.text

    def test_a_prompt_that_is_too_large_stays_in_training(self):
        data = Dataset.from_list([{"prompt": prompt, "completion": "a"} for prompt in ["big"] * 50 + ["small"] * 3])
        train, test = hold_out(data, 256)
        assert set(test["prompt"]) == {"small"} and len(train) == 50

    @pytest.mark.parametrize(("size", "rows"), [(0.25, 8), (5, 4)])
    def test_test_split_size_takes_whole_prompts(self, tmp_path, size, rows):
        lines = [json.dumps({"prompt": f"{i // 4}", "completion": str(i)}) for i in range(32)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        arguments = RunArguments(dataset_name=str(tmp_path / "rows.jsonl"))
        train, test = load_teacher_data(arguments, DatasetMixtureConfig(test_split_size=size))
        assert len(test) == rows and len(train) == 32 - rows and not set(train["prompt"]) & set(test["prompt"])

    @pytest.mark.parametrize("size", [40, 1.0 - 1e-9, 32])
    def test_a_test_split_of_all_rows(self, tmp_path, size):
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 32)
        with pytest.raises(TeacherDataError, match="`test_split_size: .*` takes .* of 32 rows. Name fewer"):
            load_teacher_data(
                RunArguments(dataset_name=str(tmp_path / "rows.jsonl")), DatasetMixtureConfig(test_split_size=size)
            )

    def test_hold_out_of_a_stream(self, standard_rows):
        data = Dataset.from_list([{"prompt": str(i), "completion": "a"} for i in range(300)]).to_iterable_dataset()
        train, test = hold_out(data, 256)
        assert len(list(test)) == 256 and len(list(train)) == 44
        data = Dataset.from_list([{"prompt": str(i % 100), "completion": "a"} for i in range(300)])
        train, test = (list(part) for part in hold_out(data.to_iterable_dataset(), 10))
        assert [row["prompt"] for row in test] == [str(i) for i in range(10)] and len(train) == 270
        # A short one is not held out whole
        train, test = hold_out(data.take(40).to_iterable_dataset(), 256)
        assert len(list(test)) == 2 and len(list(train)) == 38

    @pytest.mark.parametrize(
        ("steps", "prompts", "samples", "curve_samples"),
        [(2, 16, 1, 1), (100, 100, 3, 2), (250, 250, 8, 4), (9999, 256, 8, 4)],
    )
    def test_the_reports_sampling_scales_with_the_training(self, steps, prompts, samples, curve_samples):
        plan = sampling_plan(RecipeArguments(), steps, 1000, has_baseline=True)
        assert (plan.prompts, plan.samples, plan.curve_samples) == (prompts, samples, curve_samples)
        assert sampling_plan(RecipeArguments(), steps, 10, has_baseline=True).prompts == 10

    def test_the_reports_sampling_as_the_recipe_says(self):
        plan = sampling_plan(RecipeArguments(eval_prompts=20, eval_samples=8), 2, 1000, has_baseline=True)
        assert (plan.prompts, plan.samples, plan.once) == (20, 8, 20 * 17)
        # Three students at their ends; along two steps GAD once and SeqKD twice
        assert plan.all == 3 * plan.once + 3 * 20 * 4 and f"{plan.all:,} in the whole run" in str(plan)

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
        for resumed in (["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint=true"]):
            assert command(recipe, ["recipes/gad.yaml", *resumed, *overrides]) == expected
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
