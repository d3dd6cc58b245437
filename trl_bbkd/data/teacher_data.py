"""The contract of teacher text: prompt-completion rows, checked, counted and tokenised once."""

import difflib
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from accelerate import PartialState
from datasets import Features, IterableDataset, List, Value

from ..errors import TeacherDataError, kind_of
from .answers import with_most_answers
from .messages import ReasoningPolicy, answer_text, plain_messages, short
from .rendering import ChatRenderer, end_token_id
from .teacher_files import ROW_COLUMN, load_teacher_data, named, places_of, row_names
from .teacher_tokens import RENDERED_COLUMNS, Note, prompt_and_answer_ids, prompt_ids_of, prompt_token_ids


__all__ = [
    "INTERNAL_COLUMNS",
    "TeacherDataCounts",
    "answer_text",
    "check_teacher_data",
    "end_token_id",
    "is_tokenized",
    "load_teacher_data",
    "places_of",
    "prompt_ids_of",
    "prompt_token_ids",
    "row_names",
    "tokenize_as_configured",
    "tokenize_teacher_data",
]

logger = logging.getLogger(__name__)

STREAMING_CHECK_ROWS = 1000
FEW_ROWS = 8
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
# What is added to a user's rows
INTERNAL_COLUMNS = ("prompt_ids", "teacher_ids", ROW_COLUMN)
TOKEN_COLUMNS = {"prompt_ids", "teacher_ids"}
NOTES = "_notes"
COMMON_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "problem", "content"),
    "completion": ("output", "response", "teacher_response", "answer", "target", "solution", "chosen"),
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
        cut_at_end_token (`int`, *optional*):
            Kept rows whose answer holds the text of an end token, at which it was cut: they have no end.
        reasoning_kept, reasoning_dropped (`int`, *optional*):
            Kept rows whose answer has reasoning, by what became of it.
        answers_left_out (`int`, *optional*):
            Rows left out because as many as `answers_per_prompt` have their prompt before them.
        earlier_reasoning_left_out (`int`, *optional*):
            Kept rows in whose prompts the chat template leaves out the reasoning of earlier turns.
    """

    rows: int | None
    duplicate_prompts: int | None
    dropped_prompts: int | None = None
    truncated_answers: int | None = None
    kept: int | None = None
    cut_at_end_token: int | None = None
    reasoning_kept: int | None = None
    reasoning_dropped: int | None = None
    earlier_reasoning_left_out: int | None = None
    answers_left_out: int | None = None

    def table_rows(self) -> list[tuple[str, str]]:
        """Label and value of each count, for a table."""
        labels = {
            "rows": self.rows,
            "duplicate prompts (kept)": self.duplicate_prompts,
            "dropped, prompt too long": self.dropped_prompts,
            "answers truncated": self.truncated_answers,
            "rows kept": self.kept,
        }
        # Told only where there are any
        special = {
            "answers left out, answers_per_prompt": self.answers_left_out,
            "answers cut at the text of an end token": self.cut_at_end_token,
            "answers with reasoning (kept)": self.reasoning_kept,
            "answers with reasoning (dropped)": self.reasoning_dropped,
            "prompts without the reasoning of earlier turns": self.earlier_reasoning_left_out,
        }
        labels |= {label: count for label, count in special.items() if count}
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
            assistant message (conversational). Conversational rows may have `tools` and `chat_template_kwargs`.

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
        used = [name for name in ("prompt", "completion", ROW_COLUMN, *RENDERED_COLUMNS) if name in columns]
        batches = dataset.select_columns(used).iter(batch_size=1000)

    rows, conversational = 0, None
    distinct_prompts: set[int] = set()
    for batch in batches:
        count = len(batch["prompt"])
        conversational = _check_rows(batch, places_of(batch, range(rows, rows + count)), conversational)
        rows += count
        distinct_prompts.update(_prompt_key(prompt) for prompt in batch["prompt"])
    if rows == 0:
        raise TeacherDataError("The teacher data has no rows.")
    if streaming:
        return TeacherDataCounts(rows=None, duplicate_prompts=None)
    return TeacherDataCounts(rows=rows, duplicate_prompts=rows - len(distinct_prompts))


def _prompt_key(prompt) -> int:
    return hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))


def _missing_column(column: str, columns: list[str]) -> str:
    message = f"The teacher data has no column `{column}`; columns found: {named(columns)}."
    talk = next((name for name in ("messages", "conversations", "conversation") if name in columns), None)
    if talk is not None and "prompt" not in columns:
        return (
            f"{message} Split each conversation: `prompt` = all messages but the last, `completion` = [the last]. For "
            f'example dataset.map(lambda row: {{"prompt": row["{talk}"][:-1], "completion": row["{talk}"][-1:]}}, '
            f'remove_columns="{talk}"); a message is {{"role": ..., "content": ...}}.'
        )
    if column == "prompt" and {"instruction", "input", "output"}.issubset(columns):
        return (
            f"{message} `prompt` is `instruction` and `input` together, `completion` is `output`. For example "
            'dataset.map(lambda row: {"prompt": f"{row[\'instruction\']}\\n\\n{row[\'input\']}".strip(), "completion": row["output"]}).'
        )
    nearest = difflib.get_close_matches(column, columns, n=1, cutoff=0.7)
    candidates = nearest + [name for name in COMMON_NAMES[column] if name in columns]
    if candidates:
        return f"{message} If `{candidates[0]}` holds it, rename that column to `{column}`."
    return f"{message} A row needs `prompt` and `completion` (the teacher's answer)."


def _check_rows(batch: dict, places: list[int], conversational: bool | None) -> bool:
    """Check rows whose format must be `conversational` (`None`: the first row decides); return the format."""
    for index, row in enumerate(places):
        prompt, completion = batch["prompt"][index], batch["completion"][index]
        for column, value in (("prompt", prompt), ("completion", completion)):
            _check_kind(value, column, row)
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
        if conversational:
            turns = plain_messages(prompt, f"Row {row}: `prompt`")
            prompt_text = "".join(message["content"] for message in turns)
            answer = _answer(completion, row)
            if prompt_text.strip() and turns[-1]["role"] == "assistant":
                raise TeacherDataError(
                    f"Row {row}: `prompt` ends with a message of the assistant, {short(turns[-1]['content'])}, and the "
                    "completion would be a second turn after it. An answer is a whole turn: put the user's message last, or, "
                    "where the teacher went on with that text, put both into the completion."
                )
        else:
            prompt_text, answer = prompt, completion
            if MESSAGES_AS_TEXT.match(prompt) and MESSAGES_AS_TEXT.match(completion):
                raise TeacherDataError(
                    f"Row {row}: `prompt` and `completion` are messages written as text ({short(prompt)}): the student would learn "
                    "their brackets. Parse them into lists (a CSV file cannot hold those: save JSON Lines or Parquet)."
                )
            for column in RENDERED_COLUMNS:
                if batch.get(column) and batch[column][index]:
                    raise TeacherDataError(
                        f"Row {row}: `{column}` goes through a chat template, but `prompt` is a string, which is taken as it "
                        f"is. Write the prompt as messages, or remove the column."
                    )
        if not prompt_text.strip():
            raise TeacherDataError(f"Row {row}: `prompt` is empty ({short(prompt)}); remove the row.")
        if not answer.strip():
            raise TeacherDataError(f"Row {row}: `completion` is empty ({short(completion)}); remove the row.")
    return conversational


def _check_kind(value, column: str, row: int) -> None:
    if value is None:
        raise TeacherDataError(f"Row {row}: `{column}` is null; remove the row or fill it in.")
    if not isinstance(value, str | list):
        raise TeacherDataError(
            f"Row {row}: `{column}` is {short(value)}, {kind_of(value)}; it must be a string or a list of messages."
        )
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        raise TeacherDataError(
            f"Row {row}: `{column}` is {short(value)}, a list of {type(value[0]).__name__}; it must be a string, or a list "
            "of messages, which are {'role': ..., 'content': ...}."
        )


def _answer(completion: list, row: int) -> str:
    message = completion[0] if len(completion) == 1 else None
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise TeacherDataError(
            f"Row {row}: `completion` is {short(completion)}; a conversational completion is exactly one assistant "
            "message with text, [{'role': 'assistant', 'content': 'the answer'}]. Earlier turns belong to `prompt`."
        )
    plain = plain_messages(completion, f"Row {row}: `completion`")[0]
    # A call of a tool is an answer too
    return plain["content"] or ("tool_calls" if "tool_calls" in plain else "")


def is_tokenized(dataset) -> bool:
    """Whether `dataset` went through [`tokenize_teacher_data`]. A stream that did may not say so: it does not name its columns."""
    return TOKEN_COLUMNS.issubset(dataset.column_names or ())


def tokenize_teacher_data(
    dataset,
    tokenizer,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    max_length: int | None = None,
    answers_per_prompt: int | None = None,
    chat_template_kwargs: dict | None = None,
    reasoning: ReasoningPolicy = "keep",
    held_out: bool = False,
):
    """
    Add the columns `prompt_ids` and `teacher_ids`: the prompt, and the teacher's answer as the student would generate it,
    in the student's tokens.

    A conversational answer is what the tokenizer's chat template writes after the prompt, up to the end of the turn: with
    the reasoning that the template knows, and with the end that it has. So [`~trl.SFTTrainer`] reads the same rows.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Teacher rows; they are checked by [`check_teacher_data`] first.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        max_completion_length (`int`):
            Tokens of an answer, its end token included. Longer answers are cut on the right.
        max_prompt_length (`int`, *optional*):
            Rows with more prompt tokens are dropped and counted.
        max_length (`int`, *optional*):
            Tokens of context the student has; each prompt must leave `max_completion_length` of them free.
        answers_per_prompt (`int`, *optional*):
            Most rows that share a prompt, the first ones. The others are left out and counted.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`. What a row has in its column `chat_template_kwargs` comes before them.
        reasoning (`str`, *optional*, defaults to `"keep"`):
            `"keep"` or `"drop"` what the teacher's messages have of reasoning.
        held_out (`bool`, *optional*, defaults to `False`):
            Whether the rows are for evaluation, of which a few are enough.

    Returns:
        `tuple[Dataset | IterableDataset, TeacherDataCounts]`: the rows kept with all their columns, `prompt_ids` and
        `teacher_ids` (`list[int]`; ends in the token of [`end_token_id`] if and only if the answer was not cut), and the
        counts.

    Raises:
        [`TeacherDataError`]: unusable rows, no row left, or no room for an answer.
    """
    if tokenizer.eos_token_id is None:
        raise TeacherDataError("The tokenizer has no end-of-sequence token; set `tokenizer.eos_token`.")
    counts = check_teacher_data(dataset)
    streaming = isinstance(dataset, IterableDataset)
    if streaming and answers_per_prompt is not None:
        raise TeacherDataError(
            f"answers_per_prompt={answers_per_prompt} counts the rows of a prompt, and a stream's are not known before they are "
            "read. Turn streaming off, or leave it out."
        )
    if isinstance(next(iter(dataset))["prompt"], list):
        ChatRenderer(tokenizer)  # a template is missed before the first row

    def tokenize(batch, rows):
        places = places_of(batch, rows)
        if streaming:
            _check_rows(batch, places, None)
        prompt_ids, answer_ids, notes = prompt_and_answer_ids(
            tokenizer, batch, chat_template_kwargs or {}, reasoning, places
        )
        lengths = [len(ids) for ids in prompt_ids]
        keep = [i for i, length in enumerate(lengths) if max_prompt_length is None or length <= max_prompt_length]
        for i in keep:
            if max_length is not None and lengths[i] + max_completion_length > max_length:
                raise TeacherDataError(_no_room(places[i], lengths[i], max_completion_length, max_length))
            if not answer_ids[i]:
                raise TeacherDataError(
                    f"Row {places[i]}: `completion` begins with the text of an end token, where a student would stop: nothing of "
                    "it is left. Remove that text, or the row."
                )
        new = {
            ROW_COLUMN: [places[i] for i in keep],
            "prompt_ids": [prompt_ids[i] for i in keep],
            "teacher_ids": [answer_ids[i][:max_completion_length] for i in keep],
        }
        if not streaming:
            new[NOTES] = [notes[i] for i in keep]
        return {column: [values[i] for i in keep] for column, values in batch.items()} | new

    # Stated features keep the types of the other columns although batches pass through Python.
    ids = List(Value("int64"))
    added = {ROW_COLUMN: Value("int64"), "prompt_ids": ids, "teacher_ids": ids}
    features = dataset.features and Features({**dataset.features, **added})
    if streaming:
        return dataset.map(tokenize, batched=True, with_indices=True, features=features), counts
    features = Features({**features, NOTES: Value("int64")})
    with PartialState().main_process_first():
        dataset = dataset.map(
            tokenize, batched=True, with_indices=True, features=features, desc="Tokenizing teacher answers"
        )
    if len(dataset) == 0:
        raise TeacherDataError(
            f"No room for an answer: all {counts.rows} prompts are longer than `max_prompt_length: {max_prompt_length}` "
            "tokens."
        )
    if answers_per_prompt is not None:
        rows, dataset = len(dataset), with_most_answers(dataset, answers_per_prompt)
        counts.answers_left_out = rows - len(dataset)
    _count(counts, dataset, end_token_id(tokenizer, dataset[0]["prompt"]), reasoning)
    if PartialState().is_main_process:
        for warning in _warnings(counts, dataset, max_completion_length, held_out):
            logger.warning(warning)
    return dataset.remove_columns(NOTES), counts


def tokenize_as_configured(dataset, tokenizer, args, *, max_length: int | None = None, held_out: bool = False):
    """
    [`tokenize_teacher_data`] with what a configuration says of it, of held-out rows all answers to a prompt. Rows that went through it are returned as they are.

    Args:
        dataset, tokenizer, max_length, held_out:
            As in [`tokenize_teacher_data`].
        args ([`~config.TeacherTextConfig`]):
            Configuration, or one with the same fields.

    Returns:
        `tuple[Dataset | IterableDataset, TeacherDataCounts | None]`: the rows, and their counts if they were made here.
    """
    if is_tokenized(dataset):
        return dataset, None
    return tokenize_teacher_data(
        dataset,
        tokenizer,
        max_completion_length=args.max_completion_length,
        max_prompt_length=args.max_prompt_length,
        max_length=max_length,
        answers_per_prompt=None if held_out else args.answers_per_prompt,
        chat_template_kwargs=args.chat_template_kwargs,
        reasoning=args.reasoning,
        held_out=held_out,
    )


def _no_room(row: int, length: int, max_completion_length: int, max_length: int) -> str:
    message = (
        f"No room for an answer: row {row} has a prompt of {length} tokens, `max_completion_length` is "
        f"{max_completion_length} and the model's context is {max_length} tokens. "
    )
    room = max_length - max_completion_length
    if room < 1:
        return f"{message}Lower `max_completion_length`: it alone fills the context."
    return f"{message}Lower `max_completion_length`, or drop such rows with `max_prompt_length: {room}`."


def _count(counts: TeacherDataCounts, dataset, end_id: int, reasoning: ReasoningPolicy) -> None:
    """Fill in what tokenised rows say."""
    notes = dataset[NOTES][:]

    def noted(note: Note) -> int:
        return sum(bool(each & note) for each in notes)

    counts.kept = len(dataset)
    counts.dropped_prompts = counts.rows - counts.kept - (counts.answers_left_out or 0)
    unfinished = sum(ids[-1:] != [end_id] for ids in dataset["teacher_ids"])
    counts.cut_at_end_token = noted(Note.CUT_AT_END_TOKEN)
    counts.truncated_answers = unfinished - counts.cut_at_end_token
    counts.reasoning_kept = noted(Note.REASONING) if reasoning == "keep" else 0
    counts.reasoning_dropped = noted(Note.REASONING) if reasoning == "drop" else 0
    counts.earlier_reasoning_left_out = noted(Note.LEFT_OUT_REASONING)


def _warnings(counts: TeacherDataCounts, dataset, max_completion_length: int, held_out: bool) -> list[str]:
    """What rows that are used all the same deserve to be told."""
    found = []
    rows = "held-out rows" if held_out else "training rows"
    if counts.cut_at_end_token:
        first = next(
            row for row, note in zip(dataset[ROW_COLUMN], dataset[NOTES], strict=True) if note & Note.CUT_AT_END_TOKEN
        )
        subject = "answer of the {} holds" if counts.cut_at_end_token == 1 else "answers of the {} hold"
        found.append(
            f"{counts.cut_at_end_token:,} {subject.format(rows)} the text of an end token, the first in row {first}: cut there, "
            "where a student would stop, and not counted as finished."
        )
    if not held_out and counts.kept < FEW_ROWS:
        found.append(
            f"There {'is' if counts.kept == 1 else 'are'} only {counts.kept} training row{'s' * (counts.kept > 1)}: the student learns "
            "by heart."
        )
    answers = Counter(map(tuple, dataset["teacher_ids"])) if counts.kept > 1 else ()
    if len(answers) == 1:
        found.append(
            f"All {counts.kept:,} answers of the {rows} are the same: there is one answer to learn, whatever the prompt."
        )
    if counts.kept > 1 and len({tuple(ids) for ids in dataset["prompt_ids"]}) == 1:
        found.append(
            f"All {counts.kept:,} prompts of the {rows} are the same: the student learns to answer one prompt."
        )
    if counts.truncated_answers > counts.kept / 2:
        found.append(
            f"{counts.truncated_answers:,} of the {counts.kept:,} answers of the {rows} are cut at `max_completion_length: "
            f"{max_completion_length}`: their end is not seen. Raise it."
        )
    return found
