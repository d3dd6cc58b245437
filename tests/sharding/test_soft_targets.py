"""Trainers on soft targets end on processes that share the student as on one process."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.conftest import build_tokenizer
from tests.processes import on_processes
from tests.proxykd.helpers import make_kd_trainer
from tests.sharding.runs import FSDP2, aligned_proxykd, bayeskd, proxykd, slow_but


LOGGED = ("loss", "grad_norm", "nll", "entropy", "kl", "kl_prior", "kl_posterior", "mean_token_accuracy")
SELECTED = ("loss", "grad_norm", "selection/kept_share", "selection/uncertainty_kept", "selection/threshold_score")
# Samples of the likeliest tokens alone, which no seed changes
ON_POLICY = {"target_source": "on_policy", "kl_direction": "reverse", "on_policy_top_p": 1e-9}
VARIANTS = {
    "store": (proxykd, {}),
    "live": (proxykd, {"target_source": "live"}),
    "on policy": (proxykd, ON_POLICY),
    "LoRA": (proxykd, {"lora": True, "proxy_lora_kwargs": {"r": 4, "target_modules": "all-linear"}}),
    "alignment": (aligned_proxykd, {}),
    "alignment of an adapter": (aligned_proxykd, {"proxy_lora_kwargs": {"r": 4, "target_modules": "all-linear"}}),
    "Bayes-KD": (bayeskd, {}),
    "selection": (proxykd, {"selection": "llkd", "selection_warmup_steps": 2, "pool_factor": 2}),
}


def assert_same_run(expected, found):
    weights, others = expected["weights"]["student"], found["weights"]["student"]
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(
            others[key], value, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    for log in ("log", "proxy_log"):
        for own, other in zip(expected[log], found[log], strict=True):
            # What is kept comes in pieces of other sizes, of which token means are averaged
            logged = SELECTED if "selection/kept_share" in own else LOGGED
            for key in set(logged) & set(own):
                assert own[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4), (log, own["step"], key)
    for own, other in zip(expected["stages"], found["stages"], strict=True):
        for measured, again in zip(own, other, strict=True):
            assert again.pop("at", None) == measured.get("at")
            numbers = {key: value for key, value in measured.items() if key != "at"}
            assert again == pytest.approx(numbers, abs=1e-5, rel=1e-4)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """Of another architecture than the student: its layers, by which it is sharded, have another name."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder = tmp_path_factory.mktemp("proxy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(tiny_model_dir, proxy, tmp_path_factory):
    """Of each variant, what one process ends with."""
    found = {}

    def run(variant):
        if variant not in found:
            function, config = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("alone")
            (found[variant],) = on_processes(1, function, "single", tiny_model_dir, proxy, folder, **config)
        return found[variant]

    return run


@pytest.mark.parametrize("variant", slow_but(VARIANTS, "store", "live", "Bayes-KD"))
def test_fsdp2_ends_as_one_process(variant, alone, tiny_model_dir, proxy, tmp_path):
    function, config = VARIANTS[variant]
    found, other = on_processes(2, function, "fsdp2", tiny_model_dir, proxy, tmp_path, **config)
    assert_same_run(alone(variant), found)
    assert found["shares"]["proxy"] == pytest.approx(0.5, abs=0.02)
    for result in (found, other):
        assert result["shares"]["student"] == pytest.approx(0.5, abs=0.02)
        assert result["live_share"] == (1.0 if variant in ("live", "on policy") else None)
    if variant == "LoRA":
        return
    # Checkpoint and student are whole
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, value in found["weights"]["student"].items():
        torch.testing.assert_close(saved[key], value, atol=0, rtol=0)
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors").keys() <= saved.keys()


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_fsdp2_goes_on_from_a_checkpoint_as_if_never_stopped(step, alone, tiny_model_dir, proxy, tmp_path):
    """Also from the last one, after which there is nothing to train."""
    models = (tiny_model_dir, proxy)
    on_processes(2, proxykd, "fsdp2", *models, tmp_path)
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    found, _ = on_processes(2, proxykd, "fsdp2", *models, tmp_path, resume=checkpoint)
    assert_same_run(alone("store"), found)
    assert found["shares"]["student"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"proxy_in_memory": True}, "Hand in its path as proxy_model"),
        ({"quantized": True}, "bnb_4bit_quant_storage"),
    ],
    ids=["proxy in memory", "4-bit"],
)
def test_refused_before_anything_is_loaded(config, message, tiny_model_dir, other_model_dir, tmp_path, monkeypatch):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    # Nothing that the configuration does not say is read
    proxy = (
        AutoModelForCausalLM.from_pretrained(other_model_dir)
        if config.pop("proxy_in_memory", False)
        else other_model_dir
    )
    quantization = BitsAndBytesConfig(load_in_4bit=True) if config.pop("quantized", False) else None
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        make_kd_trainer(
            tmp_path, tiny_model_dir, proxy, trainer_kwargs={"quantization_config": quantization}, **config
        )


def test_a_proxy_in_4_bits_is_refused_where_it_would_be_sharded(
    tiny_model_dir, other_model_dir, tmp_path, monkeypatch
):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    four_bits = {"quantization_config": {"load_in_4bit": True}}
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(ValueError, match="stored as uint8 are not sharded by FSDP2"):
        make_kd_trainer(tmp_path, tiny_model_dir, other_model_dir, proxy_model_init_kwargs=four_bits)
