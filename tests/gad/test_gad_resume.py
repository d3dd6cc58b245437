import json
import shutil

import pytest
from peft import LoraConfig

from .helpers import are_different, assert_same_weights, make_trainer, weights


LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("resume_at", [2, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_model_dir, tmp_path, standard_rows, lora, resume_at):
    """Warm-up has 3 steps: the first checkpoint lies inside it, the second in the adversarial stage."""

    def trainer(name):
        kwargs = {}
        if lora:
            kwargs["peft_config"] = LoraConfig(**LORA, task_type="CAUSAL_LM")
            kwargs["discriminator_peft_config"] = LoraConfig(**LORA)
        return make_trainer(
            tmp_path / name,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs=kwargs,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            beta=0.1,
            discriminator_head="likelihood",
        )

    straight = trainer("run")
    straight.train()
    final = straight.state.log_history[5]
    checkpoint = tmp_path / "run" / f"checkpoint-{resume_at}"
    phase = json.loads((checkpoint / "gad_state.json").read_text())
    assert phase == {"phase": "warmup" if resume_at == 2 else "adversarial", "warmup_steps": 3}

    resumed = trainer("run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert_same_weights(weights(straight.discriminator), weights(resumed.discriminator))
    assert resumed.state.log_history[5]["kl"] == final["kl"] > 0
    states = [
        [t.discriminator_trainer.optimizer.state[p]["exp_avg"] for p in t.discriminator_trainer.parameters]
        for t in (straight, resumed)
    ]
    assert all((first == second).all() for first, second in zip(*states, strict=True))


def test_an_adapter_discriminator_is_not_loaded_into_the_student(tiny_model_dir, tmp_path, standard_rows):
    """transformers loads every adapter it finds one level below a checkpoint into the student."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        trainer_kwargs={"discriminator_peft_config": LoraConfig(**LORA)},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "discriminator" / "backbone" / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("*/adapter_model.safetensors"))


def test_what_is_missing_is_named(tiny_model_dir, tmp_path, standard_rows):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "beta": 0.1}
    make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train()
    shutil.move(tmp_path / "warmed_up_student", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="KL reference of this run.*warmed_up_student"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train(str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "gad_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="gad_state.json is missing"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **config).train(str(tmp_path / "checkpoint-3"))


def test_save_model_leaves_student_and_discriminator(tiny_model_dir, tmp_path, standard_rows):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_bbkd.gad.discriminator import Discriminator

    trainer = make_trainer(tmp_path / "run", tiny_model_dir, standard_rows, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert_same_weights(weights(trainer.model), weights(student))
    assert are_different(weights(student), weights(AutoModelForCausalLM.from_pretrained(tiny_model_dir)))
    discriminator = Discriminator.from_pretrained(tmp_path / "final" / "discriminator")
    assert_same_weights(weights(trainer.discriminator), weights(discriminator))
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == "<|im_end|>"
