"""What `trl-bbkd evaluate` is told. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Any

from ..collect.settings import CollectConfig
from .verdicts import METRICS


METRIC_NAMES = tuple(METRICS)
# Of a collection's keys, those that say something of a judge too
JUDGE_KEYS = (
    "base_url",
    "api_key_env",
    "api_key_header",
    "temperature",
    "top_p",
    "max_tokens",
    "max_tokens_name",
    "seed",
    "extra_body",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "request_timeout",
    "max_retries",
    "max_requests",
    "max_total_tokens",
    "max_cost",
    "prompt_price",
    "completion_price",
    "cached_prompt_price",
    "currency",
    "retry_failed",
    "journal",
)


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class JudgeConfig(CollectConfig):
    """
    A judge's endpoint: [`~collect.settings.CollectConfig`], of which `JUDGE_KEYS` are options here.

    Parameters:
        temperature (`float`, *optional*, defaults to `0.0`):
            Of the judge's answers; `null` for the endpoint's own.
    """

    temperature: float | None = field(
        default=0.0, metadata=_help("Of the judge's answers; null for the endpoint's own. Default: 0.")
    )


@dataclass
class EvaluateConfig:
    """
    Parameters of an evaluation beside its judge's.

    Parameters:
        model (`str`):
            The student: a folder or a Hub id of a model or an adapter, or a file of its answers.
        data (`str`):
            The teacher's rows: a file, a folder or a Hub id.
        judge ([`JudgeConfig`]):
            The judge.
        metrics (`tuple[str, ...]`, *optional*):
            Of `win_rate`, `lc_win_rate` and `score`; all by default.
        test_split_size (`float`, *optional*):
            Rows, or share of them, that were held out of the training; judge these alone.
        max_prompts (`int`, *optional*):
            Judge the first so many prompts alone.
        teacher_name (`str`, *optional*):
            The teacher's name; by default what the rows' column `teacher` says.
        student_max_tokens (`int`, *optional*, defaults to `512`):
            Longest answer of the student.
        student_temperature (`float`, *optional*, defaults to `0.0`):
            Of the student's answers; 0 is greedy.
        student_samples (`int`, *optional*, defaults to `1`):
            Answers of the student to each prompt.
        student_batch_size (`int`, *optional*, defaults to `16`):
            Answers that the student writes at once.
    """

    model: str
    data: str
    judge: JudgeConfig
    metrics: tuple[str, ...] = METRIC_NAMES
    test_split_size: float | None = field(
        default=None,
        metadata=_help("Rows, or share of them, that the recipe with this key held out; judge these alone."),
    )
    max_prompts: int | None = field(default=None, metadata=_help("Judge the first so many prompts alone."))
    teacher_name: str | None = field(
        default=None, metadata=_help("The teacher's name; what the rows' column `teacher` says.")
    )
    student_max_tokens: int = field(default=512, metadata=_help("Longest answer of the student."))
    student_temperature: float = field(default=0.0, metadata=_help("Of the student's answers; 0 is greedy."))
    student_samples: int = field(default=1, metadata=_help("Answers of the student to each prompt."))
    student_batch_size: int = field(default=16, metadata=_help("Answers that the student writes at once."))

    def __post_init__(self):
        for name in self.metrics:
            if name not in METRIC_NAMES:
                raise ValueError(f"metric: {name!r} is none of {', '.join(METRIC_NAMES)}.")
        for name in ("max_prompts", "student_max_tokens", "student_samples", "student_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}.")
        for name in ("test_split_size", "student_temperature"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {value:g}.")
        if self.student_samples > 1 and self.student_temperature == 0:
            raise ValueError(
                "student_samples: greedy answers are all the same. Add --student_temperature, such as 1.0."
            )


OWN_KEYS = tuple(entry.name for entry in fields(EvaluateConfig) if entry.metadata)


@dataclass
class EvalJudgeConfig(JudgeConfig):
    """
    A judge of a student in training, beside its endpoint's [`JudgeConfig`].

    Parameters:
        base_url (`str`):
            Address of the judge's endpoint, such as `https://api.openai.com/v1`.
        model (`str`):
            The judge, by the endpoint's name for it.
        metrics (`list[str]`, *optional*):
            Of `win_rate`, `lc_win_rate` and `score`; the first two by default, which share their verdicts.
        max_prompts (`int`, *optional*, defaults to `64`):
            Held-out prompts that are judged at each evaluation, the first ones.
        student_max_tokens (`int`, *optional*):
            Longest answer of the student. `None` takes the trainer's `max_completion_length`, or else 512.
        student_temperature (`float`, *optional*, defaults to `0.0`):
            Of the student's answers; 0 is greedy.
        teacher_name (`str`, *optional*):
            The teacher's name; by default what the rows' column `teacher` says. A judge of that name is warned of.
    """

    # A run has these itself
    output_dir: str = field(init=False, default="output_dir of the run")
    dataset_name: str = field(init=False, default="rows of the run")
    model: str = field(metadata=_help("The judge, by the endpoint's name for it."))
    metrics: list[str] = field(
        default_factory=lambda: ["win_rate", "lc_win_rate"],
        metadata=_help("Of win_rate, lc_win_rate and score; the first two share their verdicts."),
    )
    max_prompts: int | None = field(
        default=64, metadata=_help("Held-out prompts that are judged at each evaluation, the first ones.")
    )
    student_max_tokens: int | None = field(
        default=None, metadata=_help("Longest answer of the student; max_completion_length, or else 512.")
    )
    student_temperature: float = field(default=0.0, metadata=_help("Of the student's answers; 0 is greedy."))

    def __post_init__(self):
        super().__post_init__()
        if not self.metrics:
            raise ValueError(f"metrics: name one of {', '.join(METRIC_NAMES)}.")
        for name in self.metrics:
            if name not in METRIC_NAMES:
                raise ValueError(f"metrics: {name!r} is none of {', '.join(METRIC_NAMES)}.")
        if self.student_max_tokens is not None and self.student_max_tokens < 1:
            raise ValueError(f"student_max_tokens: expected 1 or more, got {self.student_max_tokens}.")
        if not self.student_temperature >= 0:
            raise ValueError(f"student_temperature: expected 0 or more, got {self.student_temperature:g}.")


# What a recipe's `eval_judge` may say
EVAL_JUDGE_KEYS = (
    "model",
    "metrics",
    "max_prompts",
    "student_max_tokens",
    "student_temperature",
    *JUDGE_KEYS,
)
