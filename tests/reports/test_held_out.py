import pytest

from trl_bbkd.reports.held_out import prompt_lines, read_held_out, write_held_out


ROWS = [
    {"prompt": "a", "completion": "x", "teacher_ids": [1, 2, 3], "row_in_file": 7},
    {"prompt": "b", "completion": "y", "teacher_ids": [1], "row_in_file": 2},
    {"prompt": "a", "completion": "zé", "teacher_ids": [4], "row_in_file": 9},
]
MEASURED = {
    "GAD": {
        "by_row": {
            "valid@t1.0": [1.0, 0.5, 0.0],
            "distinct_valid@t1.0": [2.0, 1.0, 0.0],
            "teacher_nll": [2.0, 1.0, 4.0],
        },
        "samples": {"t1.0": [["p", "q"], ["r", "r"], ["s", "t"]], "greedy": [["p"], ["r"], ["s"]]},
    }
}


def test_a_prompt_is_one_line(tmp_path):
    lines = prompt_lines(ROWS, MEASURED)
    write_held_out(lines, tmp_path)
    assert read_held_out(tmp_path) == lines and "zé" in (tmp_path / "held_out.jsonl").read_text(encoding="utf-8")
    first, second = lines
    # By their numbers in the file, whatever was dropped and shuffled
    assert (first["rows"], second["rows"]) == ([7, 9], [2])
    assert first["teacher"] == ["x", "zé"] and first["teacher_tokens"] == [3, 1]
    found = first["students"]["GAD"]
    assert found["samples"] == {"t1.0": ["p", "q", "s", "t"], "greedy": ["p", "s"]}
    assert found["values"] == pytest.approx(
        {"valid@t1.0": 0.5, "distinct_valid@t1.0": 2, "teacher_nll": (3 * 2 + 4) / 4}
    )
    assert second["students"]["GAD"]["values"]["distinct_valid@t1.0"] == 1
