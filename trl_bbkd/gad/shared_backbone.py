import copy
import itertools

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..errors import kind_of


SHARED = "shared"
# The other initial values of LoRA subtract the adapter from the base model
INITIALISATIONS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def share_backbone(student: PeftModel, head: str) -> PreTrainedModel:
    """
    Build a second model on the frozen weights of a LoRA student: modules of its own, the same tensors.

    Since the modules are its own, an adapter, dropout, train or eval mode, gradient checkpointing and a patched forward
    on the one do not show in the other, and neither's `state_dict`, optimizer or DDP wrapper sees the other's adapter.
    Only an in-place change of the base weights would: LoRA makes none, but merging does, for as long as TRL hands merged
    weights to vLLM (see [`~host._compat.hand_over_and_restore`]).

    Args:
        student ([`~peft.PeftModel`]):
            Student, already on its device. Left as it is.
        head (`str`):
            As in [`Discriminator`]: `"scalar"` leaves out the LM head.

    Returns:
        [`~transformers.PreTrainedModel`]: The base model, without the student's adapter.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(student.parameters(), student.buffers())}
    for parameter in student.parameters():
        # The scales of a 4-bit weight, which its module refers to as well
        quant_state = getattr(parameter, "quant_state", None)
        if quant_state is not None:
            shared[id(quant_state)] = quant_state
    model = copy.deepcopy(student, shared).unload()
    # TRL's fused LM head, at the student's sampling temperature, is an attribute of the instance
    vars(model).pop("forward", None)
    if head == "likelihood":
        return model
    body = model.base_model
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        # By which PEFT chooses its layers
        setattr(body, flag, getattr(model, flag, False))
    return body


def shared_adapter_config(student: PeftModel, backbone: PreTrainedModel) -> LoraConfig:
    """The student's LoRA configuration for the discriminator on `backbone`, without dropout."""
    config = copy.deepcopy(student.peft_config["default"])
    config.inference_mode = False
    config.lora_dropout = 0.0
    if isinstance(config.target_modules, set) and backbone.get_output_embeddings() is None:
        # Full names, as PEFT has written them for the student, begin with what holds the model beside its LM head
        prefix = f"{backbone.base_model_prefix}."
        config.target_modules = {name.removeprefix(prefix) for name in config.target_modules}
    return config


def check_shared_backbone(student_adapter: PeftConfig | None, discriminator_adapter: PeftConfig | None) -> None:
    """
    Refuse adapters that cannot live on one frozen base model.

    Args:
        student_adapter ([`~peft.PeftConfig`] or `None`):
            Of the student; `None` if it is trained in full.
        discriminator_adapter ([`~peft.PeftConfig`] or `None`):
            Of the discriminator; `None` if it takes the student's.

    Raises:
        ValueError: If the student is not a LoRA adapter, or if an adapter changes the weights under it.
    """
    if not isinstance(student_adapter, LoraConfig):
        kind = "trained in full" if student_adapter is None else f"{kind_of(student_adapter)} adapter"
        raise ValueError(
            "discriminator='shared' keeps two LoRA adapters on one frozen model, but the student is "
            f"{kind}. Train it as a LoRA adapter (`peft_config`, or `use_peft: true` in a recipe), or give the "
            "discriminator a checkpoint of its own."
        )
    for owner, config in {"student": student_adapter, "discriminator": discriminator_adapter}.items():
        if config is None:
            continue
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"discriminator='shared' needs a LoRA adapter for the discriminator, got {type(config).__name__}."
            )
        wanted = {
            "bias": config.bias == "none",
            "init_lora_weights": config.init_lora_weights in INITIALISATIONS_THAT_KEEP_THE_BASE,
            "layer_replication": config.layer_replication is None,
        }
        for name, keeps_base in wanted.items():
            if not keeps_base:
                raise ValueError(
                    f"discriminator='shared' needs a base model that stays as it is, but the {owner}'s LoRA "
                    f"configuration has {name}={getattr(config, name)!r}, which changes it. Leave {name} at its "
                    "default, or give the discriminator a checkpoint of its own."
                )
