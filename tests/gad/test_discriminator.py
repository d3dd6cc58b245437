import os

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_bbkd.discriminator.model import Discriminator, build_discriminator, collate_responses


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
RESPONSES = [[20, 21, 22, 2], [30, 2], [40, 41, 42, 43, 44, 45]]  # the last one is truncated: no EOS (2)


def build(model_dir, head, **kwargs):
    discriminator = build_discriminator(model_dir, head, **kwargs)
    with torch.no_grad():
        discriminator.score_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return discriminator.eval()


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
def test_padding_has_no_influence(tiny_model_dir, head):
    discriminator = build(tiny_model_dir, head)
    together = discriminator(**collate_responses(PROMPTS, RESPONSES, pad_token_id=0)).scores
    other_padding = discriminator(**collate_responses(PROMPTS, RESPONSES, pad_token_id=2)).scores
    alone = [
        discriminator(**collate_responses([prompt], [response], pad_token_id=0))[0]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, other_padding, atol=0, rtol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_likelihood_score_equals_full_logits(tiny_model_dir, reduction):
    discriminator = build(tiny_model_dir, "likelihood", likelihood_reduction=reduction)
    with torch.no_grad():
        discriminator.likelihood_scale.fill_(0.7)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval()
    scores, _, log_likelihoods = discriminator(**collate_responses(PROMPTS, RESPONSES, pad_token_id=0))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = model(torch.tensor([prompt + response]), output_hidden_states=True)
        log_probs = output.logits[0].log_softmax(-1)
        expected = sum(log_probs[len(prompt) + i - 1, token] for i, token in enumerate(response))
        assert log_likelihoods[row].item() == pytest.approx(expected.item(), rel=1e-5)
        evidence = expected / len(response) if reduction == "mean" else expected
        last_hidden = output.hidden_states[-1][0, -1]
        expected = 0.7 * evidence + discriminator.score_head.double()(last_hidden)
        discriminator.score_head.float()
        assert scores[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_likelihood_head_starts_as_the_language_model(tiny_model_dir):
    discriminator = build_discriminator(tiny_model_dir, "likelihood")
    scores, _, log_likelihoods = discriminator(**collate_responses(PROMPTS, RESPONSES, pad_token_id=0))
    torch.testing.assert_close(scores, log_likelihoods)


def test_scalar_head_reads_the_last_token_even_when_it_is_the_padding_id(tiny_model_dir):
    discriminator = build(tiny_model_dir, "scalar")
    with_eos, without_eos = (
        discriminator(**collate_responses([PROMPTS[0]], [response], pad_token_id=2))[0]
        for response in ([20, 21, 2], [20, 21])
    )
    assert (with_eos - without_eos).abs().item() > 1e-3


def test_dropout_is_off(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attention_dropout=0.5, dtype=torch.float32)
    discriminator = build_discriminator(
        model, "likelihood", peft_config=LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    ).train()
    torch.nn.init.normal_(
        discriminator.backbone.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
    )
    batch = collate_responses(PROMPTS, RESPONSES, pad_token_id=0)
    torch.testing.assert_close(discriminator(**batch)[0], discriminator(**batch)[0], atol=0, rtol=0)


@pytest.mark.parametrize("head", ["scalar", "likelihood"])
@pytest.mark.parametrize("lora", [False, True])
def test_save_and_load(tiny_model_dir, tmp_path, head, lora):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    discriminator = build(tiny_model_dir, head, peft_config=peft_config)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    batch = collate_responses(PROMPTS, RESPONSES, pad_token_id=0)
    expected = discriminator(**batch)[0]
    discriminator.save_pretrained(tmp_path / "discriminator")

    loaded = Discriminator.from_pretrained(tmp_path / "discriminator").eval()
    torch.testing.assert_close(loaded(**batch)[0], expected, atol=0, rtol=0)
    overwritten = build(tiny_model_dir, head, peft_config=peft_config)
    assert not torch.equal(overwritten(**batch)[0], expected)
    overwritten.load_weights(tmp_path / "discriminator")
    torch.testing.assert_close(overwritten(**batch)[0], expected, atol=0, rtol=0)
    continued = build_discriminator(str(tmp_path / "discriminator"), head)
    torch.testing.assert_close(continued.eval()(**batch)[0], expected, atol=0, rtol=0)
    files = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_errors(tiny_model_dir, tmp_path):
    from transformers import AutoModel

    with pytest.raises(ValueError, match="needs a causal language model, got Qwen2Model"):
        build_discriminator(AutoModel.from_pretrained(tiny_model_dir), "likelihood")
    build(tiny_model_dir, "scalar").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a 'scalar' head, but discriminator_head is 'likelihood'"):
        build_discriminator(str(tmp_path), "likelihood")
    with pytest.raises(FileNotFoundError, match="holds no discriminator"):
        Discriminator.from_pretrained(tmp_path / "nowhere")
