"""The proxy on disk: a model, or an adapter on one."""

from pathlib import Path

from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ProxyModelError
from ..host.model_paths import ADAPTER_CONFIG, base_name


def base_of_adapter(path: str) -> str | None:
    """
    The model that an adapter on disk belongs to; `None` if `path` is no adapter.

    Raises:
        [`ProxyModelError`]: it does not say, or the model is not there.
    """
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        return None
    base = base_name(Path(path))
    looks_local = bool(base) and base.startswith((".", "/", "~"))
    if not base or (looks_local and not Path(base).is_dir()):
        where = f"its base model {base} is not there" if base else "it does not name its base model"
        raise ProxyModelError(
            f"The proxy {path} is a LoRA adapter, and {where}. Set `base_model_name_or_path` in its {ADAPTER_CONFIG} to "
            "the model it was trained on, or hand in the merged model."
        )
    return base


def adapter_of(model: str | PreTrainedModel | PeftModel | None) -> PeftConfig | None:
    """The configuration of the adapter that a model in memory has, if there is one."""
    return model.active_peft_config if isinstance(model, PeftModel) else None


def load_proxy(path: str, trainable: bool = False, **kwargs) -> PreTrainedModel | PeftModel:
    """
    Load a proxy.

    Args:
        path (`str`):
            A model on disk or on the Hub, or a LoRA adapter on disk.
        trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter is to be trained further.
        **kwargs:
            Passed to `from_pretrained` of the model.

    Raises:
        [`ProxyModelError`]: an adapter without its base model.
    """
    base = base_of_adapter(path)
    model = AutoModelForCausalLM.from_pretrained(base or path, **kwargs)
    return model if base is None else PeftModel.from_pretrained(model, path, is_trainable=trainable)


def save_proxy(proxy: PreTrainedModel | PeftModel, tokenizer, folder: str | Path) -> None:
    """Write a proxy and its tokenizer; of an adapted model the trained adapter alone."""
    selected = {"selected_adapters": ["default"]} if isinstance(proxy, PeftModel) else {}
    proxy.save_pretrained(folder, **selected)
    tokenizer.save_pretrained(folder)


def load_weights(proxy: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Give a proxy in memory the weights of one on disk: of an adapted model those of the trained adapter."""
    if isinstance(proxy, PeftModel):
        set_peft_model_state_dict(proxy, load_peft_weights(str(folder), device="cpu"), "default")
    else:
        saved = type(proxy).from_pretrained(folder, dtype=proxy.dtype)
        proxy.load_state_dict(saved.state_dict())
