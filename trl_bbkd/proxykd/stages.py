"""The stages before the student's: warm-up of the proxy, its alignment, and its soft targets on disk."""

import time
from pathlib import Path

from datasets import Dataset

from ..host._compat import beside_another_trainer
from ..host.sharding import is_sharded
from ..proxy.stage_folder import finish_stage, finished_stage
from ..proxy.stages import ProxyStages, release_memory, store_metrics
from ..soft_targets.caching import store_targets
from ..soft_targets.store import TargetStore, check_description
from .alignment_config import ProxyAlignmentConfig
from .alignment_trainer import ProxyAlignmentTrainer
from .config import ProxyKDConfig
from .stage_rows import StageRows


class ProxyKDStages(ProxyStages):
    """The stages of Proxy-KD: see [`~proxy.stages.ProxyStages`] for arguments and how they are run."""

    labels = ProxyStages.labels | {"align": "proxy alignment", "cache": "soft targets"}

    args: ProxyKDConfig
    rows: StageRows

    def train_proxy(self) -> None:
        """Warm the proxy up and align it. From then on `proxy` is the path of the trained one."""
        super().train_proxy()
        if "align" in self.args.stages and len(self.rows.align):
            self._run("align", self.rows.align, self._align, self._alignment_settings())

    def store(self, rows: Dataset) -> TargetStore:
        """
        Compute the soft targets of the student's rows, or take the store that was handed in.

        Args:
            rows ([`~datasets.Dataset`]):
                Rows with `input_ids`, `labels` and `row_key`.

        Raises:
            [`~errors.TargetStoreError`]: the store is another proxy's, of other rows or of another k.
        """
        k = self.args.target_top_k if self.args.target_source == "cache" else 0
        if self.args.target_store is not None:
            return self._handed_in_store(Path(self.args.target_store), rows, k, "cache")
        folder = self.folder / ("targets" if k else "likelihoods")
        fingerprint = {"proxy": self._proxy_fingerprint(), **self._targets_fingerprint(rows)}
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
            pad_id=self._pad_id,
        )
        del proxy
        release_memory()
        return self._reported(store, folder, fingerprint, k, time.perf_counter() - started)

    def _align(self, rows: Dataset, folder: Path) -> tuple[list[dict], list[dict]]:
        args = self.args
        learning_rate = args.alignment_learning_rate or args.proxy_learning_rate
        if args.preference_weight == 0:
            return self._fine_tune(rows, folder, learning_rate, args.alignment_epochs, [])
        with beside_another_trainer():
            return self._aligned(rows, folder, learning_rate)

    def _aligned(self, rows: Dataset, folder: Path, learning_rate: float) -> tuple[list[dict], list[dict]]:
        args = self.args
        arguments = self._proxy_arguments()
        if is_sharded(args):
            # An adapter is loaded again for each round
            arguments["model_init_kwargs"] = self._init_kwargs()
        trainer = ProxyAlignmentTrainer(
            model=self._trainable_proxy(),
            args=ProxyAlignmentConfig(
                output_dir=str(folder),
                run_name=self._run_name(folder),
                learning_rate=learning_rate,
                num_rounds=args.alignment_rounds,
                num_train_epochs=args.alignment_epochs,
                beta=args.alignment_beta,
                alignment_patience=args.alignment_patience,
                preference_weight=args.preference_weight,
                max_completion_length=args.max_completion_length,
                chat_template_kwargs=args.chat_template_kwargs,
                reasoning=args.reasoning,
                sample_temperature=args.sample_temperature,
                sample_top_p=args.sample_top_p,
                sample_batch_size=args.per_device_eval_batch_size,
                use_vllm=args.use_vllm,
                vllm_kwargs=args.vllm_kwargs,
                log_completions=args.log_completions,
                **arguments,
            ),
            train_dataset=rows,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            peft_config=self._new_adapter(),
        )
        trainer.train()
        metrics = [
            {"at": f"round {entry['round']}" if entry["round"] else "before"}
            | {key: entry[key] for key in ("top1_agreement", "top1_agreement_se", "nll") if key in entry}
            for entry in trainer.rounds
        ]
        return metrics, trainer.log_history

    def _alignment_settings(self) -> dict:
        names = ("alignment_rounds", "alignment_epochs", "alignment_learning_rate", "alignment_beta")
        samples = ("preference_weight", "sample_temperature", "sample_top_p", "alignment_patience")
        return self._settings("proxy_learning_rate", *names, *samples)

    def _reported(self, store: TargetStore, folder: Path, fingerprint: dict, k: int, seconds: float | None):
        """Mark the store as finished, if it was made just now, and report it."""
        if seconds is not None and self.accelerator.is_main_process:
            finish_stage(folder, fingerprint | {"k": k}, {"rows": len(store), "seconds": seconds})
        self.accelerator.wait_for_everyone()
        report = finished_stage(folder, fingerprint | {"k": k})
        self.reports.append({"stage": self.labels["cache"], **report, "metrics": [store_metrics(store)]})
        return store
