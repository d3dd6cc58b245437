"""
A teacher's labels for unlabelled text, with the confidences that LLKD selects by.

    label = argmax_y p(y | x),   teacher_confidence = max_y p(y | x),   teacher_probs = p(. | x)

LLKD's paper takes the largest class probability of a frozen language model; how it gets p(y | x) from tokens is not
known, so that everything below is our reading. The distribution comes from a local model's log-probabilities of the
labels, or from what an API's answers say of it: probabilities, a stated confidence, or how far several answers agree.
"""

import string
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, List, Value
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.teacher_data import prompt_token_ids
from ..errors import PseudoLabelError, kind_of
from ..evaluation.student import pad_rows
from ..soft_targets.head import check_head, last_hidden_states, lm_head
from ..soft_targets.loss import project
from .answers import check_column, plain, read_answers
from .label_calibration import apply_temperature, check_temperature, label_distribution


__all__ = ["PseudoLabelError", "label_scores", "pseudo_label"]

Prompt = str | Callable[[dict], str | list[dict]] | None

NEW_COLUMNS = ("label", "teacher_confidence", "teacher_probs")


def pseudo_label(
    dataset: Dataset,
    labels: list[str],
    teacher: PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    prompt: Prompt = None,
    text_column: str = "text",
    scoring: str = "single_token",
    label_tokens: str | list[str] = "letters",
    length_normalize: bool = True,
    content_free: str | list[str] | None = None,
    as_chat: bool = False,
    chat_template_kwargs: dict | None = None,
    answer_prefix: str | None = None,
    batch_size: int = 16,
    answer_column: str = "completion",
    confidence_column: str | None = None,
    label_probs_column: str | None = None,
    unmatched: str = "error",
    temperature: float = 1.0,
) -> Dataset:
    """
    Label a data set with a local causal language model, or (`teacher=None`) from answers that were collected before.

    Args:
        dataset ([`~datasets.Dataset`]):
            Unlabelled rows, or rows with a teacher's answers.
        labels (`list[str]`):
            Names of the classes.
        teacher ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            Model, or a path to one; it is run as it is, without gradients. `None` reads collected answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's tokenizer; by default, that at its path.
        prompt (`str` or `Callable`, *optional*):
            Template with `{text}` and, if wanted, `{labels}` (the list of labels, each with its letter), or a function
            from a row to its prompt: a string, or a list of messages for the chat template.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that fills `{text}`.
        scoring (`str`, *optional*, defaults to `"single_token"`):
            `"single_token"`: a label is one token, p is the softmax of these tokens' logits. `"full_label"`: a label
            is its name, p the softmax of the names' log-probabilities by forced decoding (no end-of-sequence token).
        label_tokens (`str` or `list[str]`, *optional*, defaults to `"letters"`):
            Of `"single_token"`: `"letters"` (A, B, C, ...), `"labels"` (the names, if each is one token), or one text
            for each label.
        length_normalize (`bool`, *optional*, defaults to `True`):
            Of `"full_label"`: a name's mean log-probability per token, not its sum.
        content_free (`str` or `list[str]`, *optional*):
            Text that says nothing, such as `"N/A"`. Distributions are divided by the (mean) distribution on it: a
            teacher that prefers a label or its letter whatever it reads loses that preference (as NCC does, arXiv
            2511.14385).
        as_chat (`bool`, *optional*, defaults to `False`):
            Make the prompt the user's message in the chat template.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`.
        answer_prefix (`str`, *optional*):
            What stands between prompt and label. By default nothing in a chat or after white space, else a space.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per forward pass.
        answer_column (`str`, *optional*, defaults to `"completion"`):
            Without teacher: column of answers, each a label's name up to case, white space and punctuation: a string,
            one assistant message, or a list of strings (several answers to the same prompt: p is the shares of votes,
            a draw goes to the earlier label).
        confidence_column (`str`, *optional*):
            Column with the confidence in a single answer, from 0 to 1; the rest is spread evenly over other labels.
            Here the label is the answer and its confidence as stated, even if that is below chance.
        label_probs_column (`str`, *optional*):
            Column with a dict from label to probability (or, if none is positive, log-probability), or a list of
            `{"token": ..., "logprob": ...}`, by `answer_column`'s rule of likeness. What is no label is left out, the
            rest sums to 1. The answers are not read.
        unmatched (`str`, *optional*, defaults to `"error"`):
            What becomes of an answer that is no label: an error, or with `"drop"` its row is dropped; the number is
            logged. Of several answers it is then spread evenly over the labels; only rows without any label drop.
        temperature (`float`, *optional*, defaults to `1.0`):
            Applied to the distributions last; [`~label_calibration.fit_temperature`] finds it.

    Returns:
        [`~datasets.Dataset`]: all columns of the input, `label` (`int`, with names), `teacher_confidence` (`float`,
        the label's probability) and `teacher_probs` (`list[float]`, in the order of `labels`).

    Raises:
        [`PseudoLabelError`]: at the first problem, naming column, row and value.
    """
    if not isinstance(dataset, Dataset):
        raise PseudoLabelError(f"`dataset` is {kind_of(dataset)}; labelling needs a `datasets.Dataset`.")
    if len(dataset) == 0:
        raise PseudoLabelError("The data set has no rows.")
    _check_labels(labels)
    for column in NEW_COLUMNS:
        if column in dataset.column_names:
            raise PseudoLabelError(
                f"The data set already has a column `{column}`, which this would overwrite; rename it, for example "
                f"`dataset.rename_column({column!r}, 'gold')`, or remove it."
            )
    _check_choice("unmatched", unmatched, ("error", "drop"))
    check_temperature(temperature)
    rows: Sequence[int] = range(len(dataset))
    predicted = None
    if teacher is None:
        if prompt is not None or tokenizer is not None:
            raise PseudoLabelError(
                "`prompt` and `tokenizer` need a `teacher`; without one, collected answers are read."
            )
        read = read_answers(
            dataset, labels, answer_column, confidence_column, label_probs_column, drop=unmatched == "drop"
        )
        rows = [row for row in rows if read[row] is not None]
        probs = torch.tensor([read[row][1] for row in rows], dtype=torch.float64)
        predicted = torch.tensor([read[row][0] for row in rows]) if confidence_column is not None else None
    else:
        _check_choice("scoring", scoring, ("single_token", "full_label"))
        model, tokenizer = _load(teacher, tokenizer)
        texts = _label_texts(labels, scoring, label_tokens, prompt)
        empty = [content_free] if isinstance(content_free, str) else content_free or []
        prompts = _prompts(dataset, empty, prompt, text_column, labels, texts, as_chat)
        label_ids = _label_ids(tokenizer, prompts, labels, texts, scoring, answer_prefix)
        prompt_ids = prompt_token_ids(tokenizer, prompts, chat_template_kwargs)
        _check_context(model, prompt_ids, max(map(len, label_ids)))
        scores = label_scores(model, prompt_ids, label_ids, batch_size=batch_size, length_normalize=length_normalize)
        probs = label_distribution(scores[: len(rows)], scores[len(rows) :] if empty else None)
    probs = apply_temperature(probs, temperature)
    predicted = probs.argmax(dim=1) if predicted is None else predicted
    confidence = probs.gather(1, predicted[:, None]).squeeze(1)

    dataset = dataset if len(rows) == len(dataset) else dataset.select(rows)
    dataset = dataset.add_column("label", predicted.tolist(), feature=ClassLabel(names=list(labels)))
    dataset = dataset.add_column("teacher_confidence", confidence.tolist(), feature=Value("float64"))
    return dataset.add_column("teacher_probs", probs.tolist(), feature=List(Value("float64")))


@torch.no_grad()
def label_scores(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    label_ids: list[list[int]],
    *,
    batch_size: int = 16,
    length_normalize: bool = True,
) -> torch.Tensor:
    """
    Log-probabilities of labels after prompts, s_y = (1/L_y) Σ_t log p(y_t | prompt, y_<t), or their sums.

    A label's last token is predicted but never read, so that labels of one token need one sequence a prompt, all
    together, and labels that begin alike share theirs. The model's mode is as before afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        prompt_ids (`list[list[int]]`):
            N prompts.
        label_ids (`list[list[int]]`):
            C labels, at least one token each.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per forward pass.
        length_normalize (`bool`, *optional*, defaults to `True`):
            Divide by L_y.

    Returns:
        `torch.Tensor`: `(N, C)`, float64, on the CPU.

    Raises:
        [`PseudoLabelError`]: a score that is not finite.
    """
    beginnings = {tuple(ids[:-1]) for ids in label_ids}
    stems = sorted(stem for stem in beginnings if not any(other[: len(stem)] == stem for other in beginnings - {stem}))
    readers: list[list[int]] = [[] for _ in stems]
    for label, ids in enumerate(label_ids):
        stem = next(i for i, stem in enumerate(stems) if stem[: len(ids) - 1] == tuple(ids[:-1]))
        readers[stem].append(label)

    check_head(model)
    head = lm_head(model)
    scores = torch.zeros(len(prompt_ids), len(label_ids), dtype=torch.float64)
    # The longest first: what does not fit into memory fails at once
    queue = [(row, stem) for row in range(len(prompt_ids)) for stem in range(len(stems))]
    queue.sort(key=lambda item: -len(prompt_ids[item[0]]) - len(stems[item[1]]))
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(queue), batch_size), desc="Labelling", disable=None):
        batch = queue[start : start + batch_size]
        sequences = [[*prompt_ids[row], *stems[stem]] for row, stem in batch]
        # On the right, whatever the tokenizer does: positions are then the same in every batch
        input_ids, attention_mask = pad_rows(sequences, 0, model.device, side="right")
        lengths = torch.tensor([len(stems[stem]) + 1 for _, stem in batch])
        ends = torch.tensor([len(sequence) for sequence in sequences])
        position = torch.arange(input_ids.size(1))[None]
        scored = (position < ends[:, None]) & (position >= (ends - lengths)[:, None])
        hidden = last_hidden_states(model, input_ids, attention_mask)[scored.to(model.device)]
        logits = project(hidden.to(head.weight), head)
        log_mass = torch.logsumexp(logits, dim=1)
        # One entry a token of a label: where in the batch it is predicted, and whose score it belongs to
        firsts = (lengths.cumsum(0) - lengths).tolist()
        entries = [
            (first + t, token, row, label)
            for first, (row, stem) in zip(firsts, batch, strict=True)
            for label in readers[stem]
            for t, token in enumerate(label_ids[label])
        ]
        places, tokens, rows, columns = torch.tensor(entries).unbind(1)
        places, tokens = places.to(logits.device), tokens.to(logits.device)
        log_probs = (logits[places, tokens].double() - log_mass[places].double()).cpu()
        scores.index_put_((rows, columns), log_probs, accumulate=True)
    model.train(was_training)
    if not scores.isfinite().all():
        row, label = (~scores.isfinite()).nonzero()[0].tolist()
        raise PseudoLabelError(
            f"Row {row}: the teacher's score of label {label} is {float(scores[row, label])}; load the teacher in "
            "bfloat16 or float32, and check its weights."
        )
    return scores / torch.tensor([len(ids) for ids in label_ids]) if length_normalize else scores


def _check_labels(labels: list[str]) -> None:
    if isinstance(labels, str) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise PseudoLabelError(f"`labels` is {labels!r}; it must be a list of names, none of them empty.")
    if len(labels) < 2:
        raise PseudoLabelError(f"`labels` holds {len(labels)} names; there must be at least two classes.")
    seen: dict[str, str] = {}
    for label in labels:
        if seen.setdefault(plain(label), label) != label or labels.count(label) > 1:
            raise PseudoLabelError(f"The labels {seen[plain(label)]!r} and {label!r} are the same; keep one.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PseudoLabelError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def _load(
    teacher: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not isinstance(teacher, str | Path):
        if tokenizer is None:
            raise PseudoLabelError("`tokenizer` is missing; a teacher given as a model needs its tokenizer.")
        return teacher, tokenizer
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto", trust_remote_code=False)
    return model.to(PartialState().device), tokenizer


def _label_texts(labels: list[str], scoring: str, label_tokens: str | list[str], prompt: Prompt) -> list[str]:
    """What the teacher says for each label."""
    if scoring == "full_label" or label_tokens == "labels":
        return labels
    if isinstance(label_tokens, str):
        _check_choice("label_tokens", label_tokens, ("letters", "labels"))
        label_tokens = string.ascii_uppercase[: len(labels)]
        if isinstance(prompt, str) and "{labels}" not in prompt:
            raise PseudoLabelError(
                f"The template {prompt!r} has no {{labels}}: the teacher cannot know which letter stands for what. "
                "Add it, or use `label_tokens='labels'`, a list of your own, or `scoring='full_label'`."
            )
    if len(label_tokens) != len(labels):
        raise PseudoLabelError(
            f"There are {len(labels)} labels but {len(label_tokens)} label tokens; give `label_tokens` a list of one "
            "text for each label, or use `scoring='full_label'`."
        )
    return list(label_tokens)


def _prompts(
    dataset: Dataset,
    empty: list[str],
    prompt: Any,
    text_column: str,
    labels: list[str],
    texts: list[str],
    as_chat: bool,
) -> list:
    """Prompts of all rows, and of the first row with its text replaced by each content-free one."""
    is_template = isinstance(prompt, str)
    if not is_template and not callable(prompt):
        raise PseudoLabelError("`prompt` is missing; for example '{text}\\n\\nTopics:\\n{labels}\\nThe topic is'.")
    if is_template and "{text}" not in prompt:
        raise PseudoLabelError(f"The template {prompt!r} has no {{text}}: the teacher would not see the row. Add it.")
    if is_template or empty:
        check_column(text_column, dataset.column_names, "Name the column of the text in `text_column`.")
    rows = dataset.select_columns([text_column]) if is_template else dataset
    prompts = []
    listed = ", ".join(labels) if texts is labels else "\n".join(map("{}. {}".format, texts, labels))
    for row, values in enumerate(chain(rows, ({**rows[0], text_column: text} for text in empty))):
        if not is_template:
            prompts.append(prompt(values))
        elif not isinstance(values[text_column], str):
            raise PseudoLabelError(f"Row {row}: `{text_column}` is {values[text_column]!r}; it must be a string.")
        else:
            prompts.append(prompt.replace("{labels}", listed).replace("{text}", values[text_column]))
        if as_chat and isinstance(prompts[-1], str):
            prompts[-1] = [{"role": "user", "content": prompts[-1]}]
        if not prompts[-1] or type(prompts[-1]) is not type(prompts[0]) or not isinstance(prompts[-1], str | list):
            raise PseudoLabelError(
                f"Row {row}: `prompt` made {prompts[-1]!r}; it must make a string of every row, or a list of messages."
            )
    return prompts


def _label_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    labels: list[str],
    texts: list[str],
    scoring: str,
    prefix: str | None,
) -> list[list[int]]:
    """Tokens of the labels, the same for all prompts."""
    if isinstance(prompts[0], list) and getattr(tokenizer, "chat_template", None) is None:
        raise PseudoLabelError("The tokenizer has no chat template; use prompts that are strings.")
    if prefix is None:
        prefix = "" if all(isinstance(prompt, list) or prompt[-1].isspace() for prompt in prompts) else " "

    def tokens(text: str) -> list[int]:
        return tokenizer(text=text, add_special_tokens=False)["input_ids"]

    # After a line break nothing merges, and a tokenizer that opens a text with a space adds none
    start = tokens("\n")
    label_ids = []
    for text in texts:
        ids = tokens("\n" + prefix + text)
        label_ids.append(ids[len(start) :] if ids[: len(start)] == start else tokens(prefix + text))
    single = scoring == "single_token"
    heads = [ids[:1] if single else ids for ids in label_ids]
    hint = "Use other `label_tokens`, another `answer_prefix`, or `scoring='full_label'`."
    for i, (label, ids) in enumerate(zip(labels, heads, strict=True)):
        what = f"The label {label!r}" if texts is labels else f"{prefix + texts[i]!r} for the label {label!r}"
        if not ids:
            raise PseudoLabelError(f"{what} has no token. {hint}")
        if ids in heads[:i]:
            raise PseudoLabelError(f"{what} shares its first token with that of {labels[heads.index(ids)]!r}. {hint}")
        if single and len(label_ids[i]) > 1 and heads.count(ids) == 1:
            raise PseudoLabelError(f"{what} is {len(label_ids[i])} tokens. {hint}")
    return label_ids


def _check_context(model: PreTrainedModel, prompt_ids: list[list[int]], label_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row, ids in enumerate(prompt_ids):
        if limit is not None and len(ids) + label_length > limit:
            raise PseudoLabelError(
                f"Row {row}: a prompt of {len(ids)} tokens and a label of up to {label_length} do not fit into the "
                f"teacher's context of {limit}; shorten the text, for example in a function for `prompt`."
            )
