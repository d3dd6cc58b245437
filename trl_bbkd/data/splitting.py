"""Rows divided so that no prompt is on both sides: a student is measured on prompts that it has not seen."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np
from datasets import Dataset


def input_key(value) -> str:
    """What a prompt, a text or messages are compared by."""
    return json.dumps(value, sort_keys=True, default=str)


def rows_by_input(keys: Iterable[Hashable]) -> list[list[int]]:
    """
    Which rows belong together.

    Args:
        keys (`Iterable`):
            What the input of each row is compared by.

    Returns:
        `list[list[int]]`: the rows' numbers, one list for each input, in the order in which inputs come first.
    """
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        rows[key].append(number)
    return list(rows.values())


def split_by_input(dataset: Dataset, column: str, most: int, seed: int) -> tuple[Dataset, Dataset]:
    """
    Divide rows into training and held-out ones: whole prompts, in random order, for as long as they fit.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        column (`str`):
            Column of their input, such as `"prompt"`. Without it every row stands for itself.
        most (`int`):
            Most held-out rows, unless no prompt has as few.
        seed (`int`):
            Seed of the order.

    Returns:
        `tuple`: training rows and held-out rows, each in the order they came. If all rows have the same input, rows are
        divided, as there is nothing else to divide.
    """
    keys = map(input_key, dataset[column]) if column in dataset.column_names else range(len(dataset))
    groups = rows_by_input(keys)
    if len(groups) == 1:
        groups = [[number] for number in groups[0]]
    held_out = drawn_rows(groups, most, seed)
    train = [number for number in range(len(dataset)) if number not in held_out]
    return dataset.select(train), dataset.select(sorted(held_out))


def drawn_rows(groups: list[list[int]], most: int, seed: int) -> set[int]:
    """The rows of some of the groups, whole ones in random order: as many as fit into `most` rows, and at least the smallest."""
    picked: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(picked) + len(groups[group]) <= most:
            picked += groups[group]
        if len(picked) == most:
            break
    smallest = min(groups, key=len)
    return set(picked or smallest)
