"""Rounds of alignment on processes that share the proxy and its reference end as on one process."""

import pytest
import torch

from tests.processes import on_processes
from tests.sharding.runs import alignment, slow_but
from trl_bbkd.host.model_files import load_model


LOGGED = ("loss", "grad_norm", "rewards/margins", "rewards/chosen")
VARIANTS = {"full": {}, "LoRA": {"lora": True}}


def assert_same_run(expected, found):
    assert found["samples"] == expected["samples"]
    assert found["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][key], value, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    for own, other in zip(expected["log"], found["log"], strict=True):
        assert own["round"] == other["round"]
        for key in set(LOGGED) & set(own):
            assert own[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4), (own["step"], key)
    for own, other in zip(expected["rounds"], found["rounds"], strict=True):
        assert other == pytest.approx(own, abs=1e-5, rel=1e-4)


@pytest.fixture(scope="module")
def alone(other_model_dir, tmp_path_factory):
    """Of each variant, what one process ends with."""
    found = {}

    def run(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp("alone")
            (found[variant],) = on_processes(1, alignment, "single", other_model_dir, folder, **VARIANTS[variant])
        return found[variant]

    return run


def assert_sharded(variant, results):
    for result in results:
        shares = [*result["shares"]["proxy"], *result["shares"]["reference"]]
        assert shares == pytest.approx([0.5] * len(shares), abs=0.02)
        assert result["units"]["proxy"][-1] > 3
        # Of adapters, the reference is in the proxy
        assert result["units"]["reference"] == ([] if variant == "LoRA" else result["units"]["proxy"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp2_ends_as_one_process(variant, alone, other_model_dir, tmp_path):
    found, other = on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path, **VARIANTS[variant])
    assert_same_run(alone(variant), found)
    assert_sharded(variant, (found, other))
    # All is there: no round is begun
    again, _ = on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path, **VARIANTS[variant])
    assert_same_run(found, again)
    assert again["resumed at"] is None and again["shares"]["proxy"] == []


@pytest.mark.parametrize("variant", slow_but(VARIANTS))
def test_fsdp2_goes_on_with_a_round_as_if_never_stopped(variant, alone, other_model_dir, tmp_path):
    config = VARIANTS[variant]
    assert on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path, stops=True, **config) == [None, None]
    found, other = on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path, **config)
    assert found["resumed at"] == 2
    assert_same_run(alone(variant), found)
    assert_sharded(variant, (found, other))
    for folder in (tmp_path, tmp_path / "saved"):
        saved = load_model(str(folder)).state_dict()
        for key, value in found["weights"].items():
            torch.testing.assert_close(saved[key], value, atol=0, rtol=0)
