"""Which ways of sharding work here. The others are refused before any weights are loaded."""

import copy
import os
from importlib.util import find_spec

import torch
from accelerate.utils import is_torch_version
from transformers import BitsAndBytesConfig, TrainingArguments

from ._compat import shard_on_cpus


AVERAGES_ON_CPUS = "2.13"  # the first torch that was tried and does; 2.8 does not


def check_sharding(args: TrainingArguments, *quantization: BitsAndBytesConfig | None) -> None:
    """
    Refuse a way of sharding that cannot work here, and make ready the one that is asked for: FSDP2 reduces the gradient of
    every micro-batch, since what is kept until the last one is the whole gradient, on every device.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration of the run, a copy that may be changed.
        *quantization ([`~transformers.BitsAndBytesConfig`], *optional*):
            Of the models that are loaded.

    Raises:
        ValueError: Names the nearest thing that works.
    """
    is_4bit = [config for config in quantization if config is not None and config.load_in_4bit]
    if is_asked_for("FSDP", args):
        settings = _fsdp_settings(args)
        _refuse_fsdp(settings, args, is_4bit)
        if args.use_cpu:
            if is_torch_version("<", AVERAGES_ON_CPUS):
                raise ValueError(
                    f"FSDP2 on CPU processes needs torch {AVERAGES_ON_CPUS}; this is {torch.__version__}, where it adds gradients "
                    "up and does not average them. Update torch, or take --accelerate_config ddp."
                )
            shard_on_cpus()
        accumulation = {"sync_each_batch": True} | (args.accelerator_config.gradient_accumulation_kwargs or {})
        args.accelerator_config = copy.copy(args.accelerator_config)
        args.accelerator_config.gradient_accumulation_kwargs = accumulation
    if is_asked_for("DeepSpeed", args):
        if find_spec("deepspeed") is None:
            raise ValueError(
                'DeepSpeed is asked for, and is not installed: pip install "trl-bbkd[deepspeed]". FSDP2 needs no package '
                "(--accelerate_config fsdp2)."
            )
        if is_4bit and _zero_stage(args) == 3:
            raise ValueError(
                "4-bit weights cannot be partitioned by ZeRO-3. Take ZeRO-2 (--accelerate_config zero2), or leave load_in_4bit "
                "out."
            )
        if args.use_cpu:
            import deepspeed

            # accelerate does this for GPUs. Without, a model is partitioned as if there were one process
            deepspeed.init_distributed(dist_backend="gloo")


def _refuse_fsdp(settings: dict[str, str], args: TrainingArguments, is_4bit: list) -> None:
    if settings["version"] != "2":
        raise ValueError(
            "FSDP's first version is not supported. Take the second: `fsdp_version: 2`, as in "
            "recipes/accelerate_configs/fsdp2.yaml."
        )
    if settings["state_dict_type"] != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP with {settings['state_dict_type']} would save no student that can be loaded. Take "
            "`fsdp_state_dict_type: FULL_STATE_DICT`, as in recipes/accelerate_configs/fsdp2.yaml."
        )
    if settings["offload"] == "true" and args.use_cpu:
        raise ValueError(
            "FSDP offloads to the CPU what is on a GPU, and there is none. Set `fsdp_offload_params: false`."
        )
    if any(config.bnb_4bit_quant_storage == torch.uint8 for config in is_4bit):
        raise ValueError(
            "4-bit weights that are stored as uint8 are not sharded by FSDP2: every GPU would hold all of them. Set "
            "`bnb_4bit_quant_storage: bfloat16`, or train without FSDP (--accelerate_config ddp)."
        )


def _fsdp_settings(args: TrainingArguments) -> dict[str, str]:
    """What the launcher or the configuration says; the configuration's own defaults are those of transformers."""
    if not getattr(args, "fsdp", None):
        return {
            "version": os.environ.get("FSDP_VERSION", "1"),
            "state_dict_type": os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT").upper(),
            "offload": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower(),
        }
    given = args.fsdp_config or {}
    return {
        "version": str(given.get("version", 2)),
        "state_dict_type": str(given.get("state_dict_type", "FULL_STATE_DICT")).upper(),
        "offload": str(given.get("cpu_offload", False)).lower(),
    }


def _zero_stage(args: TrainingArguments) -> int:
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None:
        return config.get_value("zero_optimization.stage", 0)
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def is_asked_for(engine: str, args: TrainingArguments) -> bool:
    """Whether the run is configured or launched with `"DeepSpeed"` or `"FSDP"`."""
    # `accelerate launch` announces its configuration through these variables
    launched = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() == "true"
    return launched or bool(getattr(args, engine.lower(), None))


def is_sharded(args: TrainingArguments) -> bool:
    """Whether the run is configured or launched with DeepSpeed or FSDP."""
    return is_asked_for("DeepSpeed", args) or is_asked_for("FSDP", args)
