"""Whether a proxy and a student speak of the same tokens."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..errors import VocabularyError


SHOWN_TOKENS = 5


def check_vocabularies(
    student: PreTrainedTokenizerBase,
    proxy: PreTrainedTokenizerBase,
    student_config: PretrainedConfig,
    proxy_config: PretrainedConfig,
    texts: list[str],
) -> int:
    """
    Prove that two models share a tokenizer. Nothing but tokenizers and configurations is needed.

    Models of one family often have output layers of different sizes, padded with ids that stand for no token. That is
    fine: every id below both sizes means the same, and the rest means nothing.

    Args:
        student, proxy ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizers.
        student_config, proxy_config ([`~transformers.PretrainedConfig`]):
            The models' configurations.
        texts (`list[str]`):
            Texts that both have to cut alike, such as some of the teacher's answers: two vocabularies may be equal and
            their rules differ.

    Returns:
        `int`: number of ids both output layers have.

    Raises:
        [`VocabularyError`]: a token, or the way a text is cut, differs; or a token has no row in an output layer.
    """
    sizes = {
        name: config.get_text_config().vocab_size
        for name, config in (("student", student_config), ("proxy", proxy_config))
    }
    ids = {
        name: {i: t for t, i in tokenizer.get_vocab().items()}
        for name, tokenizer in (("student", student), ("proxy", proxy))
    }
    differing = [
        (i, ids["student"].get(i), ids["proxy"].get(i))
        for i in sorted(ids["student"].keys() | ids["proxy"].keys())
        if ids["student"].get(i) != ids["proxy"].get(i)
    ]
    if differing:
        shown = "; ".join(
            f"id {i} is {_shown(mine)} to the student and {_shown(other)} to the proxy"
            for i, mine, other in differing[:SHOWN_TOKENS]
        )
        raise VocabularyError(
            f"Proxy and student have different tokens ({len(differing):,} ids differ: {shown}). {ADVICE}"
        )
    for name, size in sizes.items():
        if max(ids[name]) >= size:
            raise VocabularyError(
                f"The {name}'s output layer has {size:,} rows, but its tokenizer goes up to id {max(ids[name]):,}: the "
                "model and its tokenizer do not belong together."
            )
    for text in texts:
        mine, other = (tokenizer(text=text, add_special_tokens=False)["input_ids"] for tokenizer in (student, proxy))
        if mine != other:
            at = next(
                (i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]),
                min(len(mine), len(other)),
            )
            raise VocabularyError(
                "Proxy and student have the same tokens but cut text differently: of "
                f"{text[:60]!r} the student makes {student.convert_ids_to_tokens(mine[at : at + 3])} where the proxy makes "
                f"{proxy.convert_ids_to_tokens(other[at : at + 3])}. {ADVICE}"
            )
    return min(sizes.values())


ADVICE = "Take a proxy of the student's family. GAD (`method: gad`) and SeqKD (plain SFT) need no shared tokenizer."


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
