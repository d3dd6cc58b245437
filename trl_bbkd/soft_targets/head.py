"""Where a language model ends in an output layer, and a forward that stops there."""

import copy
import types

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from ..host._compat import whole_models
from ..host.engines import whole_parameter
from .kernel import TokenLosses, soft_target_loss
from .loss import DenseTarget, LMHead, SparseTarget, project


LARGE_LOGITS = 10.0


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside of an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lm_head(model: PreTrainedModel) -> LMHead:
    """
    The output layer of a model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.

    Returns:
        [`~loss.LMHead`]
    """
    model = language_model(model)
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = None if layer.bias is None else whole_parameter(layer.bias)
    return LMHead(whole_parameter(layer.weight), bias, logit_scale(config), softcap)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of a model's output layer, also where its weight is in parts."""
    return model.config.get_text_config().vocab_size


def logit_scale(config: PretrainedConfig) -> float:
    """The factor by which some architectures multiply or divide their logits, whatever they call it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return divisor if config.model_type == "hyperclovax" else 1.0 / divisor


def last_hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What the output layer of a model reads, `(B, T, H)`."""
    backbone = language_model(model).base_model
    return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def scored_positions(labels: torch.Tensor) -> torch.Tensor:
    """`(B, T - 1)`, whether the token after a position is an answer's."""
    return labels[:, 1:] != -100


def check_partitioned_head(model: PreTrainedModel) -> None:
    """
    [`check_head`] of a model whose weights are, or will be, in parts: on one of the same architecture with random
    weights, no layers and few tokens. To gather the whole model on every device would take what sharding is to save.
    """
    model = language_model(model)
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers, text_config.vocab_size = 0, 16
    if isinstance(vars(text_config).get("layer_types"), list):
        text_config.layer_types = []
    text_config.pad_token_id = text_config.bos_token_id = text_config.eos_token_id = None
    with whole_models(), torch.random.fork_rng():
        small = type(model)._from_config(config, dtype=torch.float32)
        weight = small.get_output_embeddings().weight
        # Logits so large that what bounds them acts
        torch.nn.init.normal_(weight, std=LARGE_LOGITS / weight.size(1) ** 0.5)
    check_head(small)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """
    Compare, on three tokens, the logits of [`lm_head`] with the model's own.

    Raises:
        ValueError: they differ: this architecture treats its logits in a way that is not known here.
    """
    was_training = model.training
    model.eval()
    input_ids = torch.arange(3, device=model.device)[None]
    mask = torch.ones_like(input_ids)
    expected = model(input_ids=input_ids, attention_mask=mask).logits[0].float()
    head = lm_head(model)
    found = project(last_hidden_states(model, input_ids, mask)[0].to(head.weight.dtype), head)
    model.train(was_training)
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 0.05
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise ValueError(
            f"{type(language_model(model)).__name__} turns its hidden states into logits in a way that soft targets do "
            "not know yet: the logits computed from its output layer differ from its own. Please report the architecture."
        )


def add_soft_target_forward(model: PreTrainedModel) -> None:
    """
    Give `model` a second way through its forward: called with `soft_target_inputs` it returns [`~kernel.TokenLosses`]
    instead of logits, which it never builds. Without that argument it is unchanged.

    The loss is computed inside the forward, so that what wraps it (data parallelism, mixed precision, adapters) acts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, not wrapped in an adapter.
    """
    original = model.forward

    def forward(self, *args, soft_target_inputs: dict | None = None, **kwargs):
        if soft_target_inputs is None:
            return original(*args, **kwargs)
        # An adapter around the model hands on whatever arguments it knows, most of them `None`
        return _token_losses(self, kwargs["input_ids"], kwargs["attention_mask"], **soft_target_inputs)

    model.forward = types.MethodType(forward, model)


def _token_losses(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    targets: list[SparseTarget | DenseTarget],
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float,
    reverse: bool = False,
) -> TokenLosses:
    scored = scored_positions(labels)
    hidden = last_hidden_states(model, input_ids, attention_mask)[:, :-1]
    tokens = labels[:, 1:][scored]
    return soft_target_loss(hidden[scored], lm_head(model), tokens, targets, hard, soft, temperature, reverse=reverse)
