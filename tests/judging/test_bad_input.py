"""What is wrong is one line."""

import json
import shutil

import pytest

from tests.collect.server import KEY
from tests.judging.helpers import command, files, judging, write_rows
from trl_bbkd.cli import main
from trl_bbkd.judging import student


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What a command, changed so, is refused with; and how many requests were sent."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    files(tmp_path, [(f"Question {n}?", f"s{n}", f"t{n}") for n in range(12)])

    def refuse(*words, says=None, requests=0, **changes):
        with judging(says or (lambda *_: "Verdict: A")) as server, pytest.raises(SystemExit) as stopped:
            main([*command(server, tmp_path, **changes), *words])
        assert stopped.value.code == 2 and server.requests == requests
        error = capsys.readouterr().err
        (line,) = (line for line in error.splitlines() if line.startswith("error: "))
        assert "Traceback" not in error and error.splitlines()[-1] == line and KEY not in error
        return line.removeprefix("error: ")

    return refuse


def test_no_key(refusal, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert refusal().startswith("there is no key: the environment has no OPENAI_API_KEY.")


def test_a_judge_that_is_not_there(refusal):
    assert refusal(base_url="http://127.0.0.1:9/v1") == (
        "http://127.0.0.1:9/v1 and model 'teacher-1': unreachable: Connection refused. The same command goes on with what is missing."
    )


def test_verdicts_that_can_never_be_read(refusal):
    """Few are paid for: the first four pairs'."""
    line = refusal(says=lambda *_: "I like both.", metric="win_rate", requests=8)
    assert line == (
        "the judge 'teacher-1' gave no preference that can be read in 8 answers; the first ends with 'I like both.'. Name another judge."
    )
    line = refusal(says=lambda *_: "Let me think [cut]", metric="score", requests=8)
    assert line.endswith("'Let me think [cut]'. 8 were not whole: raise --max_tokens, now 1,024.")


def test_an_output_dir_that_is_a_file(refusal, tmp_path):
    (tmp_path / "taken").write_text("")
    for place in ("taken", "taken/below"):
        line = refusal(output_dir=str(tmp_path / place))
        assert line.startswith(f"--output_dir {tmp_path / place} cannot be used: ") and line.endswith(
            "Name another folder."
        )


def test_a_judge_is_tried_before_the_student_writes(refusal, monkeypatch, tiny_model_dir):
    """With the teacher's answers beside themselves; a journal that is none is seen before, too."""
    monkeypatch.setattr(student, "_sample", lambda *_: pytest.fail("sampled"))
    model = {"model": tiny_model_dir}
    assert "unreachable: Connection refused" in refusal(base_url="http://127.0.0.1:9/v1", **model)
    line = refusal(says=lambda *_: "I like both.", metric="score", requests=4, **model)
    assert "gave no points that can be read in 4 answers" in line
    line = refusal(max_requests=5, requests=1, **model)
    assert line == "--max_requests: 5 is reached before the judge's first verdicts are there. Raise it."


def test_a_file_in_the_way(refusal, tmp_path):
    (tmp_path / "out/evaluation.json").mkdir(parents=True)
    line = refusal(metric="win_rate", requests=24)
    assert line == (
        f"{tmp_path}/out/evaluation.json cannot be read or written: Is a directory. Mend that; the same command goes on."
    )


STUDENTS = {
    "cut weights": ("model.safetensors", "", "The student's weights cannot be read: {}/model.safetensors (0 bytes)"),
    "no tokenizer": (
        "tokenizer.json",
        None,
        "MODEL='{}' is neither a folder with a student nor a model on the Hub: {} has no to",
    ),
    "no JSON": ("adapter_config.json", "{", "{}/adapter_config.json is no JSON: Expecting"),
    "a list": ("adapter_config.json", "[]", "{}/adapter_config.json has no settings of an adapter."),
    "no template": (
        "chat_template.jinja",
        None,
        "The rows are conversations, but the tokenizer of {} has no chat template.",
    ),
}


@pytest.mark.parametrize(("file", "content", "message"), STUDENTS.values(), ids=STUDENTS)
def test_students(refusal, tmp_path, tiny_model_dir, monkeypatch, file, content, message):
    """Each before its weights are loaded, and before the judge is paid."""
    from trl_bbkd.host import model_files

    monkeypatch.setattr(model_files.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    shutil.copytree(tiny_model_dir, folder := tmp_path / "model")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    if file.startswith("token"):
        (folder / "tokenizer_config.json").unlink()
    rows = [{"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]}]
    write_rows(tmp_path / "teacher.jsonl", rows)
    assert refusal(model="model").startswith(message.format(folder, folder))


def test_an_adapter_without_weights(refusal, tmp_path, tiny_model_dir):
    (tmp_path / "model").mkdir()
    settings = {"base_model_name_or_path": tiny_model_dir, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1}
    (tmp_path / "model/adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    line = (
        f"{tmp_path}/model is an adapter without weights: it has no adapter_model.safetensors. Copy or make it again."
    )
    assert refusal(model="model") == line


OPTIONS = {
    "a metric": ({"metric": "bleu"}, "--metric: 'bleu' is none of win_rate, lc_win_rate, score."),
    "no judge": ({"judge": None}, "--judge is missing: the judge, by the endpoint's name for it."),
    "no address": ({"base_url": None}, "--base_url is missing: the address of the judge's endpoint"),
    "an address": ({"base_url": "localhost"}, "--base_url: expected an address such as https://"),
    "a key": ({"api_key": KEY}, "option --api_key: a key stands in no recipe and in no command."),
    "a typo": ({"metrics": "score"}, "unknown option --metrics; did you mean '--metric'?"),
    "a number": ({"max_prompts": "many"}, "--max_prompts: expected a whole number, got 'many'."),
    "no samples": ({"student_samples": 0}, "--student_samples: expected 1 or more, got 0."),
    "greedy samples": ({"student_samples": 4}, "--student_samples: greedy answers are all the same."),
    "a cap without prices": ({"max_cost": 1}, "--max_cost: a cap on money needs"),
    "no rows": ({"data": "nowhere.jsonl"}, "`--data nowhere.jsonl` does not exist"),
    "no answers": ({"model": "nowhere.jsonl"}, "`nowhere.jsonl` does not exist"),
    "no model": (
        {"model": "./nowhere"},
        "MODEL='./nowhere' is neither a folder with a student nor a model on the Hub",
    ),
}


@pytest.mark.parametrize(("changes", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(refusal, changes, message):
    assert message in refusal(**changes)


ROWS = {
    "a column": (
        [{"prompt": "Question 0?", "answer": "s"}],
        "has no column `completion`; columns found: prompt, answer.",
    ),
    "other prompts": ([{"prompt": "Else?", "completion": "s"}], "the two have no prompt in common."),
    "null": (
        [{"prompt": "Q", "completion": "s"}, {"prompt": "Q", "completion": None}],
        "row 1: `completion` is neither",
    ),
}


@pytest.mark.parametrize(("rows", "message"), ROWS.values(), ids=ROWS)
def test_rows(refusal, tmp_path, rows, message):
    write_rows(tmp_path / "student.jsonl", rows)
    assert message in refusal()


def test_a_cap_below_the_first_pair(refusal):
    line = refusal(metric="win_rate", max_requests=1, requests=1)
    assert line == "no pair of answers has a readable verdict in both orders: stopped at --max_requests 1."
