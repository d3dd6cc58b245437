"""Work on batches that the processes of a run share, each running the model equally often."""

from collections.abc import Callable
from typing import Any

from torch import distributed


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def shared(batches: list, work: Callable[[Any], Any]) -> list:
    """
    Do `work` on each batch, on one of the processes, and give all of them the results.

    A sharded model needs every process in each of its forward passes: one that has a batch less does its last one twice.

    Args:
        batches (`list`):
            The same on every process.
        work (`Callable`):
            What is done to one.

    Returns:
        `list`: a result for each batch, on every process.
    """
    rank, processes = place()
    if processes == 1:
        return [work(batch) for batch in batches]
    own = {}
    for first in range(0, len(batches), processes):
        number = min(first + rank, len(batches) - 1)
        result = work(batches[number])
        if first + rank < len(batches):
            own[number] = result
    return in_order(own)


def in_order(own: dict[int, Any]) -> list:
    """What the processes have found, each under some numbers, by number and on every process."""
    found: list[dict[int, Any]] = [own]
    if place()[1] > 1:
        found *= place()[1]
        distributed.all_gather_object(found, own)
    results = {number: result for part in found for number, result in part.items()}
    return [results[number] for number in range(len(results))]
