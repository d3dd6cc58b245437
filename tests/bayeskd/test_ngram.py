import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.bayeskd import ngram
from trl_bbkd.bayeskd.ngram import (
    NGramError,
    NGramModel,
    NGramTable,
    answer_contexts,
    build_ngram_model,
    build_ngram_table,
)


FILES = ("table.json", "keys.u64", "cumulative.u32")
HASHED_VOCAB = 151936
FINGERPRINT = {"corpus": "c1", "tokenizer": "t1"}


def reference_counts(answers, n, vocab_size):
    counts = defaultdict(Counter)
    for answer in answers:
        padded = [vocab_size] * n + list(answer)
        for position, token in enumerate(answer):
            counts[tuple(padded[position : position + n])][token] += 1
    return counts


def reference_top(counter, k):
    total = sum(counter.values())
    best = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:k]
    padding = [0] * (k - len(best))
    return [token for token, _ in best] + padding, [count / total for _, count in best] + padding, total


def as_chunks(answers, answers_per_chunk=None, dtype=np.int64):
    size = answers_per_chunk or max(1, len(answers))
    for start in range(0, len(answers), size):
        part = answers[start : start + size]
        yield np.array([token for answer in part for token in answer], dtype=dtype), np.array([len(a) for a in part])


def build(folder, answers, n, vocab_size, answers_per_chunk=None, dtype=np.int64, **kwargs):
    settings = {"num_tokens": sum(map(len, answers)), "vocab_size": vocab_size, "context_length": n} | kwargs
    return build_ngram_table(folder, as_chunks(answers, answers_per_chunk, dtype), **settings)


def build_model(folder, answers, n, vocab_size, **kwargs):
    settings = {"num_tokens": sum(map(len, answers)), "vocab_size": vocab_size, "context_length": n} | kwargs
    return build_ngram_model(folder, lambda: as_chunks(answers), **settings)


def corpus(seed, tokens, vocab_size, answer_length=50, concentration=0.3):
    """Random answers in which contexts come back: low ids are frequent."""
    generator = np.random.default_rng(seed)
    ids = np.minimum(generator.geometric(concentration, tokens) - 1, vocab_size - 1)
    lengths = generator.integers(0, 2 * answer_length, tokens)
    ends = np.minimum(np.cumsum(lengths), tokens)
    return [answer.tolist() for answer in np.split(ids, ends[: np.searchsorted(ends, tokens) + 1])]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def as_contexts(keys, n):
    return np.array(list(keys), dtype=np.int64).reshape(len(keys), n)


def check_against_reference(table, answers, n, vocab_size, k=3):
    counts = reference_counts(answers, n, vocab_size)
    contexts = as_contexts(counts, n)
    ids, probs, totals = table.top(contexts, k)
    for row, counter in enumerate(counts.values()):
        assert (ids[row].tolist(), probs[row].tolist(), totals[row]) == reference_top(counter, k)
    pairs = [(context, token, count) for context, counter in counts.items() for token, count in counter.items()]
    found = table.probability(as_contexts([pair[0] for pair in pairs], n), np.array([pair[1] for pair in pairs]))
    assert found.tolist() == [count / sum(counts[context].values()) for context, _, count in pairs]
    once = sum(sum(counter.values()) == 1 for counter in counts.values())
    assert (table.num_contexts, table.contexts_seen_once) == (len(counts), once)
    assert table.num_tokens == sum(map(len, answers)) and table.singleton_share == once / table.num_tokens
    assert (table.context_length, table.vocab_size) == (n, vocab_size)


# With ids of 1 to 18 bits; of the last vocabulary, contexts of more than 3 tokens are hashed
corpora = st.sampled_from([1, 3, 7, 300, HASHED_VOCAB]).flatmap(
    lambda vocab_size: st.tuples(
        st.just(vocab_size),
        st.lists(
            # A few ids, so that contexts come back; the last one is a neighbour of the start symbol
            st.lists(st.sampled_from(sorted({0, vocab_size // 2, vocab_size - 1})), max_size=8),
            min_size=1,
            max_size=12,
        ).filter(any),
    )
)


class TestAgainstPlainCounts:
    @settings(max_examples=120, deadline=None)
    @given(corpora, st.integers(0, 5), st.integers(1, 12), st.sampled_from([np.int64, np.int32, np.uint32]))
    def test_random_corpora(self, tmp_path_factory, vocab_and_answers, n, answers_per_chunk, dtype):
        vocab_size, answers = vocab_and_answers
        folder = tmp_path_factory.mktemp("table")
        table = build(folder, answers, n, vocab_size, answers_per_chunk, dtype)
        check_against_reference(table, answers, n, vocab_size)

    @pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
    @pytest.mark.parametrize("vocab_size", [40, 50000, HASHED_VOCAB])
    def test_more_tokens(self, tmp_path, n, vocab_size):
        answers = corpus(n, 5000, vocab_size, concentration=0.05)
        check_against_reference(build(tmp_path, answers, n, vocab_size), answers, n, vocab_size, k=5)

    @pytest.mark.parametrize("n, vocab_size", [(40, 3), (70, 1), (8, 600), (2, 2**31)])
    def test_contexts_that_do_not_fit(self, tmp_path, n, vocab_size):
        assert not ngram._Coding(vocab_size, n).exact
        answers = corpus(1, 1500, vocab_size, answer_length=100)
        check_against_reference(build(tmp_path, answers, n, vocab_size), answers, n, vocab_size)

    def test_corpus_of_many_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ngram, "PIECE_TOKENS", 64)
        answers = [*corpus(2, 2000, 30), list(range(30)) * 10, [], [7]]
        for answers_per_chunk in (1, 7, None):
            table = build(tmp_path / str(answers_per_chunk), answers, 2, 30, answers_per_chunk)
            check_against_reference(table, answers, 2, 30)

    def test_queries_in_many_blocks(self, tmp_path, monkeypatch):
        answers = corpus(3, 4000, 60, concentration=0.05)
        table = build(tmp_path, answers, 1, 60)
        for pairs in (1, 100):
            monkeypatch.setattr(ngram, "BLOCK_PAIRS", pairs)
            check_against_reference(table, answers, 1, 60, k=7)


class TestHandCounted:
    # the cat sat | the cat ran | cat sat
    ANSWERS = [[0, 1, 2], [0, 1, 3], [1, 2]]
    START = 4

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory):
        return build_model(tmp_path_factory.mktemp("model"), self.ANSWERS, 2, 4)

    def test_two_tokens(self, model):
        start = self.START
        ids, probs, totals = model.tables[0].top([[start, start], [start, 0], [0, 1], [start, 1], [1, 2]], 2)
        assert ids.tolist() == [[0, 1], [1, 0], [2, 3], [2, 0], [0, 0]]
        assert probs.tolist() == [[2 / 3, 1 / 3], [1, 0], [1 / 2, 1 / 2], [1, 0], [0, 0]]
        assert totals.tolist() == [3, 2, 2, 1, 0]
        assert (ids.dtype, probs.dtype, totals.dtype) == (np.int64, np.float64, np.int64)

    def test_one_token(self, model):
        ids, probs, totals = model.tables[1].top([[self.START], [0], [1], [2], [3]], 3)
        assert ids.tolist() == [[0, 1, 0], [1, 0, 0], [2, 3, 0], [0, 0, 0], [0, 0, 0]]
        assert probs.tolist() == [[2 / 3, 1 / 3, 0], [1, 0, 0], [2 / 3, 1 / 3, 0], [0, 0, 0], [0, 0, 0]]
        assert totals.tolist() == [3, 2, 3, 0, 0]

    def test_no_token(self, model):
        ids, probs, totals = model.tables[2].top(np.zeros((2, 0), dtype=int), 5)
        assert ids.tolist() == [[1, 0, 2, 3, 0]] * 2
        assert probs.tolist() == [[3 / 8, 2 / 8, 2 / 8, 1 / 8, 0]] * 2
        assert totals.tolist() == [8, 8]

    def test_probabilities(self, model):
        contexts, next_ids = [[0, 1], [0, 1], [0, 1], [4, 4], [2, 2]], [3, 0, 9, -1, 0]
        assert model.tables[0].probability(contexts, next_ids).tolist() == [1 / 2, 0, 0, 0, 0]

    def test_statistics(self, model):
        # Of (-, -), (-, the), (the, cat), (-, cat) the last is seen once
        table = model.tables[0]
        assert (table.num_contexts, table.contexts_seen_once, table.singleton_share) == (4, 1, 1 / 8)
        assert model.singleton_share == 1 / 8
        assert (model.context_length, model.vocab_size, model.num_tokens) == (2, 4, 8)

    def test_no_context_reaches_into_another_answer(self, model):
        _, _, totals = model.tables[1].top([[2], [3]], 1)
        assert totals.tolist() == [0, 0]

    def test_backing_off(self, model):
        contexts = [[0, 1], [3, 1], [3, 2], [4, 1]]
        ids, probs, totals = model.top(contexts, 2)
        assert totals.tolist() == [2, 3, 8, 1]
        assert ids.tolist() == [[2, 3], [2, 3], [1, 0], [2, 0]]
        assert probs.tolist() == [[1 / 2, 1 / 2], [2 / 3, 1 / 3], [3 / 8, 2 / 8], [1, 0]]
        assert model.top(contexts, 2, min_count=3)[2].tolist() == [3, 3, 8, 3]
        assert model.top(contexts, 2, min_count=9)[2].tolist() == [8, 8, 8, 8]
        assert model.probability(contexts, [3, 3, 3, 3], min_count=3).tolist() == [1 / 3, 1 / 3, 1 / 8, 1 / 3]


class TestTop:
    def test_equal_counts_are_in_order_of_ids(self, tmp_path):
        # After 9: 5 three times, then 1, 2, 8 twice each, then 0
        followers = [8, 2, 5, 1, 5, 2, 8, 1, 0, 5]
        table = build(tmp_path, [[9, follower] for follower in followers], 1, 10)
        ids, probs, _ = table.top([[9]], 6)
        assert ids.tolist() == [[5, 1, 2, 8, 0, 0]]
        assert probs.tolist() == [[0.3, 0.2, 0.2, 0.2, 0.1, 0]]

    def test_ratios_sum_to_one(self, tmp_path):
        answers = corpus(5, 3000, 20)
        table = build(tmp_path, answers, 2, 20)
        contexts = answer_contexts(np.concatenate(answers).astype(int), [len(a) for a in answers], 2, 20)
        ids, probs, totals = table.top(contexts, 20)
        np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-12)
        assert totals.min() >= 1
        everything = np.stack([table.probability(contexts, np.full(len(contexts), token)) for token in range(20)], 1)
        np.testing.assert_array_equal(np.take_along_axis(everything, ids, 1)[probs > 0], probs[probs > 0])
        np.testing.assert_allclose(everything.sum(axis=1), 1, rtol=1e-12)

    def test_unseen_contexts_next_to_seen_ones(self, tmp_path):
        answers = corpus(6, 400, 12)
        table = build(tmp_path, answers, 2, 12)
        counts = reference_counts(answers, 2, 12)
        contexts = np.stack(np.meshgrid(np.arange(13), np.arange(13)), -1).reshape(-1, 2)
        ids, probs, totals = table.top(contexts, 2)
        seen = [sum(counts[tuple(context)].values()) for context in contexts.tolist()]
        assert totals.tolist() == seen and 0 in seen
        assert not probs[totals == 0].any() and not ids[totals == 0].any()
        assert not table.probability(contexts, np.zeros(len(contexts), dtype=int))[totals == 0].any()

    def test_no_queries(self, tmp_path):
        model = build_model(tmp_path, [[0, 1]], 1, 2)
        ids, probs, totals = model.top(np.zeros((0, 1), dtype=int), 4)
        assert (ids.shape, probs.shape, totals.shape) == ((0, 4), (0, 4), (0,))
        assert model.probability(np.zeros((0, 1), dtype=int), []).shape == (0,)

    def test_frequent_context_is_ordered_once_per_batch(self, tmp_path, monkeypatch):
        table = build(tmp_path, [[0, token] for token in range(1, 2000)] + [[0, 5]], 1, 2000)
        ordered = []
        most_frequent = NGramTable._most_frequent
        monkeypatch.setattr(
            NGramTable,
            "_most_frequent",
            lambda self, out, first, sizes, *bits: (
                ordered.append(sizes.sum()) or most_frequent(self, out, first, sizes, *bits)
            ),
        )
        ids, probs, totals = table.top(np.zeros((500, 1), dtype=int), 2)
        assert ordered == [1999]
        assert ids.tolist() == [[5, 1]] * 500 and set(totals.tolist()) == {2000}


class TestBackOff:
    @settings(max_examples=25, deadline=None)
    @given(corpora, st.integers(1, 3), st.integers(1, 4))
    def test_against_slow_reference(self, tmp_path_factory, vocab_and_answers, n, min_count):
        vocab_size, answers = vocab_and_answers
        model = build_model(tmp_path_factory.mktemp("model"), answers, n, vocab_size)
        orders = [reference_counts(answers, order, vocab_size) for order in range(n + 1)]
        generator = np.random.default_rng(0)
        tokens = np.array(sorted({0, vocab_size // 2, vocab_size - 1, vocab_size}))
        contexts = tokens[generator.integers(0, len(tokens), (30, n))]
        ids, probs, totals = model.top(contexts, 3, min_count=min_count)
        next_ids = generator.integers(0, vocab_size, 30)
        found = model.probability(contexts, next_ids, min_count=min_count)
        for row, context in enumerate(contexts.tolist()):
            counter = next(
                counter
                for order in range(n, -1, -1)
                if sum((counter := orders[order].get(tuple(context[n - order :]), Counter())).values()) >= min_count
                or order == 0
            )
            assert (ids[row].tolist(), probs[row].tolist(), totals[row]) == reference_top(counter, 3)
            assert found[row] == counter[next_ids[row]] / sum(counter.values())

    def test_corpus_itself_is_never_backed_off(self, tmp_path):
        answers = corpus(7, 1000, 15)
        model = build_model(tmp_path, answers, 3, 15)
        tokens, lengths = np.concatenate(answers).astype(int), [len(answer) for answer in answers]
        contexts = answer_contexts(tokens, lengths, 3, 15)
        for found, expected in zip(model.top(contexts, 4), model.tables[0].top(contexts, 4), strict=True):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(
            model.probability(contexts, tokens), model.tables[0].probability(contexts, tokens)
        )


class TestAnswerContexts:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=6), st.integers(0, 4))
    def test_against_loop(self, answers, n):
        tokens = np.array([token for answer in answers for token in answer], dtype=np.int64)
        contexts = answer_contexts(tokens, np.array([len(a) for a in answers], dtype=np.int64), n, 10)
        expected = [([10] * n + answer)[i : i + n] for answer in answers for i in range(len(answer))]
        assert contexts.shape == (len(tokens), n) and contexts.dtype == np.int64
        assert contexts.tolist() == expected


class TestCoding:
    @pytest.mark.parametrize("vocab_size, n", [(50000, 3), (HASHED_VOCAB, 3), (1, 1), (3, 32), (2**32 - 1, 1), (5, 0)])
    def test_exact_codes_differ_and_fit(self, vocab_size, n):
        coding = ngram._Coding(vocab_size, n)
        assert coding.exact and coding.bits == n * coding.token_bits
        contexts = np.random.default_rng(0).integers(0, min(vocab_size, 2) + 1, (2000, n))
        contexts = np.unique(contexts, axis=0) if n else contexts[:1]
        codes = coding.codes(contexts.T.astype(np.uint64), len(contexts))
        assert len(np.unique(codes)) == len(contexts)
        assert not (codes & np.uint64(2 ** (64 - coding.bits) - 1)).any()

    @pytest.mark.parametrize("vocab_size, n", [(HASHED_VOCAB, 4), (HASHED_VOCAB, 6), (300, 9)])
    def test_hashes_of_similar_contexts_differ(self, vocab_size, n):
        coding = ngram._Coding(vocab_size, n)
        assert not coding.exact
        # All contexts of the ids 0 to 9 at the last 4 positions, and of one high bit each
        contexts = np.zeros((10**4, n), dtype=np.uint64)
        contexts[:, -4:] = np.stack(np.meshgrid(*4 * [np.arange(10)]), -1).reshape(-1, 4)
        contexts = np.concatenate([contexts, contexts * np.uint64(vocab_size // 10)[None]])
        contexts = np.unique(contexts, axis=0)
        codes = coding.codes(contexts.T, len(contexts))
        assert len(np.unique(codes)) == len(contexts)

    @pytest.mark.parametrize("vocab_size, n", [(50000, 1), (50000, 3), (HASHED_VOCAB, 4)])
    def test_codes_are_evenly_spread(self, vocab_size, n):
        coding = ngram._Coding(vocab_size, n)
        contexts = np.random.default_rng(1).geometric(0.001, (64000, n)).astype(np.uint64)
        contexts = np.unique(contexts, axis=0)
        in_bucket = np.bincount((coding.codes(contexts.T, len(contexts)) >> np.uint64(58)).astype(int), minlength=64)
        assert in_bucket.max() < 1.3 * len(contexts) / 64


class TestMemoryLimit:
    def test_temporary_file_changes_nothing_and_goes_away(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ngram, "PIECE_TOKENS", 500)
        answers = corpus(8, 20000, 100, concentration=0.05)
        seen = []
        append = ngram._Runs.append

        def spy(runs, *run):
            append(runs, *run)
            seen.append(runs.path.stat().st_size if runs.path.exists() else 0)

        monkeypatch.setattr(ngram._Runs, "append", spy)
        for n in range(4):
            in_memory, in_file = tmp_path / f"memory-{n}", tmp_path / f"file-{n}"
            seen.clear()
            build(in_memory, answers, n, 100)
            assert not any(seen)
            # Half of it holds 2,500 of the 20,000 keys, and a bucket is sorted in parts of 1,024
            table = build(in_file, answers, n, 100, memory_limit=40000)
            assert max(seen) > 100000
            assert contents(in_memory) == contents(in_file)
            assert sorted(path.name for path in in_file.iterdir()) == sorted(FILES)
            check_against_reference(table, answers, n, 100)

    def test_hashed_contexts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ngram, "PIECE_TOKENS", 500)
        answers = corpus(9, 5000, HASHED_VOCAB)
        build(tmp_path / "memory", answers, 5, HASHED_VOCAB)
        table = build(tmp_path / "file", answers, 5, HASHED_VOCAB, memory_limit=1)
        assert contents(tmp_path / "memory") == contents(tmp_path / "file")
        check_against_reference(table, answers, 5, HASHED_VOCAB)

    def test_temporary_file_goes_away_after_an_error(self, tmp_path):
        with pytest.raises(NGramError):
            build(tmp_path, corpus(8, 3000, 50), 2, 50, memory_limit=1, num_tokens=7)
        assert list(tmp_path.iterdir()) == []

    def test_peak_memory(self, tmp_path):
        # In a process of its own: 8 bytes a token would be 64 MB
        script = """
import resource, sys
import numpy as np
from trl_bbkd.bayeskd.ngram import build_ngram_table
tokens = np.random.default_rng(0).integers(0, 30000, 8_000_000, dtype=np.int32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
chunks = [(tokens, np.full(40_000, 200))]
build_ngram_table(
    sys.argv[1], chunks, num_tokens=len(tokens), vocab_size=30000, context_length=3, memory_limit=int(sys.argv[2])
)
print(peak() - before)
"""
        peaks = [
            int(subprocess.run([sys.executable, "-c", script, tmp_path / limit, limit], capture_output=True).stdout)
            for limit in (str(2**31), str(2**24))
        ]
        assert peaks[1] < peaks[0] - 30_000


class TestSameBytes:
    def test_whatever_the_chunks_and_the_run(self, tmp_path, monkeypatch):
        answers = corpus(10, 6000, 50)
        build(tmp_path / "first", answers, 3, 50)
        expected = contents(tmp_path / "first")
        monkeypatch.setattr(ngram, "PIECE_TOKENS", 300)
        monkeypatch.setattr(ngram, "BUCKET_KEYS", 100)
        for name, answers_per_chunk, dtype in [("same", None, np.int64), ("one", 1, np.int32), ("five", 5, np.uint16)]:
            build(tmp_path / name, answers, 3, 50, answers_per_chunk, dtype)
            assert contents(tmp_path / name) == expected

    def test_whatever_the_order_of_the_answers(self, tmp_path):
        answers = corpus(11, 3000, 50)
        build(tmp_path / "first", answers, 2, 50)
        build(tmp_path / "second", answers[::-1], 2, 50)
        assert contents(tmp_path / "first") == contents(tmp_path / "second")

    def test_chunks_in_an_array_that_is_used_again(self, tmp_path):
        answers = [list(range(10)), [3] * 10, list(range(9, -1, -1))]
        buffer = np.empty(10, dtype=np.int64)

        def chunks():
            for answer in answers:
                buffer[:] = answer
                yield buffer, [10]
            buffer[:] = 0

        table = build_ngram_table(tmp_path, chunks(), num_tokens=30, vocab_size=10, context_length=2)
        check_against_reference(table, answers, 2, 10)


class TestFolder:
    ANSWERS = [[0, 1, 2], [0, 1, 3]]

    def test_finished_table_is_used(self, tmp_path):
        build(tmp_path, self.ANSWERS, 1, 5, fingerprint=FINGERPRINT)
        table = build_ngram_table(
            tmp_path, iter(()), num_tokens=6, vocab_size=5, context_length=1, fingerprint=FINGERPRINT
        )
        check_against_reference(table, self.ANSWERS, 1, 5)

    def test_without_fingerprint_it_is_built_anew(self, tmp_path):
        build(tmp_path, self.ANSWERS, 1, 5)
        check_against_reference(build(tmp_path, [[4, 4, 4, 4, 3, 3]], 1, 5), [[4, 4, 4, 4, 3, 3]], 1, 5)

    def test_unfinished_table_is_built_anew(self, tmp_path):
        build(tmp_path, self.ANSWERS, 1, 5, fingerprint=FINGERPRINT)
        expected = contents(tmp_path)
        (tmp_path / "table.json").unlink()
        (tmp_path / "keys.u64").write_bytes(b"half")
        (tmp_path / "runs.tmp").write_bytes(b"left over")
        with pytest.raises(NGramError, match="no finished n-gram counts.*table.json.*build them"):
            NGramTable(tmp_path)
        build(tmp_path, self.ANSWERS, 1, 5, fingerprint=FINGERPRINT)
        assert contents(tmp_path) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)

    def test_failed_build_leaves_no_finished_table(self, tmp_path):
        build(tmp_path, self.ANSWERS, 1, 5)
        with pytest.raises(NGramError):
            build(tmp_path, self.ANSWERS, 1, 5, num_tokens=7)
        with pytest.raises(NGramError, match="no finished"):
            NGramTable(tmp_path)

    def test_open_table_outlives_a_new_one(self, tmp_path):
        table = build(tmp_path, self.ANSWERS, 1, 5)
        build(tmp_path, [[4] * 500], 1, 5)
        check_against_reference(table, self.ANSWERS, 1, 5)

    @pytest.mark.parametrize(
        "changed, named",
        [
            ({"fingerprint": FINGERPRINT | {"corpus": "c2"}}, "corpus"),
            ({"fingerprint": {"corpus": "c1"}}, "tokenizer"),
            ({"vocab_size": 6}, "vocab_size"),
            ({"num_tokens": 7}, "num_tokens"),
        ],
    )
    @pytest.mark.parametrize("builder", [build, build_model])
    def test_finished_from_something_else(self, tmp_path, changed, named, builder):
        kwargs = {"vocab_size": 5, "fingerprint": FINGERPRINT}
        builder(tmp_path, self.ANSWERS, 2, **kwargs)
        with pytest.raises(NGramError, match=rf"made from something else: {named} differ. Delete the folder"):
            builder(tmp_path, self.ANSWERS, 2, **kwargs | changed)

    def test_model_of_another_context_length(self, tmp_path):
        build_model(tmp_path, self.ANSWERS, 2, 5, fingerprint=FINGERPRINT)
        with pytest.raises(NGramError, match="context_length differ"):
            build_model(tmp_path, self.ANSWERS, 1, 5, fingerprint=FINGERPRINT)

    def test_finished_tables_of_an_unfinished_model_are_kept(self, tmp_path):
        build_model(tmp_path, self.ANSWERS, 2, 5, fingerprint=FINGERPRINT)
        (tmp_path / "model.json").unlink()
        (tmp_path / "context-1" / "table.json").unlink()
        before = (tmp_path / "context-2" / "keys.u64").stat().st_mtime_ns
        with pytest.raises(NGramError, match="no finished"):
            NGramModel(tmp_path)
        model = build_model(tmp_path, self.ANSWERS, 2, 5, fingerprint=FINGERPRINT)
        assert (tmp_path / "context-2" / "keys.u64").stat().st_mtime_ns == before
        for n, table in zip((2, 1, 0), model.tables, strict=True):
            check_against_reference(table, self.ANSWERS, n, 5)

    def test_finished_model_asks_for_no_chunks(self, tmp_path):
        build_model(tmp_path, self.ANSWERS, 2, 5, fingerprint=FINGERPRINT)
        asked = {"num_tokens": 6, "vocab_size": 5, "context_length": 2, "fingerprint": FINGERPRINT}
        assert build_ngram_model(tmp_path, lambda: pytest.fail("asked"), **asked).num_tokens == 6

    def test_other_format(self, tmp_path):
        build(tmp_path, self.ANSWERS, 1, 5)
        path = tmp_path / "table.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
        with pytest.raises(NGramError, match="format 1.*delete the folder"):
            NGramTable(tmp_path)

    @pytest.mark.parametrize("name", ["keys.u64", "cumulative.u32"])
    def test_file_cut_off(self, tmp_path, name):
        build(tmp_path, self.ANSWERS, 1, 5)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
        with pytest.raises(NGramError, match=f"{name} has not the size"):
            NGramTable(tmp_path)


class TestErrors:
    def test_context_length(self, tmp_path):
        with pytest.raises(NGramError, match="context_length of 0.*at least 1"):
            build_model(tmp_path, [[0]], 0, 1)
        with pytest.raises(NGramError, match="context_length at least 0"):
            build(tmp_path, [[0]], -1, 1)

    @pytest.mark.parametrize("answers", [[], [[]], [[], []]])
    @pytest.mark.parametrize("num_tokens", [0, 3])
    def test_no_answers(self, tmp_path, answers, num_tokens):
        with pytest.raises(NGramError, match="The corpus has no answers"):
            build(tmp_path, answers, 2, 5, num_tokens=num_tokens)

    @pytest.mark.parametrize("token", [5, 6, 2**40, -1, -(2**40)])
    def test_token_outside_the_vocabulary(self, tmp_path, token):
        with pytest.raises(NGramError, match=f"Token id {token:,} is not .*5.*vocab_size"):
            build(tmp_path, [[0, 1], [4, token]], 2, 5)

    @pytest.mark.parametrize("num_tokens", [2, 4])
    def test_other_number_of_tokens(self, tmp_path, num_tokens):
        with pytest.raises(NGramError, match=f"hold 3 tokens and num_tokens is {num_tokens}"):
            build(tmp_path, [[0, 1], [4]], 2, 5, num_tokens=num_tokens)

    @pytest.mark.parametrize("lengths", [[2], [2, 2], [4, -1], []])
    def test_lengths_that_do_not_sum_to_the_tokens(self, tmp_path, lengths):
        with pytest.raises(NGramError, match="lengths .* there are 3 tokens"):
            build_ngram_table(tmp_path, [([0, 1, 2], lengths)], num_tokens=3, vocab_size=5, context_length=2)

    def test_tokens_that_are_no_integers(self, tmp_path):
        with pytest.raises(NGramError, match="float64"):
            build(tmp_path, [[0, 1]], 1, 5, dtype=np.float64)

    @pytest.mark.parametrize("sizes", [{"num_tokens": 2**32}, {"vocab_size": 2**32}, {"vocab_size": 0}])
    def test_more_than_a_table_holds(self, tmp_path, sizes):
        with pytest.raises(NGramError, match="fewer than 2\\*\\*32"):
            build(tmp_path, [[0, 1]], 1, **{"vocab_size": 5} | sizes)

    def test_queries(self, tmp_path):
        model = build_model(tmp_path, [[0, 1, 2]], 2, 5)
        for contexts in ([[0]], [[0, 1, 2]], [0, 1]):
            with pytest.raises(NGramError, match=r"shape \(Q, 2\)"):
                model.tables[0].top(np.array(contexts), 1)
        for token in (6, -1):
            with pytest.raises(NGramError, match=f"Token id {token} is not"):
                model.top(np.array([[0, token]]), 1)
        with pytest.raises(NGramError, match="min_count of 0"):
            model.top(np.array([[0, 1]]), 1, min_count=0)


def test_no_trainer_is_needed():
    code = "import sys, trl_bbkd.bayeskd.ngram; sys.exit('trl' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
