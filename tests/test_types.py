"""The types that a user's type checker sees, and those of our own code (`mypy`, as pyproject.toml sets it)."""

import subprocess
import sys
from pathlib import Path

import pytest

import trl_bbkd


pytest.importorskip("mypy", reason="mypy is not installed: the `test` extra")

ROOT = Path(__file__).parents[1]
# A user is as strict as can be: TRL's own names can be imported only with `implicit_reexport`. To read torch's types takes as
# long as to read all the others
USER = """
[mypy]
strict = true
implicit_reexport = true
[mypy-datasets.*]
ignore_missing_imports = true
[mypy-torch.*]
follow_imports = skip
[mypy-trl_bbkd.*]
follow_imports = silent
"""


def mypy(*arguments, cache):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_users_script(tmp_path):
    """Its assertions hold, and each of its mistakes is one."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(USER)
    found = mypy("--config-file", settings, "tests/typed_use.py", cache=tmp_path / "cache")
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_users_script_has_every_public_name():
    script = (ROOT / "tests/typed_use.py").read_text()
    assert [name for name in trl_bbkd.__all__ if f"    {name},\n" not in script] == []


def test_the_package(tmp_path):
    found = mypy(cache=tmp_path / "cache")
    assert found.returncode == 0, found.stdout + found.stderr
