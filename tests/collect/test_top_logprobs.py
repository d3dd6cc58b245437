"""Log-probabilities from an endpoint to the targets of Bayes-KD, with no code between."""

import math

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from tests.bayeskd.helpers import make_trainer, stored_targets
from tests.collect.helpers import run
from tests.collect.teachers import END, ShowingServer, sentencepiece_bpe
from tests.conftest import build_tokenizer
from trl_bbkd.collect.spelling import Speller
from trl_bbkd.data.teacher_data import load_teacher_data
from trl_bbkd.errors import TeacherDataError


QUESTIONS = [f"Question {number}?" for number in range(12)]
SHOWN = {"logprobs": True, "top_logprobs": 3}
ESTIMATE = {
    "stages": ["estimate"],
    "posterior_draws": 0,
    "prior_weight": 0.0,
    "held_out": 0,
    "max_completion_length": 64,
}


def card(tmp_path):
    return (tmp_path / "out/README.md").read_text()


def loaded(tmp_path):
    return load_teacher_data(ScriptArguments(dataset_name=str(tmp_path / "out")), DatasetMixtureConfig())[0]


@pytest.mark.parametrize(
    ("conversational", "by_id"), [(False, False), (True, True)], ids=["bytes of texts", "ids of messages"]
)
def test_an_endpoint_becomes_targets(tmp_path, tiny_model_dir, conversational, by_id):
    """At each token of each answer, its end included, the posterior has the probabilities that the endpoint showed."""
    with ShowingServer(Speller(build_tokenizer(), "teacher")) as server:
        changes = SHOWN | {"tokenizer": tiny_model_dir, "conversational": conversational, "return_token_ids": by_id}
        run(server, tmp_path, QUESTIONS, **changes)
    assert "| log-probabilities by the tokenizer's tokens: exact | 12 |" in card(tmp_path)
    rows = loaded(tmp_path)
    trainer = make_trainer(tmp_path / "student", tiny_model_dir, None, rows.to_list(), **ESTIMATE)
    trainer.train()
    (store,) = trainer.proxy_stages.stores(trainer._whole_rows)
    targets = stored_targets(store)
    for row, values in zip(trainer._whole_rows, rows["top_logprobs"], strict=True):
        stored = targets[row["row_key"]]
        assert len(stored) == len(values["ids"]) and all(values["ids"])
        for found, ids, numbers in zip(stored, values["ids"], values["logprobs"], strict=True):
            # What is left of 1 goes to other candidates, if there are any
            whole = 1.0 if len(found) > len(ids) else sum(map(math.exp, numbers))
            for id_, number in zip(ids, numbers, strict=True):
                assert found[id_] == pytest.approx(math.exp(number) / whole, rel=0.02)
    assert trainer.warnings == []


def test_what_is_not_exact_is_left_out_by_default(tmp_path, tiny_model_dir, capsys):
    """As of a teacher with another tokenizer, which has some tokens in common with the student's."""
    with ShowingServer(Speller(sentencepiece_bpe(), "teacher")) as server:
        run(server, tmp_path, QUESTIONS, tokenizer=tiny_model_dir, **SHOWN)
    assert (
        "of 12 answers 0 have exact `top_logprobs`: the teacher's tokenizer may be another" in capsys.readouterr().err
    )
    rows = loaded(tmp_path).to_list()
    values = [row["top_logprobs"] for row in rows if row["top_logprobs"] is not None]
    assert values and all(0 < sum(map(bool, value["ids"])) < len(value["ids"]) for value in values)
    assert f"| log-probabilities by the tokenizer's tokens: in part | {len(values)} |" in card(tmp_path)
    by_default = make_trainer(tmp_path / "a", tiny_model_dir, None, rows, **ESTIMATE)
    assert by_default.proxy_stages.rows.estimate["top_logprobs"][:] == [None] * 12
    assert f"{len(values)} values of `top_logprobs` are not exact and were not used" in by_default.warnings[0]["text"]
    taken = make_trainer(tmp_path / "b", tiny_model_dir, None, rows, inexact_top_logprobs=True, **ESTIMATE)
    assert taken.proxy_stages.rows.estimate["top_logprobs"][:].count(None) == 12 - len(values)
    assert taken.warnings == []


def test_the_column_of_another_students_tokens_is_refused(tmp_path, tiny_model_dir):
    with ShowingServer(Speller(build_tokenizer(), "teacher")) as server:
        run(server, tmp_path, QUESTIONS, tokenizer=tiny_model_dir, **SHOWN)
    rows = loaded(tmp_path).to_list()
    tokens = rows[3]["top_logprobs"]["tokens"]
    rows[3]["top_logprobs"]["tokens"] = [tokens[1], tokens[0], *tokens[2:]]
    with pytest.raises(
        TeacherDataError, match="Row 3: `top_logprobs` is of other tokens than the student's tokenizer makes"
    ):
        make_trainer(tmp_path / "a", tiny_model_dir, None, rows, **ESTIMATE)


def test_what_is_missing_is_null(tmp_path, tiny_model_dir):
    """No log-probabilities, and some that end before their answer does; a second run writes the same."""
    prompts = ["Whole?", "[no logprobs] None?", "[short logprobs] Half?"]

    class Short(ShowingServer):
        def _choice(self, body, index, fault):
            choice = super()._choice(body, index, fault)
            if fault == "short logprobs":
                del choice["logprobs"]["content"][3:]
            return choice

    with Short(Speller(build_tokenizer(), "teacher")) as server:
        found = run(server, tmp_path, prompts, tokenizer=tiny_model_dir, **SHOWN)
        assert [row["top_logprobs"] is None for row in found] == [False, True, True]
        assert run(server, tmp_path, tokenizer=tiny_model_dir, **SHOWN) == found and server.requests == 3
    assert "| log-probabilities by the tokenizer's tokens: missing | 2 |" in card(tmp_path)


def test_the_column_of_a_prompts_file_is_not_taken_over(tmp_path, tiny_model_dir):
    with ShowingServer(Speller(build_tokenizer(), "teacher")) as server:
        found = run(server, tmp_path, [{"prompt": "A?", "top_logprobs": 1}], tokenizer=tiny_model_dir, **SHOWN)
    assert found[0]["top_logprobs"]["ids"][-1][0] == build_tokenizer().convert_tokens_to_ids(END)
    assert Dataset.from_list(found).features["top_logprobs"]["exact"].dtype == "bool"
