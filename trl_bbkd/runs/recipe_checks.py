"""Values of a recipe that nothing can be done with, told before anything is built from them."""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .recipe_file import RecipeFile


AT_LEAST_ONE = (
    "gradient_accumulation_steps",
    "max_completion_length",
    "max_prompt_length",
    "max_length",
    "eval_prompts",
    "eval_samples",
)
NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps", "beta")
POSITIVE = ("temperature", "repetition_penalty")
INTERVALS = ("logging_steps", "save_steps", "eval_steps")
QUANTIZATION = 'pip install "trl-bbkd[quantization]"'
OPTIMIZERS_OF_BITSANDBYTES = ("bnb", "paged", "lion", "ademamix", "adamw_8bit")
# By what an optimizer's name begins with
OPTIMIZER_PACKAGES = {
    "galore": ("galore_torch", "pip install galore-torch"),
    "apollo": ("apollo_torch", "pip install apollo-torch"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "adalomo": ("lomo_optim", "pip install lomo-optim"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "schedule_free": ("schedulefree", "pip install schedulefree"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_torch_4bit": ("torchao", "pip install torchao"),
    "adamw_torch_8bit": ("torchao", "pip install torchao"),
    "adamw_anyprecision": ("torchdistx", "see github.com/pytorch/torchdistx"),
}
# Module, and how it is installed
PACKAGES = {
    "use_vllm": ("vllm", 'pip install "trl-bbkd[vllm]"'),
    "load_in_4bit": ("bitsandbytes", QUANTIZATION),
    "load_in_8bit": ("bitsandbytes", QUANTIZATION),
    "deepspeed": ("deepspeed", 'pip install "trl-bbkd[deepspeed]"'),
    "use_liger_kernel": ("liger_kernel", "pip install liger-kernel"),
}


def check_values(values: dict[str, Any], recipe_file: RecipeFile) -> None:
    """
    Args:
        values (`dict[str, Any]`):
            Every key's value, defaults and overrides included.
        recipe_file ([`~runs.recipe_file.RecipeFile`]):
            Where some of them are from.

    Raises:
        [`~errors.RecipeError`]: a number that is out of its range, or an `output_dir` that cannot be one.
    """
    for name, value in values.items():
        problem = _problem(name, value)
        if problem and recipe_file.values.get(name) == value:
            raise recipe_file.error((name,), problem)
        if problem:
            raise RecipeError(problem)
    # The one package that a configuration itself looks for, and says so in the words of its own
    check_packages({"deepspeed": values["deepspeed"]})


def check_packages(values: dict[str, Any]) -> None:
    """
    Args:
        values (`dict[str, Any]`):
            Every key's value.

    Raises:
        [`~errors.RecipeError`]: a value needs a package that is not installed.
    """
    # A method's other models have keys that end like the student's
    needed = {
        name: package
        for name, value in values.items()
        for key, package in PACKAGES.items()
        if value and (name == key or name.endswith(f"_{key}"))
    }
    optimizer = str(getattr(values.get("optim"), "value", ""))
    if any(part in optimizer for part in OPTIMIZERS_OF_BITSANDBYTES):
        needed["optim"] = PACKAGES["load_in_8bit"]
    for start, package in OPTIMIZER_PACKAGES.items():
        if optimizer.startswith(start):
            needed["optim"] = package
    for name, (module, command) in needed.items():
        if find_spec(module) is None:
            raise RecipeError(
                f"{name}={getattr(values[name], 'value', values[name])} needs {module}, which is not installed here: `{command}`. Or take {name} out."
            )


def _problem(name: str, value: Any) -> str | None:
    requirement = _temperatures(value) if name == "eval_temperatures" else _requirement(name, value)
    if requirement:
        return f"{name} must be {requirement}, got {value}."
    return _folder_problem(value) if name == "output_dir" and value else None


def _temperatures(value: Any) -> str | None:
    """What temperatures of the report must be, if they are not."""
    if value is None or (value and len({*value}) == len(value) and all(0 <= each < math.inf for each in value)):
        return None
    return "different numbers of at least 0, such as 1.0 0.7 0"


def _folder_problem(output_dir: str) -> str | None:
    path = Path(output_dir).expanduser().absolute()
    found = next(folder for folder in (path, *path.parents) if folder.exists())
    if not found.is_dir():
        return f"output_dir cannot be {output_dir}: {found} is a file. Name another folder."
    if not os.access(found, os.W_OK):
        return f"output_dir cannot be {output_dir}: {found} may not be written to. Name another folder."
    return None


def _requirement(name: str, value: Any) -> str | None:
    """What a number of this name must be, if `value` is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if name == "max_steps":
        return None if value == -1 or value >= 1 else "at least 1, or -1 for `num_train_epochs` to decide"
    if name in INTERVALS:
        return None if value > 0 else "at least 1 step, or a share of all steps between 0 and 1"
    if name in AT_LEAST_ONE or name.endswith("batch_size"):
        return None if value >= 1 else "at least 1"
    if name in POSITIVE:
        return None if 0 < value < math.inf else "a number above 0"
    if name == "top_k":
        return None if value >= 0 else "at least 1, or 0 for all tokens"
    if name == "min_p":
        return None if 0 <= value <= 1 else "from 0 to 1"
    if name in ("seed", "data_seed"):
        return None if 0 <= value < 2**32 else "from 0 to 2**32 - 1"
    if name == "top_p":
        return None if 0 < value <= 1 else "above 0 and at most 1"
    if name in NOT_NEGATIVE or name.endswith("learning_rate"):
        return None if 0 <= value < math.inf else "a number of at least 0"
    return None
