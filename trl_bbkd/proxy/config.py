from dataclasses import dataclass, field
from typing import ClassVar

from transformers import SchedulerType

from ..data.config import KeywordArguments
from ..soft_targets.config import SoftTargetConfig


@dataclass
class ProxyConfig(SoftTargetConfig):
    r"""
    What every trainer with a proxy has: an open model that learns the teacher's text first, and whose distributions
    the student learns from.

    This class includes only the parameters that are specific to the proxy. For the rest, see
    [`~soft_targets.config.SoftTargetConfig`] and [`~trl.SFTConfig`], which are the student's. The proxy's batch,
    precision and checkpoints are the student's where no parameter says otherwise.

    Parameters:
        > Parameters that control the stages

        stages (`list[str]`, *optional*, defaults to `["warmup", "distil"]`):
            What is done. A stage is left out by handing in what it would make.

        > Parameters that control the proxy

        proxy_model (`str`, *optional*):
            The proxy: a path or a Hub id of a model with the student's tokenizer, or a path of a LoRA adapter on one.
        proxy_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of its `from_pretrained`, such as `{"dtype": "bfloat16"}`.
        proxy_lora_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~peft.LoraConfig`]. When set, the proxy is trained as a LoRA adapter.
        proxy_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the proxy.
        proxy_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Schedule of that rate, over a stage of the proxy.
        proxy_warmup_epochs (`float`, *optional*, defaults to `1.0`):
            Epochs of warm-up.
        proxy_per_device_train_batch_size (`int`, *optional*):
            Rows per device. `None` takes the student's.
        proxy_gradient_accumulation_steps (`int`, *optional*):
            Accumulation steps. `None` takes the student's.

        > Parameters that control the soft targets

        target_top_k (`int`, *optional*, defaults to `10`):
            Tokens kept of each target.
        target_store (`str`, *optional*):
            Folder of finished targets, instead of the stage that makes them.
    """

    _VALID_DICT_FIELDS = SoftTargetConfig._VALID_DICT_FIELDS + ["proxy_model_init_kwargs", "proxy_lora_kwargs"]
    _stage_names: ClassVar[tuple[str, ...]] = ("warmup", "distil")

    # Stages
    stages: list[str] = field(
        default_factory=lambda: ["warmup", "distil"], metadata={"help": "What is done: `warmup`, `distil`, or one."}
    )

    # Proxy
    proxy_model: str | None = field(
        default=None,
        metadata={
            "help": "The proxy, with the student's tokenizer: a model's path or Hub id, or a LoRA adapter's path."
        },
    )
    proxy_model_init_kwargs: KeywordArguments | None = field(
        default=None, metadata={"help": "Keyword arguments of the proxy's `from_pretrained`."}
    )
    proxy_lora_kwargs: KeywordArguments | None = field(
        default=None, metadata={"help": "Keyword arguments of `peft.LoraConfig`: train the proxy as a LoRA adapter."}
    )
    proxy_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the proxy."})
    proxy_lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Schedule of the proxy's rate, over a stage of the proxy."}
    )
    proxy_warmup_epochs: float = field(default=1.0, metadata={"help": "Epochs of the proxy's warm-up."})
    proxy_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "The proxy's rows per device. If `None`, the student's."}
    )
    proxy_gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "The proxy's accumulation steps. If `None`, the student's."}
    )

    # Soft targets
    target_top_k: int = field(default=10, metadata={"help": "Tokens kept of each target."})
    target_store: str | None = field(
        default=None, metadata={"help": "Folder of finished targets, instead of the stage that makes them."}
    )

    def __post_init__(self):
        super().__post_init__()
        unknown = [stage for stage in self.stages or [] if stage not in self._stage_names]
        if unknown or not self.stages:
            raise ValueError(f"stages must be some of {', '.join(self._stage_names)}, got {self.stages}.")
        self.stages = [stage for stage in self._stage_names if stage in self.stages]
        if self.target_top_k < 1:
            raise ValueError(f"target_top_k must be at least 1, got {self.target_top_k}.")
        self._check_proxy_training()
        replaces_stages = self.target_store is not None and "distil" in self.stages and self.needs_targets
        if replaces_stages and self.stages != ["distil"]:
            raise ValueError(
                f"target_store={self.target_store!r} takes the place of all stages before 'distil'. Set stages to ['distil'], or "
                "leave target_store out."
            )

    def _check_proxy_training(self):
        for name in ("proxy_learning_rate", "proxy_warmup_epochs"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} must be positive, got {getattr(self, name)}. To take the proxy as it is, leave 'warmup' out of stages."
                )
        for name in ("proxy_per_device_train_batch_size", "proxy_gradient_accumulation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}. Leave it out for the student's."
                )
        schedules = [schedule.value for schedule in SchedulerType]
        if self.proxy_lr_scheduler_type not in schedules:
            raise ValueError(
                f"proxy_lr_scheduler_type must be one of {', '.join(schedules)}, got {self.proxy_lr_scheduler_type!r}."
            )

    @property
    def needs_proxy(self) -> bool:
        """Whether anything asks for a proxy."""
        return True

    @property
    def needs_targets(self) -> bool:
        """Whether the loss has soft targets."""
        return self.needs_proxy
