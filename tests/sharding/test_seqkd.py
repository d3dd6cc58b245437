"""SeqKD on processes that share the student keeps the checkpoint that one process keeps, whole."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.processes import on_processes
from tests.sharding.runs import seqkd
from trl_bbkd.host.model_files import load_model


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "LoRA"])
def test_the_best_checkpoint(lora, tiny_model_dir, tmp_path):
    (alone,) = on_processes(1, seqkd, "single", tiny_model_dir, tmp_path / "one", lora=lora)
    found, other = on_processes(2, seqkd, "fsdp2", tiny_model_dir, tmp_path / "two", lora=lora)
    assert found["best_step"] == other["best_step"] == alone["best_step"] == 3
    assert found["share"] == pytest.approx(0.5, abs=0.02)
    expected, saved = (load_model(str(tmp_path / name)).state_dict() for name in ("one", "two"))
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    assert lora or any((start[key] != saved[key]).any() for key in start)
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, atol=1e-6, rtol=1e-5)
