"""Causal language models on disk: whole, or an adapter on one."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from .model_paths import base_of_adapter


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_of(model: str | PreTrainedModel | PeftModel | None) -> PeftConfig | None:
    """The configuration of the adapter that a model in memory has, if there is one."""
    return model.active_peft_config if isinstance(model, PeftModel) else None


def load_model(path: str, trainable: bool = False, **kwargs) -> PreTrainedModel | PeftModel:
    """
    Load a causal language model.

    Args:
        path (`str`):
            A model on disk or on the Hub, or a LoRA adapter on disk. An adapter that was saved with more embeddings than
            its base model has gets a base model with as many.
        trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter is to be trained further.
        **kwargs:
            Passed to `from_pretrained` of the model.

    Raises:
        ValueError: an adapter without its base model.
    """
    base = base_of_adapter(path)
    model = AutoModelForCausalLM.from_pretrained(base or path, **kwargs)
    if base is None:
        return model
    rows = saved_embeddings(path, model)
    if rows is not None and rows != model.get_input_embeddings().weight.size(0):
        # What the added ones are comes with the adapter
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, path, is_trainable=trainable)


def saved_embeddings(adapter: str, base: PreTrainedModel) -> int | None:
    """Rows of the input embedding that lies in an adapter's folder, where PEFT puts one that was resized or trained."""
    file = Path(adapter).expanduser() / ADAPTER_WEIGHTS
    if not file.is_file():
        return None
    embedding = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    with safe_open(file, framework="pt") as tensors:
        name = f"base_model.model.{embedding}.weight"
        return tensors.get_slice(name).get_shape()[0] if name in tensors.keys() else None


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer, folder: str | Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """
    Write a model and its tokenizer; of an adapted model the trained adapter alone. `weights` are its own, whole, where the
    model is in parts.
    """
    selected = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=weights, **selected)
    tokenizer.save_pretrained(folder)


def read_adapter(model: PeftModel, folder: str | Path, adapter: str = "default") -> dict[str, torch.Tensor]:
    """
    The weights of an adapter on disk, whole, by the names that they have in the state of a model with such an adapter.

    Args:
        model ([`~peft.PeftModel`]):
            The model, which is left as it is.
        folder (`str` or `Path`):
            Where the adapter was saved.
        adapter (`str`, *optional*, defaults to `"default"`):
            Which of the model's adapters is meant.
    """
    # PEFT tells how it names things in a file, but not the other way round: what it is given comes back under those names
    marks = {name: torch.empty(0) for name in model.state_dict()}
    names = {id(mark): name for name, mark in marks.items()}
    in_file = get_peft_model_state_dict(model, state_dict=marks, adapter_name=adapter)
    saved = load_peft_weights(str(folder), device="cpu")
    return {names[id(mark)]: saved[name] for name, mark in in_file.items() if name in saved}


def load_weights(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Give a model in memory the weights of one on disk: of an adapted model those of the trained adapter."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), "default")
    else:
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
