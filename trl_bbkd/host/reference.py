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
        # Embedding adapters bear the adapter's name last, linear ones have `.weight` behind it
        components = name.split(".")
        if "default" in components:
            of_reference = [REFERENCE_ADAPTER if part == "default" else part for part in components]
            reference = model.get_parameter(".".join(of_reference))
            # A copy in its precision too, which TRL lowers for the student's adapter on a quantised model
            reference.data = parameter.data.clone()
            reference.requires_grad_(False)
