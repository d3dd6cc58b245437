from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from ..data.config import KeywordArguments
from ..host.refused_fields import refuse_fields
from ..selection.config import SelectionConfig


@dataclass
class LLKDConfig(SelectionConfig, TrainingArguments):
    r"""
    Configuration class for [`LLKDTrainer`], LLKD ([arXiv 2411.08028](https://huggingface.co/papers/2411.08028), our
    reading).

    This class includes only the parameters that are specific to a student with a classification head. For the rest,
    see [`~selection.config.SelectionConfig`] (which rows a step learns from) and [`~transformers.TrainingArguments`].

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: `2e-5` instead of `5e-5`
    > - `logging_steps`: `10` instead of `500`
    > - `per_device_train_batch_size`: `32` instead of `8`
    > - `warmup_steps`: `0.1`, a share of all steps, instead of `0`
    >
    > and from [`~selection.config.SelectionConfig`]:
    > - `selection`: `"llkd"` instead of `"none"`
    >
    > The paper's own values are not known: these are usual ones of an encoder.

    Parameters:
        labels (`list[str]`, *optional*):
            Names of the classes, in the order of the numbers in the column `label`. By default those of its
            [`~datasets.ClassLabel`].
        allow_missing_classes (`bool`, *optional*, defaults to `False`):
            Whether a class may have no row: the student then never learns it. Otherwise that is an error.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the text.
        max_length (`int`, *optional*, defaults to `256`):
            Longest text in tokens; longer ones are cut. `None` cuts nothing. Rows that are `input_ids` already stay as
            they are.
        pad_to_multiple_of (`int`, *optional*):
            Of which a batch's width is a multiple.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Passed to [`~transformers.AutoModelForSequenceClassification.from_pretrained`] where the student is a path.
            It is loaded in float32 unless `dtype` says otherwise.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Changed defaults
    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two logs: a whole number, or, below 1, a share of all training steps."
        },
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Rows of a batch; a pool is `pool_factor` times as many."}
    )
    warmup_steps: float = field(
        default=0.1,
        metadata={
            "help": "Steps in which the learning rate rises: a whole number, or, below 1, a share of all steps."
        },
    )
    selection: Literal["none", "llkd"] = field(
        default="llkd",
        metadata={
            "help": "`llkd`: learn from the rows of a pool of which the teacher is sure and the student is not."
        },
    )

    # Data
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the classes, in the order of their numbers; by default those of `label`."},
    )
    allow_missing_classes: bool = field(
        default=False, metadata={"help": "Whether a class may have no row: the student then never learns it."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    max_length: int | None = field(
        default=256, metadata={"help": "Longest text in tokens; longer ones are cut. If `None`, nothing is cut."}
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Of which a batch's width is a multiple."})

    # Model
    model_init_kwargs: KeywordArguments | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` where the student is a path."}
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_fields(self, REFUSED, "for a classifier")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}.")
        if self.labels is not None and (isinstance(self.labels, str) or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"labels must be a list of different names, got {self.labels!r}.")
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError(f"labels must name at least two classes, got {self.labels!r}.")


REFUSED = {
    "parallelism_config": "pools are scored by the student as a whole. Use plain data parallelism.",
}
