"""TRL trainers that distil a black-box teacher: one whose text is all you have."""

from importlib import import_module
from typing import TYPE_CHECKING

from .host.version import __version__ as __version__


if TYPE_CHECKING:
    from .bayeskd.config import BayesKDConfig
    from .bayeskd.trainer import BayesKDTrainer
    from .data.teacher_data import load_teacher_data
    from .discriminator.model import Discriminator
    from .errors import DistillationError
    from .gad.config import GADConfig
    from .gad.trainer import GADTrainer
    from .judging.callback import JudgeCallback
    from .judging.settings import EvalJudgeConfig
    from .llkd.config import LLKDConfig
    from .llkd.pseudo_labels import pseudo_label
    from .llkd.trainer import LLKDTrainer
    from .preferencekd.config import PreferenceKDConfig
    from .preferencekd.trainer import PreferenceKDTrainer
    from .proxykd.alignment_config import ProxyAlignmentConfig
    from .proxykd.alignment_trainer import ProxyAlignmentTrainer
    from .proxykd.config import ProxyKDConfig
    from .proxykd.trainer import ProxyKDTrainer
    from .selection.collator import LLKDDataCollator
    from .selection.mixin import LLKDMixin


__all__ = [
    "BayesKDConfig",
    "BayesKDTrainer",
    "Discriminator",
    "DistillationError",
    "EvalJudgeConfig",
    "GADConfig",
    "GADTrainer",
    "JudgeCallback",
    "LLKDConfig",
    "LLKDDataCollator",
    "LLKDMixin",
    "LLKDTrainer",
    "PreferenceKDConfig",
    "PreferenceKDTrainer",
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
    "BayesKDConfig": ".bayeskd.config",
    "BayesKDTrainer": ".bayeskd.trainer",
    "Discriminator": ".discriminator.model",
    "DistillationError": ".errors",
    "EvalJudgeConfig": ".judging.settings",
    "GADConfig": ".gad.config",
    "GADTrainer": ".gad.trainer",
    "JudgeCallback": ".judging.callback",
    "LLKDConfig": ".llkd.config",
    "LLKDDataCollator": ".selection.collator",
    "LLKDMixin": ".selection.mixin",
    "LLKDTrainer": ".llkd.trainer",
    "PreferenceKDConfig": ".preferencekd.config",
    "PreferenceKDTrainer": ".preferencekd.trainer",
    "ProxyAlignmentConfig": ".proxykd.alignment_config",
    "ProxyAlignmentTrainer": ".proxykd.alignment_trainer",
    "ProxyKDConfig": ".proxykd.config",
    "ProxyKDTrainer": ".proxykd.trainer",
    "load_teacher_data": ".data.teacher_data",
    "pseudo_label": ".llkd.pseudo_labels",
}


# Type checkers read the imports above: to them, a module with `__getattr__` has every name
if not TYPE_CHECKING:

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

        from .commands.train import run_recipe

        run_recipe(recipe_file, sys.argv[1:])
    return False
