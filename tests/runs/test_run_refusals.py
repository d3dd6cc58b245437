"""What a run refuses in one line, before it trains."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.recipes import write_recipe
from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.runs.text_job import TextJob


class TestRefusals:
    """One error that names the key, before any model is loaded."""

    @pytest.fixture
    def models(self, tmp_path_factory, tiny_model_dir):
        """Folders that a student cannot be loaded from."""
        config = json.loads((Path(tiny_model_dir) / "config.json").read_text())
        adapter = {"peft_type": "LORA", "base_model_name_or_path": tiny_model_dir}
        files = {
            "no_config": {},
            "no_architecture": {"config.json": {k: v for k, v in config.items() if k != "architectures"}},
            "no_tokenizer": {"config.json": config, "tokenizer.json": None, "tokenizer_config.json": None},
            "encoder": {"config.json": {"architectures": ["BertModel"], "model_type": "bert"}},
            "adapter": {"adapter_config.json": adapter},
            "lost_adapter": {"adapter_config.json": {**adapter, "base_model_name_or_path": "./gone"}},
            "lost_on_hub": {"adapter_config.json": {**adapter, "base_model_name_or_path": "nobody/gone"}},
        }
        folders = {}
        for name, contents in files.items():
            folders[name] = str(folder := tmp_path_factory.mktemp(name))
            AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
            for file, content in contents.items():
                (folder / file).write_text(json.dumps(content)) if content else (folder / file).unlink()
        return folders

    @pytest.mark.parametrize("max_steps", [3, -1])
    def test_too_few_rows(self, tmp_path, recipe_folder, tiny_model_dir, max_steps):
        """By the trainer before it loads anything."""
        changes = {"per_device_train_batch_size": 64, "max_steps": max_steps}
        with pytest.raises(RecipeError, match="not a single step would be taken"):
            run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **changes)))
        assert not (tmp_path / "out/report.md").exists() and not (tmp_path / "out/model.safetensors").exists()

    def test_a_training_without_a_step(self, tmp_path, recipe_folder, tiny_model_dir, monkeypatch):
        """Which only its end tells, as of a stream that is too short."""
        monkeypatch.setattr("transformers.Trainer.train", lambda trainer, *args, **kwargs: "an output")
        with pytest.raises(RecipeError, match="^GADTrainer took no optimizer step and learned nothing"):
            run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out")))
        assert not (tmp_path / "out/README.md").exists() and not (tmp_path / "out/model.safetensors").exists()

    def test_no_teacher_name_is_warned_of(self, tmp_path, recipe_folder, tiny_model_dir, caplog):
        recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", teacher_name=None)
        TextJob(load_recipe(recipe))
        assert "No teacher_name is set" in caplog.text

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_name_or_path": "./gone"},
                r"^model_name_or_path='\./gone' is neither a folder with a student nor",
            ),
            ({"discriminator": "./gone"}, r"^discriminator='\./gone' is neither a folder with a model nor"),
            ({"model_name_or_path": "/nowhere/at/all"}, "there is no folder /nowhere/at/all.$"),
            (
                {"model_name_or_path": "{no_config}"},
                "neither a folder with a student.*the folder has no config.json.$",
            ),
            ({"model_name_or_path": "{no_architecture}"}, "its config.json names no `architectures`, by which TRL"),
            (
                {"model_name_or_path": "{no_tokenizer}"},
                "has no tokenizer. Copy the one that the model was trained with",
            ),
            ({"model_name_or_path": "{encoder}"}, "is a BertModel, which writes no text: take a causal language"),
            (
                {"model_name_or_path": "{adapter}", "use_peft": True},
                "is an adapter, which is trained on: take use_peft",
            ),
            ({"model_name_or_path": "{lost_adapter}"}, "is an adapter, and its base model ./gone is not there"),
            (
                {"model_name_or_path": "{lost_on_hub}"},
                "^base_model_name_or_path of the adapter .*='nobody/gone' is neither a folder with a student nor",
            ),
            ({"dataset_streaming": True}, "^A stream has no end that is known.*Set max_steps"),
            ({"resume_from_checkpoint": "true"}, "^There is no finished checkpoint in .*out to resume from"),
            (
                {"resume_from_checkpoint": "out/checkpoint-9"},
                "^resume_from_checkpoint='out/checkpoint-9' is no finished",
            ),
            (
                {"push_to_hub": True, "hub_model_id": "me/a b"},
                "^hub_model_id='me/a b' cannot be a repository.*me/student",
            ),
            (
                {"report_to": "wanbd"},
                "^report_to names 'wanbd', which is not installed here, or no experiment tracker",
            ),
        ],
    )
    def test_of_a_recipe_of_gad(self, tmp_path, recipe_folder, tiny_model_dir, models, changes, message, monkeypatch):
        changes = {
            name: value.format(**models) if isinstance(value, str) else value for name, value in changes.items()
        }
        monkeypatch.setattr("trl_bbkd.runs.text_job.evaluate_student", pytest.fail)
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
