import os

from transformers import TrainingArguments


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
    # `accelerate launch` announces its configuration through these variables
    launched_with = {
        name: os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true" for name in ("DeepSpeed", "FSDP")
    }
    for name, configured in {"DeepSpeed": args.deepspeed, "FSDP": args.fsdp}.items():
        if configured or launched_with[name]:
            raise ValueError(
                f"{trainer} does not support {name} yet: {reason}. Launch with plain data parallelism "
                "(recipes/accelerate_configs/ddp.yaml), and train adapters (`use_peft`) if memory is short."
            )
