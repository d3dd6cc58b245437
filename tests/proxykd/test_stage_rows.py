import pytest
from datasets import Dataset

from trl_bbkd.errors import TeacherDataError
from trl_bbkd.proxykd.stage_rows import split_rows


def make_dataset(prompts):
    return Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})


def rows_of(parts):
    return [part["row"][:] for part in parts]


def test_parts_are_disjoint_complete_and_of_the_papers_sizes():
    parts = split_rows(make_dataset([f"p{i}" for i in range(1000)]), 0.1, 0.45, seed=0)
    warmup, align, distil = rows_of(parts)
    assert (len(warmup), len(align), len(distil)) == (100, 450, 450)
    assert sorted([*warmup, *align, *distil]) == list(range(1000))
    assert warmup == sorted(warmup)  # the order of the data


def test_a_prompt_is_in_one_part_only():
    prompts = [f"p{i % 37}" for i in range(300)]
    parts = split_rows(make_dataset(prompts), 0.2, 0.3, seed=1)
    seen = [{prompts[row] for row in part} for part in rows_of(parts)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert sum(map(len, rows_of(parts))) == 300


def test_messages_count_as_prompts():
    prompts = [[{"role": "user", "content": f"p{i % 3}"}] for i in range(9)]
    parts = split_rows(make_dataset(prompts), 0.3, 0.3, seed=0)
    assert [len(part) for part in parts] == [3, 3, 3]


def test_the_seed_decides():
    dataset = make_dataset([f"p{i}" for i in range(50)])
    assert rows_of(split_rows(dataset, 0.1, 0.45, 0)) == rows_of(split_rows(dataset, 0.1, 0.45, 0))
    assert rows_of(split_rows(dataset, 0.1, 0.45, 0)) != rows_of(split_rows(dataset, 0.1, 0.45, 1))


def test_a_share_of_nothing():
    parts = split_rows(make_dataset([f"p{i}" for i in range(10)]), 0.0, 0.0, seed=0)
    assert [len(part) for part in parts] == [0, 0, 10]


def test_a_column_divides_the_rows():
    dataset = make_dataset(["a", "b", "c", "d"]).add_column("stage", ["distil", "warmup", "align", "distil"])
    assert rows_of(split_rows(dataset, 0.1, 0.45, seed=0)) == [[1], [2], [0, 3]]


def test_an_unknown_stage_is_named():
    dataset = make_dataset(["a", "b"]).add_column("stage", ["distil", "distill"])
    with pytest.raises(TeacherDataError, match="Row 1: `stage` is 'distill'; it must be one of warmup, align, distil"):
        split_rows(dataset, 0.1, 0.45, seed=0)
