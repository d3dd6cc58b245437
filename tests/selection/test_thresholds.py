import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trl_bbkd.errors import LLKDDataError
from trl_bbkd.selection.thresholds import (
    EPS,
    WEIGHTINGS,
    SelectionSettings,
    Selector,
    ema,
    group_thresholds,
    random_rows,
    sample_weights,
)


GROUPS = 3
RULES = ("class_mean", "maxnorm", "global", "quantile")  # "random" has tests of its own


class SlowSelector:
    """Row by row, in Python's floats; moving averages as two sums, corrected at the end."""

    def __init__(self, rule, momentum, use_teacher, use_student, weighting, warmup_steps, budget, history_size):
        self.__dict__.update(locals())
        self.step = 0
        self.sums = {(signal, y): 0.0 for signal in (0, 1) for y in ("all", *range(GROUPS))}
        self.ones = dict.fromkeys(("all", *range(GROUPS)), 0.0)
        self.history = []

    def average(self, signal, y):
        return self.sums[signal, y] / self.ones[y]

    def threshold(self, signal, y):
        seen = [k for k in range(GROUPS) if self.ones[k] > 0]
        overall = self.average(signal, "all")
        if self.rule == "global" or y not in seen:
            return overall
        if self.rule == "class_mean":
            return self.average(signal, y)
        largest = max(self.average(signal, k) for k in seen)
        return self.average(signal, y) / largest * overall if largest else overall

    def quantile(self, values):
        values, position = sorted(values), (1 - self.budget) * (len(values) - 1)
        below = math.floor(position)
        above = min(below + 1, len(values) - 1)
        return values[below] + (position - below) * (values[above] - values[below])

    def select(self, rows):
        if rows:
            self.step += 1
        for y in ("all", *range(GROUPS)):
            members = [row for row in rows if y in ("all", row[2])]
            if not members:
                continue
            self.ones[y] = self.momentum * self.ones[y] + (1 - self.momentum)
            for signal in (0, 1):
                batch = sum(row[signal] for row in members) / len(members)
                self.sums[signal, y] = self.momentum * self.sums[signal, y] + (1 - self.momentum) * batch
        scores = [(c if self.use_teacher else 1.0) * (u if self.use_student else 1.0) for c, u, _ in rows]
        if self.rule == "quantile" and rows:
            self.score = self.quantile(self.history or scores)
            self.history = (self.history + scores)[-self.history_size :]
        keep = []
        for (c, u, y), score in zip(rows, scores, strict=True):
            kept = True
            if self.step > self.warmup_steps and self.rule == "quantile":
                kept = score >= self.score - EPS
            elif self.step > self.warmup_steps:
                kept = not self.use_teacher or c >= self.threshold(0, y) - EPS
                kept = kept and (not self.use_student or u >= self.threshold(1, y) - EPS)
            keep.append(kept)
        formulas = {
            "product": lambda c, u: c * u,
            "sum": lambda c, u: c + u,
            "teacher": lambda c, u: c,
            "student": lambda c, u: u,
            "none": lambda c, u: 1.0,
        }
        raw = [formulas[self.weighting](c, u) if kept else 0.0 for (c, u, _), kept in zip(rows, keep, strict=True)]
        if sum(raw) == 0:
            return keep, [float(kept) for kept in keep]
        return keep, [weight / (sum(raw) / sum(keep)) for weight in raw]


# Multiples of an eighth tie with each other and with their means; signals come in float32
signal = st.integers(0, 8).map(lambda eighths: eighths / 8) | st.floats(0, 1, width=32, allow_subnormal=False)
# A batch has rows of some groups only, or no rows
batch = st.integers(1, GROUPS).flatmap(
    lambda groups: st.lists(st.tuples(signal, signal, st.integers(0, groups - 1)), max_size=12)
)
kind = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]),
        "use_teacher": st.booleans(),
        "use_student": st.booleans(),
        "weighting": st.sampled_from(WEIGHTINGS),
        "warmup_steps": st.integers(0, 2),
        "history_size": st.sampled_from([1, 7, 100]),
    }
)


def tensors(rows):
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    dtypes = (torch.float64, torch.float64, torch.int64)
    return [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]


def make(rule, **kwargs):
    kwargs = {"num_groups": GROUPS, "budget": 0.3 if rule == "quantile" else None, **kwargs}
    return Selector(SelectionSettings(rule=rule, **kwargs))


def stream(steps=20, rows=16, seed=0, groups=GROUPS):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        confidence, uncertainty = torch.rand(2, rows, generator=generator)
        yield confidence, uncertainty, torch.randint(groups, (rows,), generator=generator)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=100, deadline=None)
@given(batches=st.lists(batch, min_size=1, max_size=6), kind=kind, budget=st.floats(0.05, 0.95))
def test_as_a_slow_loop_does_it(rule, batches, kind, budget):
    budget = budget if rule == "quantile" else None
    slow, fast = SlowSelector(rule=rule, budget=budget, **kind), make(rule, **kind | {"budget": budget})
    for rows in batches:
        keep, weight = slow.select(rows)
        found = fast.select(*tensors(rows))
        assert found.keep.tolist() == keep
        assert found.weight.tolist() == pytest.approx(weight, rel=1e-9, abs=1e-12)
        if rule != "quantile" and slow.step:
            for number, thresholds in enumerate(fast.thresholds()[:2]):
                expected = [slow.threshold(number, y) for y in range(GROUPS)]
                assert thresholds.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        elif slow.step:
            assert fast.thresholds().score.item() == pytest.approx(slow.score, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.999])
def test_after_the_first_batch_an_average_is_that_batch(momentum):
    confidence, uncertainty, _ = next(stream())
    group = torch.tensor([0, 2] * 8)
    selector = make("class_mean", momentum=momentum)
    selector.update(confidence, uncertainty, group)
    assert selector.mean.tolist() == [confidence.double().mean().item(), uncertainty.double().mean().item()]
    for number, values in enumerate((confidence.double(), uncertainty.double())):
        thresholds = selector.thresholds()[number].tolist()
        assert thresholds[0] == pytest.approx(values[::2].mean().item(), rel=1e-15)
        assert thresholds[2] == pytest.approx(values[1::2].mean().item(), rel=1e-15)


def test_moving_average_is_the_corrected_one():
    mean, weight, plain = torch.zeros(()).double(), torch.zeros(()).double(), 0.0
    for step, value in enumerate([3.0, -1.0, 4.0, 1.0], start=1):
        mean, weight = ema(mean, weight, torch.tensor(value).double(), 0.9)
        plain = 0.9 * plain + 0.1 * value
        assert mean.item() == pytest.approx(plain / (1 - 0.9**step), rel=1e-12)


def test_rules_of_hand_values():
    means, seen = torch.tensor([0.9, 0.6, 0.0]), torch.tensor([True, True, False])
    overall = torch.tensor(0.7)
    for rule, expected in {
        "class_mean": [0.9, 0.6, 0.7],
        "maxnorm": [0.7, 0.6 / 0.9 * 0.7, 0.7],
        "global": [0.7, 0.7, 0.7],
    }.items():
        torch.testing.assert_close(group_thresholds(overall, means, seen, rule), torch.tensor(expected))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("confidence", "uncertainty"), [(0.1, 0.5), (0.5, 0.1), (0.1, 0.1)])
def test_ties_are_kept(rule, confidence, uncertainty):
    """In float64 the mean of three times 0.1 is a little more than 0.1."""
    assert torch.full((3,), 0.1, dtype=torch.float64).mean() > 0.1
    selector = make(rule)
    for _ in range(5):
        values = (torch.full((9,), value, dtype=torch.float64) for value in (confidence, uncertainty))
        found = selector.select(*values, torch.arange(9) % GROUPS)
        assert found.keep.all() and found.weight.tolist() == pytest.approx([1.0] * 9)


def test_an_absent_group_keeps_its_threshold_and_an_unseen_one_has_the_global():
    selector = make("class_mean", momentum=0.5)
    selector.update(torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.4]), torch.tensor([0, 1]))
    before = selector.thresholds()
    assert before.teacher[2] == selector.mean[0] and before.student[2] == selector.mean[1]
    selector.update(torch.tensor([0.1]), torch.tensor([0.8]), torch.tensor([0]))
    after = selector.thresholds()
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old[1] == new[1] and old[0] != new[0]
    assert after.teacher[2] == selector.mean[0] != before.teacher[2]


@pytest.mark.parametrize("rule", RULES)
def test_both_indicators_off_and_no_weights_is_plain_training(rule):
    selector = make(rule, use_teacher=False, use_student=False, weighting="none")
    for batch in stream():
        found = selector.select(*batch)
        assert found.keep.all() and (found.weight == 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_one_indicator(rule):
    """Whatever the other signal is, the selection is the same; and it is the best rows of the one that is left."""
    noise = torch.Generator().manual_seed(1)
    for name in ("use_teacher", "use_student"):
        first, second = make(rule, **{name: False}), make(rule, **{name: False})
        for confidence, uncertainty, group in stream():
            other = torch.rand(len(group), generator=noise)
            changed = (other, uncertainty) if name == "use_teacher" else (confidence, other)
            keep = first.select(confidence, uncertainty, group).keep
            assert torch.equal(keep, second.select(*changed, group).keep)
            used = uncertainty if name == "use_teacher" else confidence
            assert 0 < keep.sum() < len(keep) and used[keep].mean() > used[~keep].mean()


@pytest.mark.parametrize("rule", RULES)
def test_warm_up_keeps_all_rows(rule):
    selector = make(rule, warmup_steps=3)
    kept = [selector.select(*batch).keep.all().item() for batch in stream(steps=5)]
    assert kept == [True, True, True, False, False]


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.5])
def test_quantile_keeps_about_the_budget(budget):
    selector, kept, rows = make("quantile", budget=budget, history_size=2000), 0, 0
    for step, batch in enumerate(stream(steps=300, rows=64)):
        keep = selector.select(*batch).keep
        kept, rows = (kept + keep.sum().item(), rows + 64) if step >= 50 else (0, 0)
    assert len(selector.history) == 2000
    assert kept / rows == pytest.approx(budget, abs=0.015)


def test_quantile_compares_with_the_past_only():
    selector, ones = make("quantile", budget=0.5), torch.ones(4)
    low, high = torch.full((4,), 0.2), torch.full((4,), 0.8)
    group = torch.zeros(4, dtype=torch.int64)
    assert selector.select(low, ones, group).keep.all()  # the first batch, with itself
    assert selector.select(high, ones, group).keep.all()
    assert selector.thresholds().score.item() == pytest.approx(0.2)
    assert not selector.select(low, ones, group).keep.any()
    assert selector.thresholds().score.item() == pytest.approx(0.5)  # between 0.2 and 0.8
    assert selector.thresholds().teacher.isnan().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_1_on_average_over_the_kept_rows(weighting):
    for rule in RULES:
        selector = make(rule, weighting=weighting)
        for batch in stream():
            found = selector.select(*batch)
            assert found.weight[found.keep].mean().item() == pytest.approx(1.0, rel=1e-12)
            assert (found.weight[~found.keep] == 0).all()


def test_weights_of_hand_values():
    confidence, uncertainty = torch.tensor([0.5, 1.0, 0.9]).double(), torch.tensor([0.4, 0.6, 0.9]).double()
    keep = torch.tensor([True, True, False])
    for weighting, expected in {
        "product": [0.5, 1.5, 0.0],
        "sum": [0.72, 1.28, 0.0],
        "teacher": [2 / 3, 4 / 3, 0.0],
        "student": [0.8, 1.2, 0.0],
        "none": [1.0, 1.0, 0.0],
    }.items():
        assert sample_weights(confidence, uncertainty, keep, weighting).tolist() == pytest.approx(expected)
    # A student that is certain of all kept rows, or all but certain
    assert sample_weights(confidence, uncertainty * 0, keep, "product").tolist() == [1.0, 1.0, 0.0]
    tiny = torch.full((3,), 1e-310, dtype=torch.float64)
    assert sample_weights(confidence, tiny, keep, "student").tolist() == [1.0, 1.0, 0.0]


def test_empty_selection_and_empty_batch():
    # The surest rows are those of which the student is sure, too
    confidence, uncertainty = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    group = torch.zeros(2, dtype=torch.int64)
    for weighting in WEIGHTINGS:
        found = make("global", weighting=weighting).select(confidence, uncertainty, group)
        assert not found.keep.any() and found.weight.tolist() == [0.0, 0.0]
    for rule in RULES:
        selector = make(rule)
        before = selector.state_dict()
        found = selector.select(confidence[:0], uncertainty[:0], group[:0])
        assert found.keep.shape == found.weight.shape == (0,)
        assert_same_state(before, selector.state_dict())


def assert_same_state(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype and value.shape == second[name].shape
        assert value.numpy().tobytes() == second[name].numpy().tobytes(), name


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("rule", RULES)
def test_state_survives_a_file_bit_for_bit(tmp_path, rule, steps):
    batches = list(stream(steps=steps + 5))
    selector = make(rule, warmup_steps=12, history_size=50)
    for batch in batches[:steps]:
        selector.select(*batch)
    saved = selector.state_dict()
    save_file(saved, tmp_path / "selector.safetensors")
    restored = make(rule, warmup_steps=12, history_size=50)
    restored.select(*batches[-1])
    restored.load_state_dict(load_file(tmp_path / "selector.safetensors"))
    assert_same_state(selector.state_dict(), restored.state_dict())
    for batch in batches[steps:]:
        first, second = selector.select(*batch), restored.select(*batch)
        assert torch.equal(first.keep, second.keep) and torch.equal(first.weight, second.weight)
    assert_same_state(selector.state_dict(), restored.state_dict())
    # What was saved is a copy
    assert_same_state(saved, load_file(tmp_path / "selector.safetensors"))


def test_a_state_that_does_not_fit():
    state = make("global").state_dict()
    with pytest.raises(ValueError, match="3 groups, but num_groups is 5"):
        make("global", num_groups=5).load_state_dict(state)
    with pytest.raises(ValueError, match="no state of a selector"):
        make("global").load_state_dict({"mean": state["mean"]})


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_that_gather_are_one(rule):
    alone, ranks = make(rule), [make(rule), make(rule)]
    for batch in stream():
        one = alone.select(*batch)
        halves = [[column[:8] for column in batch], [column[8:] for column in batch]]
        gathered = [torch.cat(columns) for columns in zip(*halves, strict=True)]
        for number, rank in enumerate(ranks):
            found, own = rank.select(*gathered), slice(8 * number, 8 * number + 8)
            assert torch.equal(found.keep[own], one.keep[own]) and torch.equal(found.weight[own], one.weight[own])
            assert_same_state(alone.state_dict(), rank.state_dict())
    # A process that had only its own half would differ
    lonely = make(rule)
    for batch in stream():
        lonely.select(*(column[:8] for column in batch))
    assert not torch.equal(lonely.mean, alone.mean)


def test_gradients_and_precision_stay_outside():
    selector = make("class_mean")
    confidence = torch.tensor([0.1, 0.9], dtype=torch.bfloat16)
    uncertainty = torch.tensor([0.5, 0.5], requires_grad=True)
    found = selector.select(confidence, uncertainty, torch.tensor([0, 0]))
    assert not found.weight.requires_grad and not selector.mean.requires_grad
    assert {found.weight.dtype, selector.mean.dtype, selector.thresholds().teacher.dtype} == {torch.float64}


def test_bad_batches():
    good = torch.tensor([0.5, 0.5])
    for group in ([0, 3], [0, -1]):
        with pytest.raises(LLKDDataError, match=f"group is {group[1]}, but num_groups is 3"):
            make("global").update(good, good, torch.tensor(group))
    bad = torch.tensor([0.5, math.nan])
    for batch, name in (((bad, good), "teacher's confidence"), ((good, bad), "student's uncertainty")):
        selector = make("global")
        with pytest.raises(LLKDDataError, match=f"{name} is nan"):
            selector.select(*batch, torch.tensor([0, 1]))
        assert selector.step == 0
    with pytest.raises(ValueError, match="2 confidences, 1 uncertainties, 2 groups"):
        make("global").update(good, good[:1], torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rule", {"rule": "mean"}),
        ("weighting", {"weighting": "both"}),
        ("num_groups", {"num_groups": 0}),
        ("warmup_steps", {"warmup_steps": -1}),
        ("history_size", {"history_size": 0}),
        ("momentum", {"momentum": 1.0}),
        ("momentum", {"momentum": -0.1}),
        ("momentum", {"momentum": math.nan}),
        ("budget", {"rule": "quantile"}),
        ("budget", {"rule": "quantile", "budget": 1.0}),
        ("budget", {"rule": "quantile", "budget": 0.0}),
        ("budget", {"budget": 0.5}),
    ],
)
def test_settings_name_the_bad_field(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} is "):
        SelectionSettings(**arguments)


class TestRandomRows:
    """The control."""

    @pytest.mark.parametrize(("rows", "share"), [(8, 0.3), (7, 0.05), (32, 0.5)])
    def test_share_is_exact_on_average_and_within_one_row_always(self, rows, share):
        kept = [int(random_rows(rows, share, 0, step).sum()) for step in range(4000)]
        assert set(kept) <= {math.floor(share * rows), math.floor(share * rows) + 1}
        assert sum(kept) / len(kept) == pytest.approx(share * rows, abs=0.03)

    def test_every_row_is_as_likely(self):
        kept = torch.stack([random_rows(10, 0.3, 1, step) for step in range(4000)]).double().mean(dim=0)
        assert kept.tolist() == pytest.approx([0.3] * 10, abs=0.03)

    def test_draws_depend_on_seed_and_step_alone(self):
        assert torch.equal(random_rows(64, 0.5, 3, 7), random_rows(64, 0.5, 3, 7))
        assert not torch.equal(random_rows(64, 0.5, 3, 7), random_rows(64, 0.5, 3, 8))
        assert not torch.equal(random_rows(64, 0.5, 3, 7), random_rows(64, 0.5, 4, 7))

    def test_signals_do_not_matter(self):
        settings = SelectionSettings(num_groups=1, rule="random", budget=0.25, weighting="none")
        signals = [(torch.linspace(0, 1, 40), torch.ones(40)), (torch.zeros(40), torch.zeros(40))]
        first, second = (Selector(settings).select(*pair, torch.zeros(40, dtype=torch.long)) for pair in signals)
        assert torch.equal(first.keep, second.keep) and first.keep.sum() == 10
        assert first.weight.tolist() == first.keep.double().tolist()


@pytest.mark.parametrize(
    ("settings", "asks"),
    [
        ({}, True),
        ({"use_student": False}, True),
        ({"use_student": False, "weighting": "teacher"}, False),
        ({"rule": "random", "budget": 0.5, "weighting": "none"}, False),
        ({"rule": "random", "budget": 0.5}, True),
        ({"rule": "quantile", "budget": 0.5, "use_student": False, "weighting": "none"}, False),
    ],
)
def test_the_student_is_asked_only_where_it_matters(settings, asks):
    assert SelectionSettings(**settings).asks_student is asks
