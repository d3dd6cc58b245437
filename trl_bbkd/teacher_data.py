"""The contract of teacher text: prompt-completion rows, checked, counted and tokenised once."""

import difflib
import json
import logging
from dataclasses import dataclass
from itertools import islice

from accelerate import PartialState
from datasets import Features, IterableDataset, List, Value

from .teacher_files import TeacherDataError, load_teacher_data


__all__ = [
    "TeacherDataCounts",
    "TeacherDataError",
    "check_teacher_data",
    "load_teacher_data",
    "prompt_token_ids",
    "tokenize_teacher_data",
]

logger = logging.getLogger(__name__)

STREAMING_CHECK_ROWS = 1000
COMMON_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "problem", "content"),
    "completion": ("output", "response", "teacher_response", "answer", "target", "solution"),
}


@dataclass
class TeacherDataCounts:
    """
    Counts of a teacher set. `None` means unknown: a streaming set is read only as training goes.

    Args:
        rows (`int`, *optional*):
            Rows before anything was dropped.
        duplicate_prompts (`int`, *optional*):
            Rows whose prompt appeared in an earlier row. They are kept.
        dropped_prompts (`int`, *optional*):
            Rows dropped because their prompt is longer than `max_prompt_length` tokens.
        truncated_answers (`int`, *optional*):
            Kept rows whose answer was cut at `max_completion_length` tokens.
        kept (`int`, *optional*):
            Rows left for training.
    """

    rows: int | None
    duplicate_prompts: int | None
    dropped_prompts: int | None = None
    truncated_answers: int | None = None
    kept: int | None = None

    def table_rows(self) -> list[tuple[str, str]]:
        """Label and value of each count, for a table."""
        labels = {
            "rows": self.rows,
            "duplicate prompts (kept)": self.duplicate_prompts,
            "dropped, prompt too long": self.dropped_prompts,
            "answers truncated": self.truncated_answers,
            "rows kept": self.kept,
        }
        return [(label, "unknown (streaming)" if count is None else f"{count:,}") for label, count in labels.items()]

    def __str__(self) -> str:
        return "teacher data: " + ", ".join(f"{label}: {count}" for label, count in self.table_rows())


def check_teacher_data(dataset) -> TeacherDataCounts:
    """
    Check that every row is a prompt and the teacher's answer, in one pass and without a model or tokenizer.

    Of a streaming set only the first rows are read here; the others are checked as they are tokenised.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `completion`: both strings (standard), or a list of messages and a list holding one
            assistant message (conversational).

    Returns:
        [`TeacherDataCounts`]: rows and duplicate prompts; `None` for a streaming set.

    Raises:
        [`TeacherDataError`]: at the first problem, naming column, row and value.
    """
    streaming = isinstance(dataset, IterableDataset)
    if streaming:
        head = list(islice(dataset, STREAMING_CHECK_ROWS))
        columns = list(head[0]) if head else ["prompt", "completion"]
        batches = [{column: [row.get(column) for row in head] for column in columns}] if head else []
        logger.info(f"Streaming teacher data: checked the first {len(head)} rows, the rest as they are read.")
    else:
        columns = dataset.column_names
    for column in ("prompt", "completion"):
        if column not in columns:
            raise TeacherDataError(_missing_column(column, columns))
    if not streaming:
        batches = dataset.select_columns(["prompt", "completion"]).iter(batch_size=1000)

    rows, distinct_prompts, conversational = 0, set(), None
    for batch in batches:
        conversational = _check_rows(batch["prompt"], batch["completion"], rows, conversational)
        rows += len(batch["prompt"])
        distinct_prompts.update(_prompt_key(prompt) for prompt in batch["prompt"])
    if rows == 0:
        raise TeacherDataError("The teacher data has no rows.")
    if streaming:
        return TeacherDataCounts(rows=None, duplicate_prompts=None)
    return TeacherDataCounts(rows=rows, duplicate_prompts=rows - len(distinct_prompts))


def _prompt_key(prompt) -> int:
    return hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))


def _missing_column(column: str, columns: list[str]) -> str:
    message = f"The teacher data has no column `{column}`; columns found: {', '.join(columns)}."
    nearest = difflib.get_close_matches(column, columns, n=1, cutoff=0.7)
    candidates = nearest + [name for name in COMMON_NAMES[column] if name in columns]
    if candidates:
        return f"{message} If `{candidates[0]}` holds it, rename that column to `{column}`."
    if "messages" in columns or "conversations" in columns:
        return f"{message} Split each conversation: `prompt` = all messages but the last, `completion` = [the last]."
    return f"{message} A row needs `prompt` and `completion` (the teacher's answer)."


def _check_rows(prompts: list, completions: list, first_row: int, conversational: bool | None) -> bool:
    """Check rows whose format must be `conversational` (`None`: the first row decides); return the format."""
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=first_row):
        for column, value in (("prompt", prompt), ("completion", completion)):
            if value is None:
                raise TeacherDataError(f"Row {row}: `{column}` is null; remove the row or fill it in.")
            if not isinstance(value, str | list):
                raise TeacherDataError(
                    f"Row {row}: `{column}` is {_short(value)}, a {type(value).__name__}; it must be a string or a list "
                    "of messages."
                )
        if isinstance(prompt, str) != isinstance(completion, str):
            text, messages = ("prompt", "completion") if isinstance(prompt, str) else ("completion", "prompt")
            raise TeacherDataError(
                f"Row {row}: `{text}` is a string but `{messages}` is a list of messages; use strings for both, or "
                "messages for both (a completion is [{'role': 'assistant', 'content': ...}])."
            )
        if conversational is None:
            conversational = isinstance(prompt, list)
        if conversational != isinstance(prompt, list):
            kinds = ("strings", "lists of messages")
            raise TeacherDataError(
                f"Row {row}: `prompt` and `completion` are {kinds[isinstance(prompt, list)]}, in earlier rows they are "
                f"{kinds[conversational]}; use one format throughout."
            )
        prompt_text, answer = (
            (_prompt_text(prompt, row), _answer(completion, row)) if conversational else (prompt, completion)
        )
        if not prompt_text.strip():
            raise TeacherDataError(f"Row {row}: `prompt` is empty ({_short(prompt)}); remove the row.")
        if not answer.strip():
            raise TeacherDataError(f"Row {row}: `completion` is empty ({_short(completion)}); remove the row.")
    return conversational


def _prompt_text(prompt: list, row: int) -> str:
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise TeacherDataError(
                f"Row {row}: `prompt` holds {_short(message)}; a message is {{'role': ..., 'content': ...}}."
            )
    return "".join(str(message["content"]) for message in prompt)


def _answer(completion: list, row: int) -> str:
    message = completion[0] if len(completion) == 1 else None
    if (
        not isinstance(message, dict)
        or message.get("role") != "assistant"
        or not isinstance(message.get("content"), str)
    ):
        raise TeacherDataError(
            f"Row {row}: `completion` is {_short(completion)}; a conversational completion is exactly one assistant "
            "message with text, [{'role': 'assistant', 'content': 'the answer'}]. Earlier turns belong to `prompt`; "
            "tool calls and images are not supported."
        )
    return message["content"]


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def tokenize_teacher_data(
    dataset,
    tokenizer,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    max_length: int | None = None,
    chat_template_kwargs: dict | None = None,
):
    """
    Add the column `teacher_ids`: the teacher's answer in the student's tokens, as the student would generate it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Teacher rows; they are checked by [`check_teacher_data`] first.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        max_completion_length (`int`):
            Tokens of an answer, its end-of-sequence token included. Longer answers are cut on the right.
        max_prompt_length (`int`, *optional*):
            Rows with more prompt tokens are dropped and counted.
        max_length (`int`, *optional*):
            Tokens of context the student has; each prompt must leave `max_completion_length` of them free.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`.

    Returns:
        `tuple[Dataset | IterableDataset, TeacherDataCounts]`: the rows kept with all their columns and `teacher_ids`
        (`list[int]`; ends in the end-of-sequence token if and only if the answer was not cut), and the counts.

    Raises:
        [`TeacherDataError`]: unusable rows, no row left, or no room for an answer.
    """
    if tokenizer.eos_token_id is None:
        raise TeacherDataError("The tokenizer has no end-of-sequence token; set `tokenizer.eos_token`.")
    counts = check_teacher_data(dataset)
    streaming = isinstance(dataset, IterableDataset)

    def tokenize(batch, rows):
        if streaming:
            _check_rows(batch["prompt"], batch["completion"], rows[0], None)
        prompt_ids, answer_ids = _prompt_and_answer_ids(tokenizer, batch, chat_template_kwargs or {})
        lengths = [len(ids) for ids in prompt_ids]
        keep = [i for i, length in enumerate(lengths) if max_prompt_length is None or length <= max_prompt_length]
        for i in keep:
            if max_length is not None and lengths[i] + max_completion_length > max_length:
                raise TeacherDataError(
                    f"No room for an answer: row {rows[i]} has a prompt of {lengths[i]} tokens, `max_completion_length` "
                    f"is {max_completion_length} and the model's context is {max_length} tokens. Lower "
                    "`max_completion_length`, or drop such rows with `max_prompt_length: "
                    f"{max(max_length - max_completion_length, 0)}`."
                )
        kept = {column: [values[i] for i in keep] for column, values in batch.items()}
        ends = [tokenizer.eos_token_id]
        return {**kept, "teacher_ids": [(answer_ids[i] + ends)[:max_completion_length] for i in keep]}

    # Stated features keep the types of the other columns although batches pass through Python.
    features = dataset.features and Features({**dataset.features, "teacher_ids": List(Value("int64"))})
    if streaming:
        return dataset.map(tokenize, batched=True, with_indices=True, features=features), counts
    with PartialState().main_process_first():
        dataset = dataset.map(
            tokenize, batched=True, with_indices=True, features=features, desc="Tokenizing teacher answers"
        )
    if len(dataset) == 0:
        raise TeacherDataError(
            f"No room for an answer: all {counts.rows} prompts are longer than `max_prompt_length: {max_prompt_length}` "
            "tokens."
        )
    counts.kept = len(dataset)
    counts.dropped_prompts = counts.rows - counts.kept
    counts.truncated_answers = sum(ids[-1] != tokenizer.eos_token_id for ids in dataset["teacher_ids"])
    return dataset, counts


def prompt_token_ids(tokenizer, prompts: list, chat_template_kwargs: dict | None = None) -> list[list[int]]:
    """Ids of prompts (all strings, or all lists of messages) as `GRPOTrainer` tokenises them."""
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"]
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def _prompt_and_answer_ids(tokenizer, batch: dict, chat_template_kwargs: dict) -> tuple[list, list]:
    """Ids of the prompts, and of the answers without an end-of-sequence token."""
    prompts, answers = batch["prompt"], batch["completion"]
    prompt_ids = prompt_token_ids(tokenizer, prompts, chat_template_kwargs)
    standard = isinstance(prompts[0], str)
    if not standard:
        answers = [completion[0]["content"] for completion in answers]
        prompts = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=False, **chat_template_kwargs
        )
    # A chat template writes its special tokens as text, so the tokenizer must not add them again.
    joint_ids = tokenizer(
        text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], add_special_tokens=standard
    )["input_ids"]
    answer_ids = [
        _continuation(tokenizer, prompt, joint, answer)
        for prompt, joint, answer in zip(prompt_ids, joint_ids, answers, strict=True)
    ]
    return prompt_ids, answer_ids


def _continuation(tokenizer, prompt_ids: list[int], joint_ids: list[int], answer: str) -> list[int]:
    """Ids that spell `answer` after `prompt_ids`, up to the first end-of-sequence token, where generation stops."""
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        ids = joint_ids[len(prompt_ids) :]
    else:
        # The last prompt token and the answer merge, so the answer is tokenised by itself. A tokenizer that opens a
        # text with a space would put one between prompt and answer; after a line break it adds none.
        ids = tokenizer(text=answer, add_special_tokens=False)["input_ids"]
        line_break = tokenizer(text="\n", add_special_tokens=False)["input_ids"]
        after_break = tokenizer(text="\n" + answer, add_special_tokens=False)["input_ids"]
        decode = tokenizer.decode
        if decode(prompt_ids + ids) != decode(prompt_ids) + answer and after_break[: len(line_break)] == line_break:
            ids = after_break[len(line_break) :]
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
