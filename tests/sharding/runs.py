"""Runs on one process or several, whole or sharded, that return what they end with, whole."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from tests.bayeskd.helpers import make_trainer as make_bayes_trainer
from tests.conftest import SENTENCES
from tests.gad.helpers import FixedSamplesTrainer, make_config
from tests.llkd.helpers import make_rows as make_llkd_rows
from tests.llkd.helpers import make_trainer as make_llkd_trainer
from tests.proxykd.helpers import LORA, ON_CPU, make_aligner, make_kd_trainer, make_rows
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.student import generate_completion_ids
from trl_bbkd.preference.sampling import read_samples
from trl_bbkd.proxy import stages
from trl_bbkd.proxykd.alignment_trainer import ProxyAlignmentTrainer
from trl_bbkd.proxykd.config import ProxyKDConfig
from trl_bbkd.seqkd.trainer import train_seqkd


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
SOFT_TARGET_RUN = {
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "adam_epsilon": EPSILON,
    "save_strategy": "steps",
    "save_steps": 3,
}
PROXYKD_RUN = {"stages": ["warmup", "cache", "distil"], "warmup_share": 0.5, "alignment_share": 0.0}
PROXYKD_RUN |= {"distil_on_all_rows": True}
BAYESKD_RUN = {"posterior_sampling": "expected"}
# Two rounds of three steps each
ALIGNMENT_RUN = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1.5,
    "learning_rate": 3e-3,
    "adam_epsilon": EPSILON,
    "save_strategy": "steps",
    "save_steps": 2,
}
# In the warm-up whole pools are kept, more than a forward pass takes
LLKD_RUN = SOFT_TARGET_RUN | {"selection_warmup_steps": 2}
ROWS = [{"prompt": SENTENCES[2 * i % 8], "completion": " " + SENTENCES[(2 * i + 1) % 8]} for i in range(12)]


def slow_but(variants, *kept):
    """Variants as parameters; the default run takes those that are named."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in variants]


def start(engine: str) -> int:
    """Ask for an engine as a launcher does. Returns the number of processes."""
    if engine.startswith("fsdp2"):
        os.environ.update(FSDP2)
    if engine == "fsdp2, whole":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if engine.startswith("zero"):
        import deepspeed

        # Without an accelerator, DeepSpeed knows of the other processes once it is told
        deepspeed.init_distributed(dist_backend="gloo")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(Path(__file__).with_name(f"{engine}.json"))
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


def answers(model, output_dir) -> tuple[list[list[list[int]]], int]:
    """Samples of a sharded student, most of whose tokens end an answer, and how often this process ran it."""
    start("fsdp2")
    trainer = FixedSamplesTrainer(
        model=model,
        args=make_config(output_dir, per_device_train_batch_size=8, max_steps=1, warmup_epochs=0),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.generation_config.eos_token_id = list(range(100, 300))
    calls = []
    student.register_forward_hook(lambda *_: calls.append(1))
    ids = generate_completion_ids(
        student,
        trainer.processing_class,
        [row["prompt"] for row in ROWS],
        max_new_tokens=12,
        num_samples=5,
        batch_size=1,
        is_shared=True,
    )
    return ids, len(calls)


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
    if hasattr(parameters[0], "ds_tensor"):
        return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return own / sum(p.numel() for p in parameters)


def units(module) -> int:
    """Parts that FSDP2 gathers one at a time."""
    return sum(type(each).__name__.startswith("FSDP") for each in module.modules())


def proxykd(engine, student, proxy, output_dir, **config) -> dict:
    return soft_targets(engine, student, proxy, output_dir, make_kd_trainer, PROXYKD_RUN | config)


def aligned_proxykd(engine, student, proxy, output_dir, **config) -> dict:
    """The proxy's rows in micro-batches of 4, as in [`alignment`]: what is logged as a token mean is averaged over those."""
    batches = {"proxy_per_device_train_batch_size": 4, "proxy_gradient_accumulation_steps": 2 // start(engine)}
    stages = {"stages": ["warmup", "align", "cache", "distil"], "warmup_share": 0.25, "alignment_share": 0.5}
    found = proxykd(engine, student, proxy, output_dir, **stages, **batches, **config)
    for line in found["proxy_log"]:
        for token_mean in ("mean_token_accuracy", "entropy"):
            line.pop(token_mean, None)
    return found


def bayeskd(engine, student, proxy, output_dir, **config) -> dict:
    return soft_targets(engine, student, proxy, output_dir, make_bayes_trainer, BAYESKD_RUN | config)


def soft_targets(engine, student, proxy, output_dir, make, config) -> dict:
    """Go through all stages; rows a step are 8, of the student and of the proxy."""
    processes = start(engine)
    config = dict(config)
    lora, resume = config.pop("lora", False), config.pop("resume", None)
    torch.manual_seed(0)
    trainer = make(
        output_dir,
        student,
        proxy,
        rows=[row | {"teacher_confidence": 0.02 * number} for number, row in enumerate(make_rows(40))],
        trainer_kwargs={"peft_config": LoraConfig(**LORA) if lora else None},
        **SOFT_TARGET_RUN,
        per_device_train_batch_size=4 // processes,
        **config,
    )
    shares = {}
    save = stages.save_model

    def measuring(model, *arguments):
        shares["proxy"] = share(model)
        save(model, *arguments)

    stages.save_model = measuring
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "weights": {"student": {name: value.detach().cpu() for name, value in (state or {}).items()}},
        "shares": shares | {"student": share(trainer.model)},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "stages": [report["metrics"] for report in trainer.proxy_stages.reports],
        "proxy_log": trainer.proxy_stages.log_history,
        "live_share": None if trainer.live_proxy is None else share(trainer.live_proxy),
    }


def llkd(engine, student, output_dir, resume=None, lora=None, **config) -> dict:
    """Pools of 32 rows a step."""
    processes = start(engine)
    torch.manual_seed(0)
    trainer = make_llkd_trainer(
        output_dir,
        student,
        rows=make_llkd_rows(96, gold=True),
        trainer_kwargs={"peft_config": LoraConfig(**lora) if lora else None},
        per_device_train_batch_size=8 // processes,
        **LLKD_RUN | config,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "weights": {"student": {name: value.detach().cpu() for name, value in (weights or {}).items()}},
        "shares": {"student": share(trainer.model)},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "selector": trainer.selector.state_dict(),
    }


def seqkd(engine, student, output_dir, lora=False) -> dict:
    """Five steps of 8 rows, measured after each; the third is the best."""
    processes = start(engine)
    args = ProxyKDConfig(
        str(output_dir),
        **ON_CPU | {"per_device_train_batch_size": 4 // processes},
        gradient_accumulation_steps=2,
        adam_epsilon=EPSILON,
    )
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows, _ = tokenize_teacher_data(Dataset.from_list(make_rows(40)), tokenizer, max_completion_length=16)
    shares, steps = [], itertools.count(1)

    def measure(model):
        shares.append(share(model))
        return {"distance": abs(next(steps) - 3)}

    torch.manual_seed(0)
    result = train_seqkd(
        student,
        args,
        rows,
        tokenizer,
        measure,
        lambda new, best: new["distance"] < best["distance"],
        output_dir=str(output_dir),
        max_steps=5,
        learning_rate=1e-3,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    return {"best_step": result.best_step, "curve": result.curve, "share": shares[-1]}


def alignment(engine, proxy, output_dir, lora=False, stops=False, **config) -> dict | None:
    """
    Rounds whose steps are of 8 rows, in micro-batches of 4: TRL's NLL is a mean over the tokens of one. What `stops` does so
    in the last step of the second round.
    """
    processes = start(engine)
    shares: dict[str, list[float]] = {"proxy": [], "reference": []}
    found_units: dict[str, list[int]] = {"proxy": [], "reference": []}

    class MeasuringTrainer(ProxyAlignmentTrainer):
        def _keep(self, number):
            if number:
                for name, model in (("proxy", self.model), ("reference", self.ref_model)):
                    if model is not None:
                        shares[name].append(share(model))
                        found_units[name].append(units(model))
            super()._keep(number)

        def training_step(self, *arguments, **keywords):
            if stops and len(self.rounds) == 2 and self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*arguments, **keywords)

    trainer = make_aligner(
        output_dir,
        proxy,
        rows=make_rows(36),
        trainer_class=MeasuringTrainer,
        trainer_kwargs={"peft_config": LoraConfig(**LORA) if lora else None},
        **ALIGNMENT_RUN | {"gradient_accumulation_steps": 2 // processes} | config,
    )
    try:
        trainer.train()
    except KeyboardInterrupt:
        return None
    trainer.save_model(str(Path(output_dir) / "saved"))
    with trainer._whole() as model:
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items() if ".ref." not in name}
    folders = [Path(output_dir) / f"round-{number}" / "samples" for number in (1, 2)]
    return {
        "weights": weights,
        "shares": shares,
        "units": found_units,
        "log": [entry for entry in trainer.log_history if "loss" in entry],
        "rounds": [{key: entry[key] for key in ("round", "top1_agreement", "nll")} for entry in trainer.rounds],
        "samples": [
            line["proxy_ids"] for folder in folders for file in sorted(folder.iterdir()) for line in read_samples(file)
        ],
        "resumed at": getattr(trainer, "_initial_global_step", None),
    }
