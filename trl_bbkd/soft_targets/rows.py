"""Rows of teacher text as a student on soft targets reads them."""

from datasets import Dataset, concatenate_datasets

from ..data.teacher_files import ROW_COLUMN
from ..selection.collator import CARRIED_COLUMNS
from ..seqkd.trainer import sft_rows
from .store import row_key


def soft_target_rows(dataset: Dataset, tokenizer, chat_template_kwargs: dict | None = None) -> Dataset:
    """
    Make rows whose soft targets can be looked up.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `teacher_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`, for prompts that are not tokenised yet.

    Returns:
        [`~datasets.Dataset`]: `input_ids`, `labels` (-100 at the prompt), `row_key`, the row's name in a store, and, if
        the rows have them, their place in the file and what LLKD selects by.
    """
    rows = sft_rows(dataset, tokenizer, chat_template_kwargs)

    def name(batch):
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        return {"row_key": [row_key(ids, labels.count(-100)) for ids, labels in pairs]}

    rows = rows.map(name, batched=True, desc="Naming rows")
    carried = [column for column in (ROW_COLUMN, *CARRIED_COLUMNS) if column in dataset.column_names]
    return concatenate_datasets([rows, dataset.select_columns(carried)], axis=1) if carried else rows
