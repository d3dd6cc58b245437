"""An optimizer's state as plain tensors, for safetensors files."""

import torch


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of each parameter, in their order: `{"0.exp_avg": ..., "0.step": ..., "1.exp_avg": ...}`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give an optimizer over the same parameters the state that [`optimizer_tensors`] read."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # torch keeps the step count on the CPU
        optimizer.state[parameter][name] = value.to(parameter.device if name != "step" else "cpu")
