from dataclasses import dataclass, field
from typing import Literal

from ..proxy.config import ProxyConfig


STAGE_NAMES = ("warmup", "estimate", "distil")
MOST_CONTEXT = 16


@dataclass
class BayesKDConfig(ProxyConfig):
    r"""
    Configuration class for [`BayesKDTrainer`], Bayes-KD ([arXiv 2401.07013](https://arxiv.org/abs/2401.07013v1),
    version 1). The paper's equations are our reading of public descriptions, and every choice in them is a parameter.

    This class includes only the parameters that are specific to Bayes-KD. For the rest, see
    [`~proxy.config.ProxyConfig`] (the proxy itself), [`~soft_targets.config.SoftTargetConfig`] and [`~trl.SFTConfig`],
    which are the student's.

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]:
    > - `max_length`: `None` instead of `1024`

    Parameters:
        > Parameters that control the stages

        stages (`list[str]`, *optional*, defaults to `["warmup", "estimate", "distil"]`):
            What is done. Without `"warmup"` the proxy is taken as it is; without `"estimate"` the targets are those of
            `target_store`; without `"distil"` the run ends with the targets. All stages use all rows.

        > Parameters that control the prior

        ngram_context_length (`int`, *optional*, defaults to `3`):
            n: how many tokens before a token its n-gram count ratio looks at.
        ngram_min_count (`int`, *optional*, defaults to `1`):
            Contexts seen fewer times in the teacher's answers are replaced by their last n-1 tokens, and so on. `1`
            does not back off: a context seen once then says nothing but the token that was seen.
        ngram_memory_limit (`float`, *optional*, defaults to `4.0`):
            GiB of memory that counting may take; what does not fit is sorted on disk.
        prior_gamma (`float`, *optional*, defaults to `3.0`):
            γ: the prior is (γ-1)/γ of the token the teacher wrote and 1/γ of the n-gram ratio.

        > Parameters that control the posterior

        posterior_draws (`int`, *optional*, defaults to `50`):
            K: tokens drawn from the proxy at every position. `0` leaves the prior as it is, without a proxy.
        posterior_concentration (`float`, *optional*, defaults to `1.0`):
            κ: how many draws the prior counts for. The proxy weighs K/(K+κ). Where n-grams know little of what the
            teacher knows, a prior of 10 draws against 10 made the student far worse.
        posterior_sampling (`str`, *optional*, defaults to `"drawn"`):
            `"drawn"`: K tokens are drawn. `"expected"`: what K draws give on average, without their noise.
        posterior_grid_points (`int`, *optional*):
            m: update a Beta density on a grid of m points instead of in closed form. `None` is the closed form. Goes
            with `posterior_sampling="drawn"`.
        proxy_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the proxy's distribution.
        proxy_top_k (`int`, *optional*):
            Draw from the proxy's likeliest tokens only. `None` draws from all of them.

        inexact_top_logprobs (`bool`, *optional*, defaults to `False`):
            Whether values of `top_logprobs` are taken whose `exact` is false: those of a teacher whose tokens are not the
            student's at all positions.

        > Parameters that control the soft targets

        target_top_k (`int`, *optional*, defaults to `16`):
            Tokens kept of prior and posterior.
        target_store (`str`, *optional*):
            Folder with `prior` and `posterior`, instead of the stage `"estimate"`.
        prior_weight (`float`, *optional*, defaults to `0.0`):
            α of equation (6'). `1.0` is our reading of the paper; it never helped where we measured, and can ruin a
            student.
        posterior_weight (`float`, *optional*, defaults to `1.0`):
            β of equation (6').
    """

    _stage_names = STAGE_NAMES

    # Stages
    stages: list[str] = field(
        default_factory=lambda: list(STAGE_NAMES),
        metadata={"help": "What is done: `warmup`, `estimate`, `distil`, or some of them."},
    )

    # Prior
    ngram_context_length: int = field(
        default=3, metadata={"help": "How many tokens before a token its n-gram count ratio looks at."}
    )
    ngram_min_count: int = field(
        default=1,
        metadata={"help": "Contexts seen fewer times are replaced by shorter ones. `1` does not back off."},
    )
    ngram_memory_limit: float = field(
        default=4.0, metadata={"help": "GiB of memory for counting; what does not fit is sorted on disk."}
    )
    prior_gamma: float = field(
        default=3.0, metadata={"help": "The prior is (gamma-1)/gamma of the teacher's token, 1/gamma of the n-gram."}
    )

    # Posterior
    posterior_draws: int = field(
        default=50, metadata={"help": "Tokens drawn from the proxy at every position. `0` leaves the prior as it is."}
    )
    posterior_concentration: float = field(default=1.0, metadata={"help": "How many draws the prior counts for."})
    posterior_sampling: Literal["drawn", "expected"] = field(
        default="drawn", metadata={"help": "`drawn`: tokens are drawn. `expected`: what draws give on average."}
    )
    posterior_grid_points: int | None = field(
        default=None, metadata={"help": "Update a density on a grid of so many points. If `None`, in closed form."}
    )
    proxy_temperature: float = field(default=1.0, metadata={"help": "Temperature of the proxy's distribution."})
    proxy_top_k: int | None = field(
        default=None, metadata={"help": "Draw from the proxy's likeliest tokens only. If `None`, from all."}
    )

    inexact_top_logprobs: bool = field(
        default=False, metadata={"help": "Whether `top_logprobs` are taken whose `exact` is false."}
    )

    # Soft targets
    target_top_k: int = field(default=16, metadata={"help": "Tokens kept of prior and posterior."})
    target_store: str | None = field(
        default=None, metadata={"help": "Folder with `prior` and `posterior`, instead of the stage `estimate`."}
    )
    prior_weight: float = field(default=0.0, metadata={"help": "Weight of the KL to the prior."})
    posterior_weight: float = field(default=1.0, metadata={"help": "Weight of the KL to the posterior."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("prior_weight", "posterior_weight", "posterior_draws", "posterior_concentration"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("ngram_context_length", "ngram_min_count", "prior_gamma"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("ngram_memory_limit", "proxy_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.proxy_top_k is not None and self.proxy_top_k < 1:
            raise ValueError(f"proxy_top_k must be at least 1, got {self.proxy_top_k}. Leave it out for all tokens.")
        if self.ngram_context_length > MOST_CONTEXT:
            raise ValueError(
                f"ngram_context_length must be at most {MOST_CONTEXT}, got {self.ngram_context_length}: longer contexts are "
                "hardly ever seen twice."
            )
        if self.hard_weight == 0 and not self.needs_targets:
            raise ValueError("hard_weight, prior_weight and posterior_weight are all 0: there is no loss. Set one.")
        if self.posterior_draws == 0 and self.posterior_concentration == 0:
            raise ValueError(
                "posterior_draws and posterior_concentration are both 0: nothing is left to estimate from. Raise one."
            )
        if self.posterior_grid_points is not None:
            self._check_grid()
        self._check_stages()

    def _check_stages(self):
        if not self.needs_targets and ("distil" not in self.stages or self.target_store is not None):
            raise ValueError(
                "prior_weight and posterior_weight are both 0: nothing asks for the targets of stages or target_store. Set one."
            )
        if (
            self.needs_targets
            and "estimate" not in self.stages
            and "distil" in self.stages
            and self.target_store is None
        ):
            raise ValueError(
                "stages leaves out 'estimate', so target_store has to name a folder with the targets it would make."
            )
        if self.target_store is not None and "distil" not in self.stages:
            raise ValueError(
                f"target_store={self.target_store!r} is what the student learns from, and stages leaves out 'distil'. Take one of "
                "the two back."
            )
        if self.stages == ["warmup"] and not self.needs_proxy:
            raise ValueError(
                "stages=['warmup'] has nothing to do: without posterior_weight and posterior_draws there is no proxy."
            )

    def _check_grid(self):
        if self.posterior_grid_points < 2:
            raise ValueError(f"posterior_grid_points must be at least 2, got {self.posterior_grid_points}.")
        if self.posterior_sampling == "expected":
            raise ValueError(
                "posterior_grid_points goes with posterior_sampling='drawn': a grid's mean is not linear in the draws."
            )
        if self.posterior_concentration == 0 or self.posterior_draws == 0:
            raise ValueError(
                "posterior_grid_points needs a prior density and draws to update it with: set posterior_concentration and "
                "posterior_draws above 0."
            )

    @property
    def needs_targets(self) -> bool:
        """Whether the loss has soft targets; without them it is plain SFT."""
        return self.prior_weight > 0 or self.posterior_weight > 0

    @property
    def needs_proxy(self) -> bool:
        """Whether anything asks for a proxy: the prior does not, and a posterior without draws is the prior."""
        return self.posterior_weight > 0 and self.posterior_draws > 0

    @property
    def target_weights(self) -> dict[str, float]:
        """Weights of the KLs in the loss by their targets' names, those of weight 0 left out."""
        weights = {"prior": self.prior_weight, "posterior": self.posterior_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}
