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


@pytest.mark.parametrize("variant", slow_but(VARIANTS, "LoRA"))
def test_fsdp2_ends_as_one_process_stopped_in_a_round_or_not(variant, alone, other_model_dir, tmp_path):
    config = VARIANTS[variant]
    ended = (
        [on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path / "whole", **config)]
        if variant == "full"
        else []
    )
    assert on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path, stops=True, **config) == [None, None]
    ended.append(on_processes(2, alignment, "fsdp2", other_model_dir, tmp_path, **config))
    assert ended[-1][0]["resumed at"] == 2
    for found, other in ended:
        assert_same_run(alone(variant), found)
        for result in (found, other):
            shares = [*result["shares"]["proxy"], *result["shares"]["reference"]]
            assert shares == pytest.approx([0.5] * len(shares), abs=0.02)
            assert result["units"]["proxy"][-1] > 3
            # Of adapters, the reference is in the proxy
            assert result["units"]["reference"] == ([] if variant == "LoRA" else result["units"]["proxy"])
