"""The teacher's answers to one prompt, where several rows share it."""

import itertools
from collections.abc import Iterator

from datasets import Dataset, IterableDataset

from .splitting import rows_by_input


class AnswersByPrompt:
    """
    Finds all answers to a prompt. Prompts are the same whose token ids are.

    Args:
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt_ids` and `teacher_ids`. What else a stream will bring is not known: each of its rows stands for
            itself.
    """

    def __init__(self, rows: Dataset | IterableDataset):
        self.rows = rows
        groups = [] if isinstance(rows, IterableDataset) else rows_by_input(map(hash, map(tuple, _prompts(rows))))
        self.first_rows = [numbers[0] for numbers in groups]
        self.most = max(map(len, groups), default=1)
        # Answers stay in the table: as lists they would take many times its memory
        self._shared = {tuple(rows[numbers[0]]["prompt_ids"]): numbers for numbers in groups if len(numbers) > 1}

    def __call__(self, prompt_ids: list[int], own: list[int]) -> list[list[int]]:
        """
        All answers to a prompt, as often as rows have them.

        Args:
            prompt_ids (`list[int]`):
                The prompt's tokens.
            own (`list[int]`):
                The answer of the row at hand, which comes first.
        """
        own = list(own)
        numbers = self._shared.get(tuple(prompt_ids))
        if numbers is None:
            return [own]
        answers = list(map(list, self.rows[numbers]["teacher_ids"]))
        answers.remove(own)
        return [own, *answers]


def _prompts(rows: Dataset) -> Iterator[list[int]]:
    for batch in rows.select_columns("prompt_ids").iter(batch_size=1000):
        yield from batch["prompt_ids"]


def with_most_answers(rows: Dataset, most: int) -> Dataset:
    """Of the rows of each prompt the first ones, at most so many; with `prompt_ids`."""
    groups = rows_by_input(map(hash, map(tuple, _prompts(rows))))
    return rows.select(sorted(number for numbers in groups for number in numbers[:most]))


def count_prompts(rows: list[dict]) -> int:
    """How many prompts some rows with `prompt_ids` have."""
    return len({tuple(row["prompt_ids"]) for row in rows})


def first_prompts(rows: Dataset | IterableDataset | list[dict], most: int) -> list[dict]:
    """
    The rows of the first prompts, in their order.

    Args:
        rows ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `list[dict]`):
            Rows with `prompt_ids`. A stream is read as far as the first row of a further prompt.
        most (`int`):
            Most prompts.
    """
    if isinstance(rows, IterableDataset):
        rows = list(_up_to(rows, most))
    if isinstance(rows, Dataset):
        groups = rows_by_input(map(hash, map(tuple, _prompts(rows))))
        return rows.select(sorted(itertools.chain(*groups[:most]))).to_list()
    groups = rows_by_input(tuple(row["prompt_ids"]) for row in rows)
    return [rows[number] for number in sorted(itertools.chain(*groups[:most]))]


def _up_to(stream: IterableDataset, most: int) -> Iterator[dict]:
    seen: set[tuple] = set()
    for row in stream:
        seen.add(tuple(row["prompt_ids"]))
        if len(seen) > most:
            return
        yield row
