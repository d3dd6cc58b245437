"""The plan of the house: `[tool.importlinter]` in pyproject.toml, and what a newcomer finds at the top."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trl_bbkd
from trl_bbkd import errors
from trl_bbkd.errors import DistillationError
from trl_bbkd.runs.methods import METHODS


ROOT = Path(__file__).parents[1]
PACKAGE = Path(trl_bbkd.__file__).parent


def lint(folder):
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "."},
    )


def test_imports_keep_to_the_plan():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 4 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("gad/advantages.py", "from ..proxykd import weights", "Floors go down, and no method knows another"),
        ("data/messages.py", "from ..runs import recipe", "Floors go down, and no method knows another"),
        ("gad/trainer.py", "from ..runs import job", "A method's own files alone know runs"),
        (
            "discriminator/objectives.py",
            "from ..host import resume",
            "Mathematics imports nothing of ours but mathematics",
        ),
        ("reports/curves.py", "from . import text_report", "No circles"),
    ],
)
def test_a_line_against_the_plan_is_named(tmp_path, file, line, contract):
    shutil.copytree(PACKAGE, tmp_path / "trl_bbkd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "trl_bbkd" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    assert f"{contract} BROKEN" in lint(tmp_path).stdout


def test_four_modules_at_the_top():
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py", "cli.py", "errors.py"]


def test_contributing_has_the_floors_in_their_order():
    layers = re.search(r"layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL).group(1)
    floors = re.findall(r'"([^"]+)"', layers)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    written = re.search(r"```\n(cli .*?)```", text, flags=re.DOTALL).group(1)
    assert [line.split("  ")[0].strip() for line in written.splitlines()] == floors


SHARED = ("plan", "runs", "reports", "hub", "evaluation", "data", "host", "seqkd", "cli.py", "commands")
MAY_NAME_A_METHOD = {
    ("commands/train.py", "a recipe's file, or the name of one that comes with the package, such as gad"),
    ("runs/shipped.py", "They bring models and data, and run on 2 CPU cores (trl-bbkd train gad):"),
    (
        "runs/text_job.py",
        ", which writes no text: take a causal language model. (For a classifier there is `method: llkd`.)",
    ),
    ("hub/settings.py", "llkd"),  # the rule of selection
}


def words(tree):
    """Names and texts of a module; docstrings aside."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, str) and id(node) not in docstrings:
                yield value


def test_shared_code_knows_no_method_by_name():
    """But for the one line that a method has in `METHODS`."""
    name = re.compile("|".join((*METHODS, "proxy-kd", "bayes-kd")), re.IGNORECASE)
    files = [
        file
        for room in SHARED
        for file in ([PACKAGE / room] if room.endswith(".py") else (PACKAGE / room).rglob("*.py"))
    ]
    found = {
        (str(file.relative_to(PACKAGE)), word)
        for file in files
        for word in words(ast.parse(file.read_text()))
        if name.search(word)
    }
    one_line = {("runs/methods.py", text) for line in METHODS.items() for text in line}
    assert found == one_line | MAY_NAME_A_METHOD


def test_errors_are_one_tree_of_types_that_python_knows():
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(found) > 8 and all(issubclass(error, DistillationError) for error in found)
    for error in found:
        assert error is DistillationError or issubclass(error, ValueError | RuntimeError)


def test_no_error_of_ours_is_defined_elsewhere():
    elsewhere = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "errors.py" and re.search(r"^class \w*Error\b", path.read_text(), flags=re.MULTILINE)
    ]
    assert elsewhere == []
