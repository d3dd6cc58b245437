import dataclasses
import json
import random
import re

import pytest

from trl_bbkd.gad.config import GADConfig
from trl_bbkd.gad.monitor import TrainingMonitor, find_tell


TEACHER, STUDENT = [[10, 11, 12, 2], [20, 21, 2]], [[10, 31, 12, 2], [20, 41, 42, 2], [30, 21, 2], [33, 34, 2]]
HEALTHY = {
    "discriminator/accuracy": 0.8,
    "discriminator/loss": 0.5,
    "discriminator/group_std": 1.0,
    "completions/length_ratio": 1.05,
    "entropy": 2.0,
}
# What each kind of trouble looks like after a healthy start
TROUBLE = {
    "saturated": {"discriminator/accuracy": 1.0, "discriminator/loss": 0.001},
    "inverted": {"discriminator/accuracy": 0.2, "discriminator/loss": 1.5},
    "length": {"completions/length_ratio": 3.0},
    "group_std": {"discriminator/group_std": 0.01},
    "entropy": {"entropy": 0.05},
}
SETTINGS = {field.name for field in dataclasses.fields(GADConfig)}


def settings_named(text):
    """The words of a warning that look like settings."""
    text = re.sub(r"<\|im_end\|>|discriminator/group_std", "", text)
    return set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\bbeta\b", text))


def watch(monitor, metrics, batches, in_warmup=False, teacher=TEACHER, student=STUDENT):
    found = []
    for _ in range(batches):
        found += monitor.observe(monitor.num_batches, metrics, in_warmup, teacher, student)
    return found


def test_a_healthy_run_is_left_alone(tokenizer):
    monitor = TrainingMonitor(tokenizer)
    assert watch(monitor, HEALTHY, 10, in_warmup=True) == []
    assert watch(monitor, HEALTHY, 50) == []
    # One bad batch is no trend
    for trouble in TROUBLE.values():
        mild = {name: 0.9 * HEALTHY[name] + 0.1 * value for name, value in trouble.items()}
        assert watch(monitor, HEALTHY | mild, 1) == []
        assert watch(monitor, HEALTHY, 5) == []


@pytest.mark.parametrize("kind", TROUBLE)
def test_each_trouble_is_told_once_with_a_remedy(tokenizer, kind):
    monitor = TrainingMonitor(tokenizer)
    watch(monitor, HEALTHY, 25)
    (warning,) = watch(monitor, HEALTHY | TROUBLE[kind], 40)
    assert warning.kind == kind
    assert 25 <= warning.step <= 30  # as soon as the last five say so
    named = settings_named(warning.text)
    assert named and named <= SETTINGS, named - SETTINGS
    assert watch(monitor, HEALTHY, 10) == watch(monitor, HEALTHY | TROUBLE[kind], 10) == []
    assert monitor.warnings == [warning]


def test_short_answers_are_told_too(tokenizer):
    (warning,) = watch(TrainingMonitor(tokenizer), HEALTHY | {"completions/length_ratio": 0.3}, 10)
    assert warning.kind == "length" and "0.30 times" in warning.text


@pytest.mark.parametrize("kind", TROUBLE)
def test_warmup_is_only_searched_for_tells(tokenizer, kind):
    monitor = TrainingMonitor(tokenizer)
    watch(monitor, HEALTHY, 25, in_warmup=True)
    assert watch(monitor, HEALTHY | TROUBLE[kind], 20, in_warmup=True) == []


def test_a_tell_is_told_once_and_early_only(tokenizer):
    eos = tokenizer.eos_token_id
    student = [ids[:-1] + [17] for ids in STUDENT] * 8
    teacher = [ids[:-1] + [eos] for ids in TEACHER] * 8
    certain = HEALTHY | {"discriminator/accuracy": 1.0}
    monitor = TrainingMonitor(tokenizer)
    (warning,) = watch(monitor, certain, 10, in_warmup=True, teacher=teacher, student=student)
    assert (warning.kind, warning.step) == ("tell", 0)
    assert "'<|im_end|>'" in warning.text
    assert "the last of 100% of the teacher's answers and of 0% of the student's" in warning.text
    assert settings_named(warning.text) <= SETTINGS
    # Certainty that comes late is not a tell
    monitor = TrainingMonitor(tokenizer)
    watch(monitor, HEALTHY, 20, in_warmup=True)
    assert watch(monitor, certain, 5, in_warmup=True, teacher=teacher, student=student) == []
    # Nor is certainty that no single token explains
    assert watch(TrainingMonitor(tokenizer), certain, 5, True, teacher=TEACHER * 8, student=TEACHER * 8) == []


def test_small_batches_are_searched_for_tells_together(tokenizer):
    """Of two teacher's answers, each token is in at least half: alone, any batch would have a tell."""
    rng = random.Random(0)

    def answers(number, end):
        return [[rng.randrange(3, 300) for _ in range(30)] + [end] for _ in range(number)]

    certain = HEALTHY | {"discriminator/accuracy": 1.0}
    monitor = TrainingMonitor(tokenizer)
    for step in range(20):
        assert monitor.observe(step, certain, True, answers(2, end=2), answers(8, end=2)) == []
    monitor, found = TrainingMonitor(tokenizer), []
    for step in range(20):
        found += monitor.observe(step, certain, True, answers(2, end=2), answers(8, end=7))
    (warning,) = found
    assert warning.step == 7 and "is the last of 100% of the teacher's" in warning.text
    assert len(json.dumps(monitor.state())) < 3000


@pytest.mark.parametrize("kind", [*TROUBLE, "tell"])
def test_a_resumed_run_neither_repeats_nor_forgets(tokenizer, kind):
    def resumed(monitor):
        other = TrainingMonitor(tokenizer)
        other.load_state(json.loads(json.dumps(monitor.state())))
        return other

    trouble = HEALTHY | TROUBLE.get(kind, {"discriminator/accuracy": 1.0})
    sides = {"teacher": [[5, 2]] * 4, "student": [[6, 7]] * 8}
    straight, interrupted = TrainingMonitor(tokenizer), TrainingMonitor(tokenizer)
    if kind != "tell":
        for monitor in (straight, interrupted):
            watch(monitor, HEALTHY, 21, **sides)
    for _ in range(8):
        expected = straight.observe(7, trouble, False, **{f"{side}_ids": ids for side, ids in sides.items()})
        interrupted = resumed(interrupted)
        found = interrupted.observe(7, trouble, False, **{f"{side}_ids": ids for side, ids in sides.items()})
        assert found == expected
    assert [warning.kind for warning in interrupted.warnings] == [kind]


def test_find_tell():
    # End of sequence on one side only
    tell = find_tell([[5, 6, 2], [7, 2]], [[5, 6, 8], [7, 9], [7, 8], [5, 9]])
    assert (tell.position, tell.token, tell.teacher_share, tell.student_share) == (-1, 2, 1.0, 0.0)
    # A leading space's token
    tell = find_tell([[99, 5, 6, 2], [99, 7, 2]], [[5, 6, 2], [7, 8, 2]])
    assert (tell.position, tell.token, tell.teacher_share, tell.student_share) == (0, 99, 1.0, 0.0)
    # A token that only the student says, there in half of its answers
    tell = find_tell([[5, 6, 2], [5, 7, 2]], [[5, 6, 2], [5, 7, 2], [42, 6, 2], [42, 7, 2]])
    assert (tell.position, tell.difference) == (0, 0.5) and tell.token in (5, 42)
    # Answers shorter than the position count as not having it
    tell = find_tell([[5, 6, 50], [5, 6, 50]], [[5, 6], [5, 6]])
    assert tell.difference == 1.0 and tell.token in (6, 50)
    assert find_tell([[5, 6, 2]], [[5, 6, 2]]).difference == 0


@pytest.mark.parametrize(("text", "place"), [("!", "the first"), ("cat!", "number 2")])
def test_a_tell_is_spelt_out(tokenizer, text, place):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tail = [[200, 201], [202, 203]]
    tell = find_tell([ids + end for end in tail], [[*ids[:-1], 250 + n, *end] for n, end in enumerate(tail)])
    assert tell.position == len(ids) - 1
    assert repr(tokenizer.decode(ids[-1:])) in tell.describe(tokenizer)
    assert (place if len(ids) < 3 else f"number {len(ids)}") in tell.describe(tokenizer)
