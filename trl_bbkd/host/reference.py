"""The reference policy of a LoRA student: a frozen adapter that TRL finds by its name."""

from pathlib import Path

import torch
from peft import PeftModel

from .engines import copy_into, gathered
from .model_files import read_adapter


REFERENCE_ADAPTER = "ref"


def add_reference_adapter(model: PeftModel) -> None:
    """Give `model` a frozen adapter with the weights of its trained one."""
    if REFERENCE_ADAPTER not in model.peft_config:
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config["default"])
        model.set_adapter("default")
    copy_adapter_to_reference(model)


def copy_adapter_to_reference(model: PeftModel) -> None:
    """Make the trained adapter, as it is now, the reference."""
    for name, parameter in model.named_parameters():
        if "default" in name.split("."):
            reference = model.get_parameter(of_reference(name))
            reference.requires_grad_(False)
            # TRL lowers the precision of the student's adapter on a quantised model
            if reference.dtype != parameter.dtype:
                reference.data = reference.data.to(parameter.dtype)
            # In place: FSDP2 reads storage of its own, whatever `data` is
            with torch.no_grad(), gathered([reference, parameter]):
                reference.copy_(parameter)


def of_reference(name: str) -> str:
    """The name of the reference's parameter that has the place of one of the trained adapter's."""
    # Embedding adapters bear the adapter's name last, linear ones have `.weight` behind it
    return ".".join(REFERENCE_ADAPTER if part == "default" else part for part in name.split("."))


def read_reference(model: PeftModel, folder: str | Path) -> None:
    """Make an adapter on disk the reference."""
    copy_into(
        dict(model.named_parameters()),
        {of_reference(name): value for name, value in read_adapter(model, folder).items()},
    )
