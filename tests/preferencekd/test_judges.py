import pytest
import torch

from trl_bbkd.errors import JudgeError
from trl_bbkd.preferencekd.judges import FunctionJudge, Judged, OverlapJudge
from trl_bbkd.preferencekd.rounds import judged_in_blocks


def row(prompt, candidates, *references):
    return Judged(prompt, candidates, list(references), [], [[]] * len(candidates), [])


ROWS = [row("p", ["a b", "c"], "a b c"), row("q", ["x", "y z", "z"], "y", "z")]


def test_overlap_is_that_with_the_nearest_answer_of_the_teacher():
    assert OverlapJudge("rouge_l")(ROWS) == [pytest.approx([0.8, 0.5]), pytest.approx([0, 2 / 3, 1])]


def test_a_function_gets_an_entry_a_candidate():
    asked = []

    def judge(prompts, candidates, teacher_answers):
        asked.append((prompts, candidates, teacher_answers))
        return torch.arange(5)

    assert FunctionJudge(judge)(ROWS) == [[0, 1], [2, 3, 4]]
    assert asked == [(["p", "p", "q", "q", "q"], ["a b", "c", "x", "y z", "z"], ["a b c", "a b c", "y", "y", "y"])]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "returned a NoneType: it has to return a list"),
        ("12345", "returned a str: it has to return a list"),
        ([1, 2], "returned 2 scores for 5 candidates"),
        ([1, 2, None, 4, 5], "score of candidate 2 is None: return a number"),
        ([1, 2, 3, 4, float("nan")], "score of candidate 4 is nan"),
    ],
)
def test_what_is_no_score(found, message):
    with pytest.raises(JudgeError, match=message):
        FunctionJudge(lambda *_: found)(ROWS)


def test_a_block_on_disk_is_not_judged_again(tmp_path):
    asked = []

    def judge(rows):
        asked.extend(row.prompt for row in rows)
        if len(asked) > 3:
            raise KeyboardInterrupt
        return [[len(row.prompt)] for row in rows]

    rows = [row("p" * number, ["a"], "a") for number in range(1, 6)]
    with pytest.raises(KeyboardInterrupt):
        judged_in_blocks(tmp_path / "scores", rows, judge, 2)
    asked.clear()
    assert judged_in_blocks(tmp_path / "scores", rows, judge, 2) == [[1], [2], [3], [4], [5]]
    assert asked == ["ppp", "pppp", "ppppp"]
