import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.errors import TargetStoreError
from trl_bbkd.soft_targets.store import (
    HIGHEST_CODE,
    INDEX_DTYPE,
    LOWEST_LOG_PROB,
    STORE_FILE,
    RowTargets,
    TargetStore,
    TargetStoreWriter,
    bytes_per_token,
    check_description,
    decode_row,
    encode_row,
    row_key,
    stored_keys,
)


K = 4
# Batches of the uninterrupted store, and rows of a batch
WHOLE, ROWS = 3, 2
FINGERPRINT = {"proxy": "p1", "rows": "r1"}
FILES = ("part-00000.index", "part-00000.targets")


def make_row(seed, tokens=None, k=K, lowest=-20.0):
    generator = np.random.default_rng(seed)
    tokens = int(generator.integers(1, 9)) if tokens is None else tokens
    log_probs = -np.sort(generator.uniform(0, -lowest, (tokens, k)), axis=1).astype(np.float32)
    ids = generator.integers(0, 2**24, (tokens, k))
    return RowTargets(ids, log_probs, generator.uniform(-40, 0, tokens).astype(np.float32))


def make_batch(number, rows=ROWS, k=K):
    seeds = range(number * rows, (number + 1) * rows)
    return number, [row_key([seed], 0) for seed in seeds], [make_row(seed, k=k) for seed in seeds]


def write(folder, batches, part=0, k=K, fingerprint=FINGERPRINT):
    with TargetStoreWriter(folder, k, fingerprint, part=part) as writer:
        for batch in batches:
            writer.append(*make_batch(batch, k=k))


def resume(folder, batches):
    """Write those of `batches` that are missing; how many there were."""
    with TargetStoreWriter(folder, K, FINGERPRINT) as writer:
        missing = [batch for batch in batches if not set(make_batch(batch)[1]) <= stored_keys(folder)]
        for batch in missing:
            writer.append(*make_batch(batch))
    return len(missing)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in (*FILES, STORE_FILE)}


def assert_is(found, row):
    """A row that was read is the one that was written: log-probabilities up to their code."""
    assert found.ids.dtype == np.int64 and np.array_equal(found.ids, row.ids)
    assert found.label_log_probs.dtype == np.float32 and np.array_equal(found.label_log_probs, row.label_log_probs)
    assert found.log_probs.dtype == np.float32
    assert (np.abs(found.log_probs - row.log_probs) <= code_error(row.log_probs)).all()


def code_error(log_probs):
    """
    The largest error of a log-probability l: l = -24 c², c coded in steps of 1/65534, so that half a step moves l by
    24 (2 c h + h²), h = 0.5 / 65534. Float32 arithmetic adds a few units in the last place.
    """
    code = np.sqrt(np.minimum(-log_probs.astype(np.float64), -LOWEST_LOG_PROB) / -LOWEST_LOG_PROB)
    half = 0.5 / HIGHEST_CODE
    rounding = 4 * np.finfo(np.float32).eps * np.abs(log_probs)
    return -LOWEST_LOG_PROB * (2 * code * half + half**2) + rounding


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 2**32), st.sampled_from([-0.01, -1.0, -24.0, -30.0]))
def test_a_row_survives_coding(tokens, k, seed, lowest):
    row = make_row(seed, tokens, k, lowest)
    if k:
        row.ids[0, 0], row.ids[-1, -1], row.log_probs[0, 0] = 2**24 - 1, 0, 0.0
    data = encode_row(row)
    assert len(data) == tokens * bytes_per_token(k)
    found = decode_row(np.frombuffer(data, dtype=np.uint8), tokens, k)
    assert np.array_equal(found.ids, row.ids) and found.ids.shape == (tokens, k)
    assert np.array_equal(found.label_log_probs, row.label_log_probs)
    # What is below the lowest code is written as the lowest code: a probability of 4e-11
    wanted = np.maximum(row.log_probs, LOWEST_LOG_PROB).astype(np.float64)
    assert (np.abs(found.log_probs - wanted) <= code_error(wanted)).all()
    probs, found_probs = np.exp(row.log_probs.astype(np.float64)), np.exp(found.log_probs.astype(np.float64))
    coded = row.log_probs >= LOWEST_LOG_PROB
    assert (np.abs(found_probs / probs - 1)[coded] <= 4e-4).all()
    assert (np.abs(found_probs - probs) <= 4e-5).all()
    if k:
        assert found.log_probs[0, 0] == 0.0


def test_an_id_that_does_not_fit_is_refused():
    row = make_row(0, tokens=2)
    row.ids[1, 2] = 2**24
    with pytest.raises(TargetStoreError, match="16,777,216 does not fit"):
        encode_row(row)


@pytest.mark.parametrize("tokens", [30, 200])
def test_a_token_takes_at_most_60_bytes(tmp_path, tokens):
    with TargetStoreWriter(tmp_path, 10, FINGERPRINT) as writer:
        for batch in range(5):
            keys = [row_key([batch, i], 1) for i in range(8)]
            writer.append(batch, keys, [make_row(key % 1000, tokens, k=10) for key in keys])
    size = sum((tmp_path / name).stat().st_size for name in FILES)
    store = TargetStore(tmp_path)
    assert store.num_tokens == 40 * tokens and len(store) == 40
    assert size <= 60 * store.num_tokens
    assert size == 54 * store.num_tokens + 32 * len(store)


def test_rows_are_found_in_any_order(tmp_path):
    write(tmp_path, range(9))
    store = TargetStore(tmp_path)
    for seed in np.random.default_rng(0).permutation(18):
        assert_is(store[row_key([seed], 0)], make_row(seed))
    assert row_key([3], 0) in store and row_key([3], 1) not in store
    assert store.keys.tolist() == sorted(row_key([seed], 0) for seed in range(18))
    with pytest.raises(TargetStoreError, match="no targets in .* holds 18 rows"):
        store[row_key([18], 0)]


def test_log_likelihoods(tmp_path):
    write(tmp_path, range(6))
    keys, sums, tokens = TargetStore(tmp_path).log_likelihoods()
    rows = {row_key([seed], 0): make_row(seed).label_log_probs for seed in range(12)}
    assert keys.tolist() == sorted(rows) and sums.dtype == np.float64
    assert tokens.tolist() == [len(rows[key]) for key in keys]
    assert sums.tolist() == [rows[key].sum(dtype=np.float64) for key in keys]


def test_without_kept_tokens_the_likelihoods_stay(tmp_path):
    write(tmp_path, range(2), k=0)
    found = TargetStore(tmp_path)[row_key([3], 0)]
    assert found.ids.shape == (len(make_row(3).ids), 0)
    assert np.array_equal(found.label_log_probs, make_row(3, k=0).label_log_probs)


def test_rows_without_tokens(tmp_path):
    with TargetStoreWriter(tmp_path, K, FINGERPRINT) as writer:
        writer.append(0, [1], [make_row(0, tokens=0)])
    assert TargetStore(tmp_path)[1].ids.shape == (0, K)


def test_a_row_with_another_k_is_refused_and_nothing_is_written(tmp_path):
    with TargetStoreWriter(tmp_path, K, FINGERPRINT) as writer:
        writer.append(*make_batch(0))
        with pytest.raises(TargetStoreError, match="keeps 4 tokens per position and a row has 3"):
            writer.append(1, [1, 2], [make_row(1), make_row(2, k=3)])
        writer.append(*make_batch(1))
    write(tmp_path / "plain", range(2))
    assert contents(tmp_path) == contents(tmp_path / "plain")


def test_the_name_of_a_row():
    """Another token, another place where the answer begins, another length: another row."""
    ids = [5, 6, 7, 8]
    names = [row_key(ids, 2), row_key(ids, 1), row_key(ids, 3), row_key([5, 6, 7, 9], 2), row_key(ids[:3], 2)]
    names += [row_key([5, 6, 8, 7], 2), row_key([0, *ids], 2)]
    assert len(set(names)) == len(names)
    assert row_key(np.array(ids), 2) == names[0] and -(2**63) <= names[0] < 2**63
    # Part of the format: a store is read by other processes, years later
    assert row_key([1, 2, 3], 1) == -7607061949569868561


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_damaged_byte_is_an_error(tmp_path, place):
    write(tmp_path, range(6))
    path = tmp_path / FILES[1]
    data = bytearray(path.read_bytes())
    at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[place]
    data[at] ^= 1
    path.write_bytes(data)
    records = np.frombuffer((tmp_path / FILES[0]).read_bytes(), dtype=INDEX_DTYPE)
    damaged = int(records["key"][np.searchsorted(records["offset"], at, side="right") - 1])
    store = TargetStore(tmp_path)
    for seed in range(12):
        if row_key([seed], 0) == damaged:
            with pytest.raises(TargetStoreError, match="damaged.*Delete the folder"):
                store[damaged]
        else:
            assert_is(store[row_key([seed], 0)], make_row(seed))


def test_lost_bytes_are_an_error(tmp_path):
    write(tmp_path, range(2))
    (tmp_path / FILES[1]).write_bytes(b"")
    with pytest.raises(TargetStoreError, match="damaged"):
        TargetStore(tmp_path)[row_key([0], 0)]


@pytest.mark.parametrize(
    ("k", "changed", "named"),
    [
        (K, {"proxy": "p2"}, "stale (proxy: p1 there, p2 here)"),
        (K, {"proxy": "p2", "rows": "r2"}, "stale (proxy: p1 there, p2 here; rows: r1 there, r2 here)"),
        (9, {}, "stale (k: 4 there, 9 here)"),
        (K, {"seed": "3"}, "stale (seed: unknown there, 3 here)"),
        (K, {"rows": None}, "stale (rows: r1 there, unknown here)"),
    ],
    ids=["proxy", "proxy and rows", "k", "new name", "name gone"],
)
def test_a_stale_store_is_named_and_left_alone(tmp_path, k, changed, named):
    write(tmp_path, range(2))
    before = contents(tmp_path)
    fingerprint = {name: value for name, value in (FINGERPRINT | changed).items() if value is not None}
    for open_it in (lambda: TargetStoreWriter(tmp_path, k, fingerprint), lambda: check(tmp_path, k, fingerprint)):
        with pytest.raises(TargetStoreError) as error:
            open_it()
        assert named in str(error.value) and str(tmp_path) in str(error.value) and "Delete" in str(error.value)
    assert contents(tmp_path) == before
    check(tmp_path, K, FINGERPRINT)


def check(folder, k, fingerprint):
    check_description(folder, k, fingerprint)


def test_another_version_is_refused(tmp_path):
    write(tmp_path, range(1))
    path = tmp_path / STORE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    for open_it in (lambda: TargetStore(tmp_path), lambda: TargetStoreWriter(tmp_path, K, FINGERPRINT)):
        with pytest.raises(TargetStoreError, match="format 3; this version of trl-bbkd reads 2"):
            open_it()


def test_a_folder_without_a_store(tmp_path):
    with pytest.raises(TargetStoreError, match="store.json is missing"):
        TargetStore(tmp_path)


def test_parts_are_read_as_one(tmp_path):
    write(tmp_path, [0, 2, 4], part=0)
    write(tmp_path, [1, 3, 5], part=1)
    store = TargetStore(tmp_path)
    assert len(store) == 12 and stored_keys(tmp_path) == {row_key([seed], 0) for seed in range(12)}
    for seed in range(12):
        assert_is(store[row_key([seed], 0)], make_row(seed))
    (tmp_path / "part-00001.index").unlink()
    assert len(TargetStore(tmp_path)) == 6


def test_a_row_in_two_parts_counts_once(tmp_path):
    """A process was killed amid a batch, and the next run has fewer processes."""
    write(tmp_path, [0, 1], part=1)
    index = tmp_path / "part-00001.index"
    index.write_bytes(index.read_bytes()[: 3 * INDEX_DTYPE.itemsize])
    assert len(stored_keys(tmp_path)) == 2
    write(tmp_path, [1, 2], part=0)
    store = TargetStore(tmp_path)
    keys, sums, tokens = store.log_likelihoods()
    assert len(store) == len(set(keys)) == len(sums) == 6
    assert store.num_tokens == tokens.sum() == sum(len(make_row(seed).ids) for seed in range(6))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write(folder, range(WHOLE))
    return folder


def test_an_index_torn_anywhere_is_mended(uninterrupted, tmp_path):
    """For every length that a killed process may have left, writing goes on with the first batch that is not whole."""
    whole = contents(uninterrupted)
    batch_bytes = ROWS * INDEX_DTYPE.itemsize
    for length in range(len(whole[FILES[0]]) + 1):
        folder = tmp_path / str(length)
        shutil.copytree(uninterrupted, folder)
        os.truncate(folder / FILES[0], length)
        assert len(stored_keys(folder)) == length // batch_bytes * ROWS
        assert resume(folder, range(WHOLE)) == WHOLE - length // batch_bytes
        assert contents(folder) == whole
        shutil.rmtree(folder)


@pytest.mark.parametrize("batches", [0, 1, WHOLE])
def test_garbage_after_the_last_row_is_cut_off(uninterrupted, tmp_path, batches):
    """Rows are written before their index: those that the index does not have are written again."""
    write(tmp_path / "store", range(batches))
    with open(tmp_path / "store" / FILES[1], "ab") as file:
        file.write(os.urandom(777))
    assert resume(tmp_path / "store", range(WHOLE)) == WHOLE - batches
    assert contents(tmp_path / "store") == contents(uninterrupted)


def test_data_torn_anywhere_is_mended(uninterrupted, tmp_path):
    """After a power failure the index may be longer than the data: checksums tell which rows are whole."""
    whole = contents(uninterrupted)
    records = np.frombuffer(whole[FILES[0]], dtype=INDEX_DTYPE)
    ends = [0, *(records["offset"] + records["tokens"] * bytes_per_token(K))[ROWS - 1 :: ROWS].tolist()]
    for length in range(0, len(whole[FILES[1]]), 11):
        folder = tmp_path / str(length)
        shutil.copytree(uninterrupted, folder)
        os.truncate(folder / FILES[1], length)
        assert resume(folder, range(WHOLE)) == WHOLE - (np.searchsorted(ends, length, side="right") - 1)
        assert contents(folder) == whole
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_made_again(uninterrupted, tmp_path, name):
    """A process may be killed between making the two."""
    shutil.copytree(uninterrupted, tmp_path / "store")
    (tmp_path / "store" / name).unlink()
    assert resume(tmp_path / "store", range(WHOLE)) == WHOLE
    assert contents(tmp_path / "store") == contents(uninterrupted)


def test_a_torn_batch_is_noticed_even_where_numbers_repeat(tmp_path):
    """Batches of another run may have the same numbers."""
    with TargetStoreWriter(tmp_path, K, FINGERPRINT) as writer:
        for batch in (0, 1):
            _, keys, rows = make_batch(batch)
            writer.append(0, keys, rows)
    before = (tmp_path / FILES[0]).read_bytes()
    os.truncate(tmp_path / FILES[0], 3 * INDEX_DTYPE.itemsize)
    with TargetStoreWriter(tmp_path, K, FINGERPRINT) as writer:
        assert writer.rows_found == 2
        writer.append(0, *make_batch(1)[1:])
    assert (tmp_path / FILES[0]).read_bytes() == before


WRITER = """
import sys

from tests.soft_targets.test_store import FINGERPRINT, K, make_batch
from trl_bbkd.soft_targets.store import TargetStoreWriter, stored_keys

folder, batches = sys.argv[1], int(sys.argv[2])
with TargetStoreWriter(folder, K, FINGERPRINT) as writer:
    print("found", writer.rows_found, flush=True)
    done = stored_keys(folder)
    for number in range(batches):
        batch = make_batch(number)
        if not set(batch[1]) <= done:
            writer.append(*batch)
            print("written", number, flush=True)
"""
BATCHES = 150


def test_a_killed_writer_goes_on_where_it_was(tmp_path):
    def start(folder):
        command = [sys.executable, "-c", WRITER, str(folder), str(BATCHES)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    generator = np.random.default_rng()
    folder, found_before = tmp_path / "killed", 0
    prefix = dict.fromkeys(FILES, b"")
    for _ in range(3):
        process = start(folder)
        assert process.stdout.readline().split() == ["found", str(found_before)]
        # Whole batches that were there are not touched
        assert all((folder / name).read_bytes().startswith(prefix[name]) for name in FILES)
        for _ in range(int(generator.integers(1, 40))):
            process.stdout.readline()
        time.sleep(generator.uniform(0, 0.005))
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        found_before = len(stored_keys(folder))
        index = (folder / FILES[0]).read_bytes()[: found_before * INDEX_DTYPE.itemsize]
        size = int(np.frombuffer(index, dtype=INDEX_DTYPE)["tokens"].sum()) * bytes_per_token(K)
        prefix = {FILES[0]: index, FILES[1]: (folder / FILES[1]).read_bytes()[:size]}
    assert 0 < found_before < ROWS * BATCHES
    inodes = [(folder / name).stat().st_ino for name in FILES]
    process = start(folder)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert output.startswith(f"found {found_before}\n")
    assert output.count("written") == BATCHES - found_before // ROWS
    assert [(folder / name).stat().st_ino for name in FILES] == inodes
    write(tmp_path / "straight", range(BATCHES))
    assert contents(folder) == contents(tmp_path / "straight")


class KeyDataset:
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return self.store[int(self.store.keys[index])].ids


def test_a_worker_process_reads_the_store(uninterrupted):
    # Not above: the processes that are killed import this file and have no need of it
    from torch.utils.data import DataLoader

    store = TargetStore(uninterrupted)
    expected = [store[int(key)].ids for key in store.keys]
    assert len(pickle.dumps(store)) < 10_000
    found = list(DataLoader(KeyDataset(store), batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    assert len(found) == 6
    assert all(np.array_equal(ids, wanted) for ids, wanted in zip(found, expected, strict=True))


def test_pickles_do_not_carry_the_data(tmp_path):
    with TargetStoreWriter(tmp_path, K, FINGERPRINT) as writer:
        writer.append(0, [7], [make_row(0, tokens=50_000)])
    store = TargetStore(tmp_path)
    assert_is(store[7], make_row(0, tokens=50_000))
    data = pickle.dumps(store)
    assert len(data) < 10_000
    assert_is(pickle.loads(data)[7], make_row(0, tokens=50_000))
