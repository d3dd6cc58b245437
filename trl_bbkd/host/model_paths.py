"""Where a model is said to be: an adapter's base model, what to say when there is none, and what tells two apart."""

import hashlib
import json
import os
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM


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
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or os.sep != "/" and os.sep in path:
        reason = f"there is no folder {folder.absolute()}"
    else:
        reason = _first_line(error)
    return f"{name}={path!r} is neither a folder with {what} nor a model on the Hub: {reason.rstrip('.')}."


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def base_name(folder: Path) -> str | None:
    """The model that an adapter in a folder says it was trained on; `None` if it does not say, or there is no adapter."""
    config = folder / ADAPTER_CONFIG
    return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") if config.is_file() else None


def base_of_student(path: str) -> str | None:
    """
    The model that a LoRA adapter in a folder was trained on; `None` if `path` is no such folder.

    Raises:
        ValueError: the adapter does not name its base model, or it is not there.
    """
    folder = Path(path).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    base = base_name(folder)
    if base and (not base.startswith((".", "/", "~")) or Path(base).expanduser().is_dir()):
        return base
    where = f"its base model {base} is not there" if base else "it does not name its base model"
    raise ValueError(
        f"model_name_or_path={path!r} is an adapter, and {where}. Set base_model_name_or_path in its {ADAPTER_CONFIG}, or "
        "merge it into its base model and name that."
    )


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
    if isinstance(model, str) and (Path(model) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"The {role} {model} is an adapter. Hand in PeftModel.from_pretrained(base, {model!r}, is_trainable=True), or the "
            "merged model."
        )


def load_adapter_student(path: str, base: str, **kwargs) -> PeftModel:
    """
    Load an adapter on its base model, to be trained further.

    Args:
        path (`str`):
            Folder of the adapter.
        base (`str`):
            Its base model, as of [`base_of_student`].
        **kwargs:
            Passed to `from_pretrained` of the base model.
    """
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **kwargs), path, is_trainable=True)


def checkpoint_fingerprint(path: str, revision: str | None = None) -> str:
    """
    What tells one checkpoint from another without loading it: for a folder a hash of its weight files, of which evenly
    spaced pieces are read, and of an adapter's base model; else the name and revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = os.path.getsize(file)
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)):
                weights.seek(offset)
                digest.update(weights.read(SAMPLE_BYTES))
    base = base_name(folder)
    return digest.hexdigest() + (f"+{checkpoint_fingerprint(base)}" if base else "")
