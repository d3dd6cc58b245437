import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, default_data_collator
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_bbkd.errors import LLKDDataError
from trl_bbkd.host._compat import DataCollatorForLanguageModeling
from trl_bbkd.selection.collator import LLKDDataCollator, take_rows
from trl_bbkd.soft_targets.collator import SoftTargetCollator
from trl_bbkd.soft_targets.store import RowTargets


PAD = 9
CARRIED = {"teacher_confidence", "group", "row_id"}


def carried(number):
    return {"teacher_confidence": number / 10, "group": number % 3, "row_id": 100 + number}


def language_rows(lengths=((3, 5), (1, 1), (6, 2), (4, 12), (2, 7), (5, 3)), extra=True):
    """Prompt and answer lengths; no token is in two places."""
    rows = []
    for number, (prompt, answer) in enumerate(lengths):
        ids = [20 * number + 10 + i for i in range(prompt + answer)]
        row = {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row_key": number}
        rows.append(row | (carried(number) if extra else {}))
    return rows


def preference_rows():
    return [
        {"prompt_ids": [1] * (2 + i), "chosen_ids": [10 + i] * (1 + i % 3), "rejected_ids": [20 + i] * (1 + i % 2)}
        | carried(i)
        for i in range(4)
    ]


def text_rows(tokenizer):
    texts = ["The sky is blue.", "An apple", "A dog has four legs and one tail.", "Hello, cat!"]
    return [dict(tokenizer(text)) | {"label": i % 2} | carried(i) for i, text in enumerate(texts)]


class Store(dict):
    """Targets that name the token they belong to."""

    def __missing__(self, key):
        labels = np.array([label for label in language_rows()[key]["labels"][1:] if label != -100])
        return RowTargets(labels[:, None] + np.arange(2), np.float32(-labels[:, None] / 100.0 - np.arange(2)), labels)


def soft_target_collator(multiple=None):
    return SoftTargetCollator(pad_token_id=PAD, pad_to_multiple_of=multiple, stores=[Store(), Store()])


def language_collator(multiple=None):
    return DataCollatorForLanguageModeling(pad_token_id=PAD, pad_to_multiple_of=multiple)


def preference_collator(multiple=None):
    return DataCollatorForPreference(pad_token_id=PAD, pad_to_multiple_of=multiple)


def assert_carried(batch, numbers):
    assert batch["teacher_confidence"].dtype == torch.float32
    assert batch["group"].dtype == batch["row_id"].dtype == torch.int64
    torch.testing.assert_close(batch["teacher_confidence"], torch.tensor([number / 10 for number in numbers]))
    assert batch["group"].tolist() == [number % 3 for number in numbers]
    assert batch["row_id"].tolist() == [100 + number for number in numbers]


def assert_equal_batches(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.parametrize("name", ["language", "soft_targets", "preference", "padding", "default", "own"])
def test_wraps_any_collator(tokenizer, name):
    """The batch is what the collator makes of the rows alone, and the columns are those of its rows, in order."""
    collator, rows = {
        "language": (language_collator(), language_rows()),
        "soft_targets": (soft_target_collator(8), language_rows()),
        "preference": (preference_collator(), preference_rows()),
        "padding": (DataCollatorWithPadding(tokenizer), text_rows(tokenizer)),
        "default": (default_data_collator, [{"x": [1.0 * i, 2.0], "label": i} | carried(i) for i in range(4)]),
        "own": (
            lambda rows: {"x": torch.tensor([row["x"] for row in rows])},
            [{"x": i} | carried(i) for i in range(4)],
        ),
    }[name]
    order = [2, 0, 3, 1]
    rows = [rows[number] for number in order]
    copies = [dict(row) for row in rows]
    batch = LLKDDataCollator(collator)(rows)
    assert_carried(batch, order)
    plain = collator(without(rows, *CARRIED))
    assert_equal_batches({k: v for k, v in batch.items() if k not in CARRIED}, dict(plain))
    assert rows == copies


def test_the_collator_does_not_see_the_columns():
    seen = []

    def collator(rows):
        seen.extend(rows)
        return language_collator()(rows)

    LLKDDataCollator(collator)(language_rows())
    assert [set(row) for row in seen] == [{"input_ids", "labels", "row_key"}] * 6


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_columns_pass_truncation(mode):
    """DataCollatorForPreference cuts long rows itself; SFTTrainer cuts input_ids and labels before."""
    collator = DataCollatorForPreference(pad_token_id=PAD, max_length=3, truncation_mode=mode)
    batch = LLKDDataCollator(collator)(preference_rows())
    assert batch["input_ids"].shape == (8, 3)
    assert_carried(batch, range(4))
    cut = slice(None, 4) if mode == "keep_start" else slice(-4, None)
    rows = [row | {"input_ids": row["input_ids"][cut], "labels": row["labels"][cut]} for row in language_rows()]
    batch = LLKDDataCollator(language_collator())(rows)
    assert batch["input_ids"].shape == (6, 4)
    assert_carried(batch, range(6))


def test_label_as_group(tokenizer):
    rows = text_rows(tokenizer)
    batch = LLKDDataCollator(DataCollatorWithPadding(tokenizer), group_column="label")(rows)
    assert batch["group"].tolist() == batch["labels"].tolist() == [0, 1, 0, 1]
    # Of a language model the label is no part of the batch, and group all the same
    rows = [row | {"label": number} for number, row in enumerate(language_rows())]
    batch = LLKDDataCollator(language_collator(), group_column="label")(rows)
    assert batch["group"].tolist() == [0, 1, 2, 3, 4, 5] and "label" not in batch


def test_group_and_row_id_may_be_missing():
    batch = LLKDDataCollator(language_collator())(without(language_rows(), "group", "row_id"))
    assert batch["group"].tolist() == [0] * 6 and "row_id" not in batch


def test_rows_of_an_evaluation():
    collator, rows = LLKDDataCollator(language_collator(), required=False), language_rows()
    assert "teacher_confidence" not in collator(without(rows, *CARRIED))
    assert_carried(collator(rows), range(6))
    with pytest.raises(LLKDDataError, match="has no `teacher_confidence`"):
        collator(rows[:2] + without(rows[2:], *CARRIED))


def test_in_worker_processes():
    collator = LLKDDataCollator(language_collator(), group_column="group")
    assert pickle.loads(pickle.dumps(collator)) == collator
    loader = DataLoader(Dataset.from_list(language_rows()), batch_size=2, collate_fn=collator, num_workers=1)
    batches = list(loader)
    for start, batch in zip((0, 2, 4), batches, strict=True):
        assert_carried(batch, range(start, start + 2))


def test_formatted_data_sets():
    rows = without(language_rows(), "labels", "input_ids")
    dataset = Dataset.from_list([row | {"x": [1.0, 2.0]} for row in rows])
    for format in ("torch", "numpy", None):
        batch = LLKDDataCollator(default_data_collator)(list(dataset.with_format(format)))
        assert_carried(batch, range(6))


def test_a_row_without_confidence_says_how_to_make_one():
    rows = language_rows()
    del rows[3]["teacher_confidence"]
    with pytest.raises(LLKDDataError, match="Row 103 has no `teacher_confidence`. .*pseudo_label.*column.*packing"):
        LLKDDataCollator(language_collator())(rows)
    with pytest.raises(LLKDDataError, match="Row 3 of the batch has no"):
        LLKDDataCollator(language_collator())(without(rows, "row_id"))


@pytest.mark.parametrize("value", [math.nan, None, -0.5, 85.0, "0.5"])
def test_bad_confidence(value):
    rows = language_rows()
    rows[2]["teacher_confidence"] = value
    with pytest.raises(LLKDDataError, match=f"Row 102: `teacher_confidence` is {value!r}"):
        LLKDDataCollator(language_collator())(rows)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("group", "positive", "'positive'; it must be an integer"),
        ("group", 1.5, "1.5; it must be an integer"),
        ("group", -1, "-1; it must be 0 or more"),
        ("row_id", None, "None; it must be an integer"),
    ],
)
def test_bad_integers(column, value, message):
    rows = language_rows()
    rows[2][column] = value
    with pytest.raises(LLKDDataError, match=f"`{column}` is {message}"):
        LLKDDataCollator(language_collator())(rows)
    del rows[2][column]
    with pytest.raises(LLKDDataError, match=f"has no `{column}`. Add it as a column of integers"):
        LLKDDataCollator(language_collator(), group_column="group")(rows)
    if column == "group":
        with pytest.raises(LLKDDataError, match="has no `label`"):
            LLKDDataCollator(language_collator(), group_column="label")(rows)


def test_collators_that_merge_rows():
    padding_free = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    with pytest.raises(LLKDDataError, match="padding_free: false"):
        LLKDDataCollator(padding_free)
    with pytest.raises(LLKDDataError, match="made 1 rows of 6.*packing and padding_free"):
        LLKDDataCollator(lambda rows: padding_free(rows))(language_rows())
    packed = [row | {"seq_lengths": [len(row["input_ids"])]} for row in language_rows()]
    with pytest.raises(LLKDDataError, match="Row 100 is packed.*packing: false"):
        LLKDDataCollator(language_collator())(packed)
    with pytest.raises(LLKDDataError, match="made 12 rows of 6"):
        LLKDDataCollator(lambda rows: language_collator()(rows + rows))(language_rows())
    with pytest.raises(LLKDDataError, match="made a tuple"):
        LLKDDataCollator(lambda rows: (torch.zeros(6),))(language_rows())


@pytest.mark.parametrize("name", ["language", "soft_targets", "preference"])
@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 3), min_size=1, max_size=8), data=st.data())
def test_taken_rows_are_those_of_a_batch_of_the_kept_rows_alone(name, numbers, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)).filter(any))
    multiple = data.draw(st.sampled_from([None, 8]))
    collators = {
        "language": language_collator,
        "soft_targets": soft_target_collator,
        "preference": preference_collator,
    }
    collator = LLKDDataCollator(collators[name](multiple))
    rows = [(preference_rows() if name == "preference" else language_rows())[number] for number in numbers]
    found = take_rows(collator(rows), torch.tensor(keep), multiple)
    assert_equal_batches(found, collator([row for row, kept in zip(rows, keep, strict=True) if kept]))
    assert all(value.is_contiguous() for value in found.values())


def test_take_rows_of_classification_batches(tokenizer):
    for side in ("right", "left"):
        rows, keep = text_rows(tokenizer), torch.tensor([True, True, False, True])
        padder = DataCollatorWithPadding(tokenizer)
        padder.tokenizer.padding_side = side
        try:
            batch = LLKDDataCollator(padder)(rows)
            found = take_rows(batch, keep)
            assert found["input_ids"].size(1) < batch["input_ids"].size(1)
            assert_equal_batches(found, LLKDDataCollator(padder)([rows[0], rows[1], rows[3]]))
        finally:
            tokenizer.padding_side = "right"


def test_take_rows_leaves_alone_what_has_no_rows():
    batch = {
        "x": torch.arange(6).view(3, 2),
        "names": ["a", "b", "c"],
        "other": [1, 2],
        "scale": torch.tensor(2.0),
        "weights": torch.ones(5),
        "flag": True,
    }
    found = take_rows(batch, torch.tensor([True, False, True]))
    assert found["x"].tolist() == [[0, 1], [4, 5]] and found["names"] == ["a", "c"]
    assert all(found[name] is batch[name] for name in ("other", "scale", "weights", "flag"))


@pytest.mark.parametrize("collator", [language_collator(), soft_target_collator(), preference_collator()])
def test_take_no_rows_and_all_rows(collator):
    rows = preference_rows() if isinstance(collator, DataCollatorForPreference) else language_rows()
    batch = LLKDDataCollator(collator)(rows)
    assert_equal_batches(take_rows(batch, torch.ones(len(rows), dtype=torch.bool)), batch)
    found = take_rows(batch, torch.zeros(len(rows), dtype=torch.bool))
    assert set(found) == set(batch) and all(len(value) == 0 for value in found.values())


@pytest.mark.parametrize("name", ["teacher_probs", "labels"])
def test_a_tensor_as_wide_as_the_batch_by_chance_is_not_cut(name):
    """Four classes, four positions."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"input_ids": mask * 5, "attention_mask": mask, name: torch.ones(2, 4)}
    found = take_rows(batch, torch.tensor([True, False]))
    assert {found[key].shape for key in batch} == {(1, 4)}


def test_padding_goes_whatever_the_number_of_targets():
    """Two targets for each token, in a batch of width two."""
    rows = [{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [-100, 3]}]
    batch = language_collator()(rows) | {"target_ids_0": torch.ones(1, 2, dtype=torch.int64)}
    found = take_rows(batch, torch.tensor([True, False]))
    assert found["input_ids"].tolist() == [[1]] and found["target_ids_0"].shape == (0, 2)


def test_bad_keep():
    batch = LLKDDataCollator(language_collator())(language_rows())
    with pytest.raises(ValueError, match="`keep` is for 4 rows, but the batch has 6"):
        take_rows(batch, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="torch.int64; it must be boolean"):
        take_rows(batch, torch.arange(6))
    with pytest.raises(ValueError, match="`target_ids_0` has 7 rows, but 30 tokens are scored"):
        take_rows(batch | {"target_ids_0": torch.zeros(7, 2)}, torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labelled", ["answers", "everything"])
def test_taken_rows_have_the_same_loss(tiny_model_dir, side, labelled):
    """Token by token; also where the first token of a row is scored from the padding before it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    rows = language_rows(lengths=((3, 5), (1, 1), (6, 2), (4, 12), (2, 7)), extra=False)
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        labels = row["input_ids"] if labelled == "everything" else row["labels"]
        padding = width - len(labels)
        for name, value, fill in (
            ("input_ids", row["input_ids"], PAD),
            ("labels", labels, -100),
            ("attention_mask", [1] * len(labels), 0),
        ):
            batch[name].append(value + [fill] * padding if side == "right" else [fill] * padding + value)
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    keep = torch.tensor([True, True, False, False, True])
    found = take_rows(batch, keep)
    assert found["input_ids"].size(1) == 9 + (side == "left" and labelled == "everything")

    def losses(batch):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        scored = labels != -100
        rows = scored.nonzero()[:, 0]
        return torch.nn.functional.cross_entropy(logits[scored], labels[scored], reduction="none"), rows

    (whole, whole_rows), (part, part_rows) = losses(batch), losses(found)
    assert torch.equal(part_rows, torch.tensor([0, 1, -1, -1, 2])[whole_rows[keep[whole_rows]]])
    # A token scored from a padded position sees no token: what it sees instead is not the model's to say
    seen = batch["attention_mask"][:, :-1][batch["labels"][:, 1:] != -100].bool()[keep[whole_rows]]
    # Left padding moves the rows, and transformers has the angles of positions in float32
    tolerance = 1e-9 if side == "right" else 1e-5
    torch.testing.assert_close(part[seen], whole[keep[whole_rows]][seen], rtol=tolerance, atol=tolerance)
