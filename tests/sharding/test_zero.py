"""Runs under DeepSpeed end as on one process. Where it is not installed, they are left out."""

import functools

import pytest

from tests.llkd.helpers import build_encoder, save_student
from tests.processes import on_processes
from tests.sharding import test_alignment, test_gad, test_llkd, test_soft_targets
from tests.sharding.runs import aligned_proxykd, alignment, gad, llkd, proxykd


pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("deepspeed_on_cpus")
STAGES = ["zero2", "zero3"]


def assert_partitioned(stage, results):
    assert all(
        result["shares"]["student"] == pytest.approx(0.5 if stage == "zero3" else 1.0, abs=0.01) for result in results
    )


@pytest.fixture(scope="module")
def gad_alone(tiny_model_dir, tmp_path_factory):
    """Of each variant of GAD, what one process ends with."""

    @functools.cache
    def run(variant):
        folder = tmp_path_factory.mktemp("alone")
        (found,) = on_processes(1, gad, "single", tiny_model_dir, folder, **test_gad.VARIANTS[variant])
        # DeepSpeed takes no step where the student is held, and has no norm to log
        held = [entry for entry in found["log"] if entry.get("grad_norm") == 0]
        assert held
        for entry in held:
            del entry["grad_norm"]
        return found

    return run


@pytest.mark.parametrize("variant", test_gad.VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
def test_gad_and_its_resumption(stage, variant, gad_alone, tiny_model_dir, tmp_path):
    """Resumed from the warm-up's last step, and with adapters from the first that has a reference."""
    step = 4 if "lora" in test_gad.VARIANTS[variant] else 3
    config = test_gad.VARIANTS[variant] | {"save_steps": step}
    found = on_processes(2, gad, stage, tiny_model_dir, tmp_path, **config)
    test_gad.assert_same_run(gad_alone(variant), found[0])
    expected = 0.5 if stage == "zero3" else 1.0
    for result in found:
        assert all(share == pytest.approx(expected, abs=0.02) for share in result["shares"].values()), result["shares"]
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    again = on_processes(2, gad, stage, tiny_model_dir, tmp_path, resume=checkpoint, **config)
    test_gad.assert_same_run(gad_alone(variant), again[0])


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
def test_proxykd_on_its_own_samples(stage, tiny_model_dir, other_model_dir, tmp_path):
    models = (tiny_model_dir, other_model_dir)
    (alone,) = on_processes(1, proxykd, "single", *models, tmp_path / "one", **test_soft_targets.ON_POLICY)
    found = on_processes(2, proxykd, stage, *models, tmp_path / "two", **test_soft_targets.ON_POLICY)
    test_soft_targets.assert_same_run(alone, found[0])
    assert_partitioned(stage, found)


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


def test_another_number_of_processes_is_refused(tiny_model_dir, tmp_path):
    on_processes(2, gad, "zero2", tiny_model_dir, tmp_path, max_steps=1, save_steps=1)
    with pytest.raises(
        AssertionError, match="written by 2 processes.*Resume with --num_processes 2.*FSDP2 resumes with"
    ):
        on_processes(4, gad, "zero2", tiny_model_dir, tmp_path, resume=str(tmp_path / "checkpoint-1"))
