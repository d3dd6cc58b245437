from dataclasses import dataclass, field

from trl import DPOConfig

from ..data.config import KeywordArguments, TeacherTextConfig
from ..host.refused_fields import refuse_fields


OWN_LOSS = {
    "loss_type": "the loss is DPO's, and the NLL of the teacher's answers. Set preference_weight and sft_weight.",
    "loss_weights": "set preference_weight and sft_weight.",
}
REFERENCE = "the reference is the model as it was when the round began."
OTHER_LOSS = "neither the preference loss nor the NLL has it. Leave it out."
MEASURED = "the held-out rows are measured before and after every round. Leave it out."
NO_LOOP = "what is measured before and after every round takes the place of TRL's evaluation. Leave it out."
REFUSED = {
    "sync_ref_model": REFERENCE,
    "ref_model_mixup_alpha": f"{REFERENCE} Leave it out.",
    "ref_model_sync_steps": f"{REFERENCE} Leave it out.",
    "precompute_ref_log_probs": "each round has samples and a reference of its own.",
    "precompute_ref_batch_size": "each round has samples and a reference of its own. Leave it out.",
    "label_smoothing": OTHER_LOSS,
    "label_smoothing_factor": OTHER_LOSS,
    "use_weighting": "TRL cannot weigh the NLL of the teacher's answers. Leave it out.",
    "discopop_tau": "it belongs to a loss that is not this one. Leave it out.",
    "dataset_num_proc": "rows are tokenised in one process. Leave it out.",
    "length_column_name": "lengths are those of the tokens, and no other column is kept. Leave it out.",
    "save_only_model": "its checkpoints cannot be gone on from. Set it to False.",
    "parallelism_config": "the reference's weights are replaced every round. Use plain data parallelism.",
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), MEASURED),
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
        ),
        NO_LOOP,
    ),
}


@dataclass
class PreferenceRoundsConfig(TeacherTextConfig, DPOConfig):
    r"""
    What every trainer has that prefers the teacher's answers over a model's own, round by round.

    This class includes only the parameters that are specific to the rounds. For the rest, see
    [`~data.config.TeacherTextConfig`] (the teacher's rows; the model's samples are as long as its answers at most) and
    [`~trl.DPOConfig`]. Epochs, steps, schedule and checkpoints are those of one round.

    > [!NOTE]
    > Defaults that differ from [`~trl.DPOConfig`]:
    > - `learning_rate`: `1e-5` instead of `1e-6`
    > - `lr_scheduler_type`: `"constant"` instead of `"linear"`
    > - `max_length`: `None` instead of `1024` (`max_completion_length` bounds the answers)
    > - `num_train_epochs`: `1.0` instead of `3.0`
    >
    > `loss_type` and `loss_weights` are set: `["sigmoid", "sft"]`, weighted by `preference_weight` and `sft_weight`;
    > others are refused, as are fields that would have no effect (docs/drop_in.md).

    Parameters:
        > Parameters that control the rounds

        num_rounds (`int`, *optional*, defaults to `16`):
            Rounds. Each trains on its own shard of the rows, with the model as it is when the round begins as
            reference.

        > Parameters that control the loss

        preference_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the preference loss, a mean over pairs.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the NLL of the teacher's answers, a mean over tokens.

        > Parameters that control the model's samples

        sample_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        sample_top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        sample_batch_size (`int`, *optional*, defaults to `32`):
            Samples generated at once. Samples depend on it.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample with vLLM, one in each process. It needs the extra `vllm`.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `vllm.LLM`, such as `{"gpu_memory_utilization": 0.4}`.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print some of a round's pairs, the teacher's answer beside the model's sample.
        num_completions_to_print (`int`, *optional*, defaults to `5`):
            How many.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["chat_template_kwargs", "vllm_kwargs"]
    _refused = REFUSED

    # Changed defaults
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type, within a round."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence in tokens. If `None`, sequences are not cut."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of a round over its shard."})

    # Rounds
    num_rounds: int = field(
        default=16, metadata={"help": "Rounds, each on its own shard and against the model as the round begins."}
    )

    # Loss
    preference_weight: float = field(default=1.0, metadata={"help": "Weight of the preference loss."})
    sft_weight: float = field(default=1.0, metadata={"help": "Weight of the NLL of the teacher's answers."})

    # Samples
    sample_temperature: float = field(default=1.0, metadata={"help": "Temperature of the model's samples."})
    sample_top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling of the model's samples."})
    sample_batch_size: int = field(default=32, metadata={"help": "Samples generated at once."})
    use_vllm: bool = field(default=False, metadata={"help": "Whether to sample with vLLM, in this process."})
    vllm_kwargs: KeywordArguments | None = field(default=None, metadata={"help": "Keyword arguments of `vllm.LLM`."})
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to print some of a round's pairs of teacher's answer and sample."}
    )
    num_completions_to_print: int = field(default=5, metadata={"help": "How many pairs are printed."})

    def own_losses(self) -> dict[str, float]:
        """The losses of TRL that make up this one, each with its weight."""
        return {"sigmoid": self.preference_weight, "sft": self.sft_weight}

    def __post_init__(self):
        losses = self.own_losses()
        own = {"loss_type": list(losses), "loss_weights": list(losses.values())}
        # What it sets itself comes back where a configuration is made from another one's fields
        refuse_fields(self, OWN_LOSS, "here", {name: (value,) for name, value in own.items()})
        refuse_fields(self, self._refused, "here")
        self.loss_type, self.loss_weights = own.values()
        super().__post_init__()
        self.check_teacher_text()
        for name in ("preference_weight", "sft_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.preference_weight == 0 and self.sft_weight == 0:
            raise ValueError("preference_weight and sft_weight are both 0: there is no loss. Set one of them.")
        for name in ("num_rounds", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_sampling(self)
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} is not possible here: a pair has no one length. Take "
                "'random' or 'sequential'."
            )


def check_sampling(args) -> None:
    """
    Check what a configuration says of a model's own samples.

    Raises:
        ValueError: a value is out of its range.
    """
    if args.sample_temperature <= 0:
        raise ValueError(f"sample_temperature must be positive, got {args.sample_temperature}.")
    if not 0 < args.sample_top_p <= 1:
        raise ValueError(f"sample_top_p must lie in (0, 1], got {args.sample_top_p}.")
