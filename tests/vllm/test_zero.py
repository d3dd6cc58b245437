"""DeepSpeed and vLLM. Where DeepSpeed is not installed, they are left out."""

import pytest

from tests.processes import on_processes

from .runs import distance, gad
from .test_gad import assert_base_is_untouched, assert_samples_are_the_students
from .test_report import COLOCATE, LORA, report_of


pytest.importorskip("deepspeed")


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize("config", [{}, {"lora": True}], ids=["full", "LoRA"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_engine_in_each_process(stage, config, tiny_model_dir, tmp_path):
    first, second = on_processes(2, gad, stage, tiny_model_dir, tmp_path, **config)
    assert first["is_sharded"] == (stage == "zero3")
    assert_samples_are_the_students(first)
    assert len(first["distances"]) == 5 and max(first["distances"]) < 1e-5
    assert distance(first["engine"], second["engine"]) == 0
    if config:
        assert_base_is_untouched(first)


@pytest.mark.parametrize("config", [{}, LORA], ids=["full", "LoRA"])
def test_the_report_samples_with_vllm(config, tmp_path, recipe_folder, tiny_model_dir):
    report_of("zero3", 2, COLOCATE | config, tmp_path, recipe_folder, tiny_model_dir)
