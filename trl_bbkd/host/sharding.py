"""Which ways of sharding work here. The others are refused before any weights are loaded."""

import copy
import os
import shutil
import sys
from importlib.util import find_spec

import torch
from accelerate.utils import is_torch_version
from transformers import BitsAndBytesConfig, TrainingArguments

from ._compat import shard_on_cpus


AVERAGES_ON_CPUS = "2.13"  # the first torch that was tried and does; 2.8 does not
SAVES_IN_PARTS = "2.13"  # the first torch that was tried and writes parts as safetensors; 2.8 does it by other names


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
    if is_asked_for("FSDP", args):
        settings = _fsdp_settings(args)
        _refuse_fsdp(settings, args)
        _refuse_parallelism(args)
        _raise(why_not_sharded("fsdp2", *quantization))
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
        _raise(why_not_sharded(f"zero{_zero_stage(args)}", *quantization))
        if args.use_cpu:
            if sys.platform == "linux":
                _refuse_missing_compiler()
            import deepspeed

            # accelerate does this for GPUs. Without, a model is partitioned as if there were one process
            deepspeed.init_distributed(dist_backend="gloo")


def why_not_sharded(engine: str, *quantization: BitsAndBytesConfig | None) -> str:
    """
    Why an engine cannot train models that are loaded so, and the nearest that can; empty if it can. A plan asks it too.

    Args:
        engine (`str`):
            `"fsdp2"`, which `"hsdp"` is too, `"zero2"` or `"zero3"`.
        *quantization ([`~transformers.BitsAndBytesConfig`], *optional*):
            Of the models that are loaded.
    """
    is_4bit = [config for config in quantization if config is not None and config.load_in_4bit]
    if engine == "zero3" and is_4bit:
        return (
            "4-bit weights cannot be partitioned by ZeRO-3. Take ZeRO-2 (--accelerate_config zero2), or leave load_in_4bit "
            "out."
        )
    if engine in ("fsdp2", "hsdp") and any(config.bnb_4bit_quant_storage == torch.uint8 for config in is_4bit):
        return (
            "4-bit weights that are stored as uint8 are not sharded by FSDP2: every GPU would hold all of them. Set "
            "`bnb_4bit_quant_storage: bfloat16`, or train without FSDP (--accelerate_config ddp)."
        )
    return ""


def _refuse_missing_compiler() -> None:
    """On a CPU DeepSpeed compiles what its processes talk through, at a run's start."""
    from torch.utils.cpp_extension import is_ninja_available

    compiler = os.environ.get("CXX", "c++")
    needed = {compiler: shutil.which(compiler), "ninja": is_ninja_available()}
    missing = [name for name, is_there in needed.items() if not is_there]
    if missing:
        raise ValueError(
            f"On CPU processes DeepSpeed compiles an extension, and {' and '.join(missing)} cannot be found. Install a C++ compiler "
            "(apt install g++) and ninja (pip install ninja), or take FSDP2, which needs neither (--accelerate_config fsdp2)."
        )


def _raise(reason: str) -> None:
    if reason:
        raise ValueError(reason)


def _refuse_parallelism(args: TrainingArguments) -> None:
    """Of accelerate's ways to divide processes, those over rows of a batch alone."""
    config = args.parallelism_config
    names = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    if config is not None:
        sizes = {name: getattr(config, f"{name}_size") for name in names}
    elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in names}
    else:
        return
    for name in ("tp", "cp", "sp"):
        if sizes[name] > 1:
            raise ValueError(
                f"parallelism_config_{name}_size: {sizes[name]} is not supported: processes share rows, not layers or tokens. Set it "
                "to 1, as in recipes/accelerate_configs/hsdp.yaml."
            )
    copies, parts = sizes["dp_replicate"], sizes["dp_shard"]
    if copies * parts != args.world_size:
        raise ValueError(
            f"{copies} copies (parallelism_config_dp_replicate_size) of {parts} parts (parallelism_config_dp_shard_size) are "
            f"{copies * parts} processes, and there are {args.world_size}. Give both sizes beside --num_processes: machines, "
            "and GPUs of one."
        )


def _refuse_fsdp(settings: dict[str, str], args: TrainingArguments) -> None:
    if settings["version"] != "2":
        raise ValueError(
            "FSDP's first version is not supported. Take the second: `fsdp_version: 2`, as in "
            "recipes/accelerate_configs/fsdp2.yaml."
        )
    if settings["state_dict_type"] == "SHARDED_STATE_DICT":
        _refuse_checkpoints_in_parts(args)
    elif settings["state_dict_type"] != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP2 has no {settings['state_dict_type']}. Take `fsdp_state_dict_type: FULL_STATE_DICT`, as in "
            "recipes/accelerate_configs/fsdp2.yaml, or SHARDED_STATE_DICT."
        )
    if settings["offload"] == "true" and args.use_cpu:
        raise ValueError(
            "FSDP offloads to the CPU what is on a GPU, and there is none. Set `fsdp_offload_params: false`."
        )


def _refuse_checkpoints_in_parts(args: TrainingArguments) -> None:
    """Refuse what needs a whole student in a checkpoint. The final one is whole."""
    reason = None
    if args.save_only_model:
        reason = "save_only_model=True asks for nothing else"
    elif args.push_to_hub and args.hub_strategy != "end":
        reason = f"hub_strategy={str(args.hub_strategy.value)!r} would send it"
    elif is_torch_version("<", SAVES_IN_PARTS):
        raise ValueError(
            f"SHARDED_STATE_DICT needs torch {SAVES_IN_PARTS}; this is {torch.__version__}. Update torch, or take "
            "`fsdp_state_dict_type: FULL_STATE_DICT`, as in recipes/accelerate_configs/fsdp2.yaml."
        )
    if reason is not None:
        raise ValueError(
            f"A checkpoint with SHARDED_STATE_DICT has no student that can be loaded, and {reason}. Leave that out, or take "
            "`fsdp_state_dict_type: FULL_STATE_DICT`, as in recipes/accelerate_configs/fsdp2.yaml."
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
