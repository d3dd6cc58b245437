"""Rows of teacher text as a student on soft targets reads them."""

from datasets import Dataset

from ..seqkd import sft_rows
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
            Passed to `apply_chat_template`.

    Returns:
        [`~datasets.Dataset`]: `input_ids`, `labels` (-100 at the prompt) and `row_key`, the row's name in a store.
    """
    rows = sft_rows(dataset, tokenizer, chat_template_kwargs)

    def name(batch):
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        return {"row_key": [row_key(ids, labels.count(-100)) for ids, labels in pairs]}

    return rows.map(name, batched=True, desc="Naming rows")
