from dataclasses import dataclass, field

from trl import DPOConfig

from ..data.messages import REASONING_HELP, ReasoningPolicy, check_reasoning
from ..host.refused_fields import refuse_fields
from ..host.typed import KeywordArguments


@dataclass
class ProxyAlignmentConfig(DPOConfig):
    r"""
    Configuration class for [`ProxyAlignmentTrainer`], the alignment of Proxy-KD
    ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013), equations 3 to 6).

    This class includes only the parameters that are specific to it. For the rest, see [`~trl.DPOConfig`]. Epochs,
    steps, schedule and checkpoints are those of one round.

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
        > Parameters that control the data

        max_prompt_length (`int`, *optional*):
            Longest prompt, in tokens. Rows with a longer one are dropped, and counted. `None` keeps every row.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens, the teacher's and the proxy's.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to `apply_chat_template`.
        reasoning (`str`, *optional*, defaults to `"keep"`):
            What becomes of the reasoning of the teacher's messages: `"keep"` it, as the chat template spells it, or
            `"drop"` it.

        > Parameters that control the rounds

        num_rounds (`int`, *optional*, defaults to `16`):
            Rounds. Each trains on its own shard of the rows, with the proxy as it is when the round begins as
            reference.
        alignment_patience (`int`, *optional*):
            Stop after so many rounds without a higher share of held-out positions at which the proxy's likeliest token
            is the teacher's, and go back to the best proxy. `None` never stops, and keeps the last proxy.

        > Parameters that control the loss

        preference_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the preference loss (equation 5), a mean over pairs.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the NLL of the teacher's answers (equation 3), a mean over tokens.

        > Parameters that control the proxy's samples

        sample_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        sample_top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        sample_batch_size (`int`, *optional*, defaults to `32`):
            Samples generated at once. Samples depend on it.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample with vLLM, in this process. It needs the extra `vllm` and one process.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `vllm.LLM`, such as `{"gpu_memory_utilization": 0.4}`.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print some of a round's pairs, the teacher's answer beside the proxy's sample.
        num_completions_to_print (`int`, *optional*, defaults to `5`):
            How many.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["chat_template_kwargs", "vllm_kwargs"]

    # Changed defaults
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type, within a round."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence in tokens. If `None`, sequences are not cut."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of a round over its shard."})

    # Data
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens. Rows with a longer one are dropped and counted."}
    )
    max_completion_length: int = field(
        default=512, metadata={"help": "Longest answer in tokens, the teacher's and the proxy's."}
    )
    chat_template_kwargs: KeywordArguments | None = field(
        default=None, metadata={"help": "Keyword arguments of `apply_chat_template`."}
    )
    reasoning: ReasoningPolicy = field(default="keep", metadata={"help": REASONING_HELP})

    # Rounds
    num_rounds: int = field(
        default=16, metadata={"help": "Rounds, each on its own shard and against the proxy as the round begins."}
    )
    alignment_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many rounds without better agreement on held-out rows. If `None`, never."},
    )

    # Loss
    preference_weight: float = field(default=1.0, metadata={"help": "Weight of the preference loss (equation 5)."})
    sft_weight: float = field(
        default=1.0, metadata={"help": "Weight of the NLL of the teacher's answers (equation 3)."}
    )

    # Samples
    sample_temperature: float = field(default=1.0, metadata={"help": "Temperature of the proxy's samples."})
    sample_top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling of the proxy's samples."})
    sample_batch_size: int = field(default=32, metadata={"help": "Samples generated at once."})
    use_vllm: bool = field(default=False, metadata={"help": "Whether to sample with vLLM, in this process."})
    vllm_kwargs: KeywordArguments | None = field(default=None, metadata={"help": "Keyword arguments of `vllm.LLM`."})
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to print some of a round's pairs of teacher's answer and sample."}
    )
    num_completions_to_print: int = field(default=5, metadata={"help": "How many pairs are printed."})

    def __post_init__(self):
        own = {"loss_type": ["sigmoid", "sft"], "loss_weights": [self.preference_weight, self.sft_weight]}
        # What it sets itself comes back where a configuration is made from another one's fields
        refuse_fields(self, OWN_FIELDS, "here", {name: (value,) for name, value in own.items()})
        refuse_fields(self, REFUSED, "here")
        self.loss_type, self.loss_weights = own.values()
        super().__post_init__()
        check_reasoning(self.reasoning)
        for name in ("preference_weight", "sft_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.preference_weight == 0 and self.sft_weight == 0:
            raise ValueError("preference_weight and sft_weight are both 0: there is no loss. Set one of them.")
        for name in ("num_rounds", "sample_batch_size", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_rounds(self)
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} is not possible here: a pair has no one length. Take "
                "'random' or 'sequential'."
            )
        if self.save_strategy == "best":
            raise ValueError(
                "save_strategy='best' is not possible here: set alignment_patience to keep the best proxy."
            )


def check_rounds(args) -> None:
    """
    Check what [`ProxyAlignmentConfig`] and [`ProxyKDConfig`] say of the rounds and the proxy's samples.

    Raises:
        ValueError: a value is out of its range.
    """
    if args.alignment_patience is not None and args.alignment_patience < 1:
        raise ValueError(f"alignment_patience must be at least 1, got {args.alignment_patience}.")
    if args.sample_temperature <= 0:
        raise ValueError(f"sample_temperature must be positive, got {args.sample_temperature}.")
    if not 0 < args.sample_top_p <= 1:
        raise ValueError(f"sample_top_p must lie in (0, 1], got {args.sample_top_p}.")


OWN_FIELDS = {
    "loss_type": "the loss is that of equation 6. Set preference_weight and sft_weight.",
    "loss_weights": "set preference_weight and sft_weight.",
}
MEASURED = "the proxy is measured on the held-out rows before and after every round. Leave it out."
NO_LOOP = "agreement with the teacher takes the place of TRL's evaluation. Leave it out."
PUSHED = "an aligned proxy is a step on the way: upload the folder `output_dir` yourself. Leave it out."
REFUSED = {
    "sync_ref_model": "the reference is the proxy as it was when the round began.",
    "ref_model_mixup_alpha": "the reference is the proxy as it was when the round began. Leave it out.",
    "ref_model_sync_steps": "the reference is the proxy as it was when the round began. Leave it out.",
    "precompute_ref_log_probs": "each round has samples and a reference of its own.",
    "precompute_ref_batch_size": "each round has samples and a reference of its own. Leave it out.",
    "label_smoothing": "no loss of equation 6 has it. Leave it out.",
    "label_smoothing_factor": "no loss of equation 6 has it. Leave it out.",
    "use_weighting": "TRL cannot weigh the NLL of equation 3. Leave it out.",
    "discopop_tau": "it belongs to a loss that is not this one. Leave it out.",
    "dataset_num_proc": "rows are tokenised in one process. Leave it out.",
    "length_column_name": "lengths are those of the tokens, and no other column is kept. Leave it out.",
    "save_only_model": "its checkpoints cannot be gone on from. Set it to False.",
    "parallelism_config": "the reference's weights are replaced every round. Use plain data parallelism.",
    "eval_strategy": MEASURED,
    "eval_steps": MEASURED,
    "eval_delay": MEASURED,
    "eval_on_start": MEASURED,
    "load_best_model_at_end": "set alignment_patience to keep the best proxy.",
    "metric_for_best_model": "set alignment_patience to keep the best proxy.",
    "greater_is_better": "set alignment_patience to keep the best proxy.",
    "prediction_loss_only": NO_LOOP,
    "eval_do_concat_batches": NO_LOOP,
    "eval_use_gather_object": NO_LOOP,
    "eval_accumulation_steps": NO_LOOP,
    "include_for_metrics": NO_LOOP,
    "batch_eval_metrics": NO_LOOP,
    "bf16_full_eval": NO_LOOP,
    "fp16_full_eval": NO_LOOP,
    "push_to_hub": PUSHED,
    "hub_model_id": PUSHED,
    "hub_private_repo": PUSHED,
    "hub_strategy": PUSHED,
    "hub_always_push": PUSHED,
    "hub_revision": PUSHED,
}
