import copy
import logging
import time
from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from ..data.student_tokenizer import student_tokenizer
from ..data.teacher_data import row_names, tokenize_as_configured
from ..errors import TeacherDataError
from ..evaluation.student import end_token_ids
from ..host._compat import keep_4bit_weights_differentiable
from ..host.preflight import require_config, require_model, require_tokenizer
from ..host.resume import last_finished_checkpoint
from ..host.sharding import check_sharding, is_sharded
from ..hub.example import example_input
from ..selection.config import SELECTION_ARGUMENTS
from ..seqkd.trainer import sft_rows
from ..soft_targets.caching import model_fingerprint
from ..soft_targets.head import vocabulary_size
from ..soft_targets.rows import soft_target_rows
from ..soft_targets.store import read_description
from ..soft_targets.trainer import SoftTargetTrainer
from .checks import (
    check_enough_rows,
    check_models,
    check_proxy,
    check_shared_vocabulary,
    check_tokens,
    quantization_of_training,
)
from .config import ProxyConfig
from .stages import ProxyStages


logger = logging.getLogger(__name__)

SAME_WHEN_RESUMED = (
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    # A checkpoint brings its own, whatever is asked for
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "hard_weight",
    "distillation_temperature",
    "target_store",
    "target_top_k",
    "target_tail",
    "stages",
    *SELECTION_ARGUMENTS,
)


class ProxyTargetTrainer(SoftTargetTrainer):
    r"""
    What trainers whose soft targets come from a proxy share: one call to `train` goes through the proxy's stages and
    the student's training, and a second run goes on at the first stage that is not finished.

    A method names its configuration and its stages, and says how rows are divided between them.

    Args:
        model, processing_class, callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.SFTTrainer`], for the student.
        proxy_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The proxy, with the student's tokenizer; instead of `args.proxy_model`.
        args ([`~config.ProxyConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, for the student's evaluation and the proxy's measurements.
        compute_metrics, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in [`~trl.SFTTrainer`].

    Raises:
        TypeError: If a model is none, `args` another trainer's configuration, or `processing_class` no tokenizer.
        TeacherDataError: If the teacher text breaks the contract or a stage has no rows, before any model is loaded.
        VocabularyError: If proxy and student do not share a tokenizer, before any model is loaded.
        ProxyModelError: If the proxy is missing, is the student, or is an adapter without its base model.
        ValueError: If the run is to be sharded in a way that cannot work (see [`~host.sharding.check_sharding`]), or with a
            proxy that is no path.
    """

    _training_name = "distillation"
    _config_type: type[ProxyConfig]
    _stages_type: type[ProxyStages]
    _without_proxy: str  # how the method does without a proxy
    _why_no_stream: str

    args: ProxyConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        proxy_model: str | PreTrainedModel | PeftModel | None = None,
        args: ProxyConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        require_model(model, type(self).__name__)
        student_path = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(proxy_model, TrainingArguments):
            if args is not None:
                raise TypeError(
                    f"{type(self).__name__} was given two configurations, second and third. Leave one out."
                )
            # `Trainer(model, args)`, as all others are called
            proxy_model, args = None, proxy_model
        if args is None:
            args = self._config_type(f"{student_path.split('/')[-1]}-{self._name.replace('-', '')}")
        require_config(args, self._config_type, type(self).__name__)
        args = copy.copy(args)
        check_sharding(args, quantization_config, quantization_of_training(args))
        if not isinstance(train_dataset, Dataset):
            raise TeacherDataError(
                f"{self._name} {self._why_no_stream}: it needs a `Dataset`, not {_kind(train_dataset)}."
            )
        if not isinstance(eval_dataset, Dataset | None):
            raise TeacherDataError(f"eval_dataset must be one `Dataset`, not {_kind(eval_dataset)}.")
        proxy = args.proxy_model if proxy_model is None else proxy_model
        if proxy is not None:
            require_model(proxy, type(self).__name__, "proxy_model")
            if is_sharded(args) and not isinstance(proxy, str):
                raise ValueError(
                    "Under FSDP and DeepSpeed a model in memory may be in parts, and the proxy is measured whole. Hand in its path "
                    "as proxy_model."
                )
        self._needs_proxy = args.needs_proxy and not self._has_targets(args)
        if self._needs_proxy:
            check_proxy(proxy, model, args, self._name, self._without_proxy)
        check_models(model, peft_config, proxy if self._needs_proxy else None, args)
        self._check_setup(args, eval_dataset)

        student_kwargs, proxy_kwargs = (
            {"trust_remote_code": args.trust_remote_code}
            | {k: v for k, v in (kwargs or {}).items() if k == "revision"}
            for kwargs in (args.model_init_kwargs, args.proxy_model_init_kwargs)
        )
        if processing_class is not None:
            require_tokenizer(processing_class, type(self).__name__)
        processing_class = student_tokenizer(model, args, processing_class, **student_kwargs)
        if args.chat_template_path is not None:
            # The tokenizer has it. With another one's template came its end of a turn, which the model is to know
            args.chat_template_path, args.eos_token = None, processing_class.eos_token
        config = AutoConfig.from_pretrained(model, **student_kwargs) if isinstance(model, str) else model.config
        configs = [config]
        if self._needs_proxy:
            configs.append(check_shared_vocabulary(processing_class, config, proxy, proxy_kwargs, train_dataset))
        contexts = [getattr(each.get_text_config(), "max_position_embeddings", None) for each in configs]
        self._context = min((size for size in contexts if size), default=None)
        shared_size = self._shared_size = min(each.get_text_config().vocab_size for each in configs)

        teacher_rows, train_counts = tokenize_as_configured(
            train_dataset, processing_class, args, max_length=self._context
        )
        held_out, held_out_counts = None, None
        if eval_dataset is not None:
            held_out, held_out_counts = tokenize_as_configured(
                eval_dataset, processing_class, args, max_length=self._context, held_out=True
            )
        self._check_rows(teacher_rows, processing_class, shared_size)
        stage_rows, student_teacher_rows = self._divide(teacher_rows, args)
        for part in stage_rows:
            if part is not student_teacher_rows:
                self._student_rows(part, processing_class, args)
        student_rows = self._student_rows(student_teacher_rows, processing_class, args)
        if "distil" in args.stages:
            check_enough_rows(student_rows, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=student_rows,
            eval_dataset=None if held_out is None else self._rows_to_evaluate(held_out, processing_class, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if self.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(self.model)
        student = self.accelerator.unwrap_model(self.model)
        # So that it stops where the teacher's answers end, whoever uses it
        student.generation_config.eos_token_id = end_token_ids(student, processing_class, teacher_rows[0]["prompt"])
        self.proxy_stages = self._stages_type(
            proxy, args, stage_rows, held_out, processing_class, vocabulary_size(self.model), self.accelerator
        )
        # As they are before `max_length` cuts them: the collator cuts their targets
        self._whole_rows = student_rows
        self._seconds = 0.0
        self._learned_from: dict[str, str] = {}
        counts = {"train": train_counts, "test": held_out_counts}
        self.card.counts = {split: found for split, found in counts.items() if found is not None}
        self.card.example = self.card.example or example_input(teacher_rows)
        self.card.conversational = isinstance(teacher_rows[0]["prompt"], list)

    # Rows, whichever door they come through

    def _student_rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: ProxyConfig) -> Dataset:
        rows = soft_target_rows(dataset, tokenizer, args.chat_template_kwargs)
        if len(rows):
            check_tokens(rows, self._context, self._shared_size, row_names(dataset))
        return rows

    def _rows_to_evaluate(
        self, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: ProxyConfig
    ) -> Dataset | IterableDataset:
        """Rows without soft targets, with the prompts that callbacks generate from."""
        dataset, _ = tokenize_as_configured(dataset, tokenizer, args, max_length=self._context, held_out=True)
        rows = sft_rows(dataset, tokenizer, args.chat_template_kwargs)
        if isinstance(rows, IterableDataset):
            return rows
        check_tokens(rows, self._context, self._shared_size, row_names(dataset))
        return concatenate_datasets([rows, dataset.select_columns(["prompt"])], axis=1)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # Those of the constructor have `input_ids`; those of `evaluate` and `predict` are teacher text
        if "input_ids" not in _columns(dataset):
            dataset = self._rows_to_evaluate(dataset, processing_class, args)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not is_training and "input_ids" not in _columns(dataset):
            dataset = self._prepare_dataset(dataset, self.processing_class, self.args, False, None, description)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _has_targets(self, args: ProxyConfig) -> bool:
        """Whether all that a proxy would be needed for is on disk."""
        return args.target_store is not None and args.stages == ["distil"]

    def _check_setup(self, args: ProxyConfig, eval_dataset: Dataset | None) -> None:
        """What the method asks of its configuration beside a proxy, before anything is loaded."""

    def _check_rows(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """What the method asks of tokenised teacher rows beside the contract, before any model is loaded."""

    def _divide(self, rows: Dataset, args: ProxyConfig) -> tuple[tuple[Dataset, ...], Dataset]:
        """The rows of each stage, as `ProxyStages.rows`, and those of the student."""
        raise NotImplementedError

    def _prepare_targets(self) -> None:
        """Run the stages before the student's, and give `data_collator.stores` and `target_weights` what they made."""
        raise NotImplementedError

    @property
    def has_own_proxy(self) -> bool:
        """Whether there is a proxy that this run has used, trained or both."""
        return self._needs_proxy

    @property
    def stage_reports(self) -> list[dict]:
        """What each stage did: `stage`, `rows`, `seconds`, and `metrics`, a list with what was measured when."""
        distilled = {"stage": "distillation", "rows": len(self.train_dataset), "seconds": self._seconds, "metrics": []}
        return [*self.proxy_stages.reports, *([distilled] if self._seconds else [])]

    def check_output_dir(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """
        As in [`~host.resume.ResumableRun`], but a run that was stopped goes on by itself, in distillation as in the stages
        before.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint in (None, True):
            checkpoint = last_finished_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        return super().check_output_dir(resume_from_checkpoint)

    def _describe_run(self) -> dict:
        # Only the stages' end tells what the student learns from; until then, there is less to compare
        return super()._describe_run() | self._learned_from

    def _describe_targets(self) -> dict[str, str]:
        """What the student's targets were made from: a checkpoint is gone on with if it learned from the same."""
        stores = [(store.folder, read_description(store.folder)["fingerprint"]) for store in self.data_collator.stores]
        found = {f"{folder.name}: {name}": value for folder, names in stores for name, value in names.items()}
        if self.live_proxy is not None:
            found["proxy"] = model_fingerprint(self.live_proxy)
        return found

    # Where `stages` leaves distillation out there is nothing to return
    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput | None:
        """
        Go through the stages that are not finished, and distil.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint of the student to go on from. By default `args.resume_from_checkpoint`, or the last one in
                `output_dir` that was finished, if any.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: of distillation; `None` where `stages` leaves it out.

        Raises:
            ValueError: `output_dir` holds stages or checkpoints made from something else.
            TeacherDataError: `train_dataset` was replaced by other teacher text.
        """
        if "row_key" not in self.train_dataset.column_names:
            raise TeacherDataError(
                f"train_dataset was replaced, but {self._name} divides rows between its stages when it is made: make a new "
                "trainer with these rows."
            )
        self.proxy_stages.begin()
        resume_from_checkpoint = self.check_output_dir(resume_from_checkpoint)
        self._prepare_targets()
        self._learned_from = self._describe_targets()
        if self.accelerator.is_main_process:
            for warning in self.warnings:
                logger.warning(warning["text"])
        if "distil" not in self.args.stages:
            return None
        if resume_from_checkpoint is not None and self._has_taken_all_steps(resume_from_checkpoint):
            self.check_output_dir(resume_from_checkpoint)
            return self._finished_before(resume_from_checkpoint)
        if resume_from_checkpoint is not None and self.accelerator.is_main_process:
            logger.warning(f"distillation: going on from {resume_from_checkpoint}.")
        # The student's run is the same whichever stages were run before it
        set_seed(self.args.seed)
        started = time.perf_counter()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._seconds = time.perf_counter() - started
        return output


def _kind(dataset) -> str:
    return "a stream. Turn streaming off" if isinstance(dataset, IterableDataset) else type(dataset).__name__


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset)))
