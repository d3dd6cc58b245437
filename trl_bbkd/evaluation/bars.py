"""Bars of an evaluation's progress."""

from tqdm.auto import tqdm

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
