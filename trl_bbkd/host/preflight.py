"""What every trainer asks before it builds anything: configuration, tokenizer, a model that can learn, enough rows."""

from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import NoStepsError, WeightsError


def require_config(args, config_type: type, trainer: str) -> None:
    """
    Refuse another class's configuration, in its own place or in another argument's.

    Args:
        args:
            What was given as configuration.
        config_type (`type`):
            The trainer's configuration class.
        trainer (`str`):
            The trainer's name.

    Raises:
        TypeError: `args` is no `config_type`.
    """
    if not isinstance(args, config_type):
        raise TypeError(
            f"args of {trainer} must be a {config_type.__name__}, got {type(args).__name__}: "
            f"`from trl_bbkd import {config_type.__name__}` and change the class; the fields keep their names."
        )


def require_model(model, trainer: str, argument: str = "model") -> None:
    """
    Args:
        model:
            What was given as model.
        trainer (`str`):
            The trainer's name.
        argument (`str`, *optional*, defaults to `"model"`):
            Name of its argument.

    Raises:
        TypeError: neither a path nor a model with a configuration.
    """
    if not isinstance(model, str) and not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise TypeError(
            f"{argument} of {trainer} must be a path or an id of the Hub (`str`), a `PreTrainedModel` or a `PeftModel`, got "
            f"{type(model).__name__}."
        )


def require_tokenizer(processing_class, trainer: str) -> None:
    """
    Args:
        processing_class:
            What was given as tokenizer.
        trainer (`str`):
            The trainer's name.

    Raises:
        TypeError: a processor of images or sound, or anything else that is no tokenizer.
    """
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"{trainer} distils text: processing_class must be a tokenizer, got {type(processing_class).__name__}. "
            "Pass the processor's `.tokenizer`."
        )


def refuse_broken_weights(model, role: str) -> None:
    """
    Refuse a model on disk of which a file of weights was cut off or is none, before anything is loaded from it.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            A model, or where it is. One in memory, or on the Hub, is left alone.
        role (`str`):
            What the model is: `"student"`, `"proxy"`, `"discriminator"`, `"checkpoint"`.

    Raises:
        [`~errors.WeightsError`]: naming the first such file.
    """
    if not isinstance(model, str | Path):
        return
    for file in sorted(Path(model).expanduser().glob("[!.]*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"The {role}'s weights cannot be read: {file} ({file.stat().st_size:,} bytes) was not copied or written to its "
                f"end, or is no safetensors file ({error}). Copy or make it again."
            ) from error


def refuse_frozen(model: nn.Module, role: str) -> None:
    """
    Refuse a model that takes every step and learns nothing.

    Args:
        model (`nn.Module`):
            A model that is to be trained as it is, or with the adapter that it already has.
        role (`str`):
            What the model is: `"student"`, `"discriminator"`, `"critic"`, `"proxy"`.

    Raises:
        ValueError: no parameter of `model` requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    remedy = (
        "Load its adapter for training: PeftModel.from_pretrained(base, path, is_trainable=True)"
        if isinstance(model, PeftModel)
        else "Set requires_grad on what shall learn, or train an adapter on it (peft_config)"
    )
    raise ValueError(f"The {role} has no trainable parameter: it would take every step and learn nothing. {remedy}.")


def refuse_frozen_adapter(adapter: PeftConfig | None, role: str) -> None:
    """
    Refuse the configuration of an adapter that would be made without a trainable parameter, as a saved one's is.

    Args:
        adapter ([`~peft.PeftConfig`], *optional*):
            The adapter that is to be trained.
        role (`str`):
            What the model is.

    Raises:
        ValueError: `adapter` is for inference.
    """
    if adapter is not None and adapter.inference_mode:
        raise ValueError(
            f"The {role}'s {type(adapter).__name__} has inference_mode=True, as one read from a saved adapter: it would take "
            "every step and learn nothing. Set inference_mode=False; to go on with that adapter, hand in "
            "PeftModel.from_pretrained(base, path, is_trainable=True) instead."
        )


def refuse_adapted_head(model: PreTrainedModel, role: str) -> None:
    """
    Refuse an adapter on an output layer whose weight is multiplied with the hidden states directly.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, without its PEFT wrapper.
        role (`str`):
            What the model is.

    Raises:
        ValueError: the output layer has an adapter. A copy of the layer (`modules_to_save`) is none.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper):
        raise ValueError(
            f"The {role} has an adapter on its output layer, which would never be trained: log-probabilities are computed "
            "from the layer's weight directly. Take the layer ('lm_head') out of target_modules, and leave out "
            "trainable_token_indices and ensure_weight_tying if it is tied to the embeddings; modules_to_save=['lm_head'] "
            "trains all of it."
        )


def refuse_short_embeddings(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, role: str) -> None:
    """
    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Whose ids the model reads.
        num_embeddings (`int`):
            Rows of the model's embedding.
        role (`str`):
            What the model is.

    Raises:
        ValueError: the tokenizer has ids beyond the embedding.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, but the {role} has embeddings for {num_embeddings} tokens. Resize them, "
            f"model.resize_token_embeddings({largest + 1}), and hand in the model, or save it and hand in its path."
        )


def refuse_prompt_learning(adapter: PeftConfig | None, role: str, why: str) -> None:
    """
    Args:
        adapter ([`~peft.PeftConfig`], *optional*):
            The adapter that is to be trained.
        role (`str`):
            What the model is.
        why (`str`):
            What does not work with virtual tokens, as a clause.

    Raises:
        ValueError: `adapter` learns virtual tokens (prompt tuning, prefix tuning, p-tuning).
    """
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"{type(adapter).__name__} is not supported for the {role}: {why}. Use an adapter of weights, such as "
            "LoraConfig."
        )


def refuse_too_few_rows(rows: int, needed: int, unit: str, remedy: str) -> None:
    """
    Refuse a data set that does not fill one batch: a sampler would drop it whole, and the run would take no step.

    Args:
        rows (`int`):
            Rows (or prompts) that there are for training.
        needed (`int`):
            Rows (or prompts) of one batch over all processes.
        unit (`str`):
            `"rows"` or `"prompts"`.
        remedy (`str`):
            Which keys to lower, as a clause in the imperative.

    Raises:
        ValueError: `rows` is smaller than `needed`.
    """
    if rows < needed:
        raise ValueError(
            f"{rows} training {unit} do not fill one batch of {needed} {unit}: not a single step would be taken. "
            f"Get more teacher rows, or {remedy}."
        )


def refuse_no_steps(steps: int, what: str) -> None:
    """
    Refuse to call a run done that has learned nothing.

    Args:
        steps (`int`):
            Optimizer steps taken.
        what (`str`):
            What has ended: `"Round 1"`.

    Raises:
        [`~errors.NoStepsError`]: there were none.
    """
    if steps == 0:
        raise NoStepsError(
            f"{what} took no optimizer step and learned nothing: the rows do not fill one batch, or num_train_epochs is 0. Get "
            "more rows, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )
