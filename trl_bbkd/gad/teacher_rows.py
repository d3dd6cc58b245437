import logging

from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..data.teacher_data import TeacherDataCounts, is_tokenized, tokenize_as_configured
from ..errors import TeacherDataError
from ..host.preflight import refuse_too_few_rows
from .config import GADConfig
from .samplers import stage_rows


logger = logging.getLogger(__name__)


class TeacherRows:
    """
    Prepares rows of teacher text for GAD, whichever door they come through: the constructor, `evaluate`, `predict`, or
    an attribute that was set later.

    Args:
        args ([`GADConfig`]):
            Its `max_prompt_length`, `max_completion_length`, `answers_per_prompt`, `chat_template_kwargs` and `reasoning`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        config ([`~transformers.PretrainedConfig`]):
            The student's.
    """

    def __init__(self, args: GADConfig, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig):
        self.args = args
        self.tokenizer = tokenizer
        self.max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.counts: dict[str, TeacherDataCounts] = {}
        self._streams: list[IterableDataset] = []  # a stream that was prepared does not name its columns

    def prepare(self, rows: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
        """
        Rows with `teacher_ids`. What has them is returned as it is.

        Args:
            rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Teacher text.
            split (`str`):
                Name of the rows, under which they are counted.

        Raises:
            [`~errors.TeacherDataError`]: they are no data set, or break the contract of teacher text.
        """
        if not isinstance(rows, Dataset | IterableDataset):
            raise TeacherDataError(
                f"The rows ({split}) must be a `Dataset` or an `IterableDataset`, got {type(rows).__name__}: GAD needs "
                "prompts and the teacher's answers."
            )
        if is_tokenized(rows) or any(rows is stream for stream in self._streams):
            return rows
        rows, self.counts[split] = tokenize_as_configured(
            rows, self.tokenizer, self.args, max_length=self.max_length, held_out=split != "train"
        )
        logger.info(self.counts[split])
        if isinstance(rows, IterableDataset):
            self._streams.append(rows)
        return rows

    def prepare_training(self, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        As [`~TeacherRows.prepare`], for `train_dataset`.

        Raises:
            ValueError: there are fewer prompts than one generation batch has. A stream cannot be counted.
            [`~errors.TeacherDataError`]: `discriminator_rows="unseen"` cannot divide the rows.
        """
        rows = self.prepare(rows, "train")
        if isinstance(rows, Dataset):
            refuse_too_few_rows(len(rows), self._prompts_per_batch(), "prompts", self._how_to_fill_a_batch())
        if self.args.discriminator_rows == "unseen":
            self._check_stages(rows)
        return rows

    def _check_stages(self, rows: Dataset | IterableDataset) -> None:
        if isinstance(rows, IterableDataset):
            raise TeacherDataError(
                "discriminator_rows='unseen' divides the rows between the stages, and a stream's are not known before they are "
                "read. Turn streaming off, or leave discriminator_rows out."
            )
        needed = self._prompts_per_batch()
        share = self.args.warmup_epochs / self.args.num_train_epochs
        for stage, numbers in zip(
            ("warm-up", "adversarial stage"), stage_rows(rows, share, self.args.seed), strict=True
        ):
            if len(numbers) < needed:
                raise TeacherDataError(
                    f"discriminator_rows='unseen' leaves {len(numbers)} of {len(rows)} rows for the {stage}, and a batch has "
                    f"{needed} prompts. Get more teacher rows, set warmup_epochs ({self.args.warmup_epochs}) nearer to half of "
                    f"num_train_epochs ({self.args.num_train_epochs}), or {self._how_to_fill_a_batch()}."
                )

    def prepare_evaluation(self, rows):
        """
        As [`~TeacherRows.prepare`], for `eval_dataset`, which may be `None` or a dictionary of data sets.

        Raises:
            ValueError: there are several, and `discriminator_patience` counts evaluations of one.
        """
        if rows is None:
            return None
        if isinstance(rows, dict):
            if self.args.discriminator_patience is not None:
                raise ValueError(
                    f"discriminator_patience={self.args.discriminator_patience} counts evaluations of one data set, and eval_dataset "
                    f"has {len(rows)} by name ({', '.join(rows)}). Hand in one of them, or leave discriminator_patience out."
                )
            return {name: self.prepare(split, name) for name, split in rows.items()}
        return self.prepare(rows, "test")

    def _prompts_per_batch(self) -> int:
        return self.args.generation_batch_size // self.args.num_generations

    def _how_to_fill_a_batch(self) -> str:
        args = self.args
        keys = [f"per_device_train_batch_size ({args.per_device_train_batch_size})"]
        if args.steps_per_generation > 1:
            taken = args.gradient_accumulation_steps == args.steps_per_generation
            name = "gradient_accumulation_steps" if taken else "steps_per_generation"
            keys.append(f"{name} ({args.steps_per_generation})")
        remedy = f"lower {' or '.join(keys)}, or raise num_generations ({args.num_generations})"
        counts = self.counts.get("train")
        if counts is not None and counts.dropped_prompts:
            remedy = (
                f"raise max_prompt_length ({args.max_prompt_length}), which dropped {counts.dropped_prompts} of "
                f"{counts.rows} rows, or {remedy}"
            )
        return remedy
