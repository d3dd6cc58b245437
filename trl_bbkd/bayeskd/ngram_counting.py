"""Counting which token follows which context: out of core, in a table's files."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import NGramError
from .ngram_coding import CUMULATIVE_FILE, KEYS_FILE, TABLE_FILE, ContextCoding, check_ids, first_contexts


THREADS = 2
# What is coded and sorted at once stays in a CPU's cache
PIECE_TOKENS, BUCKET_KEYS = 2**17, 2**19
MOST_BUCKET_BITS = 16
# Bytes for each key of a bucket, with the buckets in work and those that wait for being written
WORK_BYTES = 256

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]


def write_counts(folder: Path, chunks: Chunks, coding: ContextCoding, num_tokens: int, memory_limit: int) -> dict:
    """
    Write the counts of a corpus to a table's files; their statistics. For the arguments and errors see
    [`~ngram.build_ngram_table`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TABLE_FILE, KEYS_FILE, CUMULATIVE_FILE):
        # Not overwritten: another process may have it open
        (folder / name).unlink(missing_ok=True)
    most = max(2**10, memory_limit // (2 * WORK_BYTES))
    bits = max(3, (num_tokens // min(BUCKET_KEYS, most)).bit_length(), coding.bucket_bits)
    bits = min(bits, MOST_BUCKET_BITS, coding.bits)
    runs = _Runs(folder / "runs.tmp", 2**bits, memory_limit // 2)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            pieces = _pieces(chunks, num_tokens, coding.context_length)
            for keys, bounds in _in_order(pool, lambda piece: _bucket_order(piece[0], piece[1], coding, bits), pieces):
                runs.append(keys, bounds)
            counted = _in_order(pool, lambda i: _count(runs.parts(i, most), coding), range(2**bits))
            return _write(folder, counted, 2 ** (bits - coding.bucket_bits))
    finally:
        runs.path.unlink(missing_ok=True)


class _Runs:
    """Keys in order of their working buckets, in runs: those beyond a limit in a temporary file."""

    def __init__(self, path: Path, buckets: int, limit: int):
        self.path, self.buckets, self.limit = path, buckets, limit
        self.held: list[tuple[np.ndarray, np.ndarray]] = []
        self.held_bytes = 0
        self.written: list[np.ndarray] = []

    def append(self, keys: np.ndarray, bounds: np.ndarray) -> None:
        """Take a run; `keys[bounds[i] : bounds[i + 1]]` are those of bucket i."""
        self.held.append((keys, bounds))
        self.held_bytes += keys.nbytes
        if self.held_bytes > self.limit:
            start = self.written[-1][-1] if self.written else 0
            with open(self.path, "ab" if start else "wb") as file:
                for i in range(self.buckets):
                    file.write(np.concatenate([keys[bounds[i] : bounds[i + 1]] for keys, bounds in self.held]))
            self.written.append(start + np.sum([bounds for _, bounds in self.held], axis=0))
            self.held, self.held_bytes = [], 0

    def parts(self, bucket: int, most: int) -> Iterator[np.ndarray]:
        """The keys of a bucket, in new arrays of not many more than `most`."""
        found, size = [], 0
        for keys, bounds in [*((None, bounds) for bounds in self.written), *self.held]:
            for start in range(bounds[bucket], bounds[bucket + 1], most):
                count = min(most, bounds[bucket + 1] - start)
                if keys is None:
                    found.append(np.fromfile(self.path, "<u8", count, offset=8 * start))
                else:
                    found.append(keys[start : start + count])
                size += count
                if size >= most:
                    yield np.concatenate(found)
                    found, size = [], 0
        if size:
            yield np.concatenate(found)


def _pieces(chunks: Chunks, num_tokens: int, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The corpus in pieces of whole answers: tokens in uint64, after n zeros, and lengths."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    waiting_tokens, seen = 0, 0

    def cut() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        tokens, lengths = waiting[0] if len(waiting) == 1 else map(np.concatenate, zip(*waiting, strict=True))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        bounds = np.searchsorted(ends, np.arange(0, len(tokens), PIECE_TOKENS))
        for first, last in zip(bounds, [*bounds[1:], len(lengths)], strict=True):
            piece = np.zeros(n + ends[last] - ends[first], dtype=np.uint64)
            piece[n:] = tokens[ends[first] : ends[last]]
            yield piece, lengths[first:last]

    for tokens, lengths in chunks:
        tokens, lengths = np.asarray(tokens), np.array(lengths, dtype=np.int64)
        if (lengths < 0).any() or lengths.sum() != len(tokens):
            raise NGramError(
                f"The answers' lengths sum to {lengths.sum():,} and there are {len(tokens):,} tokens: give the number "
                "of tokens of each answer."
            )
        if len(tokens) and tokens.dtype.kind not in "iu":
            raise NGramError(f"Token ids have to be integers, and are {tokens.dtype}: convert them.")
        # A copy of what waits: the caller may use its array again
        waiting.append((tokens if len(tokens) >= PIECE_TOKENS else tokens.astype(np.int64), lengths))
        seen += len(tokens)
        waiting_tokens += len(tokens)
        if waiting_tokens >= PIECE_TOKENS:
            yield from cut()
            waiting, waiting_tokens = [], 0
    if waiting_tokens:
        yield from cut()
    if not seen:
        raise NGramError("The corpus has no answers: there is nothing to count.")
    if seen != num_tokens:
        raise NGramError(f"The chunks hold {seen:,} tokens and num_tokens is {num_tokens:,}: make them equal.")


def _bucket_order(
    piece: np.ndarray, lengths: np.ndarray, coding: ContextCoding, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of a piece, in order of their buckets, and the buckets' bounds."""
    n, tokens = coding.context_length, piece[coding.context_length :]
    check_ids(tokens, coding.vocab_size)
    codes = coding.codes((piece[i : len(tokens) + i] for i in range(n)), len(tokens))
    positions, contexts = first_contexts(tokens, lengths, coding.vocab_size, n)
    codes[positions] = coding.codes(contexts.T, len(positions))
    # numpy sorts small integers by radix
    buckets = (codes >> np.uint64(64 - bits)).astype(np.uint8 if bits <= 8 else np.uint16)
    keys = coding.keys_(codes, tokens)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets.take(order), np.arange(2**bits).astype(buckets.dtype))
    return keys.take(order), np.append(bounds, len(keys))


def _count(parts: Iterable[np.ndarray], coding: ContextCoding) -> tuple[np.ndarray, np.ndarray, int, int]:
    """A bucket's different keys, what they count cumulatively, its contexts, and those seen once."""
    keys, bounds = np.zeros(0, dtype=np.uint64), np.zeros(1, dtype=np.int64)
    for part in parts:
        part.sort()
        part, part_bounds = _different(part)
        if len(keys):
            # Too large a bucket, because some context is frequent: its different keys are far fewer
            counts = np.concatenate([np.diff(bounds), np.diff(part_bounds)])
            both = np.concatenate([keys, part])
            order = np.argsort(both)
            part, same = _different(both[order])
            part_bounds = np.concatenate([[0], np.cumsum(counts[order])])[same]
        keys, bounds = part, part_bounds
    contexts, context_bounds = _different(keys >> np.uint64(coding.token_bits))
    seen_once = np.count_nonzero(np.diff(bounds[context_bounds]) == 1)
    return keys, bounds.astype(np.uint32), len(contexts), int(seen_once)


def _different(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of ascending values, and the bounds of the equal ones."""
    inner = np.flatnonzero(values[1:] != values[:-1])
    bounds = np.concatenate([[0], inner + 1, [len(values)]]) if len(values) else np.zeros(1, dtype=np.int64)
    return values.take(bounds[:-1]), bounds


def _write(folder: Path, counted: Iterable, together: int) -> dict:
    """Write the working buckets, of which some `together` are one of the table's; returns statistics."""
    num_pairs, tokens, contexts, seen_once, bucket_starts = 0, 0, 0, 0, []
    with open(folder / KEYS_FILE, "wb") as keys_file, open(folder / CUMULATIVE_FILE, "wb") as cumulative_file:
        for number, (keys, bounds, bucket_contexts, bucket_seen_once) in enumerate(counted):
            if number % together == 0:
                bucket_starts.append(num_pairs)
            bounds += np.uint32(tokens)
            keys_file.write(keys)
            cumulative_file.write(bounds[:-1])
            tokens = int(bounds[-1])
            num_pairs += len(keys)
            contexts += bucket_contexts
            seen_once += bucket_seen_once
        cumulative_file.write(np.uint32(tokens))
    statistics = {"num_contexts": contexts, "contexts_seen_once": seen_once}
    return statistics | {"bucket_starts": [*bucket_starts, num_pairs]}


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator:
    """Results in the order of the items, of which few are taken ahead."""
    futures: deque[Future] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > 2 * THREADS:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
