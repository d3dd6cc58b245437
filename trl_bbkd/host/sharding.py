"""Which ways of sharding the trainers support: FSDP2 and DeepSpeed's ZeRO; everything else is refused before a model is loaded."""

import os

from transformers import TrainingArguments

from ._compat import shard_on_cpus


def check_sharding(args: TrainingArguments) -> None:
    """
    Refuse, before any weights are loaded, a way of sharding that cannot work here, and make ready the one that is asked for.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration of the run.

    Raises:
        ValueError: Names the nearest thing that works.
    """
    if is_asked_for("FSDP", args):
        version = getattr(args, "fsdp_config", None) or {}
        if str(version.get("version", os.environ.get("FSDP_VERSION", "1"))) != "2":
            raise ValueError(
                "FSDP's first version is not supported. Take the second: `fsdp_version: 2` in accelerate's configuration, as "
                "in recipes/accelerate_configs/fsdp2.yaml."
            )
        if args.use_cpu:
            shard_on_cpus()


def is_asked_for(engine: str, args: TrainingArguments) -> bool:
    """Whether the run is configured or launched with `"DeepSpeed"` or `"FSDP"`."""
    # `accelerate launch` announces its configuration through these variables
    launched = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() == "true"
    return launched or bool(getattr(args, engine.lower(), None))


def refuse_sharding(args: TrainingArguments, trainer: str, reason: str) -> None:
    """
    Raise if the run is configured or launched with DeepSpeed or FSDP.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration of the run.
        trainer (`str`):
            Name of the trainer.
        reason (`str`):
            Why it cannot.

    Raises:
        ValueError: Says what to do instead.
    """
    for name in ("DeepSpeed", "FSDP"):
        if is_asked_for(name, args):
            raise ValueError(
                f"{trainer} does not support {name} yet: {reason}. Launch with plain data parallelism "
                "(recipes/accelerate_configs/ddp.yaml), and train adapters (`use_peft`) if memory is short."
            )
