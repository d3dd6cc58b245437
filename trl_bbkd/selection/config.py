from dataclasses import dataclass, field
from typing import Literal

from ..errors import LLKDDataError
from ..host.preflight import refuse_too_few_rows
from .thresholds import SelectionSettings


# What decides which rows a step learns from, and how
SELECTION_ARGUMENTS = (
    "selection",
    "pool_factor",
    "selection_rule",
    "selection_momentum",
    "selection_use_teacher",
    "selection_use_student",
    "selection_weighting",
    "selection_warmup_steps",
    "selection_budget",
    "selection_denominator",
)


@dataclass
class SelectionConfig:
    r"""
    Parameters of LLKD's selection ([arXiv 2411.08028](https://huggingface.co/papers/2411.08028)): which rows a step
    learns from. It stands among the bases of a trainer's configuration.

    Parameters:
        selection (`str`, *optional*, defaults to `"none"`):
            `"llkd"`: a step draws a pool of rows, scores it without gradients, and learns from the rows of which the
            teacher is sure and the student is not. Rows need a column `teacher_confidence`, from 0 to 1, and may have
            `group`, an integer. `"none"`: every row is learned from.
        pool_factor (`int`, *optional*, defaults to `4`):
            Rows of a pool for each row of `per_device_train_batch_size`.
        selection_rule (`str`, *optional*, defaults to `"maxnorm"`):
            Threshold of a group: the overall moving average scaled by the group's (`"maxnorm"`, FreeMatch's form), its own
            (`"class_mean"`), the overall one (`"global"`), or the score above which
            `selection_budget` of the rows are (`"quantile"`). `"random"` keeps that share of the rows whatever they
            are: the control to compare the others with.
        selection_momentum (`float`, *optional*, defaults to `0.99`):
            λ of the moving averages, which are corrected for their start.
        selection_use_teacher (`bool`, *optional*, defaults to `True`):
            Whether the teacher's confidence decides.
        selection_use_student (`bool`, *optional*, defaults to `True`):
            Whether the student's uncertainty decides.
        selection_weighting (`str`, *optional*, defaults to `"product"`):
            Weight of a kept row in the loss, from confidence c and uncertainty u and 1 on average: `"product"`,
            `"sum"`, `"teacher"`, `"student"` or `"none"`.
        selection_warmup_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps at the beginning in which every row is kept: an untrained student's uncertainty says
            nothing.
        selection_budget (`float`, *optional*):
            Share of rows that the rules `"quantile"` and `"random"` keep.
        selection_denominator (`str`, *optional*, defaults to `"selected"`):
            What the loss is divided by: the kept rows (`"selected"`), or the pool (`"pool"`, FreeMatch's), where steps
            become small with the share that is kept.
    """

    selection: Literal["none", "llkd"] = field(
        default="none",
        metadata={
            "help": "`llkd`: learn from the rows of a pool of which the teacher is sure and the student is not."
        },
    )
    pool_factor: int = field(
        default=4, metadata={"help": "Rows of a pool for each row of `per_device_train_batch_size`."}
    )
    selection_rule: Literal["class_mean", "maxnorm", "global", "quantile", "random"] = field(
        default="maxnorm", metadata={"help": "What a group's thresholds are made of."}
    )
    selection_momentum: float = field(default=0.99, metadata={"help": "Momentum of the moving averages."})
    selection_use_teacher: bool = field(default=True, metadata={"help": "Whether the teacher's confidence decides."})
    selection_use_student: bool = field(default=True, metadata={"help": "Whether the student's uncertainty decides."})
    selection_weighting: Literal["product", "sum", "teacher", "student", "none"] = field(
        default="product", metadata={"help": "Weight of a kept row, from confidence and uncertainty."}
    )
    selection_warmup_steps: int = field(
        default=50, metadata={"help": "Optimizer steps at the beginning in which every row is kept."}
    )
    selection_budget: float | None = field(
        default=None, metadata={"help": "Share of rows that the rules `quantile` and `random` keep."}
    )
    selection_denominator: Literal["selected", "pool"] = field(
        default="selected", metadata={"help": "What the loss is divided by: kept rows, or the pool."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("selection", ("none", "llkd")), ("selection_denominator", ("selected", "pool"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.pool_factor < 1 or self.pool_factor % 1:
            raise ValueError(f"pool_factor must be a whole number of at least 1, got {self.pool_factor}.")
        if self.selection == "llkd" and self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True is not possible with selection='llkd': a pool is a multiple of the batch. Set it to False."
            )
        self.selection_settings(num_groups=1)

    def selection_settings(self, num_groups: int) -> SelectionSettings:
        """
        Raises:
            ValueError: a parameter of the selection is out of its range.
        """
        try:
            return SelectionSettings(
                num_groups=num_groups,
                rule=self.selection_rule,
                momentum=self.selection_momentum,
                use_teacher=self.selection_use_teacher,
                use_student=self.selection_use_student,
                weighting=self.selection_weighting,
                warmup_steps=self.selection_warmup_steps,
                budget=self.selection_budget,
                seed=self.seed,
            )
        except ValueError as error:
            # It starts with the setting's name
            raise ValueError(f"selection_{error}") from None


def check_batches(rows: int, args) -> None:
    """
    Refuse fewer rows than a training step draws, before a model is loaded.

    Args:
        rows (`int`):
            Rows to train on.
        args ([`SelectionConfig`]):
            Configuration of a trainer.

    Raises:
        [`~errors.LLKDDataError`]: a pool is larger than the data set.
        ValueError: `dataloader_drop_last` drops all rows.
    """
    batch = args.per_device_train_batch_size * args.world_size
    if args.selection == "llkd" and batch * args.pool_factor > rows:
        raise LLKDDataError(
            f"A pool of {batch * args.pool_factor} rows (per_device_train_batch_size times pool_factor, of all processes) is larger "
            f"than the data set of {rows}. Lower pool_factor."
        )
    if args.dataloader_drop_last:
        refuse_too_few_rows(
            rows, batch, "rows", "lower per_device_train_batch_size, or set dataloader_drop_last to False"
        )
