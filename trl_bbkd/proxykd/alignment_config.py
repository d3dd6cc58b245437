from dataclasses import dataclass, field

from ..preference.config import REFUSED, PreferenceRoundsConfig, check_sampling


PUSH = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")
BEST = "set alignment_patience to keep the best proxy."
PUSHED = "an aligned proxy is a step on the way: upload the folder `output_dir` yourself. Leave it out."


@dataclass
class ProxyAlignmentConfig(PreferenceRoundsConfig):
    r"""
    Configuration class for [`ProxyAlignmentTrainer`], the alignment of Proxy-KD
    ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013), equations 3 to 6): `preference_weight` weighs
    equation 5, `sft_weight` equation 3, and the model of the rounds is the proxy.

    This class includes only the parameters that are specific to it. For the rest, see
    [`~preference.config.PreferenceRoundsConfig`] (rounds, loss and samples, and the defaults that differ from
    [`~trl.DPOConfig`]) and [`~data.config.TeacherTextConfig`] (the teacher's rows).

    Parameters:
        alignment_patience (`int`, *optional*):
            Stop after so many rounds without a higher share of held-out positions at which the proxy's likeliest token
            is the teacher's, and go back to the best proxy. `None` never stops, and keeps the last proxy.
    """

    _refused = REFUSED | {
        **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), BEST),
        **dict.fromkeys(PUSH, PUSHED),
    }

    alignment_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many rounds without better agreement on held-out rows. If `None`, never."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_rounds(self)
        if self.save_strategy == "best":
            raise ValueError(f"save_strategy='best' is not possible here: {BEST}")


def check_rounds(args) -> None:
    """
    Check what [`ProxyAlignmentConfig`] and [`ProxyKDConfig`] say of the rounds and the proxy's samples.

    Raises:
        ValueError: a value is out of its range.
    """
    if args.alignment_patience is not None and args.alignment_patience < 1:
        raise ValueError(f"alignment_patience must be at least 1, got {args.alignment_patience}.")
    check_sampling(args)
