import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_bbkd.bayeskd import ngram_counting
from trl_bbkd.bayeskd.ngram import NGramModel, NGramTable, build_ngram_model, build_ngram_table
from trl_bbkd.errors import NGramError

from .test_ngram import FILES, FINGERPRINT, HASHED_VOCAB, build, build_model, check_against_reference, contents, corpus


class TestMemoryLimit:
    def test_temporary_file_changes_nothing_and_goes_away(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ngram_counting, "PIECE_TOKENS", 500)
        answers = corpus(8, 20000, 100, concentration=0.05)
        seen = []
        append = ngram_counting._Runs.append

        def spy(runs, *run):
            append(runs, *run)
            seen.append(runs.path.stat().st_size if runs.path.exists() else 0)

        monkeypatch.setattr(ngram_counting._Runs, "append", spy)
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
        monkeypatch.setattr(ngram_counting, "PIECE_TOKENS", 500)
        answers = corpus(9, 5000, HASHED_VOCAB)
        build(tmp_path / "memory", answers, 5, HASHED_VOCAB)
        table = build(tmp_path / "file", answers, 5, HASHED_VOCAB, memory_limit=1)
        assert contents(tmp_path / "memory") == contents(tmp_path / "file")
        check_against_reference(table, answers, 5, HASHED_VOCAB)

    def test_temporary_file_goes_away_after_an_error(self, tmp_path):
        with pytest.raises(NGramError):
            build(tmp_path, corpus(8, 3000, 50), 2, 50, memory_limit=1, num_tokens=7)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
    def test_peak_memory(self, tmp_path):
        # In a process of its own: 8 bytes a token would be 64 MB
        script = """
import re, sys
from pathlib import Path
import numpy as np
from trl_bbkd.bayeskd.ngram import build_ngram_table
tokens = np.random.default_rng(0).integers(0, 30000, 8_000_000, dtype=np.int32)
# Not ru_maxrss: that of a child begins with its parent's
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
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
        monkeypatch.setattr(ngram_counting, "PIECE_TOKENS", 300)
        monkeypatch.setattr(ngram_counting, "BUCKET_KEYS", 100)
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
        build(tmp_path, self.ANSWERS, 1, 5, memory_limit=1, fingerprint=FINGERPRINT)
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
