"""
Soft targets on disk: for each token of a row the most likely tokens of a proxy, and its likelihood of the row.

A store is a folder:

    store.json          what it was made from and how it is coded
    part-00000.index    32 bytes a row: key, offset, tokens, checksum, batch
    part-00000.targets  the rows, one after the other

Each process that writes has a part of its own. A batch of rows is appended to `.targets`, and only then, in one write,
to `.index`: whatever a killed process leaves after its last whole batch is cut off when writing goes on, so that the
files end as if it had not been killed.

A row of T tokens is T float32 log-probabilities of the teacher's tokens, then T·k ids in 3 bytes and T·k
log-probabilities in 2 bytes each: 54 bytes a token for k = 10. Codes are finest near probability 1:
`log p = -24 (code / 65534)²`, and 65535 is probability 0: a target of fewer than k tokens has such entries at its end.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import TargetStoreError
from ..host.files import write_atomically


STORE_FILE = "store.json"
FORMAT_VERSION = 2
INDEX_DTYPE = np.dtype(
    [
        ("key", "<i8"),
        ("offset", "<u8"),
        ("tokens", "<u4"),
        ("checksum", "<u4"),
        ("batch", "<u4"),
        ("batch_rows", "<u4"),
    ]
)
LOWEST_LOG_PROB = -24.0
HIGHEST_CODE, NOTHING = 65534, 65535
ID_BYTES = 3


class RowTargets(NamedTuple):
    """
    Soft targets of one row of T answer tokens.

    Args:
        ids (`np.ndarray`):
            `(T, k)` int64, the most likely tokens, the likeliest first.
        log_probs (`np.ndarray`):
            `(T, k)` float32, their log-probabilities under the whole distribution; -inf where there are fewer than k.
        label_log_probs (`np.ndarray`):
            `(T,)` float32, the log-probability of the row's own tokens.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    label_log_probs: np.ndarray


def row_key(input_ids: Iterable[int], prompt_length: int) -> int:
    """The name of a row in a store: a hash of its tokens and of where the answer begins, as a signed 64-bit integer."""
    digest = hashlib.blake2b(np.asarray(input_ids, dtype="<i4").tobytes(), digest_size=8, key=b"%d" % prompt_length)
    return int.from_bytes(digest.digest(), "little", signed=True)


def encode_row(targets: RowTargets) -> bytes:
    """The bytes of a row. Raises [`TargetStoreError`] for an id that does not fit into its bytes."""
    if targets.ids.size and targets.ids.max() >= 1 << 8 * ID_BYTES:
        raise TargetStoreError(
            f"Token id {targets.ids.max():,} does not fit into the {ID_BYTES} bytes of a stored id."
        )
    ids = np.ascontiguousarray(targets.ids, dtype="<u4")
    planes = ids.view(np.uint8).reshape(*ids.shape, 4)[..., :ID_BYTES]
    log_probs = targets.log_probs.astype(np.float64)
    scaled = np.clip(log_probs, LOWEST_LOG_PROB, 0.0) / LOWEST_LOG_PROB
    codes = np.where(np.isneginf(log_probs), NOTHING, np.rint(HIGHEST_CODE * np.sqrt(scaled))).astype("<u2")
    labels = np.asarray(targets.label_log_probs, dtype="<f4")
    return labels.tobytes() + planes.tobytes() + codes.tobytes()


def decode_row(data: np.ndarray, tokens: int, k: int) -> RowTargets:
    """What [`encode_row`] wrote, from an array of bytes."""
    first, second = 4 * tokens, 4 * tokens + ID_BYTES * tokens * k
    planes = data[first:second].reshape(tokens, k, ID_BYTES)
    ids = np.zeros((tokens, k, 4), dtype=np.uint8)
    ids[..., :ID_BYTES] = planes
    codes = np.frombuffer(data[second:], dtype="<u2").reshape(tokens, k).astype(np.float32)
    log_probs = LOWEST_LOG_PROB * np.square(codes / np.float32(HIGHEST_CODE))
    log_probs[codes == NOTHING] = -np.inf
    return RowTargets(
        ids.view("<u4")[..., 0].astype(np.int64), log_probs, np.frombuffer(data[:first], dtype="<f4").copy()
    )


class TargetStoreWriter:
    """
    Writes a store, or goes on with one that was begun. Use as a context manager.

    Args:
        folder (`str` or `Path`):
            Folder of the store.
        k (`int`):
            Tokens kept per position; with 0 only the likelihood of the row's own tokens is kept.
        fingerprint (`dict[str, str]`):
            What the targets depend on, by name.
        part (`int`, *optional*, defaults to `0`):
            Number of this process.

    Raises:
        [`TargetStoreError`]: the folder holds a store with another fingerprint or `k`.
    """

    def __init__(self, folder: str | Path, k: int, fingerprint: dict[str, str], part: int = 0):
        self.folder, self.k = Path(folder), k
        description = {"version": FORMAT_VERSION, "k": k, "fingerprint": fingerprint}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / STORE_FILE).is_file():
            check_description(self.folder, k, fingerprint)
        elif part == 0:
            write_atomically(self.folder / STORE_FILE, json.dumps(description, indent=2) + "\n")
        self._index_path = self.folder / f"part-{part:05d}.index"
        self._data_path = self._index_path.with_suffix(".targets")
        whole_rows, whole_bytes = _cut_to_whole_batches(self._index_path, self._data_path, k)
        self.rows_found = whole_rows
        self._data = open(self._data_path, "ab")
        self._index = open(self._index_path, "ab")
        self._offset = whole_bytes

    def __enter__(self) -> "TargetStoreWriter":
        return self

    def __exit__(self, *_) -> None:
        self._index.close()
        self._data.close()

    def append(self, batch: int, keys: list[int], rows: list[RowTargets]) -> None:
        """
        Append a batch of rows. When this returns they are on disk, whatever happens to the process.

        Args:
            batch (`int`):
                Number of the batch.
            keys (`list[int]`):
                [`row_key`] of each row.
            rows (`list[RowTargets]`):
                Their targets.

        Raises:
            [`TargetStoreError`]: a row has another number of tokens per position than the store.
        """
        for row in rows:
            if row.ids.shape[1] != self.k:
                raise TargetStoreError(
                    f"The store keeps {self.k} tokens per position and a row has {row.ids.shape[1]}: k may be at most the "
                    "size of the vocabulary."
                )
        records = np.zeros(len(rows), dtype=INDEX_DTYPE)
        for position, (key, row) in enumerate(zip(keys, rows, strict=True)):
            data = encode_row(row)
            tokens = len(row.label_log_probs)
            records[position] = (key, self._offset, tokens, zlib.crc32(data), batch, len(rows))
            self._data.write(data)
            self._offset += len(data)
        _flush(self._data)
        self._index.write(records.tobytes())
        _flush(self._index)


class TargetStore:
    """
    Reads a store. Rows are memory-mapped: only what is asked for is read, and each row is compared with its checksum.

    Args:
        folder (`str` or `Path`):
            Folder of the store.

    Raises:
        [`TargetStoreError`]: there is no store, or it is of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        description = read_description(self.folder)
        self.k: int = description["k"]
        self.fingerprint: dict[str, str] = description["fingerprint"]
        found_records, found_parts = [], []
        for number, path in enumerate(_index_files(self.folder)):
            found = _read_index(path)
            found_records.append(found)
            found_parts.append(np.full(len(found), number))
        records = np.concatenate(found_records) if found_records else np.zeros(0, dtype=INDEX_DTYPE)
        parts = np.concatenate(found_parts) if found_parts else np.zeros(0, dtype=np.int64)
        # A row may be in two parts: of a killed process's last batch, and of the process that made up for it
        _, order = np.unique(records["key"], return_index=True)
        self._records, self._parts = records[order], parts[order]
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: int) -> bool:
        return self._find(key) is not None

    def __getstate__(self) -> dict:
        # A worker process maps the files itself
        return self.__dict__ | {"_maps": None}

    @property
    def keys(self) -> np.ndarray:
        """Keys of the rows, ascending."""
        return self._records["key"]

    @property
    def num_tokens(self) -> int:
        return int(self._records["tokens"].sum())

    def __getitem__(self, key: int) -> RowTargets:
        """
        Targets of a row.

        Raises:
            [`TargetStoreError`]: the row is not in the store, or its bytes have changed.
        """
        position = self._find(key)
        if position is None:
            raise TargetStoreError(
                f"A row of the data has no targets in {self.folder}, which holds {len(self)} rows. The store was made "
                "from other rows or another tokenizer: delete the folder, and its targets are computed again."
            )
        return self._read(position)

    def log_likelihoods(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row, in the order of `keys`: key, log-likelihood under the proxy (float64, nats), and tokens."""
        sums = np.array([self._read(i).label_log_probs.sum(dtype=np.float64) for i in range(len(self))])
        return self.keys.copy(), sums, self._records["tokens"].astype(np.int64)

    def _find(self, key: int) -> int | None:
        position = int(np.searchsorted(self.keys, key))
        return position if position < len(self) and self.keys[position] == key else None

    def _read(self, position: int) -> RowTargets:
        if self._maps is None:
            self._maps = [_mapped(path.with_suffix(".targets")) for path in _index_files(self.folder)]
        record = self._records[position]
        start, tokens = int(record["offset"]), int(record["tokens"])
        data = np.asarray(self._maps[self._parts[position]][start : start + tokens * bytes_per_token(self.k)])
        if zlib.crc32(data) != record["checksum"]:
            raise TargetStoreError(
                f"A row of {self.folder} is damaged: its bytes do not have the checksum they were written with. Delete "
                "the folder, and its targets are computed again."
            )
        return decode_row(data, tokens, self.k)


def bytes_per_token(k: int) -> int:
    """Bytes of a token's targets on disk."""
    return 4 + k * (ID_BYTES + 2)


def read_description(folder: Path) -> dict:
    """`store.json`. Raises [`TargetStoreError`] where there is none or it is of another version."""
    path = folder / STORE_FILE
    if not path.is_file():
        raise TargetStoreError(f"{folder} is no store of soft targets: {STORE_FILE} is missing.")
    description = json.loads(path.read_text(encoding="utf-8"))
    if description["version"] != FORMAT_VERSION:
        raise TargetStoreError(
            f"{folder} is a store of format {description['version']}; this version of trl-bbkd reads "
            f"{FORMAT_VERSION}. Delete the folder, and its targets are computed again."
        )
    return description


def check_description(folder: str | Path, k: int, fingerprint: dict[str, str]) -> None:
    """
    Compare a store with what is asked of it.

    Raises:
        [`TargetStoreError`]: `k` or a part of the fingerprint differs. The message names it.
    """
    description = read_description(Path(folder))
    found, wanted = {"k": description["k"], **description["fingerprint"]}, {"k": k, **fingerprint}
    differing = [
        f"{name}: {found.get(name, 'unknown')} there, {wanted.get(name, 'unknown')} here"
        for name in [*wanted, *(name for name in found if name not in wanted)]
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise TargetStoreError(
            f"The soft targets in {folder} are stale ({'; '.join(differing)}). Delete that folder to compute them again, "
            "or choose another one."
        )


def stored_keys(folder: str | Path) -> set[int]:
    """Keys of the rows of all batches that were written to their end."""
    return {int(key) for path in _index_files(Path(folder)) for key in _whole_records(_read_index(path))["key"]}


def _index_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.index"))


def _read_index(path: Path) -> np.ndarray:
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) - len(data) % INDEX_DTYPE.itemsize], dtype=INDEX_DTYPE)


def _mapped(path: Path) -> np.ndarray:
    # An empty file cannot be mapped
    return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.uint8)


def _whole_records(records: np.ndarray) -> np.ndarray:
    """The records up to the end of the last whole batch; batches follow one another without a gap."""
    end = 0
    while end < len(records) and 0 < (rows := int(records["batch_rows"][end])) <= len(records) - end:
        end += rows
    return records[:end]


def _cut_to_whole_batches(index: Path, data: Path, k: int) -> tuple[int, int]:
    """Cut off what a killed process left after its last whole and undamaged batch; rows and bytes that stay."""
    if not index.is_file() or not data.is_file():
        for path in (index, data):
            path.unlink(missing_ok=True)
        return 0, 0
    records = _whole_records(_read_index(index))
    records = records[: _undamaged(records, data, k)]
    records = _whole_records(records)
    size = int(records["tokens"].astype(np.int64).sum()) * bytes_per_token(k)
    for path, length in ((index, records.nbytes), (data, size)):
        with open(path, "r+b") as file:
            file.truncate(length)
    return len(records), size


def _undamaged(records: np.ndarray, data: Path, k: int) -> int:
    """How many rows from the first on have the bytes their checksum promises."""
    with open(data, "rb") as file:
        for number, record in enumerate(records):
            if zlib.crc32(file.read(int(record["tokens"]) * bytes_per_token(k))) != record["checksum"]:
                return number
    return len(records)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
