"""GAD with samples of vLLM: a stand-in behind TRL's own `VLLMGeneration`."""

import pytest
import torch
from accelerate.utils import is_torch_version

from tests.processes import on_processes
from trl_bbkd.evaluation.student import with_one_end
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
    "config", [{}, SHARED, pytest.param({"lora": True}, marks=pytest.mark.slow)], ids=["full", "shared", "LoRA"]
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
