"""The reference policy of a LoRA student: a frozen adapter that TRL finds by its name."""

import torch
from peft import PeftModel

from .engines import gathered


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
        # Embedding adapters bear the adapter's name last, linear ones have `.weight` behind it
        components = name.split(".")
        if "default" in components:
            of_reference = [REFERENCE_ADAPTER if part == "default" else part for part in components]
            reference = model.get_parameter(".".join(of_reference))
            reference.requires_grad_(False)
            # TRL lowers the precision of the student's adapter on a quantised model
            if reference.dtype != parameter.dtype:
                reference.data = reference.data.to(parameter.dtype)
            # In place: FSDP2 reads storage of its own, whatever `data` is
            with torch.no_grad(), gathered([reference, parameter]):
                reference.copy_(parameter)
