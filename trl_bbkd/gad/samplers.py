"""Which rows a batch of GAD has."""

from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from ..data.splitting import drawn_rows, input_key, rows_by_input


def stage_rows(rows: Dataset, share: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Divide rows between the stages: no prompt is in both.

    Args:
        rows ([`~datasets.Dataset`]):
            Teacher rows.
        share (`float`):
            Share of them, at most, that the warm-up learns from.
        seed (`int`):
            Seed of the division.

    Returns:
        `tuple[list[int], list[int]]`: numbers of the warm-up's rows and of the adversarial stage's.
    """
    groups = rows_by_input(map(input_key, rows["prompt"]))
    warmup = drawn_rows(groups, round(share * len(rows)), seed)
    return sorted(warmup), [number for number in range(len(rows)) if number not in warmup]


class RowSampler(Sampler):
    """
    What a sampler draws from some of the rows, as numbers among all of them.

    Args:
        sampler (`Sampler`):
            Draws places in `numbers`.
        numbers (`Sequence[int]`):
            The rows that are drawn from.
    """

    def __init__(self, sampler: Sampler, numbers: Sequence[int]):
        self.sampler, self.numbers = sampler, numbers

    def __iter__(self) -> Iterator[int]:
        return (self.numbers[place] for place in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class StageSampler(Sampler):
    """
    Repeats rows as TRL's sampler for GRPO does, each batch from the rows of the stage that it belongs to. An epoch has as
    many batches as one over all rows.

    What it draws depends on the number of the batch alone, so that a run that goes on draws what it would have drawn.

    Args:
        stages (`Callable[[], tuple[list[int], list[int], int]]`):
            The rows of the warm-up and of the adversarial stage, and how many batches the warm-up has; asked when an epoch
            begins.
        batches_per_epoch (`int`):
            Batches of prompts of an epoch.
        batch_size (`int`):
            Prompts of a batch.
        num_generations (`int`), repeats (`int`):
            How often each prompt follows itself, and each batch.
        shuffle (`bool`):
            Whether to draw rows in random order, a new one each time a stage has been through its rows.
        seed (`int`):
            Seed of the orders.
    """

    def __init__(
        self,
        stages: Callable[[], tuple[list[int], list[int], int]],
        *,
        batches_per_epoch: int,
        batch_size: int,
        num_generations: int,
        repeats: int,
        shuffle: bool,
        seed: int,
    ):
        self.stages = stages
        self.batches_per_epoch, self.batch_size = batches_per_epoch, batch_size
        self.num_generations, self.repeats = num_generations, repeats
        self.shuffle, self.seed = shuffle, seed
        self.epochs = 0  # that have begun

    def __len__(self) -> int:
        return self.batches_per_epoch * self.repeats * self.batch_size * self.num_generations

    def __iter__(self) -> Iterator[int]:
        first = self.epochs * self.batches_per_epoch
        self.epochs += 1
        warmup, adversarial, warmup_batches = self.stages()
        for number in range(first, first + self.batches_per_epoch):
            in_warmup = number < warmup_batches
            batch = self._batch(warmup, number) if in_warmup else self._batch(adversarial, number - warmup_batches)
            for _ in range(self.repeats):
                yield from (row for row in batch for _ in range(self.num_generations))

    def _batch(self, rows: list[int], number: int) -> list[int]:
        """Of a stage's rows, batch `number` of the stage. What is left over after whole batches waits for another order."""
        passes, place = divmod(number, len(rows) // self.batch_size)
        order = list(range(len(rows)))
        if self.shuffle:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed + passes)).tolist()
        return [rows[index] for index in order[place * self.batch_size : (place + 1) * self.batch_size]]
