"""Adapters as students of a recipe, with embeddings of their own."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes import write_recipe
from trl_bbkd.host.model_files import load_model
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


EMBEDDINGS = "base_model.model.model.embed_tokens.weight"


@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"]], ids=["added", "added and trained"])
def test_embeddings_that_were_added_are_trained_on(tmp_path, recipe_folder, tiny_model_dir, modules_to_save):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=modules_to_save)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    changes = {"max_steps": 1, "seqkd_baseline": False, "eval_prompts": 1, "eval_samples": 1}
    run(load_recipe(write_recipe(recipe_folder, str(tmp_path / "adapter"), tmp_path / "out", **changes)))

    after = load_file(tmp_path / "out/adapter_model.safetensors")
    assert set(after) == set(before) and after[EMBEDDINGS].size(0) == len(tokenizer)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(after[EMBEDDINGS], before[EMBEDDINGS]) == (modules_to_save is None)
    saved = load_model(str(tmp_path / "out"))
    assert saved.get_input_embeddings().weight.size(0) == len(tokenizer)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model_dir
