"""What GAD refuses before any model is loaded, or any row read."""

from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..discriminator.model import Discriminator
from ..host.preflight import (
    refuse_frozen,
    refuse_frozen_adapter,
    refuse_prompt_learning,
    refuse_short_embeddings,
    require_config,
    require_model,
)
from .config import GADConfig


def check_arguments(model, discriminator, reward_funcs, args, optimizers: tuple, tools, environment_factory) -> None:
    """
    Refuse what [`~trl.GRPOTrainer`] takes and GAD does not, before anything is read.

    Raises:
        TypeError: a model is none; `args` is no [`GADConfig`], or stands in the place of `reward_funcs`.
        ValueError: tools, environments, or a schedule beside `warmup_learning_rate`.
    """
    require_model(model, "GADTrainer")
    if discriminator is not None and not isinstance(discriminator, Discriminator):
        require_model(discriminator, "GADTrainer", "discriminator")
    if isinstance(reward_funcs, TrainingArguments):
        raise TypeError(
            "The second argument of GADTrainer is reward_funcs, as in GRPOTrainer. Name the configuration: "
            "GADTrainer(model, args=...)."
        )
    if args is not None:
        require_config(args, GADConfig, "GADTrainer")
    for name, value in {"tools": tools, "environment_factory": environment_factory}.items():
        if value:
            raise ValueError(
                f"GADTrainer does not support {name}: the teacher's answers are text that was written without them, and the "
                f"discriminator would tell the two sides apart by that. Leave {name} out."
            )
    if args is not None and args.warmup_learning_rate is not None and optimizers[1] is not None:
        raise ValueError(
            "warmup_learning_rate changes the trainer's own schedule, but `optimizers` brings another one. Leave out one of "
            "the two."
        )


def check_student(
    model: str | PreTrainedModel | PeftModel,
    adapter: PeftConfig | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    critic: str | None,
) -> None:
    """
    Refuse a student that would not learn, or cannot read its tokens, before any model is loaded.

    Raises:
        ValueError: it is frozen, its adapter is not the one that is trained, or it has too few embeddings.
    """
    refuse_frozen_adapter(adapter, "student")
    num_embeddings = config.get_text_config().vocab_size
    if not isinstance(model, str):
        if adapter is None:
            refuse_frozen(model, "student")
        num_embeddings = model.get_input_embeddings().weight.size(0)
    refuse_short_embeddings(tokenizer, num_embeddings, "student")
    if isinstance(model, PeftModel) and "default" not in model.peft_config:
        raise ValueError(
            f"The student's adapter is named {', '.join(model.peft_config)}, but GRPO trains one named 'default', beside its "
            "reference. Load it without adapter_name."
        )
    if critic == "trunk":
        trained = model.peft_config["default"] if isinstance(model, PeftModel) else adapter
        refuse_prompt_learning(trained, "student", "critic='trunk' reads its trunk without virtual tokens")


def check_rewards(reward_funcs: list, weights: list[float] | None, processing_classes) -> None:
    """
    Raises:
        ValueError: there are not as many weights or tokenizers as reward functions.
    """
    for name, given in {"reward_weights": weights, "reward_processing_classes": processing_classes}.items():
        given = given if given is None or isinstance(given, list) else [given]
        if given is not None and len(given) != len(reward_funcs):
            raise ValueError(
                f"{name} has {len(given)} entries for {len(reward_funcs)} reward_funcs. Give one for each of them, and none for "
                "the discriminator."
            )


def check_checkpoint(
    student: str | PreTrainedModel,
    path: str,
    adapter: PeftConfig | None,
    discriminator,
    args: GADConfig,
) -> None:
    """
    Refuse a student without a path where another model is to start from its checkpoint.

    Args:
        student (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]), adapter ([`~peft.PeftConfig`]):
            The student, as given to the trainer.
        path (`str`):
            Its checkpoint, empty where none is known.
        discriminator:
            Where the discriminator starts; `None` is that checkpoint.
        args ([`GADConfig`]):
            Configuration.

    Raises:
        ValueError: there is none.
    """
    needs = {
        "discriminator": discriminator is None,
        "critic": args.critic == "copy",
        "KL reference": args.beta != 0 and adapter is None and not isinstance(student, PeftModel),
    }
    if not path and any(needs.values()):
        raise ValueError(
            "The student was made in memory, and no checkpoint is known from which to start its "
            f"{', '.join(role for role, is_needed in needs.items() if is_needed)}. Save it with save_pretrained, and hand in "
            "the path."
        )
