"""Output layers of models whose weights are in parts, or not there."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, MixtralConfig, Qwen2Config

from tests.processes import on_processes
from trl_bbkd.host.engines import whole_parameter
from trl_bbkd.soft_targets import head
from trl_bbkd.soft_targets.head import check_partitioned_head


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("config", [Qwen2Config, Gemma2Config, MixtralConfig])
def test_a_head_is_checked_without_the_models_weights(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(num_hidden_layers=3, vocab_size=50_000, **SMALL))
    state = torch.random.get_rng_state()
    check_partitioned_head(model)
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    assert model.config.num_hidden_layers == 3 and model.config.vocab_size == 50_000


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_scaling"])
def test_an_unknown_treatment_of_logits_is_found(name, monkeypatch):
    """Even one that acts on large logits alone."""
    config = {"final_logit_softcapping": Gemma2Config, "logits_scaling": GraniteConfig}[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(logits_scaling=4.0, **SMALL))
    original = head.lm_head
    monkeypatch.setattr(head, "lm_head", lambda model: replace(original(model), softcap=None, logit_scale=1.0))
    with pytest.raises(ValueError, match="turns its hidden states into logits in a way"):
        check_partitioned_head(model)


def gradients() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sharded layer whose weight is read outside of its forward, and the one that all processes together have."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4, bias=False)
    weight = layer.weight.detach().clone().requires_grad_()
    inputs = torch.randn(2, 5, 3)
    loss = sum((part @ weight.T).square().sum() for part in inputs) / 2
    loss.backward()
    fully_shard(layer, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    own = inputs[torch.distributed.get_rank()]
    (own @ whole_parameter(layer.weight).T).square().sum().backward()
    return layer.weight.grad.full_tensor(), weight.grad


def test_a_weight_that_is_read_outside_of_its_forward():
    for found, expected in on_processes(2, gradients):
        torch.testing.assert_close(found, expected)
