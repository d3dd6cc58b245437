"""The student's tokenizer, made once: rows, evaluation, baseline and the saved student have the same."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


SHOWN_TOKENS = 5


def student_tokenizer(
    student: str | PreTrainedModel, args, processing_class: PreTrainedTokenizerBase | None = None, **hub_kwargs
) -> PreTrainedTokenizerBase:
    """
    Make the student's tokenizer, with what the configuration says of it: `chat_template_path`, `eos_token` and
    `pad_token`, as [`~trl.SFTTrainer`] applies them. Rows are tokenised with what comes out, so it comes first.

    Args:
        student (`str` or [`~transformers.PreTrainedModel`]):
            The student, or its path.
        args ([`~trl.trainer.base_config._BaseConfig`]):
            Configuration of the student's training. One without those fields leaves the tokenizer as it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer to change, in place. By default the one at the student's path.
        **hub_kwargs:
            Passed to `from_pretrained`, such as `revision`.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]

    Raises:
        ValueError: a token that is none, a template that is not there, or one that needs tokens the student lacks.
    """
    if processing_class is None:
        path = student if isinstance(student, str) else student.config._name_or_path
        processing_class = AutoTokenizer.from_pretrained(path, **{"padding_side": "left", **hub_kwargs})
        # Where there are no files of one, transformers makes one that reads nothing
        if not processing_class.get_vocab().keys() - {*processing_class.all_special_tokens}:
            raise ValueError(f"{path} has no tokenizer. Copy the one that the model was trained with into its folder.")
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name, None)
        if token is not None:
            if token not in processing_class.get_vocab():
                raise ValueError(
                    f"{name}={token!r} is no token of the student's tokenizer. Name one that it has, or leave {name} out."
                )
            setattr(processing_class, name, token)
    if getattr(args, "chat_template_path", None) is not None:
        _take_template(processing_class, args.chat_template_path, args.eos_token)
    return processing_class


def _take_template(tokenizer: PreTrainedTokenizerBase, path: str, eos_token: str | None) -> None:
    """The chat template in a Jinja file, or that of another tokenizer, together with its end of a turn."""
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise ValueError(f"chat_template_path={path!r} is not there.")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    try:
        source = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"chat_template_path={path!r} is neither a .jinja file nor a tokenizer: {str(error).splitlines()[0]}"
        ) from error
    if source.chat_template is None:
        raise ValueError(f"chat_template_path={path!r}: that tokenizer has no chat template.")
    vocabulary = tokenizer.get_vocab()
    missing = [token.content for token in source.added_tokens_decoder.values() if token.content not in vocabulary] + [
        token for token in (source.eos_token,) if token is not None and token not in vocabulary
    ]
    if missing:
        raise ValueError(
            f"chat_template_path={path!r} has tokens that the student's tokenizer lacks: "
            f"{', '.join(dict.fromkeys(missing[:SHOWN_TOKENS]))}. Add them to the student first (trl.clone_chat_template) and save "
            "it, or name a .jinja file."
        )
    if eos_token is not None and eos_token != source.eos_token:
        raise ValueError(
            f"eos_token={eos_token!r}, but the tokenizer at chat_template_path={path!r} ends a turn with "
            f"{source.eos_token!r}. Leave eos_token out, or name a .jinja file."
        )
    tokenizer.chat_template = source.get_chat_template()
    if source.eos_token is not None:
        tokenizer.eos_token = source.eos_token
