import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_bbkd.selection.tally import SelectionTally


GROUPS, ROWS = 3, 20
row = st.tuples(st.integers(0, ROWS - 1), st.integers(0, GROUPS - 1), st.booleans())
batches = st.lists(st.tuples(st.lists(row, max_size=8), st.booleans()), max_size=6)


def make_gold():
    rng = random.Random(0)
    return [rng.choice([-1, 0, 1, 2]) for _ in range(ROWS)]


def add(tally, rows, is_warmup):
    ids, group, keep = ([row[column] for row in rows] for column in range(3))
    tally.add(torch.tensor(ids).long(), torch.tensor(group).long(), torch.tensor(keep).bool(), is_warmup)


def ratio(part, whole):
    return pytest.approx(len(part) / len(whole)) if whole else pytest.approx(float("nan"), nan_ok=True)


@given(batches=batches)
def test_counts_are_those_of_lists(batches):
    gold = make_gold()
    tally = SelectionTally(GROUPS, ROWS, torch.tensor(gold))
    for rows, is_warmup in batches:
        add(tally, rows, is_warmup)
    everything = [row for rows, _ in batches for row in rows]
    later = [row for rows, is_warmup in batches for row in rows if not is_warmup]
    if everything:
        assert tally.kept_share == ratio([row for row in everything if row[2]], everything)
    assert tally.distinct_rows == len({row[0] for row in everything if row[2]})
    for number, share in enumerate(tally.kept_share_by_group):
        members = [row for row in later if row[1] == number]
        assert share == ratio([row for row in members if row[2]], members)
    for kept, accuracy in zip((False, True), tally.accuracy, strict=True):
        checked = [row for row in later if row[2] is kept and gold[row[0]] != -1]
        assert accuracy == ratio([row for row in checked if gold[row[0]] == row[1]], checked)


def test_state_survives():
    tally = SelectionTally(GROUPS, ROWS, torch.tensor(make_gold()))
    add(tally, [(1, 0, True), (2, 1, False), (3, 2, True)], is_warmup=False)
    state = tally.state_dict()
    other = SelectionTally(GROUPS, ROWS)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    add(tally, [(4, 0, True)], is_warmup=True)
    assert not torch.equal(tally.state_dict()["tally.seen"], state["tally.seen"])


def test_without_true_groups_there_is_no_accuracy():
    tally = SelectionTally(GROUPS, ROWS)
    add(tally, [(1, 0, True), (2, 1, False)], is_warmup=False)
    assert all(accuracy != accuracy for accuracy in tally.accuracy)
