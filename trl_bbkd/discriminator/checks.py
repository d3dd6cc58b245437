from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..host._compat import get_tokenizer_config
from ..host.model_paths import no_model
from .model import Discriminator, find_backbone


def check_vocabulary(
    discriminator: str | PreTrainedModel | Discriminator,
    tokenizer: PreTrainedTokenizerBase,
    student_name: str,
    trust_remote_code: bool = False,
) -> None:
    """
    Check that the discriminator reads the student's token ids as the student does.

    The discriminator is given token ids, never text. An embedding padded beyond the tokenizer is fine; a checkpoint
    without tokenizer files is judged by its embedding alone.

    Args:
        discriminator (`str`, [`~transformers.PreTrainedModel`] or [`Discriminator`]):
            Checkpoint or loaded model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        student_name (`str`):
            For the message.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Passed to `from_pretrained`.

    Raises:
        ValueError: If a token has another id, an id lies beyond the embedding, or there is no model.
    """
    vocabulary = tokenizer.get_vocab()
    if isinstance(discriminator, str):
        name = discriminator
        path, _ = find_backbone(discriminator)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise ValueError(no_model("discriminator", name, "a model", error)) from error
        # Without its files, AutoTokenizer makes up an empty tokenizer of the model's kind
        if get_tokenizer_config(path, trust_remote_code=trust_remote_code):
            other = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).get_vocab()
            if other != vocabulary:
                token = min(
                    (token for token, _ in vocabulary.items() ^ other.items()),
                    key=lambda token: (vocabulary.get(token, len(vocabulary)), token),
                )
                raise ValueError(
                    f"The discriminator ({name}) and the student ({student_name}) have different tokenizers: "
                    f"{len(other)} and {len(vocabulary)} tokens; {token!r} has id {other.get(token)} and "
                    f"{vocabulary.get(token)}. The discriminator reads the student's token ids: choose a model of the "
                    "same family, or leave `discriminator` out to start from the student's checkpoint."
                )
        num_embeddings = config.get_text_config().vocab_size
    else:
        model = discriminator.backbone if isinstance(discriminator, Discriminator) else discriminator
        name = model.config._name_or_path or "in memory"
        num_embeddings = model.get_input_embeddings().weight.size(0)
    largest_id = max(vocabulary.values())
    if largest_id >= num_embeddings:
        raise ValueError(
            f"The discriminator ({name}) has embeddings for {num_embeddings} tokens, but the tokenizer of the student "
            f"({student_name}) has ids up to {largest_id}. The discriminator reads the student's token ids: choose a "
            "model of the same family, or leave `discriminator` out to start from the student's checkpoint."
        )
