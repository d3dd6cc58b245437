"""The stages before the student's: warm-up of the proxy, its alignment, and its soft targets on disk."""

import gc
import logging
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .._compat import keep_4bit_weights_differentiable
from ..resume import checkpoints, last_finished_checkpoint
from ..seqkd import SHARED_ARGUMENTS, sft_rows
from ..soft_targets.caching import (
    model_fingerprint,
    rows_fingerprint,
    store_targets,
    tokenizer_fingerprint,
)
from ..soft_targets.head import check_head
from ..soft_targets.rows import soft_target_rows
from ..soft_targets.store import TargetStore, TargetStoreError, check_description, read_description
from .agreement import teacher_agreement
from .alignment_config import ProxyAlignmentConfig
from .alignment_trainer import ProxyAlignmentTrainer
from .proxy_model import base_of_adapter, checkpoint_fingerprint, load_proxy, save_proxy
from .proxykd_config import ProxyKDConfig
from .splits import StageRows
from .stage import begin_stage, finish_stage, finished_stage


logger = logging.getLogger(__name__)

PROXY_FOLDER = "proxy"
# Of the student's configuration, what the proxy trains with as well
PROXY_ARGUMENTS = (
    *(name for name in SHARED_ARGUMENTS if name not in ("model_init_kwargs", "warmup_steps")),
    "max_grad_norm",
    "per_device_eval_batch_size",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)
STAGE_LABELS = {"warmup": "proxy warm-up", "align": "proxy alignment", "cache": "soft targets"}


class ProxyStages:
    """
    Runs the proxy's stages, each in a folder of its own below `output_dir/proxy`. A stage that is finished is not run
    again; one that was stopped goes on where it was.

    Args:
        proxy (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The proxy.
        args ([`ProxyKDConfig`]):
            Configuration.
        rows ([`~splits.StageRows`]):
            Teacher rows with `teacher_ids`, per stage.
        held_out ([`~datasets.Dataset`], *optional*):
            Held-out teacher rows with `teacher_ids`, on which agreement with the teacher is measured.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of student and proxy.
        vocab_size (`int`):
            Rows of the student's output layer.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
    """

    def __init__(
        self,
        proxy: str | PreTrainedModel | PeftModel,
        args: ProxyKDConfig,
        rows: StageRows,
        held_out: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        accelerator: Accelerator,
    ):
        self.proxy, self.args, self.rows, self.tokenizer = proxy, args, rows, tokenizer
        self.vocab_size, self.accelerator = vocab_size, accelerator
        self.folder = Path(args.output_dir) / PROXY_FOLDER
        self.held_out = held_out
        self.reports: list[dict] = []
        self.log_history: list[dict] = []

    def train_proxy(self) -> None:
        """Warm the proxy up and align it. From then on `proxy` is the path of the trained one."""
        if "warmup" in self.args.stages and len(self.rows.warmup):
            self._run("warmup", self.rows.warmup, self._warm_up, self._warmup_settings())
        if "align" in self.args.stages and len(self.rows.align):
            self._run("align", self.rows.align, self._align, self._alignment_settings())

    def store(self, rows: Dataset) -> TargetStore:
        """
        Compute the soft targets of the student's rows, or take the store that was handed in.

        Args:
            rows ([`~datasets.Dataset`]):
                Rows with `input_ids`, `labels` and `row_key`.

        Raises:
            [`~soft_targets.store.TargetStoreError`]: the store is another proxy's, of other rows or of another k.
        """
        k = self.args.target_top_k if self.args.target_source == "cache" else 0
        if self.args.target_store is not None:
            return self._handed_in_store(rows, k)
        folder = self.folder / ("targets" if k else "likelihoods")
        fingerprint = {
            "proxy": self._proxy_fingerprint(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "rows": rows_fingerprint(list(rows["row_key"])),
            "vocab_size": str(self.vocab_size),
            "dtype": str(self._init_kwargs(self._frozen_dtype)["dtype"]),
        }
        started = time.perf_counter()
        if finished_stage(folder, fingerprint | {"k": k}) is not None:
            check_description(folder, k, fingerprint)
            return self._reported(TargetStore(folder), folder, fingerprint, k, None)
        proxy = self.loaded_proxy()
        store = store_targets(
            folder,
            proxy,
            rows,
            k=k,
            vocab_size=self.vocab_size,
            fingerprint=fingerprint,
            batch_size=self.args.per_device_eval_batch_size,
            pad_id=self.tokenizer.pad_token_id or 0,
        )
        del proxy
        release_memory()
        return self._reported(store, folder, fingerprint, k, time.perf_counter() - started)

    def loaded_proxy(self) -> PreTrainedModel | PeftModel:
        """The proxy as it is, in memory, frozen; in bfloat16 where the run computes in it."""
        return self._in_memory(self._frozen_dtype).requires_grad_(False)

    @property
    def _frozen_dtype(self) -> str:
        return "bfloat16" if self.args.bf16 else "float32"

    # Stages

    def _run(self, stage: str, rows: Dataset, train, settings: dict) -> None:
        folder = self.folder / stage
        keys = soft_target_rows(rows, self.tokenizer, self.args.chat_template_kwargs)["row_key"]
        fingerprint = {"proxy": self._proxy_fingerprint(), "rows": rows_fingerprint(list(keys)), **settings}
        report = finished_stage(folder, fingerprint)
        if report is None:
            if self.accelerator.is_main_process:
                begin_stage(folder, fingerprint)
            started = time.perf_counter()
            metrics, log = train(rows, folder)
            report = {
                "stage": STAGE_LABELS[stage],
                "rows": len(rows),
                "seconds": time.perf_counter() - started,
                "metrics": metrics,
                "log_history": log,
            }
            release_memory()
            if self.accelerator.is_main_process:
                finish_stage(folder, fingerprint, report)
                for checkpoint in checkpoints(folder):
                    shutil.rmtree(checkpoint)
            self.accelerator.wait_for_everyone()
        elif self.accelerator.is_main_process:
            logger.warning(f"{STAGE_LABELS[stage]}: finished before, in {folder}; not run again.")
        # As it is read back by a run that goes on
        self.log_history += [{**line, "stage": stage} for line in report["log_history"]]
        self.reports.append({key: value for key, value in report.items() if key != "log_history"})
        self.proxy = str(folder)

    def _warm_up(self, rows: Dataset, folder: Path) -> tuple[list[dict], list[dict]]:
        metrics = []
        if self.held_out is not None:
            metrics.append({"at": "before", **self._agreement(self._in_memory())})
        learning_rate, epochs = self.args.proxy_learning_rate, self.args.proxy_warmup_epochs
        return self._fine_tune(rows, folder, learning_rate, epochs, metrics)

    def _align(self, rows: Dataset, folder: Path) -> tuple[list[dict], list[dict]]:
        args = self.args
        learning_rate = args.alignment_learning_rate or args.proxy_learning_rate
        if args.preference_weight == 0:
            return self._fine_tune(rows, folder, learning_rate, args.alignment_epochs, [])
        trainer = ProxyAlignmentTrainer(
            model=self._trainable_proxy(),
            args=ProxyAlignmentConfig(
                output_dir=str(folder),
                learning_rate=learning_rate,
                num_rounds=args.alignment_rounds,
                num_train_epochs=args.alignment_epochs,
                beta=args.alignment_beta,
                alignment_patience=args.alignment_patience,
                preference_weight=args.preference_weight,
                max_completion_length=args.max_completion_length,
                chat_template_kwargs=args.chat_template_kwargs,
                sample_temperature=args.sample_temperature,
                sample_top_p=args.sample_top_p,
                sample_batch_size=args.per_device_eval_batch_size,
                use_vllm=args.use_vllm,
                vllm_kwargs=args.vllm_kwargs,
                log_completions=args.log_completions,
                **self._proxy_arguments(),
            ),
            train_dataset=rows,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            peft_config=self._new_adapter(),
        )
        trainer.train()
        metrics = [
            {"at": f"round {entry['round']}" if entry["round"] else "before"}
            | {key: entry[key] for key in ("top1_agreement", "nll") if key in entry}
            for entry in trainer.rounds
        ]
        return metrics, trainer.log_history

    def _fine_tune(
        self, rows: Dataset, folder: Path, learning_rate: float, epochs: float, metrics: list[dict]
    ) -> tuple[list[dict], list[dict]]:
        trainer = SFTTrainer(
            model=self._trainable_proxy(),
            args=SFTConfig(
                output_dir=str(folder),
                learning_rate=learning_rate,
                num_train_epochs=epochs,
                max_length=None,
                **self._proxy_arguments(),
            ),
            train_dataset=sft_rows(rows, self.tokenizer, self.args.chat_template_kwargs),
            processing_class=self.tokenizer,
            peft_config=self._new_adapter(),
        )
        if trainer.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(trainer.model)
        checkpoint = last_finished_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        proxy = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.args.should_save:
            save_proxy(proxy, self.tokenizer, folder)
        trainer.accelerator.wait_for_everyone()
        if self.held_out is not None:
            metrics.append({"at": "after", **self._agreement(proxy)})
        return metrics, trainer.state.log_history

    # What they share

    def _agreement(self, proxy: PreTrainedModel | PeftModel) -> dict[str, float]:
        rows = soft_target_rows(self.held_out, self.tokenizer, self.args.chat_template_kwargs).to_list()
        batch_size, pad_id = self.args.per_device_eval_batch_size, self.tokenizer.pad_token_id or 0
        return teacher_agreement(proxy, rows, self.accelerator, batch_size, pad_id)

    def _in_memory(self, dtype: str = "float32") -> PreTrainedModel | PeftModel:
        """The proxy, loaded if it is on disk; what was handed in as a model stays as it is."""
        proxy = load_proxy(self.proxy, **self._init_kwargs(dtype)) if isinstance(self.proxy, str) else self.proxy
        proxy = proxy.to(self.accelerator.device).eval()
        check_head(proxy)
        return proxy

    def _trainable_proxy(self) -> str | PreTrainedModel | PeftModel:
        if isinstance(self.proxy, str) and self._is_adapter:
            return load_proxy(self.proxy, trainable=True, **self._init_kwargs())
        return self.proxy

    @property
    def _is_adapter(self) -> bool:
        return isinstance(self.proxy, PeftModel) or (
            isinstance(self.proxy, str) and base_of_adapter(self.proxy) is not None
        )

    def _new_adapter(self) -> LoraConfig | None:
        """The adapter to put on the proxy, if it is to have one and does not yet."""
        if self.args.proxy_lora_kwargs is None or self._is_adapter:
            return None
        return LoraConfig(**{"task_type": "CAUSAL_LM", **self.args.proxy_lora_kwargs})

    def _proxy_arguments(self) -> dict:
        args = self.args
        return {name: getattr(args, name) for name in PROXY_ARGUMENTS} | {
            "lr_scheduler_type": args.proxy_lr_scheduler_type,
            "model_init_kwargs": self._init_kwargs() if isinstance(self.proxy, str) and not self._is_adapter else None,
            "per_device_train_batch_size": args.proxy_per_device_train_batch_size or args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.proxy_gradient_accumulation_steps or args.gradient_accumulation_steps,
        }

    def _init_kwargs(self, dtype: str = "float32") -> dict:
        return {"dtype": dtype, "trust_remote_code": self.args.trust_remote_code} | dict(
            self.args.proxy_model_init_kwargs or {}
        )

    def _proxy_fingerprint(self) -> str:
        if isinstance(self.proxy, str):
            return checkpoint_fingerprint(self.proxy, (self.args.proxy_model_init_kwargs or {}).get("revision"))
        return model_fingerprint(self.proxy)

    def _warmup_settings(self) -> dict:
        return self._settings("proxy_learning_rate", "proxy_warmup_epochs")

    def _alignment_settings(self) -> dict:
        names = ("alignment_rounds", "alignment_epochs", "alignment_learning_rate", "alignment_beta")
        samples = ("preference_weight", "sample_temperature", "sample_top_p", "alignment_patience")
        return self._settings("proxy_learning_rate", *names, *samples)

    def _settings(self, *names: str) -> dict:
        shared = (
            "proxy_model_init_kwargs",
            "proxy_lora_kwargs",
            "proxy_lr_scheduler_type",
            "max_completion_length",
            "seed",
        )
        settings = {name: getattr(self.args, name) for name in (*names, *shared)}
        arguments = self._proxy_arguments()
        batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        return settings | {"rows per step": batch * self.accelerator.num_processes}

    def _handed_in_store(self, rows: Dataset, k: int) -> TargetStore:
        folder = Path(self.args.target_store)
        found = read_description(folder)["fingerprint"]
        expected = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "vocab_size": str(self.vocab_size)}
        check_description(folder, k, found | expected)
        if self.proxy is not None and found["proxy"] != self._proxy_fingerprint():
            raise TargetStoreError(
                f"The soft targets in {folder} are another proxy's than {self.proxy}. Hand in the proxy that made them, or none: "
                "leave proxy_model out."
            )
        store = TargetStore(folder)
        missing = sum(key not in store for key in rows["row_key"])
        if missing:
            raise TargetStoreError(
                f"{missing:,} of the student's {len(rows):,} rows have no targets in {folder}. Make a store of these rows: "
                "leave target_store out, and put 'cache' into stages."
            )
        return store

    def _reported(self, store: TargetStore, folder: Path, fingerprint: dict, k: int, seconds: float | None):
        """Mark the store as finished, if it was made just now, and report it."""
        if seconds is not None and self.accelerator.is_main_process:
            finish_stage(folder, fingerprint | {"k": k}, {"rows": len(store), "seconds": seconds})
        self.accelerator.wait_for_everyone()
        report = finished_stage(folder, fingerprint | {"k": k})
        size = sum(file.stat().st_size for file in folder.glob("part-*"))
        metrics = [{"tokens": store.num_tokens, "bytes_per_token": size / max(store.num_tokens, 1)}]
        self.reports.append({"stage": STAGE_LABELS["cache"], **report, "metrics": metrics})
        return store


def release_memory() -> None:
    """Give back what a stage's models took."""
    gc.collect()
    torch.cuda.empty_cache()
