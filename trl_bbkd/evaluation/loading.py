"""A student that is evaluated: a folder or a Hub id of a model, or of an adapter on its base model."""

from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.student_tokenizer import student_tokenizer
from ..errors import RecipeError
from ..host.model_files import ADAPTER_WEIGHTS, load_model
from ..host.model_paths import base_of_adapter, no_model
from ..host.preflight import refuse_broken_weights


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """
    The student's tokenizer; its base model's where an adapter was saved without one.

    Raises:
        [`~errors.RecipeError`]: there is none.
    """
    path, base = _path(model), _base(model)
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
        [`~errors.WeightsError`]: a file of its weights was cut.
    """
    refuse_broken_student(model)
    try:
        return load_model(_path(model), dtype="auto").to(PartialState().device)
    except (OSError, ValueError) as error:
        raise RecipeError(no_model("MODEL", model, "a student", error)) from error


def refuse_broken_student(model: str) -> None:
    """
    Raises:
        [`~errors.WeightsError`]: a file of the student's weights, or of its base model's, was cut.
        [`~errors.RecipeError`]: an adapter has none.
    """
    path, base = _path(model), _base(model)
    if base is not None and not any((Path(path) / name).is_file() for name in (ADAPTER_WEIGHTS, "adapter_model.bin")):
        raise RecipeError(
            f"{model} is an adapter without weights: it has no {ADAPTER_WEIGHTS}. Copy or make it again."
        )
    refuse_broken_weights(path, "student")
    refuse_broken_weights(base, "student's base model")


def _base(model: str) -> str | None:
    try:
        return base_of_adapter(_path(model))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _path(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else model
