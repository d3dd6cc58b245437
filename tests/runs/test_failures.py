"""What ends a run in its middle: a full disk, a GPU's memory, numbers that are none, a function of the user's."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerState

from trl_bbkd.errors import DiskFullError, DivergedError, JudgeError, RecipeError
from trl_bbkd.evaluation.student import judge
from trl_bbkd.host.resume import TRAINER_STATE_NAME
from trl_bbkd.runs.failures import tells_failures
from trl_bbkd.runs.job import refuse_another_run
from trl_bbkd.runs.progress import PROGRESS_NAME, Progress, can_go_on
from trl_bbkd.runs.recipe import import_callable


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/report.md")


def run_that_fails(output_dir, failure, **script_args):
    @tells_failures
    def run(recipe):
        if isinstance(failure, Exception):
            raise failure
        failure()

    training_args = SimpleNamespace(output_dir=str(output_dir))
    run(SimpleNamespace(training_args=training_args, script_args=SimpleNamespace(**script_args)))


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
    subprocess.run(["umount", "--lazy", folder], check=True)


def write_text(folder):
    (folder / "report.md").write_text("x" * 10**6)


def write_student(folder):
    save_file({"weight": torch.zeros(10**5)}, folder / "model.safetensors")


def write_optimizer(folder):
    torch.save({"exp_avg": torch.zeros(10**5)}, folder / "optimizer.pt")


@pytest.mark.parametrize("write", [write_text, write_student, write_optimizer])
def test_whoever_writes(full_disk, write):
    with pytest.raises(
        DiskFullError, match=f"^The disk is full .*No checkpoint in {full_disk} was finished.*start again.$"
    ):
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


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(
        RecipeError, match=f"^{tmp_path}/report.md cannot be written or read: Is a directory. .*Move it away"
    ):
        run_that_fails(tmp_path, lambda: (tmp_path / "report.md").write_text("x"))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOENT, "gone", "x"), OSError(errno.EACCES, "denied"), RuntimeError("unexpected pos 64 vs 0")],
)
def test_other_errors_stay(tmp_path, error):
    with pytest.raises(type(error)) as found:
        run_that_fails(tmp_path, error)
    assert found.value is error


def test_a_gpu_without_memory(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 MiB. See documentation")
    with pytest.raises(
        RecipeError, match="^The GPU's memory is too small .CUDA out of memory.. .*Halve per_device_train_batch"
    ):
        run_that_fails(tmp_path, error)


def test_a_student_whose_probabilities_are_none(tmp_path):
    def sample():
        torch.multinomial(torch.tensor([float("nan"), 1.0]), 1)

    with pytest.raises(
        DivergedError, match="^The training diverged: probability tensor contains .*Lower learning_rate"
    ):
        run_that_fails(tmp_path, sample)


def test_a_function_of_the_users(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "def share(texts):\n    return 1 / len(texts)\n\n\ndef judge(prompts, texts):\n    return share(texts)\n"
    )
    spec = f"{file}:judge"
    found = import_callable(spec)
    with pytest.raises(
        RecipeError, match=f"^{file}, line 2, in share: ZeroDivisionError: division by zero. .*Mend that function"
    ):
        run_that_fails(tmp_path, lambda: found([], []), sample_metrics=spec)
    # Elsewhere it may be ours, and its traceback is wanted
    with pytest.raises(ZeroDivisionError):
        run_that_fails(tmp_path, lambda: 1 / 0, sample_metrics=spec, reward_funcs=["os.path.join"])


def test_a_best_metric_that_no_evaluation_has(tmp_path):
    """In the words of transformers."""

    def determine():
        trainer = SimpleNamespace(
            args=SimpleNamespace(metric_for_best_model="blu", output_dir=str(tmp_path)), state=TrainerState()
        )
        Trainer._determine_best_metric(trainer, {"eval_loss": 1.0}, None)

    with pytest.raises(
        RecipeError, match="set to 'eval_blu', which is not found in .* No checkpoint .* start again.$"
    ):
        run_that_fails(tmp_path, determine)


@pytest.mark.parametrize("text", ["def f(:", "import nothing_at_all", "raise KeyError('x')"])
def test_a_file_that_cannot_be_imported(tmp_path, text):
    (tmp_path / "judge.py").write_text(text)
    with pytest.raises(
        RecipeError, match="judge.py:f': .*judge.py cannot be imported: (Syntax|ModuleNotFound|Key)Error"
    ):
        import_callable(f"{tmp_path / 'judge.py'}:f")


@pytest.mark.parametrize(
    ("judged", "problem"),
    [
        ([1.0], "one for each metric by its name; got list"),
        ({"good": [1.0]}, "returned lists of lengths {'good': 1}"),
        ({"good": 1}, "returned lists of lengths {'good': 'an int'}"),
        ({"good": [1.0, None]}, "must return numbers only: float"),
        ({"good": [1.0, "yes"]}, "must return numbers only: could not convert"),
    ],
)
def test_what_a_judge_returns(judged, problem):
    with pytest.raises(JudgeError, match=problem):
        judge(lambda prompts, texts: judged, ["a", "b"], ["c", "d"])


def test_what_a_stopped_run_left_half_written_is_no_obstacle(tmp_path):
    for text in ("{", "[]", '{"settings'):
        for name in ("metrics.json", PROGRESS_NAME):
            (tmp_path / name).write_text(text)
        refuse_another_run(str(tmp_path), {"method": "gad"})
        assert not can_go_on(str(tmp_path))
        assert "trained" not in Progress(str(tmp_path), {})
