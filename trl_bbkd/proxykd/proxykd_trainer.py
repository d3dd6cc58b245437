import copy
import importlib.util
import logging
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from .._compat import keep_4bit_weights_differentiable
from ..resume import last_finished_checkpoint
from ..sharding import refuse_sharding
from ..soft_targets.rows import soft_target_rows
from ..soft_targets.trainer import SoftTargetTrainer
from ..soft_targets.vocabulary import check_vocabularies
from ..teacher_data import TeacherDataError, tokenize_teacher_data
from .proxy_model import ProxyModelError, base_of_adapter
from .proxy_stages import STAGE_LABELS, ProxyStages
from .proxykd_config import ProxyKDConfig
from .splits import StageRows, split_rows
from .weights import RowWeights, row_weights


logger = logging.getLogger(__name__)

VOCABULARY_TEXTS = 256
LENGTH_PENALTY = -0.9  # correlation of weight and length


class ProxyKDTrainer(SoftTargetTrainer):
    r"""
    Trainer for Proxy-KD ([arXiv 2401.07013](https://huggingface.co/papers/2401.07013), version 2).

    An open proxy is aligned to a teacher of which only the text is known, and the student learns from the teacher's
    text and from the proxy's distributions over it. One call to `train` goes through the stages: warm-up of the proxy,
    its alignment (see [`ProxyAlignmentTrainer`]), its soft targets, and distillation. Each has its own rows and is
    kept on disk below `output_dir/proxy`: a second run goes on at the first stage that is not finished.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bbkd import ProxyKDConfig, ProxyKDTrainer

    trainer = ProxyKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        proxy_model="Qwen/Qwen2.5-7B-Instruct",
        args=ProxyKDConfig(output_dir="student"),
        train_dataset=load_dataset("json", data_files="teacher.jsonl", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, as in [`~trl.SFTTrainer`].
        proxy_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The proxy, with the student's tokenizer; instead of `args.proxy_model`.
        args ([`ProxyKDConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational: `completion` is the teacher's
            answer to `prompt`. It is divided between the stages.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, for the student's evaluation and the proxy's agreement with the
            teacher.
        processing_class, callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.SFTTrainer`], for the student.

    Raises:
        TeacherDataError: If the teacher text breaks the contract or a stage has no rows, before any model is loaded.
        VocabularyError: If proxy and student do not share a tokenizer, before any model is loaded.
        ProxyModelError: If the proxy is missing, is the student, or is an adapter without its base model.
        ValueError: Under DeepSpeed or FSDP, which are not supported yet.
    """

    _tag_names = ["trl", "trl-bbkd", "proxykd"]
    _name = "Proxy-KD"
    _card_note = "Part of what it learned is its proxy's: an open model's imitation of the teacher."
    _paper = {
        "title": "Knowledge Distillation of Black-Box Large Language Models",
        "id": "2401.07013",
        # docstyle-ignore
        "citation": """@article{proxykd2024,
    title        = {{Knowledge Distillation of Black-Box Large Language Models}},
    year         = 2024,
    eprint       = {arXiv:2401.07013},
}""",
    }
    _same_when_resumed = (
        "seed",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "hard_weight",
        "kl_weight",
        "distillation_temperature",
        "target_source",
        "target_top_k",
        "target_tail",
        "sample_weighting",
        "stages",
    )

    args: ProxyKDConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        proxy_model: str | PreTrainedModel | PeftModel | None = None,
        args: ProxyKDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        student_path = model if isinstance(model, str) else model.config._name_or_path
        args = ProxyKDConfig(f"{student_path.split('/')[-1]}-ProxyKD") if args is None else copy.copy(args)
        refuse_sharding(args, type(self).__name__, "the output layer, which the loss reads, would be in pieces")
        if train_dataset is None or isinstance(train_dataset, IterableDataset):
            raise TeacherDataError(
                "Proxy-KD divides the teacher's rows between its stages and weighs each against all others: it needs a "
                "`Dataset`, not a stream. Turn streaming off."
            )
        proxy = args.proxy_model if proxy_model is None else proxy_model
        has_targets = args.target_store is not None and args.target_source == "cache" and args.stages == ["distil"]
        self._needs_proxy = args.needs_proxy and not has_targets
        if self._needs_proxy:
            check_proxy(proxy, model, args)
            check_alignment(args, eval_dataset)

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
            configs.append(_proxy_config(proxy, proxy_kwargs))
            proxy_tokenizer = _proxy_tokenizer(proxy, proxy_kwargs)
            if proxy_tokenizer is not None:
                texts = [
                    _text(answer)
                    for answer in train_dataset.select(range(min(len(train_dataset), VOCABULARY_TEXTS)))["completion"]
                ]
                check_vocabularies(processing_class, proxy_tokenizer, *configs, texts)
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
            )
            return dataset

        teacher_rows = tokenize(train_dataset, "train")
        held_out = tokenize(eval_dataset, "test")
        rows = split_rows(teacher_rows, args.warmup_share, args.alignment_share, args.seed)
        check_stage_rows(rows, args)
        for part in rows[:2]:
            if len(part):
                check_lengths(soft_target_rows(part, processing_class, args.chat_template_kwargs), context)
        student_teacher_rows = teacher_rows if args.distil_on_all_rows else rows.distil

        def prepared(dataset):
            prepared_rows = soft_target_rows(dataset, processing_class, args.chat_template_kwargs)
            check_lengths(prepared_rows, context)
            return prepared_rows

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
        if self.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(self.model)
        vocab_size = self.accelerator.unwrap_model(self.model).get_output_embeddings().weight.size(0)
        self.proxy_stages = ProxyStages(proxy, args, rows, held_out, processing_class, vocab_size, self.accelerator)
        # As they are before `max_length` cuts them: the collator cuts their targets
        self._whole_rows = student_rows
        self.row_weights: RowWeights | None = None
        self._seconds = 0.0
        self.card.counts = data_counts
        self.card.conversational = isinstance(teacher_rows[0]["prompt"], list)

    @property
    def has_own_proxy(self) -> bool:
        """Whether there is a proxy that this run has used, trained or both."""
        return self._needs_proxy

    @property
    def stage_reports(self) -> list[dict]:
        """What each stage did: `stage`, `rows`, `seconds`, and `metrics`, a list with what was measured when."""
        distilled = {"stage": "distillation", "rows": len(self.train_dataset), "seconds": self._seconds, "metrics": []}
        return [*self.proxy_stages.reports, *([distilled] if self._seconds else [])]

    @property
    def warnings(self) -> list[dict]:
        """What looks wrong, with its remedy: `step` (0, because the stages come before the student's steps) and `text`."""
        texts = []
        for report in self.proxy_stages.reports:
            agreement = [entry["top1_agreement"] for entry in report["metrics"] if "top1_agreement" in entry]
            if report["stage"] == STAGE_LABELS["align"] and agreement and agreement[-1] < agreement[0]:
                texts.append(
                    f"The alignment lowered the proxy's agreement with the teacher, from {agreement[0]:.3f} to "
                    f"{agreement[-1]:.3f} of held-out positions. Lower alignment_learning_rate or alignment_epochs, or set "
                    "alignment_patience, which keeps the best round."
                )
        if self.row_weights is not None and self.row_weights.length_correlation < LENGTH_PENALTY:
            texts.append(
                f"The row weights of equation 9 are a length penalty: their correlation with the answers' lengths is "
                f"{self.row_weights.length_correlation:.2f}. Set sample_weighting='mean'."
            )
        return [{"step": 0, "text": text} for text in texts]

    def check_output_dir(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """
        As in [`~resume.ResumableRun`], but a run that was stopped goes on by itself, in distillation as in the stages
        before.
        """
        if resume_from_checkpoint in (None, True):
            checkpoint = last_finished_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        return super().check_output_dir(resume_from_checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Go through the stages that are not finished, and distil.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint of the student to go on from. By default the last one in `output_dir` that was finished, if
                any.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: of distillation; `None` where `stages` leaves it out.

        Raises:
            ValueError: `output_dir` holds stages or checkpoints made from something else.
        """
        resume_from_checkpoint = self.check_output_dir(resume_from_checkpoint)
        if self.args.needs_proxy:
            self._prepare_targets()
        if "distil" not in self.args.stages:
            return None
        # The student's run is the same whichever stages were run before it
        set_seed(self.args.seed)
        started = time.perf_counter()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._seconds = time.perf_counter() - started
        return output

    def _prepare_targets(self) -> None:
        stages, args = self.proxy_stages, self.args
        stages.train_proxy()
        is_live = args.target_source == "live"
        wants_store = "cache" in args.stages and (not is_live or args.sample_weighting != "none")
        if wants_store or args.target_store is not None:
            store = stages.store(self._whole_rows)
            self._weigh_rows(store)
            self.data_collator.stores = [] if is_live else [store]
        if is_live and "distil" in args.stages:
            self.live_proxy = stages.loaded_proxy()
        self.target_weights = [args.kl_weight]

    def _weigh_rows(self, store) -> None:
        """Equation 9, over all rows of the student."""
        keys, log_likelihoods, tokens = store.log_likelihoods()
        position = np.searchsorted(keys, np.array(self.train_dataset["row_key"]))
        found = row_weights(log_likelihoods[position], tokens[position], self.args.sample_weighting)
        self.row_weights = found
        if self.accelerator.is_main_process and self.args.sample_weighting != "none":
            logger.warning(
                f"Weights of {len(position):,} rows (equation 9): mean log-likelihood {found.mean:.3f}, standard deviation "
                f"{found.std:.3f}; correlation of weight and length {found.length_correlation:.2f}."
            )
        if "sample_weight" in self.train_dataset.column_names:
            self.train_dataset = self.train_dataset.remove_columns("sample_weight")
        self.train_dataset = self.train_dataset.add_column("sample_weight", found.weights.tolist())


def check_proxy(proxy: str | PreTrainedModel | None, student: str | PreTrainedModel, args: ProxyKDConfig) -> None:
    """
    Raises:
        [`~proxy_model.ProxyModelError`]: there is no proxy, it is the student, or an adapter that cannot be used.
    """
    if proxy is None:
        raise ProxyModelError(
            "Proxy-KD needs a proxy: set `proxy_model` to an open model with the student's tokenizer, larger than the "
            "student. (kl_weight=0.0 is plain SFT, which needs none.)"
        )
    same = proxy is student
    if isinstance(proxy, str) and isinstance(student, str):
        same = proxy == student or (Path(proxy).is_dir() and Path(proxy).resolve() == Path(student).resolve())
    if same:
        raise ProxyModelError(
            f"The proxy is the student ({student if isinstance(student, str) else 'one model object'}): there is nothing to "
            "learn from it that the student does not know. Set `proxy_model` to a larger model of the same family."
        )
    if not isinstance(proxy, str) and args.proxy_lora_kwargs is not None:
        raise ProxyModelError(
            "proxy_lora_kwargs needs a proxy on disk: its stages keep the adapter alone, and read the base model again. Hand in "
            "its path."
        )
    if isinstance(proxy, PeftModel) and not proxy.peft_config["default"].base_model_name_or_path:
        raise ProxyModelError(
            "The proxy is an adapter whose base model has no path, from which the next stage could read it. Save the base model, "
            "and hand in an adapter on its path."
        )
    if isinstance(proxy, str) and base_of_adapter(proxy) is not None and args.proxy_lora_kwargs is not None:
        raise ProxyModelError(
            f"The proxy {proxy} is a LoRA adapter already, which is trained further. Leave proxy_lora_kwargs out."
        )


def check_alignment(args: ProxyKDConfig, eval_dataset: Dataset | None) -> None:
    """
    Raises:
        ValueError: the alignment could not do what is asked of it, when its turn comes.
    """
    if args.proxy_lora_kwargs is not None:
        try:
            LoraConfig(**args.proxy_lora_kwargs)
        except TypeError as error:
            raise ValueError(f"proxy_lora_kwargs: {error}") from error
    if "align" not in args.stages:
        return
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        raise ValueError("use_vllm=True needs vLLM: pip install 'trl-bbkd[vllm]'.")
    if args.alignment_patience is not None and eval_dataset is None:
        raise ValueError("alignment_patience needs eval_dataset: agreement is measured on held-out rows.")
    if args.use_vllm and args.world_size > 1:
        raise ValueError("use_vllm=True samples in one process. Start one, or set it to False.")


def check_stage_rows(rows: StageRows, args: ProxyKDConfig) -> None:
    """
    Raises:
        [`~teacher_data.TeacherDataError`]: a stage that is to run has no rows, or fewer than rounds.
    """
    wanted = {"warmup": ("warmup", "warmup_share"), "align": ("align", "alignment_share"), "distil": ("distil", None)}
    for stage, (name, share) in wanted.items():
        is_run = stage in args.stages and (args.needs_proxy or stage == "distil")
        if not is_run or len(getattr(rows, name)):
            continue
        advice = (
            f"Raise {share}, or take '{stage}' out of stages." if share else "Lower warmup_share or alignment_share."
        )
        raise TeacherDataError(f"The stage '{stage}' has no rows (of {sum(map(len, rows))}). {advice}")
    if "align" in args.stages and args.needs_proxy and args.preference_weight > 0:
        if len(rows.align) < args.alignment_rounds:
            raise TeacherDataError(
                f"Round {len(rows.align) + 1} of {args.alignment_rounds} has an empty shard: alignment has {len(rows.align)} "
                "rows. Lower alignment_rounds, or raise alignment_share."
            )
    unused = {
        stage: len(getattr(rows, name))
        for stage, (name, _) in wanted.items()
        if stage not in args.stages and stage != "distil" and len(getattr(rows, name))
    }
    if unused and not args.distil_on_all_rows:
        left = " and ".join(f"{count:,} rows of '{stage}'" for stage, count in unused.items())
        logger.warning(f"{left} stay unused: distil_on_all_rows=True, or shares of 0, give them to the student.")


def check_lengths(rows: Dataset, context: int | None) -> None:
    """
    Raises:
        [`~teacher_data.TeacherDataError`]: a row is longer than the context of student and proxy.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = int(np.argmax(lengths))
    if context is not None and lengths[longest] > context:
        raise TeacherDataError(
            f"Row {longest} has {lengths[longest]} tokens, prompt and answer, but the context that student and proxy share is "
            f"{context} tokens. Lower `max_completion_length`, or drop rows with `max_prompt_length`."
        )


def _proxy_path(proxy: str | PreTrainedModel) -> str:
    return proxy if isinstance(proxy, str) else proxy.config._name_or_path


def _proxy_config(proxy: str | PreTrainedModel, hub_kwargs: dict):
    if not isinstance(proxy, str):
        return proxy.config
    return AutoConfig.from_pretrained(base_of_adapter(proxy) or proxy, **hub_kwargs)


def _proxy_tokenizer(proxy: str | PreTrainedModel, hub_kwargs: dict) -> PreTrainedTokenizerBase | None:
    """The proxy's tokenizer; `None` for a model made in memory, which has none."""
    path = _proxy_path(proxy)
    if not path:
        return None
    has_own = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(path if has_own else base_of_adapter(path) or path, **hub_kwargs)


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
