import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bbkd.bayeskd import ngram, ngram_counting
from trl_bbkd.bayeskd.ngram import (
    NGramTable,
    answer_contexts,
    build_ngram_model,
    build_ngram_table,
)
from trl_bbkd.bayeskd.ngram_coding import ContextCoding


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
        assert not ContextCoding(vocab_size, n).exact
        answers = corpus(1, 1500, vocab_size, answer_length=100)
        check_against_reference(build(tmp_path, answers, n, vocab_size), answers, n, vocab_size)

    def test_corpus_of_many_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ngram_counting, "PIECE_TOKENS", 64)
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

    def test_large_counts_and_many_next_tokens(self, tmp_path):
        # Count, next token's number and context of one batch do not fit into 64 bits together
        vocab_size, many, contexts = 2**17 + 3, 2**17, 2**15
        pairs = [(0, token, 1) for token in range(many)] + [(1, 7, 3 * 10**9), (1, 9, 10**9)]
        pairs += [(context, token, token) for context in range(2, contexts) for token in (1, 2)]
        context_ids, next_ids, counts = np.array(pairs, dtype=np.uint64).T
        coding = ContextCoding(vocab_size, 1)
        keys = coding.keys_(coding.codes([context_ids], len(pairs)), next_ids)
        order = np.argsort(keys)
        keys[order].tofile(tmp_path / "keys.u64")
        np.append(0, np.cumsum(counts[order])).astype(np.uint32).tofile(tmp_path / "cumulative.u32")
        description = {"version": 1, "num_tokens": int(counts.sum()), "vocab_size": vocab_size, "context_length": 1}
        description |= {"num_contexts": contexts, "contexts_seen_once": 0, "bucket_starts": [0, len(pairs)]}
        (tmp_path / "table.json").write_text(json.dumps(description))
        ids, probs, totals = NGramTable(tmp_path).top(np.arange(contexts)[:, None], 2)
        assert totals.tolist() == [many, 4 * 10**9] + [3] * (contexts - 2)
        assert ids.tolist() == [[0, 1], [7, 9]] + [[2, 1]] * (contexts - 2)
        assert probs[1:3].tolist() == [[3 / 4, 1 / 4], [2 / 3, 1 / 3]]

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
        coding = ContextCoding(vocab_size, n)
        assert coding.exact and coding.bits == n * coding.token_bits
        contexts = np.random.default_rng(0).integers(0, min(vocab_size, 2) + 1, (2000, n))
        contexts = np.unique(contexts, axis=0) if n else contexts[:1]
        codes = coding.codes(contexts.T.astype(np.uint64), len(contexts))
        assert len(np.unique(codes)) == len(contexts)
        assert not (codes & np.uint64(2 ** (64 - coding.bits) - 1)).any()

    @pytest.mark.parametrize("vocab_size, n", [(HASHED_VOCAB, 4), (HASHED_VOCAB, 6), (300, 9)])
    def test_hashes_of_similar_contexts_differ(self, vocab_size, n):
        coding = ContextCoding(vocab_size, n)
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
        coding = ContextCoding(vocab_size, n)
        contexts = np.random.default_rng(1).geometric(0.001, (64000, n)).astype(np.uint64)
        contexts = np.unique(contexts, axis=0)
        in_bucket = np.bincount((coding.codes(contexts.T, len(contexts)) >> np.uint64(58)).astype(int), minlength=64)
        assert in_bucket.max() < 1.3 * len(contexts) / 64
