import shutil
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import build_model
from trl_bbkd.discriminator.model import build_discriminator

from .helpers import discriminator_steps, make_trainer


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


@pytest.fixture(scope="module")
def foreign_model_dir(tmp_path_factory):
    """A model with as many tokens, two of which have changed places."""
    directory = tmp_path_factory.mktemp("foreign")
    build_model(directory)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"first":').replace('"b":', '"a":').replace('"first":', '"b":'))
    return str(directory)


def copy_without_tokenizer(model_dir, destination):
    shutil.copytree(model_dir, destination, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    return str(destination)


@pytest.mark.parametrize("saved", [False, True])
def test_another_tokenizer_is_refused_before_loading(
    tiny_model_dir, foreign_model_dir, tmp_path, standard_rows, no_model_is_loaded, monkeypatch, saved
):
    path = foreign_model_dir
    if saved:  # A discriminator of another run, as an adapter: its tokenizer lies with its base model
        monkeypatch.undo()
        build_discriminator(path, "scalar", peft_config=LoraConfig(target_modules="all-linear")).save_pretrained(
            tmp_path / "discriminator"
        )
        path = str(tmp_path / "discriminator")
    message = f"{path}.*and the student .{tiny_model_dir}. have different tokenizers.*'a' has id .*choose a model of"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, discriminator=path)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_embedding_without_room_for_every_token_is_refused(tiny_model_dir, tmp_path, standard_rows, loaded):
    small = copy_without_tokenizer(tiny_model_dir, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(300)
    model.save_pretrained(small)
    with pytest.raises(ValueError, match="has embeddings for 300 tokens, but .* has ids up to 329"):
        make_trainer(
            tmp_path, tiny_model_dir, standard_rows, trainer_kwargs={"discriminator": model if loaded else small}
        )


def test_padded_embeddings_and_a_checkpoint_without_tokenizer_are_fine(
    tiny_model_dir, other_model_dir, tmp_path, standard_rows
):
    padded = tmp_path / "padded"
    model = AutoModelForCausalLM.from_pretrained(other_model_dir)
    model.resize_token_embeddings(384)
    model.save_pretrained(padded)
    assert AutoConfig.from_pretrained(padded).vocab_size == 384
    for has_tokenizer in (False, True):
        if has_tokenizer:
            AutoTokenizer.from_pretrained(other_model_dir).save_pretrained(padded)
        trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows, discriminator=str(padded), max_steps=1)
        trainer.train()
        assert discriminator_steps(trainer) == 1
        assert trainer.discriminator.score_head.in_features == 48


def test_4_bits_need_an_adapter_to_train(tiny_model_dir, tmp_path, standard_rows, no_model_is_loaded):
    with pytest.raises(ValueError, match="discriminator_load_in_4bit needs a LoRA discriminator"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, discriminator_load_in_4bit=True)
    with pytest.raises(ValueError, match="discriminator_load_in_4bit has no effect with discriminator='shared'"):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"peft_config": LoraConfig(target_modules="all-linear")},
            discriminator_load_in_4bit=True,
            discriminator="shared",
        )
    with pytest.raises(ValueError, match="acts when a discriminator is loaded, but a loaded one was given"):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={
                "discriminator": AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir)),
                "discriminator_peft_config": LoraConfig(target_modules="all-linear"),
            },
            discriminator_load_in_4bit=True,
        )
    saved = Path(tmp_path / "saved")
    saved.mkdir()
    (saved / "discriminator_config.json").write_text('{"head": "scalar", "is_adapter": false}')
    with pytest.raises(ValueError, match="discriminator_load_in_4bit needs a LoRA discriminator"):
        make_trainer(
            tmp_path, tiny_model_dir, standard_rows, discriminator=str(saved), discriminator_load_in_4bit=True
        )
