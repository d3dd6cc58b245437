"""The helper of tests that need processes of their own."""

import os

import pytest
import torch
from accelerate import PartialState

from .processes import Moment, killed_at, on_processes


def rank_sum(fails_on=None):
    """Of the ranks, by a collective; one process may fail before it."""
    state = PartialState(cpu=True)
    if state.process_index == fails_on:
        raise RuntimeError(f"process {fails_on} is out")
    total = torch.tensor([float(state.process_index)])
    torch.distributed.all_reduce(total)
    return {"pid": os.getpid(), "processes": state.num_processes, "sum": total.item()}


def touch(folder, count):
    for number in range(count):
        (folder / str(number)).touch()


def is_even(path, *args, **kwargs):
    return int(path.name) % 2 == 0


def test_they_are_processes_of_one_run():
    found = on_processes(2, rank_sum)
    assert [(each["processes"], each["sum"]) for each in found] == [(2, 1.0)] * 2
    assert len({os.getpid(), *(each["pid"] for each in found)}) == 3


def test_one_that_fails_ends_the_others_and_is_named():
    with pytest.raises(AssertionError, match=r"(?s)process 1: exit status 1.*RuntimeError: process 1 is out"):
        on_processes(2, rank_sum, fails_on=1)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_the_third_of_the_calls_that_count(tmp_path, after):
    killed_at(Moment("pathlib.Path.touch", call=3, counts=is_even, after=after), touch, tmp_path, 9)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(5 if after else 4))


def test_a_moment_that_does_not_come(tmp_path):
    with pytest.raises(AssertionError, match="exit status 0"):
        killed_at(Moment("pathlib.Path.touch", call=10), touch, tmp_path, 9)
