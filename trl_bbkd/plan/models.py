"""Counts of a model from its configuration alone: it is built on PyTorch's meta device, where weights take no memory."""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..errors import RecipeError
from ..host.model_paths import ADAPTER_CONFIG, base_of_adapter, no_model
from ..runs.held_models import HeldModel
from ..runs.recipe_file import one_line
from .memory import ModelSize


CLASSES = {"text": AutoModelForCausalLM, "trunk": AutoModel, "classes": AutoModelForSequenceClassification}
TASKS = {"text": "CAUSAL_LM", "trunk": None, "classes": "SEQ_CLS"}


class ModelSizes:
    """
    Measures models, each kind of each configuration once.

    Args:
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Passed to `transformers`.
    """

    def __init__(self, trust_remote_code: bool = False):
        self.trust_remote_code = trust_remote_code
        self._configs: dict[str, PreTrainedConfig] = {}
        self._sizes: dict[tuple, ModelSize] = {}
        self._adapters: dict[tuple, int] = {}

    def __call__(self, model: HeldModel) -> ModelSize:
        config = self._config(model)
        key = (model.source, model.kind, model.num_labels)
        if key not in self._sizes:
            self._sizes[key] = size_of(self._on_meta(model, config), config)
        if model.adapter is None:
            return self._sizes[key]
        adapter_key = (*key, json.dumps(dict(model.adapter), sort_keys=True, default=str))
        if adapter_key not in self._adapters:
            built = self._on_meta(model, config)
            self._adapters[adapter_key] = adapter_size(built, model.adapter, TASKS[model.kind], model.name)
        return replace(self._sizes[key], adapter=self._adapters[adapter_key])

    def _config(self, model: HeldModel) -> PreTrainedConfig:
        if model.source not in self._configs:
            try:
                self._configs[model.source] = AutoConfig.from_pretrained(
                    model.source, trust_remote_code=self.trust_remote_code
                )
            except (OSError, ValueError) as error:
                raise RecipeError(
                    f"{no_model(model.key, str(model.source), 'a configuration', error)} A plan needs its config.json, and no "
                    f"weights: set --{model.key} to a folder with that file."
                ) from error
        return self._configs[model.source]

    def _on_meta(self, model: HeldModel, config: PreTrainedConfig) -> PreTrainedModel:
        if model.kind == "classes":
            config.num_labels = model.num_labels
        # What is said of attention and data types is said when a model is trained
        with torch.device("meta"), _silent():
            try:
                return CLASSES[model.kind].from_config(config, trust_remote_code=self.trust_remote_code)
            except (ValueError, TypeError) as error:
                raise RecipeError(f"{model.key}={model.source!r}: {one_line(error)}") from error


def size_of(model: PreTrainedModel, config: PreTrainedConfig) -> ModelSize:
    """Counts of a model on the meta device."""
    text = config.get_text_config()
    blocks = layers_of(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    linear = sum(module.weight.numel() for module in blocks.modules() if isinstance(module, nn.Linear))
    head = model.get_output_embeddings()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        parameters=parameters,
        adapter=0,
        linear=linear,
        layer=max(in_blocks, default=0),
        tail=parameters - sum(in_blocks),
        head=0 if head is None else head.weight.numel(),
        layers=len(blocks),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        attention=heads * head_width,
        kv=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder or encoder layers: the largest list of a model's modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    return max(lists, key=count, default=nn.ModuleList())


def adapter_size(model: PreTrainedModel, adapter: Mapping[str, Any], task: str | None, name: str) -> int:
    """
    Weights that PEFT adds to a model on the meta device. Of layers that are all alike it is given two, which for 80 of them is
    a second less.
    """
    blocks = layers_of(model)
    count, sizes = len(blocks), {sum(parameter.numel() for parameter in block.parameters()) for block in blocks}
    is_cut = count > 2 and len(sizes) == 1
    if is_cut:
        del blocks[2:]
    try:
        config = LoraConfig(
            **{"task_type": task, **{key: value for key, value in adapter.items() if value is not None}}
        )
        with torch.device("meta"), _silent():
            found = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"The {name} cannot have its adapter: {one_line(error)}") from error
    added = {each: parameter.numel() for each, parameter in found.named_parameters() if parameter.requires_grad}
    of_a_layer = (
        sum(parameter.numel() for parameter in blocks[1].parameters() if parameter.requires_grad) if is_cut else 0
    )
    return sum(added.values()) + of_a_layer * (count - 2 if is_cut else 0)


def with_saved_adapter(model: HeldModel) -> HeldModel:
    """A model whose source is the folder of an adapter, on the base model that the folder names."""
    base = base_of_adapter(str(model.source), f"{model.key}={model.source!r}") if model.source else None
    if base is None:
        return model
    saved = json.loads(Path(model.source, ADAPTER_CONFIG).expanduser().read_text(encoding="utf-8"))
    names = ("r", "target_modules", "modules_to_save", "target_parameters")
    return replace(model, source=base, adapter={name: saved.get(name) for name in names})


class _silent:
    """Without what libraries say of models that are never used."""

    def __enter__(self):
        self.level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self.caught.__exit__(*error)
        logging.getLogger("transformers").setLevel(self.level)
