"""Contexts of tokens as integers, and the files that say what counts were made from."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import NGramError
from ..host.files import write_atomically


TABLE_FILE, MODEL_FILE, KEYS_FILE, CUMULATIVE_FILE = "table.json", "model.json", "keys.u64", "cumulative.u32"
FORMAT_VERSION = 1
# Odd: a product modulo a power of two can be undone
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xBF58476D1CE4E5B9)


class ContextCoding:
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
    positions, first = first_contexts(tokens, lengths, vocab_size, context_length)
    contexts[positions] = first
    return contexts


def first_contexts(tokens, lengths, vocab_size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions with fewer than n previous tokens, and their contexts, `(P, n)`."""
    offsets = np.arange(n)
    answers, before = np.nonzero(offsets < lengths[:, None])
    positions = (np.cumsum(lengths) - lengths)[answers] + before
    back = np.arange(n, 0, -1)
    contexts = tokens[np.maximum(positions[:, None] - back, 0)]
    contexts[back > before[:, None]] = vocab_size
    return positions, contexts


def check_ids(ids: np.ndarray, limit: int) -> None:
    # As unsigned integers, negative ones are large
    if (highest := ids.max(initial=0)) >= limit:
        shown = highest.astype(np.int64)
        raise NGramError(f"Token id {shown:,} is not below {limit:,}: give the vocab_size of the tokenizer.")


def is_finished(path: Path, made_from: dict[str, int], fingerprint: dict[str, str] | None) -> bool:
    """Whether there is what would be built. Raises [`NGramError`] if there is something else."""
    if fingerprint is None or not path.is_file():
        return False
    description = read_description(path)
    found = {name: description[name] for name in made_from} | description["fingerprint"]
    wanted = made_from | fingerprint
    if differing := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
        raise NGramError(
            f"The n-gram counts in {path.parent} were made from something else: {', '.join(differing)} differ. Delete "
            "the folder, and they are made again."
        )
    return True


def read_description(path: Path) -> dict:
    description = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if description.get("version") != FORMAT_VERSION:
        raise NGramError(
            f"{path.parent} holds no finished n-gram counts of format {FORMAT_VERSION}, as {path.name} would say: "
            "delete the folder, and build them."
        )
    return description


def write_description(path: Path, description: dict, fingerprint: dict[str, str] | None) -> None:
    description = {"version": FORMAT_VERSION} | description | {"fingerprint": fingerprint or {}}
    write_atomically(path, json.dumps(description) + "\n")
