"""Copies of parts: every trainer but GAD, whose own file has it, on two copies of two parts each."""

import pytest
import torch
from accelerate.utils import is_torch_version

from tests.llkd.helpers import build_encoder, save_student
from tests.processes import on_processes
from tests.sharding import test_llkd, test_soft_targets
from tests.sharding.runs import bayeskd, llkd, proxykd, seqkd
from trl_bbkd.host.model_files import load_model
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        is_torch_version("<", AVERAGES_ON_CPUS), reason="this torch does not average gradients on CPU processes"
    ),
]


def assert_halves(results):
    assert all(result["shares"]["student"] == pytest.approx(0.5, abs=0.03) for result in results)


@pytest.mark.parametrize("run", [proxykd, bayeskd])
def test_soft_targets_and_their_resumption(run, tiny_model_dir, other_model_dir, tmp_path):
    models = (tiny_model_dir, other_model_dir)
    (alone,) = on_processes(1, run, "single", *models, tmp_path / "one")
    found = on_processes(4, run, "hsdp", *models, tmp_path / "four")
    test_soft_targets.assert_same_run(alone, found[0])
    assert_halves(found)
    checkpoint = str(tmp_path / "four" / "checkpoint-3")
    again = on_processes(4, run, "hsdp", *models, tmp_path / "four", resume=checkpoint)
    test_soft_targets.assert_same_run(alone, again[0])


def test_llkd_too(tmp_path):
    student = save_student(tmp_path / "student", build_encoder())
    (alone,) = on_processes(1, llkd, "single", student, tmp_path / "one")
    found = on_processes(4, llkd, "hsdp", student, tmp_path / "four")
    test_llkd.assert_same_run(alone, found[0])
    assert_halves(found)


def test_seqkd_too(tiny_model_dir, tmp_path):
    (alone,) = on_processes(1, seqkd, "single", tiny_model_dir, tmp_path / "one")
    found, *_ = on_processes(4, seqkd, "hsdp", tiny_model_dir, tmp_path / "four")
    assert found["best_step"] == alone["best_step"] == 3
    assert found["share"] == pytest.approx(0.5, abs=0.02)
    expected, saved = (load_model(str(tmp_path / name)).state_dict() for name in ("one", "four"))
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, atol=1e-6, rtol=1e-5)
