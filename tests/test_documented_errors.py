"""Each error that `docs/teacher_data.md` and `docs/multi_gpu.md` quote is the one that is raised."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from tests.conftest import build_tokenizer
from trl_bbkd.data.teacher_data import check_teacher_data, load_teacher_data, tokenize_teacher_data
from trl_bbkd.errors import TeacherDataError


DOCS = Path(__file__).parents[1] / "docs"
USER = [{"role": "user", "content": "Name a red fruit."}]
APPLE = [{"role": "assistant", "content": "An apple."}]
# A template as many models have: roles and contents, no tools, no reasoning
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ROWS = {
    "an unknown column": [{"prompt": "Name a red fruit.", "answer": "An apple."}],
    "messages in one column": [{"messages": USER + APPLE}],
    "instructions": [{"instruction": "Name a red fruit.", "input": "", "output": "An apple."}],
    "a string and messages": [{"prompt": "Name a red fruit.", "completion": APPLE}],
    "messages as text": [{"prompt": str(USER), "completion": str(APPLE)}],
    "null": [{"prompt": "Name a red fruit.", "completion": None}],
    "empty": [{"prompt": "Name a red fruit.", "completion": " "}],
    "a number": [{"prompt": "Name a number.", "completion": 7}],
    "two answers": [{"prompt": USER, "completion": ["An apple.", "A cherry."]}],
    "the user's turn as an answer": [{"prompt": USER, "completion": USER}],
    "no text": [{"prompt": USER, "completion": [{"role": "assistant", "content": None}]}],
    "a picture": [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": APPLE}],
    "tools beside a string": [{"prompt": "Add 1 and 2.", "completion": "3", "tools": '[{"name": "add"}]'}],
}
RENDERED = {
    "tools": [{"prompt": USER, "completion": APPLE, "tools": json.dumps([{"name": "add"}])}],
    "reasoning": [{"prompt": USER, "completion": [{**APPLE[0], "reasoning_content": "Red is the colour of apples."}]}],
    "a field": [{"prompt": [{**USER[0], "name": "Ann"}], "completion": APPLE}],
}


def check_quoted(message):
    page = (DOCS / "teacher_data.md").read_text(encoding="utf-8")
    # As Markdown, `][` would be a link
    assert f'"{message}"' in page.replace("\\[", "[")


def load(name):
    return load_teacher_data(ScriptArguments(dataset_name=name), DatasetMixtureConfig())


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows(rows):
    with pytest.raises(TeacherDataError) as error:
        check_teacher_data(Dataset.from_list(rows))
    check_quoted(error.value)


def test_two_forms(tmp_path, monkeypatch):
    """As two files of one split: one file of two forms cannot be read at all."""
    monkeypatch.chdir(tmp_path)
    lines = [
        json.dumps({"prompt": "Name a red fruit.", "completion": "An apple."}),
        json.dumps({"prompt": USER, "completion": APPLE}),
    ]
    Path("teacher.jsonl").write_text("\n".join(lines))
    with pytest.raises(TeacherDataError) as error:
        check_teacher_data(load("teacher.jsonl")[0])
    check_quoted(error.value)


@pytest.mark.parametrize("rows", RENDERED.values(), ids=RENDERED)
def test_what_a_template_leaves_out(rows):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(TeacherDataError) as error:
        tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=20)
    check_quoted(error.value)


def test_messages_for_a_base_model():
    tokenizer = build_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = None, ""
    with pytest.raises(TeacherDataError) as error:
        tokenize_teacher_data(
            Dataset.from_list([{"prompt": USER, "completion": APPLE}]), tokenizer, max_completion_length=20
        )
    check_quoted(error.value)


def test_no_room():
    rows = Dataset.from_list([{"prompt": "a " * 40, "completion": "b"}])
    with pytest.raises(TeacherDataError) as error:
        tokenize_teacher_data(rows, build_tokenizer(), max_completion_length=500, max_length=512)
    check_quoted(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("teacher.txt", "An apple."),
        ("missing.jsonl", None),
        ("teacher.jsonl", ""),
        ("teacher.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "c"'),
        ("data/teacher.jsonl", '{"prompt": "a", "completion": "b"}'),
    ],
    ids=["ending", "missing", "empty", "cut", "no split"],
)
def test_files(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("data").mkdir()
        Path(name).write_text(content)
    with pytest.raises(TeacherDataError) as error:
        load("data" if name.startswith("data/") else name)
    check_quoted(str(error.value).replace(str(tmp_path), "/home/me"))
