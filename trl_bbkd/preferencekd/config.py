from dataclasses import dataclass, field
from typing import Literal

from ..data.config import KeywordArguments
from ..preference.config import REFUSED, PreferenceRoundsConfig


TEACHER, OVERLAP, SELF, DISCRIMINATOR = "teacher", "overlap", "self", "discriminator"
LAST = "the student of the last round is kept. Leave it out."
AT_THE_END = "the student goes to the Hub when all rounds are done. Leave it out."


@dataclass
class PreferenceKDConfig(PreferenceRoundsConfig):
    r"""
    Configuration class for [`PreferenceKDTrainer`].

    This class includes only the parameters that are specific to it. For the rest, see
    [`~preference.config.PreferenceRoundsConfig`] (rounds, loss and samples) and [`~data.config.TeacherTextConfig`] (the
    teacher's rows).

    > [!NOTE]
    > Defaults that differ from [`~trl.DPOConfig`] and [`~preference.config.PreferenceRoundsConfig`]:
    > - `learning_rate`: `5e-7` instead of `1e-6`
    > - `lr_scheduler_type`: `"cosine"` instead of `"linear"`
    > - `warmup_steps`: `0.1`, a share of the steps, instead of `0`
    > - `num_rounds`: `1` instead of `16`
    > - `sample_temperature`: `0.8` instead of `1.0`
    > - `sample_top_p`: `0.95` instead of `1.0`

    Parameters:
        > Parameters that control the warm-up, which is SFT on the teacher's answers before the first round

        warmup_epochs (`float`, *optional*, defaults to `1.0`):
            Epochs over all rows. `0.0` takes the student as it is: it has learned from the teacher's answers before.
        warmup_learning_rate (`float`, *optional*, defaults to `2e-5`):
            Learning rate. The schedule is that of a round.

        > Parameters that control the pairs

        num_generations (`int`, *optional*, defaults to `5`):
            The student's samples for each prompt.
        judge (`str`, *optional*, defaults to `"overlap"`):
            What tells better samples from worse ones. `"overlap"`: how much of the teacher's answer a sample has.
            `"self"`: the student, as it is when the round begins, compares two samples and is shown the teacher's answer.
            A path or Hub id: that model does. `"discriminator"`: a model that learns, each round, to tell the teacher's answers
            from the round's samples. `"teacher"`: nothing, the teacher's answer is preferred over each sample. In a
            recipe also a function, as `path/to/file.py:function`; in Python, `judge=` of the trainer.
        overlap_metric (`str`, *optional*, defaults to `"rouge_l"`):
            `"rouge_l"`, `"bleu"` or `"chrf"`. The last two need the extra `overlap`.
        judge_question (`str`, *optional*, defaults to `"quality"`):
            What a model that judges is asked: which of two answers is better (`"quality"`), or which says what the teacher's
            says (`"match"`).
        judge_batch_size (`int`, *optional*, defaults to `32`):
            Prompts judged at once, and kept on disk together.

        > Parameters that control the discriminator of `judge="discriminator"`

        discriminator (`str`, *optional*):
            Checkpoint that it starts from, with the student's tokenizer: a path, a Hub id or a discriminator on disk. `None`
            takes the student's.
        discriminator_head (`str`, *optional*, defaults to `"scalar"`):
            `"scalar"` or `"likelihood"`, as in [`~gad.config.GADConfig`].
        discriminator_likelihood_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` of the token log-probabilities of the likelihood head.
        discriminator_epochs (`int`, *optional*, defaults to `1`):
            Epochs over a round's samples, in batches of `per_device_train_batch_size` prompts.
        discriminator_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of its AdamW optimizer, constant.
        discriminator_weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay.
        discriminator_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradient norm that its gradient is clipped to.
        discriminator_batch_size (`int`, *optional*):
            Sequences per device in one forward pass. Changes memory, not results. `None` takes
            `per_device_train_batch_size`.
        discriminator_sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the NLL of the teacher's answers in its loss. It needs the likelihood head.
        discriminator_lora_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~peft.LoraConfig`]. When set, it is trained as a LoRA adapter.

        > Parameters that control which pairs are made

        pairing (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`: a prompt's best sample is preferred over its worst. `"margin"`: every sample over every other
            that scores less by more than `pair_margin`.
        pair_margin (`float`, *optional*, defaults to `0.0`):
            Pairs have scores that are further apart.
        pair_max_length_ratio (`float`, *optional*):
            Pairs have lengths, in tokens, of which the longer is at most so many times the shorter. `None` leaves lengths
            open.
        samples_from (`str`, *optional*, defaults to `"round"`):
            `"round"`: samples are those of the student as the round begins. `"base"`: of the student as it is before the
            warm-up. It needs `judge="teacher"`.
    """

    _VALID_DICT_FIELDS = PreferenceRoundsConfig._VALID_DICT_FIELDS + ["discriminator_lora_kwargs"]
    _refused = REFUSED | {
        **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), LAST),
        **dict.fromkeys(("hub_strategy", "hub_always_push"), AT_THE_END),
    }

    # Changed defaults
    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate of a round."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "The scheduler type, within the warm-up and within a round."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up of the learning rate; under 1, a share of a round's."}
    )
    num_rounds: int = field(
        default=1, metadata={"help": "Rounds, each on its own shard and against the student as the round begins."}
    )
    sample_temperature: float = field(default=0.8, metadata={"help": "Temperature of the student's samples."})
    sample_top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling of the student's samples."})

    # Warm-up
    warmup_epochs: float = field(
        default=1.0, metadata={"help": "Epochs of SFT on the teacher's answers before the first round."}
    )
    warmup_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of that SFT."})

    # Pairs
    num_generations: int = field(default=5, metadata={"help": "The student's samples for each prompt."})
    judge: str = field(
        default=OVERLAP,
        metadata={
            "help": "What tells better samples from worse ones: `overlap`, `self`, a path or Hub id of a model, "
            "`discriminator`, `path/to/file.py:function`, or `teacher`, whose answer is preferred over each sample."
        },
    )
    overlap_metric: Literal["rouge_l", "bleu", "chrf"] = field(
        default="rouge_l", metadata={"help": "How overlap with the teacher's answer is measured."}
    )
    judge_question: Literal["quality", "match"] = field(
        default="quality",
        metadata={
            "help": "What a model that judges is asked: which answer is better, or which says what the teacher's says."
        },
    )
    judge_batch_size: int = field(default=32, metadata={"help": "Prompts judged at once, and kept on disk together."})
    pairing: Literal["best_worst", "margin"] = field(
        default="best_worst",
        metadata={"help": "Best sample over worst, or every one over every other that scores less by `pair_margin`."},
    )
    pair_margin: float = field(default=0.0, metadata={"help": "Scores of a pair are further apart."})
    pair_max_length_ratio: float | None = field(
        default=None, metadata={"help": "How many times longer the longer answer of a pair may be. If `None`, any."}
    )
    samples_from: Literal["round", "base"] = field(
        default="round",
        metadata={"help": "Whether the student samples as the round begins, or as it is before the warm-up."},
    )

    # Discriminator
    discriminator: str | None = field(
        default=None, metadata={"help": "Checkpoint the discriminator starts from. If `None`, the student's."}
    )
    discriminator_head: Literal["scalar", "likelihood"] = field(
        default="scalar", metadata={"help": "What the discriminator's score is made of, as in GAD."}
    )
    discriminator_likelihood_reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "Sum or mean of the token log-probabilities of the likelihood head."}
    )
    discriminator_epochs: int = field(
        default=1, metadata={"help": "Epochs of the discriminator over a round's samples."}
    )
    discriminator_learning_rate: float = field(
        default=1e-5, metadata={"help": "Learning rate of the discriminator, constant."}
    )
    discriminator_weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of the discriminator's optimizer."}
    )
    discriminator_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradient norm the discriminator's gradient is clipped to."}
    )
    discriminator_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per device in one forward pass of the discriminator. If `None`, "
            "`per_device_train_batch_size`."
        },
    )
    discriminator_sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the NLL of the teacher's answers in the discriminator's loss."}
    )
    discriminator_lora_kwargs: KeywordArguments | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `peft.LoraConfig`: train the discriminator as a LoRA adapter."},
    )

    def own_losses(self) -> dict[str, float]:
        # TRL's NLL is that of the preferred answer, which is the teacher's with this judge alone
        if self.judge == TEACHER:
            return super().own_losses()
        return {"sigmoid": self.preference_weight}

    def __post_init__(self):
        super().__post_init__()
        if self.preference_weight == 0:
            raise ValueError("preference_weight=0.0 leaves SFT alone. Raise it, or take TRL's SFTTrainer.")
        if self.save_strategy == "best":
            raise ValueError(f"save_strategy='best' is not possible here: {LAST}")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}.")
        for name in ("num_generations", "judge_batch_size", "discriminator_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.judge != TEACHER and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} leaves judge={self.judge!r} no two samples to choose between. Set at "
                "least 2, or judge='teacher'."
            )
        if self.samples_from == "base" and self.judge != TEACHER:
            raise ValueError(
                "samples_from='base' needs judge='teacher': a judge tells between the student's own samples. Set it to 'round'."
            )
        if self.discriminator_sft_weight > 0 and self.discriminator_head != "likelihood":
            raise ValueError(
                "discriminator_sft_weight > 0 trains the discriminator as a language model: set discriminator_head='likelihood'."
            )
        if self.pair_margin < 0:
            raise ValueError(f"pair_margin must be at least 0, got {self.pair_margin}.")
        if self.pair_max_length_ratio is not None and self.pair_max_length_ratio < 1:
            raise ValueError(f"pair_max_length_ratio must be at least 1, got {self.pair_max_length_ratio}.")
