"""The reference policy of a LoRA student: a frozen adapter that TRL finds by its name."""

from peft import PeftModel


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
        if ".default." in name:
            reference = model.get_parameter(name.replace(".default.", f".{REFERENCE_ADAPTER}."))
            # A copy in its precision too, which TRL lowers for the student's adapter on a quantised model
            reference.data = parameter.data.clone()
            reference.requires_grad_(False)
