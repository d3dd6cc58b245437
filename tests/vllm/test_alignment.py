"""The alignment samples with an engine of each process, which reads the model from disk."""

import pytest
from peft import LoraConfig

from tests.gad.helpers import no_model_is_loaded
from tests.processes import on_processes
from tests.proxykd.helpers import LORA, make_aligner, make_rows

from . import stand_in


def aligned(model, output, per_device, use_vllm, lora=False) -> dict:
    if use_vllm:
        stand_in.install()
    trainer = make_aligner(
        output,
        model,
        rows=make_rows(12),
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=2,
        use_vllm=use_vllm,
        num_rounds=1,
        sample_batch_size=1,
        # As good as greedy, so that it does not matter who samples
        sample_temperature=1e-4,
        trainer_kwargs={"peft_config": LoraConfig(**LORA)} if lora else None,
    )
    trainer.train()
    return {
        "samples": trainer.train_dataset["rejected_ids"][:],
        "engines": [llm.settings for llm in stand_in.LLM.made],
        "sampled": sum(len(llm.sampled) for llm in stand_in.LLM.made),
        "left": list(output.glob("round-*/sampler")),
    }


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_engines_sample_what_one_model_says(lora, other_model_dir, tmp_path):
    (one,) = on_processes(1, aligned, other_model_dir, tmp_path / "one", 4, use_vllm=False, lora=lora)
    ranks = on_processes(2, aligned, other_model_dir, tmp_path / "two", 2, use_vllm=True, lora=lora)
    assert ranks[0]["samples"] == ranks[1]["samples"] == one["samples"]
    for rank in ranks:
        # On the process's own device
        assert rank["engines"] == [{"enable_lora": lora, "distributed_executor_backend": "external_launcher"}]
        assert rank["sampled"] and not rank["left"]
    assert sum(rank["sampled"] for rank in ranks) == len(one["samples"])


def test_without_vllm(tmp_path, other_model_dir, monkeypatch):
    no_model_is_loaded(monkeypatch)
    with pytest.raises(ValueError, match="use_vllm=True needs vLLM: pip install"):
        make_aligner(tmp_path, other_model_dir, use_vllm=True)
