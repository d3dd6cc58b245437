"""What a card says of a training: its settings as they were when it ran, those that matter first."""

import dataclasses
import itertools

import torch
from peft import PeftConfig

from ..reports.redaction import SECRET
from ..selection.config import SELECTION_ARGUMENTS


# What changes no weight of a student
UNTOLD_SETTINGS = (
    "accelerator_config",
    "config",
    "disable_tqdm",
    "hub_",
    "local_rank",
    "log",
    "output_dir",
    "push_",
    "report_to",
    "resume_",
    "run_name",
    "save_",
    "teacher_name",
)
ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")


def hyperparameters(args, steps: int, leading: tuple[str, ...] = (), adapter: PeftConfig | None = None) -> dict:
    """
    What a reader has to know to train the same student: the rate, the batch, the steps and what its method is known by;
    then everything that the method's own configuration states, changed defaults included.

    Args:
        args ([`~transformers.TrainingArguments`]):
            A method's configuration.
        steps (`int`):
            Optimizer steps taken.
        leading (`tuple[str]`, *optional*):
            Fields that a reader of this method looks for first.
        adapter ([`~peft.PeftConfig`], *optional*):
            The student's adapter.
    """
    ours = itertools.takewhile(
        lambda owner: not owner.__module__.startswith(("trl.", "transformers.")), type(args).__mro__
    )
    names = {name for owner in ours for name in vars(owner).get("__annotations__", {})}
    if getattr(args, "selection", "none") != "llkd":
        names -= set(SELECTION_ARGUMENTS)
    first = {
        "learning_rate": args.learning_rate,
        **_batch(args),
        "optimizer steps": steps or None,
        # `max_steps` overrides it
        "num_train_epochs": None if args.max_steps > 0 else args.num_train_epochs,
        "adapter": None if adapter is None else _adapter(adapter),
        **{name: getattr(args, name) for name in leading if name in names or name not in SELECTION_ARGUMENTS},
        "lr_scheduler_type": args.lr_scheduler_type,
        "seed": args.seed,
    }
    own = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.name in names}
    # What is off or unset says nothing
    return {
        name: value
        for name, value in {**first, **own}.items()
        if value not in (None, "") and value is not False and not name.startswith(UNTOLD_SETTINGS)
    }


def _batch(args) -> dict[str, str | int]:
    """How many sequences a step learns from, and how they come together."""
    accumulated, processes = args.gradient_accumulation_steps, args.world_size
    samples = args.per_device_train_batch_size * accumulated * processes
    product = f"{args.per_device_train_batch_size} per device × {accumulated} accumulated × {_count(processes, 'process', 'es')}"
    generations = getattr(args, "num_generations", None)
    prompts = f" ({samples / generations:g} prompts × {generations} samples)" if generations else ""
    batch: dict[str, str | int] = {"sequences per optimizer step": f"{samples} = {product}{prompts}"}
    if getattr(args, "selection", "none") == "llkd":
        batch["rows looked at per optimizer step"] = samples * args.pool_factor
    return batch


def _count(number: int, name: str, plural: str) -> str:
    return f"{number} {name}{plural if number != 1 else ''}"


def _adapter(config: PeftConfig) -> str:
    found = {name: getattr(config, name, None) for name in ADAPTER_SETTINGS}
    shown = [
        f"{name} {', '.join(sorted(value)) if isinstance(value, set | list) else value}"
        for name, value in found.items()
        if value
    ]
    return ", ".join([getattr(config.peft_type, "value", str(config.peft_type)), *shown])


def changed_settings(*arguments) -> dict:
    """
    Fields of dataclasses that are not at their defaults, as they are now: after a recipe, its overrides, and what the
    libraries made of them. What changes no weight is left out, and so is what may be a secret.
    """
    found = {}
    for values in arguments:
        for item in dataclasses.fields(values):
            value = getattr(values, item.name)
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            is_told = not item.name.startswith((*UNTOLD_SETTINGS, "_")) and not SECRET.search(item.name)
            if item.init and is_told and value != default and value not in (None, "", [], {}):
                found[item.name] = value
    return found


def hardware(args) -> str:
    """What a training ran on, such as `2 × NVIDIA H100`."""
    kind = args.device.type
    name = torch.cuda.get_device_name(args.device) if kind == "cuda" else kind.upper()
    return name if args.world_size == 1 else f"{args.world_size} × {name}"
