import pytest
from datasets import ClassLabel, Dataset

from trl_bbkd.errors import LLKDDataError
from trl_bbkd.llkd.rows import count_labels, find_class_names, with_class_numbers


NAMES = ["sky", "fruit", "animal"]


def make(labels, feature=None, **columns):
    rows = Dataset.from_dict({"label": labels, **columns})
    return rows.cast_column("label", feature) if feature else rows


class TestNames:
    def test_those_asked_for_come_first(self):
        assert find_class_names(make(["b", "a"]), ["b", "a"]) == ["b", "a"]

    def test_of_a_class_label(self):
        assert find_class_names(make([1, 0], ClassLabel(names=NAMES)), None) == NAMES

    def test_of_text_in_the_alphabets_order(self):
        assert find_class_names(make(["b", "a", "b", None]), None) == ["a", "b"]

    def test_of_labels_and_true_labels(self):
        assert find_class_names(make(["b", "a"], gold=["c", None]), None) == ["a", "b", "c"]

    def test_numbers_without_names(self):
        with pytest.raises(LLKDDataError, match="`label` holds numbers, and nothing names the classes. Set `labels`"):
            find_class_names(make([0, 1]), None)

    def test_no_labels_at_all(self):
        with pytest.raises(LLKDDataError, match="no column `label`.*columns found: text[.].*`trl_bbkd.pseudo_label`"):
            find_class_names(Dataset.from_dict({"text": ["a"], "row_in_file": [0]}), NAMES)


class TestNumbers:
    @pytest.mark.parametrize(
        ("labels", "feature"),
        [
            (["animal", "sky", "fruit"], None),
            ([2, 0, 1], None),
            # The data set's own order is another one
            ([1, 0, 2], ClassLabel(names=["sky", "animal", "fruit"])),
        ],
    )
    def test_whatever_the_labels_are(self, labels, feature):
        found = with_class_numbers(make(labels, feature, text=["x", "y", "z"]), "label", NAMES, "training")
        assert found["label"][:] == [2, 0, 1]
        assert found.features["label"].names == NAMES and found["text"][:] == ["x", "y", "z"]

    def test_unknown_true_labels_stay_unknown(self):
        rows = make(["sky"] * 3, gold=["fruit", None, "sky"])
        assert with_class_numbers(rows, "gold", NAMES, "training")["gold"][:] == [1, None, 0]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (
                ["sky", "fruits"],
                "Row 1 of the test rows: `label` is 'fruits'.*none of the classes.*did you mean 'fruit'",
            ),
            (["sky", "Q"], "Row 1 of the test rows: `label` is 'Q'.*sky, fruit, animal"),
            ([0, 3], "Row 1 of the test rows: `label` is 3"),
            ([0.5], "Row 0 of the test rows: `label` is 0.5"),
            ([True, False], "Row 0 of the test rows: `label` is True"),
            ([-1], "Row 0 of the test rows: `label` is -1"),
        ],
    )
    def test_what_is_no_class(self, labels, message):
        with pytest.raises(LLKDDataError, match=message):
            with_class_numbers(make(labels), "label", NAMES, "test")

    def test_a_row_is_named_by_its_place_in_the_file(self):
        with pytest.raises(LLKDDataError, match="Row 7 of the test rows: `label` is 'fruits'"):
            with_class_numbers(make(["sky", "fruits"], row_in_file=[9, 7]), "label", NAMES, "test")

    def test_minus_one_of_a_class_label_is_no_class(self):
        rows = make([0, -1], ClassLabel(names=NAMES), text=["x", "y"])
        with pytest.raises(LLKDDataError, match="Row 1 of the test rows: `label` is -1"):
            with_class_numbers(rows, "label", NAMES, "test")
        gold = rows.rename_column("label", "gold")
        assert with_class_numbers(gold, "gold", NAMES, "training")["gold"][:] == [0, None]

    def test_no_such_column(self):
        with pytest.raises(LLKDDataError, match="The test rows have no column `label`; columns found: text"):
            with_class_numbers(Dataset.from_dict({"text": ["a"]}), "label", NAMES, "test")


def test_counts():
    rows = make(
        ["sky", "fruit", "sky", "sky"], teacher_confidence=[0.5, 1.0, 0.25, 0.25], gold=["sky", None, None, "sky"]
    )
    for column in ("label", "gold"):
        rows = with_class_numbers(rows, column, NAMES, "training")
    assert count_labels(rows).table_rows() == [
        ("rows", "4"),
        ("label sky", "3"),
        ("label fruit", "1"),
        ("label animal", "0"),
        ("with a true label too", "2"),
        ("mean confidence", "0.500"),
    ]
    test = with_class_numbers(make(["sky"], text=["a"]), "label", NAMES, "test")
    assert [label for label, _ in count_labels(test).table_rows()] == ["rows", *(f"label {name}" for name in NAMES)]
