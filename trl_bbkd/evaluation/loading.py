"""A student that is evaluated: a folder or a Hub id of a model, or of an adapter on its base model."""

from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.student_tokenizer import student_tokenizer
from ..errors import RecipeError
from ..host.model_files import load_model
from ..host.model_paths import base_of_adapter, no_model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """
    The student's tokenizer; its base model's where an adapter was saved without one.

    Raises:
        [`~errors.RecipeError`]: there is none.
    """
    path = _path(model)
    try:
        base = base_of_adapter(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    has_tokenizer = base is None or (Path(path) / "tokenizer_config.json").is_file()
    try:
        return student_tokenizer(path if has_tokenizer else str(base), None)
    except (OSError, ValueError) as error:
        raise RecipeError(no_model("MODEL", model, "a student", error)) from error


def load_student(model: str) -> PreTrainedModel | PeftModel:
    """
    The student, in its checkpoint's precision and on this process' device.

    Raises:
        [`~errors.RecipeError`]: there is no such model.
    """
    try:
        return load_model(_path(model), dtype="auto").to(PartialState().device)
    except (OSError, ValueError) as error:
        raise RecipeError(no_model("MODEL", model, "a student", error)) from error


def _path(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else model
