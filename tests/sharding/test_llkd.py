"""LLKD on processes that share the student ends as on one process."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.llkd.helpers import LORA, build_decoder, build_encoder, save_student
from tests.processes import on_processes
from tests.sharding.runs import llkd, slow_but


LOGGED = ("loss", "grad_norm", "selection/kept_share", "selection/uncertainty_kept", "selection/threshold_score")


def build_without_head():
    return build_encoder().bert


VARIANTS = {
    "encoder": (build_encoder, {}),
    "decoder": (build_decoder, {}),
    "LoRA": (build_encoder, {"lora": LORA}),
    "a head that is drawn": (build_without_head, {}),
}


def assert_same_run(expected, found):
    weights, others = expected["weights"]["student"], found["weights"]["student"]
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(
            others[key], value, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    for own, other in zip(expected["log"], found["log"], strict=True):
        for key in set(LOGGED) & set(own):
            assert own[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4), (own["step"], key)
    for key, value in expected["selector"].items():
        torch.testing.assert_close(found["selector"][key], value, atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", slow_but(VARIANTS, "encoder"))
def test_fsdp2_ends_as_one_process(variant, tmp_path):
    build, config = VARIANTS[variant]
    student = save_student(tmp_path / "student", build())
    (alone,) = on_processes(1, llkd, "single", student, tmp_path / "one", **config)
    found, other = on_processes(2, llkd, "fsdp2", student, tmp_path / "two", **config)
    assert_same_run(alone, found)
    assert all(result["shares"]["student"] == pytest.approx(0.5, abs=0.03) for result in (found, other))
    if variant != "encoder":
        return
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two").state_dict()
    for key, value in found["weights"]["student"].items():
        torch.testing.assert_close(saved[key], value, atol=0, rtol=0)
    again, _ = on_processes(2, llkd, "fsdp2", student, tmp_path / "two", resume=str(tmp_path / "two" / "checkpoint-3"))
    assert_same_run(alone, again)
