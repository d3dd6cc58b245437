"""What can be said of a proxy, its student and their rows before any weights are loaded."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.teacher_data import answer_text, check_teacher_data
from ..errors import ProxyModelError, TeacherDataError
from ..host.model_files import adapter_of
from ..host.model_paths import base_of_adapter, no_model, refuse_adapter_path
from ..host.preflight import refuse_broken_weights, refuse_frozen, refuse_frozen_adapter, refuse_prompt_learning
from ..selection.config import check_batches
from ..selection.mixin import check_confidences
from ..soft_targets.vocabulary import check_vocabularies
from .config import ProxyConfig


VOCABULARY_TEXTS = 256
TRAINING_STAGES = {"warmup", "align"}  # those that train the proxy
NO_VIRTUAL_TOKENS = (
    "soft targets and their loss are computed in the model below the adapter, without its virtual tokens"
)


def quantization_of_training(args: ProxyConfig) -> BitsAndBytesConfig | None:
    """How a proxy that learns is quantised, if `proxy_model_init_kwargs` of a recipe say so."""
    given = (args.proxy_model_init_kwargs or {}).get("quantization_config")
    if not TRAINING_STAGES & {*args.stages} or given is None:
        return None
    return BitsAndBytesConfig.from_dict(given) if isinstance(given, dict) else given


def base_of_proxy(path: str) -> str | None:
    """
    [`~host.model_paths.base_of_adapter`] of a proxy.

    Raises:
        [`~errors.ProxyModelError`]: it does not name its base model, or that is not there.
    """
    try:
        return base_of_adapter(path, f"The proxy {path}")
    except ValueError as error:
        raise ProxyModelError(str(error)) from error


def check_proxy(
    proxy: str | PreTrainedModel | None, student: str | PreTrainedModel, args: ProxyConfig, method: str, without: str
) -> None:
    """
    Args:
        proxy, student (`str` or [`~transformers.PreTrainedModel`]):
            The two models.
        args ([`~config.ProxyConfig`]):
            Configuration.
        method, without (`str`):
            Name of the method, and how it does without a proxy, for the message.

    Raises:
        [`~errors.ProxyModelError`]: there is no proxy, it is the student, or an adapter that cannot be used.
        ValueError: `proxy_lora_kwargs` are none.
    """
    if proxy is None:
        raise ProxyModelError(
            f"{method} needs a proxy: set `proxy_model` to an open model with the student's tokenizer, larger than the "
            f"student. ({without})"
        )
    same = proxy is student
    if isinstance(proxy, str) and isinstance(student, str):
        same = proxy == student or (Path(proxy).is_dir() and Path(proxy).resolve() == Path(student).resolve())
    if same:
        raise ProxyModelError(
            f"The proxy is the student ({student if isinstance(student, str) else 'one model object'}): there is nothing to "
            "learn from it that the student does not know. Set `proxy_model` to a larger model of the same family."
        )
    if not isinstance(proxy, str) and args.proxy_lora_kwargs is not None:
        raise ProxyModelError(
            "proxy_lora_kwargs needs a proxy on disk: its stages keep the adapter alone, and read the base model again. Hand in "
            "its path."
        )
    if isinstance(proxy, PeftModel) and not proxy.peft_config["default"].base_model_name_or_path:
        raise ProxyModelError(
            "The proxy is an adapter whose base model has no path, from which the next stage could read it. Save the base model, "
            "and hand in an adapter on its path."
        )
    if isinstance(proxy, str) and base_of_proxy(proxy) is not None and args.proxy_lora_kwargs is not None:
        raise ProxyModelError(
            f"The proxy {proxy} is a LoRA adapter already, which is trained further. Leave proxy_lora_kwargs out."
        )
    if args.proxy_lora_kwargs is not None:
        try:
            LoraConfig(**args.proxy_lora_kwargs)
        except TypeError as error:
            raise ValueError(f"proxy_lora_kwargs: {error}") from error


def check_shared_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    proxy: str | PreTrainedModel,
    hub_kwargs: dict,
    rows: Dataset,
) -> PretrainedConfig:
    """
    Compare the student's tokenizer with the proxy's, also on some of the teacher's answers; the proxy's configuration.

    Raises:
        [`~errors.VocabularyError`]: they differ.
        [`~errors.TeacherDataError`]: one of those answers is none.
        [`~errors.ProxyModelError`]: there is no model at the proxy's path.
    """
    base = base_of_proxy(proxy) if isinstance(proxy, str) else None
    try:
        proxy_config = (
            AutoConfig.from_pretrained(base or proxy, **hub_kwargs) if isinstance(proxy, str) else proxy.config
        )
    except OSError as error:
        name = "proxy_model" if base is None else f"base_model_name_or_path of the adapter {proxy}"
        raise ProxyModelError(no_model(name, base or proxy, "a model", error)) from error
    path = proxy if isinstance(proxy, str) else proxy.config._name_or_path
    # A model made in memory has no tokenizer of its own
    if path:
        has_own = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
        source = path if has_own else base_of_proxy(path) or path
        proxy_tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
        first_rows = rows.select(range(min(len(rows), VOCABULARY_TEXTS)))
        check_teacher_data(first_rows)
        texts = [answer_text(answer) for answer in first_rows["completion"]]
        check_vocabularies(tokenizer, proxy_tokenizer, config, proxy_config, texts)
    return proxy_config


def check_models(
    student: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    proxy: str | PreTrainedModel | PeftModel | None,
    args: ProxyConfig,
) -> None:
    """
    Refuse models that could not learn, and adapters that the loss does not see.

    Raises:
        ValueError: a student, or a proxy that is to be trained, without trainable parameters; virtual tokens; a student's
            path that is an adapter's.
    """
    refuse_prompt_learning(adapter_of(student) or peft_config, "student", NO_VIRTUAL_TOKENS)
    refuse_frozen_adapter(peft_config, "student")
    refuse_adapter_path(student, "student")
    refuse_broken_weights(student, "student")
    if not isinstance(student, str) and peft_config is None:
        refuse_frozen(student, "student")
    if isinstance(proxy, str):
        refuse_broken_weights(proxy, "proxy")
        base = base_of_proxy(proxy)
        refuse_broken_weights(base, "proxy's base model")
        adapter = None if base is None else PeftConfig.from_pretrained(proxy)
    else:
        adapter = adapter_of(proxy)
        if proxy is not None and TRAINING_STAGES.intersection(args.stages):
            refuse_frozen(proxy, "proxy")
    refuse_prompt_learning(adapter, "proxy", NO_VIRTUAL_TOKENS)


def check_tokens(rows: Dataset, context: int | None, vocab_size: int, names: list[int]) -> None:
    """
    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids`.
        context (`int`, *optional*):
            Tokens of context that student and proxy share.
        vocab_size (`int`):
            Embeddings that both have.
        names (`list[int]`):
            The rows' names in errors.

    Raises:
        [`~errors.TeacherDataError`]: a row is longer than the context of student and proxy, or has a token that one of
            them has no embedding of.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = int(np.argmax(lengths))
    if context is not None and lengths[longest] > context:
        raise TeacherDataError(
            f"Row {names[longest]} has {lengths[longest]} tokens, prompt and answer, but the context that student and proxy share is "
            f"{context} tokens. Lower `max_completion_length`, or drop rows with `max_prompt_length`."
        )
    largest = [max(ids) for ids in rows["input_ids"]]
    row = int(np.argmax(largest))
    if largest[row] >= vocab_size:
        raise TeacherDataError(
            f"Row {names[row]} has token {largest[row]}, but the models have {vocab_size} embeddings only: tokenizer and models do "
            "not belong together. After adding tokens, call `model.resize_token_embeddings(len(tokenizer))` and save both."
        )


def check_enough_rows(rows: Dataset, args: ProxyConfig) -> None:
    """
    Refuse rows of the student that would not make one batch.

    Raises:
        ValueError: `dataloader_drop_last` drops all of them, or a pool of the selection is larger.
        [`~errors.LLKDDataError`]: there is nothing to select by.
        [`~errors.TeacherDataError`]: `max_length` leaves no answer.
    """
    if args.selection == "llkd":
        check_confidences(rows)
    kept = len(rows)
    if args.max_length is not None and args.truncation_mode == "keep_start":
        kept = sum(any(label != -100 for label in labels[: args.max_length]) for labels in rows["labels"])
    if not kept:
        raise TeacherDataError(f"max_length={args.max_length} cuts off every answer. Raise it, or leave it out.")
    check_batches(kept, args)
