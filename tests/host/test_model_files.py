"""Models on disk: adapters, their base models, and embeddings that were added."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.proxykd.helpers import make_kd_trainer
from trl_bbkd.errors import ProxyModelError
from trl_bbkd.host.model_files import load_model
from trl_bbkd.host.model_paths import base_of_adapter, base_of_student, no_model, refuse_adapter_path


@pytest.fixture
def adapter_on(tmp_path):
    """Writes an adapter's folder that names a base model."""

    def write(base):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
        return str(tmp_path / "adapter")

    return write


class TestBaseOfAnAdapter:
    def test_a_model_has_none(self, tiny_model_dir):
        assert base_of_adapter(tiny_model_dir) is None and base_of_adapter("Qwen/Qwen2.5-0.5B") is None

    def test_an_id_of_the_hub_or_a_folder(self, adapter_on, tiny_model_dir, monkeypatch, tmp_path):
        for base in ("Qwen/Qwen2.5-0.5B", "gpt2", tiny_model_dir):
            assert base_of_adapter(adapter_on(base)) == base
        (tmp_path / "models/base").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for base in ("models/base", "./models/base"):
            assert base_of_adapter(adapter_on(base)) == base.removeprefix("./")
        assert base_of_adapter(adapter_on("~/models/base")) == str(tmp_path / "models/base")

    @pytest.mark.parametrize(
        ("base", "reason"),
        [
            ("/no/such/model", "its base model /no/such/model is not there. Set"),
            ("runs/first/base", r"its base model runs/first/base is not there \(a relative path, looked for from /"),
            ("./base", r"its base model \./base is not there \(a relative path, looked for from /"),
            (None, "it does not name its base model. Set `base_model_name_or_path`"),
        ],
    )
    def test_that_is_not_there(self, adapter_on, tiny_model_dir, tmp_path, base, reason):
        adapter = adapter_on(base)
        with pytest.raises(ValueError, match=f"^model_name_or_path='{adapter}' is an adapter, and {reason}"):
            base_of_student(adapter)
        with pytest.raises(ProxyModelError, match=f"^The proxy {adapter} is an adapter, and {reason}"):
            make_kd_trainer(tmp_path / "out", tiny_model_dir, adapter)
        with pytest.raises(ValueError, match="The student .* is an adapter. Hand in PeftModel.from_pretrained"):
            refuse_adapter_path(adapter, "student")

    def test_that_could_be_on_the_hub_is_named_as_what_is_missing(self, adapter_on, tiny_model_dir, tmp_path):
        """It is the base model that there is not, not the adapter."""
        adapter = adapter_on("runs/base")
        message = f"^base_model_name_or_path of the adapter {adapter}='runs/base' is neither .* there is no folder /"
        with pytest.raises(ProxyModelError, match=message):
            make_kd_trainer(tmp_path / "out", tiny_model_dir, adapter)


def test_no_model_says_where_it_looked():
    assert no_model("model_name_or_path", "runs/base", "a student", OSError("no such id.\nmore")).endswith(
        "runs/base' is neither a folder with a student nor a model on the Hub: no such id, and there is no folder "
        f"{Path.cwd()}/runs/base."
    )


@pytest.mark.parametrize("added", [0, 3])
@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"]])
def test_an_adapter_with_embeddings_of_its_own(tmp_path, tiny_model_dir, added, modules_to_save):
    """PEFT writes the embeddings that were added or trained, but its reader takes a base model as it is on disk."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens([f"<new {number}>" for number in range(added)])
    if added:
        model.resize_token_embeddings(len(tokenizer))
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        modules_to_save=modules_to_save,
    )
    model = get_peft_model(model, lora).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = load_model(str(tmp_path), trainable=True).eval()
    assert loaded.get_input_embeddings().weight.size(0) == len(tokenizer)
    ids = torch.tensor([[5, 6, len(tokenizer) - 1]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
