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
two have the same hash with a probability of about D² / 2^(c + 1); their counts are then added. For 151,936 tokens, c
is 56 and n up to 3 fits; for 100 million different contexts of 4 tokens the probability is 1/14.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NGramError
from .ngram_coding import (
    CUMULATIVE_FILE,
    KEYS_FILE,
    MODEL_FILE,
    TABLE_FILE,
    ContextCoding,
    answer_contexts,
    check_ids,
    is_finished,
    read_description,
    write_description,
)
from .ngram_counting import Chunks, write_counts


__all__ = ["NGramError", "NGramModel", "NGramTable", "answer_contexts", "build_ngram_model", "build_ngram_table"]

MEMORY_LIMIT = 2 * 2**30
# What is ordered at once stays in a CPU's cache
BLOCK_PAIRS = 2**18


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
    folder, coding = Path(folder), ContextCoding(vocab_size, context_length)
    made_from = {"num_tokens": num_tokens, "vocab_size": vocab_size, "context_length": context_length}
    if is_finished(folder / TABLE_FILE, made_from, fingerprint):
        return NGramTable(folder)
    if not (num_tokens < 2**32 and 0 < vocab_size < 2**32 and context_length >= 0):
        raise NGramError("Tokens and vocabulary have to be fewer than 2**32, and the context_length at least 0.")
    statistics = write_counts(folder, chunks, coding, num_tokens, memory_limit)
    write_description(folder / TABLE_FILE, made_from | statistics, fingerprint)
    return NGramTable(folder)


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
        description = read_description(Path(folder) / TABLE_FILE)
        self.context_length: int = description["context_length"]
        self.vocab_size: int = description["vocab_size"]
        self.num_tokens: int = description["num_tokens"]
        self.num_contexts: int = description["num_contexts"]
        self.contexts_seen_once: int = description["contexts_seen_once"]
        self.singleton_share = self.contexts_seen_once / self.num_tokens
        self._coding = ContextCoding(self.vocab_size, self.context_length)
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
        check_ids(contexts, self.vocab_size + 1)
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
    path = Path(folder) / MODEL_FILE
    shared: dict[str, Any] = {"num_tokens": num_tokens, "vocab_size": vocab_size}
    made_from = shared | {"context_length": context_length}
    if not is_finished(path, made_from, fingerprint):
        path.unlink(missing_ok=True)
        shared |= {"memory_limit": memory_limit, "fingerprint": fingerprint}
        for n in range(context_length, -1, -1):
            build_ngram_table(path.with_name(f"context-{n}"), make_chunks(), context_length=n, **shared)
        write_description(path, made_from, fingerprint)
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
        description = read_description(Path(folder) / MODEL_FILE)
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


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    if not path.is_file() or path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise NGramError(f"{path} has not the size it was written with: delete the folder, and it is made again.")
    # A plain array: every access to a memmap makes a new one
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
