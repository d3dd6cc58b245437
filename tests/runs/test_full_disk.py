"""A disk that fills up while a run writes."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from trl_bbkd.errors import DiskFullError
from trl_bbkd.host.resume import TRAINER_STATE_NAME
from trl_bbkd.runs.full_disk import tells_of_a_full_disk


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/report.md")


def run_that_fails(output_dir, failure):
    @tells_of_a_full_disk
    def run(recipe):
        if isinstance(failure, Exception):
            raise failure
        failure()

    run(SimpleNamespace(training_args=SimpleNamespace(output_dir=str(output_dir))))


@pytest.fixture
def full_disk(tmp_path):
    """A disk with 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mounted = mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def write_text(folder):
    (folder / "report.md").write_text("x" * 10**6)


def write_student(folder):
    save_file({"weight": torch.zeros(10**5)}, folder / "model.safetensors")


def write_optimizer(folder):
    torch.save({"exp_avg": torch.zeros(10**5)}, folder / "optimizer.pt")


@pytest.mark.parametrize("write", [write_text, write_student, write_optimizer])
def test_whoever_writes(full_disk, write):
    with pytest.raises(DiskFullError, match=f"^The disk is full .*No checkpoint in {full_disk} was finished.*start again.$"):
        run_that_fails(full_disk, lambda: write(full_disk))


def test_what_is_safe_is_told(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / TRAINER_STATE_NAME).write_text("{}")
    (tmp_path / "checkpoint-8").mkdir()  # in which the disk ended
    (tmp_path / "checkpoint-8" / TRAINER_STATE_NAME).write_text('{"epoch": ')
    with pytest.raises(DiskFullError) as error:
        run_that_fails(tmp_path, NO_SPACE)
    text = str(error.value)
    assert "\n" not in text and "report.md" in text and f"Safe in {tmp_path}: checkpoint-4." in text
    assert text.endswith("go on with `resume_from_checkpoint: true`.")


def test_a_trained_student_is_safe(tmp_path):
    (tmp_path / "progress.json").write_text('{"settings": {}, "parts": {"trained": {}}}')
    with pytest.raises(DiskFullError, match=f"Safe in {tmp_path}: the trained student"):
        run_that_fails(tmp_path, NO_SPACE)


def test_found_in_what_an_error_came_from(tmp_path):
    error = RuntimeError("saving failed")
    error.__cause__ = NO_SPACE
    with pytest.raises(DiskFullError):
        run_that_fails(tmp_path, error)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), RuntimeError("unexpected pos 64 vs 0")])
def test_other_errors_stay(tmp_path, error):
    with pytest.raises(type(error)) as found:
        run_that_fails(tmp_path, error)
    assert found.value is error
