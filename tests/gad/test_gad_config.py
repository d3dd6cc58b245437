import pytest
import torch
from peft import LoraConfig

from trl_bbkd.teacher_data import TeacherDataError

from .helpers import make_config, make_trainer


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fp16": True}, "does not support fp16"),
        ({"warmup_epochs": 3.0}, "warmup_epochs counts towards num_train_epochs .2.*got 3.0"),
        ({"warmup_epochs": -1.0}, "got -1.0"),
        ({"discriminator_updates_per_batch": -1}, "discriminator_updates_per_batch must be at least 0, got -1"),
        ({"discriminator_max_grad_norm": 0.0}, "discriminator_max_grad_norm must be positive, got 0.0"),
        ({"discriminator_sft_weight": 1.0}, "needs discriminator_head='likelihood'"),
        (
            {"discriminator_sft_weight": 1.0, "discriminator_head": "likelihood", "warmup_epochs": 0.0},
            "acts during warm-up, but warmup_epochs is 0",
        ),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"warmup_learning_rate": 1e-3, "learning_rate": 0.0}, "warmup_learning_rate needs a positive learning_rate"),
    ],
)
def test_bad_values_are_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **config)


def no_model_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP"])
def test_sharding_is_refused_before_loading(tiny_model_dir, tmp_path, standard_rows, monkeypatch, name):
    config = make_config(tmp_path)
    no_model_is_loaded(monkeypatch)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"does not support {name} yet"):
        from trl_bbkd.gad.gad_trainer import GADTrainer

        GADTrainer(tiny_model_dir, args=config)


def test_bad_teacher_text_is_refused_before_loading(tiny_model_dir, tmp_path, standard_rows, monkeypatch):
    no_model_is_loaded(monkeypatch)
    with pytest.raises(TeacherDataError, match="Row 1: `completion` is empty"):
        make_trainer(tmp_path, tiny_model_dir, [standard_rows[0], {**standard_rows[1], "completion": " "}])
    with pytest.raises(TeacherDataError, match="No room for an answer"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, max_completion_length=510)


def test_a_setting_given_twice_is_refused(tiny_model_dir, tmp_path, standard_rows):
    with pytest.raises(ValueError, match="`discriminator` to the trainer or set it in `args`, not both"):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"discriminator": tiny_model_dir},
            discriminator=tiny_model_dir,
        )
    with pytest.raises(ValueError, match="`discriminator_peft_config` or set"):
        make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"discriminator_peft_config": LoraConfig()},
            discriminator_lora_kwargs={"r": 4},
        )


def test_discriminator_as_a_lora_adapter_from_the_config(tiny_model_dir, other_model_dir, tmp_path, standard_rows):
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        discriminator=other_model_dir,
        discriminator_lora_kwargs={"r": 4, "target_modules": "all-linear"},
    )
    trainable = {name for name, parameter in trainer.discriminator.named_parameters() if parameter.requires_grad}
    assert trainable >= {"score_head.weight", "score_head.bias"}
    assert all("lora_" in name or "score_head" in name for name in trainable)
    assert trainer.discriminator.score_head.in_features == 48
    assert trainer.discriminator.score_head.weight.dtype == torch.float32
