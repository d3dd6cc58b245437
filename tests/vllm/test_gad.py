"""GAD with samples of vLLM: a stand-in behind TRL's own `VLLMGeneration`."""

import pytest
import torch
from accelerate.utils import is_torch_version

from tests.processes import on_processes
from trl_bbkd.evaluation.student import with_one_end
from trl_bbkd.gad.vllm import masked_counts
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS

from .runs import distance, gad
from .server import serving


needs_averages = pytest.mark.skipif(
    is_torch_version("<", AVERAGES_ON_CPUS), reason="this torch does not average gradients on CPU processes"
)
SHARED = {"lora": True, "discriminator": "shared"}


def assert_samples_are_the_students(found):
    """vLLM's log-probabilities are those that the student itself gives its samples, at every step."""
    assert len(found["log"]) == 5
    for entry in found["log"]:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3, entry["step"]
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert entry["sampling/masked_share"] == 0
    assert distance(found["student"], {n: v for n, v in found["before"].items() if n in found["student"]}) > 1e-2


def assert_base_is_untouched(found):
    for name, value in found["before"].items():
        assert torch.equal(value, found["base"][name]), name


@pytest.mark.parametrize(
    "config",
    [pytest.param({}, marks=pytest.mark.slow), SHARED, pytest.param({"lora": True}, marks=pytest.mark.slow)],
    ids=["full", "shared", "LoRA"],
)
def test_an_engine_in_the_process(config, tiny_model_dir, tmp_path):
    (found,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path, **config)
    assert_samples_are_the_students(found)
    assert len(found["distances"]) == 5 and max(found["distances"]) < 1e-5
    drawn = [with_one_end(ids, *found["ends"]) for ids in found["drawn"]]
    assert drawn == [ids for batch in found["sampled"] for ids in batch]
    if config:
        assert_base_is_untouched(found)
    # At the second step the student has not moved: the discriminator learned alone
    assert found["syncs"] == [0, 2, 3, 4]


@pytest.mark.slow
def test_an_engine_that_sleeps_between_samplings(tiny_model_dir, tmp_path):
    """It loses its weights each time, also where the student has stood still; a second run begins with the first one's student."""
    (found,) = on_processes(
        1, gad, "single", tiny_model_dir, tmp_path, trains=2, max_steps=2, vllm_enable_sleep_mode=True
    )
    for entry in found["log"]:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3, entry["step"]
    assert found["syncs"].count(0) >= 2


def test_a_second_run_begins_with_the_student_of_the_first(tiny_model_dir, tmp_path):
    """Both sample at step 0, and the first one's last weights came to vLLM before its last step."""
    config = {"max_steps": 1, "warmup_epochs": 0.0, "gradient_accumulation_steps": 1}
    (found,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path, trains=2, **config)
    assert found["syncs"] == [0, 0] and max(found["distances"]) < 1e-5


@needs_averages
@pytest.mark.parametrize(
    ("engine", "config"),
    [
        ("fsdp2", {"lora": True}),
        pytest.param("fsdp2", {}, marks=pytest.mark.slow),
        pytest.param("fsdp2", SHARED, marks=pytest.mark.slow),
        pytest.param("ddp", {}, marks=pytest.mark.slow),
        pytest.param("ddp", {"lora": True}, marks=pytest.mark.slow),
    ],
)
def test_an_engine_in_each_process(engine, config, tiny_model_dir, tmp_path):
    first, second = on_processes(2, gad, engine, tiny_model_dir, tmp_path, **config)
    assert first["is_sharded"] == second["is_sharded"] == (engine == "fsdp2")
    assert_samples_are_the_students(first)
    assert len(first["distances"]) == 5 and max(first["distances"]) < 1e-5
    assert distance(first["engine"], second["engine"]) == 0
    # Each has seeds of its own
    assert first["sampled"] != second["sampled"]
    for found in (first, second):
        if config:
            assert_base_is_untouched(found)


@needs_averages
@pytest.mark.parametrize(
    ("engine", "config"),
    [
        ("single", {}),
        pytest.param("single", SHARED, marks=pytest.mark.slow),
        pytest.param("fsdp2", {}, marks=pytest.mark.slow),
        pytest.param("fsdp2", {"lora": True}, marks=pytest.mark.slow),
    ],
)
def test_a_server(engine, config, tiny_model_dir, tmp_path):
    processes = 1 if engine == "single" else 2
    with serving(tiny_model_dir) as server:
        found, *_ = on_processes(processes, gad, engine, tiny_model_dir, tmp_path, url=server.url, **config)
    assert_samples_are_the_students(found)
    drawn = sorted(with_one_end(each.token_ids, *found["ends"]) for each in server.engine.sampled)
    if processes == 1:
        assert drawn == sorted(ids for batch in found["sampled"] for ids in batch)
    assert server.asked[0] == "/init_weight_transfer_engine"
    assert server.asked.count("/update_weights") == server.asked.count("/reset_prefix_cache") == 4
    if config:
        assert_base_is_untouched(found)


def off(ids: list[int]) -> float:
    """Every other sample, by its first token, is reported as more likely than it is."""
    return -1.0 if ids[0] % 2 else 0.0


@pytest.mark.parametrize("mode", ["sequence_mask", pytest.param("token_mask", marks=pytest.mark.slow)])
def test_what_the_correction_masks_is_counted_and_still_read(mode, tiny_model_dir, tmp_path):
    """A ratio below the least is 0 in the student's loss; the discriminator learns from all samples."""
    config = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": 0.5, "max_steps": 1}
    config |= {"warmup_epochs": 0.0, "gradient_accumulation_steps": 1}
    (found,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path, drift=off, **config)
    (batch,), (entry,) = found["sampled"], found["log"]
    weights = [1 if mode == "sequence_mask" else len(ids) for ids in batch]
    masked = sum(weight for ids, weight in zip(batch, weights, strict=True) if ids[0] % 2)
    assert 0 < masked < sum(weights)
    assert entry["sampling/masked_share"] == pytest.approx(masked / sum(weights))
    assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1 - masked / sum(weights), abs=1e-3)
    assert "discriminator/accuracy" in entry


def test_masked_tokens_are_counted_where_there_is_a_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    by_token = torch.tensor([[0.0, 0.5, 0.0], [1.0, 0.0, 2.0]])
    assert masked_counts(by_token, mask).tolist() == [2, 5]
    assert masked_counts(torch.tensor([[0.0], [1.5]]), mask).tolist() == [1, 2]


@pytest.mark.slow
def test_without_a_mask_there_is_nothing_to_count(tiny_model_dir, tmp_path):
    config = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_min": 0.5}
    config |= {"max_steps": 1, "warmup_epochs": 0.0}
    (found,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path, drift=off, **config)
    assert "sampling/masked_share" not in found["log"][0]
    assert found["log"][0]["sampling/importance_sampling_ratio/min"] == pytest.approx(0.5)
