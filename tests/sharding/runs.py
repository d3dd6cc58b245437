"""Runs on one process or several, whole or sharded, that return what they end with, whole."""

import os

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from tests.conftest import SENTENCES
from tests.gad.helpers import FixedSamplesTrainer, make_config
from trl_bbkd.evaluation.student import generate_completion_ids


# What `accelerate launch` sets with recipes/accelerate_configs/fsdp2.yaml
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
# Adam divides by the root of what is nearly 0: with its usual value it makes much of the order of a sum
EPSILON = 1e-3
GAD_RUN = {
    "gradient_accumulation_steps": 2,
    "warmup_epochs": 1.0,
    "max_steps": 5,
    "beta": 0.1,
    "adam_epsilon": EPSILON,
    "discriminator_only_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
}
ROWS = [{"prompt": SENTENCES[2 * i % 8], "completion": " " + SENTENCES[(2 * i + 1) % 8]} for i in range(12)]


def start(engine: str) -> int:
    """Ask for an engine as a launcher does. Returns the number of processes."""
    if engine.startswith("fsdp2"):
        os.environ.update(FSDP2)
    if engine == "fsdp2, whole":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return int(os.environ.get("WORLD_SIZE", 1))


def gad(engine, model, output_dir, resume=None, lora=False, sequences=16, **config) -> dict:
    processes = start(engine)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    torch.manual_seed(0)
    settings = {"per_device_train_batch_size": sequences // processes, **GAD_RUN, **config}
    is_shared = settings.get("discriminator") == "shared"
    trainer = FixedSamplesTrainer(
        model=model,
        args=make_config(output_dir, **settings),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=adapter,
        discriminator_peft_config=None if is_shared else adapter,
    )
    engines = {"discriminator": trainer.discriminator_trainer.engine}
    if trainer.critic_trainer is not None:
        engines["critic"] = trainer.critic_trainer.engine
    for each in engines.values():
        for group in each.optimizer.param_groups:
            group["eps"] = EPSILON
    trainer.train(resume_from_checkpoint=resume)
    return found(trainer, engines)


def answers(model, output_dir) -> list[list[list[int]]]:
    """Samples of a sharded student, most of whose tokens end an answer."""
    start("fsdp2")
    trainer = FixedSamplesTrainer(
        model=model,
        args=make_config(output_dir, per_device_train_batch_size=8, max_steps=1, warmup_epochs=0),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.generation_config.eos_token_id = list(range(100, 300))
    return generate_completion_ids(
        student,
        trainer.processing_class,
        [row["prompt"] for row in ROWS],
        max_new_tokens=12,
        batch_size=1,
        is_shared=True,
    )


def found(trainer, engines) -> dict:
    student = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    models = {"student": trainer.model, "reference": trainer.ref_model} | {
        name: each.module for name, each in engines.items()
    }
    return {
        "weights": {name: each.state_dict() for name, each in engines.items()}
        | {"student": {name: value.detach().cpu() for name, value in student.items()}},
        "shares": {name: share(module) for name, module in models.items() if module is not None},
        "units": {name: units(module) for name, module in models.items() if module is not None},
        "log": [entry for entry in trainer.state.log_history if "discriminator/loss" in entry],
    }


def share(module) -> float:
    """Of a model's numbers, how many this process keeps."""
    parameters = list(module.parameters())
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return own / sum(p.numel() for p in parameters)


def units(module) -> int:
    """Parts that FSDP2 gathers one at a time."""
    return sum(type(each).__name__.startswith("FSDP") for each in module.modules())
