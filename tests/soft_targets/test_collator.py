import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.errors import TargetStoreError
from trl_bbkd.soft_targets.collator import SoftTargetCollator
from trl_bbkd.soft_targets.config import SoftTargetConfig
from trl_bbkd.soft_targets.head import scored_positions
from trl_bbkd.soft_targets.store import RowTargets, TargetStore, TargetStoreWriter, row_key
from trl_bbkd.soft_targets.trainer import SoftTargetTrainer


PAD = 9
# Prompt and answer lengths; the last row has a second prompt inside of its answer
LENGTHS = [(3, 5), (1, 1), (6, 2), (4, 12), (2, 7), (1, 9), (8, 3), (5, 10)]


def make_rows():
    """No token is in two places, so that a target tells which token it belongs to."""
    rows = []
    for number, (prompt, answer) in enumerate(LENGTHS):
        ids = [100 * number + 10 + i for i in range(prompt + answer)]
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "sample_weight": 0.25 * number})
    rows[-1]["labels"][8:11] = [-100] * 3
    return [row | {"row_key": row_key(row["input_ids"], row["labels"].count(-100))} for row in rows]


def targets_of(labels, k, base):
    """What a store has for a label: ids that name it, and log-probabilities that the code represents exactly."""
    labels = np.array([label for label in labels[1:] if label != -100])
    codes = (labels[:, None] + 7 * np.arange(k)) % 65536
    log_probs = np.float32(-24) * np.square(codes.astype(np.float32) / np.float32(65534))
    return RowTargets(base * labels[:, None] + np.arange(k), log_probs, np.zeros(len(labels), np.float32))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    rows, found = make_rows(), []
    for k, base in ((3, 10), (5, 20)):
        folder = tmp_path_factory.mktemp("store")
        with TargetStoreWriter(folder, k, {}) as writer:
            writer.append(0, [row["row_key"] for row in rows], [targets_of(row["labels"], k, base) for row in rows])
        found.append(TargetStore(folder))
    return found


def assert_targets_are_those_of_the_labels(batch):
    labels = batch["labels"][:, 1:][scored_positions(batch["labels"])]
    for number, (k, base) in enumerate(((3, 10), (5, 20))):
        expected = targets_of([-100, *labels.tolist()], k, base)
        ids, log_probs = batch[f"target_ids_{number}"], batch[f"target_log_probs_{number}"]
        assert ids.dtype == torch.int64 and log_probs.dtype == torch.float32
        assert np.array_equal(ids.numpy(), expected.ids)
        np.testing.assert_allclose(log_probs.numpy(), expected.log_probs, rtol=1e-6)


def cut(row, length, mode):
    """As SFTTrainer cuts the rows of a dataset."""
    kept = slice(None, length) if mode == "keep_start" else slice(-length, None)
    return {name: value[kept] if isinstance(value, list) else value for name, value in row.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=9), st.sampled_from([None, 8]))
def test_targets_follow_rows_into_any_batch(stores, numbers, multiple):
    rows = make_rows()
    collator = SoftTargetCollator(pad_token_id=PAD, pad_to_multiple_of=multiple, stores=stores)
    batch = collator([rows[number] for number in numbers])
    assert_targets_are_those_of_the_labels(batch)
    assert batch["sample_weight"].tolist() == [0.25 * number for number in numbers]
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["input_ids"]) == len(numbers)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", range(1, 17))
def test_targets_are_cut_with_their_rows(stores, mode, length):
    collator = SoftTargetCollator(pad_token_id=PAD, stores=stores, truncation_mode=mode)
    rows = [cut(row, length, mode) for row in make_rows()]
    assert max(len(row["labels"]) for row in rows) == length
    assert_targets_are_those_of_the_labels(collator(rows))
    for row in rows:
        assert_targets_are_those_of_the_labels(collator([row]))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_targets_of_what_a_trainer_left_of_its_rows(stores, tiny_model_dir, tmp_path, mode):
    """SFTTrainer itself cuts the rows, drops those without an answer and chooses columns."""
    arguments = SoftTargetConfig(
        str(tmp_path),
        max_length=7,
        truncation_mode=mode,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [row | {"input_ids": list(row["input_ids"])} for row in make_rows()]
    trainer = SoftTargetTrainer(tiny_model_dir, arguments, Dataset.from_list(rows))
    trainer.data_collator.stores = stores
    batches = list(trainer.get_train_dataloader())
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(dim=1).tolist()]
    assert sorted(lengths) == sorted(min(7, sum(pair)) for pair in LENGTHS if mode == "keep_end" or pair[0] < 7)
    for batch in batches:
        assert_targets_are_those_of_the_labels(batch)
    firsts = {row["input_ids"][0]: row["sample_weight"] for row in (cut(row, 7, mode) for row in make_rows())}
    for batch in batches:
        assert [firsts[first] for first in batch["input_ids"][:, 0].tolist()] == batch["sample_weight"].tolist()


def test_rows_of_an_evaluation_have_no_targets(stores):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in make_rows()]
    batch = SoftTargetCollator(pad_token_id=PAD, stores=stores)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_without_weights_there_are_none(stores):
    rows = make_rows()
    for row in rows:
        del row["sample_weight"]
    batch = SoftTargetCollator(pad_token_id=PAD, stores=stores[:1])(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "target_ids_0", "target_log_probs_0"}


def test_a_row_that_no_store_has(stores):
    row = make_rows()[0] | {"row_key": 1}
    with pytest.raises(TargetStoreError, match="no targets in"):
        SoftTargetCollator(pad_token_id=PAD, stores=stores)([row])
