from dataclasses import dataclass, field
from typing import Literal

from ..data.config import KeywordArguments
from ..proxy.config import ProxyConfig
from .alignment_config import check_rounds


STAGE_NAMES = ("warmup", "align", "cache", "distil")


@dataclass
class ProxyKDConfig(ProxyConfig):
    r"""
    Configuration class for [`ProxyKDTrainer`], Proxy-KD ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013),
    version 2).

    This class includes only the parameters that are specific to Proxy-KD. For the rest, see
    [`~proxy.config.ProxyConfig`] (the proxy itself), [`~soft_targets.config.SoftTargetConfig`] and [`~trl.SFTConfig`],
    which are the student's.

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]:
    > - `learning_rate`: `1e-5` instead of `2e-5`
    > - `lr_scheduler_type`: `"constant"` instead of `"linear"`
    > - `max_length`: `None` instead of `1024`
    > - `num_train_epochs`: `1.0` instead of `3.0`

    Parameters:
        > Parameters that control the stages

        stages (`list[str]`, *optional*, defaults to `["warmup", "align", "cache", "distil"]`):
            What is done. A stage is left out by handing in what it would make: without `"warmup"` and `"align"` the
            proxy is taken as it is, without `"cache"` the targets are those of `target_store`. Without `"distil"` the
            run ends with the targets.
        warmup_share (`float`, *optional*, defaults to `0.1`):
            Share of the rows that the proxy is warmed up on.
        alignment_share (`float`, *optional*, defaults to `0.45`):
            Share of the rows that the proxy is aligned on. The student learns from the rest: it never sees rows of
            another stage. A column `stage` in the data (`warmup`, `align`, `distil`) divides the rows instead.
        distil_on_all_rows (`bool`, *optional*, defaults to `False`):
            Whether the student learns from the rows of the other stages too.

        > Parameters that control the alignment

        alignment_rounds (`int`, *optional*, defaults to `16`):
            Rounds, each on its own shard of the alignment rows.
        alignment_epochs (`float`, *optional*, defaults to `1.0`):
            Epochs of a round over its shard.
        alignment_learning_rate (`float`, *optional*):
            Learning rate of the alignment. `None` takes `proxy_learning_rate`.
        alignment_beta (`float`, *optional*, defaults to `0.1`):
            β of equation 4.
        alignment_patience (`int`, *optional*):
            Stop after so many rounds without better agreement with the teacher on held-out rows, and keep the best
            proxy.
        preference_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the preference loss beside the NLL in equation 6. `0.0` aligns by NLL alone ("no DPO").
        sample_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the proxy's samples.
        sample_top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling of the proxy's samples.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether the proxy samples with vLLM.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `vllm.LLM`.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print some of a round's pairs.

        > Parameters that control the soft targets

        target_source (`str`, *optional*, defaults to `"cache"`):
            `"cache"`: the proxy's `target_top_k` likeliest tokens are computed once and kept on disk, and the proxy is
            not in memory while the student trains. `"live"`: its whole distribution, computed beside the student.
            `"on_policy"`: that distribution over the student's own answers to its rows' prompts, drawn anew at every
            step; the NLL stays that of the teacher's answers.
        kl_direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"`: KL(proxy ‖ student), the paper's. `"reverse"`: KL(student ‖ proxy), which needs the proxy's whole
            distribution, so `target_source` `"live"` or `"on_policy"`.
        on_policy_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the student's samples.
        on_policy_top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling of the student's samples.
        kl_weight (`float`, *optional*, defaults to `1.0`):
            α of equation 11. `0.0` is plain SFT, without a proxy. The paper's 100 belongs to a reduction it does not
            state; here NLL and KL are both means over tokens.
        sample_weighting (`str`, *optional*, defaults to `"mean"`):
            Equation 9 from the log-likelihood of the whole answer (`"sum"`, the paper read literally, where long
            answers count less) or per token (`"mean"`); `"none"` weighs all rows alike.
    """

    _VALID_DICT_FIELDS = ProxyConfig._VALID_DICT_FIELDS + ["vllm_kwargs"]
    _stage_names = STAGE_NAMES

    # Changed defaults
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate of the student."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "The scheduler type of the student's learning rate."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of the student over its rows."})

    # Stages
    stages: list[str] = field(
        default_factory=lambda: list(STAGE_NAMES),
        metadata={"help": "What is done: `warmup`, `align`, `cache`, `distil`, or some of them."},
    )
    warmup_share: float = field(default=0.1, metadata={"help": "Share of the rows the proxy is warmed up on."})
    alignment_share: float = field(
        default=0.45, metadata={"help": "Share of the rows the proxy is aligned on. The student learns from the rest."}
    )
    distil_on_all_rows: bool = field(
        default=False, metadata={"help": "Whether the student learns from the rows of the other stages too."}
    )

    # Alignment
    alignment_rounds: int = field(
        default=16, metadata={"help": "Rounds, each on its own shard of the alignment rows."}
    )
    alignment_epochs: float = field(default=1.0, metadata={"help": "Epochs of a round over its shard."})
    alignment_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the alignment. If `None`, `proxy_learning_rate`."}
    )
    alignment_beta: float = field(default=0.1, metadata={"help": "Beta of equation 4."})
    alignment_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many rounds without better agreement on held-out rows. If `None`, never."},
    )
    preference_weight: float = field(
        default=1.0, metadata={"help": "Weight of the preference loss in equation 6. `0.0` aligns by NLL alone."}
    )
    sample_temperature: float = field(default=1.0, metadata={"help": "Temperature of the proxy's samples."})
    sample_top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling of the proxy's samples."})
    use_vllm: bool = field(default=False, metadata={"help": "Whether the proxy samples with vLLM."})
    vllm_kwargs: KeywordArguments | None = field(default=None, metadata={"help": "Keyword arguments of `vllm.LLM`."})
    log_completions: bool = field(default=False, metadata={"help": "Whether to print some of a round's pairs."})

    # Soft targets
    target_source: Literal["cache", "live", "on_policy"] = field(
        default="cache",
        metadata={
            "help": "`cache`: the likeliest tokens, computed once. `live`: the whole distribution, beside the student. "
            "`on_policy`: that over the student's own answers, drawn at every step."
        },
    )
    kl_direction: Literal["forward", "reverse"] = field(
        default="forward",
        metadata={
            "help": "`forward`: KL(proxy ‖ student). `reverse`: KL(student ‖ proxy), not with `target_source: cache`."
        },
    )
    on_policy_temperature: float = field(default=1.0, metadata={"help": "Temperature of the student's samples."})
    on_policy_top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling of the student's samples."})
    kl_weight: float = field(
        default=1.0, metadata={"help": "Alpha of equation 11. `0.0` is plain SFT, without a proxy."}
    )
    sample_weighting: Literal["sum", "mean", "none"] = field(
        default="mean",
        metadata={
            "help": "Equation 9 from the answer's log-likelihood (`sum`), per token (`mean`), or not at all (`none`)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("warmup_share", "alignment_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must lie between 0 and 1, got {getattr(self, name)}.")
        if self.warmup_share + self.alignment_share >= 1:
            raise ValueError(
                f"warmup_share={self.warmup_share} and alignment_share={self.alignment_share} leave the student no rows: "
                "their sum must be under 1."
            )
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must be at least 0, got {self.kl_weight}.")
        if self.hard_weight == 0 and self.kl_weight == 0:
            raise ValueError("hard_weight and kl_weight are both 0: there is no loss. Set one of them.")
        if self.alignment_rounds < 1:
            raise ValueError(f"alignment_rounds must be at least 1, got {self.alignment_rounds}.")
        if self.preference_weight < 0:
            raise ValueError(f"preference_weight must be at least 0, got {self.preference_weight}.")
        check_rounds(self)
        if self.target_source != "cache" and self.target_tail == "bucket":
            raise ValueError(
                "target_tail='bucket' belongs to target_source='cache': a live proxy's targets are whole."
            )
        if self.target_source == "cache" and self.kl_direction == "reverse":
            raise ValueError(
                "kl_direction='reverse' needs the proxy's whole distribution, and target_source='cache' keeps its likeliest tokens. "
                "Set target_source to 'live' or 'on_policy'."
            )
        check_on_policy(self)
        self._check_handed_in()

    @property
    def needs_proxy(self) -> bool:
        """Whether anything asks for a proxy: without a KL nothing does."""
        return self.kl_weight > 0

    @property
    def is_on_policy(self) -> bool:
        """Whether the KL is of the student's own samples."""
        return self.target_source == "on_policy" and self.needs_proxy

    def _check_handed_in(self):
        if not self.needs_proxy or "distil" not in self.stages:
            return
        if "cache" not in self.stages and self.target_store is None and self.target_source == "cache":
            raise ValueError(
                "stages leaves out 'cache', so target_store has to name a folder with the targets it would make; or set "
                "target_source='live'."
            )
        wants_likelihoods = self.target_source != "cache" and self.sample_weighting != "none"
        if "cache" not in self.stages and self.target_store is None and wants_likelihoods:
            raise ValueError(
                f"sample_weighting={self.sample_weighting!r} needs the proxy's likelihood of every row before training, "
                "which is computed in the stage 'cache'. Add that stage, or set sample_weighting='none'."
            )


def check_on_policy(args: ProxyKDConfig) -> None:
    """
    Raises:
        ValueError: a setting of the student's samples without them, or one that has no meaning for them.
    """
    if args.target_source != "on_policy":
        for name in ("on_policy_temperature", "on_policy_top_p"):
            if getattr(args, name) != 1.0:
                raise ValueError(f"{name} belongs to target_source='on_policy', and it is {args.target_source!r}.")
        return
    if args.on_policy_temperature <= 0:
        raise ValueError(f"on_policy_temperature must be positive, got {args.on_policy_temperature}.")
    if not 0 < args.on_policy_top_p <= 1:
        raise ValueError(f"on_policy_top_p must lie in (0, 1], got {args.on_policy_top_p}.")
    for name, reason in NOT_ON_POLICY.items():
        if getattr(args, name) != args.__dataclass_fields__[name].default:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is not possible with target_source='on_policy': {reason} Leave it out."
            )
    if args.use_vllm and "align" not in args.stages:
        raise ValueError(
            "use_vllm=True is the alignment's, which stages leaves out; the student's own samples are drawn with transformers. "
            "Leave it out."
        )


NOT_ON_POLICY = {
    "target_store": "samples are new at every step, so that no store has their targets.",
    "target_top_k": "the proxy's whole distribution is taken.",
    "max_length": "a sample is as long as max_completion_length lets it be, and max_prompt_length bounds prompts.",
    "selection": "rows are not selected by what the student would say to them.",
}
