"""Where a model is said to be: an adapter's base model, what to say when there is none, and what tells two apart."""

import hashlib
import json
import os
from pathlib import Path


ADAPTER_CONFIG = "adapter_config.json"
SAMPLES_PER_FILE, SAMPLE_BYTES = 64, 65536


def no_model(name: str, path: str, what: str, error: Exception) -> str:
    """
    What to say when a checkpoint cannot be read.

    Args:
        name (`str`):
            The key that names it, such as `"discriminator"`.
        path (`str`):
            Its value.
        what (`str`):
            `"a model"` or `"a student"`.
        error (`Exception`):
            What transformers said, in many lines if it took a folder that is missing for an id of the Hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        reason = "the folder has no config.json" if not (folder / "config.json").is_file() else _first_line(error)
    elif _names_a_folder(path):
        reason = f"there is no folder {folder.absolute()}"
    else:
        reason = f"{_first_line(error).rstrip('.')}, and there is no folder {folder.absolute()}"
    return f"{name}={path!r} is neither a folder with {what} nor a model on the Hub: {reason.rstrip('.')}."


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def base_of_adapter(path: str, what: str | None = None) -> str | None:
    """
    The model that a LoRA adapter in a folder was trained on; `None` if `path` is no such folder.

    Args:
        path (`str`):
            A model on disk or on the Hub, or a LoRA adapter on disk.
        what (`str`, *optional*):
            What the message calls it, such as `"The proxy runs/adapter"`. By default the path.

    Returns:
        `str`: its base model, which is a folder that is there, or may be an id of the Hub.

    Raises:
        ValueError: the adapter does not name its base model, or names a folder that is not there.
    """
    folder = Path(path).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = _settings_of_adapter(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base and Path(base).expanduser().is_dir():
        return str(Path(base).expanduser())
    if base and not _names_a_folder(base):
        return base
    where = "it does not name its base model"
    if base:
        where = f"its base model {base} is not there"
        if not Path(base).expanduser().is_absolute():
            where += f" (a relative path, looked for from {Path.cwd()})"
    raise ValueError(
        f"{what or path} is an adapter, and {where}. Set `base_model_name_or_path` in its {ADAPTER_CONFIG} to the model it was "
        "trained on, or hand in the merged model."
    )


def _settings_of_adapter(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Copy or make the adapter again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} has no settings of an adapter. Copy or make it again.")
    return found


def base_of_student(path: str) -> str | None:
    """[`base_of_adapter`] of a recipe's student."""
    return base_of_adapter(path, f"model_name_or_path={path!r}")


def _names_a_folder(path: str) -> bool:
    """Whether `path` is none that an id of the Hub could be."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or (os.sep != "/" and os.sep in path)


def refuse_adapter_path(model, role: str) -> None:
    """
    Refuse an adapter's folder where a trainer takes a whole model, or an adapter on its base model in memory.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            What was given as model.
        role (`str`):
            What the model is: `"student"`, `"proxy"`.

    Raises:
        ValueError: `model` is the path of an adapter.
    """
    if isinstance(model, str) and (Path(model).expanduser() / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"The {role} {model} is an adapter. Hand in PeftModel.from_pretrained(base, {model!r}, is_trainable=True), or the "
            "merged model."
        )


def checkpoint_fingerprint(path: str, revision: str | None = None) -> str:
    """
    What tells one checkpoint from another without loading it: for a folder a hash of its weight files, of which evenly
    spaced pieces are read, and of an adapter's base model; else the name and revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    weights, base = weights_fingerprint(folder), base_of_adapter(path)
    return weights + (f"+{checkpoint_fingerprint(base)}" if base else "")


def weights_fingerprint(folder: Path) -> str:
    """The part of [`checkpoint_fingerprint`] that is of the folder's own files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = os.path.getsize(file)
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)):
                weights.seek(offset)
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()
