"""
Exact counts of "n previous tokens → next token" over a corpus of answers: built out of core, queried in batches.

Only tokens of answers count, and no context reaches into another answer: where there are fewer than n previous tokens,
start symbols stand in front, with the id `vocab_size`. A table is a folder:

    table.json        what it was made from, and statistics; written last: without it the table is not finished
    keys.u64          each different pair of context and next token as an integer, ascending within a bucket
    cumulative.u32    positions of the corpus that the pairs before each one count, and the number of all positions

A key is the code of the context and, in its lowest bits, the next token. What of a code does not fit is the number of
a bucket, of at most 1024. The bytes do not depend on the chunks, the memory limit or the threads.

A code has c bits: the n tokens themselves where they fit, scrambled one to one, and otherwise a hash. Among D contexts
two have the same hash with a probability of about D² / 2^(c + 1); their counts are then added. For 151,936 tokens, c is
56 and n up to 3 fits; for 100 million different contexts of 4 tokens the probability is 1/14.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


TABLE_FILE, MODEL_FILE, KEYS_FILE, CUMULATIVE_FILE = "table.json", "model.json", "keys.u64", "cumulative.u32"
FORMAT_VERSION = 1
MEMORY_LIMIT = 2 * 2**30
THREADS = 2
# What is coded, sorted and ordered at once stays in a CPU's cache
PIECE_TOKENS, BUCKET_KEYS, BLOCK_PAIRS = 2**17, 2**19, 2**18
MOST_BUCKET_BITS = 16
# Bytes for each key of a bucket, with the buckets in work and those that wait for being written
WORK_BYTES = 256
# Odd: a product modulo a power of two can be undone
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xBF58476D1CE4E5B9)

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]


class NGramError(ValueError):
    """Counts cannot be made or used as asked; the message says why and what to do."""


class _Coding:
    """Contexts as codes: 64-bit integers, evenly spread, of which the highest `bits` are used. Pairs as keys."""

    def __init__(self, vocab_size: int, context_length: int):
        self.vocab_size, self.context_length = vocab_size, context_length
        self.token_bits = vocab_size.bit_length()
        most, needed = min(64, 64 - self.token_bits + 10), context_length * self.token_bits
        self.exact, self.bits = needed <= most, min(needed, most)
        self.bucket_bits = max(0, self.bits + self.token_bits - 64)

    def codes(self, columns: Iterable[np.ndarray], size: int) -> np.ndarray:
        """Codes of `size` contexts, given as n arrays of uint64: the tokens furthest back, ..., the last tokens."""
        codes = np.zeros(size, dtype=np.uint64)
        for column in columns:
            if self.exact:
                codes <<= np.uint64(self.token_bits)
                codes |= column
            else:
                codes *= np.uint64(MULTIPLIERS[2])
                codes += column
        # One to one on so many bits; a product leaves them as the highest of the 64
        width = self.bits if self.exact else 64
        first, second = (np.uint64(multiplier << 64 - width & 2**64 - 1) for multiplier in MULTIPLIERS[:2])
        codes *= first
        codes ^= codes >> np.uint64((width + 1) // 2)
        codes >>= np.uint64(64 - width)
        codes *= second
        codes &= np.uint64(2**64 - 2 ** (64 - self.bits))
        return codes

    def keys_(self, codes: np.ndarray, next_ids: np.ndarray | np.uint64) -> np.ndarray:
        """Keys of pairs, less the bucket's bits. The codes are overwritten."""
        codes <<= np.uint64(self.bucket_bits)
        codes >>= np.uint64(64 - self.bits + self.bucket_bits - self.token_bits)
        codes |= next_ids
        return codes


class _Runs:
    """Keys in order of their working buckets, in runs: those beyond a limit in a temporary file."""

    def __init__(self, path: Path, buckets: int, limit: int):
        self.path, self.buckets, self.limit = path, buckets, limit
        self.held, self.held_bytes, self.written = [], 0, []

    def append(self, keys: np.ndarray, bounds: np.ndarray) -> None:
        """Take a run; `keys[bounds[i] : bounds[i + 1]]` are those of bucket i."""
        self.held.append((keys, bounds))
        self.held_bytes += keys.nbytes
        if self.held_bytes > self.limit:
            start = self.written[-1][-1] if self.written else 0
            with open(self.path, "ab" if start else "wb") as file:
                for i in range(self.buckets):
                    file.write(np.concatenate([keys[bounds[i] : bounds[i + 1]] for keys, bounds in self.held]))
            self.written.append(start + sum(bounds for _, bounds in self.held))
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


def build_ngram_table(
    folder: str | Path,
    chunks: Chunks,
    *,
    num_tokens: int,
    vocab_size: int,
    context_length: int,
    memory_limit: int = MEMORY_LIMIT,
    fingerprint: dict[str, str] | None = None,
) -> "NGramTable":
    """
    Count which tokens follow which `context_length` tokens: the counts of equation (1') of our reading of Bayes-KD
    (arXiv 2401.07013v1). Returns a [`NGramTable`].

    Args:
        folder (`str` or `Path`):
            Folder of the table. One that is not finished is built anew.
        chunks (`Iterable[tuple[np.ndarray, np.ndarray]]`):
            The corpus: of each chunk the tokens of its answers, one after the other, `(T,)` of integers, and the
            answers' lengths in tokens, `(A,)`.
        num_tokens (`int`):
            Tokens of all answers.
        vocab_size (`int`):
            Token ids are below it.
        context_length (`int`):
            n. With 0, single tokens are counted.
        memory_limit (`int`, *optional*, defaults to 2 GiB):
            Bytes to work in, not counting some 64 MiB and the longest answer. What does not fit into half of them, of
            8 bytes a token, is in a temporary file in the folder.
        fingerprint (`dict[str, str]`, *optional*):
            What the corpus depends on, by name. A finished table with the same one is not built again; with `None` it
            always is.

    Raises:
        [`NGramError`]: the corpus is empty, is not as described, or has an id outside the vocabulary; or the folder
        holds a finished table of something else.
    """
    folder, coding = Path(folder), _Coding(vocab_size, context_length)
    made_from = {"num_tokens": num_tokens, "vocab_size": vocab_size, "context_length": context_length}
    if _is_finished(folder / TABLE_FILE, made_from, fingerprint):
        return NGramTable(folder)
    if not (num_tokens < 2**32 and 0 < vocab_size < 2**32 and context_length >= 0):
        raise NGramError("Tokens and vocabulary have to be fewer than 2**32, and the context_length at least 0.")
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
            pieces = _pieces(chunks, num_tokens, context_length)
            for keys, bounds in _in_order(pool, lambda piece: _bucket_order(*piece, coding, bits), pieces):
                runs.append(keys, bounds)
            counted = _in_order(pool, lambda i: _count(runs.parts(i, most), coding), range(2**bits))
            statistics = _write(folder, counted, 2 ** (bits - coding.bucket_bits))
    finally:
        runs.path.unlink(missing_ok=True)
    _write_description(folder / TABLE_FILE, made_from | statistics, fingerprint)
    return NGramTable(folder)


def _pieces(chunks: Chunks, num_tokens: int, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The corpus in pieces of whole answers: tokens in uint64, after n zeros, and lengths."""
    waiting, waiting_tokens, seen = [], 0, 0

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


def _bucket_order(piece: np.ndarray, lengths: np.ndarray, coding: _Coding, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of a piece, in order of their buckets, and the buckets' bounds."""
    n, tokens = coding.context_length, piece[coding.context_length :]
    _check_ids(tokens, coding.vocab_size)
    codes = coding.codes((piece[i : len(tokens) + i] for i in range(n)), len(tokens))
    positions, contexts = _first_contexts(tokens, lengths, coding.vocab_size, n)
    codes[positions] = coding.codes(contexts.T, len(positions))
    # numpy sorts small integers by radix
    buckets = (codes >> np.uint64(64 - bits)).astype(np.uint8 if bits <= 8 else np.uint16)
    keys = coding.keys_(codes, tokens)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets.take(order), np.arange(2**bits).astype(buckets.dtype))
    return keys.take(order), np.append(bounds, len(keys))


def _count(parts: Iterable[np.ndarray], coding: _Coding) -> tuple[np.ndarray, np.ndarray, int, int]:
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


class NGramTable:
    """
    Reads a table that [`build_ngram_table`] wrote to `folder`. Its files are memory-mapped.

    Attributes:
        num_contexts, contexts_seen_once (`int`): different contexts, and those that occur once.
        singleton_share (`float`): share of the corpus's positions whose context occurs once: there the ratio says
            nothing.

    Raises:
        [`NGramError`]: the folder holds no finished table, one of another version, or one that is cut off.
    """

    def __init__(self, folder: str | Path):
        description = _read_description(Path(folder) / TABLE_FILE)
        self.context_length: int = description["context_length"]
        self.vocab_size: int = description["vocab_size"]
        self.num_tokens: int = description["num_tokens"]
        self.num_contexts: int = description["num_contexts"]
        self.contexts_seen_once: int = description["contexts_seen_once"]
        self.singleton_share = self.contexts_seen_once / self.num_tokens
        self._coding = _Coding(self.vocab_size, self.context_length)
        self._bucket_starts: list[int] = description["bucket_starts"]
        self._num_pairs = self._bucket_starts[-1]
        self._keys = _mapped(Path(folder) / KEYS_FILE, "<u8", self._num_pairs)
        self._cumulative = _mapped(Path(folder) / CUMULATIVE_FILE, "<u4", self._num_pairs + 1)

    def top(self, contexts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The most frequent next tokens after some contexts and their count ratios, (1') of our reading of Bayes-KD.

        Args:
            contexts (`np.ndarray`):
                `(Q, n)`, previous tokens, the last one last, and `vocab_size` where there is none.
            k (`int`):
                How many next tokens.

        Returns:
            `tuple`: ids, `(Q, k)` int64, the most frequent first, of equals the lowest; ratios, `(Q, k)` float64; and
            how often each context was seen, `(Q,)` int64. Where there are fewer than k, id and ratio are 0.

        Raises:
            [`NGramError`]: contexts of another length, or with ids above `vocab_size`.
        """
        return self._top(*self._find(contexts), k)

    def probability(self, contexts: np.ndarray, next_ids: np.ndarray) -> np.ndarray:
        """Count ratios of a token, `(Q,)`, after each context, `(Q, n)`: `(Q,)` float64, 0 where unseen. See `top`."""
        return self._probability(*self._find(contexts), next_ids)

    def _find(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first pair of each context, and the one after its last."""
        contexts = np.asarray(contexts)
        if contexts.ndim != 2 or contexts.shape[1] != self.context_length:
            raise NGramError(f"Contexts have to be of shape (Q, {self.context_length}), and are {contexts.shape}.")
        contexts = contexts.astype(np.uint64, order="F")
        _check_ids(contexts, self.vocab_size + 1)
        # Searched in order, neighbours have most of their way in common
        codes, inverse = np.unique(self._coding.codes(contexts.T, len(contexts)), return_inverse=True)
        buckets = codes >> np.uint64(64 - self._coding.bucket_bits)
        cuts = np.searchsorted(buckets, np.arange(len(self._bucket_starts), dtype=np.uint64))
        # Below all next tokens of a context, and above
        needles = self._coding.keys_(codes, np.uint64(0))[:, None]
        needles = np.append(needles, needles | np.uint64(2**self._coding.token_bits - 1), axis=1)
        found = np.empty(needles.shape, dtype=np.int64)
        for bucket in np.flatnonzero(np.diff(cuts)):
            part, start = slice(cuts[bucket], cuts[bucket + 1]), self._bucket_starts[bucket]
            keys = self._keys[start : self._bucket_starts[bucket + 1]]
            found[part] = start + np.searchsorted(keys, needles[part].ravel()).reshape(-1, 2)
        # All unseen ones alike
        found[found[:, 0] == found[:, 1]] = self._num_pairs
        return found[inverse, 0], found[inverse, 1]

    def _totals(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return (self._cumulative[last] - self._cumulative[first]).astype(np.int64)

    def _next_ids(self, pairs: np.ndarray) -> np.ndarray:
        return (self._keys[pairs] & np.uint64(2**self._coding.token_bits - 1)).astype(np.int64)

    def _top(self, first: np.ndarray, last: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, index, inverse = np.unique(first, return_index=True, return_inverse=True)
        totals, sizes = self._totals(first, last[index]), last[index] - first
        pairs = np.full((len(first), k), self._num_pairs)
        # Pairs are put in order as integers of context, count and number: so many contexts fit
        count_bits, number_bits = (int(values.max(initial=0)).bit_length() for values in (totals, sizes))
        ends, start = np.cumsum(sizes), 0
        while start < len(first):
            stop = int(np.searchsorted(ends, ends[start] - sizes[start] + BLOCK_PAIRS, side="right"))
            block = slice(start, min(max(stop, start + 1), start + 2 ** (64 - count_bits - number_bits)))
            self._most_frequent(pairs[block], first[block], sizes[block], count_bits, number_bits)
            start = block.stop
        there = pairs < self._num_pairs
        ids, counts = np.zeros((2, *pairs.shape), dtype=np.int64)
        ids[there] = self._next_ids(pairs[there])
        counts[there] = self._totals(pairs[there], pairs[there] + 1)
        return ids[inverse], (counts / np.maximum(totals, 1)[:, None])[inverse], totals[inverse]

    def _most_frequent(self, out, first, sizes, count_bits: int, number_bits: int) -> None:
        """Write the most frequent pairs of contexts into the rows of `out`, as far as there are any."""
        begins = np.cumsum(sizes) - sizes
        numbers = np.arange(sizes.sum()) - np.repeat(begins, sizes)
        pairs = np.repeat(first, sizes) + numbers
        # Ascending: the highest count first, then the lowest id
        order = np.repeat(np.arange(1, len(sizes) + 1) << count_bits, sizes) - self._totals(pairs, pairs + 1)
        order = (order.astype(np.uint64) << np.uint64(number_bits)) | numbers.astype(np.uint64)
        order.sort()
        wanted = np.arange(out.shape[1])
        there = wanted < sizes[:, None]
        chosen = order[(begins[:, None] + wanted)[there]] & np.uint64(2**number_bits - 1)
        out[there] = np.repeat(first, there.sum(axis=1)) + chosen.astype(np.int64)

    def _probability(self, first: np.ndarray, last: np.ndarray, next_ids: np.ndarray) -> np.ndarray:
        next_ids = np.asarray(next_ids)
        low, high = first.copy(), last.copy()
        searched = np.flatnonzero(low < high)
        while len(searched):
            middle = (low[searched] + high[searched]) // 2
            below = self._next_ids(middle) < next_ids[searched]
            low[searched[below]] = middle[below] + 1
            high[searched[~below]] = middle[~below]
            searched = searched[low[searched] < high[searched]]
        counts = np.zeros(len(first), dtype=np.int64)
        there = np.flatnonzero(low < last)
        there = there[self._next_ids(low[there]) == next_ids[there]]
        counts[there] = self._totals(low[there], low[there] + 1)
        return counts / np.maximum(self._totals(first, last), 1)


def build_ngram_model(
    folder: str | Path,
    make_chunks: Callable[[], Chunks],
    *,
    num_tokens: int,
    vocab_size: int,
    context_length: int,
    memory_limit: int = MEMORY_LIMIT,
    fingerprint: dict[str, str] | None = None,
) -> "NGramModel":
    """
    Build a table for each context length from `context_length` down to 0, each in a folder of its own within `folder`.
    With a fingerprint, those that were finished before an interruption are kept. Returns a [`NGramModel`].

    Args:
        make_chunks (`Callable`):
            Gives the chunks of the corpus from the first on; called once for each table. For the others see
            [`build_ngram_table`].

    Raises:
        [`NGramError`]: `context_length` is below 1; or what [`build_ngram_table`] raises.
    """
    if context_length < 1:
        raise NGramError(f"A context_length of {context_length} leaves no context: it has to be at least 1.")
    path, shared = Path(folder) / MODEL_FILE, {"num_tokens": num_tokens, "vocab_size": vocab_size}
    made_from = shared | {"context_length": context_length}
    if not _is_finished(path, made_from, fingerprint):
        path.unlink(missing_ok=True)
        shared |= {"memory_limit": memory_limit, "fingerprint": fingerprint}
        for n in range(context_length, -1, -1):
            build_ngram_table(path.with_name(f"context-{n}"), make_chunks(), context_length=n, **shared)
        _write_description(path, made_from, fingerprint)
    return NGramModel(folder)


class NGramModel:
    """
    Count ratios with backing off: a context seen too rarely is replaced by its last n - 1 tokens, and so on, down to
    none. With `min_count=1` no context of the corpus is: that is equation (1') of our reading of Bayes-KD.

    Attributes:
        tables (`list[NGramTable]`): what [`build_ngram_model`] wrote to `folder`, the longest contexts first.

    Raises:
        [`NGramError`]: the folder holds no finished model.
    """

    def __init__(self, folder: str | Path):
        description = _read_description(Path(folder) / MODEL_FILE)
        self.context_length: int = description["context_length"]
        self.vocab_size: int = description["vocab_size"]
        self.num_tokens: int = description["num_tokens"]
        self.tables = [NGramTable(Path(folder) / f"context-{n}") for n in range(self.context_length, -1, -1)]

    @property
    def singleton_share(self) -> float:
        """That of the table of the longest contexts."""
        return self.tables[0].singleton_share

    def top(self, contexts: np.ndarray, k: int, min_count: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As [`NGramTable.top`], for the longest end of each context that was seen at least `min_count` times."""
        ids, probs = np.zeros((len(contexts), k), dtype=np.int64), np.zeros((len(contexts), k))
        totals = np.zeros(len(contexts), dtype=np.int64)
        for table, where, first, last in self._back_off(contexts, min_count):
            ids[where], probs[where], totals[where] = table._top(first, last, k)
        return ids, probs, totals

    def probability(self, contexts: np.ndarray, next_ids: np.ndarray, min_count: int = 1) -> np.ndarray:
        """As [`NGramTable.probability`], for the longest end of each context seen at least `min_count` times."""
        next_ids, probs = np.asarray(next_ids), np.zeros(len(contexts))
        for table, where, first, last in self._back_off(contexts, min_count):
            probs[where] = table._probability(first, last, next_ids[where])
        return probs

    def _back_off(self, contexts: np.ndarray, min_count: int) -> Iterator[tuple]:
        """For each table, which contexts it answers for, and their pairs."""
        if min_count < 1:
            raise NGramError(
                f"A min_count of {min_count} keeps contexts that were never seen: it has to be at least 1."
            )
        contexts, where = np.asarray(contexts), np.arange(len(contexts))
        for table in self.tables:
            first, last = table._find(contexts[where, self.context_length - table.context_length :])
            taken = (table._totals(first, last) >= min_count) | (table.context_length == 0)
            yield table, where[taken], first[taken], last[taken]
            where = where[~taken]


def answer_contexts(tokens: np.ndarray, lengths: np.ndarray, context_length: int, vocab_size: int) -> np.ndarray:
    """
    The contexts of all tokens of some answers, `(T, n)` int64: the n tokens before each one, the last one last, with
    `vocab_size` where there is none. Tokens are `(T,)`, the answers one after the other; their lengths, `(A,)`.
    """
    tokens, lengths = np.asarray(tokens, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    padded = np.concatenate([np.zeros(context_length, dtype=np.int64), tokens])
    contexts = np.empty((len(tokens), context_length), dtype=np.int64)
    for i in range(context_length):
        contexts[:, i] = padded[i : len(tokens) + i]
    positions, first = _first_contexts(tokens, lengths, vocab_size, context_length)
    contexts[positions] = first
    return contexts


def _first_contexts(tokens, lengths, vocab_size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions with fewer than n previous tokens, and their contexts, `(P, n)`."""
    offsets = np.arange(n)
    answers, before = np.nonzero(offsets < lengths[:, None])
    positions = (np.cumsum(lengths) - lengths)[answers] + before
    back = np.arange(n, 0, -1)
    contexts = tokens[np.maximum(positions[:, None] - back, 0)]
    contexts[back > before[:, None]] = vocab_size
    return positions, contexts


def _check_ids(ids: np.ndarray, limit: int) -> None:
    # As unsigned integers, negative ones are large
    if (highest := ids.max(initial=0)) >= limit:
        shown = highest.astype(np.int64)
        raise NGramError(f"Token id {shown:,} is not below {limit:,}: give the vocab_size of the tokenizer.")


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator:
    """Results in the order of the items, of which few are taken ahead."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > 2 * THREADS:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _is_finished(path: Path, made_from: dict[str, int], fingerprint: dict[str, str] | None) -> bool:
    """Whether there is what would be built. Raises [`NGramError`] if there is something else."""
    if fingerprint is None or not path.is_file():
        return False
    description = _read_description(path)
    found = {name: description[name] for name in made_from} | description["fingerprint"]
    wanted = made_from | fingerprint
    if differing := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
        raise NGramError(
            f"The n-gram counts in {path.parent} were made from something else: {', '.join(differing)} differ. Delete "
            "the folder, and they are made again."
        )
    return True


def _read_description(path: Path) -> dict:
    description = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if description.get("version") != FORMAT_VERSION:
        raise NGramError(
            f"{path.parent} holds no finished n-gram counts of format {FORMAT_VERSION}, as {path.name} would say: "
            "delete the folder, and build them."
        )
    return description


def _write_description(path: Path, description: dict, fingerprint: dict[str, str] | None) -> None:
    description = {"version": FORMAT_VERSION} | description | {"fingerprint": fingerprint or {}}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(description) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    if not path.is_file() or path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise NGramError(f"{path} has not the size it was written with: delete the folder, and it is made again.")
    # A plain array: every access to a memmap makes a new one
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
