"""Checkpoints that each process writes a part of are gone on with by any number of processes; the final student is whole."""

import pytest
from accelerate.utils import is_torch_version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.gad.helpers import assert_same_weights
from tests.processes import on_processes
from tests.sharding import test_llkd, test_soft_targets
from tests.sharding.runs import gad
from tests.sharding.test_gad import VARIANTS, assert_same_run
from tests.sharding.test_other_processes import llkd_run, proxykd_run
from trl_bbkd.discriminator.model import Discriminator
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS


pytestmark = pytest.mark.skipif(
    is_torch_version("<", AVERAGES_ON_CPUS), reason="this torch does not average gradients on CPU processes"
)
ENGINE = "fsdp2, saved in parts"


def test_gad_goes_on_with_more_processes_and_ends_whole(tiny_model_dir, tmp_path):
    """From the first checkpoint, before which the student's optimizer has taken no step."""
    config = {"max_steps": 2, "warmup_epochs": 0.1, "save_steps": 1}
    straight, _ = on_processes(2, gad, ENGINE, tiny_model_dir, tmp_path, **config)
    checkpoint = tmp_path / "checkpoint-1"
    assert not (checkpoint / "model.safetensors").exists()
    parts = checkpoint / "discriminator" / "parts"
    assert len(list(parts.iterdir())) == len(list(parts.glob("*.safetensors"))) == 2
    found, *_ = on_processes(4, gad, ENGINE, tiny_model_dir, tmp_path, resume=str(checkpoint), **config)
    assert_same_run(straight, found)
    assert found["shares"]["discriminator"] == pytest.approx(0.25, abs=0.02)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), found["weights"]["student"])
    discriminator = Discriminator.from_pretrained(tmp_path / "discriminator")
    assert_same_weights(discriminator.state_dict(), found["weights"]["discriminator"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "LoRA and a critic"])
def test_gad_goes_on_with_fewer_processes(variant, tiny_model_dir, tmp_path):
    config = VARIANTS[variant] | {"save_steps": 2, "max_steps": 4}
    (alone,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path / "alone", **config)
    folder = tmp_path / "parts"
    on_processes(4, gad, ENGINE, tiny_model_dir, folder, **config)
    # Two processes write the last checkpoint of four over, and read it again
    for step in (2, 4):
        resume = str(folder / f"checkpoint-{step}")
        found, _ = on_processes(2, gad, ENGINE, tiny_model_dir, folder, resume=resume, **config)
        assert_same_run(alone, found)
        assert found["shares"]["discriminator"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "assert_same"),
    [(llkd_run, test_llkd.assert_same_run), (proxykd_run, test_soft_targets.assert_same_run)],
    ids=["LLKD", "Proxy-KD"],
)
def test_others_go_on_with_more_processes(run, assert_same, tiny_model_dir, other_model_dir, tmp_path):
    models = (tiny_model_dir, other_model_dir)
    (alone,) = on_processes(1, run, "single", tmp_path / "alone", *models)
    folder = tmp_path / "parts"
    on_processes(2, run, ENGINE, folder, *models)
    assert not (folder / "checkpoint-3" / "model.safetensors").exists()
    found, *_ = on_processes(4, run, ENGINE, folder, *models, resume=str(folder / "checkpoint-3"))
    assert_same(alone, found)
    weights = load_file(folder / "model.safetensors")
    assert_same_weights(weights, {name: found["weights"]["student"][name] for name in weights})


@pytest.mark.slow
def test_a_checkpoint_of_whole_models_is_not_read_as_parts(tiny_model_dir, tmp_path):
    on_processes(2, gad, "fsdp2", tiny_model_dir, tmp_path, max_steps=1, save_steps=1)
    with pytest.raises(
        AssertionError, match=r"written under FSDP \(FULL_STATE_DICT\), and FSDP \(SHARDED_STATE_DICT\)"
    ):
        on_processes(
            2, gad, ENGINE, tiny_model_dir, tmp_path, resume=str(tmp_path / "checkpoint-1"), max_steps=2, save_steps=1
        )
