"""Runs on two processes that are killed at every step, and gone on with, end with the bits of one that never was."""

import pytest
import torch

from tests.llkd.helpers import build_encoder, save_student
from tests.processes import Moment, killed_at, killed_until_it_ends, on_processes
from tests.proxykd.on_processes import aligned
from tests.sharding.runs import BAYESKD_RUN, PROXYKD_RUN, bayeskd, gad, llkd, proxykd, seqkd
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.host.resume import last_finished_checkpoint


# In each process of a run: before it saves once more, one step after the checkpoint that it leaves
A_STEP_LATER = Moment("transformers.trainer.Trainer._save_checkpoint", call=2)
# Samples are drawn; every second checkpoint lies amid a generation batch
GAD_RUN = {
    "trainer_class": GADTrainer,
    "sequences": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_train_epochs": 6,
    "warmup_epochs": 1 / 3,
    "max_steps": 3,
    "beta": 0.1,
    "critic": "copy",
    "advantage_estimator": "gae",
    "discriminator_replay_size": 16,
    "discriminator_only_steps": 0,
    "save_steps": 1,
}


def gad_run(student, proxy, folder):
    resume = None if last_finished_checkpoint(folder) is None else True
    return gad("single", student, folder, resume, **GAD_RUN)


def proxykd_run(student, proxy, folder):
    stages = {"stages": ["warmup", "align", "cache", "distil"], "alignment_share": 0.3, "alignment_rounds": 2}
    return proxykd("single", student, proxy, folder, **PROXYKD_RUN | stages, max_steps=3, save_steps=1)


def bayeskd_run(student, proxy, folder):
    return bayeskd("single", student, proxy, folder, **BAYESKD_RUN, max_steps=3, save_steps=1)


def llkd_run(student, proxy, folder):
    resume = None if last_finished_checkpoint(folder) is None else True
    student = save_student(folder / "student", build_encoder(dropout=0.1))
    return llkd("single", student, folder, resume, save_steps=1)


def same(found, expected, path=""):
    """
    Whether two results are the same, tensors by their bits. Times are not compared, nor what was in parts in this process, nor
    what is counted from 0 in a proxy's warm-up that goes on: tokens, and the steps that its mean loss is of.
    """
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif isinstance(expected, dict):
        for key in expected:
            if key not in ("shares", "num_tokens", "train_loss") and "time" not in key and "second" not in key:
                same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for number, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{path}/{number}")
    else:
        assert found == expected, path


@pytest.mark.parametrize(
    ("run", "checkpoints"),
    [
        pytest.param(gad_run, 3, id="GAD"),
        pytest.param(proxykd_run, 7, id="Proxy-KD", marks=pytest.mark.slow),
        pytest.param(bayeskd_run, 7, id="Bayes-KD", marks=pytest.mark.slow),
        pytest.param(llkd_run, 5, id="LLKD", marks=pytest.mark.slow),
    ],
)
def test_at_every_step(run, checkpoints, tiny_model_dir, other_model_dir, tmp_path):
    models = (tiny_model_dir, other_model_dir)
    straight = on_processes(2, run, *models, tmp_path / "straight")
    killed, kills = killed_until_it_ends(2, A_STEP_LATER, run, *models, tmp_path / "killed")
    same(killed, straight)
    assert kills == checkpoints - 1


@pytest.mark.slow
def test_alignment_at_every_step(other_model_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    straight = on_processes(2, aligned, other_model_dir, tmp_path / "straight", 2, **settings)
    killed, kills = killed_until_it_ends(2, A_STEP_LATER, aligned, other_model_dir, tmp_path / "killed", 2, **settings)
    same(killed, straight)
    # Of two rounds with two steps each, and no checkpoint that outlives its round
    assert kills == 3


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5])
def test_seqkd_starts_again(step, tiny_model_dir, tmp_path):
    """It is small beside the method, keeps no checkpoints, and is not put off by what it left."""
    straight = on_processes(2, seqkd, "single", tiny_model_dir, tmp_path / "straight")
    then = Moment("trl_bbkd.seqkd.trainer.CurveCallback.on_step_end", call=step)
    killed_at(then, seqkd, "single", tiny_model_dir, tmp_path / "killed", processes=2)
    again = on_processes(2, seqkd, "single", tiny_model_dir, tmp_path / "killed")
    same(again, straight)
    for expected, found in zip(
        *(sorted(f.rglob("*.safetensors")) for f in (tmp_path / "straight", tmp_path / "killed")), strict=True
    ):
        assert expected.read_bytes() == found.read_bytes()
