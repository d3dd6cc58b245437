"""The stages of a proxy before the student's training: each in a folder of its own, each run once."""

import gc
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..errors import TargetStoreError
from ..host._compat import beside_another_trainer, keep_4bit_weights_differentiable, whole_models
from ..host.model_files import load_model, save_model
from ..host.model_paths import base_of_adapter, checkpoint_fingerprint
from ..host.preflight import refuse_no_steps
from ..host.resume import checkpoints, last_finished_checkpoint, refuse_other_engine
from ..host.sharding import check_sharding
from ..seqkd.trainer import SHARED_ARGUMENTS, sft_rows
from ..soft_targets.caching import model_fingerprint, rows_fingerprint, tokenizer_fingerprint
from ..soft_targets.head import check_head
from ..soft_targets.rows import soft_target_rows
from ..soft_targets.store import TargetStore, check_description, read_description
from .agreement import teacher_agreement
from .config import ProxyConfig
from .stage_folder import begin_stage, finish_stage, finished_stage


logger = logging.getLogger(__name__)

PROXY_FOLDER = "proxy"
# Of the student's configuration, what the proxy trains with as well
PROXY_ARGUMENTS = (
    *(name for name in SHARED_ARGUMENTS if name not in ("model_init_kwargs", "warmup_steps")),
    "hub_private_repo",
    "max_grad_norm",
    "per_device_eval_batch_size",
    "project",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
)


# Of those, what decides which weights come out
DECISIVE_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "fp16",
    "max_grad_norm",
    "optim",
    "optim_args",
    "seed",
    "weight_decay",
)


class ProxyStages:
    """
    Runs the proxy's stages, each in a folder of its own below `output_dir/proxy`. A stage that is finished is not run
    again; one that was stopped goes on where it was.

    A method's own stages are a subclass; it names all of them in `labels`.

    Args:
        proxy (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The proxy.
        args ([`~config.ProxyConfig`]):
            Configuration.
        rows (`NamedTuple`):
            Teacher rows with `teacher_ids`, per stage: `warmup` among them.
        held_out ([`~datasets.Dataset`], *optional*):
            Held-out teacher rows with `teacher_ids`, on which agreement with the teacher is measured.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of student and proxy.
        vocab_size (`int`):
            Rows of the student's output layer.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
    """

    labels = {"warmup": "proxy warm-up"}

    def __init__(
        self,
        proxy: str | PreTrainedModel | PeftModel,
        args: ProxyConfig,
        rows: Any,
        held_out: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        accelerator: Accelerator,
    ):
        self.args, self.rows, self.tokenizer = args, rows, tokenizer
        self.vocab_size, self.accelerator = vocab_size, accelerator
        self.folder = Path(args.output_dir) / PROXY_FOLDER
        self.held_out = held_out
        self._handed_in = proxy
        # What a stage that was finished here was made from: a proxy in memory has learned since
        self._made_from: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Go through the stages from the first one, with the proxy that was handed in."""
        self.proxy = self._handed_in
        self.reports: list[dict] = []
        self.log_history: list[dict] = []

    def train_proxy(self) -> None:
        """Warm the proxy up. From then on `proxy` is the path of the trained one."""
        if "warmup" in self.args.stages and len(self.rows.warmup):
            self._run("warmup", self.rows.warmup, self._warm_up, self._warmup_settings())

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
        proxy = self._made_from.get(stage) or self._proxy_fingerprint()
        fingerprint = {"proxy": proxy, "rows": rows_fingerprint(list(keys)), **settings}
        report = finished_stage(folder, fingerprint)
        if report is None:
            if self.accelerator.is_main_process:
                begin_stage(folder, fingerprint)
            started = time.perf_counter()
            metrics, log = train(rows, folder)
            report = {
                "stage": self.labels[stage],
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
            logger.warning(f"{self.labels[stage]}: finished before, in {folder}; not run again.")
        self._made_from[stage] = proxy
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

    def _fine_tune(
        self, rows: Dataset, folder: Path, learning_rate: float, epochs: float, metrics: list[dict]
    ) -> tuple[list[dict], list[dict]]:
        with beside_another_trainer():
            log_history = self._trained(rows, folder, learning_rate, epochs)
        release_memory()
        if self.held_out is not None:
            metrics.append({"at": "after", **self._agreement(self._in_memory(path=str(folder)))})
        return metrics, log_history

    def _trained(self, rows: Dataset, folder: Path, learning_rate: float, epochs: float) -> list[dict]:
        args = SFTConfig(
            output_dir=str(folder),
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            max_length=None,
            run_name=self._run_name(folder),
            **self._proxy_arguments(),
        )
        check_sharding(args)
        trainer = SFTTrainer(
            model=self._trainable_proxy(),
            args=args,
            train_dataset=sft_rows(rows, self.tokenizer, self.args.chat_template_kwargs),
            processing_class=self.tokenizer,
            peft_config=self._new_adapter(),
        )
        if trainer.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(trainer.model)
        checkpoint = last_finished_checkpoint(folder)
        if checkpoint is not None:
            refuse_other_engine(checkpoint, trainer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        refuse_no_steps(trainer.state.global_step, "The proxy's training")
        # Of a model in parts, on every process
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if args.should_save:
            save_model(trainer.accelerator.unwrap_model(trainer.model), self.tokenizer, folder, weights)
        trainer.accelerator.wait_for_everyone()
        return trainer.state.log_history

    # What they share

    def _held_out_rows(self) -> list[dict]:
        return soft_target_rows(self.held_out, self.tokenizer, self.args.chat_template_kwargs).to_list()

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _agreement(self, proxy: PreTrainedModel | PeftModel) -> dict[str, float]:
        batch_size = self.args.per_device_eval_batch_size
        return teacher_agreement(proxy, self._held_out_rows(), self.accelerator, batch_size, self._pad_id)

    def _in_memory(self, dtype: str = "float32", path: str | None = None) -> PreTrainedModel | PeftModel:
        """
        The proxy, or what it is in a folder, in evaluation mode; loaded, if it is on disk, whole on every process. Of a
        model that was handed in, the weights stay.
        """
        proxy = path or self.proxy
        if isinstance(proxy, str):
            with whole_models():
                proxy = load_model(proxy, **self._init_kwargs(dtype))
        proxy = proxy.to(self.accelerator.device).eval()
        check_head(proxy)
        return proxy

    def _trainable_proxy(self) -> str | PreTrainedModel | PeftModel:
        if isinstance(self.proxy, str) and self._is_adapter:
            return load_model(self.proxy, trainable=True, **self._init_kwargs())
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

    def _run_name(self, folder: Path) -> str | None:
        """That of a stage in experiment trackers, where the student's has a name: they are no one training."""
        return None if self.args.run_name is None else f"{self.args.run_name}-{folder.name}"

    def _init_kwargs(self, dtype: str = "float32") -> dict:
        return {"dtype": dtype, "trust_remote_code": self.args.trust_remote_code} | dict(
            self.args.proxy_model_init_kwargs or {}
        )

    def _proxy_fingerprint(self) -> str:
        if isinstance(self.proxy, str):
            return checkpoint_fingerprint(self.proxy, (self.args.proxy_model_init_kwargs or {}).get("revision"))
        return model_fingerprint(self.proxy)

    def _targets_fingerprint(self, rows: Dataset) -> dict[str, str]:
        """What the soft targets of `rows` depend on, the proxy aside."""
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            # Rows of the same tokens are stored once
            "rows": rows_fingerprint(list(set(rows["row_key"]))),
            "vocab_size": str(self.vocab_size),
            "dtype": str(self._init_kwargs(self._frozen_dtype)["dtype"]),
        }

    def _warmup_settings(self) -> dict:
        return self._settings("proxy_learning_rate", "proxy_warmup_epochs")

    def _settings(self, *names: str) -> dict:
        shared = (
            "proxy_model_init_kwargs",
            "proxy_lora_kwargs",
            "proxy_lr_scheduler_type",
            "max_completion_length",
            *DECISIVE_ARGUMENTS,
        )
        settings = {name: getattr(self.args, name) for name in (*names, *shared)}
        arguments = self._proxy_arguments()
        batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        return settings | {"rows per step": batch * self.accelerator.num_processes}

    def _handed_in_store(
        self, folder: Path, rows: Dataset, k: int, stage: str, settings: dict[str, str] | None = None
    ) -> TargetStore:
        """A store that another run made: of these rows, this vocabulary, these settings and, if there is one, this proxy."""
        found = read_description(folder)["fingerprint"]
        expected = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "vocab_size": str(self.vocab_size)}
        expected |= settings or {}
        check_description(folder, k, found | expected)
        if self.proxy is not None and "proxy" in found and found["proxy"] != self._proxy_fingerprint():
            raise TargetStoreError(
                f"The soft targets in {folder} are another proxy's than {self.proxy}. Hand in the proxy that made them, or none: "
                "leave proxy_model out."
            )
        store = TargetStore(folder)
        missing = sum(key not in store for key in rows["row_key"])
        if missing:
            raise TargetStoreError(
                f"{missing:,} of the student's {len(rows):,} rows have no targets in {folder}. Make a store of these rows: "
                f"leave target_store out, and put {stage!r} into stages."
            )
        return store


def store_metrics(*stores: TargetStore) -> dict[str, float]:
    """Size of the stores of one set of rows: tokens, and bytes a token."""
    size = sum(file.stat().st_size for store in stores for file in store.folder.glob("part-*"))
    return {"tokens": stores[0].num_tokens, "bytes_per_token": size / max(stores[0].num_tokens, 1)}


def release_memory() -> None:
    """Give back what a stage's models took."""
    gc.collect()
    torch.cuda.empty_cache()
