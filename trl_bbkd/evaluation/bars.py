"""Bars of an evaluation's progress."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from .processes import place


def progress_bar_of(total: int, text: str | None, unit: str, delay: float = 0.0) -> tqdm:
    """
    A bar of what all processes do together, shown by the main one, which leaves nothing behind.

    Args:
        total (`int`):
            How much there is to do.
        text (`str`, *optional*):
            What stands before it. `None` shows no bar.
        unit (`str`):
            What is counted.
        delay (`float`, *optional*, defaults to `0.0`):
            Seconds until it appears: none does for what is done before.
    """
    return tqdm(total=total, desc=text, disable=text is None or place()[0] > 0, unit=unit, leave=False, delay=delay)


class TokensAsTheyCome(BaseStreamer):
    """
    Moves a bar of the most tokens that there can be: by the tokens of a batch as they are sampled, and by those that an answer
    does without as it ends.

    Args:
        bar (`tqdm`):
            Of tokens.
        end_ids (`Sequence[int]`):
            Tokens that end an answer.
        max_new_tokens (`int`):
            Most tokens of one.
        at_once (`int`):
            Processes that sample such a batch at the same time: each token stands for as many.
    """

    def __init__(self, bar: tqdm, end_ids: Sequence[int], max_new_tokens: int, at_once: int):
        self.bar = bar
        self.end_ids = torch.tensor(end_ids)
        self.to_come = max_new_tokens
        self.at_once = at_once
        self.under_way: torch.Tensor | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.under_way is None:
            # The prompts come first
            self.under_way = torch.ones(len(value), dtype=torch.bool)
            return
        self.to_come -= 1
        sampled = int(self.under_way.sum())
        self.under_way &= ~torch.isin(value, self.end_ids)
        ended = sampled - int(self.under_way.sum())
        tokens = (sampled + ended * self.to_come) * self.at_once
        # The last batch of some processes is one that they have had
        self.bar.update(min(tokens, self.bar.total - self.bar.n))

    def end(self) -> None:
        """Nothing is left to count."""
