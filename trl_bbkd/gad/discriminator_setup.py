import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..discriminator.checks import check_vocabulary
from ..discriminator.model import BACKBONE_NAME, CONFIG_NAME, Discriminator, build_discriminator, find_backbone
from ..host.preflight import refuse_broken_weights, refuse_frozen, refuse_frozen_adapter, refuse_prompt_learning
from ..host.sharding import check_sharding, is_sharded
from .config import GADConfig
from .shared_backbone import SHARED, check_shared_backbone, share_backbone, shared_adapter_config


def resolve_discriminator(
    args: GADConfig,
    discriminator: str | PreTrainedModel | Discriminator | None,
    adapter: PeftConfig | None,
    student: str | PreTrainedModel | PeftModel,
    student_adapter: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str | PreTrainedModel | Discriminator | None, PeftConfig | None]:
    """
    Decide what discriminator is asked for, and refuse, before any model is loaded, one that cannot be trained beside
    this student.

    Args:
        args ([`GADConfig`]):
            Its `discriminator`, `discriminator_lora_kwargs`, `discriminator_load_in_4bit` and `trust_remote_code`.
        discriminator (`str`, [`~transformers.PreTrainedModel`] or [`Discriminator`], *optional*):
            Where the discriminator starts, instead of `args.discriminator`.
        adapter ([`~peft.PeftConfig`], *optional*):
            Adapter it is to be trained as, instead of `args.discriminator_lora_kwargs`.
        student (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]), student_adapter (`PeftConfig`):
            The student, as given to the trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.

    Returns:
        `tuple[str | PreTrainedModel | Discriminator | None, PeftConfig | None]`: Where it starts (`None` is the student's
        checkpoint), and its adapter.

    Raises:
        ValueError: If a setting is given twice; if the discriminator could not learn (frozen, or an adapter that does
            nothing for it); if it has another tokenizer, or an embedding without room for every token; if `"shared"` is
            asked for without a LoRA student; if 4 bits are asked for without a LoRA adapter.
    """
    if discriminator is not None and args.discriminator is not None:
        raise ValueError("Pass `discriminator` to the trainer or set it in `args`, not both.")
    if adapter is not None and args.discriminator_lora_kwargs is not None:
        raise ValueError("Pass `discriminator_peft_config` or set `args.discriminator_lora_kwargs`, not both.")
    discriminator = discriminator or args.discriminator
    refuse_broken_weights(discriminator, "discriminator")
    if isinstance(discriminator, str):
        refuse_broken_weights(Path(discriminator) / BACKBONE_NAME, "discriminator")
    if args.discriminator_lora_kwargs is not None:
        adapter = LoraConfig(**args.discriminator_lora_kwargs)
    _check_adapter(discriminator, adapter)
    if args.discriminator_updates_per_batch > 0:
        refuse_frozen_adapter(adapter, "discriminator")
        if adapter is None and isinstance(discriminator, torch.nn.Module):
            # The heads of a discriminator are always trainable, but alone they learn next to nothing
            backbone = discriminator.backbone if isinstance(discriminator, Discriminator) else discriminator
            refuse_frozen(backbone, "discriminator")
    if args.discriminator_load_in_4bit:
        _check_4bit(discriminator, adapter)
    if discriminator == SHARED:
        if isinstance(student, PeftModel):
            student_adapter = student.peft_config["default"]
        check_shared_backbone(student_adapter, adapter)
    elif discriminator is not None:
        student_name = student if isinstance(student, str) else student.config._name_or_path or "in memory"
        check_vocabulary(discriminator, tokenizer, student_name, args.trust_remote_code)
    # PEFT writes into a configuration, and one object may have been given for both models
    return discriminator, copy.deepcopy(adapter)


def start_discriminator(
    args: GADConfig,
    discriminator: str | PreTrainedModel | Discriminator | None,
    adapter: PeftConfig | None,
    student: PreTrainedModel | PeftModel,
    student_path: str,
    student_kwargs: dict[str, Any],
) -> Discriminator:
    """
    Build the discriminator that [`resolve_discriminator`] decided on.

    Args:
        args ([`GADConfig`]), discriminator, adapter:
            As in, and from, [`resolve_discriminator`].
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The loaded student, on its device.
        student_path (`str`):
            Its checkpoint.
        student_kwargs (`dict[str, Any]`):
            Arguments of `from_pretrained` that fit the student's checkpoint. The discriminator gets them as well, except
            `revision` if it starts from another checkpoint.

    Returns:
        [`Discriminator`]
    """
    init_kwargs = dict(student_kwargs)
    if discriminator is not None:
        init_kwargs.pop("revision", None)
    if args.discriminator_load_in_4bit:
        init_kwargs["quantization_config"] = four_bits(args)
    origin = None
    if discriminator is None:
        discriminator = student_path
        origin = student.get_base_model() if isinstance(student, PeftModel) else student
    elif discriminator == SHARED:
        discriminator = share_backbone(student, args.discriminator_head)
        adapter = adapter or shared_adapter_config(student, discriminator)
    return build_discriminator(
        discriminator,
        args.discriminator_head,
        args.discriminator_likelihood_reduction,
        adapter,
        args.seed,
        origin,
        **init_kwargs,
    )


def check_sharded_models(args: GADConfig, quantization_config: BitsAndBytesConfig | None) -> None:
    """
    As [`~host.sharding.check_sharding`], for the student and what is trained beside it.

    Raises:
        ValueError: If one of them cannot be sharded in the way that is asked for.
    """
    check_sharding(args, quantization_config, four_bits(args) if args.discriminator_load_in_4bit else None)
    reason = why_models_are_not_sharded(args)
    if reason and is_sharded(args):
        raise ValueError(reason)


def why_models_are_not_sharded(args: GADConfig) -> str:
    """Why no engine can shard what GAD trains, and the nearest that works; empty if one can. A plan asks it too."""
    if args.critic == "trunk":
        return "critic='trunk' reads the student's layers past what gathers them, under FSDP and DeepSpeed. Take critic='copy'."
    return ""


def four_bits(args: GADConfig) -> BitsAndBytesConfig:
    """How a discriminator is loaded that `discriminator_load_in_4bit` asks for."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
    )


def _check_adapter(discriminator: str | PreTrainedModel | Discriminator | None, adapter: PeftConfig | None) -> None:
    """Refuse an adapter that would be left out or do nothing."""
    refuse_prompt_learning(adapter, "discriminator", "it reads token ids alone, without virtual ones")
    if adapter is None:
        return
    if isinstance(discriminator, PeftModel):
        raise ValueError(
            "The discriminator has an adapter already: leave out discriminator_peft_config (discriminator_lora_kwargs), or "
            "hand in the model without it."
        )
    is_saved = isinstance(discriminator, str) and (Path(discriminator) / CONFIG_NAME).is_file()
    is_adapter = is_saved and find_backbone(str(discriminator))[1]
    if isinstance(discriminator, Discriminator) or (is_saved and not is_adapter):
        raise ValueError(
            "A discriminator that was trained before is trained further as it is, so that discriminator_peft_config "
            "(discriminator_lora_kwargs) would have no effect. Leave it out."
        )


def _check_4bit(discriminator: str | PreTrainedModel | Discriminator | None, adapter: PeftConfig | None) -> None:
    if discriminator == SHARED:
        raise ValueError(
            "discriminator_load_in_4bit has no effect with discriminator='shared': the base model is the student's. "
            "Load the student in 4 bits (`quantization_config`, or `load_in_4bit: true` in a recipe)."
        )
    if discriminator is not None and not isinstance(discriminator, str):
        raise ValueError(
            "discriminator_load_in_4bit acts when a discriminator is loaded, but a loaded one was given. Pass its path."
        )
    if adapter is None and (discriminator is None or not find_backbone(discriminator)[1]):
        raise ValueError(
            "discriminator_load_in_4bit needs a LoRA discriminator, since 4-bit weights cannot be trained: set "
            "discriminator_lora_kwargs, e.g. {'r': 16, 'target_modules': 'all-linear'}."
        )
