"""When a student's answers are taken that are there, and when it is asked anew."""

import json

import pytest

from trl_bbkd.judging import student
from trl_bbkd.judging.pairs import Asked
from trl_bbkd.judging.settings import EvaluateConfig, JudgeConfig
from trl_bbkd.judging.student import ANSWERS, SAMPLING, student_answers


def asked(text="Why?", **columns):
    return {
        "a": Asked(0, {"prompt": text, "chat_template_kwargs": None, **columns}),
        "b": Asked(1, {"prompt": "How?"}),
    }


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Answers of a student that is a folder of weights, and how often it was sampled."""
    calls = []

    def sample(settings, prompts):
        calls.append(settings)
        # With an end of a line that is none
        texts = [f"{len(calls)}\u2028{number}" for number in range(settings.student_samples)]
        return [{"prompt": key, "completion": text, "is_cut": key == "a"} for key in prompts for text in texts]

    monkeypatch.setattr(student, "_sample", sample)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)

    def ask(prompts=None, model="one", **changes):
        judge = JudgeConfig(base_url="http://h/v1", model="m", output_dir="out", dataset_name="x")
        settings = EvaluateConfig(model=str(tmp_path / model), data="x", judge=judge, **changes)
        return *student_answers(settings, prompts or asked(), tmp_path), len(calls)

    return ask


def test_answers_that_are_there_are_taken(answers):
    assert answers() == ({"a": ["1\u20280"], "b": ["1\u20280"]}, 1, 1)
    assert answers() == answers() == ({"a": ["1\u20280"], "b": ["1\u20280"]}, 1, 1)
    found, cut, calls = answers(student_temperature=1.0, student_samples=2)
    assert (found, cut, calls) == ({"a": ["2\u20280", "2\u20281"], "b": ["2\u20280", "2\u20281"]}, 2, 2)


@pytest.mark.parametrize(
    ("name", "text"), [(SAMPLING, "{"), (SAMPLING, None), (ANSWERS, "{"), (ANSWERS, ""), (ANSWERS, None)]
)
def test_files_that_are_broken_or_gone_are_made_anew(answers, tmp_path, name, text):
    answers()
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text + "\n" * bool(text))
    assert answers() == answers() == ({"a": ["2\u20280"], "b": ["2\u20280"]}, 1, 2)


def test_half_of_the_answers_are_none(answers, tmp_path):
    answers()
    (tmp_path / ANSWERS).write_text((tmp_path / ANSWERS).read_text().split("\n")[0] + "\n")
    assert answers()[2] == 2


SAMPLED = {"student_temperature": 1.0, "student_samples": 2}
CHANGES = {
    "weights": {"model": "two"},
    "a prompt": {"prompts": asked("Who?")},
    "a prompt's template": {"prompts": asked(chat_template_kwargs={"enable_thinking": True})},
    "length": {"student_max_tokens": 7},
    "temperature": {"student_temperature": 0.5},
    "samples": {"student_samples": 3},
    "batch": {"student_batch_size": 3},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_decides_on_answers_samples_them_anew(answers, change):
    assert answers(**SAMPLED)[2] == 1 and answers(**SAMPLED | change)[2] == 2


def test_of_a_killed_run_no_answers_of_another_student_are_left(answers, tmp_path, monkeypatch):
    """Between the two files."""
    answers()
    write = student.write_atomically

    def killed(path, text):
        if path.name == SAMPLING:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(student, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        answers(model="two")
    assert json.loads((tmp_path / ANSWERS).read_text().split("\n")[0])["completion"].startswith("2")
    monkeypatch.setattr(student, "write_atomically", write)
    assert answers()[0]["a"] == ["3\u20280"]
