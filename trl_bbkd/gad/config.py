from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig

from ..data.config import KeywordArguments
from ..data.messages import REASONING_HELP, ReasoningPolicy, check_reasoning
from .config_checks import check_bounds, check_choices, refuse_without_effect


@dataclass
class GADConfig(GRPOConfig):
    r"""
    Configuration class for [`GADTrainer`], Generative Adversarial Distillation
    ([arXiv 2511.10643](https://huggingface.co/papers/2511.10643)).

    This class includes only the parameters that are specific to GAD. For the rest, see [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`]. Defaults are those of the official runs.

    > [!NOTE]
    > Defaults that differ from [`~trl.GRPOConfig`]:
    > - `beta`: `0.001` instead of `0.0`
    > - `lr_scheduler_type`: `"constant"` instead of `"linear"`
    > - `max_completion_length`: `1536` instead of `512`; a number, because both sides of the discriminator are cut there
    > - `max_grad_norm`: `0.2` instead of `1.0`
    > - `temperature`: `0.8` instead of `1.0`
    > - `use_bias_correction_kl`: `False` instead of `True` (the official runs use the plain k3 estimator)
    > - `weight_decay`: `0.01` instead of `0.0`

    Parameters:
        > Parameters that control the data

        max_prompt_length (`int`, *optional*, defaults to `2048`):
            Longest prompt, in tokens. Rows with a longer one are dropped, and counted. `None` keeps every row.
        answers_per_prompt (`int`, *optional*):
            Most training rows that share a prompt. The first ones are kept, the others left out and counted. `None` keeps
            every row.
        reasoning (`str`, *optional*, defaults to `"keep"`):
            What becomes of the reasoning of the teacher's messages: `"keep"` it, as the chat template spells it, or
            `"drop"` it.

        > Parameters that control the stages

        warmup_epochs (`float`, *optional*, defaults to `1.0`):
            Epochs of warm-up, out of `num_train_epochs`: the student learns the teacher's text by cross-entropy while
            the discriminator learns to tell the student's fresh samples from it (section 2.2 of the paper). With
            `max_steps`, warm-up keeps its share `warmup_epochs / num_train_epochs` of the steps. The student as it
            is at the end of warm-up is the KL reference of the adversarial stage.
        warmup_learning_rate (`float`, *optional*):
            Learning rate of the student during warm-up. `None` takes `learning_rate`.
        discriminator_only_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps at the start of warm-up in which only the discriminator learns; at most half of warm-up.
        sft_weight (`float`, *optional*, defaults to `0.1`):
            Weight, in the adversarial stage, of the cross-entropy on the teacher's answers (mean over their tokens), added
            to the student's loss. It keeps the likelihood of the teacher's text. Ours: the paper drops it after warm-up, as
            `0.0` does.

        > Parameters that control the discriminator

        discriminator (`str`, *optional*):
            Checkpoint the discriminator starts from: a local path or a Hub id. `None` takes the student's. `"shared"`
            makes it a second LoRA adapter on the frozen base model of a LoRA student, which is then in memory once.
        discriminator_rows (`str`, *optional*, defaults to `"all"`):
            Rows that the stages learn from. `"all"`: both from all. `"unseen"` (ours): the warm-up from one share,
            `warmup_epochs / num_train_epochs` of the rows, and the adversarial stage from the others, whose answers the
            discriminator does not know by heart. All rows of a prompt are in the same share. Steps stay as many.
        discriminator_head (`str`, *optional*, defaults to `"scalar"`):
            How a response is scored. `"scalar"`: a linear head at the last response token, as in the paper.
            `"likelihood"` (ours): a learned scale times the discriminator's own log-likelihood of the response, plus
            the linear head.
        discriminator_likelihood_reduction (`str`, *optional*, defaults to `"sum"`):
            Whether the `"likelihood"` head takes the `"sum"` or the `"mean"` over the response tokens.
        discriminator_loss (`str`, *optional*, defaults to `"bradley_terry"`):
            `"bradley_terry"` (Eq. 3) or `"cross_entropy"`, per sample (Eq. 4).
        discriminator_lora_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~peft.LoraConfig`]. When set, the discriminator is trained as a LoRA adapter. With
            `discriminator="shared"`, `None` takes the student's, without dropout.
        discriminator_load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to load the frozen model under a LoRA discriminator in 4 bits (NF4, bitsandbytes).
        discriminator_learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate of the discriminator's own AdamW optimizer, constant.
        discriminator_warmup_learning_rate (`float`, *optional*):
            Learning rate of the discriminator during warm-up. `None` takes `discriminator_learning_rate`.
        discriminator_weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay of the discriminator's optimizer.
        discriminator_max_grad_norm (`float`, *optional*, defaults to `0.2`):
            Gradient norm the discriminator's gradient is clipped to.
        discriminator_updates_per_batch (`int`, *optional*, defaults to `1`):
            Discriminator steps per generation batch. `0` freezes it.
        discriminator_batch_size (`int`, *optional*):
            Sequences per device in one forward pass of the discriminator. Changes memory, not results. `None` takes
            `per_device_train_batch_size`.
        discriminator_sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the language-model loss on the teacher's answers, added to the discriminator's loss during
            warm-up (ours, `"likelihood"` head only: its first guess is as good as its language model).

        > Parameters that control the advantages

        advantage_estimator (`str`, *optional*, defaults to `"group"`):
            `"group"`: a sample against the other samples of its prompt (GRPO, as in the paper). `"gae"`: generalized
            advantage estimation with a critic (PPO).
        discriminator_credit (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"`: the score is one reward for the whole answer. `"token"` (ours, `"likelihood"` head only): each
            token is rewarded with what it adds to the score; with `"group"`, the advantage of a token is the reward
            still to come against that of the group.
        discriminator_entropy (`float`, *optional*, defaults to `0.0`):
            Share `c` of the student's own log-likelihood that is taken off the reward (ours, `"likelihood"` head only):
            `log p_D - c log p_student` in place of `log p_D`, whose optimum is a student that writes only the likeliest.
            At 1 the student approaches the discriminator's distribution (reverse KL).
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of `"gae"`.
        lam (`float`, *optional*, defaults to `0.95`):
            Trade-off of `"gae"` between the critic's bias (0) and the variance of sampled returns (1).
        critic (`str`, *optional*):
            The value model of `"gae"`. `"copy"`: the student's checkpoint with a value head, trained. `"trunk"`: a
            value head on the student's own trunk, which it reads without changing it.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the critic's own AdamW optimizer, constant. It learns in both stages.
        critic_lora_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~peft.LoraConfig`]: train the `"copy"` as a LoRA adapter.
        critic_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradient norm the critic's gradient is clipped to.
        cliprange_value (`float`, *optional*, defaults to `0.5`):
            How far the value loss lets a value move from what it was when the answer was sampled, in standard
            deviations of the batch's rewards.

        > Parameters that stabilise the game, all off by default

        discriminator_replay_size (`int`, *optional*, defaults to `0`):
            Past pairs each process keeps to show the discriminator again. Metrics stay those of fresh pairs.
        discriminator_replay_ratio (`float`, *optional*, defaults to `0.5`):
            Share of past pairs in the discriminator's batch.
        policy_min_accuracy (`float`, *optional*):
            Hold the student still while the discriminator's accuracy on fresh pairs is under this bound
            (adversarial stage).
        discriminator_max_accuracy (`float`, *optional*):
            Hold the discriminator still while its accuracy on fresh pairs is over this bound (adversarial stage).
        discriminator_patience (`int`, *optional*):
            Stop the discriminator, for good, after so many evaluations without a higher accuracy on held-out rows: from
            then on it learns the training answers by heart. It needs `eval_strategy` and one evaluation data set.
        group_std_floor (`float`, *optional*, defaults to `0.0`):
            Least standard deviation that advantages of `"group"` are divided by, in units of the reward.
        length_control (`bool`, *optional*, defaults to `False`):
            Remove from the discriminator's score what length explains within the groups.

        > Parameters that control the Hub

        push_discriminator (`bool`, *optional*, defaults to `False`):
            Whether the pushes of `push_to_hub` send the discriminator as well, as the folder `discriminator/`.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["discriminator_lora_kwargs", "critic_lora_kwargs"]

    # Changed defaults
    beta: float = field(
        default=0.001,
        metadata={"help": "KL coefficient towards the warmed-up student. If `0.0`, no reference model is kept."},
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "The scheduler type of the student's learning rate."}
    )
    max_completion_length: int = field(
        default=1536, metadata={"help": "Longest answer in tokens, for the student's samples and the teacher's text."}
    )
    max_grad_norm: float = field(default=0.2, metadata={"help": "Gradient norm the student's gradient is clipped to."})
    temperature: float = field(
        default=0.8, metadata={"help": "Sampling temperature. The student's log-probabilities are scaled by it too."}
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Whether to multiply the KL estimate by the importance ratio. GAD uses the plain k3 one."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the student's optimizer."})

    # Data
    max_prompt_length: int | None = field(
        default=2048, metadata={"help": "Longest prompt in tokens. Rows with a longer one are dropped and counted."}
    )
    answers_per_prompt: int | None = field(
        default=None,
        metadata={"help": "Most training rows that share a prompt: the first ones. If `None`, every row."},
    )
    reasoning: ReasoningPolicy = field(default="keep", metadata={"help": REASONING_HELP})

    # Stages
    warmup_epochs: float = field(
        default=1.0,
        metadata={
            "help": "Epochs of warm-up out of `num_train_epochs`: SFT for the student, Bradley-Terry on fresh samples "
            "for the discriminator. With `max_steps`, warm-up keeps its share of the steps."
        },
    )
    warmup_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the student during warm-up. If `None`, `learning_rate`."},
    )
    discriminator_only_steps: int = field(
        default=10,
        metadata={"help": "Optimizer steps at the start of warm-up in which only the discriminator learns."},
    )
    sft_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the cross-entropy on the teacher's answers in the adversarial stage."},
    )

    # Discriminator
    discriminator: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint the discriminator starts from. If `None`, the student's checkpoint. `shared`: a second "
            "LoRA adapter on the frozen base model of a LoRA student."
        },
    )
    discriminator_rows: Literal["all", "unseen"] = field(
        default="all",
        metadata={
            "help": "`all`: both stages learn from all rows. `unseen`: warm-up and adversarial stage have different prompts."
        },
    )
    discriminator_head: Literal["scalar", "likelihood"] = field(
        default="scalar",
        metadata={
            "help": "`scalar`: linear head at the last response token (the paper). `likelihood`: learned scale times "
            "the discriminator's log-likelihood of the response, plus the linear head."
        },
    )
    discriminator_likelihood_reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "Reduction of the `likelihood` head over the response tokens."}
    )
    discriminator_loss: Literal["bradley_terry", "cross_entropy"] = field(
        default="bradley_terry", metadata={"help": "Loss of the discriminator: Eq. 3 or, per sample, Eq. 4."}
    )
    discriminator_lora_kwargs: KeywordArguments | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `peft.LoraConfig`: train the discriminator as a LoRA adapter."},
    )
    discriminator_load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Whether to load the frozen model under a LoRA discriminator in 4 bits (NF4)."},
    )
    discriminator_learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate of the discriminator, constant."}
    )
    discriminator_warmup_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the discriminator during warm-up. If `None`, `discriminator_learning_rate`."
        },
    )
    discriminator_weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of the discriminator's optimizer."}
    )
    discriminator_max_grad_norm: float = field(
        default=0.2, metadata={"help": "Gradient norm the discriminator's gradient is clipped to."}
    )
    discriminator_updates_per_batch: int = field(
        default=1, metadata={"help": "Discriminator steps per generation batch. `0` freezes the discriminator."}
    )
    discriminator_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per device in one forward pass of the discriminator. If `None`, "
            "`per_device_train_batch_size`."
        },
    )
    discriminator_sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the language-model loss on teacher answers in the discriminator's warm-up "
            "(`likelihood` head only)."
        },
    )

    # Advantages
    advantage_estimator: Literal["group", "gae"] = field(
        default="group",
        metadata={
            "help": "`group`: against the prompt's other samples (GRPO, the paper). `gae`: with a critic (PPO)."
        },
    )
    discriminator_credit: Literal["sequence", "token"] = field(
        default="sequence",
        metadata={
            "help": "`sequence`: the score rewards the whole answer. `token`: each token is rewarded with what it adds "
            "to the score (`likelihood` head only)."
        },
    )
    discriminator_entropy: float = field(
        default=0.0,
        metadata={
            "help": "Share of the student's own log-likelihood that is taken off the reward (`likelihood` head only)."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of generalized advantage estimation."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    critic: Literal["copy", "trunk"] | None = field(
        default=None,
        metadata={
            "help": "Value model of `gae`. `copy`: the student's checkpoint with a value head, trained. `trunk`: a value "
            "head on the student's own trunk, which it only reads."
        },
    )
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the critic, constant."})
    critic_lora_kwargs: KeywordArguments | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `peft.LoraConfig`: train the `copy` as a LoRA adapter."},
    )
    critic_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradient norm the critic's gradient is clipped to."}
    )
    cliprange_value: float = field(
        default=0.5, metadata={"help": "How far the value loss lets a value move from the old one."}
    )

    # Stabilisers
    discriminator_replay_size: int = field(
        default=0, metadata={"help": "Past pairs each process keeps to show the discriminator again. `0`: no replay."}
    )
    discriminator_replay_ratio: float = field(
        default=0.5, metadata={"help": "Share of past pairs in the discriminator's batch."}
    )
    policy_min_accuracy: float | None = field(
        default=None,
        metadata={"help": "Hold the student still while the discriminator's accuracy on fresh pairs is lower."},
    )
    discriminator_max_accuracy: float | None = field(
        default=None,
        metadata={"help": "Hold the discriminator still while its accuracy on fresh pairs is higher."},
    )
    discriminator_patience: int | None = field(
        default=None,
        metadata={"help": "Stop the discriminator after so many evaluations without better held-out accuracy."},
    )
    group_std_floor: float = field(
        default=0.0, metadata={"help": "Least standard deviation that group advantages are divided by."}
    )
    length_control: bool = field(
        default=False,
        metadata={"help": "Remove from the discriminator's score what length explains within the groups."},
    )

    # Hub
    push_discriminator: bool = field(
        default=False,
        metadata={"help": "Whether the pushes of `push_to_hub` send the discriminator as well."},
    )

    def __post_init__(self):
        check_bounds(self)
        refuse_without_effect(self)
        check_reasoning(self.reasoning)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            raise ValueError(
                "load_best_model_at_end needs metric_for_best_model, because the default, the policy's loss, says nothing: "
                "name a metric of your sample_metrics, or 'teacher_nll' (which tends to be best when warm-up ends)."
            )
        # The Trainer takes larger to be better for every metric whose name does not end in `loss`
        if str(self.metric_for_best_model).endswith("teacher_nll") and self.greater_is_better is None:
            self.greater_is_better = False
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, got {self.num_generations}: a sample is judged against the others "
                "of its prompt."
            )
        super().__post_init__()
        if self.fp16:
            raise ValueError("GAD does not support fp16: the discriminator's loss is not scaled. Use `bf16=True`.")
        check_choices(self)
        self._check_stages()
        self._check_advantages()
        self._check_stabilizers()

    def _check_stages(self):
        if not 0 <= self.warmup_epochs <= self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs counts towards num_train_epochs ({self.num_train_epochs}) and must lie between 0 and "
                f"it, got {self.warmup_epochs}."
            )
        if self.warmup_epochs == 0 and self.discriminator_sft_weight > 0:
            raise ValueError(
                f"discriminator_sft_weight={self.discriminator_sft_weight} acts during warm-up, but warmup_epochs is "
                "0. Set one of the two."
            )
        if self.discriminator_rows == "unseen" and not 0 < self.warmup_epochs < self.num_train_epochs:
            raise ValueError(
                "discriminator_rows='unseen' divides the rows between the two stages, but with "
                f"warmup_epochs={self.warmup_epochs} of num_train_epochs={self.num_train_epochs} there is only one. Set "
                "warmup_epochs between the two, or leave discriminator_rows out."
            )
        if self.discriminator_sft_weight > 0 and self.discriminator_head != "likelihood":
            raise ValueError(
                f"discriminator_sft_weight={self.discriminator_sft_weight} needs discriminator_head='likelihood': "
                f"the {self.discriminator_head!r} head keeps no language model."
            )
        if self.warmup_learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"warmup_learning_rate needs a positive learning_rate, got {self.learning_rate}.")
        if self.warmup_learning_rate is not None and self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                "warmup_learning_rate multiplies a schedule that is fixed beforehand, but lr_scheduler_type="
                f"{self.lr_scheduler_type.value!r} follows the evaluation. Set one of the two."
            )

    def _check_advantages(self):
        if self.advantage_estimator == "gae" and self.critic is None:
            raise ValueError(
                "advantage_estimator='gae' needs a critic: set critic='copy' (a value model of its own) or "
                "critic='trunk' (a value head on the student)."
            )
        if self.critic is not None and self.advantage_estimator != "gae":
            raise ValueError(f"critic={self.critic!r} is only used by advantage_estimator='gae'. Set both or neither.")
        if self.critic_lora_kwargs is not None and self.critic != "copy":
            raise ValueError(f"critic_lora_kwargs needs critic='copy', got critic={self.critic!r}.")
        if self.discriminator_credit == "token" and self.discriminator_head != "likelihood":
            raise ValueError(
                "discriminator_credit='token' needs discriminator_head='likelihood': the "
                f"{self.discriminator_head!r} head gives no score to single tokens."
            )
        if self.sync_ref_model:
            raise ValueError(
                "GAD's KL reference is the warmed-up student; sync_ref_model=True would replace it. Set it to False."
            )
        if self.discriminator_credit == "token" and self.mask_truncated_completions:
            raise ValueError(
                "discriminator_credit='token' compares tokens of a group, from which mask_truncated_completions=True takes "
                "the answers that were cut. Set one of the two."
            )
        per_token = self.advantage_estimator == "gae" or self.discriminator_credit == "token"
        if per_token and (self.off_policy_mask_threshold is not None or self.loss_type == "vespo"):
            raise ValueError(
                "off_policy_mask_threshold and loss_type='vespo' judge whole answers, but advantage_estimator='gae' and "
                "discriminator_credit='token' give each token its advantage. Set one of the two."
            )
        if per_token and self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} has one ratio for an answer, but "
                "advantage_estimator='gae' and discriminator_credit='token' give each token its advantage. Set "
                "importance_sampling_level='token'."
            )
        if (per_token or self.group_std_floor > 0) and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "multi_objective_aggregation='normalize_then_sum' divides each reward by its own standard deviation, "
                "but advantage_estimator='gae', discriminator_credit='token' and group_std_floor act on their sum. Set "
                "multi_objective_aggregation='sum_then_normalize'."
            )
        if self.group_std_floor > 0 and (self.advantage_estimator == "gae" or self.scale_rewards == "none"):
            raise ValueError(
                f"group_std_floor={self.group_std_floor} bounds the standard deviation that group advantages are divided "
                "by; with advantage_estimator='gae' or scale_rewards='none' there is no such division. Set it to 0."
            )

        if self.advantage_estimator == "gae" and self.scale_rewards == "none":
            raise ValueError(
                "scale_rewards='none' has no effect with advantage_estimator='gae', whose critic learns rewards in standard "
                "deviations of the batch. Leave it out."
            )

    def _check_stabilizers(self):
        for name in ("policy_min_accuracy", "discriminator_max_accuracy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is an accuracy and must lie between 0 and 1, got {value}.")
        low, high = self.policy_min_accuracy, self.discriminator_max_accuracy
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"policy_min_accuracy={low} must not be over discriminator_max_accuracy={high}: between the two, neither "
                "the student nor the discriminator would move, for good."
            )
        if self.discriminator_updates_per_batch == 0 and (
            self.policy_min_accuracy is not None or self.discriminator_max_accuracy is not None
        ):
            raise ValueError(
                "policy_min_accuracy and discriminator_max_accuracy wait for a discriminator that learns, but "
                "discriminator_updates_per_batch is 0. Set one of the two."
            )
        if self.discriminator_patience is not None and self.eval_strategy == "no":
            raise ValueError(
                f"discriminator_patience={self.discriminator_patience} counts evaluations, of which there are none. Set "
                "eval_strategy."
            )
        if self.discriminator_replay_size == 0:
            return
        if not 0 < self.discriminator_replay_ratio < 1:
            raise ValueError(
                f"discriminator_replay_ratio is a share and must lie between 0 and 1, got {self.discriminator_replay_ratio}."
            )
        if self.discriminator_updates_per_batch == 0:
            raise ValueError(
                "discriminator_replay_size needs a discriminator that learns, but discriminator_updates_per_batch is 0."
            )
        fresh = self.per_device_train_batch_size * self.steps_per_generation
        past = round(fresh * self.discriminator_replay_ratio / (1 - self.discriminator_replay_ratio))
        if self.discriminator_replay_size < past:
            raise ValueError(
                f"discriminator_replay_size={self.discriminator_replay_size} has no room: each batch of {fresh} fresh "
                f"pairs per process draws {past} past ones. Set it to several times {past}, or lower "
                "discriminator_replay_ratio."
            )
