import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.processes import on_processes
from trl_bbkd.discriminator.model import Discriminator, collate_responses

from .helpers import are_different, assert_same_weights, fill_adapters, make_trainer, weights
from .on_processes import trained


LORA = {"r": 4, "target_modules": "all-linear"}
BATCH = collate_responses([[5, 6, 7], [8, 9]], [[20, 21, 22, 2], [30, 31]], pad_token_id=0)


def trainer_on(output_dir, model, rows, backbone, dropout=0.0, student_kwargs=None, **config):
    return make_trainer(
        output_dir,
        model,
        rows,
        trainer_kwargs={
            "peft_config": LoraConfig(**LORA, lora_dropout=dropout, task_type="CAUSAL_LM", **(student_kwargs or {})),
            "discriminator_peft_config": LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
            "discriminator": "shared" if backbone == "shared" else None,
        },
        **{"beta": 0.1, "discriminator_learning_rate": 1e-2, **config},
    )


def frozen_weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_scores_equal_those_of_two_models(tiny_model_dir, tmp_path, standard_rows, head):
    scores, log_likelihoods, outputs = {}, {}, {}
    for backbone in ("shared", "separate"):
        trainer = trainer_on(
            tmp_path, tiny_model_dir, standard_rows, backbone, dropout=0.5, discriminator_head=head, temperature=0.5
        )
        fill_adapters(trainer)
        # Dropout would show if D's mode or modules were the student's
        trainer.model.train()
        trainer.discriminator.train()
        scores[backbone], log_likelihoods[backbone], *_ = trainer.discriminator(**BATCH)
        outputs[backbone] = trainer.discriminator.backbone(input_ids=BATCH["input_ids"])[0]
    torch.testing.assert_close(scores["shared"], scores["separate"], atol=0, rtol=0)
    torch.testing.assert_close(log_likelihoods["shared"], log_likelihoods["separate"], atol=0, rtol=0)
    torch.testing.assert_close(outputs["shared"], outputs["separate"], atol=0, rtol=0)
    assert scores["shared"].std() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_training_equals_that_of_two_models(tiny_model_dir, tmp_path, standard_rows, head, checkpointing):
    runs = {}
    for backbone in ("shared", "separate"):
        trainer = runs[backbone] = trainer_on(
            tmp_path / backbone,
            tiny_model_dir,
            standard_rows,
            backbone,
            dropout=0.1,
            discriminator_head=head,
            gradient_checkpointing=checkpointing,
            max_steps=4,
        )
        fill_adapters(trainer)
        start, base = weights(trainer.model), frozen_weights(trainer.discriminator)
        discriminator_start = weights(trainer.discriminator)
        trainer.train()
        assert are_different(start, weights(trainer.model))
        assert are_different(discriminator_start, weights(trainer.discriminator))
        assert_same_weights(base, frozen_weights(trainer.discriminator))
    assert_same_weights(weights(runs["shared"].model), weights(runs["separate"].model))
    assert_same_weights(weights(runs["shared"].discriminator), weights(runs["separate"].discriminator))
    log = [run.state.log_history[3] for run in runs.values()]
    assert log[0]["kl"] == log[1]["kl"] > 0


def test_each_optimizer_holds_its_own_adapter_and_the_base_is_in_memory_once(tiny_model_dir, tmp_path, standard_rows):
    trainer = trainer_on(
        tmp_path, tiny_model_dir, standard_rows, "shared", discriminator_head="likelihood", max_steps=2
    )
    trainer.train()
    student = {p.data_ptr(): name for name, p in trainer.model.named_parameters()}
    discriminator = {p.data_ptr(): name for name, p in trainer.discriminator.named_parameters()}
    base = {p.data_ptr() for p in AutoModelForCausalLM.from_pretrained(tiny_model_dir).parameters()}
    assert len(student.keys() & discriminator.keys()) == len(base)
    assert not any("lora_" in student[pointer] for pointer in student.keys() & discriminator.keys())

    optimized = {p.data_ptr() for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {name for pointer, name in student.items() if pointer in optimized} == {
        name for name in student.values() if ".default." in name
    }
    assert optimized <= student.keys()
    names = {discriminator[p.data_ptr()] for p in trainer.discriminator_trainer.engine.parameters}
    assert names == {name for name in discriminator.values() if "lora_" in name or "backbone." not in name}


def test_the_student_does_not_notice_its_discriminator(tiny_model_dir, tmp_path, standard_rows):
    plain = trainer_on(tmp_path, tiny_model_dir, standard_rows, "separate", dropout=0.5, temperature=0.5)
    shared = trainer_on(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        "shared",
        dropout=0.5,
        temperature=0.5,
        discriminator_head="likelihood",
    )
    log_probs, answers, dropouts = [], [], []
    for trainer in (plain, shared):
        fill_adapters(trainer)
        trainer.discriminator.eval()
        trainer.discriminator(**BATCH)
        assert trainer.model.training
        dropouts.append([m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)])
        trainer.model.eval()
        log_probs.append(
            trainer._get_per_token_logps_and_entropies(
                trainer.model, BATCH["input_ids"], BATCH["attention_mask"], logits_to_keep=3
            )[0]
        )
        answers.append(trainer.model.generate(BATCH["input_ids"][:1, :3], do_sample=False, max_new_tokens=12))
    torch.testing.assert_close(log_probs[0], log_probs[1], atol=0, rtol=0)
    assert torch.equal(answers[0], answers[1])
    assert dropouts[0] == dropouts[1] and 0.5 in dropouts[0]


@pytest.mark.parametrize("resume_at", [2, 4])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_model_dir, tmp_path, standard_rows, resume_at):
    """Warm-up has 3 steps."""

    def trainer():
        return trainer_on(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            "shared",
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            discriminator_head="likelihood",
        )

    straight = trainer()
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume_at}"))
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert_same_weights(weights(straight.discriminator), weights(resumed.discriminator))
    assert resumed.state.log_history[5]["kl"] == straight.state.log_history[5]["kl"] > 0
    assert set(resumed.model.peft_config) == {"default", "ref"}


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_student_and_discriminator_are_saved_apart(tiny_model_dir, tmp_path, standard_rows, head):
    trainer = trainer_on(
        tmp_path,
        tiny_model_dir,
        standard_rows,
        "shared",
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        discriminator_head=head,
    )
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        saved = load_file(folder / "adapter_model.safetensors")
        expected = {n.replace(".default.", "."): p for n, p in trainer.model.named_parameters() if ".default." in n}
        assert_same_weights(saved, {name: expected[name].detach() for name in saved})
        assert len(saved) == len(expected)
        assert {path.parent.name for path in folder.glob("*/adapter_model.safetensors")} <= {"ref"}
        alone = Discriminator.from_pretrained(folder / "discriminator").eval()
        torch.testing.assert_close(alone(**BATCH)[0], trainer.discriminator(**BATCH)[0], atol=0, rtol=0)


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_adapter_takes_the_students_configuration(tiny_model_dir, tmp_path, standard_rows, head, in_memory):
    model, peft_config = tiny_model_dir, LoraConfig(**LORA, lora_dropout=0.5, task_type="CAUSAL_LM")
    if in_memory:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        model, peft_config = get_peft_model(model, peft_config), None
    trainer = make_trainer(
        tmp_path,
        model,
        standard_rows,
        trainer_kwargs={"peft_config": peft_config},
        discriminator="shared",
        discriminator_head=head,
    )
    config = trainer.discriminator.backbone.peft_config["default"]
    assert (config.r, config.lora_dropout) == (4, 0.0)
    assert trainer.model.peft_config["default"].lora_dropout == 0.5
    student, discriminator = (
        sum("lora_A.default" in name for name, p in module.named_parameters() if p.requires_grad)
        for module in (trainer.model, trainer.discriminator)
    )
    assert student == discriminator == 14


def test_one_configuration_for_both_adapters(tiny_model_dir, tmp_path, standard_rows):
    """PEFT writes the names it found in the student into it, which are not those of a model without LM head."""
    config = LoraConfig(**LORA)
    for discriminator in (None, "shared"):
        trainer = make_trainer(
            tmp_path,
            tiny_model_dir,
            standard_rows,
            trainer_kwargs={"peft_config": config, "discriminator_peft_config": config},
            discriminator=discriminator,
        )
        config = LoraConfig(**LORA)
        assert any("lora_" in name for name, p in trainer.discriminator.named_parameters() if p.requires_grad)


def test_two_processes(tiny_model_dir, tmp_path):
    first, second = on_processes(2, trained, tiny_model_dir, tmp_path / "shared", 4, 1, 1.0, discriminator="shared")
    assert_same_weights(first["discriminator"], second["discriminator"])
    assert_same_weights(first["student"], second["student"])
    assert set(first["gradients"][-1]) == {name for name in first["student"] if ".default." in name}


def test_what_cannot_share_is_refused_before_loading(tiny_model_dir, tmp_path, standard_rows, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    shared = {"discriminator": "shared"}
    with pytest.raises(ValueError, match="the student is trained in full. Train it as a LoRA adapter"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, **shared)
    with pytest.raises(ValueError, match="the student is an IA3Config adapter"):
        make_trainer(tmp_path, tiny_model_dir, standard_rows, trainer_kwargs={"peft_config": IA3Config()}, **shared)
    for change, message in [
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes"),
    ]:
        with pytest.raises(ValueError, match=f"the student's LoRA configuration has .*{message}"):
            trainer_on(tmp_path, tiny_model_dir, standard_rows, "shared", student_kwargs=change)
        with pytest.raises(ValueError, match=f"the discriminator's LoRA configuration has .*{message}"):
            make_trainer(
                tmp_path,
                tiny_model_dir,
                standard_rows,
                trainer_kwargs={"peft_config": LoraConfig(**LORA)},
                discriminator_lora_kwargs={**LORA, **change},
                **shared,
            )
