"""Settings that GAD takes from no one: inherited ones that would not act, idle ones, and values that are none."""

import typing
from typing import Any, Literal


SHARDING = "the discriminator is sharded by FSDP2 or ZeRO alone, not by tensor or context parallelism"
GROUPS = "prompts are drawn in groups of num_generations; shuffle_dataset=False takes them in the order of the file"
NO_LABELS = "its evaluation has no labels or predictions, only means (see sample_metrics)"
REFERENCE = "the KL reference is the warmed-up student, which is not mixed with later ones"

# A field's default, the only value that is taken, and why
NO_EFFECT: dict[str, tuple[Any, str]] = {
    "parallelism_config": (None, SHARDING),
    "label_smoothing_factor": (0.0, "neither the cross-entropy of the warm-up nor GRPO's loss smooths labels"),
    "average_tokens_across_devices": (True, "its losses are means over the tokens of all processes"),
    "train_sampling_strategy": ("random", GROUPS),
    "length_column_name": ("length", GROUPS),
    "data_seed": (None, "`seed` shuffles the rows"),
    "label_names": (None, NO_LABELS),
    "include_for_metrics": ([], NO_LABELS),
    "batch_eval_metrics": (False, NO_LABELS),
    "eval_do_concat_batches": (True, NO_LABELS),
    "eval_use_gather_object": (False, NO_LABELS),
    "ref_model_mixup_alpha": (0.6, REFERENCE),
    "ref_model_sync_steps": (512, REFERENCE),
    "max_tool_calling_iterations": (None, "tools are not supported"),
}

# Values of inherited fields that are plain strings, which TRL looks at in the first step
CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "luspo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
}

# Own settings that act only beside another one
IDLE = {
    "advantage_estimator='gae'": ("gamma", "lam", "critic_learning_rate", "critic_max_grad_norm", "cliprange_value"),
    "discriminator_head='likelihood'": ("discriminator_likelihood_reduction", "discriminator_entropy"),
    "discriminator_replay_size": ("discriminator_replay_ratio",),
    "warmup_epochs": ("warmup_learning_rate", "discriminator_warmup_learning_rate"),
}


def refuse_without_effect(config) -> None:
    """
    Refuse what would be ignored.

    Args:
        config ([`~config.GADConfig`]):
            As it was given, before transformers fills it in.

    Raises:
        ValueError: a setting would have no effect, or act on one side of the discriminator only.
    """
    for name, (default, why) in NO_EFFECT.items():
        value = getattr(config, name)
        is_empty = value is False or value in ([], {}, "")
        if value != default and not (default is None and is_empty):
            given = " ".join(repr(value).split())[:80]
            raise ValueError(f"{name}={given} is not supported by GAD: {why}. Leave it out.")
    if config.max_completion_length is None:
        raise ValueError(
            "max_completion_length must be a number for GAD: the teacher's answers are cut there as the student's samples are, "
            "or the discriminator would tell them apart by their length."
        )
    for name in ("max_new_tokens", "max_length", "max_tokens"):
        if isinstance(config.generation_kwargs, dict) and name in config.generation_kwargs:
            raise ValueError(
                f"generation_kwargs has {name!r}, which cuts the student's samples but not the teacher's answers. Set "
                "max_completion_length instead."
            )
    acts = {
        "advantage_estimator='gae'": config.advantage_estimator == "gae",
        "discriminator_head='likelihood'": config.discriminator_head == "likelihood",
        "discriminator_replay_size": config.discriminator_replay_size != 0,
        "warmup_epochs": config.warmup_epochs != 0,
    }
    for needed, names in IDLE.items():
        for name in names:
            value = getattr(config, name)
            if not acts[needed] and value != type(config).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value!r} has no effect without {needed}. Set both or neither.")


def check_bounds(config) -> None:
    """
    Args:
        config ([`~config.GADConfig`]):
            As it was given.

    Raises:
        ValueError: a number is below what a field can be, or above it.
    """
    minimum = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "num_generations_eval": 1,
        "max_completion_length": 1,
        "max_steps": -1,
        "learning_rate": 0,
        "warmup_learning_rate": 0,
        "discriminator_only_steps": 0,
        "discriminator_updates_per_batch": 0,
        "discriminator_learning_rate": 0,
        "discriminator_warmup_learning_rate": 0,
        "discriminator_weight_decay": 0,
        "discriminator_sft_weight": 0,
        "sft_weight": 0,
        "discriminator_entropy": 0,
        "discriminator_patience": 1,
        "discriminator_batch_size": 1,
        "max_prompt_length": 1,
        "answers_per_prompt": 1,
        "gamma": 0,
        "lam": 0,
        "critic_learning_rate": 0,
        "discriminator_replay_size": 0,
        "group_std_floor": 0,
    }
    for name, bound in minimum.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}.")
    for name in ("temperature", "discriminator_max_grad_norm", "critic_max_grad_norm", "cliprange_value"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
    for name in ("gamma", "lam"):
        if getattr(config, name) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}.")


def check_choices(config) -> None:
    """
    Args:
        config ([`~config.GADConfig`]):
            Filled in.

    Raises:
        ValueError: a value is none of those that a field can have.
    """
    own = {name: _literals(hint) for name, hint in typing.get_type_hints(type(config)).items()}
    for name, choices in (own | CHOICES).items():
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _literals(hint) -> tuple:
    """What a `Literal`, alone or beside `None`, allows; nothing for another type."""
    members = [member for member in (hint, *typing.get_args(hint)) if typing.get_origin(member) is Literal]
    return typing.get_args(members[0]) if members else ()
