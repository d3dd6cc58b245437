import math
from dataclasses import dataclass, field, fields
from numbers import Real
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from trl import SFTConfig

from ..data.messages import REASONING_HELP, ReasoningPolicy
from ..host.refused_fields import refuse_fields
from ..host.typed import KeywordArguments
from ..selection.config import SelectionConfig


@dataclass
class SoftTargetConfig(SelectionConfig, SFTConfig):
    r"""
    What every trainer on soft targets has: the student learns the teacher's text and, token by token, the distribution
    of a model that has weights.

    This class includes only the parameters that are specific to soft targets. For the rest, see
    [`~selection.config.SelectionConfig`] (which rows a step learns from) and [`~trl.SFTConfig`].

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]:
    > - `max_length`: `None` instead of `1024` (`max_completion_length` bounds the answers)

    Parameters:
        > Parameters that control the data

        max_prompt_length (`int`, *optional*):
            Longest prompt, in tokens. Rows with a longer one are dropped, and counted. `None` keeps every row.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens. Longer ones are cut, and counted.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to `apply_chat_template`.
        reasoning (`str`, *optional*, defaults to `"keep"`):
            What becomes of the reasoning of the teacher's messages: `"keep"` it, as the chat template spells it, or
            `"drop"` it.

        > Parameters that control the loss

        hard_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the NLL of the teacher's tokens.
        distillation_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both sides of the KL. The KL is not multiplied by its square.
        target_tail (`str`, *optional*, defaults to `"renormalize"`):
            What becomes of the probability outside the tokens kept of a target: `"renormalize"` shares it out among
            them, `"bucket"` keeps it as one bucket of all other tokens.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["chat_template_kwargs"]

    # Changed defaults
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest sequence in tokens; soft targets are cut with it. If `None`, sequences are not cut."
        },
    )

    # Data
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens. Rows with a longer one are dropped and counted."}
    )
    max_completion_length: int = field(
        default=512, metadata={"help": "Longest answer in tokens. Longer ones are cut and counted."}
    )
    chat_template_kwargs: KeywordArguments | None = field(
        default=None, metadata={"help": "Keyword arguments of `apply_chat_template`."}
    )
    reasoning: ReasoningPolicy = field(default="keep", metadata={"help": REASONING_HELP})

    # Loss
    hard_weight: float = field(default=1.0, metadata={"help": "Weight of the NLL of the teacher's tokens."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of both sides of the KL."})
    target_tail: Literal["renormalize", "bucket"] = field(
        default="renormalize",
        metadata={
            "help": "Probability outside the tokens kept of a target: `renormalize` shares it out among them, `bucket` "
            "keeps it as one bucket of all other tokens."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_types()
        refuse_fields(self, REFUSED, "with soft targets", HARMLESS)
        if self.hard_weight < 0:
            raise ValueError(f"hard_weight must be at least 0, got {self.hard_weight}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}.")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be positive, got {self.distillation_temperature}.")
        if self.target_tail == "bucket" and self.distillation_temperature != 1.0:
            raise ValueError(
                f"distillation_temperature={self.distillation_temperature} needs target_tail='renormalize': how likely the "
                "bucket of all other tokens is at another temperature, the tokens kept do not tell."
            )

    def _check_types(self):
        """Of the parameters that are not TRL's: a number that is none would be found out by no comparison."""
        trl_names = {each.name for each in fields(SFTConfig)}
        hints = get_type_hints(type(self))
        for name in (each.name for each in fields(self) if each.name not in trl_names):
            value, hint = getattr(self, name), hints[name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}.")
            if hint in NUMBERS and (isinstance(value, bool) or not isinstance(value, Real | NUMBERS[hint])):
                raise ValueError(f"{name} must be a number, got {value!r}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}.")
            if isinstance(value, float) and hint in (int, int | None):
                raise ValueError(f"{name} must be a whole number, got {value}.")


# Hints of numbers, and what else may stand there
NUMBERS = {int: Real, float: Real, int | None: NoneType, float | None: NoneType}
REFUSED = {
    "packing": "a row's targets and its weight belong to one answer, and packing mixes several in a row. Set it to False.",
    "packing_strategy": "it belongs to packing. Leave it out.",
    "eval_packing": "it belongs to packing. Leave it out.",
    "padding_free": "targets are looked up row by row. Set it to False.",
    "label_smoothing_factor": "the soft targets take its place. Set it to 0.",
    "fp16": "gradients are made with the loss, before they could be scaled. Use bf16.",
    "save_only_model": "its checkpoints cannot be gone on from. Set it to False.",
    "use_liger_kernel": "it replaces the forward that the loss is computed in. Set it to False.",
    "liger_kernel_config": "it belongs to use_liger_kernel. Leave it out.",
    "parallelism_config": "the output layer, which the loss reads, would be in pieces. Use plain data parallelism.",
    "loss_type": "the hard loss is the NLL.",
    "completion_only_loss": "the teacher wrote the answers, not the prompts: only an answer's tokens have targets. Leave it out.",
    "assistant_only_loss": "a row is one prompt and one answer, and the loss is the answer's already. Leave it out.",
    "dataset_text_field": "rows are `prompt` and `completion`. Leave it out.",
    "dataset_kwargs": "rows are always prepared here. Leave it out.",
    "length_column_name": "lengths are those of the tokens, and no other column is kept. Leave it out.",
    "router_aux_loss_coef": "the auxiliary loss of a mixture of experts is not added. Set it to 0.0.",
}
# What is done anyway
HARMLESS = {"completion_only_loss": (True,), "eval_packing": (False,), "router_aux_loss_coef": (0.0,)}
