import copy
import os
from collections.abc import Callable

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput

from ..data.teacher_data import places_of
from ..data.teacher_files import ROW_COLUMN, named
from ..errors import LLKDDataError, kind_of
from ..host._compat import draws_on_every_process, get_config_model_id, keep_embeddings_apart
from ..host.model_paths import refuse_adapter_path
from ..host.preflight import (
    refuse_broken_weights,
    refuse_frozen,
    refuse_frozen_adapter,
    require_config,
    require_model,
    require_tokenizer,
)
from ..host.resume import ResumableRun
from ..host.sharding import check_sharding
from ..hub.example import example_input
from ..hub.student import StudentHubMixin
from ..selection.collator import CARRIED_COLUMNS
from ..selection.config import SELECTION_ARGUMENTS, check_batches
from ..selection.mixin import SELECTION_WEIGHT, LLKDMixin, check_confidences
from ..selection.signals import class_entropy
from ..selection.tally import UNKNOWN
from .checks import check_all_classes, check_labels, check_token_rows, refuse_other_columns
from .config import LLKDConfig


# What is no input of the model
NOT_INPUTS = (*CARRIED_COLUMNS, "labels", SELECTION_WEIGHT)


class LLKDTrainer(ResumableRun, StudentHubMixin, LLKDMixin, Trainer):
    """
    Trainer for LLKD ([arXiv 2411.08028](https://huggingface.co/papers/2411.08028), our reading), in the paper's
    setting: a small student with a classification head, an encoder or a decoder, learns a teacher's pseudo-labels.

    Each step scores a pool of rows and learns from those of which the teacher is sure and the student is not (see
    [`~selection.mixin.LLKDMixin`]). Its loss, over the rows of all micro-batches and processes of the step, is

        Σ_i w_i · CE(label_i, student) / N,

    with N the rows kept, or those of the pools (`selection_denominator="pool"`). With `selection="none"` it is plain
    training on all pseudo-labels.

    Example:

    ```python
    from trl_bbkd import LLKDConfig, LLKDTrainer, pseudo_label

    rows = pseudo_label(texts, labels=["negative", "positive"], teacher="Qwen/Qwen2.5-7B-Instruct", prompt="...")
    trainer = LLKDTrainer(model="FacebookAI/roberta-base", args=LLKDConfig("student"), train_dataset=rows)
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student. A path is loaded with a head for the classes, whose names are those of `args.labels` or of the
            [`~datasets.ClassLabel`] in `label`.
        args ([`LLKDConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        data_collator (`Callable`, *optional*):
            Makes a batch of rows with `input_ids`. By default [`~transformers.DataCollatorWithPadding`].
        train_dataset ([`~datasets.Dataset`]):
            Rows with `text` (or already `input_ids`), `label`, the teacher's, as a number, and `teacher_confidence`,
            as `trl_bbkd.pseudo_label` makes them. With `gold`, the true label or `None` where it is not known, the
            teacher's accuracy on rows that were kept and dropped is logged; nothing else looks at it.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Rows of which `label` is the true one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer; by default, that at its path.
        compute_metrics (`Callable`, *optional*):
            As in [`~transformers.Trainer`]. By default [`classification_metrics`].
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train; its `task_type` is `"SEQ_CLS"`, by which the head is trained as well.

    Raises:
        [`~errors.LLKDDataError`]: rows that cannot be learned from.
        ValueError: a student that is no classifier of these classes.
    """

    _tag_names = ["trl-bbkd", "llkd"]
    _name = "LLKD"
    _card_settings = (
        "selection_rule",
        "selection_weighting",
        "selection_momentum",
        "selection_warmup_steps",
        "max_length",
    )
    _card_note = "The paper's formulas are not public enough to be exact: this is our reading of its method."
    _paper = {
        "title": "Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data",
        "id": "2411.08028",
        # docstyle-ignore
        "citation": """@article{llkd2024,
    title        = {{Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data}},
    year         = 2024,
    eprint       = {arXiv:2411.08028},
}""",
    }
    _state_name = "llkd_state.json"
    _same_when_resumed = (
        "seed",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "label_smoothing_factor",
        *SELECTION_ARGUMENTS,
    )
    _group_column = "label"

    args: LLKDConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: LLKDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict] | None = None,
    ) -> None:
        require_model(model, type(self).__name__)
        self._student_path = model if isinstance(model, str) else get_config_model_id(model.config)
        args = LLKDConfig(f"{self._student_path.split('/')[-1]}-LLKD") if args is None else args
        require_config(args, LLKDConfig, type(self).__name__)
        args = copy.copy(args)
        check_sharding(args)
        refuse_adapter_path(model, "student")
        refuse_broken_weights(model, "student")
        refuse_frozen_adapter(peft_config, "student")
        if not isinstance(model, str) and peft_config is None:
            refuse_frozen(model, "student")
        if args.batch_eval_metrics and compute_metrics is None:
            raise ValueError(
                "batch_eval_metrics=True needs compute_metrics of your own: accuracy and macro F1 are of all rows at once."
            )
        self.class_names = class_names(train_dataset, args.labels)
        revision = {"revision": (args.model_init_kwargs or {}).get("revision", "main")}
        config = AutoConfig.from_pretrained(model, **revision) if isinstance(model, str) else model.config
        self._num_classes = self._num_labels(model, config, args)
        self._max_positions = max_positions(config)
        self._vocab_size = config.get_text_config().vocab_size
        self._collates_itself = data_collator is None
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
        evaluated = {name: rows for name, rows in evaluated.items() if rows is not None}
        self._check_training_rows(train_dataset, args)
        for name, rows in evaluated.items():
            check_labels(rows, "label", self._num_classes, self.class_names, name)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(self._student_path, **revision)
        require_tokenizer(processing_class, type(self).__name__)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        candidates = (example_input(rows, args.text_column) for rows in (*evaluated.values(), train_dataset))
        self._example = next(filter(None, candidates), None)
        train_dataset = self._training_rows(train_dataset, processing_class, args)
        evaluated = {
            name: without(self._tokenized(rows, processing_class, args, name), (*CARRIED_COLUMNS, "gold"))
            for name, rows in evaluated.items()
        }
        if not isinstance(eval_dataset, dict):
            evaluated = evaluated.get("evaluation")

        if isinstance(model, str):
            model = load_student(model, self.class_names, args)
        # Decoders look for the last token that is none of padding
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        if self.class_names is not None:
            model.config.id2label = dict(enumerate(self.class_names))
            model.config.label2id = {name: number for number, name in enumerate(self.class_names)}
        keep_embeddings_apart(model.get_base_model() if isinstance(model, PeftModel) else model)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or DataCollatorWithPadding(processing_class, pad_to_multiple_of=args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=evaluated,
            processing_class=processing_class,
            compute_metrics=compute_metrics or classification_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Trainer then counts the rows of a whole step (below), and does not divide the loss by its micro-batches
        self.model_accepts_loss_kwargs = True

    def _num_labels(self, model: str | PreTrainedModel, config: PretrainedConfig, args: LLKDConfig) -> int:
        if isinstance(model, str):
            if self.class_names is None:
                raise ValueError(
                    "A student that is a path gets a head for the classes, but nothing names them. Set `labels`, or make "
                    "`label` a `ClassLabel`, as `trl_bbkd.pseudo_label` does."
                )
            has_head = config.architectures and "ForSequenceClassification" in config.architectures[0]
            if has_head and not (args.model_init_kwargs or {}).get("ignore_mismatched_sizes"):
                self._check_classes(config)
            return len(self.class_names)
        num_labels = model.config.num_labels
        if num_labels < 2 or model.config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"The student has num_labels={num_labels} and problem_type={model.config.problem_type!r}; it must choose "
                "one of two or more classes. Load it with `num_labels`, or hand in its path."
            )
        if self.class_names is not None:
            self._check_classes(config)
        return num_labels

    def _check_classes(self, config: PretrainedConfig) -> None:
        """Refuse a head for other classes."""
        own, names = list(config.id2label.values()), self.class_names
        if len(own) != len(names):
            raise ValueError(
                f"The student has num_labels={len(own)}, but there are {len(names)} classes: {', '.join(names)}. Load it with "
                f"num_labels={len(names)} and ignore_mismatched_sizes=True (in model_init_kwargs, or in from_pretrained), "
                "or take its base model."
            )
        if own != names and own != [f"LABEL_{number}" for number in range(len(own))]:
            raise ValueError(
                f"The student's classes are {', '.join(own)}, but those of the rows are {', '.join(names)}. Bring them into "
                "the same order: name them so in `labels`, or `dataset.align_labels_with_mapping`."
            )

    def _tokenized(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLKDConfig, where: str) -> Dataset:
        """Rows with `input_ids`, all of which the student can read."""
        is_text = "input_ids" not in rows.column_names
        if is_text:
            if args.text_column not in rows.column_names:
                raise LLKDDataError(
                    f"The {where} rows have no column `{args.text_column}`, and no `input_ids`; columns found: "
                    f"{named(rows.column_names)}. Name the column of the text in text_column."
                )
            # Once for all processes: they find what the first one wrote
            with PartialState().main_process_first():
                rows = rows.map(
                    tokenize,
                    fn_kwargs={
                        "tokenizer": tokenizer,
                        "text_column": args.text_column,
                        "max_length": args.max_length,
                        "where": where,
                    },
                    with_indices=True,
                    batched=True,
                    remove_columns=[args.text_column],
                    desc=f"Tokenizing {where} rows",
                )
        check_token_rows(rows, where, self._max_positions, self._vocab_size, max_length_acts=is_text)
        if not args.remove_unused_columns and self._collates_itself:
            refuse_other_columns(rows, where, tokenizer.model_input_names)
        return rows

    def _check_training_rows(self, rows: Dataset, args: LLKDConfig) -> None:
        check_labels(rows, "label", self._num_classes, self.class_names, "training")
        if not args.allow_missing_classes:
            check_all_classes(rows, self._num_classes, self.class_names)
        if "gold" in rows.column_names:
            check_labels(rows, "gold", self._num_classes, self.class_names, "training", may_be_unknown=True)
        if args.selection == "llkd":
            check_confidences(rows)
        check_batches(len(rows), args)

    def _training_rows(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLKDConfig) -> Dataset:
        rows = self._tokenized(rows, tokenizer, args, "training")
        return without(rows, (*CARRIED_COLUMNS, "gold")) if args.selection == "none" else rows

    def train(self, *args, **kwargs) -> TrainOutput:
        """As in [`~transformers.Trainer`]; `train_dataset` may have been replaced by other rows."""
        if "input_ids" not in self.train_dataset.column_names:
            self._check_training_rows(self.train_dataset, self.args)
            self.train_dataset = self._training_rows(self.train_dataset, self.processing_class, self.args)
            if self.selector is not None:
                self._start_selection()
        return super().train(*args, **kwargs)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        # An `eval_dataset` that was replaced
        if not is_training and isinstance(dataset, Dataset) and "input_ids" not in dataset.column_names:
            dataset = self._to_evaluate(dataset)
        if isinstance(dataset, Dataset):
            # By which errors name a row: no input, also where unused columns stay
            dataset = without(dataset, (ROW_COLUMN,))
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        return super().get_eval_dataloader(self._to_evaluate(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self._to_evaluate(test_dataset))

    def _to_evaluate(self, rows):
        """Rows handed in after the constructor may be text as well."""
        if not isinstance(rows, Dataset):
            return rows
        if "label" in rows.column_names:
            check_labels(rows, "label", self._num_classes, self.class_names, "evaluation")
        rows = self._tokenized(rows, self.processing_class, self.args, "evaluation")
        return without(rows, (*CARRIED_COLUMNS, "gold"))

    def _example_input(self) -> str | list[dict] | None:
        return self._example

    def _class_labels(self) -> list[str]:
        return [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]

    def _true_groups(self, row_ids: torch.Tensor) -> torch.Tensor | None:
        if "gold" not in self.train_dataset.column_names:
            return None
        gold = torch.full((int(row_ids.max()) + 1,), UNKNOWN)
        gold[row_ids] = torch.tensor([UNKNOWN if label is None else label for label in self.train_dataset["gold"]])
        self.train_dataset = self.train_dataset.remove_columns("gold")
        return gold

    def _uncertainty(self, pool: dict) -> torch.Tensor:
        return class_entropy(class_logits(self._forward(self.model, pool)))

    def _forward(self, model, inputs: dict):
        return model(**{name: value for name, value in inputs.items() if name not in NOT_INPUTS})

    # Why the loss is that of the whole step, however it is cut. `num_items_in_batch` counts the rows with a label of all
    # micro-batches, and of all processes (`average_tokens_across_devices`); the mixin counts those of what was kept, or
    # of the pools. Each micro-batch is divided by that number, so that their gradients add up to the step's. Trainer
    # divides a loss by the number of micro-batches unless `model_accepts_loss_kwargs` says that this was done: hence the
    # assignment above. DDP then takes the mean over processes, which the factor turns into a sum.
    #
    # transformers' own loss is no model for this: of students that take keyword arguments and ignore `num_items_in_batch`
    # in their loss, such as BERT, Trainer adds up the means of micro-batches, and multiplies them by the processes.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = self._forward(model, inputs)
        labels = inputs["labels"]
        losses = cross_entropy(
            class_logits(outputs).float(), labels, reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        weight = inputs.get(SELECTION_WEIGHT)
        loss = (losses if weight is None else losses * weight).sum()
        if num_items_in_batch is None or not self.model.training:
            loss = loss / (labels != -100).sum().clamp(min=1)
        else:
            over_processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * over_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    def _selection_metrics(self, confidence, uncertainty, group, row_id, found) -> dict[str, torch.Tensor]:
        metrics = super()._selection_metrics(confidence, uncertainty, group, row_id, found)
        if self.tally.gold is not None:
            gold = self.tally.gold[row_id]
            for name, rows in (("kept", found.keep), ("dropped", ~found.keep)):
                checked = rows & (gold != UNKNOWN)
                metrics[f"teacher_accuracy_{name}"] = (gold == group)[checked].double().mean()
        return metrics

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            self._write_state(output_dir)


def class_names(rows: Dataset, labels: list[str] | None) -> list[str] | None:
    """
    Names of the classes, if there are any.

    Raises:
        [`~errors.LLKDDataError`]: no data set, no rows, no labels, or labels of other names.
    """
    if not isinstance(rows, Dataset):
        raise LLKDDataError(
            f"train_dataset is {'missing' if rows is None else kind_of(rows)}; LLKD draws pools from shuffled "
            "rows and counts their classes: it needs a `Dataset`. Turn streaming off."
        )
    if not len(rows):
        raise LLKDDataError("train_dataset has no rows.")
    feature = rows.features.get("label")
    if labels is None and not isinstance(feature, ClassLabel):
        return None
    names = list(feature.names) if labels is None else list(labels)
    if len(names) < 2:
        raise LLKDDataError(
            f"There is one class only, {names[0]!r}; a student must choose one of two or more. Set `labels`."
        )
    return names


def tokenize(batch: dict, indices: list[int], tokenizer, text_column: str, max_length: int | None, where: str) -> dict:
    """The tokens of texts, for [`~datasets.Dataset.map`]."""
    for row, text in zip(places_of(batch, indices), batch[text_column], strict=True):
        if not isinstance(text, str):
            raise LLKDDataError(f"Row {row} of the {where} rows: `{text_column}` is {text!r}; it must be a string.")
    return dict(tokenizer(batch[text_column], truncation=max_length is not None, max_length=max_length))


def max_positions(config) -> int | None:
    """Most tokens that a student of this configuration takes, if it is bounded."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    # RoBERTa and its kin number positions from after the padding's
    offset = "roberta" in config.model_type or config.model_type in ("camembert", "mpnet", "longformer")
    return limit - text_config.pad_token_id - 1 if limit is not None and offset else limit


def without(rows: Dataset, columns: tuple[str, ...]) -> Dataset:
    return rows.remove_columns([column for column in columns if column in rows.column_names])


@draws_on_every_process()
def load_student(path: str, names: list[str], args: LLKDConfig) -> PreTrainedModel:
    """A student with a head for classes of these names."""
    # The head is random
    set_seed(args.seed)
    settings = {"dtype": "float32", "trust_remote_code": False, **(args.model_init_kwargs or {})}
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **settings,
    )


def with_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig) -> PeftModel:
    """
    Raises:
        ValueError: there is one already, or it would leave the head untrained.
    """
    if isinstance(model, PeftModel):
        raise ValueError("The student has an adapter already: leave out peft_config, or hand in the model without it.")
    if peft_config.task_type != TaskType.SEQ_CLS:
        raise ValueError(
            f"peft_config has task_type={peft_config.task_type}, which leaves the new head untrained. Set 'SEQ_CLS'."
        )
    return get_peft_model(model, peft_config)


def class_logits(outputs) -> torch.Tensor:
    """
    A student's logits, `(B, C)`.

    Raises:
        ValueError: they are no classifier's.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if logits.dim() != 2:
        raise ValueError(
            f"The student's logits have the shape {tuple(logits.shape)}, not (rows, classes). Load it with "
            "`AutoModelForSequenceClassification`, or hand in its path."
        )
    return logits


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    `accuracy`, and `macro_f1`: the mean over classes of F1 = 2 TP / (2 TP + FP + FN). A class that is neither a true
    label of any row nor predicted has no F1, and is left out, as scikit-learn does.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    gold = torch.as_tensor(prediction.label_ids)
    predicted = torch.as_tensor(logits).argmax(dim=1)
    classes = logits.shape[1]
    correct = torch.bincount(gold[predicted == gold], minlength=classes)
    # 2 TP + FP + FN: of each class, its rows and its predictions
    either = torch.bincount(gold, minlength=classes) + torch.bincount(predicted, minlength=classes)
    f1 = 2.0 * correct[either > 0].double() / either[either > 0]
    return {"accuracy": (predicted == gold).double().mean().item(), "macro_f1": f1.mean().item()}
