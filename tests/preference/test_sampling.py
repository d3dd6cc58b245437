"""Samples on disk."""

from trl_bbkd.preference.sampling import read_samples, sample_completions


def test_samples_with_unusual_line_ends(tmp_path):
    text = "a\u2028b\u2029c\x85d\re"
    rows = [{"prompt": text, "completion": text}] * 3
    for _ in range(2):  # made, then read
        ids = sample_completions(
            tmp_path, rows, lambda prompts, seed: ([[1]] * len(prompts), [text] * len(prompts)), 1, 0, "proxy"
        )
        assert ids == [[1]] * 3
    assert read_samples(tmp_path / "00000.jsonl")[0]["proxy"] == text
