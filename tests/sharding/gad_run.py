"""One run of GAD, on one process or several, whole or sharded: trains and writes what it ends with, whole."""

import json
import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from tests.conftest import SENTENCES
from tests.gad.helpers import FixedSamplesTrainer, make_config


model, output, config = sys.argv[1:]
config = json.loads(config)
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if config.pop("lora", False) else None
resume = config.pop("resume", None)
samples = config.pop("samples", "fixed")
if config.get("deepspeed"):
    import deepspeed

    # Before any model: what ZeRO-3 makes of one depends on the number of processes
    deepspeed.init_distributed(dist_backend="gloo")
world = int(os.environ.get("WORLD_SIZE", 1))
rows = [{"prompt": SENTENCES[2 * i % 8], "completion": " " + SENTENCES[(2 * i + 1) % 8]} for i in range(12)]
if samples == "fixed":
    trainer_class = FixedSamplesTrainer
else:
    from trl_bbkd.gad.trainer import GADTrainer as trainer_class
torch.manual_seed(0)
trainer = trainer_class(
    model=model,
    args=make_config(
        output,
        **{
            "per_device_train_batch_size": 16 // world,
            "gradient_accumulation_steps": 2,
            "warmup_epochs": 1.0,
            "num_train_epochs": 2,
            "max_steps": 5,
            "beta": 0.1,
            "adam_epsilon": 1e-3,
            "discriminator_only_steps": 1,
            "model_init_kwargs": {"dtype": "float32"},
            **config,
        },
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=lora,
    discriminator_peft_config=lora,
)
engines = {"discriminator": trainer.discriminator_trainer.engine}
if trainer.critic_trainer is not None:
    engines["critic"] = trainer.critic_trainer.engine
for engine in engines.values():
    for group in engine.optimizer.param_groups:
        group["eps"] = 1e-3
trainer.train(resume_from_checkpoint=resume)
found = {name: engine.state_dict() for name, engine in engines.items()}
student = trainer.accelerator.get_state_dict(trainer.model_wrapped)
found["student"] = {name: value.cpu() for name, value in student.items()} if student else {}
parameter = next(engines["discriminator"].module.parameters())
found["sharded"] = {
    "student": type(next(trainer.model.parameters())).__name__,
    "discriminator": type(parameter).__name__,
    "share": parameter.to_local().numel() / parameter.numel() if isinstance(parameter, DTensor) else 1.0,
    "distributed_type": str(trainer.accelerator.distributed_type),
    "reference_units": sum(
        type(module).__name__.startswith("FSDP")
        for module in (trainer.ref_model.modules() if trainer.ref_model is not None else ())
    ),
}
found["log"] = [entry for entry in trainer.state.log_history if "discriminator/loss" in entry]
if trainer.accelerator.is_main_process:
    torch.save(found, f"{output}/found.pt")
trainer.accelerator.end_training()
