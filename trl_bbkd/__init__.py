"""TRL trainers that distil a black-box teacher: one whose text is all you have."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .bayeskd.bayeskd_config import BayesKDConfig
    from .bayeskd.bayeskd_trainer import BayesKDTrainer
    from .gad.discriminator import Discriminator
    from .gad.gad_config import GADConfig
    from .gad.gad_trainer import GADTrainer
    from .llkd.llkd_config import LLKDConfig
    from .llkd.llkd_trainer import LLKDTrainer
    from .llkd.pseudo_labels import pseudo_label
    from .proxykd.alignment_config import ProxyAlignmentConfig
    from .proxykd.alignment_trainer import ProxyAlignmentTrainer
    from .proxykd.proxykd_config import ProxyKDConfig
    from .proxykd.proxykd_trainer import ProxyKDTrainer
    from .selection.collator import LLKDDataCollator
    from .selection.mixin import LLKDMixin
    from .teacher_data import load_teacher_data


__version__ = "0.2.0"
__all__ = [
    "BayesKDConfig",
    "BayesKDTrainer",
    "Discriminator",
    "GADConfig",
    "GADTrainer",
    "LLKDConfig",
    "LLKDDataCollator",
    "LLKDMixin",
    "LLKDTrainer",
    "ProxyAlignmentConfig",
    "ProxyAlignmentTrainer",
    "ProxyKDConfig",
    "ProxyKDTrainer",
    "launch",
    "load_teacher_data",
    "pseudo_label",
]

# Imported on first use, so that the command line answers before torch is loaded.
_LAZY_NAMES = {
    "BayesKDConfig": ".bayeskd.bayeskd_config",
    "BayesKDTrainer": ".bayeskd.bayeskd_trainer",
    "Discriminator": ".gad.discriminator",
    "GADConfig": ".gad.gad_config",
    "GADTrainer": ".gad.gad_trainer",
    "LLKDConfig": ".llkd.llkd_config",
    "LLKDDataCollator": ".selection.collator",
    "LLKDMixin": ".selection.mixin",
    "LLKDTrainer": ".llkd.llkd_trainer",
    "ProxyAlignmentConfig": ".proxykd.alignment_config",
    "ProxyAlignmentTrainer": ".proxykd.alignment_trainer",
    "ProxyKDConfig": ".proxykd.proxykd_config",
    "ProxyKDTrainer": ".proxykd.proxykd_trainer",
    "load_teacher_data": ".teacher_data",
    "pseudo_label": ".llkd.pseudo_labels",
}


def __getattr__(name: str):
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY_NAMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def launch(module_name: str, recipe_file: str) -> bool:
    """
    Train a recipe that Python was started on, as `accelerate launch recipes/gad.yaml` and `torchrun` do.

    Such a recipe is YAML between a first line that is also a Python statement and a last line that closes its string:

    ```yaml
    if __import__("trl_bbkd").launch(__name__, __file__): r'''
    method: gad
    # '''
    ```

    Args:
        module_name (`str`):
            The recipe's `__name__`. A worker process that imports the recipe again is not `"__main__"`, and nothing is
            started there.
        recipe_file (`str`):
            The recipe's `__file__`. The arguments after it on the command line override its values.

    Returns:
        `bool`: always `False`, so that Python passes over the YAML.
    """
    if module_name == "__main__":
        import sys

        from .cli import run_recipe

        run_recipe(recipe_file, sys.argv[1:])
    return False
