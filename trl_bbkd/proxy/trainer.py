import copy
import logging
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput

from .._compat import keep_4bit_weights_differentiable
from ..resume import TRAINER_STATE_NAME, last_finished_checkpoint
from ..sharding import refuse_sharding
from ..soft_targets.caching import model_fingerprint
from ..soft_targets.rows import soft_target_rows
from ..soft_targets.store import read_description
from ..soft_targets.trainer import SoftTargetTrainer
from ..teacher_data import TeacherDataError, row_names, tokenize_teacher_data
from .checks import check_lengths, check_proxy, check_shared_vocabulary
from .config import ProxyConfig
from .stages import ProxyStages


logger = logging.getLogger(__name__)


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

    Raises:
        TeacherDataError: If the teacher text breaks the contract or a stage has no rows, before any model is loaded.
        VocabularyError: If proxy and student do not share a tokenizer, before any model is loaded.
        ProxyModelError: If the proxy is missing, is the student, or is an adapter without its base model.
        ValueError: Under DeepSpeed or FSDP, which are not supported yet.
    """

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
    ):
        student_path = model if isinstance(model, str) else model.config._name_or_path
        if args is None:
            args = self._config_type(f"{student_path.split('/')[-1]}-{self._name.replace('-', '')}")
        if not isinstance(args, self._config_type):
            raise TypeError(
                f"args of {type(self).__name__} must be a {self._config_type.__name__}, got {type(args).__name__}."
            )
        args = copy.copy(args)
        refuse_sharding(args, type(self).__name__, "the output layer, which the loss reads, would be in pieces")
        if not isinstance(train_dataset, Dataset):
            raise TeacherDataError(
                f"{self._name} {self._why_no_stream}: it needs a `Dataset`, not {_kind(train_dataset)}."
            )
        if not isinstance(eval_dataset, Dataset | None):
            raise TeacherDataError(f"eval_dataset must be one `Dataset`, not {_kind(eval_dataset)}.")
        proxy = args.proxy_model if proxy_model is None else proxy_model
        self._needs_proxy = args.needs_proxy and not self._has_targets(args)
        if self._needs_proxy:
            check_proxy(proxy, model, args, self._name, self._without_proxy)
        self._check_setup(args, eval_dataset)

        student_kwargs, proxy_kwargs = (
            {"trust_remote_code": args.trust_remote_code}
            | {k: v for k, v in (kwargs or {}).items() if k == "revision"}
            for kwargs in (args.model_init_kwargs, args.proxy_model_init_kwargs)
        )
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(student_path, padding_side="left", **student_kwargs)
        config = AutoConfig.from_pretrained(model, **student_kwargs) if isinstance(model, str) else model.config
        configs = [config]
        if self._needs_proxy:
            configs.append(check_shared_vocabulary(processing_class, config, proxy, proxy_kwargs, train_dataset))
        contexts = [getattr(each.get_text_config(), "max_position_embeddings", None) for each in configs]
        context = min((size for size in contexts if size), default=None)

        data_counts = {}

        def tokenize(dataset, split):
            if dataset is None or "teacher_ids" in dataset.column_names:
                return dataset
            dataset, data_counts[split] = tokenize_teacher_data(
                dataset,
                processing_class,
                max_completion_length=args.max_completion_length,
                max_prompt_length=args.max_prompt_length,
                max_length=context,
                chat_template_kwargs=args.chat_template_kwargs,
                reasoning=args.reasoning,
                held_out=split != "train",
            )
            return dataset

        def prepared(dataset):
            rows = soft_target_rows(dataset, processing_class, args.chat_template_kwargs)
            if len(rows):
                check_lengths(rows, context, row_names(dataset))
            return rows

        teacher_rows = tokenize(train_dataset, "train")
        held_out = tokenize(eval_dataset, "test")
        shared_size = min(each.get_text_config().vocab_size for each in configs)
        self._check_rows(teacher_rows, processing_class, shared_size)
        stage_rows, student_teacher_rows = self._divide(teacher_rows, args)
        for part in stage_rows:
            if part is not student_teacher_rows:
                prepared(part)
        student_rows = prepared(student_teacher_rows)
        super().__init__(
            model=model,
            args=args,
            train_dataset=student_rows,
            eval_dataset=None if held_out is None else prepared(held_out).remove_columns("row_key"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if not len(self.train_dataset):
            raise TeacherDataError(f"max_length={args.max_length} cuts off every answer. Raise it, or leave it out.")
        if self.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(self.model)
        vocab_size = self.accelerator.unwrap_model(self.model).get_output_embeddings().weight.size(0)
        self.proxy_stages = self._stages_type(
            proxy, args, stage_rows, held_out, processing_class, vocab_size, self.accelerator
        )
        # As they are before `max_length` cuts them: the collator cuts their targets
        self._whole_rows = student_rows
        self._seconds = 0.0
        self._learned_from: dict[str, str] = {}
        self.card.counts = data_counts
        self.card.conversational = isinstance(teacher_rows[0]["prompt"], list)

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
        As in [`~resume.ResumableRun`], but a run that was stopped goes on by itself, in distillation as in the stages
        before.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint in (None, True):
            checkpoint = last_finished_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        return super().check_output_dir(resume_from_checkpoint)

    def _has_taken_all_steps(self, checkpoint: str) -> bool:
        steps = TrainerState.load_from_json(Path(checkpoint) / TRAINER_STATE_NAME).global_step
        return steps >= self.args.max_steps > 0

    def _finished_before(self, checkpoint: str) -> TrainOutput:
        """What `train` left, without the step more that `Trainer` would take from a run's last checkpoint."""
        self.check_output_dir(checkpoint)
        self.state = TrainerState.load_from_json(Path(checkpoint) / TRAINER_STATE_NAME)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)
        if self.accelerator.is_main_process:
            logger.warning(f"distillation: finished before, in {checkpoint}; not run again.")
        return TrainOutput(self.state.global_step, 0.0, {})

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
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
        """
        resume_from_checkpoint = self.check_output_dir(resume_from_checkpoint)
        self._prepare_targets()
        self._learned_from = self._describe_targets()
        if self.accelerator.is_main_process:
            for warning in self.warnings:
                logger.warning(warning["text"])
        if "distil" not in self.args.stages:
            return None
        if resume_from_checkpoint is not None and self._has_taken_all_steps(resume_from_checkpoint):
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
