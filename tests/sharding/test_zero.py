"""Runs under DeepSpeed end as on one process. Where it is not installed, they are left out."""

import pytest

from tests.llkd.helpers import build_encoder, save_student
from tests.processes import on_processes
from tests.sharding import test_alignment, test_llkd, test_soft_targets
from tests.sharding.runs import aligned_proxykd, alignment, llkd, proxykd


pytest.importorskip("deepspeed")
STAGES = ["zero2", "zero3"]


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def assert_partitioned(stage, results):
    assert all(
        result["shares"]["student"] == pytest.approx(0.5 if stage == "zero3" else 1.0, abs=0.01) for result in results
    )


@pytest.mark.parametrize("stage", STAGES)
def test_proxykd_and_its_resumption(stage, tiny_model_dir, other_model_dir, tmp_path):
    models = (tiny_model_dir, other_model_dir)
    (alone,) = on_processes(1, proxykd, "single", *models, tmp_path / "one")
    found = on_processes(2, proxykd, stage, *models, tmp_path / "two")
    test_soft_targets.assert_same_run(alone, found[0])
    assert_partitioned(stage, found)
    for step in (3, 5):
        again = on_processes(
            2, proxykd, stage, *models, tmp_path / "two", resume=str(tmp_path / "two" / f"checkpoint-{step}")
        )
        test_soft_targets.assert_same_run(alone, again[0])


@pytest.mark.parametrize("stage", STAGES)
def test_llkd_too(stage, tmp_path):
    student = save_student(tmp_path / "student", build_encoder())
    (alone,) = on_processes(1, llkd, "single", student, tmp_path / "one")
    found = on_processes(2, llkd, stage, student, tmp_path / "two")
    test_llkd.assert_same_run(alone, found[0])
    assert_partitioned(stage, found)


@pytest.mark.parametrize("variant", test_alignment.VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
def test_alignment_and_its_resumption(stage, variant, other_model_dir, tmp_path):
    config = test_alignment.VARIANTS[variant]
    (alone,) = on_processes(1, alignment, "single", other_model_dir, tmp_path / "one", **config)
    for stops in (True, False):
        found = on_processes(2, alignment, stage, other_model_dir, tmp_path / "two", stops=stops, **config)
    assert found[0]["resumed at"] == 2
    test_alignment.assert_same_run(alone, found[0])
    for result in found:
        shares = [*result["shares"]["proxy"], *result["shares"]["reference"]]
        assert shares == pytest.approx([0.5 if stage == "zero3" else 1.0] * len(shares), abs=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_proxykd_that_aligns_an_adapter(stage, tiny_model_dir, other_model_dir, tmp_path):
    adapter = {"proxy_lora_kwargs": {"r": 4, "target_modules": "all-linear"}}
    models = (tiny_model_dir, other_model_dir)
    (alone,) = on_processes(1, aligned_proxykd, "single", *models, tmp_path / "one", **adapter)
    found = on_processes(2, aligned_proxykd, stage, *models, tmp_path / "two", **adapter)
    test_soft_targets.assert_same_run(alone, found[0])
    assert_partitioned(stage, found)
