"""Runs of GAD whose samples come from the stand-in, and what they find along the way."""

import re

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.gad.helpers import make_config
from tests.sharding.runs import GAD_RUN, ROWS, start
from trl_bbkd.evaluation.student import with_one_end
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.host._compat import is_in_parts
from trl_bbkd.host.engines import gathered

from . import stand_in


ADAPTER = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_alpha": 32}


class WatchingTrainer(GADTrainer):
    """Keeps what was sampled and read, and how far vLLM's weights then were from the student's."""

    def __init__(self, *args, engine_weights=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampled: list[list[list[int]]] = []
        self.read: list[list[list[int]]] = []
        self.distances: list[float] = []
        self.syncs: list[int] = []
        self.engine_weights = engine_weights
        update, sync = self.discriminator_trainer.update, self.vllm_generation.sync_weights

        def reading(pairs, *rest):
            self.read.append(pairs.student_ids)
            return update(pairs, *rest)

        def syncing():
            self.syncs.append(self.state.global_step)
            sync()

        self.discriminator_trainer.update = reading
        self.vllm_generation.sync_weights = syncing

    def _generate_single_turn(self, *args, **kwargs):
        ids, log_probs = super()._generate_single_turn(*args, **kwargs)
        self.sampled.append([with_one_end(list(each), self.eos_token_ids, self._end_id) for each in ids])
        student = merged(self.accelerator.get_state_dict(self.model_wrapped))
        if self.engine_weights is not None and student:
            self.distances.append(distance(student, self.engine_weights()))
        return ids, log_probs


class Reading(TrainerCallback):
    """Forward passes that no backward pass follows, as those of the report. They leave layers of a sharded student whole."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model(torch.tensor([[5, 6, 7]]))


def merged(state: dict | None) -> dict[str, torch.Tensor]:
    """A student's whole state as a model without adapter has it, added up here by LoRA's definition."""
    found = {}
    for name, value in (state or {}).items():
        if "lora_" in name:
            continue
        value, plain = value.detach().float().clone(), name.removeprefix("base_model.model.")
        if ".base_layer." in name:
            first, second = (
                state.get(name.replace("base_layer.weight", f"lora_{part}.default.weight")) for part in "AB"
            )
            if first is not None:
                value += ADAPTER["lora_alpha"] / ADAPTER["r"] * second.detach().float() @ first.detach().float()
        found[plain.replace(".base_layer", "")] = value
    return found


def distance(student: dict[str, torch.Tensor], engine: dict[str, torch.Tensor]) -> float:
    assert student.keys() >= engine.keys(), engine.keys() - student.keys()
    return max((student[name].cpu() - value.cpu()).abs().max().item() for name, value in engine.items())


def parameters_of(llm: stand_in.LLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in llm.weights.model.named_parameters()}


def base_of(model) -> dict[str, torch.Tensor]:
    """What an adapter stands on."""
    with gathered(list(model.parameters()), is_written=False):
        return {
            re.sub(r"base_model\.model\.|\.base_layer", "", name): whole(value).clone()
            for name, value in model.named_parameters()
            if "lora_" not in name
        }


def whole(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def gad(engine, model, output_dir, lora=False, url=None, drift=None, trains=1, **config) -> dict:
    processes = start(engine)
    stand_in.install()
    if drift is not None:
        stand_in.LLM.drift = staticmethod(drift)
    torch.manual_seed(0)
    settings = {"per_device_train_batch_size": 16 // processes, **GAD_RUN, "save_strategy": "no", **config}
    where = {"vllm_mode": "colocate"} if url is None else {"vllm_mode": "server", "vllm_server_base_url": url}
    trainer = WatchingTrainer(
        model=model,
        args=make_config(output_dir, use_vllm=True, learning_rate=1e-2, **where, **settings),
        train_dataset=Dataset.from_list(ROWS),
        callbacks=[Reading()],
        peft_config=LoraConfig(**ADAPTER) if lora else None,
        # Asleep, the engine has no weights
        engine_weights=None
        if url is not None or config.get("vllm_enable_sleep_mode")
        else lambda: parameters_of(stand_in.LLM.made[0]),
    )
    before = base_of(trainer.model)
    for _ in range(trains):
        trainer.train()
    assert trainer.read == trainer.sampled
    names = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    return {
        "log": [entry for entry in trainer.state.log_history if "discriminator/loss" in entry],
        "distances": trainer.distances,
        "syncs": trainer.syncs,
        "sampled": trainer.sampled,
        "engine": parameters_of(stand_in.LLM.made[0]) if url is None else None,
        "drawn": [each.token_ids for each in stand_in.LLM.made[0].sampled] if url is None else None,
        "student": merged(trainer.accelerator.get_state_dict(trainer.model_wrapped)),
        "before": before,
        "base": base_of(trainer.model),
        "is_sharded": any(is_in_parts(each) for each in names.values()),
        "ends": (trainer.eos_token_ids, trainer._end_id),
    }
