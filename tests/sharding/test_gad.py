"""GAD on processes that share its models ends as it does on one process."""

import pytest
import torch
from accelerate.utils import is_torch_version
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.processes import on_processes
from tests.sharding.runs import answers, gad, slow_but
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS


pytestmark = pytest.mark.skipif(
    is_torch_version("<", AVERAGES_ON_CPUS), reason="this torch does not average gradients on CPU processes"
)
LOGGED = ("loss", "grad_norm", "discriminator/loss", "discriminator/grad_norm", "critic/grad_norm")
VARIANTS = {
    "full": {},
    "LoRA and a critic": {"lora": True, "critic": "copy", "advantage_estimator": "gae"},
    "likelihood": {"discriminator_head": "likelihood", "discriminator_sft_weight": 0.1},
    "shared": {"lora": True, "discriminator": "shared"},
    "anchored": {"discriminator_head": "likelihood", "sft_weight": 0.5, "discriminator_entropy": 0.5},
}


def assert_same_run(expected, found):
    for name, weights in expected["weights"].items():
        assert weights.keys() == found["weights"][name].keys()
        for key, value in weights.items():
            torch.testing.assert_close(
                found["weights"][name][key], value, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    for own, other in zip(expected["log"], found["log"], strict=True):
        for key in set(LOGGED) & set(own):
            assert own[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4), (own["step"], key)


@pytest.fixture(scope="module")
def alone(tiny_model_dir, tmp_path_factory):
    """Of each variant, what one process ends with."""
    found = {}

    def run(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp("alone")
            (found[variant],) = on_processes(1, gad, "single", tiny_model_dir, folder, **VARIANTS[variant])
        return found[variant]

    return run


@pytest.mark.parametrize("variant", slow_but(VARIANTS, "full", "LoRA and a critic"))
def test_fsdp2_ends_as_one_process(variant, alone, tiny_model_dir, tmp_path):
    config = VARIANTS[variant]
    found, other = on_processes(2, gad, "fsdp2", tiny_model_dir, tmp_path, **config)
    assert_same_run(alone(variant), found)
    for shares in (found["shares"], other["shares"]):
        assert all(value == pytest.approx(0.5, abs=0.02) for value in shares.values()), shares
    assert found["units"]["discriminator"] > found["units"]["student"] - 2
    if "reference" in found["units"]:
        assert found["units"]["reference"] == found["units"]["student"]


@pytest.mark.parametrize(
    ("variant", "step"),
    [
        ("full", 3),
        pytest.param("LoRA and a critic", 4, marks=pytest.mark.slow),
        pytest.param("shared", 4, marks=pytest.mark.slow),
    ],
)
def test_fsdp2_goes_on_from_a_checkpoint_as_if_never_stopped(variant, step, alone, tiny_model_dir, tmp_path):
    """From the warm-up's last step, and from the first that has a reference."""
    config = VARIANTS[variant] | {"save_steps": step}
    on_processes(2, gad, "fsdp2", tiny_model_dir, tmp_path, **config)
    found, _ = on_processes(
        2, gad, "fsdp2", tiny_model_dir, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **config
    )
    assert_same_run(alone(variant), found)


def test_a_discriminator_of_another_architecture(tiny_model_dir, tmp_path):
    build_llama(tmp_path / "llama", AutoTokenizer.from_pretrained(tiny_model_dir))
    other = {"discriminator": str(tmp_path / "llama")}
    (expected,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path / "alone", **other)
    found, _ = on_processes(2, gad, "fsdp2", tiny_model_dir, tmp_path / "sharded", **other)
    assert_same_run(expected, found)


def build_llama(folder, tokenizer):
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_what_differs_from_process_to_process_is_the_main_ones(alone, tiny_model_dir, tmp_path):
    """Each has drawn adapters of its own, and loads models whole."""
    found, _ = on_processes(2, gad, "fsdp2, whole", tiny_model_dir, tmp_path, **VARIANTS["LoRA and a critic"])
    assert_same_run(alone("LoRA and a critic"), found)


def test_processes_whose_answers_end_at_different_lengths_wait_for_each_other(tiny_model_dir, tmp_path):
    (ids, calls), (same_ids, same_calls) = on_processes(2, answers, tiny_model_dir, tmp_path)
    assert ids == same_ids and [len(group) for group in ids] == [5] * 12
    tokens = sum(len(answer) for group in ids for answer in group)
    assert calls == same_calls > tokens / 2


@pytest.mark.slow
def test_four_processes(alone, tiny_model_dir, tmp_path):
    found, *_ = on_processes(4, gad, "fsdp2", tiny_model_dir, tmp_path)
    assert_same_run(alone("full"), found)
    assert found["shares"]["discriminator"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_hsdp_ends_as_one_process(variant, alone, tiny_model_dir, tmp_path):
    """Two copies of two parts each, and their resumption."""
    config = VARIANTS[variant]
    results = on_processes(4, gad, "hsdp", tiny_model_dir, tmp_path, **config)
    assert_same_run(alone(variant), results[0])
    for result in results:
        assert all(value == pytest.approx(0.5, abs=0.02) for value in result["shares"].values()), result["shares"]
    resumed = on_processes(4, gad, "hsdp", tiny_model_dir, tmp_path, resume=str(tmp_path / "checkpoint-3"), **config)
    assert_same_run(alone(variant), resumed[0])


def test_processes_with_more_and_fewer_chunks_wait_for_each_other(tiny_model_dir, tmp_path):
    # 3 samples a process, 4 a prompt: 1, 2, 2 and 1 teacher's answers, hence 4, 5, 5 and 4 rows
    uneven = {"sequences": 12, "discriminator_batch_size": 4, "gradient_accumulation_steps": 1}
    (expected,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path / "alone", **uneven)
    found, *_ = on_processes(4, gad, "fsdp2", tiny_model_dir, tmp_path / "sharded", **uneven)
    assert_same_run(expected, found)
