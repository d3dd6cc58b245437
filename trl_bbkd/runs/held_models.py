"""Which models a run holds on a device, phase by phase: what a method says of itself to a plan. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class HeldModel:
    """
    A model on a device.

    Args:
        name (`str`):
            What it is to the run, such as `"student"`.
        source (`str`):
            Folder or Hub id with its configuration.
        key (`str`):
            The recipe's key that names it.
        kind (`"text"`, `"trunk"` or `"classes"`, *optional*, defaults to `"text"`):
            With an output layer over tokens, without one, or with one over classes.
        num_labels (`int`, *optional*, defaults to `2`):
            Classes of a classifier.
        trains (`bool`, *optional*, defaults to `True`):
            Whether it learns in this phase.
        adapter (`Mapping[str, Any]`, *optional*):
            Arguments of [`~peft.LoraConfig`], if it is an adapter on frozen weights.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of its weights as they are loaded.
        is_4bit (`bool`, *optional*, defaults to `False`):
            Whether its frozen linear layers are in 4 bits.
        storage_of_4bit (`str`, *optional*, defaults to `"uint8"`):
            The type of the tensors that hold them.
        stands_on (`str`, *optional*):
            Name of the model whose frozen weights are its own too.
        copies (`str`, *optional*):
            Name of the model of which it is a frozen copy.
        is_whole (`bool`, *optional*, defaults to `False`):
            Whether every device holds all of it, whatever the engine.
        waits (`bool`, *optional*, defaults to `False`):
            Whether it is only there for a later phase: where an engine shards, it is not on the device yet.
        has_own_engine (`bool`, *optional*, defaults to `False`):
            Whether it is trained beside the student, by an [`~host.engines.Engine`].
        rows (`int`, *optional*, defaults to `1`):
            Rows that it reads at once.
        reads (`float`, *optional*, defaults to `0.0`), learns (`float`, *optional*, defaults to `0.0`):
            For each row of a step: how many it reads without learning, and how many it learns from.
        as_adapter (`str`, *optional*), in_4bit (`str`, *optional*):
            Options of the command line that make an adapter of it, and that load its frozen weights in 4 bits.
        as_shared (`str`, *optional*):
            The option that lets it stand on the student's frozen weights.
    """

    name: str
    source: str
    key: str
    kind: Literal["text", "trunk", "classes"] = "text"
    num_labels: int = 2
    trains: bool = True
    adapter: Mapping[str, Any] | None = None
    dtype: str = "float32"
    is_4bit: bool = False
    storage_of_4bit: str = "uint8"
    stands_on: str | None = None
    copies: str | None = None
    is_whole: bool = False
    waits: bool = False
    has_own_engine: bool = False
    rows: int = 1
    reads: float = 0.0
    learns: float = 0.0
    as_adapter: str = ""
    in_4bit: str = ""
    as_shared: str = ""


@dataclass(frozen=True)
class Phase:
    """
    A part of a run, in which the same models are on a device.

    Args:
        name (`str`):
            Such as `"the student's training"`.
        models (`tuple[HeldModel, ...]`):
            The models.
        tokens (`int`):
            Longest row.
        step_rows (`int`):
            Rows of an optimizer step on each device.
        new_tokens (`int`, *optional*, defaults to `0`):
            Longest answer of a row that is sampled; 0 if none is.
        sampled (`int`, *optional*, defaults to `0`):
            Rows that a device samples at once.
        sampler (`str`, *optional*, defaults to `"student"`):
            Name of the model that samples.
        vllm_share (`float`, *optional*, defaults to `0.0`):
            Share of a device's memory that is vLLM's.
        vllm_divides (`int`, *optional*, defaults to `1`):
            Devices over which vLLM divides the sampler's weights.
        vllm_sleeps (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back while models learn.
        uses_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples, on the device or elsewhere.
        gathers_to_sample (`bool`, *optional*, defaults to `True`):
            Whether ZeRO-3 puts the whole model on each device to sample.
        loss (`"tokens"`, `"sparse"`, `"dense"` or `"classes"`, *optional*, defaults to `"tokens"`):
            What the loss is computed from: TRL's chunks of log-probabilities, soft targets from disk, those of a live proxy,
            or classes.
        targets_per_token (`int`, *optional*, defaults to `0`):
            Likeliest tokens kept of each soft target in the store on disk, over all targets; 0 if there is no store.
    """

    name: str
    models: tuple[HeldModel, ...]
    tokens: int
    step_rows: int
    new_tokens: int = 0
    sampled: int = 0
    sampler: str = "student"
    vllm_share: float = 0.0
    vllm_divides: int = 1
    vllm_sleeps: bool = False
    uses_vllm: bool = False
    gathers_to_sample: bool = True
    loss: Literal["tokens", "sparse", "dense", "classes"] = "tokens"
    targets_per_token: int = 0


def student_of(recipe, **settings) -> HeldModel:
    """The student as the recipe's model keys load and train it, which learns from each row of a step once."""
    model_args, args = recipe.model_args, recipe.training_args
    adapter = None
    if model_args.use_peft:
        names = {"r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}
        adapter = {name: getattr(model_args, key) for name, key in names.items()}
        adapter["target_parameters"] = model_args.lora_target_parameters
    return HeldModel(
        name="student",
        source=model_args.model_name_or_path,
        key="model_name_or_path",
        adapter=adapter,
        dtype=str(model_args.dtype),
        is_4bit=model_args.load_in_4bit,
        storage_of_4bit=model_args.bnb_4bit_quant_storage or "uint8",
        rows=args.per_device_train_batch_size,
        learns=1.0,
        as_adapter="--use_peft true --lora_target_modules all-linear --dtype bfloat16",
        in_4bit="--load_in_4bit true",
        **settings,
    )


def reference_of(model: HeldModel, name: str = "reference") -> HeldModel:
    """A frozen copy of a model; of an adapter, a copy of the adapter on the same frozen weights."""
    stands_on = model.name if model.adapter is not None else None
    return replace(
        model,
        name=name,
        copies=model.name,
        stands_on=stands_on,
        trains=False,
        reads=max(1.0, model.learns),
        learns=0.0,
        as_adapter="",
        in_4bit="",
    )


def rows_of_a_step(args) -> int:
    """Rows that a device learns from in an optimizer step."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def longest_row(args) -> int:
    """Tokens of the longest prompt and the longest answer; `max_length` bounds both where it is set."""
    tokens = (args.max_prompt_length or args.max_completion_length) + args.max_completion_length
    return min(tokens, getattr(args, "max_length", None) or tokens)
