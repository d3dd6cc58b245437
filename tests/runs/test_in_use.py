"""Two runs in one folder."""

import errno
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.recipes import write_recipe
from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.in_use import LOCK_NAME, claimed
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run


HOLD = """
import fcntl, os, sys
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX)
print(os.getpid(), file=lock, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `out`."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", HOLD, tmp_path / "out" / LOCK_NAME]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_before_it_does_anything(tmp_path, holder, recipe_folder, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("trl_bbkd.runs.text_job.TextJob", pytest.fail)
    with pytest.raises(
        RecipeError, match=f"out is in use by another run, process {holder.pid}: .* name another output_dir"
    ):
        run(load_recipe(write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out")))


def test_a_process_that_was_killed_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    with claimed(tmp_path / "out"):
        pass


def test_nothing_is_left_behind(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "a" / "out"):
            assert (tmp_path / "a" / "out" / LOCK_NAME).is_file()
        assert not (tmp_path / "a" / "out").exists()
    with claimed(tmp_path / "out"):
        (tmp_path / "out" / "report.md").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.md"]


def test_where_nothing_can_be_locked_a_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_bbkd.runs.in_use.fcntl", None)
    with claimed(tmp_path / "out"):
        pass

    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def lockf(file, operation):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("trl_bbkd.runs.in_use.fcntl", NoLocks)
    with claimed(tmp_path / "out"):
        pass
    assert "cannot be locked (No locks available)" in caplog.text
