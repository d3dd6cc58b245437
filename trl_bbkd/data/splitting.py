"""Rows divided so that no prompt is on both sides: a student is measured on prompts that it has not seen."""

import json
from collections import defaultdict

import numpy as np
from datasets import Dataset


def input_key(value) -> str:
    """What a prompt, a text or messages are compared by."""
    return json.dumps(value, sort_keys=True, default=str)


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
    rows_of: dict[str, list[int]] = defaultdict(list)
    inputs = dataset[column] if column in dataset.column_names else range(len(dataset))
    for number, value in enumerate(inputs):
        rows_of[input_key(value)].append(number)
    groups = list(rows_of.values())
    if len(groups) == 1:
        groups = [[number] for number in groups[0]]
    picked: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(picked) + len(groups[group]) <= most:
            picked += groups[group]
        if len(picked) == most:
            break
    smallest = min(groups, key=len)
    held_out = set(picked or smallest)
    train = [number for number in range(len(dataset)) if number not in held_out]
    return dataset.select(train), dataset.select(sorted(held_out))
