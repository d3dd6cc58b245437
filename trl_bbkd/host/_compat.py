"""
Every private name of TRL and transformers that this package touches.

Tested with TRL 1.16. When TRL moves, `tests/host/test_compat.py` names what changed; this is the file to mend.
"""

import contextlib
import copy
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers import trainer as transformers_trainer
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import (
    add_fused_lm_head,
    disable_dropout_in_model,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    pad,
    print_prompt_completions_sample,
)


__all__ = [
    "DataCollatorForLanguageModeling",
    "add_fused_lm_head",
    "be_wrapped_again",
    "beside_another_trainer",
    "disable_dropout",
    "draws_on_every_process",
    "fused_forward",
    "get_callable_name",
    "get_config_model_id",
    "get_tokenizer_config",
    "is_async_callable",
    "keep_4bit_weights_differentiable",
    "keep_embeddings_apart",
    "keep_precision",
    "pad",
    "print_prompt_completions_sample",
    "references_sharded_like_students",
    "shard_by_layers",
    "shard_on_cpus",
    "uploads_through",
    "wait_for_each_other",
    "whole_models",
    "without_backward_of_leaves",
    "without_step",
]


def disable_dropout(model: PreTrainedModel) -> None:
    """Turn off dropout in modules, and in attention, where transformers reads it from a plain attribute."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def fused_forward(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool = False) -> types.MethodType:
    """
    Build, without installing it, a forward of `model` whose fused LM head scores at another temperature.

    TRL binds one temperature into the model's forward when a trainer is built. Assign the returned method to
    `model.forward` for as long as the other temperature is wanted.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, already given a fused LM head by a TRL trainer.
        temperature (`float`):
            Temperature the logits are divided by.
        cast_lm_head_to_fp32 (`bool`, *optional*, defaults to `False`):
            As in the trainer's configuration.
    """
    installed = model.forward
    add_fused_lm_head(
        model,
        temperature=temperature,
        cast_lm_head_to_fp32=cast_lm_head_to_fp32,
        outputs=("log_probs", "entropy"),
    )
    forward, model.forward = model.forward, installed
    return forward


@contextlib.contextmanager
def uploads_through(upload: Callable):
    """
    Within the block, have transformers' trainers upload folders through `upload`.

    What they send is chosen by a pattern inside methods that also decide when to push, and how.

    Args:
        upload (`Callable`):
            Called with the Hub client and the keyword arguments of [`~huggingface_hub.HfApi.upload_folder`].
    """
    original = transformers_trainer.hf_api
    client = original()
    redirected = copy.copy(client)
    redirected.upload_folder = lambda **kwargs: upload(client, **kwargs)
    transformers_trainer.hf_api = lambda: redirected
    try:
        yield
    finally:
        transformers_trainer.hf_api = original


def keep_4bit_weights_differentiable(*models: nn.Module) -> None:
    """
    Stop bitsandbytes from repacking 4-bit weights for CPU inference.

    On CPUs with AVX512-BF16 it repacks them at the first evaluation pass, for good, into a layout whose product has no
    gradient: training then fails in layers with a bias, and silently skips the gradient through the others.
    """
    for model in models:
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def be_wrapped_again(trainer: Trainer) -> None:
    """
    Have DDP wrap the student for training although it was evaluated before.

    An evaluation prepares the bare model, which marks it: training then takes it as it is, and every process silently
    trains a student of its own.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if accelerator.distributed_type.value.startswith("MULTI_"):
        accelerator._models = [prepared for prepared in accelerator._models if prepared is not model]
        model._is_accelerate_prepared = False


@contextlib.contextmanager
def keep_precision(model: nn.Module) -> Iterator[None]:
    """
    Give every parameter, at the end, the dtype it had at the start.

    TRL trains an adapter on a quantised model in bfloat16, but PEFT loads it from a checkpoint in float32: a resumed
    run would go on in another precision.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Within the block a model is loaded whole on every process, although ZeRO-3 partitions what is loaded."""
    config = transformers_deepspeed._hf_deepspeed_config_weak_ref
    transformers_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers_deepspeed._hf_deepspeed_config_weak_ref = config


@contextlib.contextmanager
def draws_on_every_process() -> Iterator[None]:
    """
    Within the block weights that no file has are drawn on every process.

    Under FSDP transformers draws them on the main one. The others get parameters without memory, which accelerate, going by
    its address, takes for one another: the optimizer has one of them twice.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    kept = os.environ.pop(name, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[name] = kept


@contextlib.contextmanager
def beside_another_trainer() -> Iterator[None]:
    """
    Within the block another trainer may be made and run. What accelerate and transformers keep for all trainers of a
    process, and each new configuration overwrites, is afterwards as before.
    """
    kept = [(state, dict(state)) for state in (PartialState._shared_state, AcceleratorState._shared_state)]
    config = transformers_deepspeed._hf_deepspeed_config_weak_ref
    try:
        yield
    finally:
        for state, values in kept:
            state.clear()
            state.update(values)
        transformers_deepspeed._hf_deepspeed_config_weak_ref = config


def shard_by_layers(accelerator: Accelerator, model: nn.Module) -> None:
    """Shard a model with FSDP2 by accelerate's rule. It keeps the first model's layers for all others, whatever those have."""
    plugin = accelerator.state.fsdp_plugin
    kept = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    fsdp2_prepare_model(accelerator, model)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = kept


@contextlib.contextmanager
def references_sharded_like_students(trainer: type[Trainer]) -> Iterator[None]:
    """
    Within the block the reference of a trainer of TRL is sharded layer by layer under FSDP2, as the student is.

    TRL makes one unit of it: its forward pass gathers the whole model on every device.

    Args:
        trainer (`type`):
            `GRPOTrainer` or `DPOTrainer`.
    """
    module: Any = sys.modules[trainer.__module__]
    original = module.prepare_fsdp

    def shard(model: Any, accelerator: Accelerator) -> nn.Module:
        if accelerator.is_fsdp2:
            shard_by_layers(accelerator, model.requires_grad_(False))
            # No backward pass follows, for which accelerate keeps the embeddings whole
            model.set_reshard_after_forward(True)
        return original(model, accelerator)

    module.prepare_fsdp = shard
    try:
        yield
    finally:
        module.prepare_fsdp = original


@contextlib.contextmanager
def without_backward_of_leaves(accelerator: Accelerator) -> Iterator[None]:
    """
    Within the block a loss that nothing was computed for is passed over, where DeepSpeed would stop at it.

    Its backward pass is the optimizer's step as well: there is none, and no moment moves.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return

    def backward(loss: torch.Tensor, **kwargs) -> None:
        if not loss.is_leaf:
            type(accelerator).backward(accelerator, loss, **kwargs)

    accelerator.backward = backward
    try:
        yield
    finally:
        del accelerator.backward


@contextlib.contextmanager
def without_step(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """
    Within the block gradients add up for a backward pass that comes after it, as between micro-batches.

    DDP exchanges none. Under FSDP2 each is reduced and scattered, since what is kept until then is the whole gradient;
    DeepSpeed, whose backward pass is the optimizer's step as well, takes none.
    """
    state = accelerator.gradient_state
    syncs = state.sync_gradients
    with contextlib.nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(syncs)


def keep_embeddings_apart(model: PreTrainedModel) -> None:
    """
    Have FSDP2 make the input embeddings a unit of their own, and not what they are in.

    Encoders name both as what is not to be split; accelerate would shard the embeddings twice, and fail.
    """
    embeddings = model.get_input_embeddings()
    around = {
        type(module).__name__
        for module in model.modules()
        if module is not embeddings and any(each is embeddings for each in module.modules())
    }
    model._no_split_modules = set(model._no_split_modules or ()) - around


def shard_on_cpus() -> None:
    """
    Have accelerate shard with FSDP2 on CPU processes too.

    It knows FSDP for accelerators alone, and trains whole copies elsewhere, without a word.
    """
    original = AcceleratorState.__init__
    if original.__name__ == "sharding_on_cpus":
        return

    def sharding_on_cpus(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            # From which every later state takes its own
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharding_on_cpus


def wait_for_each_other(model: nn.Module) -> None:
    """
    Have the processes of a model that FSDP2 shards end `generate` together: each needs the others in every step.

    transformers knows that of models it has sharded itself.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, FSDPModule):
        inner._is_fsdp_managed_module = True
