"""The column `top_logprobs`: what is refused, before any model is loaded, and what is read from it."""

import math
import shutil

import numpy as np
import pytest
from datasets import Dataset

from trl_bbkd.bayeskd.top_logprobs import check_top_logprobs, count_inexact, known_probs, without_inexact
from trl_bbkd.errors import TeacherDataError

from .helpers import make_rows, make_trainer


VOCAB, EOS = 330, 2
ANSWERS = [[7, 8, EOS], [9, 10, 11, EOS], [12, 13]]  # the last one was cut


def column(**changes):
    """A value for each answer, with the second one's changed: `ids` or `logprobs` as a whole."""
    values = [
        {"ids": [[token, token + 100] for token in answer], "logprobs": [[-0.5, -2.0] for _ in answer]}
        for answer in ANSWERS
    ]
    values[1] |= changes
    return values


def at_position_2(name, value):
    changed = column()[1][name]
    changed[2] = value
    return column(**{name: changed})


def check(values):
    check_top_logprobs(values, ANSWERS, VOCAB, EOS)


class TestAccepted:
    def test_whole_columns_and_nulls(self):
        check(column())
        check([None, None, None])

    def test_positions_of_which_nothing_is_known(self):
        check(column(ids=[[], [10], [], []], logprobs=[[], [-0.1], [], []]))

    def test_an_answer_of_its_end_alone(self):
        check_top_logprobs([{"ids": [], "logprobs": []}, {"ids": [[]], "logprobs": [[]]}], [[EOS]] * 2, VOCAB, EOS)

    def test_answers_without_their_end_and_beyond_the_cut(self):
        values = column(ids=[[9]] * 3, logprobs=[[-0.1]] * 3)
        values[2] = {"ids": [[12]] * 9, "logprobs": [[-0.1]] * 9}
        check(values)

    def test_rounding_and_the_extreme_ids(self):
        check(column(ids=[[0, VOCAB - 1]] * 4, logprobs=[[0.0005, -9998.0]] * 4))


BAD_POSITIONS = {
    "an id above the vocabulary": (
        "ids",
        [11, VOCAB],
        "names token 330, which is outside of the student's vocabulary, or the proxy's, of 330",
    ),
    "a negative id": ("ids", [11, -1], "names token -1, which is outside"),
    "a repeated token": ("ids", [11, 11], r"names a token twice: \[11, 11\]"),
    "-9999": (
        "logprobs",
        [-0.5, -9999.0],
        "has a log-probability of -9999, by which an API says .* Take the token out of both",
    ),
    "-inf": ("logprobs", [-0.5, -math.inf], "has a log-probability of -inf, by which an API says"),
    "NaN": ("logprobs", [-0.5, math.nan], "has a log-probability of nan; it must be a number of at most 0"),
    "above 0": ("logprobs", [0.7, -2.0], "has a log-probability of 0.7; it must be a number of at most 0"),
    "infinity": ("logprobs", [math.inf, -2.0], "has a log-probability of inf; it must be"),
    "base 10": ("logprobs", [-0.2, -0.4], "has probabilities that sum to 1.489; they must be natural logarithms"),
    "fewer ids": ("ids", [11], "has 1 ids and 2 log-probabilities"),
    "fewer log-probabilities": ("logprobs", [-0.5], "has 2 ids and 1 log-probabilities"),
    "no log-probabilities": ("logprobs", [], "has 2 ids and 0 log-probabilities"),
}
BAD_ROWS = {
    "positions of one list alone": (column(ids=[[9]] * 3), "has `ids` of 3 positions and `logprobs` of 4"),
    "too few positions": (
        column(ids=[[9]] * 2, logprobs=[[-0.1]] * 2),
        "has 2 positions, but the student's tokenizer makes 3, or 4 with its end tokens of the answer.*take it out",
    ),
    "too many positions": (column(ids=[[9]] * 5, logprobs=[[-0.1]] * 5), "has 5 positions, but .* makes 3, or 4"),
    "ids alone": ([None, {"ids": [[9]] * 4}, None], r'must be {"ids": .*"logprobs": .*a list of both per token'),
    "tokens as an API names them": ([None, [{"token": "a", "logprob": -0.1}] * 4, None], "must be .*or null"),
}


class TestRefused:
    @pytest.mark.parametrize("name", BAD_POSITIONS)
    def test_a_position_with(self, name):
        """The error names row, column, position and value."""
        changed, value, message = BAD_POSITIONS[name]
        with pytest.raises(TeacherDataError, match=f"^Row 1: `top_logprobs`, position 2 {message}"):
            check(at_position_2(changed, value))

    @pytest.mark.parametrize("name", BAD_ROWS)
    def test_a_row_with(self, name):
        values, message = BAD_ROWS[name]
        with pytest.raises(TeacherDataError, match=f"^Row 1: `top_logprobs` {message}"):
            check(values)

    def test_too_few_positions_of_a_cut_answer(self):
        values = column()
        values[2] = {"ids": [[12]], "logprobs": [[-0.1]]}
        with pytest.raises(TeacherDataError, match="Row 2: .* has 1 positions, but .* makes at least 2 tokens"):
            check(values)

    @pytest.mark.parametrize(
        "values",
        [
            at_position_2("ids", None),
            at_position_2("logprobs", None),
            at_position_2("ids", [11, None]),
            at_position_2("ids", ["a", "b"]),
            at_position_2("ids", [11.0, 12.5]),
            at_position_2("logprobs", ["-0.5", "-2.0"]),
            column(ids=None),
            column(ids=[9, 10, 11, 2], logprobs=[-0.1] * 4),
        ],
        ids=[
            "null ids",
            "null logprobs",
            "a null id",
            "text ids",
            "broken ids",
            "text logprobs",
            "null",
            "flat lists",
        ],
    )
    def test_cells_that_are_no_lists_of_numbers(self, values):
        with pytest.raises(TeacherDataError, match="^Row 1: `top_logprobs`"):
            check(values)

    def test_a_token_may_be_named_again_at_another_position(self):
        check(column(ids=[[9]] * 4, logprobs=[[-0.1]] * 4))

    def test_probabilities_are_summed_by_position(self):
        """Positions that sum to 0.9 are fine, one of 1.1 beside one of 0.7 is not."""
        sums = [(0.5, 0.4), (0.6, 0.5), (0.3, 0.4), (0.5, 0.4)]
        values = column(logprobs=[[math.log(a), math.log(b)] for a, b in sums])
        with pytest.raises(TeacherDataError, match="position 1 has probabilities that sum to 1.100"):
            check(values)


class TestKnownProbs:
    def test_each_position_has_its_own_and_unknown_ones_nothing(self):
        values = [{"ids": [[5, 6], []], "logprobs": [[-1.0, -2.0], []]}, None, {"ids": [[7]], "logprobs": [[0.0005]]}]
        found = known_probs(values, [3, 2, 1])
        assert found.ids.tolist() == [[5, 6], [0, 0], [0, 0], [0, 0], [0, 0], [7, 0]]
        np.testing.assert_allclose(found.probs[[0, 5]], [[math.exp(-1), math.exp(-2)], [1.0, 0.0]], rtol=1e-15)
        assert found.is_known.tolist() == [[True, True], *[[False, False]] * 4, [True, False]]

    def test_positions_beyond_a_cut_answer_are_left_out(self):
        found = known_probs([{"ids": [[5], [6], [7]], "logprobs": [[-1.0]] * 3}, None], [2, 1])
        assert found.ids.tolist() == [[5], [6], [0]] and found.is_known.tolist() == [[True], [True], [False]]

    def test_nothing_known_at_all(self):
        assert known_probs([None, None], [2, 3]).ids.shape == (5, 0)


class TestCollected:
    """What `trl-bbkd collect` adds: the tokens that a value is of, and whether it is exact."""

    def test_the_answers_own_tokens(self):
        values = [value | {"tokens": answer, "exact": True} for value, answer in zip(column(), ANSWERS, strict=True)]
        check(values)
        values[2]["tokens"] = [12, 13, 14, EOS]  # this answer was cut
        values[2] |= {"ids": [[12]] * 4, "logprobs": [[-0.1]] * 4}
        check(values)

    def test_other_tokens(self):
        values = column(tokens=[9, 11, 10, EOS])
        with pytest.raises(
            TeacherDataError, match=r"Row 1: `top_logprobs` is of other tokens .*\[9, 11, 10, 2\] there and"
        ):
            check(values)

    def test_what_is_not_exact(self):
        values = [None, {"ids": [], "exact": False}, {"ids": [], "exact": True}, {"ids": []}]
        assert without_inexact(values) == [None, None, *values[2:]]
        table = Dataset.from_dict({"top_logprobs": values}).with_format("arrow")[:]
        assert count_inexact(table) == 1
        assert count_inexact(Dataset.from_dict({"top_logprobs": values[2:3]}).with_format("arrow")[:]) == 0


def test_a_run_refuses_the_column_before_it_loads_a_model(tmp_path, tiny_model_dir):
    """The student's folder has no weights, so that loading it would be another error."""
    student = shutil.copytree(tiny_model_dir, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [row | {"top_logprobs": None} for row in make_rows(4)]
    with pytest.raises(OSError, match="no file named model.safetensors"):
        make_trainer(tmp_path, str(student), None, rows, held_out=0, posterior_weight=0.0)
    rows[2]["top_logprobs"] = {"ids": [[1]], "logprobs": [[-0.1]]}
    with pytest.raises(TeacherDataError, match="Row 2: `top_logprobs` has 1 positions, but the student's tokenizer"):
        make_trainer(tmp_path, str(student), None, rows, held_out=0, posterior_weight=0.0)
