"""Token ids of teacher rows: each prompt as the student is asked, each answer as the student would write it."""

import enum

from .messages import ReasoningPolicy
from .rendering import ChatRenderer
from .teacher_files import places_of


# Beside `prompt` and `completion`, what a chat template is given
RENDERED_COLUMNS = ("tools", "chat_template_kwargs")


class Note(enum.IntFlag):
    """What is counted of a row."""

    CUT_AT_END_TOKEN = 1
    REASONING = 2
    LEFT_OUT_REASONING = 4


def prompt_token_ids(tokenizer, prompts: list, chat_template_kwargs: dict | None = None) -> list[list[int]]:
    """Ids of prompts (all strings, or all lists of messages) as `GRPOTrainer` tokenises them."""
    return prompt_ids_of(tokenizer, {"prompt": prompts}, chat_template_kwargs)


def prompt_ids_of(tokenizer, batch: dict, chat_template_kwargs: dict | None = None) -> list[list[int]]:
    """
    Ids of the prompts of a batch of rows: `prompt_ids`, as [`tokenize_teacher_data`] made them; of rows that have not been
    through it, made here from `prompt`, `tools` and `chat_template_kwargs`.
    """
    if "prompt_ids" in batch:
        return [list(ids) for ids in batch["prompt_ids"]]
    prompts = batch["prompt"]
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    renderer = ChatRenderer(tokenizer, chat_template_kwargs)
    texts = [
        renderer.prompt(row, f"Row {place}")
        for place, row in _rendered_rows(batch, places_of(batch, range(len(prompts))))
    ]
    return tokenizer(text=texts, add_special_tokens=False)["input_ids"]


def _rendered_rows(batch: dict, places: list[int]):
    """Each row's name, and what a chat template is given of it."""
    columns = [name for name in ("prompt", "completion", *RENDERED_COLUMNS) if name in batch]
    for index, place in enumerate(places):
        yield place, {name: batch[name][index] for name in columns}


def prompt_and_answer_ids(
    tokenizer, batch: dict, chat_template_kwargs: dict, reasoning: ReasoningPolicy, places: list[int]
) -> tuple[list, list, list[int]]:
    """
    Tokenise a batch of checked rows.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        batch (`dict[str, list]`):
            Columns of the rows: `prompt`, `completion` and, if there, those of `RENDERED_COLUMNS`.
        chat_template_kwargs (`dict`):
            Passed to `apply_chat_template`.
        reasoning (`str`):
            `"keep"` or `"drop"`.
        places (`list[int]`):
            The rows' names in errors.

    Returns:
        `tuple`: ids of the prompts, ids of the answers with the token that ends them (unless they were cut at the text of
        such a token), and each row's [`Note`]s.
    """
    standard = isinstance(batch["prompt"][0], str)
    ends = {tokenizer.eos_token_id}
    if standard:
        prompts, answers, notes = batch["prompt"], batch["completion"], [Note(0)] * len(places)
        end_ids = [tokenizer.eos_token_id] * len(places)
    else:
        renderer = ChatRenderer(tokenizer, chat_template_kwargs, reasoning)
        rendered = [renderer.row(row, f"Row {place}") for place, row in _rendered_rows(batch, places)]
        prompts, answers = [row.prompt for row in rendered], [row.answer for row in rendered]
        end_ids = [row.end.token_id for row in rendered]
        ends |= set(end_ids)
        notes = [
            Note(Note.REASONING * row.has_reasoning | Note.LEFT_OUT_REASONING * row.left_out_reasoning)
            for row in rendered
        ]
    cut = [_cut_at_end(answer, [tokenizer.decode([end]) for end in ends]) for answer in answers]
    answers = [answer for answer, _ in cut]
    # A chat template writes its special tokens as text, so the tokenizer must not add them again.
    special = {"add_special_tokens": standard}
    prompt_ids = tokenizer(text=list(prompts), **special)["input_ids"]
    joint_ids = tokenizer(text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], **special)[
        "input_ids"
    ]
    answer_ids = []
    for prompt, joint, (answer, is_whole), end_id in zip(prompt_ids, joint_ids, cut, end_ids, strict=True):
        answer_ids.append(_continuation(tokenizer, prompt, joint, answer) + [end_id] * is_whole)
    notes = [note | Note.CUT_AT_END_TOKEN * (not whole) for note, (_, whole) in zip(notes, cut, strict=True)]
    return prompt_ids, answer_ids, [int(note) for note in notes]


def _cut_at_end(answer: str, ends: list[str]) -> tuple[str, bool]:
    """`answer` up to the text of an end token, where generation stops, and whether that is all of it."""
    found = [(answer.index(end), end) for end in ends if end in answer]
    if not found:
        return answer, True
    start, _ = min(found)
    rest = answer[start:]
    for end in ends:
        rest = rest.replace(end, "")
    return answer[:start], not rest.strip()


def _continuation(tokenizer, prompt_ids: list[int], joint_ids: list[int], answer: str) -> list[int]:
    """Ids that spell `answer` after `prompt_ids`."""
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
    return ids
