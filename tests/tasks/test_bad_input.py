"""What is wrong with tasks is one line, before any weights are loaded."""

import re
import shutil
import sys

import pytest

from tests.tasks.helpers import ask, write_task, write_writing_task
from trl_bbkd.cli import main


pytest.importorskip("lm_eval")


@pytest.fixture
def refusal(tmp_path, tiny_model_dir, monkeypatch, capsys):
    """What a command is refused with."""
    from lm_eval.tasks import manager

    from trl_bbkd.evaluation import loading

    # lm_eval's own tasks: one. The list of all of them takes half a minute to read
    (tmp_path / "stock").mkdir()
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "stock/manager.py"))
    write_task(tmp_path / "stock", "hellaswag", dataset_path="Rowan/hellaswag", dataset_kwargs=None)
    write_writing_task(tmp_path / "stock", task="humaneval", unsafe_code=True)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)

    def refuse(*tasks, model=tiny_model_dir, options=()):
        with pytest.raises(SystemExit) as stopped:
            ask(tmp_path, model, *tasks, options=options)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        (line,) = (line for line in error.splitlines() if line.startswith("error: "))
        assert "Traceback" not in error and error.splitlines()[-1] == line
        return line.removeprefix("error: ")

    return refuse


def test_names(refusal):
    assert refusal("hellaswagg") == "--tasks: lm_eval has no task 'hellaswagg'; did you mean 'hellaswag'?"
    line = refusal("hellaswag")
    assert line.startswith("--tasks: hellaswag cannot be loaded: Couldn't reach 'Rowan/hellaswag' on the Hub")
    assert "HF_HUB_OFFLINE is set: load its data once without it" in line


def test_unsafe_code(refusal, tmp_path):
    line = "runs on this machine what the student writes. Where that may happen, in a container, add --confirm_run_unsafe_code."
    assert refusal("humaneval") == f"--tasks: humaneval {line}"
    # Its own functions are not run either
    own = write_writing_task(tmp_path / "stock", task="humaneval", unsafe_code=True, process_docs="DOCS")
    own.write_text(own.read_text().replace("DOCS", "!function module.docs"))
    (tmp_path / "stock/module.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\ndocs = list\n")
    assert refusal("humaneval") == f"--tasks: humaneval {line}" and not (tmp_path / "it_ran").exists()
    assert refusal(write_writing_task(tmp_path, unsafe_code=True)) == f"--tasks: writing {line}"


FILES = {
    "a recipe": ("method: gad\nmodel_name_or_path: x\n", "it is no task of lm_eval. A task has the keys `task`"),
    "no data": ("task: red\noutput_type: multiple_choice\n", "it is no task of lm_eval."),
    "a list": ("- a\n- b\n", "it is no task of lm_eval."),
    "not YAML": ("task: [red\n", "is not YAML: while parsing a flow sequence"),
    "a key": ("task: red\ndataset_path: json\ndoc_to_txt: a\n", "cannot be loaded: TypeError: TaskConfig"),
    "a module": ("task: red\ndataset_path: json\ndoc_to_text: !function gone.words\n", "Cannot import module 'gone'"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_files(refusal, tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    assert message in refusal("my.yaml")


def test_data(refusal, tmp_path):
    gone = {"data_files": {"test": "gone.jsonl"}}
    line = refusal(write_task(tmp_path, dataset_kwargs=gone))
    assert (
        "red.yaml cannot be loaded: Unable to find" in line
        and f"gone.jsonl'. Relative paths of data files start at {tmp_path}." in line
    )
    line = refusal(write_task(tmp_path, dataset_kwargs={"data_files": str(tmp_path / "red.jsonl")}))
    assert "there is no 'test'. A split of a local file is named so: `dataset_kwargs: {data_files: {test:" in line
    line = refusal(write_task(tmp_path), options=["--num_fewshot", 9])
    assert line == "--num_fewshot: red has 7 rows to take examples from, and 9 are asked for."
    assert "has images or sounds" in refusal(write_task(tmp_path, doc_to_image=["question"]))


def test_paths(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal("./nowhere.yaml") == f"--tasks: there is no file or folder {tmp_path}/nowhere.yaml."
    assert refusal("./empty") == "--tasks: the folder ./empty has no YAML file of a task."
    assert refusal("red", options=["--include_path", "nowhere"]) == "--include_path: there is no folder nowhere."
    first, second = write_task(tmp_path), write_task(tmp_path, file="again.yaml")
    assert f"{first} and {second} are both the task 'red'" in refusal(first, second)


def test_data_that_cannot_be_read(refusal, tmp_path):
    assert refusal(write_task(tmp_path, rows=[])).endswith("red.yaml cannot be loaded: its data has no rows.")
    task = write_task(tmp_path)
    (tmp_path / "red.jsonl").write_text("{broken")
    # Older versions of datasets do not say that it is the data
    said = r"cannot be loaded: (its data cannot be read: JSON parse error: Missing a name|ValueError: Expected object)"
    assert re.search(said, refusal(task))


def test_a_name_that_is_a_number(refusal, tmp_path):
    """Also in a file beside that of a group, which lists its folder."""
    assert refusal(write_task(tmp_path, task=5)).endswith(
        "red.yaml: `task` is the task's name, a text: put it in quotes."
    )
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [red]\n")
    line = refusal("./group.yaml")
    assert f"--tasks: the tasks in {tmp_path} cannot be listed: TypeError: " in line and "is a name." in line


def test_an_output_dir_that_is_a_file(refusal, tmp_path):
    task = write_task(tmp_path)
    for place in (tmp_path / "out", tmp_path / "out/benchmarks"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("")
        assert (
            refusal(task)
            == f"--output_dir {tmp_path}/out/benchmarks cannot be used: {WHY[place.name]}. Name another folder."
        )
        place.unlink()


WHY = {"out": "Not a directory", "benchmarks": "File exists"}


def test_a_student_whose_weights_are_cut(refusal, tmp_path, tiny_model_dir):
    """Before tasks are loaded."""
    shutil.copytree(tiny_model_dir, tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"")
    assert refusal("no_such_task", model="./cut").startswith(
        "The student's weights cannot be read: cut/model.safetens"
    )


def test_the_student(refusal, tmp_path, tiny_model_dir):
    from transformers import AutoTokenizer

    task = write_task(tmp_path)
    assert "is a file of answers. Tasks are asked of a model" in refusal(task, model="answers.jsonl")
    assert "MODEL='./nowhere' is neither a folder with a student" in refusal(task, model="./nowhere")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    line = refusal(task, model="./plain", options=["--apply_chat_template"])
    assert line == "--apply_chat_template: the tokenizer of ./plain has no chat template."


OPTIONS = {
    "limit": (["--limit", "2.5"], "--limit: expected a number of rows, or a share between 0 and 1, got 2.5."),
    "shots": (["--num_fewshot", "-1"], "--num_fewshot: expected 0 or more, got -1."),
    "batch": (["--batch_size", "auto"], "--batch_size: expected a whole number, got 'auto'."),
    "typo": (["--num_few_shot", "1"], "unknown option --num_few_shot; did you mean '--num_fewshot'?"),
    "judge": (["--judge", "gpt"], "--data is missing"),
    "code": (["--trust_remote_code"], "unknown option --trust_remote_code"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(refusal, options, message):
    assert message in refusal("my.yaml", options=options)


def test_no_task_and_no_lm_eval(refusal, monkeypatch, capsys, tmp_path):
    assert refusal("") == "--tasks: no task is named. Say which, such as --tasks hellaswag my_tasks/arith.yaml."
    with pytest.raises(SystemExit):
        main(["evaluate", "x", "--tasks", "red"])
    assert "--output_dir is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "x", "--limit", "2", "--output_dir", "out"])
    assert "--limit: no task is named." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refusal("red") == '--tasks needs lm_eval, which is not installed: pip install "trl-bbkd[eval]".'
